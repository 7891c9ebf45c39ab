"""The store of a run: what was finished is recalled, what does not belong is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ks4stream.errors import Ks4StreamWarning, ResultsError
from ks4stream.io import objects, run_store
from ks4stream.io.objects import Version
from ks4stream.io.places import ObjectPath, read_whole, remove, size_of
from ks4stream.io.records import write_record
from ks4stream.io.run_store import FREE, Checkpointed, ObjectLock, RunStore, open_store, record_path
from ks4stream.io.tables import Receipt, read_column, write_block


def squares(number: int) -> list[int]:
    return [number, number**2]


def test_what_was_computed_is_recalled(tmp_path: Path) -> None:
    stage = RunStore(tmp_path).stage("first clustering", "ab" * 32)
    assert stage.recall([1, 2, 3]) == {}
    task = Checkpointed(squares, stage)
    assert [task(2), task(3)] == [[2, 4], [3, 9]]
    assert stage.recall([1, 2, 3]) == {1: [2, 4], 2: [3, 9]}
    assert RunStore(tmp_path).stage("first clustering", "ac" * 32).recall([2]) == {}
    assert stage.folder.name == "first-clustering-" + "ab" * 10


def test_a_task_that_comes_again_is_not_computed_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def watched(number: int) -> list[int]:
        seen.append(number)
        return squares(number)

    task = Checkpointed(watched, RunStore(tmp_path).stage("x", "0" * 64))
    assert task(2) == task(2) == [2, 4]
    assert seen == [2]
    path = record_path(task.store.folder, 2)
    path.write_bytes(path.read_bytes()[:-20])
    assert task(2) == [2, 4]
    assert seen == [2, 2]


def test_what_is_damaged_is_not_known_and_goes(tmp_path: Path) -> None:
    stage = RunStore(tmp_path).stage("x", "0" * 64)
    task = Checkpointed(squares, stage)
    for number in (1, 2):
        task(number)
    path = record_path(stage.folder, 2)
    path.write_bytes(path.read_bytes()[:-20])
    assert stage.recall([1, 2]) == {0: [1, 1]}
    assert not path.exists()


def test_a_receipt_counts_as_long_as_its_file_is_there(tmp_path: Path) -> None:
    stage = RunStore(tmp_path).stage("x", "0" * 64)

    def write(number: int) -> Receipt:
        return write_block(stage.folder / f"{number}.rows", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)

    receipts = [Checkpointed(write, stage)(number) for number in (3, 4)]
    found = stage.recall([3, 4])
    assert [found[i].digest() for i in (0, 1)] == [receipt.digest() for receipt in receipts]
    Path(receipts[0].path).unlink()
    assert list(stage.recall([3, 4])) == [1]


class Deep(NamedTuple):
    several: list[Receipt]
    by_name: dict[str, Any]


@dataclass(frozen=True)
class Holding:
    number: int
    rows: Receipt


def test_receipts_count_and_move_wherever_they_are_in_a_result(tmp_path: Path) -> None:
    stage = RunStore(tmp_path / "a").stage("x", "0" * 64, (Deep, Holding))

    def write(number: int) -> Deep:
        one, two, three = (
            write_block(stage.folder / f"{name}.rows", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)
            for name in ("one", "two", "three")
        )
        return Deep([one], {"two": (two, 5), "three": Holding(7, three)})

    Checkpointed(write, stage)(4)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = RunStore(tmp_path / "b").stage("x", "0" * 64, (Deep, Holding))
    found = moved.recall([4])[0]
    assert type(found) is Deep and found.by_name["two"][1] == 5 and found.by_name["three"].number == 7
    for receipt in (found.several[0], found.by_name["two"][0], found.by_name["three"].rows):
        assert read_column(receipt, "a").tolist() == [0, 1, 2, 3]
    (moved.folder / "three.rows").unlink()
    assert moved.recall([4]) == {}


def test_only_one_run_at_a_time_and_nothing_is_left_locked(tmp_path: Path) -> None:
    with (
        open_store(tmp_path / "run", data="a"),
        pytest.raises(ResultsError, match="Another run is writing"),
        open_store(tmp_path / "run", data="a"),
    ):
        pass
    for error in (KeyboardInterrupt, ResultsError):  # kept, as a notebook does: the lock is free nevertheless
        with pytest.raises(error) as kept, open_store(tmp_path / "run", data="a"):
            raise error
        assert kept.value is not None
    with open_store(tmp_path / "run", data="a"):
        pass


HOLD = """
import sys
from pathlib import Path
from ks4stream.io.run_store import open_store

