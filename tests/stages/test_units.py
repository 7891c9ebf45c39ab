"""Which units can be neurons, and where their spikes were."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.probe import Probe
from ks4stream.stages.units import Units, are_neurons, fewest_spikes, positions

THRESHOLD, FEWEST, IMPOSSIBLE = 8.0, 5, 30.0


def units(*trains: list[int], score: float = 20.0, unkept: tuple[int, ...] = ()) -> Units:
    """Units of given spike times, sorted as :func:`combine` sorts them; spikes at `unkept` are duplicates."""
    sample = np.array([time for train in trains for time in train], np.int64)
    unit = np.repeat(np.arange(len(trains)), [len(train) for train in trains]).astype(np.int64)
    order = np.lexsort((unit, sample))
    n = len(sample)
    return Units(
        sample=sample[order],
        template=np.zeros(n, np.int32),
        score=np.full(n, score, np.float32),
        features=np.zeros((n, 1, 1), np.float32),
        unit=unit[order],
        kept=~np.isin(sample[order], unkept),
        unit_features=np.zeros((len(trains), 1, 1), np.float32),
    )


def judged(found: Units) -> list[bool]:
    return are_neurons(found, THRESHOLD, FEWEST, impossible_samples=IMPOSSIBLE).tolist()


def regular(n: int, every: int = 1000) -> list[int]:
    return [every * i for i in range(n)]


def test_a_neuron_has_enough_spikes() -> None:
    assert judged(units(regular(5), regular(4), [], regular(50))) == [True, False, False, True]


def test_duplicates_do_not_count() -> None:
    assert judged(units(regular(5), unkept=(2000,))) == [False]
    assert judged(units(regular(6), unkept=(2000,))) == [True]


@pytest.mark.parametrize(("score", "neuron"), [(8.0, False), (9.5, False), (9.625, True), (40.0, True)])
def test_scores_stand_clear_of_the_threshold(score: float, neuron: bool) -> None:
    assert judged(units(regular(10), score=score)) == [neuron]


def test_the_mean_score_counts_unit_by_unit() -> None:
    found = units(regular(6), [time + 500 for time in regular(6)])
    score = np.where(found.unit == 0, np.where(found.sample < 3000, 8.5, 12.0), 9.0).astype(np.float32)
    assert judged(found._replace(score=score)) == [True, False]  # means 10.25 and 9


def pairs(n: int, apart: int) -> list[int]:
    return [time for at in regular(n) for time in (at, at + apart)]


@pytest.mark.parametrize(("apart", "neuron"), [(1, False), (29, False), (30, True), (200, True)])
def test_what_fires_in_impossible_bursts_is_an_artifact(apart: int, neuron: bool) -> None:
    assert judged(units(pairs(5, apart))) == [neuron]


def test_half_of_the_spikes_in_bursts_is_just_possible() -> None:
    alone = [100_000 + time for time in regular(6)]
    assert judged(units(pairs(3, 10) + alone)) == [True]  # 6 of 12
    assert judged(units(pairs(3, 10) + alone[:5])) == [False]  # 6 of 11


def test_spikes_of_different_units_are_no_burst() -> None:
    assert judged(units(regular(8), [time + 10 for time in regular(8)])) == [True, True]
    assert judged(units(regular(5), [time + 4010 for time in regular(5)])) == [True, True]  # last against first


def test_no_units() -> None:
    assert judged(units()) == []


LINE = Probe.from_positions([(0, 0), (0, 20), (30, 20), (0, 400)])


def place(features: list[list[float]], channels: list[int], limit_um: float = 100) -> tuple[float, float]:
    found = np.array([features], np.float32)
    x, y = positions(found, np.zeros(1, np.int32), np.array([channels]), LINE, limit_um)
    assert x.dtype == y.dtype == np.float32
    return float(x[0]), float(y[0])


def test_contacts_weigh_by_the_norm_of_their_features() -> None:
    assert place([[3, 4], [0, -15]], [0, 1]) == (0, 15)  # norms 5 and 15
    assert place([[1, 0], [0, 1]], [1, 2]) == (15, 20)


def test_only_contacts_near_the_templates_first_count() -> None:
    assert place([[2], [2], [9]], [0, 1, 3]) == (0, 10)
    assert place([[2], [2]], [0, 1], limit_um=20) == (0, 0)  # 20 µm is not closer than 20 µm
    assert place([[2], [2]], [1, 0], limit_um=0) == (0, 20)  # its own place at least


def test_missing_channels_do_not_count() -> None:
    assert place([[2], [7]], [1, -1]) == (0, 20)


def test_every_spike_has_the_channels_of_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ks4stream.stages.units.ROWS_AT_ONCE", 2)  # and is computed in parts
    features, template = np.ones((5, 1, 1), np.float32), np.array([1, 0, 1, 2, 0], np.int32)
    x, y = positions(features, template, np.array([[0], [2], [3]]), LINE, 100)
    assert x.tolist() == [30, 0, 30, 0, 0]
    assert y.tolist() == [20, 0, 20, 400, 0]


@pytest.mark.parametrize(
    ("seconds", "fewest"), [(1, 5), (15, 5), (17, 5), (18, 6), (30, 10), (60, 20), (61, 20), (200 * 3600, 20)]
)
def test_a_unit_has_a_spike_in_three_seconds_but_five_in_any_and_twenty_suffice(seconds: int, fewest: int) -> None:
    assert fewest_spikes(seconds * 30_000, 30_000.0) == fewest
