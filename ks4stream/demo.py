"""A small example from start to end: simulate a recording with known spikes, sort it, and compare with the truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ks4stream import scoring, simulate
from ks4stream.engine import Progress
from ks4stream.errors import ResultsError
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.probes import save_probe
from ks4stream.io.recordings import open_recording
from ks4stream.recording import Recording
from ks4stream.results import Sorting

__all__ = ["DemoRecording", "make_recording", "score_table"]

N_CHANNELS = 24
N_UNITS = 12
DRIFT_UM = 20.0
FILE_NAME, PROBE_NAME, TRUTH_NAME = "recording.bin", "probe.json", "truth.json"
_MARK = "ks4stream demo"  # in the truth file: marks the files of an earlier demo


@dataclass(frozen=True, eq=False)
class DemoRecording:
    """A simulated recording in a file, and the truth about it."""

    path: Path
    probe_path: Path
    truth: simulate.SimulatedRecording

    def open(self) -> Recording:
        """Open it like any other recording."""
        return open_recording(
            self.path, n_chan=self.truth.probe.n_channels, fs=self.truth.sampling_rate_hz, probe=self.probe_path
        )


def make_recording(folder: Path, *, duration_s: float, seed: int, progress: Progress) -> DemoRecording:
    """Simulate two staggered columns of contacts in moving tissue, and write recording, probe and truth.

    Parameters
    ----------
    folder : Path
        Created if necessary; files of an earlier demo in it are replaced.
    duration_s : float
        Length in seconds.
    seed : int
        Units, spikes, noise and drift follow from it.
    progress : callable
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    SettingsError
        If the recording would be shorter than 0.1 s, or the seed is negative.
    ResultsError
        If the folder cannot be written to, or holds files with these names that are not from a demo.
    """
    _check_free(folder)
    probe = simulate.staggered_probe(N_CHANNELS)
    truth = simulate.simulate(probe, duration_s, seed=seed, n_units=N_UNITS, drift="rigid", drift_range_um=DRIFT_UM)
    save_probe(probe, folder / PROBE_NAME)
    _write_truth(truth, folder / TRUTH_NAME)
    _write_traces(truth, folder / FILE_NAME, progress)
    return DemoRecording(folder / FILE_NAME, folder / PROBE_NAME, truth)


def score_table(demo: DemoRecording, sorting: Sorting) -> str:
    """Return how well each true unit and the drift were found, as a table with a summary."""
    truth = demo.truth
    found = scoring.score(
        truth.spike_samples,
        truth.spike_units,
        sorting.sample[sorting.kept],
        sorting.unit[sorting.kept],
        sampling_rate_hz=truth.sampling_rate_hz,
        truth_ids=np.arange(truth.n_units),
    )
    table = found.table(**{"amplitude µV": truth.units["amplitude_uv"], "rate Hz": truth.units["rate_hz"]})
    estimated_um = 0.0 if sorting.drift is None else float(np.ptp(sorting.drift.shift_um, axis=0).mean())
    moved_um = float(np.ptp(truth.drift.displacement_um(np.arange(0.0, truth.duration_s, 0.1))))
    return f"{table}\nthe tissue moved by {moved_um:.1f} µm; the estimate is {estimated_um:.1f} µm"


def _check_free(folder: Path) -> None:
    """Create the folder; refuse one that holds somebody's recording."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = [name for name in (FILE_NAME, PROBE_NAME, TRUTH_NAME) if (folder / name).exists()]
    try:
        is_demo = _MARK in json.loads((folder / TRUTH_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_demo = False
    if found and not is_demo:
        raise ResultsError(
            f"{folder / found[0]} is not from a demo and would be replaced. Choose another folder (--out)."
        )


def _write_traces(truth: simulate.SimulatedRecording, path: Path, progress: Progress) -> None:
    starts = range(0, truth.traces.shape[0], simulate.EPOCH_SAMPLES)
    progress("simulation", 0, len(starts))
    with path.open("wb") as file:
        for done, start in enumerate(starts, start=1):
            truth.read(start, start + simulate.EPOCH_SAMPLES).tofile(file)
            progress("simulation", done, len(starts))


def _write_truth(truth: simulate.SimulatedRecording, path: Path) -> None:
    units = [
        {name: value.item() for name, value in zip(truth.units.dtype.names or (), unit, strict=True)}
        | {"spike_samples": truth.spike_samples[truth.spike_units == index].tolist()}
        for index, unit in enumerate(truth.units)
    ]
    content = {_MARK: True, "sampling_rate_hz": truth.sampling_rate_hz, "units": units}
    path.write_text(json.dumps(content), encoding="utf-8")
