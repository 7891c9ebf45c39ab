"""What a finished sort leaves behind for people: files, plots and a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ks4stream.errors import CurationWarning, Ks4StreamError
from ks4stream.io.objects import write_file
from ks4stream.io.phy import export_phy
from ks4stream.io.places import ObjectPath, Place, copy_here, copy_there
from ks4stream.io.results_folder import STORE, ResultsFolder, fingerprint
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.store import save_sorting
from ks4stream.messages import warn
from ks4stream.report.log import LOG_NAME, log_inputs, run_log
from ks4stream.results import Sorting

__all__ = ["announce", "finish", "log_inputs", "log_kept", "results_folder", "run_log"]

_log = logging.getLogger(__name__)


@contextmanager
def results_folder(target: Place, files: Collection[str] = ()) -> Iterator[tuple[ResultsFolder, Path]]:
    """Where results are going to be, beside files of the recording, if any, and the folder of this machine that they
    are written to before.

    Raises
    ------
    ResultsError
        If nothing can be written there, before work begins.
    """
    results = ResultsFolder.open(target, files)
    if isinstance(target, Path):
        yield results, target
        return
    with scratch_folder() as folder:
        if results.log_bytes:  # it goes on
            copy_here(target / LOG_NAME, folder)
        yield results, folder


def announce(results: ResultsFolder) -> None:
    """Say before work starts that a curation, or the results of another sorter, are going to be moved."""
    if somebodys := results.somebodys():
        warn(
            f"{results.place} holds results that were curated, or that ks4stream did not write ({_some(somebodys)}). "
            "They will be moved into a numbered folder beside it when new results are written; if the result is the "
            "same as before, nothing is touched.",
            CurationWarning, stacklevel=3,
        )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


@contextmanager
def log_kept(folder: Path, target: Place) -> Iterator[None]:
    """Bring the log where results are to be, however a sort ends; nothing to do where it was written there."""
    try:
        yield
    finally:
        if isinstance(target, ObjectPath):
            with suppress(Ks4StreamError):  # an error that ended the sort is worth more
                write_file(str(target / LOG_NAME), folder / LOG_NAME)


def finish(
    sorting: Sorting, results: ResultsFolder, folder: Path | None = None, *, save_extra_vars: bool = False,
    save_features: bool = True, check: Callable[[], None] = lambda: None,
) -> Place | None:  # fmt: skip
    """Write everything a sorting leaves: the Phy folder, the native store ``sorting.zarr`` and the plots.

    Where the same result was written before, nothing is touched: it may have been curated since. Where another one
    was curated, or is not ours, it is moved into a numbered folder.

    Parameters
    ----------
    sorting : Sorting
        A finished sorting; may be empty.
    results : ResultsFolder
        Where it is to be.
    folder : Path, optional
        Where that is on an object store, a folder of this machine from which files are copied there.
    save_extra_vars : bool, optional
        Also write tF, Wall, full_st, full_clu and full_amp.
    save_features : bool, optional
        Write the features of all spikes, nine tenths of everything.
    check : callable, optional
        Called before anything is moved or replaced; raises if the results are not this run's to write any more.

    Returns
    -------
    Path, ObjectPath or None
        Where somebody's results were moved to, if there were any.

    Raises
    ------
    ResultsError
        If the folder cannot be written to, its disk is full, or the store refuses it; the same call writes all of it
        then.
    """
    from ks4stream.report.plots import write_plots  # matplotlib: only when there is something to draw

    began = time.perf_counter()
    key = fingerprint(sorting, save_extra_vars=save_extra_vars, save_features=save_features)
    if results.holds(key):
        _log.info("%s holds this result already; nothing in it was touched.", results.place)
        return None
    check()
    aside = results.set_aside() if results.somebodys() else None
    if aside is not None:
        warn(f"The earlier results in {results.place} were moved to {aside}.", CurationWarning, stacklevel=3)
    target = results.place if isinstance(results.place, ObjectPath) else None
    folder = Path(str(results.place)) if folder is None else folder
    with results.replacing(key, folder):
        export_phy(sorting, folder, target=target, save_extra_vars=save_extra_vars, save_features=save_features)
        save_sorting(sorting, folder / STORE, features=save_features)
        write_plots(sorting, folder)
        if target is not None:
            check()
            copy_there(folder, target, last=f"{STORE}/.zgroup")
    _log.info(
        "%d units (%d good), %d spikes (%d kept) written to %s in %.1f s",
        sorting.n_units, sorting.refractory.sum(), sorting.n_spikes, sorting.kept.sum(), results.place,
        time.perf_counter() - began,
    )  # fmt: skip
    return aside
