"""What SpikeGLX metadata mean, on files cut down to a few contacts."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import Ks4StreamWarning, ProbeError, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.io.spikeglx import _PART_OF_TYPE, _REFERENCE_CHANNEL, find_meta, read_meta
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
        "typeThis": "imec",
        "nSavedChans": "5",
        "snsApLfSy": "4,0,1",
        "acqApLfSy": "4,4,1",
        "imSampRate": "30000",
        "imAiRangeMax": "0.6",
        "imDatPrb_type": "0",
        "imDatPrb_pn": "NP1000",
        "~imroTbl": "(0,4)" + entries,
    }


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


def neural_tags(part_number: str | None, imro: str, n_channels: int = 384, **more: str) -> dict[str, str]:
    """Metadata of all channels of a probe, of which only the readout table tells the geometry."""
    tags = {
        "typeThis": "imec",
        "nSavedChans": f"{n_channels + 1}",
        "snsApLfSy": f"{n_channels},0,1",
        "imSampRate": "30000",
        "acqApLfSy": f"{n_channels},{n_channels},1",
        "imAiRangeMax": "0.6",
        "snsSaveChanSubset": "all",
        "~imroTbl": imro,
        **more,
    }
    return tags if part_number is None else {**tags, "imDatPrb_pn": part_number}


@pytest.mark.parametrize("bank", [0, 5])
def test_groups_of_channels_of_the_readout_table(bank: int, tmp_path: Path) -> None:
    """NP1110 lists 24 groups, each with two banks; SpikeGLX documents which contact a channel then reads."""
    table = "(1110,2,0,1000,125,1)" + "".join(f"({group} {bank} {bank})" for group in range(24))
    meta = read_meta(write_meta(tmp_path / "run.meta", neural_tags("NP1110", table)))
    assert meta.gain_uv == pytest.approx(1e6 * 0.6 / 512 / 1000)
    probe = meta.probe()
    assert probe is not None and probe.chan_map.tolist() == list(range(384))
    row, column = (probe.y_um / 6).astype(int), ((probe.x_um - 15.5) / 6).astype(int)
    assert sorted(zip(row, column, strict=True)) == [(48 * bank + r, c) for r in range(48) for c in range(8)]
    expected = {0: [(0, 0), (7, 7), (0, 1), (7, 6), (1, 0)], 5: [(240, 3), (247, 4), (240, 2), (247, 5), (241, 3)]}
    assert list(zip(row, column, strict=True))[:5] == expected[bank]


def test_inner_and_outer_columns_of_the_readout_table(tmp_path: Path) -> None:
    """Half of NP1110's channels read one bank, half the other: in one mode those the other mode leaves out."""
    places = []
    for mode in (0, 1):
        table = f"(1110,{mode},0,500,250,1)" + "".join(f"({group} 0 4)" for group in range(24))
        probe = read_meta(write_meta(tmp_path / "run.meta", neural_tags("NP1110", table))).probe()
        assert probe is not None
        places.append({(x, y) for x, y in probe.positions_um})
        assert np.count_nonzero(probe.y_um < 48 * 6) == 192
    assert not places[0] & places[1]


def test_a_vertical_stripe_is_where_spikeglx_itself_says(tmp_path: Path) -> None:
    """The table and the first of the contacts of a file that has both it and ~snsGeomMap (SpikeGLX 20251218)."""
    banks = [(9, 13), (11, 15), (8, 12), (10, 14)]
    table = "(1110,0,0,500,250,1)" + "".join(f"({group} {a} {b})" for group, (a, b) in enumerate(banks * 6))
    probe = read_meta(write_meta(tmp_path / "run.meta", neural_tags("NP1110", table))).probe()
    assert probe is not None
    expected = {
        0: (33.5, 3744),
        1: (39.5, 4362),
        2: (33.5, 2592),
        3: (39.5, 3210),
        4: (33.5, 3750),
        32: (33.5, 3456),
        63: (39.5, 2880),
        64: (33.5, 3792),
        383: (39.5, 3120),
    }
    assert {channel: tuple(probe.positions_um[channel]) for channel in expected} == expected


