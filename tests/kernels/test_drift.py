"""Registration of fingerprints with known shifts."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from ks4stream.kernels import drift
from ks4stream.kernels.drift import (
    Registered,
    best_nblocks,
    blocks_tried,
    fingerprint_bins,
    n_depth_bins,
    segment_bounds,
    shift_at,
)

UNSMOOTHED = (0.0, 0.0, 0.0)
LEVELS = np.arange(20)


def fingerprints(moves: list[float], n_bins: int = 60, within: tuple[float, float] = (10, 50)) -> np.ndarray:
    """Counts of batches that moved by `moves` bins: twelve patches of activity `within` some depths."""
    rng = np.random.default_rng(4)
    depth, level = rng.uniform(*within, 12), rng.uniform(2, 18, 12)
    z = np.arange(n_bins)
    counts = np.zeros((len(moves), 1, n_bins, 20))
    for batch, move in enumerate(moves):
        across = np.exp(-0.5 * ((z[:, None] - depth - move) / 1.5) ** 2)
        counts[batch, 0] = 200 * across @ np.exp(-0.5 * (LEVELS - level[:, None]) ** 2)
    return counts.round().astype(np.uint16)


def register(counts: np.ndarray, *, nblocks: int, smoothing: tuple[float, float, float]) -> np.ndarray:
    return Registered.rigidly(counts).in_segments([nblocks], smoothing)[0]


def shifts(counts: np.ndarray, nblocks: int = 1, smoothing: tuple[float, float, float] = UNSMOOTHED) -> np.ndarray:
    """Registered shifts, relative to the middle batch, which is the first reference."""
    estimate = register(counts, nblocks=nblocks, smoothing=smoothing)
    return estimate - estimate[len(estimate) // 2]


def test_whole_bins_are_recovered_and_undone() -> None:
    moves = [-6.0, 3, 0, 0, 0, 1, -2, 9]
    # The shift is read off in steps of a tenth of a bin, in each of two batches compared.
    np.testing.assert_allclose(shifts(fingerprints(moves))[:, 0], -np.array(moves), atol=0.2)


def test_parts_of_bins_are_recovered() -> None:
    moves = [-1.5, 0.5, 0, 0, 0, 0.3, -0.7, 2.5]
    # Two steps of a tenth, and the rounding of log-counts that the Gaussian between whole bins smooths over.
    np.testing.assert_allclose(shifts(fingerprints(moves))[:, 0], -np.array(moves), atol=0.3)


def test_slow_drift_survives_the_default_smoothing() -> None:
    moves = np.linspace(-5, 5, 41)
    estimate = shifts(fingerprints(list(moves)), smoothing=(0.5, 0.5, 0.5))[:, 0]
    np.testing.assert_allclose(estimate, -moves, atol=0.4)  # as above, plus a quarter of a bin between batches


def test_segments_move_on_their_own() -> None:
    low = fingerprints([0] * 8 + [2], within=(8, 40), n_bins=100)
    high = fingerprints([0] * 8 + [-2], within=(60, 92), n_bins=100)
    estimate = shifts(low + high, nblocks=2)
    assert estimate.shape == (9, 3)
    np.testing.assert_allclose(estimate[-1, [0, 2]], [-2, 2], atol=0.3)  # as above
    np.testing.assert_allclose(estimate[:-1], 0, atol=0.2)


def test_segments_are_aligned_as_if_each_were_alone() -> None:
    """A segment compares its bins of the reference with the whole batch, at the rigid shift and beside it."""
    counts = fingerprints([0, 3, -2, 9, 0, 1], n_bins=90, within=(8, 82))
    registered = Registered.rigidly(counts)
    found = registered.in_segments([1, 3], UNSMOOTHED)
    prints = drift._prints(counts)
    steps = np.arange(-5, 6)
    for nblocks, shift in zip([1, 3], found, strict=True):
        for segment, (first, last) in enumerate(segment_bounds(90, nblocks)):
            window = np.zeros_like(registered.reference)
            window[first:last] = registered.reference[first:last]
            similarity = drift._compare(prints, window, registered.shift, steps).T[:, :, None]
            alone = registered.shift + drift._peak_between_bins(similarity, 5)[:, 0]
            assert shift[:, segment].tolist() == alone.tolist()


@pytest.mark.parametrize(("knots", "nblocks"), [([0.5], 1), ([0, 1], 2), ([0, 0.5, 1], 2), ([0, 1 / 3, 2 / 3, 1], 3)])
def test_the_number_of_blocks_follows_from_the_halves(knots: list[float], nblocks: int) -> None:
    """Tissue that moves at some depths, and linearly between; noise differs between the halves."""
    draw, tried = np.random.default_rng(5), [1, 2, 3, 4, 6]
    true = draw.normal(0, 2, (200, len(knots)))

    def half() -> list[np.ndarray]:
        centres = [np.mean(segment_bounds(600, n), axis=1) / 600 for n in tried]
        seen = [np.stack([np.interp(centre, knots, row) for row in true]) for centre in centres]
        return [shift + draw.normal(0, 0.1 * math.sqrt(n), shift.shape) for n, shift in zip(tried, seen, strict=True)]

    assert best_nblocks(tried, half(), half(), 600) == nblocks


def test_halves_that_move_apart_rigidly_need_no_more_blocks() -> None:
    draw, tried = np.random.default_rng(6), [1, 2, 3]
    apart = np.repeat([0, 4], 100)[:, None]  # one half took other neurons for those of the reference

    def half(offset: float | np.ndarray) -> list[np.ndarray]:
        return [offset + draw.normal(0, 0.1, (200, 2 * n - 1)) for n in tried]

    assert best_nblocks(tried, half(apart), half(0), 600) == 1


def test_blocks_are_at_least_300_um_long() -> None:
    assert blocks_tried(0) == blocks_tried(599) == [1]
    assert blocks_tried(900) == [1, 2, 3]


@pytest.mark.parametrize("n_bins", [1, 2, 7, 15, 60])
def test_a_recording_that_keeps_still_is_left_where_it_is(n_bins: int) -> None:
    counts = np.repeat(fingerprints([0.0], n_bins=n_bins, within=(0, n_bins)), 5, axis=0)
    assert register(counts, nblocks=1, smoothing=(0.5, 0.5, 0.5)).tolist() == [[0.0]] * 5


@pytest.mark.parametrize("n_bins", [7, 60])
def test_segments_of_a_recording_that_keeps_still_do_not_move_over_time(n_bins: int) -> None:
    counts = np.repeat(fingerprints([0.0], n_bins=n_bins, within=(0, n_bins)), 5, axis=0)
    assert shifts(counts, nblocks=3, smoothing=(0.5, 0.5, 0.5)).tolist() == [[0.0] * 5] * 5


def test_silence_does_not_move() -> None:
    assert register(np.zeros((4, 1, 30, 20), np.uint16), nblocks=1, smoothing=UNSMOOTHED).tolist() == [[0.0]] * 4


@pytest.mark.parametrize(("within", "move"), [((2, 8), 4.0), ((52, 57), -4.0)])
def test_activity_at_one_end_only_is_followed(within: tuple[float, float], move: float) -> None:
    estimate = shifts(fingerprints([0, 0, 0, 0, move, move], within=within)[[0, 1, 4, 2, 3, 5]])
    # Where the middle batch lies is 0.
    np.testing.assert_allclose(estimate[:, 0], [0, 0, -move, 0, 0, -move], atol=0.2)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(0, [1, 2, 3]), (1, [0, 1, 2]), (-1, [2, 3, 0]), (2, [0, 0, 1]), (3, [0, 0, 0]), (-7, [0, 0, 0])],
)
def test_nothing_wraps_around(shift: int, expected: list[float]) -> None:
    assert drift._shifted(np.array([[1.0], [2.0], [3.0]]), shift).ravel().tolist() == expected


def jumps_with_other_activity(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Displacements, and counts of six neurons, each with another rate at each of them."""
    draw = np.random.default_rng(seed)
    place, level, rate = draw.uniform(8, 52, 6), draw.integers(0, 20, 6), draw.uniform(10, 60, 6)
    moved = np.repeat([0, -4, 4], [12, 8, 10])
    active = {move: draw.uniform(0, 1, 6) ** 2 for move in (0, -4, 4)}
    counts = np.zeros((30, 1, 60, 20), np.uint16)
    for batch, move in enumerate(moved.tolist()):
        for neuron, share in enumerate(active[move]):
            z = np.floor(draw.normal(place[neuron] + move, 0.7, draw.poisson(rate[neuron] * share))).astype(int)
            np.add.at(counts, (batch, 0, z.clip(0, 59), level[neuron]), 1)
    return moved, counts


