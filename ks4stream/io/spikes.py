"""Spikes on disk while a sort runs: one file per block, rows grouped by region, read back by region.

What a block found is written once, by the worker that found it; only a small receipt travels. A region's
task reads its own rows of every block, so no process ever holds them all.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Receipt:
    """What one block wrote.

    Attributes
    ----------
    path : str
    start : ndarray of int64, shape (r + 1,)
        Where the rows of each region begin.
    """

    path: str
    start: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return int(self.start[-1])


def write_block(path: Path, columns: Columns, region: NDArray[np.int64], n_regions: int) -> Receipt:
    """Write one block's rows, grouped by region and otherwise in their order; atomic.

    Parameters
    ----------
    columns : mapping of ndarray, shape (n, …)
    region : ndarray of int64, shape (n,)
    """
    order = np.argsort(region, kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{uuid4().hex}.draft")  # a task may be computed twice at a time, on two machines
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: values[order] for name, values in columns.items()})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # of a write that failed
    start = np.concatenate([[0], np.cumsum(np.bincount(region, minlength=n_regions))]).astype(np.int64)
    return Receipt(str(path), start)


def read_rows(receipt: Receipt, name: str, rows: slice = slice(None)) -> NDArray[Any]:
    """Some rows of one column of a block; only they are read."""
    return np.array(_mapped(receipt.path, name)[rows])


def read_region(receipts: Sequence[Receipt], name: str, region: int) -> NDArray[Any]:
    """One column of a region's rows, block after block."""
    parts = [read_rows(r, name, slice(int(r.start[region]), int(r.start[region + 1]))) for r in receipts]
    return np.concatenate(parts)


def _mapped(path: str, name: str) -> NDArray[Any]:
    """Map one member of an uncompressed ``.npz`` file without reading it."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        header_bytes = member.tell()
    assert not fortran, "rows are written contiguously"
    with open(path, "rb") as file:  # the local header's own lengths say where the member's bytes begin
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
