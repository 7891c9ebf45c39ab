"""Recordings of SpikeInterface: read where they lie, or else through it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ks4stream
from ks4stream.errors import MissingDependencyError, ProbeError, RecordingError
from ks4stream.io.sources import BinarySource, ConcatenatedSource, ZarrSource
from ks4stream.io.sources.channels import ChannelSource
from ks4stream.io.sources.extractor import ExtractorSource

core = pytest.importorskip("spikeinterface.core")
from extractors import with_contacts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")


def saves_files(test: Any) -> Any:
    """SpikeInterface warns of what it cannot describe, and leaves files open that it has written."""
    for ignored in (
        "ignore:The extractor is not serializable to file:UserWarning",
        "ignore:unclosed file .*traces_cached_seg:ResourceWarning",
        r"ignore:Exception ignored in. <_io\.FileIO:pytest.PytestUnraisableExceptionWarning",
    ):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


RATE, N_CHANNELS = 30_000.0, 6
SAMPLES = np.random.default_rng(1).integers(-300, 300, (9000, N_CHANNELS)).astype(np.int16)
POSITIONS = np.column_stack([np.tile([0.0, 20.0], 3), 25.0 * np.arange(6)])


def described(recording: Any) -> Any:
    """With gains, and a probe."""
    return with_contacts(recording, POSITIONS[: recording.get_num_channels()])


def binary(folder: Path, samples: Any = SAMPLES, *, n_files: int = 1, header: bytes = b"", **about: Any) -> Any:
    """A recording in flat files, one per segment."""
    paths = [folder / f"part{index}.bin" for index in range(n_files)]
    for path, part in zip(paths, np.array_split(samples, n_files), strict=True):
        path.write_bytes(header + part.tobytes())
    about = {"dtype": samples.dtype.str, "num_channels": samples.shape[1], "file_offset": len(header)} | about
    return described(core.BinaryRecordingExtractor(paths, RATE, **about))


def in_memory(samples: Any = SAMPLES, n_segments: int = 1) -> Any:
    return described(core.NumpyRecording(np.array_split(samples, n_segments), RATE))


def lazy(recording: Any) -> Any:
    """The same recording, but each channel doubled."""
    preprocessing = pytest.importorskip("spikeinterface.preprocessing")
    return preprocessing.scale(recording, gain=2.0, dtype="int16")


# -- where samples lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<f4", "<f8"])
def test_flat_files_are_read_where_they_lie(dtype: str, tmp_path: Path) -> None:
    samples = np.abs(SAMPLES).astype(dtype)
    recording = ks4stream.open_recording(binary(tmp_path, samples, header=b"1234567"))
    source = recording.source
    assert isinstance(source, BinarySource)
    assert source.offset_bytes == 7
    assert recording.files == (str(tmp_path / "part0.bin"),)
    assert (recording.sampling_rate_hz, recording.gain_uv, recording.offset_uv) == (RATE, 0.195, 0.0)
    np.testing.assert_array_equal(recording.read(5, 95), samples[5:95])
    (flat,) = source.flat_files
    assert (flat.dtype, flat.n_samples) == (dtype, len(samples))


def test_segments_are_joined_in_time(tmp_path: Path) -> None:
    recording = ks4stream.open_recording(binary(tmp_path, n_files=3))
    assert isinstance(recording.source, ConcatenatedSource)
    assert [type(part) for part in recording.source.sources] == [BinarySource] * 3
    np.testing.assert_array_equal(recording.read(0, len(SAMPLES)), SAMPLES)
    assert len(recording.files) == 3


def test_files_that_hold_more_than_the_recording_are_read_to_its_end(tmp_path: Path) -> None:
    extractor = binary(tmp_path)
    with (tmp_path / "part0.bin").open("ab") as file:
        file.write(b"\0" * 100)
    recording = ks4stream.open_recording(extractor)
    assert isinstance(recording.source, BinarySource)
    assert recording.n_samples == len(SAMPLES)


def test_one_channel_after_the_other_is_refused(tmp_path: Path) -> None:
    """SpikeInterface reads a stretch of such a file wrongly."""
    extractor = binary(tmp_path, np.ascontiguousarray(SAMPLES.T), num_channels=N_CHANNELS, time_axis=1)
    with pytest.raises(RecordingError, match=r"time_axis=1.*Open it without SpikeInterface"):
        ks4stream.open_recording(extractor)
    mapped = np.memmap(tmp_path / "part0.bin", np.int16, "r", shape=SAMPLES.shape[::-1]).T
    np.testing.assert_array_equal(ks4stream.open_recording(mapped, fs=RATE).read(10, 500), SAMPLES[10:500])


@saves_files
@pytest.mark.parametrize("format", ["flat", "zarr", "lazy", "memory"])
def test_a_slice_of_channels_has_its_own_order(format: str, tmp_path: Path) -> None:
    """Slices are made whenever a probe does not use all channels, and for each group."""
    extractor = in_memory() if format == "memory" else binary(tmp_path, n_files=2)
    if format == "zarr":
        extractor = extractor.save(format="zarr", folder=tmp_path / "saved.zarr", progress_bar=False, n_jobs=1)
    expected = SAMPLES
    if format == "lazy":
        extractor, expected = lazy(extractor), 2 * SAMPLES
    extractor = extractor.select_channels(extractor.channel_ids[[4, 1, 0, 2]])
    extractor = extractor.select_channels(extractor.channel_ids[[3, 0, 2]])
    order = [2, 4, 0]
    recording = ks4stream.open_recording(extractor)
    np.testing.assert_array_equal(recording.read(4000, 5000), expected[4000:5000, order])
    np.testing.assert_array_equal(recording.probe.chan_map, [0, 1, 2])
    np.testing.assert_array_equal(recording.probe.positions_um, POSITIONS[order])
    parts = getattr(recording.source, "sources", (recording.source,))
    kind = ChannelSource if format in ("flat", "zarr") else ExtractorSource
    assert {type(part) for part in parts} == {kind}
    if format == "flat":
        assert recording.files == (str(tmp_path / "part0.bin"), str(tmp_path / "part1.bin"))
        assert b"spikeinterface" not in pickle.dumps(recording.source)
        assert recording.source.flat_files == (f"3 of 6 channels were selected from {tmp_path / 'part0.bin'}")
        other = ks4stream.open_recording(extractor.select_channels(extractor.channel_ids[::-1]))
        assert recording.source.digest_is_exact and other.digest() != recording.digest()


def test_a_class_that_changes_the_samples_of_a_file_is_asked_for_them(tmp_path: Path) -> None:
    class Doubled(core.BinaryRecordingExtractor):
        def get_traces(self, **about: Any) -> Any:
            return 2 * super().get_traces(**about)

    binary(tmp_path)
    extractor = described(Doubled([tmp_path / "part0.bin"], RATE, "int16", num_channels=N_CHANNELS))
    np.testing.assert_array_equal(ks4stream.open_recording(extractor).read(0, 50), 2 * SAMPLES[:50])


@saves_files
@pytest.mark.parametrize("n_segments", [1, 2])
@pytest.mark.parametrize(("format", "kind"), [("binary", BinarySource), ("zarr", ZarrSource)])
def test_what_spikeinterface_has_saved_is_read_where_it_lies(
    format: str, kind: type, n_segments: int, tmp_path: Path
) -> None:
    folder = tmp_path / ("saved.zarr" if format == "zarr" else "saved")
    extractor = in_memory(n_segments=n_segments).save(format=format, folder=folder, progress_bar=False, n_jobs=1)
    recording = ks4stream.open_recording(extractor)
    assert {type(part) for part in getattr(recording.source, "sources", (recording.source,))} == {kind}
    assert all(str(folder) in file for file in recording.files)
    np.testing.assert_array_equal(recording.read(0, len(SAMPLES)), SAMPLES)
    np.testing.assert_array_equal(recording.probe.positions_um, POSITIONS)
    assert recording.gain_uv == 0.195
    again = core.load(folder)  # as in another session
    assert ks4stream.open_recording(again).digest() == recording.digest()


def test_a_list_of_recordings_is_joined_in_time(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    extractors = [binary(tmp_path), binary(tmp_path / "other")]
    assert ks4stream.open_recording(extractors).n_samples == 2 * len(SAMPLES)


# -- through SpikeInterface ------------------------------------------------------------------------------


def test_a_lazy_recording_travels_as_its_description(tmp_path: Path) -> None:
    recording = ks4stream.open_recording(lazy(binary(tmp_path, n_files=2)))
    assert recording.files == (str(tmp_path / "part0.bin"), str(tmp_path / "part1.bin"))
    sent = pickle.dumps(recording.source)
    assert len(sent) < SAMPLES.nbytes / 2
    received = pickle.loads(sent)
    assert received.digest() == recording.source.digest()
    assert received.sources[0].extractor is received.sources[1].extractor
    np.testing.assert_array_equal(received.read(4000, 5000), 2 * SAMPLES[4000:5000])


@pytest.mark.slow
def test_another_process_reads_the_same(tmp_path: Path) -> None:
    source = ks4stream.open_recording(lazy(binary(tmp_path))).source
    (tmp_path / "sent").write_bytes(pickle.dumps(source))
    code = "import pickle, sys; print(pickle.loads(open(sys.argv[1], 'rb').read()).digest())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == source.digest()


def test_a_recording_in_memory_travels_with_its_samples() -> None:
    recording = ks4stream.open_recording(in_memory(n_segments=2))
    assert recording.files == ()  # it is sorted in this process
    received = pickle.loads(pickle.dumps(recording.source))
    np.testing.assert_array_equal(received.read(0, len(SAMPLES)), SAMPLES)
    assert received.digest() == recording.source.digest()


def test_what_is_read_from_memory_is_a_copy() -> None:
    extractor = in_memory()
    ks4stream.open_recording(extractor).read(0, 50)[:] = 0
    np.testing.assert_array_equal(extractor.get_traces(start_frame=0, end_frame=50), SAMPLES[:50])


def test_a_recording_of_this_process_alone_says_so_when_it_is_to_be_sent() -> None:
    extractor = in_memory()
    extractor._serializability["memory"] = False
    source = ks4stream.open_recording(extractor).source
    np.testing.assert_array_equal(source.read(0, 5), SAMPLES[:5])
    with pytest.raises(RecordingError, match=r"exists only in this process.*recording\.save\(folder=…\)"):
        pickle.dumps(source)


@saves_files
def test_files_of_folders_are_named_and_not_the_folder(tmp_path: Path) -> None:
    """Results may be written to another place in the folder of a session."""
    folder = tmp_path / "saved"
    extractor = lazy(in_memory().save(folder=folder, progress_bar=False, n_jobs=1))
    files = ks4stream.open_recording(extractor).files
    assert files and str(folder) not in files and all(file.startswith(str(folder)) for file in files)


def test_large_recordings_are_digested_by_samples_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SAMPLES.copy()
    source = ks4stream.open_recording(in_memory(samples)).source
    whole = source.digest()
    assert source.digest_is_exact
    monkeypatch.setattr("ks4stream.io.sources.extractor._DIGEST_WHOLE_BYTES", 1000)
    monkeypatch.setattr("ks4stream.io.sources.extractor._DIGEST_SPOTS", 2)
    assert not source.digest_is_exact
    assert source.digest() != whole
    digest = source.digest()
    samples[4500] += 1  # between the two places that are looked at
    assert source.digest() == digest
    samples[-1] += 1
    assert source.digest() != digest


# -- metadata ----------------------------------------------------------------------------------------------


def test_gains_that_differ_are_none() -> None:
    extractor = in_memory()
    extractor.set_channel_gains(np.arange(1.0, 7.0))
    recording = ks4stream.open_recording(extractor)
    assert (recording.gain_uv, recording.offset_uv) == (None, None)


def test_a_float_recording_without_gain_is_refused() -> None:
    extractor = core.NumpyRecording([SAMPLES.astype(np.float32)], RATE)
    with pytest.raises(RecordingError, match=r"float32 samples without a gain.*set_channel_gains\(1e6\)"):
        ks4stream.open_recording(extractor)
    extractor.set_channel_gains(1.0)
    extractor.set_channel_offsets(0.0)
    assert ks4stream.open_recording(extractor).gain_uv == 1.0


def test_other_types_are_refused() -> None:
    with pytest.raises(RecordingError, match="holds uint8 samples; supported are"):
        ks4stream.open_recording(core.NumpyRecording([SAMPLES.astype(np.uint8)], RATE))


def test_what_the_caller_says_is_compared() -> None:
    with pytest.raises(RecordingError, match="n_chan=7"):
        ks4stream.open_recording(in_memory(), n_chan=7)
    assert ks4stream.open_recording(in_memory(), fs=25_000.0).sampling_rate_hz == 25_000.0


def test_groups_are_shanks() -> None:
    extractor = in_memory()
    extractor.set_property("group", np.array([3, 3, 3, 7, 7, 7]))
    np.testing.assert_array_equal(ks4stream.open_recording(extractor).probe.shank, [3, 3, 3, 7, 7, 7])
    extractor.set_property("group", np.array(["left", "right"] * 3))
    np.testing.assert_array_equal(ks4stream.open_recording(extractor).probe.shank, [0, 1] * 3)


def test_shanks_of_a_probe_are_shanks_whatever_the_groups() -> None:
    import probeinterface

    probe = probeinterface.generate_multi_shank(num_shank=2, num_columns=1, num_contact_per_column=3)
    probe.set_device_channel_indices(np.arange(6))
    extractor = core.NumpyRecording([SAMPLES], RATE)
    extractor.set_probe(probe, group_mode="by_probe")
    np.testing.assert_array_equal(ks4stream.open_recording(extractor).probe.shank, [0, 0, 0, 1, 1, 1])


def test_the_order_of_contacts_is_that_of_channels() -> None:
    import probeinterface

    probe = probeinterface.generate_linear_probe(num_elec=6, ypitch=25)
    probe.set_device_channel_indices([3, 1, 0, 5, 4, 2])
    extractor = core.NumpyRecording([SAMPLES], RATE)
    extractor.set_probe(probe)
    expected = extractor.get_channel_locations()
    found = ks4stream.open_recording(extractor).probe
    np.testing.assert_array_equal(found.positions_um, expected)
    np.testing.assert_array_equal(found.chan_map, np.arange(6))
    assert found.y_um.tolist() == [50, 25, 125, 0, 100, 75]


def test_a_recording_without_probe_can_be_opened_and_not_sorted() -> None:
    recording = ks4stream.open_recording(core.NumpyRecording([SAMPLES], RATE))
    assert recording.probe is None
    with pytest.raises(ProbeError, match="has no probe"):
        ks4stream.sort(recording, client="loop")


def test_three_coordinates_are_refused() -> None:
    import probeinterface

    probe = probeinterface.generate_linear_probe(num_elec=6, ypitch=25).to_3d()
    probe.set_device_channel_indices(np.arange(6))
    extractor = core.NumpyRecording([SAMPLES], RATE)
    extractor.set_probe(probe)
    with pytest.raises(ProbeError, match=r"three coordinates.*planarize"):
        ks4stream.open_recording(extractor)
    assert ks4stream.open_recording(extractor, probe="tetrode").probe.n_channels == 4


def test_contacts_at_the_same_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two probes, say, on top of each other in one group."""
    extractor = in_memory()
    positions = POSITIONS.copy()
    positions[3] = positions[0]
    monkeypatch.setattr(extractor, "get_channel_locations", lambda: positions)  # probeinterface refuses them too
    with pytest.raises(ProbeError, match="channels 0, 3 are at the same position"):
        ks4stream.open_recording(extractor)


def test_contacts_without_a_place_are_refused() -> None:
    extractor = in_memory()
    positions = POSITIONS.copy()
    positions[2] = np.nan
    extractor = with_contacts(extractor, positions)
    with pytest.raises(ProbeError, match=r"is nan for contact 2"):
        ks4stream.open_recording(extractor)


def test_a_spikeinterface_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = in_memory()
    monkeypatch.setattr("spikeinterface.__version__", "0.104.3")
    with pytest.raises(MissingDependencyError, match=r"SpikeInterface 0\.104\.3 is too old.*0\.105 or later"):
        ks4stream.open_recording(extractor)


def test_other_objects_of_spikeinterface_are_refused() -> None:
    sorting = core.generate_sorting(num_units=2, durations=[1.0])
    with pytest.raises(RecordingError, match="cannot be opened from an object of type"):
        ks4stream.open_recording(sorting)
