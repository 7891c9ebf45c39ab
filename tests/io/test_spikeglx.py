"""What SpikeGLX metadata mean, on files cut down to a few contacts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import Ks4StreamWarning, ProbeError, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.io.spikeglx import find_meta, read_meta
from ks4stream.quality import check_traces

REAL_CLIP = Path(__file__).resolve().parents[3] / "shared" / "data" / "np2-real"

# Six contacts of a four-shank probe and the sync channel; channel 4 is the reference.
NP2 = {
    "typeThis": "imec",
    "nSavedChans": "7",
    "snsApLfSy": "6,0,1",
    "acqApLfSy": "6,0,1",
    "snsSaveChanSubset": "0:6",
    "imSampRate": "30000.5",
    "imAiRangeMax": "0.5",
    "imMaxInt": "8192",
    "imDatPrb_type": "24",
    "imDatPrb_pn": "NP2010",
    "~snsGeomMap": "(NP2010,4,250,70)(2:27:720:1)(2:59:720:1)(1:27:0:1)(1:59:0:1)(1:27:15:0)(1:59:15:1)",
    "~snsShankMap": "(4,2,640)(2:0:48:1)(2:1:48:1)(1:0:0:1)(1:1:0:1)(1:0:1:0)(1:1:1:1)",
}


def write_meta(path: Path, tags: dict[str, str], **changes: str | None) -> Path:
    """Write tags, some changed or (None) left out; ``_`` in a keyword stands for a leading ``~``."""
    named = {key.replace("_", "~", 1) if key.startswith("_") else key: value for key, value in changes.items()}
    lines = [f"{key}={value}" for key, value in {**tags, **named}.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_np2_with_geometry(tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.meta", NP2, fileSizeBytes="1400"))
    assert (meta.stream, meta.n_channels, meta.n_neural, meta.file_size_bytes) == ("imec", 7, 6, 1400)
    assert meta.sampling_rate_hz == 30000.5
    assert meta.gain_uv == pytest.approx(0.762939453125)
    probe = meta.probe()
    assert probe is not None and probe.name == "run" and probe.n_chan_file == 7
    assert probe.chan_map.tolist() == [0, 1, 2, 3, 5]
    assert probe.x_um.tolist() == [527, 559, 277, 309, 309]
    assert probe.y_um.tolist() == [720, 720, 0, 0, 15]
    assert probe.shank.tolist() == [2, 2, 1, 1, 1]


def test_older_files_give_the_same_geometry_by_column_and_row(tmp_path: Path) -> None:
    new = read_meta(write_meta(tmp_path / "run.meta", NP2)).probe()
    assert read_meta(write_meta(tmp_path / "run.meta", NP2, _snsGeomMap=None)).probe() == new
    by_type = write_meta(tmp_path / "run.meta", NP2, _snsGeomMap=None, imDatPrb_pn=None)
    assert read_meta(by_type).probe() == new


def test_electrodes_of_the_readout_table(tmp_path: Path) -> None:
    tags = {key: value for key, value in NP2.items() if "Map" not in key}
    table = "(24,6)(0 2 0 0 96)(1 2 0 0 97)(2 1 0 0 0)(3 1 0 0 1)(4 1 0 0 2)(127 1 0 0 3)"
    probe = read_meta(write_meta(tmp_path / "run.meta", tags, _imroTbl=table)).probe()
    assert probe is not None
    assert probe.chan_map.tolist() == [0, 1, 2, 3, 4]  # acquired channel 127 is the reference
    assert probe.x_um.tolist() == [527, 559, 277, 309, 277]
    assert probe.y_um.tolist() == [720, 720, 0, 0, 15]
    assert probe.shank.tolist() == [2, 2, 1, 1, 1]


def np1_tags(gains: list[int]) -> dict[str, str]:
    entries = "".join(f"({channel} 0 0 {gain} 250 1)" for channel, gain in enumerate(gains))
    return {
        "typeThis": "imec", "nSavedChans": "5", "snsApLfSy": "4,0,1", "acqApLfSy": "4,4,1", "imSampRate": "30000",
        "imAiRangeMax": "0.6", "imDatPrb_type": "0", "~imroTbl": "(0,4)" + entries,
    }  # fmt: skip


def test_np1_gain_is_selectable_and_rows_are_staggered(tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.meta", np1_tags([500] * 4)))
    assert meta.gain_uv == pytest.approx(1e6 * 0.6 / 512 / 500)
    probe = meta.probe()
    assert probe is not None
    assert probe.x_um.tolist() == [27, 59, 11, 43] and probe.y_um.tolist() == [0, 0, 20, 20]
    rows = "(1,2,480)(0:0:0:1)(0:1:0:1)(0:0:1:1)(0:1:1:1)"
    by_row = write_meta(tmp_path / "run.meta", np1_tags([500] * 4), _snsShankMap=rows)
    assert read_meta(by_row).probe() == probe


def test_a_gain_that_differs_between_channels_is_none(tmp_path: Path) -> None:
    assert read_meta(write_meta(tmp_path / "run.meta", np1_tags([500, 500, 250, 500]))).gain_uv is None


def test_the_gain_of_the_lf_band_is_its_own(tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.lf.meta", np1_tags([500] * 4), snsApLfSy="0,4,1", imSampRate="2500"))
    assert meta.gain_uv == pytest.approx(1e6 * 0.6 / 512 / 250) and meta.n_neural == 4


@pytest.mark.parametrize(("probe_type", "gain_uv"), [("21", 0.5e6 / 8192 / 80), ("2013", 0.62e6 / 2048 / 100)])
def test_np2_gains_are_fixed(probe_type: str, gain_uv: float, tmp_path: Path) -> None:
    range_v = {"21": "0.5", "2013": "0.62"}[probe_type]
    path = write_meta(tmp_path / "run.meta", NP2, imDatPrb_type=probe_type, imAiRangeMax=range_v, imMaxInt=None)
    assert read_meta(path).gain_uv == pytest.approx(gain_uv)


def test_saved_subset(tmp_path: Path) -> None:
    """The readout table lists acquired channels, of which only some are saved."""
    tags = np1_tags([500] * 4) | {"nSavedChans": "3", "snsApLfSy": "2,0,1", "snsSaveChanSubset": "1,3,8"}
    probe = read_meta(write_meta(tmp_path / "run.meta", tags)).probe()
    assert probe is not None
    assert probe.chan_map.tolist() == [0, 1] and probe.x_um.tolist() == [59, 43] and probe.y_um.tolist() == [0, 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_snsGeomMap": None, "imDatPrb_pn": "NP9999"}, "probe part NP9999 are not known"),
        ({"_snsGeomMap": None, "imDatPrb_pn": None, "imProbeOpt": "4"}, "phase 3A option 4 are not known"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:720:1)"}, "describes 1 contacts, but the file has 6"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:720)"}, "needed are entries of 4 numbers"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:x:1)"}, "~snsGeomMap cannot be read"),
        ({"_snsGeomMap": "(NP2010)(2:27:720:1)"}, "no distance between shanks"),
        ({"_snsGeomMap": ""}, "~snsGeomMap cannot be read"),
        ({"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": "(24,1)(0 1 2)"}, "3 numbers per channel"),
        (
            {"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": "(24,1)(0 1 0 0 2)", "snsSaveChanSubset": "a"},
            "do not tell the channels",
        ),
    ],
)
def test_geometry_that_cannot_be_read_is_an_error(changes: dict[str, str | None], message: str, tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.meta", NP2, **changes))
    with pytest.raises(ProbeError, match=message):
        meta.probe()


def test_no_geometry_at_all_is_no_probe(tmp_path: Path) -> None:
    assert read_meta(write_meta(tmp_path / "run.meta", NP2, _snsGeomMap=None, _snsShankMap=None)).probe() is None


def test_nidq_streams_have_no_probe(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "run.meta", {"typeThis": "nidq", "nSavedChans": "9", "niSampRate": "25000"})
    meta = read_meta(path)
    assert (meta.n_channels, meta.sampling_rate_hz, meta.gain_uv, meta.probe()) == (9, 25000.0, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nSavedChans": None}, "has no line nSavedChans="),
        ({"imSampRate": "fast"}, "imSampRate=fast is no number"),
        ({"snsApLfSy": "6"}, "snsApLfSy=6; needed are three"),
        ({"snsApLfSy": "8,0,1"}, "are more than nSavedChans=7"),
    ],
)
def test_unreadable_metadata_are_an_error(changes: dict[str, str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=message):
        read_meta(write_meta(tmp_path / "run.meta", NP2, **changes))


def test_find_meta(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "a.imec0.ap.meta", NP2)
    assert find_meta(tmp_path / "a.imec0.ap.bin") == str(meta)
    assert find_meta(tmp_path / "a.imec0.ap.dat") is None
    assert find_meta(tmp_path / "b.bin") is None


# -- with the samples ----------------------------------------------------------------------------------


def write_run(folder: Path, name: str = "run", **changes: str | None) -> Path:
    """Ten samples of seven channels, and their metadata."""
    path = folder / f"{name}.bin"
    np.arange(70, dtype=np.int16).tofile(path)
    write_meta(folder / f"{name}.meta", NP2, **changes)
    return path


def test_a_bin_beside_its_meta_needs_no_arguments(tmp_path: Path) -> None:
    path = write_run(tmp_path, fileSizeBytes="140")
    recording = open_recording(path)
    assert (recording.n_samples, recording.n_channels, recording.sampling_rate_hz) == (10, 7, 30000.5)
    assert recording.gain_uv == pytest.approx(0.762939453125) and recording.offset_uv == 0.0
    assert recording.name == "run.bin" and recording.files == (str(path),)
    assert recording.probe is not None and recording.probe.n_channels == 5
    np.testing.assert_array_equal(recording.read(2, 3), [range(14, 21)])


def test_arguments_beat_metadata(tmp_path: Path) -> None:
    recording = open_recording(write_run(tmp_path), n_chan=7, fs=20000, dtype="int16", probe="tetrode")
    assert recording.sampling_rate_hz == 20000.0
    assert recording.probe is not None and recording.probe.name == "tetrode"


def test_arguments_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with pytest.raises(RecordingError, match=r"n_chan=14, but .*run\.meta says that run\.bin has 7 channels"):
        open_recording(path, n_chan=14)
    with pytest.raises(RecordingError, match="dtype=int32, but SpikeGLX writes int16"):
        open_recording(path, dtype="int32")


def test_a_file_cut_short_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(Ks4StreamWarning, match=r"has 140 bytes, but run\.meta says 280: was it copied"):
        assert open_recording(write_run(tmp_path, fileSizeBytes="280")).n_samples == 10
    with pytest.raises(RecordingError, match="2 bytes are left over"):
        path = write_run(tmp_path)
        path.write_bytes(path.read_bytes() + b"xx")
        open_recording(path)


def test_unknown_geometry_leaves_the_probe_to_the_user(tmp_path: Path) -> None:
    path = write_run(tmp_path, _snsGeomMap=None, imDatPrb_pn="NP9999")
    with pytest.warns(Ks4StreamWarning, match="NP9999 are not known. Give the probe explicitly"):
        assert open_recording(path).probe is None
    assert open_recording(path, probe="tetrode").probe is not None


def test_files_of_one_run_are_joined_in_time(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "t0"), write_run(tmp_path, "t1")]
    recording = open_recording(paths)
    assert recording.n_samples == 20 and recording.files == tuple(str(path) for path in paths)
    assert recording.name == "t0.bin and 1 more"
    assert recording.gain_uv == pytest.approx(0.762939453125) and recording.probe is not None
    np.testing.assert_array_equal(recording.read(9, 11), [range(63, 70), range(7)])


def test_files_of_different_runs_are_not_joined(tmp_path: Path) -> None:
    first = write_run(tmp_path, "t0")
    with pytest.raises(RecordingError, match=r"sampling rates differ \(t0.bin: 30000.5 Hz, t1.bin: 20000.0 Hz\)"):
        open_recording([first, write_run(tmp_path, "t1", imSampRate="20000")])
    other = str(NP2["~snsGeomMap"]).replace(":720:", ":750:")
    with pytest.raises(ProbeError, match=r"t0.bin and t1.bin cannot be joined in time: their probes differ"):
        open_recording([first, write_run(tmp_path, "t1", _snsGeomMap=other)])
    assert open_recording([first, write_run(tmp_path, "t1", _snsGeomMap=other)], probe="tetrode").n_samples == 20


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="the real Neuropixels clip is not beside this checkout")
def test_real_clip() -> None:
    recording = open_recording(REAL_CLIP / "run1.bin")
    assert (recording.n_samples, recording.n_channels, recording.sampling_rate_hz) == (15000, 385, 30000.0)
    assert recording.gain_uv == pytest.approx(0.762939, abs=1e-6)
    reference = json.loads((REAL_CLIP / "probe.json").read_text())
    probe = recording.probe
    assert probe is not None
    assert probe.chan_map.tolist() == reference["chanMap"] and 127 not in probe.chan_map
    assert probe.x_um.tolist() == reference["xc"] and probe.y_um.tolist() == reference["yc"]
    assert probe.shank.tolist() == reference["kcoords"]
    assert check_traces(recording) == []
    meta = read_meta(REAL_CLIP / "run1.meta")
    for tag in ("snsGeomMap", "snsShankMap"):  # older files lack them; the geometry stays the same
        meta.tags.pop(tag)  # type: ignore[attr-defined]
        assert meta.probe() == probe
