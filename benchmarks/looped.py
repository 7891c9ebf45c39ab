"""A short recording, repeated as often as one likes: long input that never lies on disk whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ks4stream import Probe, open_recording, simulate
from ks4stream.recording import Recording, Source

RATE_HZ = 30_000
NOISE_S_D, NOISE_SAMPLES = 20.0, 7 * RATE_HZ + 11  # less than half of the clip's own noise, in its units


@dataclass(frozen=True)
class Looped:
    """The samples of a source again and again; where one repetition ends the next begins.

    To which noise is added that repeats itself with another period, so that no spike comes twice as it was: spikes that
    are alike to the last bit are the nearest of each other, and are clustered by themselves.
    """

    source: Source
    n_samples: int
    noise_s_d: float = 0.0
    noise_samples: int = 0

    digest_is_exact = True

    @property
    def n_channels(self) -> int:
        return self.source.n_channels

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, start: int, stop: int) -> NDArray:
        length, parts = self.source.n_samples, [self.source.read(0, 0)]
        while start < stop:
            first = start % length
            last = min(length, first + stop - start)
            parts.append(self.source.read(first, last))
            start += last - first
        samples = np.concatenate(parts)
        if self.noise_samples:
            at = np.arange(stop - len(samples), stop) % self.noise_samples
            samples = samples + _noise(self.noise_samples, self.n_channels, self.noise_s_d)[at]
        return samples

    def digest(self) -> str:
        return f"{self.source.digest()} {self.n_samples} {self.noise_samples} {self.noise_s_d}"


@lru_cache(maxsize=1)
def _noise(n_samples: int, n_channels: int, s_d: float) -> NDArray:
    return np.random.default_rng(0).normal(0, s_d, (n_samples, n_channels)).round().astype(np.int16)


def loop(folder: Path, probe: Probe, *, clip_s: float, seconds: float, seed: int = 1) -> Recording:
    """A simulated clip in `folder`, made unless it is there, as a recording of any length."""
    path = folder / f"clip-{probe.n_channels}-{clip_s:g}-{seed}.bin"
    if not path.exists():
        n_units = max(probe.n_channels // 2, 2)
        simulate.simulate(probe, clip_s, seed=seed, n_units=n_units).write_binary(path)
    clip = open_recording(path, n_chan=probe.n_channels, fs=RATE_HZ, probe=probe)
    looped = Looped(clip.source, round(seconds * RATE_HZ), NOISE_S_D, NOISE_SAMPLES)
    return Recording(looped, RATE_HZ, probe, name=f"{clip_s:g} s repeated")
