"""The recording's way from a store to the kernels, past a cache on the disk of the machine that computes.

A sort passes over the recording several times, and tiles overlap. :class:`CachedSource` cuts time into *pieces*, as
long as the source's chunks or a few megabytes. A piece that is read for the first time stays on the disk of that
machine, compressed, in a folder named after the recording's digest, and all processes of the machine share it. Pieces
of one read are fetched side by side, and where a thread reads on from where its last read ended, as in a block of
tiles, what comes next is fetched meanwhile.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from numcodecs import Blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ks4stream.errors import Ks4StreamWarning, ResultsError
from ks4stream.io.atomic import appearing
from ks4stream.io.objects import is_remote
from ks4stream.io.sources import ArraySource, ConcatenatedSource, join
from ks4stream.messages import warn
from ks4stream.recording import FlatFile, Recording, Source

OFF = "off"
PIECE_BYTES = 4 << 20  # of samples, at least, in a piece: enough for a store to be quick, little to fetch in vain
FETCHES = 16  # of pieces at a time, in one process
LOCKS = 64  # files by which processes agree on who fetches a piece
STALE_DAYS = 7.0  # after which a cache in a temporary folder that nobody used is removed
TEMPORARY_NAMES = 10  # that are tried in the temporary folder, where others have made folders of our name
SHARE_OF_FREE = 0.5  # of what is free on the disk, that a cache may take
_USE = ".use"  # ends names of files that sorts lock, beside the caches they use
_ROOM, _ROOM_FORMAT = "room", struct.Struct("<qq")  # the file that counts bytes: allowed, taken

_log = logging.getLogger(__name__)


@dataclass
class _State:
    """What belongs to one process: pieces that somebody holds, and what each thread read last."""

    pieces: WeakValueDictionary[int, Future[NDArray[Any]]] = field(default_factory=WeakValueDictionary)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.local = field(default_factory=threading.local)
    folder: Path | None = None
    is_ready: bool = False
    use: BaseFileLock | None = None


@dataclass(frozen=True)
class CachedSource:
    """A source whose samples are fetched once and read again from the disk of the machine that reads.

    Attributes
    ----------
    source : Source
        Where the samples come from.
    key : str
        The source's digest when the sort began.
    piece_samples : int
        Length of a piece.
    folder : str or None
        Where caches lie; None: in the temporary folder (``TMPDIR``) of whichever machine reads.
    limit_bytes : int or None
        What the cache may take on one machine's disk; None: half of what was free there. What is beyond is fetched
        whenever it is needed. 0 keeps nothing.
    is_held : bool
        Whether the cache goes with one holder, who makes it: copies in other processes use it as long as it is there.
    """

    source: Source
    key: str
    piece_samples: int
    folder: str | None = None
    limit_bytes: int | None = None
    is_held: bool = False
    _state: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what belongs to one process."""
        return type(self), (self.source, self.key, self.piece_samples, self.folder, self.limit_bytes, self.is_held)

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return self.source.n_samples

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.source.n_channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return self.source.dtype

    @property
    def flat_files(self) -> tuple[FlatFile, ...] | str:
        """The source's."""
        return self.source.flat_files

    @property
    def is_flat(self) -> bool:
        """Whether the source is."""
        return getattr(self.source, "is_flat", False)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel), and begin to fetch what is likely to be next."""
        length, thread = self.piece_samples, self._state.thread
        wanted = range(start // length, -(-stop // length))
        reads_on = start <= getattr(thread, "stop", -1) < stop
        last = min(2 * stop - start, self.n_samples) if reads_on else stop
        pieces = {index: self._begun(index) for index in range(wanted.start, -(-last // length))}
        thread.stop, thread.pieces = stop, pieces  # held until this thread's next read
        parts = [pieces[index].result()[max(start - index * length, 0) : stop - index * length] for index in wanted]
        return np.concatenate(parts) if parts else np.empty((0, self.n_channels), self.dtype)

    def digest(self) -> str:
        """The source's, as it was when the sort began."""
        return self.key

    @property
    def digest_is_exact(self) -> bool:
        """Whether the source's is."""
        return self.source.digest_is_exact

    def hold(self) -> None:
        """Make the cache on this machine, to be removed when this object is garbage or the program ends."""
        with self._state.lock:
            self._state.folder, self._state.is_ready = self._make_folder(), True
        if self._state.folder is not None:
            weakref.finalize(self, _remove_own, self._state.folder, os.getpid())

    def begin_use(self) -> None:
        """Say to other sorts on this machine that the cache is in use, until the end of it or of this process."""
        with suppress(OSError):  # then nothing can be kept either
            use = self._place()
            use = use.with_name(f"{use.name}-{uuid4().hex}{_USE}")
            use.parent.mkdir(parents=True, exist_ok=True)
            self._state.use = FileLock(use, thread_local=False)
            self._state.use.acquire()

    def end_use(self) -> None:
        """Take that back."""
        if self._state.use is not None:
            _remove_lock(self._state.use)
            self._state.use = None

    def is_used(self) -> bool:
        """Whether a sort on this machine uses the cache."""
        try:
            here = self._place()
        except ResultsError:  # then nothing was kept either
            return False
        return not all(_was_left(use) for use in here.parent.glob(f"{here.name}-*{_USE}"))

    def forget(self) -> None:
        """Remove what is kept on this machine."""
        with suppress(ResultsError):
            shutil.rmtree(self._place(), ignore_errors=True)

    def _place(self) -> Path:
        """Where pieces lie on this machine.

        Raises
        ------
        ResultsError
            If that is the temporary folder, and this user can have none of his own there.
        """
        root = _temporary_folder() if self.folder is None else Path(self.folder)
        return root / f"{self.key[:32]}-{self.piece_samples}"

    def _begun(self, index: int) -> Future[NDArray[Any]]:
        """A piece that is on its way, or here; several threads that want it share it."""
        with self._state.lock:
            piece = self._state.pieces.get(index)
            if piece is None or (piece.done() and piece.exception() is not None):
                piece = self._state.pieces[index] = _pool(os.getpid()).submit(copy_context().run, self._piece, index)
            return piece

    def _piece(self, index: int) -> NDArray[Any]:
        folder = self._ready_folder()
        if folder is None:
            return self._fetch(index)
        path = folder / f"{index}.piece"
        piece = self._kept(path)
        if piece is None:
            with _alone(folder / f"{index % LOCKS}.lock"):
                piece = self._kept(path)  # another process may have been quicker
                if piece is None:
                    piece = self._fetch(index)
                    self._keep(path, piece)
        return piece

    def _fetch(self, index: int) -> NDArray[Any]:
        start = index * self.piece_samples
        return self.source.read(start, min(start + self.piece_samples, self.n_samples))

    def _kept(self, path: Path) -> NDArray[Any] | None:
        """A piece from the disk; None if it is not there, or not as it was written."""
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        if len(content) < 4 or zlib.crc32(content[4:]) != int.from_bytes(content[:4], "little"):
            _log.warning("%s is damaged; it is fetched anew.", path)
            return None
        return np.frombuffer(Blosc().decode(content[4:]), self.dtype).reshape(-1, self.n_channels)

    def _keep(self, path: Path, piece: NDArray[Any]) -> None:
        if piece.nbytes > Blosc.max_buffer_size:
            return
        packed = Blosc("zstd", clevel=1, shuffle=Blosc.BITSHUFFLE).encode(np.ascontiguousarray(piece))
        try:
            if _take(path.parent, 4 + len(packed), self.limit_bytes):
                with appearing(path) as file:
                    file.write(zlib.crc32(packed).to_bytes(4, "little"))
                    file.write(packed)
        except OSError as error:  # the disk is full, or the folder was removed: the sort goes on without
            _log.warning("The recording is not cached any longer: %s", error)
            self._state.folder = None

    def _ready_folder(self) -> Path | None:
        """Where pieces lie on this machine, made if need be; None if nothing is kept."""
        with self._state.lock:
            if not self._state.is_ready:
                self._state.folder = None if self.limit_bytes == 0 else self._make_folder(only_found=self.is_held)
                self._state.is_ready = True
            folder = self._state.folder
            if folder is not None and self.folder is None and not _is_ours(folder.parent):
                _log.warning("%s is not this user's alone any more; the recording is not cached.", folder.parent)
                self._state.folder = None
            return self._state.folder

    def _make_folder(self, *, only_found: bool = False) -> Path | None:
        try:
            folder = self._place()
            if only_found and not folder.is_dir():
                return None
            if self.folder is None:
                _remove_stale(folder.parent)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _ROOM).touch()  # it is in use
            _take(folder, 0, self.limit_bytes)
        except OSError as error:
            _log.warning("The recording cannot be cached in %s: %s", self.folder or tempfile.gettempdir(), error)
            return None
        return folder


