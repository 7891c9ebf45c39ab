"""A sorting as the objects of other libraries: xarray's ``Dataset``, SpikeInterface's ``Sorting`` and ``Motion``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import MissingDependencyError, ProbeError, RecordingError, ResultsError
from ks4stream.results import Sorting

if TYPE_CHECKING:
    import xarray

OLDEST_SPIKEINTERFACE = (0, 105)
"""The first that notes in a sorter's folder what was sorted, and the oldest that is tested."""

DIM_NAMES = {
    "n": "spike",
    "u": "unit",
    "v": "template",
    "c": "channel",
    "j": "neighbour",
    "q": "component",
    "w": "sample",
    "p": "waveform",
    "b": "batch",
    "g": "segment",
    "k": "period",
    "k_edge": "period_edge",
}
"""Names of the axes of results, for people."""

NESTED = ("whitening", "waveforms", "drift", "peaks", "diagnostics")
"""Fields of a sorting that are results themselves."""

_UNITS_AT_ONCE = 256
_SPIKES_AT_ONCE = 1 << 20


# -- xarray ------------------------------------------------------------------------------------------------


def to_dataset(sorting: Sorting) -> xarray.Dataset:
    """View a sorting as an :class:`xarray.Dataset`, without copying; see :meth:`Sorting.to_dataset`."""
    import xarray as xr

    variables = {
        f"spike_{name}" if value[0][0] == "spike" else name: value for name, value in _variables(sorting).items()
    }
    if sorting.features.shape[1] != sorting.template_channels.shape[1]:
        del variables["spike_features"]  # they were not loaded, or not saved, and have no channels
    for name in NESTED:
        nested = getattr(sorting, name)
        if nested is not None:
            own = {"n": "peak"} if name == "peaks" else {}
            variables |= {f"{name}_{key}": value for key, value in _variables(nested, own).items()}
    coords: dict[str, Any] = {"unit": np.arange(sorting.n_units)}
    if sorting.probe is not None:
        probe = sorting.probe
        coords |= {
            "channel": probe.chan_map,
            "channel_x_um": ("channel", probe.x_um, {"units": "µm"}),
            "channel_y_um": ("channel", probe.y_um, {"units": "µm"}),
            "shank": ("channel", probe.shank),
        }
    attrs = {"sampling_rate_hz": sorting.sampling_rate_hz, "n_samples": sorting.n_samples, "files": sorting.files}
    return xr.Dataset(variables, coords, attrs)


def _variables(result: Any, dim_names: dict[str, str] | None = None) -> dict[str, tuple[Any, ...]]:
    """The declared arrays of one result, in the form that xarray takes.

    An axis such as "u_known" is "unit" if the values are known, and otherwise an axis of its own, of length 0.
    """
    names = DIM_NAMES | (dim_names or {})
    found: dict[str, tuple[Any, ...]] = {}
    for spec in fields(result):
        if "dims" in spec.metadata:
            value = getattr(result, spec.name)
            letters = [letter.removesuffix("_known") if value.size else letter for letter in spec.metadata["dims"]]
            found[spec.name] = (distinct([names.get(d, d) for d in letters]), value, about(spec.metadata))
    return found


def distinct(dims: list[str]) -> list[str]:
    """Names of axes; one that occurs a second time is called ``other_…``."""
    return [f"other_{dim}" if dim in dims[:axis] else dim for axis, dim in enumerate(dims)]


