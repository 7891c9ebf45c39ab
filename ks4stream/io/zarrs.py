"""Zarr arrays and groups, opened so that what is missing or damaged is an error, and not silence.

By Zarr's rules a chunk that is not stored reads as the fill value, so that half a copy is a recording that ends in
zeros; and Blosc reads beyond a chunk that was cut short. Therefore chunks are counted when an array is opened, where
they can be listed, and each is looked at when it is fetched. Chunks that were not stored from the beginning may be
right (writers leave out those that hold nothing but the fill value), and are a warning; those that go later are not.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from ks4stream.errors import Ks4StreamError, RecordingError
from ks4stream.io.objects import can_list, child, listing, status, translate_errors, zarr_store
from ks4stream.messages import warn

_CHUNK = re.compile(r"(?:^|/)(?:c[./])?(\d+(?:[./]\d+)*)$")
_UNKNOWN_CODEC = re.compile(r"(?:codec not available|Unknown codec): ['\"]*(?:numcodecs\.)?([\w.-]+)")
_CODEC_PACKAGES = {
    "wavpack": "wavpack-numcodecs",
    "flac": "flac-numcodecs",
    "delta2D": "delta2d-numcodecs",
    "pcodec": "'numcodecs[pcodec]'",
    "zfpy": "'numcodecs[zfpy]'",
}
_METADATA = (".zarray", ".zgroup", ".zmetadata", "zarr.json")
_PICKLE = re.compile(r"^(?:numcodecs\.)?pickle$", re.IGNORECASE)  # a codec that executes what a file holds
_MAX_MISSING = 10**6  # chunks: each that is missing takes memory
_BLOSC_HEADER_BYTES = 16
_STRETCHES_SHOWN = 3


def zarr_metadata(path: str) -> str | None:
    """Return a tag of the metadata of a Zarr array or group, None if there is neither at this location."""
    for name in ("zarr.json", ".zarray", ".zgroup"):
        if found := status(child(path, name)):
            return f"{name} {found.tag}"
    return None


def open_zarr(path: str, *, patient: bool = False, is_complete: bool = False) -> Any:
    """Open the Zarr array or group at a location, for reading.

    Parameters
    ----------
    path : str
    patient : bool
        Try for minutes where a store does not answer, instead of seconds.
    is_complete : bool
        All chunks of this array are known to be stored, so that one that is not there has gone.

    Raises
    ------
    RecordingError
        If it cannot be opened; and whenever something is read from it that is damaged.
    """
    import zarr

    chunks = _Chunks(path, is_complete)
    advice = f"If it is a group, try the array's own path, {path}/NAME; else copy it again, it may be damaged."
    with translate_zarr_errors(path, f"{path} cannot be opened as a Zarr array or group", advice):
        store = zarr_store(path, patient=patient)
        node = zarr.open(_looked_at(store, chunks.look_at), mode="r")
        if hasattr(node, "shape"):
            chunks.are_blosc = _last_codec(node) in ("Blosc", "BloscCodec")
    return node


@contextmanager
def translate_zarr_errors(path: str, what: str, advice: str) -> Iterator[None]:
    """Turn all that Zarr, its stores and codecs raise (a dozen types) into a RecordingError.

    Parameters
    ----------
    path : str
        What is read.
    what, advice : str
        Sentences before and after the error's own; the first without its full stop.
    """
    try:
        with translate_errors(path):
            yield
    except (Ks4StreamError, MemoryError):
        raise
    except Exception as error:
        codec = _UNKNOWN_CODEC.search(str(error))
        if codec is not None:
            raise RecordingError(
                f"{path} is compressed with {codec[1]}, which is not installed here. Install it wherever the recording "
                f"is read, on workers too: pip install {_package_of(codec[1])}."
            ) from error
        raise RecordingError(f"{what} ({type(error).__name__}: {error}). {advice}") from error


def check_chunks(path: str, array: Any) -> bool:
    """Whether all chunks of an array are stored; False also where they cannot be listed.

    Warns
    -----
    Ks4StreamWarning
        If some are not.

    Raises
    ------
    RecordingError
        If none is, or some are empty files.
    """
    try:
        found_below = listing(path) if can_list(path) else None
    except RecordingError:  # some buckets may be read and not listed
        found_below = None
    if found_below is None:
        return False
    grid = getattr(array, "shards", None) or array.chunks
    n_chunks = [math.ceil(length / size) for length, size in zip(array.shape, grid, strict=True)]
    stored = set()
    for name, found in found_below:
        match = _CHUNK.match(name)
        if match is not None:
            stored.add(tuple(map(int, re.split("[./]", match[1]))))
            if not found.size_bytes:
                raise RecordingError(f"{child(path, name)}, a chunk of the recording, is empty. Copy it again.")
    stored = {place for place in stored if len(place) == len(n_chunks) and all(map(operator.lt, place, n_chunks))}
    n_all = math.prod(n_chunks)
    if not stored and n_all:
        raise RecordingError(
            f"{path} holds no samples: its metadata are there, but none of its {n_all} chunks. Copy it again."
        )
    if n_all - len(stored) > _MAX_MISSING:
        raise RecordingError(
            f"{path} should have {n_all} chunks, but {len(stored)} are stored: its metadata are damaged, or nearly all "
            "of it is missing. Copy it again."
        )
    missing = [place for place in itertools.product(*map(range, n_chunks)) if place not in stored]
    if not missing:
        return True
    where = _stretches(sorted({place[0] for place in missing}), grid[0], array.shape[0])
    warn(
        f"{len(missing)} of the {n_all} chunks of {path} are not stored (samples {where}), and read as "
        f"{array.fill_value or 0}. That is right if whoever wrote them left out chunks of this value; if the copy is "
        "incomplete, copy it again."
    )
    return False


def _stretches(numbers: list[int], size: int, end: int) -> str:
    """Samples of chunks of these numbers, as text."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number * size:
            runs[-1][1] += size
        else:
            runs.append([number * size, (number + 1) * size])
    shown = ", ".join(f"{start} to {min(stop, end)}" for start, stop in runs[:_STRETCHES_SHOWN])
    return shown + f" and {len(runs) - _STRETCHES_SHOWN} more stretches" * (len(runs) > _STRETCHES_SHOWN)


