"""Recordings by SpikeInterface's generator, with the recipe of its published comparisons of sorters.

    PYTHON_WITH_SPIKEINTERFACE benchmarks/make_spikeinterface_recording.py zigzag --seed 1 --out DIR

writes what scenarios.py writes. Units, trains, noise and motion are those of ``generate_drifting_recording`` with its
defaults; the probe is a slice of a Neuropixels 1.0 that is built without a network. ``busy`` is a recording of
``generate_ground_truth_recording`` with its defaults, but at 30 kHz: every unit fires 15 times per second, so that many
spikes overlap others. Runs in whatever environment holds SpikeInterface; ks4stream is not needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

GAIN_UV = 0.195
DRIFT_UM = 20.0  # to either side
BUSY, RATE_HZ = "busy", 30_000.0
MOTIONS: dict[str, dict[str, Any] | None] = {
    "static": None,
    "zigzag": {"drift_mode": "zigzag", "non_rigid_gradient": None},
    "bump": {"drift_mode": "bump", "non_rigid_gradient": None},
    "nonrigid": {"drift_mode": "zigzag", "non_rigid_gradient": 0.2},
}
"""How the tissue moves. The published recordings are longer; here motion is scaled to their length."""


def make(
    kind: str, *, seed: int, n_channels: int = 32, n_units: int = 20, duration_s: float = 120.0
) -> tuple[Any, dict[str, np.ndarray]]:
    """Return SpikeInterface's recording, still lazy, and the truth as scenarios.py has it."""
    from probeinterface.neuropixels_tools import build_neuropixels_probe
    from spikeinterface.generation import generate_drifting_recording, generate_ground_truth_recording

    if kind == BUSY:
        recording, sorting = generate_ground_truth_recording(
            durations=[duration_s], sampling_frequency=RATE_HZ, num_channels=n_channels, num_units=n_units, seed=seed
        )
        return recording, _truth_of(
            recording,
            sorting,
            location_um=sorting.get_property("gt_unit_locations"),
            amplitude_uv=-recording.templates.min(axis=(1, 2)),
        )
    probe = build_neuropixels_probe("NP1000").get_slice(np.arange(n_channels))
    probe.set_device_channel_indices(np.arange(n_channels))
    motion = MOTIONS[kind] or MOTIONS["zigzag"] or {}
    timing = {"t_start_drift": duration_s / 6, "t_end_drift": None}
    if motion["drift_mode"] == "zigzag":
        timing["period_s"] = duration_s * 5 / 6
    else:
        timing["bump_interval_s"] = (duration_s / 12, duration_s / 4)
    static, drifting, sorting, extra = generate_drifting_recording(
        num_units=n_units,
        duration=duration_s,
        probe=probe,
        generate_displacement_vector_kwargs={
            "displacement_sampling_frequency": 5.0,
            "drift_start_um": [0, DRIFT_UM],
            "drift_stop_um": [0, -DRIFT_UM],
            "drift_step_um": 1,
            "motion_list": [{**motion, **timing}],
        },
        extra_outputs=True,
        seed=seed,
    )
    recording = static if kind == "static" else drifting
    return recording, _truth(recording, sorting, extra, moves=kind != "static")


def _truth(recording: Any, sorting: Any, extra: dict[str, Any], *, moves: bool) -> dict[str, np.ndarray]:
    location_um = extra["unit_locations"]
    y_um = recording.get_channel_locations()[:, 1]
    drift_y_um = np.linspace(y_um.min(), y_um.max(), 5)
    # Displacements are those of units; between their depths they are linear in depth.
    by_depth = np.argsort(location_um[:, 1])
    moved_um = extra["unit_displacements"][:, by_depth, 1] * moves
    depth_um = location_um[by_depth, 1]
    drift_um = np.stack([np.interp(drift_y_um, depth_um, moved) for moved in moved_um])
    return _truth_of(
        recording,
        sorting,
        location_um=location_um,
        amplitude_uv=-extra["templates"].templates_array.min(axis=(1, 2)),
        drift_time_s=np.arange(len(drift_um)) / float(extra["displacement_sampling_frequency"]),
        drift_y_um=drift_y_um,
        drift_um=drift_um,
    )


def _truth_of(
    recording: Any, sorting: Any, *, location_um: np.ndarray, amplitude_uv: np.ndarray, **drift: np.ndarray
) -> dict[str, np.ndarray]:
    spikes = sorting.to_spike_vector()
    n_units, n_samples = len(location_um), recording.get_num_samples()
    rate_hz = recording.sampling_frequency
    n_spikes = np.bincount(spikes["unit_index"], minlength=n_units)
    still = {"drift_time_s": np.zeros(1), "drift_y_um": np.zeros(1), "drift_um": np.zeros((1, 1))}
    return {
        "spike_samples": spikes["sample_index"].astype(np.int64),
        "spike_units": spikes["unit_index"].astype(np.int64),
        "unit_amplitude_uv": amplitude_uv.astype(float),
        "unit_x_um": location_um[:, 0],
        "unit_y_um": location_um[:, 1],
        "unit_z_um": location_um[:, 2],
        "unit_rate_hz": n_spikes * rate_hz / n_samples,
        "unit_shank": np.zeros(n_units, dtype=np.int64),
        "unit_n_spikes": n_spikes,
        "bad_channels": np.zeros(0, dtype=np.int64),
        "artifact_spans": np.zeros((0, 2), dtype=np.int64),
        **(drift or still),
        "sampling_rate_hz": np.array(rate_hz),
        "gain_uv": np.array(GAIN_UV),
        "n_samples": np.array(n_samples),
    }


def write(recording: Any, truth: dict[str, np.ndarray], folder: Path, stem: str) -> Path:
    """Write traces, probe and truth next to each other; return the path of the traces."""
    folder.mkdir(parents=True, exist_ok=True)
    x_um, y_um = recording.get_channel_locations().T
    n_channels, n_samples = len(x_um), recording.get_num_samples()
    probe = {
        "chanMap": list(range(n_channels)),
        "xc": x_um.tolist(),
        "yc": y_um.tolist(),
        "kcoords": [0] * n_channels,
        "n_chan": n_channels,
    }
    (folder / f"{stem}.probe.json").write_text(json.dumps(probe, indent=1))
    np.savez(folder / f"{stem}.truth.npz", **truth)
    step = round(recording.sampling_frequency)
    path = folder / f"{stem}.bin"
    with path.open("wb") as file:
        for start in range(0, n_samples, step):
            traces_uv = recording.get_traces(start_frame=start, end_frame=min(start + step, n_samples))
            np.clip(np.rint(traces_uv / GAIN_UV), -32768, 32767).astype(np.int16).tofile(file)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Write one recording, its probe and its truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*MOTIONS, BUSY])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--units", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    recording, truth = make(
        options.kind, seed=options.seed, n_channels=options.channels, n_units=options.units, duration_s=options.seconds
    )
    stem = f"si{options.channels}_{options.kind}-{options.seed}"
    print(write(recording, truth, options.out, stem))


if __name__ == "__main__":
    main()
