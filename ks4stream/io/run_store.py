"""The store of a run: what its tasks found, so that nothing that was finished is computed again.

It is a folder, or a prefix in an object store, with one folder per stage and key of what the stage depends on. Each of
these holds a record per task, and the files that tasks write beside it. A record is written by the worker and appears
all at once when its task is done: whatever dies afterwards, the record remains. A changed setting changes the keys of
the stages that depend on it; the other stages keep their records. When a sort has ended, the stages that it did not use
are removed: the store holds what the last finished sort needed, and what was found since.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout

from ks4stream.errors import DamagedFileError, Ks4StreamError, ResultsError
from ks4stream.io.atomic import DRAFT, atomic_write, explain_write_errors
from ks4stream.io.kept_traces import SCRATCH
from ks4stream.io.objects import UnconditionalError, Version, Versioned, listing, read_versioned, write_bytes, write_if
from ks4stream.io.places import ObjectPath, Place, below, read_whole, remove, size_of
from ks4stream.io.records import converted, key_of, read_record, write_record
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.tables import Receipt
from ks4stream.messages import hand_on, listeners, warn
from ks4stream.method import METHOD_VERSION

FORMAT = "ks4stream.Run/1"
MANIFEST, LOCK = "manifest.json", "lock"
RENEWED_S, LOOKED_S, LEASE_S, SETTLED_S = 20.0, 2.0, 120.0, 3.0  # see ObjectLock
RELEASED_S = 10.0  # how long the end of a sort waits for its lock to be released
FREE = b"free"  # content of a lock that nobody holds
_STAGE = re.compile("[a-z-]+-[0-9a-f]{20}")  # name of a stage's folder: nothing else is ever removed
READS = 16  # records read from an object store at the same time

Size = Callable[[Place], int | None]
"""Returns the size of a file or an object in bytes; None if it does not exist."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStore:
    """A folder of stages.

    Attributes
    ----------
    folder : Path or ObjectPath
    scratch : Path
        Folder on this machine for files that are mapped into memory; removed with the run.
    lock : ObjectLock or None
        Keeps other runs from writing to an object store; None for a folder, which is locked by the system.
    """

    folder: Place
    scratch: Path = Path()
    lock: ObjectLock | None = None
    _used: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Make sure that the store still belongs to this run, before it starts or writes anything that others share.

        Raises
        ------
        ResultsError
            If another run has taken it over.
        """
        if self.lock is not None:
            self.lock.renew()

    def stage(self, name: str, key: str, classes: tuple[type, ...] = ()) -> StageStore:
        """The part of the store for a stage with this key, whose records may hold these classes."""
        self.check()
        folder = self.folder / f"{name.replace(' ', '-')}-{key[:20]}"
        self._used.add(folder.name)
        return StageStore(folder, classes)

    @property
    def used(self) -> set[str]:
        """Names of the stages' folders that were used so far; names may be added, for :meth:`tidy` to keep."""
        return self._used

    def tidy(self, *, keep: bool) -> None:
        """When a sort has ended, remove the stages it did not use, those of other settings; without `keep`, all."""
        self.check()
        with explain_write_errors(self.folder):
            for name, is_folder in below(self.folder):
                if is_folder and _STAGE.fullmatch(name) and not (keep and name in self._used):
                    try:
                        remove(self.folder / name, folder=True)
                    except (OSError, Ks4StreamError) as error:
                        # a task of a stopped sort may still be writing there
                        _log.warning("%s is kept because it could not be removed: %s", self.folder / name, error)
        if keep:
            kept_bytes = sum(found.size_bytes for _, found in listing(str(self.folder)))
            _log.info("%.1f MB are kept in %s; keep_run=False would remove them", kept_bytes / 1e6, self.folder)


