"""open_recording: whatever holds samples becomes the same recording, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.typing import NDArray

from ks4stream.errors import Ks4StreamWarning, ProbeError, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import BinarySource
from ks4stream.probe import Probe

SAMPLES = (np.arange(90).reshape(30, 3) * 7 % 100).astype(np.int16)
PROBE = Probe.from_positions([(0, 0), (0, 20), (0, 40)])


def zarr_options(zarr_format: int) -> dict[str, Any]:
    """Version 2 of the library has one format and no argument for it."""
    return {"zarr_format": zarr_format} if int(zarr.__version__.split(".")[0]) >= 3 else {}


def write_zarr(path: Path, array: NDArray[Any], attrs: dict[str, Any] | None = None, zarr_format: int = 2) -> Path:
    chunks = (7,) * array.ndim
    stored = zarr.open_array(
        str(path), mode="w", shape=array.shape, dtype=array.dtype, chunks=chunks, **zarr_options(zarr_format)
    )
    stored[:] = array
    stored.attrs.update(attrs or {})
    return path


def test_a_default_rate_gives_way_to_any_other() -> None:
    told = xr.DataArray(SAMPLES, dims=("time", "channel"), attrs={"fs": 50})
    assert open_recording(SAMPLES, default_fs=100).sampling_rate_hz == 100
    assert open_recording(told, default_fs=100).sampling_rate_hz == 50
    assert open_recording(told, fs=200, default_fs=100).sampling_rate_hz == 200


def open_kind(kind: str, folder: Path) -> Any:
    """SAMPLES in one of the forms that need only fs, and flat files, which need n_chan too."""
    flat = folder / "a.dat"
    SAMPLES.tofile(flat)
    np.save(folder / "a.npy", SAMPLES)
    halves = [folder / "0.bin", folder / "1.bin"]
    for half, path in zip((SAMPLES[:13], SAMPLES[13:]), halves, strict=True):
        half.tofile(path)
    lazy = da.from_array(SAMPLES, chunks=(7, 2))
    return {
        "flat": lambda: open_recording(flat, n_chan=3, fs=100),
        "flat by name": lambda: open_recording(str(flat), n_chan=3, fs=100.0, dtype=np.int16),
        "list": lambda: open_recording(halves, n_chan=3, fs=100),
        "list of one": lambda: open_recording([flat], n_chan=3, fs=100),
        "npy": lambda: open_recording(folder / "a.npy", fs=100),
        "array": lambda: open_recording(SAMPLES, fs=100),
        "list of arrays": lambda: open_recording((SAMPLES[:13], SAMPLES[13:]), fs=100),
        "memmap": lambda: open_recording(np.memmap(flat, np.int16, mode="r", shape=(30, 3)), fs=100),
        "dask": lambda: open_recording(lazy, fs=100, n_chan=3, dtype="int16"),
        "xarray": lambda: open_recording(xr.DataArray(SAMPLES.T, dims=("channel", "time"), attrs={"fs": 100})),
        "lazy xarray": lambda: open_recording(xr.DataArray(lazy, dims=("time", "channel")), fs=100),
        "zarr 2": lambda: open_recording(write_zarr(folder / "2.zarr", SAMPLES), fs=100),
        "zarr 3": lambda: open_recording(write_zarr(folder / "3.zarr", SAMPLES, zarr_format=3), fs=100),
        "zarr array": lambda: open_recording(zarr.open_array(str(write_zarr(folder / "z", SAMPLES)), mode="r"), fs=100),
        "recording": lambda: open_recording(open_recording(SAMPLES, fs=50), fs=100),
    }[kind]()


KINDS = [
    "flat",
    "flat by name",
    "list",
    "list of one",
    "npy",
    "array",
    "list of arrays",
    "memmap",
    "dask",
    "xarray",
    "lazy xarray",
    "zarr 2",
    "zarr 3",
    "zarr array",
    "recording",
]


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_are_the_same_recording(kind: str, tmp_path: Path) -> None:
    recording = open_kind(kind, tmp_path)
    assert (recording.n_samples, recording.n_channels) == (30, 3)
    assert recording.sampling_rate_hz == 100.0 and recording.dtype == np.int16 and recording.probe is None
    np.testing.assert_array_equal(recording.read(11, 15), SAMPLES[11:15])
    np.testing.assert_array_equal(recording.traces.compute(scheduler="synchronous"), SAMPLES)
    assert len(recording.digest()) == 64


def test_files_are_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAMPLES.tofile(tmp_path / "a.dat")
    monkeypatch.chdir(tmp_path)
    recording = open_recording("a.dat", n_chan=3, fs=100)
    assert recording.files == (str(tmp_path / "a.dat"),) and recording.name == "a.dat"
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(recording.read(0, 30), SAMPLES)


def test_a_memory_map_is_known_by_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", SAMPLES)
    for source in (tmp_path / "a.npy", np.load(tmp_path / "a.npy", mmap_mode="r")):
        recording = open_recording(source, fs=100)
        assert isinstance(recording.source, BinarySource) and recording.files == (str(tmp_path / "a.npy"),)


def test_a_probe_in_any_form(tmp_path: Path) -> None:
    assert open_recording(SAMPLES, fs=100, probe=PROBE).probe is PROBE
    as_dict = {"chanMap": [0, 1, 2], "xc": [0, 0, 0], "yc": [0, 20, 40], "kcoords": [0, 0, 0]}
    assert open_recording(SAMPLES, fs=100, probe=as_dict).probe == PROBE
    with pytest.raises(ProbeError, match=r"maps 1 contact.* up to 3, but the file has 3 channels"):
        open_recording(SAMPLES, fs=100, probe="tetrode")
    recording = open_recording(SAMPLES, fs=100, probe=PROBE)
    assert open_recording(recording).probe is PROBE


def test_traces_can_be_opened_again() -> None:
    probe = Probe([2, 0], [0, 10], [40, 20], [1, 2])  # type: ignore[arg-type]
    first = open_recording(SAMPLES, fs=100, probe=probe)
    again = open_recording(first.traces)
    assert again.sampling_rate_hz == 100.0 and again.probe is not None
    assert again.probe.chan_map.tolist() == [0, 2] and again.probe.y_um.tolist() == [20, 40]
    assert again.probe.shank.tolist() == [2, 1]
    np.testing.assert_array_equal(again.read(0, 30), SAMPLES)


# -- Zarr groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_with_one_table(zarr_format: int, tmp_path: Path) -> None:
    path = tmp_path / "g.zarr"
    zarr.open_group(str(path), mode="w", **zarr_options(zarr_format))
    write_zarr(path / "times", np.arange(30), zarr_format=zarr_format)
    write_zarr(path / "ap", SAMPLES, {"sampling_rate_hz": 100.0, "gain_uv": 0.5}, zarr_format)
    recording = open_recording(path)
    assert recording.sampling_rate_hz == 100.0 and recording.gain_uv == 0.5
    np.testing.assert_array_equal(recording.read(0, 30), SAMPLES)
    write_zarr(path / "lf", SAMPLES, zarr_format=zarr_format)
    with pytest.raises(RecordingError, match=r"2 two-dimensional arrays.*where NAME is one of ap, lf"):
        open_recording(path)
    np.testing.assert_array_equal(open_recording(path / "ap").read(0, 30), SAMPLES)


def write_spikeinterface(path: Path, probe: dict[str, Any] | None = None) -> Path:
    """The layout in which SpikeInterface saves recordings (Zarr 2), in eleven segments."""
    group = zarr.open_group(str(path), mode="w", **zarr_options(2))
    group.attrs.update({"sampling_frequency": 100.0, "num_segments": 11})
    if probe is not None:
        group.attrs["probegroup"] = probe
    for segment in range(11):
        write_zarr(path / f"traces_seg{segment}", SAMPLES + np.int16(segment))
    write_zarr(path / "channel_ids", np.arange(3))
    zarr.open_group(str(path / "properties"), mode="w", **zarr_options(2))
    write_zarr(path / "properties" / "gain_to_uV", np.full(3, 0.195))
    write_zarr(path / "properties" / "offset_to_uV", np.array([0.0, 1.0, 2.0]))
    return path


def test_spikeinterface_layout(tmp_path: Path) -> None:
    recording = open_recording(write_spikeinterface(tmp_path / "si.zarr"))
    assert recording.n_samples == 330 and recording.sampling_rate_hz == 100.0
    assert recording.gain_uv == 0.195 and recording.offset_uv is None  # channels differ
    np.testing.assert_array_equal(recording.read(59, 61), [SAMPLES[29] + 1, SAMPLES[0] + 2])
    np.testing.assert_array_equal(recording.read(300, 301), [SAMPLES[0] + 10])  # segment 10 follows 9, not 1


def test_spikeinterface_probe(tmp_path: Path) -> None:
    import probeinterface as library

    probe = library.generate_linear_probe(3, 20)
    probe.set_device_channel_indices([2, 1, 0])
    group = library.ProbeGroup()
    group.add_probe(probe)
    recording = open_recording(write_spikeinterface(tmp_path / "si.zarr", group.to_dict(array_as_list=True)))
    assert recording.probe is not None and recording.probe.name == "si"
    assert recording.probe.chan_map.tolist() == [2, 1, 0] and recording.probe.y_um.tolist() == [0, 20, 40]


def test_a_stored_probe_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    path = write_spikeinterface(tmp_path / "si.zarr", {"probes": [{"x": 1}]})
    with pytest.warns(Ks4StreamWarning, match="The probe stored in .* is ignored"):
        assert open_recording(path).probe is None


# -- errors --------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    SAMPLES.tofile(tmp_path / "a.bin")
    with pytest.raises(RecordingError, match=r"its number of channels; give n_chan .*n_chan_bin"):
        open_recording(tmp_path / "a.bin", fs=100)
    with pytest.raises(ValueError, match=r"sampling rate of a\.bin is not known; give fs"):
        open_recording(tmp_path / "a.bin", n_chan=3)
    with pytest.raises(RecordingError, match="sampling rate of array is not known"):
        open_recording(SAMPLES)
    for fs in ("fast", [1, 2]):
        with pytest.raises(RecordingError, match="is not a sampling rate"):
            open_recording(SAMPLES, fs=fs)  # type: ignore[arg-type]
    with pytest.raises(RecordingError, match=r"fs=0\.0 is not a sampling rate"):
        open_recording(SAMPLES, fs=0)
    for n_chan in ("3", 2.5, [3]):
        with pytest.raises(RecordingError, match=r"n_chan=.*must be a whole number"):
            open_recording(tmp_path / "a.bin", n_chan=n_chan, fs=100)  # type: ignore[arg-type]


def test_files_that_cannot_be_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="There is no file"):
        open_recording(tmp_path / "none.bin", n_chan=3, fs=100)
    with pytest.raises(RecordingError, match="is a folder, but not a Zarr"):
        open_recording(tmp_path, fs=100)
    for name, reason in [("a.nwb", "open it with h5py"), ("a.gz", "decompress"), ("a.meta", r"pass the \.bin")]:
        SAMPLES.tofile(tmp_path / name)
        with pytest.raises(RecordingError, match=f"cannot be read as samples: .*{reason}"):
            open_recording(tmp_path / name, n_chan=3, fs=100)
    SAMPLES.tofile(tmp_path / "a.npy")
    with pytest.raises(RecordingError, match=r"cannot be read as a \.npy file"):
        open_recording(tmp_path / "a.npy", fs=100)
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / ".zarray").write_text("{")
    with pytest.raises(RecordingError, match="cannot be opened as a Zarr array or group"):
        open_recording(tmp_path / "b.zarr", fs=100)


def test_time_must_come_first(tmp_path: Path) -> None:
    lazy = da.from_array(SAMPLES.T, chunks=-1)
    for source in (SAMPLES.T, lazy, write_zarr(tmp_path / "z.zarr", SAMPLES.T)):
        with pytest.raises(RecordingError, match=r"shape \(3, 30\): more channels than samples.*transpose"):
            open_recording(source, fs=100)
    with pytest.raises(RecordingError, match=r"n_chan=30, but array has 30 samples of 3 channels\..*transpose"):
        open_recording(SAMPLES, fs=100, n_chan=30)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (SAMPLES, {"n_chan": 4}, "n_chan=4, but array has 30 samples of 3 channels. Correct n_chan"),
        (SAMPLES, {"dtype": "uint16"}, "dtype=uint16, but array holds int16 samples"),
        (SAMPLES, {"dtype": "int8"}, "supported are int16"),
        (SAMPLES[0], {}, "two dimensions"),
        (SAMPLES[:0], {}, r"empty \(0 samples of 3 channels\)"),
        (SAMPLES[:, :0], {}, r"empty \(30 samples of 0 channels\)"),
        (SAMPLES.astype(np.int8), {}, "holds int8 samples; supported are"),
        ([], {}, "list of recordings is empty"),
        ([[1, 2], [3, 4]], {}, "must hold paths or arrays. To sort a list of numbers"),
        ([SAMPLES, SAMPLES[:, :2]], {}, "part 1 has 2 channels"),
        (12, {}, "object of type int"),
        (None, {}, "object of type NoneType"),
        (xr.DataArray(SAMPLES, dims=("t", "c")), {}, r"has dims \('t', 'c'\); they must be 'time' and 'channel'"),
        (xr.Dataset({"a": ("time", SAMPLES[:, 0])}), {}, "xarray Dataset holds several arrays"),
    ],
)
def test_contradictions_are_refused(source: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        open_recording(source, fs=100, **arguments)


def test_a_size_that_is_not_a_multiple_is_refused(tmp_path: Path) -> None:
    SAMPLES.tofile(tmp_path / "a.bin")
    with pytest.raises(RecordingError, match=r"180 bytes.*7 channels × 2 bytes.*12 bytes are left over"):
        open_recording(tmp_path / "a.bin", n_chan=7, fs=100)


def test_nothing_is_read_on_opening() -> None:
    def refuse(block: NDArray[Any]) -> NDArray[Any]:
        raise AssertionError("read")

    lazy = da.from_array(SAMPLES, chunks=(10, 3)).map_blocks(refuse, dtype=np.int16, meta=np.empty((0, 0), np.int16))
    for source in (lazy, xr.DataArray(lazy, dims=("time", "channel"))):
        assert open_recording(source, fs=100, probe=PROBE).traces.shape == (30, 3)
