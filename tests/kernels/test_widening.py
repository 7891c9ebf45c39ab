"""What templates are on other channels: least squares over their spikes, and nothing that noise would explain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ks4stream.kernels.matching import TileSpikes
from ks4stream.kernels.widening import (
    FIXED_POINT,
    FROM_AMPLITUDE,
    FROM_SCORE,
    MIN_SQUARES,
    Sums,
    is_used,
    sums_over,
    widened,
)


def spikes_of(unit: list[int], amplitude: Tensor) -> TileSpikes:
    n = len(unit)
    return TileSpikes(torch.zeros(n, dtype=torch.int64), torch.tensor(unit), torch.full((n,), 20.0), amplitude)


def test_only_large_spikes_are_used() -> None:
    score = torch.tensor([FROM_SCORE, FROM_SCORE + 0.1, FROM_SCORE + 0.1])
    amplitude = torch.tensor([1.0, 1.0, FROM_AMPLITUDE])
    zeros = torch.zeros(3, dtype=torch.int64)
    assert is_used(TileSpikes(zeros, zeros, score, amplitude)).tolist() == [False, True, False]


def test_sums_by_hand() -> None:
    spikes = spikes_of([1, 1, 0], torch.tensor([1.0, 2.0, 0.5]))
    features = torch.tensor([[[3.0]], [[5.0]], [[7.0]]])
    sums = sums_over(spikes, features, 3)
    assert (sums.product[:, 0, 0] / FIXED_POINT).tolist() == [3.5, 13.0, 0.0]
    assert (sums.square / FIXED_POINT).tolist() == [0.25, 5.0, 0.0]


def test_sums_do_not_depend_on_the_order_or_the_grouping() -> None:
    rng = np.random.default_rng(1)
    unit = rng.integers(0, 3, 500)
    spikes = spikes_of(unit.tolist(), torch.from_numpy(rng.uniform(0.5, 2, 500).astype(np.float32)))
    features = torch.from_numpy(rng.normal(0, 30, (500, 4, 6)).astype(np.float32))
    whole = sums_over(spikes, features, 3)
    order = torch.from_numpy(rng.permutation(500))
    parts = [sums_over(spikes.at(index), features[index], 3) for index in torch.split(order, 77)]
    for total, *of_parts in zip(whole, *parts, strict=True):
        assert torch.equal(total, sum(of_parts))


TEMPLATE = torch.tensor([[[20.0, 0.0], [8.0, 2.0], [3.0, -4.0], [0.0, 0.0]]])  # (1, c, q)
CHANNELS = torch.tensor([[0, 1, 2, 3, -1]])


def sums_of(n_spikes: int, seed: int = 2) -> Sums:
    """Of spikes of the template, with noise, also where there is no channel."""
    rng = np.random.default_rng(seed)
    amplitude = torch.from_numpy(rng.uniform(0.9, 1.1, n_spikes).astype(np.float32))
    features = amplitude[:, None, None] * torch.cat([TEMPLATE, 50 + TEMPLATE[:, :1]], dim=1)
    features += torch.from_numpy(rng.normal(size=features.shape).astype(np.float32))
    return sums_over(spikes_of([0] * n_spikes, amplitude), features, 1)


def test_the_missing_channels_are_found_and_the_others_stay_as_they_were() -> None:
    narrow = TEMPLATE.clone()
    narrow[:, 2:] = 0
    narrow[:, 1] *= 0.5  # known, even if it is not what the spikes say
    wide = widened(narrow, sums_of(200), CHANNELS)
    assert torch.equal(wide[:, :2], narrow[:, :2])
    # Noise of 1 in each of 200 spikes, less 0.02 / 25 of the value for the energy of noise: 5 standard errors.
    assert wide[0, 2].tolist() == pytest.approx([3.0, -4.0], abs=5 / np.sqrt(200))
    assert (wide[0, 3].abs() < 5 / np.sqrt(200)).all()


def test_channels_that_noise_explains_stay_empty() -> None:
    """Energies of the mean of noise have the distribution of χ² / 200; with 6 components, 95 % are below 2.1 · 6."""
    filled = 0
    for seed in range(200):
        noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(200, 1, 6)).astype(np.float32))
        sums = sums_over(spikes_of([0] * 200, torch.ones(200)), noise, 1)
        filled += int(widened(torch.zeros(1, 1, 6), sums, torch.tensor([[0]])).any())
    assert 0 < filled <= 0.1 * 200


def test_a_few_spikes_say_nothing() -> None:
    enough, few = (widened(torch.zeros_like(TEMPLATE), sums_of(n), CHANNELS) for n in (15, int(0.8 * MIN_SQUARES)))
    assert enough[0, 0].any() and not few.any()