@dataclass(frozen=True)
class StageStore:
    """The records of one stage."""

    folder: Place
    classes: tuple[type, ...]

    def recall(self, items: Sequence[Any]) -> dict[int, Any]:
        """What is known of some of the items, by index; damaged records are removed.

        An object store answers slowly, but can answer many requests at the same time: for several items, all sizes
        come from one listing, and records are read in parallel.
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
                _log.warning("%s It is computed again.", error)
                with explain_write_errors(self.folder):
                    remove(path)
                return []

        with ThreadPoolExecutor(READS, initializer=hand_on, initargs=(listeners(),)) as pool:
            each = map(found, items) if isinstance(self.folder, Path) else pool.map(found, items)
            return {index: value for index, values in enumerate(each) for value in values}

    def _read(self, path: Place, n_bytes: int, size: Size) -> Any:
        def present(receipt: Receipt) -> Receipt:
            here = replace(receipt, path=str(self.folder / Path(receipt.path).name))  # the folder may have been moved
            if not here.is_there(size):
                raise DamagedFileError(here.path)
            return here

        return converted(read_record(path, (Receipt, *self.classes), size=n_bytes), Receipt, present)


@dataclass(frozen=True)
class Checkpointed:
    """A task that leaves a record of what it found, and looks for one first.

    A worker may die after it has left the record and before it has returned the result; the task then runs again.
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
    """Path of the record of an item."""
    return folder / f"{key_of(item)[:24]}.record.npz"


@contextmanager
def open_store(folder: Place, *, data: str, fresh: bool = False, recall: bool = True) -> Iterator[RunStore]:
    """Open the store of a run, for this process alone.

    Parameters
    ----------
    folder : Path or ObjectPath
        Made if needed.
    data : str
        Hash of what is sorted.
    fresh : bool
        Start with an empty store, whatever is there.
    recall : bool
        Whether equal hashes mean equal data; if not, a store with the same hash is emptied, too.

    Raises
    ------
    ResultsError
        If another run is using it, or it belongs to other data or another version of the method, or is not a store
        at all (it is left as it is in these cases), or if it cannot be written to.
    """
    expected = {"format": FORMAT, "method": METHOD_VERSION, "data": data}
    with ExitStack() as stack:
        lock = None
        with explain_write_errors(folder):
            _check_kind(folder)
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(_locked(folder / LOCK).release)
            else:
                lock = stack.enter_context(ObjectLock(folder / LOCK))
                scratch = stack.enter_context(scratch_folder())
            found = {} if fresh else _manifest(folder)
            if found:
                _check_manifest(folder, found, expected)
            if fresh or not recall:
                _empty(folder)
            if not found:  # before anything else, so that the folder is recognised as a store from then on
                with atomic_write(folder / MANIFEST) as file:
                    file.write(json.dumps(expected, indent=1).encode())
            if isinstance(folder, Path):
                for draft in folder.rglob("*.draft"):  # left by workers that were killed
                    if DRAFT.fullmatch(draft.name):
                        draft.unlink(missing_ok=True)
                scratch = folder / SCRATCH
                shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
                scratch.mkdir(exist_ok=True)
                stack.callback(shutil.rmtree, scratch, ignore_errors=True)  # mapped files live until they are unmapped
        yield RunStore(folder, scratch, lock)


