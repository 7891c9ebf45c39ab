"""Which units are good, and why others are not (section 7.3).

A good unit fires like one neuron, in more than a short part of the recording, and is not made of what an artifact or
mains hum leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling, covered

FEW_SPIKES = "few spikes"
NOT_REFRACTORY = "not refractory"
UNDECIDED = "too few spikes to tell if refractory"
LOCKED_TO_ARTIFACTS = "locked to artifacts"
LOCKED_TO_HUM = "locked to {:g} Hz"
BRIEF = "in less than a tenth of the recording"

MIN_SPIKES = 11  # of a good unit
LAG_MS, LAG_BIN_MS, LAG_WINDOW_MS, LOCKED_SHARE = 5.0, 0.1, 0.5, 0.5
"""Half of the spikes of a unit that is locked to artifacts are within 0.5 ms of one lag, up to 5 ms before artifacts
begin, or after they end."""
MIN_ARTIFACTS, MIN_PAUSE_MS = 10, 2.5  # half of the spikes are near one lag by chance in pauses of 1 ms
LINES_HZ, HUM_WINDOW_S, HUM_STRENGTH, HUM_SPIKES = (50.0, 60.0), 10.0, 0.8, 8
"""The vector strength of a unit that is locked to hum, in windows of 10 s with at least 8 spikes: the mains frequency
drifts over longer times."""
MOST_PERIODS = 60
"""A unit that is locked to a half, a third … or a 60th of the mains frequency follows stimuli whose rate divides it."""
N_PARTS, BRIEF_SHARE, MOST_SPIKES = 200, 0.1, 0.9
"""A unit is in a short part of the recording if 90 % of its spikes are within a tenth of the time that was sorted."""
CHUNK = 1 << 22  # spikes at a time


@dataclass(frozen=True, eq=False)
class Trains:
    """What labels follow from.

    Attributes
    ----------
    sample, unit, kept : ndarray, shape (n,)
        Times, ascending; units; and False for duplicates.
    refractory : ndarray of bool, shape (u,)
    contamination : ndarray, shape (u,)
        R of section 7.1.
    acg_threshold : float
        The setting; not all units with a smaller R are refractory.
    artifacts : ndarray of int64, shape (span, 2)
        In which no spikes were looked for.
    tiling : Tiling
    sampling_rate_hz : float
    """

    sample: NDArray[np.int64]
    unit: NDArray[np.int32]
    kept: NDArray[np.bool_]
    refractory: NDArray[np.bool_]
    contamination: NDArray[np.float64]
    acg_threshold: float
    artifacts: NDArray[np.int64]
    tiling: Tiling
    sampling_rate_hz: float

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.refractory)


def reasons(trains: Trains) -> tuple[str, ...]:
    """Why each unit is not good, or "" if it is: (u,)."""
    counts = np.zeros(trains.n_units, np.int64)
    artifacts = _Locking(trains.artifacts, trains.n_units, trains.sampling_rate_hz)
    hum = [_Phases(line_hz, trains.n_units, trains.sampling_rate_hz) for line_hz in LINES_HZ]
    parts = _Parts(trains)
    for sample, unit in _chunks(trains):
        counts += np.bincount(unit, minlength=trains.n_units)
        artifacts.add(sample, unit)
        for line in hum:
            line.add(sample, unit)
        parts.add(sample, unit)
    locked = _locked_to_hum(trains, hum)
    found = [""] * trains.n_units
    tests = [(FEW_SPIKES, counts < MIN_SPIKES), (LOCKED_TO_ARTIFACTS, artifacts.share() >= LOCKED_SHARE)]
    tests += [(LOCKED_TO_HUM.format(hz), of_hum) for hz, of_hum in zip(LINES_HZ, locked, strict=True)]
    by_chance = ~trains.refractory & (trains.contamination < trains.acg_threshold)
    tests += [(BRIEF, parts.share() < BRIEF_SHARE), (UNDECIDED, by_chance), (NOT_REFRACTORY, ~trains.refractory)]
    for reason, holds in tests:
        for number in np.flatnonzero(holds).tolist():
            found[number] = found[number] or reason
    return tuple(found)


def _chunks(trains: Trains) -> Iterable[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """Times and units of the spikes without duplicates, some at a time."""
    for start in range(0, len(trains.sample), CHUNK):
        part = slice(start, start + CHUNK)
        kept = trains.kept[part]
        if kept.any():
            yield trains.sample[part][kept], trains.unit[part][kept]


def _locked_to_hum(trains: Trains, hum: list[_Phases]) -> list[NDArray[np.bool_]]:
    """Which units are locked to each mains frequency: a second time through the spikes of those that seem to be."""
    found = [line.strength() >= HUM_STRENGTH for line in hum]
    for line, seems in zip(hum, found, strict=True):
        if not seems.any():
            continue
        slower = [
            _Phases(line.frequency_hz / periods, trains.n_units, trains.sampling_rate_hz)
            for periods in range(2, MOST_PERIODS + 1)
        ]
        for sample, unit in _chunks(trains):
            of_them = seems[unit]
            if of_them.any():
                for phases in slower:
                    phases.add(sample[of_them], unit[of_them])
        for phases in slower:
            seems &= phases.strength() < HUM_STRENGTH
    return found


class _Locking:
    """Lags of the spikes of each unit to the artifacts nearest to them."""

    def __init__(self, spans: NDArray[np.int64], n_units: int, sampling_rate_hz: float) -> None:
        self._spans, self._bin = spans, LAG_BIN_MS * sampling_rate_hz / 1000
        self._n_bins = round(LAG_MS / LAG_BIN_MS)
        self._counts = np.zeros((n_units, 2, self._n_bins), np.int64)  # (u, before or after, lag)
        self._total = np.zeros(n_units, np.int64)
        pauses = spans[1:, 0] - spans[:-1, 1]
        short = MIN_PAUSE_MS * sampling_rate_hz / 1000
        self._tested = len(spans) >= MIN_ARTIFACTS and float(np.median(pauses)) >= short

    def add(self, sample: NDArray[np.int64], unit: NDArray[np.int32]) -> None:
        """Add some spikes."""
        self._total += np.bincount(unit, minlength=len(self._total))
        if not self._tested:
            return
        following = np.searchsorted(self._spans[:, 0], sample, side="right")
        before = self._spans[np.minimum(following, len(self._spans) - 1), 0] - sample
        after = sample - self._spans[np.maximum(following - 1, 0), 1]
        for side, lag in enumerate((before, after)):
            number = np.floor(lag / self._bin).astype(np.int64)
            near = (number >= 0) & (number < self._n_bins)
            np.add.at(self._counts, (unit[near], side, number[near]), 1)

    def share(self) -> NDArray[np.float64]:
        """Largest share of the spikes of a unit that have nearly one lag: (u,)."""
        width = round(LAG_WINDOW_MS / LAG_BIN_MS)
        total = np.pad(np.cumsum(self._counts, axis=2), ((0, 0), (0, 0), (1, 0)))
        within = total[:, :, width:] - total[:, :, :-width]
        return np.asarray(within.max(axis=(1, 2)) / self._total.clip(1))


class _Phases:
    """Phases of the spikes of each unit in the periods of a frequency."""

    def __init__(self, frequency_hz: float, n_units: int, sampling_rate_hz: float) -> None:
        self.frequency_hz = frequency_hz
        self._rate, self._window = sampling_rate_hz, round(HUM_WINDOW_S * sampling_rate_hz)
        self._last = -1  # window whose sums are not complete
        self._sum, self._n = np.zeros(n_units, np.complex128), np.zeros(n_units, np.int64)
        self._length, self._counted = np.zeros(n_units), np.zeros(n_units, np.int64)

    def add(self, sample: NDArray[np.int64], unit: NDArray[np.int32]) -> None:
        """Add some spikes, at least one, which are not earlier than those before."""
        window = sample // self._window
        edges = np.flatnonzero(np.diff(window, prepend=window[0] - 1))
        for first, after in zip(edges, [*edges[1:], len(sample)], strict=True):
            if window[first] != self._last:
                self._complete()
                self._last = int(window[first])
            phase = 2 * np.pi * ((sample[first:after] * (self.frequency_hz / self._rate)) % 1.0)
            of = unit[first:after]
            self._n += np.bincount(of, minlength=len(self._n))
            self._sum += np.bincount(of, np.cos(phase), len(self._n)) + 1j * np.bincount(
                of, np.sin(phase), len(self._n)
            )

    def _complete(self) -> None:
        enough = self._n >= HUM_SPIKES
        self._length[enough] += np.abs(self._sum[enough])
        self._counted[enough] += self._n[enough]
        self._sum[:], self._n[:] = 0, 0

    def strength(self) -> NDArray[np.float64]:
        """Mean vector strength of each unit: (u,); 0 without spikes that count."""
        self._complete()
        return np.asarray(self._length / self._counted.clip(1))


class _Parts:
    """Numbers of spikes of each unit in equal parts of the recording."""

    def __init__(self, trains: Trains) -> None:
        tiling, spans = trains.tiling, trains.artifacts
        first, last = tiling.start, max(tiling.stop, tiling.start + N_PARTS)
        self._edges = np.linspace(first, last, N_PARTS + 1)
        self._live = np.diff(self._edges) - covered(self._edges, spans)
        self._counts = np.zeros((trains.n_units, N_PARTS), np.int64)

    def add(self, sample: NDArray[np.int64], unit: NDArray[np.int32]) -> None:
        """Add some spikes."""
        part = np.clip(np.searchsorted(self._edges, sample, side="right") - 1, 0, N_PARTS - 1)
        np.add.at(self._counts, (unit, part), 1)

    def share(self) -> NDArray[np.float64]:
        """Shortest share of the time sorted that contains most spikes of a unit: (u,)."""
        time = np.concatenate([[0.0], np.cumsum(self._live)]) / max(self._live.sum(), 1.0)
        share = np.ones(len(self._counts))
        for unit, counts in enumerate(self._counts):
            total = np.concatenate([[0], np.cumsum(counts)])
            wanted = total[:-1] + int(np.ceil(MOST_SPIKES * total[-1]))
            last = np.searchsorted(total, wanted)
            enough = wanted <= total[-1]
            if total[-1] and enough.any():
                share[unit] = (time[last[enough]] - time[:-1][enough]).min()
        return share
