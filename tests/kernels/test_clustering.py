"""Graph clustering of a region, step by step and as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conditions import still
from dense_rows import DenseRows

from ks4stream.kernels import agglomeration, clustering, graph
from ks4stream.kernels.clustering import (
    ChannelRows,
    Conditions,
    PrincipalRows,
    ScatteredRows,
    cluster_region,
    landmark_step,
    linked_parts,
    seed_labels,
    spike_step,
    sweep,
)
from ks4stream.kernels.graph import SpikeGraph, graph_of


def blobs(*sizes: int, d: int = 12, distance: float = 12.0, seed: int = 0) -> tuple[DenseRows, np.ndarray]:
    """Gaussian clouds of unit variance on a line that is 12 from the origin, mixed in time."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=generator)]
    x = torch.randn((len(label), d), generator=generator)
    x[:, 0] += distance * label
    x[:, 1] += 12.0
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
    # 3 − λ/2 · 3/6 · 4 against 1 − λ/2 · 3/6 · 2, and 0 for a label that is not used
    assert landmark_step(graph, torch.tensor([2, 2, 2, 1]), 3, resolution=2.8).tolist() == [2, 2]
    assert landmark_step(graph, torch.tensor([2, 2, 2, 1]), 3, resolution=4.2).tolist() == [0, 0]


def test_a_large_label_must_have_more_of_a_spikes_landmarks() -> None:
    neighbor = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 3, 5], [0, 4, 5]], dtype=torch.int32)
    none, degree = torch.zeros(4, 3, dtype=torch.bool), torch.tensor([4, 1, 1, 2, 2, 2])  # no spike is a landmark
    graph = SpikeGraph(torch.arange(6), neighbor, none, torch.full((4,), 3), degree, 12)
    landmark_label = torch.tensor([0, 0, 1, 1, 1, 1])  # with 5 and 7 of 12 links
    assert spike_step(graph, landmark_label, 2, resolution=1.0).tolist() == [0, 1, 1, 1]
    # the second spike: 1 − λ/40 · 3/12 · 5 against 2 − λ/40 · 3/12 · 7, equal at λ = 80
    assert spike_step(graph, landmark_label, 2, resolution=79.0).tolist() == [0, 1, 1, 1]
    assert spike_step(graph, landmark_label, 2, resolution=81.0).tolist() == [0, 0, 0, 0]


def test_spikes_take_the_label_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many spikes, in chunks, with as many ties as ten landmarks and a few labels make."""
    monkeypatch.setattr(clustering, "CHUNK", 100)
    rng = np.random.default_rng(4)
    landmark_label, landmark = torch.from_numpy(rng.integers(0, 9, 50)), torch.arange(50)
    neighbor = np.stack([np.sort(rng.choice(50, 10, replace=False)) for _ in range(450)])
    graph = graph_of(torch.from_numpy(neighbor.astype(np.int32)), landmark)
    mass = np.bincount(landmark_label, graph.landmark_degree, minlength=9)
    expected = clustering.SPIKE_NULL / graph.n_links * mass
    wanted = []
    for near, degree in zip(landmark_label.numpy()[neighbor], graph.spike_degree.tolist(), strict=True):
        score = np.bincount(near, minlength=9) - degree * expected
        score[np.bincount(near, minlength=9) == 0] = -np.inf
        wanted.append(int(score.argmax()))  # the lowest label
    assert spike_step(graph, landmark_label, 9, resolution=1.0).tolist() == wanted


def test_sweeps_stop_with_labels_from_zero() -> None:
    neighbor = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.arange(4))
    spikes, landmarks = sweep(graph, torch.tensor([7, 7, 4, 4]), 9)
    assert spikes.tolist() == [0, 0, 1, 1]
    assert landmarks.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_parts_of_a_label_are_connected_by_links(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(clustering, "CHUNK", chunk)
    neighbor = torch.tensor([[4, 3], [2, 3], [0, 1], [1, 5], [2, 0], [6, 6]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.full((7,), 5))
    landmark_label = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    # 4 – 3 – 2 are connected by the first two spikes, 0 – 1 by the third, which the fourth is linked to; the last two
    # have no landmark of their label
    label = torch.tensor([0, 0, 0, 0, 1, 0])
    assert linked_parts(graph, label, landmark_label).tolist() == [2, 2, 0, 0, 8, 7]
    label[4] = 0  # connects 2 and 0
    assert linked_parts(graph, label, landmark_label).tolist() == [0, 0, 0, 0, 0, 7]


def test_a_label_without_links_between_its_parts_is_divided() -> None:
    neighbor = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]], dtype=torch.int32)
    graph = graph_of(neighbor, torch.arange(4))
    spikes, landmarks = sweep(graph, torch.tensor([4, 4, 4, 4]), 9)
    assert spikes.tolist() == [0, 0, 1, 1]
    assert landmarks.tolist() == [0, 0, 1, 1]


def clustered(rows: ChannelRows, conditions: Conditions | None = None, **changes: Any) -> np.ndarray:
    """Labels with Kilosort4's defaults."""
    defaults: dict[str, Any] = {"n_neighbors": 10, "downsampling": 20, "max_landmarks": 25_000, "seed": 5}
    conditions = still(rows.n) if conditions is None else conditions
    return cluster_region(rows, conditions, **(defaults | {"ccg_threshold": 0.25} | changes))


