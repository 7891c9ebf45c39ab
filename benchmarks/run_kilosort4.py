"""Run Kilosort4 on one recording, as a black box, in whatever environment holds it.

    PYTHON_WITH_KILOSORT benchmarks/run_kilosort4.py rec.bin --probe rec.probe.json --out DIR [--set nblocks=0]

Leaves ``result.npz`` (``sample``, ``unit``) and ``figures.json`` (seconds, peak memory, versions) in DIR.
Only Kilosort4's documented functions are called; nothing of it is imported by ks4stream.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np


def main() -> None:
    """Sort one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bad-channels", default="", help="comma separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()

    import torch
    from kilosort import run_kilosort
    from kilosort.io import load_probe

    if options.threads:
        torch.set_num_threads(options.threads)
    probe = load_probe(options.probe)
    settings = {"n_chan_bin": json.loads(options.probe.read_text())["n_chan"]}
    settings |= {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in options.set)}
    bad = [int(channel) for channel in options.bad_channels.split(",") if channel]
    began, cpu = time.perf_counter(), time.process_time()
    _, st, clu, _, _, _, is_ref, _, kept = run_kilosort(
        settings, probe=probe, filename=options.recording, results_dir=options.out / "kilosort4",
        device=torch.device(options.device), bad_channels=bad or None,
    )  # fmt: skip
    figures = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "n_good": int(np.sum(is_ref)),
        "versions": {name: version(name) for name in ("kilosort", "torch", "numpy")},
        "machine": platform.platform(),
        "settings": settings,
    }
    np.savez(options.out / "result.npz", sample=st[kept, 0].astype(np.int64), unit=np.asarray(clu)[kept].astype(int))
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
