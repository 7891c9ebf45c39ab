"""Small recordings, each about one question: is this one unit or two?

A few sites on twelve contacts, 80 µm apart, in the noise and background of :func:`ks4stream.simulate.simulate`:

- ``bursts85``, ``bursts70``: one unit per site that fires in bursts of 2 to 6 spikes, 4 ms apart, each .85 or .7 of the
  one before. Further variation of the amplitudes: none, 5 % and 10 %, by site.
- ``fading50``, ``fading25``: one unit per site, whose amplitude falls to a half or a quarter during the recording.
- ``pairs85``, ``pairs70``, ``pairs50``: two units per site, which fire independently, one .85, .7 or .5 of the other:
  cells of different kind, 10 µm apart; cells of the same kind, 15 µm apart; cells of different kind in one place.
- ``complementary_still``: two such units per site, of which one fires in the first half and the other in the second.
- ``complementary_drift``: the same in turns of 10 s, in tissue that moves by 20 µm: both are seen at all
  displacements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ks4stream.probe import Probe
from ks4stream.simulate import SimulatedRecording, simulate, staggered_probe
from ks4stream.simulate.api import from_scene
from ks4stream.simulate.trains import in_time_order
from ks4stream.simulate.units import Unit, draw_units, scaled_to_amplitude

FloatArray = NDArray[np.float64]
Train = tuple[FloatArray, FloatArray]
"""Times in s, and amplitudes relative to the unit's."""

RATE_HZ = 30_000.0
N_SITES, N_CHANNELS = 3, 12
MARGIN_S = 0.003


def bursts(seed: int, duration_s: float, fall: float) -> SimulatedRecording:
    """Bursts in which each spike is `fall` of the one before."""
    rng = np.random.default_rng((seed, 1))
    units = _units_at_sites(seed, (180.0, 300.0))
    trains = [_burst_train(rng, duration_s, fall, spread) for spread in (0.0, 0.05, 0.1)]
    return _recording(units, trains, seed, duration_s)


def fading(seed: int, duration_s: float, last: float) -> SimulatedRecording:
    """Units whose amplitude falls to `last`, in a straight line."""
    rng = np.random.default_rng((seed, 2))
    trains = []
    for _ in range(N_SITES):
        time_s, relative = _independent_train(rng, duration_s)
        trains.append((time_s, relative * (1 + (last - 1) * time_s / duration_s)))
    return _recording(_units_at_sites(seed, (120.0, 250.0)), trains, seed, duration_s)


def pairs(seed: int, duration_s: float, ratio: float) -> SimulatedRecording:
    """Two units per site, one `ratio` of the other, that fire independently."""
    rng = np.random.default_rng((seed, 3))
    units = _units_in_pairs(seed, ratio)
    return _recording(units, [_independent_train(rng, duration_s) for _ in units[1]], seed, duration_s)


