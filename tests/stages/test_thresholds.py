"""Thresholds are those of the scores in some of the batches, and a number is the threshold of all templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import RunHere

from ks4stream.blocks import Tile, Tiling
from ks4stream.geometry import Regions
from ks4stream.io.recordings import open_recording
from ks4stream.kernels import thresholds as kernels
from ks4stream.kernels.matching import TileSpikes
from ks4stream.kernels.thresholds import LOWEST, LOWEST_SMALL, WITHOUT_NEURON
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import Settings
from ks4stream.simulate import linear_probe, simulate
from ks4stream.sorter import prepare
from ks4stream.stages.matching import Match
from ks4stream.stages.thresholds import MAX_BATCHES, MIN_BATCHES, SetThresholds, Thresholds, chosen_batches
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

NT, SIZE = 61, 1000


@dataclass(frozen=True, eq=False)
class WithScores(SetThresholds):
    """Finds given spikes (sample, template, score) instead of matching the traces, in the halo as well."""

    given: tuple[NDArray[Any], ...] = ()

    def matched(self, traces: Any, tile: Tile) -> TileSpikes:
        sample = self.given[0] - tile.first
        here = (sample >= 0) & (sample < tile.length)
        columns = (torch.from_numpy(column[here]) for column in (sample, *self.given[1:], self.given[-1]))
        return TileSpikes(*columns)


def stage(
    n_batches: int, *given: NDArray[Any], n_templates: int = 3, norm: float = 60.0, **settings: Any
) -> WithScores:
    tiling = Tiling.of(n_samples=n_batches * SIZE, size=SIZE, halo=200, shortest=NT)
    tiles: Any = SimpleNamespace(tiling=tiling, read_ahead=lambda block, folder: block)
    tiles.whitened = lambda tile: (None, None)
    tiles.away_from_edges = lambda tile, sample, blank, nt: torch.ones(len(sample), dtype=torch.bool)
    templates = Templates(np.full((n_templates, 1, 1), norm, np.float32), np.ones(n_templates), np.ones(n_templates))
    waveforms = Waveforms(np.ones((1, NT)), np.ones((1, NT)))
    return WithScores(Settings(nt=NT, nt0min=NT // 2, **settings), tiles, waveforms, templates, given)


def threshold_of(score: NDArray[np.float32], lowest: float = LOWEST) -> float:
    counts = kernels.histograms(score, np.zeros(len(score), np.int32), np.array([lowest]))
    return float(kernels.thresholds(counts, np.array([lowest]))[0])


def scores(mean: float, n: int, n_background: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    neuron, background = rng.normal(mean, 1, n), LOWEST + rng.exponential(0.5, n_background)
    return rng.permutation(np.concatenate([neuron[neuron > LOWEST], background])).astype(np.float32)


@pytest.mark.parametrize("per_block", [1, 7, 60])
def test_a_template_has_the_threshold_of_all_of_its_spikes_however_tiles_are_grouped(
    tmp_path: Path, per_block: int
) -> None:
    of_template = [scores(7.5, 300, 200, 1), scores(9, 300, 2000, 2)]  # of templates 0 and 1; 2 has none
    score = np.concatenate(of_template)
    template = np.repeat([0, 1], [len(part) for part in of_template])
    sample = np.random.default_rng(3).integers(0, MIN_BATCHES * SIZE, len(score))  # near borders, too
    found = stage(MIN_BATCHES, sample, template, score).run(RunHere(tmp_path, per_block)).score.tolist()
    alone = [threshold_of(part) for part in of_template]
    assert found == [*alone, WITHOUT_NEURON]
    assert LOWEST < alone[0] < alone[1]


def test_small_templates_are_matched_and_fitted_from_lower_scores_on(tmp_path: Path) -> None:
    score = (scores(7.0, 400, 200, 5) - (LOWEST - LOWEST_SMALL)).astype(np.float32)
    sample = np.random.default_rng(6).integers(0, MIN_BATCHES * SIZE, len(score))
    small = stage(MIN_BATCHES, sample, np.zeros(len(score), np.int64), score, n_templates=1, norm=6.0)
    assert small.lowest.tolist() == [LOWEST_SMALL]
    found = small.run(RunHere(tmp_path)).score.tolist()
    assert found == [threshold_of(score, LOWEST_SMALL)]
    assert LOWEST_SMALL < found[0] < LOWEST


def test_of_a_long_recording_some_batches_are_enough(tmp_path: Path) -> None:
    """Spikes elsewhere, which look like background, have no say."""
    long = stage(5 * MIN_BATCHES).tiles.tiling
    chosen = chosen_batches(long)
    others = np.setdiff1d(np.arange(len(long)), chosen)
    score = scores(7.5, 600, 400, 3)
    rng = np.random.default_rng(4)
    sample = rng.choice(chosen, len(score)) * SIZE + rng.integers(250, 750, len(score))
    elsewhere = rng.choice(others, 5000) * SIZE + 500
    columns = (
        np.concatenate([sample, elsewhere]),
        np.zeros(len(score) + 5000, np.int64),
        np.concatenate([score, np.full(5000, LOWEST + 0.01, np.float32)]),
    )
    found = stage(len(long), *columns, n_templates=1).run(RunHere(tmp_path))
    assert found.score.tolist() == [threshold_of(score)]


def test_the_batches_are_spread_evenly() -> None:
    for n_batches in (1, MIN_BATCHES - 1, MIN_BATCHES, 1000, 100 * MAX_BATCHES):
        chosen = np.array(chosen_batches(Tiling.of(n_samples=n_batches * SIZE, size=SIZE, halo=0, shortest=NT)))
        assert min(n_batches, MIN_BATCHES) <= len(chosen) <= MAX_BATCHES
        steps = np.diff(chosen)
        assert len(steps) == 0 or np.ptp(steps) <= 1


def test_a_number_is_the_threshold_of_all_and_nothing_is_matched(tmp_path: Path) -> None:
    with_number = stage(MIN_BATCHES, Th_learned=8)
    assert with_number.items(RunHere(tmp_path)) == []
    assert with_number.run(RunHere(tmp_path)).score.tolist() == [8.0] * 3


def test_spikes_near_artifacts_have_no_say(tmp_path: Path) -> None:
    score = scores(7.5, 300, 200, 7)
    sample = np.random.default_rng(8).integers(0, MIN_BATCHES * SIZE, len(score) + 500)
    near = np.arange(len(sample)) >= len(score)
    columns = (sample, np.zeros(len(sample), np.int64), np.append(score, np.full(500, 5.01, np.float32)))
    chosen = stage(MIN_BATCHES, *columns, n_templates=1)
    tiles: Any = chosen.tiles
    places = set(sample[near].tolist())
    tiles.away_from_edges = lambda tile, at, blank, nt: torch.tensor([int(a) + tile.first not in places for a in at])
    sample[~near & np.isin(sample, sample[near])] += 1
    found = chosen.run(RunHere(tmp_path)).score
    assert found.tolist() == [threshold_of(score)]


def test_without_spikes_or_templates_there_is_nothing_to_set(tmp_path: Path) -> None:
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert stage(MIN_BATCHES, *nothing).run(RunHere(tmp_path)).score.tolist() == [WITHOUT_NEURON] * 3
    assert stage(MIN_BATCHES, *nothing, n_templates=0).run(RunHere(tmp_path)).score.tolist() == []


@pytest.mark.parametrize("per_block", [1, 4])
def test_the_spikes_of_a_tile_and_its_halo_are_kept_for_matching(tmp_path: Path, per_block: int) -> None:
    rng = np.random.default_rng(6)
    given = (rng.integers(0, 500 * SIZE, 9000), rng.integers(0, 3, 9000), rng.uniform(5, 20, 9000).astype(np.float32))
    chosen = stage(500, *given)
    thresholds = chosen.run(RunHere(tmp_path, per_block))
    tiling = chosen.tiles.tiling
    kept = [index for index in range(len(tiling)) if thresholds.spikes_of(tiling[index], "cpu") is not None]
    assert kept == chosen_batches(tiling)
    for index in kept:
        spikes = thresholds.spikes_of(tiling[index], "cpu")
        assert spikes is not None
        for column, found in zip(chosen.matched(None, tiling[index]), spikes, strict=True):
            assert torch.equal(column, found)


@pytest.mark.slow
def test_matching_uses_these_spikes_and_would_find_the_same(tmp_path: Path) -> None:
    """With real traces: what was kept, and what matching again finds, to the last byte."""
    settings = Settings(batch_size=15_000, nblocks=0)
    probe = linear_probe(8)
    simulated = simulate(probe, 4.0, seed=1, n_units=4)
    tiles = prepare(open_recording(simulated.traces, fs=30_000, probe=probe), settings)
    here = RunHere(tmp_path, 3)
    tiles = tiles.with_whitening(LearnWhitening(settings, tiles).run(here))
    waveforms = LearnWaveforms(settings, tiles).shipped()
    features = np.zeros((8, 8, 6), np.float32)
    features[np.arange(8), np.arange(8), 0] = 20.0  # one per channel
    templates = Templates(features, np.ones(8), np.full(8, np.inf, np.float32))
    regions = Regions(probe.positions_um[::4], np.zeros(2, np.int64), np.repeat([0, 1], 4))
    thresholds = SetThresholds(settings, tiles, waveforms, templates).run(here)
    assert [len(of_block) for of_block in thresholds.tile_indices] == [3, 3, 2]

    class Again(Match):
        def matched(self, traces: Any, tile: Tile) -> TileSpikes:
            raise AssertionError("all tiles have been matched")

    kept = Again(settings, tiles, waveforms, templates, regions, thresholds).run(here)
    digests = [receipt.digest() for receipt in kept.receipts]
    assert kept.of_region.sum() > 100
    for n_kept in (2, 0):  # blocks; those of matching have borders between tiles that were kept and others
        score, indices, receipts = thresholds.score, thresholds.tile_indices[:n_kept], thresholds.receipts[:n_kept]
        again = Match(settings, tiles, waveforms, templates, regions, Thresholds(score, indices, receipts)).run(here)
        assert digests == [receipt.digest() for receipt in again.receipts]
        assert [rows.tolist() for rows in kept.dropped] == [rows.tolist() for rows in again.dropped]
