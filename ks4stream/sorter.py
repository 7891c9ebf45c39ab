"""A sort, from the first sample to the last unit: the line of stages, readable as a methods section."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile, tiles_per_task
from ks4stream.engine import Engine, Loop, Progress, give_back_memory, gpus, no_progress, one_thread
from ks4stream.errors import DamagedFileError, FewSpikesWarning, MachineWarning, SettingsError
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.mapped import ColumnWriter
from ks4stream.io.places import ObjectPath, place, remove
from ks4stream.io.records import key_of
from ks4stream.io.run_store import METHOD_VERSION, Checkpointed, RunStore, open_store
from ks4stream.io.scratch import scratch_folder
from ks4stream.io.tables import Receipt, localize
from ks4stream.io.tile_cache import CachedSource, cached, ending, forget
from ks4stream.kernels import templates as template_kernels
from ks4stream.kernels.borders import Reported
from ks4stream.messages import recorded, warn
from ks4stream.planning import PROCESSES_FROM_CHANNEL_S, local_workers, plan, repays
from ks4stream.quality import check_traces
from ks4stream.recording import Recording
from ks4stream.results import Drift, PeakSample, Provenance, Sorting, Templates, Waveforms, Whitening
from ks4stream.settings import Settings
from ks4stream.stages import detection, drift, joining, matching, preprocessing, templates, units, waveforms, whitening
from ks4stream.stages.preprocessing import Preprocessor

logger = logging.getLogger("ks4stream")

FEW_SPIKES = 1000


def sort(
    recording: Recording,
    settings: Settings | None = None,
    *,
    results_dir: str | os.PathLike[str] | ObjectPath | None = None,
    client: Any = None,
    workers: int | None = None,
    block_batches: int | None = None,
    do_CAR: bool | None = None,
    invert_sign: bool | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    save_extra_vars: bool = False,
    save_features: bool = True,
    save_preprocessed_copy: bool = False,
    resume: bool = True,
    keep_run: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Sorting:
    """Sort a recording into units.

    Parameters
    ----------
    recording : Recording
        From :func:`ks4stream.open_recording`, with a probe.
    settings : Settings, optional
    results_dir : path, optional
        Folder for the Phy files, plots and the native store, or an address in an object store
        (``s3://bucket/key``); None writes nothing.
    client : distributed.Client or str, optional
        Where to compute, or the address of the scheduler ("tcp://host:8786"); by default the client that is active, as
        for Dask's own functions, and where there is none the cores and GPUs of this machine. The string "loop" computes
        in this thread, one task after the other.
    workers : int, optional
        How many of this machine's workers compute, whether or not a client is active; by default one for each GPU (of
        long recordings up to four), or else for each core, as memory allows. Results do not depend on it.
    block_batches : int, optional
        Batches per task; by default a minute of recording, or less where that would make fewer than 32 tasks. Never a
        matter of results, but another number finds none of the blocks an earlier run finished.
    do_CAR, invert_sign : bool, optional
        In place of those of the settings.
    device : str or torch.device, optional
        Where kernels run: "cpu", "cuda" or "cuda:1"; by default the GPU if this process sees one.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.
    resume : bool
        Go on where an earlier run into `results_dir` stopped: what it finished, of the same recording and with the
        same settings as far as they matter, is not computed again. False begins anew. Only of files, Zarr and
        arrays up to 256 MB it is known that they are the same; others are always sorted anew.
    keep_run : bool
        Keep what the tasks of this sort found, in the results folder's ``run``, when results are written: another
        setting then redoes only the stages it touches. It takes about twice as much space as the results.
    cache_dir : path, optional
        Where the recording is kept, compressed, on each machine that computes: by default in the temporary folder
        while it is sorted if it lies on an object store, and not at all otherwise; "off" fetches it anew in every
        pass. See :func:`ks4stream.io.tile_cache.cached`.
    cache_bytes : int, optional
        What that may take on the disk of a machine; by default half of what is free.
    save_extra_vars : bool
        Write Kilosort4's extra files too.
    save_features : bool
        Write the features of all spikes into the results folder: of long recordings nine tenths of everything, and
        only Phy's feature view and what works with features again needs them.
    save_preprocessed_copy : bool
        Also write the whitened, drift-corrected traces to ``temp_wh.dat`` in the results folder, and let Phy show
        those.

    Returns
    -------
    Sorting
        Possibly without units; a warning then says why.

    Raises
    ------
    RecordingError, ProbeError, SettingsError, ResultsError, WorkerError
        Before work starts, if the input cannot be sorted, the results not be written or a worker not compute.
    MachineError
        Before work starts, if a batch needs more memory than a worker or GPU has, or the disk is full.
    ResultsError
        At any time, if the disk is full or a write is refused; what was finished stays usable.
    """
    from ks4stream import report

    if client is not None and workers is not None:
        raise SettingsError(f"workers={workers} was given with a client, which brings its own. Leave one of them out.")
    progress = progress or no_progress
    settings = (settings or Settings()).for_recording(recording).given(do_CAR=do_CAR, invert_sign=invert_sign)
    client = client_for(client, workers)
    device_given, device = device is not None, gpus.chosen(device, here=client in (None, "loop"))
    with recorded() as said, ExitStack() as stack:
        if results_dir is not None:
            results_dir = place(results_dir)
            results, folder = stack.enter_context(report.results_folder(results_dir, recording.files))
            stack.enter_context(report.run_log(folder))
            report.log_inputs(recording, settings, device=device)
            report.announce(results)
        given, recording = recording, stack.enter_context(cached(recording, cache_dir, cache_bytes))
        source = prepare(recording, settings, device=device)
        origin = _origin(source)
        stack.enter_context(one_thread())
        store = stack.enter_context(run_store(source, results_dir, fresh=not resume))
        if results_dir is not None:
            stack.enter_context(report.log_kept(folder, results_dir, store.check))
        engine = stack.enter_context(engine_for(source, client, workers, progress, device_given=device_given))
        gpu = engine.gpu_memory
        plan(
            recording,
            settings,
            n_workers=engine.n_workers,
            results_dir=results_dir or tempfile.gettempdir(),
            worker_memory_bytes=engine.worker_memory_bytes,
            block_batches=block_batches,
            device=device,
            gpu_memory_bytes=gpu.n_bytes if gpu else math.inf,
            workers_per_gpu=gpu.n_workers if gpu else 1,
        ).check()
        run = SortRun(source, engine, store, block_batches, progress)
        sorting = replace(run.run(), warnings=tuple(said), **origin)
        if results_dir is not None:
            progress("results", 0, 1)
            report.finish(
                sorting,
                results,
                save_extra_vars=save_extra_vars,
                save_features=save_features,
                check=store.check,
                preprocessed=_preprocessed(source, sorting) if save_preprocessed_copy else None,
            )
            sorting = replace(sorting, warnings=tuple(said))  # with where somebody's results were moved to
            store.tidy(keep=keep_run)
            progress("results", 1, 1)
        if caches := ending(recording, given):
            engine.everywhere(partial(forget, caches))
    return sorting


def _preprocessed(source: Preprocessor, sorting: Sorting) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Whitened and drift-corrected traces, batch by batch: first sample and (time, channel)."""
    device = source.device if gpus.visible(source.device) else "cpu"  # of a client without GPU only the workers had one
    source = replace(source, device=device).with_results(whitening=sorting.whitening, drift=sorting.drift)
    for tile in source.tiling:
        traces, _ = source.whitened(tile)
        yield tile.start, traces[:, source.core(tile)].T.cpu().numpy()


