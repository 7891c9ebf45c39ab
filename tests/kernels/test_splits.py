"""Whether two groups of spikes are two neurons: the test by hand, and neurons whose spikes vary."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from conditions import RATE_HZ
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels import splits
from ks4stream.kernels.splits import (
    MIN_IN_CELL,
    MIN_IN_CELLS,
    RIDGE,
    SAME_BELOW,
    SEPARATE_FROM,
    Conditions,
    Group,
    are_two,
    cosine,
    distance,
    firsts,
    follow_in_bursts,
    is_first,
    lag_between,
    nearest_means,
    ranges_of,
    separation,
    separation_within,
    take_turns,
    window_of,
    windows_for,
)

D = 30
RANGE_WIDTH_UM = 2.0  # of waveforms of this size:
SIZE = 20.0


def noise(n: int, seed: int, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axis(number: int, d: int = D) -> Tensor:
    return torch.eye(d, dtype=torch.float64)[number]


def group(
    features: Tensor,
    *,
    elapsed: NDArray[np.float64] | None = None,
    displacement_um: NDArray[np.float64] | None = None,
    counts: NDArray[np.bool_] | None = None,
    overlapped: NDArray[np.bool_] | None = None,
) -> Group:
    """Spikes of a recording; by default at random times, without motion or bursts."""
    n = len(features)
    elapsed = np.random.default_rng(n).permutation(n) / n if elapsed is None else elapsed
    displacement_um = np.zeros(n) if displacement_um is None else displacement_um
    known = np.zeros(n, bool) if overlapped is None else overlapped
    conditions = Conditions(np.zeros(n, np.int64), displacement_um.astype(np.float32), elapsed, known, RATE_HZ)
    return Group(features, conditions, np.ones(n, bool) if counts is None else counts)


def parts(whole: Group, second: NDArray[np.bool_]) -> tuple[Group, Group]:
    """A group cut in two."""
    sides = (~second, second)
    a, b = (
        Group(whole.features[torch.from_numpy(side)], whole.conditions.at(side), whole.counts[side]) for side in sides
    )
    return a, b


def larger(values: Tensor) -> NDArray[np.bool_]:
    """Which values are above the median."""
    return np.asarray(values > values.median())


# -- separation --------------------------------------------------------------------------------------


def normal(n: int) -> Tensor:
    """The quantiles of a standard normal distribution."""
    return torch.special.ndtri((torch.arange(n).double() + 0.5) / n)


def test_the_separation_is_that_of_the_means_less_its_standard_error() -> None:
    a, b = torch.tensor([-1.5, -0.5]).double(), torch.tensor([0.5, 1.5, 0.5, 1.5]).double()  # ±1, s.d. 0.5
    error = math.sqrt(1 / 2 + 1 / 4 + 4**2 / (2 * 6))
    assert separation(a, b) == pytest.approx(4 - error)
    assert separation(b, a) == pytest.approx(-4 - error)


def test_the_standard_error_is_that_of_random_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        a, b = (0.25 * torch.randn(n, generator=draw, dtype=torch.float64) for n in (100, 60))
        found.append(separation(a - 0.5, b + 0.5))
    error = math.sqrt(1 / 100 + 1 / 60 + 4**2 / (2 * 160))
    assert np.mean(found) + error == pytest.approx(4, rel=0.05)  # the larger of two estimates of one s.d. is biased
    assert np.std(found) == pytest.approx(error, rel=0.15)


def test_halves_of_one_cluster_are_not_separate() -> None:
    """A normal distribution, a uniform one, and slices of the tail."""
    whole = 0.6 * normal(100_000)
    low, high = whole[whole < 0], whole[whole >= 0]
    mean = math.sqrt(2 / math.pi)  # of a half, relative to the s.d. of the whole
    assert separation(low, high) == pytest.approx(2 * mean / math.sqrt(1 - mean**2), abs=0.02)  # the standard error
    flat = torch.linspace(-1.5, 1.5, 100_000).double()
    assert separation(flat[:50_000], flat[50_000:]) == pytest.approx(math.sqrt(12), abs=0.02)
    for sigmas in (0.5, 1.0, 1.5, 2.0, 2.5):
        rest, tail = whole[whole < 0.6 * sigmas], whole[whole >= 0.6 * sigmas]
        assert separation(rest, tail) < SEPARATE_FROM


@pytest.mark.parametrize("n", [20, 60, 1000])
def test_two_neurons_four_standard_deviations_apart_are_separate_whatever_their_numbers(n: int) -> None:
    spread = 0.5 * normal(1000)
    few = 0.5 * normal(n)
    assert separation(spread - 1, few + 1) > SEPARATE_FROM
    assert separation(few - 1, spread + 1) > SEPARATE_FROM


def test_far_projections_count_no_more_than_others() -> None:
    """Of spikes that overlap others."""
    a, b = 0.3 * normal(200) - 1, 0.3 * normal(200) + 1
    without = separation(a, b)
    a[:4], b[:4] = -1000.0, 1000.0
    assert without - 1 < separation(a, b) < without


def test_identical_projections_are_infinitely_separate_or_not_at_all() -> None:
    same = torch.zeros(20).double()
    assert separation(same, same) < 0
    assert separation(same - 1, same + 1) > 1e6


# -- regression within cells -------------------------------------------------------------------------


def projections(
    monkeypatch: pytest.MonkeyPatch,
    a: Tensor,
    b: Tensor,
    cell_a: NDArray[np.int64],
    cell_b: NDArray[np.int64],
    without: Tensor | None = None,
) -> Tensor:
    """What is given to the score: of the spikes of one group, then of the other, in the cells that both have."""
    kept: list[Tensor] = []

    def keep(values_a: Tensor, values_b: Tensor) -> float:
        kept.append(torch.cat([values_a, values_b]))
        return 0.5

    monkeypatch.setattr(splits, "separation", keep)
    assert separation_within(a, b, cell_a, cell_b, without=without) == 0.5
    return kept[0]


def left_out(a: Tensor, b: Tensor, cell_a: Tensor, cell_b: Tensor, without: Tensor | None = None) -> Tensor:
    """The prediction for each spike by a weighted ridge regression without it, which has the cells as regressors."""
    n_cells, d = int(cell_a.max()) + 1, a.shape[1]
    x, cell = torch.cat([a, b]), torch.cat([cell_a, cell_b])
    target = torch.cat([-torch.ones(len(a)), torch.ones(len(b))]).double()
    count = [torch.bincount(side, minlength=n_cells).double() for side in (cell_a, cell_b)]
    total = count[0] * count[1] / (count[0] + count[1])
    total /= total.sum()
    weight = torch.cat([(0.5 * total / n)[side] for n, side in zip(count, (cell_a, cell_b), strict=True)])
    regressors = torch.cat([x, torch.nn.functional.one_hot(cell, n_cells).double()], 1)
    penalty = torch.zeros(d + n_cells, d + n_cells, dtype=torch.float64)
    penalty[:d, :d] = RIDGE * torch.eye(d, dtype=torch.float64)
    for direction in [] if without is None else without:
        direction = direction / direction.norm()
        penalty[:d, :d] += splits.FIXED * torch.outer(direction, direction)
    values = []
    for spike in range(len(x)):
        rest = torch.arange(len(x)) != spike
        y = regressors[rest]
        gram = (y * weight[rest, None]).T @ y + penalty
        values.append(regressors[spike] @ torch.linalg.solve(gram, (weight * target)[rest] @ y))
    return torch.stack(values)


@pytest.mark.parametrize("n_cells", [1, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_each_spike_is_left_out_exactly(monkeypatch: pytest.MonkeyPatch, n_cells: int, fixed: bool) -> None:
    a, b = noise(40, 1, 4) + SIZE * axis(0, 4), noise(25, 2, 4) + SIZE * axis(0, 4) + 2 * axis(1, 4)
    cell_a, cell_b = (torch.arange(len(side)) % n_cells for side in (a, b))
    a, b = a + 7 * cell_a[:, None], b + 7 * cell_b[:, None]  # which the means of the cells explain
    without = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 5]], dtype=torch.float64) if fixed else None
    found = projections(monkeypatch, a, b, cell_a.numpy(), cell_b.numpy(), without)
    # with a penalty of 10⁶ (FIXED), about ten of 16 digits remain
    torch.testing.assert_close(found, left_out(a, b, cell_a, cell_b, without), rtol=1e-6, atol=1e-6)


def test_in_one_cell_it_is_the_plain_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ±1 on the features and a constant; of many spikes, one more does not matter."""
    a, b = noise(4000, 3, 5) + 2, noise(3000, 4, 5) + 2 + 3 * axis(2, 5)
    found = projections(monkeypatch, a, b, np.zeros(4000, np.int64), np.zeros(3000, np.int64))
    x = torch.cat([a, b])
    y = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weight = torch.cat([torch.full((4000,), 0.5 / 4000), torch.full((3000,), 0.5 / 3000)]).double()
    target = torch.cat([-torch.ones(4000), torch.ones(3000)]).double()
    penalty = RIDGE * torch.eye(6, dtype=torch.float64)
    penalty[5, 5] = 0
    coefficients = torch.linalg.solve((y * weight[:, None]).T @ y + penalty, (weight * target) @ y)
    torch.testing.assert_close(found, y @ coefficients, rtol=0, atol=0.01)


