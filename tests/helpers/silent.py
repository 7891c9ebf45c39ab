"""A recording of zeros, for tests of what is said about its batches."""

from __future__ import annotations

from typing import Any

import numpy as np

import ks4stream
from ks4stream import simulate
from ks4stream.settings import Settings
from ks4stream.stages.preprocessing import Preprocessor, tiling_of


def tiles_of(*, n_parts: int = 1, **settings: Any) -> Preprocessor:
    """Five batches of 2 s, by default, on 10 contacts between 0 and 900 µm."""
    parts = np.array_split(np.zeros((300_000, 10), np.int16), n_parts)
    probe = simulate.linear_probe(10, pitch_um=100.0)
    recording = ks4stream.open_recording(parts if n_parts > 1 else parts[0], fs=30_000, probe=probe)
    values = Settings(**settings)
    return Preprocessor(recording, tiling_of(recording, values), values)
