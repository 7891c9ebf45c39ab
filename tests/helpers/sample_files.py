"""A few samples, in memory and in files of several formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

SAMPLES = (np.arange(90).reshape(30, 3) * 7 % 100).astype(np.int16)


def write(path: Path, array: NDArray[Any], header: bytes = b"") -> Path:
    path.write_bytes(header + array.tobytes())
    return path


def write_zarr(path: Path, array: NDArray[Any], zarr_format: int = 2) -> Path:
    # Zarr 2 of the library has one format and no argument for it.
    options = {"zarr_format": zarr_format} if int(zarr.__version__.split(".")[0]) >= 3 else {}
    stored = zarr.open_array(str(path), mode="w", shape=array.shape, dtype=array.dtype, chunks=(7, 2), **options)
    stored[:] = array
    return path
