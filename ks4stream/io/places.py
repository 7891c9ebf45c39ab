"""Places where a run keeps what it finds: folders on this machine's file systems, or prefixes in an object store.

:class:`ObjectPath` has the attributes of :class:`pathlib.Path` that are used here; the functions take both.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ks4stream.errors import RecordingError, ResultsError
from ks4stream.io import objects
from ks4stream.io.objects import Status

REQUESTS = 16  # sent to a store at the same time
FETCHED_BYTES = 1 << 26  # of an object, held in memory at a time while it is copied


@dataclass(frozen=True)
class ObjectPath:
    """An object, or a prefix of objects, by its address."""

    location: str

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(objects.child(self.location, name))

    def __str__(self) -> str:
        return self.location

    @property
    def name(self) -> str:
        """Last part of the address."""
        return PurePosixPath(self.location).name

    @property
    def parent(self) -> ObjectPath:
        """The prefix that contains it."""
        return ObjectPath(self.location.rpartition("/")[0])


Place = Path | ObjectPath


def place(address: str | os.PathLike[str] | ObjectPath) -> Place:
    """The place that an address or a path names; paths are made absolute.

    Raises
    ------
    ResultsError
        If it is on a web server, where nothing can be written.
    """
    if isinstance(address, ObjectPath):
        return address
    location = objects.locate(address)
    if not objects.is_remote(location):
        return Path(location)
    if location.startswith("http"):
        raise ResultsError(f"Nothing can be written to {location}; give a folder, or s3://, gs:// or az://BUCKET/KEY.")
    return ObjectPath(location)


def size_of(where: Place) -> int | None:
    """Size of a file or an object in bytes; None if it does not exist."""
    found = objects.status(str(where))
    return None if found is None else found.size_bytes


def read_range(where: Place, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file or an object.

    Raises
    ------
    FileNotFoundError, EOFError
        If it does not exist, or ends before `stop`.
    """
    if stop <= start:
        return b""
    if isinstance(where, Path):
        with where.open("rb") as file:
            file.seek(start)
            found = file.read(stop - start)
    else:
        try:
            found = bytes(objects.read_bytes(where.location, start, stop))
        except RecordingError:
            if (size_of(where) or 0) < stop:  # otherwise the store failed, and the object is long enough
                raise EOFError(f"{where} ends before byte {stop}") from None
            raise
    if len(found) < stop - start:
        raise EOFError(f"{where} ends before byte {stop}")
    return found


def read_whole(where: Place, size: int | None = None) -> bytes:
    """All bytes of a file or an object; an object of known size takes one request.

    Raises
    ------
    FileNotFoundError, EOFError
        If it does not exist, or has fewer bytes than `size`.
    """
    if isinstance(where, Path):
        return where.read_bytes()
    if size is None:
        size = size_of(where)
    if size is None:
        raise FileNotFoundError(str(where))
    return read_range(where, 0, size)


def copy_here(where: Place, folder: Path) -> Path:
    """The path of a file, or of a copy of an object, which is made in a folder on this machine.

    Raises
    ------
    FileNotFoundError
        If it does not exist.
    """
    if isinstance(where, Path):
        return where
    size = size_of(where)
    if size is None:
        raise FileNotFoundError(str(where))
    copy = folder / where.name
    with copy.open("wb") as file:
        for at in range(0, size, FETCHED_BYTES):
            file.write(read_range(where, at, min(at + FETCHED_BYTES, size)))
    return copy


def copy_there(folder: Path, where: ObjectPath, *, last: str = "") -> list[tuple[str, Status]]:
    """Copy all files below a folder, `last` after all others; returns what is there afterwards, as a listing would."""

    def copy(name: str) -> tuple[str, Status]:
        tag = objects.write_file(objects.child(where.location, name), folder / name)
        return name, Status((folder / name).stat().st_size, tag)

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(REQUESTS) as pool:
        copied = list(pool.map(copy, sorted(names - {last})))
    return sorted([*copied, *(copy(name) for name in names & {last})])


def below(where: Place) -> Iterator[tuple[str, bool]]:
    """Names of what lies directly in a folder, and whether each is a folder."""
    yield from ((name, status is None) for name, status in objects.entries(str(where)).items())


def move(where: Place, to: Place, names: Collection[str]) -> None:
    """Move files and folders into another folder of the same file system or bucket, without replacing anything.

    In a bucket, nothing is removed until everything has been copied, and objects that were changed in the meantime are
    kept. Names that disappear in the meantime are skipped.

    Raises
    ------
    FileExistsError
        If one of the names exists there already; nothing is moved in that case. In a bucket, an object with the same
        bytes does not count: it is a copy left by an interrupted move.
    ResultsError
        If the store refuses it.
    """
    if isinstance(where, Path):
        _check_free([name for name in names if os.path.lexists(Path(str(to)) / name)], to)
        for name in sorted(names):
            try:
                (where / name).rename(Path(str(to)) / name)
            except FileNotFoundError:
                if os.path.lexists(where / name):
                    raise
        return
    found, there = _objects_in(where, names), dict(objects.listing(str(to)))
    twice = sorted(found.keys() & there.keys())
    _check_free([path for path in twice if not _is_copy(where / path, found[path], to / path, there[path])], to)
    with ThreadPoolExecutor(REQUESTS) as pool:
        new = found.keys() - there.keys()
        list(pool.map(lambda path: objects.copy(str(where / path), str(to / path), found[path].size_bytes), new))
    there, now = dict(objects.listing(str(to))), _objects_in(where, names)
    objects.delete(str(where), [path for path in found if path in there and now.get(path) == found[path]])


def _check_free(taken: Sequence[str], to: Place) -> None:
    if taken:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to / taken[0]))


def _objects_in(where: Place, names: Collection[str]) -> dict[str, Status]:
    """Objects with one of the names, and all objects in folders with one of the names, by path."""
    found: dict[str, Status] = {}
    for name, status in objects.entries(str(where)).items():
        if name in names:
            inside = [("", status)] if status else objects.listing(str(where / name))
            found |= {f"{name}/{path}".rstrip("/"): one for path, one in inside}
    return found


def _is_copy(first: Place, of_first: Status, second: Place, of_second: Status) -> bool:
    """Whether two objects hold the same bytes; many stores give a copy a new tag."""
    if of_first == of_second or of_first.size_bytes != of_second.size_bytes:
        return of_first == of_second
    size = of_first.size_bytes
    ranges = [(at, min(at + FETCHED_BYTES, size)) for at in range(0, size, FETCHED_BYTES)]
    return all(read_range(first, *part) == read_range(second, *part) for part in ranges)


def remove(where: Place, *, folder: bool = False) -> None:
    """Remove a file or an object, which need not exist, or a folder with everything in it."""
    if isinstance(where, Path):
        if folder and not where.is_symlink():
            shutil.rmtree(where)
        else:
            where.unlink(missing_ok=True)
        return
    if not folder:
        objects.delete(where.location)
    elif paths := [path for path, _ in objects.listing(where.location)]:
        objects.delete(where.location, paths)
