"""Private cache folders of this user, and lock files that show which caches are in use."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ks4stream.errors import ResultsError
from ks4stream.io.recording_cache.account import ROOM

_log = logging.getLogger(__name__)
STALE_DAYS = 7.0  # after which an unused cache in a temporary folder is removed
TEMPORARY_NAMES = 10  # to try in the temporary folder, if others have created folders with our name
USE = ".use"  # suffix of the files that sorts lock, next to the caches they use


def was_left(use: Path) -> bool:
    """Whether nobody holds a lock file; if so, it is removed."""
    lock = FileLock(use)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError:  # it has just been removed
        return True
    remove_lock(lock)
    return True


def remove_lock(lock: BaseFileLock) -> None:
    with suppress(OSError):  # on systems where an open file cannot be removed, it stays
        os.unlink(lock.lock_file)
    lock.release()


def temporary_folder() -> Path:
    """The folder for this user's caches in the temporary folder, created if necessary.

    Any user may write to the temporary folder and create a folder with our name first. Folders that belong to another
    user or that others may write to are left alone, and so are symbolic links. Then a number is added to the name,
    chosen so that all processes of this user take the same folder.

    Raises
    ------
    ResultsError
        If it cannot be created.
    """
    user = str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "")
    first = Path(tempfile.gettempdir(), f"ks4stream-cache-{user}")
    for folder in (first, *(first.with_name(f"{first.name}-{number}") for number in range(1, TEMPORARY_NAMES))):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:  # other names would fail too
            raise ResultsError(f"{folder} cannot be created: {error.strerror or error}.") from error
        if is_ours(folder):
            return folder
        _warn_not_ours(folder)
    raise ResultsError(
        f"The recording cannot be cached in {first}, nor in {TEMPORARY_NAMES - 1} folders with similar names: they are "
        "links, belong to other users, or others may write to them. Give another folder (cache_dir, --cache or TMPDIR)."
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder in the temporary folder is private to this user; on Windows, the temporary folder itself is.

    Takes away read permissions of others, which an earlier version gave.
    """
    if not hasattr(os, "geteuid"):
        return folder.is_dir()
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # a link, a file, or a folder of another user
        return False
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        if stat.S_IMODE(found.st_mode) != stat.S_IRWXU:
            os.fchmod(opened, stat.S_IRWXU)
    finally:
        os.close(opened)
    return True


@lru_cache
def _warn_not_ours(folder: Path) -> None:
    _log.warning(
        "%s is a link, belongs to another user, or others may write to it. The cache goes to another folder, whose "
        "name ends in a number.",
        folder,
    )


def remove_stale(root: Path) -> None:
    """Remove caches that sorts have left here and that have not been used for days."""
    oldest = time.time() - STALE_DAYS * 86400
    for use in root.glob(f"*{USE}"):
        was_left(use)
    for folder in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):
            used = folder / ROOM
            if (used if used.exists() else folder).stat().st_mtime < oldest:
                shutil.rmtree(folder)
