"""Values as files without pickles, and keys of what a computation depends on."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ks4stream import simulate
from ks4stream.errors import DamagedFileError
from ks4stream.io.recordings import open_recording
from ks4stream.io.records import key_of, read_record, write_record
from ks4stream.settings import Settings


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass(frozen=True)
class Plain:
    number: int
    values: Any


@dataclass(frozen=True)
class Frozen:
    number: int
    values: Any
    folder: Path = Path()
    _ready: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize("value", [None, True, 3, -0.1, "µm", [], [1, [2.5, None]], (1, "a"), {"a": (1,), "b": {}}])
def test_plain_values_come_back(tmp_path: Path, value: Any) -> None:
    write_record(tmp_path / "a.npz", value)
    found = read_record(tmp_path / "a.npz", ())
    assert found == value
    assert type(found) is type(value)


def test_arrays_and_named_classes_come_back(tmp_path: Path) -> None:
    some = np.arange(6, dtype=np.int32).reshape(2, 3)
    value = [Pair(some, None), Pair(np.zeros((0, 4)), Plain(7, np.array([True])))]
    write_record(tmp_path / "deep" / "a.npz", value)
    one, other = read_record(tmp_path / "deep" / "a.npz", (Pair, Plain))
    np.testing.assert_array_equal(one.one, some)
    assert one.one.dtype == np.int32
    assert other.one.shape == (0, 4)
    assert (other.other.number, other.other.values.tolist()) == (7, [True])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_only_classes_that_were_named_are_made(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz", Pair(1, 2))
    with pytest.raises(DamagedFileError):
        read_record(tmp_path / "a.npz", (Frozen,))


def test_what_has_no_arrays_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a value of type object"):
        write_record(tmp_path / "a.npz", [object()])
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_record(tmp_path / "a.npz", np.array([object()]))
    with pytest.raises(TypeError, match="Keys in a record must be strings, as they would come back as such; 1 is not"):
        write_record(tmp_path / "a.npz", [{"a": 0, 1: 2}])
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_record(path, np.arange(50))
    whole = path.read_bytes()
    header = whole.index(b"'shape': (50,)")
    values = range(whole.index(np.int64(7).tobytes()), whole.index(np.int64(9).tobytes()))
    for at in [*range(header, header + 14), *values]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedFileError):
            read_record(path, ())
    path.write_bytes(whole[:-30])
    with pytest.raises(DamagedFileError, match="Check the disk"):
        read_record(path, ())


def test_whatever_bit_flips_nothing_else_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_record(path, np.arange(5))
    whole = path.read_bytes()
    damaged = 0
    for at in range(len(whole)):  # also the archive's directory: offsets, sizes, flags
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            np.testing.assert_array_equal(read_record(path, ()), np.arange(5))  # times, say, are of no account
        except DamagedFileError:
            damaged += 1
    assert damaged > len(whole) / 2


def test_a_damaged_file_is_named_in_any_process() -> None:
    error = pickle.loads(pickle.dumps(DamagedFileError("a.npz")))
    assert (error.path, str(error)) == ("a.npz", str(DamagedFileError("a.npz")))


def test_keys_tell_values_apart_and_are_the_same_again() -> None:
    array = np.arange(6)
    values = [
        None,
        0,
        0.0,
        False,
        "0",
        [0],
        [[0]],
        {"a": 0},
        array,
        array.reshape(2, 3),
        array.astype(np.int32),
        Pair(0, 1),
        Pair(1, 0),
        Frozen(0, array),
        Frozen(0, array + 1),
        [1, 2],
        [12],
    ]
    assert len({key_of(value) for value in values}) == len(values)
    assert key_of(array.reshape(2, 3)) == key_of(np.asfortranarray(array.reshape(2, 3)))
    assert key_of(1, 2) != key_of(2, 1)
    with pytest.raises(TypeError, match="value of type object cannot be hashed"):
        key_of(object())


def test_places_and_caches_do_not_count() -> None:
    assert key_of(Frozen(1, 2, Path("a"), {"x": 1})) == key_of(Frozen(1, 2, Path("b")))


def test_of_settings_those_count_that_a_stage_reads() -> None:
    one, other = Settings(), Settings(Th_learned=7, sig_interp=30)
    assert key_of(one.part("detection")) == key_of(other.part("detection"))
    assert key_of(one.part("matching")) != key_of(other.part("matching"))
    assert key_of(one.part("sig_interp")) != key_of(other.part("sig_interp"))


def test_of_recordings_data_and_probe_count() -> None:
    samples = np.random.default_rng(0).integers(-100, 100, (1000, 4), np.int16)
    probe = simulate.tetrode_probe(1)
    one = open_recording(samples, fs=30_000, probe=probe)
    assert key_of(one) == key_of(open_recording(samples.copy(), fs=30_000, probe=probe))
    assert key_of(one) != key_of(open_recording(samples + 1, fs=30_000, probe=probe))
    assert key_of(one) != key_of(open_recording(samples, fs=30_000, probe=probe.drop_channels([2])))
