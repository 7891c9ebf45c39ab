"""HDF5 datasets and NWB's electrical series are read, by any process."""

from __future__ import annotations

import pickle
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import Ks4StreamError, Ks4StreamWarning, RecordingError
from ks4stream.io.recordings import may_tell_rate, open_recording
from ks4stream.io.sources import hdf5
from ks4stream.io.sources.hdf5 import Hdf5Source
from ks4stream.recording import Source

h5py = pytest.importorskip("h5py")
SAMPLES = np.random.default_rng(6).normal(0, 50, (1000, 4)).astype(np.int16)


def write_nwb(path: Path, names: tuple[str, ...] = ("ElectricalSeriesAP",), **columns: Any) -> Path:
    """The layout of SpikeInterface's and DANDI's files: a series for each band, and one table of electrodes."""
    with h5py.File(path, "w") as file:
        file.attrs["neurodata_type"] = "NWBFile"
        for name in names:
            series = file.create_group(f"acquisition/{name}")
            series.attrs["neurodata_type"] = "ElectricalSeries"
            data = series.create_dataset("data", data=SAMPLES, chunks=(200, 4), compression="gzip")
            data.attrs["conversion"], data.attrs["offset"] = 0.195e-6, 0.0
            series["starting_time"] = 0.0
            series["starting_time"].attrs["rate"] = 30000.0
            series["electrodes"] = np.array([1, 2, 3, 4])  # rows of the table, of which the first is another probe's
        table = file.create_group("general/extracellular_ephys/electrodes")
        columns = {"rel_x": [9.0, 0, 32, 0, 32], "rel_y": [9.0, 0, 0, 20, 20], "group_name": list("xaaaa")} | columns
        for name, values in columns.items():
            table[name] = values
        times = file.create_group("processing/behavior/position")  # other tables, which are not traces
        times.attrs["neurodata_type"] = "SpatialSeries"
        times["data"] = np.zeros((50, 2))
    return path


def test_a_dataset_is_known_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("raw/ap", data=SAMPLES, chunks=(100, 4), compression="gzip")
    with h5py.File(path, "r") as file:
        recording = open_recording(file["raw/ap"], fs=30000)
    assert isinstance(recording.source, Hdf5Source) and isinstance(recording.source, Source)
    assert recording.files == (str(path),)
    again = pickle.loads(pickle.dumps(recording.source))  # what h5py has opened could not be
    for start, stop in [(0, 1000), (99, 101), (5, 5)]:
        block = again.read(start, stop)
        assert block.flags.writeable and block.dtype == np.int16
        np.testing.assert_array_equal(block, SAMPLES[start:stop])
    assert again.digest() == recording.source.digest()
    np.testing.assert_array_equal(open_recording(path, fs=30000).read(0, 1000), SAMPLES)  # the only table


