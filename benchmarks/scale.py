"""What a task costs beside its work: many trivial tiles through the real engine, as a sort sends them.

    python benchmarks/scale.py --tasks 20000

The tasks are blocks of one tile that do nothing but return a receipt as detection does, and leave the record that every
task of a sort leaves. They run in this thread and on a local cluster of processes. Beside them one real block of a
minute is detected in this thread: the overhead is given as a share of its time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import outcome
import torch
from endless import RATE_HZ, endless
from run_here import run_here

from ks4stream import Settings, geometry, simulate
from ks4stream.blocks import Tiling
from ks4stream.engine import Engine, Loop
from ks4stream.engine.cluster import Cluster, local_client
from ks4stream.io.places import Place
from ks4stream.io.run_store import open_store
from ks4stream.io.tables import Receipt
from ks4stream.run import Run
from ks4stream.sorter import prepare
from ks4stream.stages.base import Block, Stage
from ks4stream.stages.detection import Detect
from ks4stream.stages.preprocessing import tiling_of
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

N_REGIONS = 96  # of a probe of 384 channels
COLUMNS = ("sample", "centre", "depth_um", "score", "features")
TILE_SAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Nothing(Stage[Block, Receipt, int]):
    """Tasks that do the least there is, a receipt of no rows, and are counted."""

    name = "detection"

    tiling: Tiling
    constants: np.ndarray  # as large as a whitening matrix of 384 channels

    def items(self, run: Run) -> Sequence[Block]:
        """All batches."""
        return run.blocks(self.tiling)

    def task(self, item: Block, folder: Place) -> Receipt:
        """A receipt of no rows, whose file is there."""
        start, crc = np.zeros(N_REGIONS + 1, np.int64), np.zeros(N_REGIONS, np.int64)
        return Receipt(__file__, start, dict.fromkeys(COLUMNS, crc), Path(__file__).stat().st_size)

    def combine(self, parts: Iterable[Receipt], run: Run) -> int:
        """Count the tasks."""
        return sum(1 for _ in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64, help="of the real block")
    parser.add_argument("--block-seconds", type=float, default=60.0, help="of the real block")
    options = parser.parse_args(arguments)
    print(f"Machine: {outcome.describe(outcome.machine())}; torch {torch.__version__}")
    real_s = real_block_s(options.channels, options.block_seconds)
    block = f"{options.block_seconds:g} s of {options.channels} channels"
    print(f"A task that detects {block}: {real_s:.2f} s of CPU time\n")
    print(f"{options.tasks} trivial tasks       wall/task   CPU/task   of them here   share of a real block's time")
    for name, open_engine in (("this thread", this_thread), (f"{options.workers} processes", processes)):
        with open_engine(options.workers) as engine:
            wall_s, cpu_s, here_s = overhead_s(engine, options.tasks)
        print(
            f"{name:<26}{1e3 * wall_s:8.2f} ms{1e3 * cpu_s:8.2f} ms{1e3 * here_s:10.2f} ms"
            f"{cpu_s / real_s:14.2%} (of CPU)"
        )


@contextmanager
def this_thread(n_workers: int) -> Iterator[Engine]:
    """This thread."""
    yield Loop()


@contextmanager
def processes(n_workers: int) -> Iterator[Engine]:
    """Worker processes on this machine."""
    with local_client(n_workers=n_workers, processes=True) as client:
        yield Cluster(client)


def overhead_s(engine: Engine, n_tasks: int) -> tuple[float, float, float]:
    """Seconds per task: of wall time, of CPU time in all processes, of CPU time in this one."""
    settings = Settings(batch_size=TILE_SAMPLES)
    recording = endless(simulate.tetrode_probe(1), seconds=n_tasks * TILE_SAMPLES / RATE_HZ)
    stage = Nothing(settings, tiling_of(recording, settings), np.zeros((384, 384), np.float32))
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "run", data="") as store:
        run = Run(engine, store, RATE_HZ, block_batches=1)
        began, cpu, here = time.perf_counter(), _cpu_s(engine), time.process_time()
        n_results = run.do(stage)
        wall_s = time.perf_counter() - began
        seconds = (wall_s, _cpu_s(engine) - cpu, time.process_time() - here)
    assert n_results == n_tasks
    return tuple(one / n_tasks for one in seconds)  # type: ignore[return-value]


def real_block_s(n_channels: int, seconds: float) -> float:
    """CPU seconds of one block's detection, the block computed once before."""
    recording = endless(simulate.staggered_probe(n_channels), seconds=seconds + 4.0)
    settings = Settings()
    tiles = prepare(recording, settings)
    with run_here(tiles) as run:
        tiles = tiles.with_whitening(run.do(LearnWhitening(settings, tiles)))
        centres = geometry.template_centres(tiles.probe, settings)
        regions = geometry.clustering_regions(centres, settings)
        detect = Detect(settings, tiles, LearnWaveforms(settings, tiles).shipped(), centres, regions)
        n_tiles = max(round(seconds * recording.sampling_rate_hz / tiles.tiling.size), 1)
        detect.task((tiles.tiling[0],), run.scratch)
        began = time.process_time()
        detect.task(tuple(tiles.tiling[index] for index in range(n_tiles)), run.scratch)
        return time.process_time() - began


def _cpu_s(engine: Engine) -> float:
    """CPU seconds of this process and of the workers so far."""
    times = list(engine._client.run(_own_cpu_s).values()) if isinstance(engine, Cluster) else []
    return time.process_time() + sum(times)


def _own_cpu_s() -> float:
    return sum(os.times()[:2])


if __name__ == "__main__":
    main()
