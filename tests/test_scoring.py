"""The scorer, on spike trains small enough to count, and against SpikeInterface's comparison."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.errors import SettingsError
from ks4stream.scoring import EdgeRates, Score, count_matches, newcombe_interval, score, wilson_interval

RATE_HZ = 30_000.0  # 0.4 ms are 12 samples


def spikes(**trains: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples, units) of trains given as u3=[…], in order of unit."""
    samples = [time for train in trains.values() for time in train]
    units = [int(name[1:]) for name, train in trains.items() for _ in train]
    return np.array(samples, dtype=np.int64), np.array(units, dtype=np.int64)


def compare(truth: tuple, found: tuple, **options) -> Score:
    return score(*truth, *found, sampling_rate_hz=RATE_HZ, **options)


def train(start: int, n: int = 10, step: int = 1000) -> list[int]:
    return [start + step * i for i in range(n)]


# --- pairing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "n_expected"), [(0, 1), (12, 1), (-12, 1), (13, 0), (-13, 0)])
def test_tolerance_is_inclusive(shift, n_expected):
    result = compare(spikes(u0=[1000]), spikes(u0=[1000 + shift]))
    assert result.n_matched.tolist() == [[n_expected]]


@pytest.mark.parametrize(
    ("truth", "found", "n_expected"),
    [
        ([100], [95, 105], 1),  # one spike cannot be two
        ([95, 105], [100], 1),
        ([100, 110], [90, 105], 2),
        ([100, 110], [111, 121], 2),  # only the pairing in order leaves no one alone
        ([100, 110, 120], [88, 108, 118], 3),
        ([100, 112, 124], [100], 1),
        ([], [100], 0),
        ([100], [], 0),
    ],
)
def test_pairs_are_one_to_one_and_as_many_as_possible(truth, found, n_expected):
    result = compare(spikes(u0=truth), spikes(u0=found), truth_ids=[0])
    assert result.n_matched.sum() == n_expected


def test_a_spike_may_pair_with_several_units_but_once_with_each():
    result = compare(spikes(u0=[100]), spikes(u0=[100, 104], u1=[103]))
    assert result.n_matched.tolist() == [[1, 1]]


def largest_pairing(first: np.ndarray, second: np.ndarray, tolerance: int) -> int:
    """Return the size of the largest pairing of two ascending trains: two pointers, for one pair of units."""
    i = j = n_pairs = 0
    while i < len(first) and j < len(second):
        if abs(first[i] - second[j]) <= tolerance:
            i, j, n_pairs = i + 1, j + 1, n_pairs + 1
        elif first[i] < second[j]:
            i += 1
        else:
            j += 1
    return n_pairs


@pytest.mark.parametrize("seed", range(5))
def test_crowded_trains_pair_as_in_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3000, 300), rng.integers(0, 3, 300)
    found = rng.integers(0, 3000, 300), rng.integers(0, 4, 300)
    result = compare(truth, found)
    for i in range(3):
        for j in range(4):
            trains = np.sort(truth[0][truth[1] == i]), np.sort(found[0][found[1] == j])
            assert result.n_matched[i, j] == largest_pairing(*trains, 12)


