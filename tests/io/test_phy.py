"""The Phy folder: every file, what it holds, and that phylib and SpikeInterface read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.kilosort_ops import spike_table
from ks4stream.io.phy import export_phy, params_text, write_preprocessed_copy
from ks4stream.io.places import ObjectPath
from ks4stream.io.recording_cache import CachedSource
from ks4stream.io.recordings import open_recording
from ks4stream.recording import FlatFile, Recording
from ks4stream.settings import Settings

NAMES = {
    "spike_times",
    "spike_clusters",
    "spike_templates",
    "spike_detection_templates",
    "amplitudes",
    "spike_positions",
    "templates",
    "templates_ind",
    "similar_templates",
    "pc_features",
    "pc_feature_ind",
    "channel_map",
    "channel_positions",
    "channel_shanks",
    "whitening_mat",
    "whitening_mat_dat",
    "whitening_mat_inv",
    "kept_spikes",
    "ops",
}
TABLES = {f"cluster_{name}.tsv" for name in ("KSLabel", "group", "reason", "ContamPct", "Amplitude")}


def write_params(sorting, folder: Path) -> None:
    (folder / "params.py").write_text(params_text(sorting, folder))


def load(folder: Path, name: str):
    return np.load(folder / f"{name}.npy", allow_pickle=name == "ops")


def params(folder: Path) -> dict:
    found: dict = {}
    exec((folder / "params.py").read_text(), {}, found)
    return found


def test_folder_is_complete_with_declared_types_and_shapes(make_sorting, tmp_path):
    sorting = make_sorting()
    folder = export_phy(sorting, tmp_path / "deep" / "kilosort4")
    assert {path.name for path in folder.iterdir()} == {f"{name}.npy" for name in NAMES} | TABLES | {"params.py"}
    n, u, c, w, q, j = int(sorting.kept.sum()), 4, 12, 21, 3, 5
    expected = {
        "spike_times": (np.int64, (n,)),
        "spike_clusters": (np.int32, (n,)),
        "spike_templates": (np.int32, (n,)),
        "spike_detection_templates": (np.int32, (n,)),
        "amplitudes": (np.float32, (n,)),
        "spike_positions": (np.float32, (n, 2)),
        "templates": (np.float32, (u, w, c)),
        "templates_ind": (np.int64, (u, c)),
        "similar_templates": (np.float32, (u, u)),
        "pc_features": (np.float32, (n, q, j)),
        "pc_feature_ind": (np.uint32, (u, j)),
        "channel_map": (np.int64, (c,)),
        "channel_positions": (np.float32, (c, 2)),
        "channel_shanks": (np.int32, (c,)),
        "whitening_mat": (np.float32, (c, c)),
        "whitening_mat_inv": (np.float32, (c, c)),
        "kept_spikes": (np.bool_, (sorting.n_spikes,)),
    }
    for name, (dtype, shape) in expected.items():
        array = load(folder, name)
        assert (array.dtype, array.shape) == (dtype, shape), name


def test_arrays_hold_kept_spikes_and_times_keep_the_crops_shift(make_sorting, tmp_path):
    sorting = make_sorting(settings=Settings(tmin=0.01, nt=21, n_pcs=3, nearest_chans=5), sample=np.arange(400) + 300)
    export_phy(sorting, tmp_path, save_extra_vars=True)
    assert np.array_equal(load(tmp_path, "spike_times"), sorting.sample[sorting.kept])
    assert np.array_equal(load(tmp_path, "spike_clusters"), sorting.unit[sorting.kept])
    assert np.array_equal(load(tmp_path, "spike_detection_templates"), sorting.template[sorting.kept])
    assert np.array_equal(load(tmp_path, "full_st"), spike_table(sorting))
    assert spike_table(sorting)[0, 0] == 0  # the crop begins at sample 300
    assert load(tmp_path, "tF").shape == sorting.features.shape
    assert np.array_equal(load(tmp_path, "Wall"), sorting.unit_features)
    assert np.array_equal(load(tmp_path, "full_amp")[sorting.kept], load(tmp_path, "amplitudes"))


def test_amplitude_is_the_norm_of_a_spikes_features(make_sorting, tmp_path):
    sorting = make_sorting()
    export_phy(sorting, tmp_path)
    norm = np.sqrt((sorting.features.astype(float) ** 2).sum(axis=(1, 2)))[sorting.kept]
    assert np.allclose(load(tmp_path, "amplitudes"), norm, rtol=1e-5)


def test_features_move_to_the_channels_of_their_unit(make_sorting, tmp_path, monkeypatch):
    """Dense reference: write each spike's features onto the probe, then look them up."""
    monkeypatch.setattr("ks4stream.io.phy._SPIKES_AT_ONCE", 7)  # pieces must not show
    sorting = make_sorting()
    export_phy(sorting, tmp_path)
    moved, channels = load(tmp_path, "pc_features"), load(tmp_path, "pc_feature_ind").astype(int)
    strength = np.linalg.norm(sorting.unit_features, axis=2)
    assert all(np.all(np.diff(strength[u][channels[u]]) <= 0) for u in range(sorting.n_units))
    assert all(len(set(row)) == len(row) for row in channels)
    for row, spike in enumerate(np.flatnonzero(sorting.kept)):
        dense = np.zeros((13, 3), np.float32)
        dense[sorting.template_channels[sorting.template[spike]]] = sorting.features[spike]
        dense[-1] = 0  # where −1 went
        assert np.array_equal(moved[row].T, dense[channels[sorting.unit[spike]]])


