"""Matching pursuit in one tile, for the stages that need it (section 8.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.kernels import matching as kernels
from ks4stream.kernels.matching import TileSpikes
from ks4stream.kernels.thresholds import LOWEST, lowest_scores
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import AUTO, Settings
from ks4stream.stages.base import Block, Part, Result, Stage
from ks4stream.stages.needs import TEMPLATES_PER_CHANNEL, WIDE_CHANNELS, Load
from ks4stream.stages.preprocessing import Preprocessor


def lowest_score(settings: Settings) -> float:
    """Threshold of matching: ``Th_learned``, or that of templates that are not small if it is "auto"."""
    return LOWEST if settings.Th_learned == AUTO else float(settings.Th_learned)


@dataclass(frozen=True, eq=False)
class Pursuit(Stage[Block, Part, Result]):
    """A stage that matches templates."""

    reads: ClassVar[tuple[str, ...]] = ("nt", "nt0min", "nearest_chans", "matching")

    tiles: Preprocessor
    waveforms: Waveforms
    templates: Templates

    def matched(self, traces: Tensor, tile: Tile) -> TileSpikes:
        """Spikes of a tile's whitened traces (c, t) above the lowest threshold that their template may have."""
        moving = self.tiles.moving_matrix(tile)
        templates = self.prepared if moving is None else kernels.for_moved(self.prepared, moving)
        return kernels.match(traces, templates, threshold=self.lowest, max_peels=self.settings.max_peels)

    @cached_property
    def lowest(self) -> Tensor:
        """Threshold of matching for each template (v,), float64."""
        features = torch.from_numpy(self.templates.features)
        if self.settings.Th_learned == AUTO:
            norm = torch.linalg.vector_norm(features, dim=(1, 2), dtype=torch.float64)
            return torch.from_numpy(lowest_scores(norm.numpy()))
        return torch.full((len(features),), lowest_score(self.settings), dtype=torch.float64)

    def sample_of(self, tile: Tile, spikes: TileSpikes) -> Tensor:
        """Time of each spike, in samples of the recording: (n,)."""
        return spikes.sample_index + (tile.first - self.settings.nt // 2 + self.settings.peak_sample)

    def owned(self, tile: Tile, spikes: TileSpikes, blank: Tensor) -> Tensor:
        """Which spikes (n,) are in a tile's core, and away from the crop's ends and from blanked samples (t,)."""
        sample = self.sample_of(tile, spikes)
        in_core = (sample >= tile.start) & (sample < tile.stop)
        return in_core & self.tiles.away_from_edges(tile, sample - tile.first, blank, self.settings.nt)

    @cached_property
    def prepared(self) -> kernels.PreparedTemplates:
        """The templates, prepared for matching."""
        device = self.tiles.device
        return kernels.prepare(
            torch.from_numpy(self.templates.features).to(device),
            torch.from_numpy(self.waveforms.components).to(device),
            torch.from_numpy(self.slots),
            self.tiles.probe.positions_um,
            spread=torch.from_numpy(self.templates.spread).to(device),
        )

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Channels on which spikes have features, by the largest channel of their template: (c, j), padded with −1."""
        return self.nearest(self.settings.nearest_chans)

    def nearest(self, count: int) -> NDArray[np.int64]:
        """Each channel's `count` nearest channels of its shank, itself first, padded with −1: (c, j)."""
        dead = self.tiles.without_signal
        return geometry.padded(geometry.channel_neighbours(self.tiles.probe, count, dead=dead), fill=-1)

    @staticmethod
    def pursuit_work(load: Load, n_tiles: float) -> float:
        """Work of matching so many tiles: their traces, and the scores of all templates."""
        return load.samples_in(n_tiles) * (load.n_channels + load.n_templates)

    @staticmethod
    def bytes_beside_tile(load: Load, size: int | None = None) -> int:
        """Bytes of the scores of all templates at all samples, and of what computes them."""
        c, u, q, w = load.n_channels, load.n_templates, load.settings.n_pcs, load.settings.nt
        groups = 2 * u // kernels.GROUP_SIZE + 2
        reach = max(8 * load.settings.nearest_chans, 3 * WIDE_CHANNELS)  # channels whose templates share some with one
        sharing = u * min(u, TEMPLATES_PER_CHANNEL * reach)  # pairs
        return int(
            4 * (u + groups) * (load.fft_samples(size) + 2 * w)  # scores, and the best of each group
            + 16 * u * c * q
            + sharing * (8 * q * q + 8)  # templates, by unit and by group, and their products; those for moved traces
            + 8 * c * q * kernels.SAMPLES_PER_CHUNK.on(load.device)  # projections
            + 2 * kernels.ROWS_PER_CHUNK.on(load.device) * (4 * q * q + 24 * w)  # what is subtracted at a time
            + 8 * kernels.SAMPLES_PER_CHUNK.on(load.device) * kernels.GROUP_SIZE * w  # bins whose maxima are found
        )
