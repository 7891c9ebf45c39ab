"""What is cached stays as long as it is of use."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import far_source
import numpy as np
import pytest
from far_source import N_PIECES, SAMPLES, FarSource, pieces_in, recording_of

from ks4stream.errors import Ks4StreamWarning, ResultsError
from ks4stream.io.recording_cache import cached, cached_while_held, ending
from ks4stream.io.sources import ArraySource, BinarySource, ConcatenatedSource


def test_by_default_remote_recordings_are_cached_during_a_sort(temporary: Path) -> None:
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
sys.path.insert(0, {str(Path(far_source.__file__).parent)!r})
from far_source import FarSource, recording_of
from ks4stream.io.recording_cache import cached, lifetime
lifetime.PIECE_BYTES = 1
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
def test_a_cache_is_kept_while_its_recording_is_referenced(temporary: Path) -> None:
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
def test_a_cache_referenced_until_the_program_ends_is_removed_then(temporary: Path) -> None:
    code = """
import numpy as np
from ks4stream.io.sources import ArraySource
from ks4stream.io.recording_cache import cached_while_held
from ks4stream.recording import Recording
class Far(ArraySource):
    is_remote = True
held = cached_while_held(Recording(Far(np.arange(3000, dtype=np.int16).reshape(1000, 3)), 1000.0))
held.read(0, 1000)
print(held.source._place().is_dir())
"""
    surroundings = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert not list(temporary.glob("*/*"))


@pytest.mark.slow
def test_a_cache_in_a_given_folder_outlives_its_recording(tmp_path: Path) -> None:
    far = FarSource()
    for _ in range(2):
        cached_while_held(recording_of(far), tmp_path / "cache").read(0, 1000)
        gc.collect()
    assert far.fetched == Counter(range(N_PIECES)) and len(pieces_in(tmp_path / "cache")) == N_PIECES
    cached_while_held(recording_of(far), "off").read(0, 1000)
    assert far.fetched == Counter([*range(N_PIECES)] * 2)
    with pytest.raises(ResultsError, match=r"cache_dir=.* cannot be created"):
        cached_while_held(recording_of(far), "/dev/null/cache")


def test_what_somebody_holds_takes_no_more_room_than_was_given(tmp_path: Path) -> None:
    far = FarSource()
    held = cached_while_held(recording_of(far), tmp_path / "cache", cache_bytes=0)
    held.read(0, 1000)
    assert not pieces_in(tmp_path / "cache")


def test_off_keeps_nothing(temporary: Path) -> None:
    far = FarSource()
    with cached(recording_of(far), "off") as found:
        np.testing.assert_array_equal(found.read(0, 1000), SAMPLES)
    assert not any(temporary.iterdir())


def test_too_little_room_is_told_beforehand(tmp_path: Path) -> None:
    recording = recording_of(FarSource())
    with (
        pytest.warns(Ks4StreamWarning, match=r"may use 1e-06 GB, but the recording needs about 3e-06 GB.*--cache"),
        cached(recording, cache_bytes=1000),
    ):
        pass
    with pytest.raises(ResultsError, match=r"cache_dir=.* cannot be created"), cached(recording, "/dev/null/cache"):
        pass
