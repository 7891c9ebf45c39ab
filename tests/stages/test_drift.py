"""The drift stage: fingerprints in memory and in a file tell the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ks4stream import Settings, simulate
from ks4stream.blocks import Tiling
from ks4stream.io.sources import ArraySource
from ks4stream.io.spikes import Receipt, write_block
from ks4stream.recording import Recording
from ks4stream.stages import drift
from ks4stream.stages.preprocessing import Preprocessor

SIZE, N_BATCHES, PER_BATCH = 1000, 40, 400


@pytest.fixture
def source() -> Preprocessor:
    probe = simulate.staggered_probe(32)
    recording = Recording(ArraySource.open(np.zeros((SIZE * N_BATCHES, 32), np.int16)), 30_000.0, probe)
    tiling = Tiling.of(n_samples=recording.n_samples, size=SIZE, halo=0, shortest=61)
    return Preprocessor(recording, tiling, Settings())


@pytest.fixture
def receipts(tmp_path: Path) -> list[Receipt]:
    """Peaks at twelve depths that all move by 20 µm halfway, in two blocks."""
    rng = np.random.default_rng(0)
    written = []
    for block in range(2):
        n = N_BATCHES // 2 * PER_BATCH
        patch = rng.integers(0, 12, n)
        columns: dict[str, NDArray[np.generic]] = {
            "sample": np.sort(rng.integers(0, SIZE * N_BATCHES // 2, n)) + block * SIZE * N_BATCHES // 2,
            "depth_um": (60 + 15 * patch + 20 * block + rng.normal(0, 2, n)).astype(np.float32),
            "score": (10 + 4 * patch + rng.normal(0, 1, n)).clip(9).astype(np.float32),
        }
        written.append(write_block(tmp_path / f"{block}.npz", columns, np.zeros(n, np.int64), 1))
    return written


def test_fingerprints_in_a_file_tell_the_same(
    source: Preprocessor, receipts: list[Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sample = drift.combine(source, receipts)
    moved = np.median(held.shift_um[20:]) - np.median(held.shift_um[:20])
    assert moved == pytest.approx(-20, abs=2.5)  # µm: back to where they were; half a depth bin
    monkeypatch.setattr(drift, "HELD_BYTES", 0)
    mapped, again = drift.combine(source, receipts)
    assert np.array_equal(held.shift_um, mapped.shift_um) and np.array_equal(sample.sample, again.sample)
