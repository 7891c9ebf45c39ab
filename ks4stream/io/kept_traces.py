"""Traces of a short recording, kept on disk while it is sorted, because several stages need them.

The folder lies beside the folders of the stages. It is made when a run starts, if traces are to be kept at all, and
removed when it ends, so that what is in it is always of the same run.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from numpy.typing import NDArray

from ks4stream.io.places import Place

SCRATCH, KEPT = "scratch", "traces"


def make_folder(run: Place, n_bytes: int) -> None:
    """Let the tasks of a run keep traces of `n_bytes`, if it is a folder, on a disk that has room for them."""
    if isinstance(run, Path) and has_room(shutil.disk_usage(run).free, n_bytes):
        (run / SCRATCH / KEPT).mkdir()


def has_room(free_bytes: int | None, n_bytes: int) -> bool:
    """Whether a disk has room for twice as many bytes; assumed if `free_bytes` is not known."""
    return free_bytes is None or free_bytes >= 2 * n_bytes


def folder_for(stage: Place) -> Path | None:
    """Where a task keeps traces, by the folder of its stage; None if they are not kept."""
    if not isinstance(stage, Path):
        return None
    folder = stage.parent / SCRATCH / KEPT
    return folder if folder.is_dir() else None


def write(path: Path, *arrays: NDArray[Any]) -> None:
    """Write contiguous arrays; the file appears when it is complete.

    A failed write, on a full disk for instance, is not an error and leaves no file: the traces can be computed again.
    """
    draft = path.with_suffix(f".{uuid4().hex}")  # two workers may compute the same tile at the same time
    with suppress(OSError):
        try:
            with draft.open("wb") as file:
                for array in arrays:
                    file.write(array.data)
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)


def read(path: Path, *arrays: NDArray[Any]) -> bool:
    """Read a file into contiguous arrays of the shapes that were written.

    Returns False if the file does not exist, cannot be read, or has another size.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size == sum(array.nbytes for array in arrays)
            return found and all(file.readinto(array.data) == array.nbytes for array in arrays)
    except OSError:
        return False
