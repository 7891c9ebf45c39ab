"""Temporary folders go with their process, however it ends, and nobody else's go."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ks4stream.errors import ResultsError
from ks4stream.io import scratch
from ks4stream.io.scratch import scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, of other processes too."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


ONE = """
import sys
from ks4stream.io.scratch import scratch_folder

with scratch_folder() as folder:
    (folder / "file").write_text("of a run")
    print("ready", flush=True)
    sys.stdin.read()
"""

ALL_OF_A_SORT = """
import sys
from types import SimpleNamespace as Name
from ks4stream.io.places import place
from ks4stream.report import results_folder
from ks4stream.sorter import run_store

target = place("s3://recordings/killed")
source = Name(recording=Name(digest=lambda: "0" * 64, source=Name(digest_is_exact=True)))
with results_folder(target), run_store(source, target, fresh=True), run_store(source, None, fresh=True):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has folders; killed at the end, at the latest."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_a_folder_goes_at_the_end(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_folder() as folder:
        (folder / "deep").mkdir()
        assert not [path for path in folder.rglob("*") if path.is_file()], "nothing of ours among what is written"
        raise KeyboardInterrupt
    assert not any(temporary.iterdir())


@pytest.mark.slow
def test_those_of_killed_processes_go_and_those_in_use_stay(temporary: Path) -> None:
    with another(ONE) as killed, another(ONE), scratch_folder() as own:
        assert len(list(temporary.iterdir())) == 3
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with scratch_folder() as folder:
            assert folder != own and own.is_dir()
            assert len(list(temporary.rglob("file"))) == 1
            assert len(list(temporary.iterdir())) == 3


@pytest.mark.slow
def test_nothing_of_a_sort_stays_behind(temporary: Path, object_store: Any) -> None:
    with another(ALL_OF_A_SORT) as killed:
        assert len(list(temporary.iterdir())) == 3
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    with scratch_folder() as folder:
        assert list(temporary.iterdir()) == [folder.parent]


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "another machine's", "another user's", "one about to be locked"])
def test_what_is_not_surely_left_behind_is_kept(whose: str, temporary: Path) -> None:
    with another(ONE):
        (left,) = temporary.iterdir()
    if whose == "another machine's":
        left = left.rename(left.with_name(f"ks4stream-{platform.node()}-2-abcd_123"))  # that shares the folder
    if whose == "another user's":
        if os.geteuid():
            pytest.skip("only root may give files away")
        os.chown(left, 12345, 12345)
    if whose == "one about to be locked":
        shutil.rmtree(left / scratch.CONTENTS)
    with scratch_folder():
        assert left.exists() == (whose != "ours")


def test_without_locks_it_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # a network mount without its daemon

    monkeypatch.setattr(scratch.FileLock, "acquire", refuse)
    with pytest.raises(ResultsError, match="tmp cannot be written to"), scratch_folder():
        pass
    assert not any(temporary.iterdir())


def test_where_nothing_can_be_written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with pytest.raises(ResultsError, match="nowhere cannot be written to"), scratch_folder():
        pass
