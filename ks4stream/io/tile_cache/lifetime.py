"""Which recordings are cached, where, and until when."""

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

from ks4stream.errors import Ks4StreamWarning, ResultsError
from ks4stream.io.objects import is_remote
from ks4stream.io.sources import ArraySource, ConcatenatedSource, join
from ks4stream.io.tile_cache.account import SHARE_OF_FREE
from ks4stream.io.tile_cache.folders import temporary_folder
from ks4stream.io.tile_cache.source import CachedSource
from ks4stream.messages import warn
from ks4stream.recording import Recording, Source

_log = logging.getLogger(__name__)
OFF = "off"
PIECE_BYTES = 4 << 20  # of samples, at least, in a piece: enough for a store to be quick, little to fetch in vain


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
    source = _wrapped(recording.source, folder, 0 if cache_dir == OFF else None, is_private=folder is None)
    callers = _parts(recording.source)
    for part in _parts(source):
        if isinstance(part, CachedSource) and part.is_private and part not in callers:
            part.pin()
    return replace(recording, source=source)


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


def _wrapped(source: Source, folder: str | None, limit_bytes: int | None, *, is_private: bool = False) -> Source:
    """The source with every part that is far away, or all but arrays in memory where a folder was named, cached."""
    if isinstance(source, ConcatenatedSource):
        return join(_wrapped(part, folder, limit_bytes, is_private=is_private) for part in source.sources)
    near = isinstance(source, ArraySource) if folder else not is_remote(getattr(source, "path", ""))
    if near or isinstance(source, CachedSource):
        return source
    row_bytes = source.n_channels * source.dtype.itemsize
    chunk = max(min(getattr(source, "chunk_samples", 1), source.n_samples), 1)
    length = chunk * max(-(-PIECE_BYTES // (chunk * row_bytes)), 1)
    is_private &= limit_bytes != 0
    is_shared = source.digest_is_exact and not is_private  # what may have changed is not found again
    return CachedSource(source, source.digest() if is_shared else uuid4().hex, length, folder, limit_bytes, is_private)


def _parts(source: Source) -> tuple[Source, ...]:
    if isinstance(source, ConcatenatedSource):
        return tuple(part for joined in source.sources for part in _parts(joined))
    return (source,)


def _warn_of_little_room(parts: list[CachedSource], folder: str | None, limit_bytes: int | None) -> None:
    """Say beforehand if the cache will hardly hold the recording; compressed, samples take about half their size."""
    needed = sum(part.n_samples * part.n_channels * part.dtype.itemsize for part in parts) // 2
    try:
        place = temporary_folder() if folder is None else Path(folder)
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
