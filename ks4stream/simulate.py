"""Recordings with known spikes, of any length, computed only where they are read.

:func:`simulate` describes a recording: where the units sit, when they fire, how the tissue moves, what the
noise is like. The traces are a lazy Dask array whose values depend on the seed and on the sample alone,
never on how the array is cut: time is divided into fixed *blocks* of :data:`BLOCK_SAMPLES`, every random
number of a block comes from a generator keyed by (seed, purpose, block), and a chunk is put together from
the blocks it touches.

A spike's waveform is a continuous function of the vector from the unit to the contact, so drift moves the
unit, not the samples: nothing is interpolated between channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from ks4stream.errors import SettingsError
from ks4stream.probe import Probe

__all__ = [
    "BLOCK_SAMPLES",
    "Drift",
    "SimulatedRecording",
    "linear_probe",
    "multi_shank_probe",
    "simulate",
    "staggered_probe",
    "tetrode_probe",
]

FloatArray = NDArray[np.float64]

BLOCK_SAMPLES = 30_000
"""Samples per block. A block is the unit of every random draw: changing it changes every recording."""

_FFT_SAMPLES = 32_768
# What the FFT has beyond a block is the length of the noise filter, so that one FFT makes one block.
_FILTER_SAMPLES = _FFT_SAMPLES - BLOCK_SAMPLES

_BEFORE_MS, _AFTER_MS = 1.2, 2.8  # extent of a rendered waveform around its trough
_N_PHASES = 4  # spikes fall on quarters of a sample
_REACH_UM = (120.0, 200.0)  # a unit's field fades to nothing between these distances
_MAX_RATE_HZ = 200.0  # beyond it a train could not keep its refractory period
_CACHED_TEMPLATES = 10_000

# What a random stream is for; part of its key, so that no two purposes share numbers.
_STREAMS = {"units": 1, "trains": 2, "drift": 3, "noise": 4, "hash": 5, "hash_trains": 6, "channels": 7, "artifacts": 8}

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


def _generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Return the generator of one purpose (and, for instance, one block): SFC64, the cheapest NumPy has."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, _STREAMS[stream], *key))))


# --- probes -----------------------------------------------------------------------------------------------


def _probe(x_um: ArrayLike, y_um: ArrayLike, shank: ArrayLike, name: str) -> Probe:
    shank_of = np.asarray(shank, dtype=np.int64)
    n_channels = len(shank_of)
    return Probe(
        chan_map=np.arange(n_channels, dtype=np.int64),
        x_um=np.asarray(x_um, dtype=np.float64),
        y_um=np.asarray(y_um, dtype=np.float64),
        shank=shank_of,
        n_chan_file=n_channels,
        name=name,
    )


def linear_probe(n_channels: int, *, pitch_um: float = 25.0) -> Probe:
    """Return one column of contacts, `pitch_um` apart."""
    y_um = pitch_um * np.arange(n_channels)
    return _probe(np.zeros(n_channels), y_um, np.zeros(n_channels), f"linear {n_channels}")


def staggered_probe(n_channels: int, *, pitch_um: float = 20.0, column_um: float = 32.0) -> Probe:
    """Return two columns `column_um` apart whose contacts take turns, one every `pitch_um` of depth."""
    index = np.arange(n_channels)
    return _probe(column_um * (index % 2), pitch_um * index, np.zeros(n_channels), f"staggered {n_channels}")


def tetrode_probe(n_tetrodes: int, *, contact_um: float = 25.0, spacing_um: float = 250.0) -> Probe:
    """Return tetrodes side by side, each a square of side `contact_um` and a shank of its own."""
    square_x, square_y = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    tetrode = np.repeat(np.arange(n_tetrodes), 4)
    x_um = spacing_um * tetrode + contact_um * np.tile(square_x, n_tetrodes)
    return _probe(x_um, contact_um * np.tile(square_y, n_tetrodes), tetrode, f"{n_tetrodes} tetrodes")


def multi_shank_probe(
    n_shanks: int, n_per_shank: int, *, pitch_um: float = 20.0, column_um: float = 32.0, spacing_um: float = 250.0
) -> Probe:
    """Return `n_shanks` staggered shanks of `n_per_shank` contacts, `spacing_um` apart."""
    index, shank = np.tile(np.arange(n_per_shank), n_shanks), np.repeat(np.arange(n_shanks), n_per_shank)
    x_um = spacing_um * shank + column_um * (index % 2)
    return _probe(x_um, pitch_um * index, shank, f"{n_shanks} x {n_per_shank}")


# --- drift ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drift:
    """How the tissue moves along the probe: a slow wave, a ramp and a few sudden jumps.

    Attributes
    ----------
    kind : {"none", "rigid", "nonrigid"}
        Same movement at every depth, or more of it at larger y.
    range_um : float
        Distance between the lowest and the highest displacement (at the depth that moves most), in µm.
    period_s, phase_rad, ramp_per_s : float
        The slow wave, and the ramp relative to the wave's amplitude.
    jump_times_s, jump_levels : ndarray of float64, shape (jump,), (jump + 1,)
        When the tissue jumps, and the level it stays at from then on, relative to the wave's amplitude.
    scale_um, offset : float
        Turn the sum of the three into µm around a mean of 0.
    y_range_um : tuple of float
        Depths at which a non-rigid drift has 0.25 and 1 times its full size.
    """

    kind: str
    range_um: float
    period_s: float
    phase_rad: float
    ramp_per_s: float
    jump_times_s: FloatArray
    jump_levels: FloatArray
    scale_um: float
    offset: float
    y_range_um: tuple[float, float]

    def displacement_um(self, time_s: ArrayLike, y_um: ArrayLike = 0.0) -> FloatArray:
        """Return how far tissue at depth `y_um` has moved towards larger y, in µm (broadcast)."""
        time, depth = np.broadcast_arrays(np.asarray(time_s, float), np.asarray(y_um, float))
        if self.kind == "none":
            return np.zeros(time.shape)
        movement = self.scale_um * (self._wave(time) - self.offset)
        return movement * self._depth_gain(depth) if self.kind == "nonrigid" else movement

    def _wave(self, time_s: FloatArray) -> FloatArray:
        level: FloatArray = self.jump_levels[np.searchsorted(self.jump_times_s, time_s, side="right")]
        wave: FloatArray = np.sin(2 * np.pi * time_s / self.period_s + self.phase_rad)
        return wave + self.ramp_per_s * time_s + level

    def _depth_gain(self, y_um: FloatArray) -> FloatArray:
        low, high = self.y_range_um
        gain: FloatArray = 0.25 + 0.75 * np.clip((y_um - low) / max(high - low, 1.0), 0.0, 1.0)
        return gain


def _make_drift(kind: str, range_um: float, probe: Probe, duration_s: float, seed: int) -> Drift:
    """Draw a drift and scale it so that it spans `range_um` around a mean of 0 in this recording."""
    rng = _generator(seed, "drift")
    n_jumps = int(rng.poisson(duration_s / 60.0))
    jumps = dict(
        jump_times_s=np.sort(rng.uniform(0, duration_s, n_jumps)),
        # Levels, not increments: a random walk of jumps would leave the probe in a long recording.
        jump_levels=np.concatenate([[0.0], rng.uniform(-0.3, 0.3, n_jumps)]),
    )
    shape = dict(
        kind=kind,
        range_um=range_um,
        period_s=float(rng.uniform(60.0, 100.0)),
        phase_rad=float(rng.uniform(0, 2 * np.pi)),
        ramp_per_s=float(rng.choice([-1.0, 1.0]) * 0.7 / duration_s),
        y_range_um=(float(probe.y_um.min()), float(probe.y_um.max())),
    )
    unscaled = Drift(**shape, **jumps, scale_um=1.0, offset=0.0)  # type: ignore[arg-type]
    wave = unscaled._wave(np.arange(0.0, duration_s, 0.1))
    scale_um = range_um / max(float(np.ptp(wave)), 1e-9)
    return Drift(**shape, **jumps, scale_um=scale_um, offset=float(wave.mean()))  # type: ignore[arg-type]


# --- units ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """One neuron: place, field and waveform. Lengths in µm, times in ms, `gain_uv` in µV."""

    x_um: float
    y_um: float
    z_um: float
    shank: int
    rate_hz: float
    gain_uv: float  # makes the largest trough the amplitude that was asked for
    trough_ms: float  # standard deviations of the three phases; of the last one, rise and fall
    pre_ms: float
    rise_ms: float
    fall_ms: float
    pre_at_ms: float
    repolarisation_at_ms: float
    pre_size: float
    repolarisation_size: float
    decay_um: float
    decay_power: float
    up_stretch: float  # the field reaches farther along the dendrite, above or below
    down_stretch: float
    delay_ms_per_um: float
    broadening_per_um: float
    refractory_ms: float
    regularity: float
    burst_probability: float

    def distance_um(self, dx_um: FloatArray, dy_um: FloatArray) -> FloatArray:
        """Return the electrical distance of contacts at (dx, dy) from the unit."""
        stretched = dy_um / np.where(dy_um > 0, self.up_stretch, self.down_stretch)
        distance: FloatArray = np.sqrt(dx_um**2 + stretched**2 + self.z_um**2)
        return distance

    def field_uv(self, dx_um: FloatArray, dy_um: FloatArray) -> FloatArray:
        """Return the trough's size at contacts at (dx, dy), in µV."""
        near, far = _REACH_UM
        fade = np.cos(0.5 * np.pi * np.clip((np.hypot(dx_um, dy_um) - near) / (far - near), 0, 1)) ** 2
        decay = (1 + (self.distance_um(dx_um, dy_um) / self.decay_um) ** 2) ** -self.decay_power
        field_uv: FloatArray = self.gain_uv * fade * decay
        return field_uv

    def course(self, time_ms: FloatArray) -> FloatArray:
        """Return the waveform over time, its trough about −1 at 0: pre-peak, trough, repolarisation."""
        after = time_ms - self.repolarisation_at_ms
        pre = np.exp(-0.5 * ((time_ms + self.pre_at_ms) / self.pre_ms) ** 2)
        trough = np.exp(-0.5 * (time_ms / self.trough_ms) ** 2)
        repolarisation = np.exp(-0.5 * (after / np.where(after < 0, self.rise_ms, self.fall_ms)) ** 2)
        course: FloatArray = self.pre_size * pre - trough + self.repolarisation_size * repolarisation
        return course

    def waveform_uv(self, dx_um: FloatArray, dy_um: FloatArray, time_ms: FloatArray) -> FloatArray:
        """Return the waveform (time, contact) at contacts at (dx, dy), in µV; far ones later and broader."""
        beyond_um = self.distance_um(dx_um, dy_um) - self.z_um
        local_ms = time_ms[:, None] - self.delay_ms_per_um * beyond_um
        edge_ms = np.minimum(time_ms - time_ms[0], time_ms[-1] - time_ms)[:, None]
        window = np.sin(0.5 * np.pi * np.clip(edge_ms / 0.3, 0, 1)) ** 2  # no steps where the snippet ends
        course = self.course(local_ms / (1 + self.broadening_per_um * beyond_um))
        waveform_uv: FloatArray = window * course * self.field_uv(dx_um, dy_um)
        return waveform_uv


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _draw_place(rng: np.random.Generator, probe: Probe, shank: int, z_range_um: tuple[float, float]) -> dict[str, Any]:
    """Draw a place beside one shank: anywhere between its contacts and a little beyond."""
    here = probe.shank == shank
    x_um, y_um = probe.x_um[here], probe.y_um[here]
    return dict(
        x_um=float(rng.uniform(x_um.min() - 15, x_um.max() + 15)),
        y_um=float(rng.uniform(y_um.min() - 10, y_um.max() + 10)),
        z_um=float(rng.uniform(*z_range_um)),
        shank=shank,
    )


