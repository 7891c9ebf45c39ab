"""Kilosort4's interface: its arguments in, its nine results out.

A thin layer over :func:`ks4stream.sorter.sort`. Everything that is Kilosort4's convention (settings that
name files, the default results folder, ``ops``) is converted here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from ks4stream.deploy import client_for, forget_on_workers
from ks4stream.engine import Progress
from ks4stream.errors import ProbeError, RecordingError, ResultsError, SettingsError
from ks4stream.io.kilosort_ops import TENSORS, ops_from_sorting, spike_table
from ks4stream.io.places import place
from ks4stream.io.probes import shipped_probes
from ks4stream.io.recording_cache import cached, ending
from ks4stream.io.recordings import default_results_dir, may_tell_rate, open_recording
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.messages import silent
from ks4stream.probe import Probe
from ks4stream.recording import Recording, is_same_rate
from ks4stream.report import announce, run_log
from ks4stream.resources import Resources
from ks4stream.results import Sorting
from ks4stream.settings import OF_RECORDING, Settings
from ks4stream.sorter import sort

__all__ = ["KilosortResults", "ops_from_sorting", "run_kilosort"]

KilosortResults = tuple[
    dict[str, Any],
    NDArray[np.float64],
    NDArray[np.int32],
    torch.Tensor,
    torch.Tensor,
    NDArray[np.float32],
    NDArray[np.bool_],
    NDArray[np.float64],
    NDArray[np.bool_],
]
"""``ops, st, clu, tF, Wall, similar_templates, is_ref, est_contam_rate, kept_spikes``"""

PathLike = str | os.PathLike[str]

_PLACES = ("filename", "data_dir", "results_dir", "data_dtype", "probe", "probe_name", "probe_path")
_BINARY_SUFFIXES = (".bin", ".dat", ".bat", ".raw")
_DEFAULT_FS = 30_000.0


def run_kilosort(
    settings: Mapping[str, Any] | Settings,
    probe: Probe | Mapping[str, Any] | PathLike | None = None,
    probe_name: str | None = None,
    filename: PathLike | Sequence[PathLike] | None = None,
    data_dir: PathLike | None = None,
    file_object: Any = None,
    results_dir: PathLike | None = None,
    data_dtype: DTypeLike | None = None,
    do_CAR: bool = True,
    invert_sign: bool = False,
    device: str | torch.device | None = None,
    progress_bar: Any = None,
    save_extra_vars: bool = False,
    clear_cache: bool = False,
    save_preprocessed_copy: bool = False,
    bad_channels: Sequence[int] | None = None,
    shank_idx: float | Sequence[float] | None = None,
    verbose_console: bool = False,
    verbose_log: bool = False,
    torch_thread_lim: int | None = None,
    *,
    resume: bool = True,
    keep_run: bool = True,
    resources: Resources | None = None,
    **of_resources: Any,
) -> KilosortResults:
    """Sort a recording, called like Kilosort4.

    Parameters
    ----------
    settings : mapping or Settings
        Kilosort4's settings by name; ``n_chan_bin`` is required, all others have defaults. As in Kilosort4 it may
        also hold ``filename``, ``data_dir``, ``results_dir``, ``data_dtype``, ``probe``, ``probe_name`` and
        ``probe_path``; arguments of the same name take precedence.
    probe : Probe, mapping or path, optional
        A :class:`~ks4stream.probe.Probe`, a dictionary with ``chanMap``, ``xc``, ``yc``, ``kcoords``, or a
        probe file. Without any of the probe arguments, the probe is taken from the recording's metadata.
    probe_name : str, optional
        A probe shipped with ks4stream, or a probe file; used if `probe` is None.
    filename : path or list of paths, optional
        Binary files, joined in time in this order. Anything else that
        :func:`~ks4stream.io.recordings.open_recording` opens (Zarr, ``.npy``) works too.
    data_dir : path, optional
        A folder with exactly one .bin, .dat, .bat or .raw file; used if `filename` is None.
    file_object : array-like, optional
        Samples to sort instead of a file: anything with ``shape``, ``dtype`` and slicing, (time, channel).
    results_dir : path, optional
        Results folder; by default ``kilosort4`` next to the data.
    data_dtype : dtype-like, optional
        Type of the samples in the file; int16 by default.
    do_CAR : bool
        Subtract the common median reference, unless the settings say False.
    invert_sign : bool
        Invert the sign of the traces; True in the settings does the same.
    device : str or torch.device, optional
        Where kernels run: "cpu", "cuda" or "cuda:1"; by default the GPU if this process sees one.
    progress_bar : optional
        A tqdm bar (one round per stage), a Qt progress bar or signal (percent of a stage), or a callable
        ``progress(stage, done, total)``.
    save_extra_vars : bool
        Also write tF, Wall, full_st, full_clu and full_amp.
    clear_cache : bool
        Accepted for compatibility with Kilosort4; memory is bounded without it.
    save_preprocessed_copy : bool
        Also write the preprocessed traces to ``temp_wh.dat``, and let Phy show those.
    bad_channels : list of int, optional
        Columns of the file that are not sorted.
    shank_idx : int or list of int, optional
        Sort only this shank (a value of ``kcoords``), into a folder ``shank_<idx>`` within the results
        folder. Shanks in a list are sorted one after the other, and the last one's results are returned.
        By default all shanks are sorted together; templates and units never span two.
    verbose_console : bool
        Show on the console everything that goes to the log.
    verbose_log : bool
        Write more detail to ``kilosort4.log``.
    torch_thread_lim : int, optional
        Maximum number of this machine's cores to use (each task computes on one), whether or not a client is active;
        no effect if `client` is given.
    resume : bool
        Continue where an earlier run into the same results folder stopped; False starts over.
    keep_run : bool
        Keep what the tasks found, in ``run`` in the results folder; a sort with a changed setting then recomputes only
        the stages that the setting affects.
    resources : Resources, optional
        Where to compute and with what, as in :func:`ks4stream.sort`; `device` and `torch_thread_lim` take precedence.
    **of_resources
        Any field of :class:`~ks4stream.Resources`, such as `client`.

    Returns
    -------
    ops : dict
        Settings and results by Kilosort4's names; see :func:`~ks4stream.io.kilosort_ops.ops_from_sorting`.
    st : ndarray of float64, shape (n_spikes, 3)
        Time in samples, counted from the first sorted sample (``tmin``); template; threshold amplitude.
    clu : ndarray of int32, shape (n_spikes,)
        Unit of each spike.
    tF : Tensor, shape (n_spikes, nearest_chans, n_pcs)
        Features of each spike, on channels ``ops['iCC'][:, ops['iU'][template]]``.
    Wall : Tensor, shape (n_units, n_channels, n_pcs)
        Template of each unit.
    similar_templates : ndarray of float32, shape (n_units, n_units)
        Largest correlation of two templates over all lags.
    is_ref : ndarray of bool, shape (n_units,)
        Whether a unit is refractory ("good").
    est_contam_rate : ndarray of float64, shape (n_units,)
        Estimated contamination.
    kept_spikes : ndarray of bool, shape (n_spikes,)
        False for duplicates.

    Raises
    ------
    ValueError
        Before work starts: ``n_chan_bin`` is missing, a setting is unknown or out of bounds, or recording
        and probe cannot be sorted (:class:`~ks4stream.errors.SettingsError`,
        :class:`~ks4stream.errors.RecordingError`, :class:`~ks4stream.errors.ProbeError`).
    ResultsError
        If the results folder cannot be written to.
    """
    values, of_recording, given = _split_settings(settings)
    limit = {"device": device, "workers": torch_thread_lim}
    resources = Resources.given(resources, of_resources)
    resources = Resources.given(resources, limit if resources.client is None else {"device": device})
    places = given | _given(
        filename=filename,
        data_dir=data_dir,
        results_dir=results_dir,
        data_dtype=data_dtype,
        probe=probe,
        probe_name=probe_name,
    )
    files = _files(places, needed=file_object is None)
    folder = _results_folder(places, files)
    recording = _open(files, file_object, of_recording, places)
    if not do_CAR:  # the arguments' defaults do not override the settings
        values["do_CAR"] = False
    if invert_sign:
        values["invert_sign"] = True
    job = _Job(
        settings=Settings.from_dict(values),
        arguments={
            "resources": resources,
            "save_extra_vars": save_extra_vars,
            "progress": _progress(progress_bar),
            "save_preprocessed_copy": save_preprocessed_copy,
            "resume": resume,
            "keep_run": keep_run,
        },
        verbose={"verbose_console": verbose_console, "verbose_log": verbose_log},
    )
    jobs = [(_with_channels(recording, shank, bad_channels), folder / name) for shank, name in _shanks(shank_idx)]
    for number, (_, target) in enumerate(jobs):
        results = ResultsFolder.open(target, recording.files)
        if number:  # the sort of the first shank announces its own folder
            announce(results)
    with ExitStack() as stack:
        with silent():  # sort warns of it, while it logs
            held = stack.enter_context(cached(recording, resources.cache_dir, resources.cache_bytes))
        for of_shank, target in jobs:  # all shanks and copies read data that is fetched once
            found = job.run(replace(of_shank, source=held.source), target)
        caches = ending(held, recording)
        client = client_for(resources)  # as the sorts did
        if caches and client not in (None, "loop"):  # otherwise it was kept on this machine only
            forget_on_workers(client, caches)
    return found


@dataclass(frozen=True)
class _Job:
    """What is the same for every shank of a recording."""

    settings: Settings
    arguments: dict[str, Any]
    verbose: dict[str, bool]

    def run(self, recording: Recording, folder: Path) -> KilosortResults:
        with run_log(folder, **self.verbose):
            sorting = sort(recording, self.settings, results_dir=folder, **self.arguments)
        copied = self.arguments["save_preprocessed_copy"]
        return _as_kilosort(sorting, ops_from_sorting(sorting, folder, save_preprocessed_copy=copied))


def _as_kilosort(sorting: Sorting, ops: dict[str, Any]) -> KilosortResults:
    tensors: dict[str, Any] = {name: _tensor(ops[name]) for name in TENSORS if name in ops}
    if "Wrot" in tensors:
        tensors["preprocessing"] = {"whiten_mat": tensors["Wrot"], "hp_filter": tensors["fwav"]}
    return (
        ops | tensors,
        spike_table(sorting),
        sorting.unit,
        _tensor(sorting.features),
        _tensor(sorting.unit_features),
        sorting.similarity,
        sorting.refractory,
        sorting.contamination,
        sorting.kept,
    )


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of the same memory, or of a copy if it is read-only, which torch does not support."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


# -- what is sorted, and where results go --------------------------------------------------------------


def _split_settings(settings: Mapping[str, Any] | Settings) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split Kilosort4's settings into the method's, the recording's, and those that name files and probes.

    Raises
    ------
    SettingsError
        If ``n_chan_bin`` is missing, or a name is unknown.
    """
    values = settings.to_dict() if isinstance(settings, Settings) else dict(settings)
    places = _given(**{name: values.pop(name, None) for name in _PLACES})
    of_recording = {name: values.pop(name, None) for name in OF_RECORDING}
    if of_recording["n_chan_bin"] is None:
        raise SettingsError(
            "n_chan_bin is missing; settings must give the number of channels in the file, sorted or not: "
            "run_kilosort(settings={'n_chan_bin': 385})."
        )
    Settings.from_dict(values)  # so that a bad setting is reported before a missing file
    return values, of_recording, places


