"""Plans: made from metadata alone, right at any length, and not below what processes really take."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import users_cluster
from numpy.typing import NDArray
from seen_gpus import see_gpus

import ks4stream
from ks4stream import Settings, plan, planning, simulate, sort
from ks4stream.engine import Loop, cluster
from ks4stream.errors import MachineError, MachineWarning, ProbeError, SettingsError
from ks4stream.io.probes import load_probe
from ks4stream.probe import Probe
from ks4stream.recording import BaseSource, Recording
from ks4stream.resources import Resources
from ks4stream.stages import needs
from ks4stream.stages.preprocessing import tiling_of
from ks4stream.stages.units import min_unit_spikes

RATE_HZ = 30_000
GB = 1e9
ROOMY = {"n_workers": 2, "worker_memory_bytes": 64 * GB}


@dataclass(frozen=True)
class Unreadable(BaseSource):
    """Samples that nobody may read."""

    is_remote = False

    n_channels: int
    n_samples: int
    dtype = np.dtype(np.int16)
    digest_is_exact = True

    def read(self, start: int, stop: int) -> NDArray[Any]:
        raise AssertionError("a plan reads nothing")

    def digest(self) -> str:
        raise AssertionError("a plan reads nothing")


def recording_of(n_channels: int = 32, *, hours: float = 1.0, probe: Probe | None = None) -> Recording:
    source = Unreadable(n_channels, round(hours * 3600 * RATE_HZ))
    return Recording(source, RATE_HZ, probe or simulate.staggered_probe(n_channels))


@pytest.fixture(scope="module")
def longest() -> Recording:
    """200 hours of 384 channels."""
    return recording_of(384, hours=200, probe=load_probe("neuropixels_1"))


def test_what_it_says_of_an_hour():
    found = plan(recording_of(), **ROOMY)
    assert (found.n_batches, found.batches_per_task, found.n_channels) == (1800, 30, 32)
    assert found.duration_s == 3600 and found.n_spikes == 32 * 3600 * 10
    assert found.fetch_bytes == 32 * 2 * 3600 * RATE_HZ
    assert found.n_passes == 3 and found.read_bytes > 3 * found.fetch_bytes
    tasks = {stage.name: stage.n_tasks for stage in found.stages}
    assert tasks["detection"] == tasks["matching"] == 60
    assert tasks["first clustering"] == found.n_regions
    assert found.fits
    assert found.n_tasks == sum(tasks.values()) + tasks["waveforms"] + tasks["detection"]  # drift: once more


def test_passes_for_rare_spikes_are_said_apart():
    found = plan(recording_of(), **ROOMY)
    assert found.n_rare_passes == 10, "five thresholds in each of two detections"
    assert "in up to 3 passes (10 more if clean spikes are rare)" in str(found)
    assert plan(recording_of(), Settings(nblocks=0, Th_single_ch=5), **ROOMY).n_rare_passes == 3
    assert plan(recording_of(hours=0.01), Settings(nblocks=0), **ROOMY).n_rare_passes == 4, (
        "the first is on all batches"
    )
    shipped = plan(recording_of(), Settings(templates_from_data=False), **ROOMY)
    assert shipped.n_rare_passes == 0 and "rare" not in str(shipped)
    assert "waveforms" not in {stage.name for stage in shipped.stages}


def test_a_crop_and_no_drift_are_less():
    whole, part = plan(recording_of(), **ROOMY), plan(recording_of(), Settings(tmax=600, nblocks=0), **ROOMY)
    assert part.duration_s == 600 and part.n_passes == 2
    assert part.scratch_bytes * 6 < whole.scratch_bytes and part.results_bytes * 6 == whole.results_bytes
    assert part.client_bytes < whole.client_bytes


def test_traces_of_a_short_recording_are_kept_on_disk_and_read_once():
    settings = Settings(nblocks=0)
    (longer, shorter), kept = (plan(recording_of(hours=hours), settings, **ROOMY) for hours in (0.16, 0.14)), 4 * 32 + 1
    assert longer.read_bytes > 2 * longer.fetch_bytes
    assert 1.0 < shorter.read_bytes / shorter.fetch_bytes < 1.2, "whitening reads some batches before"
    samples = 0.14 * 3600 * RATE_HZ
    assert kept * samples < shorter.scratch_bytes - longer.scratch_bytes * 14 / 16 < 1.1 * kept * samples


def test_more_channels_or_longer_batches_need_more_memory():
    few, many, long = (
        plan(recording_of(n_channels), Settings(batch_size=size), **ROOMY)
        for n_channels, size in ((32, 60_000), (64, 60_000), (64, 240_000))
    )
    for less, more in ((few, many), (many, long)):
        assert all(
            a.memory_bytes < b.memory_bytes
            for a, b in zip(less.stages, more.stages, strict=True)
            if "clustering" not in a.name
        )


def test_it_says_the_same_as_text_and_as_numbers():
    found = plan(recording_of(), results_dir=".", **ROOMY)
    text = str(found)
    for word in ("template centres", "assumed", "run/", "detection", "1 h 00 min 00 s"):
        assert word in text
    assert json.loads(json.dumps(found.to_dict()))["n_batches"] == 1800


def test_a_recording_without_a_probe_is_refused():
    with pytest.raises(ProbeError, match="probe="):
        plan(Recording(Unreadable(4, 1_000_000), RATE_HZ), **ROOMY)


# -- what does not fit -------------------------------------------------------------------------------------------


def test_a_batch_that_no_worker_can_hold_is_refused_with_a_length_that_fits():
    recording, memory = recording_of(64), 200e6
    settings = Settings(batch_size=1_200_000)
    found = plan(recording, settings, n_workers=4, worker_memory_bytes=memory)
    with pytest.raises(
        MachineError, match=r"One batch of 1200000 samples .* batch_size \(for instance to (\d+)\)"
    ) as told:
        found.check()
    shorter = int(str(told.value).split("Lower batch_size (for instance to ")[1].split(")")[0])
    again = plan(recording, settings.replace(batch_size=shorter), n_workers=4, worker_memory_bytes=memory)
    assert not any(shortfall.certain for shortfall in again.shortfalls)


def test_what_depends_on_the_spikes_is_a_warning():
    found = plan(recording_of(), n_workers=2, worker_memory_bytes=2 * GB, spikes_per_channel_hz=2000)
    assert not found.fits
    with pytest.warns(MachineWarning) as told:
        found.check()
    (text,) = (str(one.message) for one in told if "final clustering may need" in str(one.message))
    assert "max_cluster_subset" in text


def test_a_gpu_too_small_for_a_batch_is_refused():
    recording = recording_of(384, probe=load_probe("neuropixels_1"))
    found = plan(recording, device="cuda", gpu_memory_bytes=0.2 * GB, **ROOMY)
    with pytest.raises(MachineError, match=r"One batch of .* the GPU has 200 MB free\. .*[Cc]ompute with device="):
        found.check()


def test_a_share_of_a_gpu_too_small_is_a_warning():
    """The others may need less of it just then."""
    recording = recording_of(384, probe=load_probe("neuropixels_1"))
    roomy = ROOMY | {"n_workers": 8}
    alone = plan(recording, device="cuda", gpu_memory_bytes=6 * GB, **roomy, workers_per_gpu=1)
    assert alone.fits
    shared = plan(recording, device="cuda", gpu_memory_bytes=6 * GB, **roomy, workers_per_gpu=8)
    assert {shortfall.certain for shortfall in shared.shortfalls} == {False}
    with pytest.warns(MachineWarning, match="worker's share is 750 MB") as told:
        shared.check()
    for text in (str(one.message) for one in told):
        assert "use fewer workers (now 8)" in text
        assert "block_batches" not in text  # of which nothing lies on a GPU
    assert "for each of 8 workers that share it (6.0 GB available)" in str(shared)


def test_the_gpu_of_this_machine_with_least_free_counts(monkeypatch: pytest.MonkeyPatch):
    see_gpus(monkeypatch, 80, 40)
    found = plan(recording_of(), n_workers=3)
    assert (found.gpu_memory_bytes, found.workers_per_gpu) == (40 * GB, 2)
    assert plan(recording_of(), n_workers=3, device="cuda:0").workers_per_gpu == 3
    assert plan(recording_of(), n_workers=3, device="cpu").gpu_memory_bytes is None


def test_a_plan_takes_what_a_sort_takes():
    recording = recording_of()
    assert plan(recording, workers=3).to_dict() == plan(recording, n_workers=3).to_dict()
    assert plan(recording, resources=Resources(workers=3, block_batches=7)).batches_per_task == 7
    here = plan(recording, client="loop")
    assert (here.n_workers, here.worker_memory_bytes) == (1, here.memory_bytes)
    with pytest.raises(SettingsError, match="Did you mean 'block_batches'"):
        plan(recording, block_batch=1)


def test_blocks_too_large_for_several_workers_are_computed_by_one(monkeypatch: pytest.MonkeyPatch):
    see_gpus(monkeypatch, 80)
    monkeypatch.setattr(cluster, "CPU_COUNT", 16)
    monkeypatch.setattr(cluster, "MEMORY_LIMIT", 128 * 10**9)
    recording = recording_of(384, hours=10, probe=load_probe("neuropixels_1"))
    recording = replace(recording, files=("a.bin",))  # what is in memory is sorted by this process
    assert plan(recording, device="cuda").n_workers == 4
    assert plan(recording, device="cuda", block_batches=18_000).n_workers == 1


@pytest.mark.slow
def test_a_plan_for_a_client_asks_its_workers():
    with users_cluster(3) as client:
        for given in (client, client.scheduler.address):
            assert plan(recording_of(), client=given).n_workers == 3


def test_what_a_gpu_fetches_from_lies_in_memory_beside_the_tile():
    """Pageable once, and twice in blocks that are powers of 2; on the GPU rows of the file, picked, and turned."""
    recording = recording_of(384, probe=load_probe("neuropixels_1"))
    on_cpu, on_gpu = (plan(recording, device=device, gpu_memory_bytes=40 * GB, **ROOMY) for device in ("cpu", "cuda"))
    tile = 2 * 384 * (60_000 + 2 * tiling_of(recording, Settings()).halo)
    stages = {found: {stage.name: stage for stage in found.stages} for found in (on_cpu, on_gpu)}
    assert tile + 2 * 2**26 <= stages[on_gpu]["whitening"].memory_bytes < 1.02 * (tile + 2 * 2**26)  # FFT's length
    assert stages[on_cpu]["whitening"].gpu_bytes == 0 < stages[on_gpu]["whitening"].gpu_bytes


def test_a_disk_too_small_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "_free_bytes", lambda folder: 2 * 10**6)
    with pytest.warns(MachineWarning, match=r"will need .* of disk space, but only 2\.0 MB are free.*results_dir"):
        plan(recording_of(), results_dir=".", **ROOMY).check()
    monkeypatch.setattr(planning, "_free_bytes", lambda folder: 0)
    with pytest.raises(MachineError, match="of disk"):
        plan(recording_of(), results_dir=".", **ROOMY).check()


def test_a_sort_that_cannot_work_does_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Loop, "worker_memory_bytes", 10e6)
    traces = np.random.default_rng(0).integers(-50, 50, (90_000, 16), np.int16)
    recording = ks4stream.open_recording(traces, fs=RATE_HZ, probe=simulate.staggered_probe(16))
    with pytest.raises(MachineError, match="One batch of 60000 samples"):
        sort(recording, results_dir=tmp_path, client="loop")
    assert not list(tmp_path.rglob("*.npz"))


# -- at any length -----------------------------------------------------------------------------------------------


def test_200_hours_are_planned_in_little_memory(longest: Recording):
    plan(recording_of(), **ROOMY)  # what is loaded on first use does not count
    tracemalloc.start()
    found = plan(longest, **ROOMY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n_batches == 360_000 and found.n_tasks > 36_000
    assert found.fetch_bytes == 384 * 2 * longest.n_samples
    assert peak < 100e6  # bytes; the tables of 1532 centres take some 30 MB


@pytest.mark.slow
def test_tiles_far_beyond_32_bits(longest: Recording):
    tiling = tiling_of(longest, Settings())
    assert longest.n_samples > 2**34 and len(tiling) == 360_000
    for border in (2**31, 2**32, 2**34, longest.n_samples):
        index = (border - 1) // tiling.size
        tile = tiling[index]
        assert tile.start <= border - 1 < tile.stop
        samples = np.array([tile.start - 1, tile.start, border - 1, tile.stop - 1])
        assert tiling.tile_of(samples).tolist() == [index - 1, index, index, index]
    chosen = tiling.evenly(25)
    assert len(chosen) == 200 and chosen[-1] == 199 * 360_000 // 200
    blocks = tiling.blocks(30)
    assert len(blocks) == 12_000 and blocks[-1][-1].stop == longest.n_samples
    assert all(one[-1].stop == after[0].start for one, after in itertools.pairwise(blocks))
    assert min_unit_spikes(tiling_of(longest, Settings()), RATE_HZ) == 20


# -- against what is really taken ----------------------------------------------------------------------------------

N_CLUSTERED = 20_000  # spikes of one region

MEASURE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from ks4stream import Settings, geometry, open_recording, simulate
from ks4stream.engine import one_thread
from ks4stream.io.tables import write_block
from ks4stream.blocks import Tiling
from ks4stream.results import Drift, Templates
from ks4stream.sorter import prepare
from ks4stream.results import Waveforms
from ks4stream.stages.clustering import Circumstances, GraphClustering
from ks4stream.stages.detection import Detect, Peaks
from ks4stream.stages.matching import Match, Spikes
from ks4stream.stages.needs import WIDE_CHANNELS
from ks4stream.stages.templates import LearnTemplates
from ks4stream.stages.thresholds import SetThresholds, Thresholds
from ks4stream.stages.widening import Widen
from ks4stream.stages.units import ClusterSpikes
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

settings = Settings()
folder, n_clustered = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
probe = simulate.staggered_probe(64)


def made_ready(traces):
    tiles = prepare(open_recording(traces, fs=30_000, probe=probe), settings)
    learn = LearnWhitening(settings, tiles)
    run = SimpleNamespace(scratch=folder)
    return tiles.with_whitening(learn.combine([learn.task((tiles.tiling[1],), folder)], run))


def moving():
    "Movement in every channel, far above threshold in 1.5 % of the samples."
    traces = rng.normal(0, 20, (180_000, 64)).astype(np.int16)
    for channel in traces.T:
        hit = rng.random(len(channel)) < 0.015
        channel[hit] = rng.choice([-600, 600], hit.sum())
    return traces


def regions_rows(name, kinds, kind, features):
    "Rows of the region that has most kinds of spikes: of one kind alike."
    region = np.bincount(kinds).argmax()
    of = rng.choice(np.flatnonzero(kinds == region), n_clustered)
    columns = {
        "sample": np.sort(rng.integers(0, 6_000_000, n_clustered)), kind: of.astype(np.int32),
        "score": np.full(n_clustered, 20, np.float32), "features": features[of],
    }
    columns["features"] += rng.normal(size=columns["features"].shape)
    return int(region), [write_block(folder / name, columns, np.full(n_clustered, region), kinds.max() + 1)]


with one_thread():
    simulated = simulate.simulate(probe, 6.0, seed=3, n_units=30, n_artifacts=6)
    still = made_ready(simulated.traces.compute(scheduler="sync"))
    moved = made_ready(moving())
    assert still.whitened(still.tiling[1])[1].any()  # it is filtered again
    assert 0.01 < (abs(moved.whitened(moved.tiling[1])[0]) > 6).float().mean() < 0.02
    shapes = LearnWaveforms(settings, still).shipped()
    shift_um = np.full((len(still.tiling), 1), 12, np.float32)
    drifting = still.with_drift(Drift(shift_um, np.full(1, 600, np.float32)), settings)
    centres = geometry.template_centres(probe, settings)
    regions = geometry.clustering_regions(centres, settings)
    near = geometry.channel_neighbours(probe, WIDE_CHANNELS)
    features = np.zeros((128, 64, 6), np.float32)
    size = np.exp(-np.arange(WIDE_CHANNELS) / 9)[:, None] * np.array([10, 4, 3, 2, 2, 1])
    for unit in range(len(features)):
        features[unit, near[unit % 64]] = rng.normal(size=(WIDE_CHANNELS, 6)) * size
    templates = Templates(features, np.ones(128), np.full(128, np.inf))
    match = Match(settings, drifting, shapes, templates, regions, Thresholds(np.full(128, 8.0)))
    peaks_in, peaks = regions_rows(
        "peaks.rows", regions.of_centre, "centre", 6 * rng.normal(size=(len(centres), 10, 6)).astype(np.float32)
    )
    slots = match.template_channels
    spikes_in, spikes = regions_rows(
        "spikes.rows", match.region_of, "template", features[np.arange(128)[:, None], slots]
    )
    nothing, low = np.zeros((0, 2), np.int64), np.zeros(128)
    spikes = Spikes(spikes, np.zeros(1), [np.zeros(0, np.int64)], nothing, slots, match.region_of, low, 30_000.0)
tiles, cluster = tuple(still.tiling), GraphClustering(settings)
tiling = Tiling(0, 6_000_000, 60_000, 0, 100)
moved_um = np.linspace(-20, 20, 100, dtype=np.float32)[:, None]
when = Circumstances(tiling, 30_000.0, Drift(moved_um, np.full(1, 600, np.float32)))  # which takes most
stages = [
    (LearnWhitening(settings, still), tiles),
    (LearnWaveforms(settings, still, 6.0, 20_000), tiles),
    (LearnWhitening(settings, moved), tiles),
    (LearnWaveforms(settings, moved, 6.0, 20_000), tiles),
    (Detect(settings, drifting, shapes, centres, regions), tiles),
    (match, tiles),
    (LearnTemplates(settings, Peaks(peaks), shapes, probe, centres, regions, when, cluster, 5), peaks_in),
    (Widen(settings, drifting, shapes, templates), tiles),
    (SetThresholds(settings, drifting, shapes, templates), tiles),
    (ClusterSpikes(settings, spikes, shapes, probe, when, cluster), spikes_in),
]
del simulated, still, drifting, moved, match  # a recording in memory is no stage's
while stages:
    stage, item = stages.pop(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    with one_thread():  # gives back what the last one took
        stage.task(item, folder)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(stage.name, int(status["VmHWM"].split()[0]) * 1024, sep=": ")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are asked of Linux")
def test_no_process_takes_more_than_was_said(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(N_CLUSTERED)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(ks4stream.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    on_tiles = plan(recording_of(64, hours=6 / 3600), n_workers=1, block_batches=3)
    spikes_of_a_second = 64 * planning.SPIKES_PER_CHANNEL_HZ * needs.CROWDED / on_tiles.n_regions  # largest region
    on_regions = plan(recording_of(64, hours=N_CLUSTERED / spikes_of_a_second / 3600), n_workers=1)
    need = {
        stage.name: planning.PYTHON_BYTES + stage.memory_bytes
        for found, kind in ((on_tiles, False), (on_regions, True))
        for stage in found.stages
        if ("clustering" in stage.name) == kind
    }
    measured = [line.split(": ") for line in done.stdout.splitlines()]
    for stage, n_bytes in measured:
        # Never more than was said. At most twice as much is said: part of it are buffers that only crowded recordings
        # fill, and arrays that are counted side by side though one may take the place of another.
        assert int(n_bytes) <= need[stage] <= 2 * int(n_bytes), (stage, n_bytes, need[stage])
    assert {stage for stage, _ in measured} == set(need)


MEASURE_HUM = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from ks4stream import Settings, open_recording, simulate
from ks4stream.engine import one_thread
from ks4stream.sorter import prepare
from ks4stream.stages.whitening import LearnWhitening

n_channels = int(sys.argv[1])
settings = Settings(line_frequency=50, batch_size=480_000)
traces = np.random.default_rng(0).normal(0, 20, (1_440_000, n_channels)).astype(np.int16)
tiles = prepare(open_recording(traces, fs=30_000, probe=simulate.staggered_probe(n_channels)), settings)
learn = LearnWhitening(settings, tiles)
with one_thread():
    learn.task((tiles.tiling[0],), Path())  # libraries are loaded
Path("/proc/self/clear_refs").write_text("5")
before = Path("/proc/self/status").read_text()
with one_thread():
    learn.task((tiles.tiling[1],), Path())
after = Path("/proc/self/status").read_text()
kilobytes = [int(text.split(name)[1].split()[0]) for text, name in ((before, "VmRSS:"), (after, "VmHWM:"))]
print(1024 * (kilobytes[1] - kilobytes[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_channels", [4, 32])  # with few, the harmonics take most of it; with many, the traces
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are asked of Linux")
def test_subtracting_hum_takes_no_more_than_was_said(n_channels: int):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_HUM, str(n_channels)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(ks4stream.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    settings = Settings(line_frequency=50, batch_size=480_000)
    found = plan(recording_of(n_channels, hours=48 / 3600), settings, n_workers=1, block_batches=1)
    need = next(stage.memory_bytes for stage in found.stages if stage.name == "whitening")
    assert int(done.stdout) <= need <= 2 * int(done.stdout), (done.stdout, need)  # as above


def test_snippets_are_counted_whatever_the_spikes():
    """Movement makes clean peaks, too: there may be as many as a tile hands over."""
    few, many = (plan(recording_of(), spikes_per_channel_hz=rate, **ROOMY).stages[1] for rate in (0.1, 100))
    assert few.name == "waveforms" and few.memory_bytes == many.memory_bytes
    assert few.memory_bytes > 30 * -(-500_000 // 72) * 2 * 4 * 61  # of a task of 30, of 72 batches


def test_waveforms_are_learned_from_as_many_batches_as_they_take():
    few, many = (plan(recording_of(), Settings(nskip=nskip), **ROOMY) for nskip in (9, 1000))
    tasks = [{stage.name: stage.n_tasks for stage in found.stages} for found in (few, many)]
    assert tasks[0]["whitening"] > tasks[1]["whitening"] and tasks[0]["waveforms"] == tasks[1]["waveforms"]
    tile_bytes = 32 * 2 * (60_000 + 2 * tiling_of(recording_of(), Settings()).halo)
    assert few.read_bytes - many.read_bytes == (200 - 25) * tile_bytes  # for whitening, at most and at least
    assert many.read_bytes == (3 * 1800 + 25 + 2 * 72 + 2 * 90) * tile_bytes  # every 25th, twice, and every 20th, too
