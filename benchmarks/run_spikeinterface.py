"""Run one of SpikeInterface's sorters on one recording, in whatever environment holds SpikeInterface.

    PYTHON_WITH_SPIKEINTERFACE benchmarks/run_spikeinterface.py lupin rec.bin --probe rec.probe.json --out DIR

Leaves ``result.npz`` and ``figures.json`` in DIR (see outcome.py), and the sorter's own files in
``DIR/spikeinterface``. The sorter does its own preprocessing and keeps its defaults, except for what
``--set`` names and a fixed seed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import outcome

OWN = ("spykingcircus2", "tridesclous2", "lupin")
"""Sorters that are part of SpikeInterface; they have a seed as a parameter."""

SEED = 1


def packages(sorter: str) -> tuple[str, ...]:
    """Packages whose versions matter to a sorter's result."""
    own = () if sorter in OWN else (sorter,)
    return (*own, "spikeinterface", "numpy", "scipy", "scikit-learn", "hdbscan", "numba", "torch")


def main() -> None:
    """Sort one file."""
    options = _options()

    from spikeinterface import set_global_job_kwargs
    from spikeinterface.sorters import run_sorter

    settings = outcome.parse_settings(options.set)
    bad = outcome.parse_channels(options.bad_channels)
    asked = outcome.request(options.recording, options.probe, settings, bad)
    recording = opened(options.recording, asked["probe"], bad, options.gain_uv)
    set_global_job_kwargs(n_jobs=options.threads or os.cpu_count(), progress_bar=False)
    seed = {"seed": SEED} if options.sorter in OWN else {}
    began, cpu = time.perf_counter(), time.process_time()
    sorting = run_sorter(
        options.sorter,
        recording,
        folder=options.out / "spikeinterface",
        remove_existing_folder=True,
        verbose=False,
        **seed,
        **settings,
    )
    spikes = sorting.to_spike_vector()
    figures = {
        "sorter": options.sorter,
        "asked": asked,
        "n_good": len(sorting.unit_ids),
        "stage_s": {},
        "sort_wall_s": time.perf_counter() - began,
        "sort_cpu_s": time.process_time() - cpu,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": options.threads,
        "device": options.device,
        "versions": outcome.versions(*packages(options.sorter)),
        "machine": platform.platform(),
    }
    outcome.write(options.out, sample=spikes["sample_index"], unit=spikes["unit_index"], figures=figures)


def opened(path: Path, probe: dict[str, Any], bad_channels: list[int], gain_uv: float) -> Any:
    """The recording as SpikeInterface has it: the probe's channels, in its order, without the bad ones."""
    from probeinterface import Probe
    from spikeinterface import read_binary

    chan_map = np.array(probe["chanMap"])
    good = ~np.isin(chan_map, bad_channels)
    recording = read_binary(
        path,
        sampling_frequency=30_000.0,
        dtype="int16",
        num_channels=probe["n_chan"],
        gain_to_uV=gain_uv,
        offset_to_uV=0.0,
    )
    recording = recording.select_channels(recording.channel_ids[chan_map[good]])
    contacts = Probe(ndim=2)
    contacts.set_contacts(
        positions=np.stack([probe["xc"], probe["yc"]], axis=1)[good],
        shapes="circle",
        shape_params={"radius": 5},
        shank_ids=np.array(probe["kcoords"])[good].astype(int).astype(str),
    )
    contacts.set_device_channel_indices(np.arange(good.sum()))
    probed = recording.set_probe(contacts)
    return recording if probed is None else probed  # by version: set in place, or on a copy


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sorter", help="spykingcircus2, tridesclous2, lupin, or another one that is installed")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value as in JSON")
    parser.add_argument("--bad-channels", default="", help="columns of the file, comma separated")
    parser.add_argument("--gain-uv", type=float, default=0.195, help="µV per bit")
    parser.add_argument("--threads", type=int, default=None, help="processes; all cores by default")
    parser.add_argument("--device", default="cpu", help="noted only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
