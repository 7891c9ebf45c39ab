"""What spikes look like on one channel: universal waveforms, learned from clean peaks (section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.errors import FewSpikesWarning
from ks4stream.kernels import waveforms as kernels
from ks4stream.messages import warn
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.preprocessing import Preprocessor

EVERY_BATCH = 25
FEWEST_SNIPPETS = 1000
MOST_SNIPPETS = 500_000
LOWEST_THRESHOLD, THRESHOLD_STEP = 4.0, 0.5
FEWEST_PER_SHAPE = 10  # below this many snippets per universal waveform nothing can be learned
SEED = 1  # of the k-means starts; the method has no setting for it
SHIPPED_RATE_HZ, SHIPPED_PEAK = 30_000.0, 20  # of the waveforms in the package


@dataclass(frozen=True)
class Snippets:
    """Per tile the unit-norm waveforms of its clean peaks: (n, w), at most `most_per_tile`, evenly thinned."""

    source: Preprocessor
    threshold: float
    most_per_tile: int

    def __call__(self, block: tuple[Tile, ...]) -> list[NDArray[np.float32]]:
        return [self._of(tile) for tile in self.source.read_ahead(block)]

    def _of(self, tile: Tile) -> NDArray[np.float32]:
        settings = self.source.settings
        traces, blank = self.source.whitened(tile)
        core = self.source.core(tile)
        near, wide = (
            self._neighbours(count).to(traces.device) for count in (geometry.PEAK_NEIGHBOURS, geometry.ALONE_NEIGHBOURS)
        )
        channel, sample = kernels.find_clean_peaks(
            traces, near, wide, threshold=self.threshold, first=core.start, last=core.stop
        )
        allowed = away_from(self.source, tile, sample, blank)
        channel, sample = channel[allowed], sample[allowed]
        kept = torch.arange(min(len(channel), self.most_per_tile), device=channel.device)
        kept = kept * len(channel) // max(len(kept), 1)
        snippets = kernels.cut_snippets(
            traces, channel[kept], sample[kept], nt=settings.nt, peak_sample=settings.peak_sample
        )
        return snippets.cpu().numpy()

    def _neighbours(self, count: int) -> torch.Tensor:
        dead = self.source.whitening.dead if self.source.whitening is not None else None
        return torch.from_numpy(geometry.padded(geometry.channel_neighbours(self.source.probe, count, dead=dead)))


def away_from(source: Preprocessor, tile: Tile, sample: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Which samples of a tile lie at least nt from the crop's ends and from anything blanked: (n,) to bool (n,)."""
    nt = source.settings.nt
    first, last = source.tiling.start - tile.first + nt, source.tiling.stop - tile.first - nt
    allowed = (sample >= first) & (sample < last)
    if bool(blank.any()):
        allowed &= ~widened(blank, nt)[sample]
    return allowed


def widened(blank: torch.Tensor, nt: int) -> torch.Tensor:
    """Samples within nt of a blanked one."""
    from ks4stream.kernels.preprocessing import widen

    return widen(blank, nt)


def combine(settings: Settings, parts: Iterable[list[NDArray[np.float32]]], *, threshold: float) -> Waveforms | None:
    """Learn components and shapes; None if there are fewer snippets than can teach anything."""
    snippets = [one for part in parts for one in part]
    joined = torch.from_numpy(np.concatenate(snippets)[:MOST_SNIPPETS])
    if len(joined) < FEWEST_PER_SHAPE * max(settings.n_templates, settings.n_pcs):
        return None
    return Waveforms(
        components=kernels.principal_components(joined, settings.n_pcs).numpy(),
        shapes=kernels.typical_shapes(joined, settings.n_templates, seed=SEED).numpy(),
        n_snippets=len(joined),
        threshold=threshold,
    )


def thresholds(settings: Settings) -> list[float]:
    """Thresholds to try in turn until there are enough snippets."""
    steps = np.arange(settings.Th_single_ch, LOWEST_THRESHOLD - 1e-9, -THRESHOLD_STEP)
    return [float(step) for step in steps] or [settings.Th_single_ch]


def shipped(settings: Settings, sampling_rate_hz: float) -> Waveforms:
    """The package's own waveforms, resampled to the settings' nt and the recording's rate."""
    with resources.files("ks4stream.stages").joinpath("waveforms.npz").open("rb") as file, np.load(file) as stored:
        snippets = stored["snippets"]
    wanted = (np.arange(settings.nt) - settings.peak_sample) / sampling_rate_hz
    present = (np.arange(snippets.shape[1]) - SHIPPED_PEAK) / SHIPPED_RATE_HZ
    resampled = np.stack([np.interp(wanted, present, snippet, left=0, right=0) for snippet in snippets])
    resampled /= np.linalg.norm(resampled, axis=1, keepdims=True)
    joined = torch.from_numpy(resampled.astype(np.float32))
    return Waveforms(
        components=kernels.principal_components(joined, settings.n_pcs).numpy(),
        shapes=kernels.typical_shapes(joined, settings.n_templates, seed=SEED).numpy(),
        n_snippets=0,
        threshold=settings.Th_single_ch,
    )


def warn_of_few(n_snippets: int, threshold: float, used: str) -> None:
    """Say that there was little to learn from."""
    warn(
        f"Only {n_snippets} clean spikes were found to learn waveforms from, down to a threshold of {threshold:g} "
        f"(Th_single_ch); {used}.",
        FewSpikesWarning,
        stacklevel=3,
    )
