"""When units fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ks4stream.simulate.streams import FloatArray, generator
from ks4stream.simulate.units import Unit

N_PHASES = 4  # spikes fall on quarters of a sample


def _draw_intervals_ms(rng: np.random.Generator, unit: Unit, n_intervals: int) -> FloatArray:
    """Draw intervals: the refractory period plus a gamma variable, or a few ms within a burst."""
    burst_mean_ms = 3.5
    mean_ms = 1000 / unit.rate_hz - unit.refractory_ms
    pause_ms = (mean_ms - unit.burst_probability * burst_mean_ms) / (1 - unit.burst_probability)
    in_burst = rng.random(n_intervals) < unit.burst_probability
    pauses = rng.gamma(unit.regularity, pause_ms / unit.regularity, n_intervals)
    return unit.refractory_ms + np.where(in_burst, rng.exponential(burst_mean_ms, n_intervals), pauses)


def _draw_train(unit: Unit, *, seed: int, index: int, duration_s: float) -> tuple[FloatArray, FloatArray]:
    """Return a unit's spike times in s and their relative amplitudes (near 1, smaller within a burst)."""
    rng = generator(seed, "trains", index)
    margin_ms = 3.0  # so that no waveform is cut off at the ends
    expected = unit.rate_hz * duration_s
    intervals_ms = _draw_intervals_ms(rng, unit, int(expected + 10 * np.sqrt(expected) + 20))
    # The first interval is cut at a random point; otherwise every train would start with a pause.
    time_ms = margin_ms + np.cumsum(intervals_ms) - rng.random() * intervals_ms[0]
    fatigue = np.exp(-intervals_ms / 15.0)
    relative = (1 - 0.2 * fatigue - 0.1 * np.roll(fatigue, 1)) * (1 + 0.05 * rng.standard_normal(len(time_ms)))
    kept = time_ms < 1000 * duration_s - margin_ms
    return time_ms[kept] / 1000, relative[kept]


@dataclass(frozen=True, eq=False)
class Spikes:
    """Spikes in time order: sample, quarter of a sample, unit, relative amplitude."""

    sample: NDArray[np.int64]
    phase: NDArray[np.int64]
    unit: NDArray[np.int64]
    relative: FloatArray

    def within(self, start: int, stop: int) -> Spikes:
        """Return the spikes with start <= sample < stop."""
        span = slice(*np.searchsorted(self.sample, [start, stop]))
        return Spikes(self.sample[span], self.phase[span], self.unit[span], self.relative[span])


def in_time_order(time_samples: FloatArray, unit: NDArray[np.int64], relative: FloatArray) -> Spikes:
    """Round spike times to quarter samples and sort the spikes by time, then unit."""
    quarters = np.rint(time_samples * N_PHASES).astype(np.int64)
    order = np.lexsort((unit, quarters))
    sample, phase = np.divmod(quarters[order], N_PHASES)
    return Spikes(sample, phase, unit[order], relative[order])


def draw_trains(units: Sequence[Unit], *, seed: int, duration_s: float, sampling_rate_hz: float) -> Spikes:
    """Draw the trains of all units, as one table in time order."""
    trains = [_draw_train(unit, seed=seed, index=i, duration_s=duration_s) for i, unit in enumerate(units)]
    empty = np.zeros(0)
    time_s = np.concatenate([empty, *(train[0] for train in trains)])
    relative = np.concatenate([empty, *(train[1] for train in trains)])
    owner = np.repeat(np.arange(len(units)), [len(train[0]) for train in trains])
    return in_time_order(time_s * sampling_rate_hz, owner.astype(np.int64), relative)
