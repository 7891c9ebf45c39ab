"""Drift: how far the traces of each batch are moved, to undo the tissue's displacement (section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.kernels import drift as kernels
from ks4stream.probe import Probe
from ks4stream.results import Drift, PeakSample
from ks4stream.settings import Settings
from ks4stream.stages.base import Run, Step
from ks4stream.stages.detection import Peaks
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.registration import Registration
from ks4stream.stages.small_peaks import common_peak

MAX_PLOTTED = 100_000  # peaks kept for the drift scatter plot


class DriftResult(NamedTuple):
    """The drift, and a subset of the peaks that are detected in all batches."""

    drift: Drift
    peaks: PeakSample


class DriftEstimator(Protocol):
    """Estimates the drift from all peaks, which it is given block by block.

    Another estimator is a class with this interface, named in :data:`DRIFT_METHOD`.

    Attributes
    ----------
    reads : tuple of str
        Names of the settings, or of groups of settings, that it reads.
    """

    reads: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Settings, tiling: Tiling, probe: Probe, scratch: Path | None) -> None: ...

    def add(self, sample: NDArray[np.int64], depth_um: NDArray[np.float32], score: NDArray[np.float32]) -> None:
        """Add the peaks of some batches, in time order."""
        ...

    def estimate(self) -> Drift:
        """The correction of each batch at each segment of the probe: the negative of the tissue's displacement."""
        ...

    @staticmethod
    def n_bytes(load: Load) -> tuple[int, int]:
        """Memory of the calling process, and disk space."""
        ...


DRIFT_METHOD: type[DriftEstimator] = Registration
"""The estimator that is used."""


@dataclass(frozen=True, eq=False)
class EstimateDrift(Step[DriftResult]):
    """Estimate the drift from the peaks of all batches, and keep some of those detected in all of them for a plot."""

    name = "drift"
    reads = tuple(dict.fromkeys((*DRIFT_METHOD.reads, "Th_universal")))

    tiles: Preprocessor
    peaks: Peaks

    def run(self, run: Run) -> DriftResult:
        """Give all peaks to the estimator."""
        tiling = self.tiles.tiling
        estimator = DRIFT_METHOD(self.settings, tiling, self.tiles.probe, run.scratch)
        max_per_tile = -(-MAX_PLOTTED // len(tiling))
        plotted = []
        for sample, depth_um, score, shank in self.peaks.in_time():
            estimator.add(sample, depth_um, score)
            shown = np.flatnonzero(score > common_peak(self.settings))
            rank, n_in_tile = kernels.rank_within(tiling.tile_of(sample[shown]))
            kept = shown[rank * max_per_tile % n_in_tile < max_per_tile]  # evenly; all of a tile that has fewer
            plotted.append((sample[kept], depth_um[kept], score[kept], shank[kept]))
        columns = (np.concatenate(column) for column in zip(*plotted, strict=True))
        return DriftResult(estimator.estimate(), PeakSample(*columns))

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Needs of the estimator."""
        if not load.settings.nblocks:
            return Needs(cls.name)
        client_bytes, scratch_bytes = DRIFT_METHOD.n_bytes(load)
        work = len(load.tiling) * load.n_channels  # fingerprints are as long as the probe
        return Needs(cls.name, client_bytes=client_bytes, scratch_bytes=scratch_bytes, work=work)
