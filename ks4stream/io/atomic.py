"""Files that appear complete or not at all, and system errors that say where they occurred and what to do."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO
from uuid import uuid4

from ks4stream.errors import DamagedFileError, RecordingError, ResultsError
from ks4stream.io.objects import write_bytes
from ks4stream.io.places import ObjectPath, Place

NOT_AS_WRITTEN = (
    FileNotFoundError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    SyntaxError,
    RuntimeError,
    TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file raises if it is missing, truncated or modified."""


FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)  # room does not help

DRAFT = re.compile(r".*\.[0-9a-f]{32}\.draft")  # name of a file that is not complete yet


@contextmanager
def explain_write_errors(
    folder: Place, then: str = "repeat the same call with the same results_dir to continue where it stopped"
) -> Iterator[None]:
    """Explain a write that the system refuses: where it was, how much space is free there, and what to do.

    Parameters
    ----------
    folder : Path or ObjectPath
    then : str
        What to do when the cause is removed.

    Raises
    ------
    ResultsError
        For any other OSError: a full disk, an exceeded quota, a read-only file system or folder.
    """
    try:
        yield
    except ResultsError:
        raise
    except OSError as error:
        if error.errno in FORBIDDEN:
            advice = f" Choose another folder, or check its permissions; then {then}."
        else:
            advice = f"{_free(folder)} Make room there, or check its quota and permissions; then {then}."
        raise ResultsError(f"{folder} cannot be written to: {error.strerror or error}.{advice}") from error


def _free(folder: Place) -> str:
    if isinstance(folder, ObjectPath):
        return ""
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    try:
        return f" {shutil.disk_usage(there).free / 1e6:,.1f} MB are free."
    except OSError:
        return ""


@contextmanager
def explain_read_errors(path: str | Place) -> Iterator[None]:
    """Report a file that cannot be parsed as damaged; other system errors are not caught.

    Raises
    ------
    DamagedFileError
        If the file is missing, truncated or modified.
    """
    try:
        yield
    except RecordingError:  # from a store that does not answer
        raise
    except NOT_AS_WRITTEN as error:
        raise DamagedFileError(str(path)) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which means seeking to before the start of the file
            raise
        raise DamagedFileError(str(path)) from error


@contextmanager
def atomic_write(path: Place) -> Iterator[BinaryIO]:
    """Open a file or an object for writing; it appears under its name only when complete. Its folder is made.

    Raises
    ------
    ResultsError
        If it cannot be written.
    """
    if isinstance(path, ObjectPath):
        buffer = io.BytesIO()
        yield buffer
        write_bytes(path.location, buffer.getvalue())
        return
    with atomic_draft(path) as draft, draft.open("wb") as file:
        yield file


@contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """The name under which to write a file; it appears under its own only when complete. Its folder is made.

    Raises
    ------
    ResultsError
        If it cannot be written.
    """
    draft = path.with_suffix(f".{uuid4().hex}.draft")  # two machines may compute the same task at the same time
    with explain_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()  # left by a failed write
