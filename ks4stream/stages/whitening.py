"""The covariance of the channels, and the matrix that decorrelates them (section 1.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import RecordingError
from ks4stream.io.places import Place
from ks4stream.kernels import preprocessing as kernels
from ks4stream.results import Whitening
from ks4stream.stages.base import Block, Run, Stage
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor

Covariance = NDArray[np.float64] | None  # None if too little of the tile is left after blanking artifacts
MIN_KEPT_SHARE = 0.5  # of a tile, after blanking artifacts


@dataclass(frozen=True, eq=False)
class LearnWhitening(Stage[Block, list[Covariance], Whitening]):
    """Average the covariance of the channels over some batches, and whiten each channel with its neighbourhood."""

    name = "whitening"
    reads = ("whitening",)

    tiles: Preprocessor

    def items(self, run: Run) -> Sequence[Block]:
        """Every `nskip`-th batch."""
        return run.blocks(self.tiles.tiling, self.tiles.tiling.evenly(self.settings.nskip))

    def task(self, item: Block, folder: Place) -> list[Covariance]:
        """For each tile, the covariance (c, c) of the samples of its core that were not blanked, or None."""
        return [self._covariance(tile) for tile in self.tiles.read_ahead(item)]

    def _covariance(self, tile: Tile) -> Covariance:
        traces, blank = self.tiles.referenced(tile)
        core = self.tiles.core(tile)
        traces, kept = traces[:, core], ~blank[core]
        n_kept = int(kept.sum())
        if n_kept < MIN_KEPT_SHARE * len(kept):
            return None
        return kernels.covariance(traces if n_kept == len(kept) else traces[:, kept]).cpu().numpy()

    def combine(self, parts: Iterable[list[Covariance]], run: Run) -> Whitening:
        """Average in the order of the tiles.

        Raises
        ------
        RecordingError
            If too little of every tile is left after blanking artifacts, or no channel has any signal.
        """
        total: NDArray[np.float64] | float = 0.0
        used, seen = 0, 0
        for covariance in chain.from_iterable(parts):
            seen += 1
            if covariance is not None:
                total, used = total + covariance, used + 1
        if used == 0:
            raise RecordingError(
                f"In all {seen} batches from which whitening should be learned, most samples are artifacts: within "
                f"2 ms of samples beyond artifact_threshold={self.tiles.settings.artifact_threshold}, which should be "
                "well above the spikes, or of samples where most channels are far beyond their noise."
            )
        covariance = np.asarray(total / used)
        variance = covariance.diagonal()
        dead = np.union1d(self.tiles.dead, np.flatnonzero(variance <= 1e-12 * np.median(variance)))
        if len(dead) == len(variance):
            raise RecordingError(f"{self.tiles.recording.name}: no channel has any signal after {self._steps()}.")
        neighbours = geometry.channel_neighbours(
            self.tiles.probe, self.settings.whitening_range, same_shank=False, dead=dead
        )
        matrix = kernels.local_whitening(torch.from_numpy(covariance), neighbours)
        return Whitening(matrix=matrix.numpy(), dead=dead, n_batches=used)

    def _steps(self) -> str:
        if not self.tiles.settings.do_CAR:
            return "filtering"
        return (
            "filtering and referencing. The common reference is the median of the channels, which removes all of a "
            "single channel, and of channels with the same signal; sort these with do_CAR=False"
        )

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Only the tile."""
        n_tiles = len(load.tiling.evenly(load.settings.nskip))
        return load.on_tiles(cls.name, 0, n_tiles=n_tiles, n_tiles_read=n_tiles)
