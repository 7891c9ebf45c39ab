"""A source whose pieces are fetched once and read again from the disk of the machine that computes."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
from filelock import BaseFileLock, FileLock
from numcodecs import Blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ks4stream.errors import ResultsError
from ks4stream.io.atomic import atomic_write
from ks4stream.io.recording_cache.account import ROOM, take
from ks4stream.io.recording_cache.folders import USE, is_ours, remove_lock, remove_stale, temporary_folder, was_left
from ks4stream.io.sources.base import OfSource
from ks4stream.recording import FlatFile, Source

FETCHES = 16  # concurrent fetches of pieces in one process
LOCKS = 64  # lock files with which processes agree on who fetches a piece

_log = logging.getLogger(__name__)


@dataclass
class _State:
    """State of one process: pieces that are in use, and what each thread read last."""

    pieces: WeakValueDictionary[int, Future[NDArray[Any]]] = field(default_factory=WeakValueDictionary)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.local = field(default_factory=threading.local)
    folder: Path | None = None
    is_ready: bool = False
    use: BaseFileLock | None = None


@dataclass(frozen=True)
class CachedSource(OfSource):
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
        Where caches lie; None: in the temporary folder (``TMPDIR``) of the machine that reads.
    limit_bytes : int or None
        Disk space that the cache may use on one machine; None: half of what was free there. Pieces beyond it are
        fetched whenever they are needed. 0 caches nothing.
    is_private : bool
        Whether the cache belongs to one object, which creates and removes it; until then, copies of the object in
        other processes use it.
    """

    source: Source
    key: str
    piece_samples: int
    folder: str | None = None
    limit_bytes: int | None = None
    is_private: bool = False
    _state: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the state of this process."""
        return type(self), (self.source, self.key, self.piece_samples, self.folder, self.limit_bytes, self.is_private)

    @property
    def flat_files(self) -> tuple[FlatFile, ...] | str:
        """The source's."""
        return self.source.flat_files

    @property
    def is_flat(self) -> bool:
        """Whether the source is flat."""
        return self.source.is_flat

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel), and start to fetch what is likely to come next."""
        length, thread = self.piece_samples, self._state.thread
        wanted = range(start // length, -(-stop // length))
        reads_on = start <= getattr(thread, "stop", -1) < stop
        last = min(2 * stop - start, self.n_samples) if reads_on else stop
        pieces = {index: self._begun(index) for index in range(wanted.start, -(-last // length))}
        thread.stop, thread.pieces = stop, pieces  # held until this thread's next read
        parts = [pieces[index].result()[max(start - index * length, 0) : stop - index * length] for index in wanted]
        return np.concatenate(parts) if parts else np.empty((0, self.n_channels), self.dtype)

    def digest(self) -> str:
        """The source's digest when the sort began."""
        return self.key

    def pin(self) -> None:
        """Create the cache on this machine; it is removed when this object is garbage-collected or the program ends."""
        with self._state.lock:
            self._state.folder, self._state.is_ready = self._make_folder(), True
        if self._state.folder is not None:
            weakref.finalize(self, _remove_own, self._state.folder, os.getpid())

    def begin_use(self) -> None:
        """Mark the cache as in use on this machine, until :meth:`end_use` or the end of the process."""
        with suppress(OSError):  # then nothing can be cached either
            use = self._place()
            use = use.with_name(f"{use.name}-{uuid4().hex}{USE}")
            use.parent.mkdir(parents=True, exist_ok=True)
            self._state.use = FileLock(use, thread_local=False)
            self._state.use.acquire()

    def end_use(self) -> None:
        """Undo :meth:`begin_use`."""
        if self._state.use is not None:
            remove_lock(self._state.use)
            self._state.use = None

    def is_used(self) -> bool:
        """Whether a sort on this machine uses the cache."""
        try:
            here = self._place()
        except ResultsError:  # then nothing was cached either
            return False
        return not all(was_left(use) for use in here.parent.glob(f"{here.name}-*{USE}"))

    def forget(self) -> None:
        """Remove the cache from this machine."""
        with suppress(ResultsError):
            shutil.rmtree(self._place(), ignore_errors=True)

    def _place(self) -> Path:
        """Where pieces lie on this machine.

        Raises
        ------
        ResultsError
            If that is the temporary folder, and this user cannot have a private folder in it.
        """
        root = temporary_folder() if self.folder is None else Path(self.folder)
        return root / f"{self.key[:32]}-{self.piece_samples}"

    def _begun(self, index: int) -> Future[NDArray[Any]]:
        """A piece that is being fetched or already here, shared by all threads that want it."""
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
                piece = self._kept(path)  # another process may have been faster
                if piece is None:
                    piece = self._fetch(index)
                    self._keep(path, piece)
        return piece

    def _fetch(self, index: int) -> NDArray[Any]:
        start = index * self.piece_samples
        return self.source.read(start, min(start + self.piece_samples, self.n_samples))

    def _kept(self, path: Path) -> NDArray[Any] | None:
        """A piece from the disk; None if it is missing or corrupt."""
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        if len(content) < 4 or zlib.crc32(content[4:]) != int.from_bytes(content[:4], "little"):
            _log.warning("%s is damaged; it is fetched again.", path)
            return None
        return np.frombuffer(Blosc().decode(content[4:]), self.dtype).reshape(-1, self.n_channels)

    def _keep(self, path: Path, piece: NDArray[Any]) -> None:
        if piece.nbytes > Blosc.max_buffer_size:
            return
        packed = Blosc("zstd", clevel=1, shuffle=Blosc.BITSHUFFLE).encode(np.ascontiguousarray(piece))
        try:
            if take(path.parent, 4 + len(packed), self.limit_bytes):
                with atomic_write(path) as file:
                    file.write(zlib.crc32(packed).to_bytes(4, "little"))
                    file.write(packed)
        except OSError as error:  # the disk is full, or the folder was removed: the sort continues without
            _log.warning("The recording is no longer cached: %s", error)
            self._state.folder = None

    def _ready_folder(self) -> Path | None:
        """The folder for pieces on this machine, created if necessary; None if nothing is cached."""
        with self._state.lock:
            if not self._state.is_ready:
                self._state.folder = None if self.limit_bytes == 0 else self._make_folder(only_found=self.is_private)
                self._state.is_ready = True
            folder = self._state.folder
            if folder is not None and self.folder is None and not is_ours(folder.parent):
                _log.warning("%s is no longer private to this user; the recording is not cached.", folder.parent)
                self._state.folder = None
            return self._state.folder

    def _make_folder(self, *, only_found: bool = False) -> Path | None:
        try:
            folder = self._place()
            if only_found and not folder.is_dir():
                return None
            if self.folder is None:
                remove_stale(folder.parent)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / ROOM).touch()  # it is in use
            take(folder, 0, self.limit_bytes)
        except OSError as error:
            _log.warning("The recording cannot be cached in %s: %s", self.folder or tempfile.gettempdir(), error)
            return None
        return folder


def _remove_own(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # not in a fork of the process that created it
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(maxsize=1)
def _pool(process_id: int) -> ThreadPoolExecutor:  # per process: a fork does not inherit threads
    return ThreadPoolExecutor(FETCHES, thread_name_prefix="ks4stream-fetch")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file, if possible; a folder that was removed is not created again for it."""
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
