"""Kilosort4's functions that sort step by step, for pipelines that call them one by one.

They compute the same stages as :func:`ks4stream.sort`, with the same results to the last byte, and keep what the tasks
found in ``run`` in the results folder. All they know of each other is in ``ops`` and in the arrays that they return
(:mod:`ks4stream.kilosort4.ops`).

They compute where ``sort`` would: on the active Dask client (``with distributed.Client(): …``), or else on this
machine. ``ops["client"]`` (the address of a scheduler, "loop" for this thread, or a client, with which the ``ops``
cannot be copied) and ``ops["workers"]`` choose otherwise. If there is a run of another recording in the results folder,
``ops["resume"] = False`` starts over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from ks4stream.deploy import client_for
from ks4stream.engine import gpus, no_progress, one_thread
from ks4stream.errors import Ks4StreamError, OpsError, RecordingError
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.kilosort_ops import channels_of_templates, dtype_name, highpass_impulse, ops_from_sorting
from ks4stream.io.objects import is_remote
from ks4stream.io.probes import load_probe
from ks4stream.io.recording_cache import cached
from ks4stream.io.results_folder import PREPROCESSED_COPY, ResultsFolder
from ks4stream.io.run_store import open_store
from ks4stream.kernels import merging, templates
from ks4stream.kilosort4.arguments import (
    PathLike,
    chosen_channels,
    files_of,
    given_places,
    opened,
    probe_in,
    progress_of,
    results_folder,
    shanks_of,
    split_settings,
)
from ks4stream.kilosort4.binary import BinaryFiltered
from ks4stream.kilosort4.logger import detailed
from ks4stream.kilosort4.ops import (
    OWN,
    array,
    artifacts_of,
    diagnostics_of,
    drift_of,
    folder_of,
    forget_results,
    needed,
    own,
    peaks_of,
    probe_of,
    probe_words,
    put_diagnostics,
    put_peaks,
    put_waveforms,
    put_whitening,
    recording_of,
    remember,
    settings_of,
    sorted_of,
    template_channels_of,
    tensor,
    thresholds_of,
    tiles_of,
    tiling_in,
    waveforms_of,
    whitening_of,
)
from ks4stream.kilosort4.parameters import DEFAULT_SETTINGS
from ks4stream.kilosort4.spikes import check_spikes, drift_table, in_order, spikes_from, table_of
from ks4stream.messages import recorded
from ks4stream.pipeline import cluster_spikes as cluster
from ks4stream.pipeline import diagnostics, find_peaks, find_spikes, layout, with_units
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.report import finish
from ks4stream.resources import Resources
from ks4stream.results import Sorting
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.sorter import check_plan, started
from ks4stream.stages.drift import EstimateDrift
from ks4stream.stages.joining import Join, positions
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.small_peaks import common_peak
from ks4stream.stages.units import labels
from ks4stream.stages.whitening import LearnWhitening

Ops = dict[str, Any]
_log = logging.getLogger("ks4stream")
Found = TypeVar("Found")

RUN_PARAMETERS = (
    "n_chan_bin",
    "fs",
    "batch_size",
    "nt",
    "nt0min",
    "chanMap",
    "data_dtype",
    "do_CAR",
    "invert_sign",
    "xc",
    "yc",
    "tmin",
    "tmax",
    "artifact_threshold",
    "shift",
    "scale",
    "batch_downsampling",
)


# -- before anything is computed --------------------------------------------------------------------------


def set_files(
    settings: dict[str, Any],
    filename: PathLike | Sequence[PathLike] | None,
    probe: Probe | Mapping[str, Any] | PathLike | None,
    probe_name: str | None,
    data_dir: PathLike | None,
    results_dir: PathLike | None,
    bad_channels: Sequence[int] | None,
    shank_idx: float | Sequence[float] | None,
) -> tuple[list[PathLike], Path | None, Path, dict[str, Any]]:
    """Find the files, the folders and the probe, and note them in the settings.

    Parameters
    ----------
    settings : dict
        Kilosort4's settings; ``filename``, ``data_dir`` and ``results_dir`` are set in it.
    filename, data_dir, results_dir, probe, probe_name, bad_channels, shank_idx
        As in :func:`~ks4stream.kilosort4.run_kilosort.run_kilosort`; None or "" if not given. With a file object,
        `filename` may be empty.

    Returns
    -------
    filename : list of Path, or of str for objects in a store
        Empty if the samples are those of a file object.
    data_dir : Path or None
        Folder of the first file.
    results_dir : Path
    probe : dict
        ``chanMap``, ``xc``, ``yc``, ``kcoords`` and ``n_chan`` of the channels that are sorted.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
        If there is no such file or probe, or no folder for the results.
    """
    noted = settings.get("filename")
    if isinstance(noted, _Noted):  # by an earlier call, perhaps for another recording
        own_folder = noted.folder is not None and settings.get("results_dir") == noted.folder
        names = ("filename", "data_dir", *(["results_dir"] if own_folder else []))
        settings.update(dict.fromkeys(names))
    _, of_recording, places = split_settings(settings)
    places |= given_places(
        filename=filename, data_dir=data_dir, results_dir=results_dir, probe=probe, probe_name=probe_name
    )
    files = files_of(places, needed=probe_in(places) is None or "results_dir" not in places)
    folder = results_folder(places, files)
    if probe_in(places) is None:
        places["probe"] = opened(files, None, of_recording, places).probe
    shanks = None if shank_idx is None else [shank for shank, _ in shanks_of(shank_idx) if shank is not None]
    chosen = chosen_channels(load_probe(probe_in(places)), of_recording["n_chan_bin"], shanks, bad_channels)
    found: list[PathLike] = [file if is_remote(os.fspath(file)) else Path(file) for file in files]
    for file in found:
        if isinstance(file, Path) and not file.exists():
            raise RecordingError(f"{file} does not exist. Correct filename.")
    data = found[0].parent if found and isinstance(found[0], Path) else None
    if not found and "data_dir" in places:
        data = Path(places["data_dir"])
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    derived = None if "results_dir" in places else folder
    settings.update(filename=_Noted(found, derived), data_dir=data, results_dir=folder)
    return found, data, folder, probe_words(chosen)


class _Noted(list[PathLike]):
    """Files that `set_files` has noted in the settings, and the results folder if it follows from them.

    The next call with the same settings does not take them for a user's.
    """

    def __init__(self, files: Sequence[PathLike] = (), folder: Path | None = None) -> None:
        super().__init__(files)
        self.folder = folder


def initialize_ops(
    settings: Mapping[str, Any],
    probe: Probe | Mapping[str, Any],
    data_dtype: DTypeLike | None,
    do_CAR: bool,
    invert_sign: bool,
    device: str | torch.device | None,
    save_preprocessed_copy: bool,
    gui_mode: bool = False,
) -> tuple[Ops, dict[str, Any]]:
    """Make an ``ops`` of settings and probe.

    Parameters
    ----------
    settings : dict
        As :func:`set_files` left it.
    probe : Probe or dict
    data_dtype : dtype-like, optional
        Type of the samples in the file; by default int16.
    do_CAR, invert_sign : bool
    device : str or torch.device, optional
    save_preprocessed_copy : bool
    gui_mode : bool
        Accepted for compatibility; without effect.

    Returns
    -------
    ops : dict
    settings : dict
        All settings, those that were not given with their defaults.

    Raises
    ------
    SettingsError, ProbeError
        If a setting or the probe is not valid.
    """
    given = dict(settings)
    if given.get("artifact_threshold", 0) is None:  # as callers pass it on through JSON, which has no infinity
        given["artifact_threshold"] = float("inf")
    values, of_recording, places = split_settings(given)
    checked = Settings.like_kilosort4(values)
    complete = {**DEFAULT_SETTINGS, **checked.to_dict(), **{k: v for k, v in of_recording.items() if v is not None}}
    complete |= {"nt0min": checked.peak_sample, "drift_smoothing": list(checked.drift_smoothing)}
    of_method = {name: complete.pop(name) for name in ("do_CAR", "invert_sign")}
    words = probe_words(load_probe(probe))
    filled = {name: [values.get(name), complete[name]] for name in ("nt0min",) if values.get(name) is None}
    complete |= {str(name): given[name] for name in ("filename", "data_dir") if name in given}
    ops: Ops = {
        **complete,
        "filename": list(files_of(places, needed=False)),
        "data_dir": places.get("data_dir"),
        "results_dir": places.get("results_dir"),
        "settings": dict(complete),
        "probe": words,
        "chanMap": words["chanMap"].astype(np.int32),
        **{name: words[name].astype(np.float32) for name in ("xc", "yc", "kcoords")},
        "n_chan": words["n_chan"],
        "Nchan": words["n_chan"],
        "data_dtype": dtype_name(np.dtype("int16" if data_dtype is None else data_dtype).str),
        "do_CAR": bool(do_CAR) and of_method["do_CAR"],
        "invert_sign": bool(invert_sign) or of_method["invert_sign"],
        "NTbuff": checked.batch_size + 2 * checked.nt,
        "duplicate_spike_bins": int(checked.duplicate_spike_ms * complete["fs"] / 1000),
        "torch_device": str(device or "cpu"),
        "save_preprocessed_copy": bool(save_preprocessed_copy),
        OWN: {"filled": filled},
    }
    return ops, complete


def get_run_parameters(ops: Mapping[str, Any]) -> list[Any]:
    """What Kilosort4's readers of files are made with.

    Returns
    -------
    list
        n_chan_bin, fs, batch_size, nt, nt0min, chanMap, data_dtype, do_CAR, invert_sign, xc, yc, tmin, tmax,
        artifact_threshold, shift, scale, batch_downsampling.

    Raises
    ------
    OpsError
        If one of them is missing.
    """
    return [needed(ops, name) for name in RUN_PARAMETERS]


# -- what is computed ----------------------------------------------------------------------------------------


def compute_preprocessing(
    ops: Ops, device: str | torch.device | None, tic0: float = np.nan, file_object: Any = None
) -> Ops:
    """Estimate the whitening.

    Parameters
    ----------
    ops : dict
        From :func:`initialize_ops`; ``Nbatches``, ``preprocessing`` (``hp_filter`` and ``whiten_mat``), ``Wrot`` and
        ``fwav`` are set in it, and results of an earlier recording are dropped.
    device : str or torch.device, optional
    tic0 : float
        Accepted for compatibility; without effect, as for all functions here.
    file_object : array-like, optional
        Samples of shape (time, channel), if they are not in the files of ``ops['filename']``.

    Returns
    -------
    dict
        The same `ops`.

    Raises
    ------
    RecordingError, ProbeError, SettingsError, ResultsError, MachineError
        If the recording cannot be sorted, or results cannot be written.
    """
    forget_results(ops)
    recording = recording_of(ops, file_object)
    with _computing(ops, device, recording) as at:
        whitening = at.do(lambda: at.run.do(LearnWhitening(at.settings, at.tiles)))
    to = torch.device(at.tiles.device if torch.cuda.is_available() else "cpu")
    matrix = torch.from_numpy(whitening.matrix).to(to)
    highpass = torch.from_numpy(highpass_impulse(at.settings, recording.sampling_rate_hz)).to(to)
    put_whitening(ops, whitening)
    ops.update(
        Nbatches=len(at.tiles.tiling),
        Wrot=matrix,
        fwav=highpass,
        preprocessing={"hp_filter": highpass, "whiten_mat": matrix},
    )
    return ops


def compute_drift_correction(
    ops: Ops,
    device: str | torch.device | None,
    tic0: float = np.nan,
    progress_bar: Any = None,
    file_object: Any = None,
    clear_cache: bool = False,
    verbose: bool = False,
) -> tuple[Ops, BinaryFiltered, NDArray[np.float64] | None]:
    """Detect peaks, and estimate from their depths how the tissue moved.

    Parameters
    ----------
    ops : dict
        From :func:`compute_preprocessing`; ``dshift``, ``yblk``, ``wPCA`` and ``wTEMP`` are set in it. With
        ``ops['nblocks'] = 0``, nothing is computed, and ``dshift`` is None.
    device : str or torch.device, optional
    progress_bar : optional
        As in :func:`~ks4stream.kilosort4.run_kilosort.run_kilosort`.
    file_object : array-like, optional
        As in :func:`compute_preprocessing`.
    tic0 : float
        Accepted for compatibility.
    clear_cache : bool
        After each step, free the GPU memory that torch keeps for later.
    verbose : bool
        Also log each task as it ends, and memory after each step, in the file of
        :func:`~ks4stream.kilosort4.run_kilosort.setup_logger`.

    Returns
    -------
    ops : dict
        The same `ops`.
    bfile : BinaryFiltered
        The preprocessed traces, which the next functions take.
    st0 : ndarray of float64, shape (n_peaks, 6), or None
        Peaks of the first pass (see :func:`~ks4stream.kilosort4.spikes.drift_table`), for
        :func:`~ks4stream.kilosort4.plots.plot_drift_scatter`; with ``Th_universal="auto"``, those with scores above 9,
        as smaller ones are detected in some batches only. None without drift correction.

    Raises
    ------
    OpsError
        If the `ops` was not preprocessed, or belongs to another recording.
    """
    needed(ops, "preprocessing")
    forget_results(ops, since="dshift")
    ops.update(dshift=None, yblk=None, iKxx=None)
    own(ops).pop("has_copy", None)
    recording = recording_of(ops, file_object)
    with _computing(ops, device, recording, progress_bar, clear_cache, verbose) as at:
        ops["Nbatches"] = len(at.tiles.tiling)
        st0 = at.do(partial(_estimate_drift, ops, at)) if at.settings.nblocks else None
    tiles = tiles_of(ops, recording, at.tiles.device)
    return ops, BinaryFiltered.of(tiles, at.settings.nt, at.settings.peak_sample), st0


def _estimate_drift(ops: Ops, at: _Computing) -> NDArray[np.float64]:
    run, tiles, settings = at.run, at.tiles, at.settings
    waveforms, peaks = find_peaks(run, tiles, settings, *layout(tiles, settings))
    drift, plotted = run.do(EstimateDrift(settings, tiles, peaks))
    put_waveforms(ops, waveforms)
    put_peaks(ops, plotted)
    ops.update(
        dshift=drift.shift_um.astype(np.float64),
        yblk=drift.centre_um.astype(np.float64),
        iKxx=torch.from_numpy(tiles.with_drift(drift, settings).interpolation()),
    )
    own(ops)["drift_error"] = drift.error_um
    return drift_table(peaks, tiles, common_peak(settings), run.scratch)


def detect_spikes(
    ops: Ops,
    device: str | torch.device | None,
    bfile: BinaryFiltered,
    tic0: float = np.nan,
    progress_bar: Any = None,
    clear_cache: bool = False,
    verbose: bool = False,
) -> tuple[NDArray[np.float64], torch.Tensor, torch.Tensor, NDArray[np.int32]]:
    """Learn templates, and find all spikes with them.

    Parameters
    ----------
    ops : dict
        From :func:`compute_drift_correction`; ``wPCA``, ``wTEMP``, ``iCC``, ``iCC_mask`` and ``iU`` are set in it.
    device : str or torch.device, optional
    bfile : BinaryFiltered
        From :func:`compute_drift_correction`. Only its samples are used; everything else is taken from `ops`.
    progress_bar : optional
    tic0, clear_cache, verbose
        As in :func:`compute_drift_correction`.

    Returns
    -------
    st : ndarray of float64, shape (n_spikes, 3)
        Time in samples, counted from the first sorted sample; template; threshold amplitude.
    tF : Tensor, shape (n_spikes, nearest_chans, n_pcs)
        Features, on channels ``ops['iCC'][:, ops['iU'][template]]``; many are mapped from a file.
    Wall : Tensor, shape (n_templates, n_channels, n_pcs)
        The templates.
    clu : ndarray of int32, shape (n_spikes,)
        Template of each spike.

    Raises
    ------
    OpsError
        If the drift was not estimated, or the `ops` belongs to another recording.
    """
    needed(ops, "dshift")
    forget_results(ops, since="wPCA")
    with _computing(ops, device, _recording_of(bfile, ops), progress_bar, clear_cache, verbose) as at:
        st, features, template_features = at.do(partial(_detect, ops, at))
    return st, tensor(features), tensor(template_features), st[:, 1].astype(np.int32)


def _recording_of(bfile: BinaryFiltered, ops: Ops) -> Recording:
    """The recording of a bfile; one that was made by hand does not know where contacts are."""
    if not isinstance(getattr(bfile, "recording", None), Recording):
        raise OpsError(f"bfile={bfile!r} has no samples; pass the one that compute_drift_correction returned.")
    recording: Recording = bfile.recording
    return recording if recording.probe is not None else recording.with_probe(probe_of(ops))


def _detect(ops: Ops, at: _Computing) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    run, tiles, settings = at.run, at.tiles, at.settings
    centres, regions = layout(tiles, settings)
    waveforms, peaks = find_peaks(run, tiles, settings, centres, regions)
    learned, spikes = find_spikes(run, tiles, settings, waveforms, peaks, centres, regions)
    put_waveforms(ops, waveforms)
    where = channels_of_templates(tiles.probe, spikes.template_channels)
    ops.update({name: torch.from_numpy(values) for name, values in where.items()})
    own(ops)["artifacts"], own(ops)["threshold"] = spikes.artifacts, spikes.threshold
    put_diagnostics(ops, diagnostics(peaks, learned, spikes))
    st, features = table_of(spikes, tiles.tiling.start, settings.n_pcs, run.scratch)
    return st, features, learned.features


def cluster_spikes(
    st: NDArray[np.float64],
    tF: torch.Tensor | NDArray[np.float32],
    ops: Ops,
    device: str | torch.device | None,
    bfile: BinaryFiltered,
    tic0: float = np.nan,
    progress_bar: Any = None,
    clear_cache: bool = False,
    verbose: bool = False,
) -> tuple[NDArray[np.int32], torch.Tensor, NDArray[np.float64], torch.Tensor]:
    """Cluster spikes, and merge the clusters that are one neuron.

    Parameters
    ----------
    st, tF : array-like
        From :func:`detect_spikes`; the same spikes may be left out of both.
    ops : dict
    device : str or torch.device, optional
    bfile : BinaryFiltered
        As in :func:`detect_spikes`.
    progress_bar : optional
    tic0, clear_cache, verbose
        As in :func:`compute_drift_correction`.

    Returns
    -------
    clu : ndarray of int32, shape (n_spikes,)
        Unit of each spike.
    Wall : Tensor, shape (n_units, n_channels, n_pcs)
        Template of each unit.
    st, tF
        Of the spikes that belong to a unit, in order of time and then of unit. Times are those of the unit's peak.

    Raises
    ------
    OpsError
        If spikes were not detected, the `ops` belongs to another recording, or `st` and `tF` do not fit each other.
    """
    needed(ops, "iCC")
    with _computing(ops, device, _recording_of(bfile, ops), progress_bar, clear_cache, verbose) as at:
        columns, unit_features = at.do(partial(_cluster, ops, at, array(st, np.float64), array(tF, np.float32)))
    found = np.column_stack([columns["sample"] - at.tiles.tiling.start, columns["template"], columns["score"]])
    return columns["unit"], tensor(unit_features), found.astype(np.float64), tensor(columns["features"])


def _cluster(
    ops: Ops, at: _Computing, st: NDArray[np.float64], features: NDArray[np.float32]
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    run, tiles, settings = at.run, at.tiles, at.settings
    _, regions = layout(tiles, settings)
    waveforms = waveforms_of(ops)
    check_spikes(ops, st, features)
    spikes = spikes_from(
        run, tiles, regions, st, features, template_channels_of(ops), thresholds_of(ops), artifacts_of(ops)
    )
    units = cluster(run, tiles, settings, waveforms, spikes)
    if (found := diagnostics_of(ops)) is not None:
        put_diagnostics(ops, with_units(found, units))
    return run.do(Join(settings, units, spikes, waveforms, tiles.probe)), units.features


def save_sorting(
    ops: Ops,
    results_dir: PathLike,
    st: NDArray[np.float64],
    clu: NDArray[np.integer[Any]],
    tF: torch.Tensor | NDArray[np.float32],
    Wall: torch.Tensor | NDArray[np.float32],
    imin: int,
    tic0: float = np.nan,
    save_extra_vars: bool = False,
    save_preprocessed_copy: bool = False,
    skip_dat_path: bool = False,
) -> tuple[Ops, NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Label the units, find duplicates and write the results.

    Parameters
    ----------
    ops : dict
        From :func:`cluster_spikes`; numbers of spikes and units are set in it.
    results_dir : path
    st, clu, tF, Wall : array-like
        From :func:`cluster_spikes`; they may have been changed.
    imin : int
        First sorted sample (``bfile.imin``), from which the times in `st` are counted.
    tic0 : float
        Accepted for compatibility.
    save_extra_vars : bool
        Also write tF, Wall, full_st, full_clu and full_amp.
    save_preprocessed_copy : bool
        Let Phy show ``temp_wh.dat`` in the results folder, which
        :func:`~ks4stream.kilosort4.io.save_preprocessing` writes.
    skip_dat_path : bool
        Do not name the recording's files in ``params.py``, so that Phy does not look for them.

    Returns
    -------
    ops : dict
        The same `ops`.
    similar_templates : ndarray of float32, shape (n_units, n_units)
    is_ref : ndarray of float64, shape (n_units,)
        1 for good units, 0 for others.
    est_contam_rate : ndarray of float64, shape (n_units,)
    kept_spikes : ndarray of bool, shape (n_spikes,)
        False for duplicates; in the order of `st`.

    Raises
    ------
    OpsError
        If the arrays do not fit each other or the `ops`.
    ResultsError
        If the results cannot be written.
    """
    sorting = sorting_of(ops, st, clu, tF, Wall, imin)
    if skip_dat_path:
        files = ", ".join(sorting.files) or "those of a file object"
        sorting = replace(sorting, flat_files=f"skip_dat_path was given; the samples are in {files}")
    folder = Path(results_dir)
    with recorded() as warned:
        finish(
            sorting,
            ResultsFolder.open(folder, sorting.files),
            save_extra_vars=save_extra_vars,
            preprocessed=folder / PREPROCESSED_COPY if save_preprocessed_copy else None,
            kept={PREPROCESSED_COPY} if own(ops).get("has_copy") else (),
        )
    _note(ops, warned)
    _tidy(ops)
    made = ops_from_sorting(sorting, folder, save_preprocessed_copy=save_preprocessed_copy)
    ops.update({name: made[name] for name in ("n_spikes", "n_units_total", "n_units_good", "runtime", "is_tensor")})
    kept = np.empty_like(sorting.kept)
    kept[in_order(array(st, np.float64), array(clu, np.int32))] = sorting.kept  # in the caller's order
    return ops, sorting.similarity, sorting.good.astype(np.float64), sorting.contamination, kept


