"""Spikes on disk while a sort runs: one file per block, rows grouped by region, read back by region.

What a block found is written once, by the worker that found it; only a small receipt travels. A region's
task reads its own rows of every block, so no process ever holds them all. The receipt has a checksum of every
column of every region, and what is read is held against it. (The same file holds the spikes of one region, grouped by
unit, after they were clustered.) What even one task cannot hold lies in a file that is mapped into memory.
"""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ks4stream.errors import DamagedFileError
from ks4stream.io.records import ONE_AT_A_TIME, appearing, key_of, reading, writing_to

HELD_BYTES = 1 << 30  # of one array that a task keeps in memory; a larger one is mapped from a file

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Receipt:
    """What one block wrote.

    Attributes
    ----------
    path : str
    start : ndarray of int64, shape (r + 1,)
        Where the rows of each region begin.
    crc : dict of ndarray, shape (r,), int64
        By column, the CRC-32 of each region's rows.
    n_bytes : int
        Size of the file.
    """

    path: str
    start: NDArray[np.int64]
    crc: Mapping[str, NDArray[np.int64]]
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return int(self.start[-1])

    def digest(self) -> str:
        """Hash of what was written, wherever it lies."""
        return key_of(self.start, self.crc)

    def is_there(self) -> bool:
        """Whether the file is, and of the size it was written with."""
        path = Path(self.path)
        return path.exists() and path.stat().st_size == self.n_bytes


def write_block(path: Path, columns: Columns, region: NDArray[np.int64], n_regions: int) -> Receipt:
    """Write one block's rows, grouped by region and otherwise in their order; atomic.

    Parameters
    ----------
    columns : mapping of ndarray, shape (n, …)
    region : ndarray of int64, shape (n,)
    """
    order = np.argsort(region, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(region, minlength=n_regions))]).astype(np.int64)
    grouped = {name: np.ascontiguousarray(values[order]) for name, values in columns.items()}
    with appearing(path) as file:
        np.savez(file, allow_pickle=False, **grouped)
        n_bytes = file.tell()
    crc = {
        name: np.array([_crc(values[start[r] : start[r + 1]]) for r in range(n_regions)], np.int64)
        for name, values in grouped.items()
    }
    return Receipt(str(path), start, crc, n_bytes)


def read_column(receipt: Receipt, name: str) -> NDArray[Any]:
    """One column of a block, all its rows.

    Raises
    ------
    DamagedFileError
        If they are not what was written.
    """
    regions = range(len(receipt.start) - 1)
    return np.concatenate([_read(receipt, name, region) for region in regions])


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
    like = open_column(receipts[0], name)
    found = scratch_array((len(wanted), *like.shape[1:]), like.dtype, scratch)
    in_turn = np.argsort(wanted, kind="stable")
    ends = np.cumsum([receipt.start[region + 1] - receipt.start[region] for receipt in receipts])
    bounds = np.concatenate([[0], np.searchsorted(wanted[in_turn], ends)])
    for number, receipt in enumerate(receipts):
        mine = in_turn[bounds[number] : bounds[number + 1]]
        if len(mine):
            rows = _read(receipt, name, region)
            found[mine] = rows[wanted[mine] - (ends[number] - len(rows))]
    return found


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None) -> NDArray[Any]:
    """An array to fill: in memory up to 1 GiB, beyond that in a file without a name, which goes with the array.

    Parameters
    ----------
    folder : path, optional
        Where such a file lies; by default in the system's temporary folder.

    Raises
    ------
    ResultsError
        If there is no room for it.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= HELD_BYTES:
        return np.empty(shape, dtype)
    with writing_to(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is found to be full only when the array is filled is a crash
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return np.memmap(file, dtype, mode="r+" if os.fstat(file.fileno()).st_size else "w+", shape=shape)


class GrowingColumns:
    """Columns of one length that grow on disk, part by part, and are then mapped into memory.

    Parameters
    ----------
    folder : path
        Where their files lie, which may be removed while the arrays are in use.
    """

    def __init__(self, folder: Path) -> None:
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
            if self._length * math.prod(shape) else np.empty((self._length, *shape), dtype)
            for name, (dtype, shape) in self._kinds.items()
        }  # fmt: skip

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.column"


def open_column(receipt: Receipt, name: str) -> NDArray[Any]:
    """Map a column of a block without reading it. Nothing is compared with checksums.

    Raises
    ------
    DamagedFileError
        If the file is not as it was written, as far as its headers tell.
    """
    with reading(receipt.path):
        return _mapped(receipt.path, name)


def _read(receipt: Receipt, name: str, region: int) -> NDArray[Any]:
    rows = np.array(open_column(receipt, name)[int(receipt.start[region]) : int(receipt.start[region + 1])])
    if _crc(rows) != receipt.crc[name][region]:
        raise DamagedFileError(receipt.path)
    return rows


def _crc(rows: NDArray[Any]) -> int:
    kind = zlib.crc32(f"{rows.dtype.str} {rows.shape}".encode())
    return zlib.crc32(rows.reshape(-1).view(np.uint8).data, kind) if rows.size else kind


def _mapped(path: str, name: str) -> NDArray[Any]:
    """Map one member of an uncompressed ``.npz`` file without reading it."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with ONE_AT_A_TIME:
            shape, fortran, dtype = read_header(member)
        header_bytes = member.tell()
    if fortran:
        raise ValueError("rows are written contiguously")
    with open(path, "rb") as file:  # the local header's own lengths say where the member's bytes begin
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
