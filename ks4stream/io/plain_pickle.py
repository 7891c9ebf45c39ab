"""Read a pickle without running what is in it: arrays, numbers, strings, paths, and collections of these.

A pickle is a program that names the functions and classes it wants to call. Here, these names stand for a few
functions of our own, which check what they are given and build arrays, sets and paths; any other name is an error.
Neither NumPy's nor any other library's code for unpickling is called.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ks4stream.errors import ResultsError

__all__ = ["load_object"]

MAX_BYTES = 1 << 31
"""Size of the largest file that is read: an ``ops.npy`` has some MB."""

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_TYPES = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU]\d+|O8?)")


def load_object(path: str | os.PathLike[str]) -> Any:
    """Read an ``.npy`` file of one pickled object, such as ``ops.npy``.

    Parameters
    ----------
    path : path

    Returns
    -------
    object
        Dictionaries, lists, tuples, sets, strings, bytes, numbers, None, NumPy arrays and scalars, and paths. A path
        of this system is a :class:`~pathlib.Path`, one of another system a :class:`~pathlib.PurePath`. Structured
        arrays and dates are not supported.

    Raises
    ------
    ResultsError
        If there is no such file, it is too large or damaged, or it holds an object of any other class; the message
        names the class.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = io.BytesIO(file.read(MAX_BYTES + 1))
    except FileNotFoundError as error:
        raise ResultsError(f"There is no file {path}.") from error
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if content.getbuffer().nbytes > MAX_BYTES:
        raise ResultsError(f"{path} has more than {MAX_BYTES} bytes, and is not read.")
    try:
        shape, _, dtype = _HEADERS[npy.read_magic(content)](content)
        if not dtype.hasobject or math.prod(shape) != 1:
            raise ResultsError(f"{path} holds an array of {dtype}, shape {shape}, and not a single object.")
        return _finished(_PlainUnpickler(content).load(), {}).item()
    except ResultsError:
        raise
    except _UnknownClassError as error:
        raise ResultsError(
            f"{path} holds a {error}, which is not read, as reading it could run any program. Only arrays, numbers, "
            "strings, paths and collections of these are read."
        ) from error
    except Exception as error:  # of many types, if the file was not written by pickle
        raise ResultsError(f"{path} cannot be read as a pickle: {error or type(error).__name__}.") from error


class _UnknownClassError(Exception):
    """A pickle names a class or function that is not among :data:`_KNOWN`."""


class _PlainUnpickler(pickle._Unpickler):
    """Knows only :data:`_KNOWN`.

    The class in Python and not the one in C, which allocates as much memory as an index in the file asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of our functions by the name of what it stands for."""
        try:
            return _KNOWN[_current(module), name]
        except KeyError:
            raise _UnknownClassError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside of the file."""
        raise _UnknownClassError(f"reference to another object ({pid!r})")

    def get_extension(self, code: int) -> None:
        """Refuse classes that this process has registered under a number."""
        raise _UnknownClassError(f"registered class number {code}")


def _current(module: str) -> str:
    """A module by one of its names in all versions of Python and NumPy."""
    for other, name in (("numpy._core", "numpy.core"), ("pathlib._local", "pathlib"), ("__builtin__", "builtins")):
        module = module.replace(other, name)
    return module


class _Stand:
    """A function that stands for a name in a pickle. It has no other state, and a pickle cannot give it any."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *given: Any) -> Any:
        return self._make(*given)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state was given to a function")


