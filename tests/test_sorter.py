"""A whole sort of a few seconds: right, and the same wherever it is computed."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from plain_pickle import load_plain
from pretended_gpu import pretended_gpu
from seen_gpus import see_gpus

from ks4stream import simulate
from ks4stream.deploy import engine_for, fitting_workers
from ks4stream.engine import cluster
from ks4stream.engine.cluster import local_client
from ks4stream.errors import BadChannelWarning, FewSpikesWarning, Ks4StreamWarning, SettingsError
from ks4stream.io import kept_traces
from ks4stream.io.recordings import open_recording
from ks4stream.io.records import key_of
from ks4stream.io.store import load_sorting
from ks4stream.kernels import detection, graph, matching
from ks4stream.kernels.memory import in_chunks
from ks4stream.kernels.thresholds import LOWEST_SMALL
from ks4stream.method import METHOD_VERSION
from ks4stream.planning import plan
from ks4stream.preprocessed import preprocess
from ks4stream.probe import Probe
from ks4stream.recording import FlatFile, Recording
from ks4stream.report.log import version_of
from ks4stream.resources import Resources
from ks4stream.results import Provenance, Sorting
from ks4stream.scoring import score
from ks4stream.settings import Settings
from ks4stream.sorter import sort
from ks4stream.stages import clustering, needs
from ks4stream.stages.preprocessing import Preprocessor, tiling_of

pytestmark = pytest.mark.slow  # whole sorts

RATE = 30_000.0
PROBE = simulate.linear_probe(10, pitch_um=20)
SETTINGS = Settings(batch_size=15_000)
BYTES = (
    "sample",
    "unit",
    "template",
    "score",
    "features",
    "kept",
    "x_um",
    "y_um",
    "template_channels",
    "unit_features",
    "similarity",
    "refractory",
    "contamination",
    "artifacts",
)


def simulated(seconds: float, probe: Probe = PROBE, **options: Any) -> tuple[simulate.SimulatedRecording, Recording]:
    options = {"seed": 3, "amplitude_range_uv": (90, 250), "rate_range_hz": (25, 60), "hash_per_channel": 0} | options
    truth = simulate.simulate(probe, seconds, **options)
    samples = truth.read(0, round(seconds * RATE))
    return truth, open_recording(samples, fs=RATE, probe=probe)


@dataclass
class Case:
    """A recording with drift, and its sorting by the plain loop, one batch at a time."""

    truth: simulate.SimulatedRecording
    recording: Recording
    sorting: Sorting
    progress: list[tuple[str, int, int]]
    facts: list[dict[str, Any]]  # that were told besides


class Listens:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.progress: list[tuple[str, int, int]] = []
        self.facts: list[dict[str, Any]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.progress.append((stage, done, total))

    def note(self, **facts: Any) -> None:
        self.facts.append(facts)


@pytest.fixture(scope="module")
def case() -> Case:
    truth, recording = simulated(6.0, n_units=6, drift="rigid", drift_range_um=20.0)
    shown = Listens()
    sorting = quiet_sort(recording, progress=shown, block_batches=1)
    return Case(truth, recording, sorting, shown.progress, shown.facts)


def quiet_sort(recording: Recording, settings: Settings = SETTINGS, *, client: Any = "loop", **options: Any) -> Sorting:
    """Sort on the CPU by default; that there are few spikes is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSpikesWarning)
        return sort(recording, settings, client=client, **{"device": "cpu"} | options)


def assert_same_bytes(found: Sorting, expected: Sorting) -> None:
    for name in BYTES:
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
    assert found.whitening is not None and expected.whitening is not None
    assert found.whitening.matrix.tobytes() == expected.whitening.matrix.tobytes()
    assert found.drift is not None and expected.drift is not None
    assert found.drift.shift_um.tobytes() == expected.drift.shift_um.tobytes()
    assert found.peaks is not None and expected.peaks is not None
    for name in ("sample", "depth_um", "score"):
        assert getattr(found.peaks, name).tobytes() == getattr(expected.peaks, name).tobytes(), name


