"""Run ks4stream on one recording and leave what run_kilosort4.py leaves (see outcome.py).

    python benchmarks/run_ks4stream.py rec.bin --probe rec.probe.json --out DIR [--set nblocks=0] [--workers 2]

The Phy folder goes to ``DIR/ks4stream``, so that both sorters write what they write by default.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from pathlib import Path

import numpy as np
import outcome


def main() -> None:
    """Sort one file."""
    options = _options()

    import torch

    from ks4stream import Settings, load_probe, open_recording, sort

    settings = outcome.parse_settings(options.set)
    bad = outcome.parse_channels(options.bad_channels)
    asked = outcome.request(options.recording, options.probe, settings, bad)
    rate_hz, n_channels = settings.pop("fs", 30_000.0), asked["probe"]["n_chan"]  # which Kilosort4 has as a setting
    began, cpu = time.perf_counter(), time.process_time()
    probe = load_probe(options.probe).drop_channels(bad)
    recording = open_recording(options.recording, n_chan=n_channels, fs=rate_hz, dtype="int16", probe=probe)
    sorting = sort(
        recording,
        Settings.from_dict(settings),
        results_dir=options.out / "ks4stream",
        client="loop" if options.workers == "loop" else None,
        workers=None if options.workers in ("auto", "loop") else int(options.workers),
        device=options.device,
    )
    figures = {
        "sorter": "ks4stream",
        "asked": asked,
        "n_good": int(sorting.good.sum()),
        "good_units": np.flatnonzero(sorting.good).tolist(),
        "blanked_share": float(np.diff(sorting.artifacts, axis=1).sum() / sorting.n_samples),
        "stage_s": sorting.seconds,
        "warnings": sorting.warnings,
        "sort_wall_s": time.perf_counter() - began,
        "sort_cpu_s": time.process_time() - cpu,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "workers": options.workers,
        "device": options.device,
        "versions": outcome.versions("ks4stream", "torch", "numpy", "scipy", "dask", "distributed"),
        "machine": platform.platform(),
    }
    if not torch.cuda.is_available():
        figures["device"] = "cpu"
    outcome.write(options.out, sample=sorting.sample[sorting.kept], unit=sorting.unit[sorting.kept], figures=figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value as in JSON")
    parser.add_argument("--bad-channels", default="", help="columns of the file, comma separated")
    parser.add_argument("--device", default=None, help="the GPU if there is one, by default")
    parser.add_argument("--workers", default="auto", help='a number, "loop" (no Dask), or "auto": what the machine has')
    return parser.parse_args()


if __name__ == "__main__":
    main()