def _draw_cell(rng: np.random.Generator) -> dict[str, Any]:
    """Draw waveform, field and firing pattern: one unit in three is narrow (fast-spiking), the rest broad."""
    narrow = bool(rng.random() < 0.33)
    up_stretch, down_stretch = rng.permutation([rng.uniform(1.1, 1.7), rng.uniform(0.9, 1.1)])
    return dict(
        trough_ms=float(rng.uniform(0.07, 0.1) if narrow else rng.uniform(0.1, 0.17)),
        pre_ms=float(rng.uniform(0.06, 0.12)),
        rise_ms=float(rng.uniform(0.08, 0.14) if narrow else rng.uniform(0.15, 0.28)),
        fall_ms=float(rng.uniform(0.15, 0.3) if narrow else rng.uniform(0.3, 0.6)),
        pre_at_ms=float(rng.uniform(0.2, 0.3)),
        repolarisation_at_ms=float(rng.uniform(0.24, 0.36) if narrow else rng.uniform(0.45, 0.75)),
        pre_size=float(max(rng.uniform(-0.15, 0.3), 0.0)),
        repolarisation_size=float(rng.uniform(0.25, 0.6) if narrow else rng.uniform(0.12, 0.45)),
        decay_um=float(rng.uniform(20, 40)),
        decay_power=float(rng.uniform(1.0, 1.4)),
        up_stretch=float(up_stretch),
        down_stretch=float(down_stretch),
        delay_ms_per_um=float(1 / rng.uniform(400, 1000)),  # 0.4 to 1 m/s, in µm per ms
        broadening_per_um=float(rng.uniform(0.001, 0.004)),
        refractory_ms=float(rng.uniform(2.0, 3.0)),
        regularity=float(rng.uniform(1.0, 2.5)),
        burst_probability=0.0 if narrow else float(max(rng.uniform(-0.2, 0.2), 0.0)),
    )


