"""Samples in a Zarr array, in a folder or an object store."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.objects import can_list, listing, locate, name_of, surroundings
from ks4stream.io.sources.base import check_rank, content_hash, delivered_dtype, hash_of
from ks4stream.io.zarrs import check_chunks, open_zarr, zarr_explained, zarr_metadata


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
        check_rank(array.shape, path)
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
            return hash_of("zarr", name_of(self.path), listing(self.path))
        return content_hash(f"zarr {name_of(self.path)} {zarr_metadata(self.path)}", self, n_spots=5)

    @property
    def digest_is_exact(self) -> bool:
        """Whether chunks can be listed; otherwise one may be written anew without a trace in the metadata."""
        return can_list(self.path)


@lru_cache(maxsize=16)
def _opened_zarr(path: str, version: str, is_complete: bool, _: Hashable) -> Any:
    return open_zarr(path, patient=True, is_complete=is_complete)
