"""Results of tasks as files, and what a task depends on as a number.

A *record* is one value made of arrays, numbers, texts, lists and the named tuples and dataclasses of the stages, in one
``.npz`` file: the arrays as they are, all else as JSON. Nothing is pickled, and only classes the reader names are made.
A *key* is a hash of everything a computation depends on, found by walking the same kinds of values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import DamagedFileError, RecordingError, ResultsError
from ks4stream.io.objects import write_bytes
from ks4stream.io.places import ObjectPath, Place, read_whole
from ks4stream.settings import Settings

_SKELETON = "skeleton"
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
"""What reading a file raises if it is gone, cut short or has other bits."""

ONE_AT_A_TIME = threading.Lock()
"""For reading headers of arrays: CPython 3.11's parser now and then raises SystemError where threads parse together."""

DRAFT = re.compile(r".*\.[0-9a-f]{32}\.draft")  # name of a file that is not complete yet
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def explain_write_errors(folder: Place) -> Iterator[None]:
    """Say of a write that the system refuses where it was, what is free there, and what to do.

    Raises
    ------
    ResultsError
        For any other error of the system: a full disk, a quota, a file system or folder that is read-only.
    """
    try:
        yield
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(
            f"{folder} cannot be written to: {error.strerror or error}.{_free(folder)} Make room there, or see to its "
            "quota and permissions; the same call with the same results_dir then goes on where this one stopped."
        ) from error


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
    """Say of a file that cannot be understood that it is damaged; other errors of the system are none of the file's.

    Raises
    ------
    DamagedFileError
    """
    try:
        yield
    except RecordingError:  # of a store that does not answer
        raise
    except NOT_AS_WRITTEN as error:
        raise DamagedFileError(str(path)) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which is asking for a place before the file's beginning
            raise
        raise DamagedFileError(str(path)) from error


@contextmanager
def atomic_write(path: Place) -> Iterator[BinaryIO]:
    """A file or an object to write, which appears under its name when it is complete; its folder is made.

    Raises
    ------
    ResultsError
        If the system refuses it.
    """
    if isinstance(path, ObjectPath):
        buffer = io.BytesIO()
        yield buffer
        write_bytes(path.location, buffer.getvalue())
        return
    draft = path.with_suffix(f".{uuid4().hex}.draft")  # a task may be computed twice at a time, on two machines
    with explain_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()  # of a write that failed


def write_record(path: Place, value: Any) -> None:
    """Write a value; the file appears under its name only when it is complete.

    Raises
    ------
    TypeError
        If the value holds what a record cannot.
    ResultsError
        If the system refuses it.
    """
    arrays: list[NDArray[Any]] = []
    skeleton = json.dumps(_encode(value, arrays))
    members = {f"a{number}": array for number, array in enumerate(arrays)}
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **{_SKELETON: np.frombuffer(skeleton.encode(), np.uint8)}, **members)


def read_record(path: Place, classes: Iterable[type], *, size: int | None = None) -> Any:
    """Read a value back; every byte is held against the file's checksums. Of an object, its size saves a request.

    Raises
    ------
    DamagedFileError
        If the file is not as it was written, or holds classes other than `classes`.
    """
    known = {cls.__name__: cls for cls in classes}
    with explain_read_errors(path), zipfile.ZipFile(io.BytesIO(read_whole(path, size))) as archive:

        def member(name: str) -> NDArray[Any]:
            whole = archive.read(f"{name}.npy")  # to its end, where the checksum is compared
            with ONE_AT_A_TIME:
                return np.asarray(np.lib.format.read_array(io.BytesIO(whole), allow_pickle=False))

        return _decode(json.loads(member(_SKELETON).tobytes()), lambda number: member(f"a{number}"), known)


def _encode(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """JSON that says how a value is built of arrays, which are collected."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, Mapping):
        return {"dict": {str(name): _encode(entry, arrays) for name, entry in value.items()}}
    if named := _named_fields(value):
        return {"class": type(value).__name__, "of": {n: _encode(entry, arrays) for n, entry in named.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(entry, arrays) for entry in value]}
    raise TypeError(f"A record cannot hold a {type(value).__name__}.")


def _decode(part: Any, array: Callable[[int], NDArray[Any]], known: Mapping[str, type]) -> Any:
    if isinstance(part, _PLAIN):
        return part
    if "array" in part:
        return array(part["array"])
    if "class" in part:
        of = {name: _decode(entry, array, known) for name, entry in part["of"].items()}
        return known[part["class"]](**of)
    if "dict" in part:
        return {name: _decode(entry, array, known) for name, entry in part["dict"].items()}
    ((kind, entries),) = part.items()
    return {"list": list, "tuple": tuple}[kind](_decode(entry, array, known) for entry in entries)


def key_of(*values: Any, stages: Collection[str] = ()) -> str:
    """Hash of values: 64 hexadecimal digits, the same in every process.

    Fields whose name begins with an underscore do not count, nor do paths: where a file lies is no matter. What has a
    method ``digest()`` is what that says; of a recording, its probe counts too, and of
    settings those of `stages`, named themselves or by the stage that first reads them.

    Raises
    ------
    TypeError
        If a value is of a kind nothing is known of.
    """
    state = hashlib.sha256()
    for value in values:
        _feed(state, value, stages)
    return state.hexdigest()


def _feed(state: Any, value: Any, stages: Collection[str]) -> None:
    if isinstance(value, Path | ObjectPath):
        return
    if isinstance(value, Settings):
        value = {
            spec.name: getattr(value, spec.name)
            for spec in fields(value)
            if spec.name in stages or spec.metadata["stage"] in stages
        }
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        state.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, np.ndarray):
        state.update(f"array {value.dtype.str} {value.shape};".encode())
        state.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Mapping):
        state.update(f"dict {len(value)};".encode())
        for name in sorted(value):
            _feed(state, name, stages)
            _feed(state, value[name], stages)
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        state.update(f"sequence {len(value)};".encode())
        for entry in value:
            _feed(state, entry, stages)
    elif hasattr(value, "digest"):
        state.update(f"{type(value).__name__} {value.digest()};".encode())
        _feed(state, getattr(value, "probe", None), stages)
    elif named := _named_fields(value):
        state.update(f"{type(value).__name__} {len(named)};".encode())
        for name, entry in named.items():
            _feed(state, name, stages)
            _feed(state, entry, stages)
    else:
        raise TypeError(f"Nothing is known of what a {type(value).__name__} depends on.")


def _named_fields(value: Any) -> dict[str, Any]:
    """Fields of a dataclass or a named tuple."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [spec.name for spec in fields(value)]
    else:
        names = list(getattr(value, "_fields", ()))
    return {name: getattr(value, name) for name in names if not name.startswith("_")}
