"""Graph clustering of the spikes of one region (section 6).

::

    principal components ─► landmarks and graph (graph.py) ─► seeds ─► sweeps ─► join what is one neuron
             ▲                                                            (agglomeration.py, splits.py)
             └──────────── each cluster again, until none is divided ◄───────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels import splits
from ks4stream.kernels.agglomeration import agglomerate, links_between
from ks4stream.kernels.correlograms import is_refractory_pair
from ks4stream.kernels.graph import CHUNK, ChannelRows, ScatteredRows, SpikeGraph, choose_landmarks, join_to_landmarks
from ks4stream.kernels.splits import Conditions
from ks4stream.kernels.templates import time_derivative

__all__ = ["ChannelRows", "Conditions", "ScatteredRows", "cluster_region"]

N_COMPONENTS, N_LOCAL_COMPONENTS = 12, 8
"""Principal components in which a region, and each cluster that is divided further, is clustered."""

COMPONENT_SPIKES = 20_000  # maximum number of spikes from which they are computed
COMPARED_SPIKES = 1000  # maximum number of spikes of a cluster when two are compared
SIMILARITY_SPIKES = 500  # maximum number of spikes of which a cluster's mean is taken, to find similar clusters
APART_RANGE_UM, APART_BELOW = 4.0, 0.5
"""Clusters without links are compared only if the displacements at which they were seen have less than this share in
common, in ranges of so many µm: at the same displacement, links would show that they are one neuron."""
N_SEEDS = 200  # maximum number of clusters the sweeps start with (step 3)
SPIKES_PER_SEED, MIN_SEEDS = 20, 10
"""With few spikes, fewer seeds give the same result in less time: splits can hardly be recognised in clusters of fewer
than 20 spikes."""

N_CANDIDATES = 100  # each seed is the best of this many points (step 3)
SEEDS_PER_CHUNK = 16  # random numbers are drawn for this many, then it is tested whether more are needed
MAX_SWEEPS = 200  # step 4
RESOLUTION = 1.0  # λ of step 4
LANDMARK_NULL = 5 / 10  # weight of the expected links in the landmark step (step 4); five times the published one
SPIKE_NULL = 5 / 200  # the same in the spike step

MIN_LANDMARKS = 500
"""Minimum number of landmarks. If one in 20 of a few hundred spikes were a landmark, a quiet unit might have none.
Beyond the published method."""

MIN_SPIKES = 50
"""Regions with fewer spikes are one cluster. The published 1000 is more than most regions of a short recording have."""


def seed_labels(points: Tensor, *, seed: int, n_seeds: int) -> Tensor:
    """Initialise a clustering: choose as seeds, one after the other, the points that explain the most energy.

    Each seed c is the best of :data:`N_CANDIDATES` points, which are drawn with probability proportional to what
    previous seeds do not explain of their energy. The seed explains 2x·c − ‖c‖² of the energy of a point x, and the
    point is assigned to it if that is more than its current seed explains.

    Parameters
    ----------
    points : Tensor, shape (m, d), float32
        Landmarks.
    seed : int
        Seed of the random draws, which are always made on the CPU (``cluster_init_seed``).
    n_seeds : int

    Returns
    -------
    Tensor, shape (m,), int64
        Seed number of each point; some may be unused.
    """
    generator = torch.Generator().manual_seed(seed)
    m = points.shape[0]
    energy = (points * points).sum(1)
    explained = torch.zeros_like(energy)
    label = torch.zeros(m, dtype=torch.int64, device=points.device)
    for first in range(0, n_seeds, SEEDS_PER_CHUNK):
        noise = torch.empty(min(SEEDS_PER_CHUNK, n_seeds - first), m, dtype=torch.float64)
        for clocks in noise:  # row by row, so that the numbers do not depend on how many rows are drawn together
            clocks.exponential_(generator=generator)
        before = explained.clone()
        for number, clocks in enumerate(noise.to(points.device), first):
            candidate = _draw(energy - explained, clocks, min(N_CANDIDATES, m))
            gain = 2.0 * (points[candidate] @ points.T) - energy[candidate, None] - explained  # (candidates, m)
            gain.clamp_(min=0.0)
            gain = gain.index_select(0, gain.sum(1).argmax(0, keepdim=True))[0]
            label.masked_fill_(gain > 0, number)
            explained += gain
        if torch.equal(before, explained):
            break  # further seeds explain nothing
    return label


def _draw(weight: Tensor, clocks: Tensor, n: int) -> Tensor:
    """Draw n indices without replacement with probability ∝ weight (where it is positive), ascending.

    These are the first n of independent exponential `clocks` of rate 1, sped up by the weights.
    """
    return torch.topk(weight.clamp(min=0.0) / clocks, n).indices.sort().values


def landmark_step(graph: SpikeGraph, spike_label: Tensor, n_labels: int, *, resolution: float) -> Tensor:
    """Give each landmark the label with the most links beyond expectation among the spikes linked to it.

    The score of label c is (links of j to spikes in c) − λ/2 · kⱼ/m · Σ kᵢ over spikes in c (step 4).

    Returns
    -------
    Tensor, shape (m,), int64
        Ties go to the lowest label.
    """
    counts = torch.zeros(graph.n_landmarks * n_labels, dtype=torch.int64, device=spike_label.device)
    for start in range(0, graph.n_spikes, CHUNK):
        part = slice(start, start + CHUNK)
        pair = graph.neighbor[part].long() * n_labels + spike_label[part, None]
        counts += torch.bincount(pair.flatten(), minlength=counts.shape[0])
    mass = _sum_by_label(graph.spike_degree, spike_label, n_labels)
    factor = LANDMARK_NULL * resolution / max(graph.n_links, 1)
    score = counts.view(graph.n_landmarks, n_labels).double()
    score -= (factor * graph.landmark_degree.double())[:, None] * mass
    return torch.argmax(score, dim=1)


def spike_step(graph: SpikeGraph, landmark_label: Tensor, n_labels: int, *, resolution: float) -> Tensor:
    """Give each spike the label with the most links beyond expectation among its landmarks.

    The score of label c is (landmarks of i in c) − λ/40 · kᵢ/m · Σ kⱼ over landmarks in c (step 4). Only
    the labels of the spike's landmarks are compared: with λ < 4 each of them scores above 0.

    Returns
    -------
    Tensor, shape (n,), int64
        Ties go to the lowest label.
    """
    mass = _sum_by_label(graph.landmark_degree, landmark_label, n_labels)
    expected = (SPIKE_NULL * resolution / max(graph.n_links, 1) * mass)[landmark_label]  # per link of a spike: (m,)
    landmark_label = landmark_label.float()  # exact, and reduced by vector instructions
    label = torch.empty(graph.n_spikes, dtype=torch.int64, device=landmark_label.device)
    for start in range(0, graph.n_spikes, CHUNK):
        part = slice(start, start + CHUNK)
        landmark = graph.neighbor[part].T.contiguous().long()  # (10, n)
        near = landmark_label.index_select(0, landmark.flatten()).view_as(landmark)
        loss = expected.index_select(0, landmark.flatten()).view_as(landmark) * graph.spike_degree[part]
        loss -= _times_in_column(near)
        near.masked_fill_(loss > loss.amin(0), n_labels)
        label[part] = near.amin(0).long()
    return label


def _times_in_column(values: Tensor) -> Tensor:
    """Count how often each value occurs in its column; shape (10, n) to (10, n), float32."""
    count, same = torch.zeros_like(values), torch.empty_like(values)
    for row in values:
        count += torch.eq(values, row, out=same)
    return count


def _sum_by_label(values: Tensor, label: Tensor, n_labels: int) -> Tensor:
    """Sum integers by label; shape (n_labels,), float64, exact on every device."""
    total = torch.zeros(n_labels, dtype=torch.int64, device=label.device)
    return total.scatter_add_(0, label, values.long()).double()


def sweep(graph: SpikeGraph, landmark_label: Tensor, n_labels: int) -> tuple[Tensor, Tensor]:
    """Update the labels of spikes and landmarks in turn until none changes (step 4).

    Parameters
    ----------
    graph : SpikeGraph
    landmark_label : Tensor, shape (m,), int64
        Initial labels.
    n_labels : int

    Returns
    -------
    spike_label : Tensor, shape (n,), int64
        Labels from 0, each of them used.
    landmark_label : Tensor, shape (m,), int64
    """
    spike_label = spike_step(graph, landmark_label, n_labels, resolution=RESOLUTION)
    for _ in range(MAX_SWEEPS):
        landmark_label = landmark_step(graph, spike_label, n_labels, resolution=RESOLUTION)
        before, spike_label = spike_label, spike_step(graph, landmark_label, n_labels, resolution=RESOLUTION)
        if torch.equal(before, spike_label):
            break
    used, spike_label = torch.unique(linked_parts(graph, spike_label, landmark_label), return_inverse=True)
    return spike_label, landmark_step(graph, spike_label, len(used), resolution=RESOLUTION)


def linked_parts(graph: SpikeGraph, spike_label: Tensor, landmark_label: Tensor) -> Tensor:
    """Divide each label into the parts that links within it connect.

    Seeds give one label to all points that they explain, which may be of several neurons without links between them.
    Sweeps cannot change that.

    Returns
    -------
    Tensor, shape (n,), int64
        Number of the part of each spike: its lowest landmark, or m + label without a landmark of its label.
    """
    m = graph.n_landmarks
    part_of = torch.arange(m, device=spike_label.device)  # of each landmark
    of_spike = torch.empty_like(spike_label)
    while True:
        before = part_of.clone()
        for start in range(0, graph.n_spikes, CHUNK):
            chunk = slice(start, start + CHUNK)
            near = graph.neighbor[chunk].long()  # (n, 10)
            outside = landmark_label[near] != spike_label[chunk, None]
            lowest = part_of[near].masked_fill(outside, m).amin(1)
            of_spike[chunk] = torch.where(lowest < m, lowest, m + spike_label[chunk])
            value = lowest[:, None].expand_as(near).masked_fill(outside, m)
            part_of.scatter_reduce_(0, near.flatten(), value.flatten(), "amin")
        part_of = part_of[part_of]
        if torch.equal(before, part_of):
            return of_spike


def cluster_region(
    rows: ChannelRows,
    conditions: Conditions,
    *,
    n_neighbors: int,
    downsampling: int,
    max_landmarks: int,
    seed: int,
    ccg_threshold: float,
    final: bool = False,
    components: Tensor | None = None,
    min_spikes: int = MIN_SPIKES,
    min_landmarks: int = MIN_LANDMARKS,
) -> NDArray[np.int64]:
    """Cluster the spikes of one region, then the spikes of each cluster, until none is divided.

    In the end, clusters that are one neuron are joined once more, as parts of it may have come from different clusters.

    Parameters
    ----------
    rows : ChannelRows, (n, d)
        Features of the region's spikes, in order of time.
    conditions : Conditions
        Of the same spikes.
    n_neighbors, downsampling, max_landmarks, seed, ccg_threshold
        ``cluster_neighbors``, ``cluster_downsampling``, ``max_cluster_subset``, ``cluster_init_seed`` and
        ``ccg_threshold`` of the settings.
    final : bool
        Whether clusters with a refractory cross-correlogram are kept together (step 6a).
    components : Tensor, shape (q, w), float32, optional
        wPCA. With them, clusters are not told apart by when within a sample their spikes are.
    min_spikes : int
        Fewer spikes are one cluster (section 6).
    min_landmarks : int
        Minimum number of landmarks, if there are as many spikes.

    Returns
    -------
    ndarray, shape (n,), int64
        Labels from 0, each of them used.
    """
    derivative = None if components is None else time_derivative(components).cpu()

    whole: SpikeGraph | None = None  # of all spikes

    def joined(spikes: Tensor, graph: SpikeGraph, spike_label: Tensor, landmark_label: Tensor) -> Tensor:
        """Labels of some spikes (k,) after joining what is one neuron, numbered from 0: (k,)."""
        n_labels = int(spike_label.max()) + 1
        by_label = spikes[torch.sort(spike_label, stable=True).indices]
        members = torch.split(by_label, torch.bincount(spike_label, minlength=n_labels).tolist())
        compare = _Comparison(rows, conditions, members, ccg_threshold if final else None, derivative)
        links = links_between(graph, spike_label, landmark_label, n_labels)
        groups = agglomerate(links, compare.are_two, similar=compare.similar() if compare.moves else None)
        return torch.from_numpy(groups).to(rows.device)[spike_label]

    def divide(spikes: Tensor, n_components: int) -> Tensor:
        """Cluster of each of some spikes (k,), numbered from 0: (k,)."""
        nonlocal whole
        if len(spikes) < max(min_spikes, 2):
            return torch.zeros_like(spikes)
        points = PrincipalRows(rows, spikes, n_components)
        landmark = choose_landmarks(
            points.n, downsampling=downsampling, min_landmarks=min_landmarks, max_landmarks=max_landmarks
        )
        graph = join_to_landmarks(points, landmark, n_neighbors=n_neighbors)
        whole = graph if whole is None else whole
        n_seeds = min(N_SEEDS, max(MIN_SEEDS, points.n // SPIKES_PER_SEED))
        start = seed_labels(points.take(graph.landmark), seed=seed, n_seeds=n_seeds)
        spike_label, landmark_label = sweep(graph, start, n_seeds)
        return joined(spikes, graph, spike_label, landmark_label)

    label = np.zeros(rows.n, np.int64)
    waiting, n_found = [(torch.arange(rows.n, device=rows.device), N_COMPONENTS)], 0
    while waiting:
        spikes, n_components = waiting.pop()
        part = divide(spikes, n_components)
        n_parts = int(part.max()) + 1 if len(part) else 0
        if n_parts > 1:
            waiting += [(spikes[part == number], N_LOCAL_COMPONENTS) for number in reversed(range(n_parts))]
        else:
            label[spikes.cpu().numpy()] = n_found
            n_found += 1
    if whole is not None and n_found > 1:  # parts of a neuron may have been found in different clusters
        found = torch.from_numpy(label).to(rows.device)
        found = joined(torch.arange(rows.n, device=rows.device), whole, found, found[whole.landmark])
        label = found.cpu().numpy()
    return label


class PrincipalRows:
    """Some spikes in their principal components, in memory: (n, d), where d is the number of components.

    With fewer dimensions, distances have less noise. Two neurons with similar waveforms may differ in none of the
    region's components, but they do in those of a cluster that has little else.

    Parameters
    ----------
    rows : ChannelRows
    spikes : Tensor, shape (n,), int64
        Rows that are represented.
    n_components : int
        All, if the rows have fewer features.
    """

    def __init__(self, rows: ChannelRows, spikes: Tensor, n_components: int) -> None:
        self.n, self.d, self.device = len(spikes), min(n_components, rows.d), rows.device
        sample = rows.take(spikes[:: -(-self.n // COMPONENT_SPIKES)]).double()
        mean = sample.mean(0)
        sample -= mean
        _, axes = torch.linalg.eigh(sample.T @ sample)  # eigenvalues ascend
        axes = axes[:, -self.d :].float()
        self._points = torch.cat([(rows.take(chunk) - mean.float()) @ axes for chunk in torch.split(spikes, CHUNK)])

    def chunk(self, start: int, stop: int) -> Tensor:
        """Rows ``start … stop−1``."""
        return self._points[start:stop]

    def take(self, index: Tensor) -> Tensor:
        """Rows at `index`."""
        return self._points[index]


class _Comparison:
    """Compares clusters of spikes: the `members` of each, in order of time."""

    def __init__(
        self,
        rows: ChannelRows,
        conditions: Conditions,
        members: Sequence[Tensor],
        ccg_threshold: float | None,
        derivative: Tensor | None,
    ) -> None:
        self._rows, self._conditions, self._members = rows, conditions, members
        self._ccg_threshold, self._derivative = ccg_threshold, derivative
        known_um = conditions.displacement_um[~np.isnan(conditions.displacement_um)]
        self.moves = bool(len(known_um) and np.ptp(known_um) > 0)

    def are_two(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> bool:
        """Whether two groups of clusters are two neurons (step 6)."""
        spikes = [torch.cat([self._members[number] for number in side]).sort().values for side in (left, right)]
        trains = [self._conditions.sample[side.cpu().numpy()] for side in spikes]
        rate = self._conditions.sampling_rate_hz
        if self._ccg_threshold is not None and is_refractory_pair(
            *trains, sampling_rate_hz=rate, ccg_threshold=self._ccg_threshold
        ):
            return False
        compared = [_thinned(side, COMPARED_SPIKES) for side in spikes]
        columns = self._rows.shared_columns(compared)
        where = [side.cpu().numpy() for side in compared]
        counts = splits.firsts([self._conditions.sample[side] for side in where], trains, rate)
        groups = [
            splits.Group(self._rows.take(side)[:, columns].cpu().double(), self._conditions.at(index), count)
            for side, index, count in zip(compared, where, counts, strict=True)
        ]
        return splits.are_two(*groups, time_derivative=self._derivative)

    def similar(self) -> NDArray[np.bool_]:
        """Which pairs of clusters have similar means, on the channels that both have, and take turns; shape (C, C)."""
        mean = torch.zeros(len(self._members), self._rows.d, dtype=torch.float64, device=self._rows.device)
        present = torch.zeros_like(mean)
        for number, members in enumerate(self._members):
            spikes = _thinned(members, SIMILARITY_SPIKES)
            columns = self._rows.shared_columns([spikes])
            mean[number, columns] = self._rows.take(spikes)[:, columns].double().mean(0)
            present[number, columns] = 1.0
        energy = (mean * mean) @ present.T  # of each row, on the channels of each column
        cosine = mean @ mean.T / (energy * energy.T).sqrt().clamp_min(1e-30)
        alike: NDArray[np.bool_] = (cosine > splits.MIN_SIMILARITY).cpu().numpy()
        return alike & (self._common_displacement() < APART_BELOW)

    def _common_displacement(self) -> NDArray[np.float64]:
        """Share of the spikes of two clusters that the tissue's displacement has in common; shape (C, C)."""
        moved_um = self._conditions.displacement_um
        known = ~np.isnan(moved_um)
        range_of = np.zeros(len(moved_um), np.int64)
        range_of[known] = (moved_um[known] - moved_um[known].min()) / APART_RANGE_UM
        n_ranges = int(range_of.max()) + 1
        members = [of[known[of]] for of in (side.cpu().numpy() for side in self._members)]
        counts = np.stack([np.bincount(range_of[of], minlength=n_ranges) for of in members])
        share = counts / counts.sum(axis=1, keepdims=True).clip(1)
        common = np.zeros((len(share), len(share)))
        for column in share.T:
            common += np.minimum.outer(column, column)
        return common


def _thinned(spikes: Tensor, most: int) -> Tensor:
    """At most so many of the spikes, evenly."""
    return spikes[:: -(-len(spikes) // most)]
