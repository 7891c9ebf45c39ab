"""Temporary folders on this machine that are removed when their process ends, later if it was killed."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ks4stream.io.atomic import explain_write_errors

LOCK, CONTENTS = "lock", "contents"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the system's temporary folder (``TMPDIR``), removed at the end.

    Also removes folders whose process was killed: those of this machine and user whose lock nobody holds. Locks of
    other machines that share the temporary folder may not be visible, so their folders are left alone.

    Raises
    ------
    ResultsError
        If it cannot be created or locked.
    """
    ours, temporary = f"ks4stream-{platform.node()}", Path(tempfile.gettempdir())
    with explain_write_errors(temporary):
        folder = Path(tempfile.mkdtemp(prefix=f"{ours}-"))
    lock = FileLock(folder / LOCK)
    try:
        with explain_write_errors(temporary):
            lock.acquire()
            (folder / CONTENTS).mkdir()  # only once the lock is held: a folder with contents but no lock may be removed
        for other in temporary.glob("ks4stream-*"):
            if other.name.rpartition("-")[0] == ours:
                _remove_unless_held(other, folder.stat().st_uid)
        yield folder / CONTENTS
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # mapped files stay on disk until they are unmapped


def _remove_unless_held(folder: Path, user: int) -> None:
    with suppress(OSError):  # another user's, already removed, or locked
        if folder.lstat().st_uid == user and (folder / CONTENTS).is_dir():
            with FileLock(folder / LOCK, timeout=0):
                pass  # nobody will lock it again
            shutil.rmtree(folder)
