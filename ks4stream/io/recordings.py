"""Recordings in: whatever holds the samples becomes a :class:`~ks4stream.recording.Recording`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from ks4stream.errors import Ks4StreamError, Ks4StreamWarning, ProbeError, RecordingError
from ks4stream.io import spikeglx
from ks4stream.io.formats import HEAD_BYTES, folder_refusal, is_hdf5, is_npy, refusal
from ks4stream.io.objects import can_list, child, is_remote, locate, name_of, read_bytes, status
from ks4stream.io.probes import load_probe
from ks4stream.io.sources import ArraySource, BinarySource, DaskSource, ZarrSource, delivered_dtype, join
from ks4stream.io.sources.cbin import CbinSource
from ks4stream.io.sources.hdf5 import Hdf5Source, read_series
from ks4stream.io.zarrs import open_zarr, zarr_explained, zarr_metadata
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.recording import Recording, Source

_TRANSPOSE = " Time must be the first axis: transpose the array (array.T)."
_DURATION_TOLERANCE = 0.01  # rates are corrected later by some ppm; a wrong number of channels is much more
_RATE_NAMES = ("sampling_rate_hz", "sampling_frequency", "fs")  # ours, SpikeInterface's, Kilosort's

_AnySource = TypeVar("_AnySource", bound=Source)


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
    source : path, URL, list, array or Recording
        - path or URL of a flat binary file (``.bin``, ``.dat``, …; channels interleaved). A SpikeGLX ``.meta``
          beside a ``.bin`` supplies channels, rate, gain and contacts, without sync channel and reference. A
          ``.cbin``, compressed by mtscomp, with its ``.ch`` is read alike;
        - path or URL of a ``.npy`` file; path of an NWB file with one electrical series, or of an HDF5 file with one
          table (with the extra ``hdf5``);
        - path or URL of a Zarr array, version 2 or 3, of a group that holds one, or of what SpikeInterface writes;
        - a NumPy array or memory map, a Dask array, or anything with a shape, a dtype and slices
          (``h5py.Dataset``, ``zarr.Array``), of shape (time, channel);
        - an ``xarray.DataArray`` with dims ``time`` and ``channel``, in any order; best with Dask chunks;
        - a list of these, joined in time.

        URLs are ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key`` and ``https://…``, keys as they
        are and not percent-encoded (in ``https://`` as web servers want them). Credentials are found in the
        environment of each process that reads, never in URLs.
    n_chan : int, optional
        Channels in the file, sorted or not. Needed for flat files without metadata.
    fs : float, optional
        Samples per second. Needed where no metadata tell it; beats them where they do.
    dtype : dtype-like, optional
        Type of the samples of flat files; by default int16.
    probe : Probe, mapping, path or name, optional
        The contacts, as :func:`~ks4stream.io.probes.load_probe` takes them; beats the metadata's.
    default_fs : float, optional
        Samples per second where neither `fs` nor metadata tell them.

    Returns
    -------
    Recording
        With ``probe`` None where nothing tells the contacts.

    Raises
    ------
    RecordingError
        If there is no such file, it is empty or does not fit its description, the samples' type is not
        supported, time is not the first axis, or arguments are missing or contradict the metadata.
    ProbeError
        If the probe cannot be loaded or has channels that the file has not.

    Examples
    --------
    >>> import numpy as np
    >>> recording = open_recording(np.zeros((60000, 4), "int16"), fs=30000, probe="tetrode")
    >>> recording.duration_s
    2.0
    """
    found = _look_at(source, n_chan, dtype)
    rates = (given if given is None else _checked_rate(given) for given in (fs, found.sampling_rate_hz, default_fs))
    rate_hz = next((rate for rate in rates if rate is not None), None)
    if rate_hz is None:
        raise RecordingError(
            f"{found.name} does not give its sampling rate; give it as fs, in samples per second (fs=30000)."
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


def may_tell_rate(path: str | os.PathLike[str]) -> bool:
    """Whether a recording may bring metadata that tell its rate, as SpikeGLX files, Zarr, ``.cbin`` and NWB do."""
    location = locate(path)
    if spikeglx.find_meta(location) is not None or os.path.isdir(location) or zarr_metadata(location) is not None:
        return True
    return location.lower().endswith(".cbin") or (not is_remote(location) and is_hdf5(_head(location)))


def _head(path: str) -> bytes:
    """First bytes of a file or an object; none if there is none."""
    found = status(path)
    return b"" if found is None else bytes(read_bytes(path, 0, min(HEAD_BYTES, found.size_bytes)))


def default_results_dir(path: str | os.PathLike[str]) -> Path:
    """Where results of a recording go unless somebody says so: beside a file; for what lies elsewhere, here."""
    return (Path() if is_remote(os.fspath(path)) else Path(path).parent) / "kilosort4"


def _no_probe() -> Probe | None:
    return None


@dataclass(frozen=True)
class _Found:
    """What was found out about a source; the probe only when asked for, as it may be given instead."""

    source: Source
    name: str
    files: tuple[str, ...] = ()
    sampling_rate_hz: float | None = None
    gain_uv: float | None = None
    offset_uv: float | None = None
    find_probe: Callable[[], Probe | None] = _no_probe
    meta: spikeglx.SpikeGLXMeta | None = None


def _look_at(source: Any, n_chan: int | None, dtype: DTypeLike | None) -> _Found:
    if isinstance(source, str | os.PathLike):
        found = _look_at_path(source, n_chan, dtype)
    elif isinstance(source, list | tuple):
        return _look_at_list(source, n_chan, dtype)
    elif isinstance(source, Recording):
        found = _look_at_recording(source)
    elif _is_from(source, "xarray"):
        found = _look_at_xarray(source)
    elif _is_from(source, "dask.array"):
        found = _Found(_time_first(DaskSource(source), "Dask array"), "Dask array")
    elif _is_from(source, "h5py") and Hdf5Source.can_be_opened_again(source):
        dataset = Hdf5Source.of(source)
        found = _Found(_time_first(dataset, dataset.dataset), dataset.dataset, (dataset.path,))
    elif all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")):
        array = _time_first(ArraySource.open(source), "array")
        found = _Found(array, "array", (array.path,) if isinstance(array, BinarySource) else ())
    else:
        raise RecordingError(
            f"A recording cannot be made of {type(source).__name__}; give a path, a list of paths, or a NumPy, "
            "Dask or xarray array of shape (time, channel)."
        )
    _check_agrees(found, n_chan, dtype)
    return found


def _look_at_path(path: str | os.PathLike[str], n_chan: int | None, dtype: DTypeLike | None) -> _Found:
    path = locate(path)
    if zarr_metadata(path) is not None:
        return _look_at_zarr(path)
    if os.path.isdir(path):
        raise RecordingError(folder_refusal(path))
    if status(path) is None:
        raise RecordingError(
            f"There is no {'object, Zarr array or Zarr group' if is_remote(path) else 'file'} {path}."
            + " Check bucket and key; keys are written as they are, not percent-encoded." * is_remote(path)
        )
    head = _head(path)
    reason = refusal(path, head)
    if reason is not None:
        if is_hdf5(head) and not is_remote(path):
            return _look_at_hdf5(path, reason)
        raise RecordingError(reason)
    if path.lower().endswith(".npy") or is_npy(head):
        return _look_at_npy(path)
    meta_path = spikeglx.find_meta(path)
    if path.lower().endswith(".cbin") and meta_path is None:
        packed = CbinSource.open(path)
        return _Found(packed, name_of(path), (path,), packed.sampling_rate_hz)
    if meta_path is not None:
        return _look_at_spikeglx(path, spikeglx.read_meta(meta_path), n_chan, dtype)
    if n_chan is None:
        raise RecordingError(
            f"{path} is a flat binary file and does not give its number of channels; give n_chan (all in the "
            "file, sync channels too; n_chan_bin in run_kilosort)."
        )
    source = BinarySource.open(path, n_chan, "int16" if dtype is None else dtype)
    if path.lower().endswith(".lf.bin"):
        _warn_of_lf(path)
    return _Found(source, name_of(path), (path,))


def _look_at_spikeglx(path: str, meta: spikeglx.SpikeGLXMeta, n_chan: int | None, dtype: DTypeLike | None) -> _Found:
    if n_chan is not None and n_chan != meta.n_channels:
        raise RecordingError(
            f"n_chan={n_chan}, but {meta.path} says that {name_of(path)} has {meta.n_channels} channels. Leave n_chan "
            "out, or remove the .meta file if it belongs to another file."
        )
    if dtype is not None and delivered_dtype(dtype, "dtype") != np.int16:
        raise RecordingError(f"dtype={dtype}, but SpikeGLX writes int16 (there is {meta.path}). Leave dtype out.")
    source: BinarySource | CbinSource
    if path.lower().endswith(".cbin"):
        source = CbinSource.open(path)
        _check_agrees(_Found(source, name_of(path)), meta.n_channels, "int16")
    else:
        source = BinarySource.open(path, meta.n_channels, "int16")
    n_bytes = source.n_samples * source.n_channels * source.file_dtype.itemsize
    if meta.file_size_bytes not in (None, n_bytes):
        warn(
            f"{path} has {n_bytes} bytes, but {meta.path.name} says {meta.file_size_bytes}: was it copied completely?",
            Ks4StreamWarning,
            stacklevel=4,
        )
    n_told = 0.0 if meta.duration_s is None else meta.duration_s * meta.sampling_rate_hz
    if meta.file_size_bytes == n_bytes and abs(source.n_samples - n_told) > _DURATION_TOLERANCE * n_told > 0:
        warn(
            f"{path} has {source.n_samples} samples of {source.n_channels} channels, but {meta.path.name} says that it "
            f"lasts {meta.duration_s:g} s, which are {n_told:.0f} samples at {meta.sampling_rate_hz:g} Hz: are its "
            "number of channels (nSavedChans) and its sampling rate right?",
            Ks4StreamWarning,
            stacklevel=4,
        )
    if meta.is_lf:
        _warn_of_lf(path)

    def find_probe() -> Probe | None:
        try:
            return meta.probe()
        except ProbeError as error:  # the samples are fine, and the probe can still be given
            warn(str(error), Ks4StreamWarning, stacklevel=3)
            return None

    return _Found(
        source,
        name_of(path),
        (path,),
        meta.sampling_rate_hz,
        meta.gain_uv,
        None if meta.gain_uv is None else 0.0,
        find_probe,
        meta,
    )


def _warn_of_lf(path: str) -> None:
    warn(
        f"{path} holds the LF band, which is too slow for spikes: they are in the .ap.bin of the same run.",
        Ks4StreamWarning,
        stacklevel=5,
    )


def _look_at_hdf5(path: str, reason: str) -> _Found:
    try:
        found = read_series(path)
    except ImportError as error:
        raise RecordingError(f"{reason} Or install what reads it: pip install 'ks4stream[hdf5]'.") from error
    except (Ks4StreamError, MemoryError):
        raise
    except Exception as error:  # h5py raises many types for a damaged file
        raise RecordingError(f"{reason} It may be damaged: {error}.") from error

    def find_probe() -> Probe | None:
        try:
            return found.probe()
        except MemoryError:
            raise
        except Exception as error:  # the samples are fine, and the probe can still be given
            warn(f"The probe stored in {path} is left out: {error}", Ks4StreamWarning, stacklevel=3)
            return None

    return _Found(
        _time_first(found.source, name_of(path)),
        name_of(path),
        (path,),
        found.sampling_rate_hz,
        found.gain_uv,
        found.offset_uv,
        find_probe,
    )


def _look_at_npy(path: str) -> _Found:
    name = name_of(path)
    if is_remote(path):
        return _Found(_time_first(BinarySource.open_npy(path), name), name, (path,))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path} cannot be read as a .npy file: {error}.") from error
    return _Found(_time_first(ArraySource.open(array), name), name, (path,))


