"""How much is computed at a time: pieces of a size that suits the device, and smaller ones where memory is out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MIN_ROWS = 16
"""Rows of a piece at least: fewer free no memory worth having, and products of one or two rows may be summed in
another order than those of many."""


class ChunkSize(NamedTuple):
    """Rows of a piece: few on a CPU, whose cache holds them; many on a GPU, which waits for each kernel's launch.

    Examples
    --------
    >>> ChunkSize(cpu=2, gpu=8).on("cuda:1")
    8
    """

    cpu: int
    gpu: int

    def on(self, device: torch.device | str) -> int:
        """Rows of a piece on a device."""
        return self.cpu if torch.device(device).type == "cpu" else self.gpu


def in_chunks(function: Callable[..., None], *columns: Tensor, size: int) -> None:
    """Call a function on some rows after the other of all columns.

    Parameters
    ----------
    function : callable
        Called with the same rows of each column. It changes nothing before the last of its memory is allocated, and
        what it does to a row does not depend on which others come along.
    *columns : Tensor, shape (n, …)
    size : int
        Rows at a time; half of them, and half of these, where the device is out of memory.

    Raises
    ------
    torch.OutOfMemoryError
        If not even a few times :data:`MIN_ROWS` rows fit.

    Examples
    --------
    >>> in_chunks(lambda some: print(some.tolist()), torch.arange(5), size=2)
    [0, 1]
    [2, 3]
    [4]
    """
    for piece in zip(*(column.split(size) for column in columns), strict=True):
        n = len(piece[0])
        try:
            function(*piece)
        except torch.cuda.OutOfMemoryError:
            if n < 2 * MIN_ROWS:
                raise
        else:
            continue
        torch.cuda.empty_cache()  # here the error is gone, and with it the tensors of its frames
        in_chunks(function, *piece, size=-(-n // 2))