with open_store(Path(sys.argv[1]), data="a"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_holds_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ResultsError, match="Another run is writing"), open_store(tmp_path / "run", data="a"):
            pass
        other.send_signal(signal.SIGKILL)
    with open_store(tmp_path / "run", data="a"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has locks everywhere")
def test_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)  # a marker takes its place
    marker = tmp_path / "a" / "lock"
    says_so = "flock not supported"
    with pytest.warns(UserWarning, match=says_so), open_store(tmp_path / "a", data="a"):
        left = marker.read_text()
        with (
            pytest.warns(UserWarning, match=says_so),
            pytest.raises(ResultsError, match=r"delete .*lock"),
            open_store(tmp_path / "a", data="a"),
        ):
            pass
    marker.write_text(left.replace(str(os.getpid()), str(2**22 + 1)))  # as left by a process that is no more
    with pytest.warns(UserWarning, match=says_so), open_store(tmp_path / "a", data="a"):
        pass
    refuse(errno.ENOLCK)  # a network mount without its daemon
    with pytest.raises(ResultsError, match="cannot be written to"), open_store(tmp_path / "b", data="a"):
        pass


def test_drafts_of_killed_workers_go(tmp_path: Path) -> None:
    with open_store(tmp_path, data="a") as store:
        Checkpointed(squares, store.stage("x", "0" * 64))(3)
    folder = store.stage("x", "0" * 64).folder
    (folder / f"b.{'01' * 16}.draft").write_bytes(b"half")
    (folder / "letter.draft").write_text("of a person")
    with open_store(tmp_path, data="a") as store:
        assert {path.name for path in folder.iterdir()} == {record_path(folder, 3).name, "letter.draft"}


def test_what_the_last_sort_did_not_use_goes(tmp_path: Path) -> None:
    for keys in ("ab", "ac"):
        with open_store(tmp_path, data="a") as store:
            for key in keys:
                Checkpointed(squares, store.stage("x", key * 64))(3)
            store.tidy(keep=True)
    assert sorted(path.name for path in tmp_path.glob("x-*")) == ["x-" + "a" * 20, "x-" + "c" * 20]
    store.tidy(keep=False)
    assert not list(tmp_path.glob("x-*"))


