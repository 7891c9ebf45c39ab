"""The store of a run: what its tasks found, so that nothing that was finished is computed again.

It lies in a folder, or under a prefix of an object store. A folder per stage and per key of what the stage depends on,
in it a record per task and what tasks write beside it. A record appears when its task is done, all at once, written by
the worker: whatever dies afterwards, it is there. Another setting makes other keys for the stages it touches, and
leaves the others their records. When a sort has ended, what it did not use goes: the store holds what the last finished
sort needed, and what was found since.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout

from ks4stream.errors import DamagedFileError, ResultsError
from ks4stream.io.objects import age_s, listing, write_bytes
from ks4stream.io.places import ObjectPath, Place, below, read_whole, remove, size_of
from ks4stream.io.records import DRAFT, appearing, key_of, read_record, write_record, writing_to
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.spikes import Receipt
from ks4stream.messages import hand_on, listeners

FORMAT = "ks4stream.Run/1"
METHOD = 4
"""Counts changes of the method that change any result: records of another number are of no use."""

MANIFEST, LOCK, SCRATCH = "manifest.json", "lock", "scratch"
RENEWED_S, STALE_S, SETTLED_S = 60.0, 300.0, 2.0  # see ObjectLock
READS = 16  # of records at a time, from an object store

Size = Callable[[Place], int | None]
"""Tells the bytes of a file or an object; None if there is none."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStore:
    """A folder of stages.

    Attributes
    ----------
    folder : Path or ObjectPath
    classes : tuple of type
        Classes that records may hold.
    scratch : Path
        Folder on this machine for what is mapped into memory; it goes with the run.
    """

    folder: Place
    classes: tuple[type, ...]
    scratch: Path = Path()
    _used: set[str] = field(default_factory=set)

    def stage(self, name: str, key: str) -> StageStore:
        """The part of a stage with this key."""
        folder = self.folder / f"{name.replace(' ', '-')}-{key[:20]}"
        self._used.add(folder.name)
        return StageStore(folder, self.classes)

    def tidy(self, *, keep: bool) -> None:
        """When a sort has ended, remove the stages it did not use, those of other settings; or all, unless `keep`."""
        with writing_to(self.folder):
            for name, is_folder in below(self.folder):
                if is_folder and name != SCRATCH and not (keep and name in self._used):
                    remove(self.folder / name, folder=True)
        if keep:
            kept_bytes = sum(found.size_bytes for _, found in listing(str(self.folder)))
            _log.info("%.1f MB are kept in %s; keep_run=False keeps nothing", kept_bytes / 1e6, self.folder)


@dataclass(frozen=True)
class StageStore:
    """The records of one stage."""

    folder: Place
    classes: tuple[type, ...]

    def recall(self, items: Sequence[Any]) -> dict[int, Any]:
        """What is known of some of the items, by index; what is damaged is removed.

        An object store takes its time for every request, but answers many at a time: of several items, it is asked
        once for all sizes, and records are read side by side.
        """
        size = size_of if isinstance(self.folder, Path) or len(items) <= 1 else _sizes_in(self.folder)

        def found(item: Any) -> list[Any]:
            path = record_path(self.folder, item)
            n_bytes = size(path)
            if n_bytes is None:
                return []
            try:
                return [self._read(path, n_bytes, size)]
            except DamagedFileError as error:
                _log.warning("%s It is computed anew.", error)
                with writing_to(self.folder):
                    remove(path)
                return []

        with ThreadPoolExecutor(READS, initializer=hand_on, initargs=(listeners(),)) as pool:
            each = map(found, items) if isinstance(self.folder, Path) else pool.map(found, items)
            return {index: value for index, values in enumerate(each) for value in values}

    def _read(self, path: Place, n_bytes: int, size: Size) -> Any:
        value = read_record(path, (Receipt, *self.classes), size=n_bytes)
        receipt = getattr(value, "receipt", value)
        if not isinstance(receipt, Receipt):
            return value
        receipt = replace(receipt, path=str(self.folder / Path(receipt.path).name))  # the folder may have been moved
        if not receipt.is_there(size):
            raise DamagedFileError(receipt.path)
        return receipt if isinstance(value, Receipt) else value._replace(receipt=receipt)


@dataclass(frozen=True)
class Remembered:
    """A task's function that leaves a record of what it found, and looks for one first.

    A worker may die between leaving the record and handing over what it found; the task then comes a second time.
    """

    function: Callable[[Any], Any]
    store: StageStore

    def __call__(self, item: Any) -> Any:
        for value in self.store.recall([item]).values():
            return value
        value = self.function(item)
        write_record(record_path(self.store.folder, item), value)
        return value


def _sizes_in(folder: ObjectPath) -> Size:
    """Sizes of the objects in a folder, from one listing."""
    known = {name: found.size_bytes for name, found in listing(folder.location)}
    return lambda where: known.get(where.name)


def record_path(folder: Place, item: Any) -> Place:
    """Where the record of an item lies."""
    return folder / f"{key_of(item)[:24]}.record.npz"


