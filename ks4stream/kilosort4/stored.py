"""Results read back as Kilosort4's arrays, from a folder that ks4stream or Kilosort4 has written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.engine import gpus
from ks4stream.errors import ResultsError
from ks4stream.io.kilosort_ops import OPS
from ks4stream.kilosort4.io import PathLike, load_ops
from ks4stream.kilosort4.ops import OWN, artifacts_of, needed, settings_of, tiling_in
from ks4stream.labels import Trains, reasons
from ks4stream.stages.units import labels

__all__ = ["load_sorting"]

LABELS, CONTAMINATION = "cluster_KSLabel.tsv", "cluster_ContamPct.tsv"
_NEEDED = (OPS, "spike_times.npy", "spike_clusters.npy", "similar_templates.npy", LABELS, CONTAMINATION)
_EXTRA = ("tF", "Wall", "full_st", "full_clu", "full_amp")


def load_sorting(
    results_dir: PathLike, device: str | torch.device | None = None, load_extra_vars: bool = False
) -> tuple[Any, ...]:
    """Load results.

    Nothing pickled is run: arrays are read without pickles, and ``ops.npy`` by
    :func:`~ks4stream.kilosort4.io.load_ops`.

    Parameters
    ----------
    results_dir : path
        Results folder of ks4stream or Kilosort4.
    device : str or torch.device, optional
        Where tensors are made; by default the GPU if this process sees one.
    load_extra_vars : bool
        Also load what ``save_extra_vars=True`` has saved.

    Returns
    -------
    ops : dict
    st : ndarray of int64, shape (n_kept,)
        Times of the kept spikes in samples, counted from the recording's first.
    clu : ndarray of int32, shape (n_kept,)
        Their units, as curated if they were.
    similar_templates : ndarray of float32, shape (n_units, n_units)
    is_ref : ndarray of float64, shape (n_units,)
        1 for good units, 0 for others.
    est_contam_rate : ndarray of float64, shape (n_units,)
        Of ks4stream's results, both are computed again, so that they are those of a curated sorting, too. Of
        Kilosort4's, they are as its tables have them: rounded, and NaN for units that are not listed.
    kept_spikes : ndarray of bool, shape (n_spikes,)
        Which of all spikes are kept.
    tF : Tensor, shape (n_spikes, nearest_chans, n_pcs)
        This and the following only with `load_extra_vars`.
    Wall : Tensor, shape (n_units, n_channels, n_pcs)
    full_st : ndarray of float64, shape (n_spikes, 3)
        Time in samples, counted from the first sorted sample; template; threshold amplitude.
    full_clu : ndarray of int32, shape (n_spikes,)
    full_amp : ndarray of float32, shape (n_spikes,)
        Norms of the features.

    Raises
    ------
    ResultsError
        If the folder holds no sorting, a file in it is damaged, or the extra files were not saved.
    """
    folder = Path(results_dir)
    if not folder.is_dir():
        raise ResultsError(f"There is no results folder {folder}.")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ResultsError(
            f"{folder} does not hold the results of a sort, as there is no {', '.join(missing)}. Give the folder "
            "that was results_dir (shank_<n> in it, if shanks were sorted separately)."
        )
    absent = [f"{name}.npy" for name in _EXTRA if load_extra_vars and not (folder / f"{name}.npy").is_file()]
    if absent:
        raise ResultsError(
            f"{folder} has no {', '.join(absent)}. Sort with save_extra_vars=True to have them saved, or leave "
            "load_extra_vars out."
        )
    st, clu = _array(folder, "spike_times").ravel(), _array(folder, "spike_clusters").ravel()
    similar_templates = _array(folder, "similar_templates")
    ops, n_units = load_ops(folder / OPS, device), max(len(similar_templates), int(clu.max(initial=-1)) + 1)
    is_ref, est_contam_rate = _labels(ops, st, clu, n_units) if OWN in ops else _tables(folder, n_units)
    kept_spikes = np.ones(len(st), np.bool_)  # as in results of early versions of Kilosort4, which have no such file
    if (folder / "kept_spikes.npy").is_file():
        kept_spikes = _array(folder, "kept_spikes").astype(np.bool_)
    found = (ops, st, clu, similar_templates, is_ref, est_contam_rate, kept_spikes)
    if not load_extra_vars:
        return found
    to = torch.device(gpus.chosen(device))
    extra = [_array(folder, name) for name in _EXTRA]
    return (*found, *(torch.from_numpy(values).to(to) for values in extra[:2]), *extra[2:])


def _labels(
    ops: dict[str, Any], st: NDArray[np.int64], clu: NDArray[np.integer[Any]], n_units: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Labels and contamination of units, by the times of their spikes."""
    threshold, rate_hz = settings_of(ops).acg_threshold, float(needed(ops, "fs"))
    refractory, est_contam_rate = np.zeros(n_units, np.bool_), np.zeros(n_units)
    ends = np.cumsum(np.bincount(clu, minlength=n_units))
    for unit, rows in enumerate(np.split(np.argsort(clu, kind="stable"), ends[:-1])[:n_units]):
        refractory[unit], est_contam_rate[unit] = labels(st[rows], rate_hz, threshold)
    trains = Trains(
        sample=st,
        unit=clu.astype(np.int32),
        kept=np.ones(len(st), np.bool_),
        refractory=refractory,
        contamination=est_contam_rate,
        acg_threshold=threshold,
        artifacts=artifacts_of(ops),
        tiling=tiling_in(ops),
        sampling_rate_hz=rate_hz,
    )
    return np.array([not reason for reason in reasons(trains)], np.float64), est_contam_rate


def _tables(folder: Path, n_units: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Labels and contamination of units, as the tables in the folder have them."""
    is_ref = np.array([label == "good" for label in _column(folder / LABELS, n_units, "")], np.float64)
    try:
        return is_ref, np.array(_column(folder / CONTAMINATION, n_units, "nan"), np.float64) / 100
    except ValueError as error:
        raise ResultsError(f"{folder / CONTAMINATION} has a value that is not a number: {error}.") from error


def _array(folder: Path, name: str) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        found: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error
    return found


def _column(path: Path, n_units: int, absent: str) -> list[str]:
    """The values of a table of units for units 0 … n_units−1."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))[1:]
        values = {int(row[0]): row[1] for row in rows}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise ResultsError(f"{path} is not a table of units and their values: {error}.") from error
    return [values.get(unit, absent) for unit in range(n_units)]
