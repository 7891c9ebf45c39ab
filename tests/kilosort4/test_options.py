"""Options that need a real sort: each does what it says, and none of those that should not changes a result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clusters import users_cluster

from ks4stream import simulate
from ks4stream.errors import SettingsError
from ks4stream.kilosort4 import parts
from ks4stream.kilosort4.io import save_ops
from ks4stream.kilosort4.ops import recording_of, tiles_of
from ks4stream.kilosort4.run_kilosort import (
    close_logger,
    cluster_spikes,
    compute_drift_correction,
    compute_preprocessing,
    detect_spikes,
    initialize_ops,
    run_kilosort,
    save_sorting,
    set_files,
    setup_logger,
)
from ks4stream.pipeline import STAGES
from ks4stream.results import Drift

CPU = torch.device("cpu")
N_CHANNELS, N_SAMPLES = 16, 90_000
SETTINGS = {"n_chan_bin": N_CHANNELS, "batch_size": 9_000, "nearest_chans": 6}
ARRAYS = ("st", "clu", "tF", "Wall", "similar_templates", "is_ref", "est_contam_rate", "kept_spikes")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """No plots, and waveforms of the few spikes of a short recording."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
        patch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drifting recording of three seconds."""
    recording = simulate.simulate(
        simulate.staggered_probe(N_CHANNELS),
        N_SAMPLES / 30_000,
        seed=6,
        n_units=8,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(40, 90),
        drift="rigid",
        drift_range_um=30.0,
        hash_per_channel=0,
    )
    return recording.write_binary(tmp_path_factory.mktemp("data") / "recording.bin")


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    known = simulate.staggered_probe(N_CHANNELS)
    names = {"chanMap": known.chan_map, "xc": known.x_um, "yc": known.y_um, "kcoords": known.shank}
    return {**names, "n_chan": N_CHANNELS}


@pytest.fixture(scope="module")
def whole(short: None, file: Path, probe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The eight arrays of a sort without options, and its `ops`."""
    folder = tmp_path_factory.mktemp("whole")
    ops, *arrays = run_kilosort(SETTINGS, probe=probe, filename=file, results_dir=folder, device="cpu", client="loop")
    assert np.any(ops["dshift"])
    return {"ops": ops, **dict(zip(ARRAYS, arrays, strict=True))}