def test_without_features(make_sorting, tmp_path):
    export_phy(make_sorting(), tmp_path, save_features=False)
    assert not list(tmp_path.glob("pc_feature*"))
    assert (tmp_path / "spike_times.npy").exists()


def test_more_slots_than_channels_leave_no_padding(make_sorting, tmp_path):
    export_phy(make_sorting(n_channels=4, n_slots=6), tmp_path)
    assert load(tmp_path, "pc_features").shape[2] == 4
    assert np.array_equal(np.sort(load(tmp_path, "pc_feature_ind"), axis=1), np.tile(np.arange(4), (4, 1)))


def test_templates_are_features_through_the_components(make_sorting, tmp_path, monkeypatch):
    monkeypatch.setattr("ks4stream.io.phy._UNITS_AT_ONCE", 3)
    sorting = make_sorting()
    export_phy(sorting, tmp_path)
    expected = np.einsum("ucq,qw->uwc", sorting.unit_features, sorting.waveforms.components)
    assert np.allclose(load(tmp_path, "templates"), expected, atol=1e-6)


def test_tables(make_sorting, tmp_path):
    export_phy(make_sorting(contamination=[0.0, 0.123, 1.0, np.inf]), tmp_path)
    assert (tmp_path / "cluster_KSLabel.tsv").read_text() == "cluster_id\tKSLabel\n0\tgood\n1\tmua\n2\tgood\n3\tmua\n"
    assert (tmp_path / "cluster_ContamPct.tsv").read_text().splitlines()[1:] == [
        "0\t0.0",
        "1\t12.3",
        "2\t100.0",
        "3\tinf",
    ]


def test_each_unit_has_a_reason_or_none(make_sorting, tmp_path):
    """100 spikes each but for unit 2; units 1 and 3 are not refractory."""
    rng = np.random.default_rng(0)
    unit = rng.permutation(np.repeat([0, 1, 3, 2], [130, 130, 130, 10])).astype(np.int32)
    export_phy(
        make_sorting(unit=unit, template=unit, kept=np.ones(400, bool), contamination=[0.1, 0.9, 1.0, 0.9]), tmp_path
    )
    assert (tmp_path / "cluster_reason.tsv").read_text() == (
        "cluster_id\treason\n0\tnone\n1\tnot refractory\n2\tfew spikes\n3\tnot refractory\n"
    )
    assert (tmp_path / "cluster_KSLabel.tsv").read_text() == "cluster_id\tKSLabel\n0\tgood\n1\tmua\n2\tmua\n3\tmua\n"


