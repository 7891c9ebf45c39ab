"""Kilosort4's module io: probes, recordings of SpikeInterface, ops on disk, and files of results."""

from __future__ import annotations

import json
import pickle
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.errors import CurationWarning, OpsError, ProbeError, RecordingError, ResultsError
from ks4stream.io import probes
from ks4stream.io.kilosort_ops import ops_from_sorting
from ks4stream.io.phy import export_phy, write_preprocessed_copy
from ks4stream.io.probes import shipped_probes
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.io.sources import ArraySource, BinarySource
from ks4stream.kilosort4 import arguments, io
from ks4stream.kilosort4.io import (
    RecordingExtractorAsArray,
    bfile_from_ops,
    find_binary,
    load_ops,
    load_probe,
    remove_bad_channels,
    save_ops,
    save_preprocessing,
    save_probe,
    save_to_phy,
    select_shank,
)
from ks4stream.kilosort4.parts import compute_preprocessing, initialize_ops, set_files
from ks4stream.kilosort4.utils import PROBE_DIR
from ks4stream.sorter import _preprocessed

CPU = torch.device("cpu")

# -- probes ----------------------------------------------------------------------------------------------

TWO_SHANKS = {
    "chanMap": np.arange(6)[::-1],
    "xc": np.repeat([0.0, 250.0], 3),
    "yc": np.tile([0.0, 20.0, 40.0], 2),
    "kcoords": np.repeat([1.0, 4.0], 3),
    "n_chan": 6,
}


def test_a_probe_is_a_dictionary_of_arrays(tmp_path: Path) -> None:
    save_probe(TWO_SHANKS, str(tmp_path / "probe.json"))
    found = load_probe(probe_path=tmp_path / "probe.json")
    assert list(found) == ["chanMap", "xc", "yc", "kcoords", "n_chan"]
    assert found["n_chan"] == 6 and isinstance(found["n_chan"], int)
    assert [found[name].dtype.name for name in list(found)[:4]] == ["int32", "float32", "float32", "float32"]
    assert all(np.array_equal(found[name], TWO_SHANKS[name]) for name in found)
    assert json.loads((tmp_path / "probe.json").read_text())["kcoords"] == [1, 1, 1, 4, 4, 4]
    with pytest.raises(ProbeError, match=r"\.json"):
        save_probe(TWO_SHANKS, tmp_path / "probe.txt")


@pytest.mark.parametrize(
    ("name", "own", "n_channels"),
    [
        ("neuropixels_1", "neuropixels_1", 384),
        ("neuropixels_1.json", "neuropixels_1", 384),
        ("neuropixels_1.mat", "neuropixels_1", 384),
        ("neuropixPhase3B1_kilosortChanMap.mat", "neuropixels_1", 383),
        ("neuropixPhase3B1_kilosortChanMap", "neuropixels_1", 383),
        ("NeuroPix1_default.mat", "neuropixels_1", 383),
        ("NP2_kilosortChanMap.mat", "neuropixels_2_single_shank", 384),
        ("NeuroPix2_default.mat", "neuropixels_2_single_shank", 384),
    ],
)
def test_shipped_probes_have_kilosorts_names_too(name: str, own: str, n_channels: int) -> None:
    found, ours = load_probe(name), load_probe(shipped_probes()[own])
    assert found["n_chan"] == n_channels and (191 in found["chanMap"]) == (n_channels == 384)
    kept = np.isin(ours["chanMap"], found["chanMap"])
    assert np.array_equal(ours["yc"][kept], found["yc"])
    assert load_probe(PROBE_DIR / name)["n_chan"] == n_channels


def test_a_name_is_looked_for_in_kilosort4s_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_probe(TWO_SHANKS, tmp_path / "neuropixels_1.json")
    save_probe(remove_bad_channels(TWO_SHANKS, [3]), tmp_path / "mine.json")
    monkeypatch.setattr(arguments, "PROBE_DIR", tmp_path)
    for name, n_channels in (("neuropixels_1.json", 6), ("mine.json", 5), ("tetrode", 4)):
        found = probes.load_probe(arguments.probe_in({"probe_name": name}))
        assert found.n_channels == n_channels
    assert probes.load_probe(arguments.probe_in({"probe_path": "neuropixels_1"})).n_channels == 384
    assert arguments.probe_in({}) is None


