"""How much two worker processes do in the time of one, next to two plain loops that know nothing of each other.

    python benchmarks/scaling.py static --seed 201 --seconds 120

One sort in a plain loop makes the tasks of all stages. Then, in turn and several times over, the tasks of detection and
of matching are run by one plain loop, by as many plain loops side by side as there are workers (each does all tasks:
what the machine gives), by one worker process and by several, one thread each. Last, the whole sort is run on one
worker and on several: from the times of each stage follows the share of it that does not scale.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import outcome
import psutil
import recordings
import torch
from scenarios import SCENARIOS

from ks4stream import Recording, Settings, load_probe, open_recording, sort
from ks4stream.engine import Engine, Loop, one_thread
from ks4stream.engine.cluster import Cluster, local_client
from ks4stream.pipeline import find_units
from ks4stream.run import Run
from ks4stream.sorter import prepare, run_store
from ks4stream.stages.base import Block, Stage

STAGES = ("detection", "matching")


class Tasks(NamedTuple):
    """What one stage maps, without the records of a run, in which the results would be found again."""

    stage: Stage[Block, Any, Any]
    items: Sequence[Block]
    folder: Path

    @property
    def function(self) -> Callable[[Block], Any]:
        """Computes one item."""
        return partial(self.stage.task, folder=self.folder)

    @property
    def n_tiles(self) -> int:
        """Tiles in all items."""
        return sum(len(block) for block in self.items)


class Took(NamedTuple):
    """Seconds one way of computing took for a number of tiles: by the clock, and of all processors."""

    n_tiles: int
    wall_s: float
    cpu_s: float


@dataclass
class Keeping(Run):
    """A run that keeps the stages and their items."""

    kept: dict[str, tuple[Stage[Any, Any, Any], Sequence[Any]]] = field(default_factory=dict)

    def map(self, stage: Stage[Any, Any, Any], items: Sequence[Any]) -> Iterator[Any]:
        """Run the tasks."""
        self.kept[stage.name] = stage, items  # where tissue moved, detection's second pass in place of its first
        return super().map(stage, items)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="static")
    parser.add_argument("--seed", type=int, default=201)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", action="store_true", help="also workers that are threads of one process")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recording = open_scenario(options.scenario, options.seed, folder, options.seconds)
        tasks = tasks_of(recording, folder)
        found = {stage: measure(tasks[stage], options) for stage in STAGES}
        seconds = {count: whole_sort(recording, count) for count in (1, options.workers)}
    print(report(found, seconds, options.workers))
    if options.json:
        figures = {
            stage: {way: [took._asdict() for took in runs] for way, runs in found[stage].items()} for stage in STAGES
        }
        options.json.write_text(
            json.dumps({"machine": outcome.machine(), "tasks": figures, "sort_s": seconds}, indent=1)
        )


def open_scenario(scenario: str, seed: int, folder: Path, seconds: float) -> Recording:
    """A scenario as a file, opened."""
    binary, _ = recordings.make(scenario, seed, folder, seconds=seconds)
    probe = binary.with_suffix(".probe.json")
    n_channels = json.loads(probe.read_text())["n_chan"]
    return open_recording(binary, n_chan=n_channels, fs=30_000.0, dtype="int16", probe=load_probe(probe))


def tasks_of(recording: Recording, folder: Path) -> dict[str, Tasks]:
    """The tasks of detection and matching, which write what they find into a folder."""
    settings = Settings()
    tiles = prepare(recording, settings)
    with one_thread(), run_store(tiles, None, fresh=True) as store:
        run = Keeping(Loop(), store, tiles.sampling_rate_hz)
        find_units(run, tiles, settings)
    return {name: Tasks(*run.kept[name], folder) for name in STAGES}


def measure(tasks: Tasks, options: argparse.Namespace) -> dict[str, list[Took]]:
    """Repetitions of each way of computing the tasks of a stage, in turn."""
    ways: dict[str, Callable[[], Took]] = {}
    for count in dict.fromkeys((1, options.workers)):
        ways[f"{count} loops"] = lambda count=count: side_by_side(tasks, count)
        ways[f"{count} processes"] = lambda count=count: by_workers(tasks, count, processes=True)
        if options.threads:
            ways[f"{count} threads"] = lambda count=count: by_workers(tasks, count, processes=False)
    found: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(options.repetitions):
        for way, run in ways.items():
            found[way].append(run())
    return found


def by_workers(tasks: Tasks, n_workers: int, *, processes: bool) -> Took:
    """Run the tasks on a local cluster that is up and has run one of them before."""
    with local_client(n_workers=n_workers, processes=processes) as client:
        return timed(Cluster(client), tasks)


def timed(engine: Engine, tasks: Tasks) -> Took:
    """Run the tasks, once what is made on first use is there."""
    list(engine.map(tasks.function, tasks.items[:1] * engine.n_workers, stage="first"))
    cpu_s, began = cpu_seconds(), time.perf_counter()
    list(engine.map(tasks.function, tasks.items, stage="measured"))
    wall_s = time.perf_counter() - began
    return Took(tasks.n_tiles, wall_s, cpu_seconds() - cpu_s)


def cpu_seconds() -> float:
    """Processor seconds of this process and of all it has started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def side_by_side(tasks: Tasks, count: int) -> Took:
    """Run all tasks in each of several processes with a plain loop, begun at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = []
    for number in range(count):
        own = tasks.folder / str(number)
        own.mkdir(exist_ok=True)
        some = tasks._replace(folder=own)
        processes.append(context.Process(target=_plain_loop, args=(some, barrier, answers)))
    for process in processes:
        process.start()
    took = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return Took(sum(t.n_tiles for t in took), max(t.wall_s for t in took), sum(t.cpu_s for t in took))


def _plain_loop(tasks: Tasks, barrier: Barrier, answers: Any) -> None:
    engine = Loop()
    list(engine.map(tasks.function, tasks.items[:1], stage="first"))
    barrier.wait()
    answers.put(timed(engine, tasks))


def whole_sort(recording: Recording, n_workers: int) -> dict[str, float]:
    """Seconds of each stage of a sort on so many worker processes."""
    client: AbstractContextManager[Any] = local_client(n_workers=n_workers, processes=True)
    with client as ready:
        return dict(sort(recording, client=ready, device="cpu").seconds)


def report(found: dict[str, dict[str, list[Took]]], seconds: dict[int, dict[str, float]], n_workers: int) -> str:
    """The tables as text."""
    lines = [
        f"Machine: {outcome.describe(outcome.machine())}; torch {torch.__version__}",
        f"{'stage':<12}{'computed by':<14}{'tiles/s':>9}{'of loops':>10}{'CPU s per tile':>16}  (medians)",
    ]
    for stage, ways in found.items():
        for way, runs in ways.items():
            rate = float(np.median([took.n_tiles / took.wall_s for took in runs]))
            count = way.split()[0]
            loops = float(np.median([took.n_tiles / took.wall_s for took in ways[f"{count} loops"]]))
            cpu_s = float(np.median([took.cpu_s / took.n_tiles for took in runs]))
            lines.append(f"{stage:<12}{way:<14}{rate:9.2f}{rate / loops:10.2f}{cpu_s:16.3f}")
    both = [
        sum(np.median([took.wall_s / took.n_tiles for took in ways[f"{n_workers} {way}"]]) for ways in found.values())
        for way in ("loops", "processes")
    ]
    lines += [
        f"detection and matching: {both[0] / both[1]:.2f} of what {n_workers} loops side by side reach",
        "",
        f"{'stage of a sort':<20}{'1 worker':>10}{f'{n_workers} workers':>12}{'does not scale':>16}",
    ]
    total = {count: sum(stages.values()) for count, stages in seconds.items()}
    for stage in [*seconds[1], "all"]:
        one, many = (total[n] if stage == "all" else seconds[n][stage] for n in (1, n_workers))
        serial = (many / one - 1 / n_workers) / (1 - 1 / n_workers) if n_workers > 1 and one > 0 else 1.0
        lines.append(f"{stage:<20}{one:9.2f}s{many:11.2f}s{max(serial, 0):15.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
