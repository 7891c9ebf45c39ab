from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from ks4stream.kernels import thresholds as kernels
from ks4stream.kernels.thresholds import (
    HIGHEST,
    HIGHEST_PEAK,
    LOWEST,
    LOWEST_PEAK,
    LOWEST_SMALL,
    WITHOUT_NEURON,
    Mixture,
    best_excess,
    fitted,
    histograms,
    lowest_scores,
    peak_threshold,
    thresholds,
)


def scores(
    mean: float,
    n: int,
    n_background: int = 0,
    *,
    spread: float = 1.0,
    decay: float = 2.0,
    seed: int = 1,
    lowest: float = LOWEST,
) -> NDArray[np.float32]:
    """Scores above the lowest one: of a neuron with n spikes, and of a background."""
    rng = np.random.default_rng(seed)
    neuron = rng.normal(mean, spread, n)
    background = lowest + rng.exponential(1 / decay, n_background)
    return np.concatenate([neuron[neuron > lowest], background]).astype(np.float32)


def of(score: NDArray[np.float32], lowest: float = LOWEST) -> float:
    return float(thresholds(counted(score, lowest), np.array([lowest]))[0])


def counted(score: NDArray[np.float32], lowest: float = LOWEST) -> NDArray[np.int64]:
    return histograms(score, np.zeros(len(score), np.int32), np.array([lowest]))


def expected(
    mean: float, n: int, n_background: int, *, spread: float = 1.0, decay: float = 2.0, lowest: float = LOWEST
) -> float:
    """Threshold with the highest accuracy, by the numbers that the scores were drawn with."""
    at = np.arange(lowest, HIGHEST + 0.05, 0.1)
    background = n_background * np.exp(-decay * (at - lowest))
    return float(at[np.argmax(n * norm.sf(at, mean, spread) / (n + background))])


@pytest.mark.parametrize(
    ("mean", "n", "n_background"),
    [(7.5, 400, 400), (9.0, 2000, 50), (9.0, 200, 3000), (12.0, 500, 500), (7.5, 1000, 0)],
)
def test_the_threshold_is_the_one_with_the_highest_expected_accuracy(mean: float, n: int, n_background: int) -> None:
    """Within half a standard deviation of the noise, on which accuracy depends little around its maximum."""
    found = of(scores(mean, n, n_background))
    assert found == pytest.approx(expected(mean, n, n_background), abs=0.5)


def test_more_background_raises_it_and_a_smaller_neuron_lowers_it() -> None:
    quiet, loud = of(scores(9, 500, 100)), of(scores(9, 500, 5000))
    assert LOWEST < of(scores(7.5, 500, 100)) < quiet < loud < HIGHEST


def test_a_large_neuron_is_cut_off_from_its_background_at_most_at_the_highest_threshold() -> None:
    found = of(scores(60, 300, 20_000, decay=0.6))
    assert 8 < found <= HIGHEST


def test_a_neuron_whose_amplitude_falls_keeps_its_small_spikes() -> None:
    """In bursts, say: scores from 6 to 30, without background."""
    score = np.random.default_rng(2).uniform(6, 30, 600).astype(np.float32)
    assert of(score) < 7


def test_templates_have_their_own_thresholds_whatever_their_order() -> None:
    small, large = scores(7.5, 400, 200, seed=1), scores(10, 400, 2000, seed=2)
    template = np.repeat([3, 1], [len(small), len(large)]).astype(np.int32)
    score = np.concatenate([small, large])
    order = np.random.default_rng(3).permutation(len(score))
    lowest = np.full(5, LOWEST)
    found = thresholds(histograms(score[order], template[order], lowest), lowest)
    assert found[[3, 1]].tolist() == [of(small), of(large)]
    assert found[[0, 2, 4]].tolist() == [WITHOUT_NEURON] * 3, "without spikes"


def test_templates_are_fitted_apart_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    many = [scores(rng.uniform(7, 12), 300, int(rng.integers(100, 2000)), seed=n) for n in range(9)]
    lowest = np.full(9, LOWEST)
    counts = histograms(np.concatenate(many), np.repeat(np.arange(9), [len(one) for one in many]), lowest)
    monkeypatch.setattr(kernels, "TEMPLATES_PER_CHUNK", 4)
    assert thresholds(counts, lowest).tolist() == [of(one) for one in many]


def test_histograms_count_each_score_once_and_the_largest_in_the_last_bin() -> None:
    score, template = np.array([4.05, 5.95, 5.96, 29.95, 500.0], np.float32), np.array([1, 0, 0, 1, 1])
    counts = histograms(score, template, np.array([LOWEST, 4.0, LOWEST]))
    assert counts.shape == (3, 250)
    assert {tuple(at): int(counts[tuple(at)]) for at in np.argwhere(counts).tolist()} == {
        (0, 9): 2,
        (1, 0): 1,
        (1, 249): 2,
    }


def test_only_background_is_no_neuron() -> None:
    assert of(scores(9, 0, 5000)) == WITHOUT_NEURON


@pytest.mark.parametrize("n", [0, 1, kernels.MIN_SPIKES - 1])
def test_few_spikes_are_not_fitted(n: int) -> None:
    assert of(np.full(n, 6.0, np.float32)) == WITHOUT_NEURON


@pytest.mark.parametrize("score", [5.01, 9.0, 500.0])
def test_equal_scores_have_a_finite_threshold_below_them(score: float) -> None:
    found = of(np.full(100, score, np.float32))
    assert LOWEST <= found <= HIGHEST
    assert found < score or found == WITHOUT_NEURON


