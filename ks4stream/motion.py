"""Drift that was estimated elsewhere: resampled to the batches and depths of a sort, and checked against them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError, SettingsError
from ks4stream.results import Drift
from ks4stream.stages.preprocessing import Preprocessor

if TYPE_CHECKING:
    import xarray

logger = logging.getLogger("ks4stream")

DEPTH_MARGIN_UM = 300.0
"""How far contacts may lie beyond the outermost depths: the windows of SpikeInterface's estimates are up to 450 µm
wide, and the outermost centres lie half a window within the probe."""

WANTED = (
    "give a Drift, SpikeInterface's Motion, or an xarray.DataArray of the tissue's displacement in µm with dims 'time' "
    "(coordinate in seconds) and 'depth' (in µm)"
)


def given_drift(given: Any, tiles: Preprocessor) -> Drift:
    """The drift of each batch, from a drift that was estimated elsewhere.

    Parameters
    ----------
    given : Drift, xarray.DataArray or spikeinterface.core.Motion
        A ``Drift`` is used as it is. The others hold the tissue's displacement, positive towards larger depth: they are
        interpolated linearly at the middle of each batch, and keep their depths. Times count from the first sample
        of the recording (of its segment, for a Motion with several).
    tiles : Preprocessor

    Returns
    -------
    Drift

    Raises
    ------
    SettingsError
        If it is something else, or not a table of finite numbers with ascending times and depths.
    RecordingError
        If it does not cover the batches or the probe.
    """
    if isinstance(given, Drift):
        drift = _checked(given, tiles)
    elif hasattr(given, "temporal_bins_s") and hasattr(given, "spatial_bins_um"):
        drift = _of_motion(given, tiles)
    elif hasattr(given, "dims") and hasattr(given, "coords"):
        drift = _of_array(given, tiles)
    else:
        raise SettingsError(f"drift={type(given).__name__} is not a drift: {WANTED}.")
    shift = drift.shift_um
    logger.info(
        "The drift was given: shifts from %.3g to %.3g µm at %d depth(s)", shift.min(), shift.max(), shift.shape[1]
    )
    return drift


def _checked(drift: Drift, tiles: Preprocessor) -> Drift:
    if len(drift.shift_um) != len(tiles.tiling):
        raise RecordingError(
            f"The given drift is for {len(drift.shift_um)} batches, but {tiles.recording.name} has "
            f"{len(tiles.tiling)} of batch_size={tiles.tiling.size}. Give that of the same recording and settings "
            "(batch_size, batch_downsampling, tmin, tmax), or leave drift out."
        )
    if drift.shift_um.shape[1] != len(drift.centre_um):
        raise SettingsError(
            f"The given drift has shifts at {drift.shift_um.shape[1]} depths, but {len(drift.centre_um)} depths."
        )
    if drift.error_um.size and drift.error_um.shape != drift.shift_um.shape:
        raise SettingsError(
            f"The given drift has shifts of shape {drift.shift_um.shape}, but errors (error_um) of shape "
            f"{drift.error_um.shape}. They must have the same shape, or leave error_um out."
        )
    _check_finite(drift.shift_um)
    _check_ascending(drift.centre_um, "depths")
    return drift


def _of_motion(motion: Any, tiles: Preprocessor) -> Drift:
    """From SpikeInterface's Motion, whose segments are those that were joined in time."""
    if motion.direction != "y":
        raise SettingsError(f"The given Motion is along {motion.direction!r}; only motion along 'y' can be corrected.")
    parts = tiles.recording.source.parts or (tiles.recording.source,)
    lengths = [part.n_samples for part in parts] if len(motion.displacement) > 1 else [tiles.recording.n_samples]
    if len(lengths) != len(motion.displacement):
        raise RecordingError(
            f"The given Motion has {len(motion.displacement)} segments, but {tiles.recording.name} has {len(lengths)}."
        )
    borders = np.cumsum([0, *lengths])
    centres = tiles.tiling.centres
    segment = np.searchsorted(borders[1:-1], centres, "right")
    at_batches = np.empty((len(centres), len(motion.spatial_bins_um)))
    for index, displacement in enumerate(motion.displacement):
        own = segment == index
        local_s = (centres[own] - borders[index]) / tiles.sampling_rate_hz
        where = f"segment {index} of the given Motion" if len(lengths) > 1 else "the given Motion"
        at_batches[own] = _at(
            np.asarray(displacement), np.asarray(motion.temporal_bins_s[index]), local_s, tiles, where
        )
    return _drift(at_batches, np.asarray(motion.spatial_bins_um, np.float64), tiles)


