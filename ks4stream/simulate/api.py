"""The public interface: :func:`simulate`, and the recording it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from numpy.typing import ArrayLike, NDArray

from ks4stream.errors import SettingsError
from ks4stream.probe import Probe
from ks4stream.simulate.motion import Motion, make_motion
from ks4stream.simulate.noise import draw_artifacts, make_noise, make_slow_potential
from ks4stream.simulate.scene import Scene, n_file_channels
from ks4stream.simulate.streams import EPOCH_SAMPLES, FloatArray
from ks4stream.simulate.trains import Spikes, draw_trains
from ks4stream.simulate.units import Unit, draw_hash, draw_units

_MAX_RATE_HZ = 200.0  # at higher rates a train could not respect its refractory period

UNIT_DTYPE = np.dtype(
    [
        ("amplitude_uv", "f8"),
        ("x_um", "f8"),
        ("y_um", "f8"),
        ("z_um", "f8"),
        ("rate_hz", "f8"),
        ("shank", "i8"),
        ("n_spikes", "i8"),
    ]
)


@dataclass(frozen=True, eq=False)
class SimulatedRecording:
    """A simulated recording and its ground truth.

    Attributes
    ----------
    traces : dask.array of int16, shape (time, file channel)
        In bits; nothing is computed until it is read.
    sampling_rate_hz : float
        In Hz.
    probe : Probe
        The contacts.
    gain_uv : float
        µV per bit.
    spike_samples : ndarray of int64, shape (spike,)
        Sample of each spike's trough at the unit (rounded down to a whole sample from quarters), ascending.
    spike_units : ndarray of int64, shape (spike,)
        Row of `units` each spike belongs to.
    units : structured ndarray, shape (unit,)
        ``amplitude_uv`` (size of the trough on the best good contact at the unit's mean position),
        ``x_um``, ``y_um``, ``z_um`` (mean position, z the distance from the probe's plane), ``rate_hz``
        (nominal), ``shank``, ``n_spikes``.
    drift : Motion
        ``drift.displacement_um(time_s, y_um)`` is the displacement of the tissue.
    bad_channels : tuple of int
        Dead and noisy channels, as columns of the file.
    artifact_spans : ndarray of int64, shape (artifact, 2)
        Start (inclusive) and stop (exclusive) of each artifact, in samples.
    seed : int
        Seed of all random numbers.
    scene : Scene
        Everything the samples are computed from.
    """

    traces: da.Array
    sampling_rate_hz: float
    probe: Probe
    gain_uv: float
    spike_samples: NDArray[np.int64]
    spike_units: NDArray[np.int64]
    units: NDArray[np.void]
    drift: Motion
    bad_channels: tuple[int, ...]
    artifact_spans: NDArray[np.int64]
    seed: int
    scene: Scene = field(repr=False)

    @property
    def n_units(self) -> int:
        """Number of units in the truth."""
        return len(self.units)

    @property
    def duration_s(self) -> float:
        """Length of the recording in seconds."""
        return float(self.traces.shape[0] / self.sampling_rate_hz)

    def read(self, start: int, stop: int) -> NDArray[np.int16]:
        """Return samples `start` … `stop` − 1, (time, file channel), without Dask."""
        return self.scene.read(max(start, 0), min(stop, self.traces.shape[0]))

    def write_binary(self, path: str | Path) -> Path:
        """Write the traces as flat int16, time-major, one epoch in memory at a time; return the path."""
        path = Path(path)
        n_samples = self.traces.shape[0]
        with path.open("wb") as file:
            for start in range(0, n_samples, EPOCH_SAMPLES):
                self.read(start, start + EPOCH_SAMPLES).tofile(file)
        return path

    def templates_uv(self, time_s: float = 0.0) -> NDArray[np.float32]:
        """Return the units' noiseless waveforms (unit, time, channel) in µV, at their positions at `time_s`."""
        scene = self.scene
        depth_um = self.units["y_um"]
        moved_um = np.rint(self.drift.displacement_um(time_s, depth_um)).astype(int)
        templates = np.zeros((self.n_units, len(scene.offset_samples), self.probe.n_channels), np.float32)
        for index, moved in enumerate(moved_um):
            channels, template = scene.make_template(scene.units[index], int(moved))
            templates[index][:, channels] = template
        return templates


def simulate(
    probe: Probe,
    duration_s: float,
    *,
    seed: int,
    n_units: int = 20,
    sampling_rate_hz: float = 30_000.0,
    drift: str = "none",
    drift_range_um: float = 20.0,
    amplitude_range_uv: tuple[float, float] = (35.0, 250.0),
    rate_range_hz: tuple[float, float] = (0.5, 20.0),
    noise_uv: float = 9.5,
    hash_per_channel: float = 8.0,
    lfp_uv: float = 80.0,
    dead_channels: Sequence[int] = (),
    noisy_channels: Sequence[int] = (),
    n_artifacts: int = 0,
    gain_uv: float = 0.195,
    chunk_samples: int = EPOCH_SAMPLES,
) -> SimulatedRecording:
    """Describe a recording with known spikes; its traces are computed lazily, when they are read.

    Parameters
    ----------
    probe : Probe
        The contacts. Units are distributed evenly over its shanks.
    duration_s : float
        Length in seconds.
    seed : int
        Seed of all random numbers, 0 or more.
    n_units : int
        Number of units in the ground truth.
    sampling_rate_hz : float
        In Hz.
    drift : {"none", "rigid", "nonrigid"}
        How the tissue moves along y; see :class:`Motion`.
    drift_range_um : float
        Difference between the lowest and the highest displacement, in µm.
    amplitude_range_uv : tuple of float
        Range of the trough's size on the best contact, drawn log-uniformly, in µV.
    rate_range_hz : tuple of float
        Limits of the log-normal firing rates (median 3.5 Hz), in Hz.
    noise_uv : float
        Standard deviation of the Gaussian noise between 300 and 6000 Hz, in µV.
    hash_per_channel : float
        Small distant units (6 to 22 µV) per channel that act as noise and are not part of the ground truth.
    lfp_uv : float
        Standard deviation of the slow potential, in µV.
    dead_channels, noisy_channels : sequence of int
        Contacts that are flat, and contacts with ten times the noise.
    n_artifacts : int
        Number of artifacts: events of 2 to 6 ms and 1.5 to 4 mV on all channels.
    gain_uv : float
        µV per bit.
    chunk_samples : int
        Chunk length of the Dask array; it does not change any value.

    Returns
    -------
    SimulatedRecording

    Raises
    ------
    SettingsError
        If the recording would be shorter than a tenth of an epoch, or an argument is out of range.
    """
    n_samples = round(duration_s * sampling_rate_hz)
    _check(n_samples=n_samples, seed=seed, n_units=n_units, drift=drift, chunk_samples=chunk_samples)
    if not 0 < rate_range_hz[0] <= rate_range_hz[1] <= _MAX_RATE_HZ:
        raise SettingsError(f"{rate_range_hz=} must be ascending and between 0 and {_MAX_RATE_HZ:.0f} Hz")
    if not 0 < amplitude_range_uv[0] <= amplitude_range_uv[1]:
        raise SettingsError(f"{amplitude_range_uv=} must be ascending and above 0 µV")
    good = np.ones(probe.n_channels, dtype=bool)
    bad = np.unique([*dead_channels, *noisy_channels]).astype(np.int64)
    good[bad] = False

    units, amplitudes_uv = draw_units(
        probe, good, seed=seed, n_units=n_units, amplitude_range_uv=amplitude_range_uv, rate_range_hz=rate_range_hz
    )
    spikes = draw_trains(units, seed=seed, duration_s=n_samples / sampling_rate_hz, sampling_rate_hz=sampling_rate_hz)
    scene = Scene(
        probe=probe,
        sampling_rate_hz=sampling_rate_hz,
        n_samples=n_samples,
        gain_uv=gain_uv,
        seed=seed,
        units=(*units, *draw_hash(probe, seed=seed, n_per_channel=hash_per_channel)),
        n_units=n_units,
        spikes=spikes,
        drift=make_motion(drift, drift_range_um, probe, n_samples / sampling_rate_hz, seed),
        noise=make_noise(probe, noise_uv=noise_uv, sampling_rate_hz=sampling_rate_hz, seed=seed),
        slow=make_slow_potential(probe, lfp_uv=lfp_uv, seed=seed),
        artifacts=draw_artifacts(
            n_artifacts, n_channels=probe.n_channels, n_samples=n_samples, sampling_rate_hz=sampling_rate_hz, seed=seed
        ),
        dead=np.array(dead_channels, dtype=np.int64),
        noisy=np.array(noisy_channels, dtype=np.int64),
    )
    return from_scene(scene, amplitudes_uv, bad_channels=bad, chunk_samples=chunk_samples)


def from_scene(
    scene: Scene, amplitudes_uv: ArrayLike, *, bad_channels: ArrayLike = (), chunk_samples: int = EPOCH_SAMPLES
) -> SimulatedRecording:
    """Return the recording of a scene, for scenes that :func:`simulate` does not describe.

    Parameters
    ----------
    scene : Scene
        Everything the samples are computed from.
    amplitudes_uv : array_like of float, shape (unit,)
        Size of each true unit's trough on the best contact, in µV.
    bad_channels : array_like of int
        Dead and noisy contacts.
    chunk_samples : int
        Chunk length of the Dask array; it does not change any value.

    Returns
    -------
    SimulatedRecording
    """
    bad = scene.probe.chan_map[np.asarray(bad_channels, dtype=np.int64)]
    return SimulatedRecording(
        traces=_lazy_traces(scene, chunk_samples),
        sampling_rate_hz=scene.sampling_rate_hz,
        probe=scene.probe,
        gain_uv=scene.gain_uv,
        spike_samples=scene.spikes.sample,
        spike_units=scene.spikes.unit,
        units=_unit_table(scene.units[: scene.n_units], np.asarray(amplitudes_uv, dtype=float), scene.spikes),
        drift=scene.drift,
        bad_channels=tuple(int(channel) for channel in bad),
        artifact_spans=scene.artifacts.spans,
        seed=scene.seed,
        scene=scene,
    )


def _check(*, n_samples: int, seed: int, n_units: int, drift: str, chunk_samples: int) -> None:
    if n_samples < EPOCH_SAMPLES // 10:
        raise SettingsError(f"duration_s gives {n_samples} samples; at least {EPOCH_SAMPLES // 10} are needed")
    if drift not in ("none", "rigid", "nonrigid"):
        raise SettingsError(f"drift={drift!r} is unknown; choose 'none', 'rigid' or 'nonrigid'")
    if seed < 0 or n_units < 0 or chunk_samples < 1:
        raise SettingsError(f"seed={seed} and n_units={n_units} must be ≥ 0, chunk_samples={chunk_samples} ≥ 1")


def _lazy_traces(scene: Scene, chunk_samples: int) -> da.Array:
    whole, rest = divmod(scene.n_samples, chunk_samples)
    chunks = (chunk_samples,) * whole + ((rest,) if rest else ())
    traces: da.Array = da.map_blocks(  # type: ignore[no-untyped-call]
        _read_chunk,
        scene=delayed(scene, pure=False),  # one node of the graph, not a copy in every task
        chunks=(chunks, (n_file_channels(scene.probe),)),
        dtype=np.int16,
        meta=np.empty((0, 0), dtype=np.int16),
    )
    return traces


def _read_chunk(scene: Scene, block_info: Any = None) -> NDArray[np.int16]:
    (start, stop), _ = block_info[None]["array-location"]
    return scene.read(start, stop)


def _unit_table(units: Sequence[Unit], amplitudes_uv: FloatArray, spikes: Spikes) -> NDArray[np.void]:
    table = np.zeros(len(units), dtype=UNIT_DTYPE)
    for name in ("x_um", "y_um", "z_um", "rate_hz", "shank"):
        table[name] = [getattr(unit, name) for unit in units]
    table["amplitude_uv"] = amplitudes_uv
    table["n_spikes"] = np.bincount(spikes.unit, minlength=len(units))
    return table