class _Type:
    """The type of an array, until it is known completely."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPES.fullmatch(code):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not supported")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        order, fields = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in fields):
            raise pickle.UnpicklingError("structured arrays are not supported")
        self.code = ("" if order == "|" else order) + self.code.lstrip("<>|=")

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code)


class _Array:
    """An array, until its content is known."""

    __slots__ = ("content",)

    def __init__(self, *_: Any) -> None:
        self.content: NDArray[Any] | None = None

    @classmethod
    def of_bytes(cls, content: Any, kind: Any, shape: Any, order: Any) -> _Array:
        found = cls()
        found.content = _array(content, kind, shape, order)
        return found

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.content = _array(content, kind, shape, "F" if is_fortran else "C")


def _array(content: Any, kind: Any, shape: Any, order: Any = "C") -> NDArray[Any]:
    """An array of these bytes, or of a list of objects."""
    if not isinstance(kind, _Type) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a type or an order")
    sizes = (shape,) if isinstance(shape, int) else shape
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes) or len(sizes) > 32:
        raise pickle.UnpicklingError(f"{shape!r} is not the shape of an array")
    dtype, length = kind.dtype, math.prod(sizes)
    if dtype.hasobject:
        if not isinstance(content, list) or len(content) != length:
            raise pickle.UnpicklingError(f"an array of {length} objects without their list")
        flat = np.empty(length, object)
        for at, value in enumerate(content):
            flat[at] = value
        return flat.reshape(sizes, order=order)
    if not isinstance(content, bytes | bytearray) or len(content) != length * dtype.itemsize:
        raise pickle.UnpicklingError(f"an array of {length} {dtype} without as many bytes")
    if not dtype.itemsize:
        return np.zeros(sizes, dtype)
    return np.frombuffer(bytearray(content), dtype).reshape(sizes, order=order)


def _scalar(kind: Any, content: Any = b"") -> Any:
    if not isinstance(kind, _Type) or kind.dtype.hasobject:
        raise pickle.UnpicklingError("a scalar of an unsupported type")
    if isinstance(content, str):  # pickles of Python 2
        content = content.encode("latin-1")
    return _array(content, kind, ())[()]


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _path(flavour: type[PurePath]) -> _Stand:
    def made(*parts: Any) -> PurePath:
        if not all(isinstance(part, str) for part in parts):
            raise pickle.UnpicklingError("a path that is not made of strings")
        found = flavour(*parts)
        return Path(found) if isinstance(found, type(PurePath())) else found

    return _Stand(made)


def _collection(kind: type) -> _Stand:
    def made(values: Any = ()) -> Any:
        if not isinstance(values, list | tuple):
            raise pickle.UnpicklingError(f"a {kind.__name__} that is not made of a list")
        return kind(values)

    return _Stand(made)


def _complex(real: Any, imag: Any) -> complex:
    return complex(float(real), float(imag))


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Stand(_Array),
    ("numpy.core.multiarray", "scalar"): _Stand(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Stand(_Array.of_bytes),
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Stand(_Type),
    ("_codecs", "encode"): _Stand(_encoded),
    ("builtins", "set"): _collection(set),
    ("builtins", "frozenset"): _collection(frozenset),
    ("builtins", "complex"): _Stand(_complex),
    ("builtins", "bytes"): _Stand(lambda: b""),  # others are encoded text, in old pickles
    ("builtins", "bytearray"): _Stand(lambda content=b"": bytearray(_checked_bytes(content))),
    ("collections", "OrderedDict"): _Stand(lambda: {}),
    **{("pathlib", name): _path(PurePosixPath) for name in ("PosixPath", "PurePosixPath")},
    **{("pathlib", name): _path(PureWindowsPath) for name in ("WindowsPath", "PureWindowsPath")},
}


def _checked_bytes(content: Any) -> bytes:
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("bytes made of something else")
    return content


def _finished(value: Any, known: dict[int, Any]) -> Any:
    """The same value with arrays in place of :class:`_Array`; what is shared or recursive stays so."""
    if id(value) in known:
        return known[id(value)][1]
    made: Any = value
    if isinstance(value, _Stand | _Type):
        raise pickle.UnpicklingError("a class in place of a value")
    if isinstance(value, _Array):
        if value.content is None:
            raise pickle.UnpicklingError("an array without content")
        made = value.content
        known[id(value)] = value, made
        if made.dtype.hasobject:
            for at, entry in enumerate(made.flat):
                made.flat[at] = _finished(entry, known)
        return made
    if isinstance(value, dict):
        made = {}
        known[id(value)] = value, made
        made.update((_finished(name, known), _finished(entry, known)) for name, entry in value.items())
    elif isinstance(value, list):
        made = []
        known[id(value)] = value, made
        made.extend(_finished(entry, known) for entry in value)
    elif isinstance(value, tuple | set | frozenset):
        made = type(value)(_finished(entry, known) for entry in value)
        known[id(value)] = value, made
    return made
