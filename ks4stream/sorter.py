"""``sort``: check a recording, sort it with the method of :mod:`ks4stream.pipeline`, and write the results."""

from __future__ import annotations

import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray

from ks4stream import geometry, rates, report
from ks4stream.blanks import given_spans
from ks4stream.deploy import client_for, engine_for
from ks4stream.engine import Engine, Progress, gpus, no_progress, one_thread, tell
from ks4stream.errors import ResultsError
from ks4stream.io import kept_traces
from ks4stream.io.places import ObjectPath, Place, place
from ks4stream.io.recording_cache import cached, ending, forget
from ks4stream.io.run_store import RunStore, open_store
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.store import stored_digest
from ks4stream.messages import recorded
from ks4stream.method import METHOD_VERSION
from ks4stream.motion import given_drift
from ks4stream.pipeline import find_units
from ks4stream.planning import Plan, plan
from ks4stream.quality import check_traces
from ks4stream.recording import Recording
from ks4stream.report.log import version_of
from ks4stream.resources import Resources
from ks4stream.results import Drift, Provenance, Sorting
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.stages.needs import Load, kept_bytes
from ks4stream.stages.preprocessing import Preprocessor, dead_channels, tiling_of
from ks4stream.timing import measured

if TYPE_CHECKING:
    import xarray

logger = logging.getLogger("ks4stream")


