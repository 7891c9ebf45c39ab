"""Drift that was estimated elsewhere."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from silent import tiles_of

import ks4stream
from ks4stream import simulate
from ks4stream.errors import RecordingError, SettingsError
from ks4stream.motion import given_drift
from ks4stream.results import Drift
from ks4stream.settings import Settings

RATE = 30_000.0
SETTINGS = Settings(batch_size=24_000)  # 15 batches


def array(displacement_um: Any, time: Any, depth: Any) -> xr.DataArray:
    return xr.DataArray(displacement_um, dims=("time", "depth"), coords={"time": time, "depth": depth})


def test_a_displacement_is_interpolated_at_the_middle_of_each_batch() -> None:
    given = array([[0.0, 0.0], [20.0, 40.0]], [0.0, 10.0], [0.0, 900.0])
    drift = given_drift(given, tiles_of())
    np.testing.assert_allclose(drift.shift_um, [[-2, -4], [-6, -12], [-10, -20], [-14, -28], [-18, -36]], rtol=1e-6)
    np.testing.assert_array_equal(drift.centre_um, [0, 900])
    np.testing.assert_array_equal(given_drift(given.transpose(), tiles_of()).shift_um, drift.shift_um)


def test_times_count_from_the_start_of_the_recording_whatever_is_sorted() -> None:
    given = array([[0.0], [20.0]], [0.0, 10.0], [100.0])
    drift = given_drift(given, tiles_of(tmin=4.0, tmax=8.0))
    np.testing.assert_allclose(drift.shift_um, [[-10], [-14]], rtol=1e-6)


def test_beyond_the_outermost_depths_the_displacement_remains() -> None:
    from ks4stream.kernels.drift import shift_at

    tiles = tiles_of()
    drift = given_drift(array([[10.0, 30.0]] * 2, [0.0, 10.0], [200.0, 700.0]), tiles)
    at = shift_at(tiles.probe.y_um, drift.centre_um, drift.shift_um[0])
    np.testing.assert_allclose(at, [-10, -10, -10, -14, -18, -22, -26, -30, -30, -30], rtol=1e-6)


def test_a_drift_of_ours_is_taken_as_it_is() -> None:
    drift = Drift(np.ones((5, 2)), [100.0, 500.0])
    assert given_drift(drift, tiles_of()) is drift


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("estimate", SettingsError, "drift=str is not a drift: give a Drift"),
        (np.zeros((5, 2)), SettingsError, "drift=ndarray is not a drift"),
        (xr.DataArray(np.zeros((5, 2)), dims=("time", "y")), SettingsError, r"dims \('time', 'y'\)"),
        (array([[0.0, np.nan]] * 2, [0, 10], [0, 900]), SettingsError, "not a finite number at 2 of 4 places"),
        (array(np.zeros((2, 2)), [10, 0], [0, 900]), SettingsError, "times .* ascending"),
        (array(np.zeros((2, 2)), [0, 10], [900, 0]), SettingsError, "depths .* ascending"),
        (array(np.zeros((0, 2)), [], [0, 900]), SettingsError, r"shape \(0, 2\)"),
        (array(np.zeros((3, 1)), [100, 105, 110], [0]), RecordingError, "times of the given drift are 100 to 110 s"),
        (array(np.zeros((4, 1)), [0, 1, 2, 3], [0]), RecordingError, "times of the given drift are 0 to 3 s"),
        (array(np.zeros((2, 3)), [0, 10], [0, 0.4, 0.9]), RecordingError, "depths of the given drift are 0 to 0.9 µm"),
        (Drift(np.zeros((4, 1)), [0.0]), RecordingError, "for 4 batches, but .* has 5"),
        (Drift(np.zeros((5, 2)), [0.0]), SettingsError, "shifts at 2 depths, but 1 depths"),
        (Drift(np.full((5, 1), np.inf), [0.0]), SettingsError, "not a finite number at 5 of 5 places"),
        (Drift(np.zeros((5, 1)), [0.0], np.zeros((7, 2))), SettingsError, r"errors \(error_um\) of shape \(7, 2\)"),
        (Drift(np.zeros((5, 2)), [10.0, 0.0]), SettingsError, "depths .* ascending"),
    ],
)
def test_bad_input_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        given_drift(given, tiles_of())


def test_what_cannot_be_used_is_refused_before_work(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 20, (300_000, 10)).astype(np.int16)
    recording = ks4stream.open_recording(noise, fs=RATE, probe=simulate.linear_probe(10))
    with pytest.raises(SettingsError, match="is not a drift"):
        ks4stream.sort(recording, client="loop", drift=3.0, results_dir=tmp_path)
    with pytest.raises(RecordingError, match="for 4 batches"):
        ks4stream.preprocess(recording, client="loop", drift=Drift(np.zeros((4, 1)), [0.0]))


# -- a recording that drifts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drifting() -> simulate.SimulatedRecording:
    return simulate.simulate(
        simulate.linear_probe(20),
        12.0,
        seed=4,
        n_units=12,
        drift="rigid",
        drift_range_um=40.0,
        amplitude_range_uv=(80.0, 250.0),
        rate_range_hz=(15.0, 35.0),
    )


@pytest.fixture(scope="module")
def recording(drifting: simulate.SimulatedRecording) -> Any:
    traces = drifting.read(0, drifting.traces.shape[0])
    return ks4stream.open_recording(traces, fs=RATE, probe=drifting.probe)


@pytest.fixture(scope="module")
def estimated(recording: Any) -> Any:
    return ks4stream.sort(recording, SETTINGS, client="loop")


@pytest.mark.slow
def test_the_shift_is_the_opposite_of_the_displacement(estimated: Any, drifting: simulate.SimulatedRecording) -> None:
    true_um = drifting.drift.displacement_um(estimated.tiling.centres / RATE)
    shift_um = estimated.drift.shift_um[:, 0]
    assert np.corrcoef(shift_um, true_um)[0, 1] < -0.99
    np.testing.assert_allclose(shift_um, -(true_um - np.median(true_um)), atol=5)


@pytest.mark.slow
def test_a_given_drift_takes_the_place_of_the_estimate(recording: Any, estimated: Any, tmp_path: Path) -> None:
    """The same drift gives the same result, whatever nblocks is; it is in the log."""
    given = ks4stream.sort(
        recording,
        SETTINGS.replace(nblocks=0),
        client="loop",
        drift=estimated.drift,
        results_dir=tmp_path / "given",
        save_plots=True,
    )
    assert given.peaks is None
    for spec in fields(given):
        if "dims" in spec.metadata:
            np.testing.assert_array_equal(getattr(given, spec.name), getattr(estimated, spec.name), spec.name)
    np.testing.assert_array_equal(given.drift.shift_um, estimated.drift.shift_um)
    log = (tmp_path / "given" / "kilosort4.log").read_text(encoding="utf-8")
    assert "drift = 'given as Drift'" in log and "The drift was given: shifts from" in log
    plots = {path.name for path in (tmp_path / "given").glob("*.png")}
    assert plots == {"drift_amount.png", "spike_positions.png", "diagnostics.png"}, "no peaks that were not needed"


@pytest.mark.slow
def test_a_displacement_and_the_estimate_give_the_same_traces(
    recording: Any, estimated: Any, drifting: simulate.SimulatedRecording
) -> None:
    centres_s = estimated.tiling.centres / RATE
    given = array(-estimated.drift.shift_um, centres_s, estimated.drift.centre_um)
    ours = ks4stream.preprocess(recording, SETTINGS, whitening=estimated.whitening, drift=estimated.drift)
    theirs = ks4stream.preprocess(recording, SETTINGS, whitening=estimated.whitening, drift=given)
    np.testing.assert_array_equal(theirs[:3000].compute(), ours[:3000].compute())
