"""Settle which spikes count where two tiles meet (section 8, Borders); that rule is nowhere else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Reported(NamedTuple):
    """Spikes reported by one tile: those in its core, and those outside it but within nt of its borders.

    Attributes
    ----------
    sample : array, shape (n,), int64, samples
        Spike times, counted as `border` is.
    unit : array, shape (n,), int
    counts : array, shape (n,), bool
        Whether the spike counts: if it lies in the tile's core, until a border has been settled.
    """

    sample: NDArray[np.int64]
    unit: NDArray[np.integer]
    counts: NDArray[np.bool_]


def settle(
    left: Reported, right: Reported, *, border: int, nt: int, tolerance: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Decide which spikes count at the border between two consecutive tiles.

    Both tiles process the samples around their border. Spikes within `nt` of it (``border − nt <= sample <
    border + nt``) are paired one to one: same unit, at most `tolerance` apart, nearest first, then earlier. A pair
    is one spike, and the left tile's version is kept. A spike without a partner counts if it lies in the core of the
    tile that reports it. Spikes farther from the border keep their `counts`, so the two borders of a tile can be
    settled one after the other: pass the result of the first as the `counts` of the second.

    Parameters
    ----------
    left, right : Reported
        Spikes of the earlier and of the later tile, in any order.
    border : int, samples
        First sample of the right tile's core.
    nt : int, samples
        Length of a waveform.
    tolerance : int, samples
        Largest distance of paired spikes (``nt0min``).

    Returns
    -------
    keep_left, keep_right : array, shape (n,), bool

    Examples
    --------
    The left tile reports a spike just before the border, the right tile just after it, each in its own core:

    >>> left = Reported(np.array([99]), np.array([7]), np.array([True]))
    >>> right = Reported(np.array([100]), np.array([7]), np.array([True]))
    >>> settle(left, right, border=100, nt=61, tolerance=20)
    (array([ True]), array([False]))
    """
    keep_left, keep_right = np.array(left.counts, bool), np.array(right.counts, bool)
    for i_left, i_right in _pairs(left, right, border, nt, tolerance):
        keep_left[i_left], keep_right[i_right] = True, False
    return keep_left, keep_right


def _pairs(left: Reported, right: Reported, border: int, nt: int, tolerance: int) -> list[tuple[int, int]]:
    """Pair spikes near the border: nearest first, then by the earlier left, then the earlier right spike."""
    near_left, near_right = (
        np.flatnonzero((side.sample >= border - nt) & (side.sample < border + nt)) for side in (left, right)
    )
    apart = np.abs(left.sample[near_left, None] - right.sample[near_right])
    is_allowed = (apart <= tolerance) & (left.unit[near_left, None] == right.unit[near_right])
    i_left, i_right = near_left[np.nonzero(is_allowed)[0]], near_right[np.nonzero(is_allowed)[1]]
    order = np.lexsort((i_right, i_left, right.sample[i_right], left.sample[i_left], apart[is_allowed]))
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in zip(i_left[order].tolist(), i_right[order].tolist(), strict=True):
        if i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return list(pairs.items())
