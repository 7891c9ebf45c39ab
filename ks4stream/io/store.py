"""Sortings as Zarr groups: the native store, complete and without pickles.

Arrays keep the names, dims and units that :mod:`ks4stream.results` declares; nested results (probe,
whitening, drift …) are groups of their own; all else is JSON in the attributes. Stores are written in Zarr
format 2, which zarr 2 and 3 both read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.errors import ResultsError
from ks4stream.exchange import DIM_NAMES, about, distinct
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.mapped import LARGE_MAP_BYTES, release_pages, scratch_array
from ks4stream.io.places import ObjectPath, Place, place, read_whole, size_of
from ks4stream.io.zarrs import without_pickle
from ks4stream.probe import Probe
from ks4stream.recording import FlatFile
from ks4stream.results import Diagnostics, Drift, PeakSample, Provenance, Sorting, Waveforms, Whitening
from ks4stream.settings import Settings

__all__ = ["load_sorting", "save_sorting", "stored_digest"]

FORMAT = "ks4stream.Sorting/1"
_NESTED = {
    "probe": Probe,
    "whitening": Whitening,
    "waveforms": Waveforms,
    "drift": Drift,
    "peaks": PeakSample,
    "diagnostics": Diagnostics,
}
_CHUNK_BYTES = 2**23
_CODEC = Blosc(cname="zstd", clevel=3, shuffle=Blosc.BITSHUFFLE)


def save_sorting(sorting: Sorting, path: str | os.PathLike[str], *, features: bool = True) -> Path:
    """Write a sorting as a Zarr group, replacing an existing one.

    The store appears under its name only when it is complete.

    Parameters
    ----------
    sorting : Sorting
        What to write.
    path : path
        Directory of the store, ``sorting.zarr`` by convention.
    features : bool
        Whether to write the features of all spikes, by far the largest part.

    Returns
    -------
    Path
        The store.

    Raises
    ------
    ResultsError
        If it cannot be written.
    """
    path = Path(path)
    with explain_write_errors(path), _complete_or_nothing(path) as draft:
        group = _new_group(draft)
        _write(group, sorting if features else without_features(sorting))
        group.attrs["format"] = FORMAT
    return path


def without_features(sorting: Sorting) -> Sorting:
    """Return the same sorting with features on no channels: shape (n, 0, q)."""
    return replace(sorting, features=sorting.features[:, :0])


def load_sorting(path: str | os.PathLike[str], *, features: bool = True) -> Sorting:
    """Read a finished sorting from its results.

    Parameters
    ----------
    path : path
        A results folder, or the ``sorting.zarr`` in it; on disk or in an object store.
    features : bool
        Whether to read the features of all spikes as well.

    Returns
    -------
    Sorting
        The sorting, in memory; features are on no channels, shape (n, 0, q), if they were not saved or not requested.

    Raises
    ------
    ResultsError
        If there is no such store, or it was written by something else.
    """
    return _load(path, _in_memory, leave_out=() if features else ("features",))


def map_sorting(path: str | os.PathLike[str] | ObjectPath) -> Sorting:
    """Read a sorting without features whose large columns stay on disk, in unnamed files of the temporary folder.

    Parameters
    ----------
    path : path
        As for :func:`load_sorting`.

    Raises
    ------
    ResultsError
        If the store does not exist or was written by something else, or the temporary folder is full.
    """
    return _load(path, _mapped, leave_out=("features",))


def stored_digest(results: Place) -> str:
    """The digest of the recording whose sorting is stored in a results folder; empty if it is not known."""
    try:
        found = json.loads(read_whole(results / "sorting.zarr" / ".zattrs"))["values"]["provenance"]["recording_digest"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def _load(
    path: str | os.PathLike[str] | ObjectPath, read: Callable[[Any], NDArray[Any]], leave_out: Collection[str]
) -> Sorting:
    given = place(path)
    store = next(
        (folder for folder in (given / "sorting.zarr", given) if size_of(folder / ".zgroup") is not None), None
    )
    if store is None:
        raise ResultsError(
            f"{path} does not hold a sorting. Give a sorting.zarr, or the results folder that it was written to."
        )
    group = zarr.open_group(without_pickle(str(store)), mode="r")
    written_as = group.attrs.get("format")
    if written_as != FORMAT:
        raise ResultsError(
            f"{store} has format {written_as!r}; this version of ks4stream reads {FORMAT!r}. "
            "Open it with the version that wrote it, or sort again."
        )
    found = _read(group, Sorting, read, leave_out)
    assert isinstance(found, Sorting)
    return found


def _in_memory(array: Any) -> NDArray[Any]:
    return np.asarray(array[...])


def _mapped(array: Any) -> NDArray[Any]:
    """A stored array, chunk by chunk: in memory if it is small, otherwise mapped from a file."""
    values = scratch_array(array.shape, array.dtype, held_bytes=LARGE_MAP_BYTES)
    for at in range(0, len(values), max(array.chunks[0], 1)):
        values[at : at + array.chunks[0]] = array[at : at + array.chunks[0]]
        release_pages(values)
    return values


# -- one group per result --------------------------------------------------------------------------------


def _write(group: Any, result: Any) -> None:
    """Write a result's arrays, nested results and plain values."""
    values: dict[str, Any] = {}
    for spec in fields(result):
        value = getattr(result, spec.name)
        if isinstance(value, np.ndarray):
            array = _new_array(group, spec.name, value)
            array.attrs.put(_array_attrs(spec.metadata, value))  # `update` would write them one by one
        elif is_dataclass(value) and spec.name in _NESTED:
            _write(group.create_group(spec.name), value)
        else:
            values[spec.name] = _to_json(value)
    group.attrs["values"] = values


