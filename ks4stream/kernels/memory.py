"""Computing in chunks: as large as suits the device, and smaller if it runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MIN_ROWS = 16
"""Minimum number of rows in a chunk: fewer would hardly free any memory, and products of one or two rows may be summed
in a different order than products of many."""


class ChunkSize(NamedTuple):
    """Rows in a chunk: few on a CPU, so that they fit its cache; many on a GPU, where launching a kernel takes time.

    Examples
    --------
    >>> ChunkSize(cpu=2, gpu=8).on("cuda:1")
    8
    """

    cpu: int
    gpu: int

    def on(self, device: torch.device | str) -> int:
        """Rows in a chunk on the given device."""
        return self.cpu if torch.device(device).type == "cpu" else self.gpu


def in_chunks(function: Callable[..., None], *columns: Tensor, size: int) -> None:
    """Call a function on one chunk of rows after another, the same rows of all columns.

    Parameters
    ----------
    function : callable
        Called with the same rows of each column. It must not change anything before it has allocated all its memory,
        and what it does to a row must not depend on the other rows of the chunk.
    *columns : Tensor, shape (n, …)
    size : int
        Rows in a chunk; halved, repeatedly if necessary, when the device is out of memory.

    Raises
    ------
    torch.OutOfMemoryError
        If not even the smallest chunks, of :data:`MIN_ROWS` rows or a few more, fit.

    Examples
    --------
    >>> in_chunks(lambda rows: print(rows.tolist()), torch.arange(5), size=2)
    [0, 1]
    [2, 3]
    [4]
    """
    for chunk in zip(*(column.split(size) for column in columns), strict=True):
        n = len(chunk[0])
        try:
            function(*chunk)
        except torch.cuda.OutOfMemoryError:
            if n < 2 * MIN_ROWS:
                raise
        else:
            continue
        torch.cuda.empty_cache()  # outside the handler: the error, and the tensors its frames refer to, are gone
        in_chunks(function, *chunk, size=-(-n // 2))
