"""Dask arrays are computed only where they are read."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray
from sample_files import SAMPLES

from ks4stream.errors import RecordingError
from ks4stream.io.sources import DaskSource


def test_dask_arrays_are_computed_only_where_read() -> None:
    computed: list[int] = []

    def block(block_id: tuple[int, int]) -> NDArray[Any]:
        computed.append(block_id[0])
        return np.full((10, 2), block_id[0], np.int16)

    array = da.map_blocks(block, chunks=((10,) * 5, (2,)), dtype=np.int16, meta=np.empty((0, 0), np.int16))
    source = DaskSource(array)
    assert computed == []
    assert source.read(18, 22)[:, 0].tolist() == [1, 1, 2, 2]
    assert sorted(computed) == [1, 2]


def test_dask_arrays_of_unknown_length_are_refused() -> None:
    array = da.from_array(SAMPLES, chunks=(5, 3))
    with pytest.raises(RecordingError, match="compute_chunk_sizes"):
        DaskSource(array[array[:, 0] > 3])
