"""Thresholds of the templates, by the scores of their spikes, and which spikes count (section 8.5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ks4stream.io.places import Place
from ks4stream.io.tables import pick_region
from ks4stream.kernels.thresholds import thresholds
from ks4stream.settings import AUTO
from ks4stream.stages.base import Run, Stage
from ks4stream.stages.matching import Spikes
from ks4stream.stages.needs import Load, Needs


@dataclass(frozen=True, eq=False)
class SetThresholds(Stage[int, NDArray[np.float64], Spikes]):
    """Set the threshold of each template by the scores of its spikes, unless ``Th_learned`` is a number."""

    name = "thresholds"
    reads = ("Th_learned",)

    spikes: Spikes

    def items(self, run: Run) -> Sequence[int]:
        """The regions that have spikes."""
        occupied: list[int] = np.flatnonzero(self.spikes.of_region).tolist()
        return occupied if self.settings.Th_learned == AUTO else []

    def work(self, items: Sequence[int]) -> Sequence[float]:
        """The number of spikes."""
        sizes: list[float] = self.spikes.of_region[list(items)].tolist()
        return sizes

    def task(self, item: int, folder: Place) -> NDArray[np.float64]:
        """Thresholds of the templates of one region, in their order."""
        rows = counted_rows(self.spikes, item)
        score, template = (pick_region(self.spikes.receipts, name, item, rows) for name in ("score", "template"))
        own = np.flatnonzero(self.spikes.region_of == item)
        return thresholds(score, np.searchsorted(own, template), len(own))

    def combine(self, parts: Iterable[NDArray[np.float64]], run: Run) -> Spikes:
        """The spikes, with the thresholds of their templates."""
        threshold = self.spikes.threshold.copy()
        for item, of_region in zip(self.items(run), parts, strict=True):
            threshold[self.spikes.region_of == item] = of_region
        return replace(self.spikes, threshold=threshold)

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Scores, templates and numbers of all spikes of a region; no GPU."""
        n = round(load.rows_per_spike * load.largest_region)
        return replace(load.on_regions(cls.name, 40 * n), gpu_bytes=0)


def counted_rows(spikes: Spikes, region: int) -> NDArray[np.int64]:
    """Rows of a region that count and are above the thresholds of their templates, numbered across all blocks."""
    spans = [(receipt.start[region], receipt.start[region + 1]) for receipt in spikes.receipts]
    counts = np.ones(sum(int(stop - start) for start, stop in spans), bool)
    before = 0
    for (start, stop), dropped in zip(spans, spikes.dropped, strict=True):
        in_region = dropped[(dropped >= start) & (dropped < stop)]
        counts[in_region - start + before] = False
        before += int(stop - start)
    rows = np.flatnonzero(counts)
    score, template = (pick_region(spikes.receipts, name, region, rows) for name in ("score", "template"))
    return rows[score > spikes.threshold[template]]
