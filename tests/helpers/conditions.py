"""Conditions of spikes in recordings in which nothing changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ks4stream.kernels.splits import Conditions

RATE_HZ = 30_000.0


def still(n: int, *, sample: NDArray[np.int64] | None = None) -> Conditions:
    """Conditions of n spikes while the tissue does not move; by default 10 a second, at random times."""
    if sample is None:
        seconds = max(n, 1) / 10
        sample = np.sort(np.random.default_rng(n).integers(0, round(seconds * RATE_HZ), n))
    elapsed = sample / (sample[-1] + 1) if n else np.zeros(0)
    return Conditions(sample, np.zeros(n, np.float32), elapsed, np.zeros(n, bool), RATE_HZ)
