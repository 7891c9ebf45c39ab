"""The ideal detector on tiny scenes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
N_SAMPLES, N_CHANNELS, RATE_HZ = 240_000, 8, 30_000.0
POSITION_UM = np.stack([np.zeros(N_CHANNELS), 20.0 * np.arange(N_CHANNELS)], axis=1)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("limit")


def waveform(channel: int, norm: float) -> np.ndarray:
    """A biphasic waveform (time, channel) around one channel."""
    t = np.arange(-20, 41)
    course = -np.exp(-0.5 * (t / 3) ** 2) + 0.4 * np.exp(-0.5 * ((t - 10) / 6) ** 2)
    shape = np.outer(course, np.exp(-0.5 * ((np.arange(N_CHANNELS) - channel) / 1.2) ** 2))
    return norm * shape / np.linalg.norm(shape)


def scene(units: list[tuple[int, float]], *, drift_um=(0.0, 0.0), rate_hz: float = 20.0, seed: int = 0):
    """White noise and units of a channel and a norm each; half-way, the tissue moves."""
    rng = np.random.default_rng(seed)
    traces = rng.standard_normal((N_SAMPLES, N_CHANNELS))
    samples, owners = [], []
    for unit, (channel, norm) in enumerate(units):
        at = np.cumsum(90 + rng.exponential(RATE_HZ / rate_hz, int(N_SAMPLES / RATE_HZ * rate_hz * 2))).astype(int)
        at = at[(at > 50) & (at < N_SAMPLES - 50)]
        for sample in at:
            moved = drift_um[int(sample >= N_SAMPLES // 2)]
            traces[sample - 20 : sample + 41] += waveform(channel + moved / 20, norm)
        samples.append(at)
        owners.append(np.full(len(at), unit))
    truth = {
        "spike_samples": np.concatenate(samples),
        "spike_units": np.concatenate(owners),
        "unit_x_um": np.zeros(len(units)),
        "unit_y_um": np.array([20.0 * channel for channel, _ in units]),
        "sampling_rate_hz": np.array(RATE_HZ),
        "drift_time_s": np.array([0.0, 3.999, 4.0, 8.0]),
        "drift_y_um": np.array([0.0, 140.0]),
        "drift_um": np.repeat([drift_um[0], drift_um[0], drift_um[1], drift_um[1]], 2).reshape(4, 2).astype(float),
    }
    return traces.astype(np.float32), truth


def test_large_units_are_found_even_where_they_overlap_and_small_ones_are_not(limit):
    traces, truth = scene([(2, 25.0), (3, 20.0), (5, 3.0)], rate_hz=40.0)
    found = limit.detect(traces, POSITION_UM, truth)
    assert min(found.accuracy[:2]) > 0.98
    assert found.accuracy[2] < 0.4
    np.testing.assert_allclose(found.score[:2], [25, 20], rtol=0.05)
    assert found.summary["n_well_detected"] == 2


def test_a_unit_that_is_not_there_is_not_found_in_its_own_noise(limit):
    traces, truth = scene([(2, 20.0), (5, 0.0)], rate_hz=5.0)
    assert limit.detect(traces, POSITION_UM, truth).accuracy[1] < 0.05


def test_the_waveform_is_known_after_the_tissue_has_moved(limit):
    traces, truth = scene([(3, 8.0)], drift_um=(-40.0, 40.0), rate_hz=40.0)
    known = limit.detect(traces, POSITION_UM, truth).accuracy[0]
    truth["drift_um"][:] = 0.0
    unknown = limit.detect(traces, POSITION_UM, truth).accuracy[0]
    assert known > 0.95
    assert unknown < known - 0.05


def test_results_are_kept_by_content(limit, tmp_path, monkeypatch, capsys):
    scenarios = importlib.import_module("scenarios")
    scenarios.main(["bursts85", "--seed", "5", "--seconds", "4", "--out", str(tmp_path)])
    binary, cache = tmp_path / "bursts85-5.bin", tmp_path / "cache"
    first = limit.limit_of(binary, cache)
    assert len(first.accuracy) == 3

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(limit, "compute", refuse)
    assert limit.limit_of(binary, cache) == first
    limit.main([str(binary.with_suffix("")), "--cache", str(cache), "--per-unit"])
    assert "bursts85-5" in capsys.readouterr().out
    with binary.open("r+b") as file:
        file.write(b"\1\2")
    with pytest.raises(AssertionError, match="computed again"):
        limit.limit_of(binary, cache)