PHASE_3A_REFERENCES = [36, 75, 112, 151, 188, 227, 264, 303, 340, 379]


@pytest.mark.parametrize(("option", "n_channels", "bank"), [("3", 384, 0), ("3", 384, 1), ("4", 276, 2)])
def test_phase_3a_has_reference_sites_of_its_own(option: str, n_channels: int, bank: int, tmp_path: Path) -> None:
    entries = "".join(f"({channel} {bank} 0 500 250)" for channel in range(n_channels))
    tags = neural_tags(None, f"(641251209,{option},{n_channels})" + entries, n_channels, imProbeOpt=option)
    probe = read_meta(write_meta(tmp_path / "run.meta", tags)).probe()
    assert probe is not None
    used = [channel for channel in range(n_channels) if channel not in PHASE_3A_REFERENCES]
    assert probe.chan_map.tolist() == used and 191 in used
    electrode = bank * n_channels + np.array(used)
    np.testing.assert_array_equal(probe.y_um, electrode // 2 * 20.0)
    np.testing.assert_array_equal(probe.x_um, np.array([27.0, 59, 11, 43])[electrode % 4])


def np1_table(head: str) -> str:
    return head + "".join(f"({channel} 0 0 500 250 1)" for channel in range(384))


def test_the_part_number_may_stand_in_the_readout_table(tmp_path: Path) -> None:
    """As SpikeGLX writes it since 2026. The rows of NP1015 are not staggered, those of its type's first part are."""
    tags = neural_tags(None, np1_table("(NP1015,384)"), imDatPrb_type="0")
    probe = read_meta(write_meta(tmp_path / "run.meta", tags)).probe()
    assert probe is not None
    assert probe.x_um[:4].tolist() == [27, 59, 27, 59] and 191 not in probe.chan_map


def test_a_layout_taken_by_the_type_alone_is_told(tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.meta", neural_tags(None, np1_table("(0,384)"), imDatPrb_type="0")))
    with pytest.warns(
        Ks4StreamWarning, match=r"does not give a part number \(imDatPrb_pn\).*as on NP1000, but .*type 0"
    ) as told:
        probe = meta.probe()
    assert len(told) == 1
    assert probe is not None and probe.x_um[:4].tolist() == [27, 59, 11, 43]


@pytest.mark.parametrize(
    ("part_number", "places", "x_um", "y_um"),
    [
        ("NP1000", ["0:1:0", "0:1:3"], [59, 43], [0, 60]),
        ("NP1022", ["0:1:0", "0:1:3"], [114, 114], [0, 60]),
        ("NP1100", ["0:7:0", "0:0:47"], [56, 14], [0, 282]),
        ("NP1200", ["0:1:0", "0:1:3"], [88.5, 68.5], [0, 93]),
        ("NP2006", ["0:1:0", "0:1:3"], [59, 43], [0, 45]),
        ("NP2013", ["3:0:0", "1:1:639"], [777, 309], [0, 9585]),
        ("NP2022", ["1:0:0", "1:0:1"], [2168.45, 2152.45], [0, 15]),
    ],
)
def test_dimensions_are_those_the_maker_publishes(
    part_number: str, places: list[str], x_um: list[float], y_um: list[float], tmp_path: Path
) -> None:
    """x is measured from the left edge of the first shank, as in newer files."""
    tags = neural_tags(part_number, "", 2) | {"~snsShankMap": "(…)" + "".join(f"({place}:1)" for place in places)}
    probe = read_meta(write_meta(tmp_path / "run.meta", tags)).probe()
    assert probe is not None
    np.testing.assert_allclose(probe.x_um, x_um, rtol=1e-12)  # float64 sums in another order
    np.testing.assert_allclose(probe.y_um, y_um, rtol=1e-12)


def test_references_and_types_are_those_of_the_catalogue() -> None:
    """Of the makers' table, which comes with probeinterface; its functions leave these columns out."""
    library = resources.files("probeinterface") / "resources" / "neuropixels_probe_features.json"
    catalogue = json.loads(library.read_text(encoding="utf-8"))
    for part, features in catalogue["neuropixels_probes"].items():
        found = [channel for start, channel in _REFERENCE_CHANNEL.items() if part.startswith(start)]
        assert (found or [-1]) == [int(features["on_shank_ref_chan"])], part
    for kind, part in catalogue["z_imro_format_type_to_part_number"].items():
        assert _PART_OF_TYPE.get(kind, f"NP{kind}") == part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_snsGeomMap": None, "imDatPrb_pn": "NP9999"}, "probe part NP9999 are not known"),
        ({"_snsGeomMap": None, "_snsShankMap": "(4,2,640)" + 6 * "(3:2:0:1)"}, "probe part NP2010 does not have"),
        ({"_snsGeomMap": None, "_snsShankMap": "(4,2,640)" + 6 * "(-1:0:0:1)"}, "probe part NP2010 does not have"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:720:1)"}, "describes 1 contacts, but the file has 6"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:720)"}, "all entries must have 4 numbers"),
        ({"_snsGeomMap": "(NP2010,4,250,70)(2:27:x:1)"}, "~snsGeomMap cannot be read"),
        ({"_snsGeomMap": "(NP2010)(2:27:720:1)"}, "no distance between shanks"),
        ({"_snsGeomMap": ""}, "~snsGeomMap cannot be read"),
        ({"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": "(24,1)(0 1 2)"}, "3 numbers per channel"),
        ({"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": "(24,2,0,1,1,1)(0 1 2)"}, "read by probeinterface"),
        (
            {"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": "(24,1)(0 1 0 0 2)", "snsSaveChanSubset": "a"},
            "do not identify the channels",
        ),
    ],
)
def test_geometry_that_cannot_be_read_is_an_error(changes: dict[str, str | None], message: str, tmp_path: Path) -> None:
    meta = read_meta(write_meta(tmp_path / "run.meta", NP2, **changes))
    with pytest.raises(ProbeError, match=message):
        meta.probe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snsSaveChanSubset": "0:99999999999"}, "snsSaveChanSubset lists more than 7 channels"),
        ({"_imroTbl": "(24,6)(0 nan 0 0 2)(1 1 0 0 3)"}, "imroTbl cannot be read"),
        ({"_imroTbl": "(24,6)(0 1e300 0 0 2)(1 1 0 0 3)"}, "imroTbl cannot be read"),
    ],
)
def test_numbers_out_of_all_bounds_are_an_error(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    table = "(24,6)" + "".join(f"({channel} 1 0 0 {channel})" for channel in range(6))
    base: dict[str, str | None] = {"_snsGeomMap": None, "_snsShankMap": None, "_imroTbl": table}
    with pytest.raises(ProbeError, match=message):
        read_meta(write_meta(tmp_path / "run.meta", NP2, **base | changes)).probe()


def test_numbers_of_no_sense_are_not_told(tmp_path: Path) -> None:
    for name in ("imChan0apGain", "imMaxInt"):
        assert read_meta(write_meta(tmp_path / "run.meta", NP2, **{name: "0.0"})).gain_uv is None
    digits = "9" * 5000
    meta = read_meta(write_meta(tmp_path / "run.meta", NP2, firstSample=digits, fileSizeBytes=digits))
    assert meta.first_sample is None and meta.file_size_bytes is None
    with pytest.raises(RecordingError, match=r"nSavedChans=1e12; it must be between 1 and"):
        read_meta(write_meta(tmp_path / "run.meta", NP2, nSavedChans="1e12"))


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
        ({"nSavedChans": "0"}, "nSavedChans=0; it must be between 1 and"),
        ({"nSavedChans": "nan"}, "nSavedChans=nan is not a number"),
        ({"nSavedChans": "inf"}, "nSavedChans=inf is not a number"),
        ({"imSampRate": "fast"}, "imSampRate=fast is not a number"),
        ({"snsApLfSy": "6"}, "snsApLfSy=6; it must be three"),
        ({"snsApLfSy": "8,0,1"}, "exceeds nSavedChans=7"),
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
    with pytest.raises(RecordingError, match="dtype=int32, but SpikeGLX files hold int16"):
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


def write_part(folder: Path, name: str, first: int | None, **changes: str | None) -> Path:
    """A file of ten samples that begins at a sample of the acquisition."""
    named = {"fileName": f"D:/data/run_g0/{name}.bin", **changes}
    return write_run(folder, name, firstSample=None if first is None else str(first), **named)


def test_parts_that_follow_each_other_are_joined_without_a_word(tmp_path: Path) -> None:
    paths = [write_part(tmp_path, f"run_g{n}_t0.imec0.ap", 1000 + 10 * n) for n in range(3)]
    assert open_recording(paths).n_samples == 30
    # Another acquisition counts its samples from 0 again: it has another name, or began at another time.
    for name, changes in [("day2_g0_t0", {}), ("run_g0_t9", {"fileCreateTime": "2024-05-02T09:00:00"})]:
        first = write_part(tmp_path, "run_g0_t0", 5000, fileCreateTime="2024-05-01T09:00:00")
        assert open_recording([first, write_part(tmp_path, name, 12, **changes)]).n_samples == 20
    # Without a count nothing can be told.
    assert open_recording([write_part(tmp_path, "a", None), write_part(tmp_path, "b", 0)]).n_samples == 20


def test_gaps_and_overlaps_are_told_by_their_length(tmp_path: Path) -> None:
    starts = {"run_g0_t0": 0, "run_g0_t1": 10 + 60001, "run_g0_t2": 60021, "run_g0_t3": 60028}
    paths = [write_part(tmp_path, name, start) for name, start in starts.items()]
    message = (
        r"60001 samples \(2 s\) are missing between run_g0_t0\.bin and run_g0_t1\.bin; "
        r"the last 3 samples \(0\.0001 s\) of run_g0_t2\.bin are in run_g0_t3\.bin too\. Spike times count"
    )
    with pytest.warns(Ks4StreamWarning, match=message) as caught:
        assert open_recording(paths).n_samples == 40
    assert len(caught) == 1


def test_a_file_cut_short_leaves_a_gap(tmp_path: Path) -> None:
    """What counts is what the file holds, and not what it held once."""
    first, second = write_part(tmp_path, "run_g0_t0", 0), write_part(tmp_path, "run_g0_t1", 10)
    first.write_bytes(first.read_bytes()[: 14 * 7])
    with pytest.warns(Ks4StreamWarning, match="3 samples .* are missing between"):
        open_recording([first, second])


def test_a_wrong_order_is_an_error_with_the_right_one(tmp_path: Path) -> None:
    a, b, c = (write_part(tmp_path, name, start) for name, start in [("a", 7), ("b", 17), ("c", 27)])
    message = r"b\.bin begins at sample 17 .*, but c\.bin, .* at 27\. The right order is a\.bin, b\.bin, c\.bin\."
    with pytest.raises(RecordingError, match=message):
        open_recording([a, c, b])
    flat = tmp_path / "flat.dat"
    np.zeros((5, 7), np.int16).tofile(flat)
    with pytest.raises(RecordingError, match=r"The right order is b\.bin, c\.bin\."):
        open_recording([flat, c, b], n_chan=7)  # a file without metadata does not hide it
    times = ["2024-05-01T10:00:00", "2024-05-01T09:00:00"]
    days = [
        write_part(tmp_path, f"day{n}_g0_t0", 100 - n, fileName=f"day{n}_g0_t0.bin", fileCreateTime=time)
        for n, time in enumerate(times)
    ]
    with pytest.warns(
        Ks4StreamWarning, match=r"day1_g0_t0\.bin was created at .* 09:00:00, but day0.*in order of time"
    ):
        open_recording(days)


def test_different_probes_are_not_one_recording(tmp_path: Path) -> None:
    first = write_part(tmp_path, "run_g0_t0.imec0.ap", 5, imDatPrb_sn="111")
    second = write_part(tmp_path, "run_g0_t0.imec1.ap", 4, imDatPrb_sn="222")
    with pytest.raises(RecordingError, match=r"different probes \(serial numbers 111 and 222\), at the same time"):
        open_recording([first, second])
    write_part(tmp_path, "run_g0_t0.imec1.ap", 4, imDatPrb_sn="222", fileName="later_g0_t0.bin")
    with pytest.warns(
        Ks4StreamWarning, match=r"different probes \(serial numbers 111 and 222\): units cannot continue"
    ):
        open_recording([first, second])


def test_the_same_file_twice_is_told_of(tmp_path: Path) -> None:
    path = write_part(tmp_path, "run_g0_t0", 5)
    (tmp_path / "sub").mkdir()
    for again in (path, str(path), tmp_path / "sub" / ".." / path.name):
        with pytest.warns(
            Ks4StreamWarning, match="given more than once; its spikes will be found that many times"
        ) as caught:
            assert open_recording([path, again]).n_samples == 20
        assert len(caught) == 1
    np.save(tmp_path / "a.npy", np.zeros((30, 2), np.int16))
    with pytest.warns(Ks4StreamWarning, match=r"a\.npy was given more than once"):
        open_recording([tmp_path / "a.npy"] * 2, fs=100)
    (tmp_path / "link.npy").symlink_to(tmp_path / "a.npy")
    with pytest.warns(Ks4StreamWarning, match=r"link\.npy was given more than once"):
        open_recording([tmp_path / "a.npy", tmp_path / "link.npy"], fs=100)
    halves = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert open_recording([halves[:15], halves[15:]], fs=100).n_samples == 30  # two stretches of one file


def test_the_lf_band_is_told_of(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run_g0_t0.imec0.lf", snsApLfSy="0,6,1", imSampRate="2500")
    with pytest.warns(Ks4StreamWarning, match=r"imec0\.lf\.bin holds the LF band.*in the \.ap\.bin"):
        open_recording(path)
    path.with_suffix(".meta").rename(tmp_path / "elsewhere.meta")
    with pytest.warns(Ks4StreamWarning, match="holds the LF band"):
        open_recording(path, n_chan=7, fs=2500)
    renamed = write_run(tmp_path, "renamed", snsApLfSy="0,6,1", imSampRate="2500")
    with pytest.warns(Ks4StreamWarning, match=r"renamed\.bin holds the LF band"):
        open_recording(renamed)


def test_a_duration_that_does_not_fit_is_told_of(tmp_path: Path) -> None:
    for right in ("0.000333", "0.0003333", None, "", "nan", "0"):
        open_recording(write_run(tmp_path, fileSizeBytes="140", fileTimeSecs=right))
    with pytest.warns(Ks4StreamWarning, match=r"has 10 samples of 7 channels, but run\.meta gives .* 20 samples"):
        open_recording(write_run(tmp_path, fileSizeBytes="140", fileTimeSecs="0.000667"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_metadata_saved_again_by_an_editor(encoding: str, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    meta = tmp_path / "run.meta"
    meta.write_text(meta.read_text(), encoding=encoding)
    assert open_recording(path).gain_uv == pytest.approx(0.762939453125)


def test_upper_case_suffixes_find_their_metadata(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    shouted = path.rename(tmp_path / "RUN.BIN")
    (tmp_path / "run.meta").rename(tmp_path / "RUN.META")
    assert open_recording(shouted).n_channels == 7


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
