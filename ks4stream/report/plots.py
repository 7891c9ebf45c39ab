"""The pictures that go with a sorting: drift, waveforms and templates, where the spikes are.

Each ``plot_…`` draws one figure of a :class:`~ks4stream.results.Sorting`; :func:`write_plots` writes all as
PNG under Kilosort4's names. Figures are matplotlib objects of their own (no pyplot, no global state), so
they can be drawn anywhere. For long recordings, an evenly spaced sample of the spikes is drawn.
"""

from __future__ import annotations

import colorsys
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from ks4stream.results import Sorting

__all__ = [
    "plot_diagnostics",
    "plot_drift_amount",
    "plot_drift_scatter",
    "plot_spike_positions",
    "save_plot",
    "write_plots",
]

MAX_POINTS = 100_000
_DPI = 150
_INK, _PALE = "#222222", "#d9d9d9"
_GOOD, _MUA = "#1b6ca8", "#c8963e"
_GOLDEN_TURN = 0.618_033_988_75  # hues this far apart on the circle stay distinct, however many there are


def write_plots(sorting: Sorting, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw a sorting and write the figures.

    Parameters
    ----------
    sorting : Sorting
        A sorting; may be empty.
    folder : path
        Where ``diagnostics.png``, ``spike_positions.png`` and, with a drift estimate, ``drift_amount.png``
        and ``drift_scatter.png`` go.

    Returns
    -------
    list of Path
        The files written.
    """
    plots = {
        "drift_amount.png": plot_drift_amount if sorting.drift is not None else None,
        "drift_scatter.png": plot_drift_scatter if sorting.peaks is not None else None,
        "diagnostics.png": plot_diagnostics,
        "spike_positions.png": plot_spike_positions,
    }
    written = []
    for name, plot in plots.items():
        path = Path(folder) / name
        if plot is not None:
            save_plot(plot(sorting), path)
            written.append(path)
    return written


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=_DPI)


def plot_drift_amount(sorting: Sorting) -> Figure:
    """Draw the drift correction of each depth segment over time: the negative of the tissue's displacement."""
    figure, axes = _figure(8.0, 3.6)
    _label(axes, "Drift estimate", "Time", "Correction (µm)")
    if sorting.drift is None or not sorting.drift.shift_um.size:
        return _empty(figure, axes, "no drift estimate")
    shift, depth = sorting.drift.shift_um, sorting.drift.centre_um
    time, unit = _time(sorting.tiling.centres, sorting)
    axes.set_xlabel(f"Time ({unit})")
    axes.axhline(0, color=_PALE, linewidth=1, zorder=0)
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(depth)))
    for segment, colour in enumerate(colours):
        axes.plot(
            time,
            shift[:, segment],
            color=colour,
            linewidth=1.2,
            label=f"{depth[segment]:.0f}",
            marker="o" if len(shift) < 50 else "",
            markersize=3,
        )
    if 1 < len(depth) <= 12:
        _margins(figure, right=1.1)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],
            labels[::-1],
            title="Depth (µm)",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    axes.margins(x=0.01)
    return figure


def plot_drift_scatter(sorting: Sorting) -> Figure:
    """Draw detections of the first pass by time and depth; larger ones are darker."""
    figure, axes = _figure(10.0, 6.0)
    _label(axes, "Detections before drift correction", "Time", "Depth (µm)")
    peaks = sorting.peaks
    if peaks is None or not len(peaks.sample):
        return _empty(figure, axes, "no detections")
    chosen = thinned(len(peaks.sample))
    time, unit = _time(peaks.sample[chosen], sorting)
    axes.set_xlabel(f"Time ({unit})")
    score = peaks.score[chosen].astype(float)
    low = max(float(score.min()), 1e-6)
    norm = LogNorm(low, max(float(np.quantile(score, 0.99)), low * 1.5), clip=True)
    order = np.argsort(score, kind="stable")  # the largest on top
    dots = axes.scatter(
        time[order],
        peaks.depth_um[chosen][order],
        c=score[order],
        s=_dot(len(order)),
        cmap=_greys(),
        norm=norm,
        linewidths=0,
        rasterized=True,
    )
    _colour_bar(figure, axes, dots, "Detection score", norm)
    axes.margins(x=0.005, y=0.02)
    return figure


