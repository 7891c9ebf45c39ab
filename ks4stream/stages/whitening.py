"""The covariance of the channels, and the matrix that decorrelates them (section 1.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import BadChannelWarning, HumWarning, RecordingError
from ks4stream.io.mapped import HELD_BYTES, release_pages, scratch_array
from ks4stream.io.places import Place
from ks4stream.kernels import preprocessing as kernels
from ks4stream.kernels.hum import hum_shares
from ks4stream.messages import warn
from ks4stream.results import Whitening
from ks4stream.stages.base import Block, Run, Stage
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor

MIN_KEPT_SHARE = 0.5  # of a tile, after blanking artifacts
USUAL_QUANTILE = 0.75
"""Which of the levels of noise in the tiles is the usual one: what is as loud in more than a quarter of the recording,
such as a second session with a larger gain, is no artifact."""
LOUD_TILE = 2.0  # noise relative to the usual one, on most channels of a window; such tiles do not enter
LINES_HZ, HUM_CHANNELS, MUCH_HUM = (50.0, 60.0), 32, 0.05
"""Mains hum is looked for on so many channels, and there is a warning if it is more than 5 % of the variance of one."""
SILENT_SHARE = 0.1  # of the tiles, in which a channel that is left out does not change, at least


class Measured(NamedTuple):
    """What is learned from one tile."""

    covariance: NDArray[np.float64] | None  # (c, c) of samples that were not blanked; None if those are too few
    noise: NDArray[np.float32]  # (c,) its standard deviation, in units of the file
    hum: list[float]  # share of the variance of the channel that has most of it, for each of :data:`LINES_HZ`


@dataclass(frozen=True, eq=False)
class LearnWhitening(Stage[Block, list[Measured], Whitening]):
    """Average the covariance of the channels over some batches, and whiten each channel with its neighbourhood."""

    name = "whitening"
    reads = ("whitening",)
    records = (Measured,)

    tiles: Preprocessor

    def items(self, run: Run) -> Sequence[Block]:
        """Every `nskip`-th batch."""
        return run.blocks(self.tiles.tiling, self._indices)

    @property
    def _indices(self) -> list[int]:
        return self.tiles.tiling.evenly(self.settings.nskip)

    def task(self, item: Block, folder: Place) -> list[Measured]:
        """The covariance and the noise of the core of each tile."""
        return [self._measured(tile) for tile in self.tiles.read_ahead(item, folder)]

    def _measured(self, tile: Tile) -> Measured:
        traces, blank, noise = self.tiles.measured(tile)
        core = self.tiles.core(tile)
        traces, n_kept, covariance = traces[:, core], int((~blank[core]).sum()), None
        if n_kept >= MIN_KEPT_SHARE * traces.shape[1]:
            covariance = kernels.covariance(traces, n_kept).cpu().numpy()
        hum = hum_shares(
            traces[:: -(-len(traces) // HUM_CHANNELS)],
            LINES_HZ,
            lowest_hz=self.tiles.settings.highpass_cutoff,
            sampling_rate_hz=self.tiles.sampling_rate_hz,
        )
        return Measured(covariance, noise.cpu().numpy(), hum)

    def combine(self, parts: Iterable[list[Measured]], run: Run) -> Whitening:
        """Average in the order of the tiles.

        Raises
        ------
        RecordingError
            If too little of every tile is left after blanking artifacts, or no channel has any signal.
        """
        n_tiles, n_channels = len(self._indices), self.tiles.probe.n_channels
        covariances = scratch_array((n_tiles, n_channels, n_channels), np.float64, run.scratch)
        levels: list[NDArray[np.float32]] = []
        seen = 0
        hum: list[list[float]] = []
        for measured in chain.from_iterable(parts):
            seen += 1
            if measured.covariance is not None:
                hum.append(measured.hum)
                covariances[len(levels)] = measured.covariance
                release_pages(covariances)
                levels.append(measured.noise)
        if not levels:
            threshold = self.tiles.settings.artifact_threshold
            causes = ["in the spans given as blank"] if len(self.tiles.blank) else []
            if math.isfinite(threshold):
                causes += [
                    f"near samples beyond artifact_threshold={threshold:g}, which should be well above the spikes"
                ]
            causes += ["where all channels hold their value", "where most channels are far beyond their noise"]
            raise RecordingError(
                f"In all {seen} batches from which whitening should be learned, most samples are blanked: they are "
                f"{', or '.join(causes)}."
            )
        level = np.array(levels)  # (batch, c)
        changes = level > 0
        noise = np.zeros(n_channels, np.float32)
        self._warn_of_hum(np.median(hum, axis=0))
        for channel in np.flatnonzero(changes.any(axis=0)).tolist():
            noise[channel] = np.quantile(level[changes[:, channel], channel], USUAL_QUANTILE)
        total = np.zeros((n_channels, n_channels))
        usual = self._usual(level, noise)
        for index in usual.tolist():
            total += covariances[index]
            release_pages(covariances)
        covariance = total / len(usual)
        variance = covariance.diagonal()
        died = np.setdiff1d(np.flatnonzero((~changes).mean(axis=0) >= SILENT_SHARE), self.tiles.dead)
        dead = np.union1d(np.union1d(self.tiles.dead, died), np.flatnonzero(variance <= 1e-12 * np.median(variance)))
        if len(dead) == n_channels:
            raise RecordingError(f"{self.tiles.recording.name}: no channel has any signal after {self._steps()}.")
        if len(died):
            warn(
                f"{self.tiles.recording.name}: channels {self.tiles.probe.chan_map[died].tolist()} of the file have "
                "no signal in a part of the recording and are left out.",
                BadChannelWarning,
            )
        neighbours = geometry.channel_neighbours(
            self.tiles.probe, self.settings.whitening_range, same_shank=False, dead=dead
        )
        matrix = kernels.local_whitening(torch.from_numpy(covariance), neighbours)
        return Whitening(matrix=matrix.numpy(), dead=dead, n_batches=len(usual), noise=noise)

    def _warn_of_hum(self, share: NDArray[np.float64]) -> None:
        line_hz, most = LINES_HZ[int(share.argmax())], float(share.max())
        if most > MUCH_HUM:
            warn(
                f"Mains hum at {line_hz:g} Hz and its harmonics is {100 * most:.0f} % of the variance of a channel "
                f"after filtering and referencing. line_frequency={line_hz:g} subtracts it.",
                HumWarning,
            )

    def _usual(self, level: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.intp]:
        """Indices of the tiles in which no window has most channels much louder than usual; of all if each has one."""
        is_loud = np.zeros(len(level), bool)
        for window in geometry.artifact_windows(self.tiles.probe, self.tiles.dead):
            is_loud |= np.mean(level[:, window.channels] > LOUD_TILE * noise[window.channels], axis=1) > 0.5
        return np.flatnonzero(~is_loud | is_loud.all())

    def _steps(self) -> str:
        if not self.tiles.settings.do_CAR:
            return "filtering"
        return (
            "filtering and referencing. The common reference is the median of the channels, which removes all of "
            "channels with the same signal; sort these with do_CAR=False"
        )

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """The tile, and in the calling process the covariances of all: which are loud is known at the end."""
        n_tiles = len(load.tiling.evenly(load.settings.nskip))
        covariances = 8 * n_tiles * load.n_channels**2
        return load.on_tiles(
            cls.name,
            0,
            n_tiles=n_tiles,
            n_tiles_read=n_tiles,
            work=load.samples_in(n_tiles) * load.n_channels,
            client_bytes=min(covariances, HELD_BYTES),
            scratch_bytes=covariances if covariances > HELD_BYTES else 0,
        )
