"""A source far away, and recordings of it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.recording_cache import CachedSource
from ks4stream.io.sources import ConcatenatedSource
from ks4stream.recording import BaseSource, Recording, Source

SAMPLES = np.random.default_rng(0).integers(-500, 500, (1000, 3)).astype(np.int16)


PIECE = 64


N_PIECES = 16


class FarSource(BaseSource):
    """A source far away, that counts how often each piece is fetched, and fails if told so."""

    is_remote = True

    chunk_samples = PIECE
    digest_is_exact = True

    def __init__(self, samples: NDArray[Any] = SAMPLES, *, failures: int = 0, wait_s: float = 0.0) -> None:
        self.samples, self.failures, self.wait_s = samples, failures, wait_s
        self.n_samples, self.n_channels = samples.shape
        self.dtype = samples.dtype
        self.fetched: Counter[int] = Counter()
        self.lock = threading.Lock()

    def digest(self) -> str:
        return hashlib.sha256(self.samples.tobytes()).hexdigest()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        time.sleep(self.wait_s)
        with self.lock:
            self.fetched[start // PIECE] += 1
            if self.failures:
                self.failures -= 1
                raise RecordingError("not now")
        return self.samples[start:stop].copy()


def cache(source: Source, folder: Path, limit_bytes: int | None = None) -> CachedSource:
    return CachedSource(source, "0" * 64, PIECE, str(folder), limit_bytes)


def pieces_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.piece"))


def recording_of(*sources: Source) -> Recording:
    return Recording(sources[0] if len(sources) == 1 else ConcatenatedSource(sources), 1000.0)
