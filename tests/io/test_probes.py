"""Probe files in every format describe the same contacts."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import probeinterface
import pytest
import scipy.io

from ks4stream.errors import Ks4StreamError, Ks4StreamWarning, ProbeError
from ks4stream.io.probes import load_probe, save_probe, shipped_probes
from ks4stream.probe import Probe

REPOSITORY = Path(__file__).resolve().parents[2]
KILOSORT: dict[str, Any] = {
    "chanMap": [0, 3, 2],
    "xc": [0, 0, 100],
    "yc": [0, 20, 0],
    "kcoords": [1, 1, 2],
    "n_chan": 3,
}
PROBE = Probe([0, 3, 2], [0, 0, 100], [0, 20, 0], [1, 1, 2])  # type: ignore[arg-type]


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_probe_is_returned_as_it_is() -> None:
    assert load_probe(PROBE) is PROBE


def test_kilosort_json(tmp_path: Path) -> None:
    probe = load_probe(write_json(tmp_path / "three.json", KILOSORT))
    assert probe == PROBE and probe.name == "three" and probe.n_chan_file is None


def test_kilosort_dict() -> None:
    assert load_probe({key: np.array(value) for key, value in KILOSORT.items()}) == PROBE
    columns = {key: np.array(value, float).reshape(-1, 1) for key, value in KILOSORT.items()}
    assert load_probe(columns) == PROBE
    one_shank = load_probe({key: value for key, value in KILOSORT.items() if key != "kcoords"})
    assert one_shank.shank.tolist() == [0, 0, 0]


def test_saved_probes_come_back(tmp_path: Path) -> None:
    save_probe(PROBE, tmp_path / "p.json")
    assert load_probe(tmp_path / "p.json") == PROBE
    content = json.loads((tmp_path / "p.json").read_text())
    assert content == KILOSORT
    with pytest.raises(ProbeError, match=r"give a name that ends in \.json"):
        save_probe(PROBE, tmp_path / "p.prb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1, 2]", "holds a list"),
        ('{"chanMap": [0], "xc": [0]}', r"lacks yc; it has: chanMap, xc"),
        ("{}", "lacks chanMap, xc, yc; it has: nothing"),
        ('{"chanMap": [0, 1], "xc": [0], "yc": [0, 1]}', "lengths differ"),
    ],
)
def test_bad_json_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProbeError, match=message):
        load_probe(tmp_path / "p.json")


# -- .mat ----------------------------------------------------------------------------------------------


def write_mat(path: Path, **content: Any) -> Path:
    fields = {"chanMap": [[1], [5], [4], [3]], "xcoords": [[0], [np.nan], [0], [100]], "ycoords": [[0], [0], [20], [0]]}
    fields |= {"kcoords": [[1], [1], [1], [2]], "connected": np.array([[True], [False], [True], [True]])}
    scipy.io.savemat(path, {key: value for key, value in {**fields, **content}.items() if value is not None})
    return path


def test_mat_counts_from_one_and_leaves_out_the_unconnected(tmp_path: Path) -> None:
    assert load_probe(write_mat(tmp_path / "m.mat")) == PROBE
    assert load_probe(write_mat(tmp_path / "m.mat", chanMap0ind=[[0], [4], [3], [2]])) == PROBE
    assert load_probe(write_mat(tmp_path / "m.mat", chanMap0ind=[0, 4, 3, 2], chanMap=None)) == PROBE
    assert load_probe(write_mat(tmp_path / "m.mat", connected=np.array([1, 0, 1, 1], np.uint8))) == PROBE


def test_mat_without_shanks_and_connections(tmp_path: Path) -> None:
    columns = {"xcoords": [0.0, 0, 0, 0], "ycoords": [0.0, 20, 40, 60]}
    probe = load_probe(write_mat(tmp_path / "m.mat", kcoords=None, connected=None, **columns))
    assert probe.chan_map.tolist() == [0, 4, 3, 2] and probe.shank.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"chanMap": [0, 1, 2, 3]}, "in .mat files it counts from 1"),
        ({"chanMap0ind": [1, 4, 3, 2]}, "chanMap is not chanMap0ind \\+ 1"),
        ({"chanMap": None}, "lacks chanMap"),
        ({"ycoords": None}, "lacks ycoords; it has: chanMap"),
        ({"connected": [1, 1]}, "lengths differ: chan_map 4, .*connected 2"),
        ({"connected": [0, 0, 0, 0]}, "has no contacts"),
    ],
)
def test_bad_mat_is_an_error(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        load_probe(write_mat(tmp_path / "m.mat", **content))


def test_mat_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.mat").write_bytes(b"not MATLAB at all" * 20)
    with pytest.raises(ProbeError, match="cannot be read as a MATLAB file"):
        load_probe(tmp_path / "m.mat")
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "m.mat").write_bytes(header + bytes(512))
    with pytest.raises(ProbeError, match=r'MATLAB 7\.3 file.*"-v7"'):
        load_probe(tmp_path / "m.mat")


# -- .prb ----------------------------------------------------------------------------------------------

PRB = '''
"""A probe of two shanks."""
total_nb_channels = 8  # in the file
radius: int = 100
channel_groups = {
    1: {"channels": [0, 3], "graph": [[0, 3]], "geometry": {0: (0, 0), 3: [0.0, 2e1], 7: (9, 9)}},
    2: {"channels": (2,), "geometry": [(100, 0)]},
}
'''


def test_prb(tmp_path: Path) -> None:
    (tmp_path / "p.prb").write_text(PRB)
    probe = load_probe(tmp_path / "p.prb")
    assert probe.n_chan_file == 8
    assert probe.digest() == PROBE.digest()


def test_prb_with_named_groups_numbers_them(tmp_path: Path) -> None:
    (tmp_path / "p.prb").write_text(PRB.replace("    1:", "    'a':").replace("    2:", "    'b':"))
    assert load_probe(tmp_path / "p.prb").shank.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "cannot be parsed"),
        ("x = 1", "must assign channel_groups"),
        ("channel_groups = {}", "must assign channel_groups"),
        ("channel_groups = {0: {'channels': [0]}}", "channel group 0 must have 'channels' and 'geometry'"),
        ("channel_groups = {0: {'channels': 3, 'geometry': {}}}", "'channels' must be a list of numbers"),
        ("channel_groups = {0: {'channels': ['a'], 'geometry': {}}}", "'channels' must be a list of numbers"),
        ("channel_groups = {0: {'channels': [0], 'geometry': 3}}", "'geometry' must give a position for each channel"),
        ("channel_groups = {0: {'channels': [0, 1], 'geometry': {0: (0, 0)}}}", "lacks a position for channel 1"),
        ("channel_groups = {0: {'channels': [0, 1], 'geometry': [(0, 0)]}}", "2 channels but 1 positions"),
        ("channel_groups = {0: {'channels': [0], 'geometry': {0: (0, 0, 0)}}}", "must be two numbers"),
        ("channel_groups = {0: {'channels': [0], 'geometry': {0: 'ab'}}}", "must be two numbers"),
        ("channel_groups = get_groups()", r"p\.prb, line 1: 'get_groups\(\)' cannot be evaluated"),
    ],
)
def test_prb_that_describes_no_probe_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.prb").write_text(text)
    with pytest.raises(ProbeError, match=message):
        load_probe(tmp_path / "p.prb")


@pytest.mark.parametrize("group_mode", ["by_probe", "by_shank"])
def test_prb_that_probeinterface_and_the_converter_of_kilosort4_write(group_mode: str, tmp_path: Path) -> None:
    """With NumPy 2 both (Kilosort4 4.1.7's spikeinterface_to_binary) write np.int64(0), and import nothing."""
    contacts = probeinterface.Probe(ndim=2, si_units="um")
    contacts.set_contacts([[0, 0], [0, 20], [50, 50], [100, 0]], shank_ids=["1", "1", "1", "2"])
    contacts.set_device_channel_indices(np.array([0, 3, -1, 2]))
    group = probeinterface.ProbeGroup()
    group.add_probe(contacts)
    path = tmp_path / "p.prb"
    probeinterface.write_prb(path, group, total_nb_channels=8, radius=100.0, group_mode=group_mode)
    assert "np.int64(3)" in path.read_text()
    probe = load_probe(path)
    assert probe.chan_map.tolist() == [0, 3, 2] and probe.n_chan_file == 8
    np.testing.assert_array_equal(probe.positions_um, PROBE.positions_um)
    assert probe.shank.tolist() == {"by_probe": [0, 0, 0], "by_shank": [0, 0, 1]}[group_mode]


def test_the_advice_for_files_that_are_not_understood_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probeinterface executes the file, which is why it is the user who has to say so."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.prb"
    first, second = "[0, 3], 'geometry': {0: (0, 0), 3: (0, 20)}", "[2], 'geometry': {2: (100, 0)}"
    path.write_text(f"channel_groups = {{1: {{'channels': {first}}}, 2: {{'channels': {second}}}}}.copy()\n")
    with pytest.raises(ProbeError, match="if you trust the file") as error:
        load_probe(path)
    _, found, advice = str(error.value).partition("python -c ")
    assert found
    subprocess.run([sys.executable, "-c", *shlex.split(advice)], check=True)
    probe = load_probe(tmp_path / "probe.json")
    assert probe.positions_um.tolist() == PROBE.positions_um.tolist()
    assert probe.chan_map.tolist() == [0, 3, 2] and probe.shank.tolist() == [0, 0, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_files_in_the_encodings_of_windows(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(json.dumps(KILOSORT | {"name": "µ"}, ensure_ascii=False).encode(encoding))
    assert load_probe(tmp_path / "p.json") == PROBE
    (tmp_path / "p.prb").write_bytes(("# µm\n" + PRB).encode(encoding))
    assert load_probe(tmp_path / "p.prb").digest() == PROBE.digest()


def test_prb_comments_may_be_in_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "p.prb").write_bytes(("# positions in µm\n" + PRB).encode("latin-1"))
    assert load_probe(tmp_path / "p.prb").digest() == PROBE.digest()


# -- maps that count from 1 ----------------------------------------------------------------------------

FROM_ONE = {"chanMap": [2, 1, 3], "xc": [0, 0, 0], "yc": [0, 20, 40]}


def test_a_map_that_counts_from_one_is_told_and_not_changed(tmp_path: Path) -> None:
    message = r"map of 3 contacts has the numbers 1 to 3.*subtract 1"
    with pytest.warns(Ks4StreamWarning, match=message):
        probe = load_probe(FROM_ONE)
    assert probe.chan_map.tolist() == [2, 1, 3]
    probe.check_file(4)  # possible, if channel 0 is left out
    with pytest.raises(ProbeError, match=r"has 3 channels \(0 to 2\).*seems to count from 1: subtract 1"):
        probe.check_file(3)
    with pytest.raises(ProbeError, match=r"has 5 channels \(0 to 4\).*seems to count from 1"):
        load_probe(FROM_ONE | {"chanMap": [1, 2, 5]}).check_file(5)
    with pytest.raises(ProbeError, match=r"has 2 channels \(0 to 1\)\. Use the probe"):
        probe.check_file(2)
    with pytest.warns(Ks4StreamWarning, match=message):
        load_probe(write_json(tmp_path / "p.json", FROM_ONE))
    (tmp_path / "p.prb").write_text(
        "g = {c: (0, 20 * c) for c in range(1, 4)}\nchannel_groups = {0: {'channels': list(g), 'geometry': g}}"
    )
    with pytest.warns(Ks4StreamWarning, match=message):
        load_probe(tmp_path / "p.prb")
    contacts = probeinterface.generate_linear_probe(3, 25)
    contacts.set_device_channel_indices([1, 2, 3])
    probeinterface.write_probeinterface(tmp_path / "pi.json", contacts)
    with pytest.warns(Ks4StreamWarning, match=message):
        load_probe(tmp_path / "pi.json")


def test_maps_that_need_not_count_from_one_are_taken_as_they_are(tmp_path: Path) -> None:
    for chan_map in ([0, 1, 2], [1, 2, 4], [4, 5, 6]):
        assert load_probe(FROM_ONE | {"chanMap": chan_map}).chan_map.tolist() == chan_map
    assert load_probe({"chanMap": [1], "xc": [0], "yc": [0]}).chan_map.tolist() == [1]
    matlab = write_mat(tmp_path / "m.mat", chanMap=[2, 1, 3, 4], connected=[1, 0, 1, 1])  # counts from 1, and says so
    assert load_probe(matlab).chan_map.tolist() == [1, 2, 3]


# -- probeinterface ------------------------------------------------------------------------------------


def test_probeinterface(tmp_path: Path) -> None:
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts([[0, 0], [0, 40], [0, 20], [100, 0]], shank_ids=["1", "1", "1", "2"])
    probe.set_device_channel_indices([0, -1, 3, 2])
    probeinterface.write_probeinterface(tmp_path / "pi.json", probe)
    loaded = load_probe(tmp_path / "pi.json")
    assert loaded == PROBE and loaded.name == "pi"
    assert load_probe(json.loads((tmp_path / "pi.json").read_text())) == PROBE


def test_probeinterface_converts_units_and_keeps_probes_apart(tmp_path: Path) -> None:
    group = probeinterface.ProbeGroup()
    for first_channel in (0, 3):
        probe = probeinterface.Probe(ndim=2, si_units="mm")
        probe.set_contacts([[0, 0], [0, 0.02], [0.25, 0]], shank_ids=["a", "a", "b"])
        probe.set_device_channel_indices(first_channel + np.arange(3))
        group.add_probe(probe)
    probeinterface.write_probeinterface(tmp_path / "pi.json", group)
    loaded = load_probe(tmp_path / "pi.json")
    assert loaded.chan_map.tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded.y_um.tolist() == [0, 20, 0, 0, 20, 0] and loaded.x_um.tolist() == [0, 0, 250, 0, 0, 250]
    assert loaded.shank.tolist() == [0, 0, 1, 2, 2, 3]


def test_probeinterface_without_wiring_takes_the_order_of_contacts_and_says_so(tmp_path: Path) -> None:
    probeinterface.write_probeinterface(tmp_path / "pi.json", probeinterface.generate_linear_probe(3, 25))
    with pytest.warns(Ks4StreamWarning, match="no wiring"):
        assert load_probe(tmp_path / "pi.json").chan_map.tolist() == [0, 1, 2]


def test_probeinterface_errors(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="cannot be read by probeinterface"):
        load_probe(write_json(tmp_path / "pi.json", {"specification": "probeinterface", "probes": [{"x": 1}]}))
    with pytest.raises(ProbeError, match="no contacts"):
        load_probe(write_json(tmp_path / "pi.json", {"specification": "probeinterface", "probes": []}))
    probe = probeinterface.generate_linear_probe(3, 25).to_3d()
    probeinterface.write_probeinterface(tmp_path / "pi.json", probe)
    with pytest.raises(ProbeError, match="3-dimensional positions; project them with to_2d"):
        load_probe(tmp_path / "pi.json")


# -- names ---------------------------------------------------------------------------------------------


def test_shipped_probes_are_loaded_by_name() -> None:
    shipped = {name: load_probe(name) for name in shipped_probes()}
    assert {name: probe.n_channels for name, probe in shipped.items()} == {
        "linear_16": 16,
        "neuropixels_1": 384,
        "neuropixels_2_four_shank": 384,
        "neuropixels_2_single_shank": 384,
        "tetrode": 4,
    }
    assert load_probe("tetrode.json") == shipped["tetrode"]
    four = shipped["neuropixels_2_four_shank"]
    assert [four.select_shanks(shank).n_channels for shank in range(4)] == [96, 96, 96, 96]
    assert sorted(four.chan_map) == list(range(384)) and four.y_um.max() == 47 * 15
    one = shipped["neuropixels_1"]
    assert one.x_um[:4].tolist() == [16, 48, 0, 32] and one.y_um[:4].tolist() == [0, 0, 20, 20]
    first, second = shipped["tetrode"].positions_um[:2]
    assert np.hypot(*(second - first)) == pytest.approx(14.14, abs=0.01)


def test_shipped_probes_are_what_the_script_makes(tmp_path: Path) -> None:
    for probe in runpy.run_path(str(REPOSITORY / "probes" / "make_probes.py"))["make_all"]():
        save_probe(probe, tmp_path / f"{probe.name}.json")
        assert (tmp_path / f"{probe.name}.json").read_text() == shipped_probes()[probe.name].read_text()


def test_unknown_names_are_an_error_that_suggests(tmp_path: Path) -> None:
    with pytest.raises(
        ProbeError, match=r"neuropixel1 is neither a probe file nor.*Did you mean 'neuropixels_1'\? Shipped probes: lin"
    ):
        load_probe("neuropixel1")
    with pytest.raises(ProbeError, match="is neither a probe file nor"):
        load_probe(tmp_path / "tetrode.json")  # a path, not a name
    (tmp_path / "p.csv").write_text("0,0")
    with pytest.raises(ProbeError, match=r"has the suffix '\.csv'; probe files end in \.json, \.mat, \.prb, \.meta"):
        load_probe(tmp_path / "p.csv")


def test_spikeglx_metadata_are_a_probe_file(tmp_path: Path) -> None:
    head = "typeThis=imec\nnSavedChans=3\nsnsApLfSy=2,0,1\nimSampRate=30000\n"
    (tmp_path / "run.meta").write_text(head + "~snsGeomMap=(NP1000,1,0,70)(0:27:0:1)(0:59:0:1)\n")
    probe = load_probe(tmp_path / "run.meta")
    assert probe.positions_um.tolist() == [[27, 0], [59, 0]] and probe.n_chan_file == 3
    (tmp_path / "run.meta").write_text(head)
    with pytest.raises(ProbeError, match="does not describe a probe geometry"):
        load_probe(tmp_path / "run.meta")


@pytest.mark.parametrize("suffix", [".json", ".prb", ".meta"])
def test_a_probe_as_large_as_a_recording_is_not_read(suffix, tmp_path):
    path = tmp_path / f"large{suffix}"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(Ks4StreamError, match=r"has 1099511627776 bytes.*Check that it is the right file"):
        load_probe(path)
