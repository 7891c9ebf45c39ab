"""The folder that Phy, SpikeInterface and scripts written for Kilosort4 read.

Format only, no science: names, types and shapes are those of Kilosort4's results folder. Phy's arrays
hold the kept spikes; ``kept_spikes.npy`` says which of all spikes these are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ks4stream.errors import RecordingError, ResultsError
from ks4stream.io.kilosort_ops import (
    common_layout,
    dtype_name,
    n_chan_file,
    ops_from_sorting,
    spike_table,
    whitening_matrix,
    write_ops,
)
from ks4stream.io.mapped import release_pages
from ks4stream.io.objects import is_remote
from ks4stream.io.places import Place
from ks4stream.io.results_folder import PREPROCESSED_COPY
from ks4stream.io.sources import BinarySource
from ks4stream.recording import FlatFile
from ks4stream.results import Sorting

__all__ = [
    "export_phy",
    "link",
    "params_text",
    "save_stream",
    "write_extra_vars",
    "write_preprocessed_copy",
    "write_traces",
]

PARAMS = "params.py"
PREPROCESSED_SCALE = 200.0  # the preprocessed copy holds whitened traces times this, as int16
_SPIKES_AT_ONCE = 16_384
_UNITS_AT_ONCE = 256
_PHY_SUFFIXES = (".bin", ".dat", ".raw")  # by which Phy recognizes flat files, in exactly this spelling


def export_phy(
    sorting: Sorting,
    folder: str | os.PathLike[str],
    *,
    home: Place | None = None,
    save_extra_vars: bool = False,
    save_features: bool = True,
    preprocessed: Iterable[tuple[int, NDArray[Any]]] | Path | None = None,
) -> Path:
    """Write the files for Phy and ``ops.npy``; the caller takes care of files that are already there.

    Parameters
    ----------
    sorting : Sorting
        The sorting to write; may be empty.
    folder : path
        Results folder; created if necessary.
    home : Path or ObjectPath, optional
        The final results folder, if the files will be moved there.
    save_extra_vars : bool, optional
        Also write tF, Wall, full_st, full_clu and full_amp: all spikes, duplicates included.
    save_features : bool, optional
        Write ``pc_features.npy``, without which Phy shows no feature view.
    preprocessed : iterable of (start, traces), or Path, optional
        For a preprocessed copy, or where one was written; see :func:`write_preprocessed_copy`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ResultsError
        If the folder cannot be written to, or the sorting has units but no probe or waveforms.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _write_spikes(sorting, path)
    if save_features:
        _write_features(sorting, path)
    _write_units(sorting, path)
    _write_channels(sorting, path)
    _write_tables(sorting, path)
    home = home or path.absolute()
    _write_params(path, params_text(sorting, home))
    if preprocessed is not None:
        write_preprocessed_copy(sorting, path, preprocessed)
    write_ops(ops_from_sorting(sorting, home, save_preprocessed_copy=preprocessed is not None), path)
    if save_extra_vars:
        write_extra_vars(sorting, path)
    return path


# -- spikes ------------------------------------------------------------------------------------------


def _write_spikes(sorting: Sorting, path: Path) -> None:
    n_kept = int(np.count_nonzero(sorting.kept))

    def save(name: str, dtype: DTypeLike, column: Callable[[slice], NDArray[Any]], *rest: int) -> None:
        pieces = (column(rows)[sorting.kept[rows]] for rows in _spikes_in_turn(sorting))
        save_stream(path / f"{name}.npy", (n_kept, *rest), dtype, pieces)

    save("spike_times", np.int64, lambda rows: sorting.sample[rows])
    save("spike_clusters", np.int32, lambda rows: sorting.unit[rows])
    save("spike_templates", np.int32, lambda rows: sorting.unit[rows])
    save("spike_detection_templates", np.int32, lambda rows: sorting.template[rows])
    save("spike_positions", np.float32, lambda rows: np.column_stack([sorting.x_um[rows], sorting.y_um[rows]]), 2)
    save("amplitudes", np.float32, lambda rows: _amplitudes(sorting, rows))
    _save(path, "kept_spikes", sorting.kept, np.bool_)


def _amplitudes(sorting: Sorting, rows: slice) -> NDArray[np.float32]:
    """Norms of the features of these spikes."""
    features = sorting.features[rows]
    return np.asarray(np.sqrt(np.einsum("njq,njq->n", features, features)))


