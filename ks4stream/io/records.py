"""Results of tasks as files, and what a task depends on as a hash.

A *record* is one value made of arrays, numbers, strings, lists and the named tuples and dataclasses of the stages, in
one ``.npz`` file: arrays as they are, everything else as JSON. Nothing is pickled, and only classes that the reader
names are instantiated. A *key* is a hash of everything a computation depends on, found by walking the same kinds of
values.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.io.atomic import atomic_write, explain_read_errors
from ks4stream.io.places import ObjectPath, Place, read_whole
from ks4stream.settings import Settings

_SKELETON = "skeleton"

ONE_AT_A_TIME = threading.Lock()
"""Held while array headers are read: CPython 3.11's parser sometimes raises SystemError if threads parse together."""

_PLAIN = (bool, int, float, str, type(None))


def write_record(path: Place, value: Any) -> None:
    """Write a value; the file appears under its name only when it is complete.

    Raises
    ------
    TypeError
        If the value contains something that a record cannot hold.
    ResultsError
        If the file cannot be written.
    """
    arrays: list[NDArray[Any]] = []
    skeleton = json.dumps(_encode(value, arrays))
    members = {f"a{number}": array for number, array in enumerate(arrays)}
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **{_SKELETON: np.frombuffer(skeleton.encode(), np.uint8)}, **members)


def read_record(path: Place, classes: Iterable[type], *, size: int | None = None) -> Any:
    """Read a value back, comparing every byte with the file's checksums. Giving an object's size saves a request.

    Raises
    ------
    DamagedFileError
        If the file is corrupt (truncated or modified), or holds classes other than `classes`.
    """
    known = {cls.__name__: cls for cls in classes}
    with explain_read_errors(path), zipfile.ZipFile(io.BytesIO(read_whole(path, size))) as archive:

        def member(name: str) -> NDArray[Any]:
            whole = archive.read(f"{name}.npy")  # to its end, where the checksum is compared
            with ONE_AT_A_TIME:
                return np.asarray(np.lib.format.read_array(io.BytesIO(whole), allow_pickle=False))

        return _decode(json.loads(member(_SKELETON).tobytes()), lambda number: member(f"a{number}"), known)


def _encode(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """JSON that says how a value is built from arrays, which are appended to `arrays`."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, Mapping):
        if others := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"Keys in a record must be strings, as they would come back as such; {others[0]!r} is not.")
        return {"dict": {name: _encode(entry, arrays) for name, entry in value.items()}}
    if named := _named_fields(value):
        return {"class": type(value).__name__, "of": {n: _encode(entry, arrays) for n, entry in named.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(entry, arrays) for entry in value]}
    raise TypeError(f"A record cannot hold a value of type {type(value).__name__}.")


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


def converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """A value of a record in which everything of a class, wherever it is, is replaced by what `convert` makes of it."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, Mapping):
        return {name: converted(entry, kind, convert) for name, entry in value.items()}
    if named := _named_fields(value):
        return type(value)(**{name: converted(entry, kind, convert) for name, entry in named.items()})
    if isinstance(value, list | tuple):
        return type(value)(converted(entry, kind, convert) for entry in value)
    return value


def key_of(*values: Any) -> str:
    """Hash of values: 64 hexadecimal digits, the same in every process.

    Fields whose name begins with an underscore do not count, nor do paths: it does not matter where a file lies. A
    value with a method ``digest()`` counts by what it returns, together with its probe if it has one. Of settings that
    are only a part of all, only that part counts.

    Raises
    ------
    TypeError
        If a value has a type that cannot be hashed.
    """
    state = hashlib.sha256()
    for value in values:
        _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Path | ObjectPath):
        return
    if isinstance(value, Settings):
        value = vars(value)
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
            _feed(state, name)
            _feed(state, value[name])
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        state.update(f"sequence {len(value)};".encode())
        for entry in value:
            _feed(state, entry)
    elif hasattr(value, "digest"):
        state.update(f"{type(value).__name__} {value.digest()};".encode())
        _feed(state, getattr(value, "probe", None))
    elif named := _named_fields(value):
        state.update(f"{type(value).__name__} {len(named)};".encode())
        for name, entry in named.items():
            _feed(state, name)
            _feed(state, entry)
    else:
        raise TypeError(f"A value of type {type(value).__name__} cannot be hashed: it is not known what it depends on.")


def _named_fields(value: Any) -> dict[str, Any]:
    """Fields of a dataclass or a named tuple."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [spec.name for spec in fields(value)]
    else:
        names = list(getattr(value, "_fields", ()))
    return {name: getattr(value, name) for name in names if not name.startswith("_")}
