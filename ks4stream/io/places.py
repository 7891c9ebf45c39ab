"""Places where a run keeps what it finds: folders of this machine's file systems, or prefixes of an object store.

:class:`ObjectPath` has those of :class:`pathlib.Path`'s names that are needed here; the functions know both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ks4stream.errors import RecordingError, ResultsError
from ks4stream.io import objects

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


def copy_there(folder: Path, where: ObjectPath, *, last: str = "") -> None:
    """Copy all files below a folder, one of them after all others."""

    def copy(name: str) -> None:
        objects.write_file(objects.child(where.location, name), folder / name)

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(copy, sorted(names - {last})))
    if last in names:
        copy(last)


def below(where: Place) -> Iterator[tuple[str, bool]]:
    """What lies directly in a folder: names, and whether they are folders."""
    yield from ((name, status is None) for name, status in objects.entries(str(where)).items())


def move(where: Place, to: Place, names: Sequence[str]) -> None:
    """Move files and folders of one folder into another of the same file system or bucket, in their order.

    In a bucket nothing is removed before all has been copied.

    Raises
    ------
    ResultsError
        If a store refuses it.
    """
    if isinstance(where, Path):
        for name in names:
            (where / name).rename(Path(str(to)) / name)
        return
    n_bytes: dict[str, int] = {}
    for name, status in objects.entries(str(where)).items():
        if name in names:
            inside = [("", status)] if status else objects.listing(str(where / name))
            n_bytes |= {f"{name}/{path}".rstrip("/"): found.size_bytes for path, found in inside}
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda path: objects.copy(str(where / path), str(to / path), n_bytes[path]), n_bytes))
    objects.delete(str(where), list(n_bytes))


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
