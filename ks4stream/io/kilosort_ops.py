"""A sorting in Kilosort4's terms: the dictionary ``ops``, the file ``ops.npy``, and the table of spikes ``st``.

``ops.npy`` is a pickle because its readers expect one. ks4stream sorts from settings, never from an ``ops``: only
Kilosort4's functions, in ``kilosort4/``, read one, and :func:`ks4stream.kilosort4.io.load_ops` its file, without
running what a pickle may contain.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.geometry import nearest_positions, vertical_pitch_um
from ks4stream.io.objects import is_remote
from ks4stream.io.places import Place
from ks4stream.probe import Probe
from ks4stream.recording import FlatFile
from ks4stream.results import Sorting
from ks4stream.settings import Settings

__all__ = ["ops_from_sorting", "spike_table", "write_ops"]

OPS = "ops.npy"
_HIGHPASS_SAMPLES = 30_122  # length of Kilosort4's fwav
TENSORS = ("Wrot", "fwav", "wPCA", "wTEMP", "iCC", "iCC_mask", "iU")
"""What Kilosort4's ``ops`` holds as tensors; ``is_tensor`` tells its readers."""


def spike_table(sorting: Sorting, rows: slice = slice(None)) -> NDArray[np.float64]:
    """Kilosort4's ``st``, of all spikes or some.

    Returns
    -------
    ndarray of float64, shape (n_spikes, 3)
        Time in samples, counted from the first sorted sample; template; threshold amplitude.
    """
    return np.column_stack(
        [sorting.sample[rows] - sorting.tiling.start, sorting.template[rows], sorting.score[rows].astype(np.float64)]
    ).astype(np.float64, copy=False)