@pytest.mark.parametrize(("n_workers", "block_batches"), [(1, 10), (2, 3), (2, None)])
def test_the_same_bytes_with_any_workers_and_blocks(case: Case, n_workers: int, block_batches: int | None) -> None:
    with local_client(n_workers=n_workers, processes=False) as client:
        found = quiet_sort(case.recording, client=client, block_batches=block_batches)
    assert found.n_spikes > 500
    assert_same_bytes(found, case.sorting)


BEGINNING = SETTINGS.replace(tmax=3.0)


@pytest.fixture(scope="module")
def beginning(case: Case) -> Sorting:
    """The first half of the case, sorted by the plain loop, one batch at a time."""
    sorting = quiet_sort(case.recording, BEGINNING, block_batches=1)
    assert sorting.n_spikes > 200 and sorting.drift is not None and np.any(sorting.drift.shift_um)
    return sorting


def test_the_same_bytes_in_other_processes(case: Case, beginning: Sorting) -> None:
    with local_client(n_workers=1, processes=True) as client:
        found = quiet_sort(case.recording, BEGINNING, client=client, block_batches=2)
    assert_same_bytes(found, beginning)


def test_the_same_bytes_where_memory_holds_few_rows(
    case: Case, beginning: Sorting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is out of memory now and then, units, centres and spikes are worked on in smaller pieces."""
    smaller = []

    def with_little_room(function: Any, *columns: torch.Tensor, size: int) -> None:
        def try_it(*rows: torch.Tensor) -> None:
            if len(rows[0]) > 40:
                smaller.append(function)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            function(*rows)

        in_chunks(try_it, *columns, size=size)

    for module in (detection, graph, matching):
        monkeypatch.setattr(module, "in_chunks", with_little_room)
    found = quiet_sort(case.recording, BEGINNING, block_batches=1)
    assert {function.__module__ for function in smaller} == {m.__name__ for m in (detection, graph, matching)}
    assert_same_bytes(found, beginning)


def test_the_same_bytes_whether_or_not_traces_are_kept(
    case: Case, beginning: Sorting, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, found = kept_traces.read, []
    monkeypatch.setattr(kept_traces, "read", lambda *arrays: found.append(read(*arrays)) or found[-1])
    quiet_sort(case.recording, BEGINNING, block_batches=2)
    assert found.count(True) > found.count(False) == 6, "each batch is computed once"
    found.clear()
    monkeypatch.setattr(needs, "KEPT_BYTES", 0)
    assert_same_bytes(quiet_sort(case.recording, BEGINNING, block_batches=2), beginning)
    assert not found


@pytest.mark.parametrize("from_spikes", [0, clustering.GPU_FROM_SPIKES])
def test_the_same_bytes_on_a_gpu(
    case: Case, beginning: Sorting, monkeypatch: pytest.MonkeyPatch, from_spikes: int
) -> None:
    """On one that computes as the CPU does: everything lies where it must, and the size of pieces does not matter."""
    monkeypatch.setattr(clustering, "GPU_FROM_SPIKES", from_spikes)
    with pretended_gpu():
        assert_same_bytes(quiet_sort(case.recording, BEGINNING, device="cuda", block_batches=4), beginning)


def test_a_client_brings_its_own_workers(case: Case) -> None:
    with pytest.raises(SettingsError, match="workers=2 was given with a client"):
        sort(case.recording, SETTINGS, client="loop", workers=2)


def sparse(folder: Path, seconds: int) -> Recording:
    """Of 10 channels, in a file that takes no room."""
    path = folder / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(round(seconds * RATE) * 10 * 2)
    return open_recording(path, n_chan=10, fs=RATE, dtype="int16", probe=PROBE)


@contextmanager
def asked_of_local_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a sort asks of this machine, which it does not get."""
    asked: dict[str, Any] = {}

    @contextmanager
    def local_client(**options: Any) -> Iterator[None]:
        asked.update(options)
        yield

    monkeypatch.setattr(cluster, "local_client", local_client)
    yield asked


@pytest.mark.parametrize(
    ("seconds", "in_memory", "processes"), [(140, False, False), (160, False, None), (160, True, False)]
)
def test_processes_are_started_for_long_files_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int, in_memory: bool, processes: bool | None
) -> None:
    """Of 10 channels, as many seconds as make more or less than 1500 together."""
    recording = sparse(tmp_path, seconds)
    if in_memory:
        recording = replace(recording, files=())
    with asked_of_local_client(monkeypatch) as asked:
        with engine_for(recording, SETTINGS, Resources(workers=3), "cpu", client=None):
            assert asked == {"n_workers": 3, "processes": processes, "device": "cpu"}
        with engine_for(recording, SETTINGS, Resources(workers=3), "cuda", client=None):
            assert asked == {"n_workers": 3, "processes": None, "device": "cuda"}


