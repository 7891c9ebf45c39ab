"""Spikes on disk while a sort runs: one file per block, rows grouped by region, read back by region.

What a block found is written once, by the worker that found it; only a small receipt travels. A region's
task reads its own rows of every block, so no process ever holds them all. The receipt has a checksum of every
column of every region, and what is read is held against it. (The same file holds the spikes of one region, grouped by
unit, after they were clustered.) What even one task cannot hold lies in a file that is mapped into memory.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ks4stream.errors import DamagedFileError
from ks4stream.io.places import Place, copy_here, place, read_range, size_of
from ks4stream.io.records import appearing, key_of, reading, writing_to

ALIGNED = 64  # bytes; columns begin at multiples of this, for mapped arrays
HELD_BYTES = 128 << 20  # of one array that a task keeps in memory; a larger one is mapped from a file

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Receipt:
    """What one block wrote, and how to read it: its columns, one after the other, are all that the file holds.

    Attributes
    ----------
    path : str
        Of the file, or address of the object.
    start : ndarray of int64, shape (r + 1,)
        Where the rows of each region begin.
    kind : dict
        By column, in their order in the file, dtype and shape of a row: ``["<f4", 10, 6]``.
    crc : dict of ndarray, shape (r,), int64
        By column, the CRC-32 of each region's rows.
    """

    path: str
    start: NDArray[np.int64]
    kind: Mapping[str, Sequence[Any]]
    crc: Mapping[str, NDArray[np.int64]]

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
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
        """What a column takes in the file, which the next one begins at a multiple of :data:`ALIGNED`."""
        n_bytes = self.n_rows * self.row_bytes(name)
        return -(-n_bytes // ALIGNED) * ALIGNED

    def row_bytes(self, name: str) -> int:
        """What one row of a column takes."""
        return self.dtype(name).itemsize * math.prod(self.row_shape(name))

    def digest(self) -> str:
        """Hash of what was written, wherever it lies."""
        return key_of(self.start, self.crc)

    def is_there(self, size_of: Callable[[Place], int | None] = size_of) -> bool:
        """Whether the file is, and of the size it was written with; who has a list of sizes need not ask for it."""
        return size_of(place(self.path)) == self.n_bytes


def write_block(path: Place, columns: Columns, region: NDArray[np.int64], n_regions: int) -> Receipt:
    """Write one block's rows, grouped by region and otherwise in their order; atomic.

    Parameters
    ----------
    columns : mapping of ndarray, shape (n, …)
    region : ndarray of int64, shape (n,)
    """
    order = np.argsort(region, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(region, minlength=n_regions))]).astype(np.int64)
    kind = {name: [values.dtype.str, *values.shape[1:]] for name, values in columns.items()}
    crc = {name: np.zeros(n_regions, np.int64) for name in columns}
    receipt = Receipt(str(path), start, kind, crc)
    with appearing(path) as file:
        for name, values in columns.items():
            rows = np.ascontiguousarray(values[order])
            crc[name][:] = [_crc(rows[start[r] : start[r + 1]]) for r in range(n_regions)]
            file.write(_bytes_of(rows))
            file.write(bytes(receipt.column_bytes(name) - rows.nbytes))
    return receipt


def read_column(receipt: Receipt, name: str) -> NDArray[Any]:
    """One column of a block, all its rows.

    Raises
    ------
    DamagedFileError
        If they are not what was written.
    """
    return _read(receipt, name, 0, len(receipt.start) - 1)


def read_region(receipts: Sequence[Receipt], name: str, region: int) -> NDArray[Any]:
    """One column of a region's rows, block after block; nothing else is read.

    Raises
    ------
    DamagedFileError
        If they are not what was written.
    """
    return np.concatenate([_read(receipt, name, region) for receipt in receipts])


def pick_region(
    receipts: Sequence[Receipt], name: str, region: int, wanted: NDArray[np.int64], *, scratch: Path | None = None
) -> NDArray[Any]:
    """Some of the rows that :func:`read_region` returns, in the order wanted; only one block's are held beside them.

    Parameters
    ----------
    wanted : ndarray of int64, shape (n,)
        Which rows of the region, counted through all blocks.
    scratch : path, optional
        Folder for the rows if they are too many for memory; see :func:`scratch_array`.

    Raises
    ------
    DamagedFileError
        If they are not what was written.
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


