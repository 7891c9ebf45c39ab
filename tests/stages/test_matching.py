"""Spikes at borders count once, however tiles are grouped into tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import RunHere

from ks4stream.blocks import Tile, Tiling
from ks4stream.geometry import Regions
from ks4stream.io.tables import read_column
from ks4stream.results import Templates, Waveforms
from ks4stream.settings import Settings
from ks4stream.simulate import linear_probe
from ks4stream.stages.matching import InTile, Match
from ks4stream.stages.thresholds import Thresholds

NT, SIZE, PEAK, N_UNITS = 11, 44, 3, 2  # the shortest batch there may be, of four waveforms
SPIKES = st.lists(
    st.tuples(
        st.integers(0, 7 * SIZE - 1),  # where it is
        st.integers(0, N_UNITS - 1),
        st.integers(-4, 4),  # and how much later each of two tiles has it
        st.integers(-4, 4),
    ),
    max_size=60,
)


@dataclass(frozen=True, eq=False)
class Reports(Match):
    """Uses given spikes, a separate version for each tile, instead of matching the traces."""

    given: tuple[tuple[int, int, int, int], ...] = ()

    def _in_tile(self, tile: Tile) -> InTile:
        rows = np.array(self.given, np.int64).reshape(-1, 4)
        sample = rows[:, 0] + rows[:, 2 + tile.index % 2]
        number = np.arange(len(rows))[(sample >= tile.start - NT) & (sample < tile.stop + NT)]
        number = number[np.argsort(sample[number], kind="stable")]
        sample = sample[number]
        columns = {
            "sample": sample,
            "template": rows[number, 1].astype(np.int32),
            "number": number,
            "counts": (sample >= tile.start) & (sample < tile.stop),
        }
        return InTile(columns, np.zeros((0, 2), np.int64), np.zeros((2, 1), np.float32))


def spikes(folder: Path, given: list[tuple[int, int, int, int]], tail: int, step: int, per_block: int) -> list[Any]:
    """What counts in the end: samples, templates and numbers, in order."""
    tiling = Tiling.of(n_samples=6 * SIZE + tail, size=SIZE, halo=NT, shortest=NT, step=step)
    probe = linear_probe(N_UNITS)
    tiles: Any = SimpleNamespace(
        tiling=tiling, read_ahead=lambda block, folder: block, probe=probe, sampling_rate_hz=30_000.0
    )
    tiles.without_signal = np.zeros(0, np.int64)
    each = np.eye(N_UNITS, dtype=np.float32)[:, :, None]  # a template on each channel
    regions = Regions(probe.positions_um, np.zeros(N_UNITS, np.int64), np.arange(N_UNITS))
    waveforms = Waveforms(np.ones((1, NT)), np.ones((1, NT)))
    chosen = Settings(nt=NT, nt0min=PEAK, batch_size=SIZE, n_pcs=1)
    templates, thresholds = Templates(each, np.ones(N_UNITS), np.ones(N_UNITS)), Thresholds(np.full(N_UNITS, 8.0))
    match = Reports(chosen, tiles, waveforms, templates, regions, thresholds, tuple(given))
    matched = match.run(RunHere(folder, per_block))
    rows: list[Any] = []
    for receipt, dropped in zip(matched.receipts, matched.dropped, strict=True):
        columns = [read_column(receipt, name) for name in ("sample", "template", "number")]
        rows += zip(*(np.delete(column, dropped).tolist() for column in columns), strict=True)
    return sorted(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(SPIKES, st.integers(NT, SIZE), st.integers(1, 2), st.integers(2, 7))
def test_the_same_spikes_for_any_cutting(
    folder: Path, given: list[tuple[int, int, int, int]], tail: int, step: int, per_block: int
) -> None:
    """The tail may be as short as one waveform; if only every second batch is sorted, no two are adjacent."""
    assert spikes(folder, given, tail, step, per_block) == spikes(folder, given, tail, step, 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sets(st.integers(1, 29), max_size=20), st.data())
def test_what_tiles_place_differently_counts_once(folder: Path, places: set[int], data: st.DataObject) -> None:
    """Spikes far enough apart to be distinct, whose versions are close enough to be the same spike."""
    first, late = data.draw(st.integers(0, 8)), st.integers(0, PEAK)
    given = [
        (first + 9 * place, data.draw(st.integers(0, 1)), data.draw(late), data.draw(late)) for place in sorted(places)
    ]
    for per_block in (1, 3):
        matched = spikes(folder, given, SIZE, 1, per_block)
        assert sorted(number for _, _, number in matched) == list(range(len(given)))


def match_of(traces: torch.Tensor, weights: list[list[float]], threshold: list[float], spread: float) -> Match:
    """Matches one tile of two channels, with templates that are single samples."""
    n_units = len(weights)
    tiling = Tiling.of(n_samples=60, size=60, halo=0, shortest=NT)
    probe = linear_probe(2)
    tiles: Any = SimpleNamespace(tiling=tiling, probe=probe, device="cpu", without_signal=np.zeros(0, np.int64))
    tiles.whitened = lambda tile: (traces, torch.zeros(60, dtype=torch.bool))
    tiles.core = lambda tile: slice(0, 60)
    tiles.moving_matrix = lambda tile: None
    tiles.without_spikes = lambda blank, nt: blank
    tiles.away_from_edges = lambda tile, sample, blank, nt: torch.ones(len(sample), dtype=torch.bool)
    delta = np.zeros((1, NT), np.float32)
    delta[0, NT // 2] = 1
    templates = Templates(
        np.array(weights, np.float32)[:, :, None], np.ones(n_units), np.full(n_units, spread, np.float32)
    )
    regions = Regions(probe.positions_um, np.zeros(2, np.int64), np.arange(2))
    chosen = Settings(nt=NT, nt0min=PEAK, n_pcs=1, nearest_chans=2)
    return Match(chosen, tiles, Waveforms(delta, delta), templates, regions, Thresholds(np.array(threshold)))


def test_what_is_below_its_threshold_does_not_count_and_stays_in_the_features_of_others() -> None:
    traces = torch.zeros(2, 60)
    traces[:, 30] = torch.tensor([20.0, 7.0])
    for threshold, found, features in ((6.0, [0, 1], [[20, 0], [7, 0]]), (7.5, [0], [[20, 7]])):
        match = match_of(traces, [[20.0, 0.0], [0.0, 9.0]], [12.0, threshold], spread=2.0)
        rows = match._in_tile(match.tiles.tiling[0]).rows
        assert rows["template"].tolist() == found
        assert rows["sample"].tolist() == [30 - NT // 2 + PEAK] * len(found)
        assert rows["score"].tolist() == [20, 7][: len(found)]
        assert rows["features"][:, :, 0].tolist() == features, "on the template's largest channel, and the other"


@pytest.mark.parametrize(
    ("large", "small", "kept"), [(20, 5.5, 0), (30, 5.5, 5.5), (30, 7, 0), (60, 5.5, 5.5), (60, 7, 7), (60, 13, 0)]
)
def test_features_of_large_spikes_keep_what_far_smaller_ones_explain(large: float, small: float, kept: float) -> None:
    traces = torch.zeros(2, 60)
    traces[:, 30] = torch.tensor([large, small])
    match = match_of(traces, [[large, 0.0], [0.0, small]], [5.0, 5.0], spread=2.0)
    rows = match._in_tile(match.tiles.tiling[0]).rows
    assert rows["template"].tolist() == [0, 1]
    assert rows["features"][:, :, 0].tolist() == [[large, kept], [small, 0.0]]


def test_in_moved_traces_scores_are_relative_to_the_noise() -> None:
    """Half of the noise is left on the first channel: what is 4 is 8 times the noise."""
    traces = torch.zeros(2, 60)
    traces[0, 30], traces[1, 15] = 4.0, 4.0
    match = match_of(traces, [[10.0, 0.0], [0.0, 10.0]], [6.0, 6.0], spread=100.0)
    assert len(match._in_tile(match.tiles.tiling[0]).rows["score"]) == 0
    match.tiles.moving_matrix = lambda tile: torch.diag(torch.tensor([0.5, 1.0]))  # type: ignore[method-assign]
    rows = match._in_tile(match.tiles.tiling[0]).rows
    assert (rows["template"].tolist(), rows["score"].tolist()) == ([0], [8.0])
    assert rows["features"][:, :, 0].tolist() == [[4, 0]], "what is there, whatever the noise"


def test_energy_is_that_of_the_noise_wherever_traces_are_moved() -> None:
    """What a spike explains is left out; interpolation that halves the noise of a channel does not count."""
    traces = torch.zeros(2, 60)
    traces[0, 20], traces[1, 40], traces[0, 45] = 10.0, 1.0, 1.0
    match = match_of(traces, [[10.0, 0.0], [0.0, 10.0]], [6.0, 6.0], spread=100.0)
    n_samples = match.tiles.tiling[0].stop - match.tiles.tiling[0].start
    found = match._in_tile(match.tiles.tiling[0]).energy
    np.testing.assert_allclose(found * n_samples, [[101, 1], [1, 1]], rtol=1e-5)
    match.tiles.moving_matrix = lambda tile: torch.diag(torch.tensor([0.5, 1.0]))  # type: ignore[method-assign]
    found = match._in_tile(match.tiles.tiling[0]).energy
    np.testing.assert_allclose(found * n_samples, [[404, 1], [4, 1]], rtol=1e-5)


def test_usual_amplitudes_are_those_of_the_templates() -> None:
    traces = torch.zeros(2, 60)
    traces[:, 30] = torch.tensor([10.5, 1.0])
    for spread, found in ((2.0, 1), (np.inf, 0)):
        match = match_of(traces, [[20.0, 2.0], [10.0, 0.0]], [5.0, 5.0], spread)
        assert match._in_tile(match.tiles.tiling[0]).rows["template"].tolist() == [found]
