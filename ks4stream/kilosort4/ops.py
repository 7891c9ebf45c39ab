"""What can be found again in an ``ops``: Kilosort4's functions called one by one have no other memory.

An ``ops`` is a dictionary that callers copy, edit, save and load. It holds settings and results by Kilosort4's names,
and under "ks4stream" what Kilosort4 has no name for, as plain values and arrays. Here, and nowhere else in ks4stream,
it is turned back into the values that the stages take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.errors import OpsError, RecordingError, SettingsError
from ks4stream.io.kilosort_ops import highpass_impulse
from ks4stream.io.probes import load_probe
from ks4stream.kilosort4.arguments import opened, results_folder
from ks4stream.probe import Probe
from ks4stream.recording import FlatFile, Recording
from ks4stream.results import Diagnostics, Drift, PeakSample, Provenance, Waveforms, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare, provenance_of
from ks4stream.stages.preprocessing import Preprocessor, tiling_of
from ks4stream.stages.pursuit import lowest_score

OWN = "ks4stream"
"""Key of what Kilosort4 has no name for."""

MADE_BY = {
    "probe": "initialize_ops",
    "preprocessing": "compute_preprocessing",
    "dshift": "compute_drift_correction",
    "wPCA": "detect_spikes",
    "iCC": "detect_spikes",
}
"""The function that an entry comes from."""


def needed(ops: Mapping[str, Any], name: str) -> Any:
    """An entry of an ``ops``.

    Raises
    ------
    OpsError
        If it is missing.
    """
    if name not in ops or (name == "preprocessing" and ops[name] is None):
        before = MADE_BY.get(name, "initialize_ops")
        raise OpsError(f"ops has no {name!r}. Call {before}(…) first, and pass on the ops that it returned or changed.")
    return ops[name]


def own(ops: dict[str, Any]) -> dict[str, Any]:
    """What Kilosort4 has no name for; it may be changed."""
    found: dict[str, Any] = ops.setdefault(OWN, {})
    return found


def array(value: Any, dtype: Any) -> NDArray[Any]:
    """A tensor on any device, an array or a list, as an array."""
    if torch.is_tensor(value):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    return np.ascontiguousarray(value, dtype)


def tensor(values: NDArray[Any]) -> torch.Tensor:
    """A tensor of the same memory, or of a copy if it is read-only, which torch does not support."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


# -- settings, probe, recording ------------------------------------------------------------------------


def settings_of(ops: Mapping[str, Any]) -> Settings:
    """The settings: entries of the ``ops`` itself, as callers change them there.

    There is no high-pass filter if `compute_preprocessing` was left out and ``hp_filter`` is None, or the single zero
    that SpikeInterface puts in its place.

    Raises
    ------
    SettingsError
        If one is not valid.
    """
    values = {name: _plain(ops[name]) for name in Settings.__dataclass_fields__ if name in ops}
    if values.get("artifact_threshold", 0) is None:  # as callers pass it on through JSON, which has no infinity
        values["artifact_threshold"] = math.inf
    for name, (given, filled) in ops.get(OWN, {}).get("filled", {}).items():
        if values.get(name) == filled:  # a default that we computed
            values[name] = given
    if "preprocessing" in ops and np.size(_unless_none(ops["preprocessing"].get("hp_filter"))) <= 1:
        values["highpass_cutoff"] = 0.0
    return Settings.like_kilosort4(values)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _unless_none(value: Any) -> NDArray[Any]:
    return np.zeros(0) if value is None else array(value, np.float64)


def probe_words(probe: Probe) -> dict[str, Any]:
    """A probe as Kilosort4's functions hand it on."""
    return {
        "chanMap": probe.chan_map.copy(),
        "xc": probe.x_um.copy(),
        "yc": probe.y_um.copy(),
        "kcoords": probe.shank.copy(),
        "n_chan": probe.n_channels,
    }


def probe_of(ops: Mapping[str, Any]) -> Probe:
    """The probe, without the channels that are not sorted."""
    return load_probe({name: needed(needed(ops, "probe"), name) for name in ("chanMap", "xc", "yc", "kcoords")})


