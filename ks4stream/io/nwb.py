"""A sorting as an NWB file: one Units table, the electrodes, and the settings.

Spikes are read in pieces and grouped by unit in a scratch array, which is on disk if it is large, so that memory does
not grow with the length of the recording.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ks4stream.blocks import observed_spans
from ks4stream.errors import FewSpikesWarning, Ks4StreamError, Ks4StreamWarning, MissingDependencyError, ResultsError
from ks4stream.io.atomic import atomic_draft
from ks4stream.io.by_unit import ByUnit
from ks4stream.io.mapped import release_pages
from ks4stream.io.objects import is_remote
from ks4stream.io.spikeglx import find_meta, read_meta
from ks4stream.messages import warn
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.unit_waveforms import followed_channels, mean_waveforms

__all__ = ["session_start_of", "write_nwb"]

PYNWB = (4, 2)  # the first in which waveforms need not be in volts
SETTINGS, PROVENANCE = "ks4stream_settings", "ks4stream_provenance"  # tables in the processing module "ecephys"
_SPIKES_AT_ONCE = 1 << 18
_CHUNK_ROWS = 1 << 16  # of times and intervals in the file: half a megabyte
_UNITS_AT_ONCE = 64


def write_nwb(
    sorting: Sorting,
    file: str | os.PathLike[str],
    *,
    session_start: datetime | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    location: str = "unknown",
    overwrite: bool = False,
) -> Path:
    """Write the units of a sorting to an NWB file, which appears under its name only when it is complete.

    The file holds a Units table (docs/results.md lists its columns), the electrodes of the sorted channels, one group
    of them per shank, and the settings and provenance of the sorting as tables in the processing module ``ecephys``.
    It holds no traces and no features.

    Parameters
    ----------
    sorting : Sorting
        Features are not used. Its `gain_uv` decides whether waveforms are in µV, see :func:`mean_waveforms`.
    file : path
        File on a disk, ``.nwb`` by convention.
    session_start : datetime or str, optional
        When the recording's first sample was taken, as text like "2026-03-01T14:30:00+01:00"; without a time zone, in
        that of this machine. By default ``session_start_time`` of `metadata`, else what SpikeGLX noted in the
        ``.meta`` of the recording, if that is still there.
    metadata : mapping, optional
        What a sorting cannot know: arguments of ``pynwb.NWBFile`` (``experimenter``, ``institution``, ``session_id``,
        …), and under ``subject`` those of ``pynwb.file.Subject``. Archives require a subject. By default
        ``session_description`` names the recording, and ``identifier`` is a random UUID.
    location : str, optional
        Brain region of all electrodes.
    overwrite : bool, optional
        Replace an existing file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    MissingDependencyError
        If pynwb is not installed, or too old.
    ResultsError
        If the file exists or cannot be written, the start of the session is not known, the metadata do not fit NWB, or
        the sorting lacks a probe.
    """
    _require_pynwb()
    import h5py
    from pynwb import NWBHDF5IO

    path = _target(file, overwrite)
    if sorting.probe is None:
        raise ResultsError("NWB needs the positions of the channels, which this sorting lacks. Sort with a probe.")
    contents = _empty_file(sorting, session_start, metadata or {})
    if sorting.gain_uv is None:
        warn(
            "The gain of the recording is not known, so mean waveforms are in units of its samples. Give gain_uv (on "
            "the command line --gain-uv) for µV.",
            Ks4StreamWarning,
        )
    if not sorting.n_units:
        warn("The sorting has no units; the Units table will be empty.", FewSpikesWarning)
    with atomic_draft(path) as draft:
        _add_electrodes(contents, sorting, location)
        contents.units = _units_table(sorting, contents.electrodes)
        module = contents.create_processing_module("ecephys", "How the units were found: settings and provenance.")
        module.add(_table(SETTINGS, "Settings of the sorting, all of them.", _settings_rows(sorting.settings)))
        module.add(_table(PROVENANCE, "What was sorted, and with what.", _provenance_rows(sorting)))
        # pynwb warns of a path that does not end in .nwb, but not of an open file
        with h5py.File(draft, "w") as opened, NWBHDF5IO(file=opened, mode="w") as io:
            io.write(contents)
    return path


def session_start_of(sorting: Sorting) -> datetime | None:
    """When the recording began, by the SpikeGLX ``.meta`` next to its first file; None if there is none.

    SpikeGLX notes local time without a time zone; the same is returned.
    """
    first = sorting.files[0] if sorting.files else ""
    if not first or is_remote(first):
        return None
    try:
        meta = find_meta(first)
        return read_meta(meta).created if meta else None
    except Ks4StreamError:
        return None


def _require_pynwb() -> None:
    try:
        import pynwb  # noqa: F401

        found = version("pynwb")
    except ImportError as error:
        raise MissingDependencyError("NWB files need pynwb; install it with: pip install 'ks4stream[nwb]'.") from error
    if tuple(int(number) for number in found.split(".")[:2]) < PYNWB:
        raise MissingDependencyError(
            f"NWB files need pynwb {'.'.join(map(str, PYNWB))} or newer, and {found} is installed, which can only "
            "store waveforms in volts. Update it with: pip install -U 'ks4stream[nwb]'."
        )


def _target(file: str | os.PathLike[str], overwrite: bool) -> Path:
    if is_remote(os.fspath(file)):
        raise ResultsError(f"{os.fspath(file)} is not on a disk. Write the NWB file to one, and copy it from there.")
    path = Path(file).absolute()
    if path.is_dir():
        raise ResultsError(f"{path} is a folder. Give the name of the NWB file to write.")
    if path.exists() and not overwrite:
        raise ResultsError(f"{path} exists. Choose another name, or replace it with overwrite (--overwrite).")
    return path


# -- the file ----------------------------------------------------------------------------------------


def _empty_file(sorting: Sorting, start: datetime | str | None, metadata: Mapping[str, Any]) -> Any:
    """An NWB file in memory with everything but its tables."""
    from pynwb import NWBFile
    from pynwb.file import Subject

    about = dict(metadata)
    given = about.pop("session_start_time", None)
    try:
        began = _time(start) or _time(given) or session_start_of(sorting)
        if began is None:
            raise ResultsError(
                "NWB needs the time at which the recording began, and no SpikeGLX .meta of the recording tells it. "
                "Give session_start (on the command line --session-start 2026-03-01T14:30:00+01:00)."
            )
        subject = dict(about.pop("subject", None) or {})
        if "date_of_birth" in subject:
            subject["date_of_birth"] = _with_zone(_time(subject["date_of_birth"]))
        origin = sorting.provenance
        software = {"ks4stream": origin.ks4stream, "torch": origin.torch, "numpy": origin.numpy, "scipy": origin.scipy}
        defaults: dict[str, Any] = {
            "session_description": f"Spikes sorted from {origin.recording or 'a recording'} by ks4stream.",
            "identifier": str(uuid.uuid4()),
            "was_generated_by": [[name, number] for name, number in software.items() if number] or None,
        }
        return NWBFile(
            session_start_time=_with_zone(began), subject=Subject(**subject) if subject else None, **(defaults | about)
        )
    except (TypeError, ValueError) as error:  # of pynwb, which names the argument
        raise ResultsError(f"The metadata do not fit NWB: {error}") from error


def _time(value: Any) -> datetime | None:
    if value is None or isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a time; give a datetime, or text like 2026-03-01T14:30:00+01:00.")
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a time like 2026-03-01T14:30:00+01:00.") from None


def _with_zone(time: datetime | None) -> datetime | None:
    return time if time is None or time.tzinfo else time.astimezone()


def _add_electrodes(contents: Any, sorting: Sorting, location: str) -> None:
    """One electrode per sorted channel, in the order of the sorting's channels."""
    probe = sorting.probe
    assert probe is not None
    device = contents.create_device(_name(probe.name or "probe"), description="The probe that was sorted.")
    groups = {
        shank: contents.create_electrode_group(
            f"shank{shank}", f"Sorted contacts on shank {shank}.", location=location, device=device
        )
        for shank in np.unique(probe.shank).tolist()
    }
    dead = np.zeros(0, np.int64) if sorting.whitening is None else sorting.whitening.dead
    has_signal = ~np.isin(np.arange(probe.n_channels), dead)
    for name, text in {
        "channel_in_file": "Column of the recording's file, counted from 0.",
        "shank": "Number of the shank.",
        "has_signal": "False for channels without signal, which the sorting left out.",
    }.items():
        contents.add_electrode_column(name, text)
    for channel in range(probe.n_channels):
        contents.add_electrode(
            location=location,
            group=groups[int(probe.shank[channel])],
            rel_x=float(probe.x_um[channel]),
            rel_y=float(probe.y_um[channel]),
            channel_in_file=int(probe.chan_map[channel]),
            shank=int(probe.shank[channel]),
            has_signal=bool(has_signal[channel]),
        )


