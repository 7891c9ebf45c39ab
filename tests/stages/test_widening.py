"""Templates get the channels on which their peaks had no features, however batches are grouped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import RunHere

from ks4stream.blocks import Tile, Tiling
from ks4stream.kernels.artifacts import widen as near
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import Settings
from ks4stream.simulate import linear_probe
from ks4stream.stages.needs import WIDE_CHANNELS
from ks4stream.stages.widening import MAX_BATCHES, MIN_BATCHES, Widen, chosen_batches

SIZE, NT, N_CHANNELS, N_BATCHES = 2000, 61, 40, 6
LARGE, SMALL = 20, 4  # largest channels of two neurons
WHOLE = np.zeros((2, N_CHANNELS, 2), np.float32)
WHOLE[0, :, 0] = 40 / (1 + np.abs(np.arange(N_CHANNELS) - LARGE))
WHOLE[1, 3:6, 1] = (3, 6, 3)  # too small to be used
KNOWN = np.abs(np.arange(N_CHANNELS) - np.array([[LARGE], [SMALL]])) <= 3
NARROW = np.where(KNOWN[:, :, None], WHOLE, 0)
rows = np.random.default_rng(1).normal(size=(2, NT))
COMPONENTS = np.linalg.qr(rows.T)[0].T.astype(np.float32)


def stage(templates: NDArray[np.float32] = NARROW, artifact: int | None = None) -> Widen:
    """On whitened traces in which the neurons fire alternately; around an artifact, channels are equally strong."""
    tiling = Tiling.of(n_samples=N_BATCHES * SIZE, size=SIZE, halo=200, shortest=NT)
    traces = np.random.default_rng(2).normal(size=(N_CHANNELS, N_BATCHES * SIZE)).astype(np.float32)
    for number, start in enumerate(range(100, N_BATCHES * SIZE - NT, 180)):
        traces[:, start : start + NT] += WHOLE[number % 2] @ COMPONENTS
    blank = np.zeros(N_BATCHES * SIZE, bool)
    if artifact is not None:
        blank[artifact - NT : artifact + NT] = True
        traces[:, artifact - NT // 2 : artifact - NT // 2 + NT] += 100 * COMPONENTS[0]

    def whitened(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        index = np.arange(tile.first, tile.first + tile.length).clip(0, N_BATCHES * SIZE - 1)
        return torch.from_numpy(np.ascontiguousarray(traces[:, index])), torch.from_numpy(blank[index])

    probe = linear_probe(N_CHANNELS)
    tiles: Any = SimpleNamespace(tiling=tiling, probe=probe, device="cpu", without_signal=np.zeros(0, np.int64))
    tiles.read_ahead, tiles.whitened, tiles.moving_matrix = lambda block, folder: block, whitened, lambda tile: None
    tiles.away_from_edges = lambda tile, sample, blank, nt: ~near(blank, nt // 4)[sample]
    n = len(templates)
    known = Templates(templates, np.ones(n), np.full(n, np.inf, np.float32))
    settings = Settings(nt=NT, nt0min=20, nearest_chans=6)
    return Widen(settings, tiles, Waveforms(COMPONENTS, COMPONENTS), known)


def test_a_large_template_gets_its_channels_and_a_small_one_stays_as_it_was(tmp_path: Path) -> None:
    wide = stage().run(RunHere(tmp_path)).features
    np.testing.assert_array_equal(wide[KNOWN], NARROW[KNOWN])
    np.testing.assert_array_equal(wide[1], NARROW[1])
    assert np.array_equal(np.flatnonzero(wide[0].any(axis=1) & (WHOLE[0, :, 0] > 3)), np.arange(LARGE - 12, LARGE + 13))
    n_spikes = N_BATCHES * SIZE / 360
    error = np.linalg.norm(wide[0] - WHOLE[0], axis=1)
    reached = np.argsort(np.abs(np.arange(N_CHANNELS) - LARGE))[:WIDE_CHANNELS]
    # The energy of noise in two components is 2 / n on average; of 32 channels, the largest may have 4 times as much in
    # amplitude. Channels with less than twice that energy are left out.
    assert error[reached].max() < 4 * np.sqrt(2 / n_spikes)
    assert np.linalg.norm(wide[0] - WHOLE[0]) < 0.5 * np.linalg.norm(NARROW[0] - WHOLE[0])


@pytest.mark.parametrize("per_block", [2, 4, 6])
def test_the_same_bytes_for_any_grouping(tmp_path: Path, per_block: int) -> None:
    widen = stage()
    totals = []
    for blocks in (1, per_block):
        sums = [widen.task(item, tmp_path) for item in widen.items(RunHere(tmp_path, blocks))]
        totals.append([sum(part) for part in zip(*sums, strict=True)])
    for one, other in zip(*totals, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.any()


def test_spikes_near_artifacts_are_not_used(tmp_path: Path) -> None:
    """It is 100 on all channels, where a spike is 40 on one."""
    usual, disturbed = (stage(artifact=artifact).run(RunHere(tmp_path)).features for artifact in (None, 5 * SIZE + 900))
    np.testing.assert_allclose(disturbed, usual, atol=0.5)  # noise, 1 / √33 in each value; the artifact would add 3


def test_only_what_matching_leaves_is_added(tmp_path: Path) -> None:
    """A neuron that always fires with another one does not become a part of it."""
    together = np.zeros((2, N_CHANNELS, 2), np.float32)
    together[0], together[1] = NARROW[0], np.where(KNOWN[0, :, None], 0, WHOLE[0])
    wide = stage(together).run(RunHere(tmp_path)).features
    np.testing.assert_allclose(wide[0], NARROW[0], atol=1.0)  # 6 standard errors of 1 / √33; without matching, 8


def test_what_a_larger_template_leaves_is_not_added_to_a_small_one(tmp_path: Path) -> None:
    """A template that finds a part of a large neuron does not get the rest of what the neuron's template lacks."""
    part = np.zeros((N_CHANNELS, 2), np.float32)
    part[LARGE + 4 : LARGE + 8] = WHOLE[0, LARGE + 4 : LARGE + 8]  # norm 12.9, so that most scores are large enough
    alone = stage(part[None]).run(RunHere(tmp_path / "alone")).features
    beside = stage(np.stack([NARROW[0], part])).run(RunHere(tmp_path / "beside")).features
    assert np.linalg.norm(alone[0]) > 50, "the whole neuron"
    np.testing.assert_array_equal(beside[1], part)


def test_without_templates_nothing_is_matched(tmp_path: Path) -> None:
    nothing = stage(NARROW[:0])
    assert nothing.items(RunHere(tmp_path)) == []
    assert nothing.run(RunHere(tmp_path)).features.shape == (0, N_CHANNELS, 2)


def test_of_a_long_recording_some_batches_are_enough() -> None:
    for n_batches in (1, MIN_BATCHES, 1000, 100 * MAX_BATCHES):
        chosen = chosen_batches(Tiling.of(n_samples=n_batches * SIZE, size=SIZE, halo=0, shortest=NT))
        assert min(n_batches, MIN_BATCHES) <= len(chosen) <= MAX_BATCHES
        assert len(set(np.diff(chosen).tolist())) <= 2, "evenly spread"
