"""Kilosort4's module ``io``: probes, recordings, ``ops.npy``, and results."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from ks4stream.engine import gpus
from ks4stream.errors import Ks4StreamError, OpsError, ProbeError, ResultsError, SettingsError
from ks4stream.geometry import vertical_pitch_um
from ks4stream.io import probes
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.kilosort_ops import OPS, write_ops
from ks4stream.io.phy import write_traces
from ks4stream.io.plain_pickle import load_object
from ks4stream.io.results_folder import PREPROCESSED_COPY, RECORD, ResultsFolder
from ks4stream.io.run_store import MANIFEST
from ks4stream.kilosort4.arguments import files_of, given_places, only_binary
from ks4stream.kilosort4.binary import BinaryFiltered, BinaryRWFile
from ks4stream.kilosort4.extractor import RecordingExtractorAsArray
from ks4stream.kilosort4.ops import OWN, folder_of, probe_of, probe_words, recording_of, settings_of, tiles_of
from ks4stream.kilosort4.parts import save_sorting
from ks4stream.kilosort4.utils import PROBE_DIR
from ks4stream.probe import Probe
from ks4stream.report import written_early

__all__ = [
    "BinaryFiltered",
    "BinaryRWFile",
    "RecordingExtractorAsArray",
    "bfile_from_ops",
    "find_binary",
    "load_ops",
    "load_probe",
    "remove_bad_channels",
    "save_ops",
    "save_preprocessing",
    "save_probe",
    "save_to_phy",
    "select_shank",
]

PathLike = str | os.PathLike[str]

_log = logging.getLogger("ks4stream")


# -- probes ----------------------------------------------------------------------------------------------


def load_probe(probe_path: PathLike | Probe | Mapping[str, Any]) -> dict[str, Any]:
    """Read a probe.

    Parameters
    ----------
    probe_path : path or str
        A file (``.json``, ``.mat``, ``.prb``, SpikeGLX's ``.meta``), or the name of a probe that comes with ks4stream:
        its own ("neuropixels_1") or that of Kilosort4 ("NeuroPix1_default.mat"), also in
        :data:`~ks4stream.kilosort4.utils.PROBE_DIR`.

    Returns
    -------
    dict
        ``chanMap`` (int32), ``xc``, ``yc`` and ``kcoords`` (float32), arrays with one entry per contact, and their
        number ``n_chan``.

    Raises
    ------
    ProbeError
        If there is no such probe, or the file cannot be read.
    """
    if isinstance(probe_path, str | os.PathLike):
        path = Path(probe_path)
        if not path.exists() and path.parent == PROBE_DIR:
            probe_path = path.name
    words = probe_words(probes.load_probe(probe_path))
    for name in ("xc", "yc", "kcoords"):
        words[name] = words[name].astype(np.float32)
    return words | {"chanMap": words["chanMap"].astype(np.int32)}


def save_probe(probe_dict: Mapping[str, Any] | Probe, filepath: PathLike) -> None:
    """Write a probe as JSON, which :func:`load_probe`, Kilosort4 and SpikeInterface read.

    Parameters
    ----------
    probe_dict : dict
        With ``chanMap``, ``xc``, ``yc`` and ``kcoords``.
    filepath : path
        Its name ends in ``.json``.

    Raises
    ------
    ProbeError
        If the probe is not valid, or the name does not end in ``.json``.
    """
    probes.save_probe(probes.load_probe(probe_dict), filepath)


def remove_bad_channels(probe: Mapping[str, Any], bad_channels: Sequence[int] | None) -> dict[str, Any]:
    """Leave channels out of a probe.

    Parameters
    ----------
    probe : dict
        As from :func:`load_probe`; it is not changed.
    bad_channels : list of int
        Columns of the file, which are values of ``chanMap``.

    Returns
    -------
    dict

    Raises
    ------
    ProbeError
        If no contact has one of these channels, or none would be left.
    """
    bad = np.unique(np.asarray([] if bad_channels is None else bad_channels, np.int64).ravel())
    if not len(bad):
        return dict(probe)
    probes.load_probe(probe).drop_channels(bad)  # raises the error that says what is wrong
    return _kept(probe, ~np.isin(probe["chanMap"], bad))


def select_shank(probe: Mapping[str, Any], shank_idx: float | Sequence[float] | None) -> dict[str, Any]:
    """Keep the contacts of one shank, or of some.

    Parameters
    ----------
    probe : dict
        As from :func:`load_probe`; it is not changed.
    shank_idx : float or list of float
        Values of ``kcoords``; None keeps all.

    Returns
    -------
    dict

    Raises
    ------
    ProbeError
        If the probe has no such shank.
    """
    if shank_idx is None:
        return dict(probe)
    wanted = np.atleast_1d(np.asarray(shank_idx, np.float64))
    if not np.array_equal(wanted, wanted.round()):
        raise ProbeError(f"shank_idx={shank_idx} must be whole numbers, the values of kcoords.")
    probes.load_probe(probe).select_shanks(wanted.astype(np.int64))
    return _kept(probe, np.isin(probe["kcoords"], wanted))


def _kept(probe: Mapping[str, Any], rows: NDArray[np.bool_]) -> dict[str, Any]:
    arrays = {name: np.asarray(probe[name])[rows] for name in ("chanMap", "xc", "yc", "kcoords")}
    return {**probe, **arrays, "n_chan": int(rows.sum())}


# -- recordings ------------------------------------------------------------------------------------------


def find_binary(data_dir: PathLike) -> Path:
    """Find the binary file in a folder.

    Parameters
    ----------
    data_dir : path

    Returns
    -------
    Path
        The only file that ends in ``.bin``, ``.bat``, ``.dat`` or ``.raw``.

    Raises
    ------
    RecordingError
        If there is none, or more than one.
    """
    return only_binary(Path(data_dir))


def bfile_from_ops(
    ops: Mapping[str, Any] | None = None,
    ops_path: PathLike | None = None,
    filename: PathLike | Sequence[PathLike] | None = None,
    device: str | torch.device | None = None,
) -> BinaryFiltered:
    """Open the traces of a recording, preprocessed as an ``ops`` says.

    Parameters
    ----------
    ops : mapping, optional
    ops_path : path, optional
        An ``ops.npy``, if there is no `ops`.
    filename : path or list of paths, optional
        The recording, if it is not, or no longer, at ``ops['filename']``.
    device : str or torch.device, optional
        Where traces are computed; by default the GPU if this process sees one.

    Returns
    -------
    BinaryFiltered

    Raises
    ------
    OpsError
        If neither `ops` nor `ops_path` is given, or the `ops` belongs to another recording.
    RecordingError, ResultsError
        If the recording or the ``ops.npy`` cannot be read.
    """
    if ops is None:
        if ops_path is None:
            raise OpsError("bfile_from_ops needs ops, or ops_path to load it from.")
        ops = load_ops(ops_path, device="cpu")
    known = _copied(ops)
    if filename is not None:  # a copy may have another time of change, which is part of its identity
        known["filename"] = filename
        known[OWN].pop("provenance", None)
    settings = settings_of(known)
    tiles = tiles_of(known, recording_of(known), gpus.chosen(device))
    return BinaryFiltered.of(tiles, settings.nt, settings.peak_sample)


# -- ops -------------------------------------------------------------------------------------------------


def _copied(ops: Mapping[str, Any]) -> dict[str, Any]:
    """An `ops` in which functions may note what they find, without the caller's being changed."""
    return {**ops, OWN: deepcopy(dict(ops.get(OWN, {})))}


def load_ops(ops_path: PathLike, device: str | torch.device | None = None) -> dict[str, Any]:
    """Load an ``ops`` that ks4stream or Kilosort4 has saved.

    It is a pickle; nothing in it is run (:func:`ks4stream.io.plain_pickle.load_object`).

    Parameters
    ----------
    ops_path : path
        An ``ops.npy``.
    device : str or torch.device, optional
        Where tensors are made; by default the GPU if this process sees one.

    Returns
    -------
    dict
        The entries that ``is_tensor`` lists, and those of ``preprocessing``, are tensors.

    Raises
    ------
    ResultsError
        If there is no such file, it is damaged, or it holds anything other than values, arrays and paths.
    """
    ops = load_object(ops_path)
    if not isinstance(ops, dict):
        raise ResultsError(f"{ops_path} holds a {type(ops).__name__} and not the dictionary ops.")
    to = torch.device(gpus.chosen(device))
    tensors = [] if ops.get("is_tensor") is None else ops["is_tensor"]
    if not isinstance(tensors, list | tuple) or not all(isinstance(name, str) for name in tensors):
        raise ResultsError(f"{ops_path} is damaged: its is_tensor is not a list of the names of entries.")
    for name in tensors:
        if name in ops:
            ops[name] = _as_tensor(ops[name], to)
    if isinstance(ops.get("preprocessing"), dict):
        ops["preprocessing"] = {name: _as_tensor(value, to) for name, value in ops["preprocessing"].items()}
    return ops


def _as_tensor(value: Any, device: torch.device) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False)).to(device)


