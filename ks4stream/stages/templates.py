"""Learned templates: the means of clusters of the peaks of each region (section 5)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.geometry import Centres, Regions
from ks4stream.io.places import Place
from ks4stream.io.tables import pick_region, read_region
from ks4stream.kernels import detection as kernels
from ks4stream.kernels import templates
from ks4stream.kernels.graph import CHUNK
from ks4stream.kernels.hashing import splitmix64
from ks4stream.kernels.thresholds import peak_threshold
from ks4stream.probe import Probe
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import AUTO
from ks4stream.stages.base import Run, Stage
from ks4stream.stages.clustering import (
    CLUSTER_METHOD,
    Circumstances,
    ClusterMethod,
    cluster_means,
    clustering_work,
    on_all_channels,
    scattered_rows,
    score_variances,
)
from ks4stream.stages.detection import Peaks
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.small_peaks import common_peak, complete_batches

logger = logging.getLogger("ks4stream")

AGREEMENT = 0.97
"""Least norm of the mean of a cluster of small peaks, relative to the mean projection of each on its own universal
template, which explains only a part of a neuron's waveform. So the mean of one neuron's peaks is larger than their
projections, apart from noise. Peaks of many neurons resemble different templates, and their mean none as closely."""
N_SLICES = 100  # time slices, over which the peaks of a region are thinned evenly if there are too many


class RegionTemplates(NamedTuple):
    """Clusters of one region's peaks."""

    features: NDArray[np.float32]  # (u, c, q) mean of each cluster, on all channels
    n_spikes: NDArray[np.float64]  # (u,) number of spikes that each represents
    variance: NDArray[np.float64]  # (u,) of their projections on the mean
    projection: NDArray[np.float64]  # (u,) mean of the peaks' projections on their universal templates
    noise: NDArray[np.float64]  # (u,) energy of unit noise in the mean
    n_peaks: NDArray[np.float64]  # (u,) number of peaks in each