def recording_of(ops: dict[str, Any], file_object: Any = None) -> Recording:
    """Open the recording.

    Parameters
    ----------
    ops : dict
    file_object : array-like, optional
        Its samples, if they are not in the files of ``ops['filename']``.

    Raises
    ------
    OpsError
        If the ``ops`` has results of another recording.
    RecordingError, ProbeError, SettingsError
        If it cannot be opened.
    """
    probe, files = probe_of(ops), _files(ops) if file_object is None else []
    if file_object is None and not files:
        raise RecordingError(
            "ops['filename'] names no file, as the samples are those of a file_object: pass it as file_object."
        )
    known = {"fs": needed(ops, "fs"), "n_chan_bin": needed(ops, "n_chan_bin")}
    data_dtype = ops.get("data_dtype") if file_object is None else None  # an array knows its own
    return opened(files, file_object, known, {"data_dtype": data_dtype, "probe": probe})


def _files(ops: Mapping[str, Any]) -> list[Any]:
    files = ops.get("filename") or []
    return list(files) if isinstance(files, Sequence) and not isinstance(files, str) else [files]


def folder_of(ops: Mapping[str, Any]) -> Path:
    """The results folder: that of `set_files`, or else the default for the files.

    Raises
    ------
    SettingsError
        If there is neither.
    """
    places = {"results_dir": ops.get("results_dir"), "data_dir": ops.get("data_dir")}
    if os.name != "nt" and any(isinstance(value, PureWindowsPath) for value in places.values()):
        raise SettingsError(
            f"ops was made on Windows, with results_dir={str(places['results_dir'])!r}. Set ops['results_dir'] to a "
            "folder of this machine."
        )
    return results_folder({name: value for name, value in places.items() if value}, _files(ops))


# -- what was sorted -------------------------------------------------------------------------------------


def remember(ops: dict[str, Any], tiles: Preprocessor) -> None:
    """Note what is sorted when the first function sees it, so that later ones need not open it."""
    recording, provenance = tiles.recording, provenance_of(tiles)
    flat = recording.source.flat_files
    own(ops).update(
        dead=tiles.dead,
        prepared_with=_for_preparing(settings_of(ops)),
        tiling=asdict(tiles.tiling),
        provenance=asdict(provenance),
        recording={
            "sampling_rate_hz": recording.sampling_rate_hz,
            "n_samples": recording.n_samples,
            "n_chan_file": recording.n_channels,
            "dtype": recording.dtype.name,
            "gain_uv": recording.gain_uv,
            "files": list(recording.files),
            "flat_files": flat if isinstance(flat, str) else [asdict(file) for file in flat],
        },
    )


def _for_preparing(settings: Settings) -> dict[str, Any]:
    """The settings that decide what the traces are, and which of them are sorted."""
    return dict(vars(settings.part("recording", "preprocessing", "whitening", "nt")))


def sorted_of(ops: dict[str, Any]) -> dict[str, Any]:
    """What :func:`remember` noted, as fields of a :class:`~ks4stream.results.Sorting`."""
    of_recording = needed_own(ops, "recording")
    flat = of_recording["flat_files"]
    return {
        **of_recording,
        "files": tuple(of_recording["files"]),
        "flat_files": flat if isinstance(flat, str) else tuple(FlatFile(**file) for file in flat),
        "tiling": tiling_in(ops),
        "provenance": Provenance(**needed_own(ops, "provenance")),
    }


def needed_own(ops: dict[str, Any], name: str) -> Any:
    """One of our own entries.

    Raises
    ------
    OpsError
        If it is missing.
    """
    if name not in own(ops):
        raise OpsError(
            f"ops[{OWN!r}] has no {name!r}, which ks4stream's compute_drift_correction leaves there; an ops that "
            "Kilosort4 made cannot be used here."
        )
    return own(ops)[name]


def tiling_in(ops: dict[str, Any]) -> Tiling:
    """How time was divided into batches."""
    return Tiling(**needed_own(ops, "tiling"))


