"""Probes with simple layouts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ks4stream.probe import Probe


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
    """Return two columns `column_um` apart with alternating contacts, one every `pitch_um` of depth."""
    index = np.arange(n_channels)
    return _probe(column_um * (index % 2), pitch_um * index, np.zeros(n_channels), f"staggered {n_channels}")


def tetrode_probe(n_tetrodes: int, *, contact_um: float = 25.0, spacing_um: float = 250.0) -> Probe:
    """Return tetrodes side by side, each a square with sides of `contact_um` and on its own shank."""
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
