"""Rows for the clustering of a region, and means of clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ks4stream.blocks import Tiling
from ks4stream.kernels.graph import ScatteredRows
from ks4stream.results import Drift
from ks4stream.settings import Settings
from ks4stream.stages import clustering
from ks4stream.stages.clustering import Circumstances, GraphClustering, cluster_means, scattered_rows, score_variances


def rows_of_three() -> ScatteredRows:
    """Three spikes with one feature on two slots each, scattered over the channels 2, 5 and 6."""
    features = np.array([[[1.0], [2]], [[3], [4]], [[5], [0]]], np.float32)
    kind, channels = np.array([2, 0, 1]), np.array([[5, 6], [6, -1], [2, 5]])
    return scattered_rows(features, kind, channels, np.array([2, 5, 6]), 8, "cpu")


def test_features_are_scattered_to_the_places_of_their_channels() -> None:
    assert rows_of_three().chunk(0, 3).tolist() == [[1, 2, 0], [0, 3, 4], [0, 0, 5]]


def test_only_many_spikes_go_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "GPU_FROM_SPIKES", 3)
    channels = np.array([[2, 5]])
    for n, device in [(2, "cpu"), (3, "meta")]:
        features, kind = np.ones((n, 2, 1), np.float32), np.zeros(n, np.int64)
        rows = scattered_rows(features, kind, channels, np.array([2, 5]), 8, "meta")
        assert rows.chunk(0, n).device.type == device


def test_means_are_weighted_and_count_what_each_spike_stands_for() -> None:
    mean, count = cluster_means(rows_of_three(), np.array([0, 0, 1]), np.array([1.0, 3.0, 7.0]))
    assert mean.tolist() == [[0.25, 2.75, 3], [0, 0, 5]]
    assert count.tolist() == [4, 7]


def test_scores_vary_around_the_norm_of_the_mean() -> None:
    """Projections on the mean (0, 2, 0) of spikes (1, 2, 0) and (0, 3, 4), and on a mean that is its only spike."""
    label, weight = np.array([0, 0, 1]), np.array([3.0, 1.0, 7.0])
    mean = np.array([[0, 2, 0], [0, 0, 5]], np.float32)
    assert score_variances(rows_of_three(), label, weight, mean).tolist() == [(3 * 0 + 1 * 1) / 4, 0]


def test_no_spikes_make_no_clusters() -> None:
    features, kind, channels = np.zeros((0, 2, 1), np.float32), np.zeros(0, np.int64), np.array([[2, 5]])
    rows = scattered_rows(features, kind, channels, np.array([2, 5, 6]), 8, "cpu")
    mean, count = cluster_means(rows, np.zeros(0, np.int64), np.zeros(0))
    assert (mean.shape, count.shape) == ((0, 3), (0,))
    assert score_variances(rows, np.zeros(0, np.int64), np.zeros(0), mean).shape == (0,)


# -- when and where spikes were recorded -------------------------------------------------------------

TILING = Tiling(start=1000, stop=1400, size=100, halo=0, n_tiles=4)
SAMPLE = np.array([1000, 1099, 1100, 1250, 1399])


def test_without_drift_nothing_is_displaced() -> None:
    still = Drift(np.zeros((4, 1), np.float32), np.array([50], np.float32))
    for drift in (None, still):
        conditions = Circumstances(TILING, 25_000.0, drift).of(SAMPLE, 80.0)
        assert conditions.sample is SAMPLE and conditions.sampling_rate_hz == 25_000
        assert conditions.displacement_um.tolist() == [0] * 5
        assert conditions.elapsed.tolist() == pytest.approx([0, 0.2475, 0.25, 0.625, 0.9975])


def test_tissue_is_displaced_against_the_shift_of_its_batch() -> None:
    drift = Drift(np.array([[0], [3], [-5], [2]], np.float32), np.array([50], np.float32))
    conditions = Circumstances(TILING, 25_000.0, drift).of(SAMPLE, 80.0)
    assert conditions.displacement_um.tolist() == [0, 0, -3, 5, -2]
    assert conditions.displacement_um.dtype == np.float32


@pytest.mark.parametrize(
    ("shift_um", "known"),
    [
        ([0, 2, 4, 6], [True] * 4),
        ([0, 4, 8, 12], [True] * 4),  # 8 µm in three batches
        ([0, 0, 9, 9], [True, False, False, True]),
        ([0, 0, 0, 9], [True, True, False, False]),
        ([0, 5, 10, 10], [True, False, True, True]),
        ([9, 0, 9, 9], [False, False, False, True]),
    ],
)
def test_displacements_are_not_known_while_the_tissue_jumps(shift_um: list[float], known: list[bool]) -> None:
    drift = Drift(np.array(shift_um, np.float32)[:, None], np.array([50], np.float32))
    conditions = Circumstances(TILING, 25_000.0, drift).of(np.array([1050, 1150, 1250, 1350]), 80.0)
    assert (~np.isnan(conditions.displacement_um)).tolist() == known
    np.testing.assert_array_equal(conditions.displacement_um[known], -np.array(shift_um)[known])


@pytest.mark.parametrize(("depth_um", "moved_um"), [(100, -10), (150, -15), (200, -20), (125, -12.5), (50, -5)])
def test_displacements_are_interpolated_between_depths(depth_um: float, moved_um: float) -> None:
    shift_um = np.array([[10, 20]] * 3 + [[11, 21]], np.float32)
    conditions = Circumstances(TILING, 25_000.0, Drift(shift_um, np.array([100, 200], np.float32))).of(SAMPLE, depth_um)
    assert conditions.displacement_um.tolist() == pytest.approx([moved_um] * 4 + [moved_um - 1])


def test_batches_that_are_left_out_share_the_shift_of_those_before() -> None:
    tiling = Tiling(start=0, stop=400, size=100, halo=0, n_tiles=2, step=2)
    drift = Drift(np.array([[1], [4]], np.float32), np.array([50], np.float32))
    conditions = Circumstances(tiling, 25_000.0, drift).of(np.array([50, 150, 250]), 0.0)
    assert conditions.displacement_um.tolist() == [-1, -1, -4]


def test_no_spikes_have_no_conditions() -> None:
    drift = Drift(np.ones((4, 1), np.float32), np.array([50], np.float32))
    conditions = Circumstances(TILING, 25_000.0, drift).of(np.zeros(0, np.int64), 0.0)
    assert [len(conditions.sample), len(conditions.displacement_um), len(conditions.elapsed)] == [0, 0, 0]


# -- the method --------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [False, True])
def test_the_method_reads_what_its_clusters_depend_on(final: bool) -> None:
    settings = Settings(cluster_neighbors=7, ccg_threshold=0.1)
    method = GraphClustering(settings, final=final)
    assert method.settings == settings.part(*method.reads, *["ccg_threshold"] * final)
    assert method.settings.cluster_neighbors == 7


def test_the_method_clusters_rows_with_their_conditions() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(200, 2, 3)).astype(np.float32)
    features[:, 0, 0] += 15
    truth = draw.permutation(200) % 2
    features[:, 1, 2] += 15 * truth
    rows = scattered_rows(features, np.zeros(200, np.int64), np.array([[0, 1]]), np.array([0, 1]), 2, "cpu")
    conditions = Circumstances(Tiling(0, 20_000, 1000, 0, 20), 25_000.0).of(np.arange(200) * 100, 0.0)
    components = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    for final in (False, True):
        for known in (None, components):
            label = GraphClustering(Settings(), final=final)(rows, conditions, components=known)
            assert label.max() == 1
            assert len(np.unique(2 * label + truth)) == 2