@contextmanager
def open_store(
    folder: Place, classes: tuple[type, ...], *, data: str, fresh: bool = False, recall: bool = True
) -> Iterator[RunStore]:
    """Open the store of a run, for this process alone.

    Parameters
    ----------
    folder : Path or ObjectPath
        Made if need be.
    classes : tuple of type
        Classes that records may hold.
    data : str
        Hash of what is sorted.
    fresh : bool
        Begin with an empty store, whatever is there.
    recall : bool
        Whether equal hashes are equal data; if not, a store of the same hash is emptied, too.

    Raises
    ------
    ResultsError
        If another run is using it, or it is of other data, of another version of the method or no store at all; it is
        left as it is. Or if it cannot be written to.
    """
    with ExitStack() as stack:
        with writing_to(folder):
            _check_kind(folder)
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
                lock = _locked(folder / LOCK)
                stack.callback(lock.release)
                scratch = folder / SCRATCH
                shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
                scratch.mkdir(exist_ok=True)
                stack.callback(shutil.rmtree, scratch, ignore_errors=True)  # what is mapped stays until it is not
            else:
                stack.enter_context(ObjectLock(folder / LOCK))
                scratch = stack.enter_context(scratch_folder())
            if fresh:
                _empty(folder)
            for draft in folder.rglob(f"*{DRAFT}") if isinstance(folder, Path) else ():  # of workers that were killed
                draft.unlink(missing_ok=True)
        _check_manifest(folder, {"format": FORMAT, "method": METHOD, "data": data})
        if not recall:
            _empty(folder)
            _check_manifest(folder, {"format": FORMAT, "method": METHOD, "data": data})
        yield RunStore(folder, classes, scratch)


class ObjectLock:
    """A lock that is an object, written anew every minute; one that was not for five is nobody's any more.

    Parameters
    ----------
    path : ObjectPath

    Raises
    ------
    ResultsError
        When it is entered while another process holds it.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._ended = path, threading.Event()
        self._name = f"{platform.node()} {os.getpid()} {uuid4().hex}".encode()
        self._renewing = threading.Thread(target=copy_context().run, args=(self._renew,), daemon=True)

    def __enter__(self) -> None:
        is_ours = write_bytes(self._path.location, self._name, anew=True) or self._is_ours()
        if not is_ours and (age_s(self._path.location) < STALE_S or not self._taken_over()):
            raise ResultsError(
                f"Another run is writing to {self._path.parent.parent}. Wait for its end, or give another "
                f"results_dir. If none is, as it was killed, try again in {STALE_S / 60:.0f} minutes."
            )
        self._renewing.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        if self._is_ours():
            remove(self._path)

    def _is_ours(self) -> bool:
        try:
            return read_whole(self._path) == self._name
        except (FileNotFoundError, EOFError):  # or it was written by another while it was read
            return False

    def _taken_over(self) -> bool:
        """Write the name into a lock that nobody renews; of several that do so at a time, the last has it."""
        write_bytes(self._path.location, self._name)
        return not self._ended.wait(SETTLED_S) and self._is_ours()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            try:
                if size_of(self._path) is not None and not self._is_ours():
                    _log.error("%s was taken over by another run, as this one did not renew it.", self._path)
                    return
                write_bytes(self._path.location, self._name)
            except Exception as error:  # whatever it is, the lock lasts some minutes
                _log.warning("%s could not be renewed: %s", self._path, error)


def _locked(path: Path) -> BaseFileLock:
    """A lock that is held, on a file that stays: removed, two processes could hold two files of its name.

    The system lets go of it when its process dies. On file systems without locks the file's existence counts instead;
    of a process that died on the same machine it is known that it does no more.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultsError(
            f"Another run is writing to {path.parent.parent}. Wait for its end, or give another results_dir. If none "
            f"is, as it died on another machine, delete {path}."
        ) from None
    return lock


def _check_kind(folder: Place) -> None:
    """Refuse a folder that is none of ours, before anything in it is touched."""
    if not any(name not in (LOCK, SCRATCH) and not name.endswith(DRAFT) for name, _ in below(folder)):
        return
    if not str(_manifest(folder).get("format", "")).startswith("ks4stream.Run/"):
        raise ResultsError(f"{folder} is not the store of a run of ks4stream. Give another results_dir.")


def _empty(folder: Place) -> None:
    """Remove all but the lock; the manifest last, without which the folder would not be known as a store."""
    for name, is_folder in sorted(below(folder), key=lambda entry: entry[0] == MANIFEST):
        if name not in (LOCK, SCRATCH):
            remove(folder / name, folder=is_folder)


def _manifest(folder: Place) -> dict[str, Any]:
    try:
        found = json.loads(read_whole(folder / MANIFEST))
    except (FileNotFoundError, EOFError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_manifest(folder: Place, expected: dict[str, Any]) -> None:
    """Write the manifest of a new store, or hold that of an old one against what is expected."""
    found = _manifest(folder)
    if not found:
        with appearing(folder / MANIFEST) as file:
            file.write(json.dumps(expected, indent=1).encode())
        return
    if found.get("format") != expected["format"] or found.get("method") != expected["method"]:
        why = "was left by another version of ks4stream"
    elif found.get("data") != expected["data"]:
        why = "is of another recording (or its file was written to since)"
    else:
        return
    raise ResultsError(
        f"{folder} {why}. Sort into another results_dir, or begin anew there with resume=False (--fresh)."
    )