def test_what_differs_between_cells_does_not_separate_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cells, one of which has more spikes of one group: the axis is that within cells."""
    cell_a, cell_b = (np.repeat([0, 1], sizes) for sizes in ([300, 10], [10, 300]))
    a, b = noise(310, 5), noise(310, 6)
    a[cell_a == 1] += 50 * axis(0)
    b[cell_b == 1] += 50 * axis(0)
    assert separation_within(a, b, cell_a, cell_b) < 1
    everywhere = [np.zeros(310, np.int64)] * 2
    assert separation_within(a, b, *everywhere) > SEPARATE_FROM
    found = projections(monkeypatch, a, b, cell_a, cell_b)
    assert found.abs().mean() < 0.5


def test_along_a_direction_left_out_nothing_is_separate() -> None:
    a, b, cell = noise(100, 7), noise(100, 8) + 9 * axis(3), np.zeros(100, np.int64)
    assert separation_within(a, b, cell, cell) > SEPARATE_FROM
    assert separation_within(a, b, cell, cell, without=axis(3)[None]) < 1
    assert separation_within(a, b, cell, cell, without=axis(4)[None]) > SEPARATE_FROM
    assert separation_within(a, b, cell, cell, without=torch.stack([axis(4), axis(3)])) < 1
    assert separation_within(a, b, cell, cell, without=axis(3)[None][:0]) > SEPARATE_FROM


@pytest.mark.parametrize(
    ("sizes", "known"),
    [
        ([MIN_IN_CELL] * 3, True),
        ([MIN_IN_CELL, MIN_IN_CELL, MIN_IN_CELL - 1], False),  # the last cell does not count
        ([MIN_IN_CELLS], True),
        ([MIN_IN_CELLS - 1], False),
    ],
)
def test_cells_count_if_both_groups_have_enough_spikes(sizes: list[int], known: bool) -> None:
    cells = [np.repeat(np.arange(len(sizes)), of_group) for of_group in (sizes, [20] * len(sizes))]
    for cell_a, cell_b in (cells, cells[::-1]):
        score = separation_within(noise(len(cell_a), 9), noise(len(cell_b), 10), cell_a, cell_b)
        assert (score is not None) == known


def test_groups_in_different_cells_are_not_compared() -> None:
    assert separation_within(noise(40, 9), noise(40, 10), np.zeros(40, np.int64), np.ones(40, np.int64)) is None


def test_spikes_in_cells_of_one_group_are_ignored() -> None:
    a, b, cell = noise(30, 11), noise(30, 12) + 8 * axis(0), np.zeros(30, np.int64)
    alone = torch.cat([a, noise(50, 13) + 100])
    assert separation_within(alone, b, np.append(cell, [1] * 50), cell) == separation_within(a, b, cell, cell)


# -- bursts ------------------------------------------------------------------------------------------


def bursting(n_bursts: int, seed: int, *, size: int = 3) -> NDArray[np.int64]:
    """Times of bursts, of which each spike follows the last one after 5 ms."""
    gaps = np.random.default_rng(seed).exponential(0.5, n_bursts) + 0.1
    starts = (np.cumsum(gaps) * RATE_HZ).astype(np.int64)
    return (starts[:, None] + np.arange(size) * 150).ravel()


def random_train(n: int, seconds: float, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).integers(0, int(seconds * RATE_HZ), n))


def test_groups_that_share_bursts_are_recognised() -> None:
    train = bursting(300, 0)
    place = np.arange(900) % 3
    assert follow_in_bursts(train[place == 0], train[place > 0], RATE_HZ)
    assert follow_in_bursts(train[place > 0], train[place == 0], RATE_HZ)
    assert not follow_in_bursts(random_train(1000, 180, 1), random_train(1000, 180, 2), RATE_HZ)
    assert not follow_in_bursts(bursting(300, 3), bursting(300, 4), RATE_HZ)  # each has its own


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_trains_of_few_spikes_have_no_bursts(sizes: tuple[int, int]) -> None:
    a, b = (np.arange(n, dtype=np.int64) for n in sizes)
    assert not follow_in_bursts(a, b, RATE_HZ)


def test_what_follows_within_20_ms_is_not_the_first() -> None:
    every = np.array([0, 600, 1200, 1801, 5000])
    assert is_first(every, every, RATE_HZ).tolist() == [True, False, False, True, True]
    assert is_first(np.array([1200, 5000]), every, RATE_HZ).tolist() == [False, True]
    assert is_first(np.array([100]), np.array([90, 100]), RATE_HZ).tolist() == [False]
    assert is_first(np.zeros(0, np.int64), every, RATE_HZ).tolist() == []


def test_spikes_count_if_they_begin_a_burst() -> None:
    train = bursting(300, 5)
    place = np.arange(900) % 3
    trains = [train[place == 0], train[place > 0]]
    some = [trains[0][:MIN_IN_CELLS], trains[1][:MIN_IN_CELLS]]
    assert [count.tolist() for count in firsts(some, trains, RATE_HZ)] == [
        [True] * MIN_IN_CELLS,
        [False] * MIN_IN_CELLS,
    ]
    too_few = [trains[0][:4], trains[1]]
    assert all(count.all() for count in firsts(too_few, trains, RATE_HZ)), "which no comparison in cells would use"


def test_without_bursts_all_spikes_count() -> None:
    trains = [random_train(1000, 180, 6), random_train(1000, 180, 7)]
    counts = firsts([trains[0][::3], trains[1][::2]], trains, RATE_HZ)
    assert [count.tolist() for count in counts] == [[True] * 334, [True] * 500]


# -- where groups were recorded ----------------------------------------------------------------------


def test_ranges_are_counted_from_the_lowest_displacement_of_either_group() -> None:
    a, b = (group(noise(3, 0), displacement_um=np.array(moved_um)) for moved_um in ([-3.0, 0.0, 4.9], [-1.0, 7.1, 2.0]))
    assert [of.tolist() for of in ranges_of(a, b, 5.0)] == [[0, 0, 1], [0, 2, 1]]
    nothing = Group(a.features[:0], a.conditions.at(np.zeros(3, bool)), a.counts[:0])
    assert [of.tolist() for of in ranges_of(nothing, b, 5.0)] == [[], [0, 1, 0]]
    assert [of.tolist() for of in ranges_of(nothing, nothing, 5.0)] == [[], []]


@pytest.mark.parametrize(
    ("n", "n_ranges", "windows"), [(0, 1, 1), (15, 1, 1), (16, 1, 2), (63, 1, 7), (500, 1, 8), (48, 3, 2), (500, 20, 3)]
)
def test_there_are_windows_with_eight_spikes_of_the_smaller_group_in_each_cell(
    n: int, n_ranges: int, windows: int
) -> None:
    few, many = np.arange(n) % n_ranges, np.arange(1000) % n_ranges
    assert windows_for(few, many) == windows_for(many, few) == windows


def test_windows_are_equal_shares_of_the_recording() -> None:
    assert window_of(np.array([0, 0.24, 0.25, 0.99, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    assert window_of(np.array([0, 0.5, 1.0]), 1).tolist() == [0, 0, 0]


def test_means_are_those_of_the_nearest_ranges_with_enough_spikes() -> None:
    def rows(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    range_a, range_b = np.repeat([0, 2, 4], [30, 20, 1]), np.repeat([5, 7], [10, 40])
    a, b = rows(*[1.0] * 30, *[3.0] * 20, 9.0), rows(*[10.0] * 10, *[20.0] * 40)
    assert nearest_means(a, b, range_a, range_b) == ((3, 20, 2), (10, 10, 5))
    assert nearest_means(b, a, range_b, range_a) == ((10, 10, 5), (3, 20, 2))
    few = nearest_means(rows(1, 2, 3), rows(5, 7), np.array([0, 0, 1]), np.array([2, 2]))
    assert few == ((1.5, 2, 0), (6, 2, 2))


def test_a_tenth_of_the_fullest_range_is_enough() -> None:
    """Spread over many ranges, no range has a tenth of the group."""
    ranges = np.repeat(np.arange(20), 50)
    a, b = (torch.from_numpy(ranges + offset).double()[:, None] for offset in (0, 20))
    assert nearest_means(a, b, ranges, ranges + 20) == ((19, 50, 19), (20, 50, 20))


@pytest.mark.parametrize("n", [2, 5, 20, 400])
def test_the_distance_of_means_is_that_without_noise(n: int) -> None:
    """Means of few spikes in many dimensions are far apart, and long, even those of one waveform."""
    draw = np.random.default_rng(3)
    found = []
    for _ in range(60):
        wave = np.zeros((2, 60))
        wave[:, 0], wave[1, 1] = 10, 5  # a distance of 5 / √125
        a, b = (torch.from_numpy(row + draw.normal(size=(n, 60))) for row in wave)
        found.append(distance(a, b, np.zeros(n, int), np.zeros(n, int)) ** 2)
    spread = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(25 / 125, abs=4 * spread + 0.01)  # clipped at 0, and a ratio: not unbiased


def test_single_spikes_have_the_noise_of_whitened_traces() -> None:
    a, b = torch.full((1, 25), 3.0).double(), torch.full((1, 25), 2.0).double()
    none = np.zeros(1, int)
    assert distance(a, a, none, none) == 0
    assert distance(a, b, none, none) == 0, "25 is less than the expected 50"
    assert distance(a, -b, none, none) == pytest.approx(math.sqrt((25 * 25 - 50) / (225 - 25)))


# -- one neuron or two -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 50, 100, 300, 1000, 3000])
@pytest.mark.parametrize("d", [12, 60])
def test_a_cloud_cut_in_two_is_one(n: int, d: int) -> None:
    """Cut by amplitude, across it, and where it happens to be widest."""
    for seed in range(3):
        x = noise(n, seed, d) + 12 * axis(0, d)
        whole, centred = group(x), x - x.mean(0)
        widest = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -1]
        for values in (x[:, 0], x[:, 1], widest):
            assert not are_two(*parts(whole, larger(values)))


@pytest.mark.parametrize("share", [0.07, 0.13])
def test_means_that_are_nearly_the_same_are_those_of_one_neuron(share: float) -> None:
    """Of 200 s.d.: two groups that differ by 14 or 26 s.d. in one direction, which separates them completely."""
    large = 10 * SIZE
    a, b = (noise(300, seed) + large * axis(0) for seed in (30, 31))
    b = b + share * large * axis(1)
    assert separation_within(a, b, *[np.zeros(300, np.int64)] * 2) > 2 * SEPARATE_FROM
    assert are_two(group(a), group(b)) == are_two(group(b), group(a)) == (share > SAME_BELOW)


def test_only_huge_means_are_nearly_the_same() -> None:
    """Of 45 s.d., 9 % are 4 s.d., which two neurons may differ by."""
    a, b = (noise(300, seed) + 45 * axis(0) for seed in (30, 31))
    assert are_two(group(a), group(b + 4 * axis(1)))


def test_how_nearly_the_same_is_relative_to_the_larger_mean() -> None:
    a, b = noise(300, 30) + 200 * axis(0), noise(300, 31) + 150 * axis(0)
    b = b + 60 * axis(1)  # 78 in all, less than 0.4 and 0.5 of them
    for limit, two in ((0.37, True), (0.41, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splits, "SAME_BELOW", limit)
            assert are_two(group(a), group(b)) == are_two(group(b), group(a)) == two


def test_what_time_shifts_change_is_no_difference_of_means() -> None:
    """25 s.d. along the time derivative, 40 s.d. along what rolling loses, which are not perpendicular, and 12 s.d."""
    a, b = (noise(300, seed) + 200 * axis(0) for seed in (32, 33))
    b = b + 25 * axis(1) + 40 * (axis(1) + axis(2)) / math.sqrt(2) + 12 * axis(3)
    derivative, rolled = torch.zeros(D, D).double(), torch.eye(D).double()
    derivative[0, 1] = 1.0
    rolled[0, 1] = rolled[0, 2] = 0.1
    assert are_two(group(a), group(b))
    assert are_two(group(a), group(b), time_derivative=derivative)
    assert are_two(group(a), group(b), rolled=[rolled])
    assert not are_two(group(a), group(b), time_derivative=derivative, rolled=[rolled])


@pytest.mark.parametrize("n", [200, 2000])
def test_a_neuron_whose_amplitude_falls_is_one(n: int) -> None:
    """To 40 % of what it was; cut by time or by amplitude."""
    elapsed = np.sort(np.random.default_rng(0).random(n))
    x = noise(n, 14) + torch.from_numpy(SIZE * (1 - 0.6 * elapsed))[:, None] * axis(0)
    whole = group(x, elapsed=elapsed)
    for second in (elapsed > 0.5, elapsed > 0.8, larger(x[:, 0]), (x[:, 0] > 0.6 * SIZE).numpy()):
        assert not are_two(*parts(whole, second))


def moving(displacement_um: NDArray[np.float64], seed: int, *, from_um: float = 0.0) -> Tensor:
    """Spikes whose waveform turns by 2.5 % per µm."""
    angle = torch.from_numpy(0.025 * (displacement_um - from_um))[:, None]
    return noise(len(displacement_um), seed) + SIZE * (torch.cos(angle) * axis(0) + torch.sin(angle) * axis(1))


@pytest.mark.parametrize("n", [400, 2000])
def test_a_neuron_whose_waveform_moves_with_the_tissue_is_one(n: int) -> None:
    """By 40 µm, there and back, twice; cut by displacement or by waveform."""
    elapsed = np.sort(np.random.default_rng(1).random(n))
    displacement_um = 20 - 20 * np.cos(4 * np.pi * elapsed)
    x = moving(displacement_um, 15)
    whole = group(x, elapsed=elapsed, displacement_um=displacement_um)
    for second in (displacement_um > 20, displacement_um > 10, larger(x[:, 1]), larger(x[:, 0])):
        assert not are_two(*parts(whole, second))


def test_two_neurons_that_move_together_are_two() -> None:
    displacement_um = 20 - 20 * np.cos(4 * np.pi * np.sort(np.random.default_rng(2).random(1000)))
    a, b = (moving(displacement_um, seed) for seed in (16, 17))
    groups = [group(x, displacement_um=displacement_um) for x in (a, b + 8 * axis(2))]
    assert are_two(*groups) and are_two(*groups[::-1])


def burst_of(n_bursts: int, seed: int, falling: float = 0.7) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Spikes of a neuron that bursts with falling amplitudes, their times, and places in the burst."""
    train, place = bursting(n_bursts, seed), np.arange(3 * n_bursts) % 3
    return noise(3 * n_bursts, seed) + torch.from_numpy(SIZE * falling**place)[:, None] * axis(0), train, place