def test_dead_channel_does_not_break_the_inverse(make_sorting, tmp_path):
    sorting = make_sorting()
    matrix = sorting.whitening.matrix.copy()
    matrix[3] = matrix[:, 3] = 0
    from ks4stream.results import Whitening

    export_phy(make_sorting(whitening=Whitening(matrix, [3])), tmp_path)
    product = load(tmp_path, "whitening_mat_inv").astype(float) @ (matrix + 1e-5 * np.eye(12))
    assert np.allclose(product, np.eye(12), atol=1e-3)


@pytest.mark.parametrize("changes", [{"n_spikes": 0}, {"n_spikes": 0, "n_units": 0}, {"n_spikes": 1, "n_units": 1}])
def test_empty_and_tiny_sortings_export(make_sorting, tmp_path, changes):
    sorting = make_sorting(**changes)
    export_phy(sorting, tmp_path, save_extra_vars=True)
    assert load(tmp_path, "pc_features").shape == (int(sorting.kept.sum()), 3, 5)
    assert load(tmp_path, "templates").shape == (sorting.n_units, 21, 12)
    for name in ("KSLabel", "reason"):
        assert len((tmp_path / f"cluster_{name}.tsv").read_text().splitlines()) == 1 + sorting.n_units


def test_an_empty_sorting_that_stopped_early_exports(make_sorting, tmp_path):
    sorting = make_sorting(n_spikes=0, n_units=0, waveforms=None, whitening=None, drift=None, peaks=None)
    export_phy(sorting, tmp_path)
    assert load(tmp_path, "templates").shape == (0, 21, 12)


def test_units_without_waveforms_or_probe_are_refused(make_sorting, tmp_path):
    with pytest.raises(ResultsError, match="no waveform components"):
        export_phy(make_sorting(waveforms=None), tmp_path)
    with pytest.raises(ResultsError, match="no probe"):
        export_phy(make_sorting(probe=None), tmp_path)


# -- params.py -----------------------------------------------------------------------------------------


def flat(path: Path, n_samples: int = 1, dtype: str = "<i2", offset_bytes: int = 0) -> FlatFile:
    return FlatFile(str(path), dtype, offset_bytes, n_samples, 13)


def test_paths_are_relative_to_the_folder(make_sorting, tmp_path):
    data = tmp_path / "it's dätä.bin"
    data.write_bytes(b"\0" * 26)
    export_phy(make_sorting(flat_files=(flat(data, dtype="<u2"),)), tmp_path / "kilosort4")
    assert params(tmp_path / "kilosort4") == {
        "dat_path": ["../it's dätä.bin"],
        "n_channels_dat": 13,
        "dtype": "uint16",
        "offset": 0,
        "sample_rate": 30000.0,
        "hp_filtered": False,
    }
    assert (tmp_path / "kilosort4" / "params.py").read_text().isascii()


def test_a_link_is_named_and_not_what_it_points_to(make_sorting, tmp_path):
    (tmp_path / "9f86d0").write_bytes(b"\0" * 26)  # as in git-annex: Phy would not open a file of this name
    (tmp_path / "rec.bin").symlink_to(tmp_path / "9f86d0")
    export_phy(make_sorting(flat_files=(flat(tmp_path / "rec.bin"),)), tmp_path / "kilosort4")
    assert params(tmp_path / "kilosort4")["dat_path"] == ["../rec.bin"]


def test_without_flat_files_the_path_is_empty_and_the_reason_a_comment(make_sorting, tmp_path):
    write_params(make_sorting(n_chan_file=0, flat_files="rec.zarr is a Zarr array,\nimport os"), tmp_path)
    assert params(tmp_path)["dat_path"] == [] and "os" not in params(tmp_path)
    assert params(tmp_path)["n_channels_dat"] == 12
    assert "rec.zarr is a Zarr array" in (tmp_path / "params.py").read_text()


