"""Read a pickle without running what is in it: arrays, numbers, strings, paths, and collections of these.

A pickle is a program that names the functions and classes it wants to call. Here, these names stand for a few
functions of our own, which check what they are given and build arrays, sets and paths; any other name is an error.
Neither NumPy's nor any other library's code for unpickling is called.

A short file cannot take much memory or time either. The program may have so many steps and no more, what is built may
have a few times the bytes of the file, keys are values that are hashed at once, and messages contain nothing of unknown
length.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ks4stream.errors import ResultsError

__all__ = ["load_object"]

MAX_BYTES = 1 << 31
"""Size of the largest file that is read: an ``ops.npy`` has some MB."""

MAX_STEPS = 500_000
"""Length of the longest pickle that is read, in its instructions: an ``ops.npy`` has a few hundred for its settings and
some ten for each array, whatever the array's size. One byte of the file can be an instruction that makes an object."""

_GROWTH, _SPARE_BYTES = 4, 1 << 16
"""Arrays and other copies may have this many times the bytes of the file, and some more. It is reached only by copying
the same bytes again and again: the oldest pickles copy each array twice."""

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_TYPES = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,9}|O8?)")
_KEYS = (str, bytes, int, float, complex, type(None), np.generic, PurePath)


def load_object(path: str | os.PathLike[str]) -> Any:
    """Read an ``.npy`` file of one pickled object, such as ``ops.npy``.

    Parameters
    ----------
    path : path

    Returns
    -------
    object
        Dictionaries, lists, tuples, sets, strings, bytes, numbers, None, NumPy arrays and scalars, and paths. A path
        of this system is a :class:`~pathlib.Path`, one of another system a :class:`~pathlib.PurePath`. A data type
        becomes its name. Structured arrays, dates, and keys that are tuples are not supported.

    Raises
    ------
    ResultsError
        If the file does not exist, is too large or damaged, or contains an object of any other class, which the
        message names.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = io.BytesIO(file.read(MAX_BYTES + 1))
    except FileNotFoundError as error:
        raise ResultsError(f"{path} does not exist.") from error
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if content.getbuffer().nbytes > MAX_BYTES:
        raise ResultsError(f"{path} has more than {MAX_BYTES} bytes, and is not read.")
    try:
        shape, _, dtype = _HEADERS[npy.read_magic(content)](content)
    except Exception as error:
        raise ResultsError(f"{path} cannot be read as an .npy file: {_short(str(error))}.") from error
    try:
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
        raise ResultsError(f"{path} cannot be read as a pickle: {_said(error)}.") from error


def _said(error: Exception) -> str:
    """What went wrong; the text of other errors could describe an object of the file, in any length."""
    return _short(str(error)) if isinstance(error, pickle.UnpicklingError) else type(error).__name__


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


class _UnknownClassError(Exception):
    """A pickle names a class or function that is not among :data:`_KNOWN`."""


class _PlainUnpickler(pickle._Unpickler):
    """Knows only :data:`_KNOWN`.

    The class in Python and not the one in C, which allocates as much memory as an index in the file asks for.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content)
        self._left_bytes = _GROWTH * content.getbuffer().nbytes + _SPARE_BYTES
        self.dispatch = _Counted(self._instructions)  # type: ignore[misc]  # each reader counts its own

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of our functions by the name of what it stands for."""
        try:
            found = _KNOWN[_current(module), name]
        except KeyError:
            raise _UnknownClassError(_short(f"{module}.{name}")) from None
        return _Stand(found.make, self._spend) if isinstance(found, _Stand) else found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside of the file."""
        raise _UnknownClassError("reference to another object")

    def get_extension(self, code: int) -> None:
        """Refuse classes that this process has registered under a number."""
        raise _UnknownClassError(f"registered class number {code}")

    def _spend(self, made: Any) -> None:
        """Count what was made of values in the file, which may all be the same value."""
        self._left_bytes -= _bytes_of(made)
        if self._left_bytes < 0:
            raise pickle.UnpicklingError("its arrays are far larger than the file")

    # -- what needs checks before pickle's own code --

    def load_bytearray8(self) -> None:
        """Read as many bytes as there are, before memory is allocated."""
        (length,) = struct.unpack("<Q", self.read(8))
        content = self.read(min(length, MAX_BYTES))
        if len(content) != length:
            raise pickle.UnpicklingError("it is truncated")
        self.append(bytearray(content))

    def load_dict(self) -> None:
        """Make a dictionary of what is on the stack."""
        items = self.pop_mark()
        self.append({_key(name): value for name, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitem(self) -> None:
        """Add an entry to a dictionary."""
        value, name = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(name)] = value

    def load_setitems(self) -> None:
        """Add entries to a dictionary."""
        items = self.pop_mark()
        self.stack[-1].update((_key(name), value) for name, value in zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        """Add entries to a set."""
        items = self.pop_mark()
        self.stack[-1].update(map(_key, items))

    def load_frozenset(self) -> None:
        """Make a set of what is on the stack."""
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

    def load_build(self) -> None:
        """Give one of our objects its content; there is nothing else that has a state."""
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _Stand | _Type | _Array):
            raise pickle.UnpicklingError("a state was given to a value")
        made.__setstate__(state)
        self._spend(made)

    _instructions: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BUILD[0]: load_build,
    }