@pytest.mark.parametrize(("seconds", "n_workers"), [(140, 64), (160, 6), (1100, 44), (8000, 64)])
def test_each_process_has_enough_to_sort(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int, n_workers: int
) -> None:
    """Of 10 channels, 250 seconds × channels, if there are many cores."""
    recording = sparse(tmp_path, seconds)
    monkeypatch.setattr(cluster, "CPU_COUNT", 64)
    monkeypatch.setattr(cluster, "MEMORY_LIMIT", 512 * 10**9)
    with asked_of_local_client(monkeypatch) as asked, engine_for(recording, SETTINGS, Resources(), "cpu", client=None):
        assert asked["n_workers"] == n_workers
    assert plan(recording, SETTINGS, device="cpu").n_workers == n_workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "win32")  # where workers are threads, which cost nothing
        assert fitting_workers(recording, SETTINGS, Resources(), "cpu") == 64


@pytest.mark.parametrize(("seconds", "workers", "n_workers"), [(1100, None, 1), (4100, None, 4), (4100, 2, 2)])
def test_workers_share_a_gpu_for_long_files_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int, workers: int | None, n_workers: int
) -> None:
    """Of 10 channels, as many seconds as make more or less than 40 000 together; and as many as the caller says."""
    recording = sparse(tmp_path, seconds)
    resources = Resources(workers=workers)
    see_gpus(monkeypatch, 80)
    monkeypatch.setattr(cluster, "CPU_COUNT", 16)
    monkeypatch.setattr(cluster, "MEMORY_LIMIT", 128 * 10**9)
    with asked_of_local_client(monkeypatch) as asked, engine_for(recording, SETTINGS, resources, "cuda", client=None):
        assert asked == {"n_workers": n_workers, "processes": None, "device": "cuda"}
    if workers is None:
        assert plan(recording, SETTINGS, device="cuda").n_workers == n_workers


def test_easy_units_are_found(case: Case) -> None:
    """Units of 90 µV and more in noise of 9.5 µV, ten times per second and more: all but at most one are found."""
    found = case.sorting
    result = score(case.truth.spike_samples, case.truth.spike_units, found.sample, found.unit, sampling_rate_hz=RATE)
    assert result.is_well_detected.sum() >= case.truth.n_units - 1


def test_the_drift_is_the_one_simulated(case: Case) -> None:
    """Positive displacement moves the tissue, and spikes, to larger depth; the shift moves the traces back."""
    assert case.sorting.drift is not None
    shift = case.sorting.drift.shift_um[:, 0]
    truth = case.truth.drift.displacement_um((np.arange(len(shift)) + 0.5) * SETTINGS.batch_size / RATE, 90.0)
    assert np.ptp(truth) > 15
    error = shift + truth
    assert np.std(error) < 2.0  # µm; up to a constant, as nothing tells where the tissue was at rest


def test_a_sorting_is_in_order_and_within_the_recording(case: Case) -> None:
    found = case.sorting
    assert found.sample.min() >= 0
    assert found.sample.max() < case.recording.n_samples
    order = np.lexsort((found.unit, found.sample))
    np.testing.assert_array_equal(order, np.arange(found.n_spikes))
    assert sorted(set(found.unit.tolist())) == list(range(found.n_units))
    assert (found.score > LOWEST_SMALL).all()
    assert np.isfinite(found.features).all()
    assert (found.features[found.template_channels[found.template] < 0] == 0).all()