def test_a_neuron_that_bursts_with_falling_amplitudes_is_one() -> None:
    x, train, place = burst_of(300, 18)
    for second in (place > 0, place > 1, larger(x[:, 0])):
        trains = [train[~second], train[second]]
        counts = np.ones(900, bool)
        counts[~second], counts[second] = firsts(trains, trains, RATE_HZ)
        assert counts.sum() == 300
        assert not are_two(*parts(group(x, elapsed=train / train[-1], counts=counts), second))
    assert are_two(*parts(group(x, elapsed=train / train[-1]), place > 0))  # if bursts were not known


def test_background_among_the_small_spikes_of_bursts_does_not_decide() -> None:
    """The only spikes of that group that do not follow others in bursts are another neuron's."""
    x, train, place = burst_of(300, 21)
    strange = noise(40, 22) + SIZE * (0.3 * axis(0) + 0.4 * axis(3))
    at = random_train(40, train[-1] / RATE_HZ, 23)
    second = np.concatenate([place > 0, np.ones(40, bool)])
    every, counts = np.concatenate([train, at]), np.concatenate([place == 0, np.ones(40, bool)])
    whole = group(torch.cat([x, strange]), elapsed=every / every.max(), counts=counts)
    assert not are_two(*parts(whole, second))
    few = np.concatenate([place < 2, np.ones(40, bool)])  # of which half begin a burst
    kept = second & few | ~second
    assert are_two(*parts(whole.at(kept), (second & (np.arange(940) >= 900))[kept])), "40 of another neuron"


