"""Recordings compressed by mtscomp: ``.cbin``, with the index ``.ch`` next to it.

Written from mtscomp's description of its format: chunks of time, each compressed separately by zlib; within a chunk,
each sample is stored as the difference from the previous one, and optionally from the previous channel; the index is
JSON.
"""

from __future__ import annotations

import bisect
import json
import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.objects import locate, name_of, read_bytes, read_metadata, status
from ks4stream.io.sources.base import File, OfPath, Opened, delivered_dtype, hash_of, status_of


@dataclass(frozen=True)
class CbinSource(OfPath):
    """Samples in a ``.cbin`` file or object.

    Attributes
    ----------
    path : str
        The file's absolute path, or the object's URL.
    n_channels : int
    file_dtype : numpy.dtype
        Type of the samples.
    bounds : tuple of int
        First sample of each chunk, and the end.
    offsets : tuple of int
        Where each chunk lies in the file, and the end.
    order : str
        "F" if a chunk holds one channel after the other, "C" if it holds one sample after the other.
    is_time_diff, is_channel_diff : bool
        Whether differences from the previous sample, and from the previous channel, are stored.
    sampling_rate_hz : float
    """

    path: str
    n_channels: int
    file_dtype: np.dtype[Any]
    bounds: tuple[int, ...]
    offsets: tuple[int, ...]
    order: str
    is_time_diff: bool
    is_channel_diff: bool
    sampling_rate_hz: float

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CbinSource:
        """Read the index of a ``.cbin``.

        Raises
        ------
        RecordingError
            If there is none, it is damaged, it belongs to another file, or the type is not supported.
        """
        path = locate(path)
        index_path = os.path.splitext(path)[0] + ".ch"
        found, index_found = status(path), status(index_path)
        if found is None or index_found is None:
            raise RecordingError(f"There is no {index_path if found else path}; a .cbin needs the .ch next to it.")
        try:
            index = json.loads(read_metadata(index_path, index_found.size_bytes))
            if index["algorithm"] != "zlib" or index["chunk_order"] not in ("C", "F"):
                raise ValueError(f"algorithm {index['algorithm']}, order {index['chunk_order']} is not supported")
            source = cls(
                path,
                int(index["n_channels"]),
                np.dtype(index["dtype"]),
                tuple(map(int, index["chunk_bounds"])),
                tuple(map(int, index["chunk_offsets"])),
                index["chunk_order"],
                bool(index["do_time_diff"]),
                bool(index["do_spatial_diff"]),
                float(index["sample_rate"]),
            )
            edges = source.bounds, source.offsets
            if len(edges[0]) != len(edges[1]) or any(each[:1] != (0,) or sorted(each) != [*each] for each in edges):
                raise ValueError("its chunks are not contiguous")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RecordingError(
                f"{index_path} is not a valid mtscomp index ({type(error).__name__}: {error}). Copy it again."
            ) from error
        delivered_dtype(source.file_dtype, path)
        if found.size_bytes != source.offsets[-1]:
            raise RecordingError(
                f"{path} has {found.size_bytes} bytes, but {name_of(index_path)} says {source.offsets[-1]}: copy both "
                "again."
            )
        return source

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return self.bounds[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.file_dtype)

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return f"{self.path} is compressed by mtscomp"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel); whole chunks are decompressed."""
        block = np.empty((stop - start, self.n_channels), self.dtype)
        chunk = bisect.bisect_right(self.bounds, start) - 1
        while start < stop:
            begin, end = self.bounds[chunk : chunk + 2]
            piece_stop = min(stop, end)
            if piece_stop > start:
                block[len(block) - (stop - start) :][: piece_stop - start] = self._chunk(chunk)[
                    start - begin : piece_stop - begin
                ]
            start, chunk = piece_stop, chunk + 1
        return block

    def _chunk(self, number: int) -> NDArray[Any]:
        """Decompress a chunk, shape (time, channel)."""
        n_samples = self.bounds[number + 1] - self.bounds[number]
        content = read_bytes(self.path, *self.offsets[number : number + 2])
        n_bytes = n_samples * self.n_channels * self.file_dtype.itemsize
        try:
            stream = zlib.decompressobj()
            unpacked = stream.decompress(content, n_bytes + 1)  # a few bytes may unpack to gigabytes
            if len(unpacked) != n_bytes or not stream.eof:
                raise ValueError(f"they should unpack to {n_bytes} bytes")
            values = np.frombuffer(unpacked, self.file_dtype)
            chunk = values.reshape((n_samples, self.n_channels), order=self.order)  # type: ignore[call-overload]
        except (zlib.error, ValueError) as error:
            raise RecordingError(
                f"Samples {self.bounds[number]} to {self.bounds[number + 1]} of {self.path} are damaged ({error}). "
                "Copy it again, or exclude this time (tmin, tmax)."
            ) from error
        # Differences and sums wrap in the same way, so overflow does no harm.
        for axis, is_diff in ((1, self.is_channel_diff), (0, self.is_time_diff)):
            if is_diff:
                chunk = np.cumsum(chunk, axis=axis, dtype=self.file_dtype)
        return chunk

    def digest(self) -> str:
        """Hash of the file's name, size and time of change (of an object: its ETag), and of how it is read."""
        found = status_of(self.path)
        return hash_of(
            "cbin", name_of(self.path), found.size_bytes, found.tag, self.n_channels, self.bounds, self.offsets
        )

    @property
    def digest_is_exact(self) -> bool:
        """Yes, if modification times can be trusted."""
        return True


def opens(file: File) -> Opened | None:
    """Open a ``.cbin`` by its index, which has the sampling rate but no contacts."""
    if not file.path.lower().endswith(".cbin"):
        return None
    source = CbinSource.open(file.path)
    return Opened(source, name_of(file.path), (file.path,), source.sampling_rate_hz)
