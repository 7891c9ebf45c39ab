"""Where samples come from: flat files and Zarr, here or on object stores, arrays and Dask, all behind :class:`Source`.

Each is a frozen value that checks itself when made, reads only what it is asked for, and delivers native
int16, uint16, int32 or float32. Those that lie in files hold the path and not the data, so that they can
be sent to any worker that sees the file or the store.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import operator
import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.objects import Status, can_list, is_remote, listing, locate, name_of, read_bytes, status, surroundings
from ks4stream.io.zarrs import check_chunks, open_zarr, zarr_explained, zarr_metadata
from ks4stream.recording import FlatFile, Source

if TYPE_CHECKING:
    import dask.array

__all__ = [
    "ArraySource",
    "BinarySource",
    "ConcatenatedSource",
    "DaskSource",
    "Source",
    "ZarrSource",
    "delivered_dtype",
    "join",
]

_DTYPES = ("int16", "uint16", "int32", "float32")
_DIGEST_WHOLE_BYTES = 2**28  # an array in memory up to this size enters its digest as a whole, …
_DIGEST_SPOTS = 32  # … a larger one with this many stretches …
_DIGEST_SAMPLES = 1024  # … of this length
_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_NPY_HEADER_BYTES = 1 << 14  # more than NumPy takes for a safe header


def delivered_dtype(dtype: DTypeLike, what: str = "the recording") -> np.dtype[Any]:
    """Return the dtype in which samples stored as ``dtype`` are delivered.

    Parameters
    ----------
    dtype : dtype-like
        Type of the stored samples: int16, uint16, int32 or float32, in either byte order, or float64.
    what : str, optional
        What has this type, for the message.

    Returns
    -------
    numpy.dtype
        The same in native byte order; float32 for float64, whose extra digits no amplifier fills.

    Raises
    ------
    RecordingError
        If samples of this type are not supported.
    """
    try:
        native = np.dtype(dtype).newbyteorder("=")
    except TypeError as error:
        raise RecordingError(f"dtype={dtype!r} is not known to NumPy; use one of {', '.join(_DTYPES)}.") from error
    if native == np.float64:
        return np.dtype(np.float32)
    if native.name not in _DTYPES:
        raise RecordingError(
            f"{what} holds {native} samples; supported are {', '.join(_DTYPES)} (and float64, read as float32). "
            "Convert it, or name the type the samples really have (dtype)."
        )
    return native


@dataclass(frozen=True)
class BinarySource:
    """Samples in a flat binary file or object, channels interleaved (time-major).

    Attributes
    ----------
    path : str
        The file's absolute path, or the object's URL, so that it means the same to every worker.
    n_channels, n_samples : int
        Shape of what is read.
    file_dtype : numpy.dtype
        Type of the samples in the file.
    offset_bytes : int
        Where the first sample starts.
    """

    path: str
    n_channels: int
    n_samples: int
    file_dtype: np.dtype[Any]
    offset_bytes: int = 0

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], n_channels: int, dtype: DTypeLike = "int16", offset_bytes: int = 0
    ) -> BinarySource:
        """Look at a file's size and describe its samples.

        Parameters
        ----------
        path : path or URL
            The file.
        n_channels : int
            Channels in the file, sorted or not.
        dtype : dtype-like, optional
            Type of the samples.
        offset_bytes : int, optional
            Length of a header to skip.

        Raises
        ------
        RecordingError
            If there is no such file, it holds no samples, its size does not fit the channels, or samples of
            this type are not supported.
        """
        path = locate(path)
        size_bytes = _status(path).size_bytes
        delivered_dtype(dtype, path)
        file_dtype = np.dtype(dtype)
        if n_channels < 1:
            raise RecordingError(f"n_chan={n_channels}: a file has at least one channel.")
        if offset_bytes < 0:
            raise RecordingError(f"offset_bytes={offset_bytes} lies before the start of {path}; give 0 or more.")
        n_bytes = size_bytes - offset_bytes
        if n_bytes <= 0:
            raise RecordingError(f"{path} holds no samples ({size_bytes} bytes): there is nothing to sort.")
        n_samples, remainder = divmod(n_bytes, n_channels * file_dtype.itemsize)
        if remainder:
            raise RecordingError(
                f"{path} has {n_bytes} bytes of samples, which is not a multiple of {n_channels} channels × "
                f"{file_dtype.itemsize} bytes ({file_dtype}): {remainder} bytes are left over after {n_samples} "
                "samples. Check the number of channels (n_chan; all in the file, sync channels too) and dtype; "
                "a file that was cut short can be trimmed to a whole number of samples."
            )
        return cls(path, int(n_channels), n_samples, file_dtype, int(offset_bytes))

    @classmethod
    def open_npy(cls, path: str | os.PathLike[str]) -> BinarySource:
        """Read the header of a ``.npy`` file or object and describe its samples.

        Raises
        ------
        RecordingError
            If it is no ``.npy`` file or shorter than its header says, it is not two-dimensional, time is not stored
            first, or samples of its type are not supported.
        """
        path = locate(path)
        size_bytes = _status(path).size_bytes
        head = BytesIO(read_bytes(path, 0, min(size_bytes, _NPY_HEADER_BYTES)))
        try:
            version = npy.read_magic(head)
            if version not in _NPY_HEADERS:
                raise ValueError(f"it is of version {version}, known are {', '.join(map(str, _NPY_HEADERS))}")
            shape, is_fortran, dtype = _NPY_HEADERS[version](head)
            if size_bytes < (needed := head.tell() + math.prod(shape) * dtype.itemsize):
                raise ValueError(f"it has {size_bytes} bytes, by its header {needed}")
        except ValueError as error:
            raise RecordingError(f"{path} cannot be read as a .npy file: {error}.") from error
        _check_rank(shape, path)
        delivered_dtype(dtype, path)
        if is_fortran:
            raise RecordingError(
                f"{path} holds one channel after the other (Fortran order), so that no stretch of time can be read by "
                "itself. Save it in C order (numpy.ascontiguousarray), or as Zarr."
            )
        return cls(path, shape[1], shape[0], dtype, head.tell())

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.file_dtype)

    @property
    def flat_files(self) -> tuple[FlatFile, ...]:
        """The file."""
        return (FlatFile(self.path, self.file_dtype.str, self.offset_bytes, self.n_samples, self.n_channels),)

    @property
    def is_flat(self) -> bool:
        """Whether the file itself does not tell its shape, so that somebody has said it."""
        return self.offset_bytes == 0  # a header tells

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel); the file is open only meanwhile."""
        row_bytes = self.n_channels * self.file_dtype.itemsize
        content = read_bytes(self.path, self.offset_bytes + start * row_bytes, self.offset_bytes + stop * row_bytes)
        if len(content) < (stop - start) * row_bytes:
            raise RecordingError(
                f"{self.path} ends before sample {stop}: it has become shorter since it was opened, when it held "
                f"{self.n_samples} samples."
            )
        return np.frombuffer(content, self.file_dtype).reshape(-1, self.n_channels).astype(self.dtype, copy=False)

    def digest(self) -> str:
        """Hash of the file's name, size and time of change (of an object: its ETag), and of how it is read."""
        status = _status(self.path)
        return _hash(
            "binary",
            name_of(self.path),
            status.size_bytes,
            status.tag,
            self.n_channels,
            self.n_samples,
            self.file_dtype.str,
            self.offset_bytes,
        )

    @property
    def digest_is_exact(self) -> bool:
        """Yes, as far as times of change can be trusted."""
        return True