def test_paths_of_a_folder_that_is_going_to_be_copied_are_absolute(make_sorting, tmp_path):
    data = tmp_path / "rec.bin"
    data.write_bytes(b"\0" * 26)
    export_phy(make_sorting(flat_files=(flat(data),)), tmp_path / "draft", home=ObjectPath("s3://bucket/results"))
    assert params(tmp_path / "draft")["dat_path"] == [data.resolve().as_posix()]


def test_of_files_on_an_object_store_all_but_the_copy_is_said(make_sorting, tmp_path):
    url = "s3://bucket/raw.bin"
    write_params(make_sorting(flat_files=(FlatFile(url, ">i2", 8, 1, 20),)), tmp_path)
    comment, *_ = (tmp_path / "params.py").read_text().splitlines()
    assert comment.startswith("#") and url in comment and "copy it" in comment
    found = params(tmp_path)
    assert (found["dat_path"], found["dtype"], found["offset"], found["n_channels_dat"]) == ([], ">i2", 8, 20)


SAMPLES = np.random.default_rng(0).integers(-30_000, 30_000, (3000, 13), np.int16)


def big_endian(folder: Path):
    SAMPLES.astype(">i2").tofile(folder / "rec.dat")
    return open_recording(folder / "rec.dat", fs=30_000, n_chan=13, dtype=">i2")


def float64(folder: Path):
    SAMPLES.astype(np.float64).tofile(folder / "rec.bin")
    return open_recording(folder / "rec.bin", fs=30_000, n_chan=13, dtype="float64")


def mapped(folder: Path, rows: slice = slice(None), columns: slice = slice(None), name: str = "rec.raw"):
    with (folder / name).open("wb") as file:
        file.write(bytes(1000))
        SAMPLES.tofile(file)
    array = np.memmap(folder / name, np.int16, "r", offset=1000, shape=SAMPLES.shape)
    return open_recording(array[rows, columns], fs=30_000)


def npy(folder: Path, samples: np.ndarray = SAMPLES, name: str = "rec.npy"):
    np.save(folder / name, samples)
    return open_recording(folder / name, fs=30_000)


def npy_mapped_otherwise(folder: Path):
    """All bytes of the samples of a ``.npy`` file, which says of them that they are signed."""
    start = npy(folder).source.offset_bytes
    return open_recording(np.memmap(folder / "rec.npy", np.uint16, "r", start, SAMPLES.shape), fs=30_000)


def binary(folder: Path, samples: np.ndarray = SAMPLES, name: str = "rec.bin"):
    samples.tofile(folder / name)
    return open_recording(folder / name, fs=30_000, n_chan=13, dtype=samples.dtype)


def of_zarr(folder: Path):
    import zarr

    array = zarr.open(str(folder / "rec.zarr"), mode="w", shape=SAMPLES.shape, dtype="i2", chunks=(1000, 13))
    array[:] = SAMPLES
    return open_recording(folder / "rec.zarr", fs=30_000)


def of_xarray(folder: Path):
    import xarray

    array = np.memmap(folder / "rec.bin", np.int16, "w+", shape=SAMPLES.shape)
    array[:] = SAMPLES
    array.flush()
    return open_recording(xarray.DataArray(array, dims=("time", "channel")), fs=30_000)


def of_dask(folder: Path):
    import dask.array

    return open_recording(dask.array.from_array(SAMPLES), fs=30_000)


def joined(*parts):
    return lambda folder: open_recording([part(folder) for part in parts], fs=30_000)


def cached_source(folder: Path):
    source = binary(folder).source
    return Recording(CachedSource(source, source.digest(), 1000, str(folder)), 30_000.0)


