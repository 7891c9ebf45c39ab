"""Which files in a results folder are ours and may be replaced, and which are not.

A sort leaves a *record* of the files it wrote, with hashes of their content. Whatever differs from the record was
written by a person or by another program: labels and merges of a curation, tables of quality metrics, the results of
another sorter. Such a sorting is moved as a whole to a numbered folder beside this one before results are written.
Only the names in :data:`WRITTEN` are ever replaced or removed, in folders and in buckets alike, and never the
recording's own files.

Results are first written to a *draft* and then moved into place, file by file. Meanwhile the record lists both the
earlier and the new files, so that whatever a killed process leaves is still recognised as ours, and nothing else is.
A record of files that were added before the results makes a sorting of these files only.
Each file is checked again just before another takes its place, and is moved, too, if it was changed in the meantime. A
move never replaces anything: an interrupted move continues into its numbered folder if nothing there is in its way, and
otherwise into a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from ks4stream.errors import ResultsError
from ks4stream.io import objects
from ks4stream.io.atomic import DRAFT, atomic_write, explain_write_errors
from ks4stream.io.mapped import release_pages
from ks4stream.io.places import (
    FETCHED_BYTES,
    ObjectPath,
    Place,
    below,
    copy_there,
    move,
    read_range,
    read_whole,
    remove,
    size_of,
)
from ks4stream.io.records import key_of
from ks4stream.io.scratch import scratch_folder
from ks4stream.results import Sorting

__all__ = ["CARRIED", "EARLY", "LOG", "RECORD", "STORE", "WRITTEN", "ResultsFolder", "fingerprint", "is_table_of_units"]

RECORD, STORE, LOG = "ks4stream.json", "sorting.zarr", "kilosort4.log"
CARRIED = "carried.tsv"  # what was carried over from an earlier curation
EARLY = "ks4stream.early"  # folder of files of the next results, as long as others are here
CLUSTERS = "spike_clusters.npy"
FEATURES = ("pc_feature_ind.npy", "pc_features.npy")
PHY = (
    *FEATURES,
    "amplitudes.npy",
    "channel_map.npy",
    "channel_positions.npy",
    "channel_shanks.npy",
    "kept_spikes.npy",
    "ops.npy",
    "params.py",
    "similar_templates.npy",
    CLUSTERS,
    "spike_detection_templates.npy",
    "spike_positions.npy",
    "spike_templates.npy",
    "spike_times.npy",
    "templates.npy",
    "templates_ind.npy",
    "whitening_mat.npy",
    "whitening_mat_dat.npy",
    "whitening_mat_inv.npy",
    "cluster_Amplitude.tsv",
    "cluster_ContamPct.tsv",
    "cluster_KSLabel.tsv",
    "cluster_group.tsv",
    "cluster_reason.tsv",
)
EXTRA = ("Wall.npy", "full_amp.npy", "full_clu.npy", "full_st.npy", "tF.npy")
PREPROCESSED_COPY = "temp_wh.dat"
PLOTS = ("diagnostics.png", "spike_positions.png", "drift_amount.png", "drift_scatter.png")
QUALITY, PAGE = "quality.csv", "report.html"
WRITTEN = (*PHY, *EXTRA, PREPROCESSED_COPY, *PLOTS, QUALITY, PAGE, STORE)
"""Everything a sort writes into its results folder, apart from the record and the log."""

_SIGNS = ("spike_times.npy", RECORD)  # a folder that contains one of these holds a sorting
_CACHE = ".phy"  # Phy's cache of the spikes in the same folder
_COMPANIONS = (_CACHE, "phy.log")  # left by viewing a sorting; moved with it, but not a user's work
_OF_A_SORTING = (
    *(name.casefold() for name in (*WRITTEN, RECORD, *_COMPANIONS, CARRIED)),
    "cluster_*.tsv",
    "cluster_*.csv",
    "cluster_*.npy",
    "spike_*.npy",
    "templates_*.npy",
    "template_feature*.npy",
    "templates._bc_*",
    "_phy_spikes_subset.*",
    "rez.mat",
    "rez2.mat",
)
"""Names that belong to a sorting, if there is one: ours, Kilosort's, Phy's, and those of tools that add to it."""

_TABLES = (".tsv", ".csv")
_HEADER_BYTES = 1 << 12
_WHOLE_BYTES = 1 << 32  # larger files are hashed in slices only
_SLICES, _SLICE_BYTES = 1024, 1 << 20
_HASHED_BYTES = 1 << 20  # of larger files in the store, only the size is hashed, not the content
_ROWS_AT_ONCE = 1 << 20
_FORMAT = "ks4stream.Results/1"
_STATES: dict[str, dict[str, type]] = {
    "complete": {"key": str, "files": dict},
    "replacing": {"files": dict, "new": dict},
    "early": {"files": dict, "new": dict},
    "moving": {"home": str, "number": int, "within": bool, "before": dict},
}  # states of a record, and the fields it has in each
_DRAFT = re.compile(r"\.ks4stream-[0-9a-f]{32}")
_DRAFTS_OF = tuple(f"{Path(name).stem}." for name in (RECORD, LOG))  # single files, whose drafts lie beside them

_COMPLETE = ".zgroup"  # in the store, written last and removed first: the rest cannot be read without it

Description = Mapping[str, Any]
"""Describes a file or the store: "bytes" (−1 if it does not exist), "tag" (modification time or ETag) and "digest"
(hash of the content); for the store also "inside", the size of each file in it in bytes."""


@dataclass(frozen=True)
class ResultsFolder:
    """A folder, or a prefix in an object store, that results will be written to.

    Attributes
    ----------
    place : Path or ObjectPath
    recording : collection of str
        Locations of the recording's files; those in this folder are left alone.
    log_bytes : int
        Length of the log when the folder was opened: whatever comes after it was written by this sort.
    """

    place: Place
    recording: Collection[str] = ()
    log_bytes: int = 0

    @classmethod
    def open(cls, place: Place, recording: Collection[str] = ()) -> ResultsFolder:
        """Make the folder if needed, and check that results can be written there before hours of work are spent.

        Raises
        ------
        ResultsError
            If it is not a folder, or cannot be made, listed or written to; if something is in the way of a file that
            will be written: a file that is read-only or does not belong to a sorting, a folder of the same name, or
            the recording itself; or if earlier results cannot be read or moved.
        """
        _check_writable(place)
        found = cls(place, recording, size_of(place / LOG) or 0)
        found._check_recording()
        there = found._there()
        for name in [*WRITTEN, RECORD, LOG]:
            if name in there and there[name] != (name == STORE):
                kind = "a folder" if there[name] else "a file"
                raise ResultsError(
                    f"{place / name} is {kind}, in the way of the result of that name. Choose another results_dir."
                )
        if strange := found._strange():
            raise ResultsError(
                f"{place / min(strange)} does not belong to a sorting, and would be replaced by the result of that "
                "name. Choose another results_dir."
            )
        if isinstance(place, Path):
            found._check_permissions(place)
        return found

    def somebodys(self) -> list[str]:
        """Names of files here that are not as a ks4stream sort left them, sorted; empty if all may be replaced."""
        there = self._of_a_sorting() | self._strange()
        if self._record().get("state") == "moving":
            return sorted(there)
        return sorted(there - {RECORD, *_COMPANIONS} - self._ours().keys())

    def missing(self, key: str, wanted: Iterable[str]) -> set[str] | None:
        """Which of `wanted` were not written here or are gone; None if this place holds another result or none."""
        record, there = self._record(), self._of_a_sorting()
        if record.get("state") != "complete" or record["key"] != key:
            return None
        if size_of(self.place / STORE / _COMPLETE) is None:
            there -= {STORE}
        return {*wanted} - ({*record["files"]} & there)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Make a folder on this machine to write results to; it is removed at the end."""
        if isinstance(self.place, ObjectPath):
            with scratch_folder() as folder:
                yield folder
            return
        for name, is_folder in below(self.place):  # left by a process that was killed
            if is_folder and _DRAFT.fullmatch(name):
                shutil.rmtree(self.place / name, ignore_errors=True)
            elif not is_folder and DRAFT.fullmatch(name) and name.startswith(_DRAFTS_OF):
                with suppress(OSError):
                    remove(self.place / name)
        folder = self.place / f".ks4stream-{uuid4().hex}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def replace(self, draft: Path, key: str, *, kept: Collection[str] = ()) -> list[Place]:
        """Replace the files of an earlier sort by those of a draft; files that are not ours are moved away first.

        Parameters
        ----------
        draft : Path
        key : str
            From :func:`fingerprint`.
        kept : collection of str
            Names that are neither replaced nor removed, if they are ours: they were added early.

        Returns
        -------
        list of Path or ObjectPath
            Numbered folders that files were moved to: those that were there, and those saved in the meantime.
        """
        new: dict[str, Description] = {entry.name: _described(entry) for entry in draft.iterdir()}  # may take a while
        moved = [self.set_aside()] if self.somebodys() else []
        late: list[Place] = []
        ours = self._ours()
        self._write_record({"state": "replacing", "files": ours, "new": new})
        self._retire_cache()
        stay = {name: about for name, about in ours.items() if name in kept and name not in new}
        for name in sorted((({*WRITTEN} & self._of_a_sorting()) | new.keys()) - stay.keys()):
            was_moved = False
            while not self._may_go(name, ours):  # it may be saved again while it is moved
                self._move_late(name, late)
                was_moved = True
            if name in new:
                new[name] = self._install(draft / name, new[name])
            elif not was_moved:
                remove(self.place / name, folder=name == STORE)
        # a table of another name, saved by a program that still shows the earlier units
        for name in sorted(self._of_a_sorting() - {RECORD, *_COMPANIONS} - new.keys() - ours.keys()):
            self._move_late(name, late)
        self._write_record({"state": "complete", "key": key, "files": {**new, **stay}})
        return moved + late

    def add(self, draft: Path, key: str, names: Collection[str]) -> set[str]:
        """Add some files of a draft to the same result; returns the names that a user has changed, which are kept.

        Raises
        ------
        ResultsError
            If that result is no longer here.
        """
        new = {entry.name: _described(entry) for entry in draft.iterdir() if entry.name in names}
        record, ours = self._record(), self._ours()
        if record.get("state") != "complete" or record["key"] != key:
            raise ResultsError(
                f"The results in {self.place} were moved or replaced while files were being added to them. Repeat the "
                "same call with the same results_dir to write all of them."
            )
        files = {**record["files"], **ours}
        self._write_record({**record, "files": files, "new": new})
        kept = set()
        for name in sorted(new):
            if self._may_go(name, ours):
                files[name] = self._install(draft / name, new[name])
            else:
                kept.add(name)
        self._write_record({"state": "complete", "key": key, "files": files})
        return kept

    def holds_sorting(self) -> bool:
        """Whether a sorting is here, ours or not: more than files that were added early."""
        there = self._there()
        return bool(there.keys() & {*_SIGNS}) and self._added_early(there) is None

    def takes_early(self) -> bool:
        """Whether files can be added early without touching anything that is not such a file, as it was written."""
        return not self.holds_sorting() and not self._of_a_sorting() - {RECORD} - self._ours().keys()

    def add_early(self, draft: Path) -> Place:
        """Add files of results that are not complete yet: these are ours, and :meth:`replace` replaces or removes them.

        Nothing else is ever touched for them. If a sorting is here, they are put into :data:`EARLY` until it is
        replaced.

        Parameters
        ----------
        draft : Path
            Folder of files with names among :data:`WRITTEN`.

        Returns
        -------
        Path or ObjectPath
            Where they are now.

        Raises
        ------
        ResultsError
            If one of these files was changed just now.
        """
        found: dict[str, Description] = {entry.name: _described(entry) for entry in draft.iterdir()}
        aside = self.place / EARLY
        if not self.takes_early():
            for name in sorted(found):
                if isinstance(aside, ObjectPath):
                    objects.write_file(str(aside / name), draft / name)
                else:
                    aside.mkdir(exist_ok=True)
                    (draft / name).replace(aside / name)
            return aside
        if self._there().get(EARLY):  # from before the sorting was removed
            for name in found:
                remove(aside / name)
        ours = self._ours()
        new = {name: about for name, about in found.items() if ours.get(name, {}).get("digest") != about["digest"]}
        if not new:
            return self.place
        self._write_record({"state": "early", "files": ours, "new": new})
        for name in sorted(new):
            if not self._may_go(name, ours):
                raise ResultsError(f"{self.place / name} was changed while it was being replaced. Repeat the call.")
            new[name] = self._install(draft / name, new[name])
        self._write_record({"state": "early", "files": {**ours, **new}, "new": {}})
        return self.place

    def drop_early(self) -> None:
        """Remove the files of :data:`EARLY`, when the results are here."""
        if self._there().get(EARLY) and EARLY not in self._recordings_own():
            with suppress(OSError):
                remove(self.place / EARLY, folder=True)

    def exchange(self, draft: Path) -> None:
        """Replace files of the results here, whosever they are, as somebody asks for by name.

        Plots, metrics, the page and the preprocessed copy of a sort of ours stay ours. Everything else counts as
        changed from then on. Clusters are exchanged before the tables about them, and Phy's cache of them is renamed.
        """
        record, ours, new = self._record(), self._ours(), {}
        if (draft / CLUSTERS).exists():
            self._retire_cache()
        for entry in sorted(draft.iterdir(), key=lambda entry: (entry.name != CLUSTERS, entry.name)):
            about = _described(entry)
            if entry.name in (*PLOTS, QUALITY, PAGE, PREPROCESSED_COPY) and self._may_go(entry.name, ours):
                new[entry.name] = about
            self._install(entry, about)
        if new and record.get("state") == "complete":
            self._write_record({**record, "files": {**record["files"], **new}})

    def set_aside(self) -> Place:
        """Move everything here that belongs to a sorting into a numbered folder: the first free one beside this one.

        If nothing can be put beside this folder (a whole bucket, a mounted volume), the numbered folder is made inside
        it. An interrupted move continues, unless something has got in its way since; in that case the rest is moved
        into a new folder.

        Raises
        ------
        ResultsError
            If it cannot be moved; nothing is lost in that case.
        """
        with explain_write_errors(self.place):
            record = self._record()
            is_begun = record.get("state") == "moving"
            before = record["before"] if is_begun else record
            # if the folder was renamed since, the numbered folders beside it may have nothing to do with it
            if is_begun and record["home"] == str(self._home()):
                aside = self._neighbour(record["number"], record["within"])
                with suppress(FileExistsError):
                    self._move(aside, before)
                    return aside
            number, within = self._free_neighbour()
            moving = {"home": str(self._home()), "number": number, "within": within, "before": before}
            self._write_record({"state": "moving", **moving})
            aside = self._neighbour(number, within)
            self._move(aside, before)
            return aside

    # -- before work --

    def _check_recording(self) -> None:
        own = self._recordings_own()
        if "" in own:
            raise ResultsError(f"{self.place} is the recording, or lies within it. Choose another results_dir.")
        if in_the_way := own & {*WRITTEN, RECORD, LOG}:
            raise ResultsError(
                f"{self.place / min(in_the_way)} is the recording, and a result has the same name. Choose "
                "another results_dir."
            )

    def _check_permissions(self, place: Path) -> None:
        if self.somebodys():  # these are moved, for which a file need not be writable, but a folder must be
            for moved in sorted(place / name for name in self._of_a_sorting()):
                if moved.is_dir() and not moved.is_symlink() and not os.access(moved, os.W_OK):
                    raise ResultsError(
                        f"{moved} is a folder that you may not write to, so it cannot be moved with the earlier "
                        "results. Choose another results_dir, or change the permissions of that folder."
                    )
            Path(str(self._neighbour(*self._free_neighbour()))).rmdir()
            return
        for name in (*WRITTEN, RECORD, LOG):
            if (place / name).exists() and not os.access(place / name, os.W_OK):
                raise ResultsError(
                    f"{place / name} is read-only and cannot be replaced by the result of that name. Choose another "
                    "results_dir, or make the files in this one writable."
                )

    # -- what lies here --

    def _there(self) -> dict[str, bool]:
        """Names of what is here, and whether each is a folder; in a bucket, empty objects may stand for folders."""
        there = dict(below(self.place))
        if isinstance(self.place, ObjectPath):
            for name in (STORE, _CACHE):
                if there.get(name) and not any(one.size_bytes for _, one in objects.listing(str(self.place / name))):
                    del there[name]
        return there

    def _of_a_sorting(self) -> set[str]:
        """Names here that belong to a sorting, ours or not, without the recording's; empty if there is no sorting."""
        there = self._there()
        if not there.keys() & {*_SIGNS}:
            return set()
        if (early := self._added_early(there)) is not None:
            return early - self._recordings_own()
        return {name for name, is_folder in there.items() if self._belongs(name, is_folder)} - self._recordings_own()

    def _added_early(self, there: Mapping[str, bool]) -> set[str] | None:
        """The record and the files that were added early; None if there is more of a sorting, or no record of them."""
        if "spike_times.npy" in there or RECORD not in there or (record := self._record()).get("state") != "early":
            return None
        return {RECORD, *record["files"], *record["new"]} & there.keys()

    def _strange(self) -> set[str]:
        """Names of results that exist here although there is no sorting they could belong to."""
        ours = {name.casefold() for name in WRITTEN}
        there = {name for name in self._there() if name.casefold() in ours}
        return there - self._of_a_sorting() - self._recordings_own()

    def _belongs(self, name: str, is_folder: bool) -> bool:
        if is_folder:
            return name in (STORE, _CACHE)
        # on some disks Params.py and params.py are the same file
        if any(fnmatchcase(name.casefold(), pattern) for pattern in _OF_A_SORTING):
            return True
        return name.lower().endswith(_TABLES) and is_table_of_units(self.place / name)

    def _recordings_own(self) -> set[str]:
        """Names here that are, or contain, files of the recording; one is empty if this place lies within it."""
        if isinstance(self.place, ObjectPath):
            base, mark, paths = str(self.place), "/", {*self.recording}
        else:
            base, mark = _real(str(self.place)), os.sep
            here = [path for path in self.recording if not objects.is_remote(path)]
            paths = {_real(path) for path in here} | {  # and the location of a link to it
                os.path.join(_real(os.path.dirname(path)), os.path.basename(path)) for path in here
            }
        own = {path.removeprefix(base + mark).partition(mark)[0] for path in paths if path.startswith(base + mark)}
        return own | {"" for path in paths if base == path or base.startswith(path.rstrip(mark) + mark)}

    def _ours(self) -> dict[str, Description]:
        """Descriptions, with current tags, of the recorded files that are still as a ks4stream sort left them."""
        record = self._record()
        return {
            name: found
            for part in ("files", "new")
            for name, about in record.get(part, {}).items()
            if (found := self._as_written(name, about)) is not None
        }

    def _as_written(self, name: str, about: Description) -> Description | None:
        """The description with the current tag if the file is unchanged (or a part of the store is left), else None."""
        now = _described(self.place / name, tag=about["tag"])
        is_same = now["bytes"] == about["bytes"] and (now["tag"] == about["tag"] or now["digest"] == about["digest"])
        inside = now.get("inside", {_COMPLETE: 0})
        is_part = _COMPLETE not in inside and inside.items() <= about.get("inside", {}).items()
        return {**about, "tag": now["tag"]} if is_same or is_part else None

    def _may_go(self, name: str, ours: Mapping[str, Description]) -> bool:
        """Whether a name may be written here: it does not exist, or is still as a sort left it."""
        if name in ours and self._as_written(name, ours[name]) is not None:
            return True
        where = self.place / name
        return not os.path.lexists(where) if isinstance(where, Path) else _described(where, tag=None)["bytes"] < 0

    # -- changes --

    def _move(self, aside: Place, before: Mapping[str, Any]) -> None:
        """Move a sorting with its record and its log."""
        if isinstance(aside, Path):
            aside.mkdir(exist_ok=True)
        move(self.place, aside, self._of_a_sorting() - {RECORD})
        log = read_range(self.place / LOG, 0, min(self.log_bytes, size_of(self.place / LOG) or 0))
        for name, content in {LOG: log, RECORD: json.dumps(before, indent=1).encode() if before else b""}.items():
            if content and size_of(aside / name) is None:
                with atomic_write(aside / name) as file:
                    file.write(content)
        remove(self.place / RECORD)

    def _move_late(self, name: str, late: list[Place]) -> None:
        """Move what was saved in the meantime to the first of `late` that has nothing of that name.

        If there is none, another numbered folder is made and added to `late`.
        """
        for aside in late:
            with suppress(FileExistsError):
                move(self.place, aside, [name])
                return
        late.append(self._neighbour(*self._free_neighbour()))
        move(self.place, late[-1], [name])

    def _install(self, entry: Path, about: Description) -> Description:
        """Move a file of a draft, or the store, into place; returns its description with its tag there."""
        target = self.place / entry.name
        if isinstance(target, ObjectPath):
            if entry.name != STORE:
                return {**about, "tag": objects.write_file(str(target), entry)}
            remove(target / _COMPLETE)
            remove(target, folder=True)
            return {**about, "tag": _tag_of(copy_there(entry, target, last=_COMPLETE))}
        if target.is_dir() and not target.is_symlink():
            target.rename(entry.with_name(f"{entry.name}.old"))
        elif entry.is_dir():
            target.unlink(missing_ok=True)
        entry.replace(target)  # replaces a link itself, not its target
        return about

    def _retire_cache(self) -> None:
        """Rename Phy's cache of the replaced spikes: Phy would show it, and it is not ours to remove."""
        there = self._there()
        if not there.get(_CACHE):
            return
        old = self.place / _CACHE
        new = self.place / next(name for n in count(1) if (name := f"{_CACHE}-{n}") not in there)
        if isinstance(old, Path):
            old.rename(Path(str(new)))
        else:
            move(old, new, [name for name, _ in below(old)])

    def _home(self) -> Place:
        return self.place if isinstance(self.place, ObjectPath) else Path(_real(str(self.place)))

    def _neighbour(self, number: int, within: bool) -> Place:
        home = self._home()
        if within:
            return home / f"results-{number}"
        return (
            ObjectPath(f"{home}-{number}") if isinstance(home, ObjectPath) else home.with_name(f"{home.name}-{number}")
        )

    def _free_neighbour(self) -> tuple[int, bool]:
        """The first number whose folder is free, and whether it lies within this one; on a disk, it is also made."""
        if isinstance(self.place, ObjectPath):
            within = "/" not in str(self.place).partition("://")[2]  # a bucket has nothing beside it
            return next(n for n in count(1) if not any(below(self._neighbour(n, within)))), within
        if not os.path.ismount(str(self._home())):
            with suppress(OSError):
                return self._made_neighbour(within=False), False
        return self._made_neighbour(within=True), True

    def _made_neighbour(self, *, within: bool) -> int:
        """Make the first free numbered folder, and check that what is here can be renamed into it."""
        number = next(n for n in count(1) if _is_made(Path(str(self._neighbour(n, within)))))
        aside, trial = Path(str(self._neighbour(number, within))), Path(str(self.place), f".ks4stream-{uuid4().hex}")
        try:
            trial.mkdir()
            trial.rename(aside / trial.name).rmdir()
        except OSError:  # on another file system, even if it does not look so, or under another quota
            for made in (trial, aside):
                with suppress(OSError):
                    made.rmdir()
            raise
        return number

    def _record(self) -> dict[str, Any]:
        try:
            with _explain_unreadable(self.place / RECORD):
                content = read_whole(self.place / RECORD)
        except (FileNotFoundError, EOFError):
            return {}
        try:
            found = json.loads(content)
        except ValueError:
            return {}
        is_ours = isinstance(found, dict) and found.get("format") == _FORMAT and found.get("state") in _STATES
        return found if is_ours and all(isinstance(found.get(k), v) for k, v in _STATES[found["state"]].items()) else {}

    def _write_record(self, content: Mapping[str, Any]) -> None:
        with atomic_write(self.place / RECORD) as file:
            file.write(json.dumps({"format": _FORMAT, **content}, indent=1).encode())