def sort(
    recording: Recording,
    settings: Settings | None = None,
    *,
    results_dir: str | os.PathLike[str] | ObjectPath | None = None,
    resources: Resources | None = None,
    progress: Progress | bool | None = None,
    resume: bool = True,
    keep_run: bool = True,
    save_plots: bool = False,
    save_extra_vars: bool = False,
    save_features: bool = True,
    save_preprocessed_copy: bool = False,
    drift: Drift | xarray.DataArray | Any | None = None,
    blank: ArrayLike | str | os.PathLike[str] | None = None,
    **of_resources: Any,
) -> Sorting:
    """Sort a recording into units.

    Parameters
    ----------
    recording : Recording
        From :func:`ks4stream.open_recording`, with a probe.
    settings : Settings, optional
        Everything that changes the result; without it, the defaults.
    results_dir : path, optional
        Folder for the Phy files, ``report.html`` and ``sorting.zarr``, or an address in an object store
        (``s3://bucket/key``); None writes nothing.
    resources : Resources, optional
        Where to compute, which never changes the result; by default the active Dask client, otherwise the cores and
        GPUs of this machine.
    progress : bool or callable, optional
        True shows the stages on the terminal (stderr) or in the notebook, with the time left, speed, spikes and memory.
        A callable is called as ``progress(stage, done, total)``; total is without tasks that an earlier run finished,
        and may be 0. By default nothing is shown.
    resume : bool
        Continue where an earlier run into `results_dir` stopped: tasks that it finished on the same recording, with the
        same settings for their stage, are not computed again. False starts over. Recordings in files and Zarr arrays,
        and arrays in memory of up to 256 MB, are recognised; all others are always sorted from the start.
    keep_run : bool
        Keep the results of the tasks in ``run`` in the results folder when the sort is finished: a sort with a changed
        setting then computes only the stages that the setting affects. They take about twice as much space as the
        results.
    save_plots : bool
        Also write Kilosort4's plots, as PNG; the page ``report.html`` shows the same and more.
    save_extra_vars : bool
        Also write Kilosort4's extra files.
    save_features : bool
        Write the features of all spikes into the results folder. They are most of the results of a long recording, and
        only Phy's feature view and later analyses of features need them.
    save_preprocessed_copy : bool
        Also write the whitened, drift-corrected traces to ``temp_wh.dat`` in the results folder, and let Phy show
        those.
    drift : Drift, xarray.DataArray or spikeinterface.core.Motion, optional
        Corrected in place of an estimate, whatever ``nblocks`` is: that of another sorting of the same batches
        (``sorting.drift``), or the tissue's displacement in µm, positive towards larger depth. A DataArray has dims
        ``time`` (coordinate in seconds from the recording's first sample) and ``depth`` (in µm); one depth stands for
        all.
    blank : array_like, shape (n,) or (n, 2), or path, optional
        Artifacts whose times are known, such as the pulses of a stimulator: starts of pulses, of 1 ms each, or starts
        and stops. Integers are samples, floats are seconds, both from the recording's first sample. A text file has
        one or two numbers per line. They are blanked from the start to the stop.
    **of_resources
        Any field of :class:`~ks4stream.Resources`: ``sort(recording, workers=4)``.

    Returns
    -------
    Sorting
        Possibly without units; a warning then says why.

    Raises
    ------
    RecordingError, ProbeError, SettingsError, ResultsError, WorkerError
        Before work starts, if the input cannot be sorted, the results cannot be written or a worker cannot compute.
    MachineError
        Before work starts, if a batch needs more memory than a worker or GPU has, or the disk is full.
    ResultsError
        At any time, if the disk is full or a write is refused; finished tasks are kept.
    """
    began = time.perf_counter()
    recording, settings = Recording.given(recording), Settings.given(settings)
    resources = Resources.given(resources, of_resources)
    client = client_for(resources)
    is_here = client in (None, "loop")  # otherwise workers may be those of other machines
    device = gpus.chosen(resources.device, here=is_here)
    # Each of these is closed after those below it: the log records everything, the cache exists as long as something
    # reads from it, and the run's lock is held until no worker writes any more.
    with recorded() as warned, ExitStack() as stack:
        if progress is True:
            from ks4stream.report.progress import shown_progress

            progress = stack.enter_context(shown_progress())
        progress = progress or no_progress
        if results_dir is not None:
            results_dir = place(results_dir)
            results, folder = stack.enter_context(report.results_folder(results_dir, recording.files))
            log = stack.enter_context(report.log_kept(folder, results_dir))
            stack.enter_context(report.run_log(folder))
            of_drift = {} if drift is None else {"drift": f"given as {type(drift).__name__}"}
            report.log_inputs(recording, settings, device=device, **of_drift)
            report.announce(results)
        given = recording
        recording = stack.enter_context(cached(recording, resources.cache_dir, resources.cache_bytes))
        tiles = prepare(recording, settings, device=device, blank=blank)
        found = None if drift is None else given_drift(drift, tiles)
        provenance, flat_files = provenance_of(tiles), recording.source.flat_files
        if results_dir is not None and resume and not results.somebodys():  # what is somebody's is moved
            _refuse_results_of_another(results_dir, provenance)
        run = stack.enter_context(
            started(tiles, settings, resources, results_dir, client=client, fresh=not resume, progress=progress)
        )
        if results_dir is not None:
            stack.enter_context(log.owned(run.store.check))
        expected = check_plan(recording, settings, resources, device, run.engine, results_dir).time
        tell(progress, expected_s=expected.per_pass_s if expected and is_here else {})
        sorting = run.retry_damaged(partial(find_units, run, tiles, settings, found))
        sorting = replace(sorting, warnings=tuple(warned), provenance=provenance, flat_files=flat_files)
        found_at, has_written = time.perf_counter(), False

        def check() -> None:
            """Called only if results are written, not if they were there before."""
            nonlocal has_written
            run.store.check()
            has_written = True

        if results_dir is not None:
            progress("results", 0, 1)
            report.finish(
                sorting,
                results,
                save_plots=save_plots,
                save_extra_vars=save_extra_vars,
                save_features=save_features,
                check=check,
                preprocessed=_preprocessed(tiles, sorting) if save_preprocessed_copy else None,
            )
            sorting = replace(sorting, warnings=tuple(warned))  # now also with where somebody's results were moved to
            run.store.tidy(keep=keep_run)
            progress("results", 1, 1)
        if is_here:
            is_usual = save_features and not (save_plots or save_extra_vars or save_preprocessed_copy)
            results_s = time.perf_counter() - found_at if has_written and is_usual else None
            load = Load(given, settings, tiles.tiling, device, 0.0, resources.block_batches)
            if one := measured(load, run, sorting, found_s=found_at - began, results_s=results_s):
                rates.keep(one)
        if caches := ending(recording, given):
            run.engine.run_on_workers(partial(forget, caches))
    return sorting


def _refuse_results_of_another(results_dir: Place, provenance: Provenance) -> None:
    """The store of tasks tells another recording, too, but it may have been deleted."""
    stored = stored_digest(results_dir)
    if stored and provenance.digest_is_exact and stored != provenance.recording_digest:
        raise ResultsError(
            f"The results in {results_dir} belong to another recording (or its file has changed since). Choose another "
            "results_dir, or replace them with resume=False (--fresh)."
        )