class ObjectLock:
    """A lock that is an object: it contains its holder's name, and a number that the holder raises as long as it lives.

    Clocks of different machines are never compared. Each write is conditional on the object being as it was last seen,
    which the store decides, so only one of several processes that claim a lock gets it. A lock that is held can be
    claimed only if it has not changed for the length of the lease, or if its holder was a process of this machine that
    is dead; a holder that has lost its lock in this way learns it at the next renewal. A released lock remains as an
    object that says so, because stores do not support conditional removal.

    If a store does not support conditional writes, which is tested, a warning says so. A claim is then written, and
    read back after some seconds: two runs that start within these seconds might both hold the lock.

    Parameters
    ----------
    path : ObjectPath
    lease_s, renewed_s, looked_s : float
        How long a lock remains held without being renewed, the time between renewals, and the time between looks at a
        lock that another process holds.

    Raises
    ------
    ResultsError
        If another process holds the lock when it is entered.
    """

    def __init__(
        self,
        path: ObjectPath,
        *,
        lease_s: float | None = None,
        renewed_s: float | None = None,
        looked_s: float | None = None,
    ) -> None:
        self._path = path
        self._lease_s = LEASE_S if lease_s is None else lease_s
        self._renewed_s = RENEWED_S if renewed_s is None else renewed_s
        self._looked_s = LOOKED_S if looked_s is None else looked_s
        self._name, self._count = f"{platform.node()} {os.getpid()} {_where()}{uuid4().hex}", 0
        self._version: Version | None = None
        self._is_lost, self._is_conditional = False, True
        self._turn, self._ended = threading.Lock(), threading.Event()
        self._renewing = threading.Thread(target=copy_context().run, args=(self._keep_renewing,), daemon=True)

    def __enter__(self) -> ObjectLock:
        if not self._write(self._unheld()) or (self._is_conditional and not self._is_ours_after_trying()):
            raise self._held(self._look())
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join(RELEASED_S)
        if self._renewing.is_alive():  # the store is out of reach; the thread keeps trying for minutes
            self._not_released("the store has not answered yet")

    def renew(self) -> None:
        """Show others that the lock is still held.

        Raises
        ------
        ResultsError
            If another has claimed it.
        """
        with self._turn:
            if not self._is_lost and not self._write(self._version):
                there_is_none = self._look() is None  # the object was deleted
                self._is_lost = not (there_is_none and self._write(None))
        if self._is_lost:
            raise ResultsError(
                f"{self._path.parent.parent} was taken over by another run{_by(self._look())}, because this one did "
                f"not renew its lock for {self._lease_s:.0f} s: its machine may have been suspended, or the store was "
                "out of reach. No results are written. Wait until the other run has ended, or choose another "
                "results_dir."
            )

    def _unheld(self) -> Version | None:
        """Wait until nobody holds the lock, or it has not been renewed for a lease; returns its version."""
        first = found = self._look()
        waited_s = 0.0  # counted in sleeps, because a clock may be set in the meantime
        while found is not None and first is not None and found.content != FREE:
            if found.content != first.content:
                raise self._held(found)
            if _is_dead(found):
                _log.info("%s was held by a dead process of this machine and is taken over", self._path)
                break
            if waited_s >= self._lease_s:
                _log.info("%s was not renewed for %.0f s and is taken over", self._path, waited_s)
                break
            if not waited_s:
                warn(
                    f"Another run{_by(found)} holds {self._path}. Waiting up to {self._lease_s:.0f} s to see whether "
                    "it is still alive: if it was killed, this run continues where it stopped."
                )
            time.sleep(self._looked_s)
            waited_s += self._looked_s
            found = self._look()
        return None if found is None else found.version

    def _look(self) -> Versioned | None:
        return read_versioned(self._path.location)

    def _write(self, version: Version | None, content: bytes | None = None) -> bool:
        """Write the name, or `content`, in place of a version; returns whether it is there now.

        After a write has failed, it is unknown whether it was done, so the lock is read, and the write is retried for
        half of the lease. Content with our own name is ours, even if it comes from an earlier write.
        """
        self._count += 1
        content = content or f"{self._name} {self._count}".encode()
        until = time.monotonic() + self._lease_s / 2
        while True:
            failed: Ks4StreamError | None = None
            try:
                if self._put(version, content):
                    return True
            except UnconditionalError:
                self._do_without_conditions()
                continue
            except Ks4StreamError as error:
                failed = error
            try:
                found = self._look()
                now = None if found is None else found.version
                if found is not None and found.content == content:
                    self._version = now
                    return True
                if found is not None and self._name.encode() in found.content:
                    if now != version:
                        version = now
                        continue
                elif failed is None or now != version:
                    return False
            except Ks4StreamError as error:
                failed = error
            pause = time.sleep if content == FREE else self._ended.wait  # a release is retried, too, after the end
            if time.monotonic() > until or pause(self._looked_s):
                raise failed or ResultsError(f"{self._path} still belongs to this run, but cannot be written.")

    def _put(self, version: Version | None, content: bytes) -> bool:
        """Write once; False if only reading the lock can tell whether it was done."""
        if self._is_conditional:
            now = write_if(self._path.location, content, version)
            self._version = now or self._version
            return now is not None
        found = self._look()
        if found is None or found.version == version or self._name.encode() in found.content:
            write_bytes(self._path.location, content)
            if self._renewing.ident is None:  # it is a claim
                time.sleep(SETTLED_S)
        return False

    def _is_ours_after_trying(self) -> bool:
        """Test the store, as some accept conditions and ignore them; returns whether the lock is still ours."""
        before = self._version
        is_held = self._write(before)
        if not is_held or not self._is_conditional:
            return is_held
        tried = f"{self._name} tried".encode()
        if write_if(self._path.location, tried, before) is None and write_if(self._path.location, tried, None) is None:
            return True
        self._do_without_conditions()
        return self._write(None)

    def _do_without_conditions(self) -> None:
        self._is_conditional = False
        warn(
            f"The store of {self._path} does not support conditional writes (If-Match, If-None-Match), so two runs "
            f"that start within the same {SETTLED_S:.0f} s cannot be kept apart. Start them one after the other."
        )

    def _held(self, by: Versioned | None) -> ResultsError:
        return ResultsError(
            f"Another run is writing to {self._path.parent.parent}{_by(by)}. Wait until it has ended, or choose "
            "another results_dir."
        )

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._renewed_s):
            try:
                self.renew()
            except Exception as error:  # whatever it is, the lock lasts for some minutes
                if self._is_lost:
                    _log.error("%s", error)
                    return
                _log.warning("%s could not be renewed: %s", self._path, error)
        try:
            if not self._is_lost:
                self._write(self._version, FREE)
        except Ks4StreamError as error:  # the work under the lock has ended in any case
            self._not_released(error)

    def _not_released(self, why: object) -> None:
        _log.warning("%s could not be released and stays for %.0f s: %s", self._path, self._lease_s, why)