@pytest.mark.parametrize("n_tried", [30, 10])
def test_another_first_reference_counts_if_more_is_aligned_with_it(
    monkeypatch: pytest.MonkeyPatch, n_tried: int
) -> None:
    moved, counts = jumps_with_other_activity(116)

    def farthest_off() -> int:
        total, _ = drift._register_rigidly(counts)
        off = total + moved
        return int(np.abs(off - np.median(off)).max())

    monkeypatch.setattr(drift, "BATCHES_TRIED", n_tried)
    assert farthest_off() <= 1
    monkeypatch.setattr(drift, "LARGER_BY", 2.0)  # so that it is the middle batch
    assert farthest_off() > 3


def test_the_rigid_shift_is_at_most_half_the_bins() -> None:
    counts = fingerprints([0, 0, 0, 0, 25], n_bins=30, within=(1, 4))
    total, _ = drift._register_rigidly(counts)
    assert np.abs(total).max() <= 15


def test_parts_of_the_counts_are_summed() -> None:
    counts = fingerprints([-3.0, 0, 0, 2, 0, 1, 0])
    parts = np.concatenate([counts // 3, counts - counts // 3], axis=1)
    whole = register(counts, nblocks=2, smoothing=UNSMOOTHED)
    assert register(parts, nblocks=2, smoothing=UNSMOOTHED).tolist() == whole.tolist()


def test_many_batches_are_compared_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = fingerprints([-3.0, 0, 0, 2, 0, 1, 0])
    whole = register(counts, nblocks=2, smoothing=(0.5, 0.5, 0.5))
    monkeypatch.setattr(drift, "BINS_PER_CHUNK", 2 * 60 * 20 + 1)
    assert register(counts, nblocks=2, smoothing=(0.5, 0.5, 0.5)).tolist() == whole.tolist()


@pytest.mark.parametrize(("span_um", "n_bins"), [(0, 2), (4, 2), (4.5, 3), (100, 22)])
def test_depth_bins_begin_a_micrometre_below_the_lowest_contact(span_um: float, n_bins: int) -> None:
    assert n_depth_bins(span_um, 5) == n_bins


def bins_of(depth_um: list[float], score: list[float]) -> tuple[list[int], list[int]]:
    z, a = fingerprint_bins(
        np.array(depth_um, np.float32), np.array(score, np.float32), lowest_um=50, bin_um=5, n_bins=4, threshold=9
    )
    return z.tolist(), a.tolist()


def test_edges_of_the_depth_bins() -> None:
    depths = [49, 53.9, 54, 63.9, 64, 68.9]
    assert bins_of(depths, [20] * 6)[0] == [0, 0, 1, 2, 3, 3]
    assert bins_of([-500, 48.9, 69, 900], [20] * 4)[0] == [0, 0, 3, 3]  # beyond the probe: the outermost


def test_edges_of_the_amplitude_bins() -> None:
    edge = [9 * math.exp(math.log(100 / 9) * i / 20) for i in range(20)]
    assert bins_of([60] * 20, [1.001 * e for e in edge])[1] == list(range(20))
    assert bins_of([60] * 19, [0.999 * e for e in edge[1:]])[1] == list(range(19))
    assert bins_of([60] * 4, [8, 99, 100, 1e6])[1] == [0, 19, 19, 19]


@pytest.mark.parametrize(
    ("n_bins", "nblocks", "bounds"),
    [
        (100, 1, [(0, 100)]),
        (100, 2, [(0, 50), (25, 75), (50, 100)]),
        (10, 3, [(0, 3), (2, 5), (4, 7), (5, 8), (7, 10)]),  # starts 0, 1.75, 3.5, 5.25, 7, rounded
        (2, 3, [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2)]),  # never empty
    ],
)
def test_segments_half_overlap(n_bins: int, nblocks: int, bounds: list[tuple[int, int]]) -> None:
    assert segment_bounds(n_bins, nblocks) == bounds


def test_shifts_are_interpolated_between_segments_and_extrapolated_beyond() -> None:
    depth = np.array([0.0, 20, 50, 80, 100, 110])
    estimate = shift_at(depth, np.array([20, 80, 100], np.float32), np.array([0, 6, 4], np.float32))
    np.testing.assert_allclose(estimate, [-2, 0, 3, 6, 4, 3], atol=1e-9)  # whole numbers, computed in float64


def test_segments_with_the_same_centre_do_not_divide_by_zero() -> None:
    estimate = shift_at(np.array([0.0, 1, 1.5, 2, 3]), np.array([1, 1, 2, 2], "f4"), np.array([4, 4, 6, 6], "f4"))
    assert estimate.tolist() == [4, 4, 5, 6, 6]


def test_one_segment_moves_everything_alike() -> None:
    assert shift_at(np.array([0.0, 500]), np.array([7], np.float32), np.array([2.5], np.float32)).tolist() == [2.5, 2.5]


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(drift)
    assert outcome.attempted > 0
    assert outcome.failed == 0