def _status(path: str) -> Status:
    found = status(path)
    if found is None:
        raise RecordingError(f"There is no {'object' if is_remote(path) else 'file'} {path}.")
    return found


@dataclass(frozen=True)
class ConcatenatedSource:
    """Several sources, one after the other in time.

    Attributes
    ----------
    sources : tuple of Source
        The parts, in order of time; all with the same channels and type.

    Raises
    ------
    RecordingError
        If there is no part, or two parts differ in channels or type.
    """

    sources: tuple[Source, ...]
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the parts fit together and find where each ends."""
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise RecordingError("No parts were given to join; give at least one.")
        first = self.sources[0]
        for number, part in enumerate(self.sources[1:], start=1):
            if part.n_channels != first.n_channels or part.dtype != first.dtype:
                raise RecordingError(
                    f"Parts cannot be joined in time: part {number} has {part.n_channels} channels of {part.dtype}, "
                    f"part 0 has {first.n_channels} of {first.dtype}. Join parts of one recording only."
                )
        object.__setattr__(self, "_ends", tuple(itertools.accumulate(part.n_samples for part in self.sources)))

    @property
    def n_samples(self) -> int:
        """Samples of all parts together."""
        return self._ends[-1]

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.sources[0].n_channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return self.sources[0].dtype

    @property
    def flat_files(self) -> tuple[FlatFile, ...] | str:
        """Those of all parts, or why one of them has none."""
        files: tuple[FlatFile, ...] = ()
        for part in self.sources:
            found = part.flat_files if part.n_samples else ()
            if isinstance(found, str):
                return found
            files += found
        return files

    @property
    def is_flat(self) -> bool:
        """Whether all parts are."""
        return all(getattr(part, "is_flat", False) for part in self.sources)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel), across the joints."""
        pieces = []
        part = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[part] - self.sources[part].n_samples
            piece_stop = min(stop, self._ends[part])
            if piece_stop > start:  # parts may be empty
                pieces.append(self.sources[part].read(start - begin, piece_stop - begin))
            start, part = piece_stop, part + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, self.n_channels), self.dtype)

    def digest(self) -> str:
        """Hash of the parts' hashes, in order."""
        return _hash("concatenated", *(part.digest() for part in self.sources))

    @property
    def digest_is_exact(self) -> bool:
        """Whether those of all parts are."""
        return all(part.digest_is_exact for part in self.sources)


