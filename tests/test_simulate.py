"""The simulator: values do not depend on how they are read, and levels are as requested."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path

import dask
import numpy as np
import pytest
from scipy import signal

from ks4stream.errors import SettingsError
from ks4stream.probe import Probe
from ks4stream.simulate import (
    EPOCH_SAMPLES,
    SimulatedRecording,
    linear_probe,
    multi_shank_probe,
    simulate,
    staggered_probe,
    tetrode_probe,
)

pytestmark = pytest.mark.slow  # each makes recordings
RATE_HZ = 30_000.0
SILENCE = dict(noise_uv=0.001, hash_per_channel=0.0, lfp_uv=0.0)  # spikes alone, but for the offsets


def small(seed: int = 1, duration_s: float = 3.0, **options) -> SimulatedRecording:
    """Return a recording of eight channels and a few seconds."""
    return simulate(staggered_probe(8), duration_s, seed=seed, **{"n_units": 4, **options})


def band_uv(recording: SimulatedRecording, stop: int | None = None) -> np.ndarray:
    """Return the traces between 300 and 6000 Hz in µV, without the filter's ends."""
    sos = signal.butter(3, [300, 6000], "bandpass", fs=RATE_HZ, output="sos")
    traces_uv = recording.read(0, stop or len(recording.traces)) * recording.gain_uv
    return signal.sosfiltfilt(sos, traces_uv, axis=0)[300:-300]


def spike_average_uv(recording: SimulatedRecording, samples: np.ndarray) -> np.ndarray:
    """Return the mean snippet (time, channel) around spikes, −40 … 79 samples, its first samples at 0."""
    start = samples[0] - 40
    traces = recording.read(start, samples[-1] + 80)  # at once: each read computes whole epochs
    snippets = np.stack([traces[t - 40 - start : t + 80 - start] for t in samples])
    mean_uv = snippets.mean(axis=0) * recording.gain_uv
    return mean_uv - mean_uv[:10].mean(axis=0)


# --- lazy, seeded, the same in any chunks ---------------------------------------------------------------------


def test_building_computes_nothing():
    def refuse(*_, **__):
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        recording = small()
        assert recording.traces.dtype == np.int16
        assert recording.traces.shape == (90_000, 8)
        assert recording.traces.chunks[0] == (30_000,) * 3


@pytest.mark.slow
@pytest.mark.parametrize("chunk_samples", [7_001, 30_000, 45_000, 90_000])
def test_chunks_do_not_change_a_value(chunk_samples):
    options = dict(drift="rigid", n_artifacts=3, dead_channels=(2,), noisy_channels=(5,))
    whole = small(**options).read(0, 90_000)
    chunked = small(**options, chunk_samples=chunk_samples).traces
    assert np.array_equal(chunked.compute(scheduler="threads"), whole)
    assert np.array_equal(chunked[29_990:60_011:3, 1:4].compute(scheduler="synchronous"), whole[29_990:60_011:3, 1:4])


def test_a_seed_is_a_recording():
    first, again, other = small(seed=3), small(seed=3), small(seed=4)
    assert np.array_equal(first.read(0, 1000), again.read(0, 1000))
    assert np.array_equal(first.spike_samples, again.spike_samples)
    assert np.array_equal(first.units, again.units)
    assert not np.array_equal(first.read(0, 1000), other.read(0, 1000))
    assert not np.array_equal(first.spike_samples[:10], other.spike_samples[:10])


def test_a_pickled_scene_computes_the_same():
    recording = small(drift="rigid")
    expected = recording.read(25_000, 35_000)
    copy = pickle.loads(pickle.dumps(recording.scene))
    assert not copy.templates
    assert np.array_equal(copy.read(25_000, 35_000), expected)


@pytest.mark.slow
def test_long_recordings_cost_nothing_until_read():
    recording = simulate(linear_probe(4), 100_000, seed=1, n_units=1, chunk_samples=300_000)  # 28 hours
    late = 2**31 + 12_345  # beyond 32-bit indices
    assert recording.spike_samples.dtype == np.int64
    assert recording.spike_samples[-1] > 2**31
    assert np.array_equal(recording.traces[late : late + 50].compute(), recording.read(late, late + 50))


