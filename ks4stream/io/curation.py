"""What a person decided in Phy about the units in a results folder, read and written as Phy does.

Phy keeps merges and splits in ``spike_clusters.npy``, where a new cluster has a new number, and labels and other
columns in tables of clusters (``cluster_group.tsv`` has the label). ``spike_templates.npy`` stays as it was sorted.
Nothing in the folder is executed or unpickled.
"""

from __future__ import annotations

import ast
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ResultsError
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.mapped import LARGE_MAP_BYTES, release_pages, scratch_array
from ks4stream.io.objects import Status, entries
from ks4stream.io.phy import PARAMS, save_stream
from ks4stream.io.places import Place, below, copy_here, read_range, read_whole, remove, size_of
from ks4stream.io.results_folder import CARRIED, WRITTEN, ResultsFolder, is_table_of_units
from ks4stream.io.store import stored_digest
from ks4stream.metrics import METRICS

__all__ = ["GROUP", "LABEL", "SORTERS", "UNSORTED", "CuratedFolder", "Table", "read_curation", "write_curation"]

GROUP, UNSORTED, LABEL = "group", "unsorted", "KSLabel"
_OF_COLUMN = re.compile(r"cluster_(\w+)\.tsv")
SORTERS = {found[1] for name in WRITTEN if (found := _OF_COLUMN.fullmatch(name))} - {GROUP}
SORTERS |= {metric.name for metric in METRICS}
"""Columns that a sorter writes; Phy saves those of ``quality.csv`` in tables of their own."""
_BOMBCELL = "bc_"
_NOBODYS = SORTERS | {"si_unit_id", "channel_group"}  # and SpikeInterface, which finds units by them again

_TIMES, _CLUSTERS, _TEMPLATES = "spike_times.npy", "spike_clusters.npy", "spike_templates.npy"
_OF_DETECTION = "spike_detection_templates.npy"  # where it is, spike_templates.npy has the final units
_UNITS = "templates.npy"  # has a row for each unit, as sorted
_SUMMARY = "cluster_info"  # Phy's summary of all columns, which it rewrites at every save
_MAX_TEXT_BYTES = 1 << 26
_HEADER_BYTES = 1 << 12
_ROWS_AT_ONCE = 1 << 20
_MAX_NUMBER = (1 << 31) - 1

Table = Mapping[int, str]
"""Values of a column by cluster."""


@dataclass(frozen=True, eq=False)
class CuratedFolder:
    """The spikes in a results folder, the clusters that a person has made of them, and what is said of these.

    Attributes
    ----------
    place : Path or ObjectPath
    sampling_rate_hz : float
    sample : ndarray of int, shape (n,)
        Time of each spike in samples, ascending.
    cluster : ndarray of int, shape (n,)
        Its cluster, as curated.
    columns : mapping of str to mapping of int to str
        Values of each column by cluster.
    units : mapping of int to tuple of int
        The units, as sorted, that each cluster has spikes of, ascending.
    n_spikes : mapping of int to int
        Number of spikes of each cluster.
    recording_digest : str
        Which recording was sorted, if ks4stream did; otherwise empty.
    versions : mapping of str to Status
        Size and modification time or ETag, before they were read, of the files that hold the spikes, and of the tables.
    """

    place: Place
    sampling_rate_hz: float
    sample: NDArray[np.integer[Any]]
    cluster: NDArray[np.integer[Any]]
    columns: Mapping[str, Table]
    units: Mapping[int, tuple[int, ...]]
    n_spikes: Mapping[int, int]
    recording_digest: str
    versions: Mapping[str, Status]

    def decided(self, cluster: int) -> dict[str, str]:
        """The label and other values that a person gave a cluster, by column; "unsorted" is no label."""
        values = {name: table.get(cluster, "") for name, table in self.columns.items() if name not in _NOBODYS}
        return {name: value for name, value in values.items() if value and (name, value) != (GROUP, UNSORTED)}

    def is_decided(self, cluster: int) -> bool:
        """Whether a person has labelled a cluster, or filled in another column; measurements alone are no decision."""
        return bool(self.decided(cluster).keys() - self.measured)

    @cached_property
    def measured(self) -> frozenset[str]:
        """Columns that a program seems to have filled in: Bombcell's, and columns of numbers with decimals."""
        return frozenset(name for name, table in self.columns.items() if _is_measured(name, table))

    def merged(self, cluster: int) -> tuple[int, ...]:
        """The units that were merged into a cluster; empty if there are not several."""
        units = self.units[cluster]
        return units if len(units) > 1 else ()

    def split(self, cluster: int) -> set[int]:
        """The other clusters that have spikes of the same units."""
        return {other for unit in self.units[cluster] for other in self._clusters_of[unit]} - {cluster}

    @cached_property
    def _clusters_of(self) -> dict[int, list[int]]:
        """The clusters that have spikes of each unit."""
        found: dict[int, list[int]] = {}
        for cluster, units in self.units.items():
            for unit in units:
                found.setdefault(unit, []).append(cluster)
        return found


