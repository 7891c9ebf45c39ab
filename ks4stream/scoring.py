"""Compare a sorting with known spikes.

:func:`score` compares a sorting with the ground truth as SpikeInterface's ``compare_sorter_to_ground_truth`` does
(same agreement, same assignment, same classes of units), in time proportional to the number of spikes. For a
sorter that works in tiles, it also measures whether more spikes are missed near the edges of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from ks4stream.errors import SettingsError

__all__ = ["EdgeRates", "Score", "count_matches", "newcombe_interval", "score", "wilson_interval"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# SpikeInterface's defaults (0.105), so that the classes of units are the same.
TOLERANCE_MS = 0.4  # its delta_time
MATCH_SCORE = 0.5
CHANCE_SCORE = 0.1
WELL_DETECTED_SCORE = 0.8
REDUNDANT_SCORE = 0.2
OVERMERGED_SCORE = 0.2

_Z_95 = 1.959963984540054
_SPIKES_AT_ONCE = 1 << 18  # of each side, for which a pairing takes some 100 MB


# --- intervals of rates -------------------------------------------------------------------------------------


def wilson_interval(n_events: int, n_trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion; (0, 1) without trials.

    >>> low, high = wilson_interval(5, 10)
    >>> f"{low:.3f} {high:.3f}"
    '0.237 0.763'
    """
    if n_trials == 0:
        return 0.0, 1.0
    rate, spread = n_events / n_trials, _Z_95**2 / n_trials
    centre = (rate + spread / 2) / (1 + spread)
    half = np.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def newcombe_interval(n_events_1: int, n_trials_1: int, n_events_2: int, n_trials_2: int) -> tuple[float, float]:
    """Return Newcombe's 95 % interval of the difference of two proportions, first minus second.

    >>> low, high = newcombe_interval(56, 70, 48, 80)
    >>> f"{low:.4f} {high:.4f}"
    '0.0524 0.3339'
    """
    low_1, high_1 = wilson_interval(n_events_1, n_trials_1)
    low_2, high_2 = wilson_interval(n_events_2, n_trials_2)
    rate_1 = n_events_1 / n_trials_1 if n_trials_1 else 0.5
    rate_2 = n_events_2 / n_trials_2 if n_trials_2 else 0.5
    difference = rate_1 - rate_2
    down = np.hypot(rate_1 - low_1, high_2 - rate_2)
    up = np.hypot(high_1 - rate_1, rate_2 - low_2)
    return float(difference - down), float(difference + up)


@dataclass(frozen=True)
class EdgeRates:
    """Numbers of wrong spikes near the edges of tiles, and elsewhere.

    Attributes
    ----------
    n_near, n_wrong_near, n_far, n_wrong_far : int
        Spikes, and wrong spikes (missed, or extra) among them, within the halo of an edge and elsewhere.
    """

    n_near: int
    n_wrong_near: int
    n_far: int
    n_wrong_far: int

    @property
    def rate_near(self) -> float:
        """Fraction wrong near edges (NaN without spikes)."""
        return self.n_wrong_near / self.n_near if self.n_near else float("nan")

    @property
    def rate_far(self) -> float:
        """Fraction wrong elsewhere (NaN without spikes)."""
        return self.n_wrong_far / self.n_far if self.n_far else float("nan")

    @property
    def near_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `rate_near`."""
        return wilson_interval(self.n_wrong_near, self.n_near)

    @property
    def far_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `rate_far`."""
        return wilson_interval(self.n_wrong_far, self.n_far)

    @property
    def difference_interval(self) -> tuple[float, float]:
        """95 % Newcombe interval of `rate_near` − `rate_far`."""
        return newcombe_interval(self.n_wrong_near, self.n_near, self.n_wrong_far, self.n_far)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.difference_interval)
        return (
            f"{self.n_wrong_near} of {self.n_near} near edges ({100 * self.rate_near:.2f} %), "
            f"{self.n_wrong_far} of {self.n_far} elsewhere ({100 * self.rate_far:.2f} %), "
            f"difference {low:+.2f} to {high:+.2f} percentage points"
        )