def save_ops(ops: Mapping[str, Any], results_dir: PathLike | None = None) -> None:
    """Save an ``ops``, also between two steps of a sort, to go on with it in another process.

    Parameters
    ----------
    ops : mapping
        It is not changed. Tensors are saved as arrays, paths as strings, and a Dask client as the address of its
        scheduler.
    results_dir : path, optional
        Folder for ``ops.npy``; by default that of the results.

    Raises
    ------
    OpsError
        If an entry cannot be saved.
    ResultsError
        If the folder cannot be written to.

    Warns
    -----
    CurationWarning
        If the folder holds other results than those of the `ops`. They stay as they are, and ``ops.npy`` is written to
        ``ks4stream.early`` in that folder.
    """
    folder = folder_of(ops) if results_dir is None else Path(results_dir)
    plain = {str(name): _plain(value, f"ops[{name!r}]") for name, value in ops.items()}
    tensors = [str(name) for name, value in ops.items() if torch.is_tensor(value)]
    with placed(folder, ops) as draft:
        write_ops(plain | {"is_tensor": tensors}, draft)


def _plain(value: Any, where: str) -> Any:
    """The same value made of what :func:`~ks4stream.io.kilosort_ops.write_ops` knows."""
    if torch.is_tensor(value):
        return value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, f"{where}[{name!r}]") for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry, f"{where}[…]") for entry in value]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _plain(value.tolist(), where)
    if isinstance(value, torch.device):
        return str(value)
    if type(value).__module__.startswith("distributed."):
        return str(value.scheduler.address)
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biufU"
    if value is None or is_array or isinstance(value, bool | int | float | str | np.generic | os.PathLike):
        return value
    raise OpsError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved. Leave it out of the "
        "ops that is saved."
    )


