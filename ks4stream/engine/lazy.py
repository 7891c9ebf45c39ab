"""Preprocessed traces as a lazy array, for people and for other libraries; the stages do not need it."""

from __future__ import annotations

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from ks4stream.engine.base import one_thread
from ks4stream.stages.preprocessing import Preprocessor


def whitened_traces(tiles: Preprocessor) -> xr.DataArray:
    """Whitened (and drift-corrected) traces of all batches; nothing is read until they are computed.

    Returns
    -------
    xarray.DataArray of float32
        dims ``time, channel`` over Dask, one chunk per batch. Coordinates: ``time`` (sample of the recording),
        ``channel`` (column of the file), ``x_um``, ``y_um``, ``shank``.
    """
    tiling, probe = tiles.tiling, tiles.probe
    sizes = tuple(tile.stop - tile.start for tile in tiling)
    traces: da.Array = da.map_blocks(  # type: ignore[no-untyped-call]
        _whitened,
        da.arange(len(tiling), chunks=1),
        tiles=delayed(tiles, pure=False),  # one node of the graph, not a copy in every task
        chunks=(sizes, (probe.n_channels,)),
        new_axis=1,
        dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
    )
    found = xr.DataArray(
        traces,
        dims=("time", "channel"),
        coords={
            "channel": probe.chan_map,
            "x_um": ("channel", probe.x_um),
            "y_um": ("channel", probe.y_um),
            "shank": ("channel", probe.shank),
        },
        attrs={"sampling_rate_hz": tiles.recording.sampling_rate_hz, "unit": "noise s.d."},
        name="traces",
    )
    if tiling.step == 1:
        time = found.get_index("time") + tiling.start  # a range, which needs no memory
    else:  # some batches are skipped
        time = np.concatenate([np.arange(tile.start, tile.stop) for tile in tiling])
    return found.assign_coords(time=time)


def _whitened(index: NDArray[np.int64], tiles: Preprocessor) -> NDArray[np.float32]:
    tile = tiles.tiling[int(index[0])]
    with one_thread():
        traces, _ = tiles.whitened(tile)
        found: NDArray[np.float32] = traces[:, tiles.core(tile)].T.contiguous().cpu().numpy()
        return found
