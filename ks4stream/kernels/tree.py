"""The tree of clusters: which pairs are linked most strongly, and which splits are real (section 6, steps 5 and 6).

The leaves are the clusters of the sweeps. Repeatedly merging the most strongly linked pair gives a binary tree; from
its root down, the two children of each node are kept apart or merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels.graph import CHUNK, FeatureRows, SpikeGraph

APART_BELOW = 0.2  # children with a smaller ratio of links are kept apart without further tests (step 6a)
BIMODAL_FROM = 0.6  # minimum score of a bimodal histogram (step 6c)
EXPECTED_FLOOR = 0.001  # added to expected links (step 5)
RIDGE = 0.01  # of the regression, per weighted mean square (step 6c)
N_BINS = 399  # of the projection, on [−2, 2]
SPAN = 2.0
MIDDLE_BINS = 50  # in which the trough is searched for
SMOOTHING_BINS = 4.0  # minimum σ of the smoothing
BANDWIDTH = 0.9
"""Silverman's factor: σ is at least 0.9 · s.d. · n^(−1/5). Four bins suit thousands of spikes; with fewer spikes, less
smoothing would leave random troughs. Beyond the published method."""

LEAVE_ONE_OUT_BELOW = 20
"""Spikes per feature below which overfitting would produce two peaks; a side with fewer is projected with
leave-one-out. Beyond the published method."""

HISTOGRAM_SPIKES = 200_000  # maximum per node (section 6, cost)


class MergeTree(NamedTuple):
    """A binary tree over leaves 0 … C−1; merge i makes node C + i.

    Attributes
    ----------
    left, right : ndarray, shape (C − 1,), int64
        Children of each merge.
    ratio : ndarray, shape (C − 1,), float64
        Links between the children relative to those expected.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    ratio: NDArray[np.float64]

    @property
    def n_leaves(self) -> int:
        """Number of leaves (C)."""
        return len(self.left) + 1

    def leaves_under(self) -> list[NDArray[np.int64]]:
        """Leaves under every node, ascending; list of 2·C − 1 arrays."""
        leaves = [np.array([leaf]) for leaf in range(self.n_leaves)]
        for a, b in zip(self.left, self.right, strict=True):
            leaves.append(np.sort(np.concatenate([leaves[a], leaves[b]])))
        return leaves


class LeafSums(NamedTuple):
    """Sums over the spikes of each leaf, for regressions; those of several leaves add up to those of their union.

    Attributes
    ----------
    spikes : Tensor, shape (C,), float64
    first : Tensor, shape (C, d), float64
        Σx, with 1 in place of the last feature.
    second : Tensor, shape (C, d, d), float64
        Σxxᵀ, likewise.
    """

    spikes: Tensor
    first: Tensor
    second: Tensor

    def of(self, leaves: NDArray[np.int64]) -> tuple[float, Tensor, Tensor]:
        """Sums over the union of some leaves."""
        index = torch.from_numpy(leaves).to(self.first.device)
        chosen = torch.zeros_like(self.spikes).index_fill_(0, index, 1.0)
        second = (chosen @ self.second.flatten(1)).view(self.second.shape[1:])  # without copying the chosen ones
        return float(self.spikes[index].sum()), chosen @ self.first, second


def links_between(graph: SpikeGraph, spike_label: Tensor, landmark_label: Tensor, n_labels: int) -> NDArray[np.int64]:
    """Count links from the spikes of each cluster to the landmarks of each cluster; shape (C, C), int64."""
    counts = torch.zeros(n_labels * n_labels, dtype=torch.int64, device=graph.neighbor.device)
    for start in range(0, graph.n_spikes, CHUNK):
        part = slice(start, start + CHUNK)
        to = landmark_label[graph.neighbor[part].long()]  # (n, 10)
        pair = spike_label[part, None] * n_labels + to
        counts += torch.bincount(pair[~graph.is_self[part]], minlength=n_labels * n_labels)
    return counts.view(n_labels, n_labels).cpu().numpy()


