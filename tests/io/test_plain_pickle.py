"""Pickles are read without running anything: values, arrays and paths, and nothing else."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ks4stream.errors import ResultsError
from ks4stream.io import plain_pickle
from ks4stream.io.plain_pickle import load_object


def write(path: Path, content: bytes) -> Path:
    """An ``.npy`` file of one object with this pickle."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(content)
    return path


def pickled(value: Any, protocol: int) -> bytes:
    return pickle.dumps(np.array(value, dtype=object), protocol=protocol)


def same(one: Any, other: Any) -> bool:
    """Equal in type and content, whatever they are made of."""
    if isinstance(one, np.ndarray):
        if one.dtype == object:
            return other.shape == one.shape and all(map(same, one.flat, other.flat))
        return other.dtype == one.dtype and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


VALUES: dict[str, Any] = {
    "numbers": [0, -1, 2**70, 1.5, float("inf"), 1 + 2j, True, None],
    "text": ("µm", b"bytes", ""),
    "sets": [{1, 2}, frozenset({"a"}), set()],
    "nested": {"a": {"b": [{"c": (1, [2])}]}, 3: "three"},
    "arrays": {
        "float": np.linspace(0, 1, 7, dtype=np.float32).reshape(7, 1),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "big-endian": np.arange(3, dtype=">i2"),
        "bool": np.array([True, False]),
        "complex": np.array([1j], np.complex64),
        "text": np.array(["one", "three"]),
        "bytes": np.array([b"one", b"three"]),
        "empty": np.zeros((0, 3)),
        "without_axes": np.array(3.0),
        "objects": np.array([{"a": np.arange(2)}, None, [1]], dtype=object),
    },
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(2.0), np.str_("text")],
    "paths": {"here": Path("/data/recording.bin"), "parts": [Path("a/b")]},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(tmp_path: Path, name: str, protocol: int) -> None:
    value = {"value": VALUES[name]}
    assert same(load_object(write(tmp_path / "ops.npy", pickled(value, protocol))), value)


def test_what_numpy_saves_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "ops.npy", np.array(VALUES, dtype=object), allow_pickle=True)
    assert same(load_object(tmp_path / "ops.npy"), VALUES)


def test_arrays_can_be_written_to(tmp_path: Path) -> None:
    np.save(tmp_path / "ops.npy", np.array({"a": np.zeros(3)}, dtype=object), allow_pickle=True)
    load_object(tmp_path / "ops.npy")["a"][:] = 1


def test_what_is_shared_or_recursive_stays_so(tmp_path: Path) -> None:
    value: dict[str, Any] = {"array": np.arange(3)}
    value["again"], value["self"] = value["array"], value
    found = load_object(write(tmp_path / "ops.npy", pickled(value, 4)))
    assert found["again"] is found["array"] and found["self"] is found


def test_a_short_file_of_many_shared_values_is_read_at_once(tmp_path: Path) -> None:
    value: Any = (1, 2)
    for _ in range(200):
        value = (value, value)  # 2²⁰⁰ values, if each were visited
    load_object(write(tmp_path / "ops.npy", pickled({"a": value}, 4)))


def test_paths_of_another_system(tmp_path: Path) -> None:
    other, kind = ("WindowsPath", PureWindowsPath) if os.name == "posix" else ("PosixPath", PurePosixPath)
    content = pickled(type(Path())("data") / "recording.bin", protocol=2)
    for module in ("pathlib", "pathlib._local"):
        as_other = re.sub(rb"cpathlib[._a-z]*\n\w+\n", f"c{module}\n{other}\n".encode(), content)
        found = load_object(write(tmp_path / "ops.npy", as_other))
        assert type(found) is kind and found == kind("data", "recording.bin")


def test_an_ordered_dictionary_is_a_dictionary(tmp_path: Path) -> None:
    found = load_object(write(tmp_path / "ops.npy", pickled({"a": OrderedDict(b=1)}, 4)))
    assert found == {"a": {"b": 1}} and type(found["a"]) is dict


class Runs:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > ran",)


