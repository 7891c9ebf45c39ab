"""ks4stream as a sorter of SpikeInterface."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import users_cluster

import ks4stream
from ks4stream import simulate
from ks4stream.errors import MissingDependencyError, ProbeError, RecordingError, SettingsError
from ks4stream.settings import Settings
from ks4stream.spikeinterface import register
from ks4stream.unit_waveforms import mean_waveforms

core = pytest.importorskip("spikeinterface.core")
sorters = pytest.importorskip("spikeinterface.sorters")
from extractors import with_contacts  # noqa: E402

RATE, SECONDS, SPLIT = 30_000.0, 8.0, 150_000  # the border lies within a batch
PROBE = simulate.linear_probe(16)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning"),
    # SpikeInterface leaves a file that it has written open for the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file .*traces_cached_seg:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight neurons, some of which fire across the border between segments."""
    truth = simulate.simulate(
        PROBE, SECONDS, seed=3, n_units=8, amplitude_range_uv=(80.0, 250.0), rate_range_hz=(20.0, 40.0)
    )
    return truth.write_binary(tmp_path_factory.mktemp("recorded") / "data.bin")


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    """What ``sort`` finds in the same file."""
    return ks4stream.sort(ks4stream.open_recording(path, n_chan=16, fs=RATE, probe=PROBE), client="loop")


def binary(path: Path) -> Any:
    extractor = core.BinaryRecordingExtractor([path], RATE, "int16", num_channels=16)
    return with_contacts(extractor, PROBE.positions_um)


def run(recording: Any, folder: Path, **params: Any) -> Any:
    return sorters.run_sorter("ks4stream", recording, folder=folder, **({"scheduler": "loop"} | params))


def assert_same(found: Any, expected: Any, borders: tuple[int, ...] = ()) -> None:
    """The same spikes of the same units, apart from those that a border divides."""
    nt, before = expected.settings.nt, expected.settings.peak_sample
    begins = np.array([0, *borders])
    sample, unit = expected.sample[expected.kept], expected.unit[expected.kept]
    first, last = sample - before, sample - before + nt - 1
    whole = np.ones(len(sample), bool)
    for border in borders:
        whole &= (last < border) | (first >= border)
    segment = np.searchsorted(begins[1:], sample[whole], "right")
    vector = found.to_spike_vector()
    np.testing.assert_array_equal(found.unit_ids, np.arange(expected.n_units))
    np.testing.assert_array_equal(vector["segment_index"], segment)
    np.testing.assert_array_equal(vector["sample_index"] + begins[segment], sample[whole])
    np.testing.assert_array_equal(vector["unit_index"], unit[whole])


# -- registration ------------------------------------------------------------------------------------------


def test_it_is_known_by_its_name() -> None:
    register()
    assert sorters.available_sorters().count("ks4stream") == 1
    assert "ks4stream" in sorters.installed_sorters()
    assert [sorter.sorter_name for sorter in sorters.sorter_full_list].count("ks4stream") == 1


def test_every_setting_is_a_parameter_with_its_description() -> None:
    defaults = sorters.get_default_sorter_params("ks4stream")
    descriptions = sorters.get_sorter_params_description("ks4stream")
    assert defaults.keys() == descriptions.keys()
    for spec in fields(Settings):
        assert defaults[spec.name] == spec.default
        assert descriptions[spec.name].startswith(spec.metadata["doc"])
    assert descriptions["nt0min"] == "Sample of the peak within a waveform. In samples. None: int(20·nt/61)."
    others = defaults.keys() - {spec.name for spec in fields(Settings)}
    assert others == {
        "scheduler",
        "workers",
        "device",
        "save_features",
        "save_plots",
        "save_extra_vars",
        "save_preprocessed_copy",
        "resume",
        "keep_run",
        "keep_good_only",
    }


def test_without_spikeinterface_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spikeinterface", None)
    with pytest.raises(MissingDependencyError, match=r"ks4stream\[spikeinterface\]"):
        register()