def _look_at_list(sources: Sequence[Any], n_chan: int | None, dtype: DTypeLike | None) -> _Found:
    if not sources:
        raise RecordingError("The list of recordings is empty; give at least one file or array.")
    if any(isinstance(item, int | float | list | tuple) for item in sources):
        raise RecordingError(
            "A list of recordings was expected, of paths or arrays. Make numbers an array (numpy.array)."
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
        spikeglx.check_joined(
            [spikeglx.Part(part.files[0], part.meta, part.source.n_samples) for part in run if part.meta is not None]
        )
    gains = {(part.gain_uv, part.offset_uv) for part in parts}
    gain_uv, offset_uv = gains.pop() if len(gains) == 1 else (None, None)

    def find_probe() -> Probe | None:
        probes = [part.find_probe() for part in parts]
        for part, probe in zip(parts, probes, strict=True):
            if probe != probes[0]:
                raise ProbeError(
                    f"{parts[0].name} and {part.name} cannot be joined in time: their probes differ. Sort them "
                    "apart, or give the probe they share (probe)."
                )
        return probes[0]

    return _Found(
        source=join(part.source for part in parts),
        name=parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more",
        files=tuple(file for part in parts for file in part.files),
        sampling_rate_hz=rates.pop() if rates else None,
        gain_uv=gain_uv,
        offset_uv=offset_uv,
        find_probe=find_probe,
    )


def _warn_of_repeated(parts: Sequence[_Found]) -> None:
    """Warn if samples of a file are joined more than once."""
    seen = set()
    for part in parts:
        places = tuple(file if is_remote(file) else os.path.realpath(file) for file in part.files)
        same = (places, part.source.n_samples, getattr(part.source, "offset_bytes", 0))
        if places and same in seen:
            warn(
                f"{part.files[0]} is given more than once; its spikes will be found as often.",
                Ks4StreamWarning,
                stacklevel=4,
            )
        seen.add(same)


def _look_at_recording(recording: Recording) -> _Found:
    return _Found(
        recording.source,
        recording.name,
        recording.files,
        recording.sampling_rate_hz,
        recording.gain_uv,
        recording.offset_uv,
        lambda: recording.probe,
    )


def _look_at_xarray(array: Any) -> _Found:
    import xarray as xr

    if not isinstance(array, xr.DataArray):
        raise RecordingError(f"An xarray {type(array).__name__} holds several arrays; give the one with the traces.")
    if set(array.dims) != {"time", "channel"}:
        raise RecordingError(
            f"The DataArray has dims {array.dims}; 'time' and 'channel' are needed. Rename them (rename)."
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

    return _Found(
        source,
        str(array.name or "DataArray"),
        sampling_rate_hz=_rate_of(array.attrs),
        gain_uv=array.attrs.get("gain_uv"),
        offset_uv=array.attrs.get("offset_uv"),
        find_probe=find_probe,
    )


# -- Zarr ----------------------------------------------------------------------------------------------


def _look_at_zarr(path: str) -> _Found:
    node = open_zarr(path)
    with zarr_explained(path, f"What {path} holds cannot be read", "Copy it again, it may be damaged."):
        names = [] if hasattr(node, "shape") else _trace_arrays(node, path)
        attrs = dict(node.attrs) | (dict(node[names[0]].attrs) if names else {})
        gain_uv, offset_uv = attrs.get("gain_uv"), attrs.get("offset_uv")
        if names and gain_uv is None:
            gain_uv = _common_value(node, "gain_to_uV") or None  # no amplifier has a gain of 0
            offset_uv = _common_value(node, "offset_to_uV")
    source = join(ZarrSource.open(child(path, name)) for name in names) if names else ZarrSource.open(path)
    name = name_of(path)
    return _Found(
        _time_first(source, name),
        name,
        (path,),
        _rate_of(attrs),
        gain_uv,
        offset_uv,
        lambda: _probe_of_attrs(attrs, path),
    )


def _trace_arrays(group: Any, path: str) -> list[str]:
    """Names of the arrays that hold traces: SpikeInterface's segments in order, or the only 2-D array."""
    n_segments = group.attrs.get("num_segments")
    if n_segments:  # SpikeInterface says, so that nothing need be listed
        if not isinstance(n_segments, int):
            raise RecordingError(f"{path}: num_segments={n_segments!r} is not a whole number. Copy it again.")
        names: list[str] = []
        while len(names) < n_segments and (name := f"traces_seg{len(names)}") in group:
            names.append(name)
        if not names or len(names) < n_segments:
            raise RecordingError(
                f"{path} should hold {n_segments} segment(s), but traces_seg{len(names)} cannot be found. Copy it "
                "again."
            )
        return names
    if not can_list(path):
        raise RecordingError(f"{path} is a Zarr group on a web server; give the array's own address, {path}/NAME.")
    arrays = dict(group.arrays())
    tables = [name for name, array in arrays.items() if len(array.shape) == 2]
    if len(tables) != 1:
        raise RecordingError(
            f"{path} is a Zarr group with {len(tables)} two-dimensional arrays; one is needed, with the traces. Give "
            f"the array's own path, {path}/NAME"
            + (f", NAME being one of {', '.join(sorted(tables))}." if tables else ".")
        )
    return tables


def _common_value(group: Any, name: str) -> float | None:
    """Value of a SpikeInterface channel property, None if channels differ or it is not there."""
    if f"properties/{name}" not in group:
        return None
    values = np.unique(np.asarray(group[f"properties/{name}"][:], np.float64))
    return float(values[0]) if len(values) == 1 else None


def _probe_of_attrs(attrs: Mapping[str, Any], path: str) -> Probe | None:
    """Probe that SpikeInterface stored with its recording."""
    content = attrs.get("probegroup") or attrs.get("probe")
    if not isinstance(content, Mapping):
        return None
    try:
        return replace(load_probe(content), name=os.path.splitext(name_of(path))[0])
    except ProbeError as error:  # the samples are fine, and the probe can still be given
        warn(f"The probe stored in {path} is left out: {error}", Ks4StreamWarning, stacklevel=3)
        return None


# -- checks --------------------------------------------------------------------------------------------


def _check_agrees(found: _Found, n_chan: int | None, dtype: DTypeLike | None) -> None:
    """Check what a source is against what was said of it."""
    source = found.source
    if n_chan is not None and n_chan != source.n_channels:
        raise RecordingError(
            f"n_chan={n_chan}, but {found.name} has {source.n_samples} samples of {source.n_channels} channels."
            + (_TRANSPOSE if n_chan == source.n_samples else " Correct n_chan or leave it out.")
        )
    if dtype is not None and delivered_dtype(dtype, "dtype") != source.dtype:
        raise RecordingError(
            f"dtype={dtype}, but {found.name} holds {source.dtype} samples. Leave dtype out, or convert the array."
        )


def _time_first(source: _AnySource, name: str) -> _AnySource:
    """Return the source if it is longer than wide: arrays come transposed, flat files cannot."""
    if 0 < source.n_samples < source.n_channels:
        raise RecordingError(
            f"{name} has shape ({source.n_samples}, {source.n_channels}): more channels than samples." + _TRANSPOSE
        )
    return source


def _checked_rate(fs: float) -> float:
    try:
        return float(fs)
    except (TypeError, ValueError):
        raise RecordingError(f"fs={fs!r} is not a sampling rate; give a number of samples per second.") from None


def _rate_of(attrs: Mapping[Any, Any]) -> float | None:
    for name in _RATE_NAMES:
        if attrs.get(name) is not None:
            return _checked_rate(attrs[name])
    return None


def _is_from(value: Any, module: str) -> bool:
    """Whether a value's type comes from a library, without importing it."""
    return f"{type(value).__module__}.".startswith(f"{module}.")