def complementary(seed: int, duration_s: float, period_s: float, drift: str = "none") -> SimulatedRecording:
    """Two units per site that take turns of `period_s`."""
    rng = np.random.default_rng((seed, 4))
    units, trains = _units_in_pairs(seed, 0.85), []
    for index in range(len(units[1])):
        time_s, relative = _independent_train(rng, duration_s, rate_hz=10.0)
        is_its_turn = (time_s // period_s) % 2 == index % 2
        trains.append((time_s[is_its_turn], relative[is_its_turn]))
    return _recording(units, trains, seed, duration_s, drift)


def bursts85(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Bursts in which each spike is .85 of the one before."""
    return bursts(seed, duration_s, 0.85)


def bursts70(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Bursts in which each spike is .7 of the one before."""
    return bursts(seed, duration_s, 0.7)


def fading50(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Units whose amplitude falls to a half."""
    return fading(seed, duration_s, 0.5)


def fading25(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Units whose amplitude falls to a quarter."""
    return fading(seed, duration_s, 0.25)


def pairs85(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pairs of units with an amplitude ratio of .85."""
    return pairs(seed, duration_s, 0.85)


def pairs70(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pairs of units with an amplitude ratio of .7."""
    return pairs(seed, duration_s, 0.7)


def pairs50(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pairs of units with an amplitude ratio of .5."""
    return pairs(seed, duration_s, 0.5)


def complementary_still(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pairs of which one fires in the first half and the other in the second."""
    return complementary(seed, duration_s, duration_s / 2)


def complementary_drift(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pairs that take turns of 10 s in moving tissue."""
    return complementary(seed, duration_s, 10.0, drift="rigid")


SPECIAL: dict[str, Callable[..., SimulatedRecording]] = {
    scenario.__name__: scenario
    for scenario in (
        bursts85,
        bursts70,
        fading50,
        fading25,
        pairs85,
        pairs70,
        pairs50,
        complementary_still,
        complementary_drift,
    )
}


# --- units ----------------------------------------------------------------------------------------------------


def _draw(seed: int, n_units: int, amplitude_range_uv: tuple[float, float]) -> tuple[Probe, list[Unit], FloatArray]:
    probe = staggered_probe(N_CHANNELS)
    units, amplitudes_uv = draw_units(
        probe,
        np.ones(N_CHANNELS, dtype=bool),
        seed=seed,
        n_units=n_units,
        amplitude_range_uv=amplitude_range_uv,
        rate_range_hz=(5.0, 5.0),
    )
    return probe, units, amplitudes_uv


def _placed(unit: Unit, probe: Probe, y_um: float, amplitude_uv: float) -> Unit:
    moved = replace(unit, x_um=float(probe.x_um.mean()), y_um=y_um)
    return scaled_to_amplitude(moved, probe, np.ones(probe.n_channels, dtype=bool), amplitude_uv)


def _site_y_um(probe: Probe) -> FloatArray:
    middle = (probe.y_um.min() + probe.y_um.max()) / 2
    return middle + 80.0 * (np.arange(N_SITES) - (N_SITES - 1) / 2)


Units = tuple[Probe, list[Unit], FloatArray]


def _units_at_sites(seed: int, amplitude_range_uv: tuple[float, float]) -> Units:
    probe, units, amplitudes_uv = _draw(seed, N_SITES, amplitude_range_uv)
    sites = zip(units, _site_y_um(probe), amplitudes_uv, strict=True)
    return probe, [_placed(unit, probe, y_um, amplitude_uv) for unit, y_um, amplitude_uv in sites], amplitudes_uv


def _units_in_pairs(seed: int, ratio: float) -> Units:
    probe, drawn, amplitudes_uv = _draw(seed, 2 * N_SITES, (140.0, 250.0))
    units, sizes_uv = [], []
    # Cells of the same kind at the second site: the second has the first one's waveform and field.
    for site, (apart_um, is_same_kind) in enumerate(((10.0, False), (15.0, True), (0.0, False))):
        first, second = drawn[2 * site], drawn[2 * site if is_same_kind else 2 * site + 1]
        y_um, size_uv = float(_site_y_um(probe)[site]), float(amplitudes_uv[2 * site])
        units.append(_placed(first, probe, y_um - apart_um / 2, size_uv))
        units.append(_placed(second, probe, y_um + apart_um / 2, ratio * size_uv))
        sizes_uv += [size_uv, ratio * size_uv]
    return probe, units, np.array(sizes_uv)


# --- trains ---------------------------------------------------------------------------------------------------


def _independent_train(rng: np.random.Generator, duration_s: float, rate_hz: float = 6.0) -> Train:
    """A refractory period of 3 ms and exponential pauses; amplitudes vary by 5 %."""
    n_intervals = int(rate_hz * duration_s * 1.5 + 50)
    time_s = MARGIN_S + np.cumsum(0.003 + rng.exponential(1 / rate_hz - 0.003, n_intervals))
    time_s = time_s[time_s < duration_s - MARGIN_S]
    return time_s, 1 + 0.05 * rng.standard_normal(len(time_s))


def _burst_train(rng: np.random.Generator, duration_s: float, fall: float, spread: float) -> Train:
    """About two bursts per second."""
    n_bursts = int(4 * duration_s + 20)
    length = rng.integers(2, 7, n_bursts)
    burst = np.repeat(np.arange(n_bursts), length)
    place = np.arange(len(burst)) - np.searchsorted(burst, burst)
    pauses_s = 0.1 + rng.exponential(0.4, len(burst))
    time_s = MARGIN_S + np.cumsum(np.where(place == 0, pauses_s, 0.004 * rng.uniform(0.9, 1.1, len(burst))))
    relative = fall**place * np.maximum(1 + spread * rng.standard_normal(len(burst)), 0.1)
    kept = time_s < duration_s - MARGIN_S
    return time_s[kept], relative[kept]


def _recording(
    of_probe: Units, trains: Sequence[Train], seed: int, duration_s: float, drift: str = "none"
) -> SimulatedRecording:
    probe, units, amplitudes_uv = of_probe
    scene = simulate(probe, duration_s, seed=seed, n_units=0, drift=drift, drift_range_um=20.0).scene
    spikes = in_time_order(
        np.concatenate([time_s for time_s, _ in trains]) * RATE_HZ,
        np.repeat(np.arange(len(trains)), [len(time_s) for time_s, _ in trains]),
        np.concatenate([relative for _, relative in trains]),
    )
    scene = replace(scene, units=(*units, *scene.units), n_units=len(units), spikes=spikes)
    return from_scene(scene, amplitudes_uv)