def test_probes_that_are_not_there() -> None:
    with pytest.raises(ProbeError, match="neither a probe file nor the name"):
        load_probe("Linear16x1_kilosortChanMap.mat")
    with pytest.raises(ProbeError, match="neither a probe file nor the name"):
        load_probe("/nowhere/neuropixels_1.json")


def test_bad_channels_are_left_out() -> None:
    found = remove_bad_channels(TWO_SHANKS, [2, 5, 2])
    assert found["chanMap"].tolist() == [4, 3, 1, 0] and found["n_chan"] == 4
    assert found["kcoords"].tolist() == [1, 1, 4, 4] and found["kcoords"].dtype == float
    assert TWO_SHANKS["n_chan"] == 6 and len(TWO_SHANKS["chanMap"]) == 6
    assert remove_bad_channels(TWO_SHANKS, None)["n_chan"] == remove_bad_channels(TWO_SHANKS, [])["n_chan"] == 6
    with pytest.raises(ProbeError, match="no contact on channel 50"):
        remove_bad_channels(TWO_SHANKS, [2, 50])


def test_shanks_are_selected() -> None:
    found = select_shank(TWO_SHANKS, 4)
    assert found["chanMap"].tolist() == [2, 1, 0] and found["n_chan"] == 3
    assert select_shank(TWO_SHANKS, [1.0, 4.0])["n_chan"] == select_shank(TWO_SHANKS, None)["n_chan"] == 6
    with pytest.raises(ProbeError, match="no shank 0; it has 1, 4"):
        select_shank(TWO_SHANKS, 0)
    with pytest.raises(ProbeError, match="whole numbers"):
        select_shank(TWO_SHANKS, 1.5)


# -- recordings ------------------------------------------------------------------------------------------


def test_the_only_binary_file(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="found: none"):
        find_binary(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "recording.dat").write_bytes(b"")
    assert find_binary(str(tmp_path)) == tmp_path / "recording.dat"


class Extractor:
    """A recording of three segments, as SpikeInterface's classes answer."""

    def __init__(self, segments: list[np.ndarray]) -> None:
        self.segments, self.reads = segments, 0

    def get_num_segments(self) -> int:
        return len(self.segments)

    def get_num_samples(self, segment_index: int) -> int:
        return len(self.segments[segment_index])

    def get_num_channels(self) -> int:
        return int(self.segments[0].shape[1])

    def get_dtype(self) -> np.dtype:
        return self.segments[0].dtype

    def get_traces(self, segment_index: int, start_frame: int, end_frame: int) -> np.ndarray:
        self.reads += end_frame - start_frame
        return self.segments[segment_index][start_frame:end_frame]


def test_a_recording_of_spikeinterface_as_array() -> None:
    samples = np.random.default_rng(0).integers(-99, 99, (100, 5), dtype=np.int16)
    extractor = Extractor([samples[:30], samples[30:31], samples[31:]])
    array = RecordingExtractorAsArray(recording_extractor=extractor)
    assert (array.shape, array.ndim, array.dtype, len(array)) == ((100, 5), 2, np.int16, 100)
    assert array.recording_extractor is extractor and extractor.reads == 0
    for key in (slice(25, 35), slice(None), slice(-5, None), slice(90, 20, -3), slice(3, 3), 30, -100):
        assert np.array_equal(array[key], samples[key]), key
        assert array[key].dtype == np.int16
    assert np.array_equal(array[28:33, [3, 0]], samples[28:33, [3, 0]])
    assert np.array_equal(array[28:33, 1:3], samples[28:33, 1:3])
    assert np.array_equal(array[..., 2], samples[..., 2])
    extractor.reads = 0
    assert array[10:20:5].shape == (2, 5) and extractor.reads == 6  # nothing beyond what is needed
    with pytest.raises(IndexError):
        array[100]
    with pytest.raises(RecordingError, match="only read"):
        array[0] = 1
    assert np.array_equal(pickle.loads(pickle.dumps(array))[28:33], samples[28:33])
    with pytest.raises(RecordingError, match="a ndarray was given"):
        RecordingExtractorAsArray(samples)


