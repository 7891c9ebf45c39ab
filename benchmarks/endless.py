"""A simulated recording of any length that lies nowhere: samples are made where they are read, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream import Probe, simulate
from ks4stream.recording import BaseSource, Recording
from ks4stream.simulate import EPOCH_SAMPLES
from ks4stream.simulate.scene import Scene
from ks4stream.simulate.trains import Spikes, draw_trains
from ks4stream.simulate.units import Unit

RATE_HZ = 30_000
MINUTE = 60 * RATE_HZ
BLOCKS_KEPT = 4  # those that a tile touches; half of them are the next one's too


@dataclass(frozen=True, eq=False)
class MinuteByMinute:
    """The spikes of some units, drawn for a minute at a time, so that nothing of them grows with the recording."""

    units: tuple[Unit, ...]
    seed: int

    def within(self, start: int, stop: int) -> Spikes:
        """Those with start <= sample < stop."""
        minutes = range(max(start, 0) // MINUTE, -(-stop // MINUTE))
        parts = [_minute(self, minute).within(start, stop) for minute in minutes]
        return Spikes(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


_COLUMNS = ("sample", "phase", "unit", "relative")


@lru_cache(maxsize=3)
def _minute(trains: MinuteByMinute, index: int) -> Spikes:
    seed = 1_000_000 * trains.seed + index
    found = draw_trains(trains.units, seed=seed, duration_s=60.0, sampling_rate_hz=RATE_HZ)
    return replace(found, sample=found.sample + index * MINUTE)


@dataclass(frozen=True, eq=False)
class Endless(BaseSource):
    """The source of samples."""

    is_remote = False

    scene: Scene
    n_samples: int
    n_channels: int

    dtype = np.dtype(np.int16)
    digest_is_exact = True
    flat_files = "the samples are simulated as they are read"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        blocks = range(start // EPOCH_SAMPLES, -(-stop // EPOCH_SAMPLES))
        parts = [_block(self.scene, index) for index in blocks]
        first = blocks.start * EPOCH_SAMPLES
        samples = np.concatenate([np.zeros((0, self.n_channels), self.dtype), *parts])
        return samples[start - first : stop - first]

    def digest(self) -> str:
        return f"{self.scene.seed} {self.scene.n_units} {self.n_channels} {self.n_samples}"


@lru_cache(maxsize=BLOCKS_KEPT)
def _block(scene: Scene, index: int) -> NDArray[np.int16]:
    return scene.read(index * EPOCH_SAMPLES, (index + 1) * EPOCH_SAMPLES)


def endless(probe: Probe, *, seconds: float, seed: int = 1) -> Recording:
    """A still recording with one unit for every two channels. Its first minutes are the same whatever its length."""
    n_units = max(probe.n_channels // 2, 2)
    minute = simulate.simulate(probe, 60.0, seed=seed, n_units=n_units).scene
    trains = MinuteByMinute(minute.units[:n_units], seed)
    scene = replace(minute, n_samples=round(seconds * RATE_HZ), spikes=trains)  # type: ignore[arg-type]
    return Recording(Endless(scene, scene.n_samples, probe.n_channels), RATE_HZ, probe, name="simulated where read")
