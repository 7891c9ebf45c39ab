"""The drift stage: fingerprints in memory and in a file give the same result."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from runs import RunHere

from ks4stream import Settings, simulate
from ks4stream.blocks import Tiling
from ks4stream.errors import DriftWarning
from ks4stream.io.sources import ArraySource
from ks4stream.io.tables import Receipt, read_column, write_block
from ks4stream.kernels.drift import segment_bounds
from ks4stream.recording import Recording
from ks4stream.simulate import staggered_probe
from ks4stream.stages import drift, registration
from ks4stream.stages.detection import Peaks
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor, tiling_of

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


def moved_by(tiles: Preprocessor, receipts: list[Receipt], scratch: Path) -> drift.DriftResult:
    return drift.EstimateDrift(Settings(), tiles, Peaks(receipts)).run(RunHere(scratch))


def test_fingerprints_in_a_file_tell_the_same(
    source: Preprocessor, receipts: list[Receipt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sample = moved_by(source, receipts, tmp_path)
    moved = np.median(held.shift_um[20:]) - np.median(held.shift_um[:20])
    assert moved == pytest.approx(-20, abs=2.5)  # µm: back to where they were; half a depth bin
    monkeypatch.setattr(registration, "HELD_BYTES", 0)
    mapped, again = moved_by(source, receipts, tmp_path)
    assert np.array_equal(held.shift_um, mapped.shift_um) and np.array_equal(sample.sample, again.sample)


@pytest.mark.parametrize(("threshold", "least"), [(4.0, 9.0), (9.0, 9.0), (12.0, 12.0)])
def test_small_peaks_do_not_count(
    source: Preprocessor, receipts: list[Receipt], tmp_path: Path, threshold: float, least: float
) -> None:
    """They are so many, at all depths, that fingerprints would be alike; fewer if detection finds larger ones only."""
    rng, settings = np.random.default_rng(1), Settings(Th_universal=threshold)
    large, n = {name: read_column(receipts[0], name) for name in ("sample", "depth_um", "score")}, 5000
    large["score"] = np.maximum(large["score"], np.float32(least))
    small = {
        "sample": np.sort(rng.integers(0, SIZE * N_BATCHES // 2, n)),
        "depth_um": rng.uniform(0, 300, n).astype(np.float32),
        "score": rng.uniform(threshold - 1, least, n).astype(np.float32),
    }
    small["score"][small["score"] >= least] = np.nextafter(np.float32(least), np.float32(0))
    order = np.argsort(np.concatenate([large["sample"], small["sample"]]), kind="stable")
    both = {name: np.concatenate([large[name], small[name]])[order] for name in large}
    counts = []
    for peaks in (large, both):
        estimator = registration.Registration(settings, source.tiling, source.probe)
        estimator.add(peaks["sample"], peaks["depth_um"], peaks["score"])
        counts.append(np.array(estimator._counts))
    assert counts[0].sum() == len(large["sample"])
    assert np.array_equal(*counts)


@pytest.mark.parametrize(("threshold", "n_small"), [("auto", 0), (7.0, N_BATCHES)])
def test_peaks_are_drawn_that_are_detected_in_all_batches(
    source: Preprocessor, tmp_path: Path, threshold: float | str, n_small: int
) -> None:
    """Small ones would be stripes over the batches in which they are looked for."""
    n = 2 * N_BATCHES
    columns = {
        "sample": np.arange(n) * (SIZE // 2),
        "depth_um": np.full(n, 60, np.float32),
        "score": np.tile(np.array([8, 20], np.float32), N_BATCHES),
    }
    peaks = Peaks([write_block(tmp_path / "a.npz", columns, np.zeros(n, np.int64), 1)])
    score = drift.EstimateDrift(Settings(Th_universal=threshold), source, peaks).run(RunHere(tmp_path)).peaks.score
    assert (np.sum(score == 8), np.sum(score == 20)) == (n_small, N_BATCHES)


def test_another_estimator_plans_with_its_own_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frugal(registration.Registration):
        @staticmethod
        def n_bytes(load: Load) -> tuple[int, int]:
            return 5, 7

    recording = Recording(ArraySource.open(np.zeros((SIZE * N_BATCHES, 32), np.int16)), 30_000.0, staggered_probe(32))
    load = Load(recording, Settings(), tiling_of(recording, Settings()), "cpu", 10.0)
    usual = drift.EstimateDrift.needs(load)
    assert (usual.name, usual.scratch_bytes) == ("drift", 0) and usual.client_bytes > 1000
    monkeypatch.setattr(drift, "DRIFT_METHOD", Frugal)
    assert drift.EstimateDrift.needs(load) == Needs("drift", client_bytes=5, scratch_bytes=7, work=usual.work)


def cut(peaks: dict[str, NDArray[np.generic]], folder: Path, tiles_per_block: int) -> list[Receipt]:
    """Peaks of one region as blocks of a number of batches write them."""
    block = peaks["sample"].astype(np.int64) // (SIZE * tiles_per_block)
    return [
        write_block(
            folder / f"{tiles_per_block}-{b}.rows",
            {name: v[block == b] for name, v in peaks.items()},
            np.zeros((block == b).sum(), np.int64),
            1,
        )
        for b in range(-(-N_BATCHES // tiles_per_block))
    ]


def faint(seed: int) -> dict[str, NDArray[np.generic]]:
    """Few peaks that move little, so that the decision whether there is drift is close."""
    rng = np.random.default_rng(seed)
    n = N_BATCHES * 11
    sample, patch = np.sort(rng.integers(0, SIZE * N_BATCHES, n)), rng.integers(0, 12, n)
    return {
        "sample": sample,
        "depth_um": (60 + 15 * patch + 20 * sample / (SIZE * N_BATCHES) + rng.normal(0, 2, n)).astype(np.float32),
        "score": (10 + 4 * patch + rng.normal(0, 1, n)).clip(9).astype(np.float32),
    }


def halves_that_disagree(source: Preprocessor, batches: list[int]) -> NDArray[np.uint16]:
    """Counts of neurons that move by up to 10 bins; in some batches, the odd peaks are 6 bins off."""
    estimator = registration.Registration(Settings(), source.tiling, source.probe)
    counts = np.zeros(estimator._counts.shape, np.uint16)
    place, level = np.arange(20, 45, 5), np.arange(0, 20, 4)
    for batch in range(N_BATCHES):
        moved = round(5 * np.sin(batch / 4))
        for half in (0, 1):
            off = 6 * (half == 1 and batch in batches)
            counts[batch, half, place + moved + off, level] = 40 if off == 0 else 10
    return counts


@pytest.mark.parametrize("batches", [[7, 20], [3, 7, 11, 20, 28, 33]])
def test_errors_are_large_where_the_halves_disagree(source: Preprocessor, batches: list[int]) -> None:
    counts = halves_that_disagree(source, batches)
    estimator = registration.Registration(Settings(), source.tiling, source.probe)
    much = len(batches) > 0.1 * N_BATCHES
    with pytest.warns(DriftWarning, match="in 15 % of the recording") if much else nullcontext():
        found = estimator.of(counts)
    assert found.shift_um.any() and found.error_um.shape == found.shift_um.shape
    assert np.flatnonzero(found.error_um[:, 0] > 5).tolist() == batches
    assert found.error_um[batches, 0] == pytest.approx(15, abs=2)  # half of 6 bins


def test_ends_that_move_on_their_own_are_found_by_default(tmp_path: Path) -> None:
    """A probe of 1.2 mm; at its upper half the tissue moves by ±4 bins."""
    probe = simulate.staggered_probe(62)
    tiling = Tiling.of(n_samples=SIZE * N_BATCHES, size=SIZE, halo=0, shortest=61)
    estimator = registration.Registration(Settings(), tiling, probe)
    n_bins = estimator._n_bins
    counts = np.zeros(estimator._counts.shape, np.uint16)
    rng = np.random.default_rng(3)
    place, level = rng.choice(np.arange(10, n_bins - 10), 60, replace=False), rng.integers(0, 20, 60)
    moved = np.round(4 * np.sin(np.arange(N_BATCHES) / 4)).astype(int)
    upper = place > n_bins / 2
    for batch in range(N_BATCHES):
        counts[batch, :, place + np.where(upper, moved[batch], 0), level] = 40
    found = estimator.of(counts)
    segments = (found.shift_um.shape[1] + 1) // 2
    assert 2 <= segments <= 4 and found.error_um.shape == found.shift_um.shape
    lower_um, upper_um = found.shift_um[:, [0, -1]].T
    assert np.abs(lower_um).max() < 2.5  # half a bin
    # The reference is smeared there, as the first alignment is rigid: not all of the 40 µm are found.
    assert np.corrcoef(upper_um, -moved)[0, 1] > 0.95 and 20 < np.ptp(upper_um) <= 40
    assert found.centre_um == pytest.approx([-1 + 2.5 * (a + b) for a, b in segment_bounds(n_bins, segments)], abs=1e-3)


def test_without_an_estimate_there_is_no_error(source: Preprocessor) -> None:
    estimator = registration.Registration(Settings(), source.tiling, source.probe)
    assert estimator.of(np.zeros((1, *estimator._counts.shape[1:]), np.uint16)).error_um.size == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.DriftWarning")
def test_whether_anything_moves_does_not_depend_on_the_cut(source: Preprocessor, tmp_path: Path) -> None:
    decided = set()
    for seed in range(6):
        peaks = faint(seed)
        results = [moved_by(source, cut(peaks, tmp_path, n), tmp_path) for n in (1, 2, 5, N_BATCHES)]
        first, plotted = results[0]
        for moved, sample in results[1:]:
            assert moved.shift_um.tobytes() == first.shift_um.tobytes(), seed
            for name in ("sample", "depth_um", "score"):
                assert getattr(sample, name).tobytes() == getattr(plotted, name).tobytes()
        decided.add(bool(first.shift_um.any()))
    assert decided == {True, False}  # the recordings do lie on both sides of the threshold


@pytest.mark.filterwarnings("ignore::ks4stream.errors.DriftWarning")
def test_peaks_for_the_plot_are_thinned_within_each_batch(
    source: Preprocessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "MAX_PLOTTED", 3 * N_BATCHES)
    peaks = faint(0)
    plotted = moved_by(source, cut(peaks, tmp_path, 7), tmp_path).peaks
    n_in_tile = np.bincount(peaks["sample"].astype(np.int64) // SIZE, minlength=N_BATCHES)
    assert np.bincount(plotted.sample // SIZE, minlength=N_BATCHES).tolist() == np.minimum(n_in_tile, 3).tolist()
