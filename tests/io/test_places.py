"""Folders and prefixes of object stores, by the same functions."""

from __future__ import annotations

import os
import pickle
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import DamagedFileError, RecordingError, ResultsError
from ks4stream.io import run_store
from ks4stream.io.atomic import atomic_write
from ks4stream.io.objects import listing
from ks4stream.io.places import (
    ObjectPath,
    Place,
    below,
    copy_here,
    copy_there,
    move,
    place,
    read_range,
    read_whole,
    remove,
    size_of,
)
from ks4stream.io.records import key_of, read_record, write_record
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.io.run_store import Checkpointed, RunStore, open_store, record_path
from ks4stream.io.tables import Receipt, localize, read_column, read_region, write_block

pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture(params=["folder", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of either kind."""
    if request.param == "folder":
        return tmp_path / "place"
    request.getfixturevalue("object_store")
    return ObjectPath(f"s3://recordings/places/{tmp_path.name}-{os.getpid()}-{time.monotonic_ns()}")


def write(where: Place, content: bytes) -> None:
    with atomic_write(where) as file:
        file.write(content)


def test_addresses_become_places() -> None:
    assert place("s3://bucket/key/") == ObjectPath("s3://bucket/key")
    assert place("here") == Path("here").absolute()
    assert place(Path("/there")) == Path("/there")
    with pytest.raises(ResultsError, match="Nothing can be written to https"):
        place("https://server/results")


def test_an_object_has_a_name_and_a_parent() -> None:
    found = ObjectPath("s3://bucket/run") / "stage one" / "a#1.rows"
    assert (str(found), found.name) == ("s3://bucket/run/stage one/a#1.rows", "a#1.rows")
    assert found.parent == ObjectPath("s3://bucket/run/stage one")
    assert pickle.loads(pickle.dumps(found)) == found


def test_keys_do_not_depend_on_where_a_file_lies() -> None:
    assert key_of(1, ObjectPath("s3://a/b")) == key_of(1, Path("/c")) == key_of(1)


def test_what_was_written_is_there(where: Place) -> None:
    file = where / "stage" / "a.rows"
    assert size_of(file) is None
    write(file, b"0123456789")
    write(where / "manifest", b"")
    assert (size_of(file), size_of(where / "manifest")) == (10, 0)
    assert read_range(file, 2, 5) == b"234"
    assert read_whole(file) == b"0123456789"
    assert sorted(below(where)) == [("manifest", False), ("stage", True)]
    with pytest.raises(EOFError):
        read_range(file, 8, 12)
    with pytest.raises((FileNotFoundError, DamagedFileError)):
        read_whole(where / "nothing")


def test_what_is_removed_is_gone(where: Place) -> None:
    for name in ("a", "b", "c"):
        write(where / "stage" / name, name.encode())
    remove(where / "stage" / "a")
    remove(where / "stage" / "a")  # again
    assert sorted(name for name, _ in below(where / "stage")) == ["b", "c"]
    remove(where / "stage", folder=True)
    assert list(below(where)) == []


def test_a_write_that_fails_leaves_nothing(where: Place) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(where / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert size_of(where / "a") is None


def test_a_move_replaces_nothing(where: Place) -> None:
    home, aside = where / "home", where / "aside"
    for name in ("a", "b", "deep/c"):
        write(home / name, name.encode())
    write(aside / "deep" / "c", b"another")
    with pytest.raises(FileExistsError):
        move(home, aside, ["a", "deep"])
    assert read_whole(aside / "deep" / "c") == b"another" and size_of(aside / "a") is None
    assert read_whole(home / "deep" / "c") == b"deep/c"
    move(home, aside, ["a", "gone"])
    assert sorted(below(home)) == [("b", False), ("deep", True)] and read_whole(aside / "a") == b"a"


def test_copies_left_by_an_interrupted_move_do_not_block_it(object_store: Any) -> None:
    """Also if the copy has another tag, as that of an object which was written in parts."""
    home, aside = ObjectPath("s3://recordings/left/home"), ObjectPath("s3://recordings/left/aside")
    of = {"Bucket": "recordings", "Key": "left/home/same"}
    begun = object_store.client.create_multipart_upload(**of)["UploadId"]
    part = object_store.client.upload_part(**of, UploadId=begun, PartNumber=1, Body=b"12345")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    object_store.client.complete_multipart_upload(**of, UploadId=begun, MultipartUpload=parts)
    write(aside / "same", b"12345")
    assert dict(listing(str(home))) != dict(listing(str(aside)))
    move(home, aside, ["same"])
    assert not any(below(home)) and read_whole(aside / "same") == b"12345"
    write(home / "same", b"54321")
    with pytest.raises(FileExistsError):
        move(home, aside, ["same"])


def test_copies(where: Place, tmp_path: Path) -> None:
    write(where / "a.rows", b"abc")
    copy = copy_here(where / "a.rows", tmp_path)
    assert copy.read_bytes() == b"abc"
    assert (copy == where / "a.rows") == isinstance(where, Path)


def test_a_folder_is_copied_with_all_that_is_in_it(object_store: Any, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    there = ObjectPath(f"s3://recordings/places/{tmp_path.name}-copied")
    copy_there(tmp_path, there)
    assert read_whole(there / "deep" / "a.txt") == b"a"
    assert sorted(below(there)) == [("b.txt", False), ("deep", True)]


def test_records_and_blocks_come_back(where: Place, tmp_path: Path) -> None:
    write_record(where / "1.record.npz", {"a": np.arange(3), "text": "µ"})
    found = read_record(where / "1.record.npz", ())
    assert found["a"].tolist() == [0, 1, 2] and found["text"] == "µ"
    columns = {"time": np.arange(5), "pair": np.arange(10, dtype=np.float32).reshape(5, 2)}
    receipt = write_block(where / "1.rows", columns, np.array([1, 0, 1, 0, 2]), 3)
    assert receipt.is_there()
    assert read_region([receipt], "pair", 1).tolist() == [[0, 1], [4, 5]]
    near = localize(receipt, tmp_path)
    assert read_column(near, "time").tolist() == [1, 3, 0, 2, 4]
    assert (near.path == receipt.path) == isinstance(where, Path)
    write(where / "1.rows", read_whole(where / "1.rows")[:-64] + bytes(64))
    with pytest.raises(DamagedFileError):
        read_column(receipt, "pair")


@pytest.mark.slow
def test_what_was_finished_is_recalled_from_either(where: Place) -> None:
    computed = []

    def task(number: int) -> Receipt:
        computed.append(number)
        return write_block(stage.folder / f"{number}.rows", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)

    for _ in range(2):
        with open_store(where / "run", data="x") as store:
            stage = store.stage("detection", "ab" * 32)
            remembered = Checkpointed(task, stage)
            assert [remembered(number).n_rows for number in (3, 4)] == [3, 4]
            store.tidy(keep=True)
    assert computed == [3, 4]
    with pytest.raises(ResultsError, match="another recording"), open_store(where / "run", data="y"):
        pass
    with open_store(where / "run", data="y", fresh=True) as store:
        assert store.stage("detection", "ab" * 32).recall([3, 4]) == {}


def written_rows(folder: Place, number: int) -> Receipt:
    return write_block(folder / f"{number}.rows", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)


def test_many_records_are_recalled_with_one_listing_and_a_request_each(
    object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = RunStore(ObjectPath("s3://recordings/many")).stage("detection", "ab" * 32)
    for number in range(1, 10):
        Checkpointed(partial(written_rows, stage.folder), stage)(number)
    remove(stage.folder / "3.rows")
    write(stage.folder / "4.rows", b"cut short")
    write(record_path(stage.folder, 5), b"no record")
    object_store.proxy.reset_counts()
    listed: list[str] = []
    monkeypatch.setattr(run_store, "listing", lambda location: (listed.append(location), listing(location))[1])
    together = threading.Barrier(3, timeout=300)

    def met(*arguments: Any, **options: Any) -> Any:
        together.wait()  # breaks if fewer than three are on their way at a time
        return read_record(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_store, "read_record", met)
        found = stage.recall(range(20))
    assert {index: receipt.n_rows for index, receipt in found.items()} == {n: n for n in (1, 2, 6, 7, 8, 9)}
    assert listed == [stage.folder.location]
    requests = {name.rpartition("/")[2]: times for name, times in object_store.proxy.requests.items()}
    assert requests == {record_path(stage.folder, number).name: 1 for number in range(1, 10)}
    assert stage.recall(range(20)).keys() == found.keys()

    monkeypatch.setattr(run_store, "listing", lambda _: pytest.fail("a task knows what it asks for"))
    object_store.proxy.reset_counts()
    assert stage.recall([6])[0].n_rows == 6
    assert object_store.proxy.requests.total() == 3, "the record's size, the record, the size of its rows"
    assert stage.recall([5]) == {}


def test_a_store_that_does_not_answer_is_no_damage(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = write_block(ObjectPath("s3://recordings/far/a.rows"), {"a": np.arange(3)}, np.zeros(3, np.int64), 1)

    def silent(*_: Any) -> bytes:
        raise RecordingError("no answer")

    monkeypatch.setattr("ks4stream.io.objects.read_bytes", silent)
    with pytest.raises(RecordingError, match="no answer"):
        read_column(receipt, "a")
    remove(ObjectPath(receipt.path))
    with pytest.raises(DamagedFileError):
        read_column(receipt, "a")


def test_a_store_that_refuses_is_an_error_before_work(object_store: Any, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"s3://no-such-bucket/run.*Check"):
        ResultsFolder.open(place("s3://no-such-bucket/run"))


def test_scratch_is_on_this_machine_and_goes_with_the_run(where: Place) -> None:
    with open_store(where / "run", data="x") as store:
        assert isinstance(store, RunStore) and store.scratch.is_dir()
        (store.scratch / "mapped").write_bytes(b"abc")
    assert not store.scratch.exists()
