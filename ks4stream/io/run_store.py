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
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout

from ks4stream.errors import DamagedFileError, Ks4StreamError, Ks4StreamWarning, ResultsError
from ks4stream.io.atomic import DRAFT, atomic_write, explain_write_errors
from ks4stream.io.objects import UnconditionalError, Version, Versioned, listing, read_versioned, write_bytes, write_if
from ks4stream.io.places import ObjectPath, Place, below, read_whole, remove, size_of
from ks4stream.io.records import key_of, read_record, write_record
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.tables import Receipt
from ks4stream.messages import hand_on, listeners, warn

FORMAT = "ks4stream.Run/1"
METHOD_VERSION = 4
"""Counts changes of the method that change any result: records of another number are of no use."""

MANIFEST, LOCK, SCRATCH = "manifest.json", "lock", "scratch"
RENEWED_S, LOOKED_S, LEASE_S, SETTLED_S = 20.0, 2.0, 120.0, 3.0  # see ObjectLock
RELEASED_S = 10.0  # that the end of a sort waits for its lock to be released
FREE = b"free"  # what a lock holds that nobody does
_STAGE = re.compile("[a-z-]+-[0-9a-f]{20}")  # name of a stage's folder: nothing else is ever removed
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
    scratch : Path
        Folder on this machine for what is mapped into memory; it goes with the run.
    lock : ObjectLock or None
        What says that no other run writes here, where no system does.
    """

    folder: Place
    scratch: Path = Path()
    lock: ObjectLock | None = None
    _used: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Make sure that the store is still this run's, before anything is begun or written that others would share.

        Raises
        ------
        ResultsError
            If another run has taken it over.
        """
        if self.lock is not None:
            self.lock.renew()

    def stage(self, name: str, key: str, classes: tuple[type, ...] = ()) -> StageStore:
        """The part of a stage with this key, whose records may hold these classes."""
        self.check()
        folder = self.folder / f"{name.replace(' ', '-')}-{key[:20]}"
        self._used.add(folder.name)
        return StageStore(folder, classes)

    def tidy(self, *, keep: bool) -> None:
        """When a sort has ended, remove the stages it did not use, those of other settings; or all, unless `keep`."""
        self.check()
        with explain_write_errors(self.folder):
            for name, is_folder in below(self.folder):
                if is_folder and _STAGE.fullmatch(name) and not (keep and name in self._used):
                    try:
                        remove(self.folder / name, folder=True)
                    except (OSError, Ks4StreamError) as error:
                        # a task of a sort that was stopped may still write there
                        _log.warning("%s is kept, as it could not be removed: %s", self.folder / name, error)
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
                with explain_write_errors(self.folder):
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
class Checkpointed:
    """A task that leaves a record of what it found, and looks for one first.

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
def open_store(folder: Place, *, data: str, fresh: bool = False, recall: bool = True) -> Iterator[RunStore]:
    """Open the store of a run, for this process alone.

    Parameters
    ----------
    folder : Path or ObjectPath
        Made if need be.
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
            if found := {} if fresh else _manifest(folder):
                _check_manifest(folder, found, expected)
            if fresh or not recall:
                _empty(folder)
            if not found:  # before anything else is made, so that the folder is known as a store from then on
                with atomic_write(folder / MANIFEST) as file:
                    file.write(json.dumps(expected, indent=1).encode())
            if isinstance(folder, Path):
                for draft in folder.rglob("*.draft"):  # of workers that were killed
                    if DRAFT.fullmatch(draft.name):
                        draft.unlink(missing_ok=True)
                scratch = folder / SCRATCH
                shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
                scratch.mkdir(exist_ok=True)
                stack.callback(shutil.rmtree, scratch, ignore_errors=True)  # what is mapped stays until it is not
        yield RunStore(folder, scratch, lock)


