"""Kilosort4's ``run_kilosort``: its arguments in, its nine results out; and the functions that sort step by step.

A thin layer over :func:`ks4stream.sorter.sort`. Everything that is Kilosort4's convention (settings that
name files, the default results folder, ``ops``) is converted in this package and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from ks4stream.deploy import client_for, forget_on_workers
from ks4stream.io.kilosort_ops import TENSORS, ops_from_sorting, spike_table
from ks4stream.io.recording_cache import cached, ending
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.kilosort4.arguments import (
    PathLike,
    files_of,
    given_places,
    opened,
    progress_of,
    results_folder,
    shanks_of,
    split_settings,
    with_channels,
)
from ks4stream.kilosort4.logger import close_logger, setup_logger
from ks4stream.kilosort4.ops import tensor
from ks4stream.kilosort4.parts import (
    cluster_spikes,
    compute_drift_correction,
    compute_preprocessing,
    detect_spikes,
    get_run_parameters,
    initialize_ops,
    save_sorting,
    set_files,
)
from ks4stream.kilosort4.stored import load_sorting
from ks4stream.messages import silent
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.report import announce, run_log
from ks4stream.resources import Resources
from ks4stream.results import Drift, Sorting
from ks4stream.settings import Settings
from ks4stream.sorter import sort

if TYPE_CHECKING:
    import xarray

__all__ = [
    "KilosortResults",
    "close_logger",
    "cluster_spikes",
    "compute_drift_correction",
    "compute_preprocessing",
    "detect_spikes",
    "get_run_parameters",
    "initialize_ops",
    "load_sorting",
    "ops_from_sorting",
    "run_kilosort",
    "save_sorting",
    "set_files",
    "setup_logger",
]

KilosortResults = tuple[
    dict[str, Any],
    NDArray[np.float64],
    NDArray[np.int32],
    torch.Tensor,
    torch.Tensor,
    NDArray[np.float32],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.bool_],
]
"""``ops, st, clu, tF, Wall, similar_templates, is_ref, est_contam_rate, kept_spikes``"""


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
    drift: Drift | xarray.DataArray | Any | None = None,
    resources: Resources | None = None,
    **of_resources: Any,
) -> KilosortResults:
    """Sort a recording with the arguments, results and files of Kilosort4's function.

    Parameters
    ----------
    settings : mapping or Settings
        Kilosort4's settings by name; ``n_chan_bin`` is required, all others have Kilosort4's defaults.
        ``Th_universal``, ``Th_learned`` and ``nblocks`` may be "auto", as in :func:`ks4stream.sort`. As in Kilosort4,
        it may also contain ``filename``, ``data_dir``, ``results_dir``, ``data_dtype``, ``probe``, ``probe_name`` and
        ``probe_path``; arguments of the same name take precedence.
    probe : Probe, mapping or path, optional
        A :class:`~ks4stream.probe.Probe`, a dictionary with ``chanMap``, ``xc``, ``yc``, ``kcoords``, or a
        probe file. Without any probe argument, the probe is that of the recording's metadata.
    probe_name : str, optional
        A probe that comes with ks4stream, by our name or by Kilosort4's; a file in
        :data:`~ks4stream.kilosort4.utils.PROBE_DIR`; or a path. Used if `probe` is None.
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
        A tqdm bar (one round per stage) or any other with ``update``, a Qt progress bar or signal (percent of a stage),
        or a callable ``progress(stage, done, total)``.
    save_extra_vars : bool
        Also write tF, Wall, full_st, full_clu and full_amp.
    clear_cache : bool
        After each step, free the GPU memory that torch keeps for later.
    save_preprocessed_copy : bool
        Also write the preprocessed traces to ``temp_wh.dat``, and let Phy show those.
    bad_channels : list of int, optional
        Columns of the file that are not sorted.
    shank_idx : int or list of int, optional
        Sort only this shank (a value of ``kcoords``), into a folder ``shank_<idx>`` within the results
        folder. Shanks in a list are sorted one after another, and the results of the last one are returned.
        By default all shanks are sorted together; templates and units never span two of them.
    verbose_console : bool
        Show on the console everything that goes to the log.
    verbose_log : bool
        Also log each task as it ends, and memory after each step.
    torch_thread_lim : int, optional
        Maximum number of workers on this machine (each computes on one core), which then computes whether or not a
        client is active; ignored if `client` is given.
    resume : bool
        Continue where an earlier run into the same results folder stopped; False starts over.
    keep_run : bool
        Keep the results of the tasks in ``run`` in the results folder; a sort with a changed setting then computes only
        the stages that the setting affects.
    drift : Drift, xarray.DataArray or spikeinterface.core.Motion, optional
        Corrected in place of an estimate, whatever ``nblocks`` is, as in :func:`ks4stream.sort`.
    resources : Resources, optional
        Where to compute, as in :func:`ks4stream.sort`; `device` and `torch_thread_lim` take precedence.
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
    is_ref : ndarray of float64, shape (n_units,)
        1 for good units, 0 for others.
    est_contam_rate : ndarray of float64, shape (n_units,)
        Estimated contamination: rate of refractory violations relative to chance.
    kept_spikes : ndarray of bool, shape (n_spikes,)
        False for duplicates.

    Raises
    ------
    ValueError
        Before work starts: ``n_chan_bin`` is missing, a setting is unknown or out of bounds, or recording
        and probe cannot be sorted (:class:`~ks4stream.errors.SettingsError`,
        :class:`~ks4stream.errors.RecordingError`, :class:`~ks4stream.errors.ProbeError`).
    ResultsError
        If the results folder cannot be written to, or the disk is full.
    WorkerError, MachineError
        Before work starts, if a worker cannot compute, or memory or disk are too small.
    """
    values, of_recording, given = split_settings(settings)
    limit = {"device": device, "workers": torch_thread_lim, "clear_cache": clear_cache or None}
    resources = Resources.given(resources, of_resources)
    resources = Resources.given(resources, limit if resources.client is None else limit | {"workers": None})
    places = given | given_places(
        filename=filename,
        data_dir=data_dir,
        results_dir=results_dir,
        data_dtype=data_dtype,
        probe=probe,
        probe_name=probe_name,
    )
    files = files_of(places, needed=file_object is None)
    folder = results_folder(places, files)
    recording = opened(files, file_object, of_recording, places)
    if not do_CAR:  # the arguments' defaults do not override the settings
        values["do_CAR"] = False
    if invert_sign:
        values["invert_sign"] = True
    job = _Job(
        settings=Settings.like_kilosort4(values),
        arguments={
            "resources": resources,
            "save_plots": True,
            "save_extra_vars": save_extra_vars,
            "progress": progress_of(progress_bar),
            "save_preprocessed_copy": save_preprocessed_copy,
            "resume": resume,
            "keep_run": keep_run,
            "drift": drift,
        },
        verbose={"verbose_console": verbose_console, "verbose_log": verbose_log},
    )
    jobs = [(with_channels(recording, shank, bad_channels), folder / name) for shank, name in shanks_of(shank_idx)]
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
    tensors: dict[str, Any] = {name: tensor(ops[name]) for name in TENSORS if name in ops}
    if "Wrot" in tensors:
        tensors["preprocessing"] = {"whiten_mat": tensors["Wrot"], "hp_filter": tensors["fwav"]}
    return (
        ops | tensors,
        spike_table(sorting),
        sorting.unit,
        tensor(sorting.features),
        tensor(sorting.unit_features),
        sorting.similarity,
        sorting.good.astype(np.float64),
        sorting.contamination,
        sorting.kept,
    )