def fingerprint(sorting: Sorting) -> str:
    """Hash of what a sort found; run times, versions and paths do not count.

    Features do not count either: they follow from everything else, and are by far the largest part.
    """
    parts: list[Any] = [sorting.settings.to_dict()]
    for spec in fields(sorting):
        value = getattr(sorting, spec.name)
        if spec.metadata.get("dims", ())[:1] == ("n",):
            if spec.name == "features":
                continue
            for at in range(0, len(value), _ROWS_AT_ONCE):
                parts.append(key_of(value[at : at + _ROWS_AT_ONCE]))
                release_pages(value)
        elif "dims" in spec.metadata or spec.name in ("artifacts", "probe", "whitening", "waveforms", "drift"):
            parts.append(value)
    return key_of(*parts)


def _check_writable(place: Place) -> None:
    """Make a folder, list it and write a file there; in an object store, write an object."""
    if isinstance(place, ObjectPath):
        trial = place / f".ks4stream-{uuid4().hex}"
        objects.write_bytes(str(trial), b"")
        remove(trial)
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        os.listdir(place)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ResultsError(
            f"Results cannot be written to {place}: {error.strerror or error}. "
            "Choose another results_dir, or change the permissions of this one."
        ) from error


@contextmanager
def _explain_unreadable(where: Place) -> Iterator[None]:
    """Explain a file, or one in the store, that exists but may not be read; errors of object stores say so themselves.

    Raises
    ------
    ResultsError
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResultsError(
            f"{error.filename or where} cannot be read: {error.strerror or error}. It has to be read to tell "
            "whether earlier results were changed. Choose another results_dir, or change the permissions of that file."
        ) from error


def _is_made(folder: Path) -> bool:
    """Make a folder; False if its name is taken."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _real(path: str) -> str:
    return os.path.normcase(os.path.realpath(path))


