"""The cache of a recording that lies far away: everything is fetched once, and what is wrong with it does no harm."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from far_source import N_PIECES, PIECE, SAMPLES, FarSource, cache, pieces_in
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.sources import ArraySource


@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_read_is_what_is_stored(keeps: bool, tmp_path: Path) -> None:
    source = cache(FarSource(), tmp_path, None if keeps else 0)
    for start, stop in [(0, 1000), (0, 0), (63, 65), (64, 128), (999, 1000), (500, 777)]:
        np.testing.assert_array_equal(source.read(start, stop), SAMPLES[start:stop])
    assert source.read(64, 128).flags.writeable, "a copy, whoever else holds the piece"
    assert bool(pieces_in(tmp_path)) == keeps


def test_overlapping_tiles_and_passes_fetch_everything_once(tmp_path: Path) -> None:
    far = FarSource()
    for _ in range(2):
        source = cache(far, tmp_path)
        for start in range(0, 1000, 50):
            source.read(max(start - 20, 0), min(start + 70, 1000))
    assert far.fetched == Counter(range(N_PIECES))


def test_without_a_disk_tiles_that_overlap_share_pieces(tmp_path: Path) -> None:
    far = FarSource()
    source = cache(far, tmp_path, 0)
    for start in range(0, 1000, 50):
        source.read(max(start - 20, 0), min(start + 70, 1000))
    assert far.fetched == Counter(range(N_PIECES))


def test_threads_that_want_the_same_wait_for_each_other(tmp_path: Path) -> None:
    """Of one process with one source, and with two, as two processes have them: the files are all they share."""
    far = FarSource(wait_s=0.01)
    sources = [cache(far, tmp_path), cache(far, tmp_path)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: sources[number % 2].read(0, 1000), range(6)))
    assert all(np.array_equal(block, SAMPLES) for block in found)
    assert far.fetched == Counter(range(N_PIECES))


def test_pieces_of_one_read_are_fetched_side_by_side(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=300)

    class Meeting(FarSource):
        def read(self, start: int, stop: int) -> NDArray[Any]:
            together.wait()  # breaks if fewer than four are on their way at a time
            return super().read(start, stop)

    np.testing.assert_array_equal(cache(Meeting(), tmp_path).read(0, 4 * PIECE), SAMPLES[: 4 * PIECE])


def test_the_next_tile_is_fetched_ahead_of_a_sequential_reader(tmp_path: Path) -> None:
    far = FarSource()
    source = cache(far, tmp_path)
    source.read(0, 2 * PIECE)
    source.read(8 * PIECE, 10 * PIECE)
    assert set(far.fetched) == {0, 1, 8, 9}, "nothing is fetched ahead of reads here and there"
    source.read(10 * PIECE - 20, 12 * PIECE)
    wait_for(lambda: set(far.fetched) == {0, 1, 8, 9, 10, 11, 12, 13, 14})  # as much again, and whole pieces
    source.read(12 * PIECE, 13 * PIECE)
    assert far.fetched[12] == 1


def wait_for(condition: Callable[[], bool], longest_s: float = 300.0) -> None:
    """Wait until something has happened in another thread."""
    end = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_damaged_pieces_are_fetched_again(tmp_path: Path) -> None:
    far = FarSource()
    cache(far, tmp_path).read(0, 1000)
    first, second, third, *_ = pieces_in(tmp_path)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:20])
    third.write_bytes(b"")
    np.testing.assert_array_equal(cache(far, tmp_path).read(0, 1000), SAMPLES)
    assert far.fetched.total() == N_PIECES + 3
    cache(far, tmp_path).read(0, 1000)
    assert far.fetched.total() == N_PIECES + 3


def test_a_cache_that_was_removed_stays_away(temporary: Path) -> None:
    source = cache(FarSource(), temporary)
    source.read(0, PIECE)
    source.forget()
    np.testing.assert_array_equal(source.read(0, 1000), SAMPLES)
    assert not source._place().exists()


def test_a_disk_that_refuses_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ks4stream.io.recording_cache.source.atomic_write", full)
    np.testing.assert_array_equal(cache(FarSource(), tmp_path).read(0, 1000), SAMPLES)
    (tmp_path / "a file").touch()
    np.testing.assert_array_equal(cache(FarSource(), tmp_path / "a file").read(0, 1000), SAMPLES)


def test_what_failed_is_tried_again_by_the_next_read(tmp_path: Path) -> None:
    source = cache(FarSource(failures=1), tmp_path)
    with pytest.raises(RecordingError, match="not now"):
        source.read(0, 10)
    np.testing.assert_array_equal(source.read(0, 10), SAMPLES[:10])


def test_what_belongs_to_a_process_does_not_travel(tmp_path: Path) -> None:
    source = cache(ArraySource(SAMPLES), tmp_path)
    source.read(0, 1000)
    again = pickle.loads(pickle.dumps(source))
    assert (again.key, again.digest(), again.folder) == (source.key, source.digest(), source.folder)
    np.testing.assert_array_equal(again.read(5, 500), SAMPLES[5:500])
