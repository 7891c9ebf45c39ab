"""Kilosort4's settings as its callers list them: names, defaults, bounds and descriptions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ks4stream.settings import Settings

__all__ = ["DEFAULT_SETTINGS", "EXTRA_PARAMETERS", "MAIN_PARAMETERS", "compare_settings"]

_RECORDING: dict[str, dict[str, Any]] = {
    "n_chan_bin": {"kind": int, "default": None, "doc": "Number of channels in the file, sorted or not."},
    "fs": {"kind": float, "default": 30000, "doc": "Sampling rate.", "unit": "Hz"},
}
"""Settings that belong to the recording, which :class:`~ks4stream.Settings` does not have."""

_MAIN = ("n_chan_bin", "fs", "batch_size", "nblocks", "Th_universal", "Th_learned", "tmin", "tmax")
_EXTRA = (
    "nt",
    "shift",
    "scale",
    "batch_downsampling",
    "artifact_threshold",
    "nskip",
    "whitening_range",
    "highpass_cutoff",
    "binning_depth",
    "sig_interp",
    "drift_smoothing",
    "nt0min",
    "dmin",
    "dminx",
    "min_template_size",
    "template_sizes",
    "nearest_chans",
    "nearest_templates",
    "max_channel_distance",
    "max_peels",
    "templates_from_data",
    "n_templates",
    "n_pcs",
    "Th_single_ch",
    "acg_threshold",
    "ccg_threshold",
    "cluster_neighbors",
    "cluster_downsampling",
    "max_cluster_subset",
    "x_centers",
    "cluster_init_seed",
    "duplicate_spike_ms",
    "position_limit",
)
_GUI_NAMES = {
    "n_chan_bin": "number of channels",
    "fs": "sampling frequency",
    "Th_universal": "Th (universal)",
    "Th_learned": "Th (learned)",
    "Th_single_ch": "Th (single channel)",
    "binning_depth": "binning_depth",
    "sig_interp": "sig_interp",
}
_STEP_OF_GROUP = {
    "recording": "data",
    "preprocessing": "preprocessing",
    "whitening": "preprocessing",
    "drift": "preprocessing",
    "waveforms": "spike detection",
    "detection": "spike detection",
    "matching": "spike detection",
    "clustering": "clustering",
    "results": "postprocessing",
}


def _parameter(name: str) -> dict[str, Any]:
    """Describe a setting as Kilosort4's window and SpikeInterface read it."""
    if name in _RECORDING:
        about: Mapping[str, Any] = {"group": "recording", "gt": 0} | _RECORDING[name]
        default = about["default"]
    else:
        spec = Settings.__dataclass_fields__[name]
        about = spec.metadata
        default = spec.default if about["kilosort4"] is None else about["kilosort4"]
    kind, above = about["kind"], about.get("gt")
    has_bounds = kind in (int, float)
    least = next((bound for bound in (above, about.get("ge")) if bound is not None), -math.inf)
    most = about["le"] if about.get("le") is not None else math.inf
    return {
        "gui_name": _GUI_NAMES.get(name, name if name == "nt0min" else name.replace("_", " ")),
        "type": list if kind is tuple else kind,
        "min": least if has_bounds else None,
        "max": most if has_bounds else None,
        "exclude": [] if above is None else [above],
        "default": list(default) if isinstance(default, tuple) else default,
        "step": "data" if name == "nt" else _STEP_OF_GROUP[about["group"]],
        "description": _described(about),
    }


def _described(about: Mapping[str, Any]) -> str:
    text = str(about["doc"])
    if about.get("unit"):
        text += f" In {about['unit']}."
    if about.get("if_none"):
        text += f" None: {about['if_none']}."
    return text


MAIN_PARAMETERS: dict[str, dict[str, Any]] = {name: _parameter(name) for name in _MAIN}
"""Name of a setting: a dictionary with ``gui_name``, ``type``, ``min``, ``max``, ``exclude``, ``default``, ``step`` and
``description``."""

EXTRA_PARAMETERS: dict[str, dict[str, Any]] = {name: _parameter(name) for name in _EXTRA}
"""The other settings, described in the same way."""

DEFAULT_SETTINGS: dict[str, Any] = {
    name: about["default"] for name, about in {**MAIN_PARAMETERS, **EXTRA_PARAMETERS}.items()
}
"""Name of a setting: its default value."""


def compare_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Find the settings that differ from the defaults.

    Parameters
    ----------
    settings : mapping
        Some or all settings by name.

    Returns
    -------
    modified_settings : dict
        Those whose value is not the default.
    extra_keys : list of str
        Names that are not among :data:`DEFAULT_SETTINGS`; they are not in `modified_settings`.

    Examples
    --------
    >>> compare_settings({"n_chan_bin": 385, "nt": 61, "colour": "red"})
    ({'n_chan_bin': 385}, ['colour'])
    """
    known = {name: value for name, value in settings.items() if name in DEFAULT_SETTINGS}
    modified = {name: value for name, value in known.items() if _plain(value) != DEFAULT_SETTINGS[name]}
    return modified, [name for name in settings if name not in DEFAULT_SETTINGS]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