def test_two_neurons_that_burst_together_are_two() -> None:
    """One follows the other within 5 ms; only directions other than the amplitude are left to compare."""
    x, train, place = burst_of(300, 19)
    x[torch.from_numpy(place > 0)] += 8 * axis(4)
    trains = [train[place == 0], train[place > 0]]
    counts = np.ones(900, bool)
    counts[place == 0], counts[place > 0] = firsts(trains, trains, RATE_HZ)
    assert are_two(*parts(group(x, elapsed=train / train[-1], counts=counts), place > 0))


def test_groups_that_differ_in_their_alignment_only_are_one() -> None:
    """By a third of a sample; five channels with six components, of which one is like the derivative of another."""
    derivative = torch.zeros(6, 6, dtype=torch.float64)
    derivative[0, 1] = 1
    waveform = torch.zeros(5, 6, dtype=torch.float64)
    waveform[:, 0] = 15
    moved = waveform + 0.35 * waveform @ derivative
    a, b = group(noise(500, 30) + waveform.view(-1)), group(noise(400, 31) + moved.view(-1))
    assert are_two(a, b)
    assert not are_two(a, b, time_derivative=derivative)
    other = group(noise(400, 31) + moved.view(-1) + 8 * axis(4))
    assert are_two(a, other, time_derivative=derivative)