def _given(**places: Any) -> dict[str, Any]:
    """The places that are set; callers such as SpikeInterface pass an empty string for "not set"."""
    return {name: value for name, value in places.items() if value is not None and not _is_blank(value)}


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _files(places: Mapping[str, Any], *, needed: bool) -> list[PathLike]:
    """The files to sort: those given by name, or the only one in the folder."""
    files = places.get("filename")
    if files is not None:
        return list(files) if isinstance(files, list | tuple) else [files]
    if places.get("data_dir") is not None:
        return [_only_binary(Path(places["data_dir"]))] if needed else []
    if needed:
        raise RecordingError("Nothing to sort: give filename, data_dir or file_object.")
    return []


def _only_binary(folder: Path) -> Path:
    if not folder.is_dir():
        raise RecordingError(f"data_dir={folder} is not a folder. Give the folder of the binary file, or filename.")
    found = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _BINARY_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise RecordingError(
            f"data_dir={folder} must hold exactly one file that ends in {', '.join(_BINARY_SUFFIXES)}; found: "
            f"{names}. Give the file as filename."
        )
    return found[0]


def _results_folder(places: Mapping[str, Any], files: Sequence[PathLike]) -> Path:
    if places.get("results_dir") is not None:
        folder = place(places["results_dir"])
        if isinstance(folder, Path):
            return folder
        raise ResultsError(
            f"run_kilosort can only write into a folder, not to {folder}; use ks4stream.sort(…, results_dir=…)."
        )
    if files:
        return default_results_dir(files[0])
    if places.get("data_dir") is not None:
        return Path(places["data_dir"]) / "kilosort4"
    raise SettingsError("With file_object there is no folder for the results; give results_dir.")


