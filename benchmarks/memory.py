"""How much memory a sort takes, by the length of the recording: it should not grow.

    python benchmarks/memory.py --minutes 5 30 120 --channels 32 --csv memory.csv

The recording is simulated where it is read, and lies nowhere. Workers are processes of their own, so that the client's
memory is its own too. What counts is the largest resident set since the sort began (``VmHWM``,
counted anew before it), and the largest share of it that is no file's (sampled several times a second).
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import outcome
import torch
from endless import endless

from ks4stream import Settings, planning, simulate, sort
from ks4stream.engine.cluster import local_client

SAMPLED_S = 0.2
FLAT = 0.15  # by which a longer recording may exceed the shortest
MB = 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 30, 120])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for results; by default a temporary one")
    parser.add_argument("--csv", type=Path, help="write the figures there too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    print(f"Machine: {outcome.describe(outcome.machine())}; torch {torch.__version__}")
    print(f"{options.channels} channels, {options.workers} worker processes\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:  # a new client for each
            measured = list(pool.map(measure, repeat(folder), options.minutes, repeat(options)))
    rows = [row for row, _ in measured]
    print(table(rows), verdict(rows), sep="\n")
    print("\nAnonymous memory by stage: MB of the largest worker / of the client\n")
    print(table([{"minutes": row["minutes"], **by_stage} for row, by_stage in measured]))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measure(folder: Path, minutes: float, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Sort so many minutes: peaks in MB of the largest worker and of this process, and those of each stage."""
    probe = simulate.staggered_probe(options.channels)
    recording = endless(probe, seconds=60 * minutes)
    settings = Settings.from_dict(outcome.parse_settings(options.set))
    stated = planning.plan(recording, settings, n_workers=options.workers)
    with local_client(n_workers=options.workers, processes=True) as client:
        workers = list(client.run(os.getpid).values())
        began = time.perf_counter()
        with watched([os.getpid(), *workers]) as memory:
            results = folder / f"sorted-{minutes:g}"
            sorting = sort(
                recording, settings, results_dir=results, client=client, resume=False, progress=memory.enter_stage
            )
        wall_s = time.perf_counter() - began
    measured = {
        who: {"resident": max(memory.resident[pid] for pid in pids), "anonymous": max(memory.anonymous(pids).values())}
        for who, pids in (("worker", workers), ("client", [os.getpid()]))
    }
    ours, theirs = memory.anonymous([os.getpid()]), memory.anonymous(workers)
    row = {
        "minutes": minutes,
        "spikes": sorting.n_spikes,
        "units": sorting.n_units,
        "wall_s": round(wall_s, 1),
        **{f"{who}_{kind}_mb": round(n_bytes / MB) for who, peak in measured.items() for kind, n_bytes in peak.items()},
        "worker_stated_mb": round(stated.worker_bytes / MB),
        "client_stated_mb": round(stated.client_bytes / MB),
    }
    return row, {stage: f"{theirs[stage] / MB:.0f} / {ours[stage] / MB:.0f}" for stage in ours}


@dataclass
class Memory:
    """What some processes take, in bytes."""

    pids: Sequence[int]
    stage: str = "before"
    resident: dict[int, int] = field(default_factory=dict)  # the peak of each
    by_stage: dict[tuple[str, int], int] = field(default_factory=dict)  # the peak of what is no file's

    def enter_stage(self, stage: str, done: int, total: int) -> None:
        """As a sort reports its progress; what lies between two stages counts to the one before."""
        if stage != self.stage:
            self.stage = stage
            self.look()  # at each stage once, however short it is

    def look(self) -> None:
        """Take note of what is held now."""
        for pid in self.pids:
            key = self.stage, pid
            self.by_stage[key] = max(self.by_stage.get(key, 0), _status(pid)["RssAnon"])

    def anonymous(self, pids: Sequence[int]) -> dict[str, int]:
        """By stage, the peak of the largest of some processes."""
        stages = dict.fromkeys(stage for stage, _ in self.by_stage)
        return {stage: max(self.by_stage[stage, pid] for pid in pids) for stage in stages}


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[Memory]:
    """Peaks of some processes, complete when this ends."""
    memory, done = Memory(pids), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLED_S):
            memory.look()

    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM is counted anew from here
    memory.look()  # the first stage may begin before the first sample
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.look()
        memory.resident = {pid: _status(pid)["VmHWM"] for pid in pids}


def _status(pid: int) -> dict[str, int]:
    """Sizes of a process, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether the figures are flat."""
    lines = []
    for who in ("worker", "client"):
        peaks = [row[f"{who}_resident_mb"] for row in rows]
        growth = max(peaks) / peaks[0] - 1
        lines.append(f"\n{who}: {growth:+.0%} beyond the shortest, {'flat' if growth <= FLAT else 'NOT FLAT'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
