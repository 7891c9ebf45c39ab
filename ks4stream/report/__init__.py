"""What a finished sort leaves for people: files, a page, plots and a log."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ks4stream.errors import CurationWarning, Ks4StreamError, ResultsError
from ks4stream.io.atomic import atomic_write, explain_write_errors
from ks4stream.io.by_unit import ByUnit
from ks4stream.io.kilosort_ops import OPS
from ks4stream.io.objects import Status, status, write_file
from ks4stream.io.phy import PARAMS, export_phy, link, params_text
from ks4stream.io.places import ObjectPath, Place, copy_here, read_whole, size_of
from ks4stream.io.results_folder import (
    EARLY,
    EXTRA,
    FEATURES,
    PAGE,
    PHY,
    PLOTS,
    PREPROCESSED_COPY,
    QUALITY,
    STORE,
    ResultsFolder,
    fingerprint,
)
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.store import map_sorting, save_sorting
from ks4stream.messages import warn
from ks4stream.report.log import LOG_NAME, length_before, log_inputs, run_log
from ks4stream.results import Sorting
from ks4stream.unit_metrics import GROUPED, quality_metrics, write_quality

__all__ = ["announce", "finish", "log_inputs", "log_kept", "results_folder", "rewrite_page", "run_log", "written_early"]

_log = logging.getLogger(__name__)


@contextmanager
def results_folder(target: Place, files: Collection[str] = ()) -> Iterator[tuple[ResultsFolder, Path]]:
    """Open the folder that results will be written to, before work starts.

    Parameters
    ----------
    target : Path or ObjectPath
    files : collection of str, optional
        Locations of the recording's files, which are left alone if they lie there.

    Yields
    ------
    results : ResultsFolder
    folder : Path
        Folder on this machine where the log is written.

    Raises
    ------
    ResultsError
        If nothing can be written there.
    """
    results = ResultsFolder.open(target, files)
    if isinstance(target, Path):
        yield replace(results, log_bytes=length_before(target, results.log_bytes)), target
        return
    with scratch_folder() as folder:
        if results.log_bytes:  # the earlier log is continued
            copy_here(target / LOG_NAME, folder)
        yield results, folder


def announce(results: ResultsFolder) -> None:
    """Warn before work starts that a curation, or the results of another sorter, will be moved."""
    if somebodys := results.somebodys():
        warn(
            f"{results.place} holds results that were curated, or that another sorter or an earlier version of "
            f"ks4stream wrote ({_some(somebodys)}). They will be moved into a numbered folder beside it when new "
            "results are written; if the new results are the same, nothing is touched.",
            CurationWarning,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


@contextmanager
def written_early(target: Path, files: Collection[str] = ()) -> Iterator[Path]:
    """Make a folder for files of results that are not complete yet; at the end they are moved into the results folder.

    They count as written by a sort, so that the results folder is not taken for somebody else's. If a sorting is
    there, whosever it is, nothing of it is touched: they are kept in :data:`EARLY` until :func:`finish` replaces it.

    Parameters
    ----------
    target : Path
    files : collection of str, optional
        Locations of the recording's files.

    Raises
    ------
    ResultsError
        If nothing can be written there.
    """
    results = ResultsFolder(target, files)
    if results.takes_early():
        results = ResultsFolder.open(target, files)
    with explain_write_errors(target), results.draft() as draft:
        yield draft
        names = sorted(entry.name for entry in draft.iterdir())
        where = results.add_early(draft)
    if where == target:
        return
    kept = f"{target} holds a sorting, which stays as it is: {_some(names)} was written to {where}"
    if OPS in names:  # whoever loads it again must know
        warn(f"{kept}. Load it from there, or save it in another folder.", CurationWarning)
    else:
        _log.info("%s until new results replace the sorting.", kept)


@dataclass
class KeptLog:
    """A log that is written on this machine, and its copy in an object store.

    Without the run's lock, the copy is replaced only if it is as this sort found or left it: otherwise it is the log of
    another run.
    """

    here: Path
    copy: ObjectPath | None
    is_lost: bool = False
    known: Status | None = None

    def __post_init__(self) -> None:
        if self.copy is not None:
            self.known = status(str(self.copy))

    @contextmanager
    def owned(self, check: Callable[[], None]) -> Iterator[None]:
        """Copy the log at the end, while the run's lock is still held.

        If `check` raises, the results no longer belong to this run, and nothing is copied from then on.
        """
        try:
            yield
        finally:
            if self.copy is not None:
                self.is_lost = True
                with suppress(Ks4StreamError):  # which must not hide the error that ended the sort
                    check()
                    self._write(self.copy)
                    self.is_lost = False

    def end(self) -> None:
        """Copy the log once more, with its last lines; a run that never held the lock copies it only here."""
        if self.copy is not None and not self.is_lost:
            with suppress(Ks4StreamError):
                if status(str(self.copy)) == self.known:
                    self._write(self.copy)

    def _write(self, copy: ObjectPath) -> None:
        if self.here.exists():
            write_file(str(copy), self.here)
            self.known = status(str(copy))


@contextmanager
def log_kept(folder: Path, target: Place) -> Iterator[KeptLog]:
    """Copy the log to the results when it has ended, however a sort ends; nothing is done if it was written there.

    Enter it before :func:`run_log`, so that the end of the log is copied, too, and :meth:`KeptLog.owned` once the run's
    store is locked: only while it is locked is it known whether the results belong to this run.
    """
    kept = KeptLog(folder / LOG_NAME, target / LOG_NAME if isinstance(target, ObjectPath) else None)
    try:
        yield kept
    finally:
        kept.end()


def finish(
    sorting: Sorting,
    results: ResultsFolder,
    *,
    save_plots: bool = True,
    save_extra_vars: bool = False,
    save_features: bool = True,
    preprocessed: Iterable[tuple[int, NDArray[Any]]] | Path | None = None,
    kept: Collection[str] = (),
    check: Callable[[], None] = lambda: None,
) -> Place | None:
    """Write everything a sorting leaves: the Phy folder, the store ``sorting.zarr``, metrics, the page and plots.

    If the same result was written before, nothing is touched, as it may have been curated since; only files that were
    not requested then are added. If another result is there and was curated, or is not ours, it is moved into a
    numbered folder.

    Parameters
    ----------
    sorting : Sorting
        A finished sorting; may be empty.
    results : ResultsFolder
        Where to write it.
    save_plots : bool, optional
        Also write the plots.
    save_extra_vars : bool, optional
        Also write tF, Wall, full_st, full_clu and full_amp.
    save_features : bool, optional
        Write the features of all spikes, nine tenths of all bytes.
    preprocessed : iterable of (start, traces), or Path, optional
        For a preprocessed copy, or where one was written: see :func:`ks4stream.io.phy.write_preprocessed_copy`.
    kept : collection of str, optional
        Names of files that :func:`written_early` has added or kept, which are added to these results.
    check : callable, optional
        Called before anything is moved or replaced; raises if the results no longer belong to this run.

    Returns
    -------
    Path, ObjectPath or None
        Where results that were curated or not ours were moved to, if there were any.

    Raises
    ------
    ResultsError
        If the folder cannot be written to, its disk is full, or the store refuses it; repeating the call then writes
        everything. If there is no preprocessed copy where one should have been written.
    """
    began, home = time.perf_counter(), results.place
    early = _kept_early(home, kept) if preprocessed is None else _kept_early(home, {*kept, PREPROCESSED_COPY})
    if isinstance(preprocessed, Path):
        preprocessed = early.get(PREPROCESSED_COPY, preprocessed)
    if isinstance(preprocessed, Path) and not preprocessed.is_file():
        raise ResultsError(f"There is no preprocessed copy {preprocessed}; write it before the results.")
    key = fingerprint(sorting)
    wanted = {*PHY, STORE, QUALITY, PAGE, *EXTRA[: len(EXTRA) * save_extra_vars]}
    wanted |= plot_names(sorting) if save_plots else set()
    wanted |= early.keys() | ({PREPROCESSED_COPY} if preprocessed is not None else set())
    missing = results.missing(key, wanted if save_features else wanted - {*FEATURES})
    if missing is not None:
        missing |= {PARAMS, OPS} if PREPROCESSED_COPY in missing or _is_elsewhere(sorting, results) else set()
        missing |= {STORE} if missing & {*FEATURES} else set()
    if missing == set():
        _log.info("%s already holds this result; nothing in it was touched.", home)
        results.drop_early()
        return None
    moved: list[Place] = []
    with explain_write_errors(home), results.draft() as draft:
        export_phy(
            sorting,
            draft,
            home=home,
            save_extra_vars=save_extra_vars,
            save_features=save_features,
            preprocessed=preprocessed if missing is None or PREPROCESSED_COPY in missing else None,
        )
        save_sorting(sorting, draft / STORE, features=save_features)
        if save_plots:
            from ks4stream.report.plots import write_plots  # imports matplotlib

            write_plots(sorting, draft)
        write_page(sorting, draft)
        for name, file in early.items():
            if not (draft / name).exists():
                link(file, draft / name)
        check()
        if missing is None:
            moved = results.replace(draft, key, kept=kept)
        elif kept := results.add(draft, key, missing):
            warn(
                f"{_some(sorted(kept))} in {home} were changed since they were written, and stay as they are. To have "
                "them written again, move them away.",
                CurationWarning,
            )
        results.drop_early()
    for aside in moved:
        warn(f"Earlier results or edits in {home} were moved to {aside}.{_how_to_carry(aside, home)}", CurationWarning)
    _log.info(
        "%d units (%d good), %d spikes (%d kept) written to %s in %.1f s",
        sorting.n_units,
        sorting.good.sum(),
        sorting.n_spikes,
        sorting.kept.sum(),
        home,
        time.perf_counter() - began,
    )
    return moved[0] if moved else None


def write_page(sorting: Sorting, folder: Path, *, compare: tuple[str, Sorting] | None = None) -> Path:
    """Write ``quality.csv`` and ``report.html``, the page to look at when a sort has ended.

    Parameters
    ----------
    sorting : Sorting
        Its features are not needed.
    folder : Path
    compare : (str, Sorting), optional
        Another sorting of the same recording, to compare with, and what it is called.

    Returns
    -------
    Path
        The page: one file that needs no other, and no network.
    """
    import ks4stream.report.page as pages
    from ks4stream.report.comparison import compared
    from ks4stream.report.summary import content

    by_unit = ByUnit(sorting, *GROUPED, folder=folder)
    metrics = quality_metrics(sorting, by_unit)
    write_quality(sorting, metrics, folder)
    shown = content(sorting, by_unit, metrics)
    if compare is not None:
        name, other = compare
        shown["compare"] = compared(sorting, other, name)
    return pages.write_page(shown, folder / PAGE)


def rewrite_page(results: Place, out: Path | None = None, *, compare: Place | None = None) -> Place:
    """Write the page of results again, or of results of a version that wrote none.

    Parameters
    ----------
    results : Path or ObjectPath
        A results folder, or a ``sorting.zarr``.
    out : Path, optional
        Where to write the page; by default into the results folder, with ``quality.csv`` if there is none.
    compare : Path or ObjectPath, optional
        Results of another sort of the same recording, to compare with.

    Returns
    -------
    Path or ObjectPath
        The page.

    Raises
    ------
    ResultsError
        If there is no sorting, they are of different recordings, or the page cannot be written.
    """
    sorting = map_sorting(results)
    other = None if compare is None else (str(compare), map_sorting(compare))
    if out is not None:
        with explain_write_errors(out), scratch_folder() as folder:
            page = write_page(sorting, folder, compare=other)
            with atomic_write(out) as file:
                file.write(page.read_bytes())
        return out
    home = results.parent if results.name == STORE else results
    folder_of_results = ResultsFolder(home)
    with explain_write_errors(home), folder_of_results.draft() as draft:
        write_page(sorting, draft, compare=other)
        if size_of(home / QUALITY) is not None:  # it may have been edited
            (draft / QUALITY).unlink()
        folder_of_results.exchange(draft)
    return home / PAGE


def _how_to_carry(aside: Place, home: Place) -> str:
    """How to get a curation back, if it is of a sorting that was moved as a whole."""
    if size_of(aside / "spike_times.npy") is None:
        return ""
    command = shlex.join(["ks4stream", "carry", str(aside), str(home)])
    return f" To carry labels and merges that were made in Phy over to the new results: {command}"


def _kept_early(home: Place, names: Collection[str]) -> dict[str, Path]:
    """Files with these names that wait for the results."""
    files = {name: home / EARLY / name for name in names} if isinstance(home, Path) else {}
    return {name: file for name, file in files.items() if file.is_file()}


def plot_names(sorting: Sorting) -> set[str]:
    """Names of the plots of a sorting."""
    of_drift = {"drift_amount.png": sorting.drift, "drift_scatter.png": sorting.peaks}
    return {name for name in PLOTS if of_drift.get(name, sorting) is not None}


def _is_elsewhere(sorting: Sorting, results: ResultsFolder) -> bool:
    """Whether the recording was moved after its result was written, and ``params.py`` may be rewritten."""
    params = results.place / PARAMS
    if size_of(results.place / PREPROCESSED_COPY) is not None or size_of(params) is None or results.somebodys():
        return False
    return read_whole(params) != params_text(sorting, results.place).encode()
