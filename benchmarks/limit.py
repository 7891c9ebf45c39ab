"""How well could a recording be sorted at best? An ideal detector that knows the true spikes' waveforms.

    python benchmarks/limit.py static-1.bin hybrid-2.bin --cache limits [--per-unit]

For every unit, its mean waveform in the traces that ks4stream whitens is known, where the tissue is at that moment,
and all other units' spikes are subtracted from the traces. What remains (the unit's own spikes, noise, and the distant
units that the truth does not list) passes through the unit's matched filter; the filter's local maxima within ±0.4 ms
above the best threshold are the spikes found. A unit's accuracy is TP / (TP + FN + FP), as in ``ks4stream.scoring``.

The recording is divided into segments of two seconds. A unit's waveform in a segment is the mean over its spikes in
other segments, namely those within 15 s in which the tissue was within 2 µm of where it is, and beyond these the
nearest ones, until there are fifty spikes. The segment itself is left out: a mean that contains the noise of the spike
that it shall detect would detect it too well. The means of all units are found together, in a few rounds: each is
the mean of what remains when the others' spikes are subtracted.

Results are kept in the folder of ``--cache`` under the digest of the recording, probe and truth; ``--fresh`` computes
them again, for instance after a change of ks4stream's preprocessing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import outcome
import quick
from numpy.typing import NDArray
from scipy import fft, sparse
from scipy.ndimage import maximum_filter1d

from ks4stream import Recording, preprocess
from ks4stream.scoring import WELL_DETECTED_SCORE

VERSION = 1  # of the results kept

BEFORE, AFTER = 20, 40  # samples of a waveform before and after the spike
SEGMENT_S = 2.0
NEAR_S, NEAR_UM = 15.0, 2.0
MIN_SPIKES = 50
ROUNDS = 3
RANK = 4  # temporal components of a waveform; the rest of a mean over few spikes is noise
REACH_UM = 150.0  # channels farther from the unit are not used, for the same reason
TOLERANCE_MS = 0.4
LEAST = 0.2  # smaller maxima, relative to the filter's response to the mean waveform, are no candidates

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Limit:
    """What an ideal detector achieves on one recording; one entry per true unit."""

    accuracy: list[float]
    score: list[float]  # norm of the unit's waveform in whitened traces: its response in standard deviations of noise
    n_spikes: list[int]

    @property
    def summary(self) -> dict[str, float | int]:
        """Mean accuracy, and counts of units found; the names are those of :class:`ks4stream.scoring.Score`."""
        accuracy = np.array(self.accuracy)
        return {
            "n_truth": len(accuracy),
            "mean_accuracy": float(accuracy.mean()) if len(accuracy) else 0.0,
            "n_well_detected": int((accuracy >= WELL_DETECTED_SCORE).sum()),
            "n_very_well_detected": int((accuracy >= quick.VERY_WELL_DETECTED_SCORE).sum()),
        }

    def __str__(self) -> str:
        found = self.summary
        return (
            f"acc {found['mean_accuracy']:.3f}  ≥.8 {found['n_well_detected']:2d}  "
            f"≥.95 {found['n_very_well_detected']:2d} of {found['n_truth']:2d}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="+", type=Path, help="NAME.bin, beside its probe and its truth")
    parser.add_argument("--cache", type=Path, help="folder where results are kept and found")
    parser.add_argument("--fresh", action="store_true", help="compute again what is kept")
    parser.add_argument("--per-unit", action="store_true", help="also print a line for each true unit")
    options = parser.parse_args(arguments)
    for given in options.recordings:
        binary = quick.as_binary(given)
        began = time.perf_counter()
        limit = limit_of(binary, options.cache, fresh=options.fresh)
        print(f"{binary.stem:24s} {limit}  {time.perf_counter() - began:6.1f} s", flush=True)
        if options.per_unit:
            for unit, row in enumerate(zip(limit.accuracy, limit.score, limit.n_spikes, strict=True)):
                print("  unit {:3d}  accuracy {:.3f}  score {:5.1f}  spikes {:5d}".format(unit, *row))


def limit_of(binary: Path, cache: Path | None = None, *, fresh: bool = False) -> Limit:
    """Return the limit of a recording, from the cache if it is there."""
    truth = quick.read_truth(binary)
    kept = cache / f"{_digest(binary, truth)}.json" if cache else None
    if kept and kept.exists() and not fresh:
        return Limit(**json.loads(kept.read_text()))
    limit = compute(quick.opened(binary, truth), truth)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({**limit.__dict__}))
    return limit


def _digest(binary: Path, truth: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{VERSION} {outcome.file_digest(binary)}".encode())
    digest.update(binary.with_suffix(".probe.json").read_bytes())
    for name in ("spike_samples", "spike_units", "bad_channels", "drift_um"):
        digest.update(np.ascontiguousarray(truth[name]).tobytes())
    return digest.hexdigest()[:32]


def compute(recording: Recording, truth: dict[str, np.ndarray]) -> Limit:
    """Compute the limit of a recording with a probe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = preprocess(recording, client="loop").data
        traces = np.empty(lazy.shape, np.float32)
        for rows, block in zip(_rows(lazy.chunks[0]), lazy.blocks, strict=True):  # two copies of all would be too much
            traces[rows] = block.compute(scheduler="synchronous")
    return detect(traces, recording.probe.positions_um, truth)


