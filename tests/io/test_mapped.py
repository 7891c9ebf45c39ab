"""What is too large for memory is mapped from files, and does not stay in memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ks4stream.errors import ResultsError
from ks4stream.io.mapped import ColumnWriter, StreamedArray, _map_of, _maps, release_pages, scratch_array


def test_what_is_too_large_for_memory_lies_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ks4stream.io.mapped.HELD_BYTES", 40)
    assert not isinstance(scratch_array((10,), np.float32, tmp_path), np.memmap)
    mapped = scratch_array((11,), np.float32, tmp_path)
    assert isinstance(mapped, np.memmap)
    mapped[:] = np.arange(11)
    assert mapped.sum() == 55
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not told")
@pytest.mark.parametrize("mode", ["r+", "c"])
def test_what_was_read_of_a_mapped_file_does_not_stay_in_memory(tmp_path: Path, mode: str) -> None:
    content = np.arange(4 << 20, dtype=np.float64)  # 32 MiB
    content.tofile(tmp_path / "values")
    with (tmp_path / "values").open("rb+") as file:
        os.fsync(file.fileno())  # what is not written yet cannot go
    mapped = np.memmap(tmp_path / "values", np.float64, mode=mode)
    mapped[7] = -1.0

    def resident_bytes() -> int:
        lines = Path("/proc/self/smaps").read_text().split(str(tmp_path / "values"))[1].splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])

    seen = np.asarray(mapped).reshape(-1, 2)[:, 0]  # as a result holds it, and a part of it
    assert mapped.sum() == content.sum() - 8
    before = resident_bytes()
    release_pages(seen)
    assert before > 30 << 20 and resident_bytes() < 1 << 20
    assert mapped[7] == -1.0 and mapped[8] == 8.0, "and nothing is lost"
    release_pages(content)
    assert content[8] == 8.0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not told")
@pytest.mark.parametrize("is_private", [False, True])
def test_what_was_read_through_a_tensor_does_not_stay_in_memory(tmp_path: Path, is_private: bool) -> None:
    shape = (1 << 20, 2, 2)  # 16 MiB of float32, and one row more than small private maps have
    values = np.arange(4 << 20, dtype=np.float32).reshape(shape)
    if is_private:
        columns = ColumnWriter(tmp_path / "columns")
        columns.append({"features": values})
        columns.append({"features": values[:1]})
        mapped = columns.arrays()["features"]
        with (tmp_path / "columns" / "features.column").open("rb+") as file:
            os.fsync(file.fileno())  # what is not written yet cannot go
    else:
        mapped = scratch_array(shape, np.float32, tmp_path, held_bytes=0)
        mapped[:] = values

    def resident_bytes() -> int:
        address = f"{mapped.ctypes.data:x}-"
        lines = Path("/proc/self/smaps").read_text().split(address)[1].splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])

    seen = torch.from_numpy(np.asarray(mapped)).numpy()[1:, 0]
    assert mapped[:, 0].sum() > 0
    before = resident_bytes()
    release_pages(seen)
    assert before > 15 << 20 and resident_bytes() < 1 << 20
    assert np.array_equal(mapped[: len(values)], values)


def test_maps_are_forgotten_with_their_arrays(tmp_path: Path) -> None:
    known = len(_maps)
    mapped = scratch_array((6, 2), np.int32, tmp_path, held_bytes=0)
    part = torch.from_numpy(mapped).numpy()[2:]
    assert len(_maps) == known + 1 and _map_of(part) is mapped
    assert _map_of(torch.ones(3).numpy()) is None and _map_of(np.ones(3)) is None and _map_of(part.copy()) is None
    del mapped, part
    assert len(_maps) == known


def test_rows_are_read_as_copies(tmp_path: Path) -> None:
    values = scratch_array((6, 2), np.int32, tmp_path, held_bytes=0)
    assert isinstance(values, np.memmap) and not values.any()
    values[:] = np.arange(12).reshape(6, 2)
    rows = StreamedArray(values)
    assert rows.shape == (6, 2)
    some = rows[2:4, 1:]
    assert some.tolist() == [[5], [7]] and type(some) is np.ndarray


def test_a_folder_that_cannot_be_made_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ResultsError, match=r"taken/columns cannot be written to: .*same call"):
        ColumnWriter(tmp_path / "taken" / "columns")


def test_columns_grow_on_disk_and_outlive_their_files(tmp_path: Path) -> None:
    columns = ColumnWriter(tmp_path)
    columns.append({"time": np.zeros(0, np.int64), "pair": np.zeros((0, 2), np.float32)})
    assert {name: values.shape for name, values in columns.arrays().items()} == {"time": (0,), "pair": (0, 2)}
    for first in (0, 3):
        columns.append({"time": np.arange(first, first + 3), "pair": np.full((3, 2), first, np.float32)})
    arrays = columns.arrays()
    for path in tmp_path.iterdir():
        path.unlink()
    assert arrays["time"].tolist() == [0, 1, 2, 3, 4, 5]
    assert arrays["pair"].tolist() == [[0, 0]] * 3 + [[3, 3]] * 3
    arrays["time"][0] = 7  # in memory only
    assert arrays["time"][0] == 7