def plot_diagnostics(sorting: Sorting) -> Figure:
    """Draw the learned waveforms, where each unit's template is strong, and amplitude against spike count."""
    figure = Figure(figsize=(10.0, 7.5))
    _margins(figure)
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        _bare(axes)
    _waveforms(figure, panels[0, 0], sorting, "components", "Waveform components (wPCA)")
    _waveforms(figure, panels[0, 1], sorting, "shapes", "Universal waveforms (wTEMP)")
    _template_norms(figure, panels[1, 0], sorting)
    _amplitude_against_count(figure, panels[1, 1], sorting)
    return figure


def plot_spike_positions(sorting: Sorting) -> Figure:
    """Draw where spikes are on the probe, each unit in its own colour; units that are not good are paler."""
    figure, axes = _figure(_width(sorting), 9.0)
    _label(axes, f"{sorting.n_units} units, {int(sorting.good.sum())} good", "x (µm)", "Depth (µm)")
    if sorting.probe is not None:
        axes.scatter(
            sorting.probe.x_um,
            sorting.probe.y_um,
            marker="s",
            s=14,
            facecolor="none",
            edgecolor=_PALE,
            linewidths=0.8,
            zorder=0,
        )
    spikes = thinned(sorting.n_spikes)
    spikes = spikes[sorting.kept[spikes]]
    if not len(spikes):
        return _empty(figure, axes, "no spikes")
    axes.scatter(
        sorting.x_um[spikes],
        sorting.y_um[spikes],
        c=_unit_colours(sorting)[sorting.unit[spikes]],
        s=2 * _dot(len(spikes)),
        linewidths=0,
        rasterized=True,
    )
    axes.margins(0.04)
    return figure


# -- panels ------------------------------------------------------------------------------------------


def _waveforms(figure: Figure, axes: Axes, sorting: Sorting, which: str, title: str) -> None:
    _label(axes, title, "Time from peak (ms)", "Amplitude (unit norm)")
    if sorting.waveforms is None:
        _empty(figure, axes, "no waveforms")
        return
    rows = getattr(sorting.waveforms, which)
    time_ms = (np.arange(rows.shape[1]) - sorting.settings.peak_sample) / sorting.sampling_rate_hz * 1e3
    axes.axvline(0, color=_PALE, linewidth=1, zorder=0)
    colours = colormaps["viridis"](np.linspace(0, 0.9, max(len(rows), 1)))
    for number, (row, colour) in enumerate(zip(rows, colours, strict=False), start=1):
        axes.plot(time_ms, row, color=colour, linewidth=1.3, label=str(number))
    axes.margins(x=0)
    if 0 < len(rows) <= 10:
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower right", handlelength=1.2, columnspacing=1.0)


def _template_norms(figure: Figure, axes: Axes, sorting: Sorting) -> None:
    _label(axes, "Template norm per channel", "Unit, by depth", "Channel")
    if not sorting.n_units:
        _empty(figure, axes, "no units")
        return
    norms = np.linalg.norm(sorting.unit_features, axis=2)  # (u, c)
    picture = axes.imshow(
        norms[_by_depth(sorting)].T,
        aspect="auto",
        origin="lower",
        cmap="BuPu",
        interpolation="nearest",
        vmin=0,
        vmax=max(float(np.quantile(norms.max(axis=1), 0.95)), 1e-6),
    )
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _amplitude_against_count(figure: Figure, axes: Axes, sorting: Sorting) -> None:
    _label(axes, "Amplitude against spike count", "Spikes", "Template norm")
    if not sorting.n_units:
        _empty(figure, axes, "no units")
        return
    count = np.zeros(sorting.n_units, np.int64)
    for at in range(0, sorting.n_spikes, MAX_POINTS):  # the columns may be larger than memory
        rows = slice(at, at + MAX_POINTS)
        count += np.bincount(sorting.unit[rows][sorting.kept[rows]], minlength=sorting.n_units)
    norm = np.linalg.norm(sorting.unit_features, axis=(1, 2))
    groups = [(False, _MUA, "mua"), (True, _GOOD, "good")]
    if np.isnan(sorting.contamination).all():
        groups = [(False, _INK, "not labelled")]
    for is_good, colour, label in groups:
        chosen = sorting.good == is_good
        axes.scatter(
            np.maximum(count[chosen], 1),
            norm[chosen],
            s=16,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=f"{label} ({chosen.sum()})",
        )
    axes.set_xscale("log")
    decades = np.log10([max(count.min(), 1), max(count.max(), 1)])
    axes.set_xlim(10 ** np.floor(decades[0] - 0.05), 10 ** np.ceil(decades[1] + 0.05))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


