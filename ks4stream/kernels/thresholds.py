"""Thresholds that follow from the data: for each template, from the scores of its spikes (section 8.5).

A template finds the spikes of its neuron and, at lower scores, background: spikes of distant neurons and noise. Scores
of the neuron are nearly normally distributed; those of the background fall exponentially. A mixture of the two is
fitted to the scores of each template by expectation maximization. Spikes below the lowest score that was searched are
part of the model: their number and moments are expected values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

LOWEST = 5.0
"""Lowest score that is searched if thresholds follow from the data, in noise standard deviations. Neurons whose spikes
have a mean score of less than 6.5 are not told from noise."""
HIGHEST = 12.0
"""Largest threshold. Background is hardly ever that large; larger spikes are of other neurons, and told apart by
clustering."""
LOWEST_PEAK, HIGHEST_PEAK = 6.5, 9.0
"""The same for the peaks of a region, from which templates are learned (section 5.2); the highest one is Kilosort4's
``Th_universal``."""
LARGEST_SMALL = 14.0  # peaks with larger scores say nothing about a threshold
BACKGROUND_SHARE = 0.1  # of small peaks above the threshold
WITHOUT_NEURON = 8.0  # threshold of templates with few spikes or only background; Kilosort4's ``Th_learned``
MIN_DISTANCE = 1.0  # of a neuron's mean score from the lowest one, noise s.d.; what is nearer is background
MIN_SPIKES = 20  # of a template whose scores are fitted
BIN = 0.1  # width of the bins of scores, noise s.d.
LARGEST = 30.0  # larger scores count as this one; the shape of their distribution does not matter
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
        Of the neuron's scores, including those below the lowest one.
    decay : ndarray, shape (v,), 1 / noise s.d.
        Rate at which the background decays.
    """

    share: NDArray[np.float64]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    decay: NDArray[np.float64]


def thresholds(counts: NDArray[np.int64], *, lowest: float = LOWEST) -> NDArray[np.float64]:
    """Threshold of each template, with the highest expected accuracy: spikes / (all of the neuron + background).

    Parameters
    ----------
    counts : ndarray, shape (v, bin), int64
        From :func:`histograms`.
    lowest : float, noise s.d.
        Lowest score that was searched.

    Returns
    -------
    ndarray, shape (v,), float64, noise s.d.
        Between `lowest` and :data:`HIGHEST`.
    """
    found = np.full(len(counts), WITHOUT_NEURON)
    enough = np.flatnonzero(counts.sum(axis=1) >= MIN_SPIKES)
    for some in np.split(enough, range(TEMPLATES_PER_CHUNK, len(enough), TEMPLATES_PER_CHUNK)):
        mixture = fitted(counts[some], lowest)
        of_neuron = mixture.mean >= lowest + MIN_DISTANCE
        found[some[of_neuron]] = best_thresholds(mixture, lowest)[of_neuron]
    return found


def peak_threshold(score: NDArray[np.float32], *, lowest: float = LOWEST_PEAK) -> float:
    """Lowest threshold of a region's peaks above which at most a tenth of the small ones are background.

    Parameters
    ----------
    score : ndarray, shape (n,), float32, noise s.d.
        Above `lowest`.
    lowest : float, noise s.d.
        Threshold of detection.

    Returns
    -------
    float, noise s.d.
        Between `lowest` and :data:`HIGHEST_PEAK`; the latter if all small peaks seem to be background.
    """
    small = score[score < LARGEST_SMALL]
    if len(small) < MIN_SPIKES:
        return HIGHEST_PEAK
    mixture = fitted(histograms(small, np.zeros(len(small), np.int64), 1, lowest=lowest), lowest)
    at = np.linspace(lowest, HIGHEST_PEAK, round((HIGHEST_PEAK - lowest) / BIN) + 1)
    neuron, background = _above(mixture, at, lowest)
    few = np.flatnonzero(background[0] <= BACKGROUND_SHARE * (neuron + background)[0])
    return float(at[few[0]]) if len(few) else HIGHEST_PEAK


def best_thresholds(mixture: Mixture, lowest: float) -> NDArray[np.float64]:
    """Threshold of each template with the highest expected accuracy, in steps of a bin: (v,)."""
    at = np.linspace(lowest, HIGHEST, round((HIGHEST - lowest) / BIN) + 1)
    neuron, background = _above(mixture, at, lowest)
    everything = mixture.share / ndtr((mixture.mean - lowest) / mixture.spread).clip(1e-3)  # of the neuron
    best: NDArray[np.float64] = at[(neuron / (everything[:, None] + background)).argmax(axis=1)]
    return best