def _rows(lengths: Sequence[int]) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def detect(traces: Floats, position_um: NDArray[np.float64], truth: dict[str, np.ndarray]) -> Limit:
    """Compute the limit in whitened traces (time, channel) with channels at `position_um` (channel, 2)."""
    scene = _Scene.of(traces, position_um, truth)
    waveforms = np.zeros((scene.n_segments, scene.n_units, BEFORE + AFTER + 1, traces.shape[1]), np.float32)
    for _ in range(ROUNDS):
        waveforms = scene.means(scene.cleaned_sums(waveforms))
    parts = [scene.maxima(segment, waveforms[segment], waveforms) for segment in range(scene.n_segments)]
    value, unit, is_true = (np.concatenate(column) for column in zip(*parts, strict=True))
    n_spikes = np.bincount(scene.unit, minlength=scene.n_units)
    accuracy = [_best_accuracy(value[unit == u], is_true[unit == u], int(n_spikes[u])) for u in range(scene.n_units)]
    norm = np.sqrt(np.einsum("sulc,sulc->su", waveforms, waveforms))
    return Limit(accuracy, np.median(norm, axis=0).astype(float).tolist(), n_spikes.tolist())


def _best_accuracy(value: NDArray[np.float64], is_true: NDArray[np.bool_], n_spikes: int) -> float:
    """Accuracy at the best threshold, given the maxima and which of them are at true spikes."""
    if not n_spikes or not len(value):
        return 0.0
    ordered = is_true[np.argsort(-value, kind="stable")]
    n_right = np.cumsum(ordered)
    n_wrong = np.arange(1, len(ordered) + 1) - n_right
    return float((n_right / (n_spikes + n_wrong)).max())