def read_curation(place: Place, folder: Path) -> CuratedFolder:
    """Read a folder that ks4stream, Kilosort4 or Phy has written.

    Parameters
    ----------
    place : Path or ObjectPath
        The results folder.
    folder : Path
        Where spikes are copied to if it is in an object store.

    Raises
    ------
    ResultsError
        If files are missing, damaged, or do not fit each other.
    """
    versions = _versions(place)
    there = {name for name, is_folder in below(place) if not is_folder}
    if missing := [name for name in (_TIMES, _TEMPLATES, PARAMS) if name not in there]:
        raise ResultsError(
            f"{place} is not a results folder for Phy, as it has no {', '.join(missing)}. Give the folder that was "
            "results_dir (shank_<n> in it, if shanks were sorted separately)."
        )
    sample, template = _array(place / _TIMES, folder), _array(place / _TEMPLATES, folder)
    cluster = _copied(_array(place / _CLUSTERS, folder)) if _CLUSTERS in there else template  # before Phy opens it
    if not len(sample) == len(cluster) == len(template):
        raise ResultsError(
            f"{place} is damaged: {_TIMES} has {len(sample)} spikes, {_CLUSTERS} {len(cluster)} and {_TEMPLATES} "
            f"{len(template)}."
        )
    if any(np.any(np.diff(piece.astype(np.int64)) < 0) for piece in _in_turn(sample, overlap=1)):
        raise ResultsError(f"The times in {place / _TIMES} are not ascending, as Phy needs them. Sort again.")
    n_both = _counted(place, cluster, template)
    n_spikes: dict[int, int] = {}
    units: dict[int, tuple[int, ...]] = {}
    for (number, unit), n in sorted(n_both.items()):
        n_spikes[number] = n_spikes.get(number, 0) + n
        units[number] = (*units.get(number, ()), unit)
    if _OF_DETECTION not in there:
        units = _of_other_sorters(units, _n_rows(place / _UNITS) if _UNITS in there else 0)
    return CuratedFolder(
        place=place,
        sampling_rate_hz=_sampling_rate_hz(place / PARAMS),
        sample=sample,
        cluster=cluster,
        columns=_columns(place, there),
        units=units,
        n_spikes=n_spikes,
        recording_digest=stored_digest(place),
        versions=versions,
    )


def write_curation(
    found: CuratedFolder, columns: Mapping[str, Table], listing: str, new_numbers: Mapping[int, int]
) -> None:
    """Write columns and merges into a results folder, which counts as curated from then on.

    Each file appears whole, the clusters first: tables may say too little of a merged cluster, but never lack those
    that took their place. Phy's cache of the spikes is renamed, and its summary of the columns, which it rewrites at
    every save, is removed.

    Parameters
    ----------
    found : CuratedFolder
        What is there.
    columns : mapping of str to mapping of int to str
        All values of the columns to write.
    listing : str
        Text of the file that says what was carried.
    new_numbers : mapping of int to int
        The new number of each cluster that is merged.

    Raises
    ------
    ResultsError
        If they cannot be written, or if what is there was changed since it was read; then, nothing is replaced.
    """
    results = ResultsFolder(found.place)
    again = "repeat the call, with --over (over=True) if the folder counts as curated by then"
    with explain_write_errors(found.place, again), results.draft() as draft:
        for name, table in columns.items():
            _write_table(draft / _file_of(name), name, table)
        (draft / CARRIED).write_text(listing, encoding="utf-8", newline="\n")
        if new_numbers:
            pieces = map(_renumbering(new_numbers), _in_turn(found.cluster))
            save_stream(draft / _CLUSTERS, found.cluster.shape, found.cluster.dtype, pieces)
        _check_unchanged(found)
        results.exchange(draft)
        for name in (f"{_SUMMARY}.tsv", f"{_SUMMARY}.csv"):
            remove(found.place / name)


