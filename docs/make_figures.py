"""Draw the figures of docs/method.md and the README from a simulated recording, in a minute on a CPU.

    python docs/make_figures.py

Everything follows from the seed: the same figures come out again with the same versions of the libraries.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

import ks4stream
from ks4stream import geometry, simulate
from ks4stream.blocks import Tiling
from ks4stream.kernels import clustering, detection, graph, splits
from ks4stream.kernels.borders import Reported, settle
from ks4stream.kernels.convolution import correlate
from ks4stream.results import Sorting
from ks4stream.stages.clustering import Circumstances, GraphClustering, scattered_rows
from ks4stream.stages.small_peaks import lowest_peak

FOLDER = Path(__file__).parent / "figures"
SEED, N_CHANNELS, N_UNITS, DURATION_S, DRIFT_UM = 7, 32, 18, 60.0, 25.0
DPI, N_COLOURS = 110, 128  # of the PNG files, which have a palette to be small

INK, GREY, PALE = "#222222", "#8a8a8a", "#dcdcdc"
BLUE, ORANGE, GREEN, RED = "#1b6ca8", "#d98a1f", "#2f8f5b", "#b8402f"
COLOURS = [
    *("#1b6ca8", "#d98a1f", "#2f8f5b", "#b8402f", "#7b55a8", "#0e9aa7", "#c2589b", "#7a7a1e", "#4b6cd1", "#9a5b2c"),
    *("#d1495b", "#3d8361", "#8c6bb1", "#e07a5f", "#287271", "#b5838d", "#5f7161", "#a44a3f", "#3a86c8", "#8a7f2b"),
]


@dataclass(frozen=True, eq=False)
class Example:
    """A minute of two staggered columns of contacts in tissue that moves, and what is found in it."""

    truth: simulate.SimulatedRecording

    @cached_property
    def recording(self) -> ks4stream.Recording:
        """The recording, in memory."""
        samples = self.truth.read(0, self.truth.traces.shape[0])
        return ks4stream.open_recording(samples, fs=self.truth.sampling_rate_hz, probe=self.truth.probe)

    @cached_property
    def sorting(self) -> Sorting:
        """The sorting, with the default settings."""
        return ks4stream.sort(self.recording, client="loop")

    def traces(self, start: int, stop: int) -> torch.Tensor:
        """Whitened, drift-corrected traces (c, t)."""
        found = ks4stream.preprocess(
            self.recording, self.sorting.settings, whitening=self.sorting.whitening, drift=self.sorting.drift
        )
        return torch.from_numpy(np.ascontiguousarray(found[start:stop].compute(scheduler="synchronous").to_numpy().T))

    def shift_um(self, sample: NDArray[np.int64]) -> NDArray[np.float64]:
        """Estimated shift at given times; positive moves to larger depth."""
        assert self.sorting.drift is not None
        return np.asarray(self.sorting.drift.shift_um[self.sorting.tiling.tile_of(sample), 0], np.float64)


def make_example() -> Example:
    """Describe the recording; it is made and sorted when it is asked for."""
    probe = simulate.staggered_probe(N_CHANNELS)
    return Example(
        simulate.simulate(
            probe, DURATION_S, seed=SEED, n_units=N_UNITS, drift="rigid", drift_range_um=DRIFT_UM, hash_per_channel=4.0
        )
    )


# -- tiles, halos and borders ------------------------------------------------------------------------


def draw_tiles(_: Example) -> Figure:
    """Three tiles; two spikes near a border that both neighbours report, and who owns them."""
    tiling = Tiling.of(n_samples=17_000, size=6000, halo=1449, shortest=61)
    border, nt, tolerance = tiling[1].start, 61, 20
    left_times, right_times = np.array([border - 30, border + 12]), np.array([border - 28, border + 12])
    unit = np.array([4, 7])
    keep_left, keep_right = settle(
        Reported(left_times, unit, left_times < border),
        Reported(right_times, unit, right_times >= border),
        border=border,
        nt=nt,
        tolerance=tolerance,
    )
    figure = Figure(figsize=(9.0, 3.1))
    wide, near = figure.subplots(1, 2, width_ratios=(2, 1))
    for axes in (wide, near):
        _bare(axes, left=False)
    for tile in tiling:
        row = -tile.index
        wide.add_patch(Rectangle((tile.first, row - 0.3), tile.length, 0.6, facecolor=PALE, edgecolor="none"))
        wide.add_patch(Rectangle((tile.start, row - 0.3), tile.stop - tile.start, 0.6, facecolor=BLUE, alpha=0.85))
        wide.text((tile.start + tile.stop) / 2, row, f"core {tile.index}", color="white", ha="center", va="center")
        for x in (tile.first + tile.halo / 2, tile.start + tile.size + tile.halo / 2):
            wide.text(x, row, "halo", color=INK, ha="center", va="center", fontsize=8)
        wide.text(-1900, row, f"tile {tile.index}", ha="right", va="center", fontsize=9, color=INK)
    for x, name in ((tiling.start, "start"), (tiling.stop, "stop")):
        wide.axvline(x, color=INK, linewidth=1, linestyle=":")
        wide.text(x, 0.48, name, ha="center", va="bottom", fontsize=8, color=INK)
    wide.set(xlim=(-1700, 19_800), ylim=(-2.6, 0.75), yticks=[])
    wide.set_xlabel("sample", fontsize=9)
    wide.set_title("beyond start and stop the edge value is repeated", fontsize=9, color=INK, loc="left", pad=14)

    near.axvspan(border - nt, border + nt, color=PALE, alpha=0.6, linewidth=0)
    near.axvline(border, color=INK, linewidth=1.2)
    for row, (times, keep, label) in enumerate(
        ((left_times, keep_left, "tile 0 reports"), (right_times, keep_right, "tile 1 reports"))
    ):
        near.axhline(-row, color=PALE, linewidth=1, zorder=0)
        near.scatter(times[keep], np.full(keep.sum(), -row), s=70, color=GREEN, zorder=2)
        near.scatter(times[~keep], np.full((~keep).sum(), -row), s=70, facecolor="white", edgecolor=RED, zorder=2)
        near.text(border - 235, -row + 0.08, label, fontsize=9, color=INK)
    for one, other in zip(left_times, right_times, strict=True):
        near.plot([one, other], [-0.09, -0.91], color=GREY, linewidth=1)
    near.text(left_times[0], 0.22, "unit 4", ha="center", fontsize=8, color=INK)
    near.text(left_times[1] + 3, 0.22, "unit 7", ha="left", fontsize=8, color=INK)
    near.text(border, -1.45, "± nt around the border", ha="center", fontsize=8, color=INK)
    near.set(xlim=(border - 240, border + 95), ylim=(-1.7, 0.75), yticks=[])
    near.set_xlabel("sample", fontsize=9)
    near.set_title("pairs are one spike, the left version", fontsize=9, color=INK, loc="left", pad=14)
    figure.subplots_adjust(0.07, 0.16, 0.985, 0.86, 0.08)
    return figure


# -- bound and search --------------------------------------------------------------------------------

PIECE_MS = 12.0


def draw_search(example: Example) -> Figure:
    """Bounds, the pairs evaluated, and all scores with the peaks, of a few milliseconds."""
    sorting = example.sorting
    settings, rate = sorting.settings, sorting.sampling_rate_hz
    n_shown = round(PIECE_MS * rate / 1000) // detection.BIN * detection.BIN
    margin = 20 * detection.BIN
    start = _busiest(sorting.sample, n_shown) - margin
    traces = example.traces(start, start + n_shown + 2 * margin)
    centres = geometry.template_centres(example.truth.probe, settings)
    assert sorting.waveforms is not None
    templates = detection.universal_templates(
        torch.from_numpy(sorting.waveforms.shapes),
        torch.from_numpy(sorting.waveforms.components),
        channels=torch.from_numpy(centres.channels),
        weights=torch.from_numpy(centres.weights),
        neighbours=torch.from_numpy(centres.neighbours),
        depth_um=torch.from_numpy(example.truth.probe.y_um.astype(np.float32)),
    )
    options: dict[str, Any] = dict(threshold=lowest_peak(settings), reach=settings.peak_sample)
    peaks = detection.detect(traces, templates, first=margin, last=margin + n_shown, **options)
    matches = correlate(traces, templates.shapes, layout="ctp")
    search = detection._PeakSearch(matches, templates, **options)
    bound = search.bound.clone()
    search.evaluate(search.summits())
    search.evaluate(search.undominated())
    search.evaluate(search.rivals(*search.candidates(margin, margin + n_shown)))
    bound, best = (values.view(len(centres), -1).numpy() for values in (bound, search.best))
    score = torch.stack(
        [(weights @ matches[own].flatten(1)).abs().view(len(weights), *matches.shape[1:]).amax(dim=(0, 2))
         for own, weights in zip(templates.channels, templates.weights, strict=True)]
    ).numpy()  # fmt: skip
    shown = slice(margin // detection.BIN, (margin + n_shown) // detection.BIN)
    bound, best, score = bound[:, shown], best[:, shown], score[:, margin : margin + n_shown]
    order = np.lexsort((centres.position_um[:, 0], centres.position_um[:, 1]))
    figure = Figure(figsize=(9.0, 3.3))
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    above = float((bound > options["threshold"]).mean())
    evaluated = float((best >= 0).mean())
    titles = (
        f"bound, above threshold in {100 * above:.1f} %",
        f"score, evaluated in {100 * evaluated:.1f} %",
        f"score everywhere, {len(peaks.sample)} peaks",
    )
    images = (bound, np.where(best >= 0, best, np.nan), score)
    for axes, image, title in zip(panels, images, titles, strict=True):
        _bare(axes)
        picture = axes.imshow(
            image[order],
            aspect="auto",
            origin="lower",
            extent=(0, PIECE_MS, 0, len(order)),
            vmin=0,
            vmax=3 * options["threshold"],
            cmap=_greys(),
            interpolation="nearest",
        )
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("time (ms)", fontsize=9)
    rank = np.argsort(order)
    panels[2].scatter(
        (peaks.sample.numpy() - margin) / rate * 1000,
        rank[peaks.centre.numpy()] + 0.5,
        s=46,
        facecolor="none",
        edgecolor=RED,
        linewidths=1.3,
    )
    panels[0].set_ylabel("centre, by depth", fontsize=9)
    figure.subplots_adjust(0.06, 0.15, 0.93, 0.9, 0.08)
    bar = figure.colorbar(picture, cax=figure.add_axes((0.945, 0.15, 0.012, 0.75)))
    bar.ax.axhline(options["threshold"], color=RED, linewidth=1.3)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    print(f"search: {100 * above:.1f} % of the pairs above threshold, {100 * evaluated:.2f} % evaluated")
    return figure


def _busiest(sample: NDArray[np.int64], n_samples: int) -> int:
    """Where a window of some samples holds most spikes."""
    count = np.searchsorted(sample, sample + n_samples) - np.arange(len(sample))
    return int(sample[count.argmax()]) - n_samples // 8


# -- clusters of a region, and comparisons of two ----------------------------------------------------

REGION_UM = (500.0, 640.0)  # depths of the region that is drawn


class Comparison(NamedTuple):
    """Projections of two groups of spikes that were compared in cells, and their separation."""

    separation: float
    projections: tuple[torch.Tensor, torch.Tensor]

    @property
    def two(self) -> bool:
        """Whether they are two neurons."""
        return self.separation >= splits.SEPARATE_FROM

    @property
    def size(self) -> int:
        """Spikes of the smaller group."""
        return min(map(len, self.projections))


def draw_clustering(example: Example) -> Figure:
    """Clusters of one region, and the projections of a pair that is one neuron and of one that is two."""
    rows, conditions = _region(example.sorting)
    label, compared = _cluster_and_listen(example.sorting, rows, conditions)
    figure = Figure(figsize=(9.0, 3.3))
    panels = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _draw_clusters(panels[0], rows, label)
    _draw_comparison(panels[1], max((one for one in compared if not one.two), key=lambda one: one.size))
    _draw_comparison(panels[2], min((one for one in compared if one.two), key=lambda one: one.separation))
    figure.subplots_adjust(0.03, 0.15, 0.985, 0.9, 0.16)
    n_joined = sum(not one.two for one in compared)
    print(
        f"clustering: {rows.n} spikes, {label.max() + 1} clusters, {len(compared)} comparisons, {n_joined} one neuron"
    )
    return figure


def _region(sorting: Sorting) -> tuple[graph.ScatteredRows, splits.Conditions]:
    """Features and conditions of the spikes whose template is in the region."""
    assert sorting.probe is not None
    depth_um = sorting.probe.y_um[sorting.template_channels[:, 0]]
    inside = (depth_um >= REGION_UM[0]) & (depth_um < REGION_UM[1])
    kept = sorting.kept & inside[sorting.template]
    union = np.unique(sorting.template_channels[inside])
    rows = scattered_rows(
        np.asarray(sorting.features[kept]),
        sorting.template[kept],
        sorting.template_channels,
        union[union >= 0],
        sorting.probe.n_channels,
        "cpu",
    )
    circumstances = Circumstances(sorting.tiling, sorting.sampling_rate_hz, sorting.drift)
    return rows, circumstances.of(sorting.sample[kept], float(np.mean(REGION_UM)))


def _cluster_and_listen(
    sorting: Sorting, rows: graph.ScatteredRows, conditions: splits.Conditions
) -> tuple[NDArray[np.int64], list[Comparison]]:
    """Cluster a region without step 6a; keep what was compared in cells."""
    separation = splits.separation
    compared: list[Comparison] = []

    def listen(a: torch.Tensor, b: torch.Tensor) -> float:
        compared.append(Comparison(separation(a, b), (a, b)))
        return compared[-1].separation

    assert sorting.waveforms is not None
    components = torch.from_numpy(sorting.waveforms.components)
    with mock.patch.object(splits, "separation", listen):
        label = GraphClustering(sorting.settings)(rows, conditions, components=components)
    return label, compared


def _draw_clusters(axes: Axes, rows: graph.ScatteredRows, label: NDArray[np.int64]) -> None:
    points = clustering.PrincipalRows(rows, torch.arange(rows.n), 2)
    flat = points.chunk(0, rows.n).flip(1).numpy()  # the largest component is the last
    axes.scatter(flat[:, 0], flat[:, 1], s=7, c=np.array(COLOURS)[label % len(COLOURS)].tolist(), linewidths=0)
    marked = flat[graph.choose_landmarks(rows.n, downsampling=20, min_landmarks=1, max_landmarks=25_000).numpy()]
    axes.scatter(marked[:, 0], marked[:, 1], s=26, facecolor="none", edgecolor=INK, linewidths=0.7)
    axes.set_title(f"{rows.n} spikes in {label.max() + 1} clusters, and landmarks", fontsize=9, color=INK, loc="left")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("first two principal components", fontsize=9)
    _bare(axes)


def _draw_comparison(axes: Axes, shown: Comparison) -> None:
    """Histograms of the two groups."""
    edges = np.linspace(-splits.SPAN, splits.SPAN, 61)
    sides = [side.clamp(-splits.SPAN, splits.SPAN).numpy() for side in shown.projections]
    axes.hist(sides, edges, stacked=True, color=[BLUE, ORANGE], alpha=0.35, linewidth=0, histtype="stepfilled")
    axes.hist(np.concatenate(sides), edges, color=INK, linewidth=1.0, histtype="step")
    name = "two neurons" if shown.two else "one neuron"
    axes.set(yticks=[], xlim=(-splits.SPAN, splits.SPAN))
    axes.set_title(f"{name}: separation {shown.separation:.1f}", fontsize=9, color=INK, loc="left")
    axes.set_xlabel("projection", fontsize=9)
    _bare(axes, left=False)


# -- drift -------------------------------------------------------------------------------------------


def draw_drift(example: Example) -> Figure:
    """Peaks before drift correction, the shift, and spikes after it."""
    sorting, truth = example.sorting, example.truth
    assert sorting.peaks is not None and sorting.drift is not None
    rate, low, high = sorting.sampling_rate_hz, 180.0, 480.0
    figure = Figure(figsize=(9.0, 3.3))
    before, shift, after = figure.subplots(1, 3)
    _depths(before, sorting.peaks.sample / rate, sorting.peaks.depth_um, sorting.peaks.score, (low, high))
    before.set_title("peaks before", fontsize=9, color=INK, loc="left")
    before.set_ylabel("depth (µm)", fontsize=9)
    kept = np.flatnonzero(sorting.kept)
    strength = np.linalg.norm(sorting.features[kept], axis=(1, 2))
    _depths(after, sorting.sample[kept] / rate, sorting.y_um[kept], strength, (low, high))
    after.set_title("spikes after", fontsize=9, color=INK, loc="left")
    times = np.arange(0, DURATION_S, 0.1)
    moved = -truth.drift.displacement_um(times)
    centres = sorting.tiling.centres / rate
    estimated = sorting.drift.shift_um[:, 0]
    shift.plot(times, moved - np.median(moved), color=PALE, linewidth=4, label="true, reversed")
    shift.plot(centres, estimated, color=BLUE, linewidth=1.3, marker="o", markersize=3, label="estimated")
    shift.legend(frameon=False, fontsize=8)
    shift.set_title("shift (µm)", fontsize=9, color=INK, loc="left")
    for axes in (before, shift, after):
        _bare(axes)
        axes.set_xlabel("time (s)", fontsize=9)
    figure.subplots_adjust(0.06, 0.15, 0.985, 0.9, 0.16)
    return figure


def _depths(
    axes: Axes, time_s: NDArray[Any], depth_um: NDArray[Any], size: NDArray[Any], limits: tuple[float, float]
) -> None:
    shade = np.clip(np.log(size / np.quantile(size, 0.02)) / np.log(np.quantile(size, 0.98) / size.min()), 0, 1)
    order = np.argsort(size, kind="stable")
    axes.scatter(time_s[order], depth_um[order], c=shade[order], s=2.2, cmap=_greys(), vmin=0, vmax=1, linewidths=0)
    axes.set(ylim=limits, xlim=(0, DURATION_S))


# -- the sorted recording ----------------------------------------------------------------------------


def draw_sorted(example: Example) -> Figure:
    """Spikes by time and depth as recorded, coloured by unit, and the templates of some units on the probe."""
    sorting = example.sorting
    assert sorting.probe is not None and sorting.waveforms is not None
    rate, probe = sorting.sampling_rate_hz, sorting.probe
    kept = np.flatnonzero(sorting.kept)
    norm = np.linalg.norm(sorting.unit_features, axis=2)
    by_depth = np.argsort(probe.y_um[norm.argmax(axis=1)], kind="stable")
    colours = np.empty(sorting.n_units, object)
    colours[by_depth] = [COLOURS[(7 * at) % len(COLOURS)] for at in range(sorting.n_units)]
    figure = Figure(figsize=(10.0, 5.4))
    depths, beside = figure.subplots(1, 2, width_ratios=(2.5, 1), sharey=True)
    recorded = sorting.y_um[kept] - example.shift_um(sorting.sample[kept])
    depths.scatter(
        sorting.sample[kept] / rate, recorded, c=colours[sorting.unit[kept]].tolist(), s=5, linewidths=0, alpha=0.85
    )
    depths.set(xlim=(0, DURATION_S), ylim=(probe.y_um.min() - 30, probe.y_um.max() + 40))
    depths.set_xlabel("time (s)", fontsize=9)
    depths.set_ylabel("depth (µm)", fontsize=9)
    depths.set_title(
        f"{len(kept)} spikes of {sorting.n_units} units, where they were recorded", fontsize=10, color=INK, loc="left"
    )
    beside.scatter(probe.x_um, probe.y_um, marker="s", s=9, color=PALE, linewidths=0, zorder=0)
    waveforms = np.einsum("ucq,qw->ucw", sorting.unit_features, sorting.waveforms.components)
    width, height = 24.0, 0.55 * 1000 / np.abs(waveforms).max() / 10
    time = (np.arange(waveforms.shape[2]) - sorting.settings.peak_sample) / waveforms.shape[2] * width
    shown: list[float] = []
    for unit in np.argsort(-norm.max(axis=1), kind="stable").tolist():
        middle = float(probe.y_um[norm[unit].argmax()])
        if any(abs(middle - other) < 75 for other in shown):
            continue
        shown.append(middle)
        for channel in np.flatnonzero((norm[unit] > 0.2 * norm[unit].max()) & (np.abs(probe.y_um - middle) <= 40)):
            beside.plot(
                probe.x_um[channel] + time,
                probe.y_um[channel] + height * waveforms[unit, channel],
                color=colours[unit],
                linewidth=1.4,
            )
    beside.set_title("templates on the probe", fontsize=10, color=INK, loc="left")
    beside.set_xlabel("x (µm)", fontsize=9)
    for axes in (depths, beside):
        _bare(axes)
    figure.subplots_adjust(0.065, 0.1, 0.985, 0.93, 0.06)
    return figure


# -- style -------------------------------------------------------------------------------------------


def _bare(axes: Axes, *, left: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_visible(left)
    axes.tick_params(colors=INK, labelsize=8)


def _greys() -> Colormap:
    return ListedColormap(colormaps["Greys"](np.linspace(0.04, 1.0, 256))).with_extremes(bad="#f3efe6")


def _write(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette, a third of the size of one with three full channels."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB").quantize(N_COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


FIGURES: dict[str, Callable[[Example], Figure]] = {
    "tiles": draw_tiles,
    "search": draw_search,
    "clustering": draw_clustering,
    "drift": draw_drift,
    "sorted": draw_sorted,
}


def main() -> None:
    """Draw all figures, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], default=[], help="Figures; all by default.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="Folder to write to.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    example = make_example()
    for name in options.names or FIGURES:
        _write(FIGURES[name](example), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
