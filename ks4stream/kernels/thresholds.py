"""Thresholds that follow from the data: for each template, from the scores of its spikes (section 8.5).

A template finds the spikes of its neuron and, at lower scores, background: spikes of distant neurons and noise. Scores
of the neuron are nearly normally distributed; those of the background fall exponentially. A mixture of the two is
fitted to the scores of each template by expectation maximization, as excess over the lowest score that was searched.
Spikes below that are part of the model: their number and moments are expected values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

LOWEST, LOWEST_SMALL, BELOW_NORM = 5.0, 4.0, 3.0
"""Lowest score that is searched if thresholds follow from the data, in noise standard deviations: 5, but for small
templates their norm minus 3, below which few of their spikes are, and at least 4, where noise alone is found about as
often as the spikes of a slow neuron."""
HIGHEST = 12.0
"""Largest threshold. Background is hardly ever that large; larger spikes are of other neurons, and told apart by
clustering."""
LOWEST_PEAK, HIGHEST_PEAK = 6.5, 9.0
"""Limits of the score above which peaks of a region are large, so that they are clustered apart from smaller ones
(section 5.2); the highest one is Kilosort4's ``Th_universal``."""
LARGEST_SMALL = 14.0  # peaks with larger scores say nothing about a threshold
BACKGROUND_SHARE = 0.1  # of small peaks above the threshold
WITHOUT_NEURON = 8.0  # threshold of templates with few spikes or only background; Kilosort4's ``Th_learned``
MIN_DISTANCE = 1.0  # of a neuron's mean score from the lowest one, noise s.d.; what is nearer is background
MIN_SPIKES = 20  # of a template whose scores are fitted
BIN = 0.1  # width of the bins of scores, noise s.d.
LARGEST_EXCESS = 25.0  # over the lowest score; more counts as this: the shape of the distribution does not matter there
STARTS = (0.5, 0.8, 0.95, 0.99)
"""Quantiles of the scores, at each of which the neuron's mean begins once; the most likely result counts."""
N_ROUNDS = 100
TEMPLATES_PER_CHUNK = 512  # fitted at a time: 40 MB
MIN_SPREAD = 0.8  # s.d. of a neuron's scores; noise alone makes it 1
DECAY = (0.5, 10.0)  # limits of the background's rate of decay, 1 / noise s.d.


class Mixture(NamedTuple):
    """Scores of the spikes of each template: a share of them normally distributed, the others exponentially.

    Attributes
    ----------
    share : ndarray, shape (v,)
        Of the neuron in the spikes above the lowest score.
    mean, spread : ndarray, shape (v,), noise s.d.
        Of the neuron's scores, including those below the lowest one, over which the mean is the excess.
    decay : ndarray, shape (v,), 1 / noise s.d.
        Rate at which the background decays.
    """

    share: NDArray[np.float64]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    decay: NDArray[np.float64]


