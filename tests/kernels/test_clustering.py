"""Graph clustering of a region, step by step and as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dense_rows import DenseRows

from ks4stream.kernels import clustering
from ks4stream.kernels.clustering import (
    FeatureRows,
    ScatteredRows,
    cluster_region,
    landmark_step,
    seed_labels,
    spike_step,
    sweep,
)
from ks4stream.kernels.graph import graph_of


def blobs(*sizes: int, d: int = 12, distance: float = 12.0, seed: int = 0) -> tuple[DenseRows, np.ndarray]:
    """Gaussian clouds of unit variance on a line, mixed in time."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=generator)]
    x = torch.randn((len(label), d), generator=generator)
    x[:, 0] += distance * label
    return DenseRows(x), label.numpy()


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings agree up to names."""
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return bool(pairs == len(np.unique(a)) == len(np.unique(b)))


# -- seeds -------------------------------------------------------------------------------------------


def test_seeds_are_the_points_that_explain_most() -> None:
    points = torch.tensor([[10.0, 0.0], [10.0, 1.0], [0.0, 3.0], [0.0, 0.0]])
    label = seed_labels(points, seed=5, n_seeds=10)
    # (10, 1): 2·100 − 101 = 99 for the first, 101 for itself, 5 for the third; then each as far as it helps
    assert label[0] != label[2] != label[1]
    # what a point is worth to itself is all of its energy, so in the end each explains itself; nothing needs none
    assert len(set(label[:3].tolist())) == 3
    assert label[3] == 0
    only = seed_labels(points, seed=5, n_seeds=1)
    assert only.tolist() == [0, 0, 0, 0]


@pytest.mark.slow
def test_seeds_depend_on_their_seed_only() -> None:
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    first = seed_labels(points, seed=5, n_seeds=200)
    torch.manual_seed(123)
    torch.rand(3)
    assert torch.equal(first, seed_labels(points, seed=5, n_seeds=200))
    assert not torch.equal(first, seed_labels(points, seed=6, n_seeds=200))


# -- sweeps ------------------------------------------------------------------------------------------


def test_spikes_take_the_most_frequent_label_of_their_landmarks() -> None:
    neighbor = torch.tensor([[0, 1, 2], [0, 1, 3], [2, 3, 4], [0, 2, 4]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.tensor([0, 1, 2, 3, 3][:5]))
    label = spike_step(graph, torch.tensor([1, 1, 2, 2, 0]), 3, resolution=0.0)
    assert label.tolist() == [1, 1, 2, 0]  # of three labels once each: the lowest


def test_landmarks_take_the_most_frequent_label_of_their_spikes() -> None:
    neighbor = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.tensor([0, 1]))
    assert landmark_step(graph, torch.tensor([2, 2, 2, 1]), 3, resolution=0.0).tolist() == [2, 2]
    assert landmark_step(graph, torch.tensor([2, 2, 1, 1]), 3, resolution=0.0).tolist() == [1, 1]


def test_expected_links_count_against_a_label() -> None:
    neighbor = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.tensor([0, 1]))
    # landmark 0: k = 3 of m = 6; label 2 has three links of it and spikes of degree 1 + 1 + 2, label 1 one and 2.
    # 3 − λ/10 · 3/6 · 4 against 1 − λ/10 · 3/6 · 2, and 0 for a label that is not used
    assert landmark_step(graph, torch.tensor([2, 2, 2, 1]), 3, resolution=14.0).tolist() == [2, 2]
    assert landmark_step(graph, torch.tensor([2, 2, 2, 1]), 3, resolution=21.0).tolist() == [0, 0]


def test_sweeps_stop_with_labels_from_zero() -> None:
    neighbor = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.arange(4))
    spikes, landmarks = sweep(graph, torch.tensor([7, 7, 4, 4]), 9)
    assert spikes.tolist() == [1, 1, 0, 0]
    assert landmarks.tolist() == [1, 1, 0, 0]


def clustered(rows: FeatureRows, **changes: Any) -> np.ndarray:
    """Labels with Kilosort4's defaults."""
    defaults: dict[str, Any] = {"n_neighbors": 10, "downsampling": 20, "max_landmarks": 25_000, "seed": 5}
    return cluster_region(rows, **(defaults | {"ccg_threshold": 0.25, "sampling_rate_hz": 30_000.0} | changes))