def _scaled_to_amplitude(unit: _Unit, probe: Probe, good: NDArray[np.bool_], amplitude_uv: float) -> _Unit:
    """Return the unit with the gain that gives it this trough on its best good contact."""
    time_ms = np.arange(-_BEFORE_MS, _AFTER_MS, 1 / 120)
    waveform = unit.waveform_uv(probe.x_um[good] - unit.x_um, probe.y_um[good] - unit.y_um, time_ms)
    values = {**unit.__dict__, "gain_uv": unit.gain_uv * amplitude_uv / -float(waveform.min())}
    return _Unit(**values)


def _draw_units(
    probe: Probe,
    good: NDArray[np.bool_],
    *,
    seed: int,
    n_units: int,
    amplitude_range_uv: tuple[float, float],
    rate_range_hz: tuple[float, float],
) -> tuple[list[_Unit], FloatArray]:
    """Draw the units that are the truth, shank by shank, with their amplitudes in µV."""
    rng = _generator(seed, "units")
    shanks = np.unique(probe.shank)
    units, amplitudes_uv = [], []
    for index in range(n_units):
        place = _draw_place(rng, probe, int(shanks[index % len(shanks)]), (5.0, 30.0))
        rate_hz = float(np.clip(rng.lognormal(np.log(3.5), 0.9), *rate_range_hz))
        amplitude_uv = _log_uniform(rng, *amplitude_range_uv)
        unit = _Unit(**place, rate_hz=rate_hz, gain_uv=1.0, **_draw_cell(rng))
        units.append(_scaled_to_amplitude(unit, probe, good, amplitude_uv))
        amplitudes_uv.append(amplitude_uv)
    return units, np.array(amplitudes_uv, dtype=float)


