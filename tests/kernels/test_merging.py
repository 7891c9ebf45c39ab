"""Merging of clusters, and duplicates."""

from __future__ import annotations

import doctest
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ks4stream.kernels import merging
from ks4stream.kernels.merging import (
    TOGETHER_PAIRS,
    AreTwo,
    GrowingUnit,
    LineUp,
    MergedUnits,
    coincident_share,
    fire_together,
    joined_train,
    mark_duplicates,
    merge_clusters,
)
from ks4stream.kernels.templates import roll_matrix, similarity, similarity_to

RATE = 30_000.0
NT = 61


def components(q: int = 5) -> torch.Tensor:
    """Smooth orthonormal waveforms that vanish at the ends."""
    time = torch.linspace(-1, 1, NT, dtype=torch.float64)
    bumps = torch.stack([torch.exp(-12 * time**2) * time**k for k in range(q)])
    return torch.linalg.qr(bumps.T)[0].T.float().contiguous()


PCS = components()


def template(channel: int, *, lag: int = 0, size: float = 20.0, n_channels: int = 4) -> torch.Tensor:
    """A bump on one channel, `lag` samples late, as features (c, q)."""
    time = torch.arange(NT) - NT // 2 - lag
    features = torch.zeros(n_channels, len(PCS))
    features[channel] = size * (torch.exp(-0.5 * (time / 6.0) ** 2) @ PCS.T)
    return features


def one_neuron(n: int, seed: int) -> np.ndarray:
    """Spike times at least 5 ms apart, about 40 a second."""
    return np.cumsum(np.random.default_rng(seed).integers(150, 1400, n))


class Outcome(NamedTuple):
    """What merging does to all spikes."""

    sample: np.ndarray
    unit: np.ndarray
    lag: np.ndarray
    unit_of: np.ndarray
    lag_of: np.ndarray
    features: torch.Tensor


def always(*_: object) -> bool:
    return True


def never(*_: object) -> bool:
    return False


def as_it_is(unit: GrowingUnit, other: GrowingUnit, lag: int) -> int:
    return lag


def merged(
    trains: list[np.ndarray], templates: list[torch.Tensor], are_two: AreTwo = always, line_up: LineUp = as_it_is
) -> Outcome:
    """Merge clusters given by train and template; by default, spikes of any two look like those of two neurons."""
    features = torch.stack(templates)
    alike = similarity(features, PCS)

    units = merge_clusters(
        trains,
        np.array([len(train) for train in trains]),
        features,
        PCS,
        similarity=alike.value.numpy(),
        lag=alike.lag.numpy(),
        sampling_rate_hz=RATE,
        acg_threshold=0.2,
        ccg_threshold=0.25,
        similarity_row=lambda one, others: similarity_to(one, others, PCS),
        are_two=are_two,
        line_up=line_up,
    )
    lag = np.repeat(units.lag_of, [len(train) for train in trains])
    unit = np.repeat(units.unit_of, [len(train) for train in trains])
    sample = np.concatenate(trains) - lag
    order = np.lexsort((unit, sample))
    return Outcome(sample[order], unit[order], lag[order], units.unit_of, units.lag_of, units.features)


# -- merging -----------------------------------------------------------------------------------------


def test_rolled_features_are_those_of_the_later_waveform() -> None:
    early, late = template(0, lag=-3), template(0, lag=2)
    torch.testing.assert_close(early @ roll_matrix(PCS, 5), late, atol=0.15, rtol=0)
    torch.testing.assert_close(roll_matrix(PCS, 0), torch.eye(len(PCS)), atol=1e-6, rtol=0)
    shifted = torch.roll(early[0] @ PCS, 5)  # nothing but edge value comes in
    torch.testing.assert_close((early @ roll_matrix(PCS, 5))[0], shifted @ PCS.T, atol=1e-3, rtol=0)


def test_parts_of_a_neuron_are_merged_and_strangers_are_not() -> None:
    train, other = one_neuron(3000, 0), one_neuron(2500, 1)
    units = merged([train[::2], train[1::2], other], [template(0, size=20), template(0, size=30), template(0, size=24)])
    assert units.unit_of.tolist() == [0, 0, 1]
    assert np.array_equal(units.sample[units.unit == 0], train)
    assert np.array_equal(units.sample[units.unit == 1], other)
    torch.testing.assert_close(units.features[0], template(0, size=25), atol=1e-3, rtol=1e-3)