def test_written_file_is_the_array(tmp_path):
    recording = small(duration_s=2.3)
    path = recording.write_binary(tmp_path / "traces.bin")
    written = np.fromfile(path, dtype=np.int16).reshape(-1, 8)
    assert np.array_equal(written, recording.traces.compute(scheduler="synchronous"))


def test_reading_stops_at_the_ends():
    recording = small()
    assert len(recording.read(-10, 5)) == 5
    assert len(recording.read(89_995, 99_999)) == 5
    assert recording.read(95_000, 99_999).shape == (0, 8)


def test_channels_go_where_the_channel_map_says():
    contacts = linear_probe(4)
    probe = Probe(np.array([5, 0, 3, 1]), contacts.x_um, contacts.y_um, contacts.shank, n_chan_file=6)
    plain, mapped = (simulate(p, 1.0, seed=1, n_units=2).read(0, 500) for p in (contacts, probe))
    assert mapped.shape == (500, 6)
    assert np.array_equal(mapped[:, [5, 0, 3, 1]], plain)
    assert not mapped[:, [2, 4]].any()


# --- noise ----------------------------------------------------------------------------------------------------


def test_noise_has_the_level_that_was_asked_for():
    level_uv = band_uv(small(duration_s=10, n_units=0, hash_per_channel=0, noise_uv=10.0)).std(axis=0)
    # The filter's slopes take away some 7 % of a band cut at its corners; channels differ by up to 10 %.
    assert level_uv.mean() == pytest.approx(9.4, rel=0.06)
    assert level_uv.max() < 1.3 * level_uv.min()


@pytest.mark.slow
def test_usual_noise_is_like_a_recording_s():
    level_uv = band_uv(small(duration_s=10, n_units=0)).std(axis=0)
    assert 8 < level_uv.mean() < 12


@pytest.mark.slow
def test_noise_is_shared_by_neighbours():
    probe = linear_probe(12, pitch_um=20)
    noise = band_uv(simulate(probe, 10, seed=1, n_units=0, hash_per_channel=0))
    correlation = np.corrcoef(noise.T)[0]
    assert 0.3 < correlation[1] < 0.7
    assert correlation[1] > correlation[5] > correlation[11] > 0.1


def test_noise_is_coloured():
    recording = small(duration_s=10, n_units=0, hash_per_channel=0, lfp_uv=0)
    frequency_hz, power = signal.welch(recording.read(0, 300_000)[:, 0] * recording.gain_uv, RATE_HZ, nperseg=3000)

    def density(hz: float) -> float:
        return float(power[np.abs(frequency_hz - hz) <= 25].mean())

    assert density(50) > 3 * density(500) > 3 * density(3000) > 3 * density(14_000)


@pytest.mark.slow
def test_noise_has_no_seams_between_epochs():
    traces = small(duration_s=30, n_units=0, hash_per_channel=0).read(0, 900_000).astype(float)
    steps = np.diff(traces, axis=0)
    at_seams = steps[EPOCH_SAMPLES - 1 :: EPOCH_SAMPLES]  # 29 seams × 8 channels
    assert at_seams.shape[0] == 29
    assert at_seams.std() == pytest.approx(steps.std(), rel=0.2)


@pytest.mark.slow
def test_hash_is_spiky():
    noise, with_hash = (
        band_uv(simulate(staggered_probe(32), 6, seed=2, n_units=0, hash_per_channel=n)) for n in (0.0, 8.0)
    )
    n_noise, n_hash = ((traces < -4.5 * traces.std(axis=0)).sum() for traces in (noise, with_hash))
    assert n_hash > 2 * n_noise


# --- units and trains -------------------------------------------------------------------------------------------


def test_amplitudes_are_those_of_the_table():
    recording = small(duration_s=20, amplitude_range_uv=(50.0, 200.0), **SILENCE)
    assert ((recording.units["amplitude_uv"] >= 50) & (recording.units["amplitude_uv"] <= 200)).all()
    traces_uv = recording.read(0, len(recording.traces)) * recording.gain_uv
    traces_uv -= np.median(traces_uv, axis=0)
    for index, unit in enumerate(recording.units):
        samples = recording.spike_samples[recording.spike_units == index][:40]
        troughs_uv = np.median([traces_uv[t - 5 : t + 6].min(axis=0) for t in samples], axis=0)
        assert -troughs_uv.min() == pytest.approx(unit["amplitude_uv"], rel=0.12)