def merge_tree(links: NDArray[np.int64]) -> MergeTree:
    """Merge the pair of clusters with the highest ratio of links to expected links, until one cluster is left.

    Parameters
    ----------
    links : ndarray, shape (C, C), int64
        Links from spikes of one cluster to landmarks of another.

    Returns
    -------
    MergeTree
        A merged pair takes the row of its first member; of equal ratios, the first pair in row order is merged.
    """
    n = links.shape[0]
    observed = (links + links.T).astype(np.float64)
    expected = np.outer(links.sum(1), links.sum(0)) / max(float(links.sum()), 1.0)
    expected = expected + expected.T + EXPECTED_FLOOR
    ratio = np.triu(observed / expected, 1) + np.tril(np.full((n, n), -1.0))  # each pair once
    node, alive = np.arange(n), np.ones(n, dtype=bool)
    left, right, height = np.zeros(n - 1, np.int64), np.zeros(n - 1, np.int64), np.zeros(n - 1)
    for i in range(n - 1):
        a, b = divmod(int(np.argmax(ratio)), n)  # a < b
        left[i], right[i], height[i] = node[a], node[b], ratio[a, b]
        node[a], alive[b] = n + i, False
        ratio[b, :] = ratio[:, b] = -1.0
        for counts in (observed, expected):
            counts[a] += counts[b]
            counts[:, a] = counts[a]  # wrong at [a, a], which is never used
        others = np.flatnonzero(alive)
        others = others[others != a]
        ratio[np.minimum(a, others), np.maximum(a, others)] = observed[a, others] / expected[a, others]
    return MergeTree(left, right, height)


def flatten(
    tree: MergeTree, stay_apart: Callable[[NDArray[np.int64], NDArray[np.int64], float], bool]
) -> NDArray[np.int64]:
    """Decide for every node from the root down: two children that do not stay apart become one cluster.

    Parameters
    ----------
    tree : MergeTree
    stay_apart : callable
        Takes the leaves of both children and their ratio of links; returns whether to keep them apart.

    Returns
    -------
    ndarray, shape (C,), int64
        Cluster of each leaf, numbered from 0 in the order of their first leaves.
    """
    leaves = tree.leaves_under()
    first_leaf = np.zeros(tree.n_leaves, np.int64)
    pending = [len(leaves) - 1]
    while pending:
        node = pending.pop()
        merge = node - tree.n_leaves
        if merge >= 0:
            a, b = int(tree.left[merge]), int(tree.right[merge])
            if stay_apart(leaves[a], leaves[b], float(tree.ratio[merge])):
                pending += [a, b]
                continue
        first_leaf[leaves[node]] = leaves[node][0]
    return np.unique(first_leaf, return_inverse=True)[1].astype(np.int64)


def with_bias(x: Tensor) -> Tensor:
    """Replace the last feature by 1 (section 6, step 6c), in float64."""
    x = x.double()
    x[:, -1] = 1.0
    return x


def leaf_sums(rows: FeatureRows, label: Tensor, n_labels: int) -> LeafSums:
    """Accumulate count, Σx and Σxxᵀ of every leaf in one pass over the spikes.

    Parameters
    ----------
    rows : FeatureRows
    label : Tensor, shape (n,), int64
        Leaf of each spike.
    n_labels : int

    Returns
    -------
    LeafSums
    """
    count = torch.bincount(label, minlength=n_labels).double()
    first = torch.zeros((n_labels, rows.d), dtype=torch.float64, device=rows.device)
    second = torch.zeros((n_labels, rows.d, rows.d), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.n, CHUNK):
        stop = min(start + CHUNK, rows.n)
        x = rows.chunk(start, stop)
        part = label[start:stop]
        order = torch.sort(part, stable=True).indices
        sizes = torch.bincount(part, minlength=n_labels).tolist()
        for leaf, members in enumerate(torch.split(order, sizes)):
            if len(members):
                y = with_bias(x[members])
                first[leaf] += y.sum(0)
                second[leaf].addmm_(y.T, y)
    return LeafSums(count, first, second)


class Discriminant(NamedTuple):
    """A regression of ±1 on the features of two clusters.

    Attributes
    ----------
    weight : Tensor, shape (d,), float64
        The last one is the bias.
    inverse : Tensor, shape (d, d), float64
        Of the weighted mean of xxᵀ plus ridge.
    share : tuple of float
        Weight of one spike of the left and of the right cluster.
    """

    weight: Tensor
    inverse: Tensor
    share: tuple[float, float]


def discriminant(sums: LeafSums, left: NDArray[np.int64], right: NDArray[np.int64], *, ridge: float) -> Discriminant:
    """Regress −1 (left) and +1 (right) on the features; both sides have the same weight.

    Parameters
    ----------
    sums : LeafSums
    left, right : ndarray, int64
        Leaves of the two sides; each side has a spike.
    ridge : float
        Added to the diagonal of the mean of xxᵀ.
    """
    (n_a, first_a, second_a), (n_b, first_b, second_b) = sums.of(left), sums.of(right)
    share = (0.5 / n_a, 0.5 / n_b)
    gram = share[0] * second_a + share[1] * second_b
    gram.diagonal().add_(ridge)
    inverse = torch.linalg.inv(gram)
    return Discriminant(inverse @ (share[1] * first_b - share[0] * first_a), inverse, share)


