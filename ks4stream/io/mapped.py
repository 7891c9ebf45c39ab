"""Arrays that are too large for memory: scratch arrays, and columns that grow on disk, both mapped from files.

Pages read from a mapped file count as memory of the process that read them, until it releases them.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ks4stream.io.atomic import explain_write_errors

HELD_BYTES = 128 << 20  # largest array that a task keeps in memory; a larger one is mapped from a file
LARGE_MAP_BYTES = 16 << 20  # a larger private map is worth paging out
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; Python has no name for it

Columns = Mapping[str, NDArray[Any]]
Map = np.memmap[Any, np.dtype[Any]]

_maps: WeakValueDictionary[int, Map] = WeakValueDictionary()  # those made here that are in use, by their address


def scratch_array(
    shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None, *, held_bytes: int | None = None
) -> NDArray[Any]:
    """An array of zeros: in memory if it is small, otherwise in an unnamed file that is deleted with the array.

    Parameters
    ----------
    folder : path, optional
        Where such a file lies; by default in the system's temporary folder.
    held_bytes : int, optional
        Size up to which an array is kept in memory; by default :data:`HELD_BYTES`.

    Raises
    ------
    ResultsError
        If the disk has no room for it.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= (HELD_BYTES if held_bytes is None else held_bytes):
        return np.zeros(shape, dtype)
    folder = folder or Path(tempfile.gettempdir())
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would crash the process when the array is filled
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return _known(np.memmap(file, dtype, mode="r+" if os.fstat(file.fileno()).st_size else "w+", shape=shape))


def release_pages(values: NDArray[Any]) -> None:
    """Release the pages of a mapped array to the system, if it supports that; they are read again when needed.

    Until then, pages read from a mapped file count as this process's memory. Nothing is lost, not even changes in a
    private map, whose pages are only offered for paging out. As that also drops pages from the system's cache, small
    private maps are left alone, as are arrays in memory. An array of a tensor is released if the tensor's memory is a
    map that was made in this module.
    """
    owner = _map_of(values) if sys.platform == "linux" else None
    if owner is None:
        return
    is_private = owner.mode == "c"
    if not is_private or owner.nbytes > LARGE_MAP_BYTES:
        with suppress(OSError):  # an older kernel
            owner.base.madvise(_PAGEOUT if is_private else mmap.MADV_DONTNEED)  # type: ignore[union-attr]


def _map_of(values: NDArray[Any]) -> Map | None:
    """The map whose memory an array shares, if any."""
    owner: Any = values
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base  # of a view, or of a map that was turned into a plain array
    if owner is None or isinstance(owner, np.ndarray):
        return owner if isinstance(owner, np.memmap) else None
    return _map_at(values.ctypes.data)  # something that is not an array, such as a tensor, owns the memory


def _map_at(address: int) -> Map | None:
    for reference in _maps.valuerefs():  # a copy, as other threads make maps meanwhile
        found = reference()
        if found is not None and 0 <= address - found.ctypes.data < found.nbytes:
            return found
    return None


def _known(found: Map) -> Map:
    """The same map, which can be found by its address from now on."""
    _maps[found.ctypes.data] = found
    return found


class StreamedArray:
    """An array that is read a few rows at a time, as copies, so that a mapped one does not stay in memory.

    Parameters
    ----------
    values : ndarray
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self.shape = values.shape

    def __getitem__(self, which: Any) -> NDArray[Any]:
        rows = np.array(self._values[which])
        release_pages(self._values)
        return rows


class ColumnWriter:
    """Writes columns of equal length to disk, part by part, and maps them into memory at the end.

    Parameters
    ----------
    folder : path
        Folder for the files, created if necessary; it may be removed while the arrays are in use.
    """

    def __init__(self, folder: Path) -> None:
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._length = 0

    def append(self, columns: Columns) -> None:
        """Add rows; every part has the same columns."""
        for name, values in columns.items():
            self._kinds.setdefault(name, (values.dtype, values.shape[1:]))
            with explain_write_errors(self._folder), self._path(name).open("ab") as file:
                np.ascontiguousarray(values).tofile(file)
        self._length += len(next(iter(columns.values())))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All rows, by column; changes stay in memory and never reach the files."""
        return {
            name: _known(np.memmap(self._path(name), dtype, mode="c", shape=(self._length, *shape)))
            if self._length * math.prod(shape)
            else np.empty((self._length, *shape), dtype)
            for name, (dtype, shape) in self._kinds.items()
        }

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.column"