def test_groups_that_differ_by_what_rolling_loses_are_one() -> None:
    rolled = torch.eye(6, dtype=torch.float64)
    rolled[0, 0], rolled[0, 2] = 0.95, 0.2
    waveform = torch.zeros(5, 6, dtype=torch.float64)
    waveform[:, 0] = 15
    a, b = group(noise(500, 40) + waveform.view(-1)), group(noise(400, 41) + (waveform @ rolled).view(-1))
    assert are_two(a, b)
    assert not are_two(a, b, rolled=[rolled])
    other = group(noise(400, 41) + (waveform @ rolled).view(-1) + 8 * axis(4))
    assert are_two(a, other, rolled=[rolled])


@pytest.mark.parametrize(
    ("sizes", "distance"), [((500, 500), 6), ((2000, 60), 9), ((2000, 20), 9), ((300, 16), 9), ((30, 30), 9)]
)
def test_two_neurons_recorded_together_are_two(sizes: tuple[int, int], distance: float) -> None:
    for seed in range(5):
        a = group(noise(sizes[0], seed) + 15 * axis(0))
        b = group(noise(sizes[1], seed + 100) + 15 * axis(0) + distance * axis(1))
        assert are_two(a, b) and are_two(b, a)


@pytest.mark.parametrize("n", [1, 2, 14])
def test_so_few_similar_spikes_do_not_tell(n: int) -> None:
    a, b = group(noise(n, 20) + 15 * axis(0)), group(noise(2000, 21) + 15 * axis(0) + 8 * axis(1))
    assert not are_two(a, b) and not are_two(b, a)


