"""How far the tissue moved, batch by batch (section 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.probe import Probe
from ks4stream.results import Drift, PeakSample
from ks4stream.settings import Settings
from ks4stream.stages.base import Run, Step
from ks4stream.stages.detection import Peaks
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.registration import Registration, rank_within

MAX_PLOTTED = 100_000  # peaks kept for the drift scatter plot


class Moved(NamedTuple):
    """How far the tissue moved, and some of the peaks that tell it."""

    drift: Drift
    peaks: PeakSample


class DriftEstimator(Protocol):
    """Learns of all peaks, a block at a time, and says how far the tissue moved.

    Another estimator is a class of this form.
    """

    reads: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Settings, tiling: Tiling, probe: Probe, scratch: Path | None) -> None: ...

    def add(self, sample: NDArray[np.int64], depth_um: NDArray[np.float32], score: NDArray[np.float32]) -> None:
        """Take the peaks of some batches, in order of time."""
        ...

    def estimate(self) -> Drift:
        """The shift of each batch at each segment of the probe."""
        ...


@dataclass(frozen=True, eq=False)
class EstimateDrift(Step[Moved]):
    """Estimate the drift from the peaks of all batches, and keep some of these for a plot."""

    name = "drift"

    tiles: Preprocessor
    peaks: Peaks
    estimator: type[DriftEstimator] = Registration

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.part(*self.estimator.reads))

    def run(self, run: Run) -> Moved:
        """Show all peaks to the estimator."""
        tiling = self.tiles.tiling
        estimator = self.estimator(self.settings, tiling, self.tiles.probe, run.scratch)
        most = -(-MAX_PLOTTED // len(tiling))
        plotted = []
        for sample, depth_um, score in self.peaks.in_time():
            estimator.add(sample, depth_um, score)
            rank, n_in_tile = rank_within(tiling.tile_of(sample))
            kept = rank * most % n_in_tile < most  # `most` of each tile, evenly; all where there are no more
            plotted.append((sample[kept], depth_um[kept], score[kept]))
        columns = (np.concatenate(column) for column in zip(*plotted, strict=True))
        return Moved(estimator.estimate(), PeakSample(*columns))

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """What the estimator needs."""
        return replace(Registration.needs(load), name=cls.name) if load.settings.nblocks else Needs(cls.name)
