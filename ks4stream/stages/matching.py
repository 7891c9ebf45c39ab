"""Spikes: matching pursuit with the learned templates, block by block, and settling of borders (section 8)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import ArtifactWarning
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, write_block
from ks4stream.kernels import matching as kernels
from ks4stream.kernels.borders import Reported, settle
from ks4stream.kernels.matching import TileSpikes
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.settings import AUTO
from ks4stream.stages.base import Block, Run
from ks4stream.stages.detection import rows_of_region
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.pursuit import Pursuit
from ks4stream.stages.thresholds import Thresholds, chosen_batches

logger = logging.getLogger("ks4stream")

MUCH_BLANKED = 0.05  # share of the recording above which there is a warning

LARGE_SCORES, FAR_SMALLER = (24.0, 48.0), 0.25
"""From each of these scores on, features contain what spikes explain whose scores are below this share of it. At one
displacement, the waveform of a large neuron differs from its template by more than small spikes are large."""


class Edge(NamedTuple):
    """Spikes of a block within nt of one of its outer borders, to be settled with those of the adjacent block."""

    row: NDArray[np.int64]  # in the block's file
    spikes: Reported


KNOWN_SHARE = 0.3  # of the time of a tile that is matched, for one by which thresholds were set: its spikes are known
N_SPANS = 1000  # of the time course of the energy, at most
MIN_MOVED = 1e-3  # smallest noise of a moved channel relative to one that is not; those without signal have none


class InTile(NamedTuple):
    """What was found in one tile."""

    rows: dict[str, NDArray[Any]]  # columns of its spikes, and whether they count
    artifacts: NDArray[np.int64]  # (m, 2) blanked spans, in samples, half-open
    energy: NDArray[np.float32]  # (2, c)


class Matched(NamedTuple):
    """Spikes of one block."""

    first: int  # first sample of its core
    receipt: Receipt  # of rows that count, and of those within nt of the outer borders, which may count
    left: Edge
    right: Edge
    artifacts: NDArray[np.int64]  # (m, 2) blanked spans, in samples, half-open
    energy: NDArray[np.float32]  # (tile, 2, c) mean square of whitened traces, and of what spikes do not explain


class Energy(NamedTuple):
    """Mean square of whitened traces over time, away from blanked spans: NaN if there are only those."""

    edge: NDArray[np.int64]  # (k + 1,) of the spans of time, samples
    energy: NDArray[np.float32]  # (k, 2, c) of the traces, and of what spikes do not explain


@dataclass(frozen=True)
class Spikes:
    """All spikes above the thresholds of their templates, in the files of their blocks, grouped by region.

    Columns: ``sample``, ``template``, ``score``, ``features``.
    """

    receipts: list[Receipt]
    first: NDArray[np.int64]  # (blocks,) first sample of each block
    dropped: list[NDArray[np.int64]]  # for each block, the rows that do not count, ascending
    artifacts: NDArray[np.int64]  # (m, 2) blanked spans, in samples, half-open
    template_channels: NDArray[np.int64]  # (v, j) channels of the features of each template's spikes, padded with −1
    region_of: NDArray[np.int64]  # (v,) region of each template
    threshold: NDArray[np.float64]  # (v,) of each template, noise s.d.
    sampling_rate_hz: float
    energy: Energy | None = None

    @property
    def of_region(self) -> NDArray[np.int64]:
        """Number of rows of each region, those that do not count included."""
        return rows_of_region(self.receipts)

    def counted(self, region: int) -> NDArray[np.int64]:
        """Rows of a region that count, numbered across all blocks."""
        counts, before = np.ones(int(self.of_region[region]), bool), 0
        for receipt, dropped in zip(self.receipts, self.dropped, strict=True):
            start, stop = receipt.start[region], receipt.start[region + 1]
            in_region = dropped[(dropped >= start) & (dropped < stop)]
            counts[in_region - start + before] = False
            before += int(stop - start)
        return np.flatnonzero(counts)


@dataclass(frozen=True, eq=False)
class Match(Pursuit[Matched, Spikes]):
    """Find all spikes by matching pursuit, and settle which tile the spikes at borders belong to."""

    name = "matching"
    records = (Matched, Edge, Reported)

    regions: geometry.Regions
    thresholds: Thresholds

    def items(self, run: Run) -> Sequence[Block]:
        """All batches, if there are any templates."""
        return run.blocks(self.tiles.tiling) if len(self.templates.features) else []

    def task(self, item: Block, folder: Place) -> Matched:
        """Match a block and write its spikes, with features, grouped by the region of their template."""
        found = [self._in_tile(tile) for tile in self.tiles.read_ahead(item, folder)]
        tiles = [of_tile.rows for of_tile in found]
        for i in range(1, len(item)):
            if item[i - 1].stop == item[i].start:  # otherwise batches between the two are not sorted
                left, right = tiles[i - 1], tiles[i]
                reported = [Reported(side["sample"], side["template"], side["counts"]) for side in (left, right)]
                left["counts"], right["counts"] = self._settle(reported[0], reported[1], item[i].start)
        columns = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        nt, first, last = self.settings.nt, item[0].start, item[-1].stop
        outer = (columns["sample"] < first + nt) | (columns["sample"] >= last - nt)
        rows = np.flatnonzero(columns["counts"] | outer)
        region = self.region_of[columns["template"][rows]]
        order = np.argsort(region, kind="stable")  # that of the file, so that edges can tell rows
        columns = {name: values[rows[order]] for name, values in columns.items()}
        sample, template, counts = columns["sample"], columns["template"], columns.pop("counts")
        path = folder / f"spikes-{item[0].index:08d}-{item[-1].index:08d}.rows"
        receipt = write_block(path, columns, region[order], len(self.regions))

        def edge(rows: NDArray[np.bool_]) -> Edge:
            return Edge(np.flatnonzero(rows), Reported(sample[rows], template[rows], counts[rows]))

        left_edge, right_edge = edge(sample < first + nt), edge(sample >= last - nt)
        artifacts = joined_spans(of_tile.artifacts for of_tile in found)
        energy = np.stack([of_tile.energy for of_tile in found])
        return Matched(first, receipt, left_edge, right_edge, artifacts, energy)

    def _in_tile(self, tile: Tile) -> InTile:
        """Spikes of the core and within nt of it; those outside the core count only if settling borders decides so."""
        nt, prepared, device = self.settings.nt, self.prepared, self.tiles.device
        traces, blank = self.tiles.whitened(tile)
        without = self.tiles.without_spikes(blank, nt)[self.tiles.core(tile)]
        spikes = self.thresholds.spikes_of(tile, device)
        if spikes is None:
            spikes = self.matched(traces, tile)
        threshold = torch.from_numpy(self.thresholds.score.astype(np.float32)).to(device)
        spikes = spikes.at(spikes.score > threshold[spikes.unit])
        every, time = spikes, self.sample_of(tile, spikes)
        residual = kernels.subtract(traces, every, prepared)
        energy = self._energy(tile, without, traces, residual)
        near = (time >= tile.start - nt) & (time < tile.stop + nt)
        near &= self.tiles.away_from_edges(tile, time - tile.first, blank, nt)
        spikes = spikes.at(near)
        sample = time[near].cpu().numpy()
        rows = {
            "sample": sample,
            "template": spikes.unit.cpu().numpy().astype(np.int32),
            "score": spikes.score.cpu().numpy(),
            "features": self._features(residual, every, spikes).cpu().numpy(),
            "counts": (sample >= tile.start) & (sample < tile.stop),
        }
        return InTile(rows, spans(without.cpu().numpy()) + tile.start, energy)

    def _energy(self, tile: Tile, without: Tensor, *traces: Tensor) -> NDArray[np.float32]:
        """Mean square of traces (c, t) in the core of a tile, where spikes were looked for: (2, c).

        Interpolation reduces the noise of traces that were moved; they are compared with others as if it did not.
        """
        core = self.tiles.core(tile)
        n_samples = (~without).sum()
        norms = torch.stack([torch.linalg.vector_norm(each[:, core], dim=1) for each in traces])
        if (moving := self.tiles.moving_matrix(tile)) is not None:
            norms /= torch.linalg.vector_norm(moving, dim=1).clamp(min=MIN_MOVED)
        return np.asarray((norms.square() / n_samples).cpu().numpy(), np.float32)

    def _features(self, residual: Tensor, every: TileSpikes, spikes: TileSpikes) -> Tensor:
        """Features of some spikes (n, j, q), given the residual without any; large ones keep what is far smaller."""
        features = kernels.features(residual, spikes, self.prepared)
        added = 0.0
        for large in LARGE_SCORES:
            rows, limit = spikes.score > large, FAR_SMALLER * large
            small = every.at((every.score >= added) & (every.score < limit))
            residual = kernels.subtract(residual, small._replace(amplitude=-small.amplitude), self.prepared)
            features[rows] = kernels.features(residual, spikes.at(rows), self.prepared)
            added = limit
        return features

    def _settle(self, left: Reported, right: Reported, border: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return settle(left, right, border=border, nt=self.settings.nt, tolerance=self.settings.peak_sample)

    def found(self, part: Matched) -> dict[str, int]:
        """Spikes of a block; the few near its borders may be counted in both blocks."""
        return {"spikes": part.receipt.n_rows}

    def combine(self, parts: Iterable[Matched], run: Run) -> Spikes:
        """Settle the borders between blocks."""
        first, receipts, artifacts = [], [], []
        counts: list[dict[int, bool]] = []  # for each block, whether the rows near its borders count
        energy = _EnergyOverTime(self.tiles)
        before: Matched | None = None
        for block in parts:
            first.append(block.first)
            receipts.append(block.receipt)
            artifacts.append(block.artifacts)
            energy.add(block.energy)
            counts.append(
                _by_row(block.left, block.left.spikes.counts) | _by_row(block.right, block.right.spikes.counts)
            )
            if before is not None and self.tiles.tiling.step == 1:
                settled = np.array([counts[-2][row] for row in before.right.row.tolist()], bool)
                keep_left, keep_right = self._settle(
                    before.right.spikes._replace(counts=settled), block.left.spikes, block.first
                )
                counts[-2] |= _by_row(before.right, keep_left)
                counts[-1] |= _by_row(block.left, keep_right)
            before = block
        dropped = [np.array(sorted(row for row in of_block if not of_block[row]), np.int64) for of_block in counts]
        blanked = joined_spans(artifacts)
        blanked_s = np.diff(blanked).sum() / self.tiles.sampling_rate_hz
        tiling = self.tiles.tiling
        n_samples = min(tiling.n_tiles * tiling.size, tiling.stop - tiling.start)  # the last batch may be shorter
        share = blanked_s * self.tiles.sampling_rate_hz / n_samples
        message = (
            f"No spikes were looked for in {blanked_s:.2f} s, {100 * share:.1f} % of the recording, because of "
            f"artifacts, loud noise or dead time (Sorting.artifacts; number of spans: {len(blanked)})"
        )
        if share > MUCH_BLANKED:
            warn(f"{message}.", ArtifactWarning)
        elif len(blanked):
            logger.info(message)
        return Spikes(
            receipts=receipts,
            first=np.array(first, np.int64),
            dropped=dropped,
            artifacts=blanked,
            template_channels=self.template_channels,
            region_of=self.region_of,
            threshold=self.thresholds.score,
            sampling_rate_hz=self.tiles.sampling_rate_hz,
            energy=energy.found(),
        )

    @cached_property
    def template_channels(self) -> NDArray[np.int64]:
        """Channels of the features of each template's spikes (v, j), padded with −1; computed on the CPU."""
        return self.slots[kernels.largest_channel(torch.from_numpy(self.templates.features)).numpy()]

    @cached_property
    def region_of(self) -> NDArray[np.int64]:
        """Region of each template (v,)."""
        return template_regions(self.template_channels, self.tiles.probe, self.regions)

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Scores besides the tile, and the rows of a block. Tiles by which thresholds were set are known already."""
        n_tiles, is_auto = len(load.tiling), load.settings.Th_learned == AUTO
        n_known = len(chosen_batches(load.tiling)) if is_auto else 0
        return load.on_tiles(
            cls.name,
            cls.bytes_beside_tile(load),
            rows=load.block_bytes(),
            scratch_bytes=load.row_bytes * load.n_spikes,
            n_tiles_read=n_tiles,
            work=cls.pursuit_work(load, n_tiles - (1 - KNOWN_SHARE) * n_known),
            writes_blocks=True,
        )


class _EnergyOverTime:
    """The mean energy of the batches in each of a bounded number of spans of time, added in order."""

    def __init__(self, tiles: Preprocessor) -> None:
        tiling = tiles.tiling
        self._per_span = -(-len(tiling) // N_SPANS)
        n_spans = -(-len(tiling) // self._per_span)
        tiles_per_span = self._per_span * tiling.step * tiling.size
        self._edge = np.minimum(tiling.start + np.arange(n_spans + 1) * tiles_per_span, tiling.stop)
        self._sum = np.zeros((n_spans, 2, tiles.probe.n_channels))
        self._count = np.zeros(n_spans)
        self._n_tiles = 0

    def add(self, energy: NDArray[np.float32]) -> None:
        """Add the next batches (tile, 2, c)."""
        for of_tile in energy:
            if np.isfinite(of_tile).all():  # there is nothing in a blanked batch
                self._sum[self._n_tiles // self._per_span] += of_tile
                self._count[self._n_tiles // self._per_span] += 1
            self._n_tiles += 1

    def found(self) -> Energy:
        """The spans and their energy; NaN where nothing was added."""
        count = np.where(self._count, self._count, np.nan)
        return Energy(self._edge, (self._sum / count[:, None, None]).astype(np.float32))


def template_regions(
    template_channels: NDArray[np.int64], probe: Probe, regions: geometry.Regions
) -> NDArray[np.int64]:
    """Region of each template (v,), by the position of its largest channel, the first of `template_channels` (v, j)."""
    largest = template_channels[:, 0]
    return regions.region_at(probe.positions_um[largest], probe.shank[largest])


def spans(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Half-open spans (m, 2) in which a mask is set.

    >>> spans(np.array([False, True, True, False, True])).tolist()
    [[1, 3], [4, 5]]
    """
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.column_stack([np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)]).astype(np.int64)


def joined_spans(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Concatenate spans (m, 2), which are in time order, and join those that touch: (m, 2)."""
    every = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    opens = np.append(True, every[1:, 0] > every[:-1, 1])[: len(every)]
    closes = np.append(opens[1:], True)[: len(every)]
    return np.column_stack([every[opens, 0], every[closes, 1]])


def _by_row(edge: Edge, counts: NDArray[np.bool_]) -> dict[int, bool]:
    return dict(zip(edge.row.tolist(), counts.tolist(), strict=True))