@pytest.mark.parametrize("n", [1, 2, 500])
def test_unlike_means_are_those_of_two_neurons(n: int) -> None:
    a, b = group(noise(n, 22) + 40 * axis(0)), group(noise(n, 23) + 40 * axis(1))
    assert are_two(a, b)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("sizes", [(1, 1), (20, 20), (100, 30)])
def test_identical_spikes_are_one_neuron_if_they_have_a_waveform(sizes: tuple[int, int], value: float) -> None:
    a, b = (group(torch.full((n, D), value, dtype=torch.float64)) for n in sizes)
    assert are_two(a, b) == (value == 0)  # without any, they are similar to nothing


@pytest.mark.parametrize("n", [50, 300, 3000])
def test_groups_at_different_displacements_are_one_if_they_continue_each_other(n: int) -> None:
    draw = np.random.default_rng(3)
    low, high = draw.uniform(0, 16, n), draw.uniform(18, 34, n)
    a = group(moving(low, 24), displacement_um=low)
    follows = group(moving(high, 25), displacement_um=high)
    assert not are_two(a, follows) and not are_two(follows, a)
    # A neuron that looks at 34 µm as the other does at 6 µm; the means of all spikes are as similar.
    other = group(moving(high, 26, from_um=40), displacement_um=high)
    assert cosine(a.features.mean(0), other.features.mean(0)) > splits.MIN_SIMILARITY
    assert are_two(a, other) and are_two(other, a)


@pytest.mark.parametrize(("factor", "two"), [(0.3, True), (0.6, False), (1.0, False), (1.5, False), (3.0, True)])
def test_groups_that_continue_each_other_have_about_one_size(factor: float, two: bool) -> None:
    draw = np.random.default_rng(4)
    low, high = draw.uniform(0, 10, 300), draw.uniform(12, 22, 300)
    a = group(noise(300, 32) + SIZE * axis(0), displacement_um=low)
    b = group(noise(300, 33) + factor * SIZE * axis(0), displacement_um=high)
    assert are_two(a, b) is two
    assert are_two(b, a) is two


@pytest.mark.parametrize(("n", "gap_um", "two"), [(300, 20, False), (15, 20, False), (14, 20, True), (300, 6, True)])
def test_units_that_take_turns_may_differ_more_the_farther_the_tissue_moved(n: int, gap_um: float, two: bool) -> None:
    """By 0.75 of their norm; of few spikes, displacements may differ by chance."""
    angle = 2 * np.arcsin(0.375)
    a = group(noise(n, 43) + SIZE * axis(0), displacement_um=np.zeros(n))
    turned = SIZE * (float(np.cos(angle)) * axis(0) + float(np.sin(angle)) * axis(1))
    b = group(noise(n, 44) + turned, displacement_um=np.full(n, gap_um))
    assert are_two(a, b) and are_two(b, a)
    assert are_two(a, b, max_limit=splits.MAX_LIMIT) is two
    assert are_two(b, a, max_limit=splits.MAX_LIMIT) is two


