"""Merging clusters of the same neuron, and marking duplicate spikes (sections 9 and 10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import pdtrc
from torch import Tensor

from ks4stream.kernels.agglomeration import GROWN_BY
from ks4stream.kernels.correlograms import correlogram, is_refractory_pair, is_refractory_unit
from ks4stream.kernels.templates import roll_matrix

SIMILAR_ABOVE = 0.5  # less similar templates are never merged (section 9)
REFRACTORY_MS = 2  # within which one neuron does not fire twice
TOGETHER_SHARE, TOGETHER_PAIRS = 0.02, 2
"""Two clusters are two neurons if more pairs of their spikes than this, and than this share of the smaller cluster, are
within :data:`REFRACTORY_MS`."""
TOGETHER_RATE, TOGETHER_CHANCE = 0.25, 0.01
"""The second condition for two neurons: so many pairs would be improbable (chance) if pairs were at this share of the
rate at longer lags, or within bursts, if it is higher there."""

GHOST_SHARE = 0.5
"""Share of a unit's spikes that coincide with those of a larger unit at one lag, from which it is what matching left of
that unit's waveform. Neurons that fire together because of synapses or gap junctions share fewer spikes, and
jitter more."""
GHOST_LAG_MS, GHOST_JITTER_MS = 1.0, 0.07  # maximum lag, and maximum deviation from it

AreTwo = Callable[["GrowingUnit", "GrowingUnit", int], bool]
"""Whether two units are two neurons; the spikes and waveforms of the second one are moved earlier by the lag."""

LineUp = Callable[["GrowingUnit", "GrowingUnit", int], int]
"""By how much to move the second of two units earlier, so that it lines up with the first; near the lag given."""

SimilarityRow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Similarity of one template (c, q) to others (v, c, q): values (v,) and lags (v,); see :func:`merge_clusters`."""


class Trains(Protocol):
    """Sorted spike times of each cluster, in memory or on disk."""

    def __getitem__(self, cluster: int, /) -> NDArray[np.int64]: ...


class MergedUnits(NamedTuple):
    """Units after merging.

    Attributes
    ----------
    features : Tensor, shape (u, c, q), float32
        Templates of the units.
    unit_of : ndarray, shape (cluster,), int64
        Unit of each cluster, counted from 0 in the order of each unit's first cluster.
    lag_of : ndarray, shape (cluster,), int64, samples
        Lag by which the waveform of each cluster is rolled: the times of its spikes become ``sample − lag``,
        and their features ``features @ roll_matrix(components, lag)``
        (:func:`~ks4stream.kernels.templates.roll_matrix`).
    """

    features: Tensor
    unit_of: NDArray[np.int64]
    lag_of: NDArray[np.int64]

    def lags_of(self, unit: int) -> dict[int, int]:
        """The clusters of a unit, with their lags."""
        return {number: int(self.lag_of[number]) for number in np.flatnonzero(self.unit_of == unit).tolist()}


class GrowingUnit:
    """A unit during merging: the clusters it contains with their lags, its spikes and its template."""

    def __init__(self, number: int, trains: Trains, n_spikes: int, features: Tensor) -> None:
        self.n_spikes, self.features = n_spikes, features
        self.lags = {number: 0}
        self._trains = trains

    def absorb(self, other: GrowingUnit, lag: int, components: Tensor) -> None:
        """Absorb another unit, whose waveform is delayed by `lag` (so its spikes become earlier)."""
        n, m = self.n_spikes, other.n_spikes
        rolled = other.features @ roll_matrix(components, lag)
        self.features = (n * self.features + m * rolled) / max(n + m, 1)
        self.n_spikes = n + m
        self.lags |= {number: before + lag for number, before in other.lags.items()}

    def train(self) -> NDArray[np.int64]:
        """Sorted times of its spikes; not cached, as all trains together may not fit in memory."""
        return joined_train(self._trains, self.lags)


class _KnownPairs:
    """Pairs of growing units of which something is known, until either of them has grown by `GROWN_BY`."""

    def __init__(self, units: Mapping[int, GrowingUnit]) -> None:
        self._units = units
        self._sizes: dict[frozenset[int], dict[int, int]] = {}

    def add(self, u: int, v: int) -> None:
        """From now on, it is known of this pair."""
        self._sizes[frozenset((u, v))] = {number: self._units[number].n_spikes for number in (u, v)}

    def known(self, u: int, v: int) -> bool:
        """Whether it is known of this pair."""
        sizes = self._sizes.get(frozenset((u, v)), {u: 0})
        return all(self._units[number].n_spikes < GROWN_BY * n_spikes for number, n_spikes in sizes.items())


