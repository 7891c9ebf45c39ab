"""Tests of ks4stream.kernels.clustering."""

from __future__ import annotations

import numpy as np
import torch

from ks4stream.kernels.clustering import DenseRows, cluster_region


def blobs(*sizes: int, d: int = 12, distance: float = 12.0, seed: int = 0) -> tuple[DenseRows, np.ndarray]:
    """Gaussian clouds of unit variance on a line, mixed in time."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=generator)]
    x = torch.randn((len(label), d), generator=generator)
    x[:, 0] += distance * label
    return DenseRows(x), label.numpy()


def test_separate_clouds_are_found() -> None:
    rows, truth = blobs(1500, 800, 200)
    found = cluster_region(rows)
    assert found.max() == 2
    assert len(np.unique(found * 10 + truth)) == 3


def test_nothing_and_few_spikes_are_one_cluster() -> None:
    for n in (0, 1, 2):
        assert cluster_region(DenseRows(torch.zeros(n, 6))).tolist() == [0] * n
