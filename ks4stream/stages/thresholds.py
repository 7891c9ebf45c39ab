"""Thresholds of the templates, by the scores of spikes in some of the batches (section 8.5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tile, Tiling
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, read_region, write_block
from ks4stream.kernels.matching import TileSpikes
from ks4stream.kernels.thresholds import histograms, thresholds
from ks4stream.settings import AUTO
from ks4stream.stages.base import Block, Portable, Run
from ks4stream.stages.needs import ROWS_PER_SPIKE, Load, Needs
from ks4stream.stages.pursuit import Pursuit

EVERY_BATCH, MIN_BATCHES, MAX_BATCHES = 20, 60, 200
"""Every so many batches are matched, evenly spread, but at least and at most so many. In 60 batches of two seconds, a
neuron that fires once per second has 120 spikes, six times as many as are needed for a fit."""
MATCHED_BYTES = 24  # per spike in the file of a block: its sample, template, score and amplitude


class MatchedTiles(NamedTuple):
    """Spikes of some tiles and their halos."""

    tile_indices: NDArray[np.int64]
    receipt: Receipt  # of their spikes, of all templates, grouped by tile
    score: NDArray[np.float32]  # of the spikes in the cores
    template: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Thresholds(Portable):
    """The threshold of each template, and the spikes by which thresholds were set.

    Attributes
    ----------
    score : ndarray, shape (v,), float64, noise s.d.
        Above which spikes of a template count.
    tile_indices : list of ndarray, int64
        Those of the tiles that were matched, by block.
    receipts : list of Receipt
        For each block, its spikes, grouped by tile: the columns of :class:`~ks4stream.kernels.matching.TileSpikes`.
    """

    score: NDArray[np.float64]
    tile_indices: list[NDArray[np.int64]] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)

    def spikes_of(self, tile: Tile, device: str) -> TileSpikes | None:
        """All spikes of a tile and its halo, whatever their scores; None if it was not matched."""
        if tile.index not in self._places:
            return None
        receipt, number = self._places[tile.index]
        columns = (read_region([receipt], name, number) for name in TileSpikes._fields)
        return TileSpikes(*(torch.from_numpy(column).to(device) for column in columns))

    @cached_property
    def _places(self) -> dict[int, tuple[Receipt, int]]:
        blocks = zip(self.tile_indices, self.receipts, strict=True)
        return {tile: (receipt, number) for tiles, receipt in blocks for number, tile in enumerate(tiles.tolist())}


@dataclass(frozen=True, eq=False)
class SetThresholds(Pursuit[MatchedTiles, Thresholds]):
    """Set the threshold of each template by the scores of its spikes, unless ``Th_learned`` is a number."""

    name = "thresholds"
    records = (MatchedTiles,)

    def items(self, run: Run) -> Sequence[Block]:
        """Some batches, evenly spread, if there is anything to set."""
        if not len(self.templates.features) or self.settings.Th_learned != AUTO:
            return []
        return run.blocks(self.tiles.tiling, chosen_batches(self.tiles.tiling))

    def task(self, item: Block, folder: Place) -> MatchedTiles:
        """Match a block down to the lowest scores, and write the spikes."""
        parts, scores, templates = [], [], []
        for tile in self.tiles.read_ahead(item, folder):
            traces, blank = self.tiles.whitened(tile)
            spikes = self.matched(traces, tile)
            own = self.owned(tile, spikes, blank)
            parts.append([column.cpu().numpy() for column in spikes])
            scores.append(spikes.score[own].cpu().numpy())
            templates.append(spikes.unit[own].cpu().numpy().astype(np.int32))
        columns = dict(zip(TileSpikes._fields, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        number = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        path = folder / f"tiles-{item[0].index:08d}-{item[-1].index:08d}.rows"
        receipt = write_block(path, columns, number, len(parts))
        indices = np.array([tile.index for tile in item], np.int64)
        return MatchedTiles(indices, receipt, np.concatenate(scores), np.concatenate(templates))

    def combine(self, parts: Iterable[MatchedTiles], run: Run) -> Thresholds:
        """Fit thresholds to the scores of all tiles."""
        n_templates = len(self.templates.features)
        if self.settings.Th_learned != AUTO:
            return Thresholds(np.full(n_templates, float(self.settings.Th_learned)))
        lowest = self.lowest.numpy()
        counts = histograms(np.zeros(0, np.float32), np.zeros(0, np.int32), lowest)
        indices, receipts = [], []
        for part in parts:
            counts += histograms(part.score, part.template, lowest)
            indices.append(part.tile_indices)
            receipts.append(part.receipt)
        return Thresholds(thresholds(counts, lowest), indices, receipts)

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Scores of all templates besides the tile, and the spikes without their features."""
        if load.settings.Th_learned != AUTO:
            return Needs(cls.name)
        n_tiles = len(chosen_batches(load.tiling))
        n_spikes = ROWS_PER_SPIKE * load.n_spikes * n_tiles / len(load.tiling)
        return load.on_tiles(
            cls.name,
            cls.bytes_beside_tile(load),
            n_tiles=n_tiles,
            n_tiles_read=n_tiles,
            work=cls.pursuit_work(load, n_tiles),
            scratch_bytes=round(MATCHED_BYTES * n_spikes),
        )


def chosen_batches(tiling: Tiling) -> list[int]:
    """Indices of the batches by which thresholds are set."""
    return tiling.evenly(EVERY_BATCH, min_tiles=MIN_BATCHES, max_tiles=MAX_BATCHES)
