"""The cache of a recording that lies far away: everything is fetched once, and what is wrong with it does no harm."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ks4stream.errors import Ks4StreamWarning, RecordingError, ResultsError
from ks4stream.io import tile_cache
from ks4stream.io.sources import ArraySource, BinarySource, ConcatenatedSource
from ks4stream.io.tile_cache import CachedSource, cached, cached_while_held, ending
from ks4stream.recording import Recording, Source

SAMPLES = np.random.default_rng(0).integers(-500, 500, (1000, 3)).astype(np.int16)
PIECE = 64
N_PIECES = 16


class FarSource:
    """A source far away, that counts how often each piece is fetched, and fails if told so."""

    path = "s3://far/away.zarr"
    chunk_samples = PIECE
    digest_is_exact = True

    def __init__(self, samples: NDArray[Any] = SAMPLES, *, failures: int = 0, wait_s: float = 0.0) -> None:
        self.samples, self.failures, self.wait_s = samples, failures, wait_s
        self.n_samples, self.n_channels = samples.shape
        self.dtype = samples.dtype
        self.fetched: Counter[int] = Counter()
        self.lock = threading.Lock()

    def digest(self) -> str:
        return hashlib.sha256(self.samples.tobytes()).hexdigest()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        time.sleep(self.wait_s)
        with self.lock:
            self.fetched[start // PIECE] += 1
            if self.failures:
                self.failures -= 1
                raise RecordingError("not now")
        return self.samples[start:stop].copy()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where caches lie by default; pieces are as long as the tests' chunks."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(tile_cache, "PIECE_BYTES", 1)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def cache(source: Source, folder: Path, limit_bytes: int | None = None) -> CachedSource:
    return CachedSource(source, "0" * 64, PIECE, str(folder), limit_bytes)


def pieces_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.piece"))


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


def test_who_reads_on_finds_the_next_tile_on_its_way(tmp_path: Path) -> None:
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


def test_damaged_pieces_are_fetched_anew(tmp_path: Path) -> None:
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


def test_a_full_cache_keeps_what_it_has(tmp_path: Path) -> None:
    far = FarSource()
    for _ in range(2):
        np.testing.assert_array_equal(cache(far, tmp_path, 2000).read(0, 1000), SAMPLES)
    kept = pieces_in(tmp_path)
    assert 0 < len(kept) < N_PIECES and sum(path.stat().st_size for path in kept) <= 2000
    assert far.fetched.total() == 2 * N_PIECES - len(kept)


@pytest.mark.parametrize("left", [b"", b"cut off"])
@pytest.mark.parametrize("when", ["before a sort", "while it runs"])
def test_an_account_that_was_not_written_is_counted_anew(left: bytes, when: str, tmp_path: Path) -> None:
    far = FarSource()
    source = cache(far, tmp_path, 2000)
    source.read(0, 4 * PIECE)
    (account,) = tmp_path.rglob("room")
    account.write_bytes(left)
    if when == "before a sort":
        source = cache(far, tmp_path, 2000)
    np.testing.assert_array_equal(source.read(0, 1000), SAMPLES)
    kept = pieces_in(tmp_path)
    assert 4 < len(kept) < N_PIECES and sum(path.stat().st_size for path in kept) <= 2000


def test_a_cache_that_was_removed_stays_away(temporary: Path) -> None:
    source = cache(FarSource(), temporary)
    source.read(0, PIECE)
    source.forget()
    np.testing.assert_array_equal(source.read(0, 1000), SAMPLES)
    assert not source._place().exists()


def test_a_disk_that_refuses_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tile_cache, "appearing", full)
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


# -- a sort's ------------------------------------------------------------------------------------------


def recording_of(*sources: Source) -> Recording:
    return Recording(sources[0] if len(sources) == 1 else ConcatenatedSource(sources), 1000.0)


def test_by_default_what_is_far_is_kept_while_it_is_sorted(temporary: Path) -> None:
    far = FarSource()
    recording = recording_of(far, ArraySource(SAMPLES))
    with cached(recording) as found:
        for _ in range(2):
            np.testing.assert_array_equal(found.read(0, 2000), np.concatenate([SAMPLES, SAMPLES]))
        assert len(pieces_in(temporary)) == N_PIECES and far.fetched == Counter(range(N_PIECES))
        assert found.digest() == recording.digest() and found.source.digest_is_exact
    assert not pieces_in(temporary)


def test_after_an_error_it_stays_for_the_next_call(temporary: Path) -> None:
    far = FarSource()
    with pytest.raises(KeyboardInterrupt), cached(recording_of(far)) as found:
        found.read(0, 1000)
        raise KeyboardInterrupt
    with cached(recording_of(far)) as found:
        found.read(0, 1000)
    assert far.fetched == Counter(range(N_PIECES))


def test_of_two_sorts_of_one_recording_the_last_to_end_removes_it(temporary: Path) -> None:
    far = FarSource()
    recording = recording_of(ConcatenatedSource((far, far)), ArraySource(SAMPLES))  # the same cache twice in each
    with cached(recording) as first:
        first.read(0, 500)
        with cached(recording) as second:
            second.read(0, 1000)
            assert ending(second, recording) == [], "workers keep it too"
        assert len(pieces_in(temporary)) == N_PIECES
        first.read(0, 1000)
        assert len(ending(first, recording)) == 2
    assert not list(temporary.glob("*/*"))
    assert far.fetched == Counter(range(N_PIECES))


@pytest.mark.slow
def test_a_sort_that_was_killed_does_not_count_as_a_user(temporary: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tile_cache import FarSource, cached, recording_of, tile_cache
tile_cache.PIECE_BYTES = 1
with cached(recording_of(FarSource())) as found:
    found.read(0, 100)
    os._exit(9)
"""
    surroundings = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert len(list(temporary.glob("*/*.use"))) == 1 and pieces_in(temporary)
    far = FarSource()
    with cached(recording_of(far)) as found:
        found.read(0, 1000)
    assert sum(far.fetched.values()) == N_PIECES - 2, "what the killed one fetched is used"
    assert not list(temporary.glob("*/*"))


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


