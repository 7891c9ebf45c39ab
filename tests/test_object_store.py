"""A whole sort from a real S3 server: every byte fetched once, through failures, to the result from disk."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clusters import users_cluster

from ks4stream import load_sorting, preprocess, run_kilosort, simulate, sorter
from ks4stream.cli import main
from ks4stream.engine.cluster import local_client
from ks4stream.errors import FewSpikesWarning, Ks4StreamWarning, RecordingError, ResultsError
from ks4stream.io import run_store
from ks4stream.io.objects import write_bytes
from ks4stream.io.places import below, place, read_whole
from ks4stream.io.recordings import open_recording
from ks4stream.io.run_store import ObjectLock
from ks4stream.recording import Recording
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.sorter import sort
from ks4stream.stages.matching import Match
from ks4stream.stages.units import ClusterSpikes

pytest.importorskip("obstore")
pytest.importorskip("moto")

pytestmark = pytest.mark.slow  # whole sorts, and servers

PROBE = simulate.linear_probe(10, pitch_um=20)
SECONDS = 6.0
RATE = 30_000.0
SETTINGS = Settings(batch_size=15_000, Th_universal=9)  # far fewer peaks, which do not matter here


def quiet_sort(recording: Recording, settings: Settings = SETTINGS, client: Any = "loop", **options: Any) -> Sorting:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSpikesWarning)
        return sort(recording, settings, client=client, device="cpu", block_batches=2, **options)


def assert_same(found: Sorting, expected: Sorting) -> None:
    for spec in fields(Sorting):
        if "dims" in spec.metadata:
            np.testing.assert_array_equal(getattr(found, spec.name), getattr(expected, spec.name), err_msg=spec.name)


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sorting]:
    """A recording that drifts, as a Zarr array on disk, and its sorting."""
    truth = simulate.simulate(
        PROBE,
        SECONDS,
        seed=3,
        n_units=6,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(25, 60),
        hash_per_channel=0,
        drift="rigid",
        drift_range_um=20.0,
    )
    samples = truth.read(0, round(SECONDS * RATE))
    path = tmp_path_factory.mktemp("near") / "data.zarr"
    array = zarr.open_array(str(path), mode="w", shape=samples.shape, dtype=samples.dtype, chunks=(4_000, 10))
    array[:] = samples
    array.attrs["sampling_frequency"] = RATE
    sorting = quiet_sort(open_recording(path, probe=PROBE))
    assert sorting.n_spikes > 300 and sorting.drift is not None and np.any(sorting.drift.shift_um)
    return path, sorting


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, of worker processes too."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_every_byte_is_fetched_once(near: tuple[Path, Sorting], object_store: Any, temporary: Path) -> None:
    """Two passes of detection and one of matching; 1.1 is what this project promises, for halos and metadata."""
    path, expected = near
    url = object_store.put(path, "once/data.zarr")
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found = quiet_sort(open_recording(url, probe=PROBE))
    assert_same(found, expected)
    assert found.files == (url,)
    assert stored * 0.9 < object_store.proxy.sent_bytes.total() <= 1.1 * stored
    chunks = [times for name, times in object_store.proxy.requests.items() if name.rpartition("/")[2][0].isdigit()]
    assert chunks == [1] * 45, "each once"
    assert not list(temporary.rglob("*.piece")), "removed at the end"


def test_preprocessed_traces_and_copies_are_fetched_once(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, tmp_path: Path
) -> None:
    """With the sorts before them: two, of the probe's halves."""
    path, _ = near
    url = object_store.put(path, "run_kilosort/data.zarr")
    probe = {"chanMap": np.arange(10), "xc": np.zeros(10), "yc": 20.0 * np.arange(10), "kcoords": np.arange(10) // 5}
    settings = {"n_chan_bin": 10, "batch_size": 15_000, "nblocks": 0, "nearest_chans": 5}

    def fetches() -> list[int]:
        """How often each chunk was fetched."""
        counts = object_store.proxy.requests
        found = [times for name, times in counts.items() if name.rpartition("/")[2][0].isdigit()]
        object_store.proxy.reset_counts()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSpikesWarning)
        run_kilosort(
            settings,
            filename=url,
            probe=probe,
            results_dir=tmp_path / "sorted",
            shank_idx=[0, 1],
            client="loop",
            save_preprocessed_copy=True,
            device="cpu",
        )
    assert fetches() == [1] * 45
    copied = np.fromfile(tmp_path / "sorted" / "shank_1" / "temp_wh.dat", np.int16).reshape(-1, 10)
    assert copied.any(axis=0).tolist() == [False] * 5 + [True] * 5
    assert not list(temporary.rglob("*.piece"))
    recording = open_recording(url, probe=PROBE)
    np.testing.assert_array_equal(recording.traces, open_recording(path).traces)
    assert fetches() == [1] * 45
    traces = preprocess(recording, SETTINGS, client="loop", device="cpu")
    np.testing.assert_array_equal(
        traces, preprocess(open_recording(path, probe=PROBE), SETTINGS, client="loop", device="cpu")
    )
    assert fetches() == [1] * 45