def _where() -> str:
    """Where process numbers are unique, with a colon: this boot of this machine, and this container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}:"
    except OSError:  # not on Linux
        return ""


def _is_dead(found: Versioned) -> bool:
    """Whether a lock's holder was a process of this machine that is known to be dead."""
    words = found.content.decode(errors="replace").split()
    if len(words) < 3 or not _where() or not words[2].startswith(_where()):
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):  # owned by another user
        return False
    return False


def _by(found: Versioned | None) -> str:
    """Who holds a lock, for messages."""
    words = [] if found is None else found.content.decode(errors="replace").split()
    return f" (process {words[1]} on {words[0]})" if len(words) > 2 else ""


def _locked(path: Path) -> BaseFileLock:
    """Lock a file, which is never removed: otherwise two processes could hold two files of the same name.

    The system releases the lock when its process dies. On file systems without locks, the file's existence counts
    instead, unless the process that made it was on this machine and is dead.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultsError(
            f"Another run is writing to {path.parent.parent}. Wait until it has ended, or choose another results_dir. "
            f"If it died on another machine, delete {path}."
        ) from None
    return lock


def _check_kind(folder: Place) -> None:
    """Refuse a folder that is not ours, before anything in it is touched."""
    if all(name == LOCK or DRAFT.fullmatch(name) for name, _ in below(folder)):  # of a run killed at its start
        return
    if not str(_manifest(folder).get("format", "")).startswith("ks4stream.Run/"):
        raise ResultsError(f"{folder} is not the store of a ks4stream run. Choose another results_dir.")


def _empty(folder: Place) -> None:
    """Remove all stages; the manifest, by which the folder is recognised as a store, stays.

    A task of a stopped sort may still be writing to a stage, so on a disk a stage is renamed before it is removed. What
    is left of it is removed with the other scratch files.
    """
    for name in [name for name, is_folder in below(folder) if is_folder and _STAGE.fullmatch(name)]:
        if isinstance(folder, ObjectPath):
            remove(folder / name, folder=True)
            continue
        (folder / SCRATCH).mkdir(exist_ok=True)
        old = (folder / name).rename(folder / SCRATCH / f"{name}.{uuid4().hex}")
        with suppress(OSError):
            remove(old, folder=True)


def _manifest(folder: Place) -> dict[str, Any]:
    try:
        content = read_whole(folder / MANIFEST)  # a store that does not answer raises a RecordingError, a ValueError
    except (FileNotFoundError, EOFError):
        return {}
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_manifest(folder: Place, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the manifest of a store with what is expected."""
    if found.get("format") != expected["format"] or found.get("method") != expected["method"]:
        why = "was left by another version of ks4stream"
    elif found.get("data") != expected["data"]:
        why = "belongs to another recording (or its file has changed since)"
    else:
        return
    raise ResultsError(
        f"{folder} {why}. Choose another results_dir, or start over in this one with resume=False (--fresh)."
    )