def _of_array(array: xarray.DataArray, tiles: Preprocessor) -> Drift:
    """From a labelled array of displacement."""
    if set(array.dims) != {"time", "depth"} or not {"time", "depth"} <= set(array.coords):
        raise SettingsError(
            f"The given drift has dims {array.dims} and coordinates {tuple(array.coords)}: {WANTED}. For the same "
            "drift at all depths, give a single depth."
        )
    array = array.transpose("time", "depth")
    times_s, depths_um = (np.asarray(array.coords[dim], np.float64) for dim in ("time", "depth"))
    local_s = tiles.tiling.centres / tiles.sampling_rate_hz
    at_batches = _at(np.asarray(array), times_s, local_s, tiles, "the given drift")
    return _drift(at_batches, depths_um, tiles)


def _at(
    displacement: NDArray[Any], times_s: NDArray[Any], at_s: NDArray[np.floating], tiles: Preprocessor, what: str
) -> NDArray[np.float64]:
    """Displacement (time, depth) at given times, linear in between."""
    if displacement.ndim != 2 or len(displacement) != len(times_s) or not displacement.size:
        raise SettingsError(f"The displacement of {what} has shape {displacement.shape} for {len(times_s)} times.")
    _check_finite(displacement)
    _check_ascending(times_s, "times")
    # Bins are described by their middle, so that the recording reaches half a bin farther, or a batch.
    margin_s = max(float(np.diff(times_s).max(initial=0)), tiles.tiling.size / tiles.sampling_rate_hz)
    if len(at_s) and (at_s[0] < times_s[0] - margin_s or at_s[-1] > times_s[-1] + margin_s):
        raise RecordingError(
            f"The times of {what} are {times_s[0]:.6g} to {times_s[-1]:.6g} s, but batches from {at_s[0]:.6g} to "
            f"{at_s[-1]:.6g} s are sorted. Times must count from the first sample of the recording or segment, "
            "whatever time it starts at; shorten what is sorted with tmin and tmax."
        )
    return np.column_stack([np.interp(at_s, times_s, column) for column in displacement.T.astype(np.float64)])


def _drift(displacement_um: NDArray[np.float64], depths_um: NDArray[np.float64], tiles: Preprocessor) -> Drift:
    """The shifts that undo a displacement (batch, depth); beyond its outermost depths it is what it is there."""
    if displacement_um.shape[1] != len(depths_um):
        raise SettingsError(
            f"The given drift has a displacement at {displacement_um.shape[1]} depths, but {len(depths_um)} depths."
        )
    _check_ascending(depths_um, "depths")
    if len(depths_um) > 1:
        lowest_um, highest_um = float(tiles.probe.y_um.min()), float(tiles.probe.y_um.max())
        margin_um = max(DEPTH_MARGIN_UM, float(np.diff(depths_um).max()))
        if lowest_um < depths_um[0] - margin_um or highest_um > depths_um[-1] + margin_um:
            raise RecordingError(
                f"The depths of the given drift are {depths_um[0]:g} to {depths_um[-1]:g} µm, but the sorted contacts "
                f"lie between {lowest_um:g} and {highest_um:g} µm. Give the drift of the whole probe, with depths in "
                "µm that count as the probe's y does."
            )
        # Between these and the outermost depths the shift is interpolated, and so remains constant.
        below, above = bool(lowest_um < depths_um[0]), bool(highest_um > depths_um[-1])
        depths_um = np.concatenate([[lowest_um] * below, depths_um, [highest_um] * above])
        displacement_um = np.pad(displacement_um, ((0, 0), (int(below), int(above))), mode="edge")
    return Drift(shift_um=-displacement_um, centre_um=depths_um)


def _check_finite(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise SettingsError(
            f"The given drift is not a finite number at {np.count_nonzero(~np.isfinite(values))} of {values.size} "
            "places. Fill the gaps, or leave drift out."
        )


def _check_ascending(values: NDArray[Any], what: str) -> None:
    if np.ndim(values) != 1 or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise SettingsError(f"The {what} of the given drift must be finite numbers in ascending order.")
