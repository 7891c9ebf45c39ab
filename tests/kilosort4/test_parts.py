"""Kilosort4's functions called one by one: what they hand on, and that together they are the whole."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.errors import FewSpikesWarning, OpsError, ProbeError, RecordingError, ResultsError, SettingsError
from ks4stream.kilosort4.run_kilosort import (
    cluster_spikes,
    compute_drift_correction,
    compute_preprocessing,
    detect_spikes,
    get_run_parameters,
    initialize_ops,
    run_kilosort,
    save_sorting,
    set_files,
)

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 15_000, "nearest_chans": 8}
BUSY = {"amplitude_range_uv": (90, 250), "rate_range_hz": (25, 60), "hash_per_channel": 0}
SCENES = {
    "still": (simulate.staggered_probe(16), {"seed": 1, "n_units": 8, "hash_per_channel": 0}, {"nblocks": 0}),
    "drifting": (
        simulate.linear_probe(12, pitch_um=20),
        {"seed": 3, "n_units": 6, "drift": "rigid", "drift_range_um": 20.0, **BUSY},
        {},
    ),
    "two shanks, a part of the time": (
        simulate.multi_shank_probe(2, 8),
        {"seed": 9, "n_units": 8},
        {"tmin": 0.4, "tmax": 4.5, "batch_downsampling": 1},
    ),
}
WITH_PLOTS = "drifting"
ARRAYS = ("st", "clu", "tF", "Wall", "similar_templates", "is_ref", "est_contam_rate", "kept_spikes")

pytestmark = pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")


def as_dictionary(probe):
    names = {"chanMap": probe.chan_map, "xc": probe.x_um, "yc": probe.y_um, "kcoords": probe.shank}
    return {**names, "n_chan": probe.n_channels}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Files of simulated recordings, by name, made once: path, probe and settings."""
    made: dict[str, tuple] = {}

    def get(name: str):
        if name not in made:
            probe, options, settings = SCENES[name]
            path = tmp_path_factory.mktemp("scene") / "recording.bin"
            simulate.simulate(probe, 5.0, **options).read(0, 150_000).tofile(path)
            made[name] = path, as_dictionary(probe), {"n_chan_bin": probe.n_channels, **SETTINGS, **settings}
        return made[name]

    return get


def begun(scene, folder, *, file_object=None, **changes):
    """The `ops` of a scene."""
    path, probe, settings = scene
    settings = {**settings, **changes}
    filename = path if file_object is None else ""
    _, _, _, probe = set_files(settings, filename, probe, "", "", folder, None, None)
    ops, _ = initialize_ops(settings, probe, "int16", True, False, CPU, False)
    return ops | {"client": "loop"}


def detected(ops, file_object=None):
    """`ops`, bfile, st and tF."""
    ops = compute_preprocessing(ops, CPU, file_object=file_object)
    ops, bfile, _ = compute_drift_correction(ops, CPU, file_object=file_object)
    st, tF, _, _ = detect_spikes(ops, CPU, bfile)
    return ops, bfile, st, tF


def sorted_by_parts(ops, file_object=None):
    """The eight arrays of a sort, by name."""
    ops, bfile, st, tF = detected(ops, file_object)
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    _, *rest = save_sorting(ops, ops["results_dir"], st, clu, tF, Wall, bfile.imin)
    return dict(zip(ARRAYS, (st, clu, tF, Wall, *rest), strict=True))


def whole(scene, folder, **changes):
    path, probe, settings = scene
    settings = {**settings, **changes}
    results = run_kilosort(settings, probe=probe, filename=path, results_dir=folder, device="cpu", client="loop")
    return dict(zip(ARRAYS, results[1:], strict=True))


def assert_same(one, other):
    for name in ARRAYS:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


