"""How channels covary in the noise, and the matrix that undoes it (section 1.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import RecordingError
from ks4stream.kernels import preprocessing as kernels
from ks4stream.results import Whitening
from ks4stream.stages.preprocessing import Preprocessor

Covariance = NDArray[np.float64] | None  # None: artifacts leave too little of the tile
LEAST_LEFT = 0.5  # of a tile, after its artifacts were blanked


@dataclass(frozen=True)
class Covariances:
    """Per tile the channels' covariance over what was not blanked of its core: (c, c), or None of too little."""

    source: Preprocessor

    def __call__(self, block: tuple[Tile, ...]) -> list[Covariance]:
        return [self._of(tile) for tile in self.source.read_ahead(block)]

    def _of(self, tile: Tile) -> Covariance:
        traces, blank = self.source.referenced(tile)
        core = self.source.core(tile)
        traces, kept = traces[:, core], ~blank[core]
        n_kept = int(kept.sum())
        if n_kept < LEAST_LEFT * len(kept):
            return None
        return kernels.covariance(traces if n_kept == len(kept) else traces[:, kept]).cpu().numpy()


def combine(source: Preprocessor, parts: Iterable[list[Covariance]]) -> Whitening:
    """Average the covariances and whiten each channel against its neighbourhood.

    Raises
    ------
    RecordingError
        If artifacts leave too little of every tile, or no channel has any signal.
    """
    total: NDArray[np.float64] | float = 0.0
    used, seen = 0, 0
    for covariance in (one for part in parts for one in part):
        seen += 1
        if covariance is not None:
            total, used = total + covariance, used + 1
    if used == 0:
        raise RecordingError(
            f"Every one of the {seen} batches that whitening was to be learned from is for the most part an artifact: "
            f"within 2 ms of samples beyond artifact_threshold={source.settings.artifact_threshold}, which should be "
            "well above the spikes, or of samples where most channels are far beyond their noise."
        )
    covariance = np.asarray(total / used)
    variance = covariance.diagonal()
    dead = np.union1d(source.dead, np.flatnonzero(variance <= 1e-12 * np.median(variance)))
    if len(dead) == len(variance):
        raise RecordingError(f"{source.recording.name}: no channel has any signal after filtering.")
    neighbours = geometry.channel_neighbours(source.probe, source.settings.whitening_range, same_shank=False, dead=dead)
    matrix = kernels.local_whitening(torch.from_numpy(covariance), neighbours)
    return Whitening(matrix=matrix.numpy(), dead=dead, n_batches=used)