def test_a_recording_of_spikeinterface_itself(tmp_path: Path) -> None:
    core = pytest.importorskip("spikeinterface.core")
    samples = np.random.default_rng(0).integers(-99, 99, (100, 5), dtype=np.int16)
    samples.tofile(tmp_path / "a.bin")
    one = core.read_binary(tmp_path / "a.bin", 30_000.0, "int16", 5)
    both = core.append_recordings([one, core.NumpyRecording([samples], 30_000.0)])
    joined = np.concatenate([samples, samples])
    for recording, expected in ((one, samples), (both, joined)):
        array = RecordingExtractorAsArray(recording)
        assert array.shape == expected.shape
        for key in (slice(90, 110), slice(-3, None), (slice(5, 20, 2), slice(1, 3)), 99):
            assert np.array_equal(array[key], expected[key])
            assert np.array_equal(pickle.loads(pickle.dumps(array))[key], expected[key])
    assert len(pickle.dumps(RecordingExtractorAsArray(one))) < 10_000


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_recording_of_spikeinterface_that_lies_in_a_file_is_read_there(dtype: str, tmp_path: Path) -> None:
    """Also floating-point numbers without a gain, which `open_recording` refuses."""
    core = pytest.importorskip("spikeinterface.core")
    samples = np.random.default_rng(0).integers(-99, 99, (100, 5)).astype(dtype)
    samples.tofile(tmp_path / "a.bin")
    lies = core.read_binary(tmp_path / "a.bin", 25_000.0, dtype, 5)
    in_memory = core.NumpyRecording([samples], 25_000.0)
    probe = {"chanMap": np.arange(5), "xc": np.zeros(5), "yc": 20 * np.arange(5), "kcoords": np.zeros(5)}
    for recording, kind in ((lies, BinarySource), (core.append_recordings([lies, in_memory]), ArraySource)):
        array = RecordingExtractorAsArray(recording)
        found = arguments.opened([], array, {"fs": 25_000, "n_chan_bin": 5}, {"probe": probe})
        assert type(found.source) is kind and found.n_samples == len(array)
        assert np.array_equal(found.read(0, len(array)), array[:])
    found = arguments.opened([], RecordingExtractorAsArray(lies), {"fs": None, "n_chan_bin": 5}, {"probe": probe})
    assert found.files == (str(tmp_path / "a.bin"),) and found.sampling_rate_hz == 25_000


# -- ops -------------------------------------------------------------------------------------------------


class PretendedScheduler:
    address = "tcp://node:8786"


class PretendedClient:
    """Stands in for a Dask client."""

    scheduler = PretendedScheduler()


PretendedClient.__module__ = "distributed.client"

OPS: dict[str, Any] = {
    "wPCA": torch.arange(6.0).reshape(2, 3),
    "iU": torch.tensor([3, 1]),
    "preprocessing": {"hp_filter": torch.zeros(4), "whiten_mat": np.eye(2, dtype=np.float32), "more": None},
    "nested": {"a": [torch.ones(2), (np.float32(1.5), {1})], "objects": np.array([None, "x"], dtype=object)},
    "filename": [Path("/data/recording.bin")],
    "device": torch.device("cpu"),
    "client": PretendedClient(),
    "nothing": None,
    "flag": np.bool_(True),
    "tmax": np.inf,
    "dshift": np.ones((3, 1), np.float32),
}


def test_ops_are_saved_and_loaded(tmp_path: Path) -> None:
    before = dict(OPS)
    save_ops(OPS, tmp_path)
    assert before == OPS
    found = load_ops(tmp_path / "ops.npy", device=CPU)
    assert found["is_tensor"] == ["wPCA", "iU"]
    assert torch.equal(found["wPCA"], OPS["wPCA"]) and torch.equal(found["iU"], OPS["iU"])
    assert found["iU"].dtype == torch.int64 and isinstance(found["dshift"], np.ndarray)
    preprocessing = found["preprocessing"]
    assert torch.is_tensor(preprocessing["hp_filter"]) and torch.equal(preprocessing["whiten_mat"], torch.eye(2))
    assert preprocessing["more"] is None and found["nothing"] is None
    assert np.array_equal(found["nested"]["a"][0], np.ones(2)) and found["nested"]["a"][1] == [1.5, [1]]
    assert found["nested"]["objects"] == [None, "x"]
    assert found["filename"] == [str(Path("/data/recording.bin"))] and found["client"] == "tcp://node:8786"
    assert (found["device"], found["flag"], found["tmax"]) == ("cpu", True, np.inf)
    save_ops(found, tmp_path)
    again = load_ops(tmp_path / "ops.npy", "cpu")
    assert again.keys() == found.keys() and torch.equal(again["wPCA"], OPS["wPCA"])