@dataclass
class _Chunks:
    """What is known of an array's chunks, to look at those that are fetched."""

    path: str
    are_complete: bool
    are_blosc: bool = False

    def look_at(self, key: str, content: memoryview | None) -> None:
        """Refuse a chunk that is not as it was written, and metadata by which a chunk would be executed."""
        _refuse_pickle(self.path, key, content)
        if _CHUNK.search(key) is None:
            return
        if content is None:
            if self.are_complete:
                raise RecordingError(
                    f"{child(self.path, key)}, a chunk of the recording, has gone since the recording was opened."
                )
            return
        n_bytes = len(content)
        needed = 1
        if self.are_blosc and n_bytes:
            # Blosc itself reads on, beyond the end.
            needed = max(int.from_bytes(content[12:_BLOSC_HEADER_BYTES], "little"), _BLOSC_HEADER_BYTES)
        if n_bytes < needed:
            raise RecordingError(
                f"{child(self.path, key)}, a chunk of the recording, was cut short: it has {n_bytes} bytes of "
                f"{needed}. Copy it again."
            )


def without_pickle(path: str) -> Any:
    """What ``zarr.open`` takes for a location, refusing metadata by which reading would execute what is stored."""
    return _looked_at(zarr_store(path), partial(_refuse_pickle, path))


def _refuse_pickle(path: str, key: str, content: memoryview | None) -> None:
    if content is None or key.rpartition("/")[2] not in _METADATA:
        return
    try:
        names_pickle = _names_pickle(json.loads(bytes(content)))
    except ValueError:  # Zarr itself says what is wrong
        return
    if names_pickle:
        raise RecordingError(
            f"{child(path, key)} names the codec 'pickle', which would execute what the file holds. It is not read "
            "here. If you trust whoever wrote it, save it with another codec (Blosc, say)."
        )


def _names_pickle(value: Any) -> bool:
    """Whether JSON names the codec, anywhere in it: as "id" (version 2) or "name" (version 3) of a mapping."""
    if isinstance(value, dict):
        named = (value.get(name) for name in ("id", "name"))
        return any(isinstance(one, str) and _PICKLE.match(one) for one in named) or any(
            map(_names_pickle, value.values())
        )
    return isinstance(value, list) and any(map(_names_pickle, value))


def _last_codec(array: Any) -> str:
    """Type of what compressed the chunks as they lie in files; of shards, which hold several, none."""
    if getattr(array, "shards", None) is not None:
        return ""
    codecs = array.compressors if hasattr(array, "compressors") else (array.compressor,)
    return type(codecs[-1]).__name__ if codecs else ""


def _package_of(codec: str) -> str:
    if codec.startswith("imagecodecs"):
        return "imagecodecs-numcodecs"
    return _CODEC_PACKAGES.get(codec, f"(the package that registers {codec} for numcodecs)")


def _looked_at(store: Any, look_at: Callable[[str, memoryview | None], None]) -> Any:
    """A store that shows every whole object it fetches, and which it does not find."""
    import zarr

    if int(zarr.__version__.partition(".")[0]) < 3:
        return _looked_at_2(store, look_at)
    from zarr.storage import LocalStore, WrapperStore

    class LookedAt(WrapperStore[Any]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            found = await super().get(key, prototype, byte_range)
            if found is None or byte_range is None:
                look_at(key, None if found is None else memoryview(cast(Any, found.as_numpy_array())))
            return found

    return LookedAt(store if not isinstance(store, str) else LocalStore(store, read_only=True))


def _looked_at_2(store: Any, look_at: Callable[[str, memoryview | None], None]) -> Any:
    import zarr.storage

    base: Any = zarr.storage.Store  # type: ignore[attr-defined] # as types version 3 is known
    inner: Any = zarr.storage.DirectoryStore(store) if isinstance(store, str) else store  # type: ignore[attr-defined]

    class LookedAt(base):  # type: ignore[misc]
        def __getitem__(self, key: str) -> bytes:
            found: bytes = inner[key]
            look_at(key, memoryview(found))
            return found

        def getitems(self, keys: Any, *, contexts: Any) -> dict[str, bytes]:
            found: dict[str, bytes] = inner.getitems(keys, contexts=contexts)
            for key in keys:
                look_at(key, memoryview(found[key]) if key in found else None)
            return found

        def __iter__(self) -> Iterator[str]:
            return iter(inner)

        def listdir(self, path: str = "") -> list[str]:
            return list(inner.listdir(path))

        def __len__(self) -> int:
            return len(inner)

        def __setitem__(self, key: str, value: Any) -> None:
            raise PermissionError("This store is read only.")

        def __delitem__(self, key: str) -> None:
            raise PermissionError("This store is read only.")

    return LookedAt()