def _draw_hash(probe: Probe, *, seed: int, n_per_channel: float) -> list[_Unit]:
    """Draw the many small, distant units that nobody can sort and that make real noise spiky."""
    rng = _generator(seed, "hash")
    everywhere = np.ones(probe.n_channels, dtype=bool)
    units = []
    for _ in range(round(n_per_channel * probe.n_channels)):
        place = _draw_place(rng, probe, int(rng.choice(probe.shank)), (30.0, 80.0))
        unit = _Unit(**place, rate_hz=_log_uniform(rng, 1.0, 10.0), gain_uv=1.0, **_draw_cell(rng))
        units.append(_scaled_to_amplitude(unit, probe, everywhere, _log_uniform(rng, 6.0, 22.0)))
    return units


# --- spike trains -----------------------------------------------------------------------------------------


def _draw_intervals_ms(rng: np.random.Generator, unit: _Unit, n_intervals: int) -> FloatArray:
    """Draw intervals: the refractory period plus a gamma variable, or a few ms within a burst."""
    burst_mean_ms = 3.5
    mean_ms = 1000 / unit.rate_hz - unit.refractory_ms
    pause_ms = (mean_ms - unit.burst_probability * burst_mean_ms) / (1 - unit.burst_probability)
    in_burst = rng.random(n_intervals) < unit.burst_probability
    pauses = rng.gamma(unit.regularity, pause_ms / unit.regularity, n_intervals)
    return unit.refractory_ms + np.where(in_burst, rng.exponential(burst_mean_ms, n_intervals), pauses)


def _draw_train(unit: _Unit, *, seed: int, index: int, duration_s: float) -> tuple[FloatArray, FloatArray]:
    """Return a unit's spike times in s and their relative amplitudes (near 1, less within a burst)."""
    rng = _generator(seed, "trains", index)
    margin_ms = 3.0  # whole waveforms only
    expected = unit.rate_hz * duration_s
    intervals_ms = _draw_intervals_ms(rng, unit, int(expected + 10 * np.sqrt(expected) + 20))
    # The first interval is cut at random, or every train would start with a pause.
    time_ms = margin_ms + np.cumsum(intervals_ms) - rng.random() * intervals_ms[0]
    fatigue = np.exp(-intervals_ms / 15.0)
    relative = (1 - 0.2 * fatigue - 0.1 * np.roll(fatigue, 1)) * (1 + 0.05 * rng.standard_normal(len(time_ms)))
    kept = time_ms < 1000 * duration_s - margin_ms
    return time_ms[kept] / 1000, relative[kept]


@dataclass(frozen=True, eq=False)
class _Spikes:
    """Spikes in order of time: sample, quarter of a sample, unit, relative amplitude."""

    sample: NDArray[np.int64]
    phase: NDArray[np.int64]
    unit: NDArray[np.int64]
    relative: FloatArray

    def within(self, start: int, stop: int) -> _Spikes:
        """Return the spikes with start <= sample < stop."""
        span = slice(*np.searchsorted(self.sample, [start, stop]))
        return _Spikes(self.sample[span], self.phase[span], self.unit[span], self.relative[span])


def _in_time_order(time_samples: FloatArray, unit: NDArray[np.int64], relative: FloatArray) -> _Spikes:
    """Put spikes on the grid of quarter samples and sort them by time, then unit."""
    quarters = np.rint(time_samples * _N_PHASES).astype(np.int64)
    order = np.lexsort((unit, quarters))
    sample, phase = np.divmod(quarters[order], _N_PHASES)
    return _Spikes(sample, phase, unit[order], relative[order])


def _draw_trains(units: Sequence[_Unit], *, seed: int, duration_s: float, sampling_rate_hz: float) -> _Spikes:
    trains = [_draw_train(unit, seed=seed, index=i, duration_s=duration_s) for i, unit in enumerate(units)]
    empty = np.zeros(0)
    time_s = np.concatenate([empty, *(train[0] for train in trains)])
    relative = np.concatenate([empty, *(train[1] for train in trains)])
    owner = np.repeat(np.arange(len(units)), [len(train[0]) for train in trains])
    return _in_time_order(time_s * sampling_rate_hz, owner.astype(np.int64), relative)