@pytest.mark.slow
def test_a_folder_of_ones_own_keeps_files_too_and_for_good(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(SAMPLES.tobytes())
    recording = recording_of(BinarySource.open(tmp_path / "a.bin", 3))
    with cached(recording, tmp_path / "cache") as found:
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
    assert pieces_in(tmp_path / "cache")
    with cached(recording) as found:
        assert found.source == recording.source
    with cached(recording_of(ArraySource(SAMPLES)), tmp_path / "cache") as found:
        assert isinstance(found.source, ArraySource), "what is in memory need not be kept"


def test_what_a_caller_keeps_is_not_removed_within(temporary: Path) -> None:
    far, other = FarSource(), FarSource(SAMPLES[::-1].copy())
    with cached(recording_of(far)) as outer:
        for _ in range(2):
            with cached(replace(outer, source=ConcatenatedSource((outer.source, other)))) as inner:
                inner.read(0, 2000)
        assert len(pieces_in(temporary)) == N_PIECES
    assert not pieces_in(temporary)
    assert far.fetched == Counter(range(N_PIECES)) and other.fetched == Counter([*range(N_PIECES)] * 2)


def test_parts_of_parts_are_removed_too(temporary: Path) -> None:
    far = FarSource()
    with cached(recording_of(ConcatenatedSource((far, far)), ArraySource(SAMPLES))) as found:
        found.read(0, 3000)
        assert pieces_in(temporary)
    assert not pieces_in(temporary)


@pytest.mark.slow
def test_what_somebody_holds_is_kept_as_long(temporary: Path) -> None:
    far = FarSource()
    found = cached_while_held(recording_of(far, ArraySource(SAMPLES)))
    assert not far.fetched
    with cached(recording_of(far)) as sorting:  # of the same recording, which is another's business
        sorting.read(0, 1000)
        found.read(0, 2000)
    again = copy.copy(found.source.sources[0])  # type: ignore[attr-defined] # as a worker has it
    held = found.with_probe(None)
    del found
    gc.collect()
    assert len(pieces_in(temporary)) == N_PIECES
    np.testing.assert_array_equal(held.read(0, 2000), np.concatenate([SAMPLES, SAMPLES]))
    assert far.fetched == Counter([*range(N_PIECES)] * 2), "once for each"
    again.read(0, 500)
    del held
    gc.collect()
    assert not pieces_in(temporary)
    np.testing.assert_array_equal(again.read(0, 1000), SAMPLES)  # goes on without
    late = copy.copy(again)  # in a process that begins when the holder is gone
    np.testing.assert_array_equal(late.read(0, 1000), SAMPLES)
    assert not list(temporary.glob("*/*"))


@pytest.mark.slow
def test_what_is_held_until_the_end_of_a_program_is_removed_then(temporary: Path) -> None:
    code = """
import numpy as np
from ks4stream.io.sources import ArraySource
from ks4stream.io.tile_cache import cached_while_held
from ks4stream.recording import Recording
class Far(ArraySource):
    path = "s3://far/away"
held = cached_while_held(Recording(Far(np.arange(3000, dtype=np.int16).reshape(1000, 3)), 1000.0))
held.read(0, 1000)
print(held.source._place().is_dir())
"""
    surroundings = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert not list(temporary.glob("*/*"))


@pytest.mark.slow
def test_what_somebody_holds_in_a_folder_of_his_own_stays(tmp_path: Path) -> None:
    far = FarSource()
    for _ in range(2):
        cached_while_held(recording_of(far), tmp_path / "cache").read(0, 1000)
        gc.collect()
    assert far.fetched == Counter(range(N_PIECES)) and len(pieces_in(tmp_path / "cache")) == N_PIECES
    cached_while_held(recording_of(far), "off").read(0, 1000)
    assert far.fetched == Counter([*range(N_PIECES)] * 2)
    with pytest.raises(ResultsError, match=r"cache_dir=.* cannot be made"):
        cached_while_held(recording_of(far), "/dev/null/cache")


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
    assert caplog.text.count(f"{first} is a link, or another user's folder") == 1


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
    assert "is not this user's alone any more" in caplog.text


@OF_OURS
def test_where_all_names_are_taken_it_is_told_and_nothing_is_kept(temporary: Path) -> None:
    for number in range(tile_cache.TEMPORARY_NAMES):
        (temporary / f"ks4stream-cache-{os.geteuid()}{f'-{number}' if number else ''}").touch()
    with (
        pytest.warns(Ks4StreamWarning, match=r"cannot be kept in .*-cache-\d+, nor in 9 more .*cache_dir"),
        cached(recording_of(FarSource())) as found,
    ):
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
    assert not pieces_in(temporary)


def test_off_keeps_nothing(temporary: Path) -> None:
    far = FarSource()
    with cached(recording_of(far), "off") as found:
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
    assert not any(temporary.iterdir())


def test_too_little_room_is_told_beforehand(tmp_path: Path) -> None:
    recording = recording_of(FarSource())
    with (
        pytest.warns(Ks4StreamWarning, match=r"may take 1e-06 GB, but the recording needs about 3e-06 GB.*--cache"),
        cached(recording, cache_bytes=1000),
    ):
        pass
    with pytest.raises(ResultsError, match=r"cache_dir=.* cannot be made"), cached(recording, "/dev/null/cache"):
        pass