def test_what_is_absorbed_is_moved_in_time() -> None:
    """If spikes are detected three samples late, the waveform is three samples early in its window."""
    train = one_neuron(3000, 2)
    early, late = train[np.arange(3000) % 3 > 0], train[::3]
    units = merged([early, late + 3], [template(1), template(1, lag=-3)])
    assert units.unit_of.tolist() == [0, 0]
    assert units.lag_of.tolist() == [0, 3]
    assert np.array_equal(units.sample, train)
    assert set(units.lag[np.isin(units.sample, late)].tolist()) == {3}
    torch.testing.assert_close(units.features[0], template(1), atol=0.15, rtol=0)


def test_lags_add_up_over_chains() -> None:
    train = one_neuron(6000, 3)
    part = np.arange(6000) % 6
    trains = [train[part < 3], train[(part == 3) | (part == 4)] + 2, train[part == 5] - 2]
    units = merged(trains, [template(1), template(1, lag=-2), template(1, lag=2)])
    assert units.unit_of.tolist() == [0, 0, 0]
    assert units.lag_of.tolist() == [0, 2, -2]
    assert np.array_equal(units.sample, train)


def test_unlike_templates_are_not_merged() -> None:
    train = one_neuron(3000, 4)
    assert merged([train[::2], train[1::2]], [template(0), template(2)]).unit_of.tolist() == [0, 1]


def test_units_that_are_not_refractory_absorb_nothing() -> None:
    draw = np.random.default_rng(5)
    noise = np.sort(draw.integers(0, 3_000_000, 4000))
    train = one_neuron(3000, 6)
    # the noise is the larger unit, and is not refractory: nothing is merged
    assert merged([noise, train], [template(0), template(0, size=23)]).unit_of.tolist() == [0, 1]


def test_numbers_are_kept_in_order_and_templates_follow() -> None:
    train, other = one_neuron(3000, 7), one_neuron(400, 8)
    units = merged([other, train[::3], train[np.arange(3000) % 3 > 0]], [template(2), template(0), template(0)])
    assert units.unit_of.tolist() == [0, 1, 1]
    assert units.features.shape == (2, 4, len(PCS))
    torch.testing.assert_close(units.features[0], template(2))


def rare(n: int, seed: int) -> np.ndarray:
    """Spikes every half a minute, too few for a correlogram."""
    return one_neuron(n, seed) * 30


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_few_spikes_are_one_if_their_spikes_are(seed: int) -> None:
    train = rare(100, seed)
    trains, templates = [train[::2], train[1::2]], [template(0), template(0, size=29)]
    assert merged(trains, templates, never).unit_of.tolist() == [0, 0]
    assert merged(trains, templates, always).unit_of.tolist() == [0, 1]


def test_clusters_that_are_not_refractory_are_merged_by_their_spikes_only() -> None:
    """Half of the spikes are of other neurons, at random times."""
    noise = np.sort(np.random.default_rng(11).integers(0, 3_000_000, 60))
    train = np.sort(np.concatenate([rare(60, 12), noise]))
    trains, templates = [train[::2], train[1::2]], [template(0), template(0, size=23)]
    assert merged(trains, templates, never).unit_of.tolist() == [0, 0]
    assert merged(trains, templates, always).unit_of.tolist() == [0, 1]


def test_clusters_that_fire_together_are_two_whatever_their_spikes() -> None:
    train = one_neuron(2000, 13)
    trains = [train, train[::3] + 40]
    assert fire_together(*trains, RATE)
    assert merged(trains, [template(0), template(0)], never).unit_of.tolist() == [0, 1]


def test_less_similar_clusters_are_not_compared() -> None:
    trains = [rare(50, 14), rare(40, 15)]
    templates = [template(0), template(0) + 2 * template(1)]  # cosine 0.45
    assert merged(trains, templates, lambda *_: pytest.fail("not similar")).unit_of.tolist() == [0, 1]
    templates = [template(0), template(0) + 1.5 * template(1)]  # cosine 0.55
    assert merged(trains, templates, never).unit_of.tolist() == [0, 0]


def test_units_are_compared_largest_first_with_the_most_similar_first() -> None:
    trains = [rare(n, seed) for n, seed in ((30, 16), (60, 17), (40, 18))]
    templates = [template(0), template(0) + 0.4 * template(1), template(0) + 1.2 * template(1)]
    asked: list[tuple[list[int], list[int]]] = []

    def are_two(unit: GrowingUnit, other: GrowingUnit, lag: int) -> bool:
        asked.append((list(unit.lags), list(other.lags)))
        return True

    assert merged(trains, templates, are_two).unit_of.tolist() == [0, 1, 2]
    assert asked == [([1], [0]), ([1], [2]), ([2], [0])]  # each pair once, as none grows