# -- as a whole --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1500, 800, 200), (400, 60), (90,), (2500,)])
def test_clouds_are_found(sizes: tuple[int, ...]) -> None:
    rows, truth = blobs(*sizes)
    label = clustered(rows)
    assert same_partition(label, truth)
    assert label.dtype == np.int64
    assert set(label.tolist()) == set(range(len(sizes)))


@pytest.mark.slow
def test_a_quiet_unit_beside_a_busy_one_is_found() -> None:
    """The published number of landmarks and the minimum of 1000 spikes miss such units."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(800, 72, generator=generator)
    truth = (torch.arange(800) % 20 == 3).long()
    x[:, :12] += torch.where(truth[:, None] == 1, 3.4, 0.0)
    assert same_partition(clustered(DenseRows(x)), truth.numpy())


def test_one_unit_in_many_dimensions_stays_one() -> None:
    """A regression with as many features as spikes would split any cluster."""
    x = torch.randn(120, 150, generator=torch.Generator().manual_seed(2))
    x[:, :6] += 10.0
    assert clustered(DenseRows(x)).max() == 0


@pytest.mark.parametrize("n", [0, 1, 2, 49])
def test_few_spikes_are_one_cluster(n: int) -> None:
    rows, _ = blobs(n // 2, n - n // 2)
    assert clustered(rows).tolist() == [0] * n


@pytest.mark.parametrize("n", [2, 3, 11, 60])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_identical_spikes_are_one_cluster(n: int, value: float) -> None:
    label = clustered(DenseRows(torch.full((n, 6), value)), min_spikes=0)
    assert label.tolist() == [0] * n


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_any_number_of_spikes_is_labelled(n: int) -> None:
    rows, _ = blobs(n // 2, n - n // 2)
    label = clustered(rows, min_spikes=0)
    assert len(label) == n
    assert set(label.tolist()) == set(range(label.max() + 1))


@pytest.mark.slow
def test_scattered_rows_cluster_as_dense_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(400, 4, 3, generator=generator)
    slot = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(400)])
    features[:200, 0] += 9.0
    rows = ScatteredRows(features, torch.arange(len(slot)), slot, 6)
    assert np.array_equal(clustered(rows), clustered(DenseRows(rows.chunk(0, 400))))


@pytest.mark.slow
def test_the_result_does_not_depend_on_threads_or_global_state() -> None:
    rows, _ = blobs(700, 500, 90, d=40, distance=5.0)
    n_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            results.append(clustered(rows))
    finally:
        torch.set_num_threads(n_threads)
    assert np.array_equal(*results)


@pytest.mark.slow
def test_the_refractory_veto_keeps_one_neuron_together() -> None:
    """A neuron whose waveform changes halfway, and two independent ones."""
    rows, truth = blobs(1500, 1500)
    draw = np.random.default_rng(0)
    one_train = np.cumsum(draw.integers(150, 1500, 3000))  # 5 ms apart at least
    two_trains = np.sort(draw.integers(0, one_train[-1], 3000))
    together = clustered(rows, sample=one_train, final=True)
    apart = clustered(rows, sample=two_trains, final=True)
    assert together.max() == 0 or same_partition(together, truth)
    assert same_partition(apart, truth)


@pytest.mark.slow
def test_the_refractory_veto_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "APART_BELOW", 0.0)
    rows, truth = blobs(1500, 1500)
    train = np.cumsum(np.random.default_rng(0).integers(150, 1500, 3000))
    assert same_partition(clustered(rows, sample=train, final=False), truth)
    assert clustered(rows, sample=train, final=True).max() == 0


def test_times_are_needed_in_the_end() -> None:
    with pytest.raises(ValueError, match="pass `sample` and `sampling_rate_hz`"):
        clustered(blobs(100)[0], final=True)
    with pytest.raises(ValueError, match="pass `sample` and `sampling_rate_hz`"):
        clustered(blobs(100)[0], sample=np.arange(100), sampling_rate_hz=None, final=True)


def test_only_landmarks_are_ever_held_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(DenseRows):
        asked = 0

        def chunk(self, start: int, stop: int) -> torch.Tensor:
            self.asked = max(self.asked, stop - start)
            return super().chunk(start, stop)

    for module in (clustering, *(__import__(f"ks4stream.kernels.{name}", fromlist="x") for name in ("graph", "tree"))):
        monkeypatch.setattr(module, "CHUNK", 500)
    dense, truth = blobs(1500, 700)
    rows = Watched(dense.chunk(0, 2200))
    checked: FeatureRows = rows
    assert same_partition(clustered(checked, min_landmarks=100), truth)
