"""The mean waveforms of units as they are in the recording, in µV: whitening and scaling undone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ResultsError
from ks4stream.results import Sorting


def mean_waveforms(sorting: Sorting, units: slice = slice(None)) -> NDArray[np.float32]:
    """Mean waveforms of units in µV, or in units of the file if the recording's gain is unknown.

    A template is known on the channels it was learned on (``nearest_chans``), and only there is it given back: the
    waveform x on these channels solves W x = template, where W holds the rows and columns of the whitening matrix for
    these channels. On all other channels the waveform is exactly zero, which means "not followed" rather than "no
    signal". `scale` and `invert_sign` are undone as well.

    The high-pass filter and the common reference are not undone, so that waveforms are those of filtered and
    referenced traces: at 300 Hz, the slow part of a spike is missing. In drifting tissue, they are averages of
    spikes that were moved to one position along the probe, and are flatter than any of them.

    Parameters
    ----------
    sorting : Sorting
        Its `gain_uv` decides the unit; ``dataclasses.replace(sorting, gain_uv=0.195)`` sets another.
    units : slice, optional
        Which units; by default all.

    Returns
    -------
    ndarray of float32, shape (unit, time, channel)
        Sorted channels; the spike's time is at sample ``sorting.settings.peak_sample``.

    Raises
    ------
    ResultsError
        If the sorting has units but no whitening or no waveform components.
    """
    features = sorting.unit_features[units]
    if not len(features):
        return np.zeros((0, sorting.settings.nt, sorting.n_channels), np.float32)
    if sorting.whitening is None or sorting.waveforms is None:
        raise ResultsError(
            "The sorting has no whitening or no waveform components, from which mean waveforms are made. Sort again."
        )
    unwhitened = np.stack([_unwhitened(template, sorting.whitening.matrix) for template in features])
    unwhitened *= file_factor(sorting)
    return np.asarray(np.einsum("ucq,qw->uwc", unwhitened, sorting.waveforms.components), np.float32)


def file_factor(sorting: Sorting) -> float:
    """What takes the traces that were sorted back to those of the file: to µV, or to its own unit without a gain.

    `shift` and the recording's offset are the same for all samples, and the high-pass filter removed them.
    """
    scale = sorting.settings.scale if sorting.settings.scale is not None else 1.0
    gain = 1.0 if sorting.gain_uv is None else sorting.gain_uv
    return gain / scale * (-1.0 if sorting.settings.invert_sign else 1.0)


def followed_channels(template: NDArray[Any]) -> NDArray[np.int64]:
    """Channels, ascending, on which a template (c, q) was learned: all others are exactly zero."""
    return np.flatnonzero(np.any(template != 0, axis=1))


def _unwhitened(template: NDArray[np.float32], whitening: NDArray[np.float32]) -> NDArray[np.float64]:
    """A template (c, q) in the unit of the traces before whitening.

    The inverse of the whole matrix would spread it over the probe. Requiring that its whitened waveform is also zero
    on other channels, where templates are cut off rather than zero, would make it too small.
    """
    channels = followed_channels(template)
    found = np.zeros(template.shape, np.float64)
    among = whitening[np.ix_(channels, channels)].astype(np.float64)
    found[channels] = np.linalg.lstsq(among, template[channels].astype(np.float64), rcond=None)[0]
    return found