def _name(text: str) -> str:
    """A name that HDF5 can hold."""
    return text.replace("/", "_").replace(":", "_")


def _table(name: str, description: str, rows: list[dict[str, str]]) -> Any:
    from hdmf.common import DynamicTable, VectorData

    texts = {
        "setting": "Name, which is Kilosort4's where it has the same setting.",
        "fact": "Name.",
        "value": "Value as JSON.",
        "unit": "Unit of the value; empty if it has none.",
        "meaning": "What the setting does.",
    }
    columns = [
        VectorData(name=column, description=texts[column], data=[row[column] for row in rows]) for column in rows[0]
    ]
    return DynamicTable(name=name, description=description, columns=columns)


def _settings_rows(settings: Settings) -> list[dict[str, str]]:
    values = settings.to_dict()
    return [
        {
            "setting": spec.name,
            "value": _json(values[spec.name]),
            "unit": spec.metadata["unit"],
            "meaning": spec.metadata["doc"],
        }
        for spec in fields(settings)
    ]


def _provenance_rows(sorting: Sorting) -> list[dict[str, str]]:
    """Without the paths of files, which are nobody else's business."""
    facts = asdict(sorting.provenance) | {
        "n_samples": sorting.n_samples,
        "sampling_rate_hz": sorting.sampling_rate_hz,
        "dtype": sorting.dtype,
        "n_channels_in_file": sorting.n_chan_file,
        "gain_uv": sorting.gain_uv,
        "warnings": list(sorting.warnings),
    }
    return [{"fact": name, "value": _json(value)} for name, value in facts.items()]


