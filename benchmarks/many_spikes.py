"""Memory and time of what follows matching, for as many spikes as hours of Neuropixels have, all of them made up.

Three parts, each in a process of its own, whose memory is looked at twenty times a second:

region    the final clustering of one region of ``--spikes`` spikes
cluster   every region of a sorting of ``--spikes`` spikes, cut in two clusters per unit instead of clustered
finish    merging those clusters, joining all spikes in order of time, and writing all results

``python many_spikes.py region --spikes 1000000`` or ``python many_spikes.py sorting --spikes 15000000`` (the second
and the third). Anonymous memory is what a process cannot do without; pages of mapped files, which count as resident
too, are given back when anybody else needs memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ks4stream import Settings, geometry, load_probe, report
from ks4stream.blocks import Tiling
from ks4stream.engine import Loop, one_thread
from ks4stream.io.records import read_record, write_record
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.io.run_store import open_store
from ks4stream.io.sources import ArraySource
from ks4stream.io.tables import Receipt, write_block
from ks4stream.kernels.graph import ScatteredRows
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.results import Sorting, Waveforms
from ks4stream.run import Run
from ks4stream.stages.clustering import Circumstances, ClusterMethod, GraphClustering
from ks4stream.stages.detection import rows_of_region
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Spikes
from ks4stream.stages.preprocessing import Preprocessor, tiling_of
from ks4stream.stages.units import ENOUGH_SPIKES, ClusterSpikes, Merge
from ks4stream.stages.waveforms import LearnWaveforms

RATE_HZ = 30_000.0
BLOCK_S = 60.0
SPIKES_PER_SECOND = 150e6 / (13 * 3600)  # of the 13 hours of Neuropixels that Kilosort4's documentation speaks of
N_UNITS = 400  # on 384 channels
SPREAD_UM = 40.0  # how fast a unit's amplitude falls with distance
REFRACTORY_S = 0.003


# --- spikes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Units on a probe: templates, the channels of their features, and the region of each."""

    probe: Probe
    settings: Settings
    channels: NDArray[np.int64]  # (v, j)
    features: NDArray[np.float32]  # (v, j, q) mean of each
    region_of: NDArray[np.int64]  # (v,)
    n_regions: int
    rate_hz: NDArray[np.float64]  # (v,)

    @classmethod
    def of(cls, probe: Probe, n_units: int, spikes_per_second: float, *, seed: int = 0) -> Scene:
        """Units spread evenly over the probe's channels."""
        settings, draw = Settings(), np.random.default_rng(seed)
        centres = geometry.template_centres(probe, settings, np.zeros(0, np.int64))
        regions = geometry.clustering_regions(centres, settings)
        near = geometry.channel_neighbours(probe, settings.nearest_chans)
        largest = np.arange(n_units) * probe.n_channels // n_units
        channels = np.full((n_units, settings.nearest_chans), -1, np.int64)
        for unit, channel in enumerate(largest.tolist()):
            channels[unit, : len(near[channel])] = near[channel]
        distance = np.linalg.norm(probe.positions_um[channels.clip(0)] - probe.positions_um[largest][:, None], axis=2)
        shape = draw.normal(size=(n_units, 1, settings.n_pcs))
        shape = shape + 0.3 * draw.normal(size=(*channels.shape, settings.n_pcs))
        amplitude = 25 * np.exp(-distance / SPREAD_UM) * (channels >= 0)
        shape *= (amplitude / np.linalg.norm(shape, axis=2))[:, :, None]
        rate = draw.lognormal(sigma=0.8, size=n_units)
        return cls(
            probe,
            settings,
            channels,
            shape.astype(np.float32),
            regions.region_at(probe.positions_um[largest], probe.shank[largest]),
            len(regions),
            rate * spikes_per_second / rate.sum(),
        )

    def block(self, index: int) -> dict[str, NDArray[np.generic]]:
        """Spikes of one block."""
        draw = np.random.default_rng([index, 1])
        times, template = [], []
        for unit, rate in enumerate(self.rate_hz.tolist()):
            gaps = REFRACTORY_S + draw.exponential(max(1 / rate - REFRACTORY_S, 1e-4), int(2 * rate * BLOCK_S) + 10)
            train = np.cumsum(gaps)
            train = train[train < BLOCK_S]
            times.append(train)
            template.append(np.full(len(train), unit, np.int32))
        every, which = np.concatenate(times), np.concatenate(template)
        order = np.argsort(every, kind="stable")
        which = which[order]
        features = draw.standard_normal((len(which), *self.features.shape[1:]), np.float32)
        features += self.features[which]
        features[self.channels[which] < 0] = 0
        return {
            "sample": ((every[order] + index * BLOCK_S) * RATE_HZ).astype(np.int64),
            "template": which,
            "score": np.linalg.norm(features, axis=(1, 2)),
            "features": features,
        }

    def write(self, folder: Path, n_spikes: int) -> Spikes:
        """Blocks of about as many spikes as wanted."""
        n_blocks = max(round(n_spikes / (self.rate_hz.sum() * BLOCK_S)), 1)
        receipts = []
        for index in range(n_blocks):
            columns = self.block(index)
            region = self.region_of[columns["template"]]
            receipts.append(write_block(folder / f"spikes-{index:06d}.rows", columns, region, self.n_regions))
        first = (np.arange(n_blocks) * BLOCK_S * RATE_HZ).astype(np.int64)
        return Spikes(
            receipts=receipts,
            first=first,
            dropped=[np.zeros(0, np.int64)] * n_blocks,
            artifacts=np.zeros((0, 2), np.int64),
            template_channels=self.channels,
            region_of=self.region_of,
            threshold=np.zeros(len(self.region_of)),
            sampling_rate_hz=RATE_HZ,
        )

    def sorter(self, spikes: Spikes, cluster: ClusterMethod) -> ClusterSpikes:
        """The final clustering."""
        n_blocks, size = len(spikes.first), int(BLOCK_S * RATE_HZ)
        when = Circumstances(Tiling(0, n_blocks * size, size, 0, n_blocks), RATE_HZ)
        return ClusterSpikes(self.settings, spikes, self.waveforms(), self.probe, when, cluster)

    def waveforms(self) -> Waveforms:
        """Those of the package."""
        silence = Recording(ArraySource.open(np.zeros((30_000, self.probe.n_channels), np.int16)), RATE_HZ, self.probe)
        tiles = Preprocessor(silence, tiling_of(silence, self.settings), self.settings)
        return LearnWaveforms(self.settings, tiles).shipped()


