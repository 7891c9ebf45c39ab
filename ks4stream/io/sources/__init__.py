"""Where samples come from: one file per format, all behind :class:`~ks4stream.recording.Source`.

Each is a frozen value that checks itself on construction, reads only what it is asked for, and delivers native
int16, uint16, int32 or float32. Those that read files hold the path and not the data, so that they can
be sent to any worker that sees the file or the store.

The module of a format also has ``opens(file)``, which returns what a file holds, or None if it has another format;
:func:`~ks4stream.io.recordings.open_recording` asks them in turn.
"""

from ks4stream.io.sources.array import ArraySource
from ks4stream.io.sources.base import delivered_dtype
from ks4stream.io.sources.binary import BinarySource
from ks4stream.io.sources.cbin import CbinSource
from ks4stream.io.sources.dask import DaskSource
from ks4stream.io.sources.hdf5 import Hdf5Source
from ks4stream.io.sources.joined import ConcatenatedSource, join
from ks4stream.io.sources.zarr import ZarrSource

__all__ = [
    "ArraySource",
    "BinarySource",
    "CbinSource",
    "ConcatenatedSource",
    "DaskSource",
    "Hdf5Source",
    "ZarrSource",
    "delivered_dtype",
    "join",
]
