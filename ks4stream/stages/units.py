"""From spikes to units: final clustering per region, merging, duplicates, positions (sections 9 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream import geometry
from ks4stream.io.spikes import Receipt, read_region
from ks4stream.kernels import correlograms, merging, templates
from ks4stream.kernels.clustering import cluster_region
from ks4stream.probe import Probe
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.templates import cluster_means, scattered_rows

ROWS_AT_ONCE = 65_536
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
    """Units of one region, and their spikes in order of (time, template)."""

    sample: NDArray[np.int64]  # (n,)
    template: NDArray[np.int32]  # (n,) learned template that found the spike
    score: NDArray[np.float32]  # (n,)
    features: NDArray[np.float32]  # (n, j, q)
    unit: NDArray[np.int64]  # (n,) counted within the region
    unit_features: NDArray[np.float32]  # (u, c, q)


@dataclass(frozen=True)
class RegionSorter:
    """Clusters one region's spikes into units."""

    receipts: Sequence[Receipt]
    counts: Sequence[NDArray[np.bool_]]  # per block which rows count
    template_channels: NDArray[np.int64]  # (v, j) channels of the features, −1 for none
    region_of: NDArray[np.int64]  # (v,)
    n_channels: int
    sampling_rate_hz: float
    settings: Settings
    device: str

    def __call__(self, region: int) -> RegionUnits:
        blocks = zip(self.receipts, self.counts, strict=True)
        keep = np.concatenate([counts[block.start[region] : block.start[region + 1]] for block, counts in blocks])
        sample = read_region(self.receipts, "sample", region)[keep]
        template = read_region(self.receipts, "template", region)[keep]
        order = np.lexsort((template, sample))
        sample, template = sample[order], template[order]
        score = read_region(self.receipts, "score", region)[keep][order]
        features = read_region(self.receipts, "features", region)[keep][order]
        own = self.template_channels[self.region_of == region]
        union = np.unique(own[own >= 0])
        rows = scattered_rows(features, self.template_channels[template], union, self.n_channels, self.device)
        settings = self.settings
        unit = cluster_region(
            rows, sample=sample, sampling_rate_hz=self.sampling_rate_hz, final=True,
            n_neighbors=settings.cluster_neighbors, downsampling=settings.cluster_downsampling,
            max_landmarks=settings.landmark_limit, seed=settings.cluster_init_seed,
            ccg_threshold=settings.ccg_threshold,
        )  # fmt: skip
        mean, _ = cluster_means(rows, unit, np.ones(len(unit)))
        whole = np.zeros((len(mean), self.n_channels, features.shape[2]), np.float32)
        whole[:, union] = mean.reshape(len(mean), len(union), -1)
        return RegionUnits(sample, template, score, features, unit, whole)


class Units(NamedTuple):
    """All spikes, sorted by (time, unit), and all units."""

    sample: NDArray[np.int64]
    template: NDArray[np.int32]
    score: NDArray[np.float32]
    features: NDArray[np.float32]
    unit: NDArray[np.int64]
    kept: NDArray[np.bool_]  # False for duplicates (section 10)
    unit_features: NDArray[np.float32]


def combine(
    regions: Sequence[RegionUnits], waveforms: Waveforms, settings: Settings, sampling_rate_hz: float, fewest: int
) -> Units:
    """Join the regions' units, merge those that are one neuron, drop what is none, and sort by (time, unit)."""
    first = np.cumsum([0] + [len(region.unit_features) for region in regions])
    sample = np.concatenate([region.sample for region in regions])
    unit = np.concatenate([region.unit + start for region, start in zip(regions, first, strict=False)]).astype(np.int64)
    order = np.lexsort((unit, sample))
    found = torch.from_numpy(np.concatenate([region.unit_features for region in regions]))
    components = torch.from_numpy(waveforms.components)
    alike = templates.similarity(found, components)
    merged = merging.merge_units(
        sample[order], unit[order], found, components,
        similarity=alike.value.numpy(), lag=alike.lag.numpy(),
        similarity_row=lambda one, others: _similarity_row(one, others, components),
        sampling_rate_hz=sampling_rate_hz,
        acg_threshold=settings.acg_threshold, ccg_threshold=settings.ccg_threshold,
    )  # fmt: skip
    order = order[merged.order]

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(region, name) for region in regions])[order]

    features = column("features")
    for lag in np.unique(merged.lag[merged.lag != 0]).tolist():
        moved = merged.lag == lag
        features[moved] = features[moved] @ templates.roll_matrix(components, lag).numpy()
    kept = merging.mark_duplicates(
        merged.sample, merged.unit, min_samples=int(settings.duplicate_spike_ms * sampling_rate_hz / 1000)
    )
    joined = Units(
        merged.sample, column("template"), column("score"), features, merged.unit, kept, merged.features.numpy()
    )
    stays = are_neurons(joined, settings.Th_learned, fewest, impossible_samples=sampling_rate_hz / 1000)
    return _only(joined, stays)