def _write_features(sorting: Sorting, path: Path) -> None:
    """Features of the kept spikes, moved from the channels of their template to those of their unit."""
    channels = _unit_channels(sorting)
    slot = _slots(sorting.template_channels, sorting.n_channels)

    def moved() -> Iterator[NDArray[np.float32]]:
        for rows in _spikes_in_turn(sorting):
            kept = sorting.kept[rows]
            template, unit = sorting.template[rows][kept], sorting.unit[rows][kept]
            wanted = slot[template[:, None], channels[unit]]  # (n, j), −1: missing
            features = np.take_along_axis(sorting.features[rows][kept], np.maximum(wanted, 0)[:, :, None], axis=1)
            features[wanted < 0] = 0
            yield features.transpose(0, 2, 1)

    shape = (int(np.count_nonzero(sorting.kept)), sorting.features.shape[2], channels.shape[1])
    save_stream(path / "pc_features.npy", shape, np.float32, moved())
    _save(path, "pc_feature_ind", channels, np.uint32)


def _unit_channels(sorting: Sorting) -> NDArray[np.int64]:
    """Channels (u, j) of largest mean feature norm, largest first.

    There are never more slots than channels, so every row lists different, existing channels: readers
    need no rule for padding.
    """
    n_slots = min(sorting.features.shape[1], sorting.n_channels)
    strength = np.linalg.norm(sorting.unit_features, axis=2)  # (u, c)
    return np.argsort(-strength, axis=1, kind="stable")[:, :n_slots].astype(np.int64)


def _slots(template_channels: NDArray[np.int64], n_channels: int) -> NDArray[np.int16]:
    """Position (v, c) of a channel's features within a template's; −1 where the template lacks the channel."""
    n_templates, n_slots = template_channels.shape
    slot = np.full((n_templates, n_channels + 1), -1, np.int16)  # the last column takes the padding
    np.put_along_axis(slot, template_channels, np.arange(n_slots, dtype=np.int16)[None, :], axis=1)
    return slot[:, :-1]


# -- units and channels ------------------------------------------------------------------------------


def _write_units(sorting: Sorting, path: Path) -> None:
    n_units, n_channels = sorting.n_units, sorting.n_channels
    components = _components(sorting)

    def templates() -> Iterator[NDArray[np.float32]]:
        for rows in _slices(n_units, _UNITS_AT_ONCE):
            yield np.einsum("ucq,qw->uwc", sorting.unit_features[rows], components)

    save_stream(path / "templates.npy", (n_units, components.shape[1], n_channels), np.float32, templates())
    _save(path, "templates_ind", np.tile(np.arange(n_channels), (n_units, 1)), np.int64)
    _save(path, "similar_templates", sorting.similarity, np.float32)


def _components(sorting: Sorting) -> NDArray[np.float32]:
    """The waveform components (q, w); zeros if an empty sorting has none."""
    if sorting.waveforms is not None:
        return np.asarray(sorting.waveforms.components, np.float32)
    if sorting.n_units:
        raise ResultsError(
            f"The sorting has {sorting.n_units} units but no waveform components, from which their templates are made."
        )
    return np.zeros((sorting.features.shape[2], sorting.settings.nt), np.float32)


def _write_channels(sorting: Sorting, path: Path) -> None:
    if sorting.probe is None:
        raise ResultsError("The sorting has no probe; Phy needs the positions of its channels. Sort with a probe.")
    whitening = whitening_matrix(sorting)
    _save(path, "channel_map", sorting.probe.chan_map, np.int64)
    _save(path, "channel_positions", np.column_stack([sorting.probe.x_um, sorting.probe.y_um]), np.float32)
    _save(path, "channel_shanks", sorting.probe.shank, np.int32)
    _save(path, "whitening_mat", whitening, np.float32)
    _save(path, "whitening_mat_dat", whitening, np.float32)
    _save(path, "whitening_mat_inv", _inverse(whitening), np.float32)


