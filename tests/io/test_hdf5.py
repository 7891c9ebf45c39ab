"""HDF5 datasets and NWB's electrical series are read, by any process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import RecordingError
from ks4stream.io.hdf5 import Hdf5Source
from ks4stream.io.recordings import may_tell_rate, open_recording
from ks4stream.recording import Source

h5py = pytest.importorskip("h5py")
SAMPLES = np.random.default_rng(6).normal(0, 50, (900, 4)).astype(np.int16)


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
    for start, stop in [(0, 900), (99, 101), (5, 5)]:
        block = again.read(start, stop)
        assert block.flags.writeable and block.dtype == np.int16
        np.testing.assert_array_equal(block, SAMPLES[start:stop])
    assert again.digest() == recording.source.digest()
    np.testing.assert_array_equal(open_recording(path, fs=30000).read(0, 900), SAMPLES)  # the only table


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
    assert (recording.n_samples, recording.n_channels, recording.sampling_rate_hz) == (900, 4, 30000.0)
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
        series["timestamps"] = 5 + np.arange(900) / 25000
        series["channel_conversion"] = [1.0, 1.0, 1.0, 2.0]
        del file["general/extracellular_ephys/electrodes/rel_x"]
    recording = open_recording(path)
    assert recording.sampling_rate_hz == pytest.approx(25000) and recording.probe is None
    assert recording.gain_uv is None and recording.offset_uv is None


def test_more_than_one_and_none_are_an_error(tmp_path: Path) -> None:
    path = write_nwb(tmp_path / "a.nwb", ("ElectricalSeriesAP", "ElectricalSeriesLF"))
    with pytest.raises(RecordingError, match=r"2 electrical series.*NAME being one of acquisition/ElectricalSeriesAP"):
        open_recording(path)
    with h5py.File(path, "r") as file:
        assert open_recording(file["acquisition/ElectricalSeriesAP/data"], fs=30000).n_samples == 900
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["spike_times"] = np.arange(9)
    with pytest.raises(RecordingError, match=r"0 tables of numbers.*h5py\.File\('.*b\.h5'\)\['NAME'\]"):
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
