"""The recordings that ks4stream and Kilosort4 are compared on.

Each scenario is a function of the seed. From the shell::

    python benchmarks/scenarios.py static --seed 1 --out DIR

writes ``static-1.bin`` (int16, time-major), ``static-1.probe.json`` (Kilosort's probe format) and
``static-1.truth.npz`` (plain arrays, see :func:`truth_arrays`). ``--seconds`` shortens it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from situations import SITUATIONS
from special import SPECIAL

from ks4stream.probe import Probe
from ks4stream.simulate import (
    SimulatedRecording,
    linear_probe,
    multi_shank_probe,
    simulate,
    staggered_probe,
    tetrode_probe,
)


def static(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """32 channels in two columns, nothing moves."""
    return simulate(staggered_probe(32), duration_s, seed=seed, n_units=20)


def rigid(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """The same probe with 20 µm of drift, alike at all depths."""
    return simulate(staggered_probe(32), duration_s, seed=seed, n_units=20, drift="rigid", drift_range_um=20.0)


def nonrigid(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """64 channels over 1.3 mm; the top moves 25 µm, the bottom a quarter of that."""
    return simulate(staggered_probe(64), duration_s, seed=seed, n_units=35, drift="nonrigid", drift_range_um=25.0)


def fourshank(seed: int, duration_s: float = 180.0) -> SimulatedRecording:
    """Four shanks of eight channels."""
    return simulate(multi_shank_probe(4, 8), duration_s, seed=seed, n_units=20)


def tetrodes(seed: int, duration_s: float = 200.0) -> SimulatedRecording:
    """Six tetrodes."""
    return simulate(tetrode_probe(6), duration_s, seed=seed, n_units=20)


def badchannels(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """The static recording's probe with one dead and two noisy channels and ten artifacts."""
    return simulate(
        staggered_probe(32),
        duration_s,
        seed=seed,
        n_units=20,
        dead_channels=(7,),
        noisy_channels=(15, 22),
        n_artifacts=10,
    )


def linear16(seed: int, duration_s: float = 300.0) -> SimulatedRecording:
    """16 channels in one column, small units, five minutes: hard for everyone."""
    return simulate(linear_probe(16), duration_s, seed=seed, n_units=14, amplitude_range_uv=(35.0, 120.0))


SCENARIOS: dict[str, Callable[..., SimulatedRecording]] = {
    scenario.__name__: scenario for scenario in (static, rigid, nonrigid, fourshank, tetrodes, badchannels, linear16)
}
"""The scenarios by name; each takes the seed and, optionally, ``duration_s``."""

ALL = SCENARIOS | SPECIAL | SITUATIONS
"""These, the small ones about one question each, and what happens on a real rig."""


def probe_json(probe: Probe) -> dict[str, Any]:
    """Return a probe as Kilosort's JSON files have it."""
    return {
        "chanMap": probe.chan_map.tolist(),
        "xc": probe.x_um.tolist(),
        "yc": probe.y_um.tolist(),
        "kcoords": probe.shank.tolist(),
        "n_chan": probe.n_chan_file,
    }


def truth_arrays(recording: SimulatedRecording) -> dict[str, NDArray[Any]]:
    """Return the truth as plain arrays: spikes, one ``unit_…`` array per column of the unit table, drift.

    ``background_samples`` and ``background_units`` are the spikes of the small units in the background, which are not
    expected to be found.
    ``drift_um`` (time, depth) is the displacement at ``drift_time_s`` (time,) and ``drift_y_um`` (depth,).
    """
    drift_time_s = np.arange(0.0, recording.duration_s, 1.0)
    drift_y_um = np.linspace(recording.probe.y_um.min(), recording.probe.y_um.max(), 5)
    units, background = recording.units, recording.scene.hash_spikes()
    return {
        "spike_samples": recording.spike_samples,
        "spike_units": recording.spike_units,
        "background_samples": background.sample,
        "background_units": background.unit,
        **{f"unit_{name}": units[name].copy() for name in units.dtype.names or ()},
        "bad_channels": np.array(recording.bad_channels, dtype=np.int64),
        "artifact_spans": recording.artifact_spans,
        "drift_time_s": drift_time_s,
        "drift_y_um": drift_y_um,
        "drift_um": recording.drift.displacement_um(drift_time_s[:, None], drift_y_um[None, :]),
        "sampling_rate_hz": np.array(recording.sampling_rate_hz),
        "gain_uv": np.array(recording.gain_uv),
        "n_samples": np.array(recording.traces.shape[0]),
    }


def write_scenario(recording: SimulatedRecording, folder: Path, stem: str) -> Path:
    """Write traces, probe and truth next to each other; return the path of the traces."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.probe.json").write_text(json.dumps(probe_json(recording.probe), indent=1))
    np.savez(folder / f"{stem}.truth.npz", **truth_arrays(recording))
    return recording.write_binary(folder / f"{stem}.bin")


def main(arguments: list[str] | None = None) -> None:
    """Write one scenario, or all of them, to a folder."""
    parser = argparse.ArgumentParser(description="Write a simulated recording, its probe and its truth.")
    parser.add_argument("name", choices=[*ALL, "all"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=None, help="shorter or longer than usual")
    options = parser.parse_args(arguments)
    length = {} if options.seconds is None else {"duration_s": options.seconds}
    for name in ALL if options.name == "all" else [options.name]:
        began = time.perf_counter()
        path = write_scenario(ALL[name](options.seed, **length), options.out, f"{name}-{options.seed}")
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