@pytest.fixture(scope="module", autouse=True)
def short():
    """Waveforms are learned from the few spikes of a short recording."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)
        yield


@pytest.fixture(scope="module")
def sorted_whole(scene, short, tmp_path_factory):
    """The results of `run_kilosort` by the name of the scene, sorted once: folder and arrays."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "sorted"  # as deep as that of the parts
            with pytest.MonkeyPatch.context() as patch:
                if name != WITH_PLOTS:
                    patch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
                made[name] = folder, whole(scene(name), folder)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Pictures take longer than a sort of five seconds; one test compares them."""
    if "test_one_by_one" not in request.node.name or WITH_PLOTS not in request.node.name:
        monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])


# -- together they are the whole ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_one_by_one_they_give_what_the_whole_gives(name, scene, sorted_whole, tmp_path):
    folder, arrays = sorted_whole(name)
    ops = begun(scene(name), tmp_path / "parts")
    found = sorted_by_parts(ops)
    assert_same(found, arrays)
    assert found["is_ref"].dtype == np.float64
    assert ops["dshift"] is None or ops["dshift"].dtype == ops["yblk"].dtype == np.float64
    written = {"parts": content_of(tmp_path / "parts"), "whole": content_of(folder)}
    del written["whole"]["kilosort4.log"]  # which only setup_logger begins
    assert written["parts"].keys() == written["whole"].keys()
    differ = {name for name, content in written["whole"].items() if written["parts"][name] != content}
    assert differ == {"ks4stream.json", "ops.npy", "report.html", "sorting.zarr/.zattrs"}  # with times and folders


@pytest.mark.slow
@pytest.mark.parametrize("min_seconds", [200.0, 0.0])  # small peaks in all batches, and in a fifth
def test_thresholds_may_follow_from_the_data(scene, tmp_path, monkeypatch, min_seconds):
    monkeypatch.setattr("ks4stream.stages.small_peaks.MIN_SECONDS", min_seconds)
    auto = {"Th_universal": "auto", "Th_learned": "auto"}
    found = sorted_by_parts(begun(scene("still"), tmp_path / "parts", **auto))
    assert_same(found, whole(scene("still"), tmp_path / "whole", **auto))


@pytest.mark.slow
def test_the_threshold_does_not_rise_with_the_spikes_that_a_caller_leaves_out(scene, tmp_path):
    """A unit has to stand clear of the threshold with which it was found, not of the smallest spike that is left."""
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    large = (
        st[:, 2]
        > np.array([np.median(st[st[:, 1] == number, 2]) for number in range(int(st[:, 1].max()) + 1)])[
            st[:, 1].astype(int)
        ]
    )
    clu, _, found, _ = cluster_spikes(st[large], tF[torch.from_numpy(large)], ops, CPU, bfile)
    enough = np.bincount(st[large, 1].astype(int)) >= 20
    assert enough.sum() >= 2
    assert set(np.flatnonzero(enough)) <= set(found[:, 1].astype(int)), "each template's spikes are in a unit"
    assert len(clu) == len(found)


def content_of(folder):
    """The files of a results folder without its run, and what they hold."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "run"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_drift_correction_is_left_out_where_ops_says_so(scene, tmp_path):
    """As SpikeInterface does: at the top level of `ops`, and after preprocessing."""
    ops = compute_preprocessing(begun(scene("drifting"), tmp_path / "parts"), CPU)
    ops["nblocks"] = 0
    ops, bfile, st0 = compute_drift_correction(ops, CPU)
    assert st0 is None and ops["dshift"] is None
    st, tF, _, _ = detect_spikes(ops, CPU, bfile)
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    _, *rest = save_sorting(ops, tmp_path / "parts", st, clu, tF, Wall, bfile.imin)
    found = dict(zip(ARRAYS, (st, clu, tF, Wall, *rest), strict=True))
    assert_same(found, whole(scene("drifting"), tmp_path / "whole", nblocks=0))


class Wrapped:
    """An array-like that knows slices in time only, as Kilosort4's wrapper of SpikeInterface's recordings does."""

    def __init__(self, path, n_channels) -> None:
        self._samples = np.fromfile(path, np.int16).reshape(-1, n_channels)
        self.shape, self.dtype = self._samples.shape, self._samples.dtype

    def __getitem__(self, items):
        time, *channels = items if isinstance(items, tuple) else (items,)
        assert isinstance(time, slice)
        return self._samples[(time, *channels)]


@pytest.mark.slow
def test_samples_of_a_file_object(scene, sorted_whole, tmp_path):
    path, probe, _ = scene("drifting")
    ops = begun(scene("drifting"), tmp_path / "parts", file_object=True)
    assert ops["filename"] == []
    assert_same(sorted_by_parts(ops, file_object=Wrapped(path, probe["n_chan"])), sorted_whole("drifting")[1])