def test_a_unit_that_has_grown_starts_over() -> None:
    trains = [rare(n, seed) for n, seed in ((60, 19), (50, 20), (40, 21))]
    templates = [template(0), template(0) + 0.3 * template(1), template(0) + 0.6 * template(1)]
    asked: list[tuple[list[int], list[int]]] = []

    def are_two(unit: GrowingUnit, other: GrowingUnit, lag: int) -> bool:
        asked.append((list(unit.lags), list(other.lags)))
        return asked[-1] == ([0], [1])

    assert merged(trains, templates, are_two).unit_of.tolist() == [0, 0, 0]
    assert asked == [([0], [1]), ([0], [2]), ([0, 2], [1])]


def test_spikes_are_compared_at_their_lag() -> None:
    """The second cluster's spikes are detected three samples late, and so is its waveform early in the window."""
    trains = [rare(60, 42), rare(50, 43) + 3]
    asked: list[int] = []

    def are_two(unit: GrowingUnit, other: GrowingUnit, lag: int) -> bool:
        asked.append(lag)
        assert np.array_equal(other.train(), trains[1]) and np.array_equal(unit.train(), trains[0])
        return False

    units = merged(trains, [template(1), template(1, lag=-3)], are_two)
    assert asked == [3]
    assert units.lag_of.tolist() == [0, 3]


@pytest.mark.parametrize("by_correlogram", [True, False])
def test_spikes_may_line_up_at_another_lag_than_templates(by_correlogram: bool) -> None:
    """The templates are alike, but where both were recorded, the second cluster is one sample late."""
    train = one_neuron(3000, 44)
    trains = [train[::2], train[1::2] + 1] if by_correlogram else [rare(60, 42), rare(50, 43) + 1]
    asked: list[tuple[int, int]] = []

    def line_up(unit: GrowingUnit, other: GrowingUnit, lag: int) -> int:
        asked.append((lag, 0))
        return lag + 1

    def are_two(unit: GrowingUnit, other: GrowingUnit, lag: int) -> bool:
        asked.append((lag, 1))
        return False

    units = merged(trains, [template(1), template(1)], are_two, line_up)
    assert asked == ([(0, 0)] if by_correlogram else [(0, 0), (1, 1)])
    assert units.lag_of.tolist() == [0, 1]
    assert set(units.sample.tolist()) == {*trains[0].tolist(), *(trains[1] - 1).tolist()}


# -- times of two trains -----------------------------------------------------------------------------