def test_progress_tells_every_stage_from_none_to_all(case: Case) -> None:
    stages = [stage for stage, done, _ in case.progress if done == 0]
    assert set(stages) == set(case.sorting.seconds) >= {"whitening", "drift", "matching", "merging", "joining"}
    for at, (stage, done, total) in enumerate(case.progress):
        ends = at + 1 == len(case.progress) or case.progress[at + 1][1] == 0
        assert (done == total) == ends, stage


def test_a_display_is_told_what_was_found_and_how_much_recording_a_stage_goes_through(case: Case) -> None:
    told = [fact for fact in case.facts if "peaks" in fact or "spikes" in fact]
    assert [*dict.fromkeys((fact["stage"], *fact.keys() - {"stage"}) for fact in told)] == [
        ("detection", "peaks"),
        ("matching", "spikes"),
    ]
    spikes = [fact["spikes"] for fact in told if "spikes" in fact]
    assert len(spikes) == 12 and spikes == sorted(spikes)  # a block each
    assert case.sorting.n_spikes <= spikes[-1] <= 1.1 * case.sorting.n_spikes  # some at borders are in two blocks
    recording_s = {fact["stage"]: fact["recording_s"] for fact in case.facts if "recording_s" in fact}
    assert recording_s["detection"] == recording_s["matching"] == 6.0
    assert recording_s["first clustering"] == 0.0
    assert [fact["device"] for fact in case.facts if "device" in fact] == ["cpu"]


def test_progress_is_shown_if_it_is_wanted(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in (False, True):
        quiet_sort(case.recording, SETTINGS.replace(tmax=1.0), progress=wanted)
        assert ("\nmatching: " in capsys.readouterr().err) == wanted


def test_no_state_of_this_process_is_changed(case: Case) -> None:
    """Neither torch's threads nor random states; the seed of none of them matters."""
    settings, before = SETTINGS.replace(tmax=1.0), torch.get_num_threads()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
    one = quiet_sort(case.recording, settings)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(1)).item()
    assert np.random.rand() == np.random.RandomState(1).rand()  # noqa: NPY002
    other = quiet_sort(case.recording, settings)
    assert torch.get_num_threads() == before
    for name in BYTES:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_only_the_batches_wanted_are_sorted(case: Case) -> None:
    settings = SETTINGS.replace(batch_downsampling=3, tmin=0.5, tmax=5.5, nblocks=0)
    found = quiet_sort(case.recording, settings, block_batches=2)
    batch = (found.sample - 15_000) // 15_000
    assert set(batch.tolist()) == {0, 3, 6}  # of ten, every third while three are left
    assert found.drift is None
    near = np.abs(found.sample[:, None] - case.truth.spike_samples[None, :]).min(axis=1) <= 12  # 0.4 ms
    assert near.mean() > 0.9  # the times are true; by chance 12 % would be


def test_a_crop_is_a_recording_of_its_own(case: Case) -> None:
    samples = case.recording.read(0, case.recording.n_samples)
    cropped = quiet_sort(case.recording, SETTINGS.replace(tmin=1.2, tmax=2.7))
    alone = quiet_sort(open_recording(samples[36_000:81_000], fs=RATE, probe=PROBE))
    assert cropped.n_spikes > 100
    np.testing.assert_array_equal(cropped.sample, alone.sample + 36_000)
    for name in ("unit", "score", "features", "unit_features"):
        assert getattr(cropped, name).tobytes() == getattr(alone, name).tobytes(), name


@pytest.mark.parametrize("upside_down", [False, True])
def test_what_the_file_calls_its_numbers_does_not_matter(case: Case, upside_down: bool) -> None:
    samples = case.recording.read(0, 45_000)
    plain = quiet_sort(open_recording(samples, fs=RATE, probe=PROBE))
    assert plain.n_spikes > 100
    if upside_down:
        other = quiet_sort(open_recording(-samples, fs=RATE, probe=PROBE), SETTINGS.replace(invert_sign=True))
    else:
        unsigned = (samples.astype(np.int32) + 2**15).astype(np.uint16)
        other = quiet_sort(open_recording(unsigned, fs=RATE, probe=PROBE))
    for name in BYTES:
        assert getattr(other, name).tobytes() == getattr(plain, name).tobytes(), name