def test_however_far_the_tissue_moved_a_neuron_remains_alike() -> None:
    """The two means have the similarity 0.55, so they are 0.95 of their norm apart."""
    a = group(noise(300, 45) + SIZE * axis(0), displacement_um=np.zeros(300))
    turned = SIZE * (0.55 * axis(0) + math.sqrt(1 - 0.55**2) * axis(1))
    b = group(noise(300, 46) + turned, displacement_um=np.full(300, 200.0))
    assert are_two(a, b, max_limit=splits.MAX_LIMIT)


@pytest.mark.parametrize("offset", [8, 20])
@pytest.mark.parametrize(("n_astray", "two"), [(20, False), (45, False), (46, True), (150, True)])
def test_a_few_spikes_on_the_wrong_side_of_a_jump_do_not_make_two_neurons(
    n_astray: int, two: bool, offset: float
) -> None:
    """They overlap others, which makes them unlike those that are on their own side."""
    before, after = SIZE * axis(0), SIZE * (0.95 * axis(0) + 0.3 * axis(1))
    a = group(noise(300, 47) + before, displacement_um=np.zeros(300))
    astray = torch.arange(300)[:, None] < n_astray
    waveforms = torch.where(astray, before + offset * axis(2), after)
    moved_um = np.where(astray[:, 0].numpy(), 0.0, 20.0)
    b = group(noise(300, 48) + waveforms, displacement_um=moved_um)
    assert are_two(a, b) is two
    assert are_two(b, a) is two


@pytest.mark.parametrize(("distance", "two"), [(0, False), (6, False), (10, True), (14, True)])
def test_groups_at_neighbouring_displacements_are_two_if_they_differ_much(distance: float, two: bool) -> None:
    """They are apart in a range that contains both displacements, but may differ there by 0.45 of their norm."""
    a = group(noise(300, 56) + SIZE * axis(0), displacement_um=np.full(300, 0.4))
    b = group(noise(300, 57) + SIZE * axis(0) + distance * axis(1), displacement_um=np.full(300, 2.5))
    assert are_two(a, b) is two
    assert are_two(b, a) is two


@pytest.mark.parametrize(
    ("range_a", "range_b", "turns"),
    [
        ([0] * 20, [1] * 20, True),
        ([0] * 20, [0] * 20, False),
        ([0] * 17 + [1] * 3, [1] * 20, True),
        ([0] * 16 + [1] * 4, [1] * 20, False),
        ([0] * 17 + [1] * 3, [1] * 40, True),
        ([0] * 100 + [1] * 7, [1] * 40, False),
        ([0], [0], False),
    ],
)
def test_groups_take_turns_if_few_spikes_of_the_smaller_one_are_where_the_other_is(
    range_a: list[int], range_b: list[int], turns: bool
) -> None:
    a, b = np.array(range_a), np.array(range_b)
    assert take_turns(a, b) is turns
    assert take_turns(b, a) is turns


def jumping(n: int, seed: int) -> tuple[Group, Group]:
    """A neuron before and after a jump of 10 µm, which changes its waveform; n displacements are not known."""
    before, after = noise(300, seed) + SIZE * axis(0), noise(300, seed + 1) + SIZE * (0.9 * axis(0) + 0.4 * axis(1))
    moved_um = np.repeat([0.0, 10.0], 300)
    unclear = np.r_[300 - n : 300, 300 : 300 + n]
    moved_um[unclear] = np.nan
    second = np.arange(600) >= 300
    return parts(group(torch.cat([before, after]), displacement_um=moved_um), second)


def test_spikes_at_unknown_displacements_do_not_enter() -> None:
    """As if they had been recorded at one displacement, the two parts would be two neurons."""
    a, b = jumping(60, 40)
    assert not are_two(a, b)
    at_one = [
        side._replace(
            conditions=side.conditions._replace(displacement_um=np.nan_to_num(side.conditions.displacement_um))
        )
        for side in (a, b)
    ]
    assert are_two(*at_one)


@pytest.mark.parametrize("offset_um", [0.0, 40.0, -40.0])
@pytest.mark.parametrize("n_known", [0, 2, 14, 15, 300])
@pytest.mark.parametrize(("size", "two"), [(1.0, False), (0.3, True)])
def test_with_too_few_known_displacements_the_distance_decides(
    n_known: int, size: float, two: bool, offset_um: float
) -> None:
    """Whatever the other group's displacement is."""
    a, b = jumping(0, 42)
    moved_um = b.conditions.displacement_um.copy() + offset_um
    moved_um[n_known:] = np.nan
    a = a._replace(conditions=a.conditions._replace(displacement_um=a.conditions.displacement_um + offset_um))
    b = b._replace(conditions=b.conditions._replace(displacement_um=moved_um.astype(np.float32)))
    b = b._replace(features=noise(b.n, 44) + size * b.features.mean(0))
    assert are_two(a, b) is two
    assert are_two(b, a) is two


