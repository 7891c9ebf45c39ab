"""What Kilosort4's users find in ``ops`` and ``st``."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from ks4stream.io.kilosort_ops import highpass_impulse, ops_from_sorting, spike_table, write_ops
from ks4stream.io.recordings import open_recording
from ks4stream.recording import FlatFile
from ks4stream.settings import Settings
from ks4stream.sorter import prepare


def test_ops_uses_kilosorts_words(make_sorting, tmp_path):
    sorting = make_sorting(flat_files=(FlatFile("data/rec.bin", "<i2", 0, 1, 13),))
    write_ops(ops_from_sorting(sorting), tmp_path)
    ops = np.load(tmp_path / "ops.npy", allow_pickle=True).item()
    assert ops["settings"]["n_chan_bin"] == ops["n_chan_bin"] == 13
    assert ops["nt0min"] == int(20 * 21 / 61)
    assert ops["Nbatches"] == 6 and ops["Nchan"] == 12
    assert set(ops["probe"]) == {"chanMap", "xc", "yc", "kcoords", "n_chan"}
    assert np.array_equal(ops["wPCA"], sorting.waveforms.components)
    assert (ops["filename"], ops["data_dir"], ops["data_dtype"]) == (["data/rec.bin"], "data", "int16")
    for template, channels in enumerate(sorting.template_channels):
        at = ops["iU"][template]
        assert np.array_equal(ops["iCC"][ops["iCC_mask"][:, at], at], channels[channels >= 0])


def test_number_of_batches_without_a_drift_estimate(make_sorting):
    settings = Settings(batch_size=60_000, tmin=1.0, tmax=9.5, nt=21, n_pcs=3, nearest_chans=5)
    assert ops_from_sorting(make_sorting(drift=None, settings=settings))["Nbatches"] == 5


def test_times_are_counted_from_where_the_first_batch_begins(make_sorting):
    """2.01 s · 30 kHz is 60299.99…; batches begin at sample 60300."""
    settings = Settings(tmin=2.01, nt=21, n_pcs=3, nearest_chans=5)
    sorting = make_sorting(settings=settings, sample=np.arange(400) + 60_300)
    samples = np.random.default_rng(0).integers(-100, 100, (90_000, 13)).astype(np.int16)
    assert (
        prepare(open_recording(samples, fs=30_000, probe=sorting.probe), settings).tiling.start
        == sorting.tiling.start
        == 60_300
    )
    assert spike_table(sorting)[0, 0] == 0


@pytest.mark.parametrize(
    ("rate_hz", "cutoff_hz", "tolerance"), [(30_000, 300, 1e-7), (25_000, 50, 1e-7), (3e4, 1, 2e-5)]
)
def test_the_filter_in_ops_is_kilosorts(rate_hz: float, cutoff_hz: float, tolerance: float) -> None:
    """Kilosort4 filters an impulse forward and backward; at 1 Hz the ends of its 30122 samples matter."""
    impulse = np.zeros(30_122)
    impulse[15_061] = 1
    expected = sosfiltfilt(butter(3, cutoff_hz, btype="high", fs=rate_hz, output="sos"), impulse)
    found = highpass_impulse(Settings(highpass_cutoff=cutoff_hz), rate_hz)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert highpass_impulse(Settings(highpass_cutoff=0), rate_hz).sum() == 1
