"""The native store: a round trip keeps every field, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io import store
from ks4stream.io.store import load_sorting, save_sorting, without_features
from ks4stream.recording import FlatFile
from ks4stream.results import Provenance, Sorting
from ks4stream.settings import Settings

pytestmark = pytest.mark.slow  # folders of hundreds of files


def assert_same(a, b, where="sorting"):
    """Every field equal, arrays bit for bit and of the same type."""
    assert type(a) is type(b), where
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), where
    elif is_dataclass(a) and not isinstance(a, Settings):
        for spec in fields(a):
            assert_same(getattr(a, spec.name), getattr(b, spec.name), f"{where}.{spec.name}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"files": ("a.bin", "b.bin"), "dtype": "uint16"},
        {"flat_files": (FlatFile("a.bin", ">i2", 8, 9, 13), FlatFile("b.bin", "<f8", 0, 2**40, 13))},
        {"settings": Settings(do_CAR=False, tmin=2.01, nt=21, n_pcs=3), "flat_files": "it is an array"},
        {"provenance": Provenance("0.1.0", "2.13.0+cpu", "2.4", "1.17", 3, "cpu", "a.bin", "0f", True)},
        {"n_spikes": 0, "n_units": 0},
        {"n_spikes": 0, "n_units": 0, "probe": None, "whitening": None, "waveforms": None, "drift": None},
        {"peaks": None},
        {"contamination": [0.1, math.inf, math.nan, 0.0], "seconds": {}, "warnings": ()},
    ],
)
def test_round_trip(make_sorting, tmp_path, changes):
    sorting = make_sorting(**changes)
    assert_same(load_sorting(save_sorting(sorting, tmp_path / "sorting.zarr")), sorting)


def test_a_store_of_a_version_that_kept_less_is_read(make_sorting, tmp_path):
    settings = Settings(tmin=2.01, tmax=9.5, batch_size=30_000, nt=21, n_pcs=3)
    sorting = make_sorting(settings=settings, files=("a.bin",), flat_files=(FlatFile("a.bin", "<i2", 0, 9, 13),))
    path = save_sorting(sorting, tmp_path / "sorting.zarr")
    attrs = json.loads((path / ".zattrs").read_text())
    for name in ("tiling", "flat_files", "provenance", "gain_uv"):
        del attrs["values"][name]
    for name in ("do_CAR", "invert_sign"):
        del attrs["values"]["settings"][name]
    (path / ".zattrs").write_text(json.dumps(attrs))
    found = load_sorting(path)
    assert (found.tiling, found.settings, found.files) == (sorting.tiling, settings, ("a.bin",))
    assert found.tiling.start == 60_300 and len(found.tiling) == 8
    assert found.flat_files == "it is not known where the samples are stored" and found.provenance == Provenance()
    assert found.gain_uv is None
    later = attrs["values"] | {"provenance": {"torch": "3.0", "weather": "fine"}}
    (path / ".zattrs").write_text(json.dumps(attrs | {"values": later}))
    assert load_sorting(path).provenance == Provenance(torch="3.0")


def test_a_store_whose_artifacts_were_not_declared_is_read(make_sorting, tmp_path):
    sorting = make_sorting()
    path = save_sorting(sorting, tmp_path / "sorting.zarr")
    attrs = json.loads((path / "artifacts" / ".zattrs").read_text())
    assert attrs["_ARRAY_DIMENSIONS"] == ["span", "edge"] and attrs["units"] == "samples"
    (path / "artifacts" / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["axis_0", "axis_1"]}))
    attrs = json.loads((path / ".zattrs").read_text())
    del attrs["values"]["provenance"]["python"]
    (path / ".zattrs").write_text(json.dumps(attrs))
    assert_same(load_sorting(path), sorting)
    shutil.rmtree(path / "artifacts")
    assert load_sorting(path).artifacts.shape == (0, 2)


def test_features_may_be_left_out_when_writing_or_reading(make_sorting, tmp_path):
    sorting = make_sorting()
    bare = without_features(sorting)
    assert bare.features.shape == (sorting.n_spikes, 0, sorting.features.shape[2])
    assert_same(load_sorting(save_sorting(sorting, tmp_path / "whole.zarr"), features=False), bare)
    assert_same(load_sorting(save_sorting(sorting, tmp_path / "bare.zarr", features=False)), bare)
    assert sorting.features.size


def test_settings_with_infinities_are_plain_json(make_sorting, tmp_path):
    path = save_sorting(make_sorting(), tmp_path / "sorting.zarr")
    assert load_sorting(path).settings.tmax == math.inf
    text = "\n".join(file.read_text() for file in path.rglob(".zattrs"))
    assert '"Infinity"' in text  # in quotes: as a bare word it is no JSON
    assert not re.search(r"(?<!\")(Infinity|NaN)", text.replace('"-Infinity"', ""))


def test_many_chunks_read_back_equal(make_sorting, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK_BYTES", 1000)
    sorting = make_sorting()
    assert_same(load_sorting(save_sorting(sorting, tmp_path / "sorting.zarr")), sorting)


def test_a_results_folder_will_do(make_sorting, tmp_path):
    save_sorting(make_sorting(), tmp_path / "kilosort4" / "sorting.zarr")
    assert load_sorting(tmp_path / "kilosort4").n_spikes == 400


def test_arrays_say_what_they_are(make_sorting, tmp_path):
    import zarr

    group = zarr.open_group(str(save_sorting(make_sorting(), tmp_path / "s.zarr")), mode="r")
    assert group["features"].attrs["_ARRAY_DIMENSIONS"] == ["spike", "neighbour", "component"]
    assert group["similarity"].attrs["_ARRAY_DIMENSIONS"] == ["unit", "other_unit"]
    assert group["drift/shift_um"].attrs["units"] == "µm"


@pytest.mark.slow
def test_saving_replaces_and_leaves_no_draft(make_sorting, tmp_path):
    path = tmp_path / "sorting.zarr"
    save_sorting(make_sorting(), path)
    save_sorting(make_sorting(n_spikes=50), path)
    assert load_sorting(path).n_spikes == 50
    assert [entry.name for entry in tmp_path.iterdir()] == ["sorting.zarr"]


def test_a_failed_save_leaves_the_old_store(make_sorting, tmp_path, monkeypatch):
    path = save_sorting(make_sorting(), tmp_path / "sorting.zarr")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_new_array", no_space)
    with pytest.raises(ResultsError, match="No space left"):
        save_sorting(make_sorting(n_spikes=50), path)
    assert load_sorting(path).n_spikes == 400
    assert [entry.name for entry in tmp_path.iterdir()] == ["sorting.zarr"]


def test_what_is_not_a_sorting_is_refused(make_sorting, tmp_path):
    with pytest.raises(ResultsError, match="does not hold a sorting"):
        load_sorting(tmp_path)
    path = save_sorting(make_sorting(), tmp_path / "sorting.zarr")
    attrs = json.loads((path / ".zattrs").read_text())
    (path / ".zattrs").write_text(json.dumps(attrs | {"format": "ks4stream.Sorting/9"}))
    with pytest.raises(ResultsError, match="Sorting/9"):
        load_sorting(path)


def test_dataset_views_the_arrays(make_sorting):
    sorting = make_sorting()
    dataset = sorting.to_dataset()
    names = {spec.name: spec.metadata["dims"] for spec in fields(Sorting) if "dims" in spec.metadata}
    assert {f"spike_{name}" if dims[0] == "n" else name for name, dims in names.items()} <= set(dataset.variables)
    assert dataset["spike_features"].dims == ("spike", "neighbour", "component")
    assert np.shares_memory(dataset["spike_features"].values, sorting.features)
    assert dataset["drift_shift_um"].attrs["units"] == "µm"
    assert dataset.sizes["unit"] == 4 and dataset.sizes["peak"] == 500
    assert dataset["unit_features"].sel(channel=11).shape == (4, 3)  # channel: column in the file


def test_dataset_of_an_empty_sorting(make_sorting):
    dataset = make_sorting(n_spikes=0, n_units=0, probe=None, drift=None).to_dataset()
    assert dataset.sizes["spike"] == dataset.sizes["unit"] == 0


def test_only_a_stored_sorting_is_replaced(make_sorting, tmp_path):
    session = tmp_path / "session"
    (session / "sorting.zarr").mkdir(parents=True)
    (session / "raw.bin").write_bytes(b"raw")
    for path in (session, session / "sorting.zarr", session / "raw.bin"):
        with pytest.raises(ResultsError, match="is not a stored sorting"):
            save_sorting(make_sorting(), path)
    backup = tmp_path / ".mine.zarr.backup"
    backup.mkdir()
    for n_spikes in (400, 50):
        save_sorting(make_sorting(n_spikes=n_spikes), tmp_path / "mine.zarr")
        assert load_sorting(tmp_path / "mine.zarr").n_spikes == n_spikes
    assert backup.is_dir() and (session / "raw.bin").read_bytes() == b"raw"