@pytest.mark.slow
def test_what_was_detected_to_estimate_the_drift_is_not_detected_again(scene, tmp_path, caplog, monkeypatch):
    """Also of arrays that cannot be recognized for certain, as long as `ops` says that they are the same."""
    path, probe, _ = scene("two shanks, a part of the time")

    monkeypatch.setattr("ks4stream.io.sources.array._DIGEST_WHOLE_BYTES", 0)
    samples = Wrapped(path, probe["n_chan"])
    ops = begun(scene("two shanks, a part of the time"), tmp_path / "parts", file_object=True)
    compute_preprocessing(ops, CPU, file_object=samples)
    _, bfile, st0 = compute_drift_correction(ops, CPU, file_object=samples)
    assert not np.any(ops["dshift"])  # or it would be detected again
    assert st0.shape[1] == 6 and np.all(np.diff(st0[:, 0]) >= 0)
    with caplog.at_level(logging.INFO, "ks4stream"):
        detect_spikes(ops, CPU, bfile)
    assert any(text.startswith("detection: ") and "already finished" in text for text in caplog.messages)


# -- spikes and units that callers change -----------------------------------------------------------------------


@pytest.mark.slow
def test_dropped_spikes_stay_away_and_their_order_does_not_matter(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    kept = st[:, 1] != 0
    clu, _, found, _ = cluster_spikes(st[kept], tF[torch.from_numpy(kept)], ops, CPU, bfile)
    assert len(found) and not np.any(found[:, 1] == 0)
    assert set(found[:, 0]) <= set(st[kept, 0])
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(kept))
    again, _, same, _ = cluster_spikes(st[shuffled], tF[shuffled], ops, CPU, bfile)
    assert np.array_equal(found, same) and np.array_equal(clu, again)


