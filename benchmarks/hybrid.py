"""Hybrid recordings: waveforms measured on real units, added to simulated noise at known times.

    python benchmarks/hybrid.py drifting --waveforms units.npz --channels 64 --units 40 --seconds 300 --seed 1 --out DIR

writes what scenarios.py writes. The file of waveforms is not part of this repository. For each unit *i* it holds
``x{i}``, ``y{i}``, the positions (site,) in µm around the soma at which the unit was measured, and ``w{i}``, its mean
waveform (site, sample) in µV; ``fs`` is their sampling rate.

Between the sites the waveforms are interpolated by radial basis functions, and beyond them they are faded out. Units
are drawn with replacement, so that some neighbours are alike but for their position and size. Half of the units fire
in bursts in which their amplitudes fall. Small, distant units, which have measured waveforms too, are the background;
the truth does not list them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scenarios import write_scenario
from scipy.interpolate import CubicSpline, RBFInterpolator

from ks4stream.probe import Probe
from ks4stream.simulate import SimulatedRecording
from ks4stream.simulate.api import from_scene
from ks4stream.simulate.noise import draw_artifacts, make_noise, make_slow_potential
from ks4stream.simulate.scene import Scene
from ks4stream.simulate.trains import Spikes, in_time_order

RATE_HZ = 30_000.0
GAIN_UV = 0.195
AMPLITUDE_UV = (40.0, 200.0)
BACKGROUND_UV = (10.0, 40.0)
BACKGROUND_PER_CHANNEL = 150 / 64
NOISE_UV = 12.0
"""Between 300 and 6000 Hz. With this, the largest background units are just below what is usually detected; with
less, they are units that a sorter finds and the truth does not list."""

DRIFT_RANGE_UM = 40.0
RANK = 8
"""Components kept of each measured waveform; the rest is mostly noise of the measurement."""

FADE_UM = 50.0
"""Distance beyond the outermost sites over which a waveform fades out."""

_PURPOSE = {"units": 1, "trains": 2, "background": 3, "drift": 4}


@dataclass(frozen=True, eq=False)
class MeasuredField:
    """A unit's mean waveform at the sites around its soma, and between them."""

    site_um: NDArray[np.float64]  # (site, 2), x and y relative to the soma
    waveform_uv: NDArray[np.float64]  # (site, sample)
    rate_hz: float

    @cached_property
    def time_ms(self) -> NDArray[np.float64]:
        """Times of the samples relative to the deepest trough, in ms."""
        trough = int(np.unravel_index(self.waveform_uv.argmin(), self.waveform_uv.shape)[1])
        return (np.arange(self.waveform_uv.shape[1]) - trough) * 1000 / self.rate_hz

    @cached_property
    def _interpolate(self) -> RBFInterpolator:
        left, size, right = np.linalg.svd(self.waveform_uv, full_matrices=False)
        smooth = (left[:, :RANK] * size[:RANK]) @ right[:RANK]
        return RBFInterpolator(self.site_um, smooth, kernel="thin_plate_spline")

    def at(
        self, dx_um: NDArray[np.float64], dy_um: NDArray[np.float64], time_ms: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the waveform (time, contact) in µV at contacts at (dx, dy) from the soma."""
        if not len(dx_um):
            return np.zeros((len(time_ms), 0))
        position_um = np.stack([dx_um, dy_um], axis=1)
        low, high = self.site_um.min(axis=0), self.site_um.max(axis=0)
        inside_um = np.clip(position_um, low, high)
        beyond_um = np.hypot(*(position_um - inside_um).T)
        # Towards the ends of the measured depths nothing but noise is left: it fades out before them.
        end_um = np.minimum(inside_um[:, 1] - low[1], high[1] - inside_um[:, 1])
        fade = _cosine(1 - beyond_um / FADE_UM) * _cosine(end_um / FADE_UM)
        course = CubicSpline(self.time_ms, self._interpolate(inside_um), axis=1)(time_ms, extrapolate=False)
        edge_ms = np.minimum(time_ms - self.time_ms[0], self.time_ms[-1] - time_ms)
        return (np.nan_to_num(course) * fade[:, None] * _cosine(edge_ms / 0.3)).T


def _cosine(progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rise from 0 at 0 to 1 at 1, smoothly."""
    return np.sin(0.5 * np.pi * np.clip(progress, 0, 1)) ** 2


@dataclass(frozen=True, eq=False)
class MeasuredUnit:
    """A unit with a measured waveform; to the simulator it is what its own units are."""

    field: MeasuredField
    source: int  # which of the measured units
    x_um: float
    y_um: float
    z_um: float
    rate_hz: float
    shank: int = 0
    gain: float = 1.0
    stretch: float = 1.0  # of a distant unit: its field is wider

    def waveform_uv(
        self, dx_um: NDArray[np.float64], dy_um: NDArray[np.float64], time_ms: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the waveform (time, contact) at contacts at (dx, dy), in µV."""
        return self.gain * self.field.at(dx_um / self.stretch, dy_um / self.stretch, time_ms)

    def scaled_to(self, amplitude_uv: float, probe: Probe) -> MeasuredUnit:
        """Return the unit with a trough of this size on its best contact."""
        waveform = self.waveform_uv(probe.x_um - self.x_um, probe.y_um - self.y_um, np.arange(-1.0, 1.0, 1 / 120))
        return replace(self, gain=self.gain * amplitude_uv / -float(waveform.min()))


@dataclass(frozen=True)
class ZigzagMotion:
    """The same displacement at all depths: a zigzag, and a slow wave of two thirds of its size."""

    range_um: float
    duration_s: float
    zigzag_s: float
    zigzag_phase: float
    slow_s: float
    slow_phase: float

    def displacement_um(self, time_s: Any, y_um: Any = 0.0) -> NDArray[np.float64]:
        """Return how far tissue has moved towards larger y, in µm (broadcast)."""
        time_s, _ = np.broadcast_arrays(np.asarray(time_s, float), np.asarray(y_um, float))
        course = self._course(np.arange(0.0, self.duration_s, 0.1))
        middle, extent = (course.min() + course.max()) / 2, np.ptp(course)
        return self.range_um * (self._course(time_s) - middle) / extent

    def _course(self, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        cycle = time_s / self.zigzag_s + self.zigzag_phase
        zigzag = 4 * np.abs(cycle - np.floor(cycle + 0.5)) - 1
        return 0.6 * zigzag + 0.4 * np.sin(2 * np.pi * (time_s / self.slow_s + self.slow_phase))


def neuropixels_probe(n_channels: int) -> Probe:
    """Return the lowest contacts of a Neuropixels 1.0 probe: four staggered columns, two contacts every 20 µm."""
    row, side = np.divmod(np.arange(n_channels), 2)
    return Probe(
        chan_map=np.arange(n_channels, dtype=np.int64),
        x_um=np.where(row % 2 == 0, 16.0, 0.0) + 32.0 * side,
        y_um=20.0 * row,
        shank=np.zeros(n_channels, dtype=np.int64),
        n_chan_file=n_channels,
        name=f"Neuropixels 1.0, {n_channels} contacts",
    )


def read_waveforms(path: Path) -> list[MeasuredField]:
    """Read the measured units from a file (see the top of this module)."""
    with np.load(path) as file:
        numbers = sorted(int(name[1:]) for name in file.files if name[0] == "w" and name[1:].isdigit())
        return [
            MeasuredField(
                np.stack([file[f"x{i}"].ravel(), file[f"y{i}"].ravel()], axis=1).astype(float),
                file[f"w{i}"].astype(float),
                float(file["fs"]),
            )
            for i in numbers
        ]


def hybrid(
    fields: Sequence[MeasuredField],
    *,
    seed: int,
    n_channels: int = 64,
    n_units: int = 40,
    duration_s: float = 300.0,
    drifting: bool = False,
    noise_uv: float = NOISE_UV,
    amplitude_range_uv: tuple[float, float] = AMPLITUDE_UV,
    background: bool = True,
    bursts: bool = True,
) -> SimulatedRecording:
    """Describe a hybrid recording; without background or bursts, the units are the same."""
    probe = neuropixels_probe(n_channels)
    units, amplitudes_uv = _draw_units(fields, probe, n_units, seed, amplitude_range_uv)
    distant = _draw_background(fields, probe, seed) if background else []
    n_samples = round(duration_s * RATE_HZ)
    scene = Scene(
        probe=probe,
        sampling_rate_hz=RATE_HZ,
        n_samples=n_samples,
        gain_uv=GAIN_UV,
        seed=seed,
        units=(*units, *distant),  # type: ignore[arg-type]
        n_units=n_units,
        spikes=_draw_trains(units, duration_s, seed, bursts),
        drift=_draw_motion(DRIFT_RANGE_UM if drifting else 0.0, duration_s, seed),  # type: ignore[arg-type]
        noise=make_noise(probe, noise_uv=noise_uv, sampling_rate_hz=RATE_HZ, seed=seed),
        slow=make_slow_potential(probe, lfp_uv=80.0, seed=seed),
        artifacts=draw_artifacts(0, n_channels=n_channels, n_samples=n_samples, sampling_rate_hz=RATE_HZ, seed=seed),
        dead=np.zeros(0, dtype=np.int64),
        noisy=np.zeros(0, dtype=np.int64),
    )
    return from_scene(scene, amplitudes_uv)


def _generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, 1000 + _PURPOSE[purpose], *key))))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _draw_position(rng: np.random.Generator, probe: Probe) -> dict[str, float]:
    # The waveforms are known 24 µm to either side of the soma: units in the probe's middle keep most of it.
    middle_um = (probe.x_um.min() + probe.x_um.max()) / 2
    return {
        "x_um": float(rng.uniform(middle_um - 10, middle_um + 10)),
        "y_um": float(rng.uniform(probe.y_um.min(), probe.y_um.max())),
        "z_um": 0.0,
    }


def _draw_units(
    fields: Sequence[MeasuredField], probe: Probe, n_units: int, seed: int, amplitude_range_uv: tuple[float, float]
) -> tuple[list[MeasuredUnit], list[float]]:
    rng = _generator(seed, "units")
    units, amplitudes_uv = [], []
    for _ in range(n_units):
        source = int(rng.integers(len(fields)))
        rate_hz = float(np.clip(rng.lognormal(np.log(4.0), 0.8), 0.7, 20.0))
        unit = MeasuredUnit(fields[source], source, rate_hz=rate_hz, **_draw_position(rng, probe))
        amplitudes_uv.append(_log_uniform(rng, *amplitude_range_uv))
        units.append(unit.scaled_to(amplitudes_uv[-1], probe))
    return units, amplitudes_uv


def _draw_background(fields: Sequence[MeasuredField], probe: Probe, seed: int) -> list[MeasuredUnit]:
    rng = _generator(seed, "background")
    units = []
    for _ in range(round(BACKGROUND_PER_CHANNEL * probe.n_channels)):
        source = int(rng.integers(len(fields)))
        unit = MeasuredUnit(
            fields[source],
            source,
            rate_hz=_log_uniform(rng, 1.0, 10.0),
            stretch=float(rng.uniform(1.3, 2.0)),
            **_draw_position(rng, probe),
        )
        units.append(unit.scaled_to(_log_uniform(rng, *BACKGROUND_UV), probe))
    return units


def _draw_trains(units: Sequence[MeasuredUnit], duration_s: float, seed: int, bursts: bool) -> Spikes:
    times_s, relatives = [np.zeros(0)], [np.zeros(0)]
    counts = []
    for i, unit in enumerate(units):
        time_s, relative = draw_train(_generator(seed, "trains", i), unit.rate_hz, duration_s, bursts=bursts)
        times_s.append(time_s)
        relatives.append(relative)
        counts.append(len(time_s))
    owner = np.repeat(np.arange(len(units)), counts)
    return in_time_order(np.concatenate(times_s) * RATE_HZ, owner, np.concatenate(relatives))


def draw_train(
    rng: np.random.Generator, rate_hz: float, duration_s: float, *, bursts: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a unit's spike times in s and relative amplitudes; every other unit fires in bursts, with falling ones."""
    refractory_s = rng.uniform(0.002, 0.003)
    burst_probability = rng.uniform(0.1, 0.5) if rng.random() < 0.5 and bursts else 0.0
    fall, spread = rng.uniform(0.75, 0.95), rng.uniform(0.04, 0.08)
    n_per_burst = 1 + burst_probability * 2.0  # bursts have two further spikes on average
    n_events = int(rate_hz * duration_s / n_per_burst * 1.5 + 50)
    extra = np.where(rng.random(n_events) < burst_probability, np.clip(rng.geometric(0.5, n_events), 1, 5), 0)
    pause_s = n_per_burst / rate_hz - refractory_s - 2.0 * burst_probability * 0.0045
    shape = rng.uniform(1.0, 2.5)
    event = np.repeat(np.arange(n_events), 1 + extra)
    place = np.arange(len(event)) - np.searchsorted(event, event)  # of a spike within its burst
    pauses_s = refractory_s + rng.gamma(shape, pause_s / shape, len(event))
    interval_s = np.where(place == 0, pauses_s, rng.uniform(max(refractory_s, 0.003), 0.006, len(event)))
    time_s = 0.003 + np.cumsum(interval_s) - rng.random() * interval_s[0]
    relative = fall**place * (1 + spread * rng.standard_normal(len(event)))
    kept = time_s < duration_s - 0.003
    return time_s[kept], np.maximum(relative[kept], 0.1)


def _draw_motion(range_um: float, duration_s: float, seed: int) -> ZigzagMotion:
    rng = _generator(seed, "drift")
    return ZigzagMotion(
        range_um, duration_s, rng.uniform(50, 80), rng.random(), duration_s * rng.uniform(0.8, 1.5), rng.random()
    )


def main(arguments: list[str] | None = None) -> None:
    """Write one hybrid recording, its probe and its truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["still", "drifting"])
    parser.add_argument("--waveforms", type=Path, required=True, help="file of measured units")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--amplitude-uv", type=float, nargs=2, default=AMPLITUDE_UV, metavar=("LOW", "HIGH"))
    parser.add_argument("--noise-uv", type=float, default=NOISE_UV)
    parser.add_argument("--without", choices=["background", "bursts"], nargs="+", default=[], help="what to leave out")
    parser.add_argument("--name", default=None, help="of the files; hybrid and the number of channels by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    recording = hybrid(
        read_waveforms(options.waveforms),
        seed=options.seed,
        n_channels=options.channels,
        n_units=options.units,
        duration_s=options.seconds,
        drifting=options.kind == "drifting",
        noise_uv=options.noise_uv,
        amplitude_range_uv=tuple(options.amplitude_uv),
        background="background" not in options.without,
        bursts="bursts" not in options.without,
    )
    stem = f"{options.name or f'hybrid{options.channels}'}_{options.kind}-{options.seed}"
    print(write_scenario(recording, options.out, stem))


if __name__ == "__main__":
    main()
