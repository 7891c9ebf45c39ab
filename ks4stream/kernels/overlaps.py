"""Which spikes overlap others (section 9.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def are_overlapped(
    sample: NDArray[np.int64],
    template: NDArray[np.integer[Any]],
    among_sample: NDArray[np.int64],
    among_template: NDArray[np.integer[Any]],
    *,
    is_near: NDArray[np.bool_],
    reach: int,
) -> NDArray[np.bool_]:
    """Which spikes have another one near them in time and space.

    Parameters
    ----------
    sample, template : ndarray, shape (n,)
        Time in samples and template of each spike.
    among_sample, among_template : ndarray, shape (m,)
        The same of all spikes that may overlap them, in order of time; spikes may be among these themselves.
    is_near : ndarray, shape (v, v), bool
        Which templates (columns) are near a template (row).
    reach : int
        Maximum difference of their times, samples.

    Returns
    -------
    ndarray, shape (n,), bool

    Examples
    --------
    >>> times, templates = np.array([0, 10, 50, 50, 90]), np.array([0, 0, 0, 1, 1])
    >>> near = np.array([[True, True], [False, True]])
    >>> are_overlapped(times, templates, times, templates, is_near=near, reach=10).tolist()
    [True, True, True, False, False]
    """
    first, last = np.searchsorted(among_sample, sample - reach), np.searchsorted(among_sample, sample + reach, "right")
    found = np.zeros(len(sample), bool)
    waiting = np.arange(len(sample))
    while len(waiting := waiting[first[waiting] < last[waiting]]):
        other = first[waiting]
        itself = (among_sample[other] == sample[waiting]) & (among_template[other] == template[waiting])
        found[waiting] = is_near[template[waiting], among_template[other]] & ~itself
        waiting = waiting[~found[waiting]]
        first[waiting] += 1
    return found