def assert_same(found: Any, whole: dict[str, Any]) -> None:
    for name, values in zip(ARRAYS, found, strict=True):
        a, b = np.asarray(values), np.asarray(whole[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


def begun(file: Any, probe: dict[str, Any], folder: Path, data_dtype: Any = "int16", **changes: Any) -> dict[str, Any]:
    """The `ops` of a file, or of a file object."""
    settings = SETTINGS | changes
    _, _, _, probe = set_files(settings, file, probe, "", "", folder, None, None)
    ops, _ = initialize_ops(settings, probe, data_dtype, True, False, CPU, False)
    return ops | {"client": "loop"}


class Bar:
    """A bar of tqdm's kind; its stages, and how far each has come."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.done: list[int] = []
        self.totals: list[int] = []

    def reset(self, total: int) -> None:
        self.totals.append(total)
        self.done.append(0)

    def set_description(self, stage: str) -> None:
        self.stages.append(stage)

    def update(self, n: int) -> None:
        self.done[-1] += n


class Signal:
    """A signal of Qt's kind."""

    def __init__(self) -> None:
        self.percent: list[int] = []

    def emit(self, percent: int) -> None:
        self.percent.append(percent)


# -- of the whole ------------------------------------------------------------------------------------------


def test_a_recording_upside_down_is_sorted_as_the_other_whatever_is_shown(
    file: Path, probe: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    (-np.fromfile(file, np.int16)).tofile(tmp_path / "inverted.bin")
    bar = Bar()
    ops, *found = run_kilosort(
        SETTINGS,
        probe=probe,
        filename=tmp_path / "inverted.bin",
        results_dir=tmp_path / "results",
        invert_sign=True,
        device="cpu",
        client="loop",
        progress_bar=bar,
        clear_cache=True,
        verbose_console=True,
        verbose_log=True,
    )
    assert np.any(ops["dshift"]), "the drift is corrected, too"
    assert_same(found, whole)
    assert bar.stages[:3] == ["whitening", "waveforms", "detection"] and bar.done == bar.totals
    assert len(freed) == len(STAGES) + 2  # waveforms and detection twice
    for text in ((tmp_path / "results" / "kilosort4.log").read_text(), capfd.readouterr().err):
        assert "matching: task 1 of 10 has ended" in text and "matching: this process uses" in text


def test_a_drift_from_elsewhere_is_corrected(file: Path, probe: Any, whole: Any, tmp_path: Path) -> None:
    """That of another sort gives the same result, whatever nblocks is; one that cannot be used is told before work."""
    known = whole["ops"]
    options = {"probe": probe, "filename": file, "results_dir": tmp_path, "device": "cpu", "client": "loop"}
    drift = Drift(known["dshift"], known["yblk"])
    ops, *found = run_kilosort(SETTINGS | {"nblocks": 0}, **options, drift=drift)
    assert_same(found, whole)
    assert np.array_equal(ops["dshift"], known["dshift"]) and np.array_equal(ops["yblk"], known["yblk"])
    with pytest.raises(SettingsError, match="is not a drift"):
        run_kilosort(SETTINGS, **options, drift=known["dshift"])


# -- of the functions that sort step by step -----------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(file: Path, probe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the functions up to `detect_spikes` return with all their options, and what they showed and logged."""
    folder = tmp_path_factory.mktemp("parts")
    freed: list[bool] = []
    bar, signal, log = Bar(), Signal(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_initialized", lambda: True)
        patch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
        setup_logger(folder)
        try:
            ops = compute_preprocessing(begun(file, probe, folder), CPU)
            log["compute_preprocessing"] = (len(freed), logged(folder))
            ops, bfile, _ = compute_drift_correction(ops, CPU, progress_bar=bar, clear_cache=True, verbose=True)
            log["compute_drift_correction"] = (len(freed), logged(folder))
            st, tF, _, _ = detect_spikes(ops, CPU, bfile, progress_bar=signal, clear_cache=False, verbose=False)
            log["detect_spikes"] = (len(freed), logged(folder))
        finally:
            close_logger()
    return folder, ops, bfile, st, tF, bar, signal, log


def logged(folder: Path) -> str:
    """What was logged since the last call."""
    path = folder / "kilosort4.log"
    text = path.read_text()
    path.write_text("")
    return text


def test_caches_are_cleared_after_each_step_where_that_is_wanted(detected: Any) -> None:
    *_, log = detected
    n_freed = [n for n, _ in log.values()]
    assert n_freed == [0, 3, 3]  # waveforms, detection and drift


def test_tasks_and_memory_are_logged_where_that_is_wanted(detected: Any) -> None:
    *_, log = detected
    for name, is_verbose in (("compute_preprocessing", False), ("compute_drift_correction", True)):
        assert ("has ended" in log[name][1], "MB of memory" in log[name][1]) == (is_verbose, is_verbose), name
    quiet = log["detect_spikes"][1]
    assert "matching: " in quiet and "has ended" not in quiet and "MB of memory" not in quiet


def test_progress_is_shown(detected: Any) -> None:
    *_, bar, signal, _ = detected
    assert bar.stages == ["waveforms", "detection", "drift"] and bar.done == bar.totals
    assert signal.percent[0] == 0 and signal.percent.count(100) >= 4 and not set(signal.percent) - set(range(101))


@pytest.fixture
def going_on(detected: Any, tmp_path: Path) -> Any:
    """What the last two functions take, with a folder of its own for the results."""
    _, ops, bfile, st, tF, *_ = detected
    return {**ops, "ks4stream": dict(ops["ks4stream"]), "results_dir": tmp_path}, bfile, st, tF


def test_options_of_the_last_two_functions(
    going_on: Any, whole: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, bfile, st, tF = going_on
    freed: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    shown: list[tuple[str, int, int]] = []
    setup_logger(tmp_path)
    try:
        clu, Wall, st, tF = cluster_spikes(
            st, tF, ops, CPU, bfile, progress_bar=lambda *seen: shown.append(seen), clear_cache=True, verbose=True
        )
    finally:
        close_logger()
    assert len(freed) == 3 and {stage for stage, _, _ in shown} == {"final clustering", "merging", "joining"}
    text = logged(tmp_path)
    assert "has ended" in text and "MB of memory" in text
    _, *rest = save_sorting(ops, tmp_path / "plain", st, clu, tF, Wall, bfile.imin)
    assert_same((st, clu, tF, Wall, *rest), whole)
    plain = {path.name for path in (tmp_path / "plain").iterdir()}
    extra = {"tF.npy", "Wall.npy", "full_st.npy", "full_clu.npy", "full_amp.npy"}
    assert file.name in (tmp_path / "plain" / "params.py").read_text() and not extra & plain
    save_sorting(ops, tmp_path / "more", st, clu, tF, Wall, bfile.imin, save_extra_vars=True, skip_dat_path=True)
    assert {path.name for path in (tmp_path / "more").iterdir()} == plain | extra
    text = (tmp_path / "more" / "params.py").read_text()
    assert "\ndat_path = []" in text and "skip_dat_path was given" in text


GOING_ON = """
import sys
from pathlib import Path
import numpy as np
from ks4stream.kilosort4.io import bfile_from_ops, load_ops
from ks4stream.kilosort4.run_kilosort import cluster_spikes, save_sorting
folder = Path(sys.argv[1])
ops = load_ops(folder / "ops.npy", "cpu")
bfile = bfile_from_ops(ops, device="cpu")
clu, Wall, st, tF = cluster_spikes(np.load(folder / "st.npy"), np.load(folder / "tF.npy"), ops, "cpu", bfile)
_, *rest = save_sorting(ops, folder / "results", st, clu, tF, Wall, bfile.imin)
for number, values in enumerate((st, clu, tF, Wall, *rest)):
    np.save(folder / f"found_{number}.npy", np.asarray(values))
"""


def test_another_process_goes_on(going_on: Any, whole: Any, tmp_path: Path) -> None:
    ops, _, st, tF = going_on
    save_ops(ops, tmp_path)
    np.save(tmp_path / "st.npy", st)
    np.save(tmp_path / "tF.npy", tF.numpy())
    command = [sys.executable, "-W", "ignore", "-c", GOING_ON, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert_same([np.load(tmp_path / f"found_{number}.npy") for number in range(len(ARRAYS))], whole)


def test_they_compute_where_ops_says(file: Path, probe: Any, whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """On the scheduler at an address, on a client, on the active client, or on workers on this machine."""
    used: list[tuple[str, int]] = []
    started = parts.started

    @contextmanager
    def noted(*args: Any, **options: Any) -> Iterator[Any]:
        with started(*args, **options) as run:
            client = getattr(run.engine, "_client", None)
            used.append((client.scheduler.address if client else "", run.engine.n_workers))
            yield run

    monkeypatch.setattr(parts, "started", noted)
    ops = begun(file, probe, tmp_path)
    with users_cluster(2) as client:
        address = client.scheduler.address
        ops["client"] = address
        ops = compute_preprocessing(ops, CPU)
        ops["client"] = client
        ops, bfile, _ = compute_drift_correction(ops, CPU)
        del ops["client"]
        st, tF, _, _ = detect_spikes(ops, CPU, bfile)
        ops["workers"] = 1
        clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
        _, *rest = save_sorting(ops, tmp_path, st, clu, tF, Wall, bfile.imin)
    assert used[:3] == [(address, 2)] * 3
    assert used[3][0] not in ("", address) and used[3][1] == 1
    assert_same((st, clu, tF, Wall, *rest), whole)


def test_a_device_that_is_not_there_is_told(file: Path, probe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device in ("cuda", torch.device("cuda")):
        with pytest.raises(SettingsError, match="cuda"):
            compute_preprocessing(begun(file, probe, tmp_path), device)
    with pytest.raises(SettingsError, match="device"):
        compute_preprocessing(begun(file, probe, tmp_path), "abacus")


@pytest.mark.parametrize("name", ["int16", "uint16", "int32", "float32"])
def test_samples_of_other_types(name: str, file: Path, probe: Any, tmp_path: Path) -> None:
    samples = np.fromfile(file, np.int16)[: 30_000 * N_CHANNELS].astype(np.int32)
    (samples + (2**15 if name == "uint16" else 0)).astype(name).tofile(tmp_path / "other.bin")
    ops = begun(tmp_path / "other.bin", probe, tmp_path, name, scale=0.5, shift=3.0)
    tiles = tiles_of(ops, recording_of(ops), "cpu")
    read = tiles.raw(tiles.tiling[0])[:, tiles.tiling.halo :][:, :9_000]
    assert np.array_equal(read, samples.reshape(-1, N_CHANNELS)[:9_000].T * 0.5 + 3.0)


class Slices:
    """Samples of which only slices of time can be had."""

    def __init__(self, samples: Any) -> None:
        self._samples, self.shape, self.dtype = samples, samples.shape, samples.dtype

    def __getitem__(self, key: slice) -> Any:
        assert isinstance(key, slice), key
        return self._samples[key]


def test_a_file_object_need_only_know_slices_of_time(file: Path, probe: Any, tmp_path: Path) -> None:
    samples = Slices(np.fromfile(file, np.int16).reshape(-1, N_CHANNELS))
    of_file = compute_preprocessing(begun(file, probe, tmp_path / "file"), CPU)
    of_object = compute_preprocessing(begun("", probe, tmp_path / "object"), CPU, file_object=samples)
    assert torch.equal(of_file["Wrot"], of_object["Wrot"])
    for ops in (of_file, of_object):
        ops["nblocks"] = 0
    _, one, _ = compute_drift_correction(of_file, CPU)
    _, other, _ = compute_drift_correction(of_object, CPU, file_object=samples)
    assert torch.equal(one.padded_batch_to_torch(2), other.padded_batch_to_torch(2))


@pytest.mark.parametrize("arguments", [(False, False), (True, True)])
def test_arguments_of_initialize_ops(arguments: tuple[bool, bool], file: Path, probe: Any, tmp_path: Path) -> None:
    """Without common reference, another covariance; upside down the same, but of traces with the other sign."""
    do_CAR, invert_sign = arguments
    settings = SETTINGS | {"filename": [file], "results_dir": tmp_path, "nblocks": 0}
    found = []
    for given in ((True, False), arguments):
        ops, _ = initialize_ops(settings, probe, "int16", *given, CPU, False)
        ops = compute_preprocessing(ops | {"client": "loop"}, CPU)
        _, bfile, _ = compute_drift_correction(ops, CPU)
        found.append((ops["Wrot"], bfile.padded_batch_to_torch(2)))
    (matrix, traces), (other_matrix, other_traces) = found
    assert torch.equal(matrix, other_matrix) is do_CAR
    assert not invert_sign or float((traces * other_traces).mean()) < -0.5


def test_probes_and_channels_of_set_files(file: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"n_chan_bin": 385}
    for name, n_channels in (("neuropixels_1.mat", 384), ("NeuroPix1_default.mat", 383)):
        *_, found = set_files(dict(settings), file, None, name, None, tmp_path, None, None)
        assert found["n_chan"] == n_channels
    four = simulate.multi_shank_probe(4, 4)
    for shank_idx, bad, n_channels in ((None, None, 16), (2.0, None, 4), ([0, 3], None, 8), ([0.0, 3.0], [0, 15], 6)):
        *_, found = set_files(dict(SETTINGS), file, four, None, None, tmp_path, bad, shank_idx)
        assert found["n_chan"] == n_channels
