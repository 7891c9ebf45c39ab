"""Widened templates: on channels without features, from the spikes in some of the batches (section 5.4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.blocks import Tiling
from ks4stream.io.places import Place
from ks4stream.kernels import matching as kernels
from ks4stream.kernels import widening
from ks4stream.kernels.matching import TileSpikes
from ks4stream.kernels.overlaps import are_overlapped
from ks4stream.kernels.thresholds import LOWEST
from ks4stream.results import Templates
from ks4stream.stages.base import Block, Run
from ks4stream.stages.needs import WIDE_CHANNELS, Load, Needs
from ks4stream.stages.pursuit import Pursuit

logger = logging.getLogger("ks4stream")

EVERY_BATCH, MIN_BATCHES, MAX_BATCHES = 20, 20, 100
"""Every so many batches are matched, evenly spread, but at least and at most so many. In 20 batches of two seconds, a
neuron that fires once per second has four times as many spikes as are needed."""


class BlockSums(NamedTuple):
    """Sums of one block (:class:`~ks4stream.kernels.widening.Sums`)."""

    product: NDArray[np.int64]  # (v, j, q)
    square: NDArray[np.int64]  # (v,)


@dataclass(frozen=True, eq=False)
class Widen(Pursuit[BlockSums, Templates]):
    """Complete the templates with what the residual holds around their spikes."""

    name = "widening"
    reads = ("nt", "nt0min", "nearest_chans", "max_peels")
    records = (BlockSums,)

    def items(self, run: Run) -> Sequence[Block]:
        """Some batches, evenly spread, if there are any templates."""
        return run.blocks(self.tiles.tiling, chosen_batches(self.tiles.tiling)) if len(self.templates.features) else []

    def task(self, item: Block, folder: Place) -> BlockSums:
        """Match a block, and sum the features of its large spikes on many channels."""
        totals = self._no_sums()
        for tile in self.tiles.read_ahead(item, folder):
            traces, blank = self.tiles.whitened(tile)
            spikes = self.matched(traces, tile)
            residual = kernels.subtract(traces, spikes, self.prepared)
            large = spikes.at(self.owned(tile, spikes, blank) & widening.is_used(spikes))
            used = large.at(~self.in_larger(large, spikes))
            features = kernels.features(residual, used, self.prepared)
            sums = widening.sums_over(used, features, len(self.templates.features))
            for total, of_tile in zip(totals, sums, strict=True):
                total += of_tile.cpu().numpy()
        return totals

    def combine(self, parts: Iterable[BlockSums], run: Run) -> Templates:
        """Complete the templates."""
        totals = self._no_sums()
        for part in parts:
            for total, of_block in zip(totals, part, strict=True):
                total += of_block
        features, sums = torch.from_numpy(self.templates.features), widening.Sums(*map(torch.from_numpy, totals))
        channels = torch.from_numpy(self.slots)[kernels.largest_channel(features)]
        wide = widening.widened(features, sums, channels)
        grown = (wide - features).norm(dim=(1, 2)) > 0
        logger.info("%d of %d templates are on more channels now", int(grown.sum()), len(grown))
        return replace(self.templates, features=wide.numpy())

    def in_larger(self, spikes: TileSpikes, among: TileSpikes) -> Tensor:
        """Which spikes (n,) overlap those of a larger template among some (m,): they may be what it left."""
        one, other = ([of.sample_index.cpu().numpy(), of.unit.cpu().numpy()] for of in (spikes, among))
        reach = self.settings.nt // 4
        return torch.from_numpy(are_overlapped(*one, *other, is_near=self.larger, reach=reach)).to(spikes.unit.device)

    @cached_property
    def larger(self) -> NDArray[np.bool_]:
        """Which templates (columns) are larger than a template (row), and near it: (v, v)."""
        features = torch.from_numpy(self.templates.features)
        norm = torch.linalg.vector_norm(features, dim=(1, 2), dtype=torch.float64).numpy()
        largest = kernels.largest_channel(features).numpy()
        near = np.zeros((len(features), features.shape[1] + 1), bool)  # the last one is that of channel −1
        np.put_along_axis(near, self.slots[largest], True, axis=1)
        return near[:, largest] & (norm > norm[:, None])

    def _no_sums(self) -> BlockSums:
        n, _, q = self.templates.features.shape
        return BlockSums(np.zeros((n, self.slots.shape[1], q), np.int64), np.zeros(n, np.int64))

    @cached_property
    def lowest(self) -> Tensor:
        """Whatever ``Th_learned`` is: spikes left in the residual would blur the sums, but for very small ones."""
        return torch.full((len(self.templates.features),), LOWEST, dtype=torch.float64)

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Channels near each channel, more of them than have features: (c, j)."""
        return self.nearest(max(WIDE_CHANNELS, self.settings.nearest_chans))

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Scores of all templates besides the tile, and the sums."""
        n_tiles = len(chosen_batches(load.tiling))
        n_channels = min(max(WIDE_CHANNELS, load.settings.nearest_chans), load.n_channels)
        of_template = 8 * (n_channels * load.settings.n_pcs + 1)
        record = of_template * load.n_templates
        sums = 3 * record + round(4 * of_template * load.n_spikes / len(load.tiling))
        records = load.n_blocks(n_tiles) * record
        return load.on_tiles(
            cls.name,
            cls.bytes_beside_tile(load) + sums,
            n_tiles=n_tiles,
            n_tiles_read=n_tiles,
            work=cls.pursuit_work(load, n_tiles),
            scratch_bytes=records,
            client_bytes=records,
        )


def chosen_batches(tiling: Tiling) -> list[int]:
    """Indices of the batches by which templates are completed."""
    return tiling.evenly(EVERY_BATCH, min_tiles=MIN_BATCHES, max_tiles=MAX_BATCHES)
