"""Every spike at a border counts once."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.kernels.borders import Reported, settle

BORDER, NT, TOLERANCE = 1000, 61, 20


def left_tile(*spikes: tuple[int, int]) -> Reported:
    sample, unit = np.array(spikes, dtype=np.int64).reshape(-1, 2).T
    return Reported(sample, unit, sample < BORDER)


def right_tile(*spikes: tuple[int, int]) -> Reported:
    sample, unit = np.array(spikes, dtype=np.int64).reshape(-1, 2).T
    return Reported(sample, unit, sample >= BORDER)


def settled(left: Reported, right: Reported) -> tuple[list[bool], list[bool]]:
    one, other = settle(left, right, border=BORDER, nt=NT, tolerance=TOLERANCE)
    return one.tolist(), other.tolist()


@pytest.mark.parametrize("at", [-60, -1, 0, 1, 59])
def test_a_spike_both_tiles_see_at_the_same_sample_counts_once_as_the_left_one(at: int) -> None:
    assert settled(left_tile((BORDER + at, 3)), right_tile((BORDER + at, 3))) == ([True], [False])


@pytest.mark.parametrize(("one", "other"), [(-1, 0), (0, -1), (-10, 10), (10, -10), (-30, -15), (30, 25)])
def test_a_spike_the_tiles_place_differently_counts_once(one: int, other: int) -> None:
    # (0, −1) is the one that each tile would leave to the other
    assert settled(left_tile((BORDER + one, 3)), right_tile((BORDER + other, 3))) == ([True], [False])


def test_too_far_apart_or_of_another_unit_is_no_pair() -> None:
    assert settled(left_tile((BORDER - 10, 3)), right_tile((BORDER + 11, 3))) == ([True], [True])
    assert settled(left_tile((BORDER + 11, 3)), right_tile((BORDER - 10, 3))) == ([False], [False])
    assert settled(left_tile((BORDER - 1, 3)), right_tile((BORDER, 4))) == ([True], [True])


def test_what_one_tile_alone_sees_counts_in_its_core_only() -> None:
    assert settled(left_tile((BORDER - 5, 1), (BORDER + 5, 2)), right_tile()) == ([True, False], [])
    assert settled(left_tile(), right_tile((BORDER - 5, 1), (BORDER + 5, 2))) == ([], [False, True])


def test_nearest_first_then_earlier() -> None:
    # 1005 is nearer to 1004 than 998 is; 998 stays alone, in its core
    assert settled(left_tile((998, 1), (1005, 1)), right_tile((1004, 1))) == ([True, True], [False])
    # 996 and 1004 are equally near to 1000: the earlier is its partner, 1004 is alone outside its core
    assert settled(left_tile((1004, 1), (996, 1)), right_tile((1000, 1))) == ([False, True], [False])
    # a burst: three against three, one to one
    assert settled(left_tile((990, 1), (1002, 1), (1015, 1)), right_tile((991, 1), (1001, 1), (1016, 1))) == (
        [True] * 3,
        [False] * 3,
    )


def test_far_from_the_border_nothing_changes_so_that_borders_can_be_settled_in_turn() -> None:
    for far in (-NT - 1, NT):
        left, right = left_tile((BORDER + far, 1)), right_tile((BORDER + far, 1))
        assert settled(left, right) == (left.counts.tolist(), right.counts.tolist())
    # a tile from 500 to 1000: what its left border decided stands at its right border
    middle = Reported(np.array([498, 505, 1003]), np.array([1, 2, 3]), np.array([False, True, False]))
    before = Reported(np.array([505]), np.array([2]), np.array([False]))
    _, keep = settle(before, middle, border=500, nt=NT, tolerance=TOLERANCE)
    assert keep.tolist() == [False, False, False]
    middle = middle._replace(counts=keep)
    assert settled(middle, right_tile((1001, 3))) == ([False, False, True], [False])


def test_the_arguments_are_left_alone_and_nothing_is_nothing() -> None:
    left, right = left_tile((BORDER + 3, 1)), right_tile((BORDER + 3, 1))
    settled(left, right)
    assert (left.counts.tolist(), right.counts.tolist()) == ([False], [True])
    assert settled(left_tile(), right_tile()) == ([], [])


def test_random_spikes_that_both_tiles_see_with_jitter_count_once_each() -> None:
    draw = np.random.default_rng(0)
    true = np.sort(draw.choice(np.arange(BORDER - 50, BORDER + 50), 20, replace=False))
    unit = np.arange(20)  # each its own, so that truth is known
    one, other = true + draw.integers(-5, 6, 20), true + draw.integers(-5, 6, 20)
    keep_one, keep_other = settled(
        left_tile(*zip(one.tolist(), unit.tolist(), strict=True)),
        right_tile(*zip(other.tolist(), unit.tolist(), strict=True)),
    )
    assert keep_one == [True] * 20
    assert not any(keep_other)