def test_templates_have_the_amplitude_exactly_where_nothing_moves():
    recording = small(n_units=12)
    assert -recording.templates_uv().min(axis=(1, 2)) == pytest.approx(recording.units["amplitude_uv"], rel=0.05)


def test_trough_is_at_the_spike_s_sample():
    recording = small(duration_s=20, n_units=1, seed=5, **SILENCE)
    average_uv = spike_average_uv(recording, recording.spike_samples[:40])
    trough, _ = np.unravel_index(average_uv.argmin(), average_uv.shape)
    assert trough in (40, 41)


@pytest.mark.parametrize("seed", [1, 2])
def test_trains_are_refractory_and_have_their_rates(seed):
    recording = simulate(staggered_probe(8), 300, seed=seed, n_units=30)
    assert (np.diff(recording.spike_samples) >= 0).all()
    for index, unit in enumerate(recording.units):
        train = recording.spike_samples[recording.spike_units == index]
        assert len(train) == unit["n_spikes"]
        assert np.diff(train).min() >= 2.0 * RATE_HZ / 1000 - 1
        assert 0.5 <= unit["rate_hz"] <= 20
        # Trains are at most twice as variable as Poisson's.
        assert abs(len(train) - 300 * unit["rate_hz"]) < 5 * np.sqrt(2 * 300 * unit["rate_hz"])
    assert recording.spike_samples[0] >= 80
    assert recording.spike_samples[-1] < len(recording.traces) - 80


def test_amplitudes_and_rates_are_spread():
    units = simulate(staggered_probe(32), 1.0, seed=1, n_units=200).units
    assert np.histogram(units["amplitude_uv"], [35, 60, 120, 250])[0].min() > 40
    assert np.histogram(units["rate_hz"], [0, 2, 6, 20.1])[0].min() > 30


# --- drift --------------------------------------------------------------------------------------------------------


def centroid_um(recording: SimulatedRecording, samples: np.ndarray) -> float:
    """Return the depth of the mean spike, weighted by its squared size per channel."""
    size = np.ptp(spike_average_uv(recording, samples), axis=0) ** 2
    return float(size @ recording.probe.y_um / size.sum())


@pytest.mark.parametrize("drift", ["none", "rigid"])
def test_drift_moves_spikes(drift):
    options = dict(n_units=1, amplitude_range_uv=(100.0, 200.0), rate_range_hz=(10.0, 20.0))
    recording = simulate(linear_probe(20, pitch_um=15), 90, seed=3, drift=drift, **options, **SILENCE)
    assert 60 < recording.units["y_um"][0] < 240  # not at an end, where the centroid cannot follow
    reference = simulate(linear_probe(20, pitch_um=15), 90, seed=3, drift="rigid", **options)
    moved_um = reference.drift.displacement_um(recording.spike_samples / RATE_HZ)
    low, high = recording.spike_samples[moved_um < -8][:20], recording.spike_samples[moved_um > 8][:20]
    shift_um = centroid_um(recording, high) - centroid_um(recording, low)
    expected_um = 0 if drift == "none" else 18
    assert shift_um == pytest.approx(expected_um, abs=3)


def test_drift_has_its_range_and_no_mean():
    drift = simulate(staggered_probe(8), 120, seed=1, drift="rigid", drift_range_um=30).drift
    path_um = drift.displacement_um(np.arange(0, 120, 0.1))
    assert np.ptp(path_um) == pytest.approx(30)
    assert path_um.mean() == pytest.approx(0, abs=1e-6)
    assert np.array_equal(path_um, drift.displacement_um(np.arange(0, 120, 0.1), 100.0))


def test_nonrigid_drift_grows_with_depth():
    drift = simulate(linear_probe(33, pitch_um=20), 120, seed=1, drift="nonrigid").drift
    path_um = drift.displacement_um(np.arange(0, 120, 0.1)[:, None], np.array([0.0, 320.0, 640.0]))
    assert np.ptp(path_um, axis=0) == pytest.approx([5, 12.5, 20])