# -- principal components ----------------------------------------------------------------------------


def stretched(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows with a different variance along each of some oblique axes, not centred."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return (torch.randn(n, d, generator=generator) * torch.arange(1, d + 1)) @ turn + 5.0


def distances(points: torch.Tensor) -> torch.Tensor:
    """Between all points; these do not depend on the signs of components."""
    return torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")


def on_components(x: torch.Tensor, sample: torch.Tensor, n: int) -> torch.Tensor:
    """Rows projected on the first components of some of them."""
    centred = sample.double() - sample.double().mean(0)
    return x.double() @ torch.linalg.svd(centred)[2][:n].T


def test_principal_rows_are_projections_on_the_first_components() -> None:
    x, spikes = stretched(300, 6, 0), torch.arange(0, 300, 2)
    rows = PrincipalRows(DenseRows(x), spikes, 3)
    assert (rows.n, rows.d) == (150, 3)
    points = rows.chunk(0, 150)
    assert points.dtype == torch.float32
    torch.testing.assert_close(
        distances(points), distances(on_components(x[spikes], x[spikes], 3)), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(rows.take(torch.tensor([7, 2, 7])), points[[7, 2, 7]])
    assert torch.equal(rows.chunk(20, 30), points[20:30])


def test_rows_with_few_features_have_all_components() -> None:
    x = stretched(50, 4, 1)
    points = PrincipalRows(DenseRows(x), torch.arange(50), 12).chunk(0, 50)
    assert points.shape == (50, 4)
    torch.testing.assert_close(distances(points), distances(x), atol=1e-4, rtol=1e-4)


def test_components_are_those_of_an_even_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "COMPONENT_SPIKES", 40)
    x = stretched(100, 6, 2)
    found = PrincipalRows(DenseRows(x), torch.arange(100), 2).chunk(0, 100)
    torch.testing.assert_close(distances(found), distances(on_components(x, x[::3], 2)), atol=1e-4, rtol=1e-4)


def test_one_spike_has_principal_components() -> None:
    assert PrincipalRows(DenseRows(stretched(3, 6, 3)), torch.tensor([1]), 2).chunk(0, 1).tolist() == [[0, 0]]


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
@pytest.mark.parametrize("seed", range(4))
def test_a_quiet_unit_beside_a_busy_one_is_found(seed: int) -> None:
    """The published number of landmarks and the minimum of 1000 spikes miss such units."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(800, 72, generator=generator)
    truth = (torch.arange(800) % 20 == 3).long()
    x[:, :12] += torch.where(truth[:, None] == 1, 3.4, 0.0)
    x[:, 20] += 12.0
    assert same_partition(clustered(DenseRows(x)), truth.numpy())


def share_of_best(label: np.ndarray, truth: np.ndarray, unit: int) -> tuple[float, float]:
    """Recall and precision of the cluster that has most of a unit's spikes."""
    best = np.bincount(label[truth == unit]).argmax()
    both = ((label == best) & (truth == unit)).sum()
    return float(both / (truth == unit).sum()), float(both / (label == best).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_similar_units_are_found_in_many_dimensions(seed: int) -> None:
    """Five noise standard deviations apart: distances in 60 dimensions differ by their noise only."""
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.randperm(1630, generator=generator) < 330).long()
    x = torch.randn(1630, 60, generator=generator)
    x[:, 0] += 15
    x[:, 1] += 5.0 * truth
    label = clustered(DenseRows(x))
    assert label.max() == 1
    for unit in (0, 1):  # the best boundary leaves 1.5 % of the smaller unit on the wrong side, and 0.3 % of the other
        assert min(share_of_best(label, truth.numpy(), unit)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_unit_beside_a_crowd_is_found_whole(seed: int) -> None:
    """Background spikes of all amplitudes, whose labels were one that grew over its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.randperm(5200, generator=generator) < 200).long()
    direction = torch.zeros(5200, 60)
    direction[:, :6] = 0.3 * torch.randn(5200, 6, generator=generator)
    direction[:, 0] += 1
    amplitude = 6 - 4 * torch.log(torch.rand(5200, 1, generator=generator))
    unit = torch.zeros(60)
    unit[[0, 1, 7]] = torch.tensor([10.0, 10, 14])
    x = torch.where(truth[:, None] == 1, unit, amplitude * torch.nn.functional.normalize(direction))
    x += torch.randn(5200, 60, generator=generator)
    recall, precision = share_of_best(clustered(DenseRows(x)), truth.numpy(), 1)
    assert recall > 0.99 and precision > 0.98


@pytest.mark.slow
def test_each_cluster_is_divided_in_its_own_components_until_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The region's component tells the last unit from the others, which differ along another axis."""
    made: list[tuple[int, int]] = []

    class Noted(PrincipalRows):
        def __init__(self, rows: ChannelRows, spikes: torch.Tensor, n_components: int) -> None:
            made.append((len(spikes), n_components))
            super().__init__(rows, spikes, n_components)

    monkeypatch.setattr(clustering, "PrincipalRows", Noted)
    monkeypatch.setattr(clustering, "N_COMPONENTS", 1)
    truth = torch.arange(1500) % 3
    x = torch.randn(1500, 12, generator=torch.Generator().manual_seed(4))
    x[:, 3] += 40
    x[:, 0] += torch.tensor([0.0, 0, 60])[truth]
    x[:, 1] += torch.tensor([0.0, 30, 0])[truth]
    label = clustered(DenseRows(x))
    assert made[0] == (1500, 1)
    assert {n_components for _, n_components in made[1:]} == {8}
    assert len(made) > 1 + label.max()  # each cluster that is found was tried once more
    assert all(share_of_best(label, truth.numpy(), unit)[1] > 0.95 for unit in range(3))  # none is mixed with another


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_parts_of_a_unit_that_were_mixed_with_others_are_joined_again(seed: int) -> None:
    """A part of the first unit may be in a cluster of another one, from which it is divided later."""
    truth = torch.arange(1500) % 3
    x = torch.randn(1500, 20, generator=torch.Generator().manual_seed(seed))
    x[:, 3] += 24
    x[:, 0] += torch.tensor([0.0, 0, 30])[truth]
    x[:, 1] += torch.tensor([0.0, 9, 0])[truth]
    label = clustered(DenseRows(x))
    assert label.max() == 2
    assert all(min(share_of_best(label, truth.numpy(), unit)) > 0.97 for unit in range(3))


def test_one_unit_in_many_dimensions_stays_one() -> None:
    """A regression with as many features as spikes would split any cluster."""
    x = torch.randn(120, 150, generator=torch.Generator().manual_seed(2))
    x[:, :6] += 10.0
    assert clustered(DenseRows(x)).max() == 0


@pytest.mark.parametrize("n", [0, 1, 2, 49])
def test_few_spikes_are_one_cluster(n: int) -> None:
    rows, _ = blobs(n // 2, n - n // 2)
    assert clustered(rows).tolist() == [0] * n


def test_fifty_spikes_may_be_two_clusters() -> None:
    rows, truth = blobs(25, 25, distance=20)
    assert same_partition(clustered(rows), truth)


@pytest.mark.parametrize("n", [2, 3, 11, 60])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_identical_spikes_are_one_cluster(n: int, value: float) -> None:
    label = clustered(DenseRows(torch.full((n, 6), value)), min_spikes=0)
    assert label.tolist() == [0] * n


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 50, 51])
def test_any_number_of_spikes_is_labelled(n: int) -> None:
    rows, _ = blobs(n // 2, n - n // 2)
    label = clustered(rows, min_spikes=0)
    assert len(label) == n
    assert set(label.tolist()) == set(range(label.max() + 1))


@pytest.mark.slow
def test_scattered_rows_cluster_as_dense_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(400, 6, 3, generator=generator)
    slot = torch.stack([torch.randperm(6, generator=generator) for _ in range(400)])
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


# -- what is known besides features ------------------------------------------------------------------


@pytest.mark.slow
def test_channels_that_a_group_lacks_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """One neuron, found with two templates of four channels each, of which two are the same."""
    monkeypatch.setattr(agglomeration, "MIN_RATIO", 0.0)  # so that they are compared at all
    slot, kind = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]), torch.arange(800) % 2
    features = torch.randn(800, 4, 2, generator=torch.Generator().manual_seed(6)) + 5.0
    rows = ScatteredRows(features, kind, slot, 6)
    assert clustered(rows).tolist() == [0] * 800
    assert same_partition(clustered(DenseRows(rows.chunk(0, 800))), kind.numpy())


