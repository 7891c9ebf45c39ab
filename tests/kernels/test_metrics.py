"""Metrics of one unit, by hand; tests/test_metrics_of_spikeinterface.py compares them with SpikeInterface's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ks4stream.kernels import metrics

RATE = 30_000.0


def train(*times: int) -> np.ndarray:
    return np.array(times, np.int64)


def test_bins_are_whole():
    assert metrics.bin_edges(5, 34, 10).tolist() == [5, 15, 25]
    assert metrics.bin_edges(5, 14, 10).tolist() == [5], "too short for one"


def test_presence_is_not_defined_without_a_bin():
    edges = metrics.bin_edges(0, 9, 10)
    assert math.isnan(metrics.presence_ratio(metrics.counts_in(train(1, 2), edges)))


def test_violations_are_relative_to_independent_spikes():
    # In 100 s, 1000 spikes have 2 × 1000 × 1.5 ms = 3 s after and before them, in which 1000 × 0.03 = 30 were expected.
    regular = np.arange(1000) * 3000
    close = np.sort(np.concatenate([regular[:-15], regular[:15] + 44]))
    n_samples = 3_000_000
    assert metrics.isi_violations_ratio(regular, sampling_rate_hz=RATE, n_samples=n_samples) == 0
    found = metrics.isi_violations_ratio(close, sampling_rate_hz=RATE, n_samples=n_samples)
    assert found == pytest.approx(15 / 30)
    half = metrics.isi_violations_ratio(close, sampling_rate_hz=RATE, n_samples=n_samples // 2)
    assert half == pytest.approx(found / 2), "in half of the time, twice as many are expected"


@pytest.mark.parametrize(("apart", "counts"), [(30, True), (31, False)])
def test_pairs_within_a_millisecond_are_foreign_spikes(apart, counts):
    regular = np.arange(1000) * 3000
    pairs = np.sort(np.concatenate([regular, regular[:4] + apart]))
    found = metrics.rp_contamination(pairs, sampling_rate_hz=RATE, n_samples=3_000_000)
    # Solves (4 pairs) = n² · 2 · 1 ms / T · (C − C² / 2), the expected number of pairs with a foreign spike.
    expected = 1 - math.sqrt(1 - 4 * 3_000_000 / (1004**2 * 30))
    assert found == pytest.approx(expected if counts else 0)


def test_more_pairs_than_any_share_explains_is_full_contamination():
    bursts = np.sort(np.concatenate([np.arange(100) * 30_000 + step for step in (0, 10, 20)]))
    assert metrics.rp_contamination(bursts, sampling_rate_hz=RATE, n_samples=3_000_000) == 1


def test_the_sliding_period_excludes_what_many_spikes_without_pairs_exclude():
    rng = np.random.default_rng(1)
    gaps = rng.integers(200, 1400, 12_000)  # at least 6.7 ms
    many = np.cumsum(gaps)
    n_samples = int(many[-1]) + 1
    time = {"sampling_rate_hz": RATE, "n_samples": n_samples}
    assert metrics.sliding_rp_violation(many, **time) == 0.005, "the smallest that is tested"
    few = many[::100]
    assert math.isnan(metrics.sliding_rp_violation(few, **time)), "too few to exclude anything"
    foreign = np.sort(np.concatenate([many, rng.integers(0, n_samples, 1200)]))
    assert 0.05 < metrics.sliding_rp_violation(foreign, **time) < 0.15  # a share of 1200 / 13200 = 0.09 is foreign


@pytest.mark.parametrize(("lowest", "missing"), [(-9, 0.0), (-1.0, 0.159), (0.5, 0.5)])
def test_the_share_that_is_cut_off(lowest, missing):
    amplitude = np.random.default_rng(2).normal(size=40_000)
    amplitude = 10 + amplitude[amplitude > lowest]
    assert metrics.amplitude_cutoff(amplitude) == pytest.approx(missing, abs=0.03)  # bins are smoothed over 3


def test_a_cut_off_needs_500_spikes():
    assert math.isnan(metrics.amplitude_cutoff(np.ones(499)))
    assert not math.isnan(metrics.amplitude_cutoff(np.linspace(1, 2, 500)))


def test_drift_is_that_of_medians():
    edges = np.array([0, 100, 200, 300, 400])
    sample = np.concatenate([np.arange(0, 100), np.arange(100, 200), np.arange(200, 250), np.arange(300, 400)])
    depth = np.repeat([10.0, 14.0, 99.0, 12.0], [100, 100, 50, 100])
    depth[0] = 1000  # one spike moves no median
    found = metrics.drift(sample, depth, edges)
    assert found.ptp == 4, "the third interval has too few spikes"
    assert found.std == pytest.approx(np.std([10, 14, 12]))
    assert found.mad == 2
    assert np.isnan(metrics.drift(sample[:100], depth[:100], edges)).all(), "three of four are empty"
    assert np.isnan(metrics.drift(sample[:100], depth[:100], edges[:2])).all(), "there is nothing to compare with"


def test_nothing_is_known_of_no_spikes():
    none, time = train(), {"sampling_rate_hz": RATE, "n_samples": 100}
    for name in ("isi_violations_ratio", "rp_contamination", "sliding_rp_violation"):
        assert math.isnan(getattr(metrics, name)(none, **time)), name
    assert math.isnan(metrics.amplitude_cutoff(np.zeros(0)))
    assert math.isnan(metrics.stability(none, 0, 100))


def test_neighbours_of_two_units_by_hand():
    apart = torch.arange(5.0, dtype=torch.float64)[:, None]
    assert metrics.isolation(apart, apart + 100) == 1
    # Of two spikes each, all three others are neighbours, and one of these is of the same unit.
    assert metrics.isolation(apart[:2], apart[:2] + 100) == pytest.approx(1 / 3)
    # At 0 to 4 and 5 to 9, the four nearest of 3 and of 4 are 1, 2, 4, 5 and 2, 3, 5, 6: one and two are foreign.
    assert metrics.isolation(apart, apart + 5 - 1e-9) == pytest.approx(1 - 2 * (1 + 2) / 40)


def test_isolation_is_judged_in_principal_components():
    """Two units that differ along one of 60 axes, in noise that hides it from distances in all of them."""
    draw = torch.Generator().manual_seed(1)
    units = torch.randn(2, 200, 60, generator=draw, dtype=torch.float64)
    units[1, :, 7] += 6
    assert metrics.isolation(*units) > 0.97
    assert metrics.isolation(*units[:, :, torch.arange(60) != 7]) == pytest.approx(0.5, abs=0.075)  # 3 · 0.5 / √400
