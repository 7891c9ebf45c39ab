"""From spikes to units: final clustering per region, merging, and what counts as a unit (sections 7, 9 and 10).

A region's spikes are read by the task that clusters them, which writes them anew, grouped by unit. From then on a unit
is seen at a time: its train is enough to merge it, to find its duplicates and to label it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.io.mapped import scratch_array
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, pick_region, read_region, write_block
from ks4stream.kernels import correlograms, merging, templates
from ks4stream.kernels.clustering import cluster_region
from ks4stream.probe import Probe
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.matching import Matches
from ks4stream.stages.templates import cluster_means, scattered_rows

LEAST_MARGIN = 1.5
"""Mean score of a unit's spikes above ``Th_learned``, in noise standard deviations. Departure from section 9: clusters
closer to the threshold are the summit of a distribution that reaches below it, more than a tenth of it cut off
(scores have unit noise), which is what background activity looks like; they are not reported as units."""
SECONDS_PER_SPIKE, FEWEST_SPIKES, ENOUGH_SPIKES = 3.0, 5, 20
"""A template or a unit has at least a spike in three seconds of recording, but 5 in any, and 20 always suffice."""


def fewest_spikes(n_samples: int, sampling_rate_hz: float) -> int:
    """Spikes that make a unit; clusters of fewer are chance collisions, not neurons."""
    return int(np.clip(n_samples / sampling_rate_hz / SECONDS_PER_SPIKE, FEWEST_SPIKES, ENOUGH_SPIKES))


class RegionUnits(NamedTuple):
    """Units of one region."""

    receipt: Receipt  # of its spikes, grouped by unit (counted within the region), each unit's by (time, template)
    unit_features: NDArray[np.float32]  # (u, c, q), noise s.d.


@dataclass(frozen=True)
class RegionSorter:
    """Clusters one region's spikes into units, and writes them grouped by unit.

    Columns: ``sample``, ``template``, ``score``, and ``row``, the spike's place among the rows of all blocks, where its
    features are.
    """

    matches: Matches
    template_channels: NDArray[np.int64]  # (v, j) channels of the features, −1 for none
    region_of: NDArray[np.int64]  # (v,)
    n_channels: int
    sampling_rate_hz: float
    settings: Settings
    device: str
    folder: Place = Path()

    def __call__(self, region: int) -> RegionUnits:
        receipts, settings = self.matches.receipts, self.settings
        rows = counted_rows(self.matches, region)
        sample, template = (pick_region(receipts, name, region, rows) for name in ("sample", "template"))
        order = np.lexsort((template, sample))
        rows, sample, template = rows[order], sample[order], template[order]
        scratch = self.folder if isinstance(self.folder, Path) else None
        features = pick_region(receipts, "features", region, rows, scratch=scratch)
        own = self.template_channels[self.region_of == region]
        union = np.unique(own[own >= 0])
        scattered = scattered_rows(features, template, self.template_channels, union, self.n_channels, self.device)
        unit = cluster_region(
            scattered,
            sample=sample,
            sampling_rate_hz=self.sampling_rate_hz,
            final=True,
            n_neighbors=settings.cluster_neighbors,
            downsampling=settings.cluster_downsampling,
            max_landmarks=settings.landmark_limit,
            seed=settings.cluster_init_seed,
            ccg_threshold=settings.ccg_threshold,
        )
        mean, _ = cluster_means(scattered, unit, np.ones(len(unit)))
        whole = np.zeros((len(mean), self.n_channels, features.shape[2]), np.float32)
        whole[:, union] = mean.reshape(len(mean), len(union), features.shape[2])
        columns = {
            "sample": sample,
            "template": template,
            "row": self._row_in_files(region)[rows],
            "score": pick_region(receipts, "score", region, rows),
        }
        return RegionUnits(write_block(self.folder / f"units-{region:06d}.rows", columns, unit, len(mean)), whole)

    def _row_in_files(self, region: int) -> NDArray[np.int64]:
        """Of each row of the region its place among the rows of all blocks."""
        first = np.cumsum([0] + [receipt.n_rows for receipt in self.matches.receipts])
        parts = [
            np.arange(receipt.start[region], receipt.start[region + 1]) + before
            for receipt, before in zip(self.matches.receipts, first, strict=False)
        ]
        return np.concatenate(parts).astype(np.int64)


def counted_rows(matches: Matches, region: int) -> NDArray[np.int64]:
    """Rows of a region that count, numbered through all blocks, ascending."""
    spans = [(receipt.start[region], receipt.start[region + 1]) for receipt in matches.receipts]
    counts = np.ones(sum(int(stop - start) for start, stop in spans), bool)
    before = 0
    for (start, stop), dropped in zip(spans, matches.dropped, strict=True):
        mine = dropped[(dropped >= start) & (dropped < stop)]
        counts[mine - start + before] = False
        before += int(stop - start)
    return np.flatnonzero(counts)


class Clusters:
    """The units of all regions before merging, numbered through; their spikes stay on disk.

    Attributes
    ----------
    place : ndarray of int64, shape (k, 2)
        Of each cluster its region's receipt and its number within the region.
    n_spikes : ndarray of int64, shape (k,)
    first : ndarray of int64, shape (k,)
        Spikes of the clusters before.
    """

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = receipts
        counts = [np.diff(receipt.start) for receipt in receipts]
        self.place = np.array([(i, k) for i, count in enumerate(counts) for k in range(len(count))], np.int64)
        self.place = self.place.reshape(-1, 2)
        self.n_spikes = np.concatenate([np.zeros(0, np.int64), *counts])
        self.first = np.cumsum(self.n_spikes) - self.n_spikes

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Sorted spike times of a cluster."""
        return self.column(number, "sample")

    def column(self, number: int, name: str) -> NDArray[Any]:
        """One column of a cluster's spikes."""
        receipt, unit = self.place[number].tolist()
        return read_region([self.receipts[receipt]], name, unit)