SHOWN = {
    "flat": binary,
    "big-endian": big_endian,
    "float64": float64,
    "map at a byte": mapped,
    "end of a map": lambda folder: mapped(folder, slice(500, None)),
    ".npy": npy,
    "big-endian .npy": lambda folder: npy(folder, SAMPLES.astype(">f4")),
    "xarray of a map": of_xarray,
    "two flat": joined(binary, lambda folder: binary(folder, SAMPLES[:1000], "b.dat")),
    "maps at the same byte": joined(mapped, lambda folder: mapped(folder, name="b.bin")),
    "cached": cached_source,
}
HIDDEN = {
    "array": (lambda folder: open_recording(SAMPLES, fs=30_000), "those of an array"),
    "Dask": (of_dask, "computed by Dask"),
    "Zarr": (of_zarr, "Zarr array"),
    "start of a map": (lambda folder: mapped(folder, slice(500)), "end at byte 14000"),
    "every second row": (lambda folder: mapped(folder, slice(None, None, 2)), "with gaps"),
    "some columns": (lambda folder: mapped(folder, columns=slice(3, 9)), "with gaps"),
    "other map of .npy": (npy_mapped_otherwise, "header"),
    "end of .npy": (
        lambda folder: open_recording(np.load(npy(folder).files[0], mmap_mode="r")[500:], fs=30_000),
        "header",
    ),
    "two .npy": (joined(npy, lambda folder: npy(folder, name="b.npy")), "single .npy"),
    ".bin and .npy": (joined(binary, npy), "differ"),
    "other types": (joined(binary, lambda folder: binary(folder, SAMPLES.astype(">i2"), "b.bin")), "differ"),
    "a flat file and an array": (joined(binary, lambda folder: open_recording(SAMPLES, fs=30_000)), "an array"),
    "unknown suffix": (lambda folder: binary(folder, name="rec.bat"), "does not end in .bin"),
    "upper case": (lambda folder: binary(folder, name="REC.BIN"), "does not end in .bin"),
    "no suffix": (lambda folder: binary(folder, name="continuous"), "does not end in .bin"),
}


def shown_by_phy(make_sorting, folder: Path, recording):
    model = pytest.importorskip("phylib.io.model")
    probe = make_sorting().probe
    if recording.n_channels < 12:
        probe = probe.drop_channels(np.arange(recording.n_channels, 12))
    sorting = make_sorting(
        n_channels=probe.n_channels,
        probe=probe,
        n_samples=recording.n_samples,
        files=recording.files,
        flat_files=recording.source.flat_files,
        dtype=recording.dtype.name,
        n_chan_file=recording.n_channels,
    )
    found = model.load_model(export_phy(sorting, folder / "kilosort4") / "params.py")
    return sorting, found


@pytest.mark.parametrize("make", SHOWN.values(), ids=SHOWN)
def test_phy_shows_the_samples_that_were_sorted(make_sorting, tmp_path, make):
    recording = make(tmp_path)
    sorting, model = shown_by_phy(make_sorting, tmp_path, recording)
    try:
        expected = recording.read(0, recording.n_samples)[:, sorting.probe.chan_map]
        assert len(expected) > 1000 and model.traces.shape[0] == len(expected)
        assert np.array_equal(model.traces[:], expected)
    finally:
        model.close()


@pytest.mark.parametrize(("make", "reason"), HIDDEN.values(), ids=HIDDEN)
def test_what_phy_could_not_show_as_it_is_is_not_named(make_sorting, tmp_path, make, reason):
    _, model = shown_by_phy(make_sorting, tmp_path, make(tmp_path))
    assert model.traces is None
    assert reason in (tmp_path / "kilosort4" / "params.py").read_text().splitlines()[0]
    model.close()


def test_a_file_that_has_grown_or_gone_is_not_named(make_sorting, tmp_path):
    data = tmp_path / "rec.bin"
    data.write_bytes(bytes(52))
    write_params(make_sorting(flat_files=(flat(data),)), tmp_path)
    assert params(tmp_path)["dat_path"] == [] and "has 52 bytes" in (tmp_path / "params.py").read_text()
    data.unlink()
    write_params(make_sorting(flat_files=(flat(data),)), tmp_path)
    assert params(tmp_path)["dat_path"] == [] and "does not exist" in (tmp_path / "params.py").read_text()