# --- noise ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Noise:
    """Gaussian noise: shared between neighbours, coloured in time, plus each contact's own.

    White noise of each spatial mode passes a filter of its own and the modes are mixed to channels, which
    gives the cross-spectra S_shared(f)·K + S_own(f)·I exactly with one draw per channel and sample.
    """

    response: NDArray[np.float32]  # (mode, frequency)
    mixing: NDArray[np.float32]  # (channel, mode)
    seed: int

    def block(self, index: int) -> NDArray[np.float32]:
        """Return the noise of one block, (channel, BLOCK_SAMPLES), in µV."""
        # The filter reaches back into the block before; a block draws its tail first, so that the next
        # block can have it without drawing the rest.
        tail_before, _ = self._white(index - 1, tail_only=True)
        tail, head = self._white(index)
        white = np.concatenate([tail_before, head, tail], axis=1)
        coloured = fft.irfft(fft.rfft(white, axis=1) * self.response, n=_FFT_SAMPLES, axis=1)
        first = _FILTER_SAMPLES // 2
        traces_uv: NDArray[np.float32] = self.mixing @ coloured[:, first : first + BLOCK_SAMPLES]
        return traces_uv

    def _white(self, index: int, *, tail_only: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        # Keys are not negative: the block before the first is number 0.
        rng = _generator(self.seed, "noise", index + 1)
        n_modes = len(self.response)
        tail = rng.standard_normal((n_modes, _FILTER_SAMPLES), dtype=np.float32)
        n_head = 0 if tail_only else BLOCK_SAMPLES - _FILTER_SAMPLES
        return tail, rng.standard_normal((n_modes, n_head), dtype=np.float32)


def _make_noise(probe: Probe, *, noise_uv: float, sampling_rate_hz: float, seed: int) -> _Noise:
    """Return noise of `noise_uv` rms between 300 and 6000 Hz, 60 % of its power shared over distance."""
    frequency_hz = fft.rfftfreq(_FFT_SAMPLES, 1 / sampling_rate_hz)
    shared_power = (1 + (300 / np.maximum(frequency_hz, 5.0)) ** 1.5) / (1 + (frequency_hz / 5000) ** 4)
    own_power = 1 / (1 + (frequency_hz / 9000) ** 8)
    in_band = (frequency_hz > 300) & (frequency_hz < 6000)

    place_um = np.stack([probe.x_um, probe.y_um], axis=1)
    distance_um = np.hypot(*np.moveaxis(place_um[:, None] - place_um[None, :], -1, 0))
    kernel = 0.75 * np.exp(-distance_um / 80.0) + 0.25  # neighbours, and a common mode
    variance, modes = np.linalg.eigh(kernel)
    # A white input of variance 1 has the density 1 in every bin, so a bin counts for 2 / n of the power.
    per_bin = 2 * noise_uv**2 / _FFT_SAMPLES
    shared = 0.6 * shared_power / (shared_power[in_band].sum() * per_bin / noise_uv**2)
    own = 0.4 * own_power / (own_power[in_band].sum() * per_bin / noise_uv**2)
    amplitude = noise_uv * np.sqrt(shared * np.maximum(variance, 0)[:, None] + own)
    gain = _generator(seed, "channels").uniform(0.9, 1.1, probe.n_channels)
    return _Noise(_shortened(amplitude), (gain[:, None] * modes).astype(np.float32), seed)


def _shortened(amplitude: FloatArray) -> NDArray[np.float32]:
    """Return the response (mode, frequency) of the zero-phase filters cut to _FILTER_SAMPLES."""
    impulse = fft.irfft(amplitude, n=_FFT_SAMPLES, axis=1)
    lag = np.minimum(np.arange(_FFT_SAMPLES), _FFT_SAMPLES - np.arange(_FFT_SAMPLES))
    window = np.cos(0.5 * np.pi * np.clip(lag / (_FILTER_SAMPLES / 2 - 1), 0, 1)) ** 2
    response: NDArray[np.float32] = fft.rfft(impulse * window, axis=1).real.astype(np.float32)
    return response


@dataclass(frozen=True, eq=False)
class _SlowPotential:
    """Offsets, and a local field potential that is a sum of sines whose size changes along the probe."""

    frequency_hz: FloatArray  # (sine,)
    phase_rad: FloatArray  # (sine,)
    size_uv: NDArray[np.float32]  # (sine, channel)
    offset_uv: NDArray[np.float32]  # (channel,)

    def at(self, time_s: FloatArray) -> NDArray[np.float32]:
        """Return the potential (time, channel) in µV."""
        sines = np.sin(2 * np.pi * time_s[:, None] * self.frequency_hz + self.phase_rad)
        return sines.astype(np.float32) @ self.size_uv + self.offset_uv


def _make_slow_potential(probe: Probe, *, lfp_uv: float, seed: int) -> _SlowPotential:
    rng = _generator(seed, "channels", 1)
    frequency_hz = np.exp(rng.uniform(np.log(0.3), np.log(20), 16))
    size = 1 / (1 + frequency_hz / 2)
    gradient = rng.uniform(-0.5, 0.5, len(size))[:, None] * (probe.y_um - probe.y_um.mean()) / 500
    size_uv = lfp_uv * np.sqrt(2 / np.sum(size**2)) * size[:, None] * (1 + np.clip(gradient, -0.9, 0.9))
    return _SlowPotential(
        frequency_hz,
        rng.uniform(0, 2 * np.pi, len(size)),
        size_uv.astype(np.float32),
        rng.normal(0, 40, probe.n_channels).astype(np.float32),
    )


# --- artifacts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Artifacts:
    """Brief, large, ringing events on all channels, about but not quite alike on each."""

    spans: NDArray[np.int64]  # (artifact, 2): first sample, sample after the last
    peak_uv: FloatArray  # (artifact,)
    cycles: FloatArray  # (artifact,)
    channel_gain: FloatArray  # (artifact, channel)

    def add_to(self, traces_uv: NDArray[np.float32], start: int) -> None:
        """Add what falls into traces (time, channel) that begin at sample `start`."""
        stop = start + len(traces_uv)
        for i in np.flatnonzero((self.spans[:, 0] < stop) & (self.spans[:, 1] > start)):
            first, last = max(self.spans[i, 0], start), min(self.spans[i, 1], stop)
            progress = (np.arange(first, last) - self.spans[i, 0]) / np.diff(self.spans[i])
            course = np.sin(2 * np.pi * self.cycles[i] * progress) * np.exp(-3 * progress)
            traces_uv[first - start : last - start] += np.outer(self.peak_uv[i] * course, self.channel_gain[i])


def _draw_artifacts(n: int, *, n_channels: int, n_samples: int, sampling_rate_hz: float, seed: int) -> _Artifacts:
    rng = _generator(seed, "artifacts")
    starts = np.sort(rng.integers(n_samples // 50, n_samples - n_samples // 50, n))
    lengths = np.rint(rng.uniform(2.0, 6.0, n) * sampling_rate_hz / 1000).astype(np.int64)
    return _Artifacts(
        np.stack([starts, starts + lengths], axis=1).astype(np.int64),
        rng.choice([-1.0, 1.0], n) * rng.uniform(1500, 4000, n),
        rng.uniform(1.0, 3.0, n),
        rng.uniform(0.6, 1.4, (n, n_channels)),
    )


# --- the scene: everything that is needed to compute one block ------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scene:
    """All that a recording is made of; computes any block of it on its own."""

    probe: Probe
    sampling_rate_hz: float
    n_samples: int
    gain_uv: float
    seed: int
    units: tuple[_Unit, ...]  # the truth, then the hash
    n_units: int
    spikes: _Spikes  # of the truth; the hash's are drawn block by block
    drift: Drift
    noise: _Noise
    slow: _SlowPotential
    artifacts: _Artifacts
    dead: NDArray[np.int64]
    noisy: NDArray[np.int64]
    templates: dict[tuple[int, int, int], tuple[slice, NDArray[np.float32]]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # The cache of templates stays where it is: a worker fills its own.
        return {**self.__dict__, "templates": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def read(self, start: int, stop: int) -> NDArray[np.int16]:
        """Return samples start … stop − 1, (time, file channel), in bits."""
        parts = [np.empty((0, _n_file_channels(self.probe)), dtype=np.int16)]
        for index in range(start // BLOCK_SAMPLES, -(-stop // BLOCK_SAMPLES)):
            first = index * BLOCK_SAMPLES
            parts.append(self._block(index)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def _block(self, index: int) -> NDArray[np.int16]:
        """Return one whole block. Always whole: sums of floats must not depend on who asks."""
        first = index * BLOCK_SAMPLES
        traces_uv = np.ascontiguousarray(self.noise.block(index).T)
        traces_uv[:, self.noisy] *= 10
        traces_uv += self.slow.at((first + np.arange(BLOCK_SAMPLES)) / self.sampling_rate_hz)
        for spikes in (self.spikes, self._hash_spikes(index)):
            self._add_spikes(traces_uv, first, spikes)
        self.artifacts.add_to(traces_uv, first)
        traces_uv[:, self.dead] = 0
        return self._to_file(traces_uv)

    def _to_file(self, traces_uv: NDArray[np.float32]) -> NDArray[np.int16]:
        bits = np.clip(np.rint(traces_uv / np.float32(self.gain_uv)), -32768, 32767).astype(np.int16)
        in_file = np.zeros((len(bits), _n_file_channels(self.probe)), dtype=np.int16)
        in_file[:, self.probe.chan_map] = bits
        return in_file

    def _hash_spikes(self, index: int) -> _Spikes:
        """Return the Poisson spikes of the hash in one block and in both its neighbours."""
        rates = np.array([unit.rate_hz for unit in self.units[self.n_units :]])
        times, owners, relatives = [], [], []
        for neighbour in range(index - 1, index + 2):
            rng = _generator(self.seed, "hash_trains", neighbour + 1)
            owner = np.repeat(np.arange(len(rates)), rng.poisson(rates * BLOCK_SAMPLES / self.sampling_rate_hz))
            times.append(np.floor((neighbour + rng.random(len(owner))) * BLOCK_SAMPLES))
            relatives.append(rng.uniform(0.8, 1.2, len(owner)))
            owners.append(owner + self.n_units)
        return _in_time_order(np.concatenate(times), np.concatenate(owners), np.concatenate(relatives))

    def _add_spikes(self, traces_uv: NDArray[np.float32], first: int, spikes: _Spikes) -> None:
        """Add the waveforms that reach into traces (time, channel) beginning at sample `first`."""
        offset = self._offset_samples
        here = spikes.within(first - offset[-1], first + BLOCK_SAMPLES - offset[0])
        depth_um = np.array([unit.y_um for unit in self.units])[here.unit]
        moved_um = np.rint(self.drift.displacement_um(here.sample / self.sampling_rate_hz, depth_um)).astype(int)
        rows = here.sample + offset[0] - first
        columns = zip(rows.tolist(), here.unit.tolist(), moved_um.tolist(), here.phase.tolist(), strict=True)
        for (row, unit, moved, phase), relative in zip(columns, here.relative.astype(np.float32), strict=True):
            channels, template = self._template(unit, moved, phase)
            skip = max(-row, 0)
            window = traces_uv[row + skip : row + len(offset), channels]
            window += relative * template[skip : skip + len(window)]

    @property
    def _offset_samples(self) -> NDArray[np.int64]:
        per_ms = self.sampling_rate_hz / 1000
        return np.arange(-round(_BEFORE_MS * per_ms), round(_AFTER_MS * per_ms) + 1)

    def _template(self, unit_index: int, moved_um: int, phase: int) -> tuple[slice, NDArray[np.float32]]:
        """Return the channels and the waveform (time, channel) of a unit that has moved so far."""
        key = (unit_index, moved_um, phase)
        if key not in self.templates:
            if len(self.templates) >= _CACHED_TEMPLATES:
                self.templates.clear()
            self.templates[key] = self._make_template(self.units[unit_index], moved_um, phase)
        return self.templates[key]

    def _make_template(self, unit: _Unit, moved_um: int, phase: int = 0) -> tuple[slice, NDArray[np.float32]]:
        dx_um = self.probe.x_um - unit.x_um
        dy_um = self.probe.y_um - (unit.y_um + moved_um)
        reached = np.flatnonzero(np.hypot(dx_um, dy_um) < _REACH_UM[1])
        channels = slice(int(reached.min()), int(reached.max()) + 1) if len(reached) else slice(0, 0)
        time_ms = np.asarray((self._offset_samples - phase / _N_PHASES) * 1000 / self.sampling_rate_hz, np.float64)
        return channels, unit.waveform_uv(dx_um[channels], dy_um[channels], time_ms).astype(np.float32)


def _n_file_channels(probe: Probe) -> int:
    return probe.n_chan_file or int(probe.chan_map.max()) + 1


def _read_chunk(scene: _Scene, block_info: Any = None) -> NDArray[np.int16]:
    (start, stop), _ = block_info[None]["array-location"]
    return scene.read(start, stop)


# --- what a user calls ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SimulatedRecording:
    """A recording and the truth about it.

    Attributes
    ----------
    traces : dask.array of int16, shape (time, file channel)
        In bits; nothing is computed before it is read.
    sampling_rate_hz : float
    probe : Probe
    gain_uv : float
        µV per bit.
    spike_samples : ndarray of int64, shape (spike,)
        Sample of each spike's trough near the unit (rounded down from quarters of a sample), ascending.
    spike_units : ndarray of int64, shape (spike,)
        Row of `units` each spike belongs to.
    units : structured ndarray, shape (unit,)
        ``amplitude_uv`` (size of the trough on the best good contact at the unit's mean position),
        ``x_um``, ``y_um``, ``z_um`` (mean position, z the distance from the probe's plane), ``rate_hz``
        (nominal), ``shank``, ``n_spikes``.
    drift : Drift
        ``drift.displacement_um(time_s, y_um)`` is the movement of the tissue.
    bad_channels : tuple of int
        Dead and noisy channels, as columns of the file.
    artifact_spans : ndarray of int64, shape (artifact, 2)
        First sample of each artifact and the sample after its last.
    seed : int
    """

    traces: da.Array
    sampling_rate_hz: float
    probe: Probe
    gain_uv: float
    spike_samples: NDArray[np.int64]
    spike_units: NDArray[np.int64]
    units: NDArray[np.void]
    drift: Drift
    bad_channels: tuple[int, ...]
    artifact_spans: NDArray[np.int64]
    seed: int
    _scene: _Scene = field(repr=False)

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
        return self._scene.read(max(start, 0), min(stop, self.traces.shape[0]))

    def write_binary(self, path: str | Path) -> Path:
        """Write the traces as flat int16, time-major, one block in memory at a time; return the path."""
        path = Path(path)
        n_samples = self.traces.shape[0]
        with path.open("wb") as file:
            for start in range(0, n_samples, BLOCK_SAMPLES):
                self.read(start, start + BLOCK_SAMPLES).tofile(file)
        return path

    def templates_uv(self, time_s: float = 0.0) -> NDArray[np.float32]:
        """Return the units' noiseless waveforms (unit, time, channel) in µV, where they are at `time_s`."""
        scene = self._scene
        depth_um = self.units["y_um"]
        moved_um = np.rint(self.drift.displacement_um(time_s, depth_um)).astype(int)
        templates = np.zeros((self.n_units, len(scene._offset_samples), self.probe.n_channels), np.float32)
        for index, moved in enumerate(moved_um):
            channels, template = scene._make_template(scene.units[index], int(moved))
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
    chunk_samples: int = BLOCK_SAMPLES,
) -> SimulatedRecording:
    """Describe a recording with known spikes; its traces are computed where and when they are read.

    Parameters
    ----------
    probe : Probe
        Where the contacts are. Units are shared out evenly over its shanks.
    duration_s : float
        Length in seconds.
    seed : int
        Everything random follows from it (0 or more).
    n_units : int
        Units that are the truth.
    sampling_rate_hz : float
    drift : {"none", "rigid", "nonrigid"}
        How the tissue moves along y; see :class:`Drift`.
    drift_range_um : float
        From the lowest to the highest displacement, in µm.
    amplitude_range_uv : tuple of float
        Trough on the best contact, log-uniform between the two, in µV.
    rate_range_hz : tuple of float
        Limits of the log-normal firing rates (median 3.5 Hz), in Hz.
    noise_uv : float
        Standard deviation of the Gaussian noise between 300 and 6000 Hz, in µV.
    hash_per_channel : float
        Small distant units (6 to 22 µV) per channel that are noise, not truth.
    lfp_uv : float
        Standard deviation of the slow potential, in µV.
    dead_channels, noisy_channels : sequence of int
        Contacts that are flat, or have ten times the noise.
    n_artifacts : int
        Events of 2 to 6 ms and 1.5 to 4 mV on all channels.
    gain_uv : float
        µV per bit.
    chunk_samples : int
        Chunk length of the Dask array; it does not change a value.

    Returns
    -------
    SimulatedRecording

    Raises
    ------
    SettingsError
        If the recording would be shorter than a block, or `drift` or the numbers make no sense.
    """
    n_samples = round(duration_s * sampling_rate_hz)
    _check(n_samples=n_samples, seed=seed, n_units=n_units, drift=drift, chunk_samples=chunk_samples)
    if not 0 < rate_range_hz[0] <= rate_range_hz[1] <= _MAX_RATE_HZ:
        raise SettingsError(f"{rate_range_hz=} must be ascending and within 0 and {_MAX_RATE_HZ:.0f} Hz")
    if not 0 < amplitude_range_uv[0] <= amplitude_range_uv[1]:
        raise SettingsError(f"{amplitude_range_uv=} must be ascending and above 0 µV")
    good = np.ones(probe.n_channels, dtype=bool)
    bad = np.unique([*dead_channels, *noisy_channels]).astype(np.int64)
    good[bad] = False

    units, amplitudes_uv = _draw_units(
        probe, good, seed=seed, n_units=n_units, amplitude_range_uv=amplitude_range_uv, rate_range_hz=rate_range_hz
    )
    spikes = _draw_trains(units, seed=seed, duration_s=n_samples / sampling_rate_hz, sampling_rate_hz=sampling_rate_hz)
    scene = _Scene(
        probe=probe,
        sampling_rate_hz=sampling_rate_hz,
        n_samples=n_samples,
        gain_uv=gain_uv,
        seed=seed,
        units=(*units, *_draw_hash(probe, seed=seed, n_per_channel=hash_per_channel)),
        n_units=n_units,
        spikes=spikes,
        drift=_make_drift(drift, drift_range_um, probe, n_samples / sampling_rate_hz, seed),
        noise=_make_noise(probe, noise_uv=noise_uv, sampling_rate_hz=sampling_rate_hz, seed=seed),
        slow=_make_slow_potential(probe, lfp_uv=lfp_uv, seed=seed),
        artifacts=_draw_artifacts(
            n_artifacts, n_channels=probe.n_channels, n_samples=n_samples, sampling_rate_hz=sampling_rate_hz, seed=seed
        ),
        dead=np.array(dead_channels, dtype=np.int64),
        noisy=np.array(noisy_channels, dtype=np.int64),
    )
    return SimulatedRecording(
        traces=_lazy_traces(scene, chunk_samples),
        sampling_rate_hz=sampling_rate_hz,
        probe=probe,
        gain_uv=gain_uv,
        spike_samples=spikes.sample,
        spike_units=spikes.unit,
        units=_unit_table(units, amplitudes_uv, spikes),
        drift=scene.drift,
        bad_channels=tuple(int(channel) for channel in probe.chan_map[bad]),
        artifact_spans=scene.artifacts.spans,
        seed=seed,
        _scene=scene,
    )


def _check(*, n_samples: int, seed: int, n_units: int, drift: str, chunk_samples: int) -> None:
    if n_samples < BLOCK_SAMPLES // 10:
        raise SettingsError(f"duration_s gives {n_samples} samples; at least {BLOCK_SAMPLES // 10} are needed")
    if drift not in ("none", "rigid", "nonrigid"):
        raise SettingsError(f"drift={drift!r} is unknown; choose 'none', 'rigid' or 'nonrigid'")
    if seed < 0 or n_units < 0 or chunk_samples < 1:
        raise SettingsError(f"seed={seed} and n_units={n_units} must be ≥ 0, chunk_samples={chunk_samples} ≥ 1")


def _lazy_traces(scene: _Scene, chunk_samples: int) -> da.Array:
    whole, rest = divmod(scene.n_samples, chunk_samples)
    chunks = (chunk_samples,) * whole + ((rest,) if rest else ())
    traces: da.Array = da.map_blocks(  # type: ignore[no-untyped-call]
        _read_chunk,
        scene=delayed(scene, pure=False),  # one node of the graph, not a copy in every task
        chunks=(chunks, (_n_file_channels(scene.probe),)),
        dtype=np.int16,
        meta=np.empty((0, 0), dtype=np.int16),
    )
    return traces


def _unit_table(units: Sequence[_Unit], amplitudes_uv: FloatArray, spikes: _Spikes) -> NDArray[np.void]:
    table = np.zeros(len(units), dtype=UNIT_DTYPE)
    for name in ("x_um", "y_um", "z_um", "rate_hz", "shank"):
        table[name] = [getattr(unit, name) for unit in units]
    table["amplitude_uv"] = amplitudes_uv
    table["n_spikes"] = np.bincount(spikes.unit, minlength=len(units))
    return table
