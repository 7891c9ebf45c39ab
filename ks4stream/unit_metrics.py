"""Quality metrics of all units, one unit at a time: what ``quality.csv`` and the report show.

Names and definitions are SpikeInterface's (:mod:`ks4stream.kernels.metrics`), so that the same limits can be used.
Samples in which no spikes were looked for count as no time.
"""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import covered, observed_spans
from ks4stream.io.by_unit import ByUnit
from ks4stream.io.results_folder import QUALITY
from ks4stream.kernels import metrics as kernels
from ks4stream.metrics import METRICS
from ks4stream.results import Sorting
from ks4stream.unit_waveforms import file_factor, mean_waveforms

__all__ = ["UnitMetrics", "quality_metrics", "write_quality"]

GROUPED = ("sample", "score", "y_um")  # columns of spikes that metrics are made of
INTERVAL_S = 60.0  # of presence ratio and drift; SpikeInterface's default
LIVE_SHARE = 0.5  # of what is usually sorted of an interval, if it counts for the presence ratio
UNITS_AT_ONCE = 64  # whose waveforms are in memory


@dataclass(frozen=True, eq=False)
class UnitMetrics:
    """Metrics of all units.

    Attributes
    ----------
    values : dict of ndarray, float64, shape (u,)
        By name, as in :data:`METRICS`; NaN where a metric is not defined.
    peak : ndarray, float64, shape (u,)
        Largest deflection of the mean waveform, in `amplitude_unit`.
    channel : ndarray, int64, shape (u,)
        Its channel, in the order of the probe.
    amplitude_unit : str
        "µV", or "file units" if the recording's gain is not known.
    """

    values: dict[str, NDArray[np.float64]]
    peak: NDArray[np.float64]
    channel: NDArray[np.int64]
    amplitude_unit: str

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.values[name]


def quality_metrics(sorting: Sorting, by_unit: ByUnit | None = None) -> UnitMetrics:
    """Compute the quality metrics of all units of a sorting.

    Parameters
    ----------
    sorting : Sorting
        Its features are not needed.
    by_unit : ByUnit, optional
        Its spikes with the columns :data:`GROUPED`, if they were grouped before.

    Returns
    -------
    UnitMetrics
    """
    by_unit = by_unit or ByUnit(sorting, *GROUPED)
    norm = np.linalg.norm(sorting.unit_features.astype(np.float64), axis=(1, 2))
    rate = sorting.sampling_rate_hz
    start, stop = sorting.tiling.start, sorting.tiling.stop
    observed = observed_spans(sorting.tiling, sorting.artifacts)
    n_samples = int(np.diff(observed).sum())
    time: dict[str, Any] = {"sampling_rate_hz": rate, "n_samples": n_samples}
    edges = kernels.bin_edges(start, stop, int(INTERVAL_S * rate))
    usual = np.diff(edges) / sorting.tiling.step
    counted = covered(edges, observed) >= LIVE_SHARE * usual
    peak, channel = _peaks(sorting)
    noise, isolation = noise_of(sorting), _isolation(sorting)
    values = {metric.name: np.full(sorting.n_units, math.nan) for metric in METRICS}
    for unit in range(sorting.n_units):
        sample = by_unit.of(unit, "sample")
        drift = kernels.drift(sample, by_unit.of(unit, "y_um"), edges)
        scaling = by_unit.of(unit, "score") / max(norm[unit], 1e-9)  # relative to the template
        found = {
            "num_spikes": len(sample),
            "firing_rate": len(sample) * rate / max(n_samples, 1),
            "amplitude_median": peak[unit] * float(np.median(scaling)) if len(scaling) else math.nan,
            "snr": peak[unit] / noise[channel[unit]] if noise[channel[unit]] > 0 else math.nan,
            "isi_violations_ratio": kernels.isi_violations_ratio(sample, **time),
            "rp_contamination": kernels.rp_contamination(sample, **time),
            "sliding_rp_violation": kernels.sliding_rp_violation(sample, **time),
            "presence_ratio": kernels.presence_ratio(kernels.counts_in(sample, edges)[counted]),
            "amplitude_cutoff": kernels.amplitude_cutoff(scaling),
            "drift_ptp": drift.ptp,
            "drift_std": drift.std,
            "stability": kernels.stability(sample, start, stop),
            "nn_isolation": isolation[unit],
        }
        for name, value in found.items():
            values[name][unit] = value
    return UnitMetrics(values, peak, channel, "µV" if sorting.gain_uv is not None else "file units")


def _peaks(sorting: Sorting) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Largest deflection of the mean waveform of each unit (u,), in the unit of amplitudes, and its channel (u,)."""
    peak, channel = np.zeros(sorting.n_units), np.zeros(sorting.n_units, np.int64)
    if sorting.whitening is None or sorting.waveforms is None:
        return np.full(sorting.n_units, math.nan), channel
    for at in range(0, sorting.n_units, UNITS_AT_ONCE):
        rows = slice(at, at + UNITS_AT_ONCE)
        largest = np.abs(mean_waveforms(sorting, rows)).max(axis=1)  # (u, c)
        peak[rows], channel[rows] = largest.max(axis=1), largest.argmax(axis=1)
    return peak, channel


def _isolation(sorting: Sorting) -> NDArray[np.float64]:
    """How isolated each unit is (u,), found while units were joined; NaN if it was not."""
    found = np.zeros(0) if sorting.diagnostics is None else sorting.diagnostics.isolation
    return found if len(found) == sorting.n_units else np.full(sorting.n_units, math.nan)


def noise_of(sorting: Sorting) -> NDArray[np.float64]:
    """Standard deviation of the noise of each channel (c,), in the unit of amplitudes; NaN if it is not known."""
    whitening = sorting.whitening
    if whitening is None or len(whitening.noise) != sorting.n_channels:
        return np.full(sorting.n_channels, math.nan)
    return whitening.noise.astype(np.float64) * abs(file_factor(sorting))


def write_quality(sorting: Sorting, found: UnitMetrics, folder: str | os.PathLike[str]) -> Path:
    """Write ``quality.csv``: a row for each unit in the order of templates, which Phy and SpikeInterface read, too.

    Parameters
    ----------
    sorting : Sorting
    found : UnitMetrics
    folder : path

    Returns
    -------
    Path
        The file. Empty fields are metrics that are not defined for a unit.
    """
    path = Path(folder) / QUALITY
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cluster_id", *(metric.name for metric in METRICS)])
        for unit in range(sorting.n_units):
            writer.writerow([unit, *(_field(found[metric.name][unit]) for metric in METRICS)])
    return path


def _field(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"
