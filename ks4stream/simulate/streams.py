"""Random numbers that depend only on a seed, a purpose and an epoch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

EPOCH_SAMPLES = 30_000
"""Samples per epoch. An epoch is the unit of every random draw: changing it changes every recording."""

# The purpose of each random stream is part of its key, so that no two purposes share numbers.
_STREAMS = {"units": 1, "trains": 2, "drift": 3, "noise": 4, "hash": 5, "hash_trains": 6, "channels": 7, "artifacts": 8}


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Return the generator of one purpose and key (an epoch, for instance): SFC64, the fastest NumPy has."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, _STREAMS[stream], *key))))