def test_failing_requests_change_nothing(near: tuple[Path, Sorting], object_store: Any, temporary: Path) -> None:
    """In worker processes, which open the store themselves; nearly a third of all reads fails."""
    settings = SETTINGS.replace(tmax=2.0, nblocks=0)
    expected = quiet_sort(open_recording(near[0], probe=PROBE), settings)
    recording = open_recording(object_store.put(near[0], "faulty/data.zarr"), probe=PROBE)
    object_store.proxy.kinds, object_store.proxy.share = ("503", "reset"), 0.3
    with local_client(n_workers=2, processes=True) as client:
        found = quiet_sort(recording, settings, client)
    assert found.n_spikes > 100
    assert_same(found, expected)
    assert object_store.proxy.faults["503"] and object_store.proxy.faults["reset"]


def test_nothing_stays_on_the_workers_machines(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, tmp_path: Path
) -> None:
    """Those of a cluster have temporary folders of their own; what a user keeps in a cache stays there, too."""
    recording = open_recording(object_store.put(near[0], "elsewhere/data.zarr"), probe=PROBE)
    theirs = tmp_path / "elsewhere"
    theirs.mkdir()
    with users_cluster(2, processes=True, env={"TMPDIR": str(theirs)}) as client:
        quiet_sort(recording, SETTINGS.replace(tmax=2.0, nblocks=0), client)
        (caches,) = theirs.glob("ks4stream-cache-*")  # pieces were kept there
        assert not any(caches.iterdir())
        quiet_sort(recording, SETTINGS.replace(tmax=1.0, nblocks=0), client, cache_dir=tmp_path / "kept")
        assert list((tmp_path / "kept").rglob("*.piece"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Ks4StreamWarning)
            run_kilosort(
                {"n_chan_bin": 10, "nblocks": 0, "tmax": 1.0},
                filename=recording.files[0],
                probe=PROBE,
                client=client,
                results_dir=tmp_path / "sorted",
                device="cpu",
            )
        assert not any(caches.iterdir())


def test_on_the_command_line(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    url = object_store.put(near[0], "cli/data.zarr")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.json").write_text(
        '{"chanMap": [0,1,2,3,4,5,6,7,8,9], "xc": [0,0,0,0,0,0,0,0,0,0], "yc": [0,20,40,60,80,100,120,140,160,180], '
        '"kcoords": [0,0,0,0,0,0,0,0,0,0]}'
    )
    arguments = ["sort", url, "--probe", "probe.json", "--tmax", "1", "--nblocks", "0", "--workers", "1"]
    result = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kilosort4" / "params.py").exists() and list((tmp_path / "cache").rglob("*.piece"))
    for file in (tmp_path / "kilosort4").rglob("*"):
        assert not file.is_file() or object_store.secret.encode() not in file.read_bytes(), file


def test_results_and_store_may_lie_there_too(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sort that is interrupted goes on there, and leaves nothing on this machine."""
    path, expected = near
    recording, target = open_recording(path, probe=PROBE), "s3://recordings/sorted"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClusterSpikes, "run", interrupted)
        quiet_sort(recording, results_dir=target)
    assert b"KeyboardInterrupt" in read_whole(place(target) / "kilosort4.log")
    monkeypatch.setattr(Match, "task", lambda *_: pytest.fail("it is finished"))
    found = quiet_sort(recording, results_dir=target)
    assert_same(found, expected)
    assert_same(load_sorting(target), expected)
    names = {name for name, _ in below(place(target))}
    assert names >= {"params.py", "spike_times.npy", "sorting.zarr", "kilosort4.log", "run", "report.html"}
    for name in ("params.py", "kilosort4.log"):
        content = read_whole(place(target) / name)
        assert str(path).encode() in content and str(temporary).encode() not in content
    assert b"KeyboardInterrupt" in content and content.count(b"Finished in") == 1, "the log of both"
    assert not any(temporary.iterdir())


def test_the_log_tells_why_nothing_was_sorted(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "LOOKED_S", 0.5)
    recording, target = open_recording(near[0], probe=PROBE), place("s3://recordings/not-sorted/kilosort4")
    with pytest.raises(RecordingError):
        quiet_sort(recording, Settings(batch_size=15_000, tmin=100.0), results_dir=target)
    with (
        ObjectLock(target / "run" / "lock", renewed_s=0.05),
        pytest.warns(Ks4StreamWarning, match="holds"),
        pytest.raises(ResultsError, match="Another run is writing"),
    ):
        quiet_sort(recording, results_dir=target)
    log = read_whole(target / "kilosort4.log").decode()
    assert log.index("RecordingError: ") < log.index("ResultsError: Another run is writing")
    assert not any(temporary.iterdir())


def test_a_run_whose_lock_was_taken_over_writes_no_results(
    near: tuple[Path, Sorting], object_store: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorter, "find_units", lambda *_: near[1])
    target = place("s3://recordings/taken-over/sorted")
    lock = target / "run" / "lock"

    def take_over(stage: str, done: int, total: int) -> None:
        if stage == "results":
            write_bytes(str(lock), b"node 2 another 1")

    with pytest.raises(ResultsError, match=r"taken over by another run \(process 2 on node\)"):
        quiet_sort(open_recording(near[0], probe=PROBE), results_dir=target, progress=take_over)
    assert sorted(below(target)) == [("run", True)], "nor a log over the other's"
    assert read_whole(lock) == b"node 2 another 1"
