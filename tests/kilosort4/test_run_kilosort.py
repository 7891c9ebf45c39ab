"""Kilosort4's way in: arguments, files, probes, folders, and the nine results."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from plain_pickle import load_plain

from ks4stream.blocks import Tiling
from ks4stream.errors import CurationWarning, ProbeError, RecordingError, ResultsError, SettingsError
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.kilosort4 import run_kilosort
from ks4stream.messages import DETAIL
from ks4stream.probe import Probe
from ks4stream.report import finish
from ks4stream.resources import Resources
from ks4stream.settings import Settings
from ks4stream.sorter import _preprocessed, prepare

KILOSORT4_ARGUMENTS = (
    "settings",
    "probe",
    "probe_name",
    "filename",
    "data_dir",
    "file_object",
    "results_dir",
    "data_dtype",
    "do_CAR",
    "invert_sign",
    "device",
    "progress_bar",
    "save_extra_vars",
    "clear_cache",
    "save_preprocessed_copy",
    "bad_channels",
    "shank_idx",
    "verbose_console",
    "verbose_log",
    "torch_thread_lim",
)
PROBE = {
    "chanMap": np.arange(12),
    "xc": np.tile([0.0, 32.0], 6),
    "yc": np.repeat(20.0 * np.arange(6), 2),
    "kcoords": np.zeros(12),
    "n_chan": 12,
}
TWO_SHANKS = PROBE | {"xc": PROBE["xc"] + 250 * (np.arange(12) >= 6), "kcoords": np.arange(12) // 6}


class FakeSort:
    """Stands in for the sort: notes what it was asked, and hands back a small sorting."""

    def __init__(self, make_sorting) -> None:
        self.make_sorting = make_sorting
        self.calls: list[tuple] = []
        self.changes: dict = {}

    def __call__(self, recording, settings, *, results_dir, save_extra_vars, save_preprocessed_copy, **options):
        self.calls.append((recording, settings, Path(results_dir), options))
        for level, text in ((logging.INFO, "a message"), (logging.DEBUG, "a detail"), (DETAIL, "a task")):
            logging.getLogger("ks4stream").log(level, text)
        if options["progress"] is not None:
            for done in range(3):
                options["progress"]("detection", done, 2)
        sorting = self.make_sorting(
            n_channels=recording.probe.n_channels,
            probe=recording.probe,
            settings=settings,
            files=recording.files,
            n_samples=recording.n_samples,
            n_chan_file=recording.n_channels,
            flat_files=recording.source.flat_files,
            **self.changes,
        )
        options["save_preprocessed_copy"] = save_preprocessed_copy
        source = prepare(recording, settings) if save_preprocessed_copy else None
        finish(
            sorting,
            ResultsFolder(results_dir, recording.files),
            save_extra_vars=save_extra_vars,
            preprocessed=_preprocessed(source, sorting) if source else None,
        )
        self.sorting = sorting
        return sorting


@pytest.fixture
def fake(make_sorting, monkeypatch):
    found = FakeSort(make_sorting)
    monkeypatch.setattr(sys.modules[run_kilosort.__module__], "sort", found)
    monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
    return found


@pytest.fixture
def data(tmp_path):
    """A second of 13 channels."""
    path = tmp_path / "data" / "rec.bin"
    path.parent.mkdir()
    np.random.default_rng(0).integers(-99, 99, (30_000, 13), dtype=np.int16).tofile(path)
    return path


SETTINGS = {"n_chan_bin": 13, "nt": 21, "n_pcs": 3, "nearest_chans": 5}


def test_signature_is_kilosort4s():
    parameters = inspect.signature(run_kilosort).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert tuple(positional) == KILOSORT4_ARGUMENTS
    defaults = {name: parameters[name].default for name in KILOSORT4_ARGUMENTS[1:]}
    falses = {
        "invert_sign",
        "save_extra_vars",
        "clear_cache",
        "save_preprocessed_copy",
        "verbose_console",
        "verbose_log",
    }
    assert all(defaults[name] is False for name in falses) and defaults["do_CAR"] is True
    assert all(value is None for name, value in defaults.items() if name not in falses | {"do_CAR"})


@pytest.mark.slow
def test_nine_results(fake, data):
    fake.changes["tiling"] = Tiling(3_000, 330_000, 60_000, 100, 6, 1)  # as long as the spikes, which the data are not
    results = run_kilosort(SETTINGS | {"tmin": 0.1}, probe=PROBE, filename=data)
    assert isinstance(results, tuple) and len(results) == 9
    ops, st, clu, tF, Wall, similar_templates, is_ref, est_contam_rate, kept_spikes = results
    sorting = fake.sorting
    assert st.dtype == np.float64 and np.array_equal(st[:, 0], sorting.sample - 3000)
    assert np.array_equal(st[:, 1], sorting.template) and np.array_equal(st[:, 2].astype(np.float32), sorting.score)
    assert np.array_equal(clu, sorting.unit)
    assert isinstance(tF, torch.Tensor) and tF.shape == (400, 5, 3)
    assert isinstance(Wall, torch.Tensor) and Wall.shape == (4, 12, 3)
    assert similar_templates.shape == (4, 4)
    assert is_ref.dtype == np.float64 and np.array_equal(is_ref, sorting.good) and is_ref.any()
    assert est_contam_rate.shape == (4,) and kept_spikes.dtype == bool
    assert ops["dshift"].dtype == ops["yblk"].dtype == np.float64
    assert isinstance(ops["wPCA"], torch.Tensor) and ops["do_CAR"] is True and ops["settings"]["n_chan_bin"] == 13


@pytest.mark.slow
def test_ops_file_knows_the_call(fake, data):
    run_kilosort(SETTINGS, probe=PROBE, filename=data, do_CAR=False, invert_sign=True)
    ops = np.load(data.parent / "kilosort4" / "ops.npy", allow_pickle=True).item()
    assert (ops["do_CAR"], ops["invert_sign"]) == (False, True)
    assert isinstance(ops["wPCA"], np.ndarray)
    assert not {"do_CAR", "invert_sign"} & set(ops["settings"])  # they are arguments of Kilosort4
    assert (fake.calls[0][1].do_CAR, fake.calls[0][1].invert_sign) == (False, True)
    run_kilosort(SETTINGS | {"do_CAR": False}, probe=PROBE, filename=data)
    assert (fake.calls[1][1].do_CAR, fake.calls[1][1].invert_sign) == (False, False)


@pytest.mark.slow
def test_ops_file_holds_plain_values_only(fake, data, tmp_path):
    """Of Kilosort4's caller, of ``sort`` and of the command line, which both end in the same function."""
    run_kilosort(SETTINGS, probe=PROBE, filename=data, results_dir=tmp_path / "out")
    ops = load_plain(tmp_path / "out" / "ops.npy")
    assert (ops["filename"], ops["results_dir"]) == ([str(data)], str(tmp_path / "out"))
    assert ops["ks4stream"]["provenance"]["torch"] == ""  # there was no real sort
    assert set(ops["is_tensor"]) == {"Wrot", "fwav", "wPCA", "wTEMP", "iCC", "iCC_mask", "iU"} <= set(ops)
    finish(fake.sorting, ResultsFolder.open(tmp_path / "sort"))
    assert load_plain(tmp_path / "sort" / "ops.npy")["filename"] == [str(data)]