def test_a_stored_sorting_says_how_to_make_it_again(case: Case, tmp_path: Path) -> None:
    samples = case.recording.read(0, 60_000)
    samples.astype(">i2").tofile(tmp_path / "rec.bin")
    recording = open_recording(tmp_path / "rec.bin", fs=RATE, probe=PROBE, n_chan=10, dtype=">i2")
    settings, folder = SETTINGS.replace(tmin=0.21, nblocks=0, do_CAR=False, invert_sign=True), tmp_path / "out"
    quiet_sort(recording, settings, results_dir=folder)
    found = load_sorting(folder)
    assert found.n_spikes > 100
    assert (found.settings.do_CAR, found.settings.invert_sign) == (False, True)
    assert found.provenance == Provenance(
        ks4stream=version_of("ks4stream"),
        torch=torch.__version__,
        numpy=np.__version__,
        scipy=scipy.__version__,
        method=METHOD_VERSION,
        device="cpu",
        recording="rec.bin",
        recording_digest=recording.digest(),
        digest_is_exact=True,
        python=platform.python_version(),
    )
    assert found.flat_files == (FlatFile(str(tmp_path / "rec.bin"), ">i2", 0, 60_000, 10),)
    assert found.tiling == tiling_of(recording, settings) and found.tiling.start == 6300
    again = quiet_sort(recording, found.settings)
    for name in BYTES:
        assert getattr(again, name).tobytes() == getattr(found, name).tobytes(), name
    given = {"whitening": found.whitening, "device": "cpu"}
    traces = preprocess(recording, found.settings, **given).compute(scheduler="synchronous")
    told_twice = preprocess(recording, settings, **given)
    np.testing.assert_array_equal(traces, told_twice.compute(scheduler="synchronous"))
    ops = load_plain(folder / "ops.npy")
    assert (ops["do_CAR"], ops["invert_sign"], ops["torch_device"], ops["Nbatches"]) == (False, True, "cpu", 4)
    assert ops["ks4stream"]["provenance"] == asdict(found.provenance)


def test_reference_and_sign_are_part_of_what_a_task_depends_on(case: Case) -> None:
    tiling = tiling_of(case.recording, SETTINGS)
    keys = {
        key_of(Preprocessor(case.recording, tiling, settings))
        for settings in (Settings(), Settings(do_CAR=False), Settings(invert_sign=True))
    }
    assert len(keys) == 3


@pytest.mark.parametrize("function", [sort, preprocess])
def test_a_setting_is_not_an_argument(case: Case, function: Any) -> None:
    with pytest.raises(SettingsError, match=r"do_CAR is a setting: pass it as settings=Settings\(do_CAR=…\)"):
        function(case.recording, SETTINGS, do_CAR=False)
    with pytest.raises(SettingsError, match="Did you mean 'workers'"):
        function(case.recording, SETTINGS, worker=2)


@pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")
def test_resources_are_given_together_or_one_by_one(case: Case) -> None:
    settings = SETTINGS.replace(tmax=1.0, nblocks=0)
    together = Resources(client="loop", device="cpu", block_batches=1)
    one, other = sort(case.recording, settings, resources=together), quiet_sort(case.recording, settings)
    for name in BYTES:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_noise_alone_is_an_empty_sorting() -> None:
    _, recording = simulated(2.0, n_units=0)
    with pytest.warns(FewSpikesWarning) as said:
        found = sort(recording, SETTINGS, client="loop", device="cpu")
    assert (found.n_units, found.n_spikes) == (0, 0)
    assert found.features.shape[0] == 0
    assert found.unit_features.shape[1:] == (10, 6)
    ours = [str(one.message) for one in said if issubclass(one.category, Ks4StreamWarning)]
    assert list(found.warnings) == ours
    assert any("No spikes were found. If you expected more" in message for message in ours)


