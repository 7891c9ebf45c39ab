"""Mean waveforms in µV: whitening and scaling undone, and nothing on channels that were not followed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.errors import ResultsError
from ks4stream.io.recordings import open_recording
from ks4stream.kernels.preprocessing import highpass, highpass_response
from ks4stream.results import Sorting, Whitening
from ks4stream.scoring import score
from ks4stream.settings import Settings
from ks4stream.simulate import SimulatedRecording
from ks4stream.sorter import sort
from ks4stream.unit_waveforms import mean_waveforms


def known_sorting(make_sorting, **settings) -> tuple[Sorting, np.ndarray]:
    """A sorting whose whitening mixes channels, and the waveforms (u, c, q) that its templates were whitened from."""
    sorting = make_sorting()
    rng = np.random.default_rng(4)
    matrix = np.eye(12) + 0.1 * rng.normal(size=(12, 12))
    followed = np.any(sorting.unit_features != 0, axis=2)
    waveforms = rng.normal(size=sorting.unit_features.shape) * followed[:, :, None]
    whitened = np.einsum("dc,ucq->udq", matrix, waveforms) * followed[:, :, None]  # templates are cut off
    settings = replace(sorting.settings, **settings)
    made = replace(sorting, unit_features=whitened, whitening=Whitening(matrix, np.zeros(0), 1), settings=settings)
    return made, waveforms


def test_whitening_is_undone_on_the_followed_channels_and_only_there(make_sorting):
    sorting, waveforms = known_sorting(make_sorting)
    found = mean_waveforms(replace(sorting, gain_uv=0.5))
    expected = 0.5 * np.einsum("ucq,qw->uwc", waveforms, sorting.waveforms.components)
    assert found.dtype == np.float32 and found.shape == (4, 21, 12)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.array_equal(found == 0, np.broadcast_to(expected == 0, found.shape))  # exactly


def test_scale_and_sign_are_undone_and_a_shift_does_not_matter(make_sorting):
    plain, _ = known_sorting(make_sorting)
    changed, _ = known_sorting(make_sorting, scale=4.0, shift=100.0, invert_sign=True)
    np.testing.assert_allclose(mean_waveforms(changed), -mean_waveforms(plain) / 4, rtol=1e-6)


def test_without_a_gain_the_unit_is_that_of_the_file(make_sorting):
    sorting, _ = known_sorting(make_sorting)
    np.testing.assert_allclose(2 * mean_waveforms(sorting), mean_waveforms(replace(sorting, gain_uv=2.0)), rtol=1e-6)


def test_some_units_are_the_same_as_among_all(make_sorting):
    sorting, _ = known_sorting(make_sorting)
    assert np.array_equal(mean_waveforms(sorting, slice(1, 3)), mean_waveforms(sorting)[1:3])


def test_a_channel_without_signal_stays_zero(make_sorting):
    sorting, _ = known_sorting(make_sorting)
    matrix, features = sorting.whitening.matrix.copy(), sorting.unit_features.copy()
    matrix[3], matrix[:, 3], features[:, 3] = 0, 0, 0
    found = mean_waveforms(replace(sorting, whitening=Whitening(matrix, [3], 1), unit_features=features))
    assert np.isfinite(found).all() and not found[:, :, 3].any()


def test_no_units_no_waveforms(make_sorting):
    sorting = make_sorting(n_units=0, n_spikes=0)
    assert mean_waveforms(replace(sorting, whitening=None)).shape == (0, 21, 12)


def test_units_without_whitening_are_an_error(make_sorting):
    with pytest.raises(ResultsError, match="no whitening"):
        mean_waveforms(make_sorting(whitening=None))


def compare(truth: SimulatedRecording, sorting: Sorting) -> list[tuple[float, float]]:
    """For each true unit: correlation with the filtered true waveform, and amplitude relative to it."""
    response = torch.from_numpy(highpass_response(4001, sampling_rate_hz=truth.sampling_rate_hz, cutoff_hz=300.0))
    found, results = mean_waveforms(sorting), []
    for number, true in enumerate(truth.templates_uv()):
        times = truth.spike_samples[truth.spike_units == number]
        near = [np.abs(times[:, None] - sorting.sample[sorting.unit == u]).min(axis=1) for u in range(len(found))]
        unit = int(np.argmax([np.mean(distance < 10) for distance in near]))
        padded = torch.zeros(true.shape[1], 4001)
        padded[:, 2000 : 2000 + len(true)] = torch.from_numpy(true.T)
        filtered = highpass(padded, response).numpy()
        own = np.any(found[unit] != 0, axis=0)
        best = np.argmax(np.ptp(filtered, axis=1))
        start = 2000 - truth.scene.offset_samples[0] - sorting.settings.peak_sample  # of a window around the spike
        results.append(
            max(
                (
                    float(np.corrcoef(filtered[own, at : at + 61].ravel(), found[unit][:, own].T.ravel())[0, 1]),
                    float(np.ptp(found[unit][:, best]) / np.ptp(filtered[best])),
                )
                for at in range(start - 5, start + 6)  # the sorter's peak need not be the simulation's
            )
        )
    return results


@pytest.mark.slow
def test_true_waveforms_are_found(tmp_path):
    truth = simulate.simulate(
        simulate.staggered_probe(40), 30.0, seed=3, n_units=8, amplitude_range_uv=(80, 200), rate_range_hz=(5, 15)
    )
    path = truth.write_binary(tmp_path / "recording.bin")
    recording = replace(open_recording(path, n_chan=40, fs=30_000, probe=truth.probe), gain_uv=truth.gain_uv)
    settings = Settings(scale=0.5, shift=20.0, Th_universal=9, Th_learned=8)
    sorting = sort(recording, settings, client="loop", device="cpu")
    assert sorting.gain_uv == truth.gain_uv and sorting.n_units == 8
    found = score(
        truth.spike_samples,
        truth.spike_units,
        sorting.sample[sorting.kept],
        sorting.unit[sorting.kept],
        sampling_rate_hz=30_000.0,
    )
    clean = found.accuracy >= 0.95  # spikes of distant neurons make the mean waveform of a unit smaller
    assert clean.sum() >= 7
    for correlation, amplitude in np.array(compare(truth, sorting))[clean]:
        assert correlation > 0.97 and amplitude == pytest.approx(1, abs=0.1)
