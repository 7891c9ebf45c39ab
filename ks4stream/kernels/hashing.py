"""Numbers that look random, and depend on nothing but what they are computed from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(number: NDArray[np.integer[Any]], other: NDArray[np.integer[Any]] | int = 0) -> NDArray[np.uint64]:
    """Hash pairs of numbers: shape (n,), (n,) to (n,).

    The generator of Steele, Lea & Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).

    >>> splitmix64(np.array([1, 2])).tolist()
    [16294208416658607535, 7960286522194355700]
    """
    x = number.astype(np.uint64) * _GOLDEN + np.asarray(other).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(x ^ (x >> np.uint64(31)))
