"""In which batches small peaks are detected."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.blocks import Tiling
from ks4stream.settings import Settings
from ks4stream.stages.small_peaks import common_peak, complete_batches, lowest_peak

RATE_HZ = 1000.0


def tiling(n_batches: int, size: int = 2000) -> Tiling:
    return Tiling.of(n_samples=n_batches * size, size=size, halo=0, shortest=61)


@pytest.mark.parametrize(("n_batches", "n_complete"), [(1, 1), (100, 100), (101, 100), (500, 100), (1001, 201)])
def test_they_are_detected_in_a_fifth_but_in_at_least_200_seconds(n_batches: int, n_complete: int) -> None:
    """Of batches of two seconds."""
    complete = np.flatnonzero(complete_batches(Settings(), tiling(n_batches), RATE_HZ))
    assert len(complete) == n_complete
    part = complete * n_complete // n_batches  # one in each of equal parts, whose borders may round either way
    assert np.abs(part - np.arange(n_complete)).max() <= 1


def test_shorter_batches_are_more() -> None:
    assert complete_batches(Settings(), tiling(700, size=1000), RATE_HZ).sum() == 200


def test_they_do_not_follow_a_period() -> None:
    """Of stimuli every 5 to 20 batches, each phase has its share of them, within a half.

    With a period of 20 batches, that is 50 of 1000, which chance alone varies by 7 (s.d.).
    """
    complete = np.flatnonzero(complete_batches(Settings(), tiling(5000), RATE_HZ))
    for period in range(5, 21):
        of_phase = np.bincount(complete % period, minlength=period)
        assert of_phase.min() > 0.5 * len(complete) / period
        assert of_phase.max() < 1.5 * len(complete) / period


def test_with_a_number_all_batches_are_alike() -> None:
    settings = Settings(Th_universal=7)
    assert complete_batches(settings, tiling(1000), RATE_HZ).all()
    assert lowest_peak(settings) == common_peak(settings) == 7
    assert (lowest_peak(Settings()), common_peak(Settings())) == (6.5, 9.0)
