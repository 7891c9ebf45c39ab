"""A short recording, repeated as often as one likes: long input that never lies on disk whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ks4stream import Probe, open_recording, simulate
from ks4stream.recording import Recording, Source

RATE_HZ = 30_000


@dataclass(frozen=True)
class Looped:
    """The samples of a source again and again; where one repetition ends the next begins."""

    source: Source
    n_samples: int

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
        return np.concatenate(parts)

    def digest(self) -> str:
        return f"{self.source.digest()} {self.n_samples}"


def loop(folder: Path, probe: Probe, *, clip_s: float, seconds: float, seed: int = 1) -> Recording:
    """A simulated clip in `folder`, made unless it is there, as a recording of any length."""
    path = folder / f"clip-{probe.n_channels}-{clip_s:g}-{seed}.bin"
    if not path.exists():
        n_units = max(probe.n_channels // 2, 2)
        simulate.simulate(probe, clip_s, seed=seed, n_units=n_units).write_binary(path)
    clip = open_recording(path, n_chan=probe.n_channels, fs=RATE_HZ, probe=probe)
    return Recording(Looped(clip.source, round(seconds * RATE_HZ)), RATE_HZ, probe, name=f"{clip_s:g} s repeated")
