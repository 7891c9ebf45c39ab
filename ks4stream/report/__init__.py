"""What a finished sort leaves behind for people: files, plots and a log."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ks4stream.errors import Ks4StreamError
from ks4stream.io.objects import write_bytes, write_file
from ks4stream.io.phy import check_writable, export_phy
from ks4stream.io.places import ObjectPath, Place, below, copy_here, copy_there, remove, size_of
from ks4stream.io.records import writing_to
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.store import save_sorting
from ks4stream.report.log import LOG_NAME, log_inputs, run_log
from ks4stream.results import Sorting

__all__ = ["check_writable", "finish", "log_inputs", "log_kept", "results_folder", "run_log"]

_log = logging.getLogger(__name__)


@contextmanager
def results_folder(target: Place) -> Iterator[Path]:
    """The folder of this machine that results are written to: the target, or one that is copied there in the end.

    Raises
    ------
    ResultsError
        If nothing can be written there, before work begins.
    """
    if isinstance(target, Path):
        yield check_writable(target)
        return
    trial = target / ".ks4stream"
    write_bytes(str(trial), b"")
    remove(trial)
    with scratch_folder() as folder:
        if size_of(target / LOG_NAME) is not None:  # it goes on
            copy_here(target / LOG_NAME, folder)
        yield folder


@contextmanager
def log_kept(folder: Path, target: Place) -> Iterator[None]:
    """Bring the log where results are to be, however a sort ends; nothing to do where it was written there."""
    try:
        yield
    finally:
        if isinstance(target, ObjectPath):
            with suppress(Ks4StreamError):  # an error that ended the sort is worth more
                write_file(str(target / LOG_NAME), folder / LOG_NAME)


def _publish(folder: Path, target: ObjectPath) -> None:
    """Bring results where they are to be, in place of earlier ones; ``sorting.zarr`` can be read when it is complete.

    Raises
    ------
    ResultsError
        If the store refuses it; the same call again does all of it again.
    """
    remove(target / "sorting.zarr" / ".zgroup")
    remove(target / "sorting.zarr", folder=True)
    for name, is_folder in below(target):
        if not is_folder and name.endswith((".npy", ".tsv", ".png")) and not (folder / name).exists():
            remove(target / name)
    copy_there(folder, target, last="sorting.zarr/.zgroup")


def finish(
    sorting: Sorting, results_dir: str | os.PathLike[str], *, target: ObjectPath | None = None,
    save_extra_vars: bool = False, save_features: bool = True, check: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Write everything a sorting leaves: the Phy folder, the native store ``sorting.zarr`` and the plots.

    Parameters
    ----------
    sorting : Sorting
        A finished sorting; may be empty.
    results_dir : path
        Results folder; made if need be, an earlier sorting in it is replaced.
    target : ObjectPath, optional
        Where the folder's files are copied then, in place of earlier ones; ``params.py`` has absolute paths, as those
        from this folder would mean nothing there.
    save_extra_vars : bool, optional
        Also write tF, Wall, full_st, full_clu and full_amp.
    save_features : bool, optional
        Write the features of all spikes, nine tenths of everything.
    check : callable, optional
        Called before anything is copied to the target; raises if that is not this run's any more.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ResultsError
        If the folder cannot be written to, its disk is full, or the store refuses it; the same call again does all of
        it again.
    """
    from ks4stream.report.plots import write_plots  # matplotlib: only when there is something to draw

    began = time.perf_counter()
    folder = Path(results_dir)
    with writing_to(folder):
        export_phy(
            sorting, folder, relative_paths=target is None, save_extra_vars=save_extra_vars, save_features=save_features
        )
        save_sorting(sorting, folder / "sorting.zarr", features=save_features)
        write_plots(sorting, folder)
    if target is not None:
        check()
        _publish(folder, target)
    _log.info(
        "%d units (%d good), %d spikes (%d kept) written to %s in %.1f s",
        sorting.n_units, sorting.refractory.sum(), sorting.n_spikes, sorting.kept.sum(), target or folder,
        time.perf_counter() - began,
    )  # fmt: skip
    return folder
