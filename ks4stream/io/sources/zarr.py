"""Samples in a Zarr array, in a folder or an object store."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io.objects import can_list, child, credentials_key, listing, locate, name_of
from ks4stream.io.probes import load_probe
from ks4stream.io.sources.base import (
    File,
    OfPath,
    Opened,
    check_rank,
    content_hash,
    delivered_dtype,
    hash_of,
    rate_of,
    time_first,
)
from ks4stream.io.sources.joined import join
from ks4stream.io.zarrs import check_chunks, open_zarr, translate_zarr_errors, zarr_metadata
from ks4stream.messages import warn
from ks4stream.probe import Probe


@dataclass(frozen=True)
class ZarrSource(OfPath):
    """Samples in a Zarr array, version 2 or 3, in a folder or an object store; each process opens it at the first read.

    Attributes
    ----------
    path : str
        The array's folder, absolute, or its URL.
    n_samples, n_channels : int
        Its shape.
    file_dtype : numpy.dtype
        Type of the stored samples.
    length : int
        Number of samples per chunk; for sharded arrays, per chunk within a shard.
    version : str
        Version tag of the array's metadata when the source was created.
    is_complete : bool
        Whether all its chunks were stored then, so that a missing one is an error and not the fill value.
    """

    path: str
    n_samples: int
    n_channels: int
    file_dtype: np.dtype[Any]
    length: int
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
            If the array does not exist, is damaged, is not two-dimensional, or has a type that is not supported.
        """
        path = locate(path)
        version = zarr_metadata(path)
        if version is None:
            raise RecordingError(f"{path} is not a Zarr array: it has neither zarr.json nor .zarray.")
        array = open_zarr(path)
        if not hasattr(array, "shape"):
            raise RecordingError(f"{path} is a Zarr group; give the path of the array within it.")
        check_rank(array.shape, path)
        delivered_dtype(array.dtype, path)
        with translate_zarr_errors(path, f"The metadata of {path} are damaged", "Copy it again."):
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
    def chunk_samples(self) -> int:
        """Number of samples per chunk."""
        return self.length

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return f"{self.path} is a Zarr array, stored in chunks"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel)."""
        array = _opened_zarr(self.path, self.version, self.is_complete, credentials_key())
        advice = "A chunk is damaged, or the disk is failing. Copy it again, or exclude this time (tmin, tmax)."
        with translate_zarr_errors(self.path, f"Samples {start} to {stop} of {self.path} cannot be read", advice):
            block = np.asarray(array[start:stop, :]).astype(self.dtype, copy=False)
            if len(block) < stop - start:
                raise RecordingError(
                    f"{self.path} ends before sample {stop}: it has been truncated since it was opened, when it held "
                    f"{self.n_samples} samples."
                )
            return block

    def digest(self) -> str:
        """Hash of names, sizes and times of change (of objects: ETags) of all files of the array.

        If they cannot be listed, as on web servers: hash of the metadata and of samples from a few places.
        """
        if self.digest_is_exact:
            return hash_of("zarr", name_of(self.path), listing(self.path))
        return content_hash(f"zarr {name_of(self.path)} {zarr_metadata(self.path)}", self, n_spots=5)

    @property
    def digest_is_exact(self) -> bool:
        """Whether chunks can be listed; otherwise one may be rewritten without changing the metadata."""
        return can_list(self.path)


@lru_cache(maxsize=16)
def _opened_zarr(path: str, version: str, is_complete: bool, _: Hashable) -> Any:
    return open_zarr(path, patient=True, is_complete=is_complete)


def opens(file: File) -> Opened | None:
    """Open an array, a group that holds one, or a Zarr folder written by SpikeInterface."""
    path = file.path
    if zarr_metadata(path) is None:
        return None
    node = open_zarr(path)
    with translate_zarr_errors(path, f"{path} cannot be read", "It may be damaged; copy it again."):
        names = [] if hasattr(node, "shape") else _trace_arrays(node, path)
        attrs = dict(node.attrs) | (dict(node[names[0]].attrs) if names else {})
        gain_uv, offset_uv = attrs.get("gain_uv"), attrs.get("offset_uv")
        if names and gain_uv is None:
            gain_uv = _common_value(node, "gain_to_uV") or None  # a gain of 0 is not valid
            offset_uv = _common_value(node, "offset_to_uV")
    source = join(ZarrSource.open(child(path, name)) for name in names) if names else ZarrSource.open(path)
    name = name_of(path)
    return Opened(
        time_first(source, name),
        name,
        (path,),
        rate_of(attrs),
        gain_uv,
        offset_uv,
        lambda: _probe_of_attrs(attrs, path),
    )


def _trace_arrays(group: Any, path: str) -> list[str]:
    """Names of the arrays that hold traces: SpikeInterface's segments in order, or the only 2-D array."""
    n_segments = group.attrs.get("num_segments")
    if n_segments:  # given by SpikeInterface, so nothing need be listed
        if not isinstance(n_segments, int):
            raise RecordingError(f"{path}: num_segments={n_segments!r} is not a whole number. Copy it again.")
        names: list[str] = []
        while len(names) < n_segments and (name := f"traces_seg{len(names)}") in group:
            names.append(name)
        if not names or len(names) < n_segments:
            raise RecordingError(
                f"{path} should hold {n_segments} segment(s), but traces_seg{len(names)} cannot be found. Copy it "
                "again."
            )
        return names
    if not can_list(path):
        raise RecordingError(f"{path} is a Zarr group on a web server; give the array's own address, {path}/NAME.")
    arrays = dict(group.arrays())
    tables = [name for name, array in arrays.items() if len(array.shape) == 2]
    if len(tables) != 1:
        raise RecordingError(
            f"{path} is a Zarr group with {len(tables)} two-dimensional arrays; it must have exactly one. Give the "
            f"path of the array with the traces, {path}/NAME"
            + (f", where NAME is one of {', '.join(sorted(tables))}." if tables else ".")
        )
    return tables


def _common_value(group: Any, name: str) -> float | None:
    """Value of a SpikeInterface channel property; None if channels differ or it is missing."""
    if f"properties/{name}" not in group:
        return None
    values = np.unique(np.asarray(group[f"properties/{name}"][:], np.float64))
    return float(values[0]) if len(values) == 1 else None


def _probe_of_attrs(attrs: Mapping[str, Any], path: str) -> Probe | None:
    """The probe that SpikeInterface stored with its recording."""
    content = attrs.get("probegroup") or attrs.get("probe")
    if not isinstance(content, Mapping):
        return None
    try:
        return replace(load_probe(content), name=os.path.splitext(name_of(path))[0])
    except ProbeError as error:  # the samples can be read, and another probe can be given
        warn(f"The probe stored in {path} is ignored: {error}")
        return None