def _above(mixture: Mixture, at: NDArray[np.float64], lowest: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spikes of the neuron and of the background above some scores, relative to all above the lowest one: (v, at)."""
    share, mean, spread, decay = (column[:, None] for column in mixture)
    neuron = share * ndtr((mean - at) / spread) / ndtr((mean - lowest) / spread).clip(1e-3)
    return neuron, (1.0 - share) * np.exp(-decay * (at - lowest))


def histograms(
    score: NDArray[np.float32], template: NDArray[np.integer[Any]], n_templates: int, *, lowest: float = LOWEST
) -> NDArray[np.int64]:
    """Count the spikes of each template in bins of scores.

    Parameters
    ----------
    score : ndarray, shape (n,), float32, noise s.d.
        Above `lowest`.
    template : ndarray, shape (n,), int
    n_templates : int
    lowest : float, noise s.d.
        Lowest score that was searched.

    Returns
    -------
    ndarray, shape (v, bin), int64
        In bins of :data:`BIN` above `lowest`; the last one contains all larger scores.
    """
    n_bins = round((LARGEST - lowest) / BIN)
    bins = ((score.astype(np.float64) - lowest) / BIN).astype(np.int64).clip(0, n_bins - 1)
    return np.bincount(template * np.int64(n_bins) + bins, minlength=n_templates * n_bins).reshape(-1, n_bins)


def fitted(counts: NDArray[np.int64], lowest: float) -> Mixture:
    """Fit the mixture to the scores of each template.

    Parameters
    ----------
    counts : ndarray, shape (v, bin), int
        Spikes in bins of :data:`BIN` above `lowest`; the last bin contains all larger scores.
    lowest : float, noise s.d.
    """
    at: NDArray[np.float64] = lowest + BIN * (np.arange(counts.shape[1], dtype=np.float64) + 0.5)
    share_below = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
    start = np.concatenate([at[(share_below >= quantile).argmax(axis=1)] for quantile in STARTS])
    mixture, likelihood = _maximized(np.tile(counts, (len(STARTS), 1)), at, lowest, start)
    by_start = (len(STARTS), len(counts))
    best = likelihood.reshape(by_start).argmax(axis=0), np.arange(len(counts))
    return Mixture(*(column.reshape(by_start)[best] for column in mixture))


def _maximized(
    counts: NDArray[np.int64], at: NDArray[np.float64], lowest: float, mean: NDArray[np.float64]
) -> tuple[Mixture, NDArray[np.float64]]:
    """The mixture after some rounds of expectation maximization from a mean, and its log likelihood (v,)."""
    n = counts.sum(axis=1)
    share, spread, decay = np.full(len(n), 0.5), np.full(len(n), 1.2), np.ones(len(n))
    for _ in range(N_ROUNDS):
        mixture = Mixture(share, mean, spread, decay)
        neuron, background = _densities(mixture, at, lowest)
        weight = counts * (neuron / (neuron + background).clip(1e-300))
        of_neuron = weight.sum(axis=1)  # sums, not products: BLAS may add in any order
        share = of_neuron / n
        # Expected number, mean and variance of the neuron's spikes below the lowest score: of a truncated normal.
        edge = (lowest - mean) / spread
        below = ndtr(edge).clip(1e-12)
        slope = np.exp(-0.5 * edge**2) / np.sqrt(2 * np.pi) / below
        hidden = of_neuron * (1.0 / ndtr(-edge).clip(1e-3) - 1.0)
        hidden_mean = mean - spread * slope
        hidden_variance = spread**2 * (1.0 - edge * slope - slope**2).clip(0.0)
        total = (of_neuron + hidden).clip(1e-12)
        mean = (((weight * at).sum(axis=1) + hidden * hidden_mean) / total).clip(lowest - 1.0)
        squares = (weight * (at - mean[:, None]) ** 2).sum(axis=1)
        squares += hidden * (hidden_variance + (hidden_mean - mean) ** 2)
        spread = np.sqrt(squares / total).clip(MIN_SPREAD)
        rest = counts - weight
        decay = (rest.sum(axis=1) / (rest * (at - lowest)).sum(axis=1).clip(1e-9)).clip(*DECAY)
    mixture = Mixture(share, mean, spread, decay)
    likelihood = (counts * np.log(np.add(*_densities(mixture, at, lowest)).clip(1e-300))).sum(axis=1)
    return mixture, likelihood


def _densities(
    mixture: Mixture, at: NDArray[np.float64], lowest: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Density of the neuron's and of the background's scores above the lowest one, (v, bin) each."""
    share, mean, spread, decay = (column[:, None] for column in mixture)
    above = ndtr((mean - lowest) / spread).clip(1e-3)
    normal = np.exp(-0.5 * ((at - mean) / spread) ** 2) / (np.sqrt(2 * np.pi) * spread)
    return share * normal / above, (1.0 - share) * decay * np.exp(-decay * (at - lowest))
