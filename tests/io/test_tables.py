"""What a block writes, a region reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import DamagedFileError
from ks4stream.io import tables
from ks4stream.io.tables import Receipt, localize, open_columns, pick_region, read_column, read_region, write_block


def write(path: Path, region: list[int], n_regions: int = 3) -> Receipt:
    n = len(region)
    columns = {
        "sample": np.arange(n, dtype=np.int64) + 10**10,  # beyond 32 bits
        "score": np.arange(n, dtype=np.float32) / 2,
        "features": np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3),
    }
    return write_block(path, columns, np.array(region, np.int64), n_regions)


def test_a_regions_rows_come_back_in_their_order_block_after_block(tmp_path: Path) -> None:
    receipts = [write(tmp_path / "a.rows", [2, 0, 2, 0]), write(tmp_path / "b.rows", [0, 2])]
    assert (read_region(receipts, "sample", 0) - 10**10).tolist() == [1, 3, 0]
    assert read_region(receipts, "score", 2).tolist() == [0, 1, 0.5]
    assert read_region(receipts, "features", 2)[:, 0, 0].tolist() == [0, 12, 6]
    assert [receipt.n_rows for receipt in receipts] == [4, 2]
    assert receipts[0].start.tolist() == [0, 2, 2, 4]


def test_a_region_without_rows_is_empty_and_keeps_its_type(tmp_path: Path) -> None:
    features = read_region([write(tmp_path / "a.rows", [2, 0])], "features", 1)
    assert (features.shape, features.dtype) == ((0, 2, 3), np.float32)


def test_a_block_without_rows_can_be_written_and_read(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.rows", [])
    assert (empty.n_rows, empty.start.tolist()) == (0, [0, 0, 0, 0])
    assert read_column(empty, "features").shape == (0, 2, 3)
    assert read_region([empty, write(tmp_path / "b.rows", [1])], "score", 1).tolist() == [0]


def test_a_column_without_values_keeps_its_shape(tmp_path: Path) -> None:
    receipt = write_block(tmp_path / "a.rows", {"none": np.zeros((2, 0), np.float32)}, np.array([1, 0]), 2)
    assert read_column(receipt, "none").shape == (2, 0)
    assert read_region([receipt], "none", 1).shape == (1, 0)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.float32, np.float64, np.bool_])
def test_types_come_back_as_written(tmp_path: Path, dtype: Any) -> None:
    values = np.array([1, 0, 1]).astype(dtype)
    read = read_column(write_block(tmp_path / "a.rows", {"v": values}, np.zeros(3, np.int64), 1), "v")
    assert read.dtype == dtype
    assert read.tolist() == values.tolist()


def test_a_column_comes_back_whole(tmp_path: Path) -> None:
    receipt = write(tmp_path / "a.rows", [1, 0, 1, 0, 1])
    assert read_column(receipt, "score").tolist() == [0.5, 1.5, 0, 1, 2]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.rows"
    receipt = write(path, [0, 1, 2])
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[:66])  # the first column, and half a value
    elif damage == "flip":
        whole[whole.index(np.float32(0.5).tobytes())] ^= 4
        path.write_bytes(whole)
    else:
        path.unlink()
    assert receipt.is_there() == (damage == "flip")
    with pytest.raises(DamagedFileError, match=r"a\.rows is corrupt"):
        read_region([receipt], "score", 1)


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    receipt = write(tmp_path / "a.rows", [0, 0])
    read_column(receipt, "score")[:] = 7
    assert read_column(receipt, "score").tolist() == [0, 0.5]


def test_folders_are_made_and_no_draft_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.rows"
    write(path, [0])
    write(path, [1, 1])  # a task computed twice
    assert [found.name for found in path.parent.iterdir()] == ["a.rows"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = write(tmp_path / "a.rows", [0, 0])

    def full(rows: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tables, "_bytes_of", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.rows", [1])
    monkeypatch.undo()
    assert read_column(receipt, "score").tolist() == [0, 0.5]


def test_some_rows_of_a_region_come_in_the_order_wanted(tmp_path: Path) -> None:
    receipts = [write(tmp_path / f"{n}.rows", region) for n, region in enumerate(([1, 0, 1], [2, 2], [1]))]
    whole = read_region(receipts, "features", 1)
    for wanted in ([], [2, 0], [1], [0, 0, 2, 1]):
        picked = pick_region(receipts, "features", 1, np.array(wanted, np.int64))
        assert np.array_equal(picked, whole[np.array(wanted, np.int64)])


def test_blocks_of_which_nothing_is_wanted_are_not_read(tmp_path: Path) -> None:
    receipts = [write(tmp_path / "a.rows", [1, 1]), write(tmp_path / "b.rows", [1])]
    Path(receipts[1].path).unlink()
    assert pick_region(receipts, "score", 1, np.array([1])).tolist() == [0.5]
    with pytest.raises(DamagedFileError, match=r"b\.rows"):
        pick_region(receipts, "score", 1, np.array([2]))


@pytest.mark.parametrize("column", ["sample", "features"])
def test_bytes_of_a_file_that_will_be_mapped_are_checked(tmp_path: Path, column: str) -> None:
    receipt = write(tmp_path / "a.rows", [0, 2, 1])
    assert localize(receipt, tmp_path).path == receipt.path
    content = bytearray((tmp_path / "a.rows").read_bytes())
    content[receipt.offset(column)] ^= 1
    (tmp_path / "a.rows").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.rows"):
        localize(receipt, tmp_path)


def test_a_file_is_mapped_as_it_was_written(tmp_path: Path) -> None:
    receipt = write(tmp_path / "a.rows", [0, 2, 1])
    columns = open_columns(receipt)
    assert list(columns) == ["sample", "score", "features"]
    for name, values in columns.items():
        assert np.array_equal(values, read_column(receipt, name)) and values.dtype == read_column(receipt, name).dtype
    assert {len(values) for values in open_columns(write(tmp_path / "b.rows", [])).values()} == {0}