def _json(value: Any) -> str:
    """JSON, which has no infinity: it becomes text, as in ``sorting.zarr``; Settings.from_dict reads that."""
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value).replace("inf", "Infinity")
    return json.dumps(value, ensure_ascii=False)


# -- the units ---------------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """What is asked of the mean waveforms of all units, which are not kept."""

    channels: list[NDArray[np.int64]]  # of each unit, largest waveform first
    amplitude: NDArray[np.float64]  # (u,) peak to peak on the first of them


def _shapes(sorting: Sorting) -> _Shapes:
    channels, amplitudes = [], []
    for at in range(0, sorting.n_units, _UNITS_AT_ONCE):
        units = slice(at, at + _UNITS_AT_ONCE)
        extent = np.ptp(mean_waveforms(sorting, units), axis=1)  # (unit, channel)
        for template, size in zip(sorting.unit_features[units], extent, strict=True):
            own = followed_channels(template)
            channels.append(own[np.argsort(-size[own], kind="stable")])
            amplitudes.append(float(size.max()))
    return _Shapes(channels, np.array(amplitudes, np.float64))


def _units_table(sorting: Sorting, electrodes: Any) -> Any:
    from hdmf.common import DynamicTableRegion, ElementIdentifiers, VectorData, VectorIndex
    from pynwb.misc import Units

    rate, n_units = sorting.sampling_rate_hz, sorting.n_units
    trains, shapes = ByUnit(sorting, "sample"), _shapes(sorting)
    sample = trains.all("sample")
    columns: list[Any] = []

    def ragged(name: str, text: str, data: Any, stop: NDArray[np.int64], **about: Any) -> None:
        kind = DynamicTableRegion if about else VectorData
        values = kind(name=name, description=text, data=data, **about)
        columns.append(VectorIndex(name=f"{name}_index", data=stop.astype(np.uint64), target=values))
        columns.append(values)  # hdmf looks for the index first

    def plain(name: str, text: str, data: Any) -> None:
        columns.append(VectorData(name=name, description=text, data=data))

    ragged(
        "spike_times",
        "Times of the spikes, without duplicates: sample number / sampling rate.",
        _streamed((len(sample),), np.float64, lambda rows: sample[rows] / rate, release=sample),
        trains.start[1:],
    )
    spans_s = observed_spans(sorting.tiling, sorting.artifacts) / rate
    ragged(
        "obs_intervals",
        "What was sorted, without blanked artifacts; the same for all units.",
        _streamed((n_units * len(spans_s), 2), np.float64, lambda rows: spans_s[_numbers(rows) % max(len(spans_s), 1)]),
        np.arange(1, n_units + 1) * len(spans_s),
    )
    ragged(
        "electrodes",
        "Electrodes on which the unit was followed, the one with the largest waveform first.",
        np.concatenate([np.zeros(0, np.int64), *shapes.channels]),
        np.cumsum([len(own) for own in shapes.channels]).astype(np.int64),
        table=electrodes,
    )
    unit = "µV" if sorting.gain_uv is not None else "units of the recording's samples, as its gain is not known"
    plain(
        "waveform_mean",
        f"Mean waveform (time, electrode) in {unit}, filtered and referenced, on all electrodes in the order of the "
        "electrodes table; zero on those on which the unit was not followed.",
        _streamed(
            (n_units, sorting.settings.nt, sorting.n_channels),
            np.float32,
            lambda rows: mean_waveforms(sorting, rows),
            chunk_rows=1,
            buffer_rows=_UNITS_AT_ONCE,
        ),
    )
    label = np.where(sorting.good, "good", "mua")  # an array, as its type is also known if it is empty
    main = [int(own[0]) if len(own) else -1 for own in shapes.channels]
    in_file = np.append(sorting.probe.chan_map if sorting.probe else [], -1)
    plain("KSLabel", "Label of the sorter: good if the unit fires like one neuron, otherwise mua.", label)
    plain(
        "reason", "Why the unit is not good.", np.array([reason or "none" for reason in sorting.label_reasons], np.str_)
    )
    plain("quality", "The same as KSLabel: it was not changed by hand.", label)
    plain("n_spikes", "Number of spikes, without duplicates.", trains.count)
    plain("contamination", "Spike pairs in the refractory period, relative to chance.", sorting.contamination)
    plain("amplitude", f"Peak to peak of the mean waveform where it is largest, in {unit}.", shapes.amplitude)
    plain(
        "template_norm",
        "Norm of the whitened template, in multiples of the noise's standard deviation (Kilosort4's Amplitude).",
        np.linalg.norm(sorting.unit_features, axis=(1, 2)).astype(np.float64),
    )
    plain("main_channel", "Column of the recording's file where the mean waveform is largest.", in_file[main])
    plain("x_um", "Mean position of the spikes across the probe, in µm.", trains.position_um[:, 0])
    plain("depth_um", "Mean position of the spikes along the probe, in µm, without drift.", trains.position_um[:, 1])
    return Units(
        name="units",
        description="Units found by ks4stream.",
        id=ElementIdentifiers(name="id", data=np.arange(n_units)),
        columns=columns,
        colnames=[column.name for column in columns if not isinstance(column, VectorIndex)],
        electrode_table=electrodes,
        resolution=1.0 / rate,
        waveform_rate=float(rate),
        waveform_unit="microvolts" if sorting.gain_uv is not None else "arbitrary units",
        waveform_time_before_peak_in_ms=1000.0 * sorting.settings.peak_sample / rate,
    )