def test_preprocessed_copy_keeps_columns_and_times_of_the_file(make_sorting, tmp_path):
    sorting = make_sorting(n_samples=1000)
    export_phy(sorting, tmp_path)
    traces = np.random.default_rng(0).normal(0, 50, (1000, 12)).astype(np.float32)
    path = write_preprocessed_copy(sorting, tmp_path, ((at, traces[at : at + 200]) for at in (100, 300, 600)))
    copied = np.fromfile(path, np.int16).reshape(1000, 13)
    traces[:100] = traces[500:600] = traces[800:] = 0
    assert not copied[:, 12].any()
    assert np.array_equal(copied[:, sorting.probe.chan_map], np.clip(np.rint(traces * 200), -32768, 32767))
    assert params(tmp_path)["dat_path"] == ["temp_wh.dat"]
    assert params(tmp_path)["hp_filtered"] is True


# -- readers -----------------------------------------------------------------------------------------------


def test_phylib_reads_the_folder(make_sorting, tmp_path):
    model_of = pytest.importorskip("phylib.io.model").load_model
    data = tmp_path / "rec.bin"
    np.random.default_rng(0).integers(-99, 99, (300_000, 13), dtype=np.int16).tofile(data)
    sorting = make_sorting(flat_files=(flat(data, 300_000),))
    model = model_of(export_phy(sorting, tmp_path / "kilosort4") / "params.py")
    try:
        kept = np.flatnonzero(sorting.kept)
        assert model.n_spikes == len(kept)
        assert np.array_equal(model.spike_samples, sorting.sample[kept])
        assert np.array_equal(model.spike_clusters, sorting.unit[kept])
        assert model.traces[:10].shape == (10, 12)
        assert (model.n_templates, model.n_samples_waveforms, model.n_channels_loc) == (4, 21, 12)
        assert np.array_equal(model.spike_attributes["positions"], np.load(tmp_path / "kilosort4/spike_positions.npy"))
        assert model.metadata["KSLabel"] == {0: "good", 1: "mua", 2: "good", 3: "mua"}
        best = sorting.template_channels[2][:2]
        features = model.get_features(np.array([0, 1, 2]), best)
        for row, spike in enumerate(kept[:3]):
            slots = sorting.template_channels[sorting.template[spike]]
            for column, channel in enumerate(best):
                if channel in slots:
                    assert np.array_equal(features[row, column], sorting.features[spike, list(slots).index(channel)])
        assert model.get_template(1).template.shape[0] == 21
        assert np.isfinite(model.get_template_waveforms(0)).all()
    finally:
        model.close()


def test_phylib_reads_the_folder_of_an_array(make_sorting, tmp_path):
    model_of = pytest.importorskip("phylib.io.model").load_model
    model = model_of(export_phy(make_sorting(), tmp_path) / "params.py")
    assert model.traces is None
    assert model.get_template(0) is not None
    model.close()


@pytest.mark.parametrize("keep_good_only", [False, True])
def test_spikeinterface_reads_the_folder(make_sorting, tmp_path, keep_good_only):
    extractors = pytest.importorskip("spikeinterface.extractors")
    sorting = make_sorting()
    export_phy(sorting, tmp_path)
    read = extractors.read_kilosort(tmp_path, keep_good_only=keep_good_only)
    assert list(read.unit_ids) == ([0, 2] if keep_good_only else [0, 1, 2, 3])
    for unit in read.unit_ids:
        expected = sorting.sample[sorting.kept & (sorting.unit == unit)]
        assert np.array_equal(read.get_unit_spike_train(unit), expected)
    assert list(extractors.read_phy(tmp_path).get_property("KSLabel")) == ["good", "mua", "good", "mua"]


def test_spikeinterface_makes_an_analyzer_of_the_folder(make_sorting, tmp_path):
    module = pytest.importorskip("spikeinterface.extractors.phykilosortextractors")
    export_phy(make_sorting(), tmp_path)
    analyzer = module.read_kilosort_as_analyzer(tmp_path, gain_to_uV=1.0, offset_to_uV=0.0)
    assert analyzer.get_extension("templates").data["average"].shape == (4, 21, 12)
    assert len(analyzer.get_extension("spike_locations").data["spike_locations"]) == len(load(tmp_path, "amplitudes"))
