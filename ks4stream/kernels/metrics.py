"""Quality metrics of one unit, by the names and definitions of SpikeInterface.

Spike trains are sorted int64 sample numbers. A metric that its definition does not give for so few spikes, or for so
short a recording, is NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import pdtr
from torch import Tensor

from ks4stream.kernels.correlograms import Samples, lags

ISI_MS = 1.5  # SpikeInterface's default: shorter intervals are violations
REFRACTORY_MS = 1.0  # and that of the refractory period in Llobet et al. 2022
SLIDING_BIN_MS, SLIDING_LEAST_MS, SLIDING_MOST_MS = 0.25, 0.5, 10.0
CONTAMINATION = np.arange(0.5, 35.5, 0.5) / 100
CONFIDENCE = 0.9
AMPLITUDE_BINS, SMOOTHING_BINS, SPIKES_PER_BIN, MOST_MISSING = 100, 3, 5, 0.5
NEIGHBOURS, NEIGHBOUR_COMPONENTS = 4, 10  # SpikeInterface's defaults for its nn_isolation
MIN_SPIKES_PER_INTERVAL, MIN_INTERVALS, MIN_SHARE = 100, 2, 0.5


def bin_edges(start: int, stop: int, bin_samples: int) -> NDArray[np.int64]:
    """Edges of bins of equal length in a span of samples; the rest at its end is in no bin.

    >>> bin_edges(0, 25, 10).tolist()
    [0, 10, 20]
    """
    return np.arange(start, start + (stop - start) // bin_samples * bin_samples + 1, bin_samples)


def counts_in(sample: Samples, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of spikes in each bin; as in NumPy's histograms, the last bin includes its right edge.

    >>> counts_in(np.array([3, 10, 20]), np.array([0, 10, 20])).tolist()
    [1, 2]
    """
    bounds = np.searchsorted(sample, edges)
    bounds[-1] = np.searchsorted(sample, edges[-1], side="right")
    return np.diff(bounds)


def presence_ratio(counts: NDArray[np.int64]) -> float:
    """Share of bins (of a minute, by definition) with at least one spike, given the spikes in each bin.

    >>> presence_ratio(np.array([3, 0, 1, 8]))
    0.75
    """
    return float(np.count_nonzero(counts) / len(counts)) if len(counts) else math.nan


def isi_violations_ratio(sample: Samples, *, sampling_rate_hz: float, n_samples: int) -> float:
    """Rate of the spikes that follow another within 1.5 ms, relative to that of independent spikes (Hill et al. 2011).

    It may exceed 1. It approximates the contaminated share of the spikes if that is small.

    Parameters
    ----------
    sample : ndarray, shape (n,), int64, samples
    sampling_rate_hz : float
    n_samples : int
        Number of samples in which spikes were looked for.
    """
    if not len(sample):
        return math.nan
    # Compared in seconds, as SpikeInterface does: 45 samples at 30 kHz may be less than 0.0015 s after rounding.
    n_violations = np.count_nonzero(np.diff(sample / sampling_rate_hz) < ISI_MS / 1000)
    duration_s = n_samples / sampling_rate_hz
    return float(n_violations * duration_s / (2 * len(sample) ** 2 * ISI_MS / 1000))


def rp_contamination(sample: Samples, *, sampling_rate_hz: float, n_samples: int) -> float:
    """Contaminated share of the spikes, by pairs within 1 ms, all spikes independent (Llobet et al. 2022, equation 4).

    1 if there are more such pairs than any share explains.

    Parameters
    ----------
    sample : ndarray, shape (n,), int64, samples
    sampling_rate_hz : float
    n_samples : int
        Number of samples in which spikes were looked for.
    """
    n = len(sample)
    if n <= 1:
        return math.nan
    refractory = round(REFRACTORY_MS * sampling_rate_hz / 1000)
    n_violations = int((np.searchsorted(sample, sample + refractory, side="right") - np.arange(1, n + 1)).sum())
    rest = 1 - n_violations * n_samples / (n**2 * refractory)
    return 1 - math.sqrt(rest) if rest >= 0 else 1.0


