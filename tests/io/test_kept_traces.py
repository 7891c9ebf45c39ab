"""Traces that are kept on disk: complete or not at all, and never in the way of a sort."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from ks4stream.io import kept_traces
from ks4stream.io.kept_traces import folder_for, make_folder, read, write
from ks4stream.io.places import ObjectPath

ARRAYS = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False, True])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, found = tmp_path / "0.traces", [np.empty_like(array) for array in ARRAYS]
    assert not read(path, *found)
    write(path, *ARRAYS)
    assert read(path, *found) and [path] == list(tmp_path.iterdir())
    for array, wanted in zip(found, ARRAYS, strict=True):
        assert np.array_equal(array, wanted)
    path.write_bytes(path.read_bytes()[:-1])
    assert not read(path, *found)


def test_a_write_that_fails_leaves_nothing_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "missing" / "0.traces", *ARRAYS)

    def full(path: Path, to: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    write(tmp_path / "0.traces", *ARRAYS)
    assert not list(tmp_path.iterdir())


def test_traces_are_kept_only_in_a_folder_with_twice_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "free")(100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    stage = tmp_path / "detection-0"
    (tmp_path / kept_traces.SCRATCH).mkdir()
    make_folder(tmp_path, 51)
    assert folder_for(stage) is None
    make_folder(tmp_path, 50)
    assert folder_for(stage) == tmp_path / "scratch" / "traces"
    make_folder(ObjectPath("s3://bucket/run"), 50)
    assert folder_for(ObjectPath("s3://bucket/run/detection-0")) is None
