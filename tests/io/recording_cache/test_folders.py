"""Folders for caches are this user\x27s alone, and do not stay."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from far_source import N_PIECES, SAMPLES, FarSource, pieces_in, recording_of

from ks4stream.errors import Ks4StreamWarning
from ks4stream.io.recording_cache import cached, folders


def test_stale_caches_are_removed_by_the_next_sort(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), cached(recording_of(FarSource())) as found:
        found.read(0, 100)
        raise KeyboardInterrupt
    (left,) = {path.parent for path in pieces_in(temporary)}
    (left.parent / "another-0.use").touch()  # of a sort that was killed
    other = FarSource(SAMPLES + np.int16(1))
    for days, expected in [(6, True), (8, False)]:
        os.utime(left / "room", ns=(0, time.time_ns() - days * 86_400 * 10**9))
        with cached(recording_of(other)) as found:
            found.read(0, 100)
        assert left.exists() == expected
    assert not list(temporary.glob("*/*"))


OTHER = os.geteuid() + 1 if hasattr(os, "geteuid") else 0


OF_OURS = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="each user has a temporary folder there")


def squat(how: str, folder: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder of our caches' name as somebody else might."""
    if how == "a link":
        folder.symlink_to(elsewhere, target_is_directory=True)
        return
    if how == "a file":
        folder.touch()
        return
    folder.mkdir()
    if how == "others may write to it":
        folder.chmod(0o777)
    elif os.geteuid():
        fstat, theirs = os.fstat, folder.stat().st_ino

        def of_another(number: int) -> os.stat_result:
            found = list(fstat(number))
            if found[1] == theirs:
                found[4] = OTHER
            return os.stat_result(found)

        monkeypatch.setattr(os, "fstat", of_another)
    else:
        os.chown(folder, OTHER, -1)


@OF_OURS
@pytest.mark.parametrize("how", ["a link", "a file", "others may write to it", "another user's"])
def test_a_folder_of_our_name_that_is_not_ours_alone_is_left_alone(
    how: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = temporary / f"ks4stream-cache-{os.geteuid()}"
    squat(how, first, tmp_path / "elsewhere", monkeypatch)
    second = temporary / f"{first.name}-1"
    far = FarSource()
    with cached(recording_of(far)) as found:
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
        copy.copy(found.source).read(0, 1000)  # as another process does
        assert {path.parent.parent for path in pieces_in(temporary)} == {second}
        assert far.fetched == Counter(range(N_PIECES))
    assert not pieces_in(temporary)
    assert second.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "elsewhere").iterdir()) and (how == "a file" or not list(first.iterdir()))
    assert caplog.text.count(f"{first} is a link, belongs to another user") == 1


@OF_OURS
def test_a_folder_that_others_could_read_is_closed(temporary: Path) -> None:
    root = temporary / f"ks4stream-cache-{os.geteuid()}"
    root.mkdir()
    root.chmod(0o755)
    with cached(recording_of(FarSource())) as found:
        found.read(0, 1000)
        assert pieces_in(root) and root.stat().st_mode & 0o777 == 0o700


@OF_OURS
def test_pieces_that_somebody_laid_out_are_not_read(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """He knows the recording, and what its cache would be called."""
    wrong = FarSource(np.zeros_like(SAMPLES))
    monkeypatch.setattr(wrong, "digest", FarSource().digest, raising=False)
    with cached(recording_of(wrong)) as laid_out:
        laid_out.read(0, 1000)
        (root,) = temporary.iterdir()
        root.rename(tmp_path / "theirs")
        root.symlink_to(tmp_path / "theirs")
        with cached(recording_of(FarSource())) as found:
            np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)


@OF_OURS
def test_a_folder_that_is_exchanged_meanwhile_is_used_no_longer(
    temporary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cached(recording_of(FarSource())) as found:
        found.read(0, 500)
        (root,) = temporary.iterdir()
        root.rename(tmp_path / "before")
        n_kept = len(pieces_in(tmp_path))
        root.symlink_to(tmp_path / "before")
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
        assert len(pieces_in(tmp_path / "before")) == n_kept < N_PIECES
    assert "is no longer private to this user" in caplog.text


@OF_OURS
def test_if_all_folder_names_are_taken_a_warning_says_so_and_nothing_is_cached(temporary: Path) -> None:
    for number in range(folders.TEMPORARY_NAMES):
        (temporary / f"ks4stream-cache-{os.geteuid()}{f'-{number}' if number else ''}").touch()
    with (
        pytest.warns(Ks4StreamWarning, match=r"cannot be cached in .*-cache-\d+, nor in 9 .*cache_dir"),
        cached(recording_of(FarSource())) as found,
    ):
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
    assert not pieces_in(temporary)
