"""What all formats share: files and opened sources, the types that sources deliver, checks, and hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from ks4stream.errors import RecordingError
from ks4stream.io.formats import HEAD_BYTES, folder_refusal
from ks4stream.io.objects import Status, is_remote, read_bytes, status
from ks4stream.io.spikeglx import SpikeGLXMeta
from ks4stream.probe import Probe
from ks4stream.recording import BaseSource, Source

DIGEST_SAMPLES = 1024  # length of the stretches that are hashed
_DTYPES = ("int16", "uint16", "int32", "float32")
_TRANSPOSE = " Time must be the first axis: transpose the array (array.T)."
_RATE_NAMES = ("sampling_rate_hz", "sampling_frequency", "fs")  # ours, SpikeInterface's, Kilosort's

AnySource = TypeVar("AnySource", bound=Source)


@dataclass(frozen=True)
class File:
    """A file, a folder or an object that may hold a recording, and what the caller said about it.

    Attributes
    ----------
    path : str
        Its location.
    n_chan : int or None
    dtype : dtype-like or None
    """

    path: str
    n_chan: int | None = None
    dtype: DTypeLike | None = None

    @cached_property
    def head(self) -> bytes:
        """Its first bytes.

        Raises
        ------
        RecordingError
            If it is a folder, or does not exist.
        """
        if os.path.isdir(self.path):
            raise RecordingError(folder_refusal(self.path))
        found = status(self.path)
        if found is None:
            raise RecordingError(
                f"There is no {'object, Zarr array or Zarr group' if is_remote(self.path) else 'file'} {self.path}."
                + " Check bucket and key; keys must not be percent-encoded." * is_remote(self.path)
            )
        return bytes(read_bytes(self.path, 0, min(HEAD_BYTES, found.size_bytes)))


def _no_probe() -> Probe | None:
    return None


@dataclass(frozen=True)
class Opened:
    """A source, and its metadata.

    Attributes
    ----------
    source : Source
    name : str
        For messages.
    files : tuple of str
        The files that hold the samples.
    sampling_rate_hz, gain_uv, offset_uv : float or None
        None if the metadata do not give them, or they differ between channels.
    find_probe : callable
        Returns the probe, or None; only called if no other one is given.
    meta : SpikeGLXMeta or None
    """

    source: Source
    name: str
    files: tuple[str, ...] = ()
    sampling_rate_hz: float | None = None
    gain_uv: float | None = None
    offset_uv: float | None = None
    find_probe: Callable[[], Probe | None] = _no_probe
    meta: SpikeGLXMeta | None = None

    def check(self, n_chan: int | None, dtype: DTypeLike | None) -> None:
        """Compare the source with what the caller said about it.

        Raises
        ------
        RecordingError
            If they differ.
        """
        source = self.source
        if n_chan is not None and n_chan != source.n_channels:
            raise RecordingError(
                f"n_chan={n_chan}, but {self.name} has {source.n_samples} samples of {source.n_channels} channels."
                + (_TRANSPOSE if n_chan == source.n_samples else " Correct n_chan or leave it out.")
            )
        if dtype is not None and delivered_dtype(dtype, "dtype") != source.dtype:
            raise RecordingError(
                f"dtype={dtype}, but {self.name} holds {source.dtype} samples. Leave dtype out, or convert the array."
            )


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
        The same in native byte order; float32 for float64, whose extra precision no amplifier has.

    Raises
    ------
    RecordingError
        If samples of this type are not supported.
    """
    try:
        native = np.dtype(dtype).newbyteorder("=")
    except TypeError as error:
        raise RecordingError(f"dtype={dtype!r} is not a NumPy dtype; use one of {', '.join(_DTYPES)}.") from error
    if native == np.float64:
        return np.dtype(np.float32)
    if native.name not in _DTYPES:
        raise RecordingError(
            f"{what} holds {native} samples; supported are {', '.join(_DTYPES)} (and float64, read as float32). "
            "Convert it, or give the type that the samples really have (dtype)."
        )
    return native


def status_of(path: str) -> Status:
    """Size and version of the file or object that holds a source.

    Raises
    ------
    RecordingError
        If there is none.
    """
    found = status(path)
    if found is None:
        raise RecordingError(f"There is no {'object' if is_remote(path) else 'file'} {path}.")
    return found


class OfPath(BaseSource):
    """A source of the file or object at a ``path``."""

    path: str

    @property
    def is_remote(self) -> bool:
        """Whether it is an object."""
        return is_remote(self.path)


class OfSource(BaseSource):
    """What is true of a source if it is true of the ``source`` that it reads."""

    source: Source

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return self.source.n_samples

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.source.n_channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return self.source.dtype

    @property
    def is_remote(self) -> bool:
        """Whether samples are fetched over a network."""
        return self.source.is_remote

    @property
    def only_here(self) -> str:
        """Why other processes cannot read the samples; empty if they can."""
        return self.source.only_here

    @property
    def digest_is_exact(self) -> bool:
        """Whether any change of the samples changes the digest."""
        return self.source.digest_is_exact


class OfArray(BaseSource):
    """Shape and type of a source with an ``array`` of shape (time, channel)."""

    array: Any

    @property
    def is_remote(self) -> bool:
        """Whether samples are fetched over a network: what the array does is not known."""
        return False

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


def check_rank(shape: tuple[int, ...], what: str = "the array") -> None:
    """Check that there are two dimensions.

    Raises
    ------
    RecordingError
        If there are not.
    """
    if len(shape) != 2:
        raise RecordingError(
            f"{what} has shape {tuple(shape)}; it must have two dimensions, (time, channel)."
            + (" For a single channel, use array[:, None]." if len(shape) == 1 else "")
        )


def content_hash(label: str, source: Source, n_spots: int) -> str:
    """Hash shape, type and evenly spaced stretches from the first sample to the last (everything, if it is short)."""
    content = hashlib.sha256(repr((label, source.n_samples, source.n_channels, source.dtype.str)).encode())
    last = max(0, source.n_samples - DIGEST_SAMPLES)
    for start in sorted({last * spot // max(1, n_spots - 1) for spot in range(n_spots)}):
        block = source.read(start, min(start + DIGEST_SAMPLES, source.n_samples))
        content.update(np.ascontiguousarray(block).tobytes())
    return content.hexdigest()


def hash_of(*facts: Any) -> str:
    """Hash of plain values, the same in every process."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def time_first(source: AnySource, name: str) -> AnySource:
    """Return the source if it has more samples than channels: unlike a flat file, an array may come transposed."""
    if 0 < source.n_samples < source.n_channels:
        raise RecordingError(
            f"{name} has shape ({source.n_samples}, {source.n_channels}): more channels than samples." + _TRANSPOSE
        )
    return source


def checked_rate(fs: float) -> float:
    """Return a sampling rate as a number.

    Raises
    ------
    RecordingError
        If it is not a number.
    """
    try:
        return float(fs)
    except (TypeError, ValueError):
        raise RecordingError(
            f"fs={fs!r} is not a sampling rate; it must be a positive number of samples per second."
        ) from None


def rate_of(attrs: Mapping[Any, Any]) -> float | None:
    """Sampling rate from the attributes of an array; None if they do not have one."""
    for name in _RATE_NAMES:
        if attrs.get(name) is not None:
            return checked_rate(attrs[name])
    return None