@pytest.mark.slow
def test_a_neuron_that_jumps_with_the_tissue_is_one() -> None:
    """By 15 µm halfway; too far for links, so that clusters with similar means are compared, too."""
    sample = np.sort(np.random.default_rng(7).integers(0, 6_000_000, 1000))
    late = torch.arange(1000) >= 500
    x = torch.randn(1000, 30, generator=torch.Generator().manual_seed(7))
    x[:, 0] += torch.where(late, 20 * np.cos(0.4), 20.0)
    x[:, 1] += torch.where(late, 20 * np.sin(0.4), 0.0)
    conditions = still(1000, sample=sample)
    assert same_partition(clustered(DenseRows(x), conditions), late.numpy())
    moved = conditions._replace(displacement_um=np.where(late, 15, 0).astype(np.float32))
    assert clustered(DenseRows(x), moved).tolist() == [0] * 1000


def times(*, one_neuron: bool) -> Conditions:
    """Of 3000 spikes: at least 5 ms apart, or random."""
    draw = np.random.default_rng(0)
    train = np.cumsum(draw.integers(150, 1500, 3000))
    return still(3000, sample=train if one_neuron else np.sort(draw.integers(0, train[-1], 3000)))


@pytest.mark.slow
def test_the_refractory_veto_keeps_one_neuron_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a neuron with two waveforms; two neurons stay apart. Templates are not compared by their times."""
    monkeypatch.setattr(agglomeration, "MIN_RATIO", 0.0)
    rows, truth = blobs(1500, 1500)
    one, two = (times(one_neuron=one_neuron) for one_neuron in (True, False))
    assert clustered(rows, one, final=True).max() == 0
    assert same_partition(clustered(rows, two, final=True), truth)
    assert same_partition(clustered(rows, one, final=False), truth)
    assert same_partition(clustered(rows, one, final=True, ccg_threshold=0.0), truth)


@pytest.mark.slow
def test_few_rows_are_ever_held_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(DenseRows):
        asked = 0

        def chunk(self, start: int, stop: int) -> torch.Tensor:
            self.asked = max(self.asked, stop - start)
            return super().chunk(start, stop)

        def take(self, index: torch.Tensor) -> torch.Tensor:
            self.asked = max(self.asked, len(index))
            return super().take(index)

    for module in (clustering, graph, agglomeration):
        monkeypatch.setattr(module, "CHUNK", 500)
    for name in ("COMPONENT_SPIKES", "COMPARED_SPIKES"):
        monkeypatch.setattr(clustering, name, 400)
    dense, truth = blobs(1500, 700)
    rows = Watched(dense.chunk(0, 2200))
    assert same_partition(clustered(rows, min_landmarks=100), truth)
    assert 0 < rows.asked <= 500
