"""Universal waveforms: what spikes look like on one channel, learned from isolated peaks (section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import FewSpikesWarning
from ks4stream.io.places import Place
from ks4stream.kernels import waveforms as kernels
from ks4stream.messages import warn
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.base import Block, Run, Stage
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor

EVERY_BATCH = 25
MIN_SNIPPETS = 1000
MAX_SNIPPETS = 500_000
MIN_THRESHOLD, THRESHOLD_STEP = 4.0, 0.5
MIN_SNIPPETS_PER_SHAPE = 10  # with fewer per universal waveform, the shipped waveforms are used
SEED = 1  # of the k-means starts; the method has no setting for it
SHIPPED_RATE_HZ, SHIPPED_PEAK = 30_000.0, 20  # of the waveforms in the package

Snippets = list[NDArray[np.float32]]  # for each tile, the unit-norm waveforms of its isolated peaks (n, w)


def thresholds(settings: Settings) -> list[float]:
    """Thresholds to try on all batches, in this order, until there are enough snippets."""
    highest = settings.Th_single_ch
    steps = np.arange(highest, MIN_THRESHOLD - 1e-9, -THRESHOLD_STEP)
    return [float(step) for step in steps] or [highest]


@dataclass(frozen=True, eq=False)
class LearnWaveforms(Stage[Block, Snippets, Waveforms]):
    """Learn components and shapes from the waveforms of isolated peaks.

    If a subset of the batches has fewer than a thousand of them, all batches are used, then lower thresholds. If that
    still gives too few, the waveforms shipped with the package are used.

    Attributes
    ----------
    threshold : float
        Threshold of the peaks, in standard deviations of the noise; set by :meth:`run` for each attempt.
    max_per_tile : int
        Maximum number of snippets of a tile, evenly thinned; set likewise.
    """

    name = "waveforms"
    reads = ("waveforms",)

    tiles: Preprocessor
    threshold: float = 0.0
    max_per_tile: int = 0

    def run(self, run: Run) -> Waveforms:
        """Use more batches, and lower thresholds, until there are enough snippets."""
        if not self.settings.templates_from_data:
            return self.shipped()
        for attempt, chosen in self._attempts():
            parts = list(run.map(attempt, run.blocks(self.tiles.tiling, chosen)))
            n_snippets = sum(len(snippets) for part in parts for snippets in part)
            if n_snippets >= MIN_SNIPPETS:
                break
        return attempt.combine(parts, run)

    def _attempts(self) -> Iterator[tuple[LearnWaveforms, list[int]]]:
        every = list(range(len(self.tiles.tiling)))
        subset = self.tiles.tiling.evenly(EVERY_BATCH)
        tries = [(self.settings.Th_single_ch, subset)] if len(subset) < len(every) else []
        tries += [(threshold, every) for threshold in thresholds(self.settings)]
        for threshold, chosen in tries:
            yield replace(self, threshold=threshold, max_per_tile=-(-MAX_SNIPPETS // len(chosen))), chosen

    def task(self, item: Block, folder: Place) -> Snippets:
        """Cut out the waveforms of the isolated peaks of each tile."""
        return [self._cut(tile) for tile in self.tiles.read_ahead(item, folder)]

    def _cut(self, tile: Tile) -> NDArray[np.float32]:
        nt = self.settings.nt
        traces, blank = self.tiles.whitened(tile)
        core = self.tiles.core(tile)
        near, wide = self._neighbours
        channel, sample = kernels.find_clean_peaks(
            traces, near, wide, threshold=self.threshold, first=core.start, last=core.stop
        )
        allowed = self.tiles.away_from_edges(tile, sample, blank, nt)
        channel, sample = channel[allowed], sample[allowed]
        kept = torch.arange(min(len(channel), self.max_per_tile), device=channel.device)
        kept = kept * len(channel) // max(len(kept), 1)
        snippets = kernels.cut_snippets(
            traces, channel[kept], sample[kept], nt=nt, peak_sample=self.settings.peak_sample
        )
        return snippets.cpu().numpy()

    @cached_property
    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """Channels among which a peak must be the largest, and those on which it must be the only one."""

        def channels(count: int) -> Tensor:
            lists = geometry.channel_neighbours(self.tiles.probe, count, dead=self.tiles.without_signal)
            return torch.from_numpy(geometry.padded(lists)).to(self.tiles.device)

        return channels(geometry.PEAK_NEIGHBOURS), channels(geometry.ALONE_NEIGHBOURS)

    def combine(self, parts: Iterable[Snippets], run: Run) -> Waveforms:
        """Learn from the snippets, with a warning if there are few."""
        snippets = list(chain.from_iterable(parts))
        n_snippets = sum(map(len, snippets))
        joined = torch.from_numpy(np.concatenate(snippets)[:MAX_SNIPPETS])
        if len(joined) < MIN_SNIPPETS_PER_SHAPE * max(self.settings.n_templates, self.settings.n_pcs):
            self._warn_of_few(n_snippets, "the waveforms shipped with ks4stream are used instead")
            return self.shipped()
        if n_snippets < MIN_SNIPPETS:
            self._warn_of_few(n_snippets, "the waveforms were learned from these")
        return self._learned(joined, n_snippets=len(joined), threshold=self.threshold)

    def shipped(self) -> Waveforms:
        """Waveforms shipped with the package, resampled to the settings' nt and the recording's rate."""
        with resources.files("ks4stream.stages").joinpath("waveforms.npz").open("rb") as file, np.load(file) as stored:
            snippets = stored["snippets"]
        wanted = (np.arange(self.settings.nt) - self.settings.peak_sample) / self.tiles.sampling_rate_hz
        present = (np.arange(snippets.shape[1]) - SHIPPED_PEAK) / SHIPPED_RATE_HZ
        resampled = np.stack([np.interp(wanted, present, snippet, left=0, right=0) for snippet in snippets])
        resampled /= np.linalg.norm(resampled, axis=1, keepdims=True)
        joined = torch.from_numpy(resampled.astype(np.float32))
        return self._learned(joined, n_snippets=0, threshold=self.settings.Th_single_ch)

    def _learned(self, snippets: Tensor, *, n_snippets: int, threshold: float) -> Waveforms:
        return Waveforms(
            components=kernels.principal_components(snippets, self.settings.n_pcs).numpy(),
            shapes=kernels.typical_shapes(snippets, self.settings.n_templates, seed=SEED).numpy(),
            n_snippets=n_snippets,
            threshold=threshold,
        )

    def _warn_of_few(self, n_snippets: int, used: str) -> None:
        warn(
            f"Only {n_snippets} clean spikes were found to learn waveforms from, down to a threshold of "
            f"{self.threshold:g} (Th_single_ch); {used}.",
            FewSpikesWarning,
        )

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Besides the tile: marks of peaks, samples above threshold of a few channels, windows, and snippets.

        All samples of these channels may be above threshold, as in movement artifacts.
        """
        if not load.settings.templates_from_data:
            return Needs(cls.name)
        c, t, nt = load.n_channels, load.tiling.size, load.settings.nt
        n_tiles = len(load.tiling.evenly(EVERY_BATCH))  # if these have enough isolated peaks; see `rare_passes`
        # Movement makes many more snippets than there are spikes: a tile's share, or as many as can be isolated.
        of_tile = min(-(-MAX_SNIPPETS // n_tiles), c * -(-t // (kernels.ALONE_REACH + 1)))
        near = geometry.ALONE_NEIGHBOURS * (2 * kernels.ALONE_REACH + 1)
        beside = (
            c * t
            + kernels.ABOVE_BYTES * min(c, kernels.CHANNELS_PER_CHUNK.on(load.device)) * t
            + kernels.WINDOW_BYTES * near * kernels.WINDOWS_PER_CHUNK.on(load.device)
            + 16 * nt * of_tile
        )
        in_all = min(MAX_SNIPPETS, load.n_spikes) * nt
        return load.on_tiles(
            cls.name,
            int(beside),
            n_tiles=n_tiles,
            rows=load.tiles_per_task(n_tiles) * 2 * 4 * nt * of_tile,  # as they were cut out, and in the record
            client_bytes=8 * in_all,  # twice
            scratch_bytes=4 * in_all,
            passes=load.detections,
            n_tiles_read=n_tiles,
            work=load.samples_in(n_tiles) * load.n_channels,
        )

    @staticmethod
    def rare_passes(load: Load) -> int:
        """Passes over all batches, at most, beyond those in :meth:`needs`, where isolated peaks are rare."""
        if not load.settings.templates_from_data:
            return 0
        begun = len(load.tiling.evenly(EVERY_BATCH)) == len(load.tiling)  # then the first attempt was on all batches
        return load.detections * (len(thresholds(load.settings)) - begun)