@dataclass(frozen=True, eq=False)
class LearnTemplates(Stage[int, RegionTemplates, Templates]):
    """Cluster the peaks of each region; the means of the clusters are templates."""

    name = "first clustering"
    reads = ("n_pcs", "Th_universal")
    records = (RegionTemplates,)

    peaks: Peaks
    waveforms: Waveforms
    probe: Probe
    centres: Centres
    regions: Regions
    circumstances: Circumstances
    cluster: ClusterMethod
    min_spikes: int

    def items(self, run: Run) -> Sequence[int]:
        """The regions that have peaks."""
        occupied: list[int] = np.flatnonzero(self.peaks.of_region).tolist()
        return occupied

    def work(self, items: Sequence[int]) -> Sequence[float]:
        """The number of peaks."""
        sizes: list[float] = self.peaks.of_region[list(items)].tolist()
        return sizes

    def task(self, item: int, folder: Place) -> RegionTemplates:
        """Cluster the peaks of one region, large and small ones apart; clusters of small ones have to agree.

        Peaks that are detected in only some of the batches also stand for those of the others.
        """
        score, sample = (read_region(self.peaks.receipts, name, item) for name in ("score", "sample"))
        tiling = self.circumstances.tiling
        complete = complete_batches(self.settings, tiling, self.circumstances.sampling_rate_hz)
        is_large = score > self._threshold(score[complete[tiling.tile_of(sample)]])
        weight = np.where(score > common_peak(self.settings), 1.0, len(tiling) / complete.sum())
        large, small = (self._clusters(item, np.flatnonzero(some), weight) for some in (is_large, ~is_large))
        agree = of_one_neuron(small)
        pairs: Iterable[Any] = zip(large, small, strict=True)
        return RegionTemplates(*(np.concatenate([of_large, of_small[agree]]) for of_large, of_small in pairs))

    def _threshold(self, score: NDArray[np.float32]) -> float:
        """What the large ones of a region's peaks exceed; all do, if ``Th_universal`` is a number."""
        return peak_threshold(score) if self.settings.Th_universal == AUTO else 0.0

    def _clusters(self, region: int, some: NDArray[np.int64], represented: NDArray[np.float64]) -> RegionTemplates:
        """Cluster a bounded number of some of a region's peaks, each of which represents some number of peaks."""
        receipts = self.peaks.receipts
        centre = read_region(receipts, "centre", region)[some].astype(np.int64)
        sample = read_region(receipts, "sample", region)[some]
        chosen, weight = bounded_sample(sample, centre, max_peaks=self.cluster.max_peaks)
        centre, sample, chosen = centre[chosen], sample[chosen], some[chosen]
        weight *= represented[chosen]
        features = pick_region(receipts, "features", region, chosen)
        own = self.centres.channels[self.regions.of_centre == region]
        union = np.unique(own[own >= 0])
        n_channels, device = self.probe.n_channels, self.cluster.device
        rows = scattered_rows(features, centre, self.centres.channels, union, n_channels, device)
        conditions = self.circumstances.of(sample, float(self.regions.position_um[region, 1]))
        label = self.cluster(rows, conditions, components=torch.from_numpy(self.waveforms.components))
        mean, count = cluster_means(rows, label, weight)
        total = count.clip(1e-12)
        n_features = (self.centres.channels >= 0).sum(axis=1)[centre] * features.shape[2]
        return RegionTemplates(
            features=on_all_channels(mean, union, n_channels, features.shape[2]),
            n_spikes=count,
            variance=score_variances(rows, label, weight, mean),
            projection=np.bincount(label, weight * self._projections(features, centre), len(count)) / total,
            noise=np.bincount(label, weight**2 * n_features, len(count)) / total**2,
            n_peaks=np.bincount(label, minlength=len(count)).astype(float),
        )

    def _projections(self, features: NDArray[np.float32], centre: NDArray[np.int64]) -> NDArray[np.float64]:
        """Projections of peaks on their universal templates: (n,)."""
        shapes, components = map(torch.from_numpy, (self.waveforms.shapes, self.waveforms.components))
        found = np.zeros(len(centre))
        for first in range(0, len(centre), CHUNK):
            part = slice(first, first + CHUNK)
            some, weights = map(torch.from_numpy, (features[part], self.centres.weights[centre[part]]))
            found[part] = kernels.projections(some, weights, shapes, components).numpy()
        return found

    def combine(self, parts: Iterable[RegionTemplates], run: Run) -> Templates:
        """Align the clusters of all regions, merge near duplicates, and drop those of few spikes or of collisions."""
        empty = np.zeros((0, self.probe.n_channels, self.settings.n_pcs), np.float32)
        regions = [RegionTemplates(empty, *np.zeros((5, 0))), *parts]
        features = torch.from_numpy(np.concatenate([region.features for region in regions]))
        count = torch.from_numpy(np.concatenate([region.n_spikes for region in regions]))
        variance = torch.from_numpy(np.concatenate([region.variance for region in regions]))
        n_found = torch.from_numpy(np.concatenate([region.n_peaks for region in regions]))
        if not len(features):
            return Templates(features=features.numpy(), count=count.numpy(), spread=variance.float().numpy())
        components, shapes = map(torch.from_numpy, (self.waveforms.components, self.waveforms.shapes))
        aligned = templates.align(features, components, shapes)
        merged = templates.merge_similar(aligned, count, components, variance=variance, n_found=n_found)
        enough = merged.at(merged.n_found >= self.min_spikes)
        tiling = self.circumstances.tiling
        sums = templates.are_sums(enough.features, enough.n_spikes, components, n_samples=len(tiling) * tiling.size)
        known, n_peaks = enough.at(~sums), int(self.peaks.of_region.sum())
        logger.info(
            "%d peaks, %d learned templates; %d of collisions are left out",
            n_peaks,
            len(known.features),
            int(sums.sum()),
        )
        return Templates(
            features=known.features.numpy(), count=known.n_spikes.numpy(), spread=known.variance.sqrt().float().numpy()
        )

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """A bounded number of a region's peaks, read and chosen, and their graph."""
        n = min(load.largest_region, CLUSTER_METHOD(load.settings).max_peaks)
        choosing = 64 * load.largest_region  # times and centres of all peaks, and their time slices
        return load.on_regions(
            cls.name,
            max(choosing, CLUSTER_METHOD.n_bytes(load, n)) + load.row_bytes * n,
            remedies=("lower max_cluster_subset or cluster_downsampling (a smaller sample)",),
            work=clustering_work(load, min(load.n_peaks, len(load.regions) * CLUSTER_METHOD(load.settings).max_peaks)),
        )


