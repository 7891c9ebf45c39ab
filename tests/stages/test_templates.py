"""Which peaks are clustered, and means of clusters."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from runs import RunHere

from ks4stream.blocks import Tiling
from ks4stream.geometry import Centres, Regions
from ks4stream.io.tables import write_block
from ks4stream.kernels.thresholds import HIGHEST_PEAK, LOWEST_PEAK
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import Settings
from ks4stream.simulate import linear_probe
from ks4stream.stages import templates
from ks4stream.stages.clustering import Circumstances, GraphClustering
from ks4stream.stages.detection import Peaks
from ks4stream.stages.small_peaks import complete_batches
from ks4stream.stages.templates import LearnTemplates, RegionTemplates, bounded_sample, of_one_neuron

TIMES = np.arange(10_000) * 3  # 100 spikes in each of 100 slices of time


def test_few_spikes_all_enter_in_order_of_time_and_centre() -> None:
    chosen, weight = bounded_sample(np.array([5, 3, 5, 1]), np.array([2, 0, 1, 0]), max_peaks=4)
    assert chosen.tolist() == [3, 1, 2, 0]
    assert weight.tolist() == [1, 1, 1, 1]


def test_many_spikes_share_the_places_equally_over_time_and_centres() -> None:
    centre = np.arange(10_000) % 2
    chosen, weight = bounded_sample(TIMES, centre, max_peaks=1000)
    assert np.bincount(chosen // 100).tolist() == [10] * 100
    assert np.bincount(chosen // 100 * 2 + centre[chosen]).tolist() == [5] * 200
    assert weight.tolist() == [10] * 1000


def test_a_rare_centre_keeps_its_spikes_and_leaves_its_places_to_the_others() -> None:
    centre = (np.arange(10_000) % 100 == 0).astype(np.int64)  # one spike in each slice
    chosen, weight = bounded_sample(TIMES, centre, max_peaks=1000)
    rare = centre[chosen] == 1
    assert (rare.sum(), (~rare).sum()) == (100, 900)
    assert weight[rare].tolist() == [1] * 100
    assert weight[~rare].tolist() == [11] * 900  # 9 stand for 99


def test_a_burst_does_not_crowd_out_the_rest_of_the_recording() -> None:
    sample = np.sort(np.concatenate([np.arange(5000), np.arange(99) * 10_000 + 10_000]))
    chosen, weight = bounded_sample(sample, np.zeros(len(sample), np.int64), max_peaks=200)
    late = sample[chosen] >= 10_000
    assert (late.sum(), (~late).sum()) == (99, 101)
    assert weight[late].tolist() == [1] * 99
    assert weight.sum() == pytest.approx(len(sample), abs=1e-9)  # a hundred sums in float64


@pytest.mark.parametrize("most", [400, 1234, 4999])
def test_never_more_than_asked_for_and_the_weights_add_up_to_all(most: int) -> None:
    rng = np.random.default_rng(5)
    sample, centre = np.sort(rng.integers(0, 10**9, 5000)), rng.integers(0, 3, 5000) ** 2
    chosen, weight = bounded_sample(sample, centre, max_peaks=most)
    assert len(chosen) == most
    assert len(np.unique(chosen)) == most
    assert (np.diff(sample[chosen]) >= 0).all()
    assert weight.min() >= 1
    assert weight.sum() == pytest.approx(5000, abs=1e-6)  # thousands of sums in float64


@pytest.mark.parametrize("most", [1, 50, 99, 100, 150])
def test_spikes_without_a_share_are_represented_by_others(most: int) -> None:
    """Fewer places than slices of time, or than centres in a slice."""
    chosen, weight = bounded_sample(TIMES, np.arange(10_000) % 3, max_peaks=most)
    assert len(chosen) == most
    assert weight.sum() == pytest.approx(10_000, abs=1e-6)
    if most >= 100:
        np.testing.assert_allclose(np.bincount(chosen // 100, weight), 100)  # in each slice


def test_the_choice_does_not_depend_on_the_order_of_the_spikes() -> None:
    rng = np.random.default_rng(6)
    sample, centre = rng.permutation(10**6)[:3000], rng.integers(0, 4, 3000)
    order = rng.permutation(3000)
    chosen, weight = bounded_sample(sample, centre, max_peaks=700)
    other, other_weight = bounded_sample(sample[order], centre[order], max_peaks=700)
    assert order[other].tolist() == chosen.tolist()
    assert other_weight.tolist() == weight.tolist()


def test_within_a_share_the_choice_is_scattered() -> None:
    chosen, _ = bounded_sample(TIMES, np.zeros(10_000, np.int64), max_peaks=1000)
    # Of 100 places in a slice: the mean of 1000 drawn evenly is 49.5 ± 0.9; five times that.
    assert (chosen % 100).mean() == pytest.approx(49.5, abs=4.5)


def test_spikes_that_all_fall_on_one_sample_can_be_bounded() -> None:
    chosen, weight = bounded_sample(np.full(10, 7), np.arange(10) // 5, max_peaks=4)
    assert (chosen < 5).sum() == 2
    assert weight.tolist() == [2.5] * 4


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [
        ([1, 10, 10], 9, [1, 4, 4]),
        ([10, 1, 10], 9, [4, 1, 4]),
        ([5, 5], 10, [5, 5]),
        ([5, 5], 99, [5, 5]),  # no share is larger than its size
        ([5, 5], 7, [3, 4]),  # what does not divide goes to the last
        ([5, 5, 5], 2, [0, 1, 1]),
        ([0, 3], 2, [0, 2]),
        ([4], 0, [0]),
        ([], 5, []),
    ],
)
def test_shares(sizes: list[int], total: int, shares: list[int]) -> None:
    assert templates._shares(np.array(sizes, np.int64), total).tolist() == shares


NEAR = np.array([0.5, 0.7, 0.5], np.float32)  # weights of the channels in the universal templates


def stage_of(folder: Path, features: NDArray[np.float32], score: NDArray[np.float32], **options: Any) -> LearnTemplates:
    """Peaks of one region and centre, on three channels."""
    n, n_pcs = len(features), features.shape[2]
    columns = {"sample": np.arange(n) * 300, "centre": np.zeros(n, np.int32), "score": score, "features": features}
    receipt = write_block(folder / "a.rows", columns, np.zeros(n, np.int64), 1)
    settings, one = Settings(n_pcs=n_pcs, **options), np.zeros(1, np.int64)
    pcs = np.eye(n_pcs, 61, 20, dtype=np.float32)
    mixture = np.random.default_rng(1).standard_normal((200, n_pcs)).astype(np.float32)
    return LearnTemplates(
        settings,
        Peaks([receipt]),
        Waveforms(pcs, mixture / np.linalg.norm(mixture, axis=1, keepdims=True) @ pcs),
        linear_probe(3),
        Centres(np.zeros((1, 2)), one, np.arange(3)[None], NEAR[None, None], one[:, None], 20.0),
        Regions(np.zeros((1, 2)), one, one),
        Circumstances(Tiling(0, 300 * n + 300, 300 * n + 300, 0, 1), 30_000.0),
        GraphClustering(settings),
        min_spikes=5,
    )


def test_a_region_without_peaks_has_no_templates(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, np.zeros((0, 3, 2), np.float32), np.zeros(0, np.float32))
    run = RunHere(tmp_path)
    templates = stage.task(0, tmp_path)
    assert templates.features.shape == (0, 3, 2)
    assert stage.combine([templates], run).features.shape == stage.combine([], run).features.shape == (0, 3, 2)
    assert stage.run(run).features.shape == (0, 3, 2)


class AtMost100:
    """Takes all of at most 100 peaks for one cluster."""

    device, max_peaks = "cpu", 100

    def __call__(self, rows: Any, conditions: Any, **_: Any) -> NDArray[np.int64]:
        return np.zeros(rows.n, np.int64)


def small_peaks(waveforms: NDArray[np.float32], seed: int = 1) -> NDArray[np.float32]:
    """Peaks with unit noise around some waveforms (n, c, q)."""
    noise = np.random.default_rng(seed).standard_normal(waveforms.shape)
    return (waveforms + noise).astype(np.float32)


LARGE = np.eye(3, 6, dtype=np.float32)[0] * np.array([[40], [0], [0]], np.float32)
SMALL = np.outer([1, 5, 5], [0, 0.95, 0.3, 0, 0, 0]).astype(np.float32)  # of norm 7.1; no projection is above 6.6


def many_neurons() -> NDArray[np.float32]:
    """Peaks of all kinds of waveforms (n, c, q)."""
    mixture = np.random.default_rng(3).standard_normal((300, 1, 6))
    return (9 * NEAR[:, None] * mixture / np.linalg.norm(mixture, axis=2, keepdims=True)).astype(np.float32)


def falling_scores(n: int) -> NDArray[np.float32]:
    """Those of background, or of a neuron most of whose peaks are below the threshold of detection."""
    return (6.5 + np.random.default_rng(2).exponential(0.5, n)).astype(np.float32)


def test_small_peaks_of_one_neuron_are_a_template_of_their_own(tmp_path: Path) -> None:
    features = small_peaks(np.concatenate([np.tile(LARGE, (100, 1, 1)), np.tile(SMALL, (60, 1, 1))]))
    score = np.concatenate([np.full(100, 40.0, np.float32), falling_scores(60)])
    stage = stage_of(tmp_path, features, score)
    assert stage._threshold(score) == HIGHEST_PEAK
    found = stage.task(0, tmp_path)
    assert found.n_spikes.tolist() == [100, 60]
    # 60 peaks leave 1/60 of the noise's variance in each of 18 features: an energy of 0.3, a norm of 0.55.
    assert np.linalg.norm(found.features[1] - SMALL) < 1.0
    assert len(stage.run(RunHere(tmp_path)).features) == 2


def test_small_peaks_of_many_neurons_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = falling_scores(300)
    stage = stage_of(tmp_path, small_peaks(many_neurons()), score)
    assert stage._threshold(score) == HIGHEST_PEAK
    assert stage.task(0, tmp_path).n_spikes.sum() < 30  # a few may agree by chance
    monkeypatch.setattr(templates, "AGREEMENT", 0.0)
    assert stage.task(0, tmp_path).n_spikes.sum() == 300


def test_small_peaks_of_some_batches_represent_those_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten batches, all peaks of two, and of the others those above 9; they say nothing of the threshold."""
    monkeypatch.setattr("ks4stream.stages.small_peaks.MIN_SECONDS", 0.0)
    n, per_batch = 200, 20
    circumstances = Circumstances(Tiling(0, 300 * n, 300 * per_batch, 0, 10), 30_000.0)
    complete = np.flatnonzero(complete_batches(Settings(), circumstances.tiling, 30_000.0))
    assert len(complete) == 2
    is_small = np.isin(np.arange(n) // per_batch, complete)
    waveforms = np.where(is_small[:, None, None], SMALL, LARGE)
    score = np.full(n, 40.0, np.float32)
    score[is_small] = falling_scores(40)
    stage = stage_of(tmp_path, small_peaks(waveforms), score)
    stage = replace(stage, circumstances=circumstances)
    judged: list[NDArray[np.float32]] = []
    monkeypatch.setattr(templates, "peak_threshold", lambda score: judged.append(score) or HIGHEST_PEAK)
    found = stage.task(0, tmp_path)
    assert found.n_spikes.tolist() == [160, 40 * 5]
    assert found.n_peaks.tolist() == [160, 40]
    assert found.noise.tolist() == pytest.approx([18 / 160, 18 / 40])
    assert [of_two.tolist() for of_two in judged] == [score[is_small].tolist()]
    monkeypatch.setattr(templates, "peak_threshold", lambda score: LOWEST_PEAK)  # all are large, of one cluster or more
    assert stage.task(0, tmp_path).n_spikes.sum() == 160 + 40 * 5
    with_number = replace(stage, settings=Settings(n_pcs=6, Th_universal=6.5))
    assert with_number.task(0, tmp_path).n_spikes.sum() == 200


def test_if_the_threshold_is_a_number_all_peaks_above_it_are_clustered(tmp_path: Path) -> None:
    found = stage_of(tmp_path, small_peaks(many_neurons()), falling_scores(300), Th_universal=6.5).task(0, tmp_path)
    assert found.n_spikes.sum() == 300


def test_the_noise_in_the_mean_of_few_peaks_is_no_agreement() -> None:
    mean = np.zeros((3, 2, 6), np.float32)
    mean[:, 0, 0] = [7.0, 7.0, 6.7]
    # 12 features with unit noise add 4 to the energy of the mean of 3 peaks, 0.04 to that of 300.
    noise = np.array([4.0, 0.04, 0.04])
    count = np.array([3.0, 300.0, 300.0])
    found = RegionTemplates(mean, count, np.ones(3), np.full(3, 7.0), noise, count)
    assert of_one_neuron(found).tolist() == [False, True, False]


def test_the_noise_in_the_mean_is_that_of_the_peaks_that_were_chosen(tmp_path: Path) -> None:
    """Not of those that they represent, and only on channels that there are."""
    stage = stage_of(tmp_path, small_peaks(np.tile(SMALL, (400, 1, 1))), falling_scores(400))
    all_peaks = np.arange(400), np.ones(400)
    every = stage._clusters(0, *all_peaks)
    assert every.noise.tolist() == pytest.approx([18 / 400])
    few = replace(stage, cluster=AtMost100())._clusters(0, *all_peaks)
    assert (few.n_spikes.tolist(), few.n_peaks.tolist()) == ([400], [100])
    assert few.noise.tolist() == pytest.approx([18 / 100])
    padded = replace(stage.centres, channels=np.array([[0, 1, -1]]))
    assert replace(stage, centres=padded)._clusters(0, *all_peaks).noise.tolist() == pytest.approx([12 / 400])


def combined(parts: list[RegionTemplates], folder: Path) -> Templates:
    """Templates on three channels, with two components."""
    pcs = np.eye(2, 5, 1, dtype=np.float32)
    stage = SimpleNamespace(
        settings=Settings(n_pcs=2),
        probe=linear_probe(3),
        waveforms=Waveforms(pcs, pcs[:1]),
        peaks=Peaks([]),
        circumstances=Circumstances(Tiling(0, 10_000, 5000, 0, 2), 30_000.0),
        min_spikes=5,
    )
    return LearnTemplates.combine(cast(Any, stage), parts, RunHere(folder))


def region(
    features: NDArray[np.float32], count: list[float], variance: list[float], n_peaks: list[float] | None = None
) -> RegionTemplates:
    """Clusters whose means have no noise, of as many peaks as they represent unless `n_peaks` says otherwise."""
    columns = map(np.array, (count, variance, [9.0] * len(count), [0.0] * len(count), n_peaks or count))
    return RegionTemplates(features, *columns)


def test_templates_know_how_their_scores_vary(tmp_path: Path) -> None:
    """Of two regions: a template seen in both, and one of its own in the second."""
    one, other = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    one[0, 0], other[2, 0] = 10, 30
    parts = [region(one[None], [30.0], [4.0]), region(np.stack([one * 1.1, other]), [10.0, 50.0], [8.0, 9.0])]
    found = combined(parts, tmp_path)
    between = (3 * 0.25**2 + 0.75**2) / 4  # norms of 10 and 11 around 10.25
    assert found.count.tolist() == [40, 50]
    assert found.spread.tolist() == pytest.approx([(5 + between) ** 0.5, 3.0])


def test_few_peaks_have_no_template_however_many_they_represent(tmp_path: Path) -> None:
    one = np.zeros((3, 2), np.float32)
    one[0, 0] = 10
    for n_peaks, count in ((4.0, []), (5.0, [400])):
        assert combined([region(one[None], [400.0], [1.0], [n_peaks])], tmp_path).count.tolist() == count
    halves = [region(one[None], [200.0], [1.0], [n_peaks]) for n_peaks in (2.0, 3.0)]  # of a neuron between regions
    assert combined(halves, tmp_path).count.tolist() == [400]


def test_collisions_have_no_templates(tmp_path: Path) -> None:
    one, other = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    one[0, 0], other[2, 0] = 20, 30
    for n, count in ((9, [90, 70]), (10, [90, 10, 70])):  # within ±2 samples, 3.15 are expected
        parts = [region(np.stack([one, one + other, other]), [90.0, n, 70.0], [0.0] * 3)]
        assert combined(parts, tmp_path).count.tolist() == count


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(templates)
    assert outcome.attempted > 0
    assert outcome.failed == 0