def joined_train(trains: Trains, lags: Mapping[int, int]) -> NDArray[np.int64]:
    """Sorted spike times of several clusters, each shifted earlier by its lag."""
    moved = [trains[number] - lag for number, lag in lags.items()]
    return moved[0] if len(moved) == 1 else np.sort(np.concatenate(moved))


def merge_clusters(
    trains: Trains,
    n_spikes: NDArray[np.int64],
    features: Tensor,
    components: Tensor,
    *,
    similarity: NDArray[np.float32],
    lag: NDArray[np.int64],
    similarity_row: SimilarityRow,
    sampling_rate_hz: float,
    acg_threshold: float,
    ccg_threshold: float,
    are_two: AreTwo,
    line_up: LineUp,
) -> MergedUnits:
    """Merge clusters with similar templates that are one neuron (section 9).

    Each cluster begins as a unit of its own. Units absorb others in descending order of their count. Of the units with
    a similarity above :data:`SIMILAR_ABOVE`, most similar first, a unit absorbs the first one that is part of the same
    neuron; then it starts over. It is if their cross-correlogram is refractory (which counts only for units that were
    refractory before merging), or if they do not fire together and their spikes are those of one neuron.

    Parameters
    ----------
    trains : sequence of ndarray, int64, samples
        Sorted spike times of each cluster. They are read one or two at a time, possibly more than once.
    n_spikes : ndarray, shape (cluster,), int64
        Length of each train.
    features : Tensor, shape (cluster, c, q), float32
        Mean of each cluster.
    components : Tensor, shape (q, w), float32
        wPCA.
    similarity, lag : ndarray, shape (cluster, cluster), float32 and int64
        For each pair the largest correlation over lags, and the lag by which v (column) is rolled to align
        it with u (row).
    similarity_row : callable
        The same for the template of a merged unit: ``(template (c, q), templates (v, c, q)) → (v,), (v,)``.
    sampling_rate_hz, acg_threshold, ccg_threshold : float
    are_two, line_up : callable
        See :data:`AreTwo` and :data:`LineUp`.

    Returns
    -------
    MergedUnits
    """
    n_clusters = len(n_spikes)
    alive = {u: GrowingUnit(u, trains, int(n_spikes[u]), features[u]) for u in range(n_clusters)}
    absorbs = [
        is_refractory_unit(trains[u], sampling_rate_hz=sampling_rate_hz, acg_threshold=acg_threshold)
        for u in range(n_clusters)
    ]
    similarity, lag = similarity.copy(), lag.copy()
    apart, two = _KnownPairs(alive), _KnownPairs(alive)  # by their correlogram, and by their spikes

    def lag_if_one(u: int, v: int, train: Callable[[], NDArray[np.int64]]) -> int | None:
        by_correlogram = absorbs[u] and not apart.known(u, v)
        if not by_correlogram and two.known(u, v):
            return None
        shift = line_up(alive[u], alive[v], int(lag[u, v]))
        other = alive[v].train() - shift
        if by_correlogram:
            if is_refractory_pair(train(), other, sampling_rate_hz=sampling_rate_hz, ccg_threshold=ccg_threshold):
                return shift
            apart.add(u, v)
        if not two.known(u, v):
            if not fire_together(train(), other, sampling_rate_hz) and not are_two(alive[u], alive[v], shift):
                return shift
            two.add(u, v)
        return None

    for u in np.argsort(-n_spikes, kind="stable").tolist():
        while u in alive:
            similar = np.argsort(-similarity[u], kind="stable")
            similar = similar[similarity[u, similar] > SIMILAR_ABOVE]
            train = cache(alive[u].train)  # read once, if it is needed
            lags = ((v, lag_if_one(u, v, train)) for v in similar.tolist() if v != u and v in alive)
            v, shift = next(((v, shift) for v, shift in lags if shift is not None), (None, 0))
            if v is None:
                break
            alive[u].absorb(alive.pop(v), shift, components)
            _renew_row(u, alive, similarity, lag, similarity_row)
    remaining = [alive[u] for u in sorted(alive)]
    unit_of, lag_of = np.zeros(n_clusters, np.int64), np.zeros(n_clusters, np.int64)
    for new, unit in enumerate(remaining):
        for member, shift in unit.lags.items():
            unit_of[member], lag_of[member] = new, shift
    return MergedUnits(torch.stack([unit.features for unit in remaining]) if remaining else features, unit_of, lag_of)


