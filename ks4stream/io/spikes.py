"""Spikes on disk while a sort runs: one file per block, rows grouped by region, read back by region.

What a block found is written once, by the worker that found it; only a small receipt travels. A region's
task reads its own rows of every block, so no process ever holds them all. The receipt has a checksum of every
column of every region, and what is read is held against it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import DamagedFileError
from ks4stream.io.records import ONE_AT_A_TIME, appearing, key_of, reading

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


def _read(receipt: Receipt, name: str, region: int) -> NDArray[Any]:
    with reading(receipt.path):
        rows = np.array(_mapped(receipt.path, name)[int(receipt.start[region]) : int(receipt.start[region + 1])])
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
