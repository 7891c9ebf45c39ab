"""Quality metrics are those of SpikeInterface, on the same spikes, amplitudes and positions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from ks4stream.kernels import metrics

pytest.importorskip("spikeinterface", minversion="0.104", reason="SpikeInterface is not installed")
pytestmark = pytest.mark.slow

RATE_HZ, DURATION_S = 30_000.0, 310.0
N_SAMPLES = round(RATE_HZ * DURATION_S)


@pytest.fixture(scope="module")
def trains() -> list[np.ndarray]:
    """Trains of all kinds: refractory, contaminated, Poisson, bursting, in a part of the recording, tiny.

    No two spikes of a unit are at the same sample: SpikeInterface counts such a pair twice.
    """
    rng = np.random.default_rng(5)

    def train(rate_hz: float, refractory_ms: float, stop_s: float = DURATION_S) -> np.ndarray:
        gaps = rng.exponential(1 / rate_hz, round(2 * rate_hz * stop_s) + 10) + refractory_ms / 1000
        times = np.cumsum(gaps)
        return np.round(times[times < stop_s] * RATE_HZ).astype(np.int64)

    clean, other = train(12, 2.5), train(2, 2.5)
    burst = np.unique(np.concatenate([clean, clean[::3] + 100, clean[::7] + 40]))
    found = [clean, np.unique(np.concatenate([clean, other])), train(30, 0), burst, train(8, 2, 150.0), train(0.05, 3)]
    return [np.unique(each[each < N_SAMPLES]) for each in found]


@pytest.fixture(scope="module")
def analyzer(trains):
    import spikeinterface.core as si

    recording = si.NumpyRecording([np.zeros((N_SAMPLES, 2), np.int8)], RATE_HZ)
    recording.set_dummy_probe_from_locations(np.array([[0.0, 0.0], [0.0, 20.0]]))
    recording.set_channel_gains(1.0)
    recording.set_channel_offsets(0.0)
    sorting = si.NumpySorting.from_unit_dict([dict(enumerate(trains))], RATE_HZ)
    return si.create_sorting_analyzer(sorting, recording, sparse=False)


def of_spikeinterface(analyzer, name: str, column: int | None = None) -> np.ndarray:
    from spikeinterface.metrics.quality import misc_metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(misc_metrics, name)(analyzer)
    found = found if column is None else found[column]
    return np.array([found[unit] for unit in analyzer.unit_ids], np.float64)


@pytest.mark.parametrize(
    ("ours", "theirs", "column"),
    [
        ("isi_violations_ratio", "compute_isi_violations", 0),
        ("sliding_rp_violation", "compute_sliding_rp_violations", None),
    ],
)
def test_refractoriness(analyzer, trains, ours, theirs, column):
    time = {"sampling_rate_hz": RATE_HZ, "n_samples": N_SAMPLES}
    found = [getattr(metrics, ours)(train, **time) for train in trains]
    expected = of_spikeinterface(analyzer, theirs, column)
    assert np.isfinite(expected).sum() > 2
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=ours)  # sums in another order


def test_contamination_by_pairs(trains):
    """Pairs are counted here, because SpikeInterface needs numba to do it."""
    from spikeinterface.metrics.quality.misc_metrics import _compute_rp_contamination_one_unit

    refractory = round(RATE_HZ / 1000)
    for train in trains:
        n_pairs = sum(int(np.sum(train[lag:] - train[:-lag] <= refractory)) for lag in range(1, 30))
        expected = _compute_rp_contamination_one_unit(n_pairs, len(train), N_SAMPLES, 0, refractory)
        found = metrics.rp_contamination(train, sampling_rate_hz=RATE_HZ, n_samples=N_SAMPLES)
        assert found == pytest.approx(expected, rel=1e-12)


def test_presence_ratio(analyzer, trains):
    edges = metrics.bin_edges(0, N_SAMPLES, int(60 * RATE_HZ))
    found = [metrics.presence_ratio(metrics.counts_in(train, edges)) for train in trains]
    expected = of_spikeinterface(analyzer, "compute_presence_ratios")
    assert len(set(expected.tolist())) > 1
    np.testing.assert_array_equal(found, expected)


def test_amplitude_cutoff(trains):
    from spikeinterface.metrics.quality.misc_metrics import amplitude_cutoff

    rng = np.random.default_rng(6)
    for train, lowest in zip(trains, [0, 0.8, 0.95, 1.1, 0, 0], strict=True):
        amplitude = rng.normal(1.0, 0.15, len(train))
        amplitude = amplitude[amplitude > lowest]
        np.testing.assert_equal(metrics.amplitude_cutoff(amplitude), amplitude_cutoff(amplitude))


def test_drift(analyzer, trains, monkeypatch):
    rng = np.random.default_rng(7)
    depths = [100 + 5 * np.sin(train / 3e6) + rng.normal(0, 4, len(train)) for train in trains]

    class Locations:
        def get_data(self, outputs, concatenated, periods):
            by_unit = {unit: np.array(list(zip(y, strict=True)), [("y", "f8")]) for unit, y in enumerate(depths)}
            return by_unit if concatenated else [by_unit]

    monkeypatch.setattr(analyzer, "get_extension", lambda name: Locations())
    monkeypatch.setattr("spikeinterface.metrics.quality.misc_metrics.check_has_required_extensions", lambda *_: None)
    edges = metrics.bin_edges(0, N_SAMPLES, int(60 * RATE_HZ))
    found = np.array([metrics.drift(train, depth, edges) for train, depth in zip(trains, depths, strict=True)])
    for column, name in enumerate(("ptp", "std", "mad")):
        expected = of_spikeinterface(analyzer, "compute_drift_metrics", column)
        assert np.isfinite(expected).sum() > 2
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_isolation():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    from spikeinterface.metrics.quality.pca_metrics import _compute_isolation

    rng = np.random.default_rng(8)
    for n, d, apart in ((200, 60, 1.0), (150, 8, 2.0), (20, 30, 0.5), (200, 60, 8.0)):
        units = rng.normal(size=(2, n, d)) * np.linspace(3, 1, d)
        units[1, :, 0] += apart
        together = units.reshape(2 * n, d)
        projected = decomposition.IncrementalPCA(n_components=min(10, d)).partial_fit(together).transform(together)
        expected = _compute_isolation(projected[:n], projected[n:], 4)
        assert metrics.isolation(*torch.from_numpy(units)) == pytest.approx(expected, abs=1 / (8 * n))  # one neighbour