def _open(
    files: Sequence[PathLike], file_object: Any, known: Mapping[str, Any], places: Mapping[str, Any]
) -> Recording:
    """Open the recording with its probe.

    The rate is that of the recording's metadata (with which ``fs`` of the settings must agree), else ``fs``, else
    30 kHz.

    Raises
    ------
    SettingsError
        If rate or number of channels of the recording differ from the settings; the rate by more than 1 part in 1000,
        as metadata hold measured rates (29999.95 Hz) and people give nominal ones (30000).
    """
    fs, n_chan = known["fs"], known["n_chan_bin"]
    default_fs = fs
    if fs is None and (file_object is not None or not all(map(may_tell_rate, files))):
        default_fs = _DEFAULT_FS
    source = file_object if file_object is not None else files[0] if len(files) == 1 else list(files)
    recording = open_recording(
        source, n_chan=n_chan, default_fs=default_fs, dtype=places.get("data_dtype"), probe=_probe(places)
    )
    if fs is not None and not is_same_rate(fs, recording.sampling_rate_hz):
        rate = recording.sampling_rate_hz
        raise SettingsError(f"fs={fs:g} Hz, but {recording.name} has {rate:g} Hz. Leave fs out of the settings.")
    if n_chan != recording.n_channels:
        raise SettingsError(
            f"n_chan_bin={n_chan}, but {recording.name} has {recording.n_channels} channels. Correct n_chan_bin."
        )
    if recording.probe is None:
        raise ProbeError(
            f"The contact positions of {recording.name} are not known; give probe (a dictionary with chanMap, xc, yc "
            f"and kcoords, or a file), or probe_name (shipped: {', '.join(shipped_probes())})."
        )
    return recording


