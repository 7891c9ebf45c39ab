"""Samples in an array, or in anything that has a shape and a dtype and can be sliced like one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.io.sources.base import DIGEST_SAMPLES, OfArray, check_rank, content_hash, delivered_dtype
from ks4stream.io.sources.binary import BinarySource, binary_of_memmap

_DIGEST_WHOLE_BYTES = 2**28  # an array in memory up to this size is hashed completely, …
_DIGEST_SPOTS = 32  # … a larger one in this many places


@dataclass(frozen=True, eq=False)
class ArraySource(OfArray):
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
        check_rank(self.array.shape)
        delivered_dtype(self.array.dtype, "the array")

    @classmethod
    def open(cls, array: Any) -> ArraySource | BinarySource:
        """Describe the samples of an array; those of a memory map by the file that holds them.

        Parameters
        ----------
        array : array-like, shape (time, channel)
            NumPy array or memory map, ``h5py.Dataset``, ``zarr.Array``, …

        Raises
        ------
        RecordingError
            If it is not two-dimensional, or its type is not supported.
        """
        source = cls(array)
        return binary_of_memmap(array) or source

    @property
    def flat_files(self) -> str:
        """Why there are none; memory maps whose samples lie in order are a :class:`BinarySource`."""
        if isinstance(self.array, np.memmap) and self.array.filename is not None:
            return f"the samples lie in {self.array.filename} in another order or with gaps, or were changed since"
        kind = type(self.array)
        return f"the samples are those of an array ({kind.__module__.partition('.')[0]}.{kind.__qualname__})"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Copy samples ``start`` to ``stop``, shape (time, channel); slices of time are all that it asks for."""
        return np.array(self.array[start:stop], dtype=self.dtype)

    def digest(self) -> str:
        """Hash of shape, type and all samples; of arrays over 256 MB, of samples from 32 places."""
        n_spots = -(-self.n_samples // DIGEST_SAMPLES) if self.digest_is_exact else _DIGEST_SPOTS
        return content_hash("array", self, n_spots)

    @property
    def digest_is_exact(self) -> bool:
        """Whether all samples are hashed."""
        return self.n_samples * self.n_channels * self.dtype.itemsize <= _DIGEST_WHOLE_BYTES