class _OfArray:
    """What every source with an ``array`` of shape (time, channel) knows from it."""

    array: Any

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return int(self.array.shape[0])

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.array.dtype)


@dataclass(frozen=True, eq=False)
class ArraySource(_OfArray):
    """Samples in an array, or in anything that has a shape, a dtype and slices like one.

    NumPy arrays are sent to other processes with their data; memory maps of plain files become a
    :class:`BinarySource` (see :meth:`open`), which does not do that.

    Attributes
    ----------
    array : array-like, shape (time, channel)
        The samples. They must not change while the source is in use.
    """

    array: Any

    def __post_init__(self) -> None:
        """Check rank and type."""
        _check_rank(self.array.shape)
        delivered_dtype(self.array.dtype, "the array")

    @classmethod
    def open(cls, array: Any) -> ArraySource | BinarySource:
        """Describe the samples of an array; those of a memory map by the file they lie in.

        Parameters
        ----------
        array : array-like, shape (time, channel)
            NumPy array or memory map, ``h5py.Dataset``, ``zarr.Array``, …

        Raises
        ------
        RecordingError
            If it is not two-dimensional, or samples of its type are not supported.
        """
        source = cls(array)
        return _binary_of_memmap(array) or source

    @property
    def flat_files(self) -> str:
        """Why there are none; memory maps whose samples lie in order are a :class:`BinarySource`."""
        if isinstance(self.array, np.memmap) and self.array.filename is not None:
            return f"the samples lie in {self.array.filename} in another order or with gaps, or were changed since"
        kind = type(self.array)
        return f"the samples are those of an array ({kind.__module__.partition('.')[0]}.{kind.__qualname__})"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Copy samples ``start`` to ``stop``, shape (time, channel)."""
        return np.array(self.array[start:stop, :], dtype=self.dtype)

    def digest(self) -> str:
        """Hash of shape, type and all samples; beyond 256 MB of samples from 32 places."""
        n_spots = -(-self.n_samples // _DIGEST_SAMPLES) if self.digest_is_exact else _DIGEST_SPOTS
        return _content_hash("array", self, n_spots)

    @property
    def digest_is_exact(self) -> bool:
        """Whether all samples enter."""
        return self.n_samples * self.n_channels * self.dtype.itemsize <= _DIGEST_WHOLE_BYTES


@dataclass(frozen=True, eq=False)
class DaskSource(_OfArray):
    """Samples of a Dask array; what is read is computed where it is read.

    Attributes
    ----------
    array : dask.array.Array, shape (time, channel)
        The samples. The graph is sent to other processes with the source, so it should hold recipes rather
        than data.
    """

    array: dask.array.Array

    def __post_init__(self) -> None:
        """Check rank, type and that the length is known."""
        _check_rank(self.array.shape)
        delivered_dtype(self.array.dtype, "the Dask array")
        if np.isnan(self.array.shape).any():
            raise RecordingError(
                f"The Dask array has unknown lengths (shape {self.array.shape}); call compute_chunk_sizes() first."
            )

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return "the samples are computed by Dask as they are read"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Compute samples ``start`` to ``stop``, shape (time, channel), in this thread."""
        # Not on the ambient scheduler: inside a task that would wait for a worker which may be this one.
        block = self.array[start:stop].compute(scheduler="synchronous")
        return np.asarray(block).astype(self.dtype, copy=False)

    def to_dask(self) -> dask.array.Array:
        """Return the array itself, in the type that is delivered."""
        array: Any = self.array  # Dask's methods are untyped
        lazy: dask.array.Array = array.astype(self.dtype)
        return lazy

    def digest(self) -> str:
        """Hash of shape, type and samples from a few places (which are computed)."""
        return _content_hash("dask", self, n_spots=5)

    @property
    def digest_is_exact(self) -> bool:
        """No: some samples only."""
        return False


