"""How far is the estimated drift from the true one, and does it matter? With other estimators on the same files.

    python benchmarks/drift.py rigid-1.bin step20-1.bin [--nblocks 1 auto] [--spikeinterface-python PYTHON]

A recording is what scenarios.py leaves. For each number of blocks it is sorted, and the RMS error of the drift over
time and depth is printed, relative to its median over time, beside the accuracy. With SpikeInterface, so is the error
of its preset ``dredge_fast`` (or another), which is only estimated.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import quick
from numpy.typing import NDArray

from ks4stream import Settings, sort
from ks4stream.kernels.drift import shift_at

HERE = Path(__file__).parent
N_DEPTHS = 9  # at which drift is compared


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each recording and estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--nblocks", nargs="+", default=["1", "auto"])
    parser.add_argument("--spikeinterface-python", help="python of an environment that holds SpikeInterface")
    parser.add_argument("--preset", default="dredge_fast", help="of SpikeInterface")
    options = parser.parse_args(arguments)
    for path in options.recordings:
        binary = quick.as_binary(path)
        truth = quick.read_truth(binary)
        for nblocks in options.nblocks:
            print(f"{binary.stem:24s} nblocks={nblocks:12s} {_ours(binary, truth, nblocks)}", flush=True)
        if options.spikeinterface_python:
            text = _theirs(binary, truth, options.spikeinterface_python, options.preset)
            print(f"{binary.stem:24s} {options.preset:20s} {text}", flush=True)


def _ours(binary: Path, truth: dict[str, NDArray[Any]], nblocks: str) -> str:
    settings = Settings(nblocks=nblocks if nblocks == "auto" else int(nblocks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sorting = sort(quick.opened(binary, truth), settings, client="loop")
    assert sorting.drift is not None, "nblocks=0 estimates none"
    shift_um, centre_um = sorting.drift.shift_um, sorting.drift.centre_um
    batch_s = settings.batch_size / float(truth["sampling_rate_hz"])
    error = rms_um(
        truth, batch_s * (np.arange(len(shift_um)) + 0.5), depths_um(truth), applied_um(truth, shift_um, centre_um)
    )
    summary = quick.summary_of(truth, sorting.sample[sorting.kept], sorting.unit[sorting.kept])
    return f"{error:6.2f} µm, {len(centre_um)} segments   {quick.describe('', summary).strip()}"


def _theirs(binary: Path, truth: dict[str, NDArray[Any]], python: str, preset: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "motion.npz"
        files = [str(binary), "--probe", str(binary.with_suffix(".probe.json")), "--out", str(out)]
        done = subprocess.run([python, str(HERE / "run_motion.py"), preset, *files], capture_output=True, text=True)
        if done.returncode:
            return f"failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
        with np.load(out) as found:
            error = rms_um(truth, found["time_s"], found["depth_um"], found["displacement_um"])
            return f"{error:6.2f} µm, {found['cpu_s']:.1f} CPU s"


def rms_um(
    truth: dict[str, NDArray[Any]], time_s: NDArray[Any], depth_um: NDArray[Any], displacement_um: NDArray[Any]
) -> float:
    """RMS difference from the true displacement, over time and depth, relative to its median over time.

    Parameters
    ----------
    truth : dict
        With ``drift_time_s`` (time,), ``drift_y_um`` (depth,) and ``drift_um`` (time, depth).
    time_s, depth_um : ndarray, shape (t,), (d,)
    displacement_um : ndarray, shape (t, d)
        Of the tissue, at these times and depths; constant below the first depth and above the last.
    """
    at_um = depths_um(truth)
    true = np.stack([np.interp(time_s, truth["drift_time_s"], depth) for depth in truth["drift_um"].T], axis=1)
    error = _at(displacement_um, depth_um, at_um) - _at(true, truth["drift_y_um"], at_um)
    error -= np.median(error, axis=0)
    return float(np.sqrt(np.mean(np.square(error))))


def depths_um(truth: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Depths at which drift is compared."""
    return np.linspace(truth["drift_y_um"].min(), truth["drift_y_um"].max(), N_DEPTHS)


def applied_um(truth: dict[str, NDArray[Any]], shift_um: NDArray[Any], centre_um: NDArray[Any]) -> NDArray[np.float64]:
    """The displacement that is corrected at these depths, which is extrapolated beyond the outer segments."""
    return -np.stack([shift_at(depths_um(truth), centre_um, shift) for shift in shift_um])


def _at(values: NDArray[Any], depth_um: NDArray[Any], at_um: NDArray[Any]) -> NDArray[Any]:
    return np.stack([np.interp(at_um, depth_um, row) for row in values])


if __name__ == "__main__":
    main()
