"""How much memory a sort takes, by the length of the recording: it should not grow.

    python benchmarks/memory.py --minutes 5 30 120 --channels 32 --csv memory.csv

The recording is a simulated minute that is repeated and never lies on disk whole. Workers are processes of their own,
so that the client's memory is its own too. What counts is the largest resident set since the sort began (``VmHWM``,
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import outcome
import torch
from looped import loop

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
    parser.add_argument("--clip-seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, help="for clip and results; by default a temporary one")
    parser.add_argument("--csv", type=Path, help="write the figures there too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    print(f"Machine: {outcome.describe(outcome.machine())}; torch {torch.__version__}")
    print(f"{options.channels} channels, {options.workers} worker processes\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [measure(folder, minutes, options) for minutes in options.minutes]
    print(table(rows))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measure(folder: Path, minutes: float, options: argparse.Namespace) -> dict[str, Any]:
    """Sort so many minutes, and return the peaks in MB, of the largest worker and of this process."""
    probe = simulate.staggered_probe(options.channels)
    recording = loop(folder, probe, clip_s=options.clip_seconds, seconds=60 * minutes)
    settings = Settings.from_dict(outcome.parse_settings(options.set))
    stated = planning.plan(recording, settings, n_workers=options.workers)
    with local_client(n_workers=options.workers, processes=True) as client:
        workers = list(client.run(os.getpid).values())
        began = time.perf_counter()
        with watched([os.getpid(), *workers]) as peaks:
            sorting = sort(recording, settings, results_dir=folder / f"sorted-{minutes:g}", client=client, resume=False)
        wall_s = time.perf_counter() - began
    measured = {"worker": peaks[max(workers, key=lambda pid: peaks[pid]["resident"])], "client": peaks[os.getpid()]}
    return {
        "minutes": minutes, "spikes": sorting.n_spikes, "units": sorting.n_units, "wall_s": round(wall_s, 1),
        **{f"{who}_{kind}_mb": round(n_bytes / MB) for who, peak in measured.items() for kind, n_bytes in peak.items()},
        "worker_stated_mb": round(stated.worker_bytes / MB), "client_stated_mb": round(stated.client_bytes / MB),
    }  # fmt: skip


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[dict[int, dict[str, int]]]:
    """Peaks of some processes, in bytes, complete when this ends: of all that is resident, and of what is no file's."""
    peaks = {pid: {"resident": 0, "anonymous": 0} for pid in pids}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLED_S):
            for pid, peak in peaks.items():
                peak["anonymous"] = max(peak["anonymous"], _status(pid)["RssAnon"])

    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM is counted anew from here
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        for pid, peak in peaks.items():
            peak["resident"] = _status(pid)["VmHWM"]


def _status(pid: int) -> dict[str, int]:
    """Sizes of a process, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a table in Markdown, and whether they are flat."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    lines = [f"| {line} |" for line in lines]
    for who in ("worker", "client"):
        peaks = [row[f"{who}_resident_mb"] for row in rows]
        growth = max(peaks) / peaks[0] - 1
        lines.append(f"\n{who}: {growth:+.0%} beyond the shortest, {'flat' if growth <= FLAT else 'NOT FLAT'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
