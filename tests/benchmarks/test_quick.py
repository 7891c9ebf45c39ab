"""Figures of a sorting against the truth."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ks4stream import simulate


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("quick")


def train(seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).integers(0, 3_000_000, 300))


@pytest.mark.parametrize(("background", "n_false", "n_background"), [(True, 1, 1), (False, 2, 0)])
def test_neurons_of_the_background_are_not_false(
    quick: ModuleType, background: bool, n_false: int, n_background: int
) -> None:
    """One true unit, one of the background, and one that is neither."""
    truth = {
        "spike_samples": train(1),
        "spike_units": np.zeros(300, int),
        "unit_x_um": np.zeros(1),
        "sampling_rate_hz": np.array(30_000.0),
    }
    if background:
        truth |= {"background_samples": train(2), "background_units": np.ones(300, int)}
    sample = np.concatenate([train(1), train(2), train(3)])
    summary = quick.summary_of(truth, sample, np.repeat([4, 5, 6], 300))
    found = [summary[f"n_{name}"] for name in ("well_detected", "false_positive", "background")]
    assert found == [1, n_false, n_background]
    assert "n_false_good" not in summary
    good = quick.summary_of(truth, sample, np.repeat([4, 5, 6], 300), good=[4, 5])
    assert good == summary | {"n_false_good": n_false - 1}
    assert f"false {n_false:2d}  background {n_background:2d}" in quick.describe("name", summary)


def test_the_truth_lists_the_spikes_of_the_background(quick: ModuleType) -> None:
    scenarios = importlib.import_module("scenarios")
    recording = simulate.simulate(simulate.linear_probe(4), 5.0, seed=1, n_units=2)
    truth = scenarios.truth_arrays(recording)
    sample, unit = truth["background_samples"], truth["background_units"]
    assert len(sample) == len(unit) > 100
    assert (np.diff(sample) >= 0).all() and sample[0] >= 0 and sample[-1] < truth["n_samples"]
    assert unit.min() >= recording.n_units, "their numbers follow those of the true units"
    rate_hz = np.bincount(unit - recording.n_units) / recording.duration_s
    expected = [one.rate_hz for one in recording.scene.units[recording.n_units :]]
    # A Poisson process: the s.d. of a rate is that of its count.
    assert np.abs(rate_hz - expected[: len(rate_hz)]).max() < 5 * np.sqrt(max(expected) / recording.duration_s)