def test_ops_go_to_their_own_folder(tmp_path: Path) -> None:
    save_ops({"results_dir": tmp_path / "out", "nt": 61})
    assert load_ops(tmp_path / "out" / "ops.npy")["nt"] == 61
    assert ResultsFolder.open(tmp_path / "out").somebodys() == []


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpsError, match=r"ops\['a'\]\['b'\]\[…\] is a builtins\.function"):
        save_ops({"a": {"b": [print, lambda: 0][1:]}}, tmp_path)
    assert not (tmp_path / "ops.npy").exists()


def test_other_files_are_not_ops(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="does not exist"):
        load_ops(tmp_path / "ops.npy")
    np.save(tmp_path / "list.npy", np.array([[1, None]], dtype=object)[:, :1].reshape(()), allow_pickle=True)
    with pytest.raises(ResultsError, match="not the dictionary"):
        load_ops(tmp_path / "list.npy")
    np.save(tmp_path / "torch.npy", np.array({"a": torch.zeros(2)}, dtype=object), allow_pickle=True)
    with pytest.raises(ResultsError, match="torch"):
        load_ops(tmp_path / "torch.npy")
    np.save(tmp_path / "path.npy", np.array({"a": PurePosixPath("b")}, dtype=object), allow_pickle=True)
    assert load_ops(tmp_path / "path.npy") == {"a": Path("b")}


# -- files of results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `ops` of a simulated recording, preprocessed."""
    folder = tmp_path_factory.mktemp("begun")
    probe = simulate.linear_probe(6, pitch_um=20)
    samples = simulate.simulate(probe, 2.0, seed=2, n_units=2).read(0, 60_000)
    np.column_stack([samples, np.zeros(60_000, np.int16)]).tofile(folder / "recording.bin")
    words = {"chanMap": probe.chan_map, "xc": probe.x_um, "yc": probe.y_um, "kcoords": probe.shank}
    settings = {"n_chan_bin": 7, "batch_size": 15_000, "tmin": 0.1, "nt": 41}
    *_, words = set_files(settings, folder / "recording.bin", words, "", "", folder / "kilosort4", None, None)
    ops, _ = initialize_ops(settings, words, "int16", True, False, CPU, True)
    return compute_preprocessing(ops | {"client": "loop"}, CPU)


SHIFT_UM = np.linspace(-10, 10, 4, dtype=np.float32)[:, None]