def lowest_scores(norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lowest score that is searched for templates of some norms (v,), rounded to the width of a bin.

    >>> lowest_scores(np.array([5.5, 7.52, 60.0])).tolist()
    [4.0, 4.5, 5.0]
    """
    steps = ((norm - BELOW_NORM - LOWEST_SMALL) / BIN).round()
    return np.asarray((LOWEST_SMALL + BIN * steps).clip(LOWEST_SMALL, LOWEST), np.float64)


def thresholds(counts: NDArray[np.int64], lowest: NDArray[np.float64]) -> NDArray[np.float64]:
    """Threshold of each template, with the highest expected accuracy: spikes / (all of the neuron + background).

    Parameters
    ----------
    counts : ndarray, shape (v, bin), int64
        From :func:`histograms`.
    lowest : ndarray, shape (v,), float64, noise s.d.
        Lowest score that was searched.

    Returns
    -------
    ndarray, shape (v,), float64, noise s.d.
        Between `lowest` and :data:`HIGHEST`.
    """
    found = np.full(len(counts), WITHOUT_NEURON)
    enough = np.flatnonzero(counts.sum(axis=1) >= MIN_SPIKES)
    for some in np.split(enough, range(TEMPLATES_PER_CHUNK, len(enough), TEMPLATES_PER_CHUNK)):
        mixture = fitted(counts[some])
        of_neuron = mixture.mean >= MIN_DISTANCE
        best = lowest[some] + best_excess(mixture, HIGHEST - lowest[some])
        found[some[of_neuron]] = best[of_neuron]
    return found


def peak_threshold(score: NDArray[np.float32]) -> float:
    """Lowest threshold of a region's peaks above which at most a tenth of the small ones are background.

    Parameters
    ----------
    score : ndarray, shape (n,), float32, noise s.d.
        Above :data:`LOWEST_PEAK`.

    Returns
    -------
    float, noise s.d.
        Between :data:`LOWEST_PEAK` and :data:`HIGHEST_PEAK`; the latter if all small peaks seem to be background.
    """
    small = score[score < LARGEST_SMALL]
    if len(small) < MIN_SPIKES:
        return HIGHEST_PEAK
    at = _steps(HIGHEST_PEAK - LOWEST_PEAK)
    mixture = fitted(histograms(small, np.zeros(len(small), np.int64), np.array([LOWEST_PEAK])))
    neuron, background = _above(mixture, at)
    few = np.flatnonzero(background[0] <= BACKGROUND_SHARE * (neuron + background)[0])
    return float(LOWEST_PEAK + at[few[0]]) if len(few) else HIGHEST_PEAK


def best_excess(mixture: Mixture, highest: NDArray[np.float64]) -> NDArray[np.float64]:
    """Excess, in steps of a bin up to some highest ones, above which the expected accuracy is highest: (v,)."""
    at = _steps(highest.max(initial=0.0))
    neuron, background = _above(mixture, at)
    everything = mixture.share / ndtr(mixture.mean / mixture.spread).clip(1e-3)  # of the neuron
    accuracy = neuron / (everything[:, None] + background)
    allowed = at < highest[:, None] + 0.5 * BIN
    return np.asarray(at[np.where(allowed, accuracy, -1.0).argmax(axis=1)], np.float64)


def _steps(highest: float) -> NDArray[np.float64]:
    """Edges of the bins from 0 to some highest one."""
    return np.linspace(0.0, highest, round(highest / BIN) + 1)


def _above(mixture: Mixture, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spikes of the neuron and of the background above some excess, relative to all above the lowest score: (v, at)."""
    share, mean, spread, decay = (column[:, None] for column in mixture)
    neuron = share * ndtr((mean - at) / spread) / ndtr(mean / spread).clip(1e-3)
    return neuron, (1.0 - share) * np.exp(-decay * at)


def histograms(
    score: NDArray[np.float32], template: NDArray[np.integer[Any]], lowest: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Count the spikes of each template in bins of scores.

    Parameters
    ----------
    score : ndarray, shape (n,), float32, noise s.d.
        Above the lowest one of its template.
    template : ndarray, shape (n,), int
    lowest : ndarray, shape (v,), float64, noise s.d.
        Lowest score that was searched.

    Returns
    -------
    ndarray, shape (v, bin), int64
        In bins of :data:`BIN` above `lowest`; the last one contains all larger scores.
    """
    n_bins = round(LARGEST_EXCESS / BIN)
    bins = ((score - lowest[template]) / BIN).astype(np.int64).clip(0, n_bins - 1)
    return np.bincount(template * np.int64(n_bins) + bins, minlength=len(lowest) * n_bins).reshape(-1, n_bins)


def fitted(counts: NDArray[np.int64]) -> Mixture:
    """Fit the mixture to the scores of each template.

    Parameters
    ----------
    counts : ndarray, shape (v, bin), int
        Spikes in bins of :data:`BIN` above the lowest score; the last bin contains all larger scores.
    """
    at: NDArray[np.float64] = BIN * (np.arange(counts.shape[1], dtype=np.float64) + 0.5)
    share_below = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
    start = np.concatenate([at[(share_below >= quantile).argmax(axis=1)] for quantile in STARTS])
    mixture, likelihood = _maximized(np.tile(counts, (len(STARTS), 1)), at, start)
    by_start = (len(STARTS), len(counts))
    best = likelihood.reshape(by_start).argmax(axis=0), np.arange(len(counts))
    return Mixture(*(column.reshape(by_start)[best] for column in mixture))


def _maximized(
    counts: NDArray[np.int64], at: NDArray[np.float64], mean: NDArray[np.float64]
) -> tuple[Mixture, NDArray[np.float64]]:
    """The mixture after some rounds of expectation maximization from a mean, and its log likelihood (v,)."""
    n = counts.sum(axis=1)
    share, spread, decay = np.full(len(n), 0.5), np.full(len(n), 1.2), np.ones(len(n))
    for _ in range(N_ROUNDS):
        mixture = Mixture(share, mean, spread, decay)
        neuron, background = _densities(mixture, at)
        weight = counts * (neuron / (neuron + background).clip(1e-300))
        of_neuron = weight.sum(axis=1)  # sums, not products: BLAS may add in any order
        share = of_neuron / n
        # Expected number, mean and variance of the neuron's spikes below the lowest score: of a truncated normal.
        edge = -mean / spread
        below = ndtr(edge).clip(1e-12)
        slope = np.exp(-0.5 * edge**2) / np.sqrt(2 * np.pi) / below
        hidden = of_neuron * (1.0 / ndtr(-edge).clip(1e-3) - 1.0)
        hidden_mean = mean - spread * slope
        hidden_variance = spread**2 * (1.0 - edge * slope - slope**2).clip(0.0)
        total = (of_neuron + hidden).clip(1e-12)
        mean = (((weight * at).sum(axis=1) + hidden * hidden_mean) / total).clip(-1.0)
        squares = (weight * (at - mean[:, None]) ** 2).sum(axis=1)
        squares += hidden * (hidden_variance + (hidden_mean - mean) ** 2)
        spread = np.sqrt(squares / total).clip(MIN_SPREAD)
        rest = counts - weight
        decay = (rest.sum(axis=1) / (rest * at).sum(axis=1).clip(1e-9)).clip(*DECAY)
    mixture = Mixture(share, mean, spread, decay)
    likelihood = (counts * np.log(np.add(*_densities(mixture, at)).clip(1e-300))).sum(axis=1)
    return mixture, likelihood


def _densities(mixture: Mixture, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Density of the neuron's and of the background's scores above the lowest one, (v, bin) each."""
    share, mean, spread, decay = (column[:, None] for column in mixture)
    above = ndtr(mean / spread).clip(1e-3)
    normal = np.exp(-0.5 * ((at - mean) / spread) ** 2) / (np.sqrt(2 * np.pi) * spread)
    return share * normal / above, (1.0 - share) * decay * np.exp(-decay * at)
