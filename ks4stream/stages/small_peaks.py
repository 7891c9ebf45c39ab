"""In which batches small peaks are detected (section 3.2).

They take more time than all others, and are needed only to learn templates, for which a part of them is enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.kernels.hashing import splitmix64
from ks4stream.kernels.thresholds import HIGHEST_PEAK, LOWEST_PEAK
from ks4stream.settings import AUTO, Settings

EVERY_BATCH = 5  # one of so many batches has small peaks
MIN_SECONDS = 200.0
"""Minimum duration of these batches. In 200 s, a neuron that fires every ten seconds has 20 spikes, which are enough
for a template."""


def lowest_peak(settings: Settings) -> float:
    """Lowest threshold of detection: ``Th_universal``, or that of small peaks if it is "auto"."""
    return LOWEST_PEAK if settings.Th_universal == AUTO else float(settings.Th_universal)


def common_peak(settings: Settings) -> float:
    """Score above which peaks are detected in all batches: ``Th_universal``, or ``HIGHEST_PEAK`` if it is "auto"."""
    return HIGHEST_PEAK if settings.Th_universal == AUTO else float(settings.Th_universal)


def complete_batches(settings: Settings, tiling: Tiling, sampling_rate_hz: float) -> NDArray[np.bool_]:
    """Batches (b,) in which all peaks above the lowest threshold are detected: all, unless ``Th_universal`` is "auto".

    One in each of as many equal parts of the recording as there are such batches: by a hash, so that they do not follow
    the period of a stimulus.
    """
    n = len(tiling)
    complete = np.zeros(n, bool)
    least = int(np.ceil(MIN_SECONDS * sampling_rate_hz / tiling.size))
    wanted = min(max(-(-n // EVERY_BATCH), least), n) if settings.Th_universal == AUTO else n
    number = np.arange(wanted)
    first, last = number * n // wanted, (number + 1) * n // wanted
    complete[first + (splitmix64(number) % (last - first).astype(np.uint64)).astype(np.int64)] = True
    return complete