def test_a_task_that_still_writes_while_others_tidy_up_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that a sort which was stopped left running on its user's cluster."""
    store = RunStore(tmp_path)
    for name in "ab":
        write_record(record_path(RunStore(tmp_path).stage(name, "0" * 64).folder, 1), 1)

    def still_filled(where: Path, *, folder: bool) -> None:
        if where.name.startswith("a"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        remove(where, folder=folder)

    monkeypatch.setattr(run_store, "remove", still_filled)
    store.tidy(keep=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a-" + "0" * 20] and "could not be removed" in caplog.text


@pytest.mark.parametrize("options", [{"fresh": True}, {"recall": False}])
def test_a_task_that_still_writes_while_a_store_is_emptied_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    folder, real = tmp_path / "run", shutil.rmtree
    with open_store(folder, data="a") as store:
        stages = [store.stage(name, "0" * 64).folder for name in "ab"]
        for stage in stages:
            write_record(record_path(stage, 1), 1)

    def still_filled(where: Path, **given: Any) -> None:
        """A file appears between the listing of a folder and its removal; the task knows only the stage's name."""
        if where.is_relative_to(folder) and where.name != run_store.SCRATCH:
            for stage in stages:
                write_record(record_path(stage, 2), 2)
                if where == stage:
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        real(where, **given)

    monkeypatch.setattr(shutil, "rmtree", still_filled)
    with open_store(folder, data="a", **options):
        assert not any(record_path(stage, 1).exists() for stage in stages)
        assert not any((folder / run_store.SCRATCH).iterdir())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["data.bin", "scratch/thesis.txt", "letter.draft"])
def test_a_folder_that_is_not_a_store_is_left_alone(tmp_path: Path, name: str, fresh: bool) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with (
        pytest.raises(ResultsError, match="not the store of a ks4stream run"),
        open_store(tmp_path / "run", data="a", fresh=fresh),
    ):
        pass
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("step", ["mkdir", "replace"])
def test_a_store_is_known_however_its_beginning_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, fresh: bool
) -> None:
    left, real = [0], getattr(Path, step)

    def killed(*given: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given, **options)

    for name, number in [("new", 0), ("new", 1), ("new", 2), ("new", 3), ("old", 99), ("old", 0), ("old", 1)]:
        folder = tmp_path / name / str(number if name == "new" else "")
        left[0] = number
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, step, killed)
            with open_store(folder, data="x", fresh=fresh):
                pass
        with open_store(folder, data="x", fresh=fresh):
            pass


def test_a_store_may_be_moved(tmp_path: Path) -> None:
    stage = RunStore(tmp_path / "a").stage("x", "0" * 64)

    def write(number: int) -> Receipt:
        return write_block(stage.folder / "1.rows", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)

    Checkpointed(write, stage)(3)
    (tmp_path / "a").rename(tmp_path / "b")
    found = RunStore(tmp_path / "b").stage("x", "0" * 64).recall([3])[0]
    assert read_column(found, "a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data": "b"}, "belongs to another recording"),
        ({"method": -1}, "another version"),
        ({"format": "ks4stream.Run/0"}, "another version"),
    ],
)
def test_a_store_that_does_not_belong_is_refused_and_left_alone(
    tmp_path: Path, entry: dict[str, object], message: str
) -> None:
    with open_store(tmp_path / "run", data="a") as store:
        Checkpointed(squares, store.stage("x", "0" * 64))(3)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | entry))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    with pytest.raises(ResultsError, match=message), open_store(tmp_path / "run", data="a"):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before
    with open_store(tmp_path / "run", data="a", fresh=True) as store:
        assert store.stage("x", "0" * 64).recall([3]) == {}


def test_a_store_is_known_however_its_emptying_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path / "run", data="x") as store:
        write_record(record_path(store.stage("a", "0" * 64).folder, 1), 1)
        write_record(record_path(store.stage("z", "0" * 64).folder, 1), 1)
    removed = []

    def killed(where: Path, *, folder: bool = False) -> None:
        removed.append(where.name)
        if len(removed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_store, "remove", killed)
    with pytest.raises(KeyboardInterrupt), open_store(tmp_path / "run", data="y", fresh=True):
        pass
    assert run_store.MANIFEST not in removed
    monkeypatch.undo()
    draft = tmp_path / "run" / f"manifest.{'01' * 16}.draft"
    draft.write_text("{")
    with open_store(tmp_path / "run", data="y", fresh=True) as store:
        assert not draft.exists()


def test_what_may_have_changed_is_not_recalled_but_what_is_another_recordings_is_left(tmp_path: Path) -> None:
    with open_store(tmp_path / "run", data="x") as store:
        path = record_path(store.stage("a", "0" * 64).folder, 1)
        write_record(path, 1)
    with pytest.raises(ResultsError, match="another recording"), open_store(tmp_path / "run", data="y", recall=False):
        pass
    assert path.exists()
    with open_store(tmp_path / "run", data="x", recall=False):
        assert not path.exists()


