"""Graph clustering of the spikes of one region (section 6).

::

    landmarks ─► graph (graph.py) ─► seeds on landmarks ─► sweeps ─► tree of clusters (tree.py) ─► labels
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels.correlograms import is_refractory_pair
from ks4stream.kernels.graph import CHUNK, FeatureRows, ScatteredRows, SpikeGraph, choose_landmarks, join_to_landmarks
from ks4stream.kernels.tree import APART_BELOW, BIMODAL_FROM, flatten, leaf_sums, links_between, merge_tree, split_score

__all__ = ["FeatureRows", "ScatteredRows", "cluster_region"]

N_SEEDS = 200  # maximum number of clusters the sweeps start with (step 3)
SPIKES_PER_SEED, MIN_SEEDS = 20, 10
"""With few spikes, fewer seeds give the same result in less time: splits can hardly be recognised in clusters of fewer
than 20 spikes."""

N_CANDIDATES = 100  # each seed is the best of this many points (step 3)
SEEDS_PER_CHUNK = 16  # random numbers are drawn for this many, then it is tested whether more are needed
MAX_SWEEPS = 200  # step 4
RESOLUTION = 1.0  # λ of step 4
LANDMARK_NULL = 1 / 10  # weight of the expected links in the landmark step (step 4)
SPIKE_NULL = 1 / 200  # the same in the spike step

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

    The score of label c is (links of j to spikes in c) − λ/10 · kⱼ/m · Σ kᵢ over spikes in c (step 4).

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

    The score of label c is (landmarks of i in c) − λ/200 · kᵢ/m · Σ kⱼ over landmarks in c (step 4). Only
    the labels of the spike's landmarks are compared: with λ < 20 each of them scores above 0.

    Returns
    -------
    Tensor, shape (n,), int64
        Ties go to the lowest label.
    """
    mass = _sum_by_label(graph.landmark_degree, landmark_label, n_labels)
    penalty = SPIKE_NULL * resolution / max(graph.n_links, 1) * mass
    label = torch.empty(graph.n_spikes, dtype=torch.int64, device=landmark_label.device)
    for start in range(0, graph.n_spikes, CHUNK):
        part = slice(start, start + CHUNK)
        near = landmark_label[graph.neighbor[part].long()]  # (n, 10)
        score = _times_in_row(near).double() - graph.spike_degree[part, None].double() * penalty[near]
        best = score == score.amax(1, keepdim=True)
        label[part] = torch.where(best, near, n_labels).amin(1)
    return label


def _times_in_row(values: Tensor) -> Tensor:
    """Count how often each value occurs in its row; shape (n, 10) to (n, 10)."""
    if values.device.type != "cpu":
        return (values[:, :, None] == values[:, None]).sum(2)
    count = torch.zeros(values.shape, dtype=torch.int16)
    for column in range(values.shape[1]):  # touches less memory
        count += values == values[:, column : column + 1]
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
    used, spike_label = torch.unique(spike_label, return_inverse=True)
    return spike_label, landmark_step(graph, spike_label, len(used), resolution=RESOLUTION)


def cluster_region(
    rows: FeatureRows,
    *,
    n_neighbors: int,
    downsampling: int,
    max_landmarks: int,
    seed: int,
    ccg_threshold: float,
    sample: NDArray[np.int64] | None = None,
    sampling_rate_hz: float | None = None,
    final: bool = False,
    min_spikes: int = MIN_SPIKES,
    min_landmarks: int = MIN_LANDMARKS,
) -> NDArray[np.int64]:
    """Cluster the spikes of one region.

    Parameters
    ----------
    rows : FeatureRows, (n, d)
        Features of the region's spikes, in order of time.
    n_neighbors, downsampling, max_landmarks, seed, ccg_threshold
        ``cluster_neighbors``, ``cluster_downsampling``, ``max_cluster_subset``, ``cluster_init_seed`` and
        ``ccg_threshold`` of the settings.
    sample : ndarray, shape (n,), int64, samples
        Spike times; required if `final`.
    sampling_rate_hz : float
        Required if `final`.
    final : bool
        Whether clusters with a refractory cross-correlogram are kept together (step 6b).
    min_spikes : int
        Fewer spikes are one cluster (section 6).
    min_landmarks : int
        Minimum number of landmarks, if there are as many spikes.

    Returns
    -------
    ndarray, shape (n,), int64
        Labels from 0, each of them used.
    """
    if rows.n < max(min_spikes, 2):
        return np.zeros(rows.n, np.int64)
    if final and (sample is None or sampling_rate_hz is None):
        raise ValueError("The final clustering requires spike times: pass `sample` and `sampling_rate_hz`.")
    landmark = choose_landmarks(
        rows.n, downsampling=downsampling, min_landmarks=min_landmarks, max_landmarks=max_landmarks
    )
    graph = join_to_landmarks(rows, landmark, n_neighbors=n_neighbors)
    n_seeds = min(N_SEEDS, max(MIN_SEEDS, rows.n // SPIKES_PER_SEED))
    start = seed_labels(rows.take(graph.landmark), seed=seed, n_seeds=n_seeds)
    spike_label, landmark_label = sweep(graph, start, n_seeds)
    n_leaves = int(spike_label.max()) + 1
    tree = merge_tree(links_between(graph, spike_label, landmark_label, n_leaves))
    clusters = _Clusters(rows, spike_label, n_leaves)

    def stay_apart(left: NDArray[np.int64], right: NDArray[np.int64], ratio: float) -> bool:
        """Decide whether the children of a node stay apart (step 6): by links, refractoriness, bimodality."""
        if ratio < APART_BELOW:
            return True
        if final and sample is not None and sampling_rate_hz is not None:
            a, b = clusters.train(left, sample), clusters.train(right, sample)
            if is_refractory_pair(a, b, sampling_rate_hz=sampling_rate_hz, ccg_threshold=ccg_threshold):
                return False
        return clusters.split_score(left, right) >= BIMODAL_FROM

    cluster: NDArray[np.int64] = flatten(tree, stay_apart)[spike_label.cpu().numpy()]
    return cluster


class _Clusters:
    """The leaves of a tree: their spikes, and the sums for regressions between groups of leaves."""

    def __init__(self, rows: FeatureRows, label: Tensor, n_leaves: int) -> None:
        self._rows = rows
        by_leaf = torch.sort(label, stable=True).indices
        self._members = torch.split(by_leaf, torch.bincount(label, minlength=n_leaves).tolist())
        self._sums = leaf_sums(rows, label, n_leaves)

    def members(self, leaves: NDArray[np.int64]) -> Tensor:
        """Spikes of some leaves."""
        return torch.cat([self._members[leaf] for leaf in leaves])

    def train(self, leaves: NDArray[np.int64], sample: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sorted times of the spikes of some leaves."""
        return np.sort(sample[self.members(leaves).cpu().numpy()])

    def split_score(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> float:
        """How clearly two groups of leaves are separate clusters."""
        return split_score(self._rows, self._sums, (left, right), (self.members(left), self.members(right)))
