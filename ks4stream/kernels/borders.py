"""Settle which spikes count where two tiles meet (section 8, Borders): the one place for that rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Reported(NamedTuple):
    """Spikes one tile reports: those of its core, and those within nt of its borders outside it.

    Attributes
    ----------
    sample : array, shape (n,), int64, samples
        Spike times, counted as `border` is.
    unit : array, shape (n,), int
    in_core : array, shape (n,), bool
        The spike lies in the tile's core; or, where a border was settled before, the spike counts.
    """

    sample: NDArray[np.int64]
    unit: NDArray[np.integer]
    in_core: NDArray[np.bool_]


def settle(
    left: Reported, right: Reported, *, border: int, nt: int, tolerance: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Decide which spikes count at the border between two tiles that follow each other.

    Both tiles see the samples around their border. Spikes within `nt` of it (from ``border − nt`` to before
    ``border + nt``) are paired one to one: same unit, at most `tolerance` apart, nearest first, then earlier. A pair
    is one spike, the left tile's version. A spike without a partner counts if it lies in its reporter's core.
    Spikes farther away are none of this border's business and keep their `in_core`, so a tile's two borders are
    settled one after the other, the result of the first being the `in_core` of the second.

    Parameters
    ----------
    left, right : Reported
        Of the earlier and the later tile; in any order.
    border : int, samples
        First sample of the right tile's core.
    nt : int, samples
        Length of a waveform.
    tolerance : int, samples
        ``nt0min``.

    Returns
    -------
    keep_left, keep_right : array, shape (n,), bool

    Examples
    --------
    A spike that the left tile places just before the border and the right one just after it, in its own core each:

    >>> left = Reported(np.array([99]), np.array([7]), np.array([True]))
    >>> right = Reported(np.array([100]), np.array([7]), np.array([True]))
    >>> settle(left, right, border=100, nt=61, tolerance=20)
    (array([ True]), array([False]))
    """
    keep_left, keep_right = np.array(left.in_core, bool), np.array(right.in_core, bool)
    for one, other in _pairs(left, right, border, nt, tolerance):
        keep_left[one], keep_right[other] = True, False
    return keep_left, keep_right


def _pairs(left: Reported, right: Reported, border: int, nt: int, tolerance: int) -> list[tuple[int, int]]:
    """Pair spikes near the border, nearest first, then the earlier left and right spike."""
    near_left, near_right = (
        np.flatnonzero((side.sample >= border - nt) & (side.sample < border + nt)) for side in (left, right)
    )
    apart = np.abs(left.sample[near_left, None] - right.sample[near_right])
    may = (apart <= tolerance) & (left.unit[near_left, None] == right.unit[near_right])
    one, other = near_left[np.nonzero(may)[0]], near_right[np.nonzero(may)[1]]
    order = np.lexsort((other, one, right.sample[other], left.sample[one], apart[may]))
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in zip(one[order].tolist(), other[order].tolist(), strict=True):
        if i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return list(pairs.items())