@contextmanager
def cached(
    recording: Recording, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
) -> Iterator[Recording]:
    """A recording that is fetched once, for the duration of a sort, or of what a caller does around one.

    Parameters
    ----------
    recording : Recording
    cache_dir : path, optional
        Folder for the cache, on each machine that computes; what is kept there stays, for later sorts. By default
        recordings on object stores and web servers are kept in the temporary folder, and removed from this machine
        when a sort has ended well and no other one here uses them (from its workers' machines, the sort has them call
        :func:`forget`). After errors, and where workers died, caches go when they have not been used for a week and a
        sort begins there. Other recordings are not kept. "off" keeps nothing.
    cache_bytes : int, optional
        What the cache may take on the disk of a machine; by default half of what is free. The rest of the recording is
        fetched in every pass.

    Raises
    ------
    ResultsError
        If `cache_dir` cannot be made here.
    """
    folder, limit_bytes = _folder(cache_dir), 0 if cache_dir == OFF else cache_bytes
    source = _wrapped(recording.source, folder, limit_bytes)
    parts = [part for part in _parts(source) if isinstance(part, CachedSource)]
    if parts and limit_bytes != 0:
        _warn_of_little_room(parts, folder, limit_bytes)
    passed = replace(recording, source=source)
    passing = _passing(passed, recording)
    for cache in passing:
        cache.begin_use()
    try:
        yield passed
    except BaseException:
        if parts:
            where = folder or tempfile.gettempdir()
            _log.info("What was fetched of the recording stays in %s, for the same call again.", where)
        for cache in passing:
            cache.end_use()
        raise
    forget(ending(passed, recording))