def sorting_of(
    ops: Ops,
    st: NDArray[np.float64],
    clu: NDArray[np.integer[Any]],
    tF: torch.Tensor | NDArray[np.float32],
    Wall: torch.Tensor | NDArray[np.float32],
    imin: int,
) -> Sorting:
    """The sorting that Kilosort4's arrays describe.

    Raises
    ------
    OpsError
        If they do not fit each other or the `ops`.
    """
    if "recording" not in own(ops):  # the ops of a whole sort by an earlier version
        remember(ops, tiles_of(ops, recording_of(ops), "cpu"))
    st, features, unit_features = array(st, np.float64), array(tF, np.float32), array(Wall, np.float32)
    unit = array(clu, np.float64)
    channels = template_channels_of(ops)
    check_spikes(ops, st, features)
    _check_units(unit, unit_features, len(st), probe_of(ops).n_channels)
    unit = unit.astype(np.int32)
    if int(imin) != tiling_in(ops).start:
        raise OpsError(f"imin={imin}, but sorting began at sample {tiling_in(ops).start}. Pass bfile.imin.")
    settings, waveforms, probe = settings_of(ops), waveforms_of(ops), probe_of(ops)
    rate = float(sorted_of(ops)["sampling_rate_hz"])
    order = in_order(st, unit)
    if np.any(np.diff(order) != 1):  # changed by the caller
        st, unit, features = st[order], unit[order], features[order]
    sample, template = st[:, 0].astype(np.int64) + int(imin), st[:, 1].astype(np.int32)
    kept = merging.mark_duplicates(sample, unit, min_samples=int(settings.duplicate_spike_ms * rate / 1000))
    refractory, contamination = np.zeros(len(unit_features), bool), np.zeros(len(unit_features))
    by_unit = np.argsort(unit[kept], kind="stable")
    ends = np.cumsum(np.bincount(unit[kept], minlength=len(unit_features)))
    for number, rows in enumerate(np.split(by_unit, ends[:-1]) if len(ends) else []):
        refractory[number], contamination[number] = labels(sample[kept][rows], rate, settings.acg_threshold)
    x_um, y_um = positions(features, template, channels, probe, settings.position_limit)
    with one_thread():  # on more, matrix products add up in another order than in a whole sort
        similarity = templates.similarity(torch.from_numpy(unit_features), torch.from_numpy(waveforms.components))
    return Sorting(
        sample=sample,
        unit=unit,
        template=template,
        score=st[:, 2].astype(np.float32),
        features=features,
        kept=kept,
        x_um=x_um,
        y_um=y_um,
        template_channels=channels,
        unit_features=unit_features,
        similarity=similarity.value.numpy(),
        refractory=refractory,
        contamination=contamination,
        settings=settings,
        probe=probe,
        whitening=whitening_of(ops),
        waveforms=waveforms,
        drift=drift_of(ops),
        peaks=peaks_of(ops),
        diagnostics=diagnostics_of(ops),
        artifacts=artifacts_of(ops),
        seconds=dict(own(ops).get("seconds", {})),
        warnings=tuple(own(ops).get("warnings", ())),
        **sorted_of(ops),
    )


