"""A run that is called again goes on where it stopped, to the same result."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ks4stream import simulate
from ks4stream.engine.cluster import local_client
from ks4stream.errors import CurationWarning, FewSpikesWarning, ResultsError
from ks4stream.io import run_store
from ks4stream.io.recordings import open_recording
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.recording import Recording
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.sorter import sort

pytestmark = pytest.mark.slow  # whole sorts

PROBE = simulate.linear_probe(8)
SETTINGS = Settings(batch_size=15_000, nblocks=0, nearest_chans=8)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("data") / "data.bin"
    simulate.simulate(PROBE, 3.0, seed=3, n_units=4).write_binary(path)
    return open_recording(path, n_chan=8, fs=30_000, dtype="int16", probe=PROBE)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tasks of each stage were computed, by the stage's name."""
    found: Counter[str] = Counter()
    write = run_store.write_record

    def counting(path: Path, value: Any) -> None:
        write(path, value)
        found[path.parent.name.rpartition("-")[0]] += 1

    monkeypatch.setattr(run_store, "write_record", counting)
    return found


def run(recording: Recording, folder: Path, settings: Settings = SETTINGS, **options: Any) -> Sorting:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSpikesWarning)
        return sort(recording, settings, results_dir=folder, **{"client": "loop", "block_batches": 1} | options)


def assert_same(one: Sorting, other: Sorting) -> None:
    for spec in fields(Sorting):
        if "dims" in spec.metadata:
            np.testing.assert_array_equal(getattr(one, spec.name), getattr(other, spec.name), err_msg=spec.name)


@pytest.fixture(scope="module")
def undisturbed(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sorting]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(recording, folder)


def test_nothing_that_was_finished_is_computed_again(
    recording: Recording, tmp_path: Path, computed: Counter[str]
) -> None:
    first = run(recording, tmp_path)
    assert first.n_spikes > 50
    spikes = {"first-clustering", "widening", "thresholds", "matching", "final-clustering"}
    assert {"whitening", "waveforms", "detection"} | spikes == set(computed)
    computed.clear()
    assert_same(run(recording, tmp_path), first)
    assert not computed
    assert_same(run(recording, tmp_path, resume=False), first)
    assert computed["detection"] == computed["matching"] == 6


def test_blocks_are_found_again_on_another_number_of_workers(
    recording: Recording, tmp_path: Path, computed: Counter[str]
) -> None:
    run(recording, tmp_path, block_batches=None)
    computed.clear()
    with local_client(n_workers=3, processes=False) as client:
        run(recording, tmp_path, client=client, block_batches=None)
    assert not computed


def test_a_changed_setting_redoes_the_stages_it_touches(
    recording: Recording, tmp_path: Path, computed: Counter[str]
) -> None:
    run(recording, tmp_path)
    computed.clear()
    found = run(recording, tmp_path, SETTINGS.replace(Th_learned=14))
    assert set(computed) == {"matching", "final-clustering"}
    computed.clear()
    assert_same(found, run(recording, tmp_path / "other", SETTINGS.replace(Th_learned=14)))
    computed.clear()
    run(recording, tmp_path, SETTINGS.replace(Th_universal=25))
    assert {"detection", "first-clustering", "matching"} <= set(computed)
    assert not {"whitening", "waveforms"} & set(computed)
    computed.clear()
    run(recording, tmp_path)  # as at first, but of that sort only those stages are kept that the last one used too
    assert {"detection", "matching"} <= set(computed)
    assert len(list((tmp_path / "run").glob("matching-*"))) == 1


def test_the_width_of_the_drift_correction_matters_only_to_corrected_traces(
    tmp_path: Path, computed: Counter[str]
) -> None:
    probe, path = simulate.linear_probe(10, pitch_um=20), tmp_path / "data.bin"
    truth = simulate.simulate(
        probe,
        6.0,
        seed=3,
        n_units=6,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(25, 60),
        hash_per_channel=0,
        drift="rigid",
        drift_range_um=20.0,
    )
    truth.write_binary(path)
    recording = open_recording(path, n_chan=10, fs=30_000, dtype="int16", probe=probe)
    settings = Settings(batch_size=15_000)
    first = run(recording, tmp_path, settings)
    assert first.drift is not None and first.drift.shift_um.any()
    all_tasks = Counter(computed)
    computed.clear()
    run(recording, tmp_path, settings.replace(sig_interp=25))
    assert "whitening" not in computed
    for stage in ("waveforms", "detection"):  # of the two passes, only that over corrected traces
        assert 2 * computed[stage] == all_tasks[stage], stage
    assert computed["matching"] == all_tasks["matching"]