def ending(recording: Recording, given: Recording) -> list[CachedSource]:
    """Caches that are of no use any more when the sort of a recording ends, which it does with this call.

    They lie in temporary folders, are not those it was given with, and no other sort on this machine uses them: the
    last one to end has them. They are cheap to pickle.
    """
    caches = _passing(recording, given)
    for cache in caches:  # all before any is looked at: the same source may be there twice
        cache.end_use()
    return [cache for cache in caches if not cache.is_used()]


def _passing(recording: Recording, given: Recording) -> list[CachedSource]:
    """Caches of a recording that lie in temporary folders and were made for its sort."""
    before = _parts(given.source)
    caches = [part for part in _parts(recording.source) if isinstance(part, CachedSource) and part not in before]
    return [cache for cache in caches if cache.folder is None and cache.limit_bytes != 0]


def forget(caches: Iterable[CachedSource]) -> None:
    """Remove from this machine what caches keep here."""
    for cache in caches:
        cache.forget()


def cached_while_held(recording: Recording, cache_dir: str | os.PathLike[str] | None = None) -> Recording:
    """A recording that is fetched once, for as long as somebody holds what is returned; a lazy array, say.

    Parameters
    ----------
    recording : Recording
    cache_dir : path, optional
        As in :func:`cached`, but by default what is kept is shared with no other call, on this machine only, and
        removed when the recording returned is garbage or the program ends. Other processes find it until then.

    Raises
    ------
    ResultsError
        If `cache_dir` cannot be made here.
    """
    folder = _folder(cache_dir)
    source = _wrapped(recording.source, folder, 0 if cache_dir == OFF else None, is_held=folder is None)
    callers = _parts(recording.source)
    for part in _parts(source):
        if isinstance(part, CachedSource) and part.is_held and part not in callers:
            part.hold()
    return replace(recording, source=source)


