"""``.npy`` files, on a disk or an object store."""

from __future__ import annotations

import numpy as np

from ks4stream.errors import RecordingError
from ks4stream.io.formats import is_npy
from ks4stream.io.objects import is_remote, name_of
from ks4stream.io.sources.array import ArraySource
from ks4stream.io.sources.base import File, Opened, time_first
from ks4stream.io.sources.binary import BinarySource


def opens(file: File) -> Opened | None:
    """Open a file by its header; files on a disk as memory maps, whose samples may be in any order."""
    path, name = file.path, name_of(file.path)
    if not (path.lower().endswith(".npy") or is_npy(file.head)):
        return None
    if is_remote(path):
        return Opened(time_first(BinarySource.open_npy(path), name), name, (path,))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path} cannot be read as a .npy file: {error}.") from error
    return Opened(time_first(ArraySource.open(array), name), name, (path,))
