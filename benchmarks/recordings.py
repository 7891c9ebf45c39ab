"""Scenarios as files, the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from scenarios import ALL

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def make(scenario: str, seed: int, folder: Path, *, seconds: float | None = None) -> tuple[Path, dict[str, np.ndarray]]:
    """Return a scenario's binary file and its truth; simulated unless it lies there, whole and of that length.

    It is simulated by a process on one thread: on more, matrix products add up in another order, and of 10⁸ samples
    some ten are rounded to the other side.
    """
    binary, truth = folder / f"{scenario}-{seed}.bin", folder / f"{scenario}-{seed}.truth.npz"
    length = {} if seconds is None else {"duration_s": seconds}
    traces = ALL[scenario](seed, **length).traces  # lazy: only its shape is wanted
    n_bytes = traces.dtype.itemsize * traces.size
    if not (binary.exists() and truth.exists() and binary.stat().st_size == n_bytes):
        script = str(Path(__file__).parent / "scenarios.py")
        command = [sys.executable, script, scenario, "--seed", str(seed), "--out", str(folder)]
        command += [] if seconds is None else ["--seconds", str(seconds)]
        subprocess.run(command, check=True, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL)
    with np.load(truth) as file:
        return binary, dict(file)
