"""From all detections to learned templates: one pass, then one clustering per region (section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tile
from ks4stream.geometry import Regions
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, pick_region, read_region, write_block
from ks4stream.kernels import detection, templates
from ks4stream.kernels.clustering import cluster_region
from ks4stream.kernels.graph import CHUNK, ScatteredRows
from ks4stream.results import Templates
from ks4stream.settings import Settings
from ks4stream.stages.detection import Detector

GPU_FROM_SPIKES = 8192
"""Spikes of a region from which a GPU clusters them faster than a processor, where one is used at all. Fewer are too
little work for the thousands of small steps."""

N_SLICES = 100  # of time, between which a region's spikes are shared out where there are too many


@dataclass(frozen=True)
class PeakWriter:
    """Detects a block's peaks and writes them, with features, grouped by region; returns the receipt."""

    detector: Detector
    regions: Regions
    folder: Place = Path()

    def __call__(self, block: tuple[Tile, ...]) -> Receipt:
        tiles = [self._of(tile) for tile in self.detector.source.read_ahead(block)]
        columns = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        region = self.regions.of_centre[columns["centre"]]
        path = self.folder / f"peaks-{block[0].index:08d}-{block[-1].index:08d}.rows"
        return write_block(path, columns, region, len(self.regions))

    def _of(self, tile: Tile) -> dict[str, NDArray[np.generic]]:
        traces, peaks = self.detector.peaks(tile)
        known = self.detector.templates
        channels, present = known.channels[peaks.centre], known.present[peaks.centre]
        features = detection.features(traces, known.components, channels, peaks.sample, present)
        return {
            "sample": self.detector.time_of(tile, peaks.sample).cpu().numpy(),
            "centre": peaks.centre.cpu().numpy().astype(np.int32),
            "depth_um": peaks.depth_um.cpu().numpy(),
            "score": peaks.score.cpu().numpy(),
            "features": features.cpu().numpy(),
        }


class RegionTemplates(NamedTuple):
    """Clusters of one region's detections."""

    features: NDArray[np.float32]  # (u, c, q) mean of each cluster, on all channels
    n_spikes: NDArray[np.float64]  # (u,) that each stands for


@dataclass(frozen=True)
class RegionClusterer:
    """Clusters the detections of one region; returns the mean of each cluster."""

    receipts: Sequence[Receipt]
    channels: NDArray[np.int64]  # (k, j) of each centre, −1 for none
    of_centre: NDArray[np.int64]  # (k,) region of each centre
    n_channels: int
    settings: Settings
    device: str

    def __call__(self, region: int) -> RegionTemplates:
        centre = read_region(self.receipts, "centre", region).astype(np.int64)
        sample = read_region(self.receipts, "sample", region)
        chosen, weight = bounded_sample(sample, centre, most=self._most())
        features = pick_region(self.receipts, "features", region, chosen)
        own = self.channels[self.of_centre == region]
        union = np.unique(own[own >= 0])
        rows = scattered_rows(features, centre[chosen], self.channels, union, self.n_channels, self.device)
        settings = self.settings
        label = cluster_region(
            rows,
            final=False,
            n_neighbors=settings.cluster_neighbors,
            downsampling=settings.cluster_downsampling,
            max_landmarks=settings.landmark_limit,
            seed=settings.cluster_init_seed,
        )
        mean, count = cluster_means(rows, label, weight)
        whole = np.zeros((len(mean), self.n_channels, features.shape[2]), np.float32)
        whole[:, union] = mean.reshape(len(mean), len(union), features.shape[2])
        return RegionTemplates(whole, count)

    def _most(self) -> int:
        return self.settings.cluster_downsampling * self.settings.landmark_limit


def scattered_rows(
    features: NDArray[np.float32],
    kind: NDArray[np.integer[Any]],
    channels: NDArray[np.int64],
    union: NDArray[np.int64],
    n_channels: int,
    device: str,
) -> ScatteredRows:
    """Features (n, j, q), on the channels (k, j; −1: none) of each spike's kind (n,), as rows over those of `union`.

    They are on the device only if it repays that.
    """
    device = device if len(features) >= GPU_FROM_SPIKES else "cpu"
    slot = np.full(n_channels + 1, -1, np.int64)  # the last entry answers for −1
    slot[union] = np.arange(len(union))
    held = torch.from_numpy(features)
    if not isinstance(features, np.memmap):  # else they are too many for the device too, and go there piece by piece
        held = held.to(device)
    return ScatteredRows(held, torch.from_numpy(kind), torch.from_numpy(slot[channels]), len(union), device=device)