class ObjectLock:
    """A lock that is an object: its holder's name, and a number that the holder raises as long as it lives.

    No clock is compared with another. Each write is on the condition that the object is still as it was last seen,
    which the store decides, so that of several that claim a lock one gets it. A lock that somebody holds is claimed
    only after it was looked at again and again for the length of the lease, and stayed as it was, or if its holder was
    a process of this machine that is dead; a holder whose lock
    was claimed so learns it when it next renews it. A lock that is let go of stays, as an object that says so: stores
    do not remove on conditions.

    Where a store does not write on conditions, which is tried, a warning says so, and a claim is written, and read back
    after some seconds: of those who begin within them two might hold the lock.

    Parameters
    ----------
    path : ObjectPath
    lease_s, renewed_s, looked_s : float
        How long a lock stays its holder's that is not renewed, between renewals, and between looks at another's lock.

    Raises
    ------
    ResultsError
        When it is entered while another process holds it.
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
        if self._renewing.is_alive():  # a store out of reach, which is tried for minutes; that goes on behind us
            self._not_released("the store has not answered yet")

    def renew(self) -> None:
        """Tell others that the lock is still held.

        Raises
        ------
        ResultsError
            If another has claimed it.
        """
        with self._turn:
            if not self._is_lost and not self._write(self._version):
                there_is_none = self._look() is None  # somebody has cleared up
                self._is_lost = not (there_is_none and self._write(None))
        if self._is_lost:
            raise ResultsError(
                f"{self._path.parent.parent} was taken over by another run{_by(self._look())}, as this one did not "
                f"renew its lock for {self._lease_s:.0f} s: its machine was suspended, say, or the store out of reach. "
                "No results are written. Wait for the other's end, or give another results_dir."
            )

    def _unheld(self) -> Version | None:
        """The version of a lock that nobody holds; of one that is held, after it was not renewed for a lease."""
        first = found = self._look()
        waited_s = 0.0  # sleeps are counted and no clock is asked, which may be set meanwhile
        while found is not None and first is not None and found.content != FREE:
            if found.content != first.content:
                raise self._held(found)
            if _is_dead(found):
                _log.info("%s was held by a process of this machine that is dead, and is taken over", self._path)
                break
            if waited_s >= self._lease_s:
                _log.info("%s was not renewed for %.0f s and is taken over", self._path, waited_s)
                break
            if not waited_s:
                warn(
                    f"Another run{_by(found)} holds {self._path}. Waiting up to {self._lease_s:.0f} s, to see whether "
                    "it is still there: if it was killed, this one goes on where it stopped.",
                    Ks4StreamWarning,
                    stacklevel=2,
                )
            time.sleep(self._looked_s)
            waited_s += self._looked_s
            found = self._look()
        return None if found is None else found.version

    def _look(self) -> Versioned | None:
        return read_versioned(self._path.location)

    def _write(self, version: Version | None, content: bytes | None = None) -> bool:
        """Write the name, or `content`, in place of a version; whether it now stands there.

        Of a write that failed nobody knows whether it was done, so the lock is looked at, and for half of the lease it
        is tried again. What stands there under our own name is ours, also if it is of an earlier write.
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
            pause = time.sleep if content == FREE else self._ended.wait  # a release is tried again, too, at the end
            if time.monotonic() > until or pause(self._looked_s):
                raise failed or ResultsError(f"{self._path} is still this run's, and cannot be written.")

    def _put(self, version: Version | None, content: bytes) -> bool:
        """Write once; False where only a look can tell whether it was done."""
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
        """Try the store, some of which take conditions and write nevertheless; whether the lock is still ours."""
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
            f"The store of {self._path} does not write on conditions (If-Match, If-None-Match), so that two runs that "
            f"begin within the same {SETTLED_S:.0f} s are not told from each other. Begin them one after the other.",
            Ks4StreamWarning,
            stacklevel=2,
        )

    def _held(self, by: Versioned | None) -> ResultsError:
        return ResultsError(
            f"Another run is writing to {self._path.parent.parent}{_by(by)}. Wait for its end, or give another "
            "results_dir."
        )

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._renewed_s):
            try:
                self.renew()
            except Exception as error:  # whatever it is, the lock lasts some minutes
                if self._is_lost:
                    _log.error("%s", error)
                    return
                _log.warning("%s could not be renewed: %s", self._path, error)
        try:
            if not self._is_lost:
                self._write(self._version, FREE)
        except Ks4StreamError as error:  # what the lock was for has ended, well or not
            self._not_released(error)

    def _not_released(self, why: object) -> None:
        _log.warning("%s could not be released, and stays for %.0f s: %s", self._path, self._lease_s, why)


def _where() -> str:
    """What process numbers are unique in, with a colon: this start of this machine, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}:"
    except OSError:  # another system than Linux
        return ""


def _is_dead(found: Versioned) -> bool:
    """Whether a lock's holder is known to be dead, as it was a process of this machine."""
    words = found.content.decode(errors="replace").split()
    if len(words) < 3 or not _where() or not words[2].startswith(_where()):
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):  # of another user
        return False
    return False


def _by(found: Versioned | None) -> str:
    """Who holds a lock, for messages."""
    words = [] if found is None else found.content.decode(errors="replace").split()
    return f" (process {words[1]} on {words[0]})" if len(words) > 2 else ""


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
    if all(name == LOCK or DRAFT.fullmatch(name) for name, _ in below(folder)):  # of a run that was killed as it began
        return
    if not str(_manifest(folder).get("format", "")).startswith("ks4stream.Run/"):
        raise ResultsError(f"{folder} is not the store of a run of ks4stream. Give another results_dir.")


def _empty(folder: Place) -> None:
    """Remove all stages; the manifest stays, by which the folder is known as a store."""
    for name, is_folder in below(folder):
        if is_folder and _STAGE.fullmatch(name):
            remove(folder / name, folder=True)


def _manifest(folder: Place) -> dict[str, Any]:
    try:
        found = json.loads(read_whole(folder / MANIFEST))
    except (FileNotFoundError, EOFError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_manifest(folder: Place, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the manifest of a store with what is expected."""
    if found.get("format") != expected["format"] or found.get("method") != expected["method"]:
        why = "was left by another version of ks4stream"
    elif found.get("data") != expected["data"]:
        why = "is of another recording (or its file was written to since)"
    else:
        return
    raise ResultsError(
        f"{folder} {why}. Sort into another results_dir, or begin anew there with resume=False (--fresh)."
    )