@pytest.mark.parametrize("n_at_once", [1, 5, 40, 1 << 18])
@pytest.mark.parametrize(("n_first", "n_second"), [(300, 300), (20, 500), (500, 20), (0, 9), (9, 0)])
def test_matches_are_counted_in_parts_as_in_one(monkeypatch, n_at_once, n_first, n_second):
    """Both where spikes are so dense that no part ends for long, and where they are sparse."""
    monkeypatch.setattr("ks4stream.scoring._SPIKES_AT_ONCE", n_at_once)
    rng = np.random.default_rng(3)
    for span in (3000, 30_000):
        first = np.sort(rng.integers(0, span, n_first)).astype(np.uint64), rng.integers(-1, 3, n_first, np.int32)
        second = np.sort(rng.integers(span // 3, span, n_second)), rng.integers(-1, 4, n_second)
        found = count_matches(*first, *second, n_first=3, n_second=4, sampling_rate_hz=RATE_HZ)
        for i in range(3):
            for j in range(4):
                trains = first[0][first[1] == i].astype(np.int64), second[0][second[1] == j]
                assert found[i, j] == largest_pairing(*trains, 12)


def test_order_of_spikes_does_not_matter():
    rng = np.random.default_rng(0)
    truth, found = spikes(u0=train(100), u1=train(500)), spikes(u4=train(103), u9=train(498, 7))
    shuffled = [tuple(array[order] for array in pair) for pair, order in _orders(rng, truth, found)]
    assert np.array_equal(compare(truth, found).agreement, compare(*shuffled).agreement)


def _orders(rng, *pairs):
    return [(pair, rng.permutation(len(pair[0]))) for pair in pairs]


# --- units --------------------------------------------------------------------------------------------------


def test_figures_of_one_unit():
    found = [*train(102, 8), 300, 700]  # 8 of 10 found, 2 extra
    result = compare(spikes(u5=train(100)), spikes(u7=found))
    assert result.agreement == pytest.approx(np.array([[8 / 12]]))
    assert result.accuracy == pytest.approx([8 / 12])
    assert result.recall == pytest.approx([0.8])
    assert result.precision == pytest.approx([0.8])
    assert result.matched_unit.tolist() == [7.0]
    assert not result.is_well_detected[0]


def test_well_detected_from_exactly_four_fifths():
    result = compare(spikes(u0=train(100)), spikes(u0=train(100, 8)))
    assert result.is_well_detected.tolist() == [True]


def test_unmatched_unit_counts_as_nothing_but_shows_its_best():
    result = compare(spikes(u0=train(100)), spikes(u3=train(100, 4)))
    assert np.isnan(result.matched_unit[0])
    assert (result.accuracy[0], result.recall[0], result.precision[0]) == (0, 0, 0)
    assert (result.best_unit[0], result.best_agreement[0]) == (3.0, 0.4)


def test_assignment_is_one_to_one():
    """Two true units merged into one sorted unit: it is matched to only one of them."""
    result = compare(spikes(u0=train(100, 12), u1=train(500, 6)), spikes(u0=sorted(train(100, 12) + train(500, 6))))
    assert result.matched_index.tolist() == [0, -1]
    assert result.overmerged_units.tolist() == [0]
    assert result.mean_accuracy == pytest.approx(0.5 * 12 / 18)


def test_classes_of_sorted_units():
    truth = spikes(u0=train(100, 20), u1=train(500, 20))
    found = spikes(
        u0=train(100, 15),  # matched
        u1=train(15_100, 5),  # the rest of unit 0: redundant (5 / 20 ≥ 0.2)
        u2=train(500, 9),  # best of unit 1, but too few to be matched: neither redundant nor false
        u3=train(700, 20),  # nothing
        u4=train(18_500, 2),  # 2 / 20 < 0.2: false
    )
    result = compare(truth, found)
    assert result.matched_index.tolist() == [0, -1]
    assert result.redundant_units.tolist() == [1]
    assert result.false_positive_units.tolist() == [3, 4]
    assert result.unmatched_units.tolist() == [1, 2, 3, 4]
    assert result.overmerged_units.tolist() == []
    assert result.summary == {
        "n_truth": 2,
        "n_sorted": 5,
        "n_matched": 1,
        "n_well_detected": 0,
        "n_false_positive": 2,
        "n_redundant": 1,
        "n_overmerged": 0,
        "n_unmatched": 4,
        "mean_accuracy": pytest.approx(0.375),
        "mean_recall": pytest.approx(0.375),
        "mean_precision": pytest.approx(0.5),
    }


def test_silent_true_units_count_as_not_found():
    result = compare(spikes(u0=train(100)), spikes(u0=train(100)), truth_ids=[0, 1])
    assert result.accuracy.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("empty", ["truth", "found", "both"])
def test_nothing_on_one_side_is_a_score_all_the_same(empty):
    none, some = spikes(), spikes(u0=train(100))
    result = compare(none if empty != "found" else some, none if empty != "truth" else some, edge_period_samples=1000)
    assert result.summary["n_well_detected"] == 0
    assert len(result.false_positive_units) == (empty == "truth")
    assert len(result.redundant_units) == len(result.overmerged_units) == 0
    assert "0 of" in result.table()


def test_table_names_every_unit_and_says_the_sum():
    text = compare(spikes(u0=train(100), u1=train(500)), spikes(u7=train(500))).table(amplitude_uv=[40.0, 123.4])
    header, first, second, closing = text.splitlines()
    assert header.split() == ["unit", "amplitude", "uv", "spikes", "sorted", "as", "accuracy", "recall", "precision"]
    assert first.split() == ["1", "123.4", "10", "7", "1.000", "1.000", "1.000", "well"]
    assert second.split()[:4] == ["0", "40.0", "10", "–"]
    assert closing.startswith("1 of 2 units well detected, mean accuracy 0.500")


# --- edges --------------------------------------------------------------------------------------------------


def test_misses_and_extras_near_edges():
    period, halo = 10_000, 90  # 3 ms
    near, far = [10_000 - halo, 10_000 + halo, 20_000], [5, 10_000 - halo - 1, 10_000 + halo + 1, 15_000, 40]
    result = compare(
        spikes(u0=near + far, u1=train(50_000, 3)),  # unit 1 is not found at all, and does not count
        spikes(u0=[*near[1:], *far[1:], 30_001, 35_000]),
        edge_period_samples=period,
    )
    assert result.misses == EdgeRates(n_near=3, n_wrong_near=1, n_far=5, n_wrong_far=1)
    assert result.extras == EdgeRates(n_near=3, n_wrong_near=1, n_far=5, n_wrong_far=1)
    assert "misses: 1 of 3 near edges (33.33 %), 1 of 5 elsewhere (20.00 %)" in result.table()


def test_the_start_of_the_recording_is_no_edge():
    result = compare(spikes(u0=[10, 500, 900]), spikes(u0=[10, 500, 900]), edge_period_samples=10_000)
    assert result.misses.n_near == 0


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I: 81/263 and 15/148, Wilson score without continuity correction.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_newcombe_interval_is_the_published_one():
    # Newcombe 1998, paper on differences, table II, method 10.
    assert newcombe_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert newcombe_interval(0, 0, 3, 10)[0] < 0 < newcombe_interval(0, 0, 3, 10)[1]


def test_edge_rates_tell_a_difference_from_chance():
    assert EdgeRates(1000, 200, 10_000, 500).difference_interval[0] > 0
    low, high = EdgeRates(1000, 50, 10_000, 500).difference_interval
    assert low < 0 < high


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    with pytest.raises(SettingsError, match=r"truth_samples has shape \(2,\) and truth_units \(1,\)"):
        compare(([1, 2], [0]), spikes(u0=[1]))
    with pytest.raises(SettingsError, match="tolerance_ms=-1"):
        compare(spikes(u0=[1]), spikes(u0=[1]), tolerance_ms=-1)
    with pytest.raises(SettingsError, match=r"truth_units holds \[3\]"):
        compare(spikes(u3=[1]), spikes(u0=[1]), truth_ids=[0])


# --- SpikeInterface -----------------------------------------------------------------------------------------


def imperfect_sorting(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return true trains, and the same sorted badly: jitter, misses, merges, splits, noise and doublets."""
    rng = np.random.default_rng(seed)
    trains = [100 + np.cumsum(60 + rng.exponential(rng.uniform(2e3, 2e4), 400)).astype(np.int64) for _ in range(15)]
    jittered = [times[rng.random(400) < rng.uniform(0.6, 1)] for times in trains]
    jittered = [times + np.rint(rng.normal(0, 5, len(times))).astype(int) for times in jittered]
    found = [np.concatenate(jittered[:2]), np.concatenate(jittered[2:5]), jittered[5][::4], jittered[5][1::4]]
    found += [jittered[6][:190], jittered[6][190:], *jittered[7:13]]
    found += [rng.integers(0, 2_000_000, 300), np.concatenate([jittered[7][:40], rng.integers(0, 2_000_000, 80)])]
    found[-3] = np.concatenate([found[-3], found[-3][:20] + 7])  # the same spikes twice
    truth_units = np.repeat(np.arange(15), 400)
    found_units = np.repeat(np.arange(len(found)) * 2 + 1, [len(times) for times in found])
    return (np.concatenate(trains), truth_units), (np.concatenate(found), found_units)


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_spikeinterface(seed):
    pytest.importorskip("numba")  # which SpikeInterface needs for it, and does not bring along
    comparison = pytest.importorskip("spikeinterface.comparison")
    core = pytest.importorskip("spikeinterface.core")
    truth, found = imperfect_sorting(seed)
    sortings = [
        core.NumpySorting.from_samples_and_labels([samples], [units], RATE_HZ) for samples, units in (truth, found)
    ]
    theirs = comparison.compare_sorter_to_ground_truth(*sortings, exhaustive_gt=True, delta_time=0.4)
    ours = compare(truth, found)

    assert np.array_equal(ours.n_matched, theirs.match_event_count.to_numpy())
    assert np.allclose(ours.agreement, theirs.agreement_scores.to_numpy())
    expected = theirs.hungarian_match_12.to_numpy().astype(float)
    assert np.array_equal(ours.matched_unit, np.where(expected == -1, np.nan, expected), equal_nan=True)
    performance = theirs.get_performance(method="by_unit")
    for name in ("accuracy", "recall", "precision"):
        assert np.allclose(getattr(ours, name), performance[name].to_numpy(dtype=float, na_value=0.0))
    counts = theirs.count_units_categories()
    assert ours.summary["n_well_detected"] == counts["num_well_detected"]
    assert ours.false_positive_units.tolist() == list(theirs.get_false_positive_units())
    assert ours.redundant_units.tolist() == list(theirs.get_redundant_units())
    assert ours.overmerged_units.tolist() == list(theirs.get_overmerged_units())
    assert ours.unmatched_units.tolist() == list(theirs.get_bad_units())
