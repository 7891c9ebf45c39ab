"""Units: their positions, and their waveform at any contact.

A spike's waveform is a continuous function of the vector from the unit to the contact, so drift moves the
unit, not the samples: nothing is interpolated between channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.probe import Probe
from ks4stream.simulate.streams import FloatArray, generator

BEFORE_MS, AFTER_MS = 1.2, 2.8  # extent of a rendered waveform around its trough
REACH_UM = (120.0, 200.0)  # a unit's field fades to nothing between these distances


@dataclass(frozen=True)
class Unit:
    """One neuron: position, field and waveform. Lengths in µm, times in ms, `gain_uv` in µV."""

    x_um: float
    y_um: float
    z_um: float
    shank: int
    rate_hz: float
    gain_uv: float  # scales the largest trough to the requested amplitude
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
    up_stretch: float  # the field extends farther along the dendrite, above or below
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
        """Return the size of the trough at contacts at (dx, dy), in µV."""
        near, far = REACH_UM
        fade = np.cos(0.5 * np.pi * np.clip((np.hypot(dx_um, dy_um) - near) / (far - near), 0, 1)) ** 2
        decay = (1 + (self.distance_um(dx_um, dy_um) / self.decay_um) ** 2) ** -self.decay_power
        field_uv: FloatArray = self.gain_uv * fade * decay
        return field_uv

    def course(self, time_ms: FloatArray) -> FloatArray:
        """Return the waveform over time, with a trough of about −1 at 0: pre-peak, trough, repolarisation."""
        after = time_ms - self.repolarisation_at_ms
        pre = np.exp(-0.5 * ((time_ms + self.pre_at_ms) / self.pre_ms) ** 2)
        trough = np.exp(-0.5 * (time_ms / self.trough_ms) ** 2)
        repolarisation = np.exp(-0.5 * (after / np.where(after < 0, self.rise_ms, self.fall_ms)) ** 2)
        course: FloatArray = self.pre_size * pre - trough + self.repolarisation_size * repolarisation
        return course

    def waveform_uv(self, dx_um: FloatArray, dy_um: FloatArray, time_ms: FloatArray) -> FloatArray:
        """Return the waveform (time, contact) at contacts at (dx, dy), in µV; later and broader at far contacts."""
        beyond_um = self.distance_um(dx_um, dy_um) - self.z_um
        local_ms = time_ms[:, None] - self.delay_ms_per_um * beyond_um
        edge_ms = np.minimum(time_ms - time_ms[0], time_ms[-1] - time_ms)[:, None]
        window = np.sin(0.5 * np.pi * np.clip(edge_ms / 0.3, 0, 1)) ** 2  # no steps at the ends of the snippet
        course = self.course(local_ms / (1 + self.broadening_per_um * beyond_um))
        waveform_uv: FloatArray = window * course * self.field_uv(dx_um, dy_um)
        return waveform_uv


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _draw_position(
    rng: np.random.Generator, probe: Probe, shank: int, z_range_um: tuple[float, float]
) -> dict[str, Any]:
    """Draw a position beside one shank: anywhere between its contacts or a little beyond."""
    on_shank = probe.shank == shank
    x_um, y_um = probe.x_um[on_shank], probe.y_um[on_shank]
    return dict(
        x_um=float(rng.uniform(x_um.min() - 15, x_um.max() + 15)),
        y_um=float(rng.uniform(y_um.min() - 10, y_um.max() + 10)),
        z_um=float(rng.uniform(*z_range_um)),
        shank=shank,
    )


def _draw_cell(rng: np.random.Generator) -> dict[str, Any]:
    """Draw waveform, field and firing pattern: a third of the units are narrow (fast-spiking), the others broad."""
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


def scaled_to_amplitude(unit: Unit, probe: Probe, good: NDArray[np.bool_], amplitude_uv: float) -> Unit:
    """Return the unit with the gain that gives a trough of this amplitude on its best good contact."""
    time_ms = np.arange(-BEFORE_MS, AFTER_MS, 1 / 120)
    waveform = unit.waveform_uv(probe.x_um[good] - unit.x_um, probe.y_um[good] - unit.y_um, time_ms)
    values = {**unit.__dict__, "gain_uv": unit.gain_uv * amplitude_uv / -float(waveform.min())}
    return Unit(**values)


def draw_units(
    probe: Probe,
    good: NDArray[np.bool_],
    *,
    seed: int,
    n_units: int,
    amplitude_range_uv: tuple[float, float],
    rate_range_hz: tuple[float, float],
) -> tuple[list[Unit], FloatArray]:
    """Draw the units of the ground truth, shank by shank, with their amplitudes in µV."""
    rng = generator(seed, "units")
    shanks = np.unique(probe.shank)
    units, amplitudes_uv = [], []
    for index in range(n_units):
        position = _draw_position(rng, probe, int(shanks[index % len(shanks)]), (5.0, 30.0))
        rate_hz = float(np.clip(rng.lognormal(np.log(3.5), 0.9), *rate_range_hz))
        amplitude_uv = _log_uniform(rng, *amplitude_range_uv)
        unit = Unit(**position, rate_hz=rate_hz, gain_uv=1.0, **_draw_cell(rng))
        units.append(scaled_to_amplitude(unit, probe, good, amplitude_uv))
        amplitudes_uv.append(amplitude_uv)
    return units, np.array(amplitudes_uv, dtype=float)


def draw_hash(probe: Probe, *, seed: int, n_per_channel: float) -> list[Unit]:
    """Draw the many small, distant units that cannot be sorted and that make real noise spiky."""
    rng = generator(seed, "hash")
    everywhere = np.ones(probe.n_channels, dtype=bool)
    units = []
    for _ in range(round(n_per_channel * probe.n_channels)):
        position = _draw_position(rng, probe, int(rng.choice(probe.shank)), (30.0, 80.0))
        unit = Unit(**position, rate_hz=_log_uniform(rng, 1.0, 10.0), gain_uv=1.0, **_draw_cell(rng))
        units.append(scaled_to_amplitude(unit, probe, everywhere, _log_uniform(rng, 6.0, 22.0)))
    return units
