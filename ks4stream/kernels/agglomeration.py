"""Joining clusters that are one neuron, the most strongly linked first (section 6, step 5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels.graph import CHUNK, SpikeGraph

EXPECTED_FLOOR = 0.001  # added to expected links
GROWN_BY = 1.1  # factor by which a cluster has grown if it is to be compared again with those it was told apart from
MIN_RATIO = 0.01  # links between two clusters relative to expected links; clusters with less are not compared

Clusters = NDArray[np.int64]
AreTwo = Callable[[Clusters, Clusters], bool]
"""Whether two groups, each given by the numbers of its clusters, are two neurons."""


def links_between(graph: SpikeGraph, spike_label: Tensor, landmark_label: Tensor, n_labels: int) -> NDArray[np.int64]:
    """Count links from the spikes of each cluster to the landmarks of each cluster; shape (C, C), int64."""
    counts = torch.zeros(n_labels * n_labels, dtype=torch.int64, device=graph.neighbor.device)
    for start in range(0, graph.n_spikes, CHUNK):
        part = slice(start, start + CHUNK)
        to = landmark_label[graph.neighbor[part].long()]  # (n, 10)
        pair = spike_label[part, None] * n_labels + to
        counts += torch.bincount(pair[~graph.is_self[part]], minlength=n_labels * n_labels)
    return counts.view(n_labels, n_labels).cpu().numpy()


def agglomerate(
    links: NDArray[np.int64], are_two: AreTwo, *, similar: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Join, again and again, the pair with the highest ratio of links to expected links that is one neuron.

    A pair that was found to be two neurons is compared again when either of them has grown by :data:`GROWN_BY`.

    Parameters
    ----------
    links : ndarray, shape (C, C), int64
        Links from spikes of one cluster to landmarks of another.
    are_two : callable
    similar : ndarray, shape (C, C), bool, optional
        Pairs that are compared even without links (:data:`MIN_RATIO`), after all others.

    Returns
    -------
    ndarray, shape (C,), int64
        Group of each cluster, numbered from 0 in the order of their first clusters.

    Examples
    --------
    >>> links = np.array([[9, 9, 1, 0], [9, 9, 0, 1], [1, 0, 9, 8], [0, 1, 8, 9]])
    >>> agglomerate(links, lambda a, b: min(a) < 2 <= max(b)).tolist()
    [0, 0, 1, 1]
    """
    n = len(links)
    observed = (links + links.T).astype(np.float64)
    expected = np.outer(links.sum(1), links.sum(0)) / max(float(links.sum()), 1.0)
    expected = expected + expected.T + EXPECTED_FLOOR
    unlinked = np.zeros((n, n), bool) if similar is None else similar.copy()
    groups = {number: np.array([number]) for number in range(n)}
    size = links.sum(1).astype(np.float64)  # a spike has as many links as any other
    size_then = np.zeros((n, n))  # [a, b]: size of a when it was told apart from b; 0 if it was not
    waiting = np.triu(np.ones((n, n), bool), 1)  # each pair once; False for those that are two, and for joined ones
    while True:
        ratio = np.where(waiting, observed / expected, -1.0)
        ratio[(ratio < MIN_RATIO) & ~unlinked] = -1.0
        a, b = divmod(int(np.argmax(ratio)), n)  # a < b
        if ratio[a, b] < 0:
            break
        if are_two(groups[a], groups[b]):
            waiting[a, b] = False
            size_then[a, b], size_then[b, a] = size[a], size[b]
            continue
        larger = a if size[a] >= size[b] else b
        size_then[a], size_then[:, a] = size_then[larger], size_then[:, larger]
        size[a] += size[b]
        groups[a] = np.sort(np.concatenate([groups[a], groups.pop(b)]))
        for counts in (observed, expected, unlinked):
            counts[a] += counts[b]
            counts[:, a] = counts[a]  # wrong at [a, a], which is never used
        others = np.array([number for number in groups if number != a], np.int64)
        known = (size[a] < GROWN_BY * size_then[a, others]) & (size[others] < GROWN_BY * size_then[others, a])
        waiting[np.minimum(a, others), np.maximum(a, others)] = ~known
        waiting[b], waiting[:, b] = False, False
    label = np.zeros(n, np.int64)
    for number, first in enumerate(sorted(groups)):
        label[groups[first]] = number
    return label