def test_a_spikeinterface_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikeinterface.__version__", "0.104.3")
    with pytest.raises(MissingDependencyError, match=r"SpikeInterface 0\.104\.3 is too old.*0\.105 or later"):
        register()


def test_importing_the_module_does_not_import_spikeinterface() -> None:
    code = "import ks4stream.spikeinterface, sys; print('spikeinterface' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- bad input, before work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"Th_learned": -1}, SettingsError, "Th_learned=-1 is too small"),
        ({"nt": 60}, SettingsError, "nt=60 is even"),
        ({"scheduler": "loop", "workers": 2}, SettingsError, "workers=2 was given with a client"),
        ({"Th_lerned": 8}, ValueError, "Th_lerned"),
    ],
)
def test_wrong_parameters_are_refused(
    params: dict[str, Any], error: type[Exception], message: str, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        sorters.run_sorter("ks4stream", binary(path), folder=tmp_path / "o", **params)


def test_recordings_that_cannot_be_sorted_are_refused(path: Path, tmp_path: Path) -> None:
    bare = core.BinaryRecordingExtractor([path], RATE, "int16", num_channels=16)
    with pytest.raises(Exception, match="hannel locations"):  # SpikeInterface's own
        run(bare, tmp_path / "bare")
    floats = core.BinaryRecordingExtractor([path], RATE, "float32", num_channels=16)
    with pytest.raises(RecordingError, match="float32 samples without a gain"):
        run(with_contacts(floats, PROBE.positions_um, gain_uv=None), tmp_path / "floats")
    deep = binary(path)
    deep.set_probe(deep.get_probe().to_3d(axes="xy"))
    with pytest.raises(ProbeError, match="three coordinates"):
        run(deep, tmp_path / "deep")


# -- sorting -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sorted_folder(path: Path, expected: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    folder = tmp_path_factory.mktemp("sorted") / "o"
    found = run(binary(path), folder)
    assert_same(found, expected)
    assert found.has_recording()
    return folder


@pytest.mark.slow
def test_a_flat_file_is_sorted_where_it_lies(sorted_folder: Path, path: Path, expected: Any) -> None:
    """No copy is written, and Phy is shown the file itself."""
    output = sorted_folder / "sorter_output"
    largest = max(file.stat().st_size for file in sorted_folder.rglob("*") if file.is_file())
    assert largest < path.stat().st_size / 4
    assert path.name in (output / "params.py").read_text(encoding="utf-8")
    np.testing.assert_array_equal(np.load(output / "spike_times.npy"), expected.sample[expected.kept])
    assert json.loads((sorted_folder / "spikeinterface_log.json").read_text())["sorter_version"]


@pytest.mark.slow
def test_the_result_is_read_again_in_a_new_process(sorted_folder: Path, expected: Any) -> None:
    code = (
        "import sys, spikeinterface.sorters as s; from ks4stream.spikeinterface import register; register(); "
        "found = s.read_sorter_folder(sys.argv[1]); "
        "print(found.get_num_units(), len(found.to_spike_vector()), *found.get_property('main_channel_id'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sorted_folder)], capture_output=True, text=True, check=True)
    found = sorters.read_sorter_folder(sorted_folder)
    assert done.stdout.split() == [
        str(expected.n_units),
        str(expected.kept.sum()),
        *map(str, found.get_property("main_channel_id")),
    ]


@pytest.mark.slow
def test_the_result_is_read_when_the_recording_is_gone(sorted_folder: Path, expected: Any) -> None:
    found = sorters.read_sorter_folder(sorted_folder, register_recording=False)
    assert_same(found, expected)
    assert not found.has_recording()


@pytest.mark.slow
def test_spikeinterface_analyses_the_result(sorted_folder: Path, path: Path) -> None:
    """Its own templates of the units are largest on the main channels."""
    found, recording = sorters.read_sorter_folder(sorted_folder), binary(path)
    analyzer = core.create_sorting_analyzer(found, recording, sparse=False)
    analyzer.compute(["random_spikes", "templates"], extension_params={"templates": {"operators": ["average"]}})
    templates = analyzer.get_extension("templates").get_data()
    templates = templates - templates.mean(axis=1, keepdims=True)
    agrees = np.ptp(templates, axis=1).argmax(axis=1) == found.get_property("main_channel_index")
    assert agrees.mean() > 0.7


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::spikeinterface")  # its own
@pytest.mark.parametrize("has_recording", [False, True])
def test_spikeinterface_reads_the_folder_as_an_analyzer(
    sorted_folder: Path, path: Path, expected: Any, has_recording: bool
) -> None:
    """Units, templates in µV, and where the spikes are; with the recording, its own amplitudes agree."""
    extractors = pytest.importorskip("spikeinterface.extractors")
    recording = binary(path) if has_recording else None
    analyzer = extractors.read_kilosort_as_analyzer(
        sorted_folder / "sorter_output", recording, gain_to_uV=0.195, offset_to_uV=0
    )
    assert_same(analyzer.sorting, expected)
    templates = analyzer.get_extension("templates").get_data()  # (unit, time, channel)
    theirs, ours = (np.ptp(values, axis=1) for values in (templates, mean_waveforms(replace(expected, gain_uv=0.195))))
    largest = ours[np.arange(len(ours)), theirs.argmax(axis=1)]  # or nearly so: a unit may lie between two contacts
    np.testing.assert_allclose(largest, ours.max(axis=1), rtol=0.1)
    np.testing.assert_allclose(theirs.max(axis=1), ours.max(axis=1), rtol=0.1)
    locations = analyzer.get_extension("spike_locations").get_data()
    for name, values in (("x", expected.x_um), ("y", expected.y_um)):
        np.testing.assert_array_equal(locations[name], values[expected.kept])
    if has_recording:
        analyzer.compute("spike_amplitudes")
        amplitudes, unit = analyzer.get_extension("spike_amplitudes").get_data(), expected.unit[expected.kept]
        medians = np.array([np.median(amplitudes[unit == number]) for number in range(expected.n_units)])
        assert np.corrcoef(medians, templates.min(axis=(1, 2)))[0, 1] > 0.8
        np.testing.assert_allclose(medians, templates.min(axis=(1, 2)), rtol=0.5)  # of traces that are not filtered


@pytest.mark.slow
def test_segments_are_joined_and_spikes_given_back_by_segment(path: Path, expected: Any, tmp_path: Path) -> None:
    whole = binary(path)
    n_samples = whole.get_num_samples()
    recording = core.append_recordings([whole.frame_slice(0, SPLIT), whole.frame_slice(SPLIT, n_samples)])
    found = run(recording, tmp_path / "o")
    assert found.get_num_segments() == 2
    assert_same(found, expected, (SPLIT,))
    vector = found.to_spike_vector()
    lengths = np.array([SPLIT, n_samples - SPLIT])
    assert (vector["sample_index"] >= 0).all()
    assert (vector["sample_index"] < lengths[vector["segment_index"]]).all()
    again = sorters.read_sorter_folder(tmp_path / "o", register_recording=False)
    np.testing.assert_array_equal(again.to_spike_vector(), vector)


@pytest.mark.slow
def test_a_zarr_folder_of_spikeinterface(path: Path, expected: Any, tmp_path: Path) -> None:
    recording = binary(path).save(format="zarr", folder=tmp_path / "saved.zarr", progress_bar=False, n_jobs=1)
    assert_same(run(recording, tmp_path / "o"), expected)


@pytest.mark.slow
def test_a_lazy_recording_is_sorted_by_worker_processes(path: Path, expected: Any, tmp_path: Path) -> None:
    """Preprocessing of SpikeInterface that changes nothing, read in slices by other processes."""
    preprocessing = pytest.importorskip("spikeinterface.preprocessing")
    recording = preprocessing.scale(binary(path), gain=1.0, dtype="int16")
    with users_cluster(2, processes=True) as client:
        found = run(recording, tmp_path / "o", scheduler=client.scheduler.address)
    assert_same(found, expected)
    params = (tmp_path / "o" / "sorter_output" / "params.py").read_text(encoding="utf-8")
    assert "read through SpikeInterface (ScaleRecording)" in params


@pytest.mark.slow
def test_a_recording_in_memory_is_sorted_in_this_process(path: Path, expected: Any) -> None:
    samples = np.fromfile(path, np.int16).reshape(-1, 16)
    recording = with_contacts(core.NumpyRecording([samples], RATE), PROBE.positions_um)
    found = ks4stream.sort(ks4stream.open_recording(recording), workers=2).to_spikeinterface(recording)
    assert_same(found, expected)


@pytest.mark.slow
def test_a_recording_that_other_processes_cannot_read_is_refused_before_work(path: Path) -> None:
    samples = np.fromfile(path, np.int16).reshape(-1, 16)
    extractor = with_contacts(core.NumpyRecording([samples], RATE), PROBE.positions_um)
    extractor._serializability["memory"] = False
    recording = ks4stream.open_recording(extractor)
    refused = pytest.raises(RecordingError, match="exists only in this process")
    with users_cluster(1, processes=True), refused:
        ks4stream.sort(recording)


@pytest.mark.slow
def test_groups_are_sorted_by_themselves(path: Path, tmp_path: Path) -> None:
    """And have the units that ``sort`` finds on their channels; units of groups of different sizes are joined."""
    recording = binary(path)
    groups = np.repeat([0, 1], [9, 7])
    recording.set_property("group", groups)
    found = sorters.run_sorter_by_property(
        "ks4stream", recording, "group", folder=tmp_path / "o", scheduler="loop", keep_good_only=True, nblocks=0
    )
    n_units = []
    for group in (0, 1):
        columns = np.flatnonzero(groups == group)
        samples = np.fromfile(path, np.int16).reshape(-1, 16)[:, columns]
        probe = ks4stream.Probe.from_positions(PROBE.positions_um[columns])
        alone = ks4stream.sort(
            ks4stream.open_recording(samples, fs=RATE, probe=probe), Settings(nblocks=0), client="loop"
        )
        n_units.append(int(alone.refractory.sum()))
    assert [int((found.get_property("group") == group).sum()) for group in (0, 1)] == n_units
    ids = found.get_property("main_channel_id")
    np.testing.assert_array_equal(groups[recording.ids_to_indices(ids)], found.get_property("group"))


@pytest.mark.slow
def test_parameters_reach_the_sort(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(
        binary(path),
        tmp_path / "o",
        tmax=5.0,
        nblocks=0,
        drift_smoothing=[1, 1, 1],
        save_features=False,
        save_extra_vars=True,
        keep_good_only=True,
        keep_run=True,
        verbose=True,
    )
    output = tmp_path / "o" / "sorter_output"
    assert found.to_spike_vector()["sample_index"].max() < 5 * RATE
    assert set(found.get_property("KSLabel")) <= {"good"}
    assert not (output / "pc_features.npy").exists()
    assert (output / "full_st.npy").exists()
    assert (output / "run").exists()
    stored = ks4stream.load_sorting(output).settings
    assert (stored.tmax, stored.nblocks, stored.drift_smoothing) == (5.0, 0, (1.0, 1.0, 1.0))
    assert "matching: " in capfd.readouterr().err


@pytest.mark.slow
def test_a_failed_sort_says_why(path: Path, tmp_path: Path) -> None:
    from spikeinterface.sorters.utils import SpikeSortingError

    silent = tmp_path / "silent.bin"
    np.zeros((90_000, 16), np.int16).tofile(silent)
    with pytest.raises(SpikeSortingError, match="every sample checked is zero"):
        run(binary(silent), tmp_path / "o")
