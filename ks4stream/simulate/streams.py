"""Random numbers that depend on a seed, a purpose and a block alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

BLOCK_SAMPLES = 30_000
"""Samples per block. A block is the unit of every random draw: changing it changes every recording."""

# What a random stream is for; part of its key, so that no two purposes share numbers.
_STREAMS = {"units": 1, "trains": 2, "drift": 3, "noise": 4, "hash": 5, "hash_trains": 6, "channels": 7, "artifacts": 8}


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Return the generator of one purpose (and, for instance, one block): SFC64, the cheapest NumPy has."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, _STREAMS[stream], *key))))