def client_for(client: Any, workers: int | None = None) -> Any:
    """The client that was given, or else the active one, unless workers of this machine are wanted."""
    if client is not None or workers is not None or "distributed" not in sys.modules:  # nobody has made one
        return client
    from ks4stream.engine import cluster

    return cluster.active_client()


def forget_on_workers(client: Any, caches: list[CachedSource]) -> None:
    """Have a client's workers, or those of the scheduler at an address, remove from their machines what caches keep."""
    from ks4stream.engine import cluster

    with ExitStack() as stack:
        if isinstance(client, str):
            client = stack.enter_context(cluster.connected(client))
        cluster.Cluster(client).everywhere(partial(forget, caches))


def _origin(source: Preprocessor) -> dict[str, Any]:
    """What is sorted, where it lies and by which versions, as it is when the sort begins."""
    from ks4stream.report.log import version_of

    recording = source.recording
    provenance = Provenance(
        ks4stream=version_of("ks4stream"),
        torch=str(torch.__version__),
        numpy=np.__version__,
        scipy=scipy.__version__,
        method=METHOD_VERSION,
        device=torch.device(source.device).type,
        recording=recording.name,
        recording_digest=recording.digest(),
        digest_is_exact=recording.source.digest_is_exact,
    )
    return {"provenance": provenance, "flat_files": recording.source.flat_files}


