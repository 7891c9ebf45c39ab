"""Correlograms and refractoriness, on examples small enough to count."""

from __future__ import annotations

from math import erf, sqrt

import numpy as np
import pytest

from ks4stream.kernels import correlograms
from ks4stream.kernels.correlograms import (
    correlogram,
    is_refractory_pair,
    is_refractory_unit,
    refractoriness,
    refractoriness_of,
)

RATE = 30_000.0


def poisson_train(n: int, seconds: float, seed: int, refractory_ms: float = 0.0) -> np.ndarray:
    """Random spike times, without those too soon after the previous one."""
    draw = np.random.default_rng(seed)
    times = np.sort(draw.integers(0, int(seconds * RATE), n))
    if refractory_ms:
        kept = [int(times[0])]
        for time in times.tolist():
            if time - kept[-1] >= refractory_ms * RATE / 1000:
                kept.append(time)
        times = np.array(kept)
    return times


def test_lags_are_rounded_to_milliseconds() -> None:
    a = np.array([10_000])
    lags = np.array([-46, -44, -16, -14, 0, 14, 16, 44, 46, 104, 106])
    counts = correlogram(a, a[0] + lags, sampling_rate_hz=RATE, reach_ms=3)
    assert counts.tolist() == [0, 1, 2, 3, 2, 1, 1]
    assert counts.dtype == np.int64


def test_an_autocorrelogram_is_even_and_has_no_pair_of_a_spike_with_itself() -> None:
    train = poisson_train(300, 10, 0)
    counts = correlogram(train, sampling_rate_hz=RATE, reach_ms=50)
    lag = np.abs(train - train[:, None])
    assert counts[50] == np.sum(np.rint(lag / (RATE / 1000)) == 0) - len(train) > 0
    assert np.array_equal(counts, counts[::-1])


@pytest.mark.parametrize("rate", [30_000.0, 24_414.0625, 10_000.0])
def test_counts_are_those_of_all_pairs(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlograms, "PAIRS_PER_CHUNK", 7)  # many chunks
    draw = np.random.default_rng(1)
    a, b = np.sort(draw.integers(0, 20_000, 60)), np.sort(draw.integers(0, 20_000, 45))
    lags = np.rint((b - a[:, None]) / (rate / 1000)).astype(int)
    expected = [(lags == lag).sum() for lag in range(-20, 21)]
    assert correlogram(a, b, sampling_rate_hz=rate, reach_ms=20).tolist() == expected


def test_sums_of_large_times_are_exact() -> None:
    start = 2**45
    train = np.array([0, 60, 90]) + start
    assert correlogram(train, sampling_rate_hz=RATE, reach_ms=3).tolist() == [1, 1, 1, 0, 1, 1, 1]


def test_many_pairs_are_sampled_evenly() -> None:
    train = poisson_train(4000, 20, 2)
    whole = correlogram(train, sampling_rate_hz=RATE)
    part = correlogram(train, sampling_rate_hz=RATE, max_pairs=100_000)
    assert part.sum() <= 100_000
    assert part.sum() > 50_000
    assert abs(refractoriness_of(whole).ratio - refractoriness_of(part).ratio) < 0.2


def test_the_measure_counts_as_specified() -> None:
    counts = np.full(1001, 4)
    counts[460:541] = 8  # ±40 ms: 30 of the 40 bins of the left flank, 31 of the right one
    counts[497:504] = 1  # ±3 ms
    ratio, probability = refractoriness_of(counts)
    baseline = (31 * 8 + 9 * 4) / 40
    assert ratio == pytest.approx(1 / baseline)
    half = {1: 1, 2: 2, 3: 3, 4: 11, 5: 19, 6: 27}  # pairs within ± i ms, over two
    expected = min(0.5 * (1 + erf((n - baseline * i) / sqrt(2 * baseline * i))) for i, n in half.items())
    assert probability == pytest.approx(expected)


def test_trains_that_say_nothing() -> None:
    none, one = np.zeros(0, np.int64), np.array([5])
    for train in (none, one, np.array([5, 5, 5])):
        assert refractoriness(train, sampling_rate_hz=RATE) == (1.0, 1.0)
        assert not is_refractory_unit(train, sampling_rate_hz=RATE, acg_threshold=0.2)
        assert not is_refractory_pair(train, none, sampling_rate_hz=RATE, ccg_threshold=0.25)
        assert not is_refractory_pair(train, one, sampling_rate_hz=RATE, ccg_threshold=0.25)
    assert not is_refractory_unit(np.zeros(50, np.int64), sampling_rate_hz=RATE, acg_threshold=0.2)


def test_units_are_told_from_noise() -> None:
    assert is_refractory_unit(poisson_train(2000, 60, 3, refractory_ms=3), sampling_rate_hz=RATE, acg_threshold=0.2)
    assert not is_refractory_unit(poisson_train(2000, 60, 3), sampling_rate_hz=RATE, acg_threshold=0.2)


def test_halves_of_a_train_avoid_each_other_and_strangers_do_not() -> None:
    train = poisson_train(2000, 120, 4, refractory_ms=3)
    assert is_refractory_pair(train[::2], train[1::2], sampling_rate_hz=RATE, ccg_threshold=0.25)
    other = poisson_train(1000, 120, 5, refractory_ms=3)
    assert not is_refractory_pair(train[::2], other, sampling_rate_hz=RATE, ccg_threshold=0.25)


def test_an_empty_middle_of_few_pairs_is_no_evidence() -> None:
    """The published conditions are met by chance; at 0.6 pairs per bin one of fifty unrelated pairs passes."""
    verdicts = [
        is_refractory_pair(
            poisson_train(600, 120, seed),
            poisson_train(150, 120, 1000 + seed),
            sampling_rate_hz=RATE,
            ccg_threshold=0.25,
        )
        for seed in range(200)
    ]
    assert sum(verdicts) <= 2


def test_the_order_of_a_pair_does_not_matter() -> None:
    train = poisson_train(1500, 120, 6, refractory_ms=3)
    for a, b in ((train[::2], train[1::2]), (train[::3], poisson_train(300, 120, 7))):
        assert is_refractory_pair(a, b, sampling_rate_hz=RATE, ccg_threshold=0.25) == is_refractory_pair(
            b, a, sampling_rate_hz=RATE, ccg_threshold=0.25
        )
