"""Whose files lie in a results folder: ours, which a sort may replace, and somebody's work, which it may not.

A sort leaves a *record* of the files it wrote, by their content. What differs from it was written by a person or by
another program: labels and merges of a curation, tables of quality metrics, the results of another sorter. Such a
folder is moved as a whole into a numbered folder beside it before results are written. Only names of the list
:data:`WRITTEN` are ever replaced or removed, in folders and in buckets alike, and never the recording's own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from ks4stream.errors import ResultsError
from ks4stream.io import objects
from ks4stream.io.places import FETCHED_BYTES, ObjectPath, Place, below, move, read_range, read_whole, remove, size_of
from ks4stream.io.records import appearing, key_of, writing_to
from ks4stream.io.spikes import let_go
from ks4stream.results import Sorting

__all__ = ["LOG", "RECORD", "STORE", "WRITTEN", "ResultsFolder", "fingerprint"]

RECORD, STORE, LOG = "ks4stream.json", "sorting.zarr", "kilosort4.log"
PHY = (
    "amplitudes.npy", "channel_map.npy", "channel_positions.npy", "channel_shanks.npy", "kept_spikes.npy", "ops.npy",
    "params.py", "pc_feature_ind.npy", "pc_features.npy", "similar_templates.npy", "spike_clusters.npy",
    "spike_detection_templates.npy", "spike_positions.npy", "spike_templates.npy", "spike_times.npy", "templates.npy",
    "templates_ind.npy", "whitening_mat.npy", "whitening_mat_dat.npy", "whitening_mat_inv.npy",
    "cluster_Amplitude.tsv", "cluster_ContamPct.tsv", "cluster_KSLabel.tsv", "cluster_group.tsv",
)  # fmt: skip
EXTRA = ("Wall.npy", "full_amp.npy", "full_clu.npy", "full_st.npy", "tF.npy", "temp_wh.dat")
PLOTS = ("diagnostics.png", "spike_positions.png", "drift_amount.png", "drift_scatter.png")
WRITTEN = (*PHY, *EXTRA, *PLOTS)
"""All files that a sort writes into its results folder, beside the record, the store and the log."""

_CACHE = ".phy"  # Phy's own, of the spikes that lie beside it
_OF_A_SORTING = (
    *WRITTEN, RECORD, STORE, _CACHE, "cluster_*", "spike_*.npy", "template*.npy", "templates._bc_*", "pc_feature*.npy",
    "whitening_mat*.npy", "channel_*.npy", "_phy_*", "phy.log", "rez*.mat",
)  # fmt: skip
"""What belongs to the results of a sort by its name: ours, Kilosort's, Phy's, and those of tools that add to them."""

_TABLES = (".tsv", ".csv")
_HEADER_BYTES = 1 << 12
_HASHED_BYTES = 1 << 30  # of a larger file, only size and time of change are compared
_FORMAT = "ks4stream.Results/1"
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class ResultsFolder:
    """A folder, or a prefix of an object store, that results are going to be written to.

    Attributes
    ----------
    place : Path or ObjectPath
    recording : collection of str
        Locations of the recording's files; those that lie in here are left alone.
    log_bytes : int
        Length of the log as it was found: what comes after is this sort's.
    """

    place: Place
    recording: Collection[str] = ()
    log_bytes: int = 0

    @classmethod
    def open(cls, place: Place, recording: Collection[str] = ()) -> ResultsFolder:
        """Make the folder if need be, and see that results can be written there, before hours of work are spent.

        Raises
        ------
        ResultsError
            If it is not a folder, cannot be made or written to, or something is in the way of a file that is going
            to be written: one that is read-only, a folder of its name, or the recording itself.
        """
        _check_writable(place)
        found = cls(place, recording, size_of(place / LOG) or 0)
        if recorded := found._recordings_own() & {*WRITTEN, RECORD, STORE, LOG}:
            raise ResultsError(
                f"{place / min(recorded)} is the recording, and results have a file of that name. Choose another "
                "results_dir."
            )
        in_the_way = [name for name, is_folder in below(place) if is_folder and name in (*WRITTEN, RECORD, LOG)]
        if isinstance(place, Path) and not found.somebodys():  # else they are moved, which they need not allow
            names = [name for name in (*WRITTEN, RECORD, LOG) if (place / name).exists()]
            in_the_way += [name for name in names if not os.access(place / name, os.W_OK)]
        if in_the_way:
            raise ResultsError(
                f"{place / in_the_way[0]} is read-only, or a folder, and cannot be replaced by the result of that "
                "name. Choose another results_dir, or make its files writable."
            )
        return found

    def somebodys(self) -> list[str]:
        """Names of what lies here and is not as a sort of ks4stream left it, sorted; empty if all may be replaced."""
        there = self._of_a_sorting() - {_CACHE}
        record = self._record()
        if not record:
            return sorted(there)
        if record["state"] == "writing":  # by a sort that was killed meanwhile
            ours = {*WRITTEN}
        else:
            ours = {name for name, about in record["files"].items() if self._is_as_written(name, about)}
        return sorted(there - {RECORD, STORE} - ours)

    def holds(self, key: str) -> bool:
        """Whether this very result was written here, and nothing need be touched: it was curated, or is complete."""
        record = self._record()
        if record.get("state") != "complete" or record["key"] != key:
            return False
        return bool(self.somebodys()) or {*record["files"], STORE} <= self._of_a_sorting()

    @contextmanager
    def replacing(self, key: str, written: Path | None = None) -> Iterator[None]:
        """Write results: those of an earlier sort are removed before, and afterwards it is noted what was written.

        Parameters
        ----------
        key : str
            From :func:`fingerprint`.
        written : Path, optional
            Folder of this machine with the same files, where they are copied to an object store.
        """
        with writing_to(self.place):
            self._write_record({"state": "writing"})  # half a result is nobody's work
            self._clear()
            yield
            self._write_record({"state": "complete", "key": key, "files": self._described(WRITTEN, written)})

    def lacks(self, name: str) -> bool:
        """Whether a file is not among those that were written with the result here, or was removed since."""
        return name not in self._record().get("files", {}) or name not in self._of_a_sorting()

    @contextmanager
    def adding(self, *names: str) -> Iterator[None]:
        """Write some more files, or some of them again, with a result that was written."""
        with writing_to(self.place):
            yield
            record = self._record()
            self._write_record(record | {"files": record["files"] | self._described(names, None)})

    def set_aside(self) -> Place:
        """Move all in here that belongs to a sorting into a numbered folder: the first free one beside this folder.

        Where nothing can be put beside it (a whole bucket, a mounted volume), the numbered folder is made within.

        Raises
        ------
        ResultsError
            If it cannot be moved; nothing is lost then.
        """
        with writing_to(self.place):
            aside = self._free_neighbour()
            move(self.place, aside, sorted(self._of_a_sorting(), key=lambda name: name == RECORD))
            if self.log_bytes:
                with appearing(aside / LOG) as file:
                    file.write(read_range(self.place / LOG, 0, self.log_bytes))
        return aside

    def _clear(self) -> None:
        if isinstance(self.place, ObjectPath):  # where a store is not replaced as a whole
            remove(self.place / STORE / ".zgroup")
            remove(self.place / STORE, folder=True)
        there = self._of_a_sorting()
        for name in there & {*WRITTEN}:
            remove(self.place / name)
        if _CACHE in there:
            remove(self.place / _CACHE, folder=True)

    def _described(self, names: Collection[str], written: Path | None) -> dict[str, dict[str, Any]]:
        """Size, tag and hash of those files that are here."""
        there = objects.entries(str(self.place))
        return {
            name: {
                "bytes": status.size_bytes, "tag": status.tag,
                "sha256": _sha256((written or self.place) / name, status.size_bytes),
            }
            for name in sorted({*names} - self._recordings_own()) if (status := there.get(name)) is not None
        }  # fmt: skip

    def _is_as_written(self, name: str, about: Mapping[str, Any]) -> bool:
        status = objects.status(str(self.place / name))
        if status is None or status.size_bytes != about["bytes"]:
            return False
        if status.tag == about["tag"]:
            return True
        return about["sha256"] is not None and about["sha256"] == _sha256(self.place / name, status.size_bytes)

    def _of_a_sorting(self) -> set[str]:
        """Names in here that belong to the results of a sort, whosever it was; none of the recording's."""
        names = {name for name, is_folder in below(self.place) if self._belongs(name, is_folder)}
        return names - self._recordings_own()

    def _belongs(self, name: str, is_folder: bool) -> bool:
        if is_folder:
            return name in (STORE, _CACHE)
        if any(fnmatchcase(name, pattern) for pattern in _OF_A_SORTING):
            return True
        return name.lower().endswith(_TABLES) and _is_table_of_units(self.place / name)

    def _recordings_own(self) -> set[str]:
        """Names in here that are, or hold, files of the recording."""
        mark = "/" if isinstance(self.place, ObjectPath) else os.sep
        prefix = str(self.place).rstrip(mark) + mark
        return {path.removeprefix(prefix).partition(mark)[0] for path in self.recording if path.startswith(prefix)}

    def _free_neighbour(self) -> Place:
        place, name = self.place, self.place.name
        if isinstance(place, ObjectPath):
            is_bucket = "/" not in str(place).partition("://")[2]
            base = str(place / "results") if is_bucket else str(place)
            return next(
                there for number in count(1) if not any(below(there := ObjectPath(f"{base}-{number}")))
            )
        is_free_beside = os.access(place.parent, os.W_OK) and not os.path.ismount(place)
        for number in count(1):
            aside = place.parent / f"{name}-{number}" if is_free_beside else place / f"results-{number}"
            try:
                aside.mkdir()
            except FileExistsError:
                continue
            return aside
        raise AssertionError("numbers do not end")

    def _record(self) -> dict[str, Any]:
        try:
            found = json.loads(read_whole(self.place / RECORD))
        except (FileNotFoundError, EOFError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("format") == _FORMAT else {}

    def _write_record(self, content: Mapping[str, Any]) -> None:
        with appearing(self.place / RECORD) as file:
            file.write(json.dumps({"format": _FORMAT, **content}, indent=1).encode())


def fingerprint(sorting: Sorting, **options: Any) -> str:
    """Hash of what a sort found, and of options of writing it; run times, versions and places do not count.

    Features follow from everything else, and are by far the most.
    """
    parts: list[Any] = [sorting.settings.to_dict(), options]
    for spec in fields(sorting):
        value = getattr(sorting, spec.name)
        if spec.metadata.get("dims", ())[:1] == ("n",):
            if spec.name == "features":
                continue
            for at in range(0, len(value), _ROWS_AT_ONCE):
                parts.append(key_of(value[at : at + _ROWS_AT_ONCE]))
                let_go(value)
        elif "dims" in spec.metadata or spec.name in ("artifacts", "probe", "whitening", "waveforms", "drift"):
            parts.append(value)
    return key_of(*parts)


def _check_writable(place: Place) -> None:
    """Make a folder and write a file there; of an object store, an object."""
    if isinstance(place, ObjectPath):
        trial = place / f".ks4stream-{uuid4().hex}"
        objects.write_bytes(str(trial), b"")
        remove(trial)
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ResultsError(
            f"Results cannot be written to {place}: {error.strerror or error}. "
            "Choose another results_dir, or change the permissions of this one."
        ) from error


def _sha256(where: Place, n_bytes: int) -> str | None:
    if n_bytes > _HASHED_BYTES:
        return None
    state = hashlib.sha256()
    for at in range(0, n_bytes, FETCHED_BYTES):
        state.update(read_range(where, at, min(at + FETCHED_BYTES, n_bytes)))
    return state.hexdigest()


def _is_table_of_units(where: Place) -> bool:
    """Whether a table has a column of units: tools read all that do, as tables of the units that lie beside them."""
    head = read_range(where, 0, min(_HEADER_BYTES, size_of(where) or 0)).partition(b"\n")[0]
    return "cluster_id" in head.decode("utf-8", "replace").replace(",", "\t").strip().split("\t")