def _read(group: Any, kind: type, read: Callable[[Any], NDArray[Any]], leave_out: Collection[str] = ()) -> Any:
    """Create a result from its group; fields that the store does not have keep their defaults."""
    values = {name: _from_json(value) for name, value in dict(group.attrs)["values"].items()}
    known = {spec.name for spec in fields(kind)}
    for name in known & set(group.keys()):
        if name in leave_out:
            values[name] = np.zeros((group[name].shape[0], 0, *group[name].shape[2:]), group[name].dtype)
        else:
            values[name] = _read(group[name], _NESTED[name], _in_memory) if name in _NESTED else read(group[name])
    found = {name: _MADE_OF.get(name, _as_it_is)(value) for name, value in values.items() if name in known}
    if kind is Sorting and "tiling" not in found:  # written by a version that did not store it
        found["tiling"] = Tiling.by_settings(
            found["settings"], n_samples=found["n_samples"], sampling_rate_hz=found["sampling_rate_hz"]
        )
    return kind(**found)


def _known(kind: type, values: dict[str, Any]) -> Any:
    """Create a small value from its fields, ignoring those added by a later version."""
    names = {spec.name for spec in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


_MADE_OF: dict[str, Callable[[Any], Any]] = {
    "settings": partial(_known, Settings),  # earlier versions also kept what belongs to the recording
    "tiling": partial(_known, Tiling),
    "provenance": partial(_known, Provenance),
    "flat_files": lambda files: files if isinstance(files, str) else tuple(_known(FlatFile, file) for file in files),
    "files": tuple,
    "warnings": tuple,
}
"""How to create values from their JSON, for fields that are not plain JSON."""


def _as_it_is(value: Any) -> Any:
    return value


def _array_attrs(metadata: Any, value: NDArray[Any]) -> dict[str, Any]:
    """Dims under the name that xarray reads, unit and meaning."""
    if "dims" not in metadata:
        return {"_ARRAY_DIMENSIONS": [f"axis_{axis}" for axis in range(value.ndim)]}
    dims = distinct([DIM_NAMES.get(dim, dim) for dim in metadata["dims"]])
    return {"_ARRAY_DIMENSIONS": dims, **about(metadata)}


def _to_json(value: Any) -> Any:
    """Convert to plain JSON; infinity, which JSON lacks, becomes ``"Infinity"``."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity" if value < 0 else "NaN"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be stored as JSON.")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


# -- zarr 2 and 3 ------------------------------------------------------------------------------------------


def _new_group(path: Path) -> Any:
    """Create an empty group in Zarr format 2, whichever version of zarr is installed."""
    about: dict[str, Any] = {"zarr_format": 2} if hasattr(zarr.Group, "create_array") else {}
    return zarr.open_group(str(path), mode="w", **about)


def _new_array(group: Any, name: str, value: NDArray[Any]) -> Any:
    """Write an array in chunks of whole rows, a few rows at a time, as the array may be a memory map."""
    row_bytes = max(1, value.itemsize * math.prod(value.shape[1:]))
    rows = max(1, min(_CHUNK_BYTES // row_bytes, len(value)))
    chunks = (rows, *(max(1, length) for length in value.shape[1:]))
    about: dict[str, Any] = {"shape": value.shape, "chunks": chunks, "dtype": value.dtype}
    if hasattr(group, "create_array"):
        array = group.create_array(name, compressors=_CODEC, **about)
    else:
        array = group.create_dataset(name, compressor=_CODEC, **about)
    if value.size:
        for at in range(0, len(value), rows):
            array[at : at + rows] = value[at : at + rows]
            release_pages(value)
    return array


def _is_sorting(path: Path) -> bool:
    try:
        attributes = json.loads((path / ".zattrs").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(attributes, dict) and str(attributes.get("format", "")).startswith("ks4stream.Sorting/")


@contextmanager
def _complete_or_nothing(path: Path) -> Iterator[Path]:
    """Write to a sibling folder and rename it at the end; after an error nothing is left of it.

    Raises
    ------
    ResultsError
        If something other than a sorting already has that name.
    """
    if path.exists() and not _is_sorting(path):
        raise ResultsError(f"{path} is not a stored sorting and will not be replaced. Choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft_name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}(\.old)?")
    for left in path.parent.iterdir():
        if draft_name.fullmatch(left.name):  # left by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
        if path.exists():
            old = draft.with_name(f"{draft.name}.old")
            path.replace(old)
            draft.replace(path)
            shutil.rmtree(old)
        else:
            draft.replace(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