def copied(begun: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """An `ops` of its own, with another results folder."""
    return {**begun, "ks4stream": dict(begun["ks4stream"]), "results_dir": folder, **changes}


def test_traces_of_an_ops(begun: dict[str, Any], tmp_path: Path) -> None:
    ops = copied(begun, tmp_path, dshift=SHIFT_UM, yblk=np.array([50.0]))
    bfile = bfile_from_ops(ops, device=CPU)
    assert (bfile.n_batches, bfile.imin, bfile.nt, bfile.nt0min) == (4, 3000, 41, 13)
    batch = bfile.padded_batch_to_torch(2)
    assert batch.shape == (6, 15_082) and 0.5 < batch.std() < 2
    save_ops(ops)
    stored = bfile_from_ops(ops_path=tmp_path / "ops.npy", device=CPU)
    assert torch.equal(stored.padded_batch_to_torch(2), batch)
    still = bfile_from_ops(copied(begun, tmp_path), device=CPU)
    assert not torch.equal(still.padded_batch_to_torch(2), batch)
    moved = tmp_path / "moved.bin"
    moved.write_bytes(Path(begun["filename"][0]).read_bytes())
    for filename in (moved, str(moved), [moved]):
        assert torch.equal(bfile_from_ops(ops, filename=filename, device=CPU).padded_batch_to_torch(2), batch)
    with pytest.raises(OpsError, match="needs ops"):
        bfile_from_ops()


def test_the_preprocessed_copy_is_a_part_of_the_results(
    begun: dict[str, Any], tmp_path: Path, make_sorting: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kilosort4"
    ops = copied(begun, folder, dshift=SHIFT_UM, yblk=np.array([50.0]))
    bfile = bfile_from_ops(ops, device=CPU)
    save_preprocessing(folder / "temp_wh.dat", ops, bfile)
    assert {path.name for path in folder.iterdir()} == {"temp_wh.dat", "ks4stream.json"}
    assert ResultsFolder.open(folder).somebodys() == []
    values = np.fromfile(folder / "temp_wh.dat", np.int16).reshape(60_000, 7)
    assert not values[:3000].any() and not values[:, 6].any()
    batch = bfile.padded_batch_to_torch(1)[:, 41:-41].numpy()
    np.testing.assert_allclose(values[18_000:33_000, :6].T / 200, np.clip(batch, -163, 163), atol=0.0026)
    # the same as that of a whole sort
    tiles = bfile.tiles
    sorting = make_sorting(
        n_channels=6, probe=tiles.probe, whitening=tiles.whitening, drift=tiles.drift, n_samples=60_000, n_chan_file=7
    )
    pieces = _preprocessed(tiles, sorting)
    (tmp_path / "whole").mkdir()
    write_preprocessed_copy(sorting, tmp_path / "whole", pieces)
    assert (tmp_path / "whole" / "temp_wh.dat").read_bytes() == (folder / "temp_wh.dat").read_bytes()
    # from the file, under any name, in any place
    with caplog.at_level("INFO", "ks4stream"):
        save_preprocessing(tmp_path / "copies" / "mine.bin", ops, bfile_path=begun["filename"][0], verbose=True)
    assert "batch 4 of 4" in caplog.text
    assert (tmp_path / "copies" / "mine.bin").read_bytes() == (folder / "temp_wh.dat").read_bytes()
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["mine.bin"]
    with pytest.raises(OpsError, match="needs bfile"):
        save_preprocessing(folder / "temp_wh.dat", ops)


def test_nothing_is_left_of_a_copy_that_fails(begun: dict[str, Any], tmp_path: Path) -> None:
    class Broken:
        n_chan_bin, total_samples, chan_map = 7, 60_000, np.arange(6)
        recording = SimpleNamespace(files=())

        def cores(self, ops: Any) -> Any:
            yield 0, np.zeros((10, 6), np.float32)
            raise OSError("the disk is gone")

    for name in ("temp_wh.dat", "mine.bin"):
        folder = tmp_path / name
        with pytest.raises(ResultsError, match="the disk is gone"):
            save_preprocessing(folder / name, copied(begun, folder), Broken())  # type: ignore[arg-type]
        assert not list(folder.iterdir())


@pytest.fixture
def finished(make_sorting: Any, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with curated results, and their `ops`."""
    folder, sorting = tmp_path / "kilosort4", make_sorting()
    with ResultsFolder.open(folder).draft() as draft:
        export_phy(sorting, draft, home=folder)
        ResultsFolder.open(folder).replace(draft, "key")
    (folder / "cluster_group.tsv").write_text("cluster_id\tgroup\n0\tgood\n")
    return folder, ops_from_sorting(sorting, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_only_the_ops_of_results_is_written_to_them(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, ops = finished
    before = contents(folder)
    others = {
        "begun": {name: value for name, value in ops.items() if not name.startswith("n_units")},
        "a setting was changed": ops | {"Th_learned": 7.5},
        "of other spikes": ops | {"n_spikes": 1},
        "of another recording": ops | {"ks4stream": {"provenance": {"recording_digest": "0"}}},
        "of Kilosort4": {name: value for name, value in ops.items() if name != "ks4stream"},
    }
    for name, other in others.items():
        with pytest.warns(CurationWarning, match=r"ops\.npy was written to .*ks4stream\.early"):
            save_ops(other | {"name": name}, folder)
        assert load_ops(folder / "ks4stream.early" / "ops.npy", CPU)["name"] == name
        assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kilosort4"]
    save_ops(ops | {"name": "of these", "dmin": None}, folder)  # as it is before it is stored
    assert load_ops(folder / "ops.npy", CPU)["name"] == "of these"
    assert ResultsFolder.open(folder).somebodys() == ["cluster_group.tsv", "ops.npy"]


def test_another_sorters_ops_stays(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, ops = finished
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("spike_times.npy", "ops.npy", "cluster_group.tsv"):
        (folder / name).write_bytes(b"of another sorter")
    before = contents(folder)
    for other in (ops, ops | {"results_dir": folder}):
        with pytest.warns(CurationWarning, match="stays as it is"):
            save_ops(other, folder)
        assert contents(folder) == before


def test_the_preprocessed_copy_waits_beside_other_results(
    begun: dict[str, Any], finished: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = finished
    before, ops = contents(folder), copied(begun, finished[0])
    save_preprocessing(folder / "temp_wh.dat", ops, bfile_from_ops(ops, device=CPU))
    assert contents(folder) == before and ops["ks4stream"]["has_copy"]
    assert (folder / "ks4stream.early" / "temp_wh.dat").stat().st_size == 2 * 7 * 60_000


def test_the_recording_and_other_files_are_never_replaced(begun: dict[str, Any], tmp_path: Path) -> None:
    recording = tmp_path / "recording.bin"
    recording.write_bytes(Path(begun["filename"][0]).read_bytes())
    (tmp_path / "link.bin").symlink_to(recording)
    (tmp_path / "mine.bin").write_bytes(b"mine")
    before = contents(tmp_path)
    ops = copied(begun, tmp_path / "kilosort4")
    bfile = bfile_from_ops(ops, filename=recording, device=CPU)
    for name in ("recording.bin", "link.bin"):
        with pytest.raises(ResultsError, match="is the recording"):
            save_preprocessing(tmp_path / name, ops, bfile)
        with pytest.raises(ResultsError, match="is the recording"):
            save_preprocessing(tmp_path / name, ops, bfile_path=recording)
    with pytest.raises(ResultsError, match="exists, and is not replaced"):
        save_preprocessing(tmp_path / "mine.bin", ops, bfile)
    with pytest.raises(ResultsError, match="is the recording"):
        save_preprocessing(begun["filename"][0], ops, bfile)
    assert contents(tmp_path) == before


def test_an_ops_is_not_changed_by_functions_that_only_read_it(begun: dict[str, Any], tmp_path: Path) -> None:
    ops = copied(begun, tmp_path)
    for name in ("provenance", "recording"):
        del ops["ks4stream"][name]
    before = set(ops["ks4stream"])
    bfile_from_ops(ops, device=CPU)
    assert set(ops["ks4stream"]) == before
    with pytest.raises(OpsError):
        save_to_phy(np.zeros((0, 3)), np.zeros(0), np.zeros((0, 1, 1)), np.zeros((0, 6, 1)), None, ops, 0)
    assert set(ops["ks4stream"]) == before
    without = {name: value for name, value in begun.items() if name != "ks4stream"}
    bfile_from_ops(without, device=CPU)
    assert "ks4stream" not in without


def test_a_list_of_tensors_that_is_none(tmp_path: Path) -> None:
    for value in (5, "wPCA", [["a"]], {"a": 1}, np.arange(2)):
        np.save(tmp_path / "ops.npy", np.array({"is_tensor": value}, dtype=object), allow_pickle=True)
        with pytest.raises(ResultsError, match="its is_tensor is not a list"):
            load_ops(tmp_path / "ops.npy", CPU)
    np.save(tmp_path / "ops.npy", np.array({"is_tensor": None}, dtype=object), allow_pickle=True)
    assert load_ops(tmp_path / "ops.npy", CPU) == {"is_tensor": None}


def test_the_recording_in_the_results_folder_is_left_alone(begun: dict[str, Any]) -> None:
    folder, bfile = Path(begun["filename"][0]).parent, bfile_from_ops(begun, device=CPU)
    with pytest.raises(ResultsError, match="is the recording"):
        save_preprocessing(folder / "temp_wh.dat", copied(begun, folder, filename=[folder / "temp_wh.dat"]), bfile)


def test_all_names_are_there() -> None:
    assert set(io.__all__) <= set(vars(io))