def test_the_fit_finds_what_the_scores_were_drawn_with() -> None:
    score = scores(8.0, 20_000, 10_000, spread=1.3, decay=2.5)
    share, excess, spread, decay = (float(column[0]) for column in fitted(counted(score)))
    # The s.d. of these estimates is about 0.01 with so many spikes; bins of 0.1 add as much.
    assert (share, LOWEST + excess, spread, decay) == pytest.approx((2 / 3, 8.0, 1.3, 2.5), rel=0.04)


def test_spikes_below_the_lowest_score_are_part_of_the_fit() -> None:
    """Half of the neuron is not seen, and yet its mean is found."""
    assert float(fitted(counted(scores(LOWEST, 40_000))).mean[0]) == pytest.approx(0.0, abs=0.5)


def test_the_best_threshold_of_a_known_mixture() -> None:
    """Half neuron, half background: where a spike of the neuron gained is a background spike less, at equal rates."""
    one = Mixture(np.array([0.5]), np.array([9.0 - LOWEST]), np.array([1.0]), np.array([2.0]))
    excess = best_excess(one, np.array([HIGHEST - LOWEST]))[0]
    assert LOWEST + excess == pytest.approx(expected(9.0, 1000, 1000), abs=0.051)


def test_small_templates_are_searched_at_lower_scores() -> None:
    assert lowest_scores(np.array([0.0, 6.5, 7.5, 8.0, 100.0])) == pytest.approx([4, 4, 4.5, 5, 5])
    assert lowest_scores(np.zeros(0)).shape == (0,)


def test_a_small_neuron_has_a_low_threshold() -> None:
    """One of whose spikes a third are below the lowest score of others."""
    found = of(scores(5.5, 500, 200, decay=4.0, lowest=LOWEST_SMALL), LOWEST_SMALL)
    assert found < LOWEST

    def accuracy(at: float) -> float:
        return float(500 * norm.sf(at, 5.5, 1.0) / (500 + 200 * np.exp(-4.0 * (at - LOWEST_SMALL))))

    # The s.d. of the mean of 500 scores, 0.05, moves the threshold, on which accuracy hardly depends at its maximum.
    assert accuracy(found) > accuracy(expected(5.5, 500, 200, decay=4.0, lowest=LOWEST_SMALL)) - 0.01


def test_no_threshold_is_above_the_highest_wherever_the_search_begins() -> None:
    lowest = np.array([LOWEST_SMALL, 4.3, LOWEST])
    each = [scores(60, 300, 20_000, decay=0.5, lowest=one) for one in lowest.tolist()]
    template = np.repeat(np.arange(3), [len(one) for one in each])
    counts = histograms(np.concatenate(each), template, lowest)
    assert thresholds(counts, lowest) == pytest.approx([HIGHEST] * 3)


def test_templates_are_fitted_apart_wherever_their_search_begins() -> None:
    lowest = np.array([LOWEST, LOWEST_SMALL, 4.4])
    each = [scores(mean, 400, 600, lowest=one) for mean, one in zip((9.0, 5.8, 7.0), lowest.tolist(), strict=True)]
    template = np.repeat(np.arange(3), [len(one) for one in each])
    found = thresholds(histograms(np.concatenate(each), template, lowest), lowest)
    assert found.tolist() == [of(score, one) for score, one in zip(each, lowest.tolist(), strict=True)]


# -- peaks -------------------------------------------------------------------------------------------


def peaks(n_background: int, *neurons: tuple[float, int], decay: float = 1.5, seed: int = 5) -> NDArray[np.float32]:
    """Scores of a region's peaks: background, and neurons of some mean and number."""
    rng = np.random.default_rng(seed)
    parts = [LOWEST_PEAK + rng.exponential(1 / decay, n_background), *(rng.normal(mean, 1, n) for mean, n in neurons)]
    score = np.concatenate(parts).astype(np.float32)
    return rng.permutation(score[score > LOWEST_PEAK])


def test_without_background_all_peaks_are_used() -> None:
    assert peak_threshold(peaks(5, (7.5, 400))) == pytest.approx(LOWEST_PEAK, abs=0.11)


def test_background_alone_has_the_highest_threshold() -> None:
    assert peak_threshold(peaks(3000)) == HIGHEST_PEAK
    assert peak_threshold(peaks(3000, (40, 1000))) == HIGHEST_PEAK, "large neurons say nothing of small ones"


def test_with_both_it_keeps_background_to_a_tenth() -> None:
    score = peaks(1000, (9, 600))
    threshold = peak_threshold(score)
    assert LOWEST_PEAK < threshold < HIGHEST_PEAK
    background = peaks(1000)  # the same, as it is drawn first
    share = (background > threshold).sum() / (score > threshold).sum()
    assert share == pytest.approx(kernels.BACKGROUND_SHARE, abs=0.05)  # s.d. of the count, and error of the fit


def test_more_background_raises_it() -> None:
    found = [peak_threshold(peaks(n, (9, 600))) for n in (50, 500, 5000)]
    assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("n", [0, 1, kernels.MIN_SPIKES - 1])
def test_few_small_peaks_are_not_fitted(n: int) -> None:
    assert peak_threshold(np.concatenate([np.full(n, 7.0), np.full(500, 30.0)]).astype(np.float32)) == HIGHEST_PEAK