def cluster_means(
    rows: ScatteredRows, label: NDArray[np.int64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Weighted mean row (u, d) and summed weight (u,) of each label, summed in float64 in the rows' order."""
    n_labels = int(label.max()) + 1 if len(label) else 0
    total = torch.zeros(n_labels, rows.d, dtype=torch.float64)
    count = np.bincount(label, weight, n_labels).astype(np.float64)
    for first in range(0, rows.n, CHUNK):
        part = slice(first, first + CHUNK)
        values = rows.chunk(first, min(first + CHUNK, rows.n)).cpu().double()
        total.index_add_(0, torch.from_numpy(label[part]), values * torch.from_numpy(weight[part])[:, None])
    return (total / torch.from_numpy(count).clamp(min=1e-12)[:, None]).float().numpy(), count


def bounded_sample(
    sample: NDArray[np.int64], centre: NDArray[np.int64], *, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most `most` spikes: equal shares over time slices and, within a slice, over centres.

    Unused shares go to the others. Within a share the smallest hashes of (time, centre) are taken, so the
    choice does not depend on the order of the spikes.

    Returns
    -------
    chosen : ndarray of int64
        Sorted indices.
    weight : ndarray of float64
        Spikes each chosen one stands for.
    """
    n = len(sample)
    order = np.lexsort((centre, sample))
    if n <= most:
        return order, np.ones(n)
    span = max(int(sample.max() - sample.min()) + 1, 1)
    slices = (sample - sample.min()) * N_SLICES // span
    group_of = np.unique(slices * (int(centre.max()) + 1) + centre, return_inverse=True)[1]
    slice_of_group = np.zeros(int(group_of.max()) + 1, np.int64)
    slice_of_group[group_of] = slices
    size = np.bincount(group_of)
    share = np.zeros_like(size)
    per_slice = _shares(np.bincount(slices, minlength=N_SLICES), most)
    for one in range(N_SLICES):
        groups = np.flatnonzero(slice_of_group == one)
        share[groups] = _shares(size[groups], int(per_slice[one]))
    ranked = np.lexsort((_hash(sample, centre), group_of))
    rank = np.arange(n) - np.repeat(np.cumsum(size) - size, size)
    chosen = ranked[rank < share[group_of[ranked]]]
    weight = size[group_of[chosen]] / share[group_of[chosen]]
    in_time = np.lexsort((centre[chosen], sample[chosen]))
    return chosen[in_time], weight[in_time]


def _shares(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share `total` out equally, nobody getting more than its size: the level at which the sizes are cut.

    >>> _shares(np.array([1, 10, 10]), 9).tolist()
    [1, 4, 4]
    """
    shares, left = np.zeros_like(sizes), total
    for done, index in enumerate(np.argsort(sizes, kind="stable")):
        shares[index] = min(int(sizes[index]), left // (len(sizes) - done))
        left -= int(shares[index])
    return shares


def _hash(sample: NDArray[np.int64], centre: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A fixed scrambling of (time, centre): splitmix64."""
    x = sample.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + centre.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(x ^ (x >> np.uint64(31)))


def combine(
    regions: Sequence[RegionTemplates], components: NDArray[np.float32], shapes: NDArray[np.float32], *, fewest: int
) -> Templates:
    """All regions' clusters as templates: centred in time, near copies merged, those of too few spikes dropped."""
    features = torch.from_numpy(np.concatenate([region.features for region in regions]))
    count = torch.from_numpy(np.concatenate([region.n_spikes for region in regions]))
    if not len(features):
        return Templates(features=features.numpy(), count=count.numpy())
    basis = torch.from_numpy(components)
    merged = templates.merge_similar(templates.align(features, basis, torch.from_numpy(shapes)), count, basis)
    stays = merged.n_spikes >= fewest
    return Templates(features=merged.features[stays].numpy(), count=merged.n_spikes[stays].numpy())
