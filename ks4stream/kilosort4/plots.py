"""Kilosort4's module ``plots``: the pictures of a sort that is called step by step.

They are drawn by :mod:`ks4stream.report.plots` and written under Kilosort4's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.errors import OpsError, ResultsError
from ks4stream.kilosort4.io import PathLike, placed
from ks4stream.kilosort4.ops import array, drift_of, needed, probe_of, settings_of, waveforms_of
from ks4stream.probe import Probe
from ks4stream.report import plots
from ks4stream.results import PeakSample, Sorting

__all__ = ["plot_diagnostics", "plot_drift_amount", "plot_drift_scatter", "plot_spike_positions"]

_RATE_HZ = 30_000.0  # of the clock in which times in seconds are drawn


def plot_drift_amount(ops: Mapping[str, Any], results_dir: PathLike, tmin: float = 0) -> None:
    """Draw the estimated drift over time, as ``drift_amount.png``.

    Parameters
    ----------
    ops : mapping
        From :func:`~ks4stream.kilosort4.parts.compute_drift_correction`.
    results_dir : path
    tmin : float
        Where the first batch begins, in seconds; by default where the settings say.

    Raises
    ------
    OpsError
        If no drift was estimated.
    ResultsError
        If the plot cannot be written.
    """
    drift = drift_of(dict(ops))
    if drift is None:
        raise OpsError("ops has no drift (dshift is None), so there is nothing to draw: nblocks was 0.")
    settings, rate_hz = settings_of(ops), float(needed(ops, "fs"))
    tiling = Tiling(
        start=round((tmin or settings.tmin) * rate_hz),
        stop=0,
        size=settings.batch_size,
        halo=0,
        n_tiles=len(drift.shift_um),
        step=settings.batch_downsampling,
    )
    sorting = _drawn(drift=drift, tiling=tiling, sampling_rate_hz=rate_hz)
    _write("drift_amount.png", plots.plot_drift_amount(sorting), results_dir, ops)


def plot_drift_scatter(st0: NDArray[np.float64], results_dir: PathLike, tmin: float = 0) -> None:
    """Draw the peaks of the first pass by time and depth, as ``drift_scatter.png``.

    Parameters
    ----------
    st0 : ndarray, shape (n_peaks, 6)
        From :func:`~ks4stream.kilosort4.parts.compute_drift_correction`: seconds, depth, score.
    results_dir : path
    tmin : float
        Added to the times, in seconds.

    Raises
    ------
    OpsError
        If `st0` is None, as no drift was estimated, or has another shape.
    ResultsError
        If the plot cannot be written.
    """
    if np.ndim(st0) != 2 or np.shape(st0)[1] < 3:
        raise OpsError("st0 must be the table of peaks (seconds, depth, score) that compute_drift_correction returns.")
    rows = np.asarray(st0)[plots.thinned(len(st0))]
    peaks = PeakSample(np.rint((rows[:, 0] + tmin) * _RATE_HZ), rows[:, 1], rows[:, 2])
    figure = plots.plot_drift_scatter(_drawn(peaks=peaks))
    _write("drift_scatter.png", figure, results_dir)


def plot_diagnostics(
    Wall0: torch.Tensor | NDArray[np.float32],
    clu0: NDArray[np.integer[Any]],
    ops: Mapping[str, Any],
    results_dir: PathLike,
) -> None:
    """Draw the learned waveforms and templates, as ``diagnostics.png``.

    Parameters
    ----------
    Wall0 : Tensor or ndarray, shape (n_templates, n_channels, n_pcs)
        From :func:`~ks4stream.kilosort4.parts.detect_spikes`.
    clu0 : ndarray of int, shape (n_spikes,)
        Template of each spike.
    ops : mapping
    results_dir : path

    Raises
    ------
    OpsError
        If `clu0` names a template that `Wall0` does not have.
    ResultsError
        If the plot cannot be written.
    """
    features, unit = array(Wall0, np.float32), array(clu0, np.int32).ravel()
    _check_units(unit, len(features), "clu0", "Wall0")
    sorting = _drawn(
        unit=unit,
        kept=np.ones(len(unit), np.bool_),
        unit_features=features,
        refractory=np.zeros(len(features), np.bool_),
        contamination=np.full(len(features), np.nan),
        settings=settings_of(ops),
        sampling_rate_hz=float(needed(ops, "fs")),
        probe=probe_of(ops),
        waveforms=waveforms_of(dict(ops)),
    )
    _write("diagnostics.png", plots.plot_diagnostics(sorting), results_dir, ops)


def plot_spike_positions(clu: NDArray[np.integer[Any]], is_refractory: NDArray[Any], results_dir: PathLike) -> None:
    """Draw where spikes are on the probe, as ``spike_positions.png``.

    Parameters
    ----------
    clu : ndarray of int, shape (n_spikes,) or (n_kept,)
        Unit of each spike, with or without those that are not kept.
    is_refractory : ndarray of float64 or bool, shape (n_units,)
    results_dir : path
        Folder with the results, which say where spikes are.

    Raises
    ------
    ResultsError
        If there are no results, or they are those of other spikes.
    """
    folder = Path(results_dir)
    positions = _stored(folder, "spike_positions")
    if positions is None:
        raise ResultsError(f"{folder} has no spike_positions.npy; save the results before their positions are drawn.")
    unit, refractory = array(clu, np.int32).ravel(), array(is_refractory, np.bool_)
    kept = _stored(folder, "kept_spikes")
    if kept is not None and len(unit) == len(kept) and len(unit) != len(positions):
        unit = unit[kept.astype(np.bool_)]
    if len(unit) != len(positions):
        raise ResultsError(f"clu has {len(unit)} spikes, but the results in {folder} have {len(positions)}.")
    _check_units(unit, len(refractory), "clu", "is_refractory")
    templates = _stored(folder, "templates")  # (u, w, c)
    features = np.zeros((len(refractory), 1, 1), np.float32)
    if templates is not None and len(templates) == len(refractory):
        features = np.linalg.norm(templates, axis=1)[:, :, None]
    contacts, shank = _stored(folder, "channel_positions"), _stored(folder, "channel_shanks")
    sorting = _drawn(
        unit=unit,
        kept=np.ones(len(unit), np.bool_),
        x_um=positions[:, 0],
        y_um=positions[:, 1],
        unit_features=features,
        refractory=refractory,
        contamination=np.zeros(len(refractory)),
        probe=None
        if contacts is None or len(contacts) != features.shape[1]
        else Probe.from_positions(contacts, shank=shank),
    )
    figure = plots.plot_spike_positions(sorting)
    _write("spike_positions.png", figure, folder, is_of_results=True)


@dataclass(frozen=True, eq=False)
class _Labelled(Sorting):
    """A sorting whose labels are given as `refractory`: the times of its spikes are not known."""

    @property
    def good(self) -> NDArray[np.bool_]:
        return self.refractory


def _drawn(**known: Any) -> Sorting:
    """A sorting of which only what is drawn is known."""
    n_spikes, n_units = len(known.get("unit", ())), len(known.get("contamination", ()))
    empty: dict[str, Any] = {
        **{name: np.zeros(n_spikes) for name in ("sample", "unit", "template", "score", "kept", "x_um", "y_um")},
        "features": np.zeros((n_spikes, 0, 0)),
        "template_channels": np.zeros((0, 0)),
        "unit_features": np.zeros((n_units, 0, 0)),
        "similarity": np.zeros((0, 0)),
        "refractory": np.zeros(n_units),
        "contamination": np.zeros(n_units),
        "sampling_rate_hz": _RATE_HZ,
    }
    return _Labelled(**empty | known)


def _check_units(unit: NDArray[np.int32], n_units: int, of_spikes: str, of_units: str) -> None:
    if len(unit) and not 0 <= unit.min() <= unit.max() < n_units:
        raise OpsError(f"{of_spikes} has units {unit.min()} to {unit.max()}, but {of_units} has {n_units}.")


def _stored(folder: Path, name: str) -> NDArray[Any] | None:
    """An array of the results; None if there is none."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        return None
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error
    return found


def _write(
    name: str,
    figure: Figure,
    results_dir: PathLike,
    ops: Mapping[str, Any] | None = None,
    *,
    is_of_results: bool = False,
) -> None:
    with placed(Path(results_dir), ops, is_of_results=is_of_results) as draft:
        plots.save_plot(figure, draft / name)