def tiles_of(ops: dict[str, Any], recording: Recording, device: str) -> Preprocessor:
    """The tiles of the recording, with as much preprocessing as the ``ops`` knows.

    Raises
    ------
    OpsError
        If the ``ops`` belongs to another recording.
    RecordingError, ProbeError, SettingsError
        If the recording cannot be sorted.
    """
    settings = settings_of(ops)
    if "provenance" not in own(ops):
        tiles = prepare(recording, settings, device=device)
    else:
        known, found = own(ops)["provenance"], recording.digest()
        if known["recording_digest"] != found:
            raise OpsError(
                f"ops has results of another recording ({known['recording']}) than {recording.name}, or the recording "
                "was changed since. Begin with a new ops from initialize_ops."
            )
        _check_unchanged(ops, settings)
        dead = array(own(ops).get("dead", whitening_of(ops).dead), np.int64)
        tiles = Preprocessor(recording, tiling_of(recording, settings), settings, dead=dead, device=device)
    if "preprocessing" in ops:
        tiles = tiles.with_whitening(whitening_of(ops, tiles.dead))
    drift = drift_of(ops)
    return tiles if drift is None or not np.any(drift.shift_um) else _drifting(tiles, drift, settings)


def _check_unchanged(ops: dict[str, Any], settings: Settings) -> None:
    """Raise an OpsError if a setting was changed after the traces were prepared with it."""
    now = _for_preparing(settings)
    before = own(ops).get("prepared_with", now)
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        raise OpsError(
            f"ops[{changed[0]!r}] is {now[changed[0]]!r}, but traces were prepared with {before[changed[0]]!r}. Call "
            "compute_preprocessing again after changing it."
        )
    highpass = _unless_none(ops.get("preprocessing", {}).get("hp_filter"))
    rate_hz = float(own(ops).get("recording", ops).get("sampling_rate_hz", ops.get("fs", 0)))
    if highpass.size > 1 and not np.allclose(highpass, highpass_impulse(settings, rate_hz), atol=3e-5):
        raise OpsError(
            "ops['preprocessing']['hp_filter'] is another filter than that of highpass_cutoff. Change highpass_cutoff "
            "and call compute_preprocessing again, or set it to None for no filter."
        )


def _drifting(tiles: Preprocessor, drift: Drift, settings: Settings) -> Preprocessor:
    if len(drift.shift_um) != len(tiles.tiling):
        raise OpsError(
            f"ops['dshift'] is for {len(drift.shift_um)} batches, but the recording has {len(tiles.tiling)}. Give one "
            "row per batch, or set it to None."
        )
    return tiles.with_drift(drift, settings)


# -- results -----------------------------------------------------------------------------------------------


def whitening_of(ops: dict[str, Any], dead: NDArray[np.int64] | None = None) -> Whitening:
    """The whitening; if `compute_preprocessing` was left out, the identity without channels that are dead in the file.

    Raises
    ------
    OpsError
        If there is none, or it is for another number of channels.
    """
    n_channels = probe_of(ops).n_channels
    given = needed(ops, "preprocessing").get("whiten_mat")
    matrix = np.eye(n_channels, dtype=np.float32) if given is None else array(given, np.float32)
    if np.array_equal(matrix, np.eye(len(matrix))):  # SpikeInterface's is for all channels of the recording
        matrix = np.eye(n_channels, dtype=np.float32)
        matrix[array(own(ops).get("dead", []), np.int64) if dead is None else dead] = 0
    if matrix.shape != (n_channels, n_channels):
        raise OpsError(
            f"ops['preprocessing']['whiten_mat'] has shape {matrix.shape}, but {n_channels} channels are sorted. Call "
            "compute_preprocessing again after changing the probe."
        )
    dead = np.flatnonzero(~matrix.any(axis=1))
    return Whitening(
        matrix=matrix,
        dead=dead,
        n_batches=int(own(ops).get("whitening_batches", 0)),
        noise=array(own(ops).get("noise", []), np.float32),
    )


def waveforms_of(ops: dict[str, Any]) -> Waveforms:
    """The universal waveforms."""
    components, shapes = (array(needed(ops, name), np.float32) for name in ("wPCA", "wTEMP"))
    known = own(ops).get("waveforms", {})
    return Waveforms(components=components, shapes=shapes, **known)


