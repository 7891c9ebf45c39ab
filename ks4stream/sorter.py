"""A sort, from the first sample to the last unit: the line of stages, readable as a methods section."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream import geometry
from ks4stream.blocks import Tile
from ks4stream.engine import Engine, Loop, Progress, one_thread
from ks4stream.errors import DamagedFileError, FewSpikesWarning, Ks4StreamWarning, SettingsError
from ks4stream.io.records import key_of
from ks4stream.io.run_store import METHOD, Remembered, RunStore, open_store
from ks4stream.io.spikes import Receipt
from ks4stream.kernels import templates as template_kernels
from ks4stream.kernels.borders import Reported
from ks4stream.recording import Recording, check_traces
from ks4stream.results import Drift, PeakSample, Sorting, Templates, Waveforms, Whitening
from ks4stream.settings import Settings
from ks4stream.stages import detection, drift, matching, preprocessing, templates, units, waveforms, whitening
from ks4stream.stages.preprocessing import Preprocessor

logger = logging.getLogger("ks4stream")

BLOCK_SECONDS = 60.0  # of recording per task, at most
PROCESSES_FROM_CHANNEL_S = 10_000  # seconds of recording × channels: less is sorted before processes have paid off
TASKS_PER_WORKER = 4  # at least, where the recording is long enough, so that no worker waits for the last
FEW_SPIKES = 1000


def sort(
    recording: Recording,
    settings: Settings | None = None,
    *,
    results_dir: str | os.PathLike[str] | None = None,
    client: Any = None,
    workers: int | None = None,
    block_batches: int | None = None,
    do_CAR: bool = True,
    invert_sign: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    save_extra_vars: bool = False,
    resume: bool = True,
) -> Sorting:
    """Sort a recording into units.

    Parameters
    ----------
    recording : Recording
        From :func:`ks4stream.open_recording`, with a probe.
    settings : Settings, optional
    results_dir : path, optional
        Folder for the Phy files, plots and the native store; None writes nothing.
    client : distributed.Client or str, optional
        Where to compute, or the address of the scheduler ("tcp://host:8786"); by default the cores and GPUs of this
        machine. The string "loop" computes in this thread, one task after the other.
    workers : int, optional
        How many of this machine's workers compute, if no `client` is given; by default one for each GPU, or else for
        each core as far as memory reaches. Never a matter of results.
    block_batches : int, optional
        Batches per task; by default about a minute of recording. Never a matter of results.
    do_CAR : bool
        Subtract the common median reference.
    invert_sign : bool
        Turn the traces upside down.
    device : str or torch.device, optional
        Where kernels run; by default the GPU if there is one.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.
    resume : bool
        Go on where an earlier run into `results_dir` stopped: what it finished, of the same recording and with the
        same settings as far as they matter, is not computed again. False begins anew. Only of files and of arrays
        up to 256 MB it is known that they are the same; others are always sorted anew.
    save_extra_vars : bool
        Write Kilosort4's extra files too.

    Returns
    -------
    Sorting
        Possibly without units; a warning then says why.

    Raises
    ------
    RecordingError, ProbeError, SettingsError, ResultsError, WorkerError
        Before work starts, if the input cannot be sorted, the results not be written or a worker not compute.
    """
    from ks4stream import report

    if client is not None and workers is not None:
        raise SettingsError(f"workers={workers} was given with a client, which brings its own. Leave one of them out.")
    settings = (settings or Settings()).replace(fs=recording.sampling_rate_hz)  # the recording knows best
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with ExitStack() as stack, _recorded_warnings() as said:
        if results_dir is not None:
            report.check_writable(results_dir)
            stack.enter_context(report.run_log(results_dir))
            report.log_inputs(recording, settings, do_CAR=do_CAR, invert_sign=invert_sign, device=device)
        source = prepare(recording, settings, do_car=do_CAR, invert_sign=invert_sign, device=device)
        stack.enter_context(one_thread())
        store = stack.enter_context(run_store(source, results_dir, fresh=not resume))
        engine = stack.enter_context(engine_for(source, client, workers, progress))
        sorting = replace(SortRun(source, engine, store, block_batches).run(), warnings=tuple(said))
        if results_dir is not None:
            if progress is not None:
                progress("results", 0, 1)
            report.finish(sorting, results_dir, save_extra_vars=save_extra_vars)
            if progress is not None:
                progress("results", 1, 1)
    return sorting


def prepare(
    recording: Recording, settings: Settings, *, do_car: bool = True, invert_sign: bool = False, device: str = "cpu"
) -> Preprocessor:
    """Check recording, probe and settings against each other, before work starts.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
    """
    tiling = preprocessing.tiling_of(recording, settings)
    source = Preprocessor(recording, tiling, settings, do_car=do_car, invert_sign=invert_sign, device=device)
    source.probe.check_file(recording.n_channels)
    dead = preprocessing.dead_channels(recording, source.probe, check_traces(recording))
    return replace(source, dead=dead)


RECORDED = (matching.Matched, matching.Edge, Reported, templates.RegionTemplates, units.RegionUnits)
"""What tasks return, beside arrays and receipts."""

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
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

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
                Path(error.path).unlink(missing_ok=True)

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
            with self._timed("drift"):
                moved, plotted = drift.combine(source, peaks)
            if np.any(moved.shift_um):
                source = source.with_results(drift=moved)
                shapes = self.learn_waveforms(source)
                peaks = self.detect(source, centres, regions, shapes)

        learned = self.learn_templates(source, centres, regions, shapes, peaks)
        found, template_channels = self.match(source, shapes, learned, regions)
        return self.finish(source, shapes, moved, plotted, template_channels, found)

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
        self, source: Preprocessor, centres: geometry.Centres, regions: geometry.Regions, shapes: Waveforms,
        peaks: list[Receipt],
    ) -> Templates:  # fmt: skip
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
    ) -> tuple[units.Units | None, NDArray[np.int64]]:
        """Sections 8 and 9: all spikes, clustered into units."""
        probe, settings = source.probe, source.settings
        region_of = units.template_regions(learned.features, probe, regions)
        matcher = matching.SpikeMatcher(source, shapes, learned, region_of, len(regions))
        template_channels = matcher.template_channels
        if not len(learned.features):
            return None, template_channels
        with self._timed("matching"):
            receipts, counts, self.artifacts = matching.combine(source, self._map(matcher, self._blocks(), "matching"))
            blanked_s = np.diff(self.artifacts).sum() / source.recording.sampling_rate_hz
            logger.info("%d artifacts were blanked, %.2f s in all", len(self.artifacts), blanked_s)
        with self._timed("final clustering"):
            sizes = _sizes(receipts)
            occupied = np.flatnonzero(sizes).tolist()
            rate = source.recording.sampling_rate_hz
            sorter = units.RegionSorter(
                receipts, counts, template_channels, region_of, probe.n_channels, rate, settings, source.device
            )
            found = list(self._map(sorter, occupied, "final clustering", sizes[occupied]))
        with self._timed("merging"):
            return (units.combine(found, shapes, settings, rate, self._fewest()) if found else None), template_channels

    def finish(
        self, source: Preprocessor, shapes: Waveforms, moved: Drift | None, peaks: PeakSample | None,
        template_channels: NDArray[np.int64], found: units.Units | None,
    ) -> Sorting:  # fmt: skip
        """Section 10: duplicates, labels, positions."""
        settings, probe, recording = source.settings, source.probe, source.recording
        found = found or _no_units(source, template_channels)
        rate = recording.sampling_rate_hz
        refractory, contamination = units.labels(found, settings, rate)
        x_um, y_um = units.positions(found.features, found.template, template_channels, probe, settings.position_limit)
        n_units = len(found.unit_features)
        if len(found.sample) < FEW_SPIKES or n_units < 2:
            warnings.warn(
                f"Only {len(found.sample)} spikes in {n_units} units were found. If more were to be expected, check "
                "the probe's units (µm), the channel map, dtype and n_chan, or lower Th_universal and Th_learned.",
                FewSpikesWarning, stacklevel=5,
            )  # fmt: skip
        similarity = template_kernels.similarity(
            torch.from_numpy(found.unit_features), torch.from_numpy(shapes.components)
        ).value.numpy() if n_units else np.zeros((0, 0))
        return Sorting(
            sample=found.sample, unit=found.unit, template=found.template, score=found.score, features=found.features,
            kept=found.kept, x_um=x_um, y_um=y_um,
            template_channels=template_channels, unit_features=found.unit_features,
            similarity=similarity, refractory=refractory, contamination=contamination, settings=settings,
            sampling_rate_hz=rate, probe=probe, whitening=source.whitening, waveforms=shapes, drift=moved, peaks=peaks,
            n_samples=recording.n_samples, files=recording.files, dtype=recording.dtype.name,
            n_chan_file=recording.n_channels, artifacts=self.artifacts, seconds=dict(self.seconds),
        )  # fmt: skip

    def _fewest(self) -> int:
        tiling = self.source.tiling
        return units.fewest_spikes(tiling.n_tiles * tiling.size, self.source.recording.sampling_rate_hz)

    def _blocks(self, indices: Sequence[int] | None = None) -> list[tuple[Tile, ...]]:
        tiling = self.source.tiling
        n_tiles = len(tiling) if indices is None else len(indices)
        if self.block_batches is not None:
            return tiling.blocks(self.block_batches, indices)
        longest = max(int(BLOCK_SECONDS * self.source.recording.sampling_rate_hz / tiling.size), 1)
        return tiling.blocks(min(longest, -(-n_tiles // (TASKS_PER_WORKER * self.engine.n_workers))), indices)

    def _map(
        self, function: Callable[[Any], Any], items: Sequence[Any], stage: str, priority: Any = ()
    ) -> Iterator[Any]:
        """Results in order: those of an earlier run from the store, the others computed and kept there."""
        store = self.store.stage(stage, key_of(function, METHOD, torch.__version__, stages=MATTERS[stage]))
        if isinstance(function, templates.PeakWriter | matching.SpikeMatcher):
            function = replace(function, folder=store.folder)
        known = store.recall(items)
        if known:
            logger.info("%s: %d of %d tasks were finished before", stage, len(known), len(items))
        missing = [index for index in range(len(items)) if index not in known]
        fresh = self.engine.map(
            Remembered(function, store.folder), [items[index] for index in missing], stage=stage,
            priority=[priority[index] for index in missing] if len(priority) else (),
        )  # fmt: skip
        for index in range(len(items)):
            yield known.pop(index) if index in known else next(fresh)
        yield from fresh  # nothing is left of it, but its end

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        logger.info("%s: %.2f s", stage, self.seconds[stage])


def _sizes(receipts: Sequence[Receipt]) -> NDArray[np.int64]:
    """Rows of each region in all blocks."""
    return np.asarray(np.diff(np.stack([receipt.start for receipt in receipts]), axis=1).sum(axis=0))


def _no_units(source: Preprocessor, template_channels: NDArray[np.int64]) -> units.Units:
    n_slots, n_pcs = template_channels.shape[1], source.settings.n_pcs
    return units.Units(
        sample=np.zeros(0, np.int64), template=np.zeros(0, np.int32), score=np.zeros(0, np.float32),
        features=np.zeros((0, n_slots, n_pcs), np.float32), unit=np.zeros(0, np.int64), kept=np.zeros(0, bool),
        unit_features=np.zeros((0, source.probe.n_channels, n_pcs), np.float32),
    )  # fmt: skip


@contextmanager
def run_store(source: Preprocessor, results_dir: str | os.PathLike[str] | None, *, fresh: bool) -> Iterator[RunStore]:
    """Where a run keeps what its tasks find: in the results folder, or else in a temporary one."""
    with ExitStack() as stack:
        folder = Path(results_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="ks4stream-")))
        data = source.recording.digest() if results_dir else ""
        fresh |= not source.recording.source.digest_is_exact  # what it was then, nobody can tell
        yield stack.enter_context(open_store(folder.absolute() / "run", RECORDED, data=data, fresh=fresh))


@contextmanager
def engine_for(
    source: Preprocessor, client: Any = None, workers: int | None = None, progress: Progress | None = None
) -> Iterator[Engine]:
    """The engine to compute with: the caller's client or scheduler, this thread ("loop"), or this machine."""
    if client == "loop":
        yield Loop(progress)
        return
    from ks4stream.engine import cluster

    uses_gpu = source.device.startswith("cuda")
    processes = None if uses_gpu or _repays_processes(source) else False
    with ExitStack() as stack:
        if client is None:
            local = cluster.local_client(n_workers=workers, processes=processes, uses_gpu=uses_gpu)
            client = stack.enter_context(local)
        elif isinstance(client, str):
            client = stack.enter_context(cluster.connected(client))
        yield cluster.Cluster(client, progress, uses_gpu=uses_gpu)


def _repays_processes(source: Preprocessor) -> bool:
    """Whether there is enough to sort that worker processes repay their start; arrays in memory are left there."""
    recording, tiling = source.recording, source.tiling
    sorted_s = tiling.n_tiles * tiling.size / recording.sampling_rate_hz
    return bool(recording.files) and sorted_s * source.probe.n_channels >= PROCESSES_FROM_CHANNEL_S


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Collect the text of our warnings while they are shown as usual."""
    said: list[str] = []
    show = warnings.showwarning

    def record(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, Ks4StreamWarning):
            said.append(str(message))
            logger.warning("%s", message)
        show(message, category, *rest)

    with warnings.catch_warnings():  # also forgets which were shown before: those of this sort are all said
        warnings.showwarning = record  # type: ignore[assignment]
        yield said