def scratch_array(
    shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None, *, held_bytes: int | None = None
) -> NDArray[Any]:
    """An array of zeros: in memory if it is small, else in a file without a name, which goes with the array.

    Parameters
    ----------
    folder : path, optional
        Where such a file lies; by default in the system's temporary folder.
    held_bytes : int, optional
        What is small; by default :data:`HELD_BYTES`.

    Raises
    ------
    ResultsError
        If there is no room for it.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= (HELD_BYTES if held_bytes is None else held_bytes):
        return np.zeros(shape, dtype)
    folder = folder or Path(tempfile.gettempdir())
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing_to(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is found to be full only when the array is filled is a crash
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return np.memmap(file, dtype, mode="r+" if os.fstat(file.fileno()).st_size else "w+", shape=shape)


def let_go(values: NDArray[Any]) -> None:
    """Take the pages of a mapped array out of this process, as far as the system can; they come back when needed.

    What was read of a mapped file counts as this process's memory until somebody else needs it. Nothing is lost: not
    even what was changed of a private map, which is only offered for paging out. That takes pages out of the system's
    cache, too, so small private maps are left alone. So are arrays in memory.
    """
    owner: Any = values
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base  # of a view, or of a map that was made a plain array
    if not isinstance(owner, np.memmap) or sys.platform != "linux":
        return
    is_private = owner.mode == "c"
    if not is_private or owner.nbytes > LARGE_MAP_BYTES:
        with suppress(OSError):  # an older kernel
            owner.base.madvise(_PAGEOUT if is_private else mmap.MADV_DONTNEED)  # type: ignore[union-attr]


LARGE_MAP_BYTES = 16 << 20
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; Python has no name for it


class PassingRows:
    """An array of which some rows at a time are read, as copies; mapped ones do not stay in memory.

    Parameters
    ----------
    values : ndarray
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self.shape = values.shape

    def __getitem__(self, which: Any) -> NDArray[Any]:
        rows = np.array(self._values[which])
        let_go(self._values)
        return rows


class GrowingColumns:
    """Columns of one length that grow on disk, part by part, and are then mapped into memory.

    Parameters
    ----------
    folder : path
        Where their files lie, made if need be; it may be removed while the arrays are in use.
    """

    def __init__(self, folder: Path) -> None:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._length = 0

    def append(self, columns: Columns) -> None:
        """Add rows; every part has the same columns."""
        for name, values in columns.items():
            self._kinds.setdefault(name, (values.dtype, values.shape[1:]))
            with writing_to(self._folder), self._path(name).open("ab") as file:
                np.ascontiguousarray(values).tofile(file)
        self._length += len(next(iter(columns.values())))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All rows, by column; they may be changed in memory, which the files never see."""
        return {
            name: np.memmap(self._path(name), dtype, mode="c", shape=(self._length, *shape))
            if self._length * math.prod(shape)
            else np.empty((self._length, *shape), dtype)
            for name, (dtype, shape) in self._kinds.items()
        }

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.column"


def open_columns(receipt: Receipt) -> dict[str, NDArray[Any]]:
    """Map a block's file, once for all columns, without reading it. Nothing is compared with checksums.

    Raises
    ------
    DamagedFileError
        If the file is gone or too short.
    """
    content = np.zeros(0, np.uint8)
    if receipt.n_bytes:
        with reading(receipt.path):
            content = np.memmap(receipt.path, np.uint8, "r", shape=(receipt.n_bytes,))
    columns = {}
    for name in receipt.kind:
        first, n_bytes = receipt.offset(name), receipt.n_rows * receipt.row_bytes(name)
        values = content[first : first + n_bytes].view(receipt.dtype(name))
        columns[name] = values.reshape(receipt.n_rows, *receipt.row_shape(name))
    return columns


def brought_near(receipt: Receipt, folder: Path) -> Receipt:
    """The same with its file on this machine, copied into a folder if it lies elsewhere; every byte is checked.

    Raises
    ------
    DamagedFileError
        If it is not what was written.
    """
    with reading(receipt.path), writing_to(folder):
        near = replace(receipt, path=str(copy_here(place(receipt.path), folder)))
    for name in receipt.kind:
        for region in range(len(receipt.start) - 1):
            try:
                _read(near, name, region)
            except DamagedFileError:
                raise DamagedFileError(receipt.path) from None  # and not its copy
    return near


def _read(receipt: Receipt, name: str, region: int, last_region: int | None = None) -> NDArray[Any]:
    """Rows of a region, or of those up to another, as a copy."""
    stop = region + 1 if last_region is None else last_region
    first, last = int(receipt.start[region]), int(receipt.start[stop])
    row_bytes, offset = receipt.row_bytes(name), receipt.offset(name)
    with reading(receipt.path):
        found = read_range(place(receipt.path), offset + first * row_bytes, offset + last * row_bytes)
    rows = np.ndarray((last - first, *receipt.row_shape(name)), receipt.dtype(name), bytearray(found))
    for one in range(region, stop):
        if _crc(rows[receipt.start[one] - first : receipt.start[one + 1] - first]) != receipt.crc[name][one]:
            raise DamagedFileError(receipt.path)
    return rows


def _crc(rows: NDArray[Any]) -> int:
    return zlib.crc32(_bytes_of(rows), zlib.crc32(f"{rows.dtype.str} {rows.shape}".encode()))


def _bytes_of(rows: NDArray[Any]) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data