def one_region(n_spikes: int) -> Scene:
    """A probe of one region only: 32 contacts within 80 µm, 30 units."""
    positions = [(16.0 * (i % 4), 10.0 * (i // 4)) for i in range(32)]
    scene = Scene.of(Probe.from_positions(positions), 30, 30 * 8.0)
    return replace(scene, region_of=np.zeros(30, np.int64), n_regions=1)


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """What a part of the work took."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_anonymous_gb: dict[str, float] = field(default_factory=dict)
    peak_resident_gb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Measure what happens inside."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                for name, peaks in (("RssAnon", self.peak_anonymous_gb), ("VmRSS", self.peak_resident_gb)):
                    peaks[part] = max(peaks.get(part, 0.0), _status_bytes(name) / 1e9)

        thread = threading.Thread(target=watch, daemon=True)
        began, cpu = time.perf_counter(), time.process_time()
        thread.start()
        try:
            yield
        finally:
            self.seconds[part] = time.perf_counter() - began
            self.cpu_seconds[part] = time.process_time() - cpu
            done.set()
            thread.join()


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


# --- parts ----------------------------------------------------------------------------------------------------


def region(n_spikes: int, folder: Path, usage: Usage) -> dict[str, object]:
    """Cluster one region."""
    scene = one_region(n_spikes)
    with usage.of("making the spikes"):
        spikes = scene.write(folder, n_spikes)
    with usage.of("final clustering"), one_thread():
        found = scene.sorter(spikes, GraphClustering(scene.settings)).task(0, folder)
    return {"spikes": found.receipt.n_rows, "clusters": len(found.features), "true units": len(scene.rate_hz)}


@dataclass(frozen=True)
class Halves:
    """In place of a clustering: two clusters per template, its spikes shared out by a fixed scramble."""

    device: str = "cpu"
    max_peaks: int = 0

    def __call__(self, rows: ScatteredRows, *_: object, **__: object) -> NDArray[np.int64]:
        """The clusters of the spikes."""
        number = np.unique(rows.kind.numpy(), return_inverse=True)[1]
        half = (np.arange(rows.n) * np.int64(2654435761) >> 7) & 1
        return np.unique(2 * number + half, return_inverse=True)[1]


def cluster(n_spikes: int, folder: Path, usage: Usage) -> dict[str, object]:
    """Write every region's units: each true unit is cut in two at random, so that there is something to merge."""
    scene = Scene.of(load_probe("neuropixels_1"), N_UNITS, SPIKES_PER_SECOND)
    with usage.of("making the spikes"):
        spikes = scene.write(folder, n_spikes)
    write_record(folder / "spikes.npz", spikes)
    with open_run(folder) as run, usage.of("regions, without their clustering"), one_thread():
        run.do(scene.sorter(spikes, Halves()))
    sizes = rows_of_region(spikes.receipts)
    return {"spikes": int(sizes.sum()), "regions": int(np.count_nonzero(sizes)), "largest region": int(sizes.max())}


@contextmanager
def open_run(folder: Path) -> Iterator[Run]:
    """A run in this thread that keeps its files in a folder, where a later one finds them."""
    with open_store(folder / "run", data="") as store:
        yield Run(Loop(), store, RATE_HZ)


def finish(n_spikes: int, folder: Path, usage: Usage) -> dict[str, object]:
    """Merge, join and write."""
    scene = Scene.of(load_probe("neuropixels_1"), N_UNITS, SPIKES_PER_SECOND)
    settings, probe, waveforms = scene.settings, scene.probe, scene.waveforms()
    spikes = read_record(folder / "spikes.npz", (Spikes, Receipt))
    with open_run(folder) as run:
        regions = run.do(scene.sorter(spikes, Halves()))  # they are found there
        with usage.of("merging"):
            merged = run.do(
                Merge(settings, regions, spikes.template_channels, waveforms, probe, RATE_HZ, ENOUGH_SPIKES)
            )
        with usage.of("joining"):
            columns = run.do(Join(settings, merged, spikes, waveforms, probe))
    n_samples = int(len(spikes.first) * BLOCK_S * RATE_HZ)
    sorting = Sorting(
        **columns,
        template_channels=scene.channels,
        unit_features=merged.features,
        similarity=np.eye(len(merged.features)),
        refractory=merged.refractory,
        contamination=merged.contamination,
        sampling_rate_hz=RATE_HZ,
        probe=probe,
        waveforms=waveforms,
        settings=settings,
        n_samples=n_samples,
        n_chan_file=385,
    )
    for receipt in spikes.receipts:  # room for the results
        Path(receipt.path).unlink()
    with usage.of("writing results"):
        report.finish(sorting, ResultsFolder.open(folder / "results"))
    written = sum(path.stat().st_size for path in (folder / "results").rglob("*") if path.is_file())
    return {
        "spikes": sorting.n_spikes,
        "hours": n_samples / RATE_HZ / 3600,
        "clusters": len(merged.unit_of),
        "units": sorting.n_units,
        "results (GB)": written / 1e9,
    }


PARTS = {"region": region, "cluster": cluster, "finish": finish}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a part here, or ``sorting``: two parts in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "sorting"])
    parser.add_argument("--spikes", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="for all files; by default a temporary one, which is removed")
    asked = parser.parse_args(arguments)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="many-spikes-"))
    try:
        if asked.part == "sorting":
            for part in ("cluster", "finish"):
                command = [sys.executable, __file__, part, "--spikes", str(asked.spikes), "--folder", str(folder)]
                subprocess.run(command, check=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        usage = Usage()
        outcome = PARTS[asked.part](asked.spikes, folder, usage)
        print(json.dumps({"part": asked.part, **outcome}, indent=1))
        print("| part | wall (s) | CPU (s) | peak memory, anonymous (GB) | and with mapped files (GB) |")
        print("| --- | --- | --- | --- | --- |")
        for name, seconds in usage.seconds.items():
            anonymous, resident = usage.peak_anonymous_gb.get(name, 0), usage.peak_resident_gb.get(name, 0)
            print(f"| {name} | {seconds:.1f} | {usage.cpu_seconds[name]:.1f} | {anonymous:.2f} | {resident:.2f} |")
    finally:
        if asked.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
