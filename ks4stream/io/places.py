"""Places where a run keeps what it finds: folders of this machine's file systems, or prefixes of an object store.

:class:`ObjectPath` has those of :class:`pathlib.Path`'s names that are needed here; the functions know both.
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

REQUESTS = 16  # to a store at a time
FETCHED_BYTES = 1 << 26  # of an object that are held at a time while it is copied


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
        """What it lies in."""
        return ObjectPath(self.location.rpartition("/")[0])


Place = Path | ObjectPath


def place(address: str | os.PathLike[str] | ObjectPath) -> Place:
    """What an address or a path names; paths become absolute.

    Raises
    ------
    ResultsError
        If nothing can be written there: web servers only give.
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
    """Bytes of a file or an object; None if there is none."""
    found = objects.status(str(where))
    return None if found is None else found.size_bytes


def read_range(where: Place, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file or an object.

    Raises
    ------
    FileNotFoundError, EOFError
        If it is gone, or ends before.
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
            if (size_of(where) or 0) < stop:  # else the store fails, and not the object
                raise EOFError(f"{where} ends before byte {stop}") from None
            raise
    if len(found) < stop - start:
        raise EOFError(f"{where} ends before byte {stop}")
    return found


def read_whole(where: Place, size: int | None = None) -> bytes:
    """All bytes of a file or an object; of an object whose size is known, with one request.

    Raises
    ------
    FileNotFoundError, EOFError
        If there is none, or fewer bytes than `size`.
    """
    if isinstance(where, Path):
        return where.read_bytes()
    if size is None:
        size = size_of(where)
    if size is None:
        raise FileNotFoundError(str(where))
    return read_range(where, 0, size)


def copy_here(where: Place, folder: Path) -> Path:
    """A file as it is; an object as a copy in a folder of this machine.

    Raises
    ------
    FileNotFoundError
        If there is none.
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
    """Copy all files below a folder, one of them after all others; returns what is there then, as a listing would."""

    def copy(name: str) -> tuple[str, Status]:
        tag = objects.write_file(objects.child(where.location, name), folder / name)
        return name, Status((folder / name).stat().st_size, tag)

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(REQUESTS) as pool:
        copied = list(pool.map(copy, sorted(names - {last})))
    return sorted([*copied, *(copy(name) for name in names & {last})])


def below(where: Place) -> Iterator[tuple[str, bool]]:
    """What lies directly in a folder: names, and whether they are folders."""
    yield from ((name, status is None) for name, status in objects.entries(str(where)).items())


def move(where: Place, to: Place, names: Collection[str]) -> None:
    """Move files and folders of one folder into another of the same file system or bucket, where nothing is replaced.

    In a bucket nothing is removed before all has been copied, nor what was written to meanwhile. What goes meanwhile is
    passed over.

    Raises
    ------
    FileExistsError
        If something of such a name is there already, before anything is moved. In a bucket, an object with the same
        bytes does not count: it is a copy that an interrupted move left.
    ResultsError
        If a store refuses it.
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
    """Objects of some names, and of all that lies in folders of such names, by path."""
    found: dict[str, Status] = {}
    for name, status in objects.entries(str(where)).items():
        if name in names:
            inside = [("", status)] if status else objects.listing(str(where / name))
            found |= {f"{name}/{path}".rstrip("/"): one for path, one in inside}
    return found


def _is_copy(first: Place, of_first: Status, second: Place, of_second: Status) -> bool:
    """Whether two objects hold the same bytes; many stores give a copy another tag."""
    if of_first == of_second or of_first.size_bytes != of_second.size_bytes:
        return of_first == of_second
    size = of_first.size_bytes
    ranges = [(at, min(at + FETCHED_BYTES, size)) for at in range(0, size, FETCHED_BYTES)]
    return all(read_range(first, *part) == read_range(second, *part) for part in ranges)


def remove(where: Place, *, folder: bool = False) -> None:
    """Remove a file or an object, or all that lies in a folder; what is not there need not be."""
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