def _remove_own(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # and not a fork of the process that made it
        shutil.rmtree(folder, ignore_errors=True)


def _folder(cache_dir: str | os.PathLike[str] | None) -> str | None:
    """The user's own folder for caches, made if need be."""
    if cache_dir is None or cache_dir == OFF:
        return None
    folder = os.path.abspath(cache_dir)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cache_dir={folder} cannot be made ({error}). Choose another.") from error
    return folder


def _wrapped(source: Source, folder: str | None, limit_bytes: int | None, *, is_held: bool = False) -> Source:
    """The source with every part that is far away, or all but arrays in memory where a folder was named, cached."""
    if isinstance(source, ConcatenatedSource):
        return join(_wrapped(part, folder, limit_bytes, is_held=is_held) for part in source.sources)
    near = isinstance(source, ArraySource) if folder else not is_remote(getattr(source, "path", ""))
    if near or isinstance(source, CachedSource):
        return source
    row_bytes = source.n_channels * source.dtype.itemsize
    chunk = max(min(getattr(source, "chunk_samples", 1), source.n_samples), 1)
    length = chunk * max(-(-PIECE_BYTES // (chunk * row_bytes)), 1)
    is_held &= limit_bytes != 0
    is_shared = source.digest_is_exact and not is_held  # what may have changed is not found again
    return CachedSource(source, source.digest() if is_shared else uuid4().hex, length, folder, limit_bytes, is_held)


def _parts(source: Source) -> tuple[Source, ...]:
    if isinstance(source, ConcatenatedSource):
        return tuple(part for joined in source.sources for part in _parts(joined))
    return (source,)


def _warn_of_little_room(parts: list[CachedSource], folder: str | None, limit_bytes: int | None) -> None:
    """Say beforehand if the cache will hardly hold the recording; compressed, samples take about half their size."""
    needed = sum(part.n_samples * part.n_channels * part.dtype.itemsize for part in parts) // 2
    try:
        place = _temporary_folder() if folder is None else Path(folder)
    except ResultsError as error:
        warn(f"{error} Until then it is fetched in every pass.", Ks4StreamWarning, stacklevel=4)
        return
    room = limit_bytes if limit_bytes is not None else int(SHARE_OF_FREE * shutil.disk_usage(place).free)
    if needed > room:
        warn(
            f"The cache in {place} may take {room / 1e9:.3g} GB, but the recording needs about {needed / 1e9:.3g} GB: "
            "what does not fit is fetched in every pass. Give a larger disk (cache_dir, --cache) if fetching is slow.",
            Ks4StreamWarning,
            stacklevel=4,
        )


@lru_cache(maxsize=1)
def _pool(process_id: int) -> ThreadPoolExecutor:  # by process: threads are not inherited by a forked one
    return ThreadPoolExecutor(FETCHES, thread_name_prefix="ks4stream-fetch")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file, where there can be one; a folder that was removed is not made again for it."""
    if not path.parent.is_dir():
        yield
        return
    lock = FileLock(path)
    with suppress(OSError):  # the folder was removed
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _was_left(use: Path) -> bool:
    """Whether nobody holds a lock file, which goes then."""
    lock = FileLock(use)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError:  # it has just gone
        return True
    _remove_lock(lock)
    return True


def _remove_lock(lock: BaseFileLock) -> None:
    with suppress(OSError):  # where a file that is open cannot be removed it stays for the next one
        os.unlink(lock.lock_file)
    lock.release()


def _temporary_folder() -> Path:
    """The folder for this user's caches in the temporary one, made if need be.

    All may write there, and make a folder of our name before us: one that is another user's, or that others may write
    to, is left alone, and so is a symbolic link. A number is added to the name then, so that all processes of this user
    take the same folder nevertheless.

    Raises
    ------
    ResultsError
        If there can be none.
    """
    user = str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "")
    first = Path(tempfile.gettempdir(), f"ks4stream-cache-{user}")
    for folder in (first, *(first.with_name(f"{first.name}-{number}") for number in range(1, TEMPORARY_NAMES))):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:  # as it would for other names
            raise ResultsError(f"{folder} cannot be made: {error.strerror or error}.") from error
        if _is_ours(folder):
            return folder
        _say_not_ours(folder)
    raise ResultsError(
        f"The recording cannot be kept in {first}, nor in {TEMPORARY_NAMES - 1} more of its name: they are links, "
        "other users', or others may write to them. Name another folder (cache_dir, --cache, or TMPDIR)."
    )


def _is_ours(folder: Path) -> bool:
    """Whether a folder in the temporary one is this user's alone; on Windows that one is.

    Others may have been allowed to read it, by an earlier version; they are no longer.
    """
    if not hasattr(os, "geteuid"):
        return folder.is_dir()
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is a link or a file, or others may not look into it
        return False
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        if stat.S_IMODE(found.st_mode) != stat.S_IRWXU:
            os.fchmod(opened, stat.S_IRWXU)
    finally:
        os.close(opened)
    return True


@lru_cache
def _say_not_ours(folder: Path) -> None:
    _log.warning(
        "%s is a link, or another user's folder, or others may write to it. The cache goes to another folder, whose "
        "name ends in a number.",
        folder,
    )


def _remove_stale(root: Path) -> None:
    """Remove caches that sorts have left here and nobody has used for days."""
    oldest = time.time() - STALE_DAYS * 86400
    for use in root.glob(f"*{_USE}"):
        _was_left(use)
    for folder in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):
            used = folder / _ROOM
            if (used if used.exists() else folder).stat().st_mtime < oldest:
                shutil.rmtree(folder)


def _take(folder: Path, n_bytes: int, limit_bytes: int | None) -> bool:
    """Whether a cache has room for so many bytes more, which are taken then.

    What is taken is counted anew in an account that is empty, or cut short: it is new, or a crash or a full disk came
    between its emptying and its writing.

    Raises
    ------
    FileNotFoundError
        If there is no account: the cache was removed.
    """
    account = folder / _ROOM
    if not account.exists():  # before the lock, which would make the folder
        raise FileNotFoundError(account)
    with FileLock(folder / f"{_ROOM}.lock"):
        content = account.read_bytes()
        if len(content) == _ROOM_FORMAT.size:
            limit, taken = _ROOM_FORMAT.unpack(content)
        else:
            taken = sum(path.stat().st_size for path in folder.glob("*.piece"))
            limit = int(SHARE_OF_FREE * (shutil.disk_usage(folder).free + taken))
        fits = taken + n_bytes <= (limit if limit_bytes is None else limit_bytes)
        account.write_bytes(_ROOM_FORMAT.pack(limit, taken + n_bytes * fits))
        return bool(fits)
