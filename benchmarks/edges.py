"""Show that tiles, blocks and workers leave no trace in a sorting.

    python benchmarks/edges.py --out edges.json

Two parts. *Edges*: recordings are sorted with short batches, so that many true spikes lie within 3 ms of a tile's edge,
and misses and extra spikes there are counted against those elsewhere. *Identity*: one recording is sorted with 1, 3 and
10 batches per block in a plain loop, and on 1 and 2 workers, and every array of the results is compared byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import recordings
from scenarios import SCENARIOS

from ks4stream import Recording, Settings, Sorting, load_probe, open_recording, sort
from ks4stream.engine.cluster import local_client
from ks4stream.scoring import EdgeRates, score

WANTED_NEAR = 1000  # true spikes near an edge, at least
BLOCKS = (1, 3, 10)  # batches per block
WORKERS = (1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both parts, print, and fail if the results are not identical or spikes go missing at edges."""
    options = _options(arguments)
    found: dict[str, Any] = {"machine": outcome.machine(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.recordings or Path(scratch)
        identical = worse = False
        if "edges" in options.parts:
            found["edges"], worse = compare_edges(options, folder)
        if "identity" in options.parts:
            found["identity"], identical = compare_bytes(options, folder)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, default=str))
    if worse or ("identity" in options.parts and not identical):
        sys.exit(1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("edges", "identity"), default=("edges", "identity"))
    parser.add_argument("--scenario", choices=SCENARIOS, default="static")
    parser.add_argument("--seeds", type=int, nargs="+", default=[401, 402, 403, 404], help="recordings for the edges")
    parser.add_argument("--seconds", type=float, default=None, help="of each; the scenario's own length by default")
    parser.add_argument("--identity-seconds", type=float, default=60.0, help="of the first seed's recording")
    parser.add_argument("--batch-size", type=int, default=6000)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting")
    parser.add_argument("--recordings", type=Path, help="folder where recordings are made, or found; they are kept")
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    return parser.parse_args(arguments)


def _open(binary: Path) -> Recording:
    probe = binary.with_suffix(".probe.json")
    n_channels = json.loads(probe.read_text())["n_chan"]
    return open_recording(binary, n_chan=n_channels, fs=30_000.0, dtype="int16", probe=load_probe(probe))


def compare_edges(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Misses and extra spikes near edges and elsewhere, summed over recordings; whether there are more near edges."""
    settings = Settings.from_dict({"batch_size": options.batch_size, **outcome.parse_settings(options.set)})
    rates: dict[str, list[EdgeRates]] = {"misses": [], "extra spikes": []}
    for seed in options.seeds:
        binary, truth = recordings.make(options.scenario, seed, folder, seconds=options.seconds)
        sorting = sort(_open(binary), settings)
        held = score(
            truth["spike_samples"],
            truth["spike_units"],
            sorting.sample[sorting.kept],
            sorting.unit[sorting.kept],
            sampling_rate_hz=sorting.sampling_rate_hz,
            edge_period_samples=options.batch_size,
        )
        assert held.misses is not None and held.extras is not None
        rates["misses"].append(held.misses)
        rates["extra spikes"].append(held.extras)
        _say(f"{binary.stem}: {held.summary['n_well_detected']} of {held.summary['n_truth']} units well detected")
        _say(f"{binary.stem}: misses {held.misses}")
        if not options.recordings:
            binary.unlink()
    summed = {name: _sum(parts) for name, parts in rates.items()}
    for name, total in summed.items():
        print(f"{name}: {total}")
        for where, interval in (("near edges", total.near_interval), ("elsewhere", total.far_interval)):
            print(f"    {where}: 95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f} %")
    n_near = summed["misses"].n_near
    print(f"{n_near} spikes of found units near edges" + ("" if n_near >= WANTED_NEAR else f": wanted {WANTED_NEAR}"))
    worse = any(total.difference_interval[0] > 0 for total in summed.values())
    print("More frequent near edges." if worse else "Neither is more frequent near edges.")
    return {name: asdict(total) for name, total in summed.items()}, worse


def _sum(parts: Sequence[EdgeRates]) -> EdgeRates:
    return EdgeRates(*(sum(getattr(part, spec.name) for part in parts) for spec in fields(EdgeRates)))


def compare_bytes(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Digests of all arrays of all runs; whether all runs agree."""
    binary, _ = recordings.make(options.scenario, options.seeds[0], folder, seconds=options.seconds)
    asked = {"batch_size": options.batch_size, "tmax": options.identity_seconds}
    settings = Settings.from_dict(asked | outcome.parse_settings(options.set))
    runs: dict[str, dict[str, str]] = {}
    for label, sorting in _runs(_open(binary), settings):
        runs[label] = dict(digests(sorting))
        print(f"{label:<22} {sorting.n_spikes} spikes, {sorting.n_units} units, {_joined(runs[label])[:16]}")
    different = sorted({name for run in runs.values() for name, digest in run.items() if digest != first(runs)[name]})
    print(f"{len(first(runs))} arrays, " + (f"different: {', '.join(different)}" if different else "identical bytes"))
    return {"runs": runs, "different": different}, not different


def first(runs: dict[str, dict[str, str]]) -> dict[str, str]:
    """The run the others are held against."""
    return next(iter(runs.values()))


def _runs(recording: Recording, settings: Settings) -> Iterator[tuple[str, Sorting]]:
    for batches in BLOCKS:
        yield f"loop, blocks of {batches}", sort(recording, settings, client="loop", block_batches=batches)
    for count in WORKERS:
        with local_client(n_workers=count, processes=count > 1) as client:
            yield f"workers: {count}", sort(recording, settings, client=client)


def digests(result: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Digest of every array a result holds, those of results within it included."""
    for spec in fields(result):
        value = getattr(result, spec.name)
        if isinstance(value, np.ndarray):
            yield prefix + spec.name, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        elif spec.name in ("whitening", "waveforms", "drift", "peaks") and value is not None:
            yield from digests(value, f"{spec.name}.")


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