def test_a_curation_stays_until_the_result_changes_and_is_moved_then(recording: Recording, tmp_path: Path) -> None:
    folder, curated = tmp_path / "kilosort4", "cluster_id\tgroup\n0\tgood\n"
    run(recording, folder)
    (folder / "cluster_group.tsv").write_text(curated)

    def stamps() -> dict[Path, int]:
        own = {folder / "kilosort4.log", *(folder / "run").rglob("*")}
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path not in own}

    before = stamps()
    with pytest.warns(CurationWarning, match=r"curated.*cluster_group.tsv.*nothing is touched"):
        run(recording, folder)
    assert stamps() == before
    with pytest.warns(CurationWarning) as said:
        found = run(recording, folder, SETTINGS.replace(Th_learned=14))
    announced, moved = (str(one.message) for one in said)
    assert found.warnings[0] == announced, "before work started"
    assert found.warnings[-1] == moved, "and at the end"
    assert str(tmp_path / "kilosort4-1") in moved
    assert (tmp_path / "kilosort4-1" / "cluster_group.tsv").read_text() == curated
    assert (folder / "cluster_group.tsv").read_text() != curated
    log = (folder / "kilosort4.log").read_text()
    assert "nothing in it was touched" in log and "were moved to" in log


def test_nothing_is_kept_where_nothing_is_to_be(recording: Recording, tmp_path: Path) -> None:
    run(recording, tmp_path, keep_run=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "manifest.json"]


@pytest.mark.parametrize(("stage", "after"), [("whitening", 1), ("detection", 4), ("matching", 3), ("final", 0)])
def test_an_interrupted_run_goes_on(
    recording: Recording,
    tmp_path: Path,
    computed: Counter[str],
    undisturbed: tuple[Path, Sorting],
    stage: str,
    after: int,
) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith(stage) and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recording, tmp_path, progress=interrupt)
    before = Counter(computed)
    assert_same(run(recording, tmp_path), undisturbed[1])
    assert computed["detection"] == computed["matching"] == 6, "every block once, in both runs together"
    assert before.total() < computed.total()


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 16
    path.write_bytes(whole)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "pattern",
    [
        "detection-*/*.record.npz",
        "detection-*/p*2.rows",
        "widening-*/*.record.npz",
        "thresholds-*/t*2.rows",
        "matching-*/sp*4.rows",
    ],
)
def test_what_is_damaged_is_computed_again(
    recording: Recording,
    tmp_path: Path,
    computed: Counter[str],
    undisturbed: tuple[Path, Sorting],
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "run").glob("*clustering-*/*"):
        path.unlink()  # so that the blocks are read again
    stage = pattern.partition("-")[0]
    again = 0
    if stage == "thresholds":  # whose files matching reads
        for path in (tmp_path / "run").glob("matching-*/*"):
            again += path.suffix == ".rows"
            path.unlink()
    computed.clear()
    damage(next(iter(sorted((tmp_path / "run").glob(pattern)))))
    assert_same(run(recording, tmp_path), undisturbed[1])
    assert computed[stage] == 1
    of_blocks = ("detection", "widening", "thresholds", "matching")
    assert sum(computed[name] for name in of_blocks) == 1 + again