def test_without_drift_nothing_moves():
    assert not small().drift.displacement_um(np.arange(3.0)).any()


# --- probes and bad channels ----------------------------------------------------------------------------------


def test_probes():
    assert np.diff(linear_probe(4, pitch_um=30).y_um).tolist() == [30, 30, 30]
    assert staggered_probe(4).x_um.tolist() == [0, 32, 0, 32]
    tetrodes, shanks = tetrode_probe(3), multi_shank_probe(4, 8)
    assert np.bincount(tetrodes.shank).tolist() == [4, 4, 4]
    assert np.bincount(shanks.shank).tolist() == [8, 8, 8, 8]
    for probe in (tetrodes, shanks):
        assert len(set(zip(probe.x_um, probe.y_um, strict=True))) == probe.n_channels
        assert probe.chan_map.tolist() == list(range(probe.n_channels))


def test_a_tetrode_s_units_are_seen_by_it_alone():
    recording = simulate(tetrode_probe(4), 5, seed=1, n_units=12)
    assert np.bincount(recording.units["shank"]).tolist() == [3, 3, 3, 3]
    size_uv = np.ptp(recording.templates_uv(), axis=1)  # (unit, channel)
    on_shank = recording.units["shank"][:, None] == recording.probe.shank
    assert (size_uv[on_shank].reshape(12, 4).max(axis=1) > 30).all()
    assert size_uv[~on_shank].max() < 1e-3


def test_bad_channels():
    recording = small(dead_channels=(2,), noisy_channels=(5, 6))
    assert recording.bad_channels == (2, 5, 6)
    assert not recording.read(0, 90_000)[:, 2].any()
    level_uv = band_uv(recording).std(axis=0)
    assert (level_uv[[5, 6]] > 7 * np.median(level_uv[[0, 1, 3, 4, 7]])).all()


def test_artifacts_are_where_they_are_said_to_be():
    recording = small(n_artifacts=4, n_units=0)
    assert recording.artifact_spans.shape == (4, 2)
    traces_uv = np.abs(recording.read(0, 90_000)) * recording.gain_uv
    inside = np.zeros(90_000, dtype=bool)
    for start, stop in recording.artifact_spans:
        inside[start:stop] = True
        assert 60 <= stop - start <= 180
        assert (traces_uv[start:stop].max(axis=0) > 400).all()  # on all channels
    assert traces_uv[~inside].max() < 800


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(duration_s=0.01), "300 samples"),
        (dict(drift="sideways"), "'sideways'"),
        (dict(seed=-1), "seed=-1"),
        (dict(rate_range_hz=(0.5, 500.0)), "rate_range_hz"),
        (dict(amplitude_range_uv=(0.0, 50.0)), "amplitude_range_uv"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(SettingsError, match=message):
        small(**options)


# --- scenarios ------------------------------------------------------------------------------------------------


@pytest.fixture
def scenarios(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("scenarios")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static", "rigid", "nonrigid", "fourshank", "tetrodes", "badchannels", "linear16"])
def test_scenarios_write_traces_probe_and_truth(scenarios, name, tmp_path, capsys):
    assert name in scenarios.SCENARIOS
    scenarios.main([name, "--seed", "7", "--out", str(tmp_path), "--seconds", "1.5"])
    assert f"{name}-7.bin" in capsys.readouterr().out
    probe = json.loads((tmp_path / f"{name}-7.probe.json").read_text())
    traces = np.fromfile(tmp_path / f"{name}-7.bin", dtype=np.int16).reshape(-1, probe["n_chan"])
    assert len(traces) == 45_000
    assert len(probe["chanMap"]) == len(probe["xc"]) == len(probe["yc"]) == len(probe["kcoords"]) == probe["n_chan"]
    with np.load(tmp_path / f"{name}-7.truth.npz", allow_pickle=False) as truth:
        assert truth["spike_samples"].shape == truth["spike_units"].shape
        assert truth["unit_amplitude_uv"].shape == truth["unit_n_spikes"].shape
        assert len(truth["bad_channels"]) == (3 if name == "badchannels" else 0)
