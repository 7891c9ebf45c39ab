"""All spikes: matching pursuit with the learned templates, block by block, borders settled (section 8)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, write_block
from ks4stream.kernels import matching as kernels
from ks4stream.kernels.borders import Reported, settle
from ks4stream.results import Templates, Waveforms
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.waveforms import away_from


class Edge(NamedTuple):
    """A block's spikes within nt of one of its outer borders, still to be settled with the next block's."""

    row: NDArray[np.int64]  # of the block's file
    spikes: Reported


class Matched(NamedTuple):
    """What one block found."""

    first: int  # first sample of its core
    receipt: Receipt  # of rows that count, and of those within nt of the outer borders that may
    left: Edge
    right: Edge
    artifacts: NDArray[np.int64]  # (m, 2) spans that were blanked, in samples, half open


@dataclass(frozen=True, eq=False)
class SpikeMatcher:
    """Matches a block and writes its spikes, with features, grouped by the region of their template."""

    source: Preprocessor
    waveforms: Waveforms
    templates: Templates
    region_of: NDArray[np.int64]  # (v,) region of each template
    n_regions: int
    folder: Place = Path()
    _ready: dict[str, kernels.Matcher] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}}

    @property
    def matcher(self) -> kernels.Matcher:
        """The templates made ready, on first use."""
        if "matcher" not in self._ready:
            device, count = self.source.device, self.source.settings.nearest_chans
            self._ready["matcher"] = kernels.prepare(
                torch.from_numpy(self.templates.features).to(device),
                torch.from_numpy(self.waveforms.components).to(device),
                torch.from_numpy(channel_slots(self.source, count)),
                self.source.probe.positions_um,
            )
        return self._ready["matcher"]

    @property
    def template_channels(self) -> NDArray[np.int64]:
        """Channels of the features of each template's spikes (v, j), padded with −1; told without a GPU."""
        largest = kernels.largest_channel(torch.from_numpy(self.templates.features)).numpy()
        return channel_slots(self.source, self.source.settings.nearest_chans)[largest]

    def __call__(self, block: tuple[Tile, ...]) -> Matched:
        artifacts: list[NDArray[np.int64]] = []
        tiles = [self._of(tile, artifacts) for tile in self.source.read_ahead(block)]
        for at in range(1, len(block)):
            if block[at - 1].stop == block[at].start:  # else batches between them are not sorted
                left, right = tiles[at - 1], tiles[at]
                left["counts"], right["counts"] = self._settle(left, right, block[at].start)
        columns = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        nt, first, last = self.source.settings.nt, block[0].start, block[-1].stop
        outer = (columns["sample"] < first + nt) | (columns["sample"] >= last - nt)
        columns = {name: values[columns["counts"] | outer] for name, values in columns.items()}
        counts, region = columns.pop("counts"), self.region_of[columns["template"]]
        order = np.argsort(region, kind="stable")  # as write_block does
        path = self.folder / f"spikes-{block[0].index:08d}-{block[-1].index:08d}.rows"
        receipt = write_block(path, columns, region, self.n_regions)
        sample, template, counts = columns["sample"][order], columns["template"][order], counts[order]

        def edge(rows: NDArray[np.bool_]) -> Edge:
            return Edge(np.flatnonzero(rows), Reported(sample[rows], template[rows], counts[rows]))

        left_edge, right_edge = edge(sample < first + nt), edge(sample >= last - nt)
        return Matched(first, receipt, left_edge, right_edge, joined_spans(artifacts))

    def _settle(
        self, left: dict[str, NDArray[Any]], right: dict[str, NDArray[Any]], border: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        settings = self.source.settings
        one, other = (Reported(side["sample"], side["template"], side["counts"]) for side in (left, right))
        return settle(one, other, border=border, nt=settings.nt, tolerance=settings.peak_sample)

    def _of(self, tile: Tile, artifacts: list[NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """Spikes of the core and of nt around it; those outside the core do not count unless settled so."""
        settings, matcher = self.source.settings, self.matcher
        traces, blank = self.source.whitened(tile)
        artifacts.append(spans(blank[self.source.core(tile)].cpu().numpy()) + tile.start)
        found = kernels.match(traces, matcher, threshold=settings.Th_learned, max_peels=settings.max_peels)
        residual = kernels.subtract(traces, found, matcher)
        time = found.sample_index + (tile.first - settings.nt // 2 + settings.peak_sample)
        near = (time >= tile.start - settings.nt) & (time < tile.stop + settings.nt)
        near &= away_from(self.source, tile, found.sample_index, blank)
        spikes = kernels.Spikes(*(column[near] for column in found))
        sample = time[near].cpu().numpy()
        return {
            "sample": sample,
            "template": spikes.unit.cpu().numpy().astype(np.int32),
            "score": spikes.score.cpu().numpy(),
            "features": kernels.features(residual, spikes, matcher).cpu().numpy(),
            "counts": (sample >= tile.start) & (sample < tile.stop),
        }


def channel_slots(source: Preprocessor, count: int) -> NDArray[np.int64]:
    """Each channel's nearest channels of its shank, itself first, padded with −1: (c, j)."""
    dead = source.whitening.dead if source.whitening is not None else None
    lists = geometry.channel_neighbours(source.probe, count, dead=dead)
    longest = max((len(one) for one in lists), default=0)
    slots = np.full((len(lists), max(longest, 1)), -1, np.int64)
    for channel, near in enumerate(lists):
        slots[channel, : len(near)] = near
    return slots


def spans(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where a mask is set, as half-open spans (m, 2).

    >>> spans(np.array([False, True, True, False, True])).tolist()
    [[1, 3], [4, 5]]
    """
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.column_stack([np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)]).astype(np.int64)


def joined_spans(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Spans in order of time, those that touch made one: several (m, 2) to (m, 2)."""
    every = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    opens = np.append(True, every[1:, 0] > every[:-1, 1])[: len(every)]
    closes = np.append(opens[1:], True)[: len(every)]
    return np.column_stack([every[opens, 0], every[closes, 1]])


class Matches(NamedTuple):
    """All spikes, in the files of their blocks."""

    receipts: list[Receipt]
    first: NDArray[np.int64]  # (blocks,) first sample of each
    dropped: list[NDArray[np.int64]]  # per block the rows that do not count, ascending
    artifacts: NDArray[np.int64]  # (m, 2) spans that were blanked, in samples, half open


def combine(source: Preprocessor, blocks: Iterable[Matched]) -> Matches:
    """Settle the borders between blocks."""
    settings = source.settings
    first, receipts, artifacts = [], [], []
    counts: list[dict[int, bool]] = []  # per block, of the rows near its borders
    before: Matched | None = None
    for block in blocks:
        first.append(block.first)
        receipts.append(block.receipt)
        artifacts.append(block.artifacts)
        counts.append(_by_row(block.left, block.left.spikes.in_core) | _by_row(block.right, block.right.spikes.in_core))
        if before is not None and source.tiling.step == 1:
            settled = np.array([counts[-2][row] for row in before.right.row.tolist()], bool)
            keep_left, keep_right = settle(
                before.right.spikes._replace(in_core=settled),
                block.left.spikes,
                border=block.first,
                nt=settings.nt,
                tolerance=settings.peak_sample,
            )
            counts[-2] |= _by_row(before.right, keep_left)
            counts[-1] |= _by_row(block.left, keep_right)
        before = block
    dropped = [np.array(sorted(row for row in of_block if not of_block[row]), np.int64) for of_block in counts]
    return Matches(receipts, np.array(first, np.int64), dropped, joined_spans(artifacts))


def _by_row(edge: Edge, counts: NDArray[np.bool_]) -> dict[int, bool]:
    return dict(zip(edge.row.tolist(), counts.tolist(), strict=True))
