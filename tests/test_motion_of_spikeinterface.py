"""SpikeInterface's ``Motion``, given as drift and made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from silent import tiles_of

import ks4stream
from ks4stream import simulate
from ks4stream.errors import RecordingError, SettingsError
from ks4stream.motion import given_drift
from ks4stream.results import Drift
from ks4stream.settings import Settings
from ks4stream.stages.preprocessing import Preprocessor, tiling_of

RATE = 30_000.0


@pytest.fixture
def motion_class() -> Any:
    return pytest.importorskip("spikeinterface.core.motion").Motion


def test_a_motion_comes_back_as_the_drift_it_was_made_of(motion_class: Any, make_sorting: Any) -> None:
    shift = np.random.default_rng(0).normal(0, 5, (5, 2)).astype(np.float32)
    tiles = tiles_of()
    drift = Drift(shift, [0.0, 900.0])
    sorting = make_sorting(
        n_samples=tiles.recording.n_samples, n_spikes=0, drift=drift, tiling=tiles.tiling, probe=tiles.probe
    )
    back = given_drift(sorting.to_motion(), tiles)
    np.testing.assert_array_equal(back.shift_um, drift.shift_um)
    np.testing.assert_array_equal(back.centre_um, drift.centre_um)


def test_segments_of_a_motion_are_those_that_were_joined(motion_class: Any) -> None:
    tiles = tiles_of(n_parts=2)  # of 5 s; the third batch has its middle at the border
    displacement = [np.array([[1.0], [2.0]]), np.array([[10.0], [20.0]])]
    times = [np.array([0.0, 5.0]), np.array([0.0, 5.0])]
    drift = given_drift(motion_class(displacement, times, np.array([300.0])), tiles)
    np.testing.assert_allclose(drift.shift_um[:, 0], [-1.2, -1.6, -10, -14, -18], rtol=1e-6)
    with pytest.raises(RecordingError, match="has 2 segments, but array has 1"):
        given_drift(motion_class(displacement, times, np.array([300.0])), tiles_of())
    late = [times[0], times[1] + 100]
    with pytest.raises(RecordingError, match="times of segment 1 of the given Motion are 100 to 105 s"):
        given_drift(motion_class(displacement, late, np.array([300.0])), tiles)


def test_motion_across_the_probe_is_refused(motion_class: Any) -> None:
    motion = motion_class(np.zeros((2, 1)), np.array([0.0, 10.0]), np.array([300.0]), direction="x")
    with pytest.raises(SettingsError, match="along 'x'"):
        given_drift(motion, tiles_of())


def test_both_libraries_move_traces_the_same_way(motion_class: Any) -> None:
    """A bump at 400 µm, in tissue that has moved up by 30 µm, appears at 430 µm, and is moved back by both."""
    interpolation = pytest.importorskip("spikeinterface.sortingcomponents.motion.motion_interpolation")
    probe = simulate.linear_probe(40, pitch_um=20.0)
    n_samples, moved_um = 6000, 30.0
    bump = np.exp(-((probe.y_um - 400 - moved_um) ** 2) / (2 * 30.0**2))
    times_s = np.array([0.0, n_samples / RATE])
    motion = motion_class(np.full((2, 1), moved_um), times_s, np.array([400.0]))

    def centre(values: Any) -> float:
        weight = np.clip(values, 0, None) ** 2
        return float((weight * probe.y_um).sum() / weight.sum())

    theirs = interpolation.interpolate_motion_on_traces(
        bump[None].astype(np.float32), np.array([0.1]), probe.positions_um, motion
    )[0]

    import torch

    from ks4stream.kernels.preprocessing import Mover

    recording = ks4stream.open_recording(np.zeros((n_samples, 40), np.int16), fs=RATE, probe=probe)
    settings = Settings(batch_size=n_samples)
    drift = given_drift(motion, Preprocessor(recording, tiling_of(recording, settings), settings))
    shift = torch.full((40,), float(drift.shift_um[0, 0]), dtype=torch.float64)
    mover = Mover(torch.from_numpy(probe.positions_um), torch.from_numpy(probe.shank.copy()), sigma_um=20.0)
    ours = (mover.matrix(shift) @ torch.from_numpy(bump).float()).numpy()
    assert centre(bump) == pytest.approx(430, abs=3)
    assert centre(theirs) == pytest.approx(400, abs=3)
    assert centre(ours) == pytest.approx(400, abs=3)
