"""Open recordings: whatever holds the samples becomes a :class:`~ks4stream.recording.Recording`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io.formats import is_hdf5, refusal
from ks4stream.io.objects import is_remote, locate
from ks4stream.io.probes import load_probe
from ks4stream.io.sources import (
    ArraySource,
    BinarySource,
    DaskSource,
    Hdf5Source,
    binary,
    cbin,
    extractor,
    hdf5,
    join,
    npy,
    spikeglx,
    zarr,
)
from ks4stream.io.sources.base import File, Opened, checked_rate, rate_of, time_first
from ks4stream.io.spikeglx import Part, check_joined, find_meta
from ks4stream.io.zarrs import zarr_metadata
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.recording import Recording, Source


def open_recording(
    source: Any,
    *,
    n_chan: int | None = None,
    fs: float | None = None,
    dtype: DTypeLike | None = None,
    probe: Probe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    default_fs: float | None = None,
) -> Recording:
    """Open a recording; only its metadata are read.

    Parameters
    ----------
    source : path, URL, list, array, Recording or SpikeInterface recording
        - path or URL of a flat binary file (``.bin``, ``.dat``, …; channels interleaved). A SpikeGLX ``.meta``
          next to a ``.bin`` supplies channels, rate, gain and contacts, without sync channel and reference. A
          ``.cbin``, compressed by mtscomp, with its ``.ch`` is read in the same way;
        - path or URL of a ``.npy`` file; path of an NWB file with one electrical series, or of an HDF5 file with one
          table (with the extra ``hdf5``);
        - path or URL of a Zarr array, version 2 or 3, of a group that holds one, or of a Zarr folder written by
          SpikeInterface;
        - a NumPy array or memory map, a Dask array, or anything with a shape, a dtype and slicing
          (``h5py.Dataset``, ``zarr.Array``), of shape (time, channel);
        - an ``xarray.DataArray`` with dims ``time`` and ``channel``, in any order; best with Dask chunks;
        - a SpikeInterface recording. Flat files and SpikeInterface's own Zarr folders are read where they lie, anything
          else through SpikeInterface; segments are joined in time. Column i is its i-th channel;
        - a list of these, joined in time.

        URLs are ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key`` and ``https://…``. Keys are not
        percent-encoded, except in ``https://`` if the web server requires it. Each process that reads takes
        credentials from its environment, never from URLs.
    n_chan : int, optional
        Number of channels in the file, sorted or not. Required for flat files without metadata.
    fs : float, optional
        Sampling rate, in Hz. Required if the metadata do not give it; takes precedence if they do.
    dtype : dtype-like, optional
        Type of the samples of flat files; by default int16.
    probe : Probe, mapping, path or name, optional
        The contacts, in any form that :func:`~ks4stream.io.probes.load_probe` takes; overrides the metadata.
    default_fs : float, optional
        Sampling rate, in Hz, if neither `fs` nor the metadata give it.

    Returns
    -------
    Recording
        With ``probe`` None if the contacts are not known.

    Raises
    ------
    RecordingError
        If there is no such file, it is empty or does not fit its description, the samples' type is not
        supported, time is not the first axis, or arguments are missing or contradict the metadata.
    ProbeError
        If the probe cannot be loaded or has channels that the file does not have.

    Examples
    --------
    >>> import numpy as np
    >>> recording = open_recording(np.zeros((60000, 4), "int16"), fs=30000, probe="tetrode")
    >>> recording.duration_s
    2.0
    """
    found = _look_at(source, _whole(n_chan), dtype)
    rates = (given if given is None else checked_rate(given) for given in (fs, found.sampling_rate_hz, default_fs))
    rate_hz = next((rate for rate in rates if rate is not None), None)
    if rate_hz is None:
        raise RecordingError(
            f"The sampling rate of {found.name} is not known; give fs in samples per second (fs=30000)."
        )
    return Recording(
        source=found.source,
        sampling_rate_hz=rate_hz,
        probe=found.find_probe() if probe is None else load_probe(probe),
        gain_uv=found.gain_uv,
        offset_uv=found.offset_uv,
        name=found.name,
        files=found.files,
    )


def _whole(n_chan: Any) -> int | None:
    try:
        if n_chan is None or int(n_chan) == n_chan:
            return None if n_chan is None else int(n_chan)
    except (TypeError, ValueError, OverflowError):
        pass
    raise RecordingError(
        f"n_chan={n_chan!r} (n_chan_bin in run_kilosort) must be a whole number, that of the channels in the file."
    )


def may_tell_rate(path: str | os.PathLike[str]) -> bool:
    """Whether a recording may have metadata with its rate, as SpikeGLX files, Zarr, ``.cbin`` and NWB do."""
    location = locate(path)
    if find_meta(location) is not None or os.path.isdir(location) or zarr_metadata(location) is not None:
        return True
    return location.lower().endswith(".cbin") or (os.path.isfile(location) and is_hdf5(File(location).head))


def default_results_dir(path: str | os.PathLike[str]) -> Path:
    """Default folder for the results of a recording: next to a file, or the current folder if it is remote."""
    return (Path() if is_remote(os.fspath(path)) else Path(path).parent) / "kilosort4"


def _look_at(source: Any, n_chan: int | None, dtype: DTypeLike | None) -> Opened:
    if isinstance(source, str | os.PathLike):
        found = _look_at_path(source, n_chan, dtype)
    elif isinstance(source, list | tuple):
        return _look_at_list(source, n_chan, dtype)
    elif isinstance(source, Recording):
        found = _look_at_recording(source)
    elif extractor.is_extractor(source):
        found = extractor.opens(source)
    elif _is_from(source, "xarray"):
        found = _look_at_xarray(source)
    elif _is_from(source, "dask.array"):
        found = Opened(time_first(DaskSource(source), "Dask array"), "Dask array")
    elif _is_from(source, "h5py") and Hdf5Source.can_be_opened_again(source):
        dataset = Hdf5Source.of(source)
        found = Opened(time_first(dataset, dataset.dataset), dataset.dataset, (dataset.path,))
    elif all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")):
        array = time_first(ArraySource.open(source), "array")
        found = Opened(array, "array", (array.path,) if isinstance(array, BinarySource) else ())
    else:
        raise RecordingError(
            f"A recording cannot be opened from an object of type {type(source).__name__}; give a path, a list of "
            "paths, a NumPy, Dask or xarray array of shape (time, channel), or a SpikeInterface recording."
        )
    found.check(n_chan, dtype)
    return found


def _refuse(file: File) -> None:
    """Raise for formats that are recognized but not supported."""
    reason = refusal(file.path, file.head)
    if reason is not None:
        raise RecordingError(reason)


OPENERS: tuple[Callable[[File], Opened | None], ...] = (
    zarr.opens,
    hdf5.opens,
    _refuse,
    npy.opens,
    spikeglx.opens,
    cbin.opens,
)
"""The first that recognizes a file opens it, or refuses it; a file that none recognizes is flat."""


def _look_at_path(path: str | os.PathLike[str], n_chan: int | None, dtype: DTypeLike | None) -> Opened:
    file = File(locate(path), n_chan, dtype)
    for opens in OPENERS:
        found = opens(file)
        if found is not None:
            return found
    return binary.opens(file)


def _look_at_list(sources: Sequence[Any], n_chan: int | None, dtype: DTypeLike | None) -> Opened:
    if not sources:
        raise RecordingError("The list of recordings is empty; give at least one file or array.")
    if any(isinstance(item, int | float | list | tuple) for item in sources):
        raise RecordingError(
            "The list must hold paths or arrays. To sort a list of numbers, convert it to an array (numpy.array)."
        )
    parts = [_look_at(item, n_chan, dtype) for item in sources]
    rates = {part.sampling_rate_hz for part in parts if part.sampling_rate_hz is not None}
    if len(rates) > 1:
        raise RecordingError(
            "Files cannot be joined in time: their sampling rates differ ("
            + ", ".join(f"{part.name}: {part.sampling_rate_hz} Hz" for part in parts)
            + ")."
        )
    _warn_of_repeated(parts)
    for _, run in itertools.groupby(parts, key=lambda part: part.meta is None):
        check_joined([Part(part.files[0], part.meta, part.source.n_samples) for part in run if part.meta is not None])
    gains = {(part.gain_uv, part.offset_uv) for part in parts}
    gain_uv, offset_uv = gains.pop() if len(gains) == 1 else (None, None)

    def find_probe() -> Probe | None:
        probes = [part.find_probe() for part in parts]
        for part, probe in zip(parts, probes, strict=True):
            if probe != probes[0]:
                raise ProbeError(
                    f"{parts[0].name} and {part.name} cannot be joined in time: their probes differ. Sort them "
                    "separately, or give the probe they share (probe)."
                )
        return probes[0]

    return Opened(
        source=join(part.source for part in parts),
        name=parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more",
        files=tuple(file for part in parts for file in part.files),
        sampling_rate_hz=rates.pop() if rates else None,
        gain_uv=gain_uv,
        offset_uv=offset_uv,
        find_probe=find_probe,
    )


def _warn_of_repeated(parts: Sequence[Opened]) -> None:
    """Warn if a file is joined more than once."""
    seen = set()
    for part in parts:
        places = tuple(file if is_remote(file) else os.path.realpath(file) for file in part.files)
        flat = part.source.flat_files
        begins = () if isinstance(flat, str) else tuple(file.offset_bytes for file in flat)
        same = (places, part.source.n_samples, begins)
        if places and same in seen:
            warn(f"{part.files[0]} was given more than once; its spikes will be found that many times.")
        seen.add(same)


def _look_at_recording(recording: Recording) -> Opened:
    return Opened(
        recording.source,
        recording.name,
        recording.files,
        recording.sampling_rate_hz,
        recording.gain_uv,
        recording.offset_uv,
        lambda: recording.probe,
    )


def _look_at_xarray(array: Any) -> Opened:
    import xarray as xr

    if not isinstance(array, xr.DataArray):
        raise RecordingError(f"An xarray {type(array).__name__} holds several arrays; give the one with the traces.")
    if set(array.dims) != {"time", "channel"}:
        raise RecordingError(
            f"The DataArray has dims {array.dims}; they must be 'time' and 'channel'. Rename them (rename)."
        )
    array = array.transpose("time", "channel")
    source: Source = DaskSource(array.data) if array.chunks is not None else ArraySource.open(array.data)

    def find_probe() -> Probe | None:
        if not {"x_um", "y_um"} <= set(array.coords):
            return None
        x_um, y_um = (np.asarray(array.coords[name], np.float64) for name in ("x_um", "y_um"))
        shank = np.asarray(array.coords["shank"]) if "shank" in array.coords else np.zeros(len(x_um), np.int64)
        sorted_channels = np.flatnonzero(np.isfinite(x_um) & np.isfinite(y_um))
        return Probe(
            sorted_channels, x_um[sorted_channels], y_um[sorted_channels], shank[sorted_channels], name="DataArray"
        )

    return Opened(
        source,
        str(array.name or "DataArray"),
        sampling_rate_hz=rate_of(array.attrs),
        gain_uv=array.attrs.get("gain_uv"),
        offset_uv=array.attrs.get("offset_uv"),
        find_probe=find_probe,
    )


def _is_from(value: Any, module: str) -> bool:
    """Whether a value's type comes from a library, without importing it."""
    return f"{type(value).__module__}.".startswith(f"{module}.")