# -- style and helpers -------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    _margins(figure)
    axes = figure.subplots()
    _bare(axes)
    return figure, axes


def _margins(figure: Figure, *, right: float = 0.2) -> None:
    """Fixed margins, in inches: finding them costs matplotlib a second drawing of everything."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.75 / width, 0.55 / height, 1 - right / width, 1 - 0.4 / height, 0.28, 0.32)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(
        title, fontsize=10, color=_INK, loc="left", y=1.0
    )  # without y, matplotlib looks for room among ticks
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)


def _empty(figure: Figure, axes: Axes, why: str) -> Figure:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="#888888", fontsize=11)
    if not axes.collections:
        axes.set(xticks=[], yticks=[])
    return figure


def _colour_bar(figure: Figure, axes: Axes, dots: Any, label: str, norm: LogNorm) -> None:
    bar = figure.colorbar(dots, ax=axes, pad=0.01, aspect=35)
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    ticks = np.geomspace(low, high, 4)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9, color=_INK)
    bar.outline.set_visible(False)


def _greys() -> Any:
    """Greys without the near-white end, which is lost on white paper."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Greys"](np.linspace(0.22, 1.0, 256)))


def _unit_colours(sorting: Sorting) -> NDArray[np.float64]:
    """RGBA per unit (u, 4); neighbours in depth get very different hues."""
    rank = np.empty(sorting.n_units, np.int64)
    rank[_by_depth(sorting)] = np.arange(sorting.n_units)
    rgb = [colorsys.hls_to_rgb((at * _GOLDEN_TURN) % 1, 0.42 + 0.16 * (at % 2), 0.72) for at in rank]
    return np.column_stack([np.array(rgb).reshape(-1, 3), np.where(sorting.good, 0.8, 0.25)])


def _by_depth(sorting: Sorting) -> NDArray[np.int64]:
    """Units by shank and depth of their largest channel."""
    channel = np.linalg.norm(sorting.unit_features, axis=2).argmax(axis=1)
    if sorting.probe is None:
        return np.argsort(channel, kind="stable")
    return np.lexsort((sorting.probe.x_um[channel], sorting.probe.y_um[channel], sorting.probe.shank[channel]))


def _width(sorting: Sorting) -> float:
    """Width in inches, larger for wide arrays of contacts."""
    if sorting.probe is None:
        return 5.0
    across, along = np.ptp(sorting.probe.x_um), max(np.ptp(sorting.probe.y_um), 1.0)
    return float(np.clip(9.0 * across / along, 4.5, 12.0))


def thinned(n: int) -> NDArray[np.int64]:
    """At most MAX_POINTS of `n` indices, evenly spaced."""
    if n <= MAX_POINTS:
        return np.arange(n)
    return (np.arange(MAX_POINTS, dtype=np.int64) * n) // MAX_POINTS


def _dot(n: int) -> float:
    """Area of a dot (points²) when `n` are drawn."""
    return float(np.clip(40_000 / max(n, 1), 0.6, 5.0))


def _time(sample: NDArray[Any], sorting: Sorting) -> tuple[NDArray[np.float64], str]:
    """Convert samples to the unit of time that suits the recording's length."""
    seconds = np.asarray(sample, np.float64) / sorting.sampling_rate_hz
    whole = max(sorting.n_samples / sorting.sampling_rate_hz, float(seconds.max(initial=0.0)))
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if whole > 3 * length:
            return seconds / length, unit
    return seconds, "s"
