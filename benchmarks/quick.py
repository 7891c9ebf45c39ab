"""Sort recordings with known spikes in this process and print one line for each.

    python benchmarks/quick.py static-1.bin hybrid-2.bin [Th_universal=7 nblocks=0 …] [--per-unit] [--keep DIR]

A recording is what scenarios.py leaves: ``NAME.bin``, ``NAME.probe.json`` and ``NAME.truth.npz``; the ending may be
left out. Nothing is written unless asked for, and no worker is started.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import outcome

from ks4stream import Settings, load_probe, open_recording, sort
from ks4stream.scoring import Score, score

VERY_WELL_DETECTED_SCORE = 0.95


def main(arguments: list[str] | None = None) -> None:
    """Sort and score each recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="+", help="recordings, and settings as NAME=VALUE (value as in JSON)")
    parser.add_argument("--per-unit", action="store_true", help="also print a line for each true unit")
    parser.add_argument("--stages", action="store_true", help="also print the seconds of each stage")
    parser.add_argument("--keep", type=Path, help="folder for the results of the sorts, which can then be resumed")
    parser.add_argument("--device", default=None)
    options = parser.parse_args(arguments)
    pairs = [text for text in options.given if "=" in text]
    settings = outcome.parse_settings(pairs)
    for text in options.given:
        if text not in pairs:
            binary = as_binary(Path(text))
            keep = options.keep and options.keep / binary.stem
            print(one_line(binary, settings, keep, options.device, options.per_unit, options.stages), flush=True)


def one_line(
    binary: Path,
    settings: dict[str, Any],
    keep: Path | None = None,
    device: str | None = None,
    per_unit: bool = False,
    stages: bool = False,
) -> str:
    """Sort one recording; return its line, and more of them if asked for."""
    truth = read_truth(binary)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sorting = sort(
            opened(binary, truth), Settings.from_dict(settings), results_dir=keep, client="loop", device=device
        )
    took_s = time.perf_counter() - began
    spikes = sorting.sample[sorting.kept], sorting.unit[sorting.kept]
    found = score_of(truth, *spikes)
    lines = [f"{describe(binary.stem, summary_of(truth, *spikes))} {took_s:6.1f} s"]
    if stages:
        lines.append(" ".join(f"{stage} {seconds:.1f}" for stage, seconds in sorting.seconds.items()))
    if per_unit:
        lines.append(found.table(amplitude_uv=truth["unit_amplitude_uv"]))
    return "\n".join(lines)


def as_binary(path: Path) -> Path:
    """The file of traces, whose ending may be left out."""
    return path if path.suffix == ".bin" else path.with_name(f"{path.name}.bin")


def opened(binary: Path, truth: dict[str, np.ndarray]) -> Any:
    """The recording in a file, without its bad channels."""
    path = binary.with_suffix(".probe.json")
    probe = load_probe(path).drop_channels(truth["bad_channels"].tolist())
    n_channels = json.loads(path.read_text())["n_chan"]
    return open_recording(binary, n_chan=n_channels, fs=float(truth["sampling_rate_hz"]), dtype="int16", probe=probe)


def read_truth(binary: Path) -> dict[str, np.ndarray]:
    """The truth beside a recording."""
    with np.load(binary.with_suffix(".truth.npz")) as file:
        return dict(file)


def score_of(truth: dict[str, np.ndarray], sample: Any, unit: Any) -> Score:
    """Score spikes against the truth, in which units without spikes count as missed."""
    return score(
        truth["spike_samples"],
        truth["spike_units"],
        sample,
        unit,
        sampling_rate_hz=float(truth["sampling_rate_hz"]),
        truth_ids=np.arange(len(truth["unit_x_um"])),
    )


def summary_of(truth: dict[str, np.ndarray], sample: Any, unit: Any, good: Any = None) -> dict[str, float | int]:
    """Figures of a sorting. Units that find a neuron of the background are not false, but counted by themselves.

    With the units that are labelled `good`, ``n_false_good`` is the number of false ones among them.
    """
    found = score_of(truth, sample, unit)
    very_well = int((found.accuracy >= VERY_WELL_DETECTED_SCORE).sum())
    false, background = found.false_positive_units, np.zeros(0)
    if "background_units" in truth:
        rest = np.isin(unit, false)
        known = (truth["background_samples"], truth["background_units"])
        rate_hz = float(truth["sampling_rate_hz"])
        of_background = score(*known, sample[rest], unit[rest], sampling_rate_hz=rate_hz)
        background = of_background.matched_unit[of_background.is_matched]
        false = np.setdiff1d(false, background)
    summary = found.summary | {
        "n_very_well_detected": very_well,
        "n_background": len(background),
        "n_false_positive": len(false),
    }
    return summary if good is None else summary | {"n_false_good": len(np.intersect1d(false, good))}


def describe(name: str, summary: dict[str, float | int]) -> str:
    """Name, mean accuracy, units found, false, redundant and merged ones, as columns of a line."""
    very_well, n_false = summary["n_very_well_detected"], summary["n_false_positive"]
    return (
        f"{name:24s} acc {summary['mean_accuracy']:.3f}  ≥.8 {summary['n_well_detected']:2d}  "
        f"≥.95 {very_well:2d} of {summary['n_truth']:2d}  false {n_false:2d}  "
        f"background {summary['n_background']:2d}  redundant {summary['n_redundant']:2d}  "
        f"merged {summary['n_overmerged']:2d}  units {summary['n_sorted']:3d}"
    )


if __name__ == "__main__":
    main()
