"""Recordings that are made elsewhere than in the package: hybrids, small scenes, SpikeInterface's."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def hybrid(benchmark) -> ModuleType:
    return benchmark("hybrid")


@pytest.fixture
def waveforms(tmp_path: Path) -> Path:
    """A file of two invented units on the sites of a Neuropixels probe."""
    row, side = np.divmod(np.arange(104), 2)
    x_um, y_um = np.where(row % 2, -24.0, -8.0) + 32.0 * side, 10.0 * row - 260.0
    time = np.arange(81) - 39
    arrays = {"fs": np.array(30_000.0)}
    for i, width in enumerate((4.0, 7.0)):
        course = -np.exp(-0.5 * (time / width) ** 2)
        arrays |= {f"x{i}": x_um, f"y{i}": y_um}
        arrays[f"w{i}"] = 100 * np.exp(-np.hypot(x_um, y_um) / 40)[:, None] * course
    np.savez(tmp_path / "units.npz", **arrays)
    return tmp_path / "units.npz"


def test_measured_waveforms_are_kept_at_the_sites_and_fade_beyond_them(hybrid, waveforms):
    field = hybrid.read_waveforms(waveforms)[0]
    site = int(np.argmin(np.hypot(*field.site_um.T)))
    at_site = field.at(*field.site_um[[site]].T, field.time_ms[10:-10])[:, 0]
    np.testing.assert_allclose(at_site, field.waveform_uv[site, 10:-10], atol=1e-6)
    beside = field.at(np.array([24.0, 49.0, 74.0]), np.zeros(3), np.zeros(1))[0]
    assert beside[0] < beside[1] < 0
    assert beside[2] == 0
    assert field.at(np.zeros(0), np.zeros(0), np.zeros(5)).shape == (5, 0)


@pytest.mark.slow
def test_a_hybrid_has_the_amplitudes_and_the_motion_it_states(hybrid, waveforms, tmp_path):
    options = ["drifting", "--waveforms", str(waveforms), "--channels", "16", "--units", "5", "--seconds", "6"]
    hybrid.main([*options, "--seed", "3", "--out", str(tmp_path)])
    with np.load(tmp_path / "hybrid16_drifting-3.truth.npz") as file:
        truth = dict(file)
    probe = json.loads((tmp_path / "hybrid16_drifting-3.probe.json").read_text())
    traces = np.fromfile(tmp_path / "hybrid16_drifting-3.bin", np.int16).reshape(-1, probe["n_chan"])
    assert traces.shape == (180_000, 16)
    assert len(truth["unit_amplitude_uv"]) == 5
    assert np.ptp(truth["drift_um"]) > 20
    recording = hybrid.hybrid(hybrid.read_waveforms(waveforms), seed=3, n_channels=16, n_units=5, duration_s=6.0)
    assert np.ptp(recording.drift.displacement_um(np.arange(0, 6, 0.1))) == 0
    troughs_uv = -recording.templates_uv().min(axis=(1, 2))
    np.testing.assert_allclose(troughs_uv, recording.units["amplitude_uv"], rtol=0.05)


def test_a_hybrid_can_be_without_background_or_bursts(hybrid, waveforms):
    fields = hybrid.read_waveforms(waveforms)
    options = dict(seed=3, n_channels=16, n_units=8, duration_s=60.0)
    plain, quiet, steady = (
        hybrid.hybrid(fields, **options, **kwargs) for kwargs in ({}, {"background": False}, {"bursts": False})
    )
    assert len(plain.scene.units) == len(steady.scene.units) > len(quiet.scene.units) == 8
    assert np.array_equal(plain.spike_samples, quiet.spike_samples)
    assert np.array_equal(plain.templates_uv(), steady.templates_uv())

    def share_in_bursts(recording):
        trains = [recording.spike_samples[recording.spike_units == unit] for unit in range(8)]
        return np.mean(np.concatenate([np.diff(train) < 0.006 * 30_000 for train in trains]))

    assert share_in_bursts(plain) > 2 * share_in_bursts(steady)


def test_trains_keep_a_refractory_period_and_amplitudes_fall_in_bursts(hybrid):
    for seed in range(6):
        time_s, relative = hybrid.draw_train(np.random.default_rng(seed), 8.0, 200.0)
        interval_s = np.diff(time_s)
        assert interval_s.min() > 0.002
        assert 4 < len(time_s) / 200 < 12
        if (interval_s < 0.006).mean() > 0.1:
            assert relative[1:][interval_s < 0.006].mean() < 0.96


def test_bursts_fall_and_pairs_take_turns(benchmark):
    special = benchmark("special")
    bursts = special.bursts70(1, 20.0)
    spikes = bursts.scene.spikes
    first_unit = spikes.unit == 0
    interval = np.diff(spikes.sample[first_unit])
    ratio = spikes.relative[first_unit][1:] / spikes.relative[first_unit][:-1]
    np.testing.assert_allclose(ratio[interval < 200], 0.7)
    assert np.abs(interval[interval < 200] / 120 - 1).max() < 0.11

    turns = special.complementary_still(1, 20.0)
    is_first_half = turns.spike_samples < 300_000
    assert np.array_equal(turns.spike_units % 2 == 0, is_first_half)
    assert np.ptp(special.complementary_drift(1, 60.0).drift.displacement_um(np.arange(60.0))) > 15

    fading = special.fading25(1, 20.0).scene.spikes
    assert fading.relative[-20:].mean() == pytest.approx(0.26, abs=0.03)


def test_a_recording_by_spikeinterface_states_its_truth(benchmark, tmp_path):
    pytest.importorskip("spikeinterface")
    maker = benchmark("make_spikeinterface_recording")
    maker.main(["nonrigid", "--channels", "16", "--units", "4", "--seconds", "6", "--out", str(tmp_path)])
    with np.load(tmp_path / "si16_nonrigid-1.truth.npz") as file:
        truth = dict(file)
    traces = np.fromfile(tmp_path / "si16_nonrigid-1.bin", np.int16).reshape(-1, 16)
    assert len(traces) == truth["n_samples"] == 180_000
    assert truth["unit_n_spikes"].sum() == len(truth["spike_samples"])
    range_um = np.ptp(truth["drift_um"], axis=0)
    assert range_um.min() < 0.5 * range_um.max()


def test_spikeinterface_gets_the_good_channels_in_the_order_of_the_probe(benchmark, tmp_path):
    pytest.importorskip("spikeinterface")
    runner = benchmark("run_spikeinterface")
    np.arange(40, dtype=np.int16).reshape(10, 4).tofile(tmp_path / "a.bin")
    probe = {"chanMap": [2, 0, 3], "xc": [0.0, 10.0, 20.0], "yc": [5.0, 6.0, 7.0], "kcoords": [0, 0, 1], "n_chan": 4}
    recording = runner.opened(tmp_path / "a.bin", probe, [0], 0.5)
    assert recording.get_traces()[0].tolist() == [2, 3]
    assert recording.get_channel_locations().tolist() == [[0, 5], [20, 7]]
    assert recording.get_channel_gains().tolist() == [0.5, 0.5]