def drift_of(ops: dict[str, Any]) -> Drift | None:
    """The drift; None if there is none, or it was not estimated."""
    if ops.get("dshift") is None:
        return None
    shift_um, error_um = array(ops["dshift"], np.float32), array(own(ops).get("drift_error", [[]]), np.float32)
    known = {"error_um": error_um} if error_um.shape == shift_um.shape else {}  # not that of another drift
    return Drift(shift_um=shift_um, centre_um=array(needed(ops, "yblk"), np.float32), **known)


def diagnostics_of(ops: dict[str, Any]) -> Diagnostics | None:
    """What happened on the way, as far as it is known."""
    known = own(ops).get("diagnostics")
    if known is None:
        return None
    types = {"edge": np.int64, "noise": np.float32, "explained": np.float32, "isolation": np.float64}
    values: dict[str, Any] = {name: array(known[name], types[name]) if name in types else known[name] for name in known}
    return Diagnostics(**values)


def peaks_of(ops: dict[str, Any]) -> PeakSample | None:
    """The peaks for the plot of the drift."""
    known = own(ops).get("peaks")
    types = {"sample": np.int64, "depth_um": np.float32, "score": np.float32, "shank": np.int64}
    if known is None:
        return None
    return PeakSample(**{name: array(known[name], kind) for name, kind in types.items() if name in known})


def thresholds_of(ops: dict[str, Any]) -> NDArray[np.float64]:
    """Thresholds of the templates (v,); in an `ops` of which only the settings are known, :func:`lowest_score`."""
    n_templates, known = len(template_channels_of(ops)), array(own(ops).get("threshold", []), np.float64)
    return known if len(known) == n_templates else np.full(n_templates, lowest_score(settings_of(ops)))


def artifacts_of(ops: dict[str, Any]) -> NDArray[np.int64]:
    """Blanked spans (m, 2), in samples, half-open."""
    return array(own(ops).get("artifacts", []), np.int64).reshape(-1, 2)


def template_channels_of(ops: dict[str, Any]) -> NDArray[np.int64]:
    """Channels of the features of each template's spikes (v, j), padded with −1."""
    near, mask = array(needed(ops, "iCC"), np.int64), array(needed(ops, "iCC_mask"), np.bool_)
    largest = array(needed(ops, "iU"), np.int64)
    return np.where(mask, near, -1)[:, largest].T


def put_whitening(ops: dict[str, Any], whitening: Whitening) -> None:
    """Note what Kilosort4 has no name for in a whitening."""
    own(ops)["whitening_batches"], own(ops)["noise"] = whitening.n_batches, whitening.noise


def put_waveforms(ops: dict[str, Any], waveforms: Waveforms) -> None:
    """Put universal waveforms into the ``ops``."""
    ops.update(wPCA=torch.from_numpy(waveforms.components), wTEMP=torch.from_numpy(waveforms.shapes))
    own(ops)["waveforms"] = {"n_snippets": waveforms.n_snippets, "threshold": waveforms.threshold}


def put_diagnostics(ops: dict[str, Any], found: Diagnostics) -> None:
    """Keep what happened on the way."""
    own(ops)["diagnostics"] = {spec.name: getattr(found, spec.name) for spec in fields(found)}


def put_peaks(ops: dict[str, Any], peaks: PeakSample) -> None:
    """Keep the peaks for the plot of the drift."""
    own(ops)["peaks"] = {spec.name: getattr(peaks, spec.name) for spec in fields(peaks)}


_RESULTS = (
    ("preprocessing", "Wrot", "fwav", "Nbatches"),
    ("dshift", "yblk", "iKxx"),
    ("wPCA", "wTEMP", "iCC", "iCC_mask", "iU"),
    ("n_spikes", "n_units_total", "n_units_good", "runtime", "is_tensor"),
)
"""Entries of results, in the order in which they are found."""


def forget_results(ops: dict[str, Any], *, since: str = "preprocessing") -> None:
    """Drop the entry `since` and all results that were found later.

    With those of preprocessing, everything goes that is known of a recording.
    """
    for names in _RESULTS[next(index for index, names in enumerate(_RESULTS) if since in names) :]:
        for name in names:
            ops.pop(name, None)
    if since == "preprocessing":
        ops[OWN] = {name: own(ops)[name] for name in ("filled",) if name in own(ops)}
    else:
        for name in ("artifacts", "threshold", "diagnostics"):
            own(ops).pop(name, None)
