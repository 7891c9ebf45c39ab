"""When the GPU's memory does not suffice, the same in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 16
"""Rows below which a piece is not halved: so few free no memory worth having, and products of one or two rows are
summed in another order than those of many."""


def in_pieces(function: Callable[..., None], *columns: Tensor, size: int) -> None:
    """Call a function on some rows after the other of all columns.

    Parameters
    ----------
    function : callable
        Called with the same rows of each column. It changes nothing before the last of its memory is allocated, and
        what it does to a row does not depend on which others come along.
    *columns : Tensor, shape (n, …)
    size : int
        Rows at a time; halved, for the rest of them too, whenever the device is out of memory.

    Raises
    ------
    torch.OutOfMemoryError
        If not even :data:`SMALLEST` rows fit.

    Examples
    --------
    >>> in_pieces(lambda some: print(some.tolist()), torch.arange(5), size=2)
    [0, 1]
    [2, 3]
    [4]
    """
    start, n = 0, len(columns[0])
    while start < n:
        try:
            function(*(column[start : start + size] for column in columns))
        except torch.cuda.OutOfMemoryError:
            if size <= SMALLEST:
                raise
        else:
            start += size
            continue
        size = -(-size // 2)  # here the error is gone, and with it the tensors of its frames
        torch.cuda.empty_cache()
