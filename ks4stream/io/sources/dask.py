"""Samples of a Dask array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.sources.base import OfArray, check_rank, content_hash, delivered_dtype

if TYPE_CHECKING:
    import dask.array


@dataclass(frozen=True, eq=False)
class DaskSource(OfArray):
    """Samples of a Dask array; they are computed by the process that reads them.

    Attributes
    ----------
    array : dask.array.Array, shape (time, channel)
        The samples. The graph is sent to other processes with the source, so it should not contain the data
        itself.
    """

    array: dask.array.Array

    def __post_init__(self) -> None:
        """Check rank, type and that the length is known."""
        check_rank(self.array.shape)
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
        # Not on the active scheduler: inside a task, that would wait for a worker, which may be this one.
        block = self.array[start:stop].compute(scheduler="synchronous")
        return np.asarray(block).astype(self.dtype, copy=False)

    def to_dask(self) -> dask.array.Array:
        """Return the array itself, in the type in which samples are delivered."""
        array: Any = self.array  # Dask's methods are untyped
        lazy: dask.array.Array = array.astype(self.dtype)
        return lazy

    def digest(self) -> str:
        """Hash of shape, type and samples from a few places (which are computed)."""
        return content_hash("dask", self, n_spots=5)

    @property
    def digest_is_exact(self) -> bool:
        """No: only some samples are hashed."""
        return False