# -- results ---------------------------------------------------------------------------------------------


@contextmanager
def placed(folder: Path, ops: Mapping[str, Any] | None = None, *, is_of_results: bool = False) -> Iterator[Path]:
    """Make a folder to write files to, which are moved into another folder at the end.

    Of results that are there, whosever they are, nothing is moved, and a file is replaced only by one of the same
    results. In a folder for results, files are added as a part of those to come
    (:func:`ks4stream.report.written_early`). In any other folder, they are written and nothing else.

    Parameters
    ----------
    folder : Path
    ops : mapping, optional
        What the files are of, if known.
    is_of_results : bool
        Whether they are known to be of the results that are there.
    """
    results = ResultsFolder(folder)
    is_of_results |= ops is not None and _is_of_results(ops, folder)
    if not is_of_results and (results.holds_sorting() or _is_for_results(folder, ops)):
        given = given_places(filename=(ops or {}).get("filename"))
        with written_early(folder, [os.path.abspath(file) for file in files_of(given, needed=False)]) as draft:
            yield draft
        return
    with _draft_in(folder) as draft:
        yield draft
        results.exchange(draft)


@contextmanager
def _draft_in(folder: Path) -> Iterator[Path]:
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".ks4stream-{uuid4().hex}"
        draft.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _is_for_results(folder: Path, ops: Mapping[str, Any] | None) -> bool:
    """Whether results are written to a folder: by this `ops`, by a run that is kept there, or because others were."""
    if (folder / "run" / MANIFEST).is_file() or (folder / RECORD).is_file():
        return True
    try:
        return ops is not None and os.path.realpath(folder_of(ops)) == os.path.realpath(folder)
    except SettingsError:  # it names none
        return False


def _is_of_results(ops: Mapping[str, Any], folder: Path) -> bool:
    """Whether an `ops` is that of the results of ks4stream in a folder."""
    if "n_units_total" not in ops or not (folder / "spike_times.npy").is_file():
        return False
    try:
        return _identity(ops) == _identity(load_ops(folder / OPS, "cpu"))
    except (Ks4StreamError, KeyError, TypeError):  # of another sorter, or damaged
        return False


def _identity(ops: Mapping[str, Any]) -> tuple[Any, ...]:
    digest = ops[OWN]["provenance"]["recording_digest"]
    settings = settings_of(ops)
    settings = replace(settings, dmin=settings.dmin or vertical_pitch_um(probe_of(ops)))  # as it is stored
    return str(digest), int(ops["n_units_total"]), int(ops["n_spikes"]), settings


