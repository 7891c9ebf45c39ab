"""From spikes to units: final clustering per region, merging, and selection of units (sections 7, 9 and 10).

The spikes of a region are read by the task that clusters them, which writes them again, grouped by cluster. After that,
one cluster is processed at a time: its train is enough to merge it, to find its duplicates and to label it. Clusters
that were merged are a unit if they can be a neuron. A spike has a number in each of these files; docs/method.md,
appendix A, draws them with an example.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.io.mapped import HELD_BYTES, scratch_array
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, localize, pick_region, read_region, write_block
from ks4stream.kernels import correlograms, merging, metrics, splits, templates
from ks4stream.kernels.graph import SHARED_FROM
from ks4stream.kernels.overlaps import are_overlapped
from ks4stream.probe import Probe
from ks4stream.results import Waveforms
from ks4stream.stages.base import Run, Stage, Step
from ks4stream.stages.clustering import (
    CLUSTER_METHOD,
    Circumstances,
    ClusterMethod,
    cluster_means,
    clustering_work,
    on_all_channels,
    scattered_rows,
)
from ks4stream.stages.matching import Spikes
from ks4stream.stages.needs import Load, Needs

logger = logging.getLogger("ks4stream")

CLUSTERED_SPIKE_BYTES = 24  # per spike in the file of a region: sample, template, score, and the row of its features
MIN_MARGIN = 1.5
"""Minimum difference of the mean score of a unit's spikes and the mean threshold of their templates, in noise s.d.
Beyond the published method (section 9.3): clusters closer to the threshold are the upper part of a distribution of
which the threshold cuts off more than a tenth (scores have unit noise). Background activity looks like that; they are
not units."""
MIN_PEAKED_MARGIN, PEAKED = 1.0, 1.6
"""A difference from which clusters are units, too, if it is so many times the standard deviation of the scores. That
ratio is 1 if scores fall exponentially from the threshold, as those of background do, and 1.62 if they are normally
distributed and the threshold is one standard deviation below their mean."""
OVERLAPPING_FROM, OVERLAPPING_CHANNELS = 6.0, 0.4
"""A spike overlaps others that are less than a quarter of a waveform from it, have a score of at least 6, and whose
template has at least 0.4 of its channels."""
OVERLAP_BYTES = 150
"""Per spike of the largest region, around which others have fewer: times and templates of the spikes that may overlap
its own, their order, and themselves in that order."""
EXAMPLES = 500  # maximum number of spikes of a cluster that are compared with those of other clusters
SECONDS_PER_SPIKE, MIN_SPIKES, ENOUGH_SPIKES = 3.0, 5, 20
"""A template or a unit has at least one spike in three seconds of recording, but never fewer than 5; 20 always
suffice."""


FEW, NEAR_THRESHOLD, BURSTS, GHOST = (
    "too few spikes",
    "scores near the threshold, as those of background",
    "most spikes within 1 ms of another",
    "ghosts: spikes coincide with those of a larger unit",
)
"""Why clusters are no units."""
GHOST_REACH_UM = 200.0  # distance from a unit at which what matching left of its waveform may be found
HUGE, FAR_GHOST = 50.0, 0.5
"""Units with a norm of more than 50 standard deviations have ghosts of less than half of it at any distance: the
common reference has a part of their spikes."""
CLUSTERS_PER_REGION = 50  # assumed by the plan
SPIKES_PER_CLUSTER = 2500  # that take as long to merge as a cluster takes by itself
HELD_CLUSTERS = 256  # whose examples are in memory, 130 kB each with ten channels and six components
LAGS_BESIDE = 2  # samples by which the lag of two templates may be wrong where both were recorded
ISOLATION_EXAMPLES, MIN_ISOLATION_SPIKES, ISOLATION_CHANNELS = 200, 10, 0.5
"""Maximum and minimum number of spikes by which the isolation of two units is computed, and the share of one's channels
that both must have. Like the minimum, the share is SpikeInterface's default."""
MIN_COMMON_CHANNELS = 3  # of two clusters that may be one unit, unless one of them has fewer channels