def _inverse(matrix: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    regular = matrix.astype(np.float64) + 1e-5 * np.eye(len(matrix))  # dead channels have rows of zeros
    try:
        return np.linalg.inv(regular)
    except np.linalg.LinAlgError:
        return np.linalg.pinv(regular)


def _write_tables(sorting: Sorting, path: Path) -> None:
    """One table per property of units. The group repeats the label under another name, as Kilosort4 does."""
    label = np.where(sorting.good, "good", "mua")
    norm = np.linalg.norm(sorting.unit_features, axis=(1, 2))
    _write_table(path / "cluster_KSLabel.tsv", "KSLabel", label)
    _write_table(path / "cluster_group.tsv", "KSLabel", label)
    _write_table(path / "cluster_reason.tsv", "reason", [reason or "none" for reason in sorting.label_reasons])
    _write_table(path / "cluster_ContamPct.tsv", "ContamPct", [f"{100 * rate:.1f}" for rate in sorting.contamination])
    _write_table(path / "cluster_Amplitude.tsv", "Amplitude", [f"{amplitude:.1f}" for amplitude in norm])


def _write_table(path: Path, column: str, values: Sequence[str] | NDArray[np.str_]) -> None:
    lines = [f"cluster_id\t{column}", *(f"{unit}\t{value}" for unit, value in enumerate(values))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- params.py and the preprocessed copy --------------------------------------------------------------


def params_text(
    sorting: Sorting, home: Place, files: tuple[FlatFile, ...] | str | None = None, *, hp_filtered: bool = False
) -> str:
    """Compose ``params.py``, which tells Phy where the raw traces are.

    Phy supports one type, one offset and one number of channels for all files. The files are named only if they share
    these and meet Phy's other requirements, so that Phy shows what was sorted; otherwise ``dat_path`` is empty,
    with the reason as a comment, and readers work without traces.

    Paths are relative to the folder, with forward slashes, so that data and results can be moved or
    mounted elsewhere together; a file on another drive keeps its absolute path.

    Parameters
    ----------
    sorting : Sorting
        Supplies the sampling rate and, if there are no files, type and number of channels.
    home : Path or ObjectPath
        The results folder. On an object store, paths are absolute: valid for downloaded results wherever the file
        system of this machine is mounted.
    files : tuple of FlatFile or str, optional
        The files of the traces in order of time, or why there are none; by default those of the sorting.
    hp_filtered : bool, optional
        Whether the files are already filtered.
    """
    files = sorting.flat_files if files is None else files
    why_not = _unknown_to_phy(files)
    dat_path: list[str] = []
    if isinstance(files, tuple) and not why_not:
        absolute = [
            Path(file.path).parent.resolve() / Path(file.path).name for file in files
        ]  # a symbolic link keeps its name
        dat_path = [_portable(file, home) if isinstance(home, Path) else file.as_posix() for file in absolute]
    layout = common_layout(files)
    dtype, offset_bytes, n_channels = layout or (sorting.dtype, 0, n_chan_file(sorting))
    lines = [f"# dat_path is empty, as {ascii(why_not)[1:-1]}."] if why_not else []  # no line break gets out of it
    lines += [
        f"dat_path = [{', '.join(ascii(file) for file in dat_path)}]",
        f"n_channels_dat = {n_channels}",
        f"dtype = {dtype_name(dtype)!r}",
        f"offset = {offset_bytes}",
        f"sample_rate = {float(sorting.sampling_rate_hz)!r}",
        f"hp_filtered = {hp_filtered}",
    ]
    return "\n".join(lines) + "\n"


def _unknown_to_phy(files: tuple[FlatFile, ...] | str) -> str:
    """Why Phy could not show the samples of these files; an empty string if it can."""
    if isinstance(files, str):
        return files
    for file in files:
        if is_remote(file.path):
            return f"{file.path} is not on a disk; copy it to one and give the copy in dat_path"
        if not Path(file.path).is_file():
            return f"{file.path} does not exist"
    if common_layout(files) is None:
        return "the files differ in type, offset or number of channels: " + ", ".join(
            f"{file.path} ({dtype_name(file.dtype)}, {file.offset_bytes} bytes, {file.n_channels} channels)"
            for file in files
        )
    for file in files:
        suffix, size_bytes = Path(file.path).suffix, Path(file.path).stat().st_size
        if suffix == ".npy" and len(files) > 1:
            return "Phy opens only a single .npy file; write one with all samples, or a flat file, and give that"
        if suffix not in (*_PHY_SUFFIXES, ".npy"):
            return (
                f"Phy does not open {file.path}, as its name does not end in {', '.join(_PHY_SUFFIXES)}; rename it, or "
                "make a link with such a name, and give that in dat_path"
            )
        if size_bytes != file.end_bytes:
            return f"{file.path} has {size_bytes} bytes, but the sorted samples end at byte {file.end_bytes}"
        if suffix == ".npy" and not _is_by_header(file):
            return f"the header of {file.path} describes samples other than those that were sorted"
    return ""


def _is_by_header(file: FlatFile) -> bool:
    """Whether the header of a ``.npy`` file, which Phy reads, describes the same samples."""
    try:
        (found,) = BinarySource.open_npy(file.path).flat_files
    except RecordingError:
        return False
    return replace(found, path=file.path) == file


def _portable(file: Path, folder: Path) -> str:
    """Path of a file as seen from the folder, absolute if they share nothing but the root."""
    folder = folder.resolve()
    try:
        shared = Path(os.path.commonpath([file, folder]))
    except ValueError:  # different drives
        return file.as_posix()
    if shared == Path(shared.anchor):
        return file.as_posix()
    return Path(os.path.relpath(file, folder)).as_posix()


def write_preprocessed_copy(
    sorting: Sorting, folder: str | os.PathLike[str], pieces: Iterable[tuple[int, NDArray[Any]]] | Path
) -> Path:
    """Write the whitened, drift-corrected traces to ``temp_wh.dat`` and let Phy show them; see :func:`write_traces`.

    Parameters
    ----------
    sorting : Sorting
        Supplies the channels and the length.
    folder : path
        Results folder, exported before.
    pieces : iterable of (start, traces), or Path
        First sample, counted from the recording's first, and traces of shape (time, channel that is sorted); or a file
        that :func:`write_traces` made of them, which is linked (or copied, if the disk has no links).

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ResultsError
        If the sorting lacks a probe, or the file does not have the size of the recording's traces.
    """
    if sorting.probe is None:
        raise ResultsError("The sorting has no probe, so the columns of the preprocessed copy are not known.")
    path = Path(folder) / PREPROCESSED_COPY
    if isinstance(pieces, Path):
        _check_size(pieces, 2 * n_chan_file(sorting) * sorting.n_samples)
        link(pieces, path)
    else:
        write_traces(path, pieces, sorting.probe.chan_map, n_chan_file(sorting), sorting.n_samples)
    copy = FlatFile(str(path), np.dtype(np.int16).str, 0, sorting.n_samples, n_chan_file(sorting))
    _write_params(path.parent, params_text(sorting, path.parent, (copy,), hp_filtered=True))
    return path


def write_traces(
    path: Path,
    pieces: Iterable[tuple[int, NDArray[Any]]],
    chan_map: NDArray[np.int64],
    n_chan_file: int,
    n_samples: int,
) -> None:
    """Write preprocessed traces, times 200 as int16, in the shape of the original.

    Spike times and ``channel_map`` therefore hold for both files. Whatever was not sorted (other channels, time outside
    tmin and tmax) is 0.

    Parameters
    ----------
    path : Path
    pieces : iterable of (start, traces)
        First sample, counted from the recording's first, and traces of shape (time, channel that is sorted).
    chan_map : ndarray of int64, shape (n_channels,)
        Column of each sorted channel.
    n_chan_file, n_samples : int
        Shape of the original.
    """
    limits = np.iinfo(np.int16)
    row_bytes = 2 * n_chan_file
    with path.open("wb") as file:
        for start, traces in pieces:
            scaled = np.rint(np.asarray(traces, np.float32) * PREPROCESSED_SCALE)
            block = np.zeros((len(scaled), n_chan_file), np.int16)
            block[:, chan_map] = np.clip(scaled, limits.min, limits.max).astype(np.int16)
            file.seek(start * row_bytes)
            block.tofile(file)
        file.truncate(n_samples * row_bytes)


def _check_size(source: Path, n_bytes: int) -> None:
    if source.stat().st_size != n_bytes:
        raise ResultsError(
            f"{source} has {source.stat().st_size} bytes, but the preprocessed traces of this recording have "
            f"{n_bytes}. Write it again."
        )


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_params(folder: Path, text: str) -> None:
    (folder / PARAMS).write_text(text, encoding="utf-8")


# -- what Kilosort4's users read back -----------------------------------------------------------------


def write_extra_vars(sorting: Sorting, folder: str | os.PathLike[str]) -> None:
    """Write all spikes as ``run_kilosort`` returns them: tF, Wall, full_st, full_clu, full_amp."""
    path = Path(folder)
    n, j, q = sorting.features.shape

    def save(name: str, shape: tuple[int, ...], dtype: DTypeLike, column: Callable[[slice], NDArray[Any]]) -> None:
        save_stream(path / f"{name}.npy", shape, dtype, (column(rows) for rows in _spikes_in_turn(sorting)))

    save("tF", (n, j, q), np.float32, lambda rows: sorting.features[rows])
    save("full_st", (n, 3), np.float64, lambda rows: spike_table(sorting, rows))
    save("full_amp", (n,), np.float32, lambda rows: _amplitudes(sorting, rows))
    _save(path, "Wall", sorting.unit_features, np.float32)
    _save(path, "full_clu", sorting.unit, np.int32)


# -- helpers -----------------------------------------------------------------------------------------


def _save(path: Path, name: str, values: NDArray[Any], dtype: DTypeLike) -> None:
    np.save(path / f"{name}.npy", np.ascontiguousarray(values, dtype), allow_pickle=False)


def save_stream(path: Path, shape: tuple[int, ...], dtype: DTypeLike, pieces: Iterator[NDArray[Any]]) -> None:
    """Write an ``.npy`` file piece by piece along its first axis.

    Appending keeps one piece in memory; pages of a memory-mapped file would count as the process's own.
    """
    kind = np.dtype(dtype)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            np.ascontiguousarray(piece, kind).tofile(file)


def _spikes_in_turn(sorting: Sorting) -> Iterator[slice]:
    """Slices of the spikes; after each, the pages of columns mapped from files are released."""
    columns = [getattr(sorting, spec.name) for spec in fields(sorting) if spec.metadata.get("dims", ())[:1] == ("n",)]
    for rows in _slices(sorting.n_spikes, _SPIKES_AT_ONCE):
        yield rows
        for column in columns:
            release_pages(column)


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, n)) for at in range(0, n, step))