def _versions(place: Place) -> dict[str, Status]:
    there = {name: status for name, status in entries(str(place)).items() if status is not None}
    return {name: there[name] for name in {_TIMES, _CLUSTERS, _TEMPLATES, *_tables(place, there)} & there.keys()}


def _check_unchanged(found: CuratedFolder) -> None:
    """A comparison may take minutes, in which a person may save something in Phy."""
    now = _versions(found.place)
    if changed := [name for name in sorted({*now, *found.versions}) if now.get(name) != found.versions.get(name)]:
        raise ResultsError(
            f"{', '.join(changed)} in {found.place} changed after it was read, so nothing was replaced there. Close "
            "Phy, and whatever else may write to this folder, and repeat the call."
        )


# -- spikes ------------------------------------------------------------------------------------------


def _array(where: Place, folder: Path) -> NDArray[Any]:
    """A column of whole numbers, mapped if it is large."""
    path = where
    try:
        path = copy_here(where, _made(folder))
        is_large = path.stat().st_size > LARGE_MAP_BYTES
        found: NDArray[Any] = np.load(path, mmap_mode="r" if is_large else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ResultsError(f"{where} cannot be read: {error}.") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.shape[:1] != (found.size,):
        raise ResultsError(f"{where} is damaged: it does not hold one whole number per spike.")
    return found.reshape(-1)


def _of_other_sorters(templates: Mapping[int, tuple[int, ...]], n_units: int) -> dict[int, tuple[int, ...]]:
    """The units that each cluster was made of, if its spikes may have several templates without having been merged.

    Usually, a unit has the number of one of its templates. In early versions of Kilosort4, templates are those of
    detection, and their numbers have nothing to do with the units'; then, clusters numbered above all units are new,
    and made of some of the units that are gone.
    """
    sorted_as = [number for number in templates if number < n_units]
    if 2 * sum(number in templates[number] for number in sorted_as) >= len(sorted_as):
        return {number: (number,) if number in its else its for number, its in templates.items()}
    gone = tuple(number for number in range(n_units) if number not in templates)
    return {number: gone if number >= n_units and gone else (number,) for number in templates}


def _n_rows(where: Place) -> int:
    """Length of the array in a file, of which only the header is read."""
    try:
        head = io.BytesIO(read_range(where, 0, min(_HEADER_BYTES, size_of(where) or 0)))
        is_first = np.lib.format.read_magic(head) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        return int(read(head)[0][0])
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise ResultsError(f"{where} cannot be read: {error}.") from error


def _copied(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers, not mapped from their file, which Windows would not let anything replace."""
    found = scratch_array(values.shape, values.dtype)
    for at in range(0, len(values), _ROWS_AT_ONCE):
        found[at : at + _ROWS_AT_ONCE] = values[at : at + _ROWS_AT_ONCE]
        release_pages(values)
        release_pages(found)
    return found


def _counted(place: Place, cluster: NDArray[Any], template: NDArray[Any]) -> Counter[tuple[int, int]]:
    """Number of spikes of each cluster with each template."""
    found: Counter[tuple[int, int]] = Counter()
    for of_cluster, of_template in zip(_in_turn(cluster), _in_turn(template), strict=True):
        for name, values in ((_CLUSTERS, of_cluster), (_TEMPLATES, of_template)):
            if values.min() < 0 or values.max() > _MAX_NUMBER:
                raise ResultsError(f"{place / name} is damaged: it holds numbers that cannot be those of clusters.")
        both, counts = np.unique(of_cluster.astype(np.int64) << 32 | of_template.astype(np.int64), return_counts=True)
        for number, unit, n in zip((both >> 32).tolist(), (both & _MAX_NUMBER).tolist(), counts.tolist(), strict=True):
            found[number, unit] += n
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _in_turn(values: NDArray[Any], *, overlap: int = 0) -> Iterator[NDArray[Any]]:
    for at in range(0, len(values), _ROWS_AT_ONCE):
        yield np.array(values[at : at + _ROWS_AT_ONCE + overlap])
        release_pages(values)


def _renumbering(new_numbers: Mapping[int, int]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def renumber(cluster: NDArray[Any]) -> NDArray[Any]:
        for number, new in new_numbers.items():
            cluster[cluster == number] = new  # no new number is one of the old
        return cluster

    return renumber


def _sampling_rate_hz(where: Place) -> float:
    """What ``params.py`` assigns to ``sample_rate``; it is not executed."""
    try:
        statements = ast.parse(_text(where)).body
        for statement in reversed(statements):
            match statement:
                case ast.Assign(targets=[ast.Name(id="sample_rate")], value=value):
                    return float(ast.literal_eval(value))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ResultsError(f"{where} cannot be read as Phy's parameters: {error}.") from error
    raise ResultsError(f"{where} has no sample_rate. Add a line like: sample_rate = 30000.")


# -- tables ------------------------------------------------------------------------------------------


def _columns(place: Place, there: set[str]) -> dict[str, Table]:
    """All columns of all tables of clusters; a column in several tables is read from the one that Phy writes."""
    found: dict[str, Table] = {}
    for name in _tables(place, there):
        for column, values in _read_table(place / name).items():
            own = f"cluster_{column}.tsv"
            if column not in found or name == own or own not in there:
                found[column] = values
    return found


def _tables(place: Place, there: Iterable[str]) -> list[str]:
    """Names of the tables of clusters, without Phy's summary; there may be a .csv and a .tsv of one name."""
    tables = [name for name in there if name.endswith((".tsv", ".csv")) and Path(name).stem != _SUMMARY]
    return sorted(name for name in tables if is_table_of_units(place / name))


def _read_table(where: Place) -> dict[str, Table]:
    """The columns of a table of clusters, by name."""
    text = _text(where)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    try:
        header = [name.strip() for name in next(rows, [])]
        columns: dict[str, dict[int, str]] = {name: {} for name in header if name not in ("", "cluster_id")}
        for row in rows:
            values = dict(zip(header, row, strict=False))
            if any(row):
                number = float(values.pop("cluster_id"))
                if not number.is_integer():
                    raise ValueError(f"{number} is not a cluster")
                for name in columns.keys() & values:
                    columns[name][int(number)] = values[name]
    except (ValueError, KeyError, OverflowError, csv.Error) as error:
        raise ResultsError(f"{where} is not a table of clusters: {error}. Correct it, or move it away.") from error
    return dict(columns)


def _is_measured(column: str, table: Table) -> bool:
    values = {value.strip() for value in table.values()} - {""}
    if column.startswith(_BOMBCELL):
        return True
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return not all(map(float.is_integer, numbers)) or not all(value.lstrip("+-").isdecimal() for value in values)


def _text(where: Place) -> str:
    if (size_of(where) or 0) > _MAX_TEXT_BYTES:
        raise ResultsError(f"{where} is larger than {_MAX_TEXT_BYTES >> 20} MiB, and no table or parameters of Phy's.")
    try:
        return read_whole(where).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ResultsError(f"{where} cannot be read: {error}.") from error


def _file_of(column: str) -> str:
    """The table that Phy writes a column to."""
    name = f"cluster_{column}.tsv"
    if not column.isprintable() or {*'/\\:*?"<>|'} & {*column} or len(name.encode()) > 200:
        raise ResultsError(f"A table of clusters has a column {column!r}, which cannot name a file. Rename the column.")
    return name


def _write_table(path: Path, column: str, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["cluster_id", column])
        rows.writerows(sorted(table.items()))