def with_pairs(n_pairs: int, apart: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sparse trains of n spikes each, of which some are pairs."""
    a = np.arange(n) * 30_000
    b = a + 15_000
    b[:n_pairs] = a[:n_pairs] + apart
    return a, b


@pytest.mark.parametrize(
    ("n_pairs", "apart", "n", "together"),
    [
        (TOGETHER_PAIRS, 40, 100, False),
        (TOGETHER_PAIRS + 1, 40, 100, True),
        (TOGETHER_PAIRS + 1, -40, 100, True),
        (20, 40, 1000, False),  # not more than 2 %
        (21, 40, 1000, True),
        (50, 74, 100, True),  # 2.47 ms, in the bin of 2 ms
        (50, 76, 100, False),
        (50, 0, 100, True),  # one event, which was taken for a spike of each
    ],
)
def test_more_pairs_than_one_neuron_has_are_of_two(n_pairs: int, apart: int, n: int, together: bool) -> None:
    assert fire_together(*with_pairs(n_pairs, apart, n), RATE) == together


def test_pairs_count_relative_to_those_at_longer_lags() -> None:
    """Halves of a busy neuron's train have few pairs within its refractory period; unrelated trains have some."""
    train = one_neuron(20_000, 24)
    assert not fire_together(train[::2], train[1::2], RATE)
    strays = np.sort(np.random.default_rng(25).choice(train, 100, replace=False))  # pairs by wrong detections
    assert not fire_together(train[::2], np.sort(np.concatenate([train[1::2], strays + 40])), RATE)
    assert fire_together(one_neuron(20_000, 26), one_neuron(20_000, 27), RATE)


def test_pairs_count_relative_to_those_within_bursts() -> None:
    """Of the second spikes of a neuron's bursts, a few wrong ones are in the middle, 2 ms after the first."""
    firsts = rare(400, 28)
    wrong = np.random.default_rng(29).choice(firsts, 20, replace=False) + 60
    seconds = np.sort(np.concatenate([firsts + 120, wrong]))
    assert not fire_together(firsts, seconds, RATE)
    unrelated = np.sort(np.concatenate([rare(400, 30), wrong]))  # without bursts, so many are improbable
    assert fire_together(firsts, unrelated, RATE)
    bursts = [np.sort(np.concatenate([train, train + 120])) for train in (one_neuron(4000, 31), one_neuron(4000, 32))]
    assert fire_together(*bursts, RATE), "two neurons, each with bursts"


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_trains_of_few_spikes_do_not_fire_together(sizes: tuple[int, int]) -> None:
    a, b = (np.arange(n, dtype=np.int64) for n in sizes)
    assert not fire_together(a, b, RATE)
    assert coincident_share(a, b, RATE) in (0.0, 1.0)


def test_spikes_coincide_at_one_lag() -> None:
    train = np.arange(100) * 3000
    assert coincident_share(train, train + 20, RATE) == 1
    assert coincident_share(train, train - 30, RATE) == 1
    assert coincident_share(train, train + 33, RATE) == 0  # more than 1 ms
    assert coincident_share(train[:50], train, RATE) == 1
    assert coincident_share(train, train[:50], RATE) == 0.5
    jitter = np.arange(100) % 2 * 10
    assert coincident_share(train, train + 5 + jitter, RATE) == 0.5
    assert coincident_share(train, train + 5 + jitter // 5, RATE) == 1


def test_clusters_of_a_merged_unit_are_given_with_their_lags() -> None:
    units = MergedUnits(torch.zeros(2, 1, 1), np.array([0, 1, 0]), np.array([0, 0, 4]))
    assert (units.lags_of(0), units.lags_of(1)) == ({0: 0, 2: 4}, {1: 0})


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(merging)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("n_units", [0, 1])
def test_nothing_to_merge(n_units: int) -> None:
    features = torch.stack([template(0)] * n_units) if n_units else torch.zeros(0, 4, len(PCS))
    units = merge_clusters(
        [np.arange(1)] * n_units,
        np.ones(n_units, np.int64),
        features,
        PCS,
        similarity=np.ones((n_units, n_units), np.float32),
        lag=np.zeros((n_units, n_units), np.int64),
        similarity_row=lambda *_: pytest.fail("there is nobody to compare with"),
        are_two=lambda *_: pytest.fail("likewise"),
        line_up=lambda *_: pytest.fail("likewise"),
        sampling_rate_hz=RATE,
        acg_threshold=0.2,
        ccg_threshold=0.25,
    )
    assert units.unit_of.tolist() == list(range(n_units))
    assert units.features.shape[0] == n_units


def test_a_joined_train_is_in_order_of_the_moved_times() -> None:
    trains = [np.array([10, 30]), np.array([12, 33]), np.array([5])]
    assert joined_train(trains, {0: 0, 1: 4}).tolist() == [8, 10, 29, 30]
    assert joined_train(trains, {2: -1}).tolist() == [6]


def test_units_without_spikes_stay() -> None:
    train = one_neuron(500, 10)
    units = merged([train, np.zeros(0, np.int64)], [template(0), template(1)])
    assert units.unit_of.tolist() == [0, 1]
    assert len(units.features) == 2


# -- duplicates --------------------------------------------------------------------------------------


def slow_duplicates(sample: np.ndarray, unit: np.ndarray, min_samples: int) -> np.ndarray:
    """Which spikes are kept, as section 10 defines it: decided spike by spike."""
    kept, last = np.zeros(len(sample), bool), {}
    for i in np.lexsort((np.arange(len(sample)), sample)):
        u = unit[i]
        kept[i] = u not in last or sample[i] - last[u] >= min_samples
        if kept[i]:
            last[u] = sample[i]
    return kept


def test_spikes_are_dropped_after_the_last_one_kept() -> None:
    sample, unit = np.array([0, 4, 6, 8, 9, 20]), np.array([0, 0, 1, 0, 1, 1])
    assert mark_duplicates(sample, unit, min_samples=7).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("min_samples", [0, 1, 7, 50])
def test_duplicates_are_those_of_the_rule(min_samples: int) -> None:
    draw = np.random.default_rng(0)
    sample, unit = np.sort(draw.integers(0, 3000, 800)), draw.integers(0, 4, 800)
    assert np.array_equal(
        mark_duplicates(sample, unit, min_samples=min_samples), slow_duplicates(sample, unit, min_samples)
    )


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_drop(n: int) -> None:
    assert mark_duplicates(np.zeros(n, np.int64), np.zeros(n, np.int64), min_samples=7).tolist() == [True] * n


def test_a_long_chain_keeps_every_other() -> None:
    sample = np.arange(20_000) * 4
    kept = mark_duplicates(sample, np.zeros(20_000, np.int64), min_samples=8)
    assert np.array_equal(kept, np.arange(20_000) % 2 == 0)
