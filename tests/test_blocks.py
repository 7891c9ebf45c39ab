"""Every sample belongs to one tile, and times are those of the recording."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from ks4stream import blocks
from ks4stream.blocks import Tiling, observed_spans
from ks4stream.errors import RecordingError


def tiling(n_samples: int = 1000, **changes: int) -> Tiling:
    return Tiling.of(**({"n_samples": n_samples, "size": 300, "halo": 50, "shortest": 61} | changes))


@pytest.mark.parametrize("n_samples", [61, 299, 300, 301, 360, 361, 600, 1000])
@pytest.mark.parametrize("start", [0, 7])
def test_every_sample_of_the_crop_is_owned_by_one_tile(n_samples: int, start: int) -> None:
    cut = tiling(n_samples + start, start=start)
    owned = np.concatenate([np.arange(tile.start, tile.stop) for tile in cut])
    assert owned.tolist() == list(range(start, cut.stop))
    assert cut.tile_of(owned).tolist() == [tile.index for tile in cut for _ in range(tile.start, tile.stop)]
    assert start + n_samples - cut.stop < 61  # at most a tail too short for a waveform is left out


@pytest.mark.parametrize(("n_samples", "n_tiles", "stop"), [(660, 2, 600), (661, 3, 661), (600, 2, 600)])
def test_a_tail_shorter_than_a_waveform_is_dropped(n_samples: int, n_tiles: int, stop: int) -> None:
    assert (len(tiling(n_samples)), tiling(n_samples).stop) == (n_tiles, stop)


def test_every_tile_sees_equally_much_whatever_it_owns() -> None:
    tiles = list(tiling())
    assert [(tile.first, tile.length) for tile in tiles] == [(-50, 400), (250, 400), (550, 400), (850, 400)]
    assert tiles[-1].stop == 1000


def test_a_crop_ends_with_the_recording_at_the_latest() -> None:
    assert tiling(start=100, stop=5000).stop == 1000
    assert [(tile.start, tile.stop) for tile in tiling(start=100, stop=450)] == [(100, 400)]


@pytest.mark.parametrize(("n_samples", "start", "left"), [(60, 0, 60), (1000, 940, 60), (1000, 1200, 0)])
def test_less_than_one_waveform_is_refused(n_samples: int, start: int, left: int) -> None:
    with pytest.raises(RecordingError, match=rf"has {left} samples to sort \(of {n_samples}\).*nt = 61"):
        tiling(n_samples, start=start)


def test_downsampling_keeps_true_times() -> None:
    cut = tiling(2100, step=3)
    assert [(tile.index, tile.start, tile.stop) for tile in cut] == [(0, 0, 300), (1, 900, 1200)]
    assert cut.tile_of(np.array([0, 299, 900, 1199])).tolist() == [0, 0, 1, 1]


def test_downsampling_that_leaves_no_batch_is_refused() -> None:
    with pytest.raises(RecordingError, match="batch_downsampling=5 leaves none of the recording's 4 batches"):
        tiling(step=5)


@pytest.mark.parametrize("index", [-1, 4])
def test_there_are_no_tiles_before_the_first_or_after_the_last(index: int) -> None:
    with pytest.raises(IndexError):
        tiling()[index]


@pytest.mark.parametrize(
    ("n_tiles", "every", "min_tiles", "max_tiles", "chosen"),
    [
        (10, 5, 1, 9, [0, 5]),  # as asked for
        (10, 5, 4, 9, [0, 2, 5, 7]),  # at least four
        (10, 1, 1, 5, [0, 2, 4, 6, 8]),  # at most five
        (3, 1, 25, 200, [0, 1, 2]),  # no more than there are
        (11, 5, 1, 9, [0, 3, 7]),  # a part of five begun counts
    ],
)
def test_evenly(n_tiles: int, every: int, min_tiles: int, max_tiles: int, chosen: list[int]) -> None:
    assert tiling(300 * n_tiles).evenly(every, min_tiles=min_tiles, max_tiles=max_tiles) == chosen


@pytest.mark.parametrize(
    ("per_block", "indices", "expected"),
    [
        (3, None, [[0, 1, 2], [3]]),
        (1, None, [[0], [1], [2], [3]]),
        (9, None, [[0, 1, 2, 3]]),
        (2, [0, 2, 3], [[0, 2], [3]]),
        (2, [], []),
    ],
)
def test_blocks_are_runs_of_tiles(per_block: int, indices: list[int] | None, expected: list[list[int]]) -> None:
    assert [[tile.index for tile in block] for block in tiling().blocks(per_block, indices)] == expected


def test_two_hundred_hours_are_counted_in_64_bits() -> None:
    n_samples = 200 * 3600 * 30_000  # ten times what 31 bits hold
    cut = Tiling.of(n_samples=n_samples, size=60_000, halo=600, shortest=61)
    last = cut[len(cut) - 1]
    assert (last.start, last.stop, len(cut)) == (n_samples - 60_000, n_samples, 360_000)
    assert cut.tile_of(np.array([n_samples - 1])).tolist() == [359_999]
    assert cut.tile_of(np.array([0])).dtype == np.int64
    assert cut.evenly(1, min_tiles=1, max_tiles=2) == [0, 180_000]


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(blocks)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize(
    ("artifacts", "expected"),
    [
        ([], [[0, 1000]]),
        ([[100, 120], [110, 150], [150, 160]], [[0, 100], [160, 1000]]),
        ([[0, 10], [990, 1000]], [[10, 990]]),
        ([[990, 1100]], [[0, 990]]),
        ([[0, 1000]], []),
    ],
)
def test_artifacts_are_cut_out_of_the_sorted_span(artifacts, expected):
    tiling = Tiling.of(n_samples=1000, size=300, halo=50, shortest=61)
    assert observed_spans(tiling, np.array(artifacts, np.int64).reshape(-1, 2)).tolist() == expected


def test_only_sorted_batches_were_observed():
    tiling = Tiling.of(n_samples=1000, size=200, halo=0, shortest=61, start=100, step=2)
    assert observed_spans(tiling, np.array([[150, 350]])).tolist() == [[100, 150], [500, 700]]
