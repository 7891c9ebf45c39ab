"""What the report shows of a sorting, as plain values and arrays whose size does not grow with the recording.

Everything drawn is binned here: rasters to pixels, trains to correlograms, amplitudes and depths to quantiles over
time. :mod:`ks4stream.report.page` describes the content and turns it into a page.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import covered, observed_spans
from ks4stream.io.by_unit import ByUnit, kept_spikes
from ks4stream.kernels.correlograms import correlogram
from ks4stream.metrics import METRICS
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.unit_metrics import UNITS_AT_ONCE, UnitMetrics, noise_of
from ks4stream.unit_waveforms import mean_waveforms

TIME_BINS, UNIT_TIME_BINS = 200, 60
RASTER_TIMES, RASTER_DEPTHS, MARGIN_UM = 600, 200, 10.0  # pixels, and what is shown beyond the contacts
DRIFT_POINTS = 1500
REACH_MS, MAX_PAIRS = 50, 2_000_000  # of correlograms; more pairs than that make no smoother picture
N_NEAR = 3  # most similar units that are shown beside each
TEMPLATE_CHANNELS = 10
QUANTILES = (0.1, 0.5, 0.9)
SPIKES_PER_BIN = 200  # are enough for quantiles
RASTER_FULL = 0.99  # share of the occupied pixels that are not at full darkness

METHOD_PAPERS = (
    "Pachitariu M, Sridhar S, Pennington J, Stringer C (2024). Spike sorting with Kilosort4. Nature Methods 21, "
    "914–921.",
    "Rocklin M (2015). Dask: parallel computation with blocked algorithms and task scheduling. Proceedings of the 14th "
    "Python in Science Conference, 126–132.",
)
METRIC_PAPERS = (
    "Chung JE, Magland JF, Barnett AH, Tolosa VM, Tooker AC, Lee KY, Shah KG, Felix SH, Frank LM, Greengard LF (2017). "
    "A fully automated approach to spike sorting. Neuron 95, 1381–1394.",
    "Hill DN, Mehta SB, Kleinfeld D (2011). Quality metrics to accompany spike sorting of extracellular signals. "
    "Journal of Neuroscience 31, 8699–8705.",
    "Buccino AP, Hurwitz CL, Garcia S, Magland J, Siegle JH, Hurwitz R, Hennig MH (2020). SpikeInterface, a unified "
    "framework for spike sorting. eLife 9, e61834.",
    "International Brain Laboratory (2022). Spike sorting pipeline for the International Brain Laboratory. figshare, "
    "doi:10.6084/m9.figshare.19705522.",
    "Llobet V, Wyngaard A, Barbour B (2022). Automatic post-processing and merging of multiple spike-sorting analyses "
    "with Lussac. bioRxiv 2022.02.08.479192.",
)


def content(sorting: Sorting, by_unit: ByUnit, metrics: UnitMetrics) -> dict[str, Any]:
    """Everything the page shows; :mod:`ks4stream.report.page` lists the fields.

    Parameters
    ----------
    sorting : Sorting
        Its features are not needed.
    by_unit : ByUnit
        Its spikes.
    metrics : UnitMetrics
        Their metrics.
    """
    time, rasters = _over_time(sorting)
    near = _nearest(sorting.similarity)
    return {
        "recording": {
            "name": sorting.provenance.recording,
            "duration_s": (sorting.tiling.stop - sorting.tiling.start) / sorting.sampling_rate_hz,
            "start_s": sorting.tiling.start / sorting.sampling_rate_hz,
            "n_channels": sorting.n_channels,
            "sampling_rate_hz": sorting.sampling_rate_hz,
            "amplitude_unit": metrics.amplitude_unit,
        },
        "verdict": _verdict(sorting),
        "drift": _drift(sorting),
        "borders_s": _borders_s(sorting),
        "rasters": rasters,
        "probe": _probe(sorting),
        "units": _units(sorting, by_unit, metrics, near),
        "metrics": [
            {
                "name": metric.name,
                "title": metric.title,
                "unit": metrics.amplitude_unit if metric.unit == "µV" else metric.unit,
                "digits": metric.digits,
                "threshold": metric.threshold,
                "better": metric.better or None,
                "undefined": metric.undefined or None,
                "help": metric.help,
            }
            for metric in METRICS
        ],
        "details": _details(sorting, by_unit, metrics, near),
        "time": time,
        "funnel": _funnel(sorting),
        "left_out": [
            {"reason": reason, "units": units, "spikes": spikes}
            for reason, (units, spikes) in (sorting.diagnostics.left_out if sorting.diagnostics else {}).items()
        ],
        "run": _run(sorting),
        "compare": None,
    }


# -- the recording -------------------------------------------------------------------------------------


def _verdict(sorting: Sorting) -> dict[str, Any]:
    found, drift = sorting.diagnostics, sorting.drift
    blanked_s = float(np.diff(sorting.artifacts).sum()) / sorting.sampling_rate_hz
    duration_s = (sorting.tiling.stop - sorting.tiling.start) / sorting.sampling_rate_hz
    observed_s = float(np.diff(observed_spans(sorting.tiling, sorting.artifacts)).sum()) / sorting.sampling_rate_hz
    error = None if drift is None or not drift.error_um.size else drift.error_um
    return {
        "good": int(sorting.good.sum()),
        "mua": int((~sorting.good).sum()),
        "left_out": None if found is None else sum(units for units, _ in found.left_out.values()),
        "n_spikes": int(np.count_nonzero(sorting.kept)),
        "drift_um": None if drift is None else float(np.ptp(drift.shift_um, axis=0).max(initial=0.0)),
        "drift_error_um": None if error is None else float(np.sqrt(np.mean(np.square(error)))),
        "blanked_share": blanked_s / duration_s if duration_s else 0.0,
        "blanked_s": blanked_s,
        "observed_s": observed_s,
        "warnings": [{"text": text, "setting": _setting_in(text)} for text in sorting.warnings],
    }


def _setting_in(text: str) -> str | None:
    """The first setting that a warning names."""
    names = set(Settings().to_dict())
    return next((word for word in re.findall(r"\w+", text) if word in names), None)


def _drift(sorting: Sorting) -> dict[str, Any] | None:
    drift = sorting.drift
    if drift is None or not drift.shift_um.size:
        return None
    step = -(-len(drift.shift_um) // DRIFT_POINTS)
    return {
        "time_s": (sorting.tiling.centres[::step] / sorting.sampling_rate_hz).astype(np.float32),
        "displacement_um": -drift.shift_um[::step],
        "error_um": drift.error_um[::step] if drift.error_um.shape == drift.shift_um.shape else None,
        "centre_um": drift.centre_um.tolist(),
        "given": sorting.peaks is None,
    }


def _borders_s(sorting: Sorting) -> list[float]:
    """Where the files of the recording were joined, if they are flat files."""
    files = sorting.flat_files
    if isinstance(files, str):
        return []
    borders = np.cumsum([file.n_samples for file in files])[:-1]
    borders = borders[(borders > sorting.tiling.start) & (borders < sorting.tiling.stop)]
    return (borders / sorting.sampling_rate_hz).tolist()


def _probe(sorting: Sorting) -> dict[str, Any] | None:
    probe = sorting.probe
    if probe is None:
        return None
    bad = np.zeros(probe.n_channels, bool)
    if sorting.whitening is not None:
        bad[sorting.whitening.dead] = True
    return {
        "x_um": probe.x_um.tolist(),
        "y_um": probe.y_um.tolist(),
        "shank": probe.shank.tolist(),
        "bad": bad.tolist(),
    }


def _over_time(sorting: Sorting) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The time strip, and the raster of peaks and spikes: one pass over all spikes."""
    start, stop, rate = sorting.tiling.start, sorting.tiling.stop, sorting.sampling_rate_hz
    edges = np.linspace(start, max(stop, start + 1), TIME_BINS + 1)
    counts, rasters = np.zeros(TIME_BINS, np.int64), _Rasters(sorting)
    shank_of = _shank_of_templates(sorting)
    for rows, kept in kept_spikes(sorting, "sample", "template", "score", "y_um"):
        sample = sorting.sample[rows][kept]
        counts += np.histogram(sample, edges)[0]
        shank = shank_of[sorting.template[rows][kept]]
        rasters.after.add(sample, sorting.y_um[rows][kept], sorting.score[rows][kept], shank)
    peaks = sorting.peaks
    if peaks is not None:
        shank = peaks.shank if len(peaks.shank) else np.full(len(peaks.sample), rasters.shanks[0])
        rasters.before.add(peaks.sample, peaks.depth_um, peaks.score, shank)
    live = covered(edges, observed_spans(sorting.tiling, sorting.artifacts))
    time = {
        "edges_s": (edges / rate).tolist(),
        "rate_hz": _plain(np.divide(counts * rate, live, out=np.full(TIME_BINS, np.nan), where=live > 0)),
        "blanked_share": _plain(covered(edges, sorting.artifacts) / np.diff(edges)),
        "noise": None,
        "explained": None,
    }
    found = sorting.diagnostics
    if found is not None and len(found.explained):
        span = np.clip(np.searchsorted(found.edge, (edges[1:] + edges[:-1]) / 2, side="right") - 1, 0, None)
        span = np.minimum(span, len(found.explained) - 1)
        time["noise"] = (found.noise[span] * noise_of(sorting)).T.astype(np.float32)
        time["explained"] = _plain(found.explained[span])
    return time, rasters.entries(rate)