def prepare(recording: Recording, settings: Settings, *, device: str = "cpu") -> Preprocessor:
    """Check recording, probe and settings against each other, before work starts.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
    """
    tiling = preprocessing.tiling_of(recording, settings)
    source = Preprocessor(recording, tiling, settings, device=device)
    source.probe.check_file(recording.n_channels)
    still = check_traces(recording, scale=settings.scale, start=tiling.start, stop=tiling.stop)
    dead = preprocessing.dead_channels(recording, source.probe, still)
    return replace(source, dead=dead)


RECORDED = (matching.Matched, matching.Edge, Reported, templates.RegionTemplates, units.RegionUnits)
"""What tasks return, beside arrays and receipts."""

WRITERS = (templates.PeakWriter, matching.SpikeMatcher, units.RegionSorter)
"""Functions that write files, into their `folder`."""

_TRACES = ("recording", "preprocessing", "sig_interp")
MATTERS = {
    "whitening": (*_TRACES, "whitening"),
    "waveforms": (*_TRACES, "waveforms"),
    "detection": (*_TRACES, "waveforms", "detection"),
    "first clustering": ("clustering",),
    "matching": (*_TRACES, "waveforms", "detection", "matching"),
    "final clustering": ("clustering",),
}
"""By stage, the settings its tasks read, by their own name or that of the stage that first reads them. What earlier
stages found is part of what a task depends on, so that their settings need not be named again."""


