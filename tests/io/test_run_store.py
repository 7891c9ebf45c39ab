"""The store of a run: what was finished is recalled, what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.run_store import Remembered, RunStore, open_store, record_path
from ks4stream.io.spikes import Receipt, read_column, write_block


def squares(number: int) -> list[int]:
    return [number, number**2]


def test_what_was_computed_is_recalled(tmp_path: Path) -> None:
    stage = RunStore(tmp_path, ()).stage("first clustering", "ab" * 32)
    assert stage.recall([1, 2, 3]) == {}
    task = Remembered(squares, stage)
    assert [task(2), task(3)] == [[2, 4], [3, 9]]
    assert stage.recall([1, 2, 3]) == {1: [2, 4], 2: [3, 9]}
    assert RunStore(tmp_path, ()).stage("first clustering", "ac" * 32).recall([2]) == {}
    assert stage.folder.name == "first-clustering-" + "ab" * 10


def test_what_is_damaged_is_not_known_and_goes(tmp_path: Path) -> None:
    stage = RunStore(tmp_path, ()).stage("x", "0" * 64)
    task = Remembered(squares, stage)
    for number in (1, 2):
        task(number)
    path = record_path(stage.folder, 2)
    path.write_bytes(path.read_bytes()[:-20])
    assert stage.recall([1, 2]) == {0: [1, 1]}
    assert not path.exists()


def test_a_receipt_counts_as_long_as_its_file_is_there(tmp_path: Path) -> None:
    stage = RunStore(tmp_path, ()).stage("x", "0" * 64)

    def write(number: int) -> Receipt:
        return write_block(stage.folder / f"{number}.npz", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)

    receipts = [Remembered(write, stage)(number) for number in (3, 4)]
    found = stage.recall([3, 4])
    assert [found[i].digest() for i in (0, 1)] == [receipt.digest() for receipt in receipts]
    Path(receipts[0].path).unlink()
    assert list(stage.recall([3, 4])) == [1]


def test_only_one_run_at_a_time_and_nothing_is_left_locked(tmp_path: Path) -> None:
    with (
        open_store(tmp_path / "run", (), data="a"),
        pytest.raises(ResultsError, match="Another run is writing"),
        open_store(tmp_path / "run", (), data="a"),
    ):
        pass
    for error in (KeyboardInterrupt, ResultsError):  # kept, as a notebook does: the lock is free nevertheless
        with pytest.raises(error) as kept, open_store(tmp_path / "run", (), data="a"):
            raise error
        assert kept.value is not None
    with open_store(tmp_path / "run", (), data="a"):
        pass


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.bin").write_text("precious")
    with (
        pytest.raises(ResultsError, match="not the store of a run"),
        open_store(tmp_path / "run", (), data="a", fresh=fresh),
    ):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data.bin"]


def test_a_store_may_be_moved(tmp_path: Path) -> None:
    stage = RunStore(tmp_path / "a", ()).stage("x", "0" * 64)

    def write(number: int) -> Receipt:
        return write_block(stage.folder / "1.npz", {"a": np.arange(number)}, np.zeros(number, np.int64), 1)

    Remembered(write, stage)(3)
    (tmp_path / "a").rename(tmp_path / "b")
    found = RunStore(tmp_path / "b", ()).stage("x", "0" * 64).recall([3])[0]
    assert read_column(found, "a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("entry", "message"), [({"data": "b"}, "of another recording"), ({"method": -1}, "another version"),
                           ({"format": "ks4stream.Run/0"}, "another version")],
)  # fmt: skip
def test_a_store_that_does_not_belong_is_refused_and_left_alone(
    tmp_path: Path, entry: dict[str, object], message: str
) -> None:
    with open_store(tmp_path / "run", (), data="a") as store:
        Remembered(squares, store.stage("x", "0" * 64))(3)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | entry))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    with pytest.raises(ResultsError, match=message), open_store(tmp_path / "run", (), data="a"):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before
    with open_store(tmp_path / "run", (), data="a", fresh=True) as store:
        assert store.stage("x", "0" * 64).recall([3]) == {}
