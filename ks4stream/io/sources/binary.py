"""Samples in a flat binary file or a ``.npy`` file, on a disk or an object store."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.objects import locate, name_of, read_bytes
from ks4stream.io.sources.base import File, OfPath, Opened, check_rank, delivered_dtype, hash_of, status_of
from ks4stream.io.spikeglx import warn_of_lf
from ks4stream.recording import FlatFile

_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_NPY_HEADER_BYTES = 1 << 14  # more than the longest header that NumPy considers safe


@dataclass(frozen=True)
class BinarySource(OfPath):
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
            If the file does not exist, is empty, or has a size that does not fit the number of channels; or if the
            type is not supported.
        """
        path = locate(path)
        size_bytes = status_of(path).size_bytes
        delivered_dtype(dtype, path)
        file_dtype = np.dtype(dtype)
        if n_channels < 1:
            raise RecordingError(
                f"n_chan={n_channels} is not possible; give the number of channels in the file, 1 or more."
            )
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
                "samples. Check the number of channels (n_chan; all in the file, including sync channels) and dtype; "
                "a truncated file can be trimmed to a whole number of samples."
            )
        return cls(path, int(n_channels), n_samples, file_dtype, int(offset_bytes))

    @classmethod
    def open_npy(cls, path: str | os.PathLike[str]) -> BinarySource:
        """Read the header of a ``.npy`` file or object and describe its samples.

        Raises
        ------
        RecordingError
            If it is not a ``.npy`` file or is shorter than its header says, it is not two-dimensional, time is not
            stored first, or its type is not supported.
        """
        path = locate(path)
        size_bytes = status_of(path).size_bytes
        head = BytesIO(read_bytes(path, 0, min(size_bytes, _NPY_HEADER_BYTES)))
        try:
            version = npy.read_magic(head)
            if version not in _NPY_HEADERS:
                raise ValueError(f"its version is {version}; supported are {', '.join(map(str, _NPY_HEADERS))}")
            shape, is_fortran, dtype = _NPY_HEADERS[version](head)
            if size_bytes < (needed := head.tell() + math.prod(shape) * dtype.itemsize):
                raise ValueError(f"it has {size_bytes} bytes, but its header says {needed}")
        except ValueError as error:
            raise RecordingError(f"{path} cannot be read as a .npy file: {error}.") from error
        check_rank(shape, path)
        delivered_dtype(dtype, path)
        if is_fortran:
            raise RecordingError(
                f"{path} holds one channel after the other (Fortran order), so a stretch of time cannot be read by "
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
        """Whether the file does not store its shape, so that the caller gave it."""
        return self.offset_bytes == 0  # otherwise a header has it

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel); the file is not kept open."""
        row_bytes = self.n_channels * self.file_dtype.itemsize
        content = read_bytes(self.path, self.offset_bytes + start * row_bytes, self.offset_bytes + stop * row_bytes)
        if len(content) < (stop - start) * row_bytes:
            raise RecordingError(
                f"{self.path} ends before sample {stop}: it has been truncated since it was opened, when it held "
                f"{self.n_samples} samples."
            )
        return np.frombuffer(content, self.file_dtype).reshape(-1, self.n_channels).astype(self.dtype, copy=False)

    def digest(self) -> str:
        """Hash of the file's name, size and time of change (of an object: its ETag), and of how it is read."""
        status = status_of(self.path)
        return hash_of(
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
        """Yes, if modification times can be trusted."""
        return True


def binary_of_memmap(array: Any) -> BinarySource | None:
    """Describe a memory map by its file; None if it is not one, or its samples are not in order in the file."""
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous or not array.size:
        return None
    mapping = array
    while isinstance(mapping.base, np.memmap):
        mapping = mapping.base
    # Changes to a mapping in mode "c" exist only in memory, and an anonymous mapping cannot be reopened by a name.
    if mapping.filename is None or mapping.mode == "c":
        return None
    offset_bytes = mapping.offset + _address(array) - _address(mapping)
    return BinarySource(
        os.path.abspath(mapping.filename), int(array.shape[1]), int(array.shape[0]), array.dtype, int(offset_bytes)
    )


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def opens(file: File) -> Opened:
    """Open any file as what the caller said it is."""
    path = file.path
    if file.n_chan is None:
        raise RecordingError(
            f"{path} is a flat binary file and does not give its number of channels; give n_chan (all in the "
            "file, including sync channels; n_chan_bin in run_kilosort)."
        )
    source = BinarySource.open(path, file.n_chan, "int16" if file.dtype is None else file.dtype)
    if path.lower().endswith(".lf.bin"):
        warn_of_lf(path)
    return Opened(source, name_of(path), (path,))