READ_BY_KILOSORT4 = """
import sys
from pathlib import Path
import numpy as np
import torch
from kilosort import data_tools, io
folder, upside_down = map(Path, sys.argv[1:])
ops = io.load_ops(folder / "ops.npy")
assert all(torch.is_tensor(ops[name]) for name in ops["is_tensor"])
assert io.bfile_from_ops(ops_path=folder / "ops.npy").shape == (60_000, 13)
times = np.load(folder / "spike_times.npy")
waves = data_tools.get_spike_waveforms(times[5:15], folder)
assert waves.shape == (12, 21, 10) and np.ptp(waves) > 100
turned = data_tools.get_spike_waveforms(times[5:15], upside_down)
assert np.corrcoef(turned.ravel(), waves.ravel())[0, 1] < -0.9  # not -1: of twelve channels, a median is the sixth
best = data_tools.get_best_channel(folder, 0)
mean, rows = data_tools.mean_waveform(0, folder)
of_unit = times[np.load(folder / "spike_clusters.npy") == 0]
assert mean.shape == (21,) and len(rows) == len(of_unit)
assert np.allclose(mean, data_tools.get_spike_waveforms(of_unit, folder, chan=best).mean(axis=1), atol=1e-2)
assert data_tools.cluster_templates(0, folder).shape == (len(rows), 21, 12)
assert data_tools.get_templates([0, 1], folder).shape == (2, 21, 12)
assert data_tools.get_labels(folder) == [["0", "good"], ["1", "mua"], ["2", "good"], ["3", "mua"]]
assert int(data_tools.get_good_cluster(folder)) in (0, 2)
assert [len(values) for values in data_tools.get_refractory(folder)] == [4, 4]
print("read")
"""