def test_one_unit_is_one_unit() -> None:
    truth, recording = simulated(3.0, n_units=1, amplitude_range_uv=(150, 200))
    found = quiet_sort(recording)
    assert found.n_units == 1
    assert found.refractory.tolist() == [True]
    assert any("in 1 unit were found" in message for message in found.warnings)
    result = score(truth.spike_samples, truth.spike_units, found.sample, found.unit, sampling_rate_hz=RATE)
    assert result.accuracy[0] > 0.95


def test_a_dead_channel_is_left_out_and_said() -> None:
    truth, recording = simulated(3.0, n_units=3, dead_channels=(4,))
    with pytest.warns(BadChannelWarning, match=r"channels \[4\] of the file have no signal"):
        found = quiet_sort(recording)
    assert found.whitening is not None
    assert found.whitening.dead.tolist() == [4]
    assert 4 not in found.template_channels
    assert not found.unit_features[:, 4].any()
    result = score(truth.spike_samples, truth.spike_units, found.sample, found.unit, sampling_rate_hz=RATE)
    assert result.is_well_detected.sum() >= 2


def test_artifacts_are_blanked() -> None:
    """A jump of 2000 bits on a few channels, which no common reference takes away."""
    truth, recording = simulated(3.0, n_units=3)
    samples = recording.read(0, recording.n_samples).copy()
    samples[50_000:50_060, :3] += 2000
    found = quiet_sort(
        open_recording(samples, fs=RATE, probe=PROBE), SETTINGS.replace(artifact_threshold=1000, nblocks=0)
    )
    margin = 60 + SETTINGS.nt - 10  # blanked 2 ms on either side; no window's centre, 10 later, within nt of that
    assert not ((found.sample >= 50_000 - margin) & (found.sample < 50_060 + margin)).any()
    clean = np.abs(truth.spike_samples - 50_030) > 30 + 4 * margin
    near = np.abs(found.sample[:, None] - truth.spike_samples[None, clean]).min(axis=0) <= 12  # 0.4 ms
    assert near.mean() > 0.9


def test_artifacts_on_most_channels_are_recognised_by_themselves() -> None:
    recording = simulate.simulate(simulate.staggered_probe(32), 6.0, seed=4, n_units=6, n_artifacts=4)
    found = quiet_sort(
        open_recording(recording.traces.compute(), fs=RATE, probe=recording.probe), SETTINGS.replace(nblocks=0)
    )
    assert len(found.artifacts) == 4
    for (first, last), (start, stop) in zip(found.artifacts, recording.artifact_spans, strict=True):
        assert start - 90 <= first < last <= stop + 90  # 2 ms on either side, and 1 ms that the filter rings
        assert last - first > 60
        assert not ((found.sample >= first) & (found.sample < last)).any()
    assert found.n_units >= 3


@pytest.mark.parametrize("probe", [simulate.tetrode_probe(2), simulate.multi_shank_probe(2, 4)], ids=repr)
def test_few_channels_per_shank_are_sorted_with_default_settings(probe: Probe) -> None:
    """Where a shank is too short to tell drift, a still recording is left as it is."""
    truth, recording = simulated(3.0, probe, n_units=4)
    found = quiet_sort(recording, SETTINGS.replace(nearest_chans=4))
    assert found.drift is not None
    assert not found.drift.shift_um.any()
    result = score(truth.spike_samples, truth.spike_units, found.sample, found.unit, sampling_rate_hz=RATE)
    assert result.is_well_detected.sum() >= 3


def test_results_are_written_where_asked(case: Case, tmp_path: Any) -> None:
    found = quiet_sort(case.recording, SETTINGS.replace(tmax=1.0), results_dir=tmp_path / "found")
    assert not len(found.artifacts)
    assert (tmp_path / "found" / "spike_times.npy").is_file()
    assert (tmp_path / "found" / "sorting.zarr").exists()
    log = (tmp_path / "found" / "kilosort4.log").read_text()
    assert "tmax = 1.0" in log and "whitening:" in log  # what was asked for, and what was done
    assert "No spikes were looked for" not in log  # nothing is blanked here