@contextmanager
def started(
    tiles: Preprocessor,
    settings: Settings,
    resources: Resources,
    results_dir: Place | None,
    *,
    client: Any = ...,
    fresh: bool = False,
    token: str = "",
    progress: Progress = no_progress,
    keep_traces: bool = True,
) -> Iterator[Run]:
    """A run in which steps can be computed, as long as it is entered: its store is locked, and its workers are there.

    `client` is what :func:`client_for` returned when the device was chosen (by default it is called now); `token` is
    that of :func:`run_store`. With `keep_traces`, filtered traces are kept on disk if they are few.

    Raises
    ------
    ResultsError
        If another run is using the store.
    WorkerError
        If a worker cannot compute.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        store = stack.enter_context(run_store(tiles, results_dir, fresh=fresh, token=token))
        n_bytes = kept_bytes(tiles.tiling, tiles.probe.n_channels, tiles.device)
        if keep_traces and n_bytes:
            kept_traces.make_folder(store.folder, n_bytes)
        client = client_for(resources) if client is ... else client
        engine = engine_for(tiles.recording, settings, resources, tiles.device, progress, client=client)
        yield Run(
            stack.enter_context(engine),
            store,
            tiles.sampling_rate_hz,
            resources.block_batches,
            resources.clear_cache,
            progress,
        )


def prepare(
    recording: Recording,
    settings: Settings,
    *,
    device: str = "cpu",
    blank: ArrayLike | str | os.PathLike[str] | None = None,
) -> Preprocessor:
    """Check that recording, probe and settings fit each other, before work starts.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
    """
    tiling = tiling_of(recording, settings)
    rate = recording.sampling_rate_hz
    spans = given_spans([] if blank is None else blank, n_samples=recording.n_samples, sampling_rate_hz=rate)
    tiles = Preprocessor(recording, tiling, settings, device=device, blank=spans)
    tiles.probe.check_file(recording.n_channels)
    constant = check_traces(recording, scale=settings.scale, start=tiling.start, stop=tiling.stop)
    dead = dead_channels(recording, tiles.probe, constant)
    if settings.do_CAR and not geometry.reference_groups(tiles.probe, dead):
        logger.info("There is no common reference: the median of so few channels has much of their spikes")
    return replace(tiles, dead=dead)


def check_plan(
    recording: Recording,
    settings: Settings,
    resources: Resources,
    device: str,
    engine: Engine,
    results_dir: Place | None,
) -> Plan:
    """Warn of what may not fit, or raise a MachineError if something certainly does not."""
    gpu = engine.gpu_memory
    planned = plan(
        recording,
        settings,
        n_workers=engine.n_workers,
        results_dir=results_dir or tempfile.gettempdir(),
        worker_memory_bytes=engine.worker_memory_bytes,
        resources=replace(resources, client=None, device=device),
        gpu_memory_bytes=gpu.n_bytes if gpu else math.inf,
        workers_per_gpu=gpu.n_workers if gpu else 1,
    )
    planned.check()
    return planned


def provenance_of(tiles: Preprocessor) -> Provenance:
    """What is sorted and with which versions, as of the start of the sort."""
    recording = tiles.recording
    return Provenance(
        ks4stream=version_of("ks4stream"),
        torch=str(torch.__version__),
        numpy=np.__version__,
        scipy=scipy.__version__,
        method=METHOD_VERSION,
        device=torch.device(tiles.device).type,
        recording=recording.name,
        recording_digest=recording.digest(),
        digest_is_exact=recording.source.digest_is_exact,
        python=platform.python_version(),
    )


@contextmanager
def run_store(
    tiles: Preprocessor, results_dir: str | os.PathLike[str] | ObjectPath | None, *, fresh: bool, token: str = ""
) -> Iterator[RunStore]:
    """The store for what a run's tasks find: in the results folder, or else in a temporary one.

    If the digest of the recording is not exact, what an earlier sort found is not used, as it may not have been the
    same recording, unless a caller who knows that it was gives the same `token`.
    """
    with ExitStack() as stack:
        folder = place(results_dir or stack.enter_context(scratch_folder()))
        data = f"{tiles.recording.digest()}{token}" if results_dir else ""
        recall = bool(token) or tiles.recording.source.digest_is_exact
        yield stack.enter_context(open_store(folder / "run", data=data, fresh=fresh, recall=recall))


def _preprocessed(tiles: Preprocessor, sorting: Sorting) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Whitened and drift-corrected traces, batch by batch: first sample and (time, channel)."""
    # The workers of a client may have had a GPU that this process lacks.
    device = tiles.device if gpus.visible(tiles.device) else "cpu"
    tiles = replace(tiles, device=device, whitening=sorting.whitening)
    if sorting.drift is not None:
        tiles = tiles.with_drift(sorting.drift, sorting.settings)
    for tile in tiles.tiling:
        traces, _ = tiles.whitened(tile)
        yield tile.start, traces[:, tiles.core(tile)].T.cpu().numpy()
