"""Folders for caches that are this user's alone, and who uses what lies in them."""

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
from ks4stream.io.tile_cache.account import ROOM

_log = logging.getLogger(__name__)
STALE_DAYS = 7.0  # after which a cache in a temporary folder that nobody used is removed
TEMPORARY_NAMES = 10  # that are tried in the temporary folder, where others have made folders of our name
USE = ".use"  # ends names of files that sorts lock, beside the caches they use


def was_left(use: Path) -> bool:
    """Whether nobody holds a lock file, which goes then."""
    lock = FileLock(use)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError:  # it has just gone
        return True
    remove_lock(lock)
    return True


def remove_lock(lock: BaseFileLock) -> None:
    with suppress(OSError):  # where a file that is open cannot be removed it stays for the next one
        os.unlink(lock.lock_file)
    lock.release()


def temporary_folder() -> Path:
    """The folder for this user's caches in the temporary one, made if need be.

    All may write there, and make a folder of our name before us: one that is another user's, or that others may write
    to, is left alone, and so is a symbolic link. A number is added to the name then, so that all processes of this user
    take the same folder nevertheless.

    Raises
    ------
    ResultsError
        If there can be none.
    """
    user = str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "")
    first = Path(tempfile.gettempdir(), f"ks4stream-cache-{user}")
    for folder in (first, *(first.with_name(f"{first.name}-{number}") for number in range(1, TEMPORARY_NAMES))):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:  # as it would for other names
            raise ResultsError(f"{folder} cannot be made: {error.strerror or error}.") from error
        if is_ours(folder):
            return folder
        _say_not_ours(folder)
    raise ResultsError(
        f"The recording cannot be kept in {first}, nor in {TEMPORARY_NAMES - 1} more of its name: they are links, "
        "other users', or others may write to them. Name another folder (cache_dir, --cache, or TMPDIR)."
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder in the temporary one is this user's alone; on Windows that one is.

    Others may have been allowed to read it, by an earlier version; they are no longer.
    """
    if not hasattr(os, "geteuid"):
        return folder.is_dir()
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is a link or a file, or others may not look into it
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
def _say_not_ours(folder: Path) -> None:
    _log.warning(
        "%s is a link, or another user's folder, or others may write to it. The cache goes to another folder, whose "
        "name ends in a number.",
        folder,
    )


def remove_stale(root: Path) -> None:
    """Remove caches that sorts have left here and nobody has used for days."""
    oldest = time.time() - STALE_DAYS * 86400
    for use in root.glob(f"*{USE}"):
        was_left(use)
    for folder in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):
            used = folder / ROOM
            if (used if used.exists() else folder).stat().st_mtime < oldest:
                shutil.rmtree(folder)