def min_unit_spikes(tiling: Tiling, sampling_rate_hz: float) -> int:
    """Minimum number of spikes of a unit; smaller clusters are chance collisions, not neurons."""
    seconds = tiling.n_tiles * tiling.size / sampling_rate_hz
    return int(np.clip(seconds / SECONDS_PER_SPIKE, MIN_SPIKES, ENOUGH_SPIKES))


class RegionClusters(NamedTuple):
    """Clusters of one region's spikes."""

    receipt: Receipt  # of the spikes, by cluster (numbered within the region), in each sorted by (time, template)
    examples: Receipt  # of some spikes of each cluster, with features and conditions, for comparisons
    features: NDArray[np.float32]  # (cluster, c, q) mean of each cluster, on all channels, noise s.d.
    threshold: NDArray[np.float64]  # (cluster,) mean over its spikes of the thresholds of their templates, noise s.d.


@dataclass(frozen=True, eq=False)
class ClusterSpikes(Stage[int, RegionClusters, list[RegionClusters]]):
    """Cluster the spikes of each region, and write them grouped by cluster.

    Columns: ``sample``, ``template``, ``score``, and ``row``, the row of the spike in the files of all blocks, where
    its features are. A second file has some spikes of each cluster, with their features, for :class:`Examples`.
    """

    name = "final clustering"
    records = (RegionClusters,)

    spikes: Spikes
    waveforms: Waveforms
    probe: Probe
    circumstances: Circumstances
    cluster: ClusterMethod

    def items(self, run: Run) -> Sequence[int]:
        """The regions that have spikes."""
        occupied: list[int] = np.flatnonzero(self.spikes.of_region).tolist()
        return occupied

    def work(self, items: Sequence[int]) -> Sequence[float]:
        """The number of spikes."""
        sizes: list[float] = self.spikes.of_region[list(items)].tolist()
        return sizes

    def task(self, item: int, folder: Place) -> RegionClusters:
        """Cluster one region's spikes, and write them grouped by cluster."""
        spikes, receipts = self.spikes, self.spikes.receipts
        rows = spikes.counted(item)
        names = ("sample", "template", "score")
        sample, template, score = (pick_region(receipts, name, item, rows) for name in names)
        order = np.lexsort((template, sample))
        rows, sample, template, score = rows[order], sample[order], template[order], score[order]
        scratch = folder if isinstance(folder, Path) else None
        features = pick_region(receipts, "features", item, rows, scratch=scratch)
        own = spikes.template_channels[spikes.region_of == item]
        union = np.unique(own[own >= 0])
        n_channels, device = self.probe.n_channels, self.cluster.device
        scattered = scattered_rows(features, template, spikes.template_channels, union, n_channels, device)
        conditions = self.circumstances.of(sample, float(self.probe.y_um[own[:, 0]].mean()))
        conditions = conditions._replace(overlapped=self._overlapped(item, sample, template))
        label = self.cluster(scattered, conditions, components=torch.from_numpy(self.waveforms.components))
        mean, _ = cluster_means(scattered, label, np.ones(len(label)))
        columns = {"sample": sample, "template": template, "row": self._row_in_files(item)[rows], "score": score}
        receipt = write_block(folder / f"clusters-{item:06d}.rows", columns, label, len(mean))
        some = thinned(label, EXAMPLES)
        examples = {"sample": sample, "template": template, "features": features, **conditions.columns()}
        examples = {name: values[some] for name, values in examples.items()}
        return RegionClusters(
            receipt,
            write_block(folder / f"examples-{item:06d}.rows", examples, label[some], len(mean)),
            on_all_channels(mean, union, n_channels, features.shape[2]),
            np.bincount(label, spikes.threshold[template], len(mean)) / np.bincount(label, minlength=len(mean)).clip(1),
        )

    def _overlapped(self, region: int, sample: NDArray[np.int64], template: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which spikes (n,) of a region overlap others, of any region."""
        spikes = self.spikes
        has = np.zeros((len(spikes.template_channels), self.probe.n_channels + 1), np.float32)
        np.put_along_axis(has, spikes.template_channels, 1.0, axis=1)
        has = has[:, :-1]  # the last column is that of padding
        own = np.flatnonzero(spikes.region_of == region)
        is_near = np.zeros((len(has), len(has)), bool)
        is_near[own] = has[own] @ has.T >= OVERLAPPING_CHANNELS * has[own].sum(axis=1, keepdims=True)
        parts = []
        for near in np.unique(spikes.region_of[is_near.any(axis=0)]).tolist():
            rows = spikes.counted(near)
            columns = [pick_region(spikes.receipts, name, near, rows) for name in ("sample", "template", "score")]
            parts.append([column[columns[2] >= OVERLAPPING_FROM] for column in columns[:2]])
        other_sample, other_template = (np.concatenate(column) for column in zip(*parts, strict=True))
        del parts, columns
        order = np.argsort(other_sample, kind="stable")
        return are_overlapped(
            sample,
            template,
            other_sample[order],
            other_template[order],
            is_near=is_near,
            reach=self.waveforms.components.shape[1] // 4,
        )

    def _row_in_files(self, region: int) -> NDArray[np.int64]:
        """For each row of the region, its number among the rows of all blocks."""
        receipts = self.spikes.receipts
        first = np.cumsum([0] + [receipt.n_rows for receipt in receipts])
        parts = [
            np.arange(receipt.start[region], receipt.start[region + 1]) + before
            for receipt, before in zip(receipts, first, strict=False)
        ]
        return np.concatenate(parts).astype(np.int64)

    def combine(self, parts: Iterable[RegionClusters], run: Run) -> list[RegionClusters]:
        """All regions."""
        return list(parts)

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """All spikes of a region; features of more than :data:`~ks4stream.io.mapped.HELD_BYTES` stay on disk."""
        n = load.largest_region
        n_examples = min(load.n_spikes, EXAMPLES * CLUSTERS_PER_REGION * len(load.regions))
        return load.on_regions(
            cls.name,
            min(4 * load.n_features * n, HELD_BYTES) + max(CLUSTER_METHOD.n_bytes(load, n), OVERLAP_BYTES * n),
            scratch_bytes=CLUSTERED_SPIKE_BYTES * load.n_spikes + load.row_bytes * n_examples,
            remedies=("lower max_cluster_subset (fewer landmarks)", "sort a part with tmin and tmax"),
            work=clustering_work(load, load.n_spikes),
        )


class Clusters:
    """The clusters of all regions, numbered across regions; their spikes stay on disk.

    Attributes
    ----------
    receipt_and_number : ndarray of int64, shape (cluster, 2)
        For each cluster, the index of its region's receipt, and its number within the region.
    n_spikes : ndarray of int64, shape (cluster,)
    first : ndarray of int64, shape (cluster,)
        Total number of spikes of the previous clusters.
    """

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = receipts
        counts = [np.diff(receipt.start) for receipt in receipts]
        self.receipt_and_number = np.array(
            [(i, k) for i, count in enumerate(counts) for k in range(len(count))], np.int64
        )
        self.receipt_and_number = self.receipt_and_number.reshape(-1, 2)
        self.n_spikes = np.concatenate([np.zeros(0, np.int64), *counts])
        self.first = np.cumsum(self.n_spikes) - self.n_spikes

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Sorted spike times of a cluster."""
        return self.column(number, "sample")

    def column(self, number: int, name: str) -> NDArray[Any]:
        """One column of the spikes of a cluster."""
        receipt, in_region = self.receipt_and_number[number].tolist()
        return read_region([self.receipts[receipt]], name, in_region)


def thinned(label: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Indices of at most so many rows of each label, evenly, sorted by label.

    >>> thinned(np.array([1, 0, 1, 1, 1, 0]), 2).tolist()
    [1, 5, 0, 3]
    """
    order = np.argsort(label, kind="stable")
    count = np.bincount(label)
    ends = np.cumsum(count)
    parts = [order[end - n : end : max(1, -(-n // most))] for end, n in zip(ends.tolist(), count.tolist(), strict=True)]
    return np.concatenate([order[:0], *parts])


class Examples:
    """Some spikes of each cluster with their features, on disk, by which clusters are compared."""

    def __init__(
        self,
        clusters: Clusters,
        receipts: Sequence[Receipt],
        template_channels: NDArray[np.int64],
        components: torch.Tensor,
        sampling_rate_hz: float,
    ) -> None:
        self._clusters, self._receipts, self._channels = clusters, receipts, template_channels
        self._components, self._rate = components, sampling_rate_hz
        self._known = lru_cache(maxsize=HELD_CLUSTERS)(self._read)

    def are_two(self, unit: merging.GrowingUnit, other: merging.GrowingUnit, lag: int) -> bool:
        """Whether two units are two neurons, with the spikes and waveforms of the other moved earlier by `lag`."""
        sides = [self._of(unit.lags), self._of({number: before + lag for number, before in other.lags.items()})]
        channels = self._common_channels(sides)
        if not channels:
            return True
        trains = [unit.train(), other.train() - lag]
        counts = splits.firsts([side["sample"] for side in sides], trains, self._rate)
        groups = (self._group(channels, side, count) for side, count in zip(sides, counts, strict=True))
        lags = {*unit.lags.values(), *(before + lag for before in other.lags.values())} - {0}
        return splits.are_two(
            *groups,
            time_derivative=templates.time_derivative(self._components),
            rolled=[self._there_and_back(lag) for lag in sorted(lags)],
            max_limit=splits.MAX_LIMIT,
        )

    def line_up(self, unit: merging.GrowingUnit, other: merging.GrowingUnit, lag: int) -> int:
        """The lag by which the other unit lines up best where both were recorded, near that of their templates."""
        sides = [self._of(unit.lags), self._of(other.lags)]
        channels = self._common_channels(sides)
        if not channels:
            return lag
        a, b = (self._group(channels, side, np.ones(len(side["sample"]), bool)) for side in sides)
        near = sorted(range(-LAGS_BESIDE, LAGS_BESIDE + 1), key=abs)
        rolls = {lag + step: templates.roll_matrix(self._components, lag + step).double() for step in near}
        return splits.lag_between(a, b, rolls)

    def isolation(self, units: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Smallest isolation of each unit from any other near it (u,), given the lags of their clusters.

        1 if there is none near it; NaN for units with few spikes, which others are not compared with.
        """
        n_spikes = np.array([self._clusters.n_spikes[list(lags)].sum() for lags in units], np.int64)
        compared = n_spikes >= MIN_ISOLATION_SPIKES
        found = np.where(compared, 1.0, np.nan)
        has = np.zeros((len(units), int(self._channels.max(initial=0)) + 1), np.float32)
        for unit in np.flatnonzero(compared).tolist():
            has[unit, list(self._shared_channels(self._of(units[unit])["template"]))] = 1.0
        common, size = has @ has.T, has.sum(axis=1)
        is_near = (common > 0) & (common >= ISOLATION_CHANNELS * size[:, None])  # [a, b]: b has enough channels of a
        for unit, other in np.argwhere(np.triu(is_near | is_near.T, 1)).tolist():
            channels = np.flatnonzero(has[unit] * has[other]).tolist()
            features = [self._on(channels, self._of(units[of])) for of in (unit, other)]
            n = min(ISOLATION_EXAMPLES, *map(len, features))
            value = metrics.isolation(*(rows[torch.arange(n) * len(rows) // n] for rows in features))
            for one, another in ((unit, other), (other, unit)):
                if is_near[one, another]:
                    found[one] = min(found[one], value)
        return found

    def _common_channels(self, sides: Sequence[Mapping[str, NDArray[Any]]]) -> list[int]:
        """Channels on which two units are compared; none if they have too few in common."""
        channels_of = [self._shared_channels(side["template"]) for side in sides]
        channels = sorted(set.intersection(*channels_of))
        return channels if len(channels) >= max(1, min(MIN_COMMON_CHANNELS, *map(len, channels_of))) else []

    def _group(self, channels: list[int], side: Mapping[str, NDArray[Any]], counts: NDArray[np.bool_]) -> splits.Group:
        """Examples of a unit, to be compared on some channels."""
        return splits.Group(self._on(channels, side), splits.Conditions.of_columns(side, self._rate), counts)

    def _there_and_back(self, lag: int) -> torch.Tensor:
        """Rolls features (…, q) by −lag, then by the lag: (q, q), float64."""
        there, back = (templates.roll_matrix(self._components, sign * lag).double() for sign in (-1, 1))
        return there @ back

    def _read(self, number: int) -> dict[str, NDArray[Any]]:
        """Columns of some spikes of one cluster."""
        receipt, in_region = self._clusters.receipt_and_number[number].tolist()
        names = self._receipts[receipt].kind
        return {name: read_region([self._receipts[receipt]], name, in_region) for name in names}

    def _of(self, lags: Mapping[int, int]) -> dict[str, NDArray[Any]]:
        """Columns of some spikes of several clusters, of which each is moved earlier by its lag."""
        parts = []
        for number, lag in lags.items():
            part = dict(self._known(number))
            if lag:
                part["sample"] = part["sample"] - lag
                part["features"] = part["features"] @ templates.roll_matrix(self._components, lag).numpy()
            parts.append(part)
        step = -(-sum(len(part["sample"]) for part in parts) // EXAMPLES)
        return {name: np.concatenate([part[name] for part in parts])[::step] for name in parts[0]}

    def _shared_channels(self, template: NDArray[np.int32]) -> set[int]:
        channel, count = np.unique(self._channels[template], return_counts=True)
        return set(channel[(count >= SHARED_FROM * len(template)) & (channel >= 0)].tolist())

    def _on(self, channels: list[int], side: Mapping[str, NDArray[Any]]) -> torch.Tensor:
        """Features of spikes on some channels, 0 where a spike has none: (n, d), float64."""
        n_channels = int(self._channels.max()) + 1
        union = np.array(channels, np.int64)
        rows = scattered_rows(side["features"], side["template"], self._channels, union, n_channels, "cpu")
        return rows.chunk(0, rows.n).double()


class Units(NamedTuple):
    """The units of a sorting; their spikes are those of their clusters."""

    clusters: Clusters
    unit_of: NDArray[np.int64]  # (cluster,) unit of each cluster, −1 for those that are not neurons
    lag_of: NDArray[np.int64]  # (cluster,) lag by which its waveforms are rolled, and its spikes are earlier
    kept: NDArray[np.bool_]  # (n,) for the spikes of one cluster after another: False for duplicates
    features: NDArray[np.float32]  # (u, c, q), noise s.d.
    refractory: NDArray[np.bool_]  # (u,)
    contamination: NDArray[np.float64]  # (u,)
    similarity: NDArray[np.float32]  # (u, u)
    isolation: NDArray[np.float64]  # (u,)
    left_out: dict[str, tuple[int, int]]  # numbers of merged clusters that are no units, and of their spikes, by reason


@dataclass(frozen=True, eq=False)
class Merge(Step[Units]):
    """Merge clusters of the same neuron, drop what is not a neuron, find duplicates, and label the units."""

    name = "merging"
    reads = ("n_pcs", "acg_threshold", "ccg_threshold", "duplicate_spike_ms")

    regions: list[RegionClusters]
    template_channels: NDArray[np.int64]  # (v, j) channels of the features of each template's spikes
    waveforms: Waveforms
    probe: Probe
    sampling_rate_hz: float
    min_spikes: int

    def run(self, run: Run) -> Units:
        """Process one cluster after another, with their spikes on this machine's disk."""
        settings, rate = self.settings, self.sampling_rate_hz
        clusters = Clusters([localize(region.receipt, run.scratch) for region in self.regions])
        empty = np.zeros((0, self.probe.n_channels, settings.n_pcs), np.float32)
        features = torch.from_numpy(np.concatenate([empty, *(region.features for region in self.regions)]))
        components = torch.from_numpy(self.waveforms.components)
        threshold = np.concatenate([np.zeros(0), *(region.threshold for region in self.regions)])
        similarity = templates.similarity(features, components)
        examples = Examples(
            clusters,
            [localize(region.examples, run.scratch) for region in self.regions],
            self.template_channels,
            components,
            rate,
        )
        merged = merging.merge_clusters(
            clusters,
            clusters.n_spikes,
            features,
            components,
            similarity=similarity.value.numpy(),
            lag=similarity.lag.numpy(),
            similarity_row=lambda template, others: templates.similarity_to(template, others, components),
            are_two=examples.are_two,
            line_up=examples.line_up,
            sampling_rate_hz=rate,
            acg_threshold=settings.acg_threshold,
            ccg_threshold=settings.ccg_threshold,
        )
        kept = scratch_array((int(clusters.n_spikes.sum()),), np.bool_, run.scratch)
        n_units = len(merged.features)
        stays, refractory, contamination = np.zeros(n_units, bool), np.zeros(n_units, bool), np.zeros(n_units)
        why = np.full(n_units, "", object)
        for unit in range(n_units):
            members = np.flatnonzero(merged.unit_of == unit)
            train, score, kept_of = _without_duplicates(
                clusters, members, merged.lag_of, min_samples=int(settings.duplicate_spike_ms * rate / 1000)
            )
            for member, flags in zip(members, kept_of, strict=True):
                kept[clusters.first[member] : clusters.first[member] + len(flags)] = flags
            limit = float(np.average(threshold[members], weights=clusters.n_spikes[members]))
            why[unit] = why_no_neuron(train, score, limit, self.min_spikes, impossible_samples=rate / 1000)
            stays[unit] = not why[unit]
            if stays[unit]:
                refractory[unit], contamination[unit] = labels(train, rate, settings.acg_threshold)
        ghosts = self._ghosts(clusters, merged, stays)
        why[ghosts] = GHOST
        stays &= ~ghosts
        n_spikes = np.bincount(merged.unit_of, clusters.n_spikes, n_units)
        number = np.where(stays, np.cumsum(stays) - 1, -1)
        features = merged.features[torch.from_numpy(stays)]
        return Units(
            clusters=clusters,
            unit_of=number[merged.unit_of],
            lag_of=merged.lag_of,
            kept=kept,
            features=features.numpy(),
            refractory=refractory[stays],
            contamination=contamination[stays],
            similarity=templates.similarity(features, components).value.numpy(),
            isolation=examples.isolation([merged.lags_of(unit) for unit in np.flatnonzero(stays).tolist()]),
            left_out={
                reason: (int(np.sum(why == reason)), int(n_spikes[why == reason].sum()))
                for reason in (FEW, NEAR_THRESHOLD, BURSTS, GHOST)
                if np.any(why == reason)
            },
        )

    def _ghosts(self, clusters: Clusters, merged: merging.MergedUnits, stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which units are what matching left of a larger unit's waveform."""
        energy = merged.features.square().sum(dim=2).numpy()
        size, position = energy.sum(axis=1), self.probe.positions_um[energy.argmax(axis=1)]
        n_spikes = np.bincount(merged.unit_of, clusters.n_spikes, len(stays))
        ghosts = np.zeros(len(stays), bool)
        units = np.flatnonzero(stays)
        for unit in units[np.argsort(size[units], kind="stable")].tolist():
            near = np.hypot(*(position[units] - position[unit]).T) <= GHOST_REACH_UM
            near |= (size[units] > HUGE**2) & (size[unit] < FAR_GHOST**2 * size[units])
            train = merging.joined_train(clusters, merged.lags_of(unit))
            enough = 2 * n_spikes[units] >= merging.GHOST_SHARE * len(train)  # others cannot coincide with half of it
            for other in units[near & enough & (size[units] > size[unit])].tolist():
                share = merging.coincident_share(
                    train, merging.joined_train(clusters, merged.lags_of(other)), self.sampling_rate_hz
                )
                if share >= merging.GHOST_SHARE:
                    ghosts[unit] = True
                    logger.info(
                        "A unit of %d spikes at %.0f, %.0f µm is left out: %.0f %% of its spikes coincide with those "
                        "of a larger one at %.0f, %.0f µm",
                        len(train),
                        *position[unit],
                        100 * share,
                        *position[other],
                    )
                    break
        return ghosts

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """A flag for each spike, in memory or on disk, and examples of some clusters."""
        examples = HELD_CLUSTERS * EXAMPLES * load.row_bytes
        work = load.n_templates + load.n_spikes / SPIKES_PER_CLUSTER
        return Needs(cls.name, client_bytes=min(load.n_spikes, HELD_BYTES) + examples, work=work)


def _without_duplicates(
    clusters: Clusters, members: NDArray[np.int64], lag_of: NDArray[np.int64], *, min_samples: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], list[NDArray[np.bool_]]]:
    """Times, ascending, and scores of a unit's spikes without duplicates, and which of each member's these are."""
    before = [clusters[member] for member in members]
    sample = np.concatenate([times - lag_of[member] for member, times in zip(members, before, strict=True)])
    order = np.lexsort((np.concatenate(before), sample))  # the order of the final sorting
    alone = np.zeros(len(sample), bool)
    alone[order] = merging.mark_duplicates(sample[order], np.zeros(len(sample), np.int64), min_samples=min_samples)
    ends = np.cumsum([len(times) for times in before])[:-1]
    score = np.concatenate([clusters.column(member, "score") for member in members])
    stays = order[alone[order]]
    return sample[stays], score[stays], np.split(alone, ends)


def labels(sample: NDArray[np.int64], sampling_rate_hz: float, acg_threshold: float) -> tuple[bool, float]:
    """Whether a unit is refractory, and its contamination, by the times of its spikes without duplicates, ascending."""
    is_good = correlograms.is_refractory_unit(sample, sampling_rate_hz=sampling_rate_hz, acg_threshold=acg_threshold)
    return is_good, correlograms.refractoriness(sample, sampling_rate_hz=sampling_rate_hz).ratio


def why_no_neuron(
    sample: NDArray[np.int64],
    score: NDArray[np.float32],
    threshold: float,
    min_spikes: int,
    *,
    impossible_samples: float,
) -> str:
    """Why a unit cannot be a neuron, or "", by the times (n,), ascending, and scores (n,) of its spikes.

    A neuron has at least `min_spikes` spikes, a mean score well above the threshold, or scores that vary little around
    it, and at most half of its spikes within `impossible_samples` of the previous or the next one; units made of
    residues of artifacts have more.
    """
    if len(sample) < max(min_spikes, 1):
        return FEW
    close = np.diff(sample) < impossible_samples
    in_burst = np.append(close, False) | np.insert(close, 0, False)
    margin, spread = float(score.mean(dtype=np.float64)) - threshold, float(score.std(dtype=np.float64))
    if margin <= MIN_MARGIN and margin <= max(MIN_PEAKED_MARGIN, PEAKED * spread):
        return NEAR_THRESHOLD
    return BURSTS if 2 * in_burst.sum() > len(sample) else ""
