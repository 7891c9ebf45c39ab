"""NWB files: valid, complete, and read back by pynwb, SpikeInterface and neuroconv."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ks4stream import cli
from ks4stream.blocks import observed_spans
from ks4stream.errors import FewSpikesWarning, Ks4StreamWarning, MissingDependencyError, ResultsError
from ks4stream.io import nwb, store
from ks4stream.io.nwb import session_start_of, write_nwb
from ks4stream.io.store import map_sorting, save_sorting
from ks4stream.results import Provenance, Sorting, Whitening
from ks4stream.settings import Settings
from ks4stream.unit_waveforms import mean_waveforms

pynwb = pytest.importorskip("pynwb", minversion="4.2")
START = datetime(2026, 3, 1, 14, 30, tzinfo=UTC)
MOUSE = {"subject_id": "m1", "species": "Mus musculus", "sex": "F", "age": "P90D"}
METADATA = {"subject": MOUSE, "experimenter": ["Doe, Jane"], "session_id": "a1"}


@pytest.fixture
def sorting(make_sorting) -> Sorting:
    """Twelve channels on two shanks, one of them without signal; times that are no multiple of a millisecond."""
    made: Sorting = make_sorting()
    matrix, features = made.whitening.matrix.copy(), made.unit_features.copy()  # type: ignore[union-attr]
    matrix[11], matrix[:, 11], features[:, 11] = 0, 0, 0
    assert made.probe is not None
    probe = replace(made.probe, shank=np.repeat([0, 3], 6), name="two/shanks")
    return replace(
        made,
        gain_uv=0.5,
        probe=probe,
        whitening=Whitening(matrix, [11], 1),
        unit_features=features,
        sampling_rate_hz=29_999.7,
        provenance=Provenance(ks4stream="0.2.0", torch="2.13.0", recording="mouse.bin", recording_digest="a1b2"),
        files=("/home/someone/mouse.bin",),
        settings=replace(made.settings, tmax=np.inf, scale=2.0),
    )


def read(path: Path) -> SimpleNamespace:
    """What pynwb finds, in memory."""
    with closing(pynwb.NWBHDF5IO(str(path), "r")) as io:
        file = io.read()
        units = file.units
        columns = {name: list(units[name][:]) for name in units.colnames if name != "electrodes"}
        tables = file.processing["ecephys"].data_interfaces
        return SimpleNamespace(
            start=file.session_start_time,
            subject=file.subject,
            experimenter=file.experimenter,
            identifier=file.identifier,
            generated_by=np.asarray([] if file.was_generated_by is None else file.was_generated_by)
            .astype(str)
            .tolist(),
            electrodes=file.electrodes.to_dataframe(),
            groups={name: group.device.name for name, group in file.electrode_groups.items()},
            units=SimpleNamespace(**columns),
            descriptions={name: units[name].description for name in units.colnames},
            rows=[units["electrodes"].target.data[a:b] for a, b in bounds(units["electrodes"].data[:])],
            waveforms=(units.waveform_rate, units.waveform_unit, units.waveform_time_before_peak_in_ms),
            resolution=units.resolution,
            compression={name: units[name].target.data.compression for name in ("spike_times", "obs_intervals")},
            settings=dict(zip(*(tables[nwb.SETTINGS][name][:] for name in ("setting", "value")), strict=True)),
            provenance=dict(zip(*(tables[nwb.PROVENANCE][name][:] for name in ("fact", "value")), strict=True)),
        )


def texts(data: Any) -> list[Any]:
    return [] if data is None else np.asarray(data).astype(str).tolist()


def bounds(stop: Any) -> list[tuple[int, int]]:
    stop = np.asarray(stop, np.int64)
    return list(zip((stop - np.diff(stop, prepend=0)).tolist(), stop.tolist(), strict=True))


def messages(path: Path) -> dict[str, str]:
    """What nwbinspector says: importance by check."""
    inspector = pytest.importorskip("nwbinspector")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nwbinspector's own libraries
        return {found.check_function_name: found.importance.name for found in inspector.inspect_nwbfile(path)}


def test_units_are_complete(sorting, tmp_path):
    path = write_nwb(sorting, tmp_path / "sub" / "a.nwb", session_start=START, metadata=METADATA)
    found = read(path)
    units, kept, rate = found.units, sorting.kept, sorting.sampling_rate_hz
    for unit, times in enumerate(units.spike_times):
        assert np.array_equal(times, sorting.sample[kept & (sorting.unit == unit)] / rate)
        assert np.array_equal(np.rint(times * rate), sorting.sample[kept & (sorting.unit == unit)])
        assert np.array_equal(units.obs_intervals[unit], observed_spans(sorting.tiling, sorting.artifacts) / rate)
    assert units.n_spikes == np.bincount(sorting.unit[kept]).tolist()
    assert units.KSLabel == units.quality == ["good", "mua", "good", "mua"]
    assert units.contamination == sorting.contamination.tolist()
    assert np.allclose(units.x_um, [sorting.x_um[kept & (sorting.unit == u)].mean() for u in range(4)], rtol=1e-5)
    assert np.allclose(units.depth_um, [sorting.y_um[kept & (sorting.unit == u)].mean() for u in range(4)], rtol=1e-5)
    assert np.allclose(units.template_norm, np.linalg.norm(sorting.unit_features, axis=(1, 2)), rtol=1e-6)
    assert found.resolution == 1 / rate
    assert found.compression == {"spike_times": "gzip", "obs_intervals": "gzip"}


def test_waveforms_are_on_the_electrodes_of_their_unit(sorting, tmp_path):
    found = read(write_nwb(sorting, tmp_path / "a.nwb", session_start=START))
    waveforms = np.array(found.units.waveform_mean)
    assert np.array_equal(waveforms, mean_waveforms(sorting))
    assert found.waveforms == (29_999.7, "microvolts", pytest.approx(1000 * sorting.settings.peak_sample / 29_999.7))
    size = np.ptp(waveforms, axis=1)
    assert found.units.amplitude == pytest.approx(size.max(axis=1))
    for unit, rows in enumerate(found.rows):
        assert sorted(rows) == np.flatnonzero(size[unit]).tolist()  # far channels are exactly zero
        assert np.all(np.diff(size[unit][rows]) <= 0)
        assert found.units.main_channel[unit] == sorting.probe.chan_map[rows[0]]


def test_electrodes_are_the_sorted_channels(sorting, tmp_path):
    found = read(write_nwb(sorting, tmp_path / "a.nwb", session_start=START, location="VISp"))
    table, probe = found.electrodes, sorting.probe
    assert table.channel_in_file.tolist() == probe.chan_map.tolist()
    assert table[["rel_x", "rel_y"]].to_numpy().tolist() == probe.positions_um.tolist()
    assert table["shank"].tolist() == probe.shank.tolist()
    assert table.group_name.tolist() == [f"shank{shank}" for shank in probe.shank]
    assert table.has_signal.tolist() == [True] * 11 + [False]
    assert set(table.location) == {"VISp"}
    assert found.groups == {"shank0": "two_shanks", "shank3": "two_shanks"}


def test_settings_and_provenance_are_text(sorting, tmp_path):
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START, metadata=METADATA)
    found = read(path)
    settings = {name: json.loads(value, parse_constant=pytest.fail) for name, value in found.settings.items()}
    assert Settings.from_dict(settings) == sorting.settings
    provenance = {name: json.loads(value) for name, value in found.provenance.items()}
    assert provenance["recording"] == "mouse.bin" and provenance["recording_digest"] == "a1b2"
    assert provenance["gain_uv"] == 0.5 and provenance["warnings"] == ["a warning"]
    assert found.generated_by == [["ks4stream", "0.2.0"], ["torch", "2.13.0"]]
    assert found.start == START and found.subject.subject_id == "m1" and found.experimenter == ("Doe, Jane",)
    assert b"someone" not in path.read_bytes()  # a file that is shared names no paths


@pytest.mark.slow
def test_a_file_is_valid_and_inspected(sorting, tmp_path):
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START, metadata=METADATA)
    assert pynwb.validate(path=str(path)) == []
    found = messages(path)
    assert "CRITICAL" not in found.values()
    assert {name for name, importance in found.items() if importance == "BEST_PRACTICE_VIOLATION"} <= {
        "check_electrodes_location_allen_ccf"  # "unknown" is no region of the mouse
    }
    without = messages(write_nwb(sorting, tmp_path / "b.nwb", session_start=START))
    assert [name for name, importance in without.items() if importance == "CRITICAL"] == ["check_subject_exists"]


def test_pieces_do_not_show(sorting, tmp_path, monkeypatch):
    whole = read(write_nwb(sorting, tmp_path / "a.nwb", session_start=START))
    for name, value in {"_SPIKES_AT_ONCE": 7, "_CHUNK_ROWS": 5, "_UNITS_AT_ONCE": 3}.items():
        monkeypatch.setattr(nwb, name, value)
    pieces = read(write_nwb(sorting, tmp_path / "b.nwb", session_start=START))
    for name, values in vars(whole.units).items():
        for one, other in zip(values, getattr(pieces.units, name), strict=True):
            assert np.array_equal(one, other) or (name.endswith("_um") and np.isclose(one, other, rtol=1e-12)), name


def test_without_a_gain_waveforms_are_in_units_of_the_file(sorting, tmp_path):
    with pytest.warns(Ks4StreamWarning, match="gain of the recording is not known"):
        path = write_nwb(replace(sorting, gain_uv=None), tmp_path / "a.nwb", session_start=START)
    found = read(path)
    assert found.waveforms[1] == "arbitrary units" and "gain is not known" in found.descriptions["waveform_mean"]
    assert np.allclose(np.array(found.units.waveform_mean), mean_waveforms(sorting) / 0.5)
    assert pynwb.validate(path=str(path)) == []


@pytest.mark.slow
def test_an_empty_sorting_is_a_valid_file(make_sorting, tmp_path):
    empty = make_sorting(n_units=0, n_spikes=0, gain_uv=1.0, artifacts=np.zeros((0, 2)))
    with pytest.warns(FewSpikesWarning, match="no units"):
        path = write_nwb(empty, tmp_path / "a.nwb", session_start=START, metadata=METADATA)
    assert pynwb.validate(path=str(path)) == []
    assert "CRITICAL" not in messages(path).values()
    found = read(path)
    assert found.units.spike_times == [] and len(found.electrodes) == 12


# -- refusals ----------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_if_asked(sorting, tmp_path):
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="overwrite"):
        write_nwb(sorting, path, session_start=START)
    assert path.read_bytes() == before
    write_nwb(sorting, path, session_start=START, overwrite=True)
    assert read(path).identifier.encode() not in before


def test_a_failure_leaves_the_old_file_and_no_draft(sorting, tmp_path, monkeypatch):
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START)
    before = path.read_bytes()

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pynwb.NWBHDF5IO, "write", no_space)
    with pytest.raises(ResultsError, match="No space left"):
        write_nwb(sorting, path, session_start=START, overwrite=True)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.nwb"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"session_start": None}, "--session-start"),
        ({}, {"session_start": "yesterday"}, "'yesterday' is not a time like 2026"),
        ({}, {"session_start": 2026}, "2026 is not a time; give"),
        ({}, {"session_start": None, "metadata": {"session_start_time": 2026}}, "2026 is not a time; give"),
        ({"probe": None}, {}, "which this sorting lacks"),
        ({}, {"metadata": {"weather": "fine"}}, "metadata do not fit NWB.*weather"),
        ({}, {"metadata": {"subject": {"date_of_birth": "spring"}}}, "metadata do not fit NWB.*spring"),
        ({}, {"file": "s3://bucket/a.nwb"}, "not on a disk"),
        ({}, {"file": "."}, "is a folder"),
    ],
)
def test_bad_input_is_refused_before_work(sorting, tmp_path, monkeypatch, changes, options, message):
    monkeypatch.setattr(nwb, "ByUnit", pytest.fail)
    given: dict[str, Any] = {"file": tmp_path / "a.nwb", "session_start": START} | options
    with pytest.raises(ResultsError, match=message):
        write_nwb(replace(sorting, **changes), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("found", "message"), [(None, "install it with"), ("3.1.0", "4.2 or newer, and 3.1.0")])
def test_pynwb_must_be_there_and_new_enough(sorting, tmp_path, monkeypatch, found, message):
    if found is None:
        monkeypatch.setitem(sys.modules, "pynwb", None)
    monkeypatch.setattr(nwb, "version", lambda _: found)
    with pytest.raises(MissingDependencyError, match=message):
        write_nwb(sorting, tmp_path / "a.nwb", session_start=START)


# -- when the session began ---------------------------------------------------------------------------


def test_spikeglx_tells_when_the_session_began(sorting, tmp_path):
    recording = tmp_path / "run_g0_t0.imec0.ap.bin"
    assert session_start_of(replace(sorting, files=(str(recording),))) is None
    meta = ["typeThis=imec", "nSavedChans=1", "imSampRate=30000", "snsApLfSy=1,0,0", "fileSizeBytes=2"]
    recording.with_suffix(".meta").write_text("\n".join([*meta, "fileCreateTime=2025-06-07T08:09:10"]))
    known = replace(sorting, files=(str(recording),))
    assert session_start_of(known) == datetime(2025, 6, 7, 8, 9, 10)
    assert read(write_nwb(known, tmp_path / "a.nwb")).start == datetime(2025, 6, 7, 8, 9, 10).astimezone()
    assert read(write_nwb(known, tmp_path / "b.nwb", session_start=START)).start == START


@pytest.mark.parametrize("where", ["session_start", "metadata"])
@pytest.mark.parametrize(
    ("text", "expected"), [(START.isoformat(), START), ("2026-01-01T00:00:00", datetime(2026, 1, 1).astimezone())]
)
def test_it_may_be_given_as_text(sorting, tmp_path, where, text, expected):
    given = {where: text if where == "session_start" else {"session_start_time": text}}
    assert read(write_nwb(sorting, tmp_path / "a.nwb", **given)).start == expected


@pytest.mark.parametrize("files", [(), ("s3://bucket/a.bin",), ("/nowhere/a.dat",)])
def test_otherwise_it_is_not_known(sorting, files):
    assert session_start_of(replace(sorting, files=files)) is None


# -- other readers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("use_pynwb", [False, True])
def test_spikeinterface_reads_it(sorting, tmp_path, use_pynwb):
    extractors = pytest.importorskip("spikeinterface.extractors")
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START)
    found = extractors.read_nwb_sorting(path, use_pynwb=use_pynwb)
    assert found.sampling_frequency == pytest.approx(sorting.sampling_rate_hz, rel=1e-12)  # 1 / (1 / rate)
    for unit in found.unit_ids:
        expected = sorting.sample[sorting.kept & (sorting.unit == unit)]
        assert np.array_equal(found.get_unit_spike_train(unit), expected)
    assert found.get_property("quality").tolist() == ["good", "mua", "good", "mua"]
    assert np.array_equal(found.get_property("waveform_mean"), mean_waveforms(sorting))


@pytest.mark.slow
def test_neuroconv_reads_it(sorting, tmp_path):
    helpers = pytest.importorskip("neuroconv.tools.nwb_helpers")
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START, metadata=METADATA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neuroconv's own
        helpers.repack_nwbfile(nwbfile_path=path, export_nwbfile_path=tmp_path / "b.nwb")
    one, other = read(path).units, read(tmp_path / "b.nwb").units
    for name, values in vars(one).items():
        assert all(np.array_equal(a, b) for a, b in zip(values, getattr(other, name), strict=True)), name


@pytest.mark.slow
@pytest.mark.parametrize("use_pynwb", [False, True])
@pytest.mark.parametrize("n_electrodes", [4, None])
def test_neuroconv_writes_what_spikeinterface_reads(sorting, tmp_path, n_electrodes, use_pynwb):
    """Without `electrodes`, which SpikeInterface reads as a property if all units have equally many of them.

    neuroconv (0.10.2) then adds them as a column of numbers, which pynwb does not write.
    """
    extractors = pytest.importorskip("spikeinterface.extractors")
    neuroconv = pytest.importorskip("neuroconv.tools.spikeinterface")
    if n_electrodes:
        followed = (np.arange(12) - 2 * np.arange(4)[:, None]) % 12 < n_electrodes
        sorting = replace(sorting, unit_features=np.ones_like(sorting.unit_features) * followed[:, :, None])
    path = write_nwb(sorting, tmp_path / "a.nwb", session_start=START)
    assert pynwb.validate(path=str(path)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neuroconv's own
        found = extractors.read_nwb_sorting(path, use_pynwb=use_pynwb)
        assert ("electrodes" in found.get_property_keys()) is (n_electrodes is not None)
        about = {"NWBFile": {"session_start_time": START, "session_description": "", "identifier": "a"}}
        neuroconv.write_sorting_to_nwbfile(found, tmp_path / "b.nwb", metadata=about, skip_properties=["electrodes"])
        again = extractors.read_nwb_sorting(tmp_path / "b.nwb", use_pynwb=use_pynwb, sampling_frequency=29_999.7)
    for unit, name in zip(found.unit_ids, again.unit_ids, strict=True):
        assert np.array_equal(again.get_unit_spike_train(name), found.get_unit_spike_train(unit))
    assert again.get_property("KSLabel").tolist() == ["good", "mua", "good", "mua"]


# -- the command -------------------------------------------------------------------------------------


def export(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, ["export", *map(str, arguments)])


def test_the_command_exports_a_results_folder(sorting, tmp_path):
    save_sorting(sorting, tmp_path / "kilosort4" / "sorting.zarr")
    (tmp_path / "about.json").write_text(json.dumps(METADATA))
    start = ["--session-start", "2026-03-01T14:30:00+00:00"]
    options = [*start, "--metadata", tmp_path / "about.json", "--gain-uv", "0.25", "--location", "VISp"]
    result = export(tmp_path / "kilosort4", "--nwb", tmp_path / "a.nwb", *options)
    assert result.exit_code == 0 and f"4 units with {int(sorting.kept.sum())} spikes" in result.output
    found = read(tmp_path / "a.nwb")
    assert found.start == START and found.subject.sex == "F" and set(found.electrodes.location) == {"VISp"}
    assert np.allclose(np.array(found.units.waveform_mean), mean_waveforms(sorting) / 2)
    again = export(tmp_path / "kilosort4" / "sorting.zarr", "--nwb", tmp_path / "a.nwb", *start)
    assert again.exit_code == 1 and "exists" in again.output
    assert export(tmp_path / "kilosort4", "--nwb", tmp_path / "a.nwb", *start, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--session-start", "yesterday", "is not a time like"),
        ("--metadata", "missing.json", "cannot be read as JSON"),
        ("--metadata", "list.json", "one JSON object"),
        ("--gain-uv", "0", "Invalid value"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, option, value, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    result = export("kilosort4", "--nwb", "a.nwb", option, value)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def test_a_folder_without_a_sorting_is_refused(tmp_path):
    result = export(tmp_path, "--nwb", tmp_path / "a.nwb")
    assert result.exit_code == 1 and "does not hold a sorting" in result.output


def test_large_columns_stay_on_disk(sorting, tmp_path, monkeypatch):
    path = save_sorting(sorting, tmp_path / "sorting.zarr")
    monkeypatch.setattr(store, "LARGE_MAP_BYTES", 1000)
    mapped = map_sorting(path)
    assert isinstance(mapped.sample.base, np.memmap) and not isinstance(mapped.kept.base, np.memmap)
    assert all(np.array_equal(getattr(mapped, name), getattr(sorting, name)) for name in ("sample", "unit", "y_um"))
    assert mapped.features.shape == (sorting.n_spikes, 0, 3)
