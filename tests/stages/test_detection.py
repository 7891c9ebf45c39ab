"""Peaks are the same whatever the threshold of a batch, but for small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from runs import RunHere

from ks4stream.io.recordings import open_recording
from ks4stream.io.tables import read_column
from ks4stream.kernels.thresholds import HIGHEST_PEAK
from ks4stream.pipeline import layout
from ks4stream.settings import Settings
from ks4stream.simulate import linear_probe, simulate
from ks4stream.sorter import prepare
from ks4stream.stages import small_peaks
from ks4stream.stages.detection import Detect, Peaks
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Preprocessor:
    """Eight batches of half a second, whitened."""
    settings, probe = Settings(batch_size=15_000, nblocks=0), linear_probe(16)
    prepared = prepare(open_recording(simulate(probe, 4.0, seed=1, n_units=4).traces, fs=30_000, probe=probe), settings)
    return prepared.with_whitening(LearnWhitening(settings, prepared).run(RunHere(tmp_path_factory.mktemp("run"), 3)))


def detected(tiles: Preprocessor, folder: Path, per_block: int) -> Peaks:
    waveforms = LearnWaveforms(Settings(), tiles).shipped()
    return Detect(Settings(), tiles, waveforms, *layout(tiles, Settings())).run(RunHere(folder, per_block))


def columns(peaks: Peaks) -> dict[str, NDArray[np.generic]]:
    """In order of time."""
    found = {
        name: np.concatenate([read_column(receipt, name) for receipt in peaks.receipts])
        for name in ("sample", "centre", "depth_um", "score", "features")
    }
    order = np.lexsort((found["centre"], found["sample"]))
    return {name: column[order] for name, column in found.items()}


@pytest.mark.parametrize("per_block", [1, 3])
def test_the_others_have_the_same_peaks_but_for_small_ones(
    tiles: Preprocessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_block: int
) -> None:
    everything = columns(detected(tiles, tmp_path / "all", 3))
    monkeypatch.setattr(small_peaks, "EVERY_BATCH", 3)
    monkeypatch.setattr(small_peaks, "MIN_SECONDS", 0.0)
    some = np.flatnonzero(small_peaks.complete_batches(Settings(), tiles.tiling, tiles.sampling_rate_hz))
    assert len(some) == 3
    found = columns(detected(tiles, tmp_path / "some", per_block))
    complete = np.isin(tiles.tiling.tile_of(everything["sample"]), some)
    large = everything["score"] > HIGHEST_PEAK
    assert np.sum(~complete & ~large) > 20
    assert np.sum(complete & ~large) > 10
    for name, column in found.items():  # float32; products of more rows are summed in another order
        np.testing.assert_allclose(column, everything[name][complete | large], rtol=1e-5, atol=1e-4)