def save_to_phy(
    st: NDArray[np.float64],
    clu: NDArray[np.integer[Any]],
    tF: torch.Tensor | NDArray[np.float32],
    Wall: torch.Tensor | NDArray[np.float32],
    probe: Mapping[str, Any] | Probe | None,
    ops: Mapping[str, Any],
    imin: int,
    results_dir: PathLike | None = None,
    data_dtype: DTypeLike | None = None,
    save_extra_vars: bool = False,
    save_preprocessed_copy: bool = False,
    skip_dat_path: bool = False,
) -> tuple[Path, NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Label the units, find duplicates and write the results, as :func:`~ks4stream.kilosort4.parts.save_sorting` does.

    Parameters
    ----------
    st, clu, tF, Wall, imin, save_extra_vars, save_preprocessed_copy, skip_dat_path
        As for :func:`~ks4stream.kilosort4.parts.save_sorting`.
    probe : dict, optional
        By default that of the `ops`.
    ops : mapping
        It is not changed.
    results_dir : path, optional
        By default that of the `ops`.
    data_dtype : dtype-like, optional
        Type of the samples in the file; by default that of the `ops`.

    Returns
    -------
    results_dir : Path
    similar_templates : ndarray of float32, shape (n_units, n_units)
    is_ref : ndarray of float64, shape (n_units,)
    est_contam_rate : ndarray of float64, shape (n_units,)
    kept_spikes : ndarray of bool, shape (n_spikes,)

    Raises
    ------
    OpsError
        If the arrays do not fit each other or the `ops`.
    ResultsError
        If the results cannot be written.
    """
    known = _copied(ops)
    if probe is not None:
        known["probe"] = probe_words(probes.load_probe(probe))
    if data_dtype is not None:
        known["data_dtype"] = np.dtype(data_dtype).name
    folder = folder_of(known) if results_dir is None else Path(results_dir)
    _, similar_templates, is_ref, est_contam_rate, kept_spikes = save_sorting(
        known,
        folder,
        st,
        clu,
        tF,
        Wall,
        imin,
        save_extra_vars=save_extra_vars,
        save_preprocessed_copy=save_preprocessed_copy,
        skip_dat_path=skip_dat_path,
    )
    return folder, similar_templates, is_ref, est_contam_rate, kept_spikes


def save_preprocessing(
    filename: PathLike,
    ops: Mapping[str, Any],
    bfile: BinaryFiltered | None = None,
    bfile_path: PathLike | Sequence[PathLike] | None = None,
    verbose: bool = False,
) -> None:
    """Write the preprocessed traces: filtered, whitened, corrected for drift, times 200, as int16.

    The file has the shape of the recording, so that spike times and ``channel_map`` hold for both; what is not sorted
    is 0. Traces are computed and written one batch at a time.

    Parameters
    ----------
    filename : path
        The file to write, which must not exist. Only ``temp_wh.dat`` in the results folder of `ops` may exist: it
        becomes a part of these results, which `save_sorting` keeps, and names in ``params.py`` with
        ``save_preprocessed_copy=True``. If the folder holds other results, it waits in ``ks4stream.early`` there.
    ops : mapping
    bfile : BinaryFiltered, optional
        The traces.
    bfile_path : path or list of paths, optional
        The recording, if there is no `bfile`.
    verbose : bool
        Log every batch.

    Raises
    ------
    OpsError
        If neither `bfile` nor `bfile_path` is given.
    ResultsError
        If the file cannot be written, is the recording, or exists.
    """
    if bfile is None:
        if bfile_path is None:
            raise OpsError("save_preprocessing needs bfile, or bfile_path to read the recording from.")
        bfile = bfile_from_ops(ops, filename=bfile_path, device=ops.get("torch_device"))
    target = Path(filename)
    is_result = target.name == PREPROCESSED_COPY and os.path.realpath(target.parent) == os.path.realpath(folder_of(ops))
    files = [*files_of(given_places(filename=ops.get("filename")), needed=False), *bfile.recording.files]
    if os.path.realpath(target) in {os.path.realpath(file) for file in files}:
        raise ResultsError(f"{target} is the recording, which is not replaced. Choose another filename.")
    if not is_result and os.path.lexists(target):
        raise ResultsError(f"{target} exists, and is not replaced. Choose another filename, or move that file away.")
    with placed(target.parent, ops) if is_result else _draft_in(target.parent) as draft:
        pieces = _told(bfile, ops) if verbose else bfile.cores(ops)
        n_chan_file, n_samples = bfile.n_chan_bin, bfile.total_samples
        write_traces(draft / target.name, pieces, bfile.chan_map, n_chan_file, n_samples)
        if not is_result:
            (draft / target.name).replace(target)
    if is_result and isinstance(ops.get(OWN), dict):
        ops[OWN]["has_copy"] = True  # so that save_sorting keeps it


def _told(bfile: BinaryFiltered, ops: Mapping[str, Any]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for number, piece in enumerate(bfile.cores(ops), start=1):
        yield piece
        _log.info("Preprocessed traces of batch %d of %d written", number, bfile.n_batches)
