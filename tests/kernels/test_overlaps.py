"""Which spikes overlap others."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from numpy.typing import NDArray

from ks4stream.kernels import overlaps
from ks4stream.kernels.overlaps import are_overlapped

EVERYWHERE = np.ones((3, 3), bool)


def overlapped(sample: list[int], template: list[int], is_near: NDArray[np.bool_] = EVERYWHERE) -> list[bool]:
    """Of spikes that are among each other."""
    times, templates = np.array(sample, np.int64), np.array(template, np.int32)
    found: list[bool] = are_overlapped(times, templates, times, templates, is_near=is_near, reach=5).tolist()
    return found


def test_examples() -> None:
    assert doctest.testmod(overlaps).failed == 0


def test_spikes_within_reach_overlap_and_others_do_not() -> None:
    assert overlapped([0, 5, 11, 20], [0, 1, 2, 0]) == [True, True, False, False]


def test_a_spike_does_not_overlap_itself_but_another_at_the_same_time() -> None:
    assert overlapped([7], [0]) == [False]
    assert overlapped([7, 7], [0, 1]) == [True, True]


def test_only_templates_that_are_near_overlap() -> None:
    is_near = np.eye(3, dtype=bool)
    is_near[0, 2] = True  # a wide template reaches a narrow one, but not the other way round
    assert overlapped([0, 1, 2], [0, 1, 2], is_near) == [True, False, False]


def test_the_one_that_is_near_need_not_be_the_first() -> None:
    assert overlapped([0, 1, 2, 3], [1, 1, 1, 0], np.array([[False, True], [False, False]])) == [False] * 3 + [True]
    is_near = np.zeros((3, 3), bool)
    is_near[0, 2] = True
    assert overlapped([8, 9, 10, 11, 12], [1, 1, 0, 1, 2], is_near) == [False, False, True, False, False]


@pytest.mark.parametrize("n", [0, 1, 300])
def test_as_by_comparing_each_with_each(n: int) -> None:
    draw = np.random.default_rng(n)
    times, templates = np.sort(draw.integers(0, 3000, 500)), draw.integers(0, 3, 500)
    chosen = np.sort(draw.choice(500, n, replace=False))
    is_near = draw.random((3, 3)) < 0.5
    near = is_near[templates[chosen, None], templates] & (np.abs(times[chosen, None] - times) <= 5)
    near &= (times[chosen, None] != times) | (templates[chosen, None] != templates)
    found = are_overlapped(times[chosen], templates[chosen], times, templates, is_near=is_near, reach=5)
    assert np.array_equal(found, near.any(axis=1))