class _Rasters:
    """Pixels over depth and time for each shank: peaks before, and spikes after drift was corrected."""

    def __init__(self, sorting: Sorting) -> None:
        probe, tiling = sorting.probe, sorting.tiling
        depths = np.zeros(1) if probe is None else probe.y_um
        margin = 0.02 * float(np.ptp(depths)) + MARGIN_UM
        self.shanks = np.zeros(1, np.int64) if probe is None else np.unique(probe.shank)
        self._span = tiling.start, max(tiling.stop, tiling.start + 1)
        self._depths_um = float(depths.min()) - margin, float(depths.max()) + margin
        self.before, self.after = (_Raster(self.shanks, self._span, self._depths_um) for _ in range(2))

    def entries(self, rate: float) -> list[dict[str, Any]]:
        """Those of the page; none for shanks without peaks and spikes."""
        found = [
            {
                "shank": shank,
                "t0_s": self._span[0] / rate,
                "t1_s": self._span[1] / rate,
                "y0_um": self._depths_um[0],
                "y1_um": self._depths_um[1],
                "before": _darkness(before),
                "after": _darkness(after),
            }
            for shank, before, after in zip(self.shanks.tolist(), self.before.pixels, self.after.pixels, strict=True)
        ]
        return [entry for entry in found if entry["before"] is not None or entry["after"] is not None]