@pytest.mark.slow
def test_units_that_a_caller_has_merged_are_saved_as_they_are(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    merged = np.where(clu == clu.max(), 0, clu)
    _, similar, is_ref, _, kept = save_sorting(ops, tmp_path, st, merged, tF, Wall[:-1], bfile.imin)
    assert similar.shape == (len(Wall) - 1,) * 2 and is_ref.shape == (len(Wall) - 1,)
    assert np.array_equal(np.load(tmp_path / "spike_clusters.npy"), merged[kept])
    assert ops["n_units_total"] == len(Wall) - 1


# -- files, settings and probe -------------------------------------------------------------------------------------


def test_files_folders_and_probe(scene, tmp_path):
    path, probe, settings = scene("still")
    settings = dict(settings)
    files, data, folder, found = set_files(settings, str(path), probe, None, None, None, [3], None)
    assert (files, data, folder) == ([path], path.parent, path.parent / "kilosort4")
    assert (settings["filename"], settings["data_dir"], settings["results_dir"]) == (files, data, folder)
    assert found["n_chan"] == 15 and 3 not in found["chanMap"]
    files, data, folder, _ = set_files(dict(settings), [path, path], probe, None, None, tmp_path, None, None)
    assert (files, folder) == ([path, path], tmp_path)
    _, _, _, shank = set_files(dict(scene("two shanks, a part of the time")[2]), path, *two_shanks(scene), 1)
    assert np.all(shank["kcoords"] == 1)


def two_shanks(scene):
    return scene("two shanks, a part of the time")[1], None, None, None, None


def test_what_set_files_refuses(scene, tmp_path):
    path, probe, settings = scene("still")
    with pytest.raises(RecordingError, match="Nothing to sort"):
        set_files(dict(settings), "", probe, "", "", "", None, None)
    with pytest.raises(SettingsError, match="n_chan_bin is missing"):
        set_files({}, path, probe, "", "", "", None, None)
    with pytest.raises(ProbeError, match=r"bad_channels=\[16\]"):
        set_files(dict(settings), path, probe, "", "", "", [16], None)
    with pytest.raises(ProbeError, match="no shank 5"):
        set_files(dict(settings), path, probe, "", "", tmp_path, None, 5)


def test_ops_and_run_parameters(scene, tmp_path):
    path, probe, settings = scene("still")
    ops, complete = initialize_ops(
        {**settings, "filename": [path], "artifact_threshold": None}, probe, np.dtype("uint16"), False, True, CPU, True
    )
    assert complete["nt0min"] == 20 and "do_CAR" not in complete and complete["fs"] == 30_000
    assert ops["settings"].items() >= complete.items()
    assert (ops["do_CAR"], ops["invert_sign"], ops["save_preprocessed_copy"]) == (False, True, True)
    parameters = get_run_parameters(ops)
    assert len(parameters) == 17
    assert parameters[:5] == [16, 30_000, 15_000, 61, 20] and parameters[6:9] == ["uint16", False, True]
    assert np.array_equal(parameters[5], probe["chanMap"]) and np.array_equal(parameters[10], probe["yc"])
    assert parameters[11:] == [0.0, np.inf, np.inf, None, None, 1]
    with pytest.raises(SettingsError, match="Did you mean 'nblocks'"):
        initialize_ops({**settings, "nblock": 1}, probe, None, True, False, None, False)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_functions_in_the_wrong_order(scene, tmp_path):
    ops = begun(scene("still"), tmp_path)
    with pytest.raises(OpsError, match=r"no 'preprocessing'. Call compute_preprocessing"):
        compute_drift_correction(ops, CPU)
    with pytest.raises(OpsError, match=r"no 'dshift'. Call compute_drift_correction"):
        detect_spikes(ops, CPU, None)
    with pytest.raises(OpsError, match=r"no 'iCC'. Call detect_spikes"):
        cluster_spikes(np.zeros((0, 3)), torch.zeros(0, 8, 6), ops, CPU, None)
    with pytest.raises(OpsError, match=r"no 'iCC'. Call detect_spikes"):
        save_sorting(ops, tmp_path, np.zeros((0, 3)), np.zeros(0), torch.zeros(0, 8, 6), torch.zeros(0, 16, 6), 0)
    with pytest.raises(OpsError, match=r"no 'probe'. Call initialize_ops"):
        compute_preprocessing({}, CPU)
    with pytest.raises(RecordingError, match="pass it as file_object"):
        compute_preprocessing({**ops, "filename": []}, CPU)


@pytest.mark.slow
def test_ops_of_another_recording(scene, tmp_path):
    ops = compute_preprocessing(begun(scene("still"), tmp_path), CPU)
    other = tmp_path / "other.bin"
    other.write_bytes(scene("still")[0].read_bytes()[: 2 * 16 * 100_000])
    with pytest.raises(OpsError, match="another recording"):
        compute_drift_correction({**ops, "filename": [other]}, CPU)


@pytest.mark.slow
def test_arrays_that_do_not_fit_each_other(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    with pytest.raises(OpsError, match="Drop the same spikes from both"):
        cluster_spikes(st[1:], tF, ops, CPU, bfile)
    with pytest.raises(OpsError, match="of the same detect_spikes"):
        cluster_spikes(st + np.array([0, 99, 0]), tF, ops, CPU, bfile)
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    with pytest.raises(OpsError, match="Change clu and Wall together"):
        save_sorting(ops, tmp_path, st, clu, tF, Wall[:-1], bfile.imin)
    with pytest.raises(OpsError, match="ops has 16 channels"):
        save_sorting(ops, tmp_path, st, clu, tF, Wall[:, 1:], bfile.imin)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_noise_gives_an_empty_sorting(tmp_path):
    probe = simulate.tetrode_probe(1)
    path = tmp_path / "noise.bin"
    simulate.simulate(probe, 4.0, seed=11, n_units=0, hash_per_channel=0).read(0, 120_000).tofile(path)
    scene = path, as_dictionary(probe), {"n_chan_bin": 4, **SETTINGS}
    found = sorted_by_parts(begun(scene, tmp_path / "parts", Th_universal=50.0))
    assert_same(found, whole(scene, tmp_path / "whole", Th_universal=50.0))
    assert len(found["st"]) == 0 and found["Wall"].shape == (0, 4, 6)
    assert issubclass(FewSpikesWarning, UserWarning)


# -- what is edited or used again between the calls --------------------------------------------------------------


def test_settings_that_were_used_do_not_tie_the_next_recording(scene, tmp_path):
    """As in a loop over recordings with one dictionary of settings."""
    _, probe, settings = scene("still")
    settings, folders = dict(settings), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.bin").write_bytes(bytes(2 * 16 * 1000))
        files, _, folder, _ = set_files(settings, tmp_path / name / "data.bin", probe, "", "", "", None, None)
        folders.append(folder)
        assert files == [tmp_path / name / "data.bin"] and folder.is_dir()
    assert folders == [tmp_path / "a" / "kilosort4", tmp_path / "b" / "kilosort4"]
    assert set_files(settings, "", probe, "", "", tmp_path, None, None)[0] == []  # for a file object
    chosen = {**scene("still")[2], "results_dir": tmp_path / "chosen"}
    for name in ("a", "b"):
        found = set_files(chosen, tmp_path / name / "data.bin", probe, "", "", "", None, None)
        assert found[2] == tmp_path / "chosen"
    with pytest.raises(RecordingError, match="does not exist"):
        set_files(settings, tmp_path / "none.bin", probe, "", "", "", None, None)


@pytest.mark.slow
def test_what_is_edited_after_it_was_used_is_refused(scene, tmp_path):
    ops = compute_preprocessing(begun(scene("still"), tmp_path), CPU)
    for name, value in {"tmin": 1.0, "batch_size": 20_000, "highpass_cutoff": 500.0, "whitening_range": 4}.items():
        with pytest.raises(OpsError, match=f"{name}.*compute_preprocessing again"):
            compute_drift_correction({**ops, name: value}, CPU)
    other = {**ops["preprocessing"], "hp_filter": 2 * ops["preprocessing"]["hp_filter"]}
    with pytest.raises(OpsError, match="another filter"):
        compute_drift_correction({**ops, "preprocessing": other}, CPU)
    with pytest.raises(OpsError, match="Call compute_preprocessing"):
        compute_drift_correction({**ops, "preprocessing": None}, CPU)


@pytest.mark.slow
def test_what_later_functions_found_is_dropped_when_an_earlier_one_is_called_again(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    compute_drift_correction(ops, CPU)
    with pytest.raises(OpsError, match=r"no 'iCC'. Call detect_spikes"):
        cluster_spikes(st, tF, ops, CPU, bfile)
    ops["n_units_total"] = 3
    compute_preprocessing(ops, CPU)
    assert not {"n_units_total", "dshift", "wPCA", "iU"} & ops.keys()
    with pytest.raises(OpsError, match="pass the one that compute_drift_correction returned"):
        detect_spikes({**ops, "dshift": None}, CPU, None)


@pytest.mark.slow
def test_impossible_spikes_and_units_are_refused(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path))
    for change, message in (([1e9, 0, 0], "samples are sorted"), ([np.nan, 0, 0], "not numbers")):
        with pytest.raises(OpsError, match=message):
            cluster_spikes(st + np.array(change), tF, ops, CPU, bfile)
    with pytest.raises(OpsError, match=r"it must be \(n_spikes, 8, 6\)"):
        cluster_spikes(st, tF[:, :5], ops, CPU, bfile)
    clu, Wall, st, tF = cluster_spikes(st, tF.to(torch.bfloat16), ops, CPU, bfile)
    with pytest.raises(OpsError, match="Change clu and Wall together"):
        save_sorting(ops, tmp_path, st, clu + 0.5, tF, Wall, bfile.imin)
    moved = np.where(np.arange(len(st))[:, None] == 0, [-5, 0, 1], st)  # as merging may move the first spike
    assert save_sorting(ops, tmp_path, moved, clu, tF, Wall, bfile.imin)[-1][0]
    with pytest.raises(OpsError, match=r"Pass bfile.imin"):
        save_sorting(ops, tmp_path, st, clu, tF, Wall, bfile.imin + 5)


@pytest.mark.slow
def test_kept_spikes_are_in_the_order_of_the_caller(scene, tmp_path):
    ops, bfile, st, tF = detected(begun(scene("still"), tmp_path / "first"))
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    st[1::7, 0] = st[::7, 0][: len(st[1::7])]  # some duplicates
    order = np.argsort(clu, kind="stable")
    expected = save_sorting(ops, tmp_path / "first", st, clu, tF, Wall, bfile.imin)[-1]
    found = save_sorting(ops, tmp_path / "second", st[order], clu[order], tF[order], Wall, bfile.imin)[-1]
    assert np.array_equal(found, expected[order])


@pytest.mark.slow
def test_the_whole_can_be_saved_again_from_its_ops(scene, tmp_path):
    """Nothing that it found is missing in its `ops`: the same results are recognized and left alone."""
    path, probe, settings = scene("drifting")
    ops, st, clu, tF, Wall, *_ = run_kilosort(
        settings, probe=probe, filename=path, results_dir=tmp_path / "sorted", device="cpu", client="loop"
    )
    (tmp_path / "sorted" / "cluster_group.tsv").write_text("cluster_id\tgroup\n0\tnoise\n")
    save_sorting(ops, tmp_path / "sorted", st, clu, tF, Wall, 0)
    assert (tmp_path / "sorted" / "cluster_group.tsv").read_text().endswith("noise\n")
    assert [found.name for found in tmp_path.iterdir()] == ["sorted"]


@pytest.mark.slow
def test_another_recording_in_the_same_folder_can_start_over(scene, tmp_path):
    compute_preprocessing(begun(scene("still"), tmp_path), CPU)
    ops = begun(scene("two shanks, a part of the time"), tmp_path)
    with pytest.raises(ResultsError, match="another recording"):
        compute_preprocessing(ops, CPU)
    assert "preprocessing" in compute_preprocessing({**ops, "resume": False}, CPU)