@dataclass
class SortRun:
    """One run: what it reads, where it computes, and the time each stage took."""

    source: Preprocessor
    engine: Engine
    store: RunStore
    block_batches: int | None
    progress: Progress = no_progress
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> Sorting:
        """Sort; where a file turns out to be damaged, its block is computed again and the rest is recalled."""
        damaged: set[str] = set()
        while True:
            try:
                return self._run()
            except DamagedFileError as error:
                if error.path in damaged:  # for the second time: no chance
                    raise
                damaged.add(error.path)
                logger.warning("%s It is computed anew.", error)
                with explain_write_errors(self.store.folder):
                    remove(place(error.path))

    def _run(self) -> Sorting:
        """The methods section."""
        source, settings = self.source, self.source.settings
        noise = self.learn_whitening(source)
        source = source.with_results(whitening=noise)
        centres = geometry.template_centres(source.probe, settings, noise.dead)
        regions = geometry.clustering_regions(centres, settings)
        logger.info("%d template centres, %d regions", len(centres), len(regions))

        shapes = self.learn_waveforms(source)
        peaks = self.detect(source, centres, regions, shapes)
        moved, plotted = None, None
        if settings.nblocks > 0:
            with self._here("drift"):
                moved, plotted = drift.combine(source, peaks, scratch=self.store.scratch)
            if np.any(moved.shift_um):
                source = source.with_results(drift=moved)
                shapes = self.learn_waveforms(source)
                peaks = self.detect(source, centres, regions, shapes)

        learned = self.learn_templates(source, centres, regions, shapes, peaks)
        matches, template_channels = self.match(source, shapes, learned, regions)
        found = self.sort_regions(source, shapes, learned, regions, matches, template_channels)
        return self.finish(source, shapes, moved, plotted, template_channels, matches, found)

    def learn_whitening(self, source: Preprocessor) -> Whitening:
        """Section 1.4."""
        with self._timed("whitening"):
            chosen = source.tiling.evenly(source.settings.nskip)
            parts = self._map(whitening.Covariances(source), self._blocks(chosen), "whitening")
            return whitening.combine(source, parts)

    def learn_waveforms(self, source: Preprocessor) -> Waveforms:
        """Section 2; fewer than a thousand snippets: all batches, then a lower threshold."""
        settings = source.settings
        with self._timed("waveforms"):
            if not settings.templates_from_data:
                return waveforms.shipped(settings, source.recording.sampling_rate_hz)
            everything = list(range(len(source.tiling)))
            some = source.tiling.evenly(waveforms.EVERY_BATCH)
            tries = [(settings.Th_single_ch, some)] if len(some) < len(everything) else []
            tries += [(threshold, everything) for threshold in waveforms.thresholds(settings)]
            for threshold, chosen in tries:
                most = -(-waveforms.MOST_SNIPPETS // len(chosen))
                parts = list(self._map(waveforms.Snippets(source, threshold, most), self._blocks(chosen), "waveforms"))
                n_snippets = sum(len(one) for part in parts for one in part)
                if n_snippets >= waveforms.FEWEST_SNIPPETS:
                    break
            learned = waveforms.combine(settings, parts, threshold=threshold)
            if learned is None:
                waveforms.warn_of_few(n_snippets, threshold, "the waveforms shipped with ks4stream are used instead")
                return waveforms.shipped(settings, source.recording.sampling_rate_hz)
            if n_snippets < waveforms.FEWEST_SNIPPETS:
                waveforms.warn_of_few(n_snippets, threshold, "they were learned from those")
            return learned

    def detect(
        self, source: Preprocessor, centres: geometry.Centres, regions: geometry.Regions, shapes: Waveforms
    ) -> list[Receipt]:
        """Section 3: a full pass; peaks and their features go to disk, by region."""
        with self._timed("detection"):
            writer = templates.PeakWriter(detection.Detector(source, centres, shapes), regions)
            return list(self._map(writer, self._blocks(), "detection"))

    def learn_templates(
        self,
        source: Preprocessor,
        centres: geometry.Centres,
        regions: geometry.Regions,
        shapes: Waveforms,
        peaks: list[Receipt],
    ) -> Templates:
        """Section 5: cluster each region's peaks; the means of the clusters are templates."""
        with self._timed("first clustering"):
            sizes = _sizes(peaks)
            clusterer = templates.RegionClusterer(
                peaks, centres.channels, regions.of_centre, source.probe.n_channels, source.settings, source.device
            )
            occupied = np.flatnonzero(sizes).tolist()
            found = list(self._map(clusterer, occupied, "first clustering", sizes[occupied]))
            if not found:
                return Templates(np.zeros((0, source.probe.n_channels, source.settings.n_pcs)), np.zeros(0))
            learned = templates.combine(found, shapes.components, shapes.shapes, fewest=self._fewest())
            logger.info("%d peaks, %d learned templates", sizes.sum(), len(learned.features))
            return learned

    def match(
        self, source: Preprocessor, shapes: Waveforms, learned: Templates, regions: geometry.Regions
    ) -> tuple[matching.Matches | None, NDArray[np.int64]]:
        """Section 8: all spikes, and the channels of the features of each template's."""
        region_of = units.template_regions(learned.features, source.probe, regions)
        matcher = matching.SpikeMatcher(source, shapes, learned, region_of, len(regions))
        template_channels = matcher.template_channels
        if not len(learned.features):
            return None, template_channels
        with self._timed("matching"):
            matches = matching.combine(source, self._map(matcher, self._blocks(), "matching"))
            blanked_s = np.diff(matches.artifacts).sum() / source.recording.sampling_rate_hz
            logger.info("%d artifacts were blanked, %.2f s in all", len(matches.artifacts), blanked_s)
        return matches, template_channels

    def sort_regions(
        self,
        source: Preprocessor,
        shapes: Waveforms,
        learned: Templates,
        regions: geometry.Regions,
        matches: matching.Matches | None,
        template_channels: NDArray[np.int64],
    ) -> units.Units | None:
        """Section 9: each region's spikes clustered into units, and these merged."""
        if matches is None:
            return None
        probe, settings, rate = source.probe, source.settings, source.recording.sampling_rate_hz
        with self._timed("final clustering"):
            sizes = _sizes(matches.receipts)
            occupied = np.flatnonzero(sizes).tolist()
            region_of = units.template_regions(learned.features, probe, regions)
            sorter = units.RegionSorter(
                matches, template_channels, region_of, probe.n_channels, rate, settings, source.device
            )
            found = list(self._map(sorter, occupied, "final clustering", sizes[occupied]))
        with self._here("merging"):
            scratch = self.store.scratch
            found = [region._replace(receipt=localize(region.receipt, scratch)) for region in found]
            return units.combine(found, shapes, settings, rate, self._fewest(), scratch=scratch) if found else None

    def finish(
        self,
        source: Preprocessor,
        shapes: Waveforms,
        moved: Drift | None,
        peaks: PeakSample | None,
        template_channels: NDArray[np.int64],
        matches: matching.Matches | None,
        found: units.Units | None,
    ) -> Sorting:
        """Section 10: all spikes in order of time, where they were, and what is known of their units."""
        settings, probe, recording = source.settings, source.probe, source.recording
        columns = ColumnWriter(self.store.scratch / uuid4().hex)
        with self._here("joining"):
            columns.append(_no_spikes(source, template_channels))
            if matches is not None and found is not None:
                for part in joining.in_order(found, matches, shapes, template_channels, probe, settings.position_limit):
                    columns.append(part)
        unit_features = found.features if found else np.zeros((0, probe.n_channels, settings.n_pcs), np.float32)
        similarity = np.zeros((0, 0), np.float32)
        if len(unit_features):
            components = torch.from_numpy(shapes.components)
            similarity = template_kernels.similarity(torch.from_numpy(unit_features), components).value.numpy()
        spikes: dict[str, Any] = columns.arrays()
        sorting = Sorting(
            **spikes,
            template_channels=template_channels,
            unit_features=unit_features,
            similarity=similarity,
            refractory=found.refractory if found else np.zeros(0),
            settings=settings,
            contamination=found.contamination if found else np.zeros(0),
            sampling_rate_hz=recording.sampling_rate_hz,
            probe=probe,
            whitening=source.whitening,
            waveforms=shapes,
            drift=moved,
            peaks=peaks,
            n_samples=recording.n_samples,
            files=recording.files,
            dtype=recording.dtype.name,
            n_chan_file=recording.n_channels,
            seconds=dict(self.seconds),
            tiling=source.tiling,
            artifacts=matches.artifacts if matches else np.zeros((0, 2), np.int64),
        )
        if sorting.n_spikes < FEW_SPIKES or sorting.n_units < 2:
            warn(
                f"Only {sorting.n_spikes} spikes in {sorting.n_units} units were found. If more were to be expected, "
                "check the probe's units (µm), the channel map, dtype and n_chan, or lower Th_universal and "
                "Th_learned.",
                FewSpikesWarning,
                stacklevel=5,
            )
        return sorting

    def _fewest(self) -> int:
        tiling = self.source.tiling
        return units.fewest_spikes(tiling.n_tiles * tiling.size, self.source.recording.sampling_rate_hz)

    def _blocks(self, indices: Sequence[int] | None = None) -> list[tuple[Tile, ...]]:
        """Batches by task; cut alike on any machine, so that a run finds its blocks again wherever it goes on."""
        tiling = self.source.tiling
        n_tiles = len(tiling) if indices is None else len(indices)
        rate = self.source.recording.sampling_rate_hz
        return tiling.blocks(self.block_batches or tiles_per_task(tiling, n_tiles, rate), indices)

    def _map(
        self, function: Callable[[Any], Any], items: Sequence[Any], stage: str, priority: Any = ()
    ) -> Iterator[Any]:
        """Results in order: those of an earlier run from the store, the others computed and kept there."""
        store = self.store.stage(stage, key_of(function, METHOD_VERSION, torch.__version__, stages=MATTERS[stage]))
        if isinstance(function, WRITERS):
            function = replace(function, folder=store.folder)
        known = store.recall(items)
        if known:
            logger.info("%s: %d of %d tasks were finished before", stage, len(known), len(items))
        missing = [index for index in range(len(items)) if index not in known]
        fresh = self.engine.map(
            Checkpointed(function, store),
            [items[index] for index in missing],
            stage=stage,
            priority=[priority[index] for index in missing] if len(priority) else (),
        )
        for index in range(len(items)):
            yield known.pop(index) if index in known else next(fresh)
        yield from fresh  # nothing is left of it, but its end

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        give_back_memory()
        logger.info("%s: %.2f s", stage, self.seconds[stage])

    @contextmanager
    def _here(self, stage: str) -> Iterator[None]:
        """A stage of one step, in this process."""
        self.progress(stage, 0, 1)
        with self._timed(stage):
            yield
        self.progress(stage, 1, 1)


def _sizes(receipts: Sequence[Receipt]) -> NDArray[np.int64]:
    """Rows of each region in all blocks."""
    return np.asarray(np.diff(np.stack([receipt.start for receipt in receipts]), axis=1).sum(axis=0))


def _no_spikes(source: Preprocessor, template_channels: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The columns of spikes that a sorting declares, without rows."""
    of_row = {"features": (template_channels.shape[1], source.settings.n_pcs)}
    return {
        spec.name: np.zeros((0, *of_row.get(spec.name, ())), spec.metadata["dtype"])
        for spec in fields(Sorting)
        if spec.metadata.get("dims", ())[:1] == ("n",)
    }


@contextmanager
def run_store(
    source: Preprocessor, results_dir: str | os.PathLike[str] | ObjectPath | None, *, fresh: bool
) -> Iterator[RunStore]:
    """Where a run keeps what its tasks find: in the results folder, or else in a temporary one."""
    with ExitStack() as stack:
        folder = place(results_dir or stack.enter_context(scratch_folder()))
        data = source.recording.digest() if results_dir else ""
        recall = source.recording.source.digest_is_exact  # else nobody can tell what it was then
        yield stack.enter_context(open_store(folder / "run", RECORDED, data=data, fresh=fresh, recall=recall))


@contextmanager
def engine_for(
    source: Preprocessor,
    client: Any = None,
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    device_given: bool = True,
) -> Iterator[Engine]:
    """The engine to compute with: the caller's client or scheduler, this thread ("loop"), or this machine."""
    if client == "loop":
        yield Loop(progress, device=source.device)
        return
    from ks4stream.engine import cluster

    recording, settings, device = source.recording, source.settings, source.device
    with ExitStack() as stack:
        is_own = client is None
        if is_own:
            if workers is None:
                workers = local_workers(recording, settings, device)
            enough = device.startswith("cuda") or repays(recording, settings, PROCESSES_FROM_CHANNEL_S)
            local = cluster.local_client(n_workers=workers, processes=None if enough else False, device=device)
            client = stack.enter_context(local)
        elif isinstance(client, str):
            client = stack.enter_context(cluster.connected(client))
        elif client is cluster.active_client():
            logger.info("The active Dask client computes, %r; without one, this machine would.", client)
        engine = cluster.Cluster(client, progress, device=device)
        if not (is_own or device_given) and device == "cpu" and (idle := engine.workers_with_gpu()):
            warn(
                f"{len(idle)} of the client's workers see a GPU (that at {idle[0]}, say) and this process does not, so "
                "that processors compute. Pass device='cuda' to use GPUs, or device='cpu' to say that this is meant.",
                MachineWarning,
                stacklevel=5,
            )
        yield engine