def _check_units(unit: NDArray[Any], unit_features: NDArray[np.float32], n_spikes: int, n_channels: int) -> None:
    whole = np.all(unit == np.round(unit))
    if unit.shape != (n_spikes,) or not whole or (n_spikes and not 0 <= unit.min() <= unit.max() < len(unit_features)):
        raise OpsError(
            f"clu has shape {unit.shape} and units up to {unit.max(initial=-1)}, but there are {n_spikes} spikes, and "
            f"Wall has {len(unit_features)} units, numbered from 0. Change clu and Wall together."
        )
    if unit_features.ndim != 3 or unit_features.shape[1] != n_channels:
        raise OpsError(
            f"Wall has shape {unit_features.shape}; it must be (n_units, n_channels, n_pcs), and ops has "
            f"{n_channels} channels."
        )


# -- where it is computed ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Computing:
    """A run that continues what earlier functions with the same ``ops`` began."""

    run: Run
    tiles: Preprocessor
    settings: Settings

    def do(self, method: Callable[[], Found]) -> Found:
        """Compute something; files that turn out to be damaged are computed again."""
        return self.run.retry_damaged(method)


@contextmanager
def _computing(
    ops: Ops,
    device: str | torch.device | None,
    recording: Recording,
    progress_bar: Any = None,
    clear_cache: bool = False,
    verbose: bool = False,
) -> Iterator[_Computing]:
    resources = Resources(client=ops.get("client"), workers=ops.get("workers"), device=device, clear_cache=clear_cache)
    folder, progress = folder_of(ops), progress_of(progress_bar) or no_progress
    client = client_for(resources)
    chosen = gpus.chosen(device, here=client in (None, "loop"))
    with recorded() as warned, detailed(verbose), ExitStack() as stack:
        recording = stack.enter_context(cached(recording, None, None))
        is_first = "provenance" not in own(ops)
        tiles = tiles_of(ops, recording, chosen)
        token = "" if recording.source.digest_is_exact else own(ops).get("token", uuid4().hex)
        is_fresh = is_first and (bool(token) or not ops.get("resume", True))
        run = stack.enter_context(
            started(
                tiles,
                settings_of(ops),
                resources,
                folder,
                fresh=is_fresh,
                token=token,
                progress=progress,
                client=client,
            )
        )
        if is_first:
            check_plan(recording, settings_of(ops), resources, chosen, run.engine, folder)
            remember(ops, tiles)
            own(ops)["token"] = token
        yield _Computing(run, tiles, settings_of(ops))
        seconds = own(ops).setdefault("seconds", {})
        for name, spent_s in run.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent_s
        own(ops)["stages"] = sorted({*own(ops).get("stages", ()), *run.store.used})
    _note(ops, warned)


def _note(ops: Ops, warned: Sequence[str]) -> None:
    """Keep warnings for the sorting."""
    known = own(ops).setdefault("warnings", [])
    known += [text for text in warned if text not in known]


def _tidy(ops: Ops) -> None:
    """Remove what the stages of other settings have left in the run's store."""
    known, folder = own(ops), folder_of(ops) / "run"
    if "stages" not in known or not folder.is_dir():
        return
    try:
        with open_store(folder, data=known["provenance"]["recording_digest"] + known.get("token", "")) as store:
            store.used.update(known["stages"])
            store.tidy(keep=True)
    except Ks4StreamError as error:  # another run has begun there
        _log.info("%s is left as it is: %s", folder, error)
