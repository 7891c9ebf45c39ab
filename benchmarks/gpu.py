"""What a GPU does while a recording is sorted: seconds, memory, and the share of time that it computes, by stage.

    python benchmarks/gpu.py --minutes 10 --channels 384 --workers 1 2 --folder DIR --out gpu.json

A recording is simulated by as many processes as there are cores, written to ``DIR`` as a flat file with its probe, and
sorted with the given numbers of worker processes, which share the GPUs there are. Each number begins with its processes
started and a few seconds sorted, so that CUDA's libraries are loaded, and with the file read once. Every array of the
results must be the same to the last byte. The GPUs are asked ten times a second (NVML, from the package nvidia-ml-py):
they say in which share of the last moments a kernel ran, whoever's it was, and how much memory is taken. Of several the
mean of the shares is told, and the memory of the fullest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import edges
import numpy as np
import outcome
import torch
from endless import RATE_HZ, endless
from memory import table

from ks4stream import Recording, Settings, load_probe, open_recording, simulate, sort
from ks4stream.engine.cluster import local_client
from ks4stream.errors import Ks4StreamWarning
from ks4stream.io.probes import save_probe

SAMPLED_S = 0.1
WARMING_S = 8.0  # of the recording, sorted before
SECOND_PIECES = 2 * RATE_HZ  # samples that a process simulates at a time


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, sort, print; fail if results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="for the recording; one that lies there is sorted")
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    print(f"Machine: {outcome.describe(outcome.machine())}; {', '.join(gpus())}; torch {torch.__version__}", flush=True)
    recording = written(options.folder, options.channels, 60 * options.minutes, options.seed)
    settings = Settings.from_dict(outcome.parse_settings(options.set))
    runs: dict[int, dict[str, Any]] = {}
    for n_workers in options.workers:
        runs[n_workers] = run = measure(recording, settings, n_workers)
        print(f"\n{n_workers} worker(s): {run['wall_s']:.1f} s, {run['spikes']} spikes, {run['units']} units\n")
        print(table(run["stages"]), flush=True)
        if options.out:
            found = {"machine": outcome.machine(), "gpus": gpus(), "torch": torch.__version__}
            options.out.write_text(json.dumps(found | {"runs": runs}, indent=1))
    differ = len({json.dumps(run["digests"]) for run in runs.values()}) > 1
    if len(runs) > 1:
        print("\nRESULTS DIFFER." if differ else "\nResults are identical.")
    sys.exit(differ)


def gpus() -> list[str]:
    """Names of the GPUs."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] or ["no GPU"]


# -- the recording -----------------------------------------------------------------------------------


def written(folder: Path, n_channels: int, seconds: float, seed: int) -> Recording:
    """The recording, simulated and written unless it lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, probe_path = folder / f"gpu-{n_channels}-{seconds:g}-{seed}.bin", folder / f"gpu-{n_channels}.probe.json"
    probe = simulate.staggered_probe(n_channels)
    if not path.exists():
        began = time.perf_counter()
        save_probe(probe, probe_path)
        source = endless(probe, seconds=seconds, seed=seed)
        starts = range(0, source.n_samples, SECOND_PIECES)
        growing = path.with_suffix(".part")
        with growing.open("wb") as file:
            file.truncate(2 * source.n_samples * n_channels)
        with multiprocessing.get_context("fork").Pool(os.cpu_count(), _one_thread) as pool:  # inherits the source
            for _ in pool.imap_unordered(partial(_write, source, growing), starts):
                pass
        growing.rename(path)
        print(f"Simulated {seconds:g} s in {time.perf_counter() - began:.0f} s", flush=True)
    return open_recording(path, n_chan=n_channels, fs=RATE_HZ, dtype="int16", probe=load_probe(probe_path))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _write(source: Recording, path: Path, start: int) -> None:
    samples = source.read(start, min(start + SECOND_PIECES, source.n_samples))
    with path.open("r+b") as file:
        file.seek(start * samples[0].nbytes)
        file.write(samples.tobytes())


# -- sorting it --------------------------------------------------------------------------------------


@dataclass
class Gpus:
    """What the GPUs do and hold, by the stage that runs."""

    stage: str = "before"
    busy: dict[str, list[float]] = field(default_factory=dict)  # shares of time, 0 … 1
    taken: dict[str, int] = field(default_factory=dict)  # peak of one, in bytes

    def enter_stage(self, stage: str, done: int, total: int) -> None:
        """As a sort reports its progress."""
        self.stage = stage

    def note(self, busy: Sequence[float], taken: Sequence[int]) -> None:
        """Take down one answer of each GPU."""
        self.busy.setdefault(self.stage, []).append(fmean(busy))
        self.taken[self.stage] = max(self.taken.get(self.stage, 0), *taken)


@contextmanager
def watched_gpus() -> Iterator[Gpus]:
    """What the GPUs do until this ends; nothing where there is none. What asking them raises is raised here."""
    found, done = Gpus(), threading.Event()
    if not torch.cuda.is_available():
        yield found
        return
    try:
        import pynvml
    except ModuleNotFoundError:
        sys.exit("GPUs can only be watched with NVML. Install it: pip install nvidia-ml-py")
    pynvml.nvmlInit()
    uuids = [torch.cuda.get_device_properties(number).uuid for number in range(torch.cuda.device_count())]
    handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]

    def sample() -> None:
        while not done.wait(SAMPLED_S):
            busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in handles]
            found.note(busy, [pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles])

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(sample)
        try:
            yield found
        finally:
            done.set()
        watching.result()


def measure(recording: Recording, settings: Settings, n_workers: int) -> dict[str, Any]:
    """Sort on so many worker processes: seconds, and by stage what the GPUs did."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for start in range(0, recording.n_samples, SECOND_PIECES):
        recording.read(start, min(start + SECOND_PIECES, recording.n_samples))
    with local_client(n_workers=n_workers, processes=True, device=device) as client:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Ks4StreamWarning)  # so short a recording has few spikes
            sort(recording, settings.replace(tmax=WARMING_S), client=client, device=device)
        began = time.perf_counter()
        with watched_gpus() as watched:
            sorting = sort(recording, settings, client=client, device=device, progress=watched.enter_stage)
        wall_s = time.perf_counter() - began
    stages = [
        {
            "stage": stage,
            "s": round(seconds, 2),
            "GPU computes": f"{fmean(watched.busy[stage]):.0%}" if stage in watched.busy else "",
            "GPU memory, MB": round(watched.taken[stage] / 1e6) if stage in watched.taken else "",
        }
        for stage, seconds in sorting.seconds.items()
    ]
    every = [share for shares in watched.busy.values() for share in shares]
    most = round(max(watched.taken.values()) / 1e6) if every else ""
    share = f"{fmean(every):.0%}" if every else ""
    stages.append({"stage": "all", "s": round(wall_s, 2), "GPU computes": share, "GPU memory, MB": most})
    return {
        "wall_s": wall_s,
        "spikes": sorting.n_spikes,
        "units": sorting.n_units,
        "stages": stages,
        "drift_um": float(np.ptp(sorting.drift.shift_um)) if sorting.drift is not None else 0.0,
        "warnings": list(sorting.warnings),
        "digests": dict(edges.digests(sorting)),
    }


if __name__ == "__main__":
    main()