class _Counted(dict[int, Callable[..., None]]):
    """What to do for each instruction of a pickle, up to :data:`MAX_STEPS` times."""

    def __init__(self, known: Mapping[int, Callable[..., None]]) -> None:
        super().__init__(known)
        self.n_left = MAX_STEPS

    def __getitem__(self, instruction: int) -> Callable[..., None]:
        self.n_left -= 1
        if self.n_left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_STEPS} instructions")
        return super().__getitem__(instruction)


def _key(value: Any) -> Any:
    """A key, or an entry of a set.

    Hashing tuples within tuples may take forever, or more stack than there is.
    """
    if not isinstance(value, _KEYS):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is a key, or in a set")
    return value


def _bytes_of(made: Any) -> int:
    """Size of a value that was made; of collections, their length, as their entries were there before."""
    if isinstance(made, _Array):
        content = made.content
        return 0 if content is None else content.size if content.dtype.hasobject else content.nbytes
    if isinstance(made, np.generic):
        return made.nbytes
    if isinstance(made, PurePath):
        return len(str(made))
    return len(made) if isinstance(made, bytes | bytearray | set | frozenset) else 0


def _current(module: str) -> str:
    """A module by one of its names in all versions of Python and NumPy."""
    for other, name in (("numpy._core", "numpy.core"), ("pathlib._local", "pathlib"), ("__builtin__", "builtins")):
        module = module.replace(other, name)
    return module


class _Stand:
    """A function that stands for a name in a pickle, which cannot give it a state; `spend` is told what it makes."""

    __slots__ = ("make", "spend")

    def __init__(self, make: Callable[..., Any], spend: Callable[[Any], None] = lambda _: None) -> None:
        self.make, self.spend = make, spend

    def __call__(self, *given: Any) -> Any:
        made = self.make(*given)
        self.spend(made)
        return made

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state was given to a function")


class _Type:
    """The type of an array, until it is known completely."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPES.fullmatch(code):
            said = repr(_short(code)) if isinstance(code, str) else "unknown"
            raise pickle.UnpicklingError(f"arrays of type {said} are not supported")
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
    is_shape = isinstance(sizes, tuple) and len(sizes) <= 32
    if not is_shape or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise pickle.UnpicklingError("something that is not the shape of an array")
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
    if not dtype.itemsize:  # NumPy would make it one byte or more for each
        raise pickle.UnpicklingError("an array of text without characters")
    return np.frombuffer(bytearray(content), dtype).reshape(sizes, order=order)


def _scalar(kind: Any, content: Any = b"") -> Any:
    if not isinstance(kind, _Type) or kind.dtype.hasobject:
        raise pickle.UnpicklingError("a scalar of an unsupported type")
    if isinstance(content, str):  # pickles of Python 2
        content = content.encode("latin-1")
    if not kind.dtype.itemsize and not content:
        return kind.dtype.type()
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
        return kind(map(_key, values))

    return _Stand(made)


def _complex(real: Any, imag: Any) -> complex:
    if not isinstance(real, int | float) or not isinstance(imag, int | float):
        raise pickle.UnpicklingError("a complex number that is not made of numbers")
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
    if isinstance(value, _Type):
        return value.dtype.name
    if isinstance(value, _Stand | memoryview):
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
