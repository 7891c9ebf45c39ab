"""A sorting as objects of other libraries."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import MissingDependencyError, ProbeError, RecordingError, ResultsError
from ks4stream.io.store import load_sorting, save_sorting
from ks4stream.results import Diagnostics, Drift, PeakSample, Sorting


def test_the_dataset_shares_the_arrays(make_sorting: Any, tmp_path: Any) -> None:
    sorting = make_sorting()
    np.save(tmp_path / "features.npy", sorting.features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    sorting = replace(sorting, features=mapped)
    dataset = sorting.to_dataset()
    assert dataset.spike_features.dims == ("spike", "neighbour", "component")
    assert np.shares_memory(dataset.spike_features.values, mapped)
    assert np.shares_memory(dataset.spike_sample.values, sorting.sample)
    assert dataset.spike_sample.attrs["units"] == "samples"
    assert dataset.contamination.dims == ("unit",)
    assert dataset.drift_shift_um.dims == ("batch", "segment")
    assert dataset.sizes["unit"] == sorting.n_units


def test_the_dataset_has_diagnostics_along_axes_of_their_own(make_sorting: Any) -> None:
    """There are as many parts of the recording as there are, whatever the number of blanked spans (2 here)."""
    known = Diagnostics(edge=[0, 10, 20, 30], noise=np.ones((3, 12)), explained=np.ones(3), isolation=[1, 0.9, 0.5, 1])
    dataset = make_sorting(diagnostics=known, peaks=PeakSample([1, 2], [5, 6], [9, 9], [0, 0])).to_dataset()
    assert dataset.diagnostics_noise.dims == ("period", "channel") and dataset.sizes["span"] == 2
    assert dataset.diagnostics_edge.dims == ("period_edge",) and dataset.peaks_shank.dims == ("peak",)
    assert dataset.diagnostics_isolation.sel(unit=2) == 0.5
    unknown = make_sorting(diagnostics=replace(known, isolation=np.zeros(0))).to_dataset()
    assert unknown.diagnostics_isolation.dims == ("u_known",) and unknown.drift_error_um.dims == ("b_known", "g_known")


def test_the_dataset_leaves_out_features_that_were_not_loaded(make_sorting: Any, tmp_path: Any) -> None:
    path = save_sorting(make_sorting(), tmp_path / "sorting.zarr")
    assert "spike_features" in load_sorting(path).to_dataset()
    dataset = load_sorting(path, features=False).to_dataset()
    assert "spike_features" not in dataset and dataset.sizes["neighbour"] == 5


@pytest.mark.parametrize("method", ["to_spikeinterface", "to_motion"])
def test_without_spikeinterface_the_message_names_it(
    method: str, make_sorting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spikeinterface", None)
    with pytest.raises(MissingDependencyError, match=r"needs SpikeInterface.*ks4stream\[spikeinterface\]"):
        getattr(make_sorting(), method)()


# -- with SpikeInterface -------------------------------------------------------------------------------


@pytest.fixture
def core() -> Any:
    return pytest.importorskip("spikeinterface.core")


def recording_of(core: Any, lengths: list[int], n_channels: int = 13) -> Any:
    """A recording of zeros that takes no memory, with channels called a, b, c …"""
    names = np.array([chr(97 + channel) for channel in range(n_channels)])
    zeros = [np.broadcast_to(np.int16(0), (length, n_channels)) for length in lengths]
    return core.NumpyRecording(zeros, 30_000.0, channel_ids=names)


def spikes_of(found: Any) -> np.ndarray:
    return found.to_spike_vector()


def test_kept_spikes_by_unit(core: Any, make_sorting: Any) -> None:
    sorting = make_sorting()
    found = sorting.to_spikeinterface()
    assert found.unit_ids.tolist() == [0, 1, 2, 3]
    assert (found.get_num_segments(), found.sampling_frequency) == (1, 30_000.0)
    vector = spikes_of(found)
    np.testing.assert_array_equal(vector["sample_index"], sorting.sample[sorting.kept])
    np.testing.assert_array_equal(vector["unit_index"], sorting.unit[sorting.kept])
    train = sorting.sample[sorting.kept & (sorting.unit == 2)]
    np.testing.assert_array_equal(found.get_unit_spike_train(2, segment_index=0), train)


def test_good_units_alone_keep_their_numbers(core: Any, make_sorting: Any) -> None:
    sorting = make_sorting()
    found = sorting.to_spikeinterface(keep_good_only=True)
    assert found.unit_ids.tolist() == [0, 2]
    assert set(found.get_property("KSLabel")) == {"good"}
    train = sorting.sample[sorting.kept & (sorting.unit == 2)]
    np.testing.assert_array_equal(found.get_unit_spike_train(2, segment_index=0), train)


def test_units_have_properties(core: Any, make_sorting: Any) -> None:
    sorting = make_sorting()
    recording = recording_of(core, [330_000])
    found = sorting.to_spikeinterface(recording)
    assert found.has_recording()
    dense = np.einsum("ucq,qw->uwc", sorting.unit_features, sorting.waveforms.components)
    main = np.ptp(dense, axis=1).argmax(axis=1)
    columns = sorting.probe.chan_map[main]
    np.testing.assert_array_equal(found.get_property("main_channel_index"), columns)
    np.testing.assert_array_equal(found.get_property("main_channel_id"), recording.channel_ids[columns])
    np.testing.assert_array_equal(found.get_property("KSLabel"), ["good", "mua", "good", "mua"])
    np.testing.assert_allclose(found.get_property("ContamPct"), 100 * sorting.contamination)
    template, ids = found.get_property("template"), found.get_property("template_channel_ids")
    assert template.shape == (4, 21, 5) and ids.shape == (4, 5)
    np.testing.assert_array_equal(ids[:, 0], found.get_property("main_channel_id"))
    np.testing.assert_allclose(template[1, :, 0], dense[1, :, main[1]], rtol=1e-6)
    assert not (ids == "").any()
    own = sorting.kept & (sorting.unit == 3)
    np.testing.assert_allclose(found.get_property("depth")[3], sorting.y_um[own].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.get_property("x_um")[3], sorting.x_um[own].mean(), rtol=1e-5)


def test_templates_of_any_probe_have_the_same_shape(core: Any, make_sorting: Any) -> None:
    """So that SpikeInterface can join those of shanks."""
    sorting = make_sorting(n_channels=4, n_slots=7)
    found = sorting.to_spikeinterface(recording_of(core, [330_000], n_channels=4))
    template, ids = found.get_property("template"), found.get_property("template_channel_ids")
    assert template.shape == (4, 21, 7) and not template[:, :, 4:].any()
    assert sorted(ids[0]) == ["", "", "", "a", "b", "c", "d"]
    assert (sorting.to_spikeinterface().get_property("template_channel_ids")[:, 4:] == -1).all()


def test_spikes_are_given_back_by_segment(core: Any, make_sorting: Any) -> None:
    """Counted from the segment's first sample; whatever a border divides is left out."""
    border = 100_000
    sample = np.array([5, 99_985, 99_986, 99_993, 99_999, 100_000, 100_005, 100_006, 100_007, 299_999])
    n = len(sample)
    sorting = make_sorting(n_spikes=n, sample=sample, kept=np.ones(n, bool))
    before, nt = sorting.settings.peak_sample, sorting.settings.nt
    assert (before, nt) == (6, 21)
    found = sorting.to_spikeinterface(recording_of(core, [border, 230_000]))
    vector = spikes_of(found)
    first, second = (vector[vector["segment_index"] == segment] for segment in (0, 1))
    # The last whole waveform ends with sample 99999: its peak is at 99999 − 14. The first begins at 100000.
    assert first["sample_index"].tolist() == [5, 99_985]
    assert second["sample_index"].tolist() == [6, 7, 199_999]