@dataclass(frozen=True, eq=False)
class _Scene:
    """Whitened traces, the true spikes, and which segments are alike."""

    traces: Floats  # (time, channel)
    sample: Ints  # (spike,)
    unit: Ints  # (spike,)
    n_units: int
    length: int  # of a segment, in samples
    n_segments: int
    weight: Floats  # (unit, segment, segment): 1 where the second segment's spikes are used in the first
    used: NDArray[np.bool_]  # (segment, unit, channel)
    tolerance: int

    @classmethod
    def of(cls, traces: Floats, position_um: NDArray[np.float64], truth: dict[str, np.ndarray]) -> _Scene:
        rate_hz = float(truth["sampling_rate_hz"])
        order = np.argsort(truth["spike_samples"], kind="stable")
        sample, unit = truth["spike_samples"][order].astype(np.int64), truth["spike_units"][order].astype(np.int64)
        inside = (sample >= BEFORE) & (sample < len(traces) - AFTER)  # the waveforms of others are cut off
        n_units, length = len(truth["unit_x_um"]), round(SEGMENT_S * rate_hz)
        n_segments = max(len(traces) // length, 1)  # what is left over belongs to the last
        time_s = (np.arange(n_segments) + 0.5) * length / rate_hz
        moved_um = _displacement_um(truth, time_s)  # (segment, unit)
        count = np.zeros((n_segments, n_units), dtype=np.int64)
        np.add.at(count, (np.minimum(sample // length, n_segments - 1), unit), 1)
        weight = np.stack([_alike(time_s, moved_um[:, u], count[:, u]) for u in range(n_units)])
        dx_um = position_um[:, 0] - truth["unit_x_um"][:, None]
        dy_um = position_um[:, 1] - (truth["unit_y_um"] + moved_um)[..., None]
        return cls(
            traces=traces,
            sample=sample[inside],
            unit=unit[inside],
            n_units=n_units,
            length=length,
            n_segments=n_segments,
            weight=weight,
            used=np.hypot(dx_um, dy_um) <= REACH_UM,
            tolerance=int(TOLERANCE_MS * rate_hz / 1000 + 1e-6),
        )

    def segment_of(self, sample: Ints) -> Ints:
        return np.minimum(sample // self.length, self.n_segments - 1)

    def span(self, segment: int) -> tuple[int, int]:
        """First sample of a segment, and the one after its last."""
        last = segment == self.n_segments - 1
        return segment * self.length, len(self.traces) if last else (segment + 1) * self.length

    def spikes_within(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Samples and units of the spikes with start ≤ sample < stop."""
        span = slice(*np.searchsorted(self.sample, [start, stop]))
        return self.sample[span], self.unit[span]

    def remainder(self, segment: int, waveforms: Floats, margin: int) -> tuple[Floats, int]:
        """Traces of a segment and its margins without any spikes, (time, channel), and their first sample."""
        start, stop = self.span(segment)
        first, last = max(start - margin, 0), min(stop + margin, len(self.traces))
        rest = self.traces[first:last].copy()
        sample, unit = self.spikes_within(first - AFTER, last + BEFORE)
        where = self.segment_of(sample)
        for near in np.unique(where):
            chosen = where == near
            design = self._design(sample[chosen] - first, unit[chosen], last - first)
            rest -= design @ waveforms[near].reshape(-1, rest.shape[1])
        return rest, first

    def _design(self, sample: Ints, unit: Ints, n_samples: int) -> sparse.csr_array:
        """Matrix (time, unit · waveform sample) that places waveforms at spikes; what lies outside is left out."""
        n_lags = BEFORE + AFTER + 1
        row = sample[:, None] - BEFORE + np.arange(n_lags)
        column = unit[:, None] * n_lags + np.arange(n_lags)
        inside = (row >= 0) & (row < n_samples)
        entries = (np.ones(int(inside.sum()), np.float32), (row[inside], column[inside]))
        return sparse.csr_array(entries, shape=(n_samples, self.n_units * n_lags))

    def cleaned_sums(self, waveforms: Floats) -> tuple[Floats, Ints]:
        """Sums of each unit's spikes, the others' being subtracted, by segment, and their numbers."""
        sums, count = np.zeros_like(waveforms), np.zeros(waveforms.shape[:2], dtype=np.int64)
        for segment in range(self.n_segments):
            rest, first = self.remainder(segment, waveforms, BEFORE + AFTER)
            sample, unit = self.spikes_within(*self.span(segment))
            count[segment] = np.bincount(unit, minlength=self.n_units)
            design = self._design(sample - first, unit, len(rest))
            sums[segment] = (design.T @ rest).reshape(sums[segment].shape)
            sums[segment] += count[segment][:, None, None] * waveforms[segment]
        return sums, count

    def means(self, of_segments: tuple[Floats, Ints]) -> Floats:
        """Waveforms (segment, unit, time, channel): means over the spikes of like segments, smoothed."""
        sums, count = of_segments
        means = np.zeros_like(sums)
        for unit in range(self.n_units):
            n = np.maximum(self.weight[unit] @ count[:, unit].astype(np.float32), 1)
            flat = self.weight[unit] @ sums[:, unit].reshape(len(sums), -1)
            means[:, unit] = (flat / n[:, None]).reshape(sums[:, unit].shape)
        means *= self.used[:, :, None, :]
        return _of_low_rank(means)

    def maxima(
        self, segment: int, own: Floats, waveforms: Floats
    ) -> tuple[NDArray[np.float64], Ints, NDArray[np.bool_]]:
        """Local maxima of each unit's filter in a segment: log likelihood ratio, unit, and whether at a true spike."""
        start, stop = self.span(segment)
        rest, first = self.remainder(segment, waveforms, BEFORE + AFTER + self.tolerance)
        response = _filtered(rest, own)  # (unit, time): the filter's output for a spike at this sample
        energy = np.einsum("ulc,ulc->u", own, own)
        values, units, is_true = [], [], []
        sample, unit = self.spikes_within(first, first + len(rest))
        for u in np.flatnonzero(energy > 0):
            mine = sample[unit == u]
            overlap = _autocorrelation(own[u])  # the unit's own spikes are still in the traces
            output = response[u]
            reach = len(overlap) // 2
            at = mine[:, None] - first + np.arange(-reach, reach + 1)
            inside = (at >= 0) & (at < len(rest))
            np.add.at(output, at[inside], np.broadcast_to(overlap, at.shape)[inside])
            peaks = maximum_filter1d(output, 2 * self.tolerance + 1, mode="nearest")
            chosen = np.flatnonzero((output == peaks) & (output > LEAST * energy[u]))
            chosen = chosen[(chosen + first >= start) & (chosen + first < stop)]
            found = output[chosen].astype(float)
            right = _nearest_true(chosen + first, found, mine, self.tolerance)
            values.append(found - 0.5 * float(energy[u]))
            units.append(np.full(len(chosen), u))
            is_true.append(right)
        if not values:
            return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool)
        return np.concatenate(values), np.concatenate(units), np.concatenate(is_true)


def _displacement_um(truth: dict[str, np.ndarray], time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each unit is from its mean position, (time, unit)."""
    at, depth_um, drift_um = truth["drift_time_s"], truth["drift_y_um"], truth["drift_um"]
    by_depth = np.stack([np.interp(time_s, at, course) for course in drift_um.T], axis=1)
    return np.stack([np.interp(truth["unit_y_um"], depth_um, row) for row in by_depth])


def _alike(time_s: NDArray[np.float64], moved_um: NDArray[np.float64], count: Ints) -> Floats:
    """Which other segments (second axis) a unit's mean waveform in a segment (first axis) is made of."""
    cost = np.maximum(np.abs(time_s[:, None] - time_s) / NEAR_S, np.abs(moved_um[:, None] - moved_um) / NEAR_UM)
    np.fill_diagonal(cost, np.inf)
    order = np.argsort(cost, axis=1, kind="stable")
    n_before = np.cumsum(count[order], axis=1) - count[order]
    taken = (np.take_along_axis(cost, order, axis=1) <= 1) | (n_before < MIN_SPIKES)
    taken &= np.isfinite(np.take_along_axis(cost, order, axis=1))
    weight = np.zeros(cost.shape, np.float32)
    np.put_along_axis(weight, order, taken.astype(np.float32), axis=1)
    return weight


def _of_low_rank(waveforms: Floats) -> Floats:
    """The first temporal components of each waveform."""
    if min(waveforms.shape[2:]) <= RANK:
        return waveforms
    _, vectors = np.linalg.eigh(waveforms @ waveforms.swapaxes(2, 3))  # (…, time, component), the largest last
    leading = vectors[..., -RANK:]
    return leading @ (leading.swapaxes(2, 3) @ waveforms)


def _filtered(rest: Floats, waveforms: Floats) -> Floats:
    """Correlate traces (time, channel) with waveforms (unit, time, channel): output (unit, time) at the spike."""
    n_samples, (n_units, n_lags, _) = len(rest), waveforms.shape
    left, size, right = np.linalg.svd(waveforms, full_matrices=False)
    rank = min(RANK, size.shape[1])
    in_time = (left[..., :rank] * size[:, None, :rank]).swapaxes(1, 2)  # (unit, component, time)
    length = fft.next_fast_len(n_samples + n_lags, real=True)
    output = np.empty((n_units, n_samples), np.float32)
    for u in range(n_units):
        projected = fft.rfft(rest @ right[u, :rank].T, length, axis=0)  # (frequency, component)
        kernel = fft.rfft(in_time[u], length, axis=1).conj()
        course = fft.irfft((projected.T * kernel).sum(axis=0), length)
        output[u] = np.roll(course, BEFORE)[:n_samples]
    return output


def _autocorrelation(waveform: Floats) -> Floats:
    """Response of a unit's filter to its waveform, at lags − (n − 1) … n − 1."""
    n_lags = len(waveform)
    spectrum = fft.rfft(waveform, 2 * n_lags, axis=0)
    full = fft.irfft((np.abs(spectrum) ** 2).sum(axis=1), 2 * n_lags)
    return np.concatenate([full[n_lags + 1 :], full[:n_lags]]).astype(np.float32)


def _nearest_true(at: Ints, value: NDArray[np.float64], spikes: Ints, tolerance: int) -> NDArray[np.bool_]:
    """Which maxima are true spikes; of several within the tolerance of one spike, only the largest."""
    right = np.zeros(len(at), dtype=bool)
    begin, end = np.searchsorted(at, spikes - tolerance), np.searchsorted(at, spikes + tolerance, side="right")
    for first, last in zip(begin, end, strict=True):
        free = first + np.flatnonzero(~right[first:last])
        if len(free):
            right[free[np.argmax(value[free])]] = True
    return right


if __name__ == "__main__":
    main()
