"""Correlograms of spike trains, and refractoriness (section 7).

Spike trains are sorted int64 sample numbers; pairs are counted exactly, in integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import pdtr

Samples = NDArray[np.int64]

REACH_MS = 500  # largest lag, on either side (section 7)
REFRACTORY_MS = 10  # windows of ±1 … ±10 ms are tested
MIN_SPIKES = 11  # an auto-correlogram of fewer is not informative
MAX_PAIRS = 100_000_000  # with more, a subset of the reference spikes is enough
UNIT_CHANCE = 0.2  # largest Q of a unit that is refractory
PAIR_CHANCE = 0.002  # probability of an empty correlogram between unrelated trains; measured, see `is_refractory_pair`
PAIRS_PER_CHUNK = 1 << 18  # pairs in memory at a time


class Refractoriness(NamedTuple):
    """How empty the middle of a correlogram is.

    Attributes
    ----------
    ratio : float
        R: smallest rate within ±1 … ±10 ms, relative to the baseline rate. 0 is perfectly refractory; 1 if
        there is no baseline.
    probability : float
        Q: probability of so few counts without a refractory period.
    """

    ratio: float
    probability: float


def correlogram(
    times_a: Samples,
    times_b: Samples | None = None,
    *,
    sampling_rate_hz: float,
    reach_ms: int = REACH_MS,
    max_pairs: int = MAX_PAIRS,
) -> NDArray[np.int64]:
    """Count pairs of spikes by lag in bins of 1 ms.

    Parameters
    ----------
    times_a : ndarray, shape (n_a,), int64, samples
        Reference train, sorted.
    times_b : ndarray, shape (n_b,), int64, samples, optional
        Other train, sorted; by default `times_a` itself (pairs of a spike with itself are not counted).
    sampling_rate_hz : float
    reach_ms : int
        Largest lag, in bins.
    max_pairs : int
        If there are more pairs, only evenly spaced spikes of `times_a` are used, so that about this many are
        counted.

    Returns
    -------
    ndarray, shape (2·reach_ms + 1,), int64
        Pairs with round((b − a) / 1 ms) = −reach_ms … reach_ms. Section 7 does not use the middle bin.

    Examples
    --------
    >>> train = np.array([0, 60, 90])
    >>> correlogram(train, sampling_rate_hz=30_000.0, reach_ms=3).tolist()
    [1, 1, 1, 0, 1, 1, 1]
    """
    bin_samples = sampling_rate_hz / 1000.0
    reach = math.ceil((reach_ms + 0.5) * bin_samples)  # samples; pairs farther apart are in no bin
    a = times_a
    b = times_a if times_b is None else times_b
    first, last = np.searchsorted(b, a - reach), np.searchsorted(b, a + reach, side="right")
    n_pairs = int((last - first).sum())
    if n_pairs > max_pairs:
        step = -(-n_pairs // max_pairs)
        a, first, last = a[::step], first[::step], last[::step]
    # Look up the bin of every possible lag, so that rounding is consistent. Two more bins take pairs beyond the last.
    bin_of = np.rint(np.arange(-reach, reach + 1) / bin_samples).astype(np.int64)
    bin_of = np.clip(bin_of, -reach_ms - 1, reach_ms + 1) + reach_ms + 1
    counts = _count_lags(a, b, first, last, reach)
    binned = np.bincount(bin_of, weights=counts, minlength=2 * reach_ms + 3).astype(np.int64)[1:-1]
    if times_b is None:
        binned[reach_ms] -= len(a)  # pairs of a spike with itself
    return binned


def lags(times: Samples, reach: int) -> NDArray[np.int64]:
    """Count pairs of a train's spikes by the samples between them, from 0 to `reach`: (reach + 1,).

    A spike is no pair with itself; two spikes at the same time are.

    >>> lags(np.array([0, 2, 2, 5]), 3).tolist()
    [1, 0, 2, 2]
    """
    after = np.arange(1, len(times) + 1)
    return _count_lags(times, times, after, np.searchsorted(times, times + reach, side="right"), reach)[reach:]


def _count_lags(a: Samples, b: Samples, first: Samples, last: Samples, reach: int) -> NDArray[np.int64]:
    """Histogram of b − a in samples, for each a over b[first:last]; shape (2·reach + 1,)."""
    counts = np.zeros(2 * reach + 1, np.int64)
    ends = np.cumsum(last - first)
    start = 0
    while start < len(a):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS_PER_CHUNK, side="right")))
        n_of = last[start:stop] - first[start:stop]
        # Positions in b: first[i], first[i] + 1, … for each spike i of a.
        offset = np.repeat(first[start:stop] - (ends[start:stop] - n_of), n_of)
        partner = b[np.arange(before, ends[stop - 1]) + offset]
        lag = partner - np.repeat(a[start:stop], n_of)
        counts += np.bincount(lag + reach, minlength=2 * reach + 1)
        start = stop
    return counts


class _Flanks(NamedTuple):
    """Pairs around lag 0, and pairs per bin away from it."""

    width: NDArray[np.int64]  # 1 … 10 bins to either side
    within: NDArray[np.int64]  # pairs at lags 1 … width on both sides
    far: float  # |lag| of 250 … 499 ms
    left: float  # −50 … −11 ms
    right: float  # 10 … 49 ms

    @property
    def largest(self) -> float:
        """Q00, the baseline."""
        return max(self.far, self.left, self.right)


def _flanks(counts: NDArray[np.int64]) -> _Flanks:
    """Summarise a correlogram of ±500 ms."""
    zero = len(counts) // 2
    beside = counts[zero + 1 : zero + 1 + REFRACTORY_MS] + counts[zero - 1 : zero - 1 - REFRACTORY_MS : -1]
    return _Flanks(
        width=np.arange(1, REFRACTORY_MS + 1),
        within=np.cumsum(beside),
        far=float(np.concatenate([counts[zero - 499 : zero - 249], counts[zero + 250 : zero + 500]]).mean()),
        left=float(counts[zero - 50 : zero - 10].mean()),
        right=float(counts[zero + 10 : zero + 50].mean()),
    )


def refractoriness_of(counts: NDArray[np.int64]) -> Refractoriness:
    """Compare the middle of a correlogram with its flanks.

    Parameters
    ----------
    counts : ndarray, shape (1001,), int64
        Pairs per millisecond of lag, −500 … 500 ms.

    Returns
    -------
    Refractoriness
    """
    flanks = _flanks(counts)
    baseline, width, half = flanks.largest, flanks.width, flanks.within / 2.0
    if baseline == 0.0:
        return Refractoriness(1.0, 1.0)
    ratio = float((half / width).min()) / baseline  # the normalisation of the rates cancels
    deviation = (half - baseline * width) / np.sqrt(2.0 * baseline * width)
    return Refractoriness(ratio, 0.5 * (1.0 + math.erf(float(deviation.min()))))


def refractoriness(times_a: Samples, times_b: Samples | None = None, *, sampling_rate_hz: float) -> Refractoriness:
    """Measure the refractoriness of a train, or of a pair of trains.

    Parameters
    ----------
    times_a, times_b : ndarray, int64, samples
        Sorted spike times; without `times_b`, the auto-correlogram is used.
    sampling_rate_hz : float

    Returns
    -------
    Refractoriness
        (ratio, probability); both are 1 for an empty train.
    """
    if min(len(times_a), len(times_a if times_b is None else times_b)) == 0:
        return Refractoriness(1.0, 1.0)
    return refractoriness_of(correlogram(times_a, times_b, sampling_rate_hz=sampling_rate_hz))


def is_refractory_unit(times: Samples, *, sampling_rate_hz: float, acg_threshold: float) -> bool:
    """Whether a unit fires like one neuron ("good", section 7)."""
    if len(times) < MIN_SPIKES or times[0] == times[-1]:
        return False
    ratio, probability = refractoriness(times, sampling_rate_hz=sampling_rate_hz)
    return ratio < acg_threshold and probability < UNIT_CHANCE


def is_refractory_pair(times_a: Samples, times_b: Samples, *, sampling_rate_hz: float, ccg_threshold: float) -> bool:
    """Whether the cross-correlogram of two trains is refractory, as for parts of one neuron's train (section 7).

    It is if some window of ±1 … ±10 ms has less than `ccg_threshold` of the baseline rate, and so few pairs
    that their Poisson probability for independent trains is below :data:`PAIR_CHANCE`. Both must hold in the same
    window: the published pair of conditions (R < 0.25 in one window, Q < 0.05 in another) is met by chance too often
    if the baseline is a few pairs per bin.

    Parameters
    ----------
    times_a, times_b : ndarray, int64, samples
        Sorted spike times.
    sampling_rate_hz, ccg_threshold : float
    """
    if min(len(times_a), len(times_b)) == 0:
        return False
    flanks = _flanks(correlogram(times_a, times_b, sampling_rate_hz=sampling_rate_hz))
    # The larger baseline for the rate, as published, but the smaller one for the probability.
    expected = min(flanks.far, 0.5 * (flanks.left + flanks.right)) * 2 * flanks.width
    is_empty = flanks.within < ccg_threshold * flanks.largest * 2 * flanks.width
    return bool((is_empty & (pdtr(flanks.within, expected) < PAIR_CHANCE)).any())
