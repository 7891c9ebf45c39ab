"""Everything a simulated recording is made of; any epoch can be computed by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.probe import Probe
from ks4stream.simulate.motion import Motion
from ks4stream.simulate.noise import Artifacts, Noise, SlowPotential
from ks4stream.simulate.streams import EPOCH_SAMPLES, generator
from ks4stream.simulate.trains import N_PHASES, Spikes, in_time_order
from ks4stream.simulate.units import AFTER_MS, BEFORE_MS, REACH_UM, Unit

_CACHED_TEMPLATES = 10_000


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything a simulated recording is made of; computes any epoch by itself."""

    probe: Probe
    sampling_rate_hz: float
    n_samples: int
    gain_uv: float
    seed: int
    units: tuple[Unit, ...]  # the truth, then the hash
    n_units: int
    spikes: Spikes  # of the truth; those of the hash are drawn epoch by epoch
    drift: Motion
    noise: Noise
    slow: SlowPotential
    artifacts: Artifacts
    dead: NDArray[np.int64]
    noisy: NDArray[np.int64]
    templates: dict[tuple[int, int, int], tuple[slice, NDArray[np.float32]]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # The cache of templates is not pickled: each worker fills its own.
        return {**self.__dict__, "templates": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def read(self, start: int, stop: int) -> NDArray[np.int16]:
        """Return samples start … stop − 1, (time, file channel), in bits."""
        parts = [np.empty((0, n_file_channels(self.probe)), dtype=np.int16)]
        for index in range(start // EPOCH_SAMPLES, -(-stop // EPOCH_SAMPLES)):
            first = index * EPOCH_SAMPLES
            parts.append(self._epoch(index)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def _epoch(self, index: int) -> NDArray[np.int16]:
        """Return one whole epoch. Always whole: float sums must not depend on the range that is read."""
        first = index * EPOCH_SAMPLES
        traces_uv = np.ascontiguousarray(self.noise.epoch(index).T)
        traces_uv[:, self.noisy] *= 10
        traces_uv += self.slow.at((first + np.arange(EPOCH_SAMPLES)) / self.sampling_rate_hz)
        for spikes in (self.spikes, self._hash_spikes(range(index - 1, index + 2))):  # those beside overlap with it
            self._add_spikes(traces_uv, first, spikes)
        self.artifacts.add_to(traces_uv, first)
        traces_uv[:, self.dead] = 0
        return self._to_file(traces_uv)

    def _to_file(self, traces_uv: NDArray[np.float32]) -> NDArray[np.int16]:
        bits = np.clip(np.rint(traces_uv / np.float32(self.gain_uv)), -32768, 32767).astype(np.int16)
        in_file = np.zeros((len(bits), n_file_channels(self.probe)), dtype=np.int16)
        in_file[:, self.probe.chan_map] = bits
        return in_file

    def hash_spikes(self) -> Spikes:
        """Return all spikes of the hash units, whose numbers follow those of the true units."""
        spikes = self._hash_spikes(range(-(-self.n_samples // EPOCH_SAMPLES)))
        return spikes.within(0, self.n_samples)

    def _hash_spikes(self, epochs: range) -> Spikes:
        """Return the Poisson spikes of the hash units in some epochs."""
        rates = np.array([unit.rate_hz for unit in self.units[self.n_units :]])
        times, owners, relatives = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0)]
        for epoch in epochs:
            rng = generator(self.seed, "hash_trains", epoch + 1)
            owner = np.repeat(np.arange(len(rates)), rng.poisson(rates * EPOCH_SAMPLES / self.sampling_rate_hz))
            times.append(np.floor((epoch + rng.random(len(owner))) * EPOCH_SAMPLES))
            relatives.append(rng.uniform(0.8, 1.2, len(owner)))
            owners.append(owner + self.n_units)
        return in_time_order(np.concatenate(times), np.concatenate(owners), np.concatenate(relatives))

    def _add_spikes(self, traces_uv: NDArray[np.float32], first: int, spikes: Spikes) -> None:
        """Add the waveforms that overlap traces (time, channel) beginning at sample `first`."""
        offset = self.offset_samples
        overlapping = spikes.within(first - offset[-1], first + EPOCH_SAMPLES - offset[0])
        depth_um = np.array([unit.y_um for unit in self.units])[overlapping.unit]
        moved_um = np.rint(self.drift.displacement_um(overlapping.sample / self.sampling_rate_hz, depth_um)).astype(int)
        rows = overlapping.sample + offset[0] - first
        columns = zip(
            rows.tolist(), overlapping.unit.tolist(), moved_um.tolist(), overlapping.phase.tolist(), strict=True
        )
        for (row, unit, moved, phase), relative in zip(columns, overlapping.relative.astype(np.float32), strict=True):
            channels, template = self._template(unit, moved, phase)
            skip = max(-row, 0)
            window = traces_uv[row + skip : row + len(offset), channels]
            window += relative * template[skip : skip + len(window)]

    @property
    def offset_samples(self) -> NDArray[np.int64]:
        """Samples of a waveform, relative to its spike."""
        per_ms = self.sampling_rate_hz / 1000
        return np.arange(-round(BEFORE_MS * per_ms), round(AFTER_MS * per_ms) + 1)

    def _template(self, unit_index: int, moved_um: int, phase: int) -> tuple[slice, NDArray[np.float32]]:
        """Return the channels and the waveform (time, channel) of a unit displaced by `moved_um`, from the cache."""
        key = (unit_index, moved_um, phase)
        if key not in self.templates:
            if len(self.templates) >= _CACHED_TEMPLATES:
                self.templates.clear()
            self.templates[key] = self.make_template(self.units[unit_index], moved_um, phase)
        return self.templates[key]

    def make_template(self, unit: Unit, moved_um: int, phase: int = 0) -> tuple[slice, NDArray[np.float32]]:
        """Compute the channels and the waveform (time, channel) of a unit displaced by `moved_um`."""
        dx_um = self.probe.x_um - unit.x_um
        dy_um = self.probe.y_um - (unit.y_um + moved_um)
        reached = np.flatnonzero(np.hypot(dx_um, dy_um) < REACH_UM[1])
        channels = slice(int(reached.min()), int(reached.max()) + 1) if len(reached) else slice(0, 0)
        time_ms = np.asarray((self.offset_samples - phase / N_PHASES) * 1000 / self.sampling_rate_hz, np.float64)
        return channels, unit.waveform_uv(dx_um[channels], dy_um[channels], time_ms).astype(np.float32)


def n_file_channels(probe: Probe) -> int:
    """Number of channels in the file."""
    return probe.n_chan_file or int(probe.chan_map.max()) + 1