def fire_together(a: NDArray[np.int64], b: NDArray[np.int64], sampling_rate_hz: float) -> bool:
    """Whether two trains (sorted times) have more pairs within a refractory period than one neuron could have."""
    reach = 60
    counts = correlogram(a, b, sampling_rate_hz=sampling_rate_hz, reach_ms=reach)
    lag = np.abs(np.arange(-reach, reach + 1))
    near, in_bursts, far = lag <= REFRACTORY_MS, (lag > REFRACTORY_MS) & (lag <= 10), lag > 10
    n_pairs = int(counts[near].sum())
    tolerated = TOGETHER_RATE * float(max(counts[in_bursts].mean(), counts[far].mean())) * int(near.sum())
    many = n_pairs > max(TOGETHER_PAIRS, TOGETHER_SHARE * min(len(a), len(b)))
    return bool(many and pdtrc(n_pairs - 1, tolerated) < TOGETHER_CHANCE)


def coincident_share(sample: NDArray[np.int64], other: NDArray[np.int64], sampling_rate_hz: float) -> float:
    """Share of the spikes of a train (sorted times) that coincide with those of another one at the best lag.

    Lags of up to :data:`GHOST_LAG_MS` are tried, and spikes coincide within :data:`GHOST_JITTER_MS`.

    >>> train = np.array([1000, 5000, 9000, 12_000])
    >>> coincident_share(train, np.array([1009, 5011, 9010, 20_000]), 30_000.0)
    0.75
    """
    if not len(sample) or not len(other):
        return 0.0
    reach, jitter = (round(ms * sampling_rate_hz / 1000) for ms in (GHOST_LAG_MS, GHOST_JITTER_MS))
    after = np.searchsorted(other, sample).clip(max=len(other) - 1)
    lags = np.stack([other[after], other[np.maximum(after - 1, 0)]]) - sample
    nearest = np.where(np.abs(lags[0]) < np.abs(lags[1]), lags[0], lags[1])
    counts = np.bincount(nearest[np.abs(nearest) <= reach] + reach, minlength=2 * reach + 1)
    return float(np.convolve(counts, np.ones(2 * jitter + 1), mode="full").max() / len(sample))


def _renew_row(
    u: int,
    alive: dict[int, GrowingUnit],
    similarity: NDArray[np.float32],
    lag: NDArray[np.int64],
    similarity_row: SimilarityRow,
) -> None:
    """Update the similarity of a changed template to all that remain."""
    others = np.array([v for v in alive if v != u], np.int64)
    if len(others):
        stacked = torch.stack([alive[v].features for v in others.tolist()])
        value, shift = similarity_row(alive[u].features, stacked)
        similarity[u, others] = similarity[others, u] = value.cpu().numpy()
        lag[u, others] = shift.cpu().numpy()
        lag[others, u] = -lag[u, others]


def mark_duplicates(sample: NDArray[np.int64], unit: NDArray[np.int64], *, min_samples: int) -> NDArray[np.bool_]:
    """Mark the spikes to keep: in each unit, those at least `min_samples` after the previous kept one (section 10).

    Parameters
    ----------
    sample : ndarray, shape (n,), int64, samples
        Spike times.
    unit : ndarray, shape (n,), int
        Unit of each spike.
    min_samples : int
        int(``duplicate_spike_ms`` · fs / 1000).

    Returns
    -------
    ndarray, shape (n,), bool

    Examples
    --------
    >>> mark_duplicates(np.array([0, 5, 10, 12]), np.zeros(4, int), min_samples=7).tolist()
    [True, False, True, False]
    """
    order = np.lexsort((sample, unit))
    time, unit_of = sample[order], unit[order]
    kept = np.ones(len(order), dtype=bool)
    close = (np.diff(time) < min_samples) & (np.diff(unit_of) == 0)
    # Only runs of spikes that are each close to the previous one have to be decided, spike by spike from the start of
    # the run; all runs advance together.
    at = np.flatnonzero(close & ~np.concatenate([[False], close[:-1]]))
    last = time[at]
    while len(at):
        at = at + 1
        far = time[at] - last >= min_samples
        kept[at] = far
        last = np.where(far, time[at], last)
        more = np.zeros(len(at), dtype=bool)
        more[at < len(close)] = close[at[at < len(close)]]
        at, last = at[more], last[more]
    result = np.empty_like(kept)
    result[order] = kept
    return result