def test_a_part_of_a_neuron_that_overlaps_others_is_no_neuron() -> None:
    """What is left of other spikes moved these 40 of its spikes by eight standard deviations, all to one side."""
    whole = torch.cat([noise(300, 46) + SIZE * axis(0), noise(40, 47) + SIZE * axis(0) + 8 * axis(1)])
    second = np.arange(340) >= 300
    assert are_two(*parts(group(whole), second))

    def overlapping(n_of_most: int, n_of_few: int) -> tuple[Group, Group]:
        """Most spikes, of which so many overlap others, and the few beside them."""
        overlapped = np.zeros(340, bool)
        overlapped[:n_of_most] = overlapped[300 : 300 + n_of_few] = True
        return parts(group(whole, overlapped=overlapped), second)

    assert are_two(*overlapping(120, 16))  # 0.6 of both do not overlap others
    assert not are_two(*overlapping(30, 19))  # 0.9 and 0.53
    assert not are_two(*overlapping(30, 19)[::-1])


@pytest.mark.parametrize("n_alone", range(5, 21))
def test_a_small_neuron_some_of_whose_spikes_overlap_others_stays_one(n_alone: int) -> None:
    """Of 20 spikes. Its waveform differs by 0.7 of the norm, whether spikes or their means are compared."""
    whole = torch.cat([noise(400, 48) + SIZE * axis(0), noise(20, 49) + SIZE * (axis(0) + axis(1))])
    overlapped = np.r_[np.arange(400) >= 20 * n_alone, np.arange(20) >= n_alone]
    a, b = parts(group(whole, overlapped=overlapped), np.arange(420) >= 400)
    assert are_two(a, b) and are_two(b, a)


# -- lining up ---------------------------------------------------------------------------------------


def delays() -> dict[int, Tensor]:
    """Lags, for five channels with six components that stand for samples: a delay moves values to later ones."""
    return {lag: torch.roll(torch.eye(6, dtype=torch.float64), lag, dims=1) for lag in (0, -1, 1, -2, 2)}


def delayed(displacement_um: NDArray[np.float64], seed: int, *, late: NDArray[np.int64], n_channels: int = 5) -> Group:
    """Spikes of a waveform, each so many samples late."""
    waveform = torch.zeros(n_channels, 6, dtype=torch.float64)
    waveform[:, 2] = 15
    rolls = delays()
    rows = torch.stack([(waveform @ rolls[lag]).flatten() for lag in late.tolist()])
    return group(noise(len(late), seed, d=6 * n_channels) + rows, displacement_um=displacement_um)


def test_groups_line_up_by_what_was_recorded_at_the_same_displacements() -> None:
    """Most spikes of the second group are in time with the first, but not where both were recorded."""
    a = delayed(np.zeros(200), 50, late=np.zeros(200, int))
    moved_um = np.repeat([0.0, 30.0], [40, 160])
    b = delayed(moved_um, 51, late=np.repeat([1, 0], [40, 160]))
    assert lag_between(a, b, delays()) == -1
    assert lag_between(b, a, delays()) == 1


@pytest.mark.parametrize("n_together", [0, 4])
def test_groups_that_take_turns_line_up_at_the_nearest_displacements(n_together: int) -> None:
    a = delayed(np.zeros(200), 52, late=np.zeros(200, int))
    moved_um = np.repeat([0.0, 10.0, 30.0], [n_together, 40, 160])
    b = delayed(moved_um, 53, late=np.repeat([1, -2, 0], [n_together, 40, 160]))
    assert lag_between(a, b, delays()) == 2


def test_without_motion_or_known_displacements_the_first_lag_stays() -> None:
    a = delayed(np.zeros(200), 54, late=np.zeros(200, int))
    for place_um in (0.0, np.nan):
        b = delayed(np.full(200, place_um), 55, late=np.full(200, 1))
        assert lag_between(a, b, delays()) == lag_between(b, a, delays()) == 0


def test_means_that_do_not_exceed_the_noise_are_not_apart() -> None:
    a, b = torch.full((1, 25), 0.5).double(), torch.full((1, 25), -0.5).double()
    assert distance(a, b, np.zeros(1, int), np.zeros(1, int)) == 0


def test_conditions_are_columns_of_a_table() -> None:
    overlapped = np.arange(4) > 1
    conditions = Conditions(np.arange(4), np.arange(4, dtype=np.float32), np.arange(4) / 4, overlapped, RATE_HZ)
    assert set(conditions.columns()) == {"displacement_um", "elapsed", "overlapped"}
    again = Conditions.of_columns({"sample": conditions.sample, **conditions.columns()}, RATE_HZ)
    assert all(np.array_equal(one, other) for one, other in zip(again, conditions, strict=True))
    some = conditions.at(np.array([2, 0]))
    assert (some.sample.tolist(), some.displacement_um.tolist(), some.elapsed.tolist()) == ([2, 0], [2, 0], [0.5, 0])


def test_spikes_that_count_are_picked_from_all_columns() -> None:
    whole = group(noise(4, 27), elapsed=np.arange(4) / 4, counts=np.array([True, False, True, False]))
    counted = whole.counted()
    assert counted.n == 2
    assert counted.conditions.elapsed.tolist() == [0, 0.5]
    assert counted.counts.all()
    assert torch.equal(counted.features, whole.features[[0, 2]])


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(splits)
    assert outcome.attempted > 0
    assert outcome.failed == 0