def are_neurons(units: Units, threshold: float, fewest: int, *, impossible_samples: float) -> NDArray[np.bool_]:
    """Which units can be neurons: (u,).

    They have at least `fewest` spikes, scores that stand clear of the threshold, and fire no more than half of
    their spikes within `impossible_samples` of the last or the next, as what an artifact leaves behind does.
    """
    n_units = len(units.unit_features)
    unit, sample, score = units.unit[units.kept], units.sample[units.kept], units.score[units.kept]
    count = np.bincount(unit, minlength=n_units)
    mean = np.bincount(unit, score, n_units) / np.maximum(count, 1)
    order = np.argsort(unit, kind="stable")
    close = (np.diff(sample[order]) < impossible_samples) & (np.diff(unit[order]) == 0)
    in_burst = np.append(close, False) | np.insert(close, 0, False)
    impossible = np.bincount(unit[order], in_burst[: len(unit)], n_units)
    return (count >= fewest) & (mean > threshold + LEAST_MARGIN) & (2 * impossible <= count)


def _only(units: Units, stays: NDArray[np.bool_]) -> Units:
    """Some of the units (u,), numbered anew."""
    rows = stays[units.unit]
    spikes = {name: getattr(units, name)[rows] for name in Units._fields if name != "unit_features"}
    spikes["unit"] = (np.cumsum(stays) - 1)[spikes["unit"]]
    return Units(**spikes, unit_features=units.unit_features[stays])


def _similarity_row(one: Tensor, others: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of one template (c, q) to others (v, c, q), and the lags."""
    alike = templates.similarity(torch.cat([one[None], others]), components)
    return alike.value[0, 1:], alike.lag[0, 1:]


def labels(
    units: Units, settings: Settings, sampling_rate_hz: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Per unit whether it is refractory, and its contamination (section 7), without duplicates."""
    n_units = len(units.unit_features)
    refractory, contamination = np.zeros(n_units, bool), np.zeros(n_units)
    unit, sample = units.unit[units.kept], units.sample[units.kept]
    trains = np.split(sample[np.argsort(unit, kind="stable")], np.cumsum(np.bincount(unit, minlength=n_units))[:-1])
    for u, train in enumerate(trains[:n_units]):
        refractory[u] = correlograms.is_refractory_unit(
            train, sampling_rate_hz=sampling_rate_hz, acg_threshold=settings.acg_threshold
        )
        contamination[u] = correlograms.refractoriness(train, sampling_rate_hz=sampling_rate_hz).ratio
    return refractory, contamination


def positions(
    features: NDArray[np.float32], template: NDArray[np.int32], template_channels: NDArray[np.int64], probe: Probe,
    limit_um: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where each spike was: contacts weighted by the norm of the features there (section 10).

    Only channels closer than `limit_um` to the template's largest (its first) count.

    Returns
    -------
    x_um, y_um : ndarray of float32, shape (n,)
    """
    place = probe.positions_um[template_channels.clip(0)]  # (v, j, 2)
    near = np.linalg.norm(place - place[:, :1], axis=2) < max(limit_um, 1e-9)
    near &= template_channels >= 0
    found = np.zeros((len(template), 2), np.float32)
    for first in range(0, len(template), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        weight = np.linalg.norm(features[rows], axis=2) * near[template[rows]]
        total = np.maximum(weight.sum(axis=1), 1e-12)
        found[rows] = (weight[:, :, None] * place[template[rows]]).sum(axis=1) / total[:, None]
    return found[:, 0], found[:, 1]


def template_regions(
    unit_features: NDArray[np.float32], probe: Probe, regions: geometry.Regions
) -> NDArray[np.int64]:
    """Region of each template (u, c, q): by the position of its largest channel."""
    largest = (unit_features**2).sum(axis=2).argmax(axis=1) if len(unit_features) else np.zeros(0, np.int64)
    return regions.nearest(probe.positions_um[largest], probe.shank[largest])