def _described(where: Place, *, tag: str | None = "") -> Description:
    """Describe a file or the store; without its digest if it has the given tag, or if None is given."""
    if where.name == STORE:
        files = [(path, status) for path, status in objects.listing(str(where)) if status.size_bytes]
        inside = {path: status.size_bytes for path, status in files}
        n_bytes, now, more = sum(inside.values()) or -1, _tag_of(files), {"inside": inside}
    else:
        status = objects.status(str(where))
        if status is None:
            return {"bytes": -1, "tag": "", "digest": ""}
        files, n_bytes, now, more = [], status.size_bytes, status.tag, {}
    digest = ""
    if tag is not None and tag != now:
        with suppress(FileNotFoundError, EOFError), _explain_unreadable(where):  # if it is gone, it fits no description
            digest = _digest_of_store(where, files) if where.name == STORE else _digest(where, n_bytes)
    return {"bytes": n_bytes, "tag": now, "digest": digest, **more}


def _tag_of(files: Iterable[tuple[str, objects.Status]]) -> str:
    return hashlib.sha256("".join(f"{path} {status}\n" for path, status in files).encode()).hexdigest()


def _digest_of_store(where: Place, files: Iterable[tuple[str, objects.Status]]) -> str:
    """Hash of the store: names and sizes of its files, and the content of the small ones."""
    state = hashlib.sha256()
    for path, status in files:
        state.update(f"{path} {status.size_bytes} ".encode())
        if status.size_bytes <= _HASHED_BYTES:
            state.update(read_range(where / path, 0, status.size_bytes))
    return state.hexdigest()


def _digest(where: Place, n_bytes: int) -> str:
    """Hash of a file: of all of it, or of evenly spaced slices if it is very large."""
    is_whole = n_bytes <= _WHOLE_BYTES
    step, length = (FETCHED_BYTES, FETCHED_BYTES) if is_whole else (n_bytes // _SLICES, _SLICE_BYTES)
    state = hashlib.sha256()
    for at in range(0, n_bytes, step):
        state.update(read_range(where, at, min(at + length, n_bytes)))
    return state.hexdigest()


def is_table_of_units(where: Place) -> bool:
    """Whether a table has a column of units: tools take any such table as one of the units in its folder."""
    try:
        head = read_range(where, 0, min(_HEADER_BYTES, size_of(where) or 0)).partition(b"\n")[0]
    except (OSError, EOFError):
        return False
    columns = head.decode("utf-8-sig", "replace").replace(",", "\t").split("\t")
    return "cluster_id" in [column.strip().strip("'\"") for column in columns]