def of_one_neuron(found: RegionTemplates) -> NDArray[np.bool_]:
    """Which clusters (u,) have a mean as large as the projections of their peaks."""
    energy = np.square(found.features.astype(np.float64)).sum(axis=(1, 2)) - found.noise
    return np.asarray(energy >= (AGREEMENT * found.projection) ** 2)


def bounded_sample(
    sample: NDArray[np.int64], centre: NDArray[np.int64], *, max_peaks: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose at most `max_peaks` peaks: equal shares for time slices and, within a slice, for centres.

    What a share does not use goes to the others. Within a share, the peaks with the smallest hashes of (time, centre)
    are chosen, so the choice does not depend on the order of the peaks.

    Returns
    -------
    chosen : ndarray of int64
        Sorted indices.
    weight : ndarray of float64
        Number of peaks that each chosen one represents.
    """
    n = len(sample)
    order = np.lexsort((centre, sample))
    if n <= max_peaks:
        return order, np.ones(n)
    span = max(int(sample.max() - sample.min()) + 1, 1)
    slices = (sample - sample.min()) * N_SLICES // span
    group_of = np.unique(slices * (int(centre.max()) + 1) + centre, return_inverse=True)[1]
    slice_of_group = np.zeros(int(group_of.max()) + 1, np.int64)
    slice_of_group[group_of] = slices
    size = np.bincount(group_of)
    share = np.zeros_like(size)
    per_slice = _shares(np.bincount(slices, minlength=N_SLICES), max_peaks)
    for number in range(N_SLICES):
        groups = np.flatnonzero(slice_of_group == number)
        share[groups] = _shares(size[groups], int(per_slice[number]))
    ranked = np.lexsort((splitmix64(sample, centre), group_of))
    rank = np.arange(n) - np.repeat(np.cumsum(size) - size, size)
    chosen = ranked[rank < share[group_of[ranked]]]
    weight = size[group_of[chosen]] / share[group_of[chosen]]
    weight *= _unrepresented(size, share, slice_of_group)[group_of[chosen]]
    in_time = np.lexsort((centre[chosen], sample[chosen]))
    return chosen[in_time], weight[in_time]


def _unrepresented(
    size: NDArray[np.int64], share: NDArray[np.int64], slice_of_group: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Factor of the weights in each group by which those chosen also represent the groups that have no share.

    These are the others of their slice, or of all slices where a whole slice has no share. It is 1 where all have one.
    """
    of_slice, chosen_of_slice = (
        np.bincount(slice_of_group, size * kept, N_SLICES) for kept in (np.ones_like(size), share > 0)
    )
    within = of_slice / np.maximum(chosen_of_slice, 1)
    between = size.sum() / of_slice[chosen_of_slice > 0].sum()
    return np.asarray(within[slice_of_group] * between, np.float64)


def _shares(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Divide `total` into equal shares, none larger than its size; what is left over goes to the others.

    >>> _shares(np.array([1, 10, 10]), 9).tolist()
    [1, 4, 4]
    """
    shares, left = np.zeros_like(sizes), total
    for done, index in enumerate(np.argsort(sizes, kind="stable")):
        shares[index] = min(int(sizes[index]), left // (len(sizes) - done))
        left -= int(shares[index])
    return shares