def write_ops(ops: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write ``ops.npy``: a pickle of NumPy arrays and plain values, for readers that expect one.

    Paths become strings and tuples lists, so that it can be loaded on any system and without our classes.

    Raises
    ------
    TypeError
        If there is a value of another type.
    """
    np.save(Path(folder) / OPS, np.array(_plain(ops), dtype=object), allow_pickle=True)


def _plain(value: Any) -> Any:
    """The same value made of dictionaries, lists, arrays, strings and numbers only."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        return np.array(value)  # also of memory maps
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # a subclass would be pickled by its name
    if value is None:
        return None
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be stored in ops.npy.")


def ops_from_sorting(
    sorting: Sorting, results_dir: Place | None = None, *, save_preprocessed_copy: bool = False
) -> dict[str, Any]:
    """Describe a sorting the way Kilosort4's ``ops`` does, with the keys that mean the same in both.

    Every setting is in ``ops`` itself and in ``ops['settings']``; `do_CAR` and `invert_sign`, which are arguments
    of Kilosort4 and not settings, are only in ``ops``. :func:`ks4stream.sort` reads no ``ops``; Kilosort4's functions
    do (:mod:`ks4stream.kilosort4`).

    Parameters
    ----------
    sorting : Sorting
        A finished sorting.
    results_dir : Path or ObjectPath, optional
        Where its results are.
    save_preprocessed_copy : bool, optional
        Whether ``temp_wh.dat`` is among them.

    Returns
    -------
    dict
        NumPy arrays and plain values. Channels of a spike's features are
        ``ops['iCC'][:, ops['iU'][template]]``, where ``ops['iCC_mask']`` is True.
    """
    settings = {
        "n_chan_bin": n_chan_file(sorting),
        "fs": sorting.sampling_rate_hz,
        **sorting.settings.to_dict(),
        "nt0min": sorting.settings.peak_sample,
        "drift_smoothing": list(sorting.settings.drift_smoothing),
    }
    arguments = {name: settings.pop(name) for name in ("do_CAR", "invert_sign")}
    files, dtype = _for_kilosort(sorting)
    ops: dict[str, Any] = {**settings, **arguments, "settings": settings}
    ops |= {
        "filename": files,
        "data_dir": str(Path(files[0]).parent) if files else None,
        "data_dtype": dtype,
        "torch_device": sorting.provenance.device or "cpu",
        "save_preprocessed_copy": save_preprocessed_copy,
        "results_dir": None if results_dir is None else str(results_dir),
        "Nbatches": sorting.tiling.n_tiles,
        "NTbuff": sorting.settings.batch_size + 2 * sorting.settings.nt,
        "Nchan": sorting.n_channels,
        "n_chan": sorting.n_channels,
        "duplicate_spike_bins": int(sorting.settings.duplicate_spike_ms * sorting.sampling_rate_hz / 1000),
        "n_spikes": sorting.n_spikes,
        "n_units_total": sorting.n_units,
        "n_units_good": int(sorting.good.sum()),
        "runtime": float(sum(sorting.seconds.values())),
        "ks4stream": _own_ops(sorting),
    }
    ops |= _probe_ops(sorting) | _stage_ops(sorting)
    return ops | {"is_tensor": [name for name in TENSORS if name in ops]}


def _own_ops(sorting: Sorting) -> dict[str, Any]:
    """What Kilosort4 has no name for: with it, the sorting can be found again from its ``ops`` and its arrays."""
    given, probe, waveforms, peaks = sorting.settings, sorting.probe, sorting.waveforms, sorting.peaks
    filled: dict[str, list[Any]] = {"nt0min": [given.nt0min, given.peak_sample]}
    if probe is not None:
        filled["dmin"] = [given.dmin, given.dmin or vertical_pitch_um(probe)]
    flat = sorting.flat_files
    own: dict[str, Any] = {
        "seconds": dict(sorting.seconds),
        "warnings": list(sorting.warnings),
        "files": list(sorting.files),
        "provenance": asdict(sorting.provenance),
        "tiling": asdict(sorting.tiling),
        "filled": {name: pair for name, pair in filled.items() if pair[0] is None},
        "artifacts": sorting.artifacts,
        "recording": {
            "sampling_rate_hz": sorting.sampling_rate_hz,
            "n_samples": sorting.n_samples,
            "n_chan_file": sorting.n_chan_file,
            "dtype": sorting.dtype,
            "gain_uv": sorting.gain_uv,
            "files": list(sorting.files),
            "flat_files": flat if isinstance(flat, str) else [asdict(file) for file in flat],
        },
    }
    if sorting.whitening is not None:
        own["whitening_batches"], own["noise"] = sorting.whitening.n_batches, sorting.whitening.noise
    if sorting.drift is not None:
        own["drift_error"] = sorting.drift.error_um
    if waveforms is not None:
        own["waveforms"] = {"n_snippets": waveforms.n_snippets, "threshold": waveforms.threshold}
    if peaks is not None:
        own["peaks"] = {"sample": peaks.sample, "depth_um": peaks.depth_um, "score": peaks.score}
    return own


def _for_kilosort(sorting: Sorting) -> tuple[list[str], str]:
    """Files that Kilosort4 would read as we did, from their first byte on, and their type; otherwise no files."""
    files, layout = sorting.flat_files, common_layout(sorting.flat_files)
    if isinstance(files, str) or layout is None or layout[1] != 0 or any(is_remote(file.path) for file in files):
        return [], sorting.dtype
    return [file.path for file in files], dtype_name(layout[0])


def _probe_ops(sorting: Sorting) -> dict[str, Any]:
    probe = sorting.probe
    if probe is None:
        return {}
    words = {
        "chanMap": probe.chan_map.copy(),
        "xc": probe.x_um.astype(np.float32),
        "yc": probe.y_um.astype(np.float32),
        "kcoords": probe.shank.astype(np.float32),
    }
    return {
        **words,
        "probe": {**words, "n_chan": probe.n_channels},
        "dmin": sorting.settings.dmin or vertical_pitch_um(probe),
        **channels_of_templates(probe, sorting.template_channels),
    }


def channels_of_templates(probe: Probe, template_channels: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Where features are: on channels ``iCC[:, iU[template]]``, where ``iCC_mask`` is True.

    Parameters
    ----------
    probe : Probe
    template_channels : ndarray of int64, shape (v, j)
        Channels of the features of each template's spikes, padded with −1.
    """
    positions = np.column_stack([probe.x_um, probe.y_um])
    same_shank = probe.shank[:, None] == probe.shank[None, :]
    near, _ = nearest_positions(positions, positions, template_channels.shape[1], same_shank)  # (c, j)
    largest = template_channels[:, 0].copy()
    near[largest] = template_channels  # for templates with spikes, exactly the channels that hold their features
    mask = near >= 0
    return {"iCC": np.where(mask, near, np.arange(len(near))[:, None]).T, "iCC_mask": mask.T, "iU": largest}


def _stage_ops(sorting: Sorting) -> dict[str, Any]:
    whitening = whitening_matrix(sorting)
    highpass = highpass_impulse(sorting.settings, sorting.sampling_rate_hz)
    ops: dict[str, Any] = {
        "Wrot": whitening,
        "fwav": highpass,
        "preprocessing": {"whiten_mat": whitening, "hp_filter": highpass},
    }
    if sorting.waveforms is not None:
        ops |= {"wPCA": sorting.waveforms.components, "wTEMP": sorting.waveforms.shapes}
    ops["dshift"] = None if sorting.drift is None else sorting.drift.shift_um.astype(np.float64)
    ops["yblk"] = None if sorting.drift is None else sorting.drift.centre_um.astype(np.float64)
    return ops


def highpass_impulse(settings: Settings, sampling_rate_hz: float) -> NDArray[np.float32]:
    """Kilosort4's ``fwav``: the impulse response of a third-order Butterworth filter, forward and backward.

    From the response in closed form, as importing ``scipy.signal`` takes half a second.
    """
    impulse = np.zeros(_HIGHPASS_SAMPLES)
    impulse[_HIGHPASS_SAMPLES // 2] = 1
    if settings.highpass_cutoff > 0:
        n_fft = 1 << 18  # longer than the response, which at a few Hz is longer than that of Kilosort4
        with np.errstate(divide="ignore"):  # at frequency zero, where the response is zero
            ratio = np.tan(np.pi * settings.highpass_cutoff / sampling_rate_hz) / np.tan(np.pi * np.fft.rfftfreq(n_fft))
        gain = 1 / (1 + ratio**6)
        impulse = np.fft.irfft(gain * np.fft.rfft(impulse, n_fft), n_fft)[:_HIGHPASS_SAMPLES]
    return impulse.astype(np.float32)


# -- also used by the Phy folder ---------------------------------------------------------------------


def whitening_matrix(sorting: Sorting) -> NDArray[np.float32]:
    """The whitening matrix (c, c); the identity if an empty sorting has none."""
    if sorting.whitening is None:
        return np.eye(sorting.n_channels, dtype=np.float32)
    return np.asarray(sorting.whitening.matrix, np.float32)


def common_layout(files: tuple[FlatFile, ...] | str) -> tuple[str, int, int] | None:
    """Type, offset and number of channels, if they are the same for all files."""
    if isinstance(files, str):
        return None
    layouts = {(file.dtype, file.offset_bytes, file.n_channels) for file in files}
    return layouts.pop() if len(layouts) == 1 else None


def dtype_name(dtype: str) -> str:
    """A type by its common name ("int16"), or with its byte order (">i2") if it is big-endian."""
    kind = np.dtype(dtype)
    return kind.str if kind.str.startswith(">") else kind.name


def n_chan_file(sorting: Sorting) -> int:
    """Number of columns in the file, at least those of the channel map."""
    least = 0 if sorting.probe is None else int(sorting.probe.chan_map.max()) + 1
    return max(sorting.n_chan_file, least)