def _probe(places: Mapping[str, Any]) -> Any:
    return next((places[name] for name in ("probe", "probe_path", "probe_name") if name in places), None)


def _shanks(shank_idx: float | Sequence[float] | None) -> list[tuple[int | None, str]]:
    """The shanks to sort separately, each with its folder; all together is one job without a folder of its own."""
    if shank_idx is None:
        return [(None, "")]
    chosen = np.atleast_1d(np.asarray(shank_idx, np.float64)).ravel().tolist()
    if not chosen:
        raise SettingsError("shank_idx is an empty list; give the shanks to sort, or None for all.")
    if any(shank != int(shank) for shank in chosen):
        raise SettingsError(f"shank_idx={shank_idx} must be whole numbers, the values of kcoords.")
    return [(int(shank), f"shank_{int(shank)}") for shank in chosen]


def _with_channels(recording: Recording, shank: int | None, bad_channels: Sequence[int] | None) -> Recording:
    """The recording with the channels that are to be sorted."""
    probe = recording.probe
    assert probe is not None
    bad = np.unique(np.asarray([] if bad_channels is None else bad_channels, np.int64))
    beyond = bad[(bad < 0) | (bad >= recording.n_channels)]
    if len(beyond):
        raise ProbeError(
            f"bad_channels={beyond.tolist()} lie outside the file's channels 0 to {recording.n_channels - 1}."
        )
    if shank is not None:
        probe = probe.select_shanks(shank)
    on_probe = np.intersect1d(bad, probe.chan_map)  # the others are not sorted anyway
    return recording.with_probe(probe.drop_channels(on_probe) if len(on_probe) else probe)


# -- progress ------------------------------------------------------------------------------------------


def _progress(bar: Any) -> Progress | None:
    """The callable that :func:`ks4stream.sorter.sort` wants, for a progress bar of any of the usual kinds."""
    if bar is None:
        return None
    show = getattr(bar, "emit", None) or getattr(bar, "setValue", None)  # a Qt signal, a Qt progress bar
    if show is not None:
        return lambda stage, done, total: show(100 * done // max(total, 1))
    if hasattr(bar, "update") and hasattr(bar, "reset"):
        return _Tqdm(bar)
    if callable(bar):
        found: Progress = bar
        return found
    raise SettingsError(
        f"progress_bar={bar!r} is not a progress bar; give a tqdm bar, a Qt progress bar or signal, or a callable "
        "progress(stage, done, total)."
    )


class _Tqdm:
    """One round of a tqdm bar per stage."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._stage: str | None = None
        self._done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._done:
            self._bar.reset(total=total)
            self._bar.set_description(stage)
            self._stage, self._done = stage, 0
        self._bar.update(done - self._done)
        self._done = done