class _Raster:
    """Pixels in which larger spikes weigh more: (shank, depth, time)."""

    def __init__(self, shanks: NDArray[np.int64], span: tuple[int, int], depths_um: tuple[float, float]) -> None:
        self._shanks, self._span, self._depths_um = shanks, span, depths_um
        self.pixels = np.zeros((len(shanks), RASTER_DEPTHS // math.isqrt(len(shanks)), RASTER_TIMES))

    def add(self, sample: NDArray[Any], depth_um: NDArray[Any], weight: NDArray[Any], shank: NDArray[np.int64]) -> None:
        """Add spikes; those beyond the edges are not drawn."""
        shape = self.pixels.shape
        column = np.floor(_share(sample, *self._span) * shape[2]).astype(np.int64)
        row = np.floor(_share(depth_um, *self._depths_um) * shape[1]).astype(np.int64)
        inside = (column >= 0) & (column < shape[2]) & (row >= 0) & (row < shape[1])
        number = np.ravel_multi_index(
            (np.searchsorted(self._shanks, shank[inside]), row[inside], column[inside]), shape
        )
        self.pixels += np.bincount(number, weight[inside], self.pixels.size).reshape(shape)


def _share(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    return (values - low) / (high - low)


def _shank_of_templates(sorting: Sorting) -> NDArray[np.int64]:
    """Shank of the largest channel of each learned template: (v,)."""
    if sorting.probe is None:
        return np.zeros(len(sorting.template_channels), np.int64)
    return np.asarray(sorting.probe.shank[sorting.template_channels[:, 0].clip(0)])


def _darkness(pixels: NDArray[np.float64]) -> NDArray[np.uint8] | None:
    """Pixels as 0 … 255: the square root, so that single small spikes remain visible; None if there are none."""
    if not pixels.any():
        return None
    full = float(np.quantile(pixels[pixels > 0], RASTER_FULL))
    return np.ceil(255 * np.sqrt(np.clip(pixels / full, 0, 1))).astype(np.uint8)


# -- units ---------------------------------------------------------------------------------------------


def _units(sorting: Sorting, by_unit: ByUnit, metrics: UnitMetrics, near: NDArray[np.int32]) -> dict[str, list[Any]]:
    """Columns of the table, each (u,); `near` (u, k) is from :func:`_nearest`."""
    channel = metrics.channel
    most_similar = near[:, 0] if near.shape[1] else np.full(sorting.n_units, -1, np.int32)
    shank = np.zeros(sorting.n_units, np.int64)
    in_file = channel
    if sorting.probe is not None:
        shank, in_file = sorting.probe.shank[channel], sorting.probe.chan_map[channel]
    return {
        "id": list(range(sorting.n_units)),
        "label": ["good" if is_good else "mua" for is_good in sorting.good],
        "reason": list(sorting.label_reasons),
        "x_um": _plain(by_unit.position_um[:, 0]),
        "y_um": _plain(by_unit.position_um[:, 1]),
        "shank": shank.tolist(),
        "channel": in_file.tolist(),
        **{metric.name: _plain(metrics[metric.name]) for metric in METRICS},
        "num_spikes": by_unit.count.tolist(),  # all digits
        "similar": [other if other >= 0 else None for other in most_similar.tolist()],
        "similarity": _plain(sorting.similarity[np.arange(sorting.n_units), most_similar], where=most_similar >= 0),
    }


def _details(sorting: Sorting, by_unit: ByUnit, metrics: UnitMetrics, near: NDArray[np.int32]) -> dict[str, Any]:
    """What is shown of a unit when it is opened; `near` (u, k) is from :func:`_nearest`."""
    n_units, rate = sorting.n_units, sorting.sampling_rate_hz
    edges = np.linspace(sorting.tiling.start, max(sorting.tiling.stop, sorting.tiling.start + 1), UNIT_TIME_BINS + 1)
    norm = np.linalg.norm(sorting.unit_features.astype(np.float64), axis=(1, 2))
    acg = np.zeros((n_units, REACH_MS + 1), np.uint16)
    ccg = np.zeros((n_units, near.shape[1], 2 * REACH_MS + 1), np.uint16)
    count = np.zeros((n_units, UNIT_TIME_BINS), np.uint32)
    amplitude, depth_um = np.full((2, n_units, len(QUANTILES), UNIT_TIME_BINS), np.nan, np.float32)
    for unit in range(n_units):
        sample = by_unit.of(unit, "sample")
        acg[unit] = _small(
            correlogram(sample, sampling_rate_hz=rate, reach_ms=REACH_MS, max_pairs=MAX_PAIRS)[REACH_MS:]
        )
        for place, other in enumerate(near[unit].tolist()):
            if other >= 0:
                pairs = correlogram(
                    sample, by_unit.of(other, "sample"), sampling_rate_hz=rate, reach_ms=REACH_MS, max_pairs=MAX_PAIRS
                )
                ccg[unit, place] = _small(pairs)
        bounds = np.searchsorted(sample, edges)
        count[unit] = np.diff(bounds)
        amplitude[unit] = metrics.peak[unit] / max(norm[unit], 1e-9) * _quantiles(by_unit.of(unit, "score"), bounds)
        depth_um[unit] = _quantiles(by_unit.of(unit, "y_um"), bounds)
    template, scale, channels = _templates(sorting)
    time_ms = (np.arange(sorting.settings.nt) - sorting.settings.peak_sample) / rate * 1000
    similarity = np.take_along_axis(sorting.similarity, near.clip(0), axis=1) if near.size else np.zeros(near.shape)
    return {
        "template": template,
        "template_scale": scale,
        "template_channels": channels,
        "template_ms": time_ms.round(4).tolist(),
        "acg": acg,
        "acg_bin_ms": 1.0,
        "nearest": near,
        "similarity": np.where(near >= 0, similarity, 0).astype(np.float32),
        "ccg": ccg,
        "edges_s": (edges / rate).tolist(),
        "observed_s": _plain(covered(edges, observed_spans(sorting.tiling, sorting.artifacts)) / rate),
        "count": count,
        "amplitude": amplitude,
        "depth_um": depth_um,
    }


def _nearest(similarity: NDArray[np.float32]) -> NDArray[np.int32]:
    """The units with the most similar templates, most similar first, −1 where there are fewer: (u, k).

    >>> _nearest(np.array([[1, 0.2, 0.9], [0.2, 1, 0], [0.9, 0, 1]])).tolist()
    [[2, 1], [0, -1], [0, -1]]
    """
    n_units = len(similarity)
    others = np.where(np.eye(n_units, dtype=bool), -1.0, similarity)
    order = np.argsort(-others, axis=1, kind="stable")[:, : min(N_NEAR, max(n_units - 1, 0))]
    return np.where(np.take_along_axis(others, order, axis=1) > 0, order, -1).astype(np.int32)


def _small(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Counts as uint16, divided by the same number if some are too large: only the shape is shown."""
    most = np.iinfo(np.uint16).max
    return np.rint(counts * (most / max(int(counts.max(initial=0)), most))).astype(np.uint16)


def _quantiles(values: NDArray[Any], bounds: NDArray[np.int64]) -> NDArray[np.float32]:
    """Quantiles of the values in each bin, which has the rows from one bound to the next: (quantile, bin).

    Evenly spaced rows of large bins are enough.
    """
    found = np.full((len(QUANTILES), len(bounds) - 1), np.nan, np.float32)
    for number, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if b > a:
            some = np.sort(values[a : b : -(-(b - a) // SPIKES_PER_BIN)])
            found[:, number] = some[[round(q * (len(some) - 1)) for q in QUANTILES]]
    return found


def _templates(sorting: Sorting) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int16]]:
    """Mean waveforms (u, j, w) as small integers, what 1 stands for in the unit of amplitudes, and channels (u, j)."""
    n_units, nt = sorting.n_units, sorting.settings.nt
    n_channels = min(TEMPLATE_CHANNELS, sorting.n_channels)
    found, scale = np.zeros((n_units, n_channels, nt), np.int8), np.zeros(n_units, np.float32)
    channels = np.full((n_units, n_channels), -1, np.int16)
    if sorting.whitening is None or sorting.waveforms is None:
        return found, scale, channels
    for at in range(0, n_units, UNITS_AT_ONCE):
        rows = slice(at, at + UNITS_AT_ONCE)
        waveforms = mean_waveforms(sorting, rows)  # (unit, w, c)
        size = np.abs(waveforms).max(axis=1)
        largest = np.argsort(-size, axis=1, kind="stable")[:, :n_channels]
        of_largest = np.take_along_axis(waveforms, largest[:, None, :], axis=2).transpose(0, 2, 1)
        scale[rows] = np.abs(of_largest).max(axis=(1, 2)) / 127
        found[rows] = np.rint(of_largest / np.maximum(scale[rows], 1e-12)[:, None, None])
        channels[rows] = np.where(np.take_along_axis(size, largest, axis=1) > 0, largest, -1)
    return found, scale, channels


# -- the run -------------------------------------------------------------------------------------------


def _funnel(sorting: Sorting) -> list[dict[str, Any]]:
    found = sorting.diagnostics
    if found is None or not found.counts:
        return []
    in_units, kept = sorting.n_spikes, int(np.count_nonzero(sorting.kept))
    counts = found.counts
    rows = [
        ("Peaks detected", counts["peaks"], "anything that looks like a spike (small ones in some batches only)"),
        ("Templates learned", counts["templates"], "from clusters of these peaks"),
        ("Spikes matched", counts["matched spikes"], "above the threshold of their template, everywhere"),
        ("Clusters of spikes", counts["clusters"], "in all regions of the probe"),
        ("Clusters after merging", counts["merged clusters"], "those of one neuron are merged"),
        ("Units", counts["units"], "clusters that can be neurons"),
        ("Spikes of units", in_units, "including duplicates"),
        ("Spikes without duplicates", kept, f"the same spike twice within {sorting.settings.duplicate_spike_ms:g} ms"),
    ]
    return [{"step": step, "count": count, "note": note} for step, count, note in rows]


def _run(sorting: Sorting) -> dict[str, Any]:
    from_run, changed = sorting.provenance, _changed(sorting.settings)
    return {
        "settings": [
            {
                "name": spec.name,
                "value": _text(getattr(sorting.settings, spec.name)),
                "default": _text(spec.default),
                "changed": spec.name in changed,
                "help": spec.metadata["doc"],
            }
            for spec in fields(Settings)
        ],
        "versions": {
            "ks4stream": from_run.ks4stream,
            "method": str(from_run.method),
            "Python": from_run.python,
            "torch": from_run.torch,
            "NumPy": from_run.numpy,
            "SciPy": from_run.scipy,
        },
        "digest": from_run.recording_digest,
        "device": from_run.device,
        "seconds": dict(sorting.seconds),
        "memory_bytes": sorting.memory_bytes or None,
        "workers": sorting.n_workers or None,
        "resumed": {stage: list(tasks) for stage, tasks in sorting.recalled.items() if tasks[0]},
        "files": list(sorting.files),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "methods": _methods(sorting),
        "citations": [*METHOD_PAPERS, *METRIC_PAPERS],
    }


def _methods(sorting: Sorting) -> str:
    """A paragraph for the methods section of a paper."""
    settings, of_run = sorting.settings, sorting.provenance
    drift = sorting.drift
    if drift is None:
        of_drift = "Drift was not corrected."
    elif sorting.peaks is None:
        of_drift = "Drift was corrected by a given estimate."
    elif not np.any(drift.shift_um):
        of_drift = "Drift was estimated from the depths of detected peaks; none was found."
    else:
        n = len(drift.centre_um)
        how = "rigidly" if n == 1 else f"in {n} segments"
        of_drift = (
            f"Drift was estimated from the depths of detected peaks, {how}, and corrected by interpolation (range "
            f"{np.ptp(drift.shift_um, axis=0).max():.1f} µm)."
        )
    reference = ", referenced to the median of the channels" if settings.do_CAR else ""
    others = ", ".join(f"{name} = {_text(value)}" for name, value in _changed(settings).items())
    return (
        f"Spikes were sorted with ks4stream {of_run.ks4stream} (version {of_run.method} of its method), an independent "
        "implementation of the method of Kilosort4 (Pachitariu et al. 2024) on Dask (Rocklin 2015). Traces of "
        f"{sorting.n_channels} channels were high-pass filtered at {settings.highpass_cutoff:g} Hz{reference} and "
        f"whitened. {of_drift} Templates were learned by clustering detected peaks, all spikes were found by matching "
        "pursuit and clustered, and clusters were merged by the similarity of their templates and their correlograms. "
        + (f"Settings other than the defaults were {others}. " if others else "All settings were the defaults. ")
        + f"Of {sorting.n_units} units, {int(sorting.good.sum())} were labelled good: they had a refractory period, at "
        "least 11 spikes, not nearly all of them within a tenth of the recording, and were not locked to artifacts or "
        "mains hum. Quality metrics are those of SpikeInterface (Buccino et al. 2020), after Hill et al. (2011), "
        "Chung et al. (2017), Llobet et al. (2022) and the International Brain Laboratory (2022)."
    )


def _changed(settings: Settings) -> dict[str, Any]:
    """Settings that are not the defaults."""
    defaults = Settings().to_dict()
    return {name: value for name, value in settings.to_dict().items() if value != defaults[name]}


# -- helpers -------------------------------------------------------------------------------------------


def _plain(values: NDArray[Any], *, where: NDArray[np.bool_] | None = None) -> list[float | None]:
    """Numbers for JSON, with six digits; None for those that are not finite, and elsewhere."""
    found = np.asarray(values, float) if where is None else np.where(where, values, np.nan)
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in found.tolist()]


def _text(value: Any) -> str:
    """A setting as a person would type it.

    >>> [_text(value) for value in (True, 0.1, None, (1.0, 2.5), 12345.678, "auto")]
    ['True', '0.1', 'none', '1, 2.5', '12345.678', 'auto']
    """
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value))
    if value is None:
        return "none"
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