def test_segments_without_spikes_are_there(core: Any, make_sorting: Any) -> None:
    sorting = make_sorting(n_spikes=3, sample=np.array([50, 60, 70]), kept=np.ones(3, bool))
    found = sorting.to_spikeinterface(recording_of(core, [100_000, 200_000, 30_000]))
    assert found.get_num_segments() == 3
    assert len(found.get_unit_spike_train(0, segment_index=2)) == 0


def test_an_empty_sorting(core: Any, make_sorting: Any) -> None:
    found = make_sorting(n_spikes=0, n_units=0, waveforms=None).to_spikeinterface(recording_of(core, [300_000, 30_000]))
    assert len(found.unit_ids) == 0
    assert found.get_num_segments() == 2


def test_another_recording_is_refused(core: Any, make_sorting: Any) -> None:
    with pytest.raises(RecordingError, match=r"has 1000 samples in 1 segment\(s\), but 330000 samples were sorted"):
        make_sorting().to_spikeinterface(recording_of(core, [1000]))
    with pytest.raises(ProbeError, match="has 4 channels, but channel 11 was sorted"):
        make_sorting().to_spikeinterface(recording_of(core, [330_000], n_channels=4))


def test_the_displacement_is_the_opposite_of_the_shift(core: Any, make_sorting: Any) -> None:
    sorting: Sorting = make_sorting()
    assert sorting.drift is not None
    motion = sorting.to_motion()
    np.testing.assert_array_equal(motion.displacement[0], -sorting.drift.shift_um)
    np.testing.assert_array_equal(motion.temporal_bins_s[0], sorting.tiling.centres / 30_000)
    np.testing.assert_array_equal(motion.spatial_bins_um, [20.0, 80.0])


def test_motion_by_segment_counts_from_when_it_starts(core: Any, make_sorting: Any) -> None:
    sorting: Sorting = make_sorting()  # batches of 60000; their middles at 30000, 90000 …
    recording = recording_of(core, [120_000, 10_000, 200_000])
    recording.shift_times(100.0)
    motion = sorting.to_motion(recording)
    assert [len(times) for times in motion.temporal_bins_s] == [2, 1, 4]
    np.testing.assert_allclose(motion.temporal_bins_s[0], 100 + np.array([1.0, 3.0]))
    np.testing.assert_allclose(motion.temporal_bins_s[2][0], 100 + 20_000 / 30_000)


def test_without_drift_there_is_no_motion(core: Any, make_sorting: Any) -> None:
    with pytest.raises(ResultsError, match="nblocks=0"):
        make_sorting(drift=None).to_motion()


def test_motion_of_one_batch_and_depth(core: Any, make_sorting: Any) -> None:
    sorting = make_sorting(n_samples=30_000, n_spikes=0, drift=Drift(np.array([[3.0]]), [50.0]))
    motion = sorting.to_motion()
    at = motion.get_displacement_at_time_and_depth(np.array([0.3]), np.array([10.0]))
    np.testing.assert_allclose(at, [-3.0])