def sliding_rp_violation(sample: Samples, *, sampling_rate_hz: float, n_samples: int) -> float:
    """Smallest contamination that can be excluded with 90 % confidence, for whatever refractory period fits best.

    Of 0.5 to 35 %; NaN if there is none (International Brain Laboratory et al. 2022). For each period of 0.5 to 10 ms,
    the number of pairs within it is compared with the number expected at that contamination.

    Parameters
    ----------
    sample : ndarray, shape (n,), int64, samples
    sampling_rate_hz : float
    n_samples : int
        Number of samples in which spikes were looked for.
    """
    n = len(sample)
    bin_samples = round(SLIDING_BIN_MS * sampling_rate_hz / 1000)
    if not n or not bin_samples:
        return math.nan
    n_bins = int(SLIDING_MOST_MS / 1000 / (bin_samples / sampling_rate_hz))
    counts = lags(sample, n_bins * bin_samples)[: n_bins * bin_samples]
    pairs = np.cumsum(counts.reshape(n_bins, bin_samples).sum(axis=1))
    period_s = bin_samples / sampling_rate_hz * np.arange(1, n_bins + 1)
    bad = CONTAMINATION[:, None] * n
    expected = 2 * period_s * sampling_rate_hz / n_samples * bad * (n - bad + (bad - 1) / 2)
    tested = period_s - bin_samples / sampling_rate_hz / 2 > SLIDING_LEAST_MS / 1000
    excluded = np.any(1 - pdtr(pairs, expected.clip(0))[:, tested] > CONFIDENCE, axis=1)
    return float(CONTAMINATION[excluded.argmax()]) if excluded.any() else math.nan


def amplitude_cutoff(amplitude: NDArray[np.floating]) -> float:
    """Share of a unit's spikes that is missing below the smallest amplitudes, if their distribution is symmetric.

    At most 0.5; NaN for fewer than 500 spikes (Hill et al. 2011, as in the Allen Institute's metrics). As in
    SpikeInterface 0.105, the smoothed histogram is rounded down, which makes it up to a third too small.

    Parameters
    ----------
    amplitude : ndarray, shape (n,)
        Positive, in any unit.
    """
    if len(amplitude) < SPIKES_PER_BIN * AMPLITUDE_BINS:
        return math.nan
    counts = np.histogram(amplitude, AMPLITUDE_BINS)[0]
    density = gaussian_filter1d(counts, SMOOTHING_BINS, mode="nearest")
    missing = density[np.flatnonzero(density >= density[0])[-1] + 1 :].sum()
    return float(min(missing / (len(amplitude) + missing), MOST_MISSING))


class UnitDrift(NamedTuple):
    """How the median position of a unit's spikes varies from minute to minute, in the unit of the positions."""

    ptp: float
    std: float
    mad: float


def drift(sample: Samples, position: NDArray[np.floating], edges: NDArray[np.int64]) -> UnitDrift:
    """Range, standard deviation and median absolute deviation of the median position in intervals.

    Intervals with fewer than 100 spikes do not count; NaN if that is more than half of them, or if there is only one.

    Parameters
    ----------
    sample : ndarray, shape (n,), int64, samples
    position : ndarray, shape (n,)
        Of each spike along the probe.
    edges : ndarray, shape (b + 1,), int64, samples
        Of the intervals, which are of a minute by definition.
    """
    bounds = np.searchsorted(sample, edges)
    spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    medians = np.array([np.median(position[a:b]) for a, b in spans if b - a >= MIN_SPIKES_PER_INTERVAL], np.float64)
    if len(spans) < MIN_INTERVALS or not len(medians) or len(medians) < MIN_SHARE * len(spans):
        return UnitDrift(math.nan, math.nan, math.nan)
    mad = float(np.median(np.abs(medians - np.median(medians))))
    return UnitDrift(float(np.ptp(medians)), float(medians.std()), mad)


def stability(sample: Samples, start: int, stop: int) -> float:
    """Number of spikes in the half of the recording with fewer, relative to that in the other: 1 is stable.

    >>> stability(np.array([1, 2, 7]), 0, 10)
    0.5
    """
    first = int(np.searchsorted(sample, (start + stop) // 2))
    halves = first, len(sample) - first
    return min(halves) / max(halves) if max(halves) else math.nan


def isolation(features: Tensor, others: Tensor) -> float:
    """Share of the four nearest neighbours of the spikes of two units that are of the same unit (Chung et al. 2017).

    In the first ten principal components of both units' spikes. 1 if the units are apart, about 0.5 if they are one.

    Parameters
    ----------
    features, others : Tensor, shape (n, d), float64
        Of the same number of spikes of each unit, on the same channels.
    """
    x = torch.cat([features, others])
    x = x - x.mean(dim=0)
    if x.shape[1] > NEIGHBOUR_COMPONENTS:
        x = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -NEIGHBOUR_COMPONENTS:]
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(NEIGHBOURS, len(x) - 1), largest=False).indices
    is_first = torch.arange(len(x), device=x.device) < len(features)
    return float((is_first[nearest] == is_first[:, None]).double().mean())