def test_what_others_cannot_open_stays_an_array(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:  # somebody is writing
        file["x"] = SAMPLES
        recording = open_recording(file["x"], fs=30000)
        assert not isinstance(recording.source, Hdf5Source)
        np.testing.assert_array_equal(recording.read(0, 9), SAMPLES[:9])


@pytest.mark.parametrize("name", ["a.nwb", "a.bin"])
def test_an_electrical_series_tells_all(name: str, tmp_path: Path) -> None:
    recording = open_recording(write_nwb(tmp_path / name))
    assert may_tell_rate(tmp_path / name)  # so that no default takes its place
    assert (recording.n_samples, recording.n_channels, recording.sampling_rate_hz) == (1000, 4, 30000.0)
    assert recording.gain_uv == pytest.approx(0.195) and recording.offset_uv == 0.0
    assert recording.probe is not None and recording.probe.chan_map.tolist() == [0, 1, 2, 3]
    assert recording.probe.x_um.tolist() == [0, 32, 0, 32] and recording.probe.y_um.tolist() == [0, 0, 20, 20]
    np.testing.assert_array_equal(recording.read(190, 210), SAMPLES[190:210])


def test_shanks_gains_and_missing_positions(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb", group_name=list("xabab"))
    probe = open_recording(path).probe
    assert probe is not None and probe.shank.tolist() == [0, 1, 0, 1]
    with h5py.File(path, "r+") as file:
        series = file["acquisition/ElectricalSeriesAP"]
        del series["starting_time"]
        series["timestamps"] = 5 + np.arange(1000) / 25000
        series["channel_conversion"] = [1.0, 1.0, 1.0, 2.0]
        del file["general/extracellular_ephys/electrodes/rel_x"]
    recording = open_recording(path)
    assert recording.sampling_rate_hz == pytest.approx(25000) and recording.probe is None
    assert recording.gain_uv is None and recording.offset_uv is None


def test_more_than_one_and_none_are_an_error(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb", ("ElectricalSeriesAP", "ElectricalSeriesLF"))
    with pytest.raises(
        RecordingError, match=r"2 electrical series.*where NAME is one of acquisition/ElectricalSeriesAP"
    ):
        open_recording(path)
    with h5py.File(path, "r") as file:
        assert open_recording(file["acquisition/ElectricalSeriesAP/data"], fs=30000).n_samples == 1000
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["spike_times"] = np.arange(9)
    with pytest.raises(RecordingError, match=r"0 tables of 1000 samples or more.*h5py\.File\('.*b\.h5'\)\['NAME'\]"):
        open_recording(tmp_path / "b.h5", fs=30000)


def test_damaged_files_are_an_error(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb")
    source = open_recording(path).source
    assert isinstance(source, Hdf5Source)
    with h5py.File(path, "r") as file:
        offset = file[source.dataset].id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"x" * 40
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"Samples 190 to 210 of /acquisition/.* cannot be read"):
        source.read(190, 210)
    path.write_bytes(content[:2000])
    for read in (lambda: source.read(0, 10), lambda: open_recording(path)):
        with pytest.raises(RecordingError, match=r"damaged"):
            read()


def test_a_table_that_is_not_a_recording_is_left_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["positions"] = np.zeros((300, 2))
        file["events"] = np.zeros((5000, 2), np.int64)  # not a type of samples
        file["traces"] = SAMPLES
    np.testing.assert_array_equal(open_recording(tmp_path / "a.h5", fs=30000).read(0, 1000), SAMPLES)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["traces"] = SAMPLES.T
        file["positions"] = np.zeros((300, 2))
    with pytest.raises(RecordingError, match=r"has shape \(4, 1000\): more channels than samples.*transpose"):
        open_recording(tmp_path / "b.h5", fs=30000)


@pytest.mark.parametrize("digits", [3, 6, 9])
def test_rounded_timestamps_tell_the_rate(digits: int, tmp_path: Path) -> None:
    """To a thousandth: milliseconds are 30 samples, of the 100 000 that are looked at."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["timestamps"] = np.round(5 + np.arange(150_000) / 29_950, digits)
        found = hdf5._rate_of(file["timestamps"], "a")
        assert found == pytest.approx(29_950, rel=1e-3 if digits == 3 else 1e-6)
        for number, values in enumerate(([1.0], [2.0, 1.0], [1.0, 1.0], [0.0, np.nan])):
            file[f"{number}"] = values
            assert hdf5._rate_of(file[f"{number}"], "a") is None


def test_gaps_of_timestamps_are_told(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        series = file["acquisition/ElectricalSeriesAP"]
        del series["starting_time"]
        series["timestamps"] = np.r_[np.arange(998), [5000, 5001]] / 25000
        with pytest.MonkeyPatch.context() as patch, pytest.warns(Ks4StreamWarning, match="there are gaps"):
            patch.setattr(hdf5, "_TIMESTAMPS", 500)
            assert hdf5._rate_of(series["timestamps"], "a") == pytest.approx(25_000)


def test_a_series_may_be_named_by_bytes_and_lie_in_processing(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        file["acquisition/ElectricalSeriesAP"].attrs["neurodata_type"] = np.bytes_("ElectricalSeries")
        file["traces"] = np.zeros((2000, 3), np.int16)
    assert open_recording(path).n_channels == 4
    with h5py.File(path, "r+") as file:
        file.move("acquisition/ElectricalSeriesAP", "processing/ecephys/Filtered/ElectricalSeriesAP")
    assert open_recording(path).n_channels == 4


def test_a_probe_that_is_given_takes_the_place_of_one_that_is_not_right(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb", rel_x=[0.0] * 5, rel_y=[9.0, 0, 0, 20, 20])  # contacts in one place
    assert open_recording(path, probe="tetrode").probe is not None  # warnings are errors
    with pytest.warns(Ks4StreamWarning, match="The probe stored in .* is ignored"):
        assert open_recording(path).probe is None


def test_damage_of_any_kind_is_one_error(tmp_path: Path) -> None:
    whole = write_nwb(tmp_path / "a.nwb").read_bytes()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(100, len(content), 200)] = rng.integers(0, 256, 200)
        (tmp_path / "b.nwb").write_bytes(content.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Ks4StreamError):
                open_recording(tmp_path / "b.nwb").read(0, 1000)


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((1000, 4))
    creation.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)  # Blosc
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((1000, 4))
        made = h5py.h5d.create(file.id, b"traces", h5py.h5t.NATIVE_INT16, space, creation)
        made.write_direct_chunk((0, 0), b"x" * 100)
    if h5py.h5z.filter_avail(32001):
        pytest.skip("it is installed")
    with pytest.raises(RecordingError, match=r"compressed by a filter that is not installed.*pip install hdf5plugin"):
        open_recording(tmp_path / "a.h5", fs=30000).read(0, 9)
