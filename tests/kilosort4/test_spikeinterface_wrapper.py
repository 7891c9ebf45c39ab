"""SpikeInterface's own wrapper of Kilosort4, unmodified, on ks4stream under the name ``kilosort``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream import simulate
from ks4stream.kilosort4 import as_kilosort
from ks4stream.kilosort4.io import load_ops
from ks4stream.kilosort4.run_kilosort import load_sorting, run_kilosort

si = pytest.importorskip("spikeinterface")
from probeinterface import Probe as ContactsOfProbe  # noqa: E402
from spikeinterface import sorters  # noqa: E402
from spikeinterface.extractors import read_kilosort  # noqa: E402
from spikeinterface.sorters.external.kilosort4 import read_kilosort4_motion  # noqa: E402

RATE, SECONDS = 30_000, 3
SETTINGS: dict[str, Any] = {"batch_size": 15_000, "nearest_chans": 8}
PROBE = simulate.linear_probe(12, pitch_um=20)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning"),
    pytest.mark.filterwarnings("default:::spikeinterface"),  # its own
    pytest.mark.filterwarnings("default:::probeinterface"),
]


@pytest.fixture(scope="module", autouse=True)
def under_its_name() -> Iterator[None]:
    with as_kilosort():
        yield


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Waveforms are learned from the few spikes of a short recording."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)
        yield


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than a sort of three seconds; the first test sees them."""
    if "run_kilosort" not in request.node.name:
        monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
        monkeypatch.setattr("ks4stream.kilosort4.plots._write", lambda *_, **__: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "recording.bin"
    scene = simulate.simulate(
        PROBE,
        float(SECONDS),
        seed=3,
        n_units=6,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(40, 90),
        hash_per_channel=0,
        drift="rigid",
        drift_range_um=20.0,
    )
    scene.read(0, SECONDS * RATE).tofile(path)
    return path


@pytest.fixture
def recording(file: Path) -> Any:
    found = si.read_binary(file, sampling_frequency=RATE, dtype="int16", num_channels=12, gain_to_uV=1, offset_to_uV=0)
    contacts = ContactsOfProbe(ndim=2)
    contacts.set_contacts(positions=PROBE.positions_um, shapes="circle", shape_params={"radius": 5})
    contacts.set_device_channel_indices(np.arange(12))
    found.set_probe(contacts)
    return found


def by_wrapper(recording: Any, folder: Path, **params: Any) -> Any:
    return sorters.run_sorter("kilosort4", recording, folder=folder, torch_device="cpu", **SETTINGS, **params)


def by_ourselves(file: Path, folder: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Times and units."""
    settings = {"n_chan_bin": 12, **SETTINGS, **options.pop("settings", {})}
    contacts = {"chanMap": np.arange(12), "xc": PROBE.x_um, "yc": PROBE.y_um, "kcoords": PROBE.shank, "n_chan": 12}
    _, st, clu, *_, kept = run_kilosort(
        settings, probe=contacts, filename=file, results_dir=folder, device="cpu", client="loop", **options
    )
    return st[kept, 0].astype(np.int64), clu[kept]


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Times and units of `run_kilosort`."""
    return by_ourselves(file, tmp_path_factory.mktemp("whole"))


def assert_same(sorting: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    times, units = expected
    assert len(sorting.unit_ids) == len(np.unique(units)) > 3
    for unit in sorting.unit_ids:
        assert np.array_equal(sorting.get_unit_spike_train(unit), times[units == unit])


def test_the_units_are_those_of_run_kilosort(recording: Any, whole: Any, tmp_path: Path) -> None:
    sorting = by_wrapper(recording, tmp_path / "si", verbose=True)
    assert_same(sorting, whole)
    folder = tmp_path / "si" / "sorter_output"
    assert (folder / "drift_amount.png").exists() and (folder / "diagnostics.png").exists()
    assert "matching" in (folder / "kilosort4.log").read_text()
    assert not logging.getLogger("kilosort").handlers
    assert len(read_kilosort(folder).unit_ids) == len(sorting.unit_ids)
    motion = read_kilosort4_motion(folder)
    assert np.ptp(motion.displacement[0]) > 5


@pytest.mark.parametrize("use_binary_file", [None, False])
def test_the_recording_is_read_through_its_extractor(
    recording: Any, whole: Any, tmp_path: Path, use_binary_file: bool | None
) -> None:
    sorting = by_wrapper(recording, tmp_path / "si", use_binary_file=use_binary_file)
    assert_same(sorting, whole)
    assert not (tmp_path / "si" / "sorter_output" / "recording.dat").exists()


def test_without_drift_correction(recording: Any, file: Path, tmp_path: Path) -> None:
    sorting = by_wrapper(recording, tmp_path / "si", do_correction=False)
    assert_same(sorting, by_ourselves(file, tmp_path / "own", settings={"nblocks": 0}))
    assert load_ops(tmp_path / "si" / "sorter_output" / "ops.npy")["dshift"] is None


def test_with_bad_channels(recording: Any, file: Path, tmp_path: Path) -> None:
    sorting = by_wrapper(recording, tmp_path / "si", bad_channels=[0, 7])
    assert_same(sorting, by_ourselves(file, tmp_path / "own", bad_channels=[0, 7]))


def test_traces_that_were_preprocessed_are_taken_as_they_are(recording: Any, tmp_path: Path) -> None:
    """Filtered, referenced and whitened by SpikeInterface, one unit wide; ours adds nothing."""
    from spikeinterface import preprocessing

    ready = preprocessing.highpass_filter(recording, freq_min=300.0)
    ready = preprocessing.whiten(preprocessing.common_reference(ready), dtype="float32", mode="local", radius_um=100.0)
    sorting = by_wrapper(
        ready, tmp_path / "si", skip_kilosort_preprocessing=True, do_CAR=False, bad_channels=[11], do_correction=False
    )
    assert len(sorting.unit_ids) > 3
    ops = load_ops(tmp_path / "si" / "sorter_output" / "ops.npy")
    assert np.array_equal(ops["Wrot"].numpy(), np.eye(11)) and ops["highpass_cutoff"] == 0


def test_files_that_are_asked_for(recording: Any, tmp_path: Path) -> None:
    by_wrapper(recording, tmp_path / "si", save_extra_vars=True, save_preprocessed_copy=True)
    folder = tmp_path / "si" / "sorter_output"
    assert len(load_sorting(folder, load_extra_vars=True)) == 12
    assert (folder / "temp_wh.dat").stat().st_size == SECONDS * RATE * 12 * 2
    assert "temp_wh.dat" in (folder / "params.py").read_text()
    assert not [path.name for path in (tmp_path / "si").iterdir() if path.name.startswith("sorter_output-")]


def test_groups_are_sorted_apart(recording: Any, tmp_path: Path) -> None:
    recording.set_property("group", np.repeat([0, 1], 6))
    sorting = sorters.run_sorter_by_property(
        "kilosort4", recording, "group", folder=tmp_path / "si", torch_device="cpu", nblocks=0, **SETTINGS
    )
    assert set(sorting.get_property("group")) == {0, 1}