@dataclass(frozen=True)
class ZarrSource:
    """Samples in a Zarr array, version 2 or 3, in a folder or an object store; each process opens it at the first read.

    Attributes
    ----------
    path : str
        The array's folder, absolute, or its URL.
    n_samples, n_channels : int
        Its shape.
    file_dtype : numpy.dtype
        Type of the stored samples.
    chunk_samples : int
        Samples that are stored together; of sharded arrays, those of one chunk within a shard.
    version : str
        Tag of the array's metadata when it was described.
    is_complete : bool
        Whether all its chunks were stored then, so that one that is not there is an error, and not fill value.
    """

    path: str
    n_samples: int
    n_channels: int
    file_dtype: np.dtype[Any]
    chunk_samples: int
    version: str
    is_complete: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ZarrSource:
        """Read an array's metadata and describe its samples.

        Parameters
        ----------
        path : path or URL
            The array's own.

        Raises
        ------
        RecordingError
            If there is no such array, it is damaged or not two-dimensional, or samples of its type are not supported.
        """
        path = locate(path)
        version = zarr_metadata(path)
        if version is None:
            raise RecordingError(f"{path} is not a Zarr array: it has neither zarr.json nor .zarray.")
        array = open_zarr(path)
        if not hasattr(array, "shape"):
            raise RecordingError(f"{path} is a Zarr group; name the array within it.")
        _check_rank(array.shape, path)
        delivered_dtype(array.dtype, path)
        with zarr_explained(path, f"{path} has metadata that are damaged", "Copy it again."):
            n_samples, n_channels = map(operator.index, array.shape)
            if min(n_samples, n_channels) < 0:
                raise ValueError(f"shape {array.shape}")
            return cls(
                path,
                n_samples,
                n_channels,
                np.dtype(array.dtype),
                int(array.chunks[0]),
                version,
                check_chunks(path, array),
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.file_dtype)

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return f"{self.path} is a Zarr array, stored in chunks"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel)."""
        array = _opened_zarr(self.path, self.version, self.is_complete, surroundings())
        advice = "A chunk is damaged, or the disk fails. Copy the recording again, or leave this time out (tmin, tmax)."
        with zarr_explained(self.path, f"Samples {start} to {stop} of {self.path} cannot be read", advice):
            block = np.asarray(array[start:stop, :]).astype(self.dtype, copy=False)
            if len(block) < stop - start:
                raise RecordingError(
                    f"{self.path} ends before sample {stop}: it has become shorter since it was opened, when it held "
                    f"{self.n_samples} samples."
                )
            return block

    def digest(self) -> str:
        """Hash of names, sizes and times of change (of objects: ETags) of all that the array consists of.

        Where they cannot be listed, on web servers, of the metadata and of samples from a few places.
        """
        if self.digest_is_exact:
            return _hash("zarr", name_of(self.path), listing(self.path))
        return _content_hash(f"zarr {name_of(self.path)} {zarr_metadata(self.path)}", self, n_spots=5)

    @property
    def digest_is_exact(self) -> bool:
        """Whether chunks can be listed; otherwise one may be written anew without a trace in the metadata."""
        return can_list(self.path)


@lru_cache(maxsize=16)
def _opened_zarr(path: str, version: str, is_complete: bool, _: Hashable) -> Any:
    return open_zarr(path, patient=True, is_complete=is_complete)


def _check_rank(shape: tuple[int, ...], what: str = "the array") -> None:
    if len(shape) != 2:
        raise RecordingError(
            f"{what} has shape {tuple(shape)}; two dimensions are needed, (time, channel)."
            + (" A single channel is array[:, None]." if len(shape) == 1 else "")
        )


def _binary_of_memmap(array: Any) -> BinarySource | None:
    """Describe a memory map by its file; None if it is none, or its samples do not lie there in order."""
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous or not array.size:
        return None
    mapping = array
    while isinstance(mapping.base, np.memmap):
        mapping = mapping.base
    # In mode "c" changes stay in memory; a mapping without a name has no file to open again.
    if mapping.filename is None or mapping.mode == "c":
        return None
    offset_bytes = mapping.offset + _address(array) - _address(mapping)
    return BinarySource(
        os.path.abspath(mapping.filename), int(array.shape[1]), int(array.shape[0]), array.dtype, int(offset_bytes)
    )


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _content_hash(label: str, source: Source, n_spots: int) -> str:
    """Hash shape, type and evenly spaced stretches, from the first sample to the last (all, if they suffice)."""
    content = hashlib.sha256(repr((label, source.n_samples, source.n_channels, source.dtype.str)).encode())
    last = max(0, source.n_samples - _DIGEST_SAMPLES)
    for start in sorted({last * spot // max(1, n_spots - 1) for spot in range(n_spots)}):
        block = source.read(start, min(start + _DIGEST_SAMPLES, source.n_samples))
        content.update(np.ascontiguousarray(block).tobytes())
    return content.hexdigest()


def _hash(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def join(sources: Iterable[Source]) -> Source:
    """Return sources joined in time; a single one as it is."""
    parts = tuple(sources)
    return parts[0] if len(parts) == 1 else ConcatenatedSource(parts)