@pytest.mark.skipif("KILOSORT4_PYTHON" not in os.environ, reason="KILOSORT4_PYTHON names no Python with Kilosort4")
def test_kilosort4s_own_readers_open_the_folder(fake, data, tmp_path):
    """In an environment of its own, as Kilosort4 is no dependency: KILOSORT4_PYTHON=…/bin/python."""
    samples = np.random.default_rng(0).integers(-999, 999, (60_000, 13), np.int16)
    samples.tofile(data)
    fake.changes["sample"] = np.sort(np.random.default_rng(1).integers(100, 59_000, 400))
    for name, upside_down in (("folder", False), ("upside_down", True)):
        folder = tmp_path / name
        run_kilosort(SETTINGS, probe=PROBE, filename=data, results_dir=folder, invert_sign=upside_down)
    command = [os.environ["KILOSORT4_PYTHON"], "-c", READ_BY_KILOSORT4, str(tmp_path / "folder"), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip().endswith("read"), done.stderr


# -- settings --------------------------------------------------------------------------------------------


def test_settings_are_a_dictionary():
    with pytest.raises(SettingsError, match="must be a dictionary, not None"):
        run_kilosort(None)


@pytest.mark.parametrize("settings", [{}, {"n_chan_bin": None, "fs": 20_000}, Settings()])
def test_n_chan_bin_is_needed(settings, data):
    with pytest.raises(ValueError, match="n_chan_bin is missing"):
        run_kilosort(settings, probe=PROBE, filename=data)


def test_an_unknown_setting_is_told_before_a_missing_file():
    with pytest.raises(SettingsError, match="Did you mean 'Th_learned'"):
        run_kilosort({"n_chan_bin": 13, "Th_lerned": 8}, filename="nowhere.bin")


@pytest.mark.slow
def test_settings_may_name_the_places(fake, data, tmp_path):
    places = {"filename": str(data), "results_dir": tmp_path / "out", "probe": PROBE, "data_dtype": "int16"}
    run_kilosort(SETTINGS | places)
    assert fake.calls[0][2] == tmp_path / "out"
    run_kilosort(SETTINGS | places, results_dir=tmp_path / "argument")
    assert fake.calls[1][2] == tmp_path / "argument"
    run_kilosort(SETTINGS | places | {"filename": "", "probe_name": "", "data_dir": data.parent})
    assert fake.calls[2][0].files == (str(data),)


@pytest.mark.slow
def test_settings_object_and_rate(fake, data):
    run_kilosort(SETTINGS | {"fs": 25_000}, probe=PROBE, filename=data)
    assert fake.calls[0][0].sampling_rate_hz == 25_000
    run_kilosort(SETTINGS, probe=PROBE, filename=data)
    assert fake.calls[1][0].sampling_rate_hz == 30_000


@pytest.mark.slow
def test_the_rate_of_metadata_counts_and_settings_must_agree(fake, tmp_path):
    traces = xr.DataArray(
        np.random.default_rng(0).integers(-99, 99, (30_000, 13), dtype=np.int16),
        dims=("time", "channel"),
        attrs={"sampling_rate_hz": 29_999.95},
    )
    slower = traces.assign_attrs(sampling_rate_hz=25_000)
    places = {"probe": PROBE, "file_object": traces, "results_dir": tmp_path / "out"}
    for settings in (SETTINGS, SETTINGS | {"fs": 30_000}):
        run_kilosort(settings, **places)
        assert fake.calls[-1][0].sampling_rate_hz == 29_999.95
    with pytest.raises(SettingsError, match="fs=25000 Hz, but DataArray has 30000 Hz"):
        run_kilosort(SETTINGS | {"fs": 25_000}, **places)
    with pytest.raises(SettingsError, match="fs=30000 Hz, but DataArray has 25000 Hz"):
        run_kilosort(SETTINGS | {"fs": 30_000}, **places | {"file_object": slower})
    assert len(fake.calls) == 2


# -- files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_lie_beside_the_data_by_default(fake, data):
    run_kilosort(SETTINGS, probe=PROBE, filename=str(data))
    folder = data.parent / "kilosort4"
    assert fake.calls[0][2] == folder
    assert {"params.py", "kilosort4.log", "ops.npy", "sorting.zarr"} <= {path.name for path in folder.iterdir()}
    assert "../rec.bin" in (folder / "params.py").read_text()


@pytest.mark.slow
def test_the_only_binary_of_a_folder(fake, data):
    run_kilosort(SETTINGS, probe=PROBE, data_dir=data.parent)
    assert fake.calls[0][0].files == (str(data),)
    (data.parent / "other.DAT").write_bytes(b"")
    with pytest.raises(RecordingError, match=r"found: other.DAT, rec.bin"):
        run_kilosort(SETTINGS, probe=PROBE, data_dir=data.parent)
    with pytest.raises(RecordingError, match="is not a folder"):
        run_kilosort(SETTINGS, probe=PROBE, data_dir=data)


@pytest.mark.slow
def test_files_are_joined_in_time(fake, data):
    later = shutil.copy(data, data.with_name("later.bin"))
    run_kilosort(SETTINGS, probe=PROBE, filename=[data, later])
    recording = fake.calls[0][0]
    assert recording.n_samples == 60_000 and recording.files == (str(data), str(later))
    assert fake.calls[0][2] == data.parent / "kilosort4"


@pytest.mark.slow
def test_a_file_object_takes_the_place_of_a_file(fake, data, tmp_path):
    class Wrapped:
        """Like Kilosort4's wrapper of a SpikeInterface recording."""

        shape, dtype = (30_000, 13), np.dtype("int16")

        def __getitem__(self, *items):
            return np.fromfile(data, np.int16).reshape(self.shape)[items[0]]

    run_kilosort(SETTINGS, probe=PROBE, file_object=Wrapped(), filename=data)
    recording = fake.calls[0][0]
    assert np.array_equal(recording.read(5, 9), Wrapped()[5:9, :])
    assert fake.calls[0][2] == data.parent / "kilosort4"
    run_kilosort(SETTINGS, probe=PROBE, file_object=Wrapped(), data_dir=tmp_path / "new")
    assert fake.calls[1][2] == tmp_path / "new" / "kilosort4"
    with pytest.raises(SettingsError, match="give results_dir"):
        run_kilosort(SETTINGS, probe=PROBE, file_object=Wrapped())


@pytest.mark.slow
def test_a_file_object_need_only_know_slices_of_time(fake, data, tmp_path):
    samples = np.fromfile(data, np.int16).reshape(-1, 13)

    class Slices:
        """Without a base class, a length or a number of dimensions."""

        shape, dtype = samples.shape, "int16"

        def __getitem__(self, key):
            assert isinstance(key, slice), key
            return samples[key]

    run_kilosort(SETTINGS, probe=PROBE, file_object=Slices(), results_dir=tmp_path, data_dtype="int16")
    recording = fake.calls[0][0]
    assert np.array_equal(recording.read(5, 9), samples[5:9]) and recording.dtype == np.int16
    with pytest.raises(RecordingError, match="dtype=float32, but array holds int16"):
        run_kilosort(SETTINGS, probe=PROBE, file_object=Slices(), results_dir=tmp_path, data_dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int16", "uint16", "int32", "float32"])
def test_samples_of_other_types_scaled_and_shifted(name, fake, data):
    samples = np.fromfile(data, np.int16).astype(np.int32)
    (samples + (2**15 if name == "uint16" else 0)).astype(name).tofile(data.with_name("other.bin"))
    run_kilosort(
        SETTINGS | {"scale": 0.5, "shift": 3.0}, probe=PROBE, filename=data.with_name("other.bin"), data_dtype=name
    )
    recording, settings, *_ = fake.calls[0]
    assert recording.dtype == name and recording.n_samples == 30_000
    tiles = prepare(recording, settings)
    read = tiles.raw(tiles.tiling[0])[:, tiles.tiling.halo :][:, :30_000]
    assert np.array_equal(read, samples.reshape(-1, 13)[:, :12].T * 0.5 + 3.0)


def test_nothing_to_sort():
    with pytest.raises(RecordingError, match="Nothing to sort"):
        run_kilosort(SETTINGS, probe=PROBE)


def test_a_locked_results_folder_is_told_before_work(fake, data):
    (data.parent / "kilosort4").write_text("")
    with pytest.raises(ResultsError, match="another results_dir"):
        run_kilosort(SETTINGS, probe=PROBE, filename=data)
    assert not fake.calls


# -- probes, channels, shanks ------------------------------------------------------------------------------


@pytest.mark.slow
def test_probe_by_name_object_and_path(fake, data, tmp_path):
    run_kilosort(SETTINGS, probe_name="tetrode", filename=data)
    assert fake.calls[-1][0].probe.n_channels == 4
    probe = Probe(np.arange(3), np.zeros(3), 25.0 * np.arange(3), np.zeros(3))
    run_kilosort(SETTINGS, probe=probe, probe_name="tetrode", filename=data)
    assert fake.calls[-1][0].probe == probe
    from ks4stream.io.probes import save_probe

    save_probe(probe, tmp_path / "probe.json")
    run_kilosort(SETTINGS | {"probe_path": tmp_path / "probe.json"}, filename=data)
    assert fake.calls[-1][0].probe == probe
    with pytest.raises(ProbeError, match=r"probe_name \(shipped: .*tetrode"):
        run_kilosort(SETTINGS, filename=data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_channels"), [("neuropixels_1.mat", 384), ("neuropixPhase3B1_kilosortChanMap.mat", 383)]
)
def test_shipped_probes_have_kilosorts_names_too(name, n_channels, fake, tmp_path):
    np.random.default_rng(0).integers(-99, 99, (5_000, 385), np.int16).tofile(tmp_path / "recording.bin")
    run_kilosort(SETTINGS | {"n_chan_bin": 385}, probe_name=name, filename=tmp_path / "recording.bin")
    assert fake.calls[0][0].probe.n_channels == n_channels


@pytest.mark.slow
def test_bad_channels_are_not_sorted(fake, data):
    run_kilosort(SETTINGS, probe=PROBE, filename=data, bad_channels=[3, 12])  # 12 is on no contact
    assert fake.calls[0][0].probe.chan_map.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ProbeError, match=r"bad_channels=\[13\]"):
        run_kilosort(SETTINGS, probe=PROBE, filename=data, bad_channels=[13])


@pytest.mark.slow
def test_shanks_are_sorted_apart(fake, data):
    results = run_kilosort(SETTINGS, probe=TWO_SHANKS, filename=data, shank_idx=[0, 1], bad_channels=[2])
    assert [call[2].name for call in fake.calls] == ["shank_0", "shank_1"]
    assert [call[0].probe.chan_map.tolist() for call in fake.calls] == [[0, 1, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert np.array_equal(results[0]["chanMap"], np.arange(6, 12))  # those of the last
    run_kilosort(SETTINGS, probe=TWO_SHANKS, filename=data, shank_idx=1.0)
    assert fake.calls[-1][2] == data.parent / "kilosort4" / "shank_1"
    with pytest.raises(ProbeError, match="no shank 7"):
        run_kilosort(SETTINGS, probe=TWO_SHANKS, filename=data, shank_idx=7)
    with pytest.raises(SettingsError, match="whole numbers"):
        run_kilosort(SETTINGS, probe=TWO_SHANKS, filename=data, shank_idx=0.5)


# -- progress, logs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_progress_bars_of_all_kinds(fake, data):
    class Bar:
        def __init__(self) -> None:
            self.n, self.total, self.said = 0, None, []

        def reset(self, total) -> None:
            self.n, self.total = 0, total

        def set_description(self, text) -> None:
            self.said.append(text)

        def update(self, n) -> None:
            self.n += n

    class Signal:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def emit(self, percent: int) -> None:
            self.seen.append(percent)

    class Simple:
        done = 0

        def update(self, n) -> None:
            self.done += n

    class QtBar:
        update = reset = None  # as widgets have them, which are something else

        def __init__(self) -> None:
            self.seen: list[int] = []

        def setValue(self, percent: int) -> None:
            self.seen.append(percent)

    bar, simple, signal, qt, seen = Bar(), Simple(), Signal(), QtBar(), []
    for progress in (bar, simple, signal, qt, lambda *args: seen.append(args)):
        run_kilosort(SETTINGS, probe=PROBE, filename=data, progress_bar=progress)
    assert (bar.n, bar.total, bar.said, simple.done) == (2, 2, ["detection"], 2)
    assert signal.seen == qt.seen == [0, 50, 100]
    assert seen == [("detection", 0, 2), ("detection", 1, 2), ("detection", 2, 2)]
    with pytest.raises(SettingsError, match="is not a progress bar"):
        run_kilosort(SETTINGS, probe=PROBE, filename=data, progress_bar="bar")


@pytest.mark.slow
def test_the_logger_is_left_alone(fake, data):
    before = list(logging.getLogger("ks4stream").handlers)
    run_kilosort(SETTINGS, probe=PROBE, filename=data, verbose_console=True, verbose_log=True)
    assert logging.getLogger("ks4stream").handlers == before


@pytest.mark.slow
@pytest.mark.parametrize("verbose_console", [False, True])
@pytest.mark.parametrize("verbose_log", [False, True])
def test_verbosity(verbose_console, verbose_log, fake, data, capsys):
    run_kilosort(SETTINGS, probe=PROBE, filename=data, verbose_console=verbose_console, verbose_log=verbose_log)
    texts = (data.parent / "kilosort4" / "kilosort4.log").read_text(), capsys.readouterr().err
    in_log, on_console = ([word in text for word in ("a message", "a detail", "a task")] for text in texts)
    assert in_log == [True, True, verbose_log]
    assert on_console == (in_log if verbose_console else [True, False, False])


# -- where it computes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_where_it_computes_and_what_it_keeps(fake, data, tmp_path):
    def asked(**options):
        run_kilosort(SETTINGS, probe=PROBE, filename=data, **options)
        return fake.calls[-1][3]

    assert asked()["resources"] == Resources()
    assert (fake.calls[-1][3]["resume"], fake.calls[-1][3]["keep_run"]) == (True, True)
    found = asked(device=torch.device("cuda:1"), torch_thread_lim=3, clear_cache=True, resume=False, keep_run=False)
    assert found["resources"] == Resources(device=torch.device("cuda:1"), workers=3, clear_cache=True)
    assert (found["resume"], found["keep_run"]) == (False, False)
    assert asked(torch_thread_lim=3, client="loop")["resources"] == Resources(client="loop")  # it has its own workers
    given = Resources(workers=2, device="cuda", block_batches=4)
    assert asked(resources=given)["resources"] == given
    found = asked(resources=given, torch_thread_lim=1, device="cpu", cache_dir=tmp_path)["resources"]
    assert found == Resources(workers=1, device="cpu", block_batches=4, cache_dir=tmp_path)


# -- files written on request ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_extra_files(fake, data):
    run_kilosort(SETTINGS, probe=PROBE, filename=data, save_extra_vars=True)
    folder = data.parent / "kilosort4"
    assert {"tF.npy", "Wall.npy", "full_st.npy", "full_clu.npy", "full_amp.npy"} <= {p.name for p in folder.iterdir()}


@pytest.mark.slow
def test_preprocessed_copy(fake, data):
    from ks4stream.results import Whitening

    fake.changes = {"drift": None, "whitening": Whitening(np.eye(12) * 0.02, [])}
    run_kilosort(SETTINGS, probe=PROBE, filename=data, save_preprocessed_copy=True)
    folder = data.parent / "kilosort4"
    copied = np.fromfile(folder / "temp_wh.dat", np.int16).reshape(30_000, 13)
    assert not copied[:, 12].any()
    original = np.fromfile(data, np.int16).reshape(30_000, 13)[:, :12]
    assert np.corrcoef(copied[100:-100, 3], original[100:-100, 3])[0, 1] > 0.8  # filtered and referenced
    assert "temp_wh.dat" in (folder / "params.py").read_text()


@pytest.mark.slow
def test_a_preprocessed_copy_is_added_to_a_curated_result(fake, data):
    from ks4stream.results import Whitening

    folder, curated = data.parent / "kilosort4", "cluster_id\tgroup\n0\tnoise\n"
    fake.changes = {"drift": None, "whitening": Whitening(np.eye(12) * 0.02, [])}
    run_kilosort(SETTINGS, probe=PROBE, filename=data)
    (folder / "cluster_group.tsv").write_text(curated)
    run_kilosort(SETTINGS, probe=PROBE, filename=data, save_preprocessed_copy=True)
    assert "temp_wh.dat" in (folder / "params.py").read_text()
    assert np.load(folder / "ops.npy", allow_pickle=True).item()["save_preprocessed_copy"]
    assert (folder / "cluster_group.tsv").read_text() == curated
    assert ResultsFolder(folder).somebodys() == ["cluster_group.tsv"]
    before = (folder / "temp_wh.dat").stat()
    run_kilosort(SETTINGS, probe=PROBE, filename=data, save_preprocessed_copy=True)
    assert (folder / "temp_wh.dat").stat() == before, "it is of the same result"
    (folder / "temp_wh.dat").unlink()
    (folder / "params.py").write_text("dat_path = []\n")
    with pytest.warns(CurationWarning, match=r"params.py .*stay as they are"):
        run_kilosort(SETTINGS, probe=PROBE, filename=data, save_preprocessed_copy=True)
    assert (folder / "params.py").read_text() == "dat_path = []\n"