class Units(NamedTuple):
    """The units of a sorting, as far as they are found; the spikes are those of their clusters."""

    clusters: Clusters
    unit_of: NDArray[np.int64]  # (k,) of each cluster, −1 for those that are no neuron
    lag_of: NDArray[np.int64]  # (k,) by which its waveforms are late, so its spikes are earlier
    kept: NDArray[np.bool_]  # (n,) of every cluster's spikes, one cluster after the other: False for duplicates
    features: NDArray[np.float32]  # (u, c, q), noise s.d.
    refractory: NDArray[np.bool_]  # (u,)
    contamination: NDArray[np.float64]  # (u,)


def combine(
    regions: Sequence[RegionUnits],
    waveforms: Waveforms,
    settings: Settings,
    sampling_rate_hz: float,
    fewest: int,
    *,
    scratch: Path | None = None,
) -> Units:
    """Merge the regions' units that are one neuron, drop what is none, find duplicates, and label what is left."""
    clusters = Clusters([region.receipt for region in regions])
    found = torch.from_numpy(np.concatenate([region.unit_features for region in regions]))
    components = torch.from_numpy(waveforms.components)
    alike = templates.similarity(found, components)
    merged = merging.merge_units(
        clusters,
        clusters.n_spikes,
        found,
        components,
        similarity=alike.value.numpy(),
        lag=alike.lag.numpy(),
        similarity_row=lambda one, others: templates.similarity_to(one, others, components),
        sampling_rate_hz=sampling_rate_hz,
        acg_threshold=settings.acg_threshold,
        ccg_threshold=settings.ccg_threshold,
    )
    kept = scratch_array((int(clusters.n_spikes.sum()),), np.bool_, scratch)
    n_units = len(merged.features)
    stays, refractory, contamination = np.zeros(n_units, bool), np.zeros(n_units, bool), np.zeros(n_units)
    for unit in range(n_units):
        members = np.flatnonzero(merged.unit_of == unit)
        train, score = _unit_train(clusters, members, merged.lag_of, kept, settings, sampling_rate_hz)
        stays[unit] = is_neuron(train, score, settings.Th_learned, fewest, impossible_samples=sampling_rate_hz / 1000)
        if stays[unit]:
            refractory[unit] = correlograms.is_refractory_unit(
                train, sampling_rate_hz=sampling_rate_hz, acg_threshold=settings.acg_threshold
            )
            contamination[unit] = correlograms.refractoriness(train, sampling_rate_hz=sampling_rate_hz).ratio
    number = np.where(stays, np.cumsum(stays) - 1, -1)
    return Units(
        clusters,
        number[merged.unit_of],
        merged.lag_of,
        kept,
        merged.features.numpy()[stays],
        refractory[stays],
        contamination[stays],
    )


def _unit_train(
    clusters: Clusters,
    members: NDArray[np.int64],
    lag_of: NDArray[np.int64],
    kept: NDArray[np.bool_],
    settings: Settings,
    sampling_rate_hz: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Times, ascending, and scores of a unit's spikes without its duplicates, which are marked in `kept`."""
    before = [clusters[member] for member in members]
    sample = np.concatenate([times - lag_of[member] for member, times in zip(members, before, strict=True)])
    order = np.lexsort((np.concatenate(before), sample))  # as all spikes are sorted in the end
    min_samples = int(settings.duplicate_spike_ms * sampling_rate_hz / 1000)
    alone = np.zeros(len(sample), bool)
    alone[order] = merging.mark_duplicates(sample[order], np.zeros(len(sample), np.int64), min_samples=min_samples)
    ends = np.cumsum([len(times) for times in before])[:-1]
    for member, flags in zip(members, np.split(alone, ends), strict=True):
        kept[clusters.first[member] : clusters.first[member] + len(flags)] = flags
    score = np.concatenate([clusters.column(member, "score") for member in members])
    stays = order[alone[order]]
    return sample[stays], score[stays]


def is_neuron(
    sample: NDArray[np.int64], score: NDArray[np.float32], threshold: float, fewest: int, *, impossible_samples: float
) -> bool:
    """Whether a unit can be a neuron, by times (n,), ascending, and scores (n,) of its spikes.

    It has at least `fewest` spikes, scores that stand clear of the threshold, and fires no more than half of
    its spikes within `impossible_samples` of the last or the next, as what an artifact leaves behind does.
    """
    if len(sample) < max(fewest, 1):
        return False
    close = np.diff(sample) < impossible_samples
    in_burst = np.append(close, False) | np.insert(close, 0, False)
    clear = float(score.mean(dtype=np.float64)) > threshold + LEAST_MARGIN
    return bool(clear and 2 * in_burst.sum() <= len(sample))


def template_regions(unit_features: NDArray[np.float32], probe: Probe, regions: geometry.Regions) -> NDArray[np.int64]:
    """Region of each template (u, c, q): by the position of its largest channel."""
    largest = (unit_features**2).sum(axis=2).argmax(axis=1) if len(unit_features) else np.zeros(0, np.int64)
    return regions.nearest(probe.positions_um[largest], probe.shank[largest])
