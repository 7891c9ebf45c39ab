"""Folders for a process's own time, on this machine, that go with it; also if it is killed."""

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
    """A new folder in the system's temporary one (``TMPDIR``), removed at the end.

    Those whose process was killed go, too: they are of this machine and user, and nobody holds their lock. Of other
    machines that share the temporary folder locks may not be seen, so that theirs are left alone.

    Raises
    ------
    ResultsError
        If it cannot be made, or not be locked.
    """
    ours, there = f"ks4stream-{platform.node()}", Path(tempfile.gettempdir())
    with explain_write_errors(there):
        folder = Path(tempfile.mkdtemp(prefix=f"{ours}-"))
    lock = FileLock(folder / LOCK)
    try:
        with explain_write_errors(there):
            lock.acquire()
            (folder / CONTENTS).mkdir()  # not before the lock is held: what has contents and no lock may go
        for other in there.glob("ks4stream-*"):
            if other.name.rpartition("-")[0] == ours:
                _remove_unless_held(other, folder.stat().st_uid)
        yield folder / CONTENTS
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays until it is not


def _remove_unless_held(folder: Path, user: int) -> None:
    with suppress(OSError):  # of another user or gone, or the lock is held
        if folder.lstat().st_uid == user and (folder / CONTENTS).is_dir():
            with FileLock(folder / LOCK, timeout=0):
                pass  # nobody takes it again
            shutil.rmtree(folder)
