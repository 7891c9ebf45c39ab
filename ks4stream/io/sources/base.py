"""What all sources share: the types they deliver, checks, and hashes of what they hold."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ks4stream.errors import RecordingError
from ks4stream.io.objects import Status, is_remote, status
from ks4stream.recording import Source

DIGEST_SAMPLES = 1024  # length of the stretches that enter a digest
_DTYPES = ("int16", "uint16", "int32", "float32")


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


def status_of(path: str) -> Status:
    """Look at the file or object that a source lies in.

    Raises
    ------
    RecordingError
        If there is none.
    """
    found = status(path)
    if found is None:
        raise RecordingError(f"There is no {'object' if is_remote(path) else 'file'} {path}.")
    return found


class OfArray:
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


def check_rank(shape: tuple[int, ...], what: str = "the array") -> None:
    """Check that there are two dimensions.

    Raises
    ------
    RecordingError
        If there are not.
    """
    if len(shape) != 2:
        raise RecordingError(
            f"{what} has shape {tuple(shape)}; two dimensions are needed, (time, channel)."
            + (" A single channel is array[:, None]." if len(shape) == 1 else "")
        )


def content_hash(label: str, source: Source, n_spots: int) -> str:
    """Hash shape, type and evenly spaced stretches, from the first sample to the last (all, if they suffice)."""
    content = hashlib.sha256(repr((label, source.n_samples, source.n_channels, source.dtype.str)).encode())
    last = max(0, source.n_samples - DIGEST_SAMPLES)
    for start in sorted({last * spot // max(1, n_spots - 1) for spot in range(n_spots)}):
        block = source.read(start, min(start + DIGEST_SAMPLES, source.n_samples))
        content.update(np.ascontiguousarray(block).tobytes())
    return content.hexdigest()


def hash_of(*facts: Any) -> str:
    """Hash of plain values, the same in every process."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()
