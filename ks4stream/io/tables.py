"""Tables on disk while a sort runs: one file per block, rows grouped by region, read back by region.

The rows of a block are written once, by the worker that found them; only a small receipt travels. A region's
task reads its own rows of every block, so no process ever holds them all. The receipt has a checksum of every
column of every region, with which the rows are compared when they are read. (Files of the same kind hold the spikes of
one region, grouped by cluster, and those by which thresholds are set, grouped by tile.)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import DamagedFileError
from ks4stream.io.atomic import atomic_write, explain_read_errors, explain_write_errors
from ks4stream.io.mapped import Columns, scratch_array
from ks4stream.io.places import Place, copy_here, place, read_range, size_of
from ks4stream.io.records import key_of

ALIGNED = 64  # bytes; columns begin at multiples of this, for mapped arrays


@dataclass(frozen=True, eq=False)
class Receipt:
    """What one block wrote, and how to read it: the file holds nothing but its columns, one after the other.

    Attributes
    ----------
    path : str
        Path of the file, or address of the object.
    start : ndarray of int64, shape (r + 1,)
        Where the rows of each region begin.
    kind : dict
        For each column, in the order of the file, dtype and shape of a row: ``["<f4", 10, 6]``.
    crc : dict of ndarray, shape (r,), int64
        For each column, the CRC-32 of each region's rows.
    """

    path: str
    start: NDArray[np.int64]
    kind: Mapping[str, Sequence[Any]]
    crc: Mapping[str, NDArray[np.int64]]

    @property
    def n_rows(self) -> int:
        """Number of rows in the file."""
        return int(self.start[-1])

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return sum(self.column_bytes(name) for name in self.kind)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of a column."""
        return np.dtype(self.kind[name][0])

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a column."""
        return tuple(self.kind[name][1:])

    def offset(self, name: str) -> int:
        """Where a column begins in the file."""
        names = list(self.kind)
        return sum(self.column_bytes(before) for before in names[: names.index(name)])

    def column_bytes(self, name: str) -> int:
        """Bytes of a column in the file, padded so that the next one begins at a multiple of :data:`ALIGNED`."""
        n_bytes = self.n_rows * self.row_bytes(name)
        return -(-n_bytes // ALIGNED) * ALIGNED

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a column."""
        return self.dtype(name).itemsize * math.prod(self.row_shape(name))

    def digest(self) -> str:
        """Hash of what was written, regardless of where it lies."""
        return key_of(self.start, self.crc)

    def is_there(self, size_of: Callable[[Place], int | None] = size_of) -> bool:
        """Whether the file exists with the size it was written with; `size_of` may look it up in a list of sizes."""
        return size_of(place(self.path)) == self.n_bytes


def write_block(path: Place, columns: Columns, region: NDArray[np.int64], n_regions: int) -> Receipt:
    """Write one block's rows atomically, grouped by region and otherwise in their order.

    Rows that are grouped already are not copied.

    Parameters
    ----------
    columns : mapping of ndarray, shape (n, …)
    region : ndarray of int64, shape (n,)
    """
    order = slice(None) if (np.diff(region) >= 0).all() else np.argsort(region, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(region, minlength=n_regions))]).astype(np.int64)
    kind = {name: [values.dtype.str, *values.shape[1:]] for name, values in columns.items()}
    crc = {name: np.zeros(n_regions, np.int64) for name in columns}
    receipt = Receipt(str(path), start, kind, crc)
    with atomic_write(path) as file:
        for name, values in columns.items():
            rows = np.ascontiguousarray(values[order])
            crc[name][:] = [_crc(rows[start[r] : start[r + 1]]) for r in range(n_regions)]
            file.write(_bytes_of(rows))
            file.write(bytes(receipt.column_bytes(name) - rows.nbytes))
    return receipt


def read_column(receipt: Receipt, name: str) -> NDArray[Any]:
    """Read all rows of one column of a block.

    Raises
    ------
    DamagedFileError
        If the file is corrupt.
    """
    return _read(receipt, name, 0, len(receipt.start) - 1)