@pytest.mark.parametrize("after", [4, 30])
def test_a_disk_that_fills_up_stops_a_run_that_goes_on(
    recording: Recording,
    tmp_path: Path,
    computed: Counter[str],
    undisturbed: tuple[Path, Sorting],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    def full(descriptor: int) -> None:
        if computed.total() >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"/run/.* cannot be written to: .*No space left.* MB are free.*continue"):
        run(recording, tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert_same(run(recording, tmp_path), undisturbed[1])
    assert computed.total() == len(list((tmp_path / "run").glob("*/*.record.npz"))), "every task once, in both runs"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_for_the_results_costs_none_of_the_work(
    recording: Recording,
    tmp_path: Path,
    computed: Counter[str],
    undisturbed: tuple[Path, Sorting],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = ResultsFolder.draft
    for name in ("spike_times.npy", "report.html"):

        @contextmanager
        def full(results: ResultsFolder, name: str = name) -> Iterator[Path]:
            with draft(results) as folder:
                (folder / name).symlink_to("/dev/full")
                yield folder

        with monkeypatch.context() as patch:
            patch.setattr(ResultsFolder, "draft", full)
            with pytest.raises(ResultsError, match=r"cannot be written to: .*No space left.* MB are free"):
                run(recording, tmp_path)
        assert not list(tmp_path.glob("*.npy")), "no half results"
    before = computed.total()
    assert_same(run(recording, tmp_path), undisturbed[1])
    assert computed.total() == before


SORT_UNTIL = """
import json, sys, time
from ks4stream import open_recording, simulate, sort
from ks4stream.engine.cluster import local_client
from ks4stream.settings import Settings

def stop(stage, done, total):
    if stage == "detection" and done >= 3:  # several may be told of at once
        print("here", flush=True)
        time.sleep(600)

if __name__ == "__main__":
    data, folder, settings = sys.argv[1:]
    recording = open_recording(data, n_chan=8, fs=30_000, dtype="int16", probe=simulate.linear_probe(8))
    with local_client(n_workers=2, processes=True) as client:
        sort(recording, Settings.from_dict(json.loads(settings)), results_dir=folder, client=client, block_batches=1,
             progress=stop)
"""


def test_a_killed_process_leaves_no_workers_and_a_run_that_goes_on(
    recording: Recording, tmp_path: Path, computed: Counter[str], undisturbed: tuple[Path, Sorting]
) -> None:
    settings = '{"batch_size": 15000, "nblocks": 0, "nearest_chans": 8}'
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SORT_UNTIL, recording.files[0], str(tmp_path), settings],
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        with pytest.raises(ResultsError, match="Another run is writing"):
            run(recording, tmp_path)
        children = psutil.Process(other.pid).children(recursive=True)
        assert len(children) >= 2
        other.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(children, timeout=300)[1]
    assert "whitening: " in (tmp_path / "kilosort4.log").read_text(), "the first run's log is still there"
    assert_same(run(recording, tmp_path), undisturbed[1])
    assert not {"whitening", "waveforms"} & set(computed)
    assert computed["detection"] <= 3


def test_a_worker_that_dies_changes_nothing(
    recording: Recording, tmp_path: Path, undisturbed: tuple[Path, Sorting]
) -> None:
    killed: list[int] = []
    with local_client(n_workers=2, processes=True) as client:

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "matching" and done >= 2 and not killed:
                killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)

        assert_same(run(recording, tmp_path, client=client, progress=kill), undisturbed[1])
    assert killed


def test_another_recording_is_refused(recording: Recording, tmp_path: Path, undisturbed: tuple[Path, Sorting]) -> None:
    other = tmp_path / "other.bin"
    simulate.simulate(PROBE, 2.0, seed=4, n_units=2).write_binary(other)
    with pytest.raises(ResultsError, match=r"to another recording.*resume=False"):
        run(open_recording(other, n_chan=8, fs=30_000, dtype="int16", probe=PROBE), undisturbed[0])


def test_results_of_another_recording_are_not_replaced_where_its_run_was_deleted(tmp_path: Path) -> None:
    """The folder kilosort4 next to the data is the default of all recordings there."""
    recordings = []
    for seed in (4, 5):
        path = tmp_path / f"{seed}.bin"
        simulate.simulate(PROBE, 2.0, seed=seed, n_units=2).write_binary(path)
        recordings.append(open_recording(path, n_chan=8, fs=30_000, dtype="int16", probe=PROBE))
    one, other = recordings
    run(one, tmp_path / "kilosort4")
    shutil.rmtree(tmp_path / "kilosort4" / "run")
    before = (tmp_path / "kilosort4" / "spike_times.npy").read_bytes()
    with pytest.raises(ResultsError, match=r"belong to another recording.*--fresh"):
        run(other, tmp_path / "kilosort4")
    assert (tmp_path / "kilosort4" / "spike_times.npy").read_bytes() == before
    run(one, tmp_path / "kilosort4")
    run(other, tmp_path / "kilosort4", resume=False)
    assert (tmp_path / "kilosort4" / "spike_times.npy").read_bytes() != before


def test_a_file_written_to_since_is_another_recording(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    simulate.simulate(PROBE, 2.0, seed=4, n_units=2).write_binary(path)
    run(open_recording(path, n_chan=8, fs=30_000, dtype="int16", probe=PROBE), tmp_path / "results")
    os.utime(path, (time.time() + 10,) * 2)
    with pytest.raises(ResultsError, match="to another recording"):
        run(open_recording(path, n_chan=8, fs=30_000, dtype="int16", probe=PROBE), tmp_path / "results")