def about(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Unit and meaning of a declared array, as attributes."""
    found = {"units": metadata["unit"], "description": metadata["doc"]}
    return {key: text for key, text in found.items() if text}


# -- SpikeInterface ----------------------------------------------------------------------------------------


def spikeinterface_core() -> Any:
    """The module ``spikeinterface.core``.

    Raises
    ------
    MissingDependencyError
        If SpikeInterface is not installed, or is too old.
    """
    try:
        import spikeinterface
        import spikeinterface.core as core
    except ImportError as error:
        raise MissingDependencyError(
            "This needs SpikeInterface; install it with: pip install 'ks4stream[spikeinterface]'."
        ) from error
    version = str(getattr(spikeinterface, "__version__", "0"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_SPIKEINTERFACE:
        oldest = ".".join(map(str, OLDEST_SPIKEINTERFACE))
        raise MissingDependencyError(
            f"SpikeInterface {version} is too old; ks4stream needs version {oldest} or later. Install it with: pip "
            "install --upgrade 'ks4stream[spikeinterface]'."
        )
    return core


def segment_lengths(extractor: Any) -> list[int]:
    """Number of samples of each segment of a SpikeInterface recording."""
    return [int(extractor.get_num_samples(segment_index=index)) for index in range(extractor.get_num_segments())]


def to_spikeinterface(
    sorting: Sorting,
    recording: Any = None,
    *,
    keep_good_only: bool = False,
    lengths: Sequence[int] | None = None,
    channel_ids: Sequence[Any] | NDArray[Any] | None = None,
) -> Any:
    """Make a SpikeInterface sorting; see :meth:`Sorting.to_spikeinterface`.

    Parameters
    ----------
    sorting : Sorting
    recording : spikeinterface recording, optional
    keep_good_only : bool
    lengths : sequence of int, optional
        Samples of each segment, if there is no recording to ask; by default there is one segment.
    channel_ids : sequence, optional
        Likewise, the channels' names; by default columns of the file.
    """
    core = spikeinterface_core()
    if recording is not None:
        lengths, channel_ids = segment_lengths(recording), recording.channel_ids
    lengths = [sorting.n_samples] if lengths is None else [int(length) for length in lengths]
    _check_belongs(sorting, lengths, channel_ids)
    units = np.flatnonzero(sorting.good) if keep_good_only else np.arange(sorting.n_units)
    vector = _spike_vector(sorting, units, np.cumsum([0, *lengths]))
    found = core.NumpySorting(vector, sorting.sampling_rate_hz, units)
    while found.get_num_segments() < len(lengths):  # it counts segments up to the last one with spikes
        found.add_sorting_segment(type(found.segments[0])(vector, found.get_num_segments(), units))
    for name, values in unit_properties(sorting, channel_ids).items():
        found.set_property(name, values[units])
    if recording is not None:
        found.register_recording(recording)
    return found


def _check_belongs(sorting: Sorting, lengths: Sequence[int], channel_ids: Any) -> None:
    if sum(lengths) != sorting.n_samples:
        raise RecordingError(
            f"The given recording has {sum(lengths)} samples in {len(lengths)} segment(s), but {sorting.n_samples} "
            "samples were sorted. Give the recording that was sorted, with all its segments, or none."
        )
    if channel_ids is not None and sorting.probe is not None and len(channel_ids) <= int(sorting.probe.chan_map.max()):
        raise ProbeError(
            f"The given recording has {len(channel_ids)} channels, but channel {int(sorting.probe.chan_map.max())} was "
            "sorted (counted from 0). Give the recording that was sorted, with all its channels, or none."
        )


def _spike_vector(sorting: Sorting, units: NDArray[np.int64], borders: NDArray[np.int64]) -> NDArray[np.void]:
    """Spikes of some units as SpikeInterface's vector: kept ones whose waveform lies within one segment."""
    dtype = [("sample_index", "int64"), ("unit_index", "int64"), ("segment_index", "int64")]
    index_of_unit = np.full(sorting.n_units, -1, np.int64)
    index_of_unit[units] = np.arange(len(units))
    before = sorting.settings.peak_sample
    after = sorting.settings.nt - before
    inner = borders[1:-1]
    pieces = []
    for at in range(0, sorting.n_spikes, _SPIKES_AT_ONCE):
        rows = slice(at, at + _SPIKES_AT_ONCE)
        sample = np.asarray(sorting.sample[rows], np.int64)
        unit_index = index_of_unit[sorting.unit[rows]]
        whole = np.searchsorted(inner, sample - before, "right") == np.searchsorted(inner, sample + after - 1, "right")
        chosen = sorting.kept[rows] & (unit_index >= 0) & whole
        piece = np.empty(int(np.count_nonzero(chosen)), dtype)
        segment = np.searchsorted(inner, sample[chosen], "right")
        piece["sample_index"] = sample[chosen] - borders[segment]
        piece["unit_index"] = unit_index[chosen]
        piece["segment_index"] = segment
        pieces.append(piece)
    return np.concatenate(pieces) if pieces else np.empty(0, dtype)


def unit_properties(sorting: Sorting, channel_ids: Any = None) -> dict[str, NDArray[Any]]:
    """What SpikeInterface is told about each unit, by name; first axis: unit."""
    templates, channels = _templates(sorting)
    columns, shanks = np.arange(sorting.n_channels), np.zeros(sorting.n_channels, np.int64)
    if sorting.probe is not None:
        columns, shanks = sorting.probe.chan_map, sorting.probe.shank
    ids = columns if channel_ids is None else np.asarray(channel_ids)[columns]
    x_um, y_um = (_mean_by_unit(sorting, values) for values in (sorting.x_um, sorting.y_um))
    return {
        "KSLabel": np.where(sorting.good, "good", "mua"),
        "reason": np.array([reason or "none" for reason in sorting.label_reasons], np.str_),
        "ContamPct": 100 * sorting.contamination,
        "Amplitude": np.linalg.norm(sorting.unit_features, axis=(1, 2)),
        "main_channel_id": ids[channels[:, 0]],
        "main_channel_index": columns[channels[:, 0]],
        "shank": shanks[channels[:, 0]],
        "x_um": x_um,
        "y_um": y_um,
        "depth": y_um,
        "template": templates,
        "template_channel_ids": _ids_at(ids, channels),
    }


def _ids_at(ids: NDArray[Any], channels: NDArray[np.int64]) -> NDArray[Any]:
    """Names of channels; an empty one, or −1, where there is none."""
    if ids.dtype.kind not in "iU":
        ids = ids.astype(str)
    found = ids[channels]
    found[channels < 0] = "" if ids.dtype.kind == "U" else -1
    return found


def _templates(sorting: Sorting) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Whitened waveforms of all units on the channels where they are largest (peak to peak), and these channels.

    (u, w, j) and (u, j). There are `nearest_chans` of them, for a smaller probe 0 on channel −1: SpikeInterface joins
    properties of shanks only if they have the same shape.
    """
    n_slots, n_found = sorting.settings.nearest_chans, min(sorting.settings.nearest_chans, sorting.n_channels)
    if sorting.waveforms is None:
        if sorting.n_units:
            raise ResultsError(f"The sorting has {sorting.n_units} units but no waveform components.")
        return np.zeros((0, sorting.settings.nt, n_slots), np.float32), np.zeros((0, n_slots), np.int64)
    components = np.asarray(sorting.waveforms.components, np.float32)
    templates = np.zeros((sorting.n_units, components.shape[1], n_slots), np.float32)
    channels = np.full((sorting.n_units, n_slots), -1, np.int64)
    for at in range(0, sorting.n_units, _UNITS_AT_ONCE):
        rows = slice(at, at + _UNITS_AT_ONCE)
        dense = np.einsum("ucq,qw->uwc", sorting.unit_features[rows], components)
        largest = np.argsort(-np.ptp(dense, axis=1), axis=1, kind="stable")[:, :n_found]
        templates[rows, :, :n_found] = np.take_along_axis(dense, largest[:, None, :], axis=2)
        channels[rows, :n_found] = largest
    return templates, channels


def _mean_by_unit(sorting: Sorting, values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean over the kept spikes of each unit; NaN for a unit without any."""
    total, count = np.zeros((2, sorting.n_units))
    for at in range(0, sorting.n_spikes, _SPIKES_AT_ONCE):
        rows = slice(at, at + _SPIKES_AT_ONCE)
        kept = sorting.kept[rows]
        unit = sorting.unit[rows][kept]
        total += np.bincount(unit, values[rows][kept], minlength=sorting.n_units)
        count += np.bincount(unit, minlength=sorting.n_units)
    return np.divide(total, count, out=np.full(sorting.n_units, np.nan), where=count > 0)


def to_motion(sorting: Sorting, recording: Any = None) -> Any:
    """The drift as SpikeInterface's ``Motion``; see :meth:`Sorting.to_motion`."""
    spikeinterface_core()
    from spikeinterface.core.motion import Motion

    if sorting.drift is None:
        raise ResultsError("The sorting has no drift: it was not estimated (nblocks=0). Sort with nblocks=1 or more.")
    displacement = -sorting.drift.shift_um.astype(np.float64)
    lengths, starts = [sorting.n_samples], [0.0]
    if recording is not None:
        lengths = segment_lengths(recording)
        starts = [float(recording.get_start_time(segment_index=index)) for index in range(len(lengths))]
        _check_belongs(sorting, lengths, recording.channel_ids)
    centres, borders = sorting.tiling.centres, np.cumsum([0, *lengths])
    segment = np.searchsorted(borders[1:-1], centres, "right")
    of_segment, times_s = [], []
    for index, (first, last) in enumerate(itertools.pairwise(borders)):
        own = np.flatnonzero(segment == index)
        local = centres[own] - first
        if not len(own):  # a segment shorter than a batch has the shift of the nearest one
            local = np.array([(last - first) / 2])
            own = np.abs(centres - (first + last) / 2).argmin(keepdims=True)
        of_segment.append(displacement[own])
        times_s.append(starts[index] + local / sorting.sampling_rate_hz)
    return Motion(of_segment, times_s, sorting.drift.centre_um.astype(np.float64))
