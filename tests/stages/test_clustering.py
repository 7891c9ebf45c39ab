"""Rows for the clustering of a region, and means of clusters."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.kernels.graph import ScatteredRows
from ks4stream.stages import clustering
from ks4stream.stages.clustering import cluster_means, scattered_rows


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


def test_no_spikes_make_no_clusters() -> None:
    features, kind, channels = np.zeros((0, 2, 1), np.float32), np.zeros(0, np.int64), np.array([[2, 5]])
    rows = scattered_rows(features, kind, channels, np.array([2, 5, 6]), 8, "cpu")
    mean, count = cluster_means(rows, np.zeros(0, np.int64), np.zeros(0))
    assert (mean.shape, count.shape) == ((0, 3), (0,))
