"""Which recordings are cached, where, and for how long."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from ks4stream.errors import ResultsError
from ks4stream.io.recording_cache.account import SHARE_OF_FREE
from ks4stream.io.recording_cache.folders import temporary_folder
from ks4stream.io.recording_cache.source import CachedSource
from ks4stream.io.sources import ArraySource, ConcatenatedSource, join
from ks4stream.messages import warn
from ks4stream.recording import Recording, Source

_log = logging.getLogger(__name__)
OFF = "off"
PIECE_BYTES = 4 << 20  # of samples, at least, in a piece: large enough for fast requests, small enough to waste little


@contextmanager
def cached(
    recording: Recording, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
) -> Iterator[Recording]:
    """A recording that is fetched once, for the duration of a sort or of whatever a caller does around it.

    Parameters
    ----------
    recording : Recording
    cache_dir : path, optional
        Folder for the cache on each machine that computes; what is cached there stays for later sorts. By default,
        recordings on object stores and web servers are cached in the temporary folder, and removed from this machine
        when a sort has succeeded and no other sort here uses them (on its workers' machines, the sort makes them call
        :func:`forget`). After errors, and where workers died, caches are removed when a sort begins there and they
        have not been used for a week. Other recordings are not cached. "off" caches nothing.
    cache_bytes : int, optional
        Disk space that the cache may use on each machine; by default half of what is free. The rest of the recording
        is fetched in every pass.

    Raises
    ------
    ResultsError
        If `cache_dir` cannot be created on this machine.
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
            _log.info("The part of the recording that was fetched stays in %s, for when the sort is run again.", where)
        for cache in passing:
            cache.end_use()
        raise
    forget(ending(passed, recording))


def ending(recording: Recording, given: Recording) -> list[CachedSource]:
    """End the use of a recording's caches by its sort, and return those that are no longer needed.

    They lie in temporary folders, were not part of the recording that was given, and are not used by any other sort on
    this machine: the last sort to end gets them. They are cheap to pickle.
    """
    caches = _passing(recording, given)
    for cache in caches:  # for all caches before any is checked: the same source may occur twice
        cache.end_use()
    return [cache for cache in caches if not cache.is_used()]


def _passing(recording: Recording, given: Recording) -> list[CachedSource]:
    """Caches of a recording that lie in temporary folders and were made for its sort."""
    before = _parts(given.source)
    caches = [part for part in _parts(recording.source) if isinstance(part, CachedSource) and part not in before]
    return [cache for cache in caches if cache.folder is None and cache.limit_bytes != 0]


def forget(caches: Iterable[CachedSource]) -> None:
    """Remove the contents of these caches from this machine."""
    for cache in caches:
        cache.forget()


def cached_while_held(
    recording: Recording, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
) -> Recording:
    """A recording that is fetched once, for as long as the returned object is referenced, for instance by a lazy array.

    Parameters
    ----------
    recording : Recording
    cache_dir : path, optional
        As in :func:`cached`, but by default the cache is not shared with other calls, is on this machine only, and is
        removed when the returned recording is garbage-collected or the program ends. Until then other processes can
        use it.
    cache_bytes : int, optional
        As in :func:`cached`.

    Raises
    ------
    ResultsError
        If `cache_dir` cannot be created on this machine.
    """
    folder = _folder(cache_dir)
    source = _wrapped(recording.source, folder, 0 if cache_dir == OFF else cache_bytes, is_private=folder is None)
    callers = _parts(recording.source)
    for part in _parts(source):
        if isinstance(part, CachedSource) and part.is_private and part not in callers:
            part.pin()
    return replace(recording, source=source)


def _folder(cache_dir: str | os.PathLike[str] | None) -> str | None:
    """The folder for caches that the user gave, created if necessary."""
    if cache_dir is None or cache_dir == OFF:
        return None
    folder = os.path.abspath(cache_dir)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cache_dir={folder} cannot be created ({error}). Choose another folder.") from error
    return folder


def _wrapped(source: Source, folder: str | None, limit_bytes: int | None, *, is_private: bool = False) -> Source:
    """The source with its remote parts cached; if a folder was given, all parts that are not arrays in memory."""
    if isinstance(source, ConcatenatedSource):
        return join(_wrapped(part, folder, limit_bytes, is_private=is_private) for part in source.sources)
    near = isinstance(source, ArraySource) if folder else not source.is_remote
    if near or isinstance(source, CachedSource):
        return source
    row_bytes = source.n_channels * source.dtype.itemsize
    chunk = max(min(source.chunk_samples, source.n_samples), 1)
    length = chunk * max(-(-PIECE_BYTES // (chunk * row_bytes)), 1)
    is_private &= limit_bytes != 0
    is_shared = source.digest_is_exact and not is_private  # data that may have changed are never recognized
    return CachedSource(source, source.digest() if is_shared else uuid4().hex, length, folder, limit_bytes, is_private)


def _parts(source: Source) -> tuple[Source, ...]:
    if isinstance(source, ConcatenatedSource):
        return tuple(part for joined in source.sources for part in _parts(joined))
    return (source,)


def _warn_of_little_room(parts: list[CachedSource], folder: str | None, limit_bytes: int | None) -> None:
    """Warn in advance if the recording will hardly fit the cache; compressed, samples take about half their size."""
    needed = sum(part.n_samples * part.n_channels * part.dtype.itemsize for part in parts) // 2
    try:
        place = temporary_folder() if folder is None else Path(folder)
    except ResultsError as error:
        warn(f"{error} Until then the recording is fetched in every pass.")
        return
    room = limit_bytes if limit_bytes is not None else int(SHARE_OF_FREE * shutil.disk_usage(place).free)
    if needed > room:
        warn(
            f"The cache in {place} may use {room / 1e9:.3g} GB, but the recording needs about {needed / 1e9:.3g} GB: "
            "what does not fit is fetched in every pass. If that is slow, give a larger disk (cache_dir, --cache)."
        )