def test_what_is_mapped_is_no_stage(tmp_path: Path) -> None:
    with open_store(tmp_path / "run", data="x") as store:
        store.tidy(keep=False)
        assert store.scratch.is_dir()


# -- locks that are objects ----------------------------------------------------------------------------------------

NEVER_S = 600.0  # longer than any test
QUICK = {"lease_s": 0.3, "looked_s": 0.1}  # of somebody who looks at another's lock


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_in_one_prefix_are_refused_and_say_who_is_there(
    object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "RENEWED_S", 0.05)
    monkeypatch.setattr(run_store, "LOOKED_S", 0.2)
    folder = ObjectPath("s3://recordings/locked/run")
    for _ in range(2):  # the second finds a lock that was let go of
        with (
            open_store(folder, data="x"),
            pytest.warns(Ks4StreamWarning, match=rf"\(process {os.getpid()} on .*\) holds .*Waiting up to 120 s"),
            pytest.raises(ResultsError, match=rf"writing to s3://recordings/locked \(process {os.getpid()} on"),
        ):
            open_store(folder, data="x").__enter__()
    assert read_whole(folder / "lock") == FREE


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong_makes_no_second_owner(
    hours: int, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's is an hour ahead or behind."""
    skewed = timedelta(hours=hours)
    monkeypatch.setattr("moto.s3.models.utcnow", lambda: datetime.now(UTC).replace(tzinfo=None) + skewed)
    monkeypatch.setattr(run_store, "RENEWED_S", 0.05)
    monkeypatch.setattr(run_store, "LOOKED_S", 0.2)
    lock = ObjectPath(f"s3://recordings/skewed{hours}/run/lock")
    with (
        ObjectLock(lock),
        pytest.warns(Ks4StreamWarning, match="holds"),
        pytest.raises(ResultsError, match="Another run is writing"),
    ):
        ObjectLock(lock).__enter__()


@pytest.mark.parametrize("left", [None, FREE, b"node 1 killed 7"])
def test_one_of_many_simultaneous_claims_gets_the_lock(
    left: bytes | None, object_store: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """There was none, it is free, or its holder was killed."""
    lock = ObjectPath(f"s3://recordings/crowd-{left and left[:4].decode()}/run/lock")
    if left is not None:
        objects.write_bytes(str(lock), left)
    together, owners, refused = threading.Barrier(6), [], []

    def claim(number: int) -> None:
        together.wait(300)
        try:
            with ObjectLock(lock, renewed_s=0.02, lease_s=3.0, looked_s=0.5):  # far from each other on a busy machine
                owners.append(number)
                until(lambda: len(owners) + len(refused) == 6)
        except ResultsError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(claim, range(6)))
    assert len(owners) == 1
    assert all("Another run is writing" in said for said in refused)
    assert read_whole(lock) == FREE


HOLD_OBJECT = """
import sys
from ks4stream.errors import ResultsError
from ks4stream.io import run_store
from ks4stream.io.places import place

run_store.RENEWED_S = float(sys.argv[2])
try:
    with run_store.open_store(place(sys.argv[1]), data="a") as store:
        print("held", flush=True)
        sys.stdin.readline()
        store.stage("x", "0" * 64)
except ResultsError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be suspended there")
def test_a_run_that_was_suspended_ends_before_it_writes_and_leaves_the_other_its_lock(object_store: Any) -> None:
    folder = "s3://recordings/suspended/run"
    lock = ObjectPath(f"{folder}/lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_OBJECT, folder, "0.05"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # a renewal that it has sent may still be on its way
        try:
            with pytest.warns(Ks4StreamWarning, match=f"process {other.pid} on"), ObjectLock(lock, **QUICK):
                other.send_signal(signal.SIGCONT)
                said, _ = other.communicate("go on\n", timeout=300)
                assert "was taken over by another run" in said and f"process {os.getpid()} on" in said
                assert "Traceback" not in said and read_whole(lock) != FREE
        finally:
            other.kill()  # also while it is suspended; else its end would be waited for
    assert read_whole(lock) == FREE


@pytest.mark.skipif(sys.platform != "linux", reason="only there it is known in what process numbers are unique")
def test_a_lock_of_a_process_that_died_on_this_machine_is_not_waited_for(object_store: Any) -> None:
    folder = "s3://recordings/died/run"
    command = [sys.executable, "-c", HOLD_OBJECT, folder, str(NEVER_S)]  # nothing is on its way when it is killed
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
        finally:
            other.kill()
    lock = ObjectPath(f"{folder}/lock")
    left = read_whole(lock)
    with ObjectLock(lock, renewed_s=NEVER_S):  # a warning would be an error: it waits
        pass
    elsewhere = left.replace(left.split()[2].partition(b":")[0], b"another-start")
    objects.write_bytes(str(lock), elsewhere)
    with pytest.warns(Ks4StreamWarning, match="Waiting up to"), ObjectLock(lock, **QUICK):
        pass


def test_what_was_taken_over_is_neither_renewed_nor_released_nor_tidied(
    object_store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lock = ObjectPath("s3://recordings/taken/run/lock")
    with ObjectLock(lock, renewed_s=0.05) as held:
        objects.write_bytes(str(lock), b"node 2 another 1")
        until(lambda: "was taken over by another run (process 2 on node)" in caplog.text)  # said at once
        store = RunStore(lock.parent, lock=held)
        for write in (lambda: store.stage("x", "0" * 64), lambda: store.tidy(keep=False), store.check):
            with pytest.raises(ResultsError, match="taken over by another run"):
                write()
    assert read_whole(lock) == b"node 2 another 1"


def test_a_lock_that_somebody_removed_is_held_again(object_store: Any) -> None:
    lock = ObjectPath("s3://recordings/removed/run/lock")
    with ObjectLock(lock, renewed_s=0.02) as held:
        remove(lock)
        until(lambda: size_of(lock) is not None)
        held.renew()
    assert read_whole(lock) == FREE


def test_an_answer_that_was_lost_is_not_anothers_claim(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object was written, and when it was asked again the store said that it had changed."""

    def lost(location: str, content: bytes, version: Version | None) -> None:
        objects.write_if(location, content, version)

    monkeypatch.setattr(run_store, "write_if", lost)
    lock = ObjectPath("s3://recordings/lost/run/lock")
    with ObjectLock(lock, renewed_s=NEVER_S) as held:
        held.renew()
    assert read_whole(lock) == FREE


@pytest.mark.parametrize("is_written", [True, False])
def test_a_write_that_fails_is_looked_after_and_tried_again(
    is_written: bool, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer came in time, whether or not the object was written."""
    left = [2]

    def fail(location: str, content: bytes, version: Version | None) -> Version | None:
        written = objects.write_if(location, content, version) if is_written or not left[0] else None
        if left[0]:
            left[0] -= 1
            raise ResultsError("no answer")
        return written

    lock = ObjectPath(f"s3://recordings/failed-{is_written}/run/lock")
    with ObjectLock(lock, renewed_s=NEVER_S, looked_s=0.01) as held:
        monkeypatch.setattr(run_store, "write_if", fail)
        for _ in range(2):
            held.renew()
        assert not left[0]
        left[0] = is_written  # an answer may be missing at the end, too
    assert read_whole(lock) == FREE


def test_a_write_of_which_nobody_knew_for_long_is_not_anothers_claim(
    object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was done, and then the store was out of reach for longer than anybody tries."""

    def fail(location: str, *given: Any) -> None:
        if given:
            objects.write_if(location, *given)
        raise ResultsError("no answer")

    lock = ObjectPath("s3://recordings/unknown/run/lock")
    with ObjectLock(lock, lease_s=0.0, renewed_s=NEVER_S) as held:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ResultsError, match="no answer"):
            patch.setattr(run_store, "write_if", fail)
            patch.setattr(run_store, "read_versioned", fail)
            held.renew()
        held.renew()
    assert read_whole(lock) == FREE


def test_the_end_does_not_wait_for_a_store_out_of_reach(
    object_store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()

    def late(location: str, content: bytes, version: Version | None) -> Version | None:
        answers.wait(30)
        return objects.write_if(location, content, version)

    monkeypatch.setattr(run_store, "RELEASED_S", 0.1)
    lock = ObjectPath("s3://recordings/late/run/lock")
    with ObjectLock(lock, renewed_s=NEVER_S) as held:
        monkeypatch.setattr(run_store, "write_if", late)
    assert "could not be released and stays for 120 s: the store has not answered yet" in caplog.text
    answers.set()
    held._renewing.join(300)
    assert read_whole(lock) == FREE


def taken_over(lock: ObjectPath, held: ObjectLock) -> bool:
    """Whether a holder learns of a claim; without conditions a renewal that is under way would undo it."""
    with held._turn:
        objects.write_bytes(str(lock), b"node 2 another 1")
    try:
        held.renew()
    except ResultsError as error:
        return "taken over by another run (process 2 on node)" in str(error)
    return False


@pytest.mark.parametrize("how", ["says so", "answers 501", "creates only", "writes anyway"])
def test_a_store_without_conditions_is_told_once_and_has_a_lock_nevertheless(
    how: str, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore")
    put = obstore.put

    def answer_501(*given: Any, mode: Any = None) -> Any:
        if isinstance(mode, dict) or (mode == "create" and how == "answers 501"):
            raise obstore.exceptions.GenericError("… after 4 retries - Server returned: 501 Not Implemented: <xml>")
        return put(*given, mode=mode)

    if how == "says so":
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    elif how in ("answers 501", "creates only"):
        monkeypatch.setattr(obstore, "put", answer_501)
    object_store.proxy.heeds_conditions = how != "writes anyway"
    monkeypatch.setattr(run_store, "SETTLED_S", 0.05)
    lock = ObjectPath(f"s3://recordings/unconditional-{how[:4]}/run/lock")
    for _ in range(2):
        with pytest.warns(Ks4StreamWarning) as told, ObjectLock(lock, renewed_s=0.05) as held:
            held.renew()
            with pytest.raises(ResultsError, match="Another run is writing"):
                ObjectLock(lock, looked_s=0.2).__enter__()
            until(lambda: taken_over(lock, held))
        assert [str(one.message).split()[0:2] for one in told] == [["The", "store"], ["Another", "run"]]
        assert read_whole(lock) == b"node 2 another 1"
        objects.write_bytes(str(lock), FREE)


def test_without_conditional_writes_the_last_writer_gets_the_lock(
    object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    lock = ObjectPath("s3://recordings/settled/run/lock")
    monkeypatch.setattr(time, "sleep", lambda _: objects.write_bytes(str(lock), b"node 2 another 1"))
    with (
        pytest.warns(Ks4StreamWarning, match="does not support conditional writes"),
        pytest.raises(ResultsError, match=r"Another run is writing to .* \(process 2 on node\)"),
    ):
        ObjectLock(lock).__enter__()


def test_a_store_that_fails_at_the_end_is_no_error_of_the_run(
    object_store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ResultsError("no answer")

    with ObjectLock(ObjectPath("s3://recordings/failing/run/lock"), lease_s=0.0, renewed_s=NEVER_S):
        monkeypatch.setattr(run_store, "write_if", fail)
    assert "could not be released and stays for 0 s: no answer" in caplog.text


def test_a_release_that_fails_once_is_tried_again(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1]

    def fail_once(location: str, content: bytes, version: Version | None) -> Version | None:
        if left:
            left.pop()
            raise ResultsError("no answer")
        return objects.write_if(location, content, version)

    lock = ObjectPath("s3://recordings/released/run/lock")
    with ObjectLock(lock, renewed_s=NEVER_S, looked_s=0.01):
        monkeypatch.setattr(run_store, "write_if", fail_once)
    assert read_whole(lock) == FREE
