"""The error of a drift estimate."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def drift(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("drift")


def test_offsets_do_not_count_and_depths_are_interpolated(drift: ModuleType) -> None:
    time_s, depth_um = np.arange(100.0), np.array([0.0, 100.0, 200.0])
    moved = np.sin(time_s / 9)[:, None] * np.array([0.0, 5.0, 10.0])
    truth = {"drift_time_s": time_s, "drift_y_um": depth_um, "drift_um": moved}
    assert drift.rms_um(truth, time_s, depth_um, moved + 7) == pytest.approx(0, abs=1e-9)
    assert drift.rms_um(truth, time_s, depth_um[[0, 2]], moved[:, [0, 2]]) == pytest.approx(0, abs=1e-9)
    still = drift.rms_um(truth, time_s, np.array([100.0]), np.zeros((100, 1)))
    across = np.linspace(0, 10, 9)  # constant beyond the only depth
    centred = np.sin(time_s / 9) - np.median(np.sin(time_s / 9))
    assert still == pytest.approx(np.sqrt(np.mean(centred**2) * np.mean(across**2)))


def test_a_perfect_estimate_in_segments_has_no_error(drift: ModuleType) -> None:
    """Shifts are extrapolated beyond the outer segments, as when they are applied."""
    time_s, depth_um = np.arange(60.0), np.array([0.0, 600.0])
    moved = np.sin(time_s / 9)[:, None] * np.array([2.5, 10.0])
    centre_um = np.array([150.0, 300.0, 450.0])
    shift_um = -np.sin(time_s / 9)[:, None] * (2.5 + 7.5 * centre_um / 600)
    truth = {"drift_time_s": time_s, "drift_y_um": depth_um, "drift_um": moved}
    applied = drift.applied_um(truth, shift_um, centre_um)
    assert drift.rms_um(truth, time_s, drift.depths_um(truth), applied) == pytest.approx(0, abs=1e-9)