def _numbers(rows: slice) -> NDArray[np.int64]:
    return np.arange(rows.start, rows.stop)


def _streamed(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    read: Callable[[slice], NDArray[Any]],
    *,
    chunk_rows: int = _CHUNK_ROWS,
    buffer_rows: int = _SPIKES_AT_ONCE,
    release: NDArray[Any] | None = None,
) -> Any:
    """A compressed dataset that is read and written a few rows at a time."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    from hdmf.backends.hdf5 import H5DataIO
    from hdmf.data_utils import GenericDataChunkIterator

    class Streamed(GenericDataChunkIterator):  # type: ignore[misc]
        def _get_data(self, selection: tuple[slice, ...]) -> NDArray[Any]:
            found = np.asarray(read(selection[0])[(slice(None), *selection[1:])], dtype)
            if release is not None:
                release_pages(release)
            return found

        def _get_maxshape(self) -> tuple[int, ...]:
            return shape

        def _get_dtype(self) -> np.dtype[Any]:
            return np.dtype(dtype)

    n_chunk = min(chunk_rows, shape[0])
    n_buffer = min(max(buffer_rows // n_chunk, 1) * n_chunk, shape[0])
    pieces = Streamed(buffer_shape=(n_buffer, *shape[1:]), chunk_shape=(n_chunk, *shape[1:]))
    return H5DataIO(pieces, compression="gzip", compression_opts=4, shuffle=True)