def projection(
    rows: FeatureRows, members: Tensor, side: int, discriminant: Discriminant, *, leave_one_out: bool
) -> Tensor:
    """Project the spikes of one side on the axis that separates it from the other.

    Parameters
    ----------
    rows : FeatureRows
    members : Tensor, shape (n,), int64
        Spikes of this side.
    side : int
        0 left, 1 right.
    discriminant : Discriminant
    leave_one_out : bool
        Whether to project each spike on the axis computed without it.

    Returns
    -------
    Tensor, shape (n,), float64
        Near −1 on the left, near 1 on the right.
    """
    target = 2.0 * side - 1.0
    parts = []
    for chunk in torch.split(members, CHUNK):
        x = with_bias(rows.take(chunk))
        fit = x @ discriminant.weight
        if leave_one_out:  # the exact identity of ridge regression, with leverage h < 1
            leverage = discriminant.share[side] * ((x @ discriminant.inverse) * x).sum(1)
            fit = (fit - leverage * target) / (1.0 - leverage)
        parts.append(fit)
    return torch.cat(parts)


def split_score(
    rows: FeatureRows,
    sums: LeafSums,
    leaves: tuple[NDArray[np.int64], NDArray[np.int64]],
    members: tuple[Tensor, Tensor],
) -> float:
    """Score how clearly two groups of leaves are separate clusters (step 6c).

    Parameters
    ----------
    rows : FeatureRows
    sums : LeafSums
    leaves : two ndarrays, int64
        Leaves of the left and the right group.
    members : two Tensors, int64
        Spikes of the two groups.

    Returns
    -------
    float
        See :func:`bimodality`.
    """
    axis = discriminant(sums, *leaves, ridge=RIDGE)
    step = -(-sum(len(side) for side in members) // HISTOGRAM_SPIKES)
    left, right = (
        projection(rows, side[::step], number, axis, leave_one_out=len(side) < LEAVE_ONE_OUT_BELOW * rows.d)
        for number, side in enumerate(members)
    )
    histogram = smoothed_histogram(torch.cat([left, right]), smoothing_bins=smoothing_for(left, right))
    return bimodality(histogram)


def smoothing_for(left: Tensor, right: Tensor) -> float:
    """Width of the smoothing, in bins, that suits the smaller of two groups of values.

    Parameters
    ----------
    left, right : Tensor, shape (n,), (n',), float64
        Projections of the two groups.
    """
    variances = [side.clamp(-SPAN, SPAN).var(correction=0) for side in (left, right)]
    spread = math.sqrt(0.5 * float(variances[0] + variances[1]))
    width = BANDWIDTH * spread * min(len(left), len(right)) ** -0.2
    return float(max(SMOOTHING_BINS, width * N_BINS / (2 * SPAN)))


def smoothed_histogram(values: Tensor, *, smoothing_bins: float = SMOOTHING_BINS) -> NDArray[np.float64]:
    """Histogram on [−2, 2] in 399 bins, smoothed with a Gaussian; values outside are ignored.

    Returns
    -------
    ndarray, shape (399,), float64, spikes per bin
    """
    inside = values[(values >= -SPAN) & (values < SPAN)]
    counts = torch.bincount(((inside + SPAN) * (N_BINS / (2 * SPAN))).long(), minlength=N_BINS)[:N_BINS]
    reach = math.ceil(4 * smoothing_bins)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / smoothing_bins) ** 2)
    padded = np.convolve(counts.cpu().numpy().astype(np.float64), kernel / kernel.sum(), mode="full")
    return padded[reach : reach + N_BINS]


def bimodality(histogram: NDArray[np.float64]) -> float:
    """Score the depth of the trough in the middle relative to the lower of the two peaks beside it.

    Parameters
    ----------
    histogram : ndarray, shape (399,), float64
        Smoothed.

    Returns
    -------
    float
        1 − trough / lower peak: 1 for two separate peaks, 0 or less without two peaks.
    """
    start = (N_BINS - MIDDLE_BINS + 1) // 2
    trough = start + int(np.argmin(histogram[start : start + MIDDLE_BINS]))
    lower_peak = min(histogram[:trough].max(), histogram[trough + 1 :].max())
    return 1.0 - float(histogram[trough] / lower_peak) if lower_peak > 0 else 0.0