# --- the score ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Score:
    """Comparison of a sorting with the ground truth. Axes: `truth` for true units, `sorted` for sorted units.

    Attributes
    ----------
    truth_ids, sorted_ids : ndarray of int64, shape (truth,), (sorted,)
        Labels of the units, ascending.
    n_truth_spikes, n_sorted_spikes : ndarray of int64, shape (truth,), (sorted,)
        Spikes per unit.
    n_matched : ndarray of int64, shape (truth, sorted)
        Number of spikes of the two units that pair one to one within the tolerance.
    agreement : ndarray of float64, shape (truth, sorted)
        Matched / (true + sorted − matched).
    matched_index : ndarray of int64, shape (truth,)
        Row of `sorted_ids` assigned to each true unit; −1 if there is none (agreement < 0.5).
    misses, extras : EdgeRates or None
        Missed spikes of the matched true units, and extra spikes of the matched sorted units, near tile edges
        and elsewhere; None if no edges were given.
    """

    truth_ids: IntArray
    sorted_ids: IntArray
    n_truth_spikes: IntArray
    n_sorted_spikes: IntArray
    n_matched: IntArray
    agreement: FloatArray
    matched_index: IntArray
    misses: EdgeRates | None = None
    extras: EdgeRates | None = None

    @property
    def is_matched(self) -> BoolArray:
        """Whether each true unit is matched to a sorted unit, shape (truth,)."""
        return self.matched_index >= 0

    @property
    def matched_unit(self) -> FloatArray:
        """Label of the sorted unit matched to each true unit, NaN if there is none, shape (truth,)."""
        labels = np.append(self.sorted_ids.astype(float), np.nan)
        return labels[self.matched_index]

    @property
    def n_found(self) -> IntArray:
        """True positives per true unit, shape (truth,)."""
        n_found = np.zeros(len(self.truth_ids), dtype=np.int64)
        rows = np.flatnonzero(self.is_matched)
        n_found[rows] = self.n_matched[rows, self.matched_index[rows]]
        return n_found

    @property
    def accuracy(self) -> FloatArray:
        """Agreement with the matched unit, 0 if there is none, shape (truth,)."""
        accuracy = np.zeros(len(self.truth_ids))
        rows = np.flatnonzero(self.is_matched)
        accuracy[rows] = self.agreement[rows, self.matched_index[rows]]
        return accuracy

    @property
    def recall(self) -> FloatArray:
        """Found / true spikes, 0 without a matched unit, shape (truth,)."""
        recall: FloatArray = self.n_found / np.maximum(self.n_truth_spikes, 1)
        return recall

    @property
    def precision(self) -> FloatArray:
        """Found / spikes of the matched unit, 0 if there is none, shape (truth,)."""
        n_sorted = np.append(self.n_sorted_spikes, 0)[self.matched_index]
        precision: FloatArray = self.n_found / np.maximum(n_sorted, 1)
        return precision

    @property
    def best_agreement(self) -> FloatArray:
        """Largest agreement of each true unit with any sorted unit, shape (truth,)."""
        best: FloatArray = self.agreement.max(axis=1, initial=0.0)
        return best

    @property
    def best_unit(self) -> FloatArray:
        """Label of the sorted unit with the largest agreement, NaN if all are below 0.1, shape (truth,)."""
        return _best_labels(self.agreement, self.sorted_ids)

    @property
    def is_well_detected(self) -> BoolArray:
        """Accuracy ≥ 0.8, shape (truth,)."""
        return self.accuracy >= WELL_DETECTED_SCORE

    @property
    def unmatched_units(self) -> IntArray:
        """Labels of sorted units that are not matched to a true unit (SpikeInterface's "bad")."""
        return np.delete(self.sorted_ids, self.matched_index[self.is_matched])

    @property
    def false_positive_units(self) -> IntArray:
        """Labels of unmatched sorted units whose best agreement with any true unit is below 0.2."""
        best = self.agreement.max(axis=0, initial=0.0)
        return self._unmatched_where(best < REDUNDANT_SCORE)

    @property
    def redundant_units(self) -> IntArray:
        """Labels of unmatched sorted units that agree (≥ 0.2) with a true unit that another one fits better."""
        if not self.agreement.size:
            return np.zeros(0, dtype=np.int64)
        best_truth = self.agreement.argmax(axis=0)
        is_fitted_better = self.agreement.argmax(axis=1)[best_truth] != np.arange(len(self.sorted_ids))
        return self._unmatched_where(is_fitted_better & (self.agreement.max(axis=0) >= REDUNDANT_SCORE))

    @property
    def overmerged_units(self) -> IntArray:
        """Labels of sorted units, matched or not, that agree (> 0.2) with more than one true unit."""
        n_true: IntArray = (self.agreement > OVERMERGED_SCORE).sum(axis=0)
        return self.sorted_ids[n_true > 1]

    def _unmatched_where(self, condition: BoolArray) -> IntArray:
        chosen = self.sorted_ids[condition]
        return chosen[np.isin(chosen, self.unmatched_units)]

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over all true units, counting unmatched ones as 0."""
        return _mean(self.accuracy)

    @property
    def summary(self) -> dict[str, float | int]:
        """Summary of the whole sorting: counts of units, and means over the true units."""
        return {
            "n_truth": len(self.truth_ids),
            "n_sorted": len(self.sorted_ids),
            "n_matched": int(self.is_matched.sum()),
            "n_well_detected": int(self.is_well_detected.sum()),
            "n_false_positive": len(self.false_positive_units),
            "n_redundant": len(self.redundant_units),
            "n_overmerged": len(self.overmerged_units),
            "n_unmatched": len(self.unmatched_units),
            "mean_accuracy": self.mean_accuracy,
            "mean_recall": _mean(self.recall),
            "mean_precision": _mean(self.precision),
        }

    def table(self, **columns: Sequence[float] | NDArray[Any]) -> str:
        """Return one line per true unit, in order of falling accuracy, and a summary, as plain text.

        Parameters
        ----------
        **columns : sequence of float, shape (truth,)
            Additional columns, for instance ``amplitude_uv=…``; shown in the order given.
        """
        extra = {name.replace("_", " "): [f"{value:.1f}" for value in values] for name, values in columns.items()}
        cells: dict[str, list[str]] = {
            "unit": [str(label) for label in self.truth_ids],
            **extra,
            "spikes": [str(count) for count in self.n_truth_spikes],
            "sorted as": ["–" if np.isnan(label) else f"{label:.0f}" for label in self.matched_unit],
            "accuracy": [f"{value:.3f}" for value in self.accuracy],
            "recall": [f"{value:.3f}" for value in self.recall],
            "precision": [f"{value:.3f}" for value in self.precision],
            "": ["well" if well else "" for well in self.is_well_detected],
        }
        return _text_table(cells, np.argsort(-self.accuracy, kind="stable")) + "\n" + self._closing_lines()

    def _closing_lines(self) -> str:
        figures = self.summary
        lines = [
            f"{figures['n_well_detected']} of {figures['n_truth']} units well detected, "
            f"mean accuracy {figures['mean_accuracy']:.3f}; of {figures['n_sorted']} sorted units "
            f"{figures['n_false_positive']} false, {figures['n_redundant']} redundant, "
            f"{figures['n_overmerged']} overmerged"
        ]
        lines += [f"misses: {self.misses}"] if self.misses else []
        lines += [f"extra spikes: {self.extras}"] if self.extras else []
        return "\n".join(lines)


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _best_labels(agreement: FloatArray, labels: IntArray) -> FloatArray:
    if not len(labels):
        return np.full(len(agreement), np.nan)
    return np.where(agreement.max(axis=1) >= CHANCE_SCORE, labels[agreement.argmax(axis=1)], np.nan)


def _text_table(cells: dict[str, list[str]], order: IntArray) -> str:
    widths = [max(map(len, [name, *column])) for name, column in cells.items()]
    rows = [list(cells), *([column[i] for column in cells.values()] for i in order)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# --- computing the score ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trains:
    """Spikes in time order, with their units as rows of `ids`."""

    sample: IntArray
    unit: IntArray
    ids: IntArray

    @property
    def n_spikes(self) -> IntArray:
        return np.bincount(self.unit, minlength=len(self.ids))


def score(
    truth_samples: ArrayLike,
    truth_units: ArrayLike,
    sorted_samples: ArrayLike,
    sorted_units: ArrayLike,
    *,
    sampling_rate_hz: float,
    tolerance_ms: float = TOLERANCE_MS,
    truth_ids: ArrayLike | None = None,
    edge_period_samples: int | None = None,
    edge_halo_ms: float = 3.0,
) -> Score:
    """Compare sorted spikes with true spikes.

    Parameters
    ----------
    truth_samples, sorted_samples : array_like of int, shape (spike,)
        Times in samples, in any order.
    truth_units, sorted_units : array_like of int, shape (spike,)
        Unit of each spike.
    sampling_rate_hz : float
        In Hz.
    tolerance_ms : float
        Largest time between a true and a sorted spike that are paired, in ms.
    truth_ids : array_like of int, shape (unit,), optional
        All true units, if some may have no spikes; those count as not found.
    edge_period_samples : int, optional
        Edges of tiles are at the multiples of this, from 1 on; if given, `misses` and `extras` are counted.
    edge_halo_ms : float
        Largest distance of a spike that counts as near an edge, in ms.

    Returns
    -------
    Score

    Raises
    ------
    SettingsError
        If times and units differ in length, or the tolerance, the sampling rate or the edge period is out of range.
    """
    if tolerance_ms < 0 or sampling_rate_hz <= 0 or (edge_period_samples is not None and edge_period_samples < 1):
        raise SettingsError(
            f"{tolerance_ms=} must be ≥ 0, {sampling_rate_hz=} > 0 and {edge_period_samples=} ≥ 1 or None"
        )
    truth = _make_trains("truth", truth_samples, truth_units, truth_ids)
    sorting = _make_trains("sorted", sorted_samples, sorted_units, None)
    tolerance_samples = _in_samples(tolerance_ms, sampling_rate_hz)
    i_truth, i_sorted = _pair_spikes(truth, sorting, tolerance_samples)

    n_truth, n_sorted = len(truth.ids), len(sorting.ids)
    cells = truth.unit[i_truth] * n_sorted + sorting.unit[i_sorted]
    n_matched = np.bincount(cells, minlength=n_truth * n_sorted).reshape(n_truth, n_sorted)
    total = truth.n_spikes[:, None] + sorting.n_spikes[None, :] - n_matched
    agreement = n_matched / np.maximum(total, 1)
    matched_index = _assign(agreement)

    misses = extras = None
    if edge_period_samples is not None:
        is_kept = sorting.unit[i_sorted] == matched_index[truth.unit[i_truth]]
        halo_samples = _in_samples(edge_halo_ms, sampling_rate_hz)
        edges = (edge_period_samples, halo_samples)
        misses = _edge_rates(truth, matched_index >= 0, i_truth[is_kept], *edges)
        extras = _edge_rates(sorting, np.isin(np.arange(n_sorted), matched_index), i_sorted[is_kept], *edges)
    return Score(
        truth_ids=truth.ids,
        sorted_ids=sorting.ids,
        n_truth_spikes=truth.n_spikes,
        n_sorted_spikes=sorting.n_spikes,
        n_matched=n_matched,
        agreement=agreement,
        matched_index=matched_index,
        misses=misses,
        extras=extras,
    )


def count_matches(
    first_samples: NDArray[np.integer[Any]],
    first_units: NDArray[np.integer[Any]],
    second_samples: NDArray[np.integer[Any]],
    second_units: NDArray[np.integer[Any]],
    *,
    n_first: int,
    n_second: int,
    sampling_rate_hz: float,
    tolerance_ms: float = TOLERANCE_MS,
) -> IntArray:
    """Count the spikes that each unit of one sorting shares with each unit of another.

    The arrays may be mapped from files: a part of them is in memory at a time, whatever their length.

    Parameters
    ----------
    first_samples, second_samples : ndarray of int, shape (spike,)
        Times in samples, ascending.
    first_units, second_units : ndarray of int, shape (spike,)
        Unit of each spike, from 0; spikes with −1 are left out.
    n_first, n_second : int
        Numbers of units.
    sampling_rate_hz : float
        In Hz.
    tolerance_ms : float
        Largest time between two spikes that are paired, in ms.

    Returns
    -------
    ndarray of int64, shape (n_first, n_second)
        Number of spikes of the two units that pair one to one within the tolerance.
    """
    n_matched, tolerance_samples = np.zeros((n_first, n_second), np.int64), _in_samples(tolerance_ms, sampling_rate_hz)

    def part_of(samples: NDArray[Any], units: NDArray[Any], n_units: int, rows: slice) -> _Trains:
        sample, unit = samples[rows].astype(np.int64), units[rows].astype(np.int64)
        return _Trains(sample[unit >= 0], unit[unit >= 0], np.arange(n_units))

    for of_first, of_second in _parts(first_samples, second_samples, tolerance_samples):
        first = part_of(first_samples, first_units, n_first, of_first)
        second = part_of(second_samples, second_units, n_second, of_second)
        i_first, i_second = _pair_spikes(first, second, tolerance_samples)
        cells = first.unit[i_first] * n_second + second.unit[i_second]
        n_matched += np.bincount(cells, minlength=n_first * n_second).reshape(n_first, n_second)
    return n_matched


def _parts(first: NDArray[Any], second: NDArray[Any], tolerance_samples: int) -> Iterator[tuple[slice, slice]]:
    """Divide two ascending trains where no spike is within the tolerance of another, so that no pair is divided."""
    at_first, at_second, length = 0, 0, _SPIKES_AT_ONCE
    while at_first < len(first) and at_second < len(second):
        stretches = [train[at : at + length].astype(np.int64) for train, at in ((first, at_first), (second, at_second))]
        left = [len(first) - at_first - length, len(second) - at_second - length]
        if max(left) <= 0:
            yield slice(at_first, len(first)), slice(at_second, len(second))
            return
        known_until = min(stretch[-1] for stretch, n_left in zip(stretches, left, strict=True) if n_left > 0)
        both = np.sort(np.concatenate([stretch[stretch <= known_until] for stretch in stretches]))
        gaps = np.flatnonzero(np.diff(both) > tolerance_samples)
        if not len(gaps):
            length *= 2
            continue
        n_first, n_second = (int(np.searchsorted(stretch, both[gaps[-1]], side="right")) for stretch in stretches)
        yield slice(at_first, at_first + n_first), slice(at_second, at_second + n_second)
        at_first, at_second, length = at_first + n_first, at_second + n_second, _SPIKES_AT_ONCE


def _in_samples(time_ms: float, sampling_rate_hz: float) -> int:
    # Rounded down, as in SpikeInterface; the small term is for products such as 11.999999.
    return int(time_ms * sampling_rate_hz / 1000 + 1e-6)


def _make_trains(name: str, samples: ArrayLike, units: ArrayLike, ids: ArrayLike | None) -> _Trains:
    sample, unit = np.asarray(samples, dtype=np.int64), np.asarray(units, dtype=np.int64)
    if sample.ndim != 1 or sample.shape != unit.shape:
        raise SettingsError(
            f"{name}_samples has shape {sample.shape} and {name}_units {unit.shape}; both must be (spike,)"
        )
    labels = np.unique(unit if ids is None else np.asarray(ids, dtype=np.int64))
    missing = np.setdiff1d(unit, labels)
    if len(missing):
        raise SettingsError(f"{name}_units holds {missing.tolist()}, which {name}_ids does not list")
    order = np.lexsort((unit, sample))
    return _Trains(sample[order], np.searchsorted(labels, unit[order]).astype(np.int64), labels)


def _pair_spikes(truth: _Trains, sorting: _Trains, tolerance_samples: int) -> tuple[IntArray, IntArray]:
    """Pair spikes within the tolerance, one to one for each pair of units, as many as possible.

    Returns
    -------
    i_truth, i_sorted : ndarray of int64, shape (pair,)
        Rows of the two trains. A spike is in at most one pair with each unit of the other side.
    """
    i_truth, i_sorted = _candidates(truth.sample, sorting.sample, tolerance_samples)
    by_truth = i_truth * len(sorting.ids) + sorting.unit[i_sorted]
    by_sorted = i_sorted * len(truth.ids) + truth.unit[i_truth]
    kept_truth, kept_sorted = [i_truth[:0]], [i_sorted[:0]]
    # A candidate that is the first of both its spikes belongs to some maximum pairing, because partners are in
    # time order. Nearly all candidates have no competitor and are kept in the first round.
    while len(i_truth):
        first_truth, by_truth = _first_of_each(by_truth)
        first_sorted, by_sorted = _first_of_each(by_sorted)
        # The first candidate of both groups is the same only if it is this one: no two have the same two spikes.
        is_kept = first_truth[by_truth] == first_sorted[by_sorted]
        kept_truth.append(i_truth[is_kept])
        kept_sorted.append(i_sorted[is_kept])
        is_free = ~_has_one(is_kept, by_truth) & ~_has_one(is_kept, by_sorted)
        i_truth, i_sorted, by_truth, by_sorted = (a[is_free] for a in (i_truth, i_sorted, by_truth, by_sorted))
    return np.concatenate(kept_truth), np.concatenate(kept_sorted)


def _first_of_each(keys: IntArray) -> tuple[IntArray, IntArray]:
    """Return the index of the first occurrence of each value, and the values renumbered from 0 without gaps."""
    _, first, renumbered = np.unique(keys, return_index=True, return_inverse=True)
    return first, renumbered


def _has_one(is_kept: BoolArray, group: IntArray) -> BoolArray:
    """Return, for each entry, whether any entry of its group is kept."""
    has_one = np.zeros(group.max() + 1, dtype=bool)
    has_one[group[is_kept]] = True
    return has_one[group]


def _candidates(first: IntArray, second: IntArray, tolerance_samples: int) -> tuple[IntArray, IntArray]:
    """Return all (i, j) with |first[i] − second[j]| ≤ tolerance, in order of i, then j; both ascending."""
    begin = np.searchsorted(second, first - tolerance_samples, side="left")
    n_partners = np.searchsorted(second, first + tolerance_samples, side="right") - begin
    i_first = np.repeat(np.arange(len(first)), n_partners)
    rank = np.arange(len(i_first)) - np.repeat(np.cumsum(n_partners) - n_partners, n_partners)
    return i_first, np.repeat(begin, n_partners) + rank


def _assign(agreement: FloatArray) -> IntArray:
    """Return the sorted unit assigned to each true unit in the best one-to-one assignment, −1 below 0.5."""
    rows, columns = linear_sum_assignment(-np.where(agreement >= MATCH_SCORE, agreement, 0.0))
    good = agreement[rows, columns] >= MATCH_SCORE
    matched = np.full(len(agreement), -1, dtype=np.int64)
    matched[rows[good]] = columns[good]
    return matched


def _edge_rates(
    trains: _Trains, unit_counts: BoolArray, right: IntArray, period_samples: int, halo_samples: int
) -> EdgeRates:
    """Count the spikes of chosen units that are not among the `right` ones, near edges and elsewhere."""
    is_wrong = np.ones(len(trains.sample), dtype=bool)
    is_wrong[right] = False
    # Edge 0 is the start of the recording, not an edge between tiles.
    edge = np.maximum(np.rint(trains.sample / period_samples), 1).astype(np.int64)
    is_near = np.abs(trains.sample - edge * period_samples) <= halo_samples
    chosen = unit_counts[trains.unit]
    return EdgeRates(
        n_near=int((chosen & is_near).sum()),
        n_wrong_near=int((chosen & is_near & is_wrong).sum()),
        n_far=int((chosen & ~is_near).sum()),
        n_wrong_far=int((chosen & ~is_near & is_wrong).sum()),
    )
