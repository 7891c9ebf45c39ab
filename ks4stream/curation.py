"""Decisions that a person made in Phy, carried over to a new sort of the same recording.

A cluster of the earlier, curated result and a unit of the new one are the same neuron if most of their spikes coincide:
spikes within 0.4 ms of each other match (SpikeInterface's ``delta_time``, by which it compares sorters), and the
agreement of two trains is matches / (spikes of either). Only the time that both sorts cover counts. Two clusters can
agree with the same unit only below an agreement of one half.

Where an earlier cluster was merged from several units, and several units of the new sort together agree with it better
than any one of them, these are merged, as Phy would do.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ResultsError, SettingsError
from ks4stream.io.curation import GROUP, LABEL, SORTERS, UNSORTED, CuratedFolder, Table, read_curation, write_curation
from ks4stream.io.mapped import scratch_array
from ks4stream.io.places import place
from ks4stream.io.scratch import scratch_folder
from ks4stream.recording import is_same_rate
from ks4stream.scoring import MATCH_SCORE, count_matches

__all__ = ["Carried", "CarriedCluster", "carry_curation"]

IntArray = NDArray[np.int64]

FEW = "too few spikes to compare"
UNHEARD = "no spikes in the time that both sorts cover"
TOGETHER = "one unit with others in the new sort"
TAKEN = "another cluster agrees better with its unit"
DIVIDED = "several units in the new sort"
DIFFERENT = "no unit of the new sort agrees"

SPLIT_OFF = 0.1
"""Largest share of a unit that may be spikes which a person had split off, for a label to be carried to it."""

FEWEST = 10
"""Least number of spikes that a cluster and a unit have in common: a few may coincide by chance."""

_SPIKES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class CarriedCluster:
    """What became of the decisions about one cluster.

    Attributes
    ----------
    cluster : int
        Its number in the earlier, curated result.
    n_spikes : int
    n_compared : int
        Number of its spikes in the time that both sorts cover.
    values : dict
        Its label ("group") and other columns that a person filled in.
    merged_from : tuple of int
        The units of the earlier sort that were merged into it; empty if it was not merged.
    split_from : tuple of int
        The other clusters with spikes of the same unit; empty if nothing was split.
    to : int or None
        Its number in the new result; None if it was not carried.
    of_units : tuple of int
        The units of the new sort that were merged for it, if there were several.
    agreement : float
        With `to`, or with the unit of the new sort that agrees best.
    why_not : str
        Why it was not carried; empty if it was.
    detail : str
        Which units and clusters are meant, or what could not be carried although the label was.
    replaced : dict
        Label and other columns that a person had filled in for the units of the new sort, and that are no longer there.
    """

    cluster: int
    n_spikes: int
    n_compared: int
    values: dict[str, str]
    merged_from: tuple[int, ...]
    split_from: tuple[int, ...]
    to: int | None
    of_units: tuple[int, ...]
    agreement: float
    why_not: str = ""
    detail: str = ""
    replaced: dict[str, str] = field(default_factory=dict)

    @property
    def decision(self) -> str:
        """What was decided, in words."""
        said = _in_words(self.values)
        said += [f"merged from {_listed(self.merged_from)}"] if self.merged_from else []
        return ", ".join(said + (["split"] if self.split_from else []))

    @property
    def outcome(self) -> str:
        """What became of it, in words."""
        if self.to is None:
            return f"not carried: {self.why_not}" + f" ({self.detail})" * bool(self.detail)
        merged = [f"merged from {_listed(self.of_units)}"] if self.of_units else []
        replaced = f"replaced {', '.join(_in_words(self.replaced))}" if self.replaced else ""
        return "; ".join(filter(None, [", ".join(["carried", *merged]), self.detail, replaced]))


@dataclass(frozen=True)
class Carried:
    """What became of the decisions of a curation.

    Attributes
    ----------
    old, new : str
        The two results folders.
    clusters : tuple of CarriedCluster
        All clusters of the earlier result about which a person decided something.
    """

    old: str
    new: str
    clusters: tuple[CarriedCluster, ...] = field(repr=False)

    @property
    def n_carried(self) -> int:
        """Number of clusters whose decisions were carried."""
        return sum(one.to is not None for one in self.clusters)

    @property
    def summary(self) -> str:
        """One line: how many were carried, and why others were not."""
        left = Counter(one.why_not for one in self.clusters if one.to is None)
        whys = ", ".join(f"{why} ({n})" for why, n in left.most_common())
        said = f"{self.n_carried} of {len(self.clusters)} decisions carried"
        return f"{said}; {left.total()} not: {whys}" if left else said

    def rows(self) -> list[list[str]]:
        """A table: names of columns, and a row for each cluster."""
        table = [["old_cluster", "spikes", "compared", "decision", "new_cluster", "agreement", "outcome"]]
        for one in self.clusters:
            to = "" if one.to is None else str(one.to)
            counts = [str(one.cluster), str(one.n_spikes), str(one.n_compared)]
            table.append([*counts, one.decision, to, f"{one.agreement:.2f}", one.outcome])
        return table


def carry_curation(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    agreement: float = MATCH_SCORE,
    over: bool = False,
    dry_run: bool = False,
) -> Carried:
    """Carry labels, other columns and merges over from a curated result to a new sort of the same recording.

    Labels and columns of a cluster, as curated, go to the unit of the new sort that agrees with it best, one to one.
    Units of the new sort are merged where an earlier merge asks for it. A split is kept where the new sort has two
    units; otherwise, it is listed as not carried. What the sorter itself wrote (KSLabel, ContamPct, Amplitude, reason)
    is no decision. Neither are columns that programs fill in (Bombcell's, and columns of numbers with decimals), but
    their values are carried with a decision where `new` has none. All decisions are listed in ``carried.tsv`` in `new`,
    unless nothing could be carried.

    Parameters
    ----------
    old : path
        Results folder, or an address like ``s3://bucket/sorted``, of ks4stream or Kilosort4, curated in Phy.
    new : path
        Results folder or address of the new sort.
    agreement : float, optional
        Least agreement of a cluster and a unit, which also have at least 10 spikes in common. Below 0.5, two clusters
        may agree with the same unit, which then goes to the one that agrees better.
    over : bool, optional
        Also if `new` has already been curated. What is carried replaces what was decided there about the same units,
        which is listed as replaced; the rest stays.
    dry_run : bool, optional
        Only report what would be carried.

    Returns
    -------
    Carried

    Raises
    ------
    SettingsError
        If `agreement` is out of range.
    ResultsError
        If a folder cannot be read or written, holds no result, or the two are of different recordings; if `old` was not
        curated, or `new` was. Nothing is changed in these cases.
    """
    if not 0 < agreement <= 1:
        raise SettingsError(f"{agreement=} must be above 0 and at most 1.")
    with scratch_folder() as folder:
        earlier, later = read_curation(place(old), folder / "old"), read_curation(place(new), folder / "new")
        decisions = _decisions(earlier)
        _check(earlier, later, decisions, over=over)
        found = _Comparison.of(earlier, later, agreement)
        if not found.partner and _are_of_two_recordings(earlier, later):
            raise ResultsError(
                f"{old} and {new} are results of different recordings: their digests differ, and the largest agreement "
                f"of any two units with at least {FEWEST} spikes in common is {found.trusted.max(initial=0.0):.2f}. "
                "Give two sorts of the same recording."
            )
        clusters = [found.became(one) for one in decisions]
        columns = _columns(later, found.unions, clusters, earlier.measured)
        clusters = [replace(one, replaced=_replaced(later, columns, one)) for one in clusters]
        carried = Carried(str(old), str(new), tuple(clusters))
        if carried.n_carried and not dry_run:
            numbers = {part: number for number, parts in found.unions.items() for part in parts}
            write_curation(later, columns, _listing(carried), numbers)
    return carried


def _decisions(earlier: CuratedFolder) -> list[int]:
    """The clusters about which something was decided, ascending."""
    return [one for one in earlier.units if earlier.is_decided(one) or earlier.merged(one) or earlier.split(one)]


def _check(earlier: CuratedFolder, later: CuratedFolder, decisions: Sequence[int], *, over: bool) -> None:
    if earlier.place == later.place:
        raise ResultsError(f"{earlier.place} was given twice. Give the curated results first, then the new ones.")
    if not is_same_rate(earlier.sampling_rate_hz, later.sampling_rate_hz):
        raise ResultsError(
            f"{earlier.place} was recorded at {earlier.sampling_rate_hz:g} Hz and {later.place} at "
            f"{later.sampling_rate_hz:g} Hz, so they are not of the same recording. Give two sorts of one recording."
        )
    if not decisions:
        raise ResultsError(
            f"{earlier.place} was not curated: no cluster has a label or another column of a person's, and none was "
            "merged or split. Give the curated results first, then the new ones."
        )
    if not over and (done := _decisions(later)):
        what = ", ".join(name for name in later.decided(done[0]) if name not in later.measured) or "merged or split"
        raise ResultsError(
            f"{later.place} has already been curated: something was decided about {len(done)} of its clusters, for "
            f"instance about {done[0]} ({what}). Use --over (over=True) to replace that where the earlier curation "
            "says something about the same units."
        )


def _are_of_two_recordings(earlier: CuratedFolder, later: CuratedFolder) -> bool:
    """Whether both know which recording was sorted, and it is not the same; a longer one of it has another digest."""
    digests = {earlier.recording_digest, later.recording_digest}
    return len(digests) == 2 and "" not in digests


# --- comparison -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trains:
    """Spikes of a result in the time that is compared.

    Attributes
    ----------
    sample : ndarray of int, shape (n,)
        Ascending; may be mapped.
    row : ndarray of int32, shape (n,)
        The cluster of each spike, as an index of `ids`.
    ids : ndarray of int64, shape (u,)
        Numbers of the clusters.
    """

    sample: NDArray[np.integer[Any]]
    row: NDArray[np.int32]
    ids: IntArray

    @classmethod
    def of(cls, found: CuratedFolder, span: Sequence[int]) -> _Trains:
        """The spikes from a sample on and before another one."""
        start, stop = np.searchsorted(found.sample, span).tolist()
        ids = np.array(sorted(found.units), dtype=np.int64)
        return cls(found.sample[start:stop], _looked_up(found.cluster[start:stop], ids, np.arange(len(ids))), ids)

    @cached_property
    def n_spikes(self) -> IntArray:
        """Number of spikes of each cluster."""
        return np.bincount(self.row, minlength=len(self.ids))

    def joined(self, unions: Mapping[int, Sequence[int]]) -> _Trains:
        """The same spikes, with some clusters as parts of new ones."""
        number_of = {part: number for number, parts in unions.items() for part in parts}
        numbers = np.array([number_of.get(one, one) for one in self.ids.tolist()], dtype=np.int64)
        ids, row_of = np.unique(numbers, return_inverse=True)
        return _Trains(self.sample, _looked_up(self.row, np.arange(len(row_of)), row_of), ids)

    def only(self, rows: Sequence[int]) -> _Trains:
        """The spikes of some clusters."""
        which = np.flatnonzero(np.isin(self.row, rows))
        return _Trains(self.sample[which], self.row[which], self.ids)

    @property
    def as_one(self) -> _Trains:
        """All spikes as those of one cluster."""
        return _Trains(self.sample, np.zeros(len(self.row), np.int32), self.ids[:1])


def _looked_up(values: NDArray[np.integer[Any]], ids: IntArray, rows: IntArray) -> NDArray[np.int32]:
    """The row of each value, which is one of the ascending `ids`; mapped from a file if there are very many."""
    found: NDArray[np.int32] = scratch_array(values.shape, np.int32)
    for at in range(0, len(values), _SPIKES_AT_ONCE):
        some = slice(at, at + _SPIKES_AT_ONCE)
        found[some] = rows[np.searchsorted(ids, values[some].astype(np.int64))]
    return found


def _matches(first: _Trains, second: _Trains, rate_hz: float) -> IntArray:
    sizes = {"n_first": len(first.ids), "n_second": len(second.ids)}
    return count_matches(first.sample, first.row, second.sample, second.row, **sizes, sampling_rate_hz=rate_hz)


def _agreement(n_matched: IntArray, first: _Trains, second: _Trains) -> NDArray[np.float64]:
    found: NDArray[np.float64] = n_matched / np.maximum(
        first.n_spikes[:, None] + second.n_spikes[None, :] - n_matched, 1
    )
    return found


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Clusters of the earlier result, those of the new one as they will be, and which go together.

    Attributes
    ----------
    earlier : CuratedFolder
    old, new : _Trains
    n_matched : ndarray of int64, shape (old, new)
    agreement : ndarray of float64, shape (old, new)
    trusted : ndarray of float64, shape (old, new)
        The same; 0 where too few spikes match.
    unions : dict of int to tuple of int
        The units that are merged, by their new number.
    partner : dict of int to int
        Row of `new` that each row of `old` goes to.
    least : float
        Least agreement of partners.
    """

    earlier: CuratedFolder
    old: _Trains
    new: _Trains
    n_matched: IntArray
    agreement: NDArray[np.float64]
    trusted: NDArray[np.float64]
    unions: dict[int, tuple[int, ...]]
    partner: dict[int, int]
    least: float

    @classmethod
    def of(cls, earlier: CuratedFolder, later: CuratedFolder, least: float) -> _Comparison:
        """Compare two results over the time that both cover."""
        rate_hz, span = earlier.sampling_rate_hz, _common_span(earlier.sample, later.sample)
        old, new = _Trains.of(earlier, span), _Trains.of(later, span)
        n_matched = _matches(old, new, rate_hz)
        best = _agreement(n_matched, old, new).max(axis=1, initial=0.0)
        unions: dict[int, tuple[int, ...]] = {}
        union_of: dict[int, int] = {}
        is_free, number = np.ones(len(new.ids), np.bool_), max(later.units, default=-1) + 1  # Phy's next number
        for row, cluster in enumerate(old.ids.tolist()):
            if not earlier.merged(cluster):
                continue
            parts, together = _together(old, new, n_matched[row] * is_free, row, rate_hz)
            split_off = n_matched[np.isin(old.ids, list(earlier.split(cluster)))][:, parts].sum()
            is_split = split_off > SPLIT_OFF * new.n_spikes[parts].sum()
            if len(parts) > 1 and together >= least and together > best[row] and not is_split:
                is_free[parts] = False
                union_of[row] = number + len(unions)
                unions[union_of[row]] = tuple(sorted(new.ids[parts].tolist()))
        if unions:
            new = new.joined(unions)
            n_matched = _matches(old, new, rate_hz)
        agreement = _agreement(n_matched, old, new)
        partner = {row: int(np.searchsorted(new.ids, union)) for row, union in union_of.items()}
        trusted = np.where(n_matched >= FEWEST, agreement, 0.0)
        partner = _partners(trusted, least, partner)
        return cls(earlier, old, new, n_matched, agreement, trusted, unions, partner, least)

    def became(self, cluster: int) -> CarriedCluster:
        """What becomes of a cluster of the earlier result."""
        row = int(np.searchsorted(self.old.ids, cluster))
        values, merged = self.earlier.decided(cluster), self.earlier.merged(cluster)
        split = self.earlier.split(cluster)
        partner, why_not, detail = self.partner.get(row), "", ""
        agreement = float(self.agreement[row].max(initial=0.0) if partner is None else self.agreement[row, partner])
        if partner is None:
            why_not, detail = self._why_not(row)
        elif others := [one for one in self._mostly_in(partner) if one != cluster]:
            lost = [one for one in others if one in split]
            n_lost = self.n_matched[np.isin(self.old.ids, lost), partner].sum()
            if n_lost > SPLIT_OFF * self.new.n_spikes[partner] or (
                lost and not self.earlier.is_decided(cluster) and not merged
            ):
                why_not, detail = TOGETHER, f"{_named('cluster', others)} in unit {self.new.ids[partner]}"
            else:
                detail = f"with the spikes of {_named('cluster', others)}"
        to = None if partner is None or why_not else int(self.new.ids[partner])
        return CarriedCluster(
            cluster=cluster,
            n_spikes=self.earlier.n_spikes[cluster],
            n_compared=int(self.old.n_spikes[row]),
            values=values,
            merged_from=merged,
            split_from=tuple(sorted(split)),
            to=to,
            of_units=() if to is None else self.unions.get(to, ()),
            agreement=agreement,
            why_not=why_not,
            detail=detail,
        )

    def _why_not(self, row: int) -> tuple[str, str]:
        """Why a cluster goes to no unit, and which units and clusters are meant."""
        if not self.old.n_spikes[row]:
            return UNHEARD, ""
        if not len(self.new.ids):
            return DIFFERENT, ""
        most, best = int(self.n_matched[row].argmax()), int(self.agreement[row].argmax())
        cluster = int(self.old.ids[row])
        few = f"unit {self.new.ids[best]} has {self.n_matched[row, best]} of {self.old.n_spikes[row]}"
        if not self._is_heard[row]:
            return FEW, few * bool(self.n_matched[row, best])
        inside = self._mostly_in(most)
        if cluster in inside and len(inside) > 1:
            return (
                TOGETHER,
                f"{_named('cluster', [one for one in inside if one != cluster])} in unit {self.new.ids[most]}",
            )
        if self.trusted[row].max() >= self.least:
            wanted = int(self.trusted[row].argmax())
            taken_by = next(other for other, column in self.partner.items() if column == wanted)
            return TAKEN, f"unit {self.new.ids[wanted]} to cluster {self.old.ids[taken_by]}"
        if self.agreement[row, best] >= self.least:
            return FEW, few
        parts, together = _together(self.old, self.new, self.n_matched[row], row, self.earlier.sampling_rate_hz)
        if len(parts) > 1 and together >= self.least:
            return DIVIDED, f"{_named('unit', sorted(self.new.ids[parts].tolist()))}, together {together:.2f}"
        return DIFFERENT, f"best: {self.new.ids[best]}, {self.agreement[row, best]:.2f}"

    def _mostly_in(self, column: int) -> list[int]:
        """Clusters of the earlier result that have most of their spikes in one of the new."""
        found: list[int] = self.old.ids[(2 * self.n_matched[:, column] > self.old.n_spikes) & self._is_heard].tolist()
        return found

    @cached_property
    def _is_heard(self) -> NDArray[np.bool_]:
        """Whether enough spikes of each cluster of the earlier result were compared, or all that it has."""
        n_spikes = np.array([self.earlier.n_spikes[one] for one in self.old.ids.tolist()], dtype=np.int64)
        found: NDArray[np.bool_] = self.old.n_spikes >= np.minimum(FEWEST, n_spikes)
        return found


def _common_span(first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """The samples from the first spike on that neither sort precedes, to the last one that neither exceeds."""
    if not len(first) or not len(second):
        return 0, 0
    return max(int(first[0]), int(second[0])), min(int(first[-1]), int(second[-1])) + 1


def _together(old: _Trains, new: _Trains, n_matched: IntArray, row: int, rate_hz: float) -> tuple[list[int], float]:
    """The rows of `new`, each mostly within a cluster of `old`, that together agree with it best, and how well.

    Each of them adds more matches than other spikes, unless another one has found the same spikes.
    """
    parts = np.flatnonzero((2 * n_matched > new.n_spikes) & (n_matched >= FEWEST))
    train, pool = old.only([row]).as_one, new.only(parts.tolist())

    def together(some: list[int]) -> float:
        union = pool.only(some).as_one
        return float(_agreement(_matches(train, union, rate_hz), train, union)[0, 0])

    chosen = parts.tolist()
    reached = together(chosen)
    for part in parts[np.argsort(n_matched[parts], kind="stable")].tolist():
        others = [one for one in chosen if one != part]
        if (without := together(others)) > reached:
            chosen, reached = others, without
    return chosen, reached


def _partners(agreement: NDArray[np.float64], least: float, known: Mapping[int, int]) -> dict[int, int]:
    """Rows and columns that agree, one to one: those that are known, then those that agree best."""
    rows, columns = np.nonzero(agreement >= least)
    partner, taken = {**known}, {*known.values()}
    for at in np.argsort(-agreement[rows, columns], kind="stable"):
        row, column = int(rows[at]), int(columns[at])
        if row not in partner and column not in taken:
            partner[row] = column
            taken.add(column)
    return partner


# --- what is written ------------------------------------------------------------------------------------------


def _columns(
    later: CuratedFolder,
    unions: Mapping[int, Sequence[int]],
    clusters: Sequence[CarriedCluster],
    measured: Collection[str],
) -> dict[str, Table]:
    """The columns that change, whole; values that were measured do not replace others.

    A merged cluster gets the value that its parts have, or that of the largest one, as in Phy. Columns of a person's
    have a row for each cluster: SpikeInterface leaves out clusters that any table lacks. Clusters that an interrupted
    call has merged get the sorter's values now, because it may not have got to the tables.
    """
    columns = {name: dict(table) for name, table in later.columns.items()}
    gone = {one: [part for part in later.merged(one) if part not in later.units] for one in later.units}
    before = {one: parts for one, parts in gone.items() if parts}
    for number, parts in {**before, **unions}.items():
        largest = max(parts, key=lambda part: later.n_spikes.get(part, 0))
        for name, table in columns.items():
            if number in before and (name not in SORTERS or number in table):
                continue
            values = {part: value for part in parts if (value := table.pop(part, ""))}
            table.pop(number, None)  # of a unit without spikes
            if values:
                table[number] = next(iter(values.values())) if len({*values.values()}) == 1 else values.get(largest, "")
    for one in clusters:
        if one.to is not None:
            for name, value in one.values.items():
                if name not in measured or not columns.get(name, {}).get(one.to):
                    columns.setdefault(name, {})[one.to] = value
    changed = {name for name, table in columns.items() if table != later.columns.get(name)}
    if unions or before or GROUP in changed:
        changed.add(GROUP)
        if LABEL in columns:  # the sorter writes its label under the name of the group's table, too
            changed.add(LABEL)
    merged = {part for parts in unions.values() for part in parts}
    numbers = sorted(({*later.units} - merged) | unions.keys())
    return {
        name: columns[name]
        if name in SORTERS
        else {one: columns.get(name, {}).get(one) or (UNSORTED if name == GROUP else "") for one in numbers}
        for name in sorted(changed)
    }


def _replaced(later: CuratedFolder, columns: Mapping[str, Table], one: CarriedCluster) -> dict[str, str]:
    """What was decided in the new results about the units of a cluster, and is not among the columns to be written."""
    found: dict[str, list[str]] = {}
    if one.to is not None:
        for part in one.of_units or (one.to,):
            for name, value in later.decided(part).items():
                if value != columns.get(name, later.columns[name]).get(one.to, ""):
                    found.setdefault(name, []).append(value)
    return {name: " and ".join(dict.fromkeys(values)) for name, values in found.items()}


def _listing(carried: Carried) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(carried.rows())
    return text.getvalue()


def _in_words(values: Mapping[str, str]) -> list[str]:
    return [value if name == GROUP else f"{name}: {value}" for name, value in values.items()]


def _listed(numbers: Sequence[int]) -> str:
    """Numbers in words.

    >>> _listed([3, 5, 8])
    '3, 5 and 8'
    """
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _named(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' * (len(numbers) > 1)} {_listed(numbers)}"
