"""How far the tissue moved, batch by batch (section 4)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tile
from ks4stream.errors import DriftWarning
from ks4stream.kernels import drift as kernels
from ks4stream.results import Drift, PeakSample
from ks4stream.stages.detection import Detector
from ks4stream.stages.preprocessing import Preprocessor

MOST_PLOTTED = 200_000  # peaks kept for the drift scatter plot
LEAST_RELIABILITY = 0.5  # correlation of the shifts told by the two halves of the peaks, below which they are noise
STILL_BINS = 1.0  # noise in the shifts up to which a recording is called still without a warning


class Fingerprints(NamedTuple):
    """What one tile contributes."""

    counts: NDArray[np.uint16]  # (half, z, a): peaks of even and of odd rank, by depth and score
    sample: NDArray[np.int64]  # (n,) a thinned sample of the peaks, for the plot
    depth_um: NDArray[np.float32]  # (n,)
    score: NDArray[np.float32]  # (n,)


@dataclass(frozen=True)
class Fingerprinter:
    """Detects the peaks of each tile and counts them by depth and score."""

    detector: Detector
    most_plotted_per_tile: int

    def __call__(self, block: tuple[Tile, ...]) -> list[Fingerprints]:
        return [self._of(tile) for tile in block]

    def _of(self, tile: Tile) -> Fingerprints:
        _, peaks = self.detector.peaks(tile)
        source = self.detector.source
        lowest, n_bins = depth_range(source)
        halves = [
            kernels.fingerprint(
                peaks.depth_um[half::2], peaks.score[half::2], lowest_um=lowest,
                bin_um=source.settings.binning_depth, n_bins=n_bins, threshold=source.settings.Th_universal,
            )
            for half in (0, 1)
        ]  # fmt: skip
        kept = torch.arange(min(len(peaks.sample), self.most_plotted_per_tile), device=peaks.sample.device)
        kept = kept * len(peaks.sample) // max(len(kept), 1)
        return Fingerprints(
            counts=torch.stack(halves).clamp(max=65535).cpu().numpy().astype(np.uint16),
            sample=self.detector.time_of(tile, peaks.sample[kept]).cpu().numpy(),
            depth_um=peaks.depth_um[kept].cpu().numpy(),
            score=peaks.score[kept].cpu().numpy(),
        )


def depth_range(source: Preprocessor) -> tuple[float, int]:
    """Depth of the lowest contact and the number of depth bins."""
    y = source.probe.y_um
    return float(y.min()), kernels.n_depth_bins(float(np.ptp(y)), source.settings.binning_depth)


def combine(source: Preprocessor, parts: Iterable[list[Fingerprints]]) -> tuple[Drift, PeakSample]:
    """Register the fingerprints of all tiles; where they cannot tell, the shift is 0 and a warning says so."""
    tiles = [one for part in parts for one in part]
    counts = np.stack([tile.counts for tile in tiles])  # (b, half, z, a)
    peaks = PeakSample(
        sample=np.concatenate([tile.sample for tile in tiles]),
        depth_um=np.concatenate([tile.depth_um for tile in tiles]),
        score=np.concatenate([tile.score for tile in tiles]),
    )
    return estimate(source, counts), peaks


def estimate(source: Preprocessor, counts: NDArray[np.uint16]) -> Drift:
    """Shifts of all batches from their fingerprints (b, half, z, a)."""
    settings = source.settings
    lowest, n_bins = depth_range(source)
    segments = kernels.segment_bounds(n_bins, settings.nblocks)
    centre = lowest - 1 + settings.binning_depth * np.array([(first + last) / 2 for first, last in segments])
    none = Drift(shift_um=np.zeros((len(counts), len(segments))), centre_um=centre)
    if n_bins < kernels.FEWEST_BINS:
        return _undecided(none, f"the probe has only {n_bins} depth bins of {settings.binning_depth:g} µm")
    if len(counts) < 2:
        return none

    def register(some: NDArray[np.uint16]) -> NDArray[np.float64]:
        found = kernels.register(some, n_blocks=settings.nblocks, smoothing=settings.drift_smoothing)
        return found - np.median(found, axis=0)

    both = counts[:, 0].astype(np.uint32) + counts[:, 1]
    shift = register(both.astype(np.uint16))
    halves = [register(counts[:, half]) for half in (0, 1)]
    reliability = _correlation(halves[0], halves[1])
    if reliability < LEAST_RELIABILITY:
        if shift.std() <= STILL_BINS:
            return none
        return _undecided(none, f"even and odd peaks tell shifts that correlate by {reliability:.2f} only (few peaks)")
    return Drift(shift_um=shift * settings.binning_depth, centre_um=centre)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = (a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def _undecided(none: Drift, why: str) -> Drift:
    warnings.warn(f"Drift is taken as zero: {why}.", DriftWarning, stacklevel=3)
    return none