REFUSED: dict[str, tuple[Any, str]] = {
    "program": (Runs(), r"posix\.system|nt\.system"),
    "evaluation": (type("E", (), {"__reduce__": lambda self: (eval, ("1",))})(), r"builtins\.eval"),
    "tensor": (torch.zeros(3), r"torch\._utils\._rebuild_tensor"),
    "device": (torch.device("cpu"), r"torch\.device"),
    "class": (np.random.default_rng(0), r"numpy\.random"),
    "type": (dict, r"builtins\.dict"),
    "mapping": (np.memmap, r"numpy\.memmap|numpy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_class_is_named_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value, said = REFUSED[name]
    path = write(tmp_path / "ops.npy", pickled({"a": [value]}, 4))
    with pytest.raises(ResultsError, match=said) as caught:
        load_object(path)
    assert str(path) in str(caught.value) and not (tmp_path / "ran").exists()


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "no array": (pickle.dumps({"a": 1}), "cannot be read"),
    "a class": (b"cnumpy\ndtype\n.", "cannot be read"),
    "an array without content": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.", "content"),
    "an array instead of a function": (b"cnumpy\nndarray\n(I0\ntR.", "cannot be read"),
    "a function with a state": (b"cnumpy\ndtype\n}S'_make'\nI1\nsb.", "a state was given to a function"),
    "a set of a number": (b"cbuiltins\nset\n(I3\ntR.", "not made of a list"),
    "bytes of a number": (b"cbuiltins\nbytearray\n(I999999999999\ntR.", "bytes made of something else"),
    "memo": (b"]r\xff\xff\xff\x7f.", "cannot be read"),
    "outside": (b"Pid\n.", "reference to another object"),
    "registered": (b"\x82\x01.", "registered class number 1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_errors(tmp_path: Path, name: str) -> None:
    content, said = DAMAGED[name]
    with pytest.raises(ResultsError, match=said):
        load_object(write(tmp_path / "ops.npy", content))


def array_pickle(code: bytes, state: bytes, shape: bytes, content: bytes) -> bytes:
    """An array by its parts, in the oldest protocol."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
        + shape
        + b"cnumpy\ndtype\n(S'"
        + code
        + b"'\nI00\nI01\ntR"
        + state
        + b"I00\n"
        + content
        + b"tb."
    )


PLAIN = b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
ARRAYS: dict[str, tuple[bytes, str]] = {
    "too large": (
        array_pickle(b"f8", PLAIN, b"(I1000000000\nt", b"c_codecs\nencode\n(S'ab'\nS'latin1'\ntR"),
        "as many",
    ),
    "negative": (array_pickle(b"f8", PLAIN, b"(I-1\nt", b"c_codecs\nencode\n(S''\nS'latin1'\ntR"), "not the shape"),
    "of text": (array_pickle(b"f8", PLAIN, b"(I1\nt", b"S'abcdefgh'\n"), "as many bytes"),
    "objects of bytes": (
        array_pickle(b"O8", PLAIN, b"(I1\nt", b"c_codecs\nencode\n(S'abcdefgh'\nS'latin1'\ntR"),
        "list",
    ),
    "structured": (array_pickle(b"V8", PLAIN, b"(I1\nt", b"N"), "type 'V8'"),
    "fields": (array_pickle(b"f8", b"(I3\nS'<'\nN(S'a'\nt}I8\nI8\nI0\ntb", b"(I1\nt", b"N"), "structured"),
    "dates": (array_pickle(b"M8", PLAIN, b"(I1\nt", b"N"), "type 'M8'"),
    "codec": (array_pickle(b"b1", PLAIN, b"(I1\nt", b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR"), "encoding"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_contradicts_itself_is_an_error(tmp_path: Path, name: str) -> None:
    content, said = ARRAYS[name]
    with pytest.raises(ResultsError, match=said):
        load_object(write(tmp_path / "ops.npy", content))


def test_other_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultsError, match="does not exist"):
        load_object(tmp_path / "nowhere.npy")
    with pytest.raises(ResultsError, match="cannot be read"):
        load_object(tmp_path)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ResultsError, match="cannot be read"):
        load_object(tmp_path / "text.npy")
    np.save(tmp_path / "numbers.npy", np.zeros(3))
    with pytest.raises(ResultsError, match="an array of float64"):
        load_object(tmp_path / "numbers.npy")
    monkeypatch.setattr(plain_pickle, "MAX_BYTES", 100)
    with pytest.raises(ResultsError, match="is not read"):
        load_object(tmp_path / "numbers.npy")


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def an_array(code: str, content: bytes, shape: int) -> bytes:
    """An array as protocol 5 has it, of bytes in the same words."""
    made = b"cnumpy.core.numeric\n_frombuffer\n(" + content + b"cnumpy\ndtype\n(" + text(code) + b"K\x00K\x01tR"
    return made + b"\x8a\x08" + shape.to_bytes(8, "little") + b"\x85" + text("C") + b"tR"


def many_copies(n_bytes: int) -> bytes:
    """The same bytes in a hundred arrays."""
    content = b"B" + n_bytes.to_bytes(4, "little") + bytes(n_bytes) + b"q\x05"
    return b"](" + content + 100 * an_array("u1", b"h\x05", n_bytes) + b"e"


def shared_lists(depth: int) -> bytes:
    """A list that contains the same list twice, and so on; written out, 2^depth entries."""
    return b"]q\x010" + depth * b"]q\x02(h\x01h\x01e0h\x02q\x010" + b"h\x01"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "tuples within tuples as a key": (b"}" + b")" + 400_000 * b"\x85" + b"K\x01s", "a tuple is a key"),
    "a doubled tuple as a key": (b"}" + b")" + 200 * b"2\x86" + b"K\x01s", "a tuple is a key"),
    "keys at once": (b"}(" + b")" + 200 * b"2\x86" + b"K\x01u", "a tuple is a key"),
    "keys in the oldest words": (b"()" + 200 * b"2\x86" + b"K\x01d", "a tuple is a key"),
    "a tuple in a set": (b"\x8f(" + b")" + 200 * b"2\x86" + b"\x90", "a tuple is a key, or in a set"),
    "a tuple in a frozen set": (b"(" + b")" + 200 * b"2\x86" + b"\x91", "a tuple is a key, or in a set"),
    "a tuple in an old set": (b"cbuiltins\nset\n(](" + b")" + 200 * b"2\x86" + b"etR", "a tuple is a key, or in"),
    "bytes that are not there": (b"\x96" + (1 << 40).to_bytes(8, "little") + b"abc", "truncated"),
    "text without characters": (b"]" + an_array("S0", b"C\x00", 8 * 10**9) + b"a", "without characters"),
    "copies": (many_copies(100_000), "far larger than the file"),
    "copies of text": (
        b"](" + text("x" * 100_000) + b"q\x05" + 100 * (b"cpathlib\nPurePosixPath\n(h\x05tR") + b"e",
        "far larger than the file",
    ),
    "a type of lists": (b"cnumpy\ndtype\n(" + shared_lists(60) + b"K\x00K\x01tR", "arrays of type unknown"),
    "a shape of lists": (
        b"cnumpy.core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n("
        + text("u1")
        + b"tR"
        + shared_lists(60)
        + b"X\1\0\0\0CtR",
        "shape of an array",
    ),
    "a reference of lists": (shared_lists(60) + b"Q", "reference to another object"),
    "millions of lists": (10_000_000 * b"]", "more than 500000 instructions"),
    "a complex number of text": (b"cbuiltins\ncomplex\n(" + 2 * text("1" * 1000) + b"tR", "not made of numbers"),
    "a long name": (b"c" + b"x" * 100_000 + b"\ny\n", "x…, which is not read"),
    "a state of a path": (
        b"cpathlib\nPurePosixPath\n(X\1\0\0\0atRN}X\4\0\0\0_strK\1s\x86b",
        "a state was given to a value",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_short_file_takes_neither_time_nor_memory(tmp_path: Path, name: str) -> None:
    content, said = HOSTILE[name]
    with pytest.raises(ResultsError, match=said) as caught:
        load_object(write(tmp_path / "ops.npy", content + b"."))
    assert len(str(caught.value)) < 1000


def test_many_values_are_read(tmp_path: Path) -> None:
    """Far more than an ``ops.npy`` has, such as the names of all files of a long experiment."""
    value = {"files": [f"recording_{number}.bin" for number in range(50_000)], "numbers": list(range(100_000))}
    assert load_object(write(tmp_path / "ops.npy", pickled(value, 4))) == value


def test_types_become_their_names(tmp_path: Path) -> None:
    value = {"data_dtype": np.dtype("int16"), "swapped": [np.dtype(">f4")], "nothing": np.str_("")}
    found = load_object(write(tmp_path / "ops.npy", pickled(value, 4)))
    assert found == {"data_dtype": "int16", "swapped": ["float32"], "nothing": ""}


def test_other_keys(tmp_path: Path) -> None:
    value = {Path("a"): 1, None: 2, 1.5: 3, np.int64(4): 4, b"b": 5, True: 6}
    assert load_object(write(tmp_path / "ops.npy", pickled(value, 4))) == value


WHOLE = pickled({name: VALUES[name] for name in ("numbers", "arrays", "paths", "scalars")}, 4)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_an_error_or_another_value(tmp_path_factory: Any, at: int, byte: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    write(path, WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    with suppress(ResultsError):
        load_object(path)