def read_region(receipts: Sequence[Receipt], name: str, region: int) -> NDArray[Any]:
    """Read one column of a region's rows, block after block; nothing else is read.

    Raises
    ------
    DamagedFileError
        If the file is corrupt.
    """
    return np.concatenate([_read(receipt, name, region) for receipt in receipts])


def pick_region(
    receipts: Sequence[Receipt], name: str, region: int, wanted: NDArray[np.int64], *, scratch: Path | None = None
) -> NDArray[Any]:
    """Read some of the rows of :func:`read_region`, in any order, holding only one block's rows in addition.

    Parameters
    ----------
    wanted : ndarray of int64, shape (n,)
        Rows of the region, counted through all blocks, in the order of the result.
    scratch : path, optional
        Folder for the rows if they are too many for memory; see :func:`scratch_array`.

    Raises
    ------
    DamagedFileError
        If the file is corrupt.
    """
    found = scratch_array((len(wanted), *receipts[0].row_shape(name)), receipts[0].dtype(name), scratch)
    in_turn = np.argsort(wanted, kind="stable")
    ends = np.cumsum([receipt.start[region + 1] - receipt.start[region] for receipt in receipts])
    bounds = np.concatenate([[0], np.searchsorted(wanted[in_turn], ends)])
    for number, receipt in enumerate(receipts):
        mine = in_turn[bounds[number] : bounds[number + 1]]
        if len(mine):
            rows = _read(receipt, name, region)
            found[mine] = rows[wanted[mine] - (ends[number] - len(rows))]
    return found


def open_columns(receipt: Receipt) -> dict[str, NDArray[Any]]:
    """Map a block's file, once for all columns, without reading it. Checksums are not checked.

    Raises
    ------
    DamagedFileError
        If the file is missing or too short.
    """
    content = np.zeros(0, np.uint8)
    if receipt.n_bytes:
        with explain_read_errors(receipt.path):
            content = np.memmap(receipt.path, np.uint8, "r", shape=(receipt.n_bytes,))
    columns = {}
    for name in receipt.kind:
        first, n_bytes = receipt.offset(name), receipt.n_rows * receipt.row_bytes(name)
        values = content[first : first + n_bytes].view(receipt.dtype(name))
        columns[name] = values.reshape(receipt.n_rows, *receipt.row_shape(name))
    return columns


def localize(receipt: Receipt, folder: Path) -> Receipt:
    """The same receipt with its file on this machine, copied into a folder if it lies elsewhere, and fully checked.

    Raises
    ------
    DamagedFileError
        If the file is corrupt.
    """
    with explain_read_errors(receipt.path), explain_write_errors(folder):
        near = replace(receipt, path=str(copy_here(place(receipt.path), folder)))
    for name in receipt.kind:
        for region in range(len(receipt.start) - 1):
            try:
                _read(near, name, region)
            except DamagedFileError:
                raise DamagedFileError(receipt.path) from None  # naming the original, not its copy
    return near


def _read(receipt: Receipt, name: str, region: int, last_region: int | None = None) -> NDArray[Any]:
    """Rows of a region, or of several regions up to (not including) `last_region`, as a copy."""
    stop = region + 1 if last_region is None else last_region
    first, last = int(receipt.start[region]), int(receipt.start[stop])
    row_bytes, offset = receipt.row_bytes(name), receipt.offset(name)
    with explain_read_errors(receipt.path):
        found = read_range(place(receipt.path), offset + first * row_bytes, offset + last * row_bytes)
    rows = np.ndarray((last - first, *receipt.row_shape(name)), receipt.dtype(name), bytearray(found))
    for number in range(region, stop):
        if _crc(rows[receipt.start[number] - first : receipt.start[number + 1] - first]) != receipt.crc[name][number]:
            raise DamagedFileError(receipt.path)
    return rows


def _crc(rows: NDArray[Any]) -> int:
    return zlib.crc32(_bytes_of(rows), zlib.crc32(f"{rows.dtype.str} {rows.shape}".encode()))


def _bytes_of(rows: NDArray[Any]) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data
