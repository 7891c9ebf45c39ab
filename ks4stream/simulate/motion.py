"""How the tissue moves along the probe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ks4stream.probe import Probe
from ks4stream.simulate.streams import FloatArray, generator


@dataclass(frozen=True, eq=False)
class Motion:
    """How the tissue moves along the probe: a slow wave, a ramp and a few sudden jumps.

    Attributes
    ----------
    kind : {"none", "rigid", "nonrigid"}
        No movement; the same movement at every depth; or more movement at larger y.
    range_um : float
        Distance between the lowest and the highest displacement (at the depth that moves most), in µm.
    period_s, phase_rad, ramp_per_s : float
        The slow wave, and the ramp relative to the wave's amplitude.
    jump_times_s, jump_levels : ndarray of float64, shape (jump,), (jump + 1,)
        When the tissue jumps, and the level it stays at from then on, relative to the wave's amplitude.
    scale_um, offset : float
        Convert the sum of the three to µm, with a mean of 0.
    y_range_um : tuple of float
        Depths at which a non-rigid motion has 0.25 and 1 times its full size.
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


def make_motion(kind: str, range_um: float, probe: Probe, duration_s: float, seed: int) -> Motion:
    """Draw a motion and scale it so that it spans `range_um` around a mean of 0 in this recording."""
    rng = generator(seed, "drift")
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
    unscaled = Motion(**shape, **jumps, scale_um=1.0, offset=0.0)  # type: ignore[arg-type]
    wave = unscaled._wave(np.arange(0.0, duration_s, 0.1))
    scale_um = range_um / max(float(np.ptp(wave)), 1e-9)
    return Motion(**shape, **jumps, scale_um=scale_um, offset=float(wave.mean()))  # type: ignore[arg-type]
