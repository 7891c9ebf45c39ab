"""What a sort will need, estimated before it begins from metadata alone: no sample is read, unless it calibrates.

The number of spikes is not known in advance; it, and everything that follows from it, is an assumption that the plan
states. All else follows from recording, probe and settings. Each stage states its own `needs`, beside the code that
they describe; a plan is their sum, with advice on what to change if something does not fit. The tests compare it with
what processes actually use. How long it takes is estimated if this machine's speed is known (:mod:`ks4stream.timing`).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ks4stream import deploy, rates, timing
from ks4stream.deploy import PYTHON_BYTES, SPIKES_PER_CHANNEL_HZ, needs_of
from ks4stream.engine import Loop, gpus
from ks4stream.errors import MachineError, MachineWarning
from ks4stream.io.kept_traces import has_room
from ks4stream.io.places import ObjectPath, Place, place
from ks4stream.messages import warn
from ks4stream.recording import Recording
from ks4stream.resources import Resources, checked_number
from ks4stream.settings import Settings
from ks4stream.stages.detection import Detect
from ks4stream.stages.matching import Match
from ks4stream.stages.needs import CUDA_BYTES, Load, Needs
from ks4stream.stages.preprocessing import tiling_of
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening
from ks4stream.timing import Measured, Timing

CLIENT_BYTES = 600 << 20  # the calling process, with Zarr, xarray and Matplotlib and what plots take
RESULT_COPIES = 2  # of the features among the results: Phy's and those of sorting.zarr
RESULT_BYTES = 116  # per spike in the results, apart from features, and of what the page is made of
START_S = 5.0  # that worker processes take to start, if it was not measured


UNKNOWN_TIME = (
    "not known, as no sort like this one has ended on this machine; --calibrate (in Python, calibrate=True) measures it"
)


@dataclass(frozen=True)
class Shortfall:
    """What does not fit, and which setting to change.

    Attributes
    ----------
    text : str
        What does not fit, and what to change.
    certain : bool
        True if the sort would fail in any case; False if that depends on the number of spikes.
    """

    text: str
    certain: bool


@dataclass(frozen=True)
class Plan:
    """What a sort will do and need; ``print`` shows it as a table.

    Attributes
    ----------
    recording : str
        Its name.
    duration_s : float
        Length of what is sorted, in s.
    n_channels : int
        Number of channels that are sorted.
    n_batches, batches_per_task : int
        Number of batches, in all and per task.
    n_centres, n_regions : int
        Universal template centres, and regions that are clustered.
    spikes_per_channel_hz : float
        Assumed spike rate per channel, in Hz.
    n_spikes, n_templates : int
        Numbers that follow from the assumed rate.
    n_passes : int
        Passes over the recording, at most: with drift correction, detection runs twice.
    n_rare_passes : int
        Further passes, at most, to learn waveforms if clean spikes are rare (fewer than a thousand in a sample of the
        batches). Tasks and bytes read are without these.
    stages : tuple of Needs
        Needs of the stages that have tasks; each task's process needs :data:`PYTHON_BYTES` in addition.
    n_tasks : int
        Number of tasks in all passes together.
    fetch_bytes : int
        Bytes of the recording, if each sample is fetched once.
    read_bytes : int
        Bytes read in all passes together. If the filtered traces are few, they are kept on disk, and read from there.
    client_bytes : int
        Memory of the calling process.
    scratch_bytes, results_bytes : int
        Disk space of ``run``, which may be deleted when the sort is finished, and of the results.
    n_workers : int
        Number of tasks at a time.
    memory_bytes : int
        Memory of this machine.
    workers_per_gpu : int
        Number of workers that share a GPU, if one is used.
    worker_memory_bytes, gpu_memory_bytes, disk_bytes : int or None
        What is available: memory for one task at a time, free memory on one GPU, free disk space where the results go;
        None if unknown.
    shortfalls : tuple of Shortfall
        What does not fit.
    is_counted : bool
        Whether the spike rate was counted in an excerpt, not assumed.
    time : Timing or None
        How long it will take; None if the speed of this machine is not known.
    """

    recording: str
    duration_s: float
    n_channels: int
    n_batches: int
    batches_per_task: int
    n_centres: int
    n_regions: int
    spikes_per_channel_hz: float
    n_spikes: int
    n_templates: int
    n_passes: int
    n_rare_passes: int
    stages: tuple[Needs, ...]
    n_tasks: int
    fetch_bytes: int
    read_bytes: int
    client_bytes: int
    scratch_bytes: int
    results_bytes: int
    n_workers: int
    workers_per_gpu: int
    memory_bytes: int
    worker_memory_bytes: int | None
    gpu_memory_bytes: int | None
    disk_bytes: int | None
    shortfalls: tuple[Shortfall, ...] = ()
    is_counted: bool = False
    time: Timing | None = None

    @property
    def fits(self) -> bool:
        """Whether no shortfall was found."""
        return not self.shortfalls

    @property
    def worker_bytes(self) -> int:
        """Memory that a worker needs at most, including Python and torch."""
        return PYTHON_BYTES + max(stage.memory_bytes for stage in self.stages)

    def check(self) -> None:
        """Warn of what may not fit.

        Raises
        ------
        MachineError
            If something certainly does not.
        """
        certain = [shortfall.text for shortfall in self.shortfalls if shortfall.certain]
        if certain:
            raise MachineError(" ".join(certain))
        for shortfall in self.shortfalls:
            warn(shortfall.text, MachineWarning)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings and lists, for JSON."""
        return asdict(self) | {"worker_bytes": self.worker_bytes, "fits": self.fits}

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the table: a label and its text."""
        hours, rest = divmod(round(self.duration_s), 3600)
        available = {  # where it is known
            name: "" if n_bytes is None else f" ({format_bytes(n_bytes)} available)"
            for name, n_bytes in (
                ("worker", self.worker_memory_bytes),
                ("gpu", self.gpu_memory_bytes),
                ("disk", self.disk_bytes),
            )
        }
        gpu, sharing = max(stage.gpu_bytes for stage in self.stages), self.workers_per_gpu
        rare = f" ({self.n_rare_passes} more if clean spikes are rare)" * (self.n_rare_passes > 0)
        each = f" for each of {sharing} workers that share it" * (sharing > 1)
        return [
            ("recording", f"{hours} h {rest // 60:02d} min {rest % 60:02d} s, {self.n_channels} channels to sort"),
            (
                "batches",
                f"{self.n_batches}, {self.batches_per_task} per task; {self.n_tasks} tasks on "
                f"{self.n_workers} worker{'s' * (self.n_workers != 1)}, in up to {self.n_passes} passes{rare}",
            ),
            ("probe", f"{self.n_centres} template centres, {self.n_regions} regions"),
            (
                "counted" if self.is_counted else "assumed",
                f"{self.spikes_per_channel_hz:g} spikes/s per channel: {self.n_spikes:.3g} spikes; "
                f"{self.n_templates} templates",
            ),
            ("read", f"{format_bytes(self.fetch_bytes)} of recording, {format_bytes(self.read_bytes)} in all passes"),
            *((f"memory: {stage.name}", format_bytes(PYTHON_BYTES + stage.memory_bytes)) for stage in self.stages),
            ("memory: a worker", f"{format_bytes(self.worker_bytes)} at most{available['worker']}"),
            (
                "memory: this process",
                f"{format_bytes(self.client_bytes)} ({format_bytes(self.memory_bytes)} available)",
            ),
            *([("memory: GPU", f"{format_bytes(gpu)} at most{each}{available['gpu']}")] if gpu else []),
            ("disk: run/", f"{format_bytes(self.scratch_bytes)}; may be deleted afterwards{available['disk']}"),
            ("disk: results", format_bytes(self.results_bytes)),
            *(self.time.rows() if self.time else [("time", UNKNOWN_TIME)]),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{text}" for name, text in rows]
        return "\n".join([*lines, *(f"! {shortfall.text}" for shortfall in self.shortfalls)])


def format_bytes(n_bytes: float) -> str:
    """Format a number of bytes for people.

    >>> format_bytes(2_345_000_000)
    '2.3 GB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{0 if n_bytes >= 100 * size else 1}f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


def plan(
    recording: Recording,
    settings: Settings | None = None,
    *,
    results_dir: str | os.PathLike[str] | ObjectPath | None = None,
    resources: Resources | None = None,
    n_workers: int | None = None,
    worker_memory_bytes: float | None = None,
    gpu_memory_bytes: float | None = None,
    workers_per_gpu: int | None = None,
    spikes_per_channel_hz: float | None = None,
    calibrate: bool = False,
    **of_resources: Any,
) -> Plan:
    """Estimate what a sort will need, how long it takes, and what does not fit; only metadata are read.

    Parameters
    ----------
    recording : Recording
        With a probe.
    settings : Settings, optional
    results_dir : path, optional
        Where the results will go; the free space of that disk is checked, unless it is an object store.
    resources : Resources, optional
        As in :func:`ks4stream.sort`, but an active client is not asked, only one that is given; the cache does not
        enter the plan.
    n_workers : int, optional
        Number of concurrent tasks, by default `workers`, those of the client, or as many as a sort on this machine
        would use.
    worker_memory_bytes : float, optional
        Memory for one task at a time; by default the client's, or each worker's share of this machine's. Infinite means
        unknown.
    gpu_memory_bytes : float, optional
        Memory of one GPU; by default the least that is free on any of the client's or this machine's.
    workers_per_gpu : int, optional
        Number of workers that share it; by default that of the client's, or that of `n_workers` on this machine's GPUs.
    spikes_per_channel_hz : float, optional
        Expected spike rate, by default 10. Memory of the final clustering and disk space follow from it. The time
        follows from that of earlier sorts, unless it is given.
    calibrate : bool
        Sort a few batches of the recording in this thread, which takes seconds, with hundreds of channels a minute:
        their speed and their spikes are used in the plan. Otherwise the time follows from the last sorts on this
        machine of about as many channels; if there are none, it is not known.
    **of_resources
        Any field of :class:`~ks4stream.Resources`: ``plan(recording, workers=4)``.

    Returns
    -------
    Plan

    Raises
    ------
    RecordingError, ProbeError, SettingsError
        If there is nothing to sort, an argument is not valid, or there are no spikes in the batches that are sorted.
    LostWorkerError, WorkerError
        If a client was given whose scheduler or workers do not answer.
    """
    recording, settings = Recording.given(recording), Settings.given(settings)
    resources = Resources.given(resources, of_resources)
    n_workers, workers_per_gpu = (
        checked_number("n_workers", n_workers),
        checked_number("workers_per_gpu", workers_per_gpu),
    )
    is_here = resources.client in (None, "loop")
    device = gpus.chosen(resources.device, here=is_here and gpu_memory_bytes is None)
    tiling = tiling_of(recording, settings)
    if resources.client is not None:
        with deploy.engine_for(recording, settings, resources, device, client=resources.client) as engine:
            gpu = engine.gpu_memory
            n_workers = n_workers or engine.n_workers
            worker_memory_bytes = worker_memory_bytes or engine.worker_memory_bytes
            gpu_memory_bytes = gpu_memory_bytes or (gpu.n_bytes if gpu else math.inf)
            workers_per_gpu = workers_per_gpu or (gpu.n_workers if gpu else 1)
    memory_bytes = int(Loop().worker_memory_bytes)
    n_workers = n_workers or resources.workers or deploy.fitting_workers(recording, settings, resources, device)
    excerpt = _calibrated(recording, settings, device) if calibrate else None
    counted_hz = excerpt[0].spikes_per_channel_hz if excerpt else SPIKES_PER_CHANNEL_HZ
    load = Load(recording, settings, tiling, device, spikes_per_channel_hz or counted_hz, resources.block_batches)
    workers_per_gpu = workers_per_gpu or timing.sharing(device, n_workers)
    found = _plan(
        load,
        n_workers,
        memory_bytes=memory_bytes,
        worker_memory_bytes=_known(worker_memory_bytes or memory_bytes / n_workers),
        gpu_memory_bytes=_known(gpu_memory_bytes or gpus.free_here(device)),
        workers_per_gpu=workers_per_gpu,
        disk_bytes=None if results_dir is None else _free_bytes(place(results_dir)),
    )
    return replace(
        found,
        shortfalls=tuple(_Advice(load, found).shortfalls()),
        is_counted=excerpt is not None and spikes_per_channel_hz is None,
        time=timing.expected(
            load,
            [excerpt[0]] if excerpt else _alike(load, is_here=is_here),
            n_workers=n_workers,
            workers_per_gpu=workers_per_gpu,
            results=results_dir is not None,
            keep_rate=spikes_per_channel_hz is not None,
            excerpt=excerpt[1] if excerpt else "",
        ),
    )


def _alike(load: Load, *, is_here: bool) -> list[Measured]:
    """Earlier sorts like this one; none, if the workers of a client compute, which may be on other machines."""
    return timing.alike(rates.known(), load.recording, load.n_channels, load.device) if is_here else []


def _calibrated(recording: Recording, settings: Settings, device: str) -> tuple[Measured, str]:
    """What sorting an excerpt measured, and what it was."""
    from ks4stream.calibration import calibrate  # which sorts, and a sort makes a plan

    found = calibrate(recording, settings, device=device)
    processes = deploy.for_processes(recording, settings) >= deploy.PROCESSES_FROM_CHANNEL_S
    start_s = found.measured.start_s + START_S * processes
    basis = f"an excerpt of {found.n_batches} batches, sorted in {timing.about(found.took_s)}"
    return replace(found.measured, start_s=start_s), basis


def _plan(load: Load, n_workers: int, **available: Any) -> Plan:
    """Sum the needs of all stages."""
    needs, recording, n_batches = needs_of(load), load.recording, len(load.tiling)
    sample_bytes = recording.n_channels * recording.dtype.itemsize
    tile_bytes = sample_bytes * (load.tiling.size + 2 * load.tiling.halo)
    n_tasks = sum(need.n_tasks * need.passes for need in needs)
    records_bytes = sum(need.n_tasks for need in needs) * load.receipt_bytes
    n_tiles_read = sum(need.passes * need.n_tiles_read for need in needs)
    kept_bytes = load.kept_bytes if has_room(available["disk_bytes"], load.kept_bytes) else 0
    if kept_bytes:  # once, besides those read before the traces that are kept can be computed
        n_tiles_read = n_batches + LearnWhitening.needs(load).n_tiles_read
    return Plan(
        recording=recording.name,
        duration_s=load.duration_s,
        n_channels=load.n_channels,
        n_batches=n_batches,
        batches_per_task=load.tiles_per_task(),
        n_centres=len(load.centres),
        n_regions=len(load.regions),
        spikes_per_channel_hz=load.spikes_per_channel_hz,
        n_spikes=load.n_spikes,
        n_templates=load.n_templates,
        n_passes=load.detections + 1,
        n_rare_passes=LearnWaveforms.rare_passes(load),
        stages=tuple(need for need in needs if need.n_tasks),
        n_tasks=n_tasks,
        fetch_bytes=sample_bytes * n_batches * load.tiling.size,
        read_bytes=tile_bytes * n_tiles_read,
        client_bytes=CLIENT_BYTES + sum(need.client_bytes for need in needs) + load.n_blocks() * load.receipt_bytes,
        scratch_bytes=sum(need.passes * need.scratch_bytes for need in needs) + records_bytes + kept_bytes,
        results_bytes=load.n_spikes * (RESULT_COPIES * 4 * load.n_features + RESULT_BYTES),
        n_workers=n_workers,
        **available,
    )


@dataclass(frozen=True)
class _Advice:
    """What does not fit in a plan, and which setting to change."""

    load: Load
    plan: Plan

    def shortfalls(self) -> Iterator[Shortfall]:
        """Everything that does not fit."""
        plan = self.plan
        if plan.client_bytes > plan.memory_bytes:
            yield Shortfall(
                f"This process may need {format_bytes(plan.client_bytes)}, but the machine has "
                f"{format_bytes(plan.memory_bytes)}. Sort a part with tmin and tmax, raise binning_depth (now "
                f"{self.load.settings.binning_depth:g} µm) or set Th_learned to 8 or more (fewer spikes).",
                certain=False,
            )
        if plan.worker_memory_bytes is not None:
            yield from self._in_memory(plan.worker_memory_bytes)
        if plan.gpu_memory_bytes is not None and self.load.on_gpu:
            yield from self._on_gpu(plan.gpu_memory_bytes)
        if plan.disk_bytes is not None:
            yield from self._on_disk(plan.disk_bytes)

    def _in_memory(self, available: int) -> Iterator[Shortfall]:
        n_workers = self.plan.n_workers
        if not self.load.on_gpu and self.load.min_tile_bytes() > available:
            yield self._no_batch(
                f"a worker has {format_bytes(available)}", available, f"use fewer workers (now {n_workers})"
            )
            return
        for need in self.plan.stages:
            if PYTHON_BYTES + need.memory_bytes > available:
                remedies = (f"use fewer workers (now {n_workers})", *self._remedies(need, rows=True))
                yield Shortfall(
                    f"A task of {need.name} may need {format_bytes(PYTHON_BYTES + need.memory_bytes)}, but a worker "
                    f"has {format_bytes(available)}. {_one_of(*remedies)}",
                    certain=False,
                )

    def _on_gpu(self, available: int) -> Iterator[Shortfall]:
        sharing, share = self.plan.workers_per_gpu, available // self.plan.workers_per_gpu
        elsewhere: tuple[str, ...] = ('compute with device="cpu"',)
        if self.load.min_tile_bytes() > available:
            yield self._no_batch(f"the GPU has {format_bytes(available)} free", available, *elsewhere)
            return
        if sharing > 1:
            elsewhere = (f"use fewer workers (now {self.plan.n_workers})", *elsewhere)
        has = f"a worker's share is {format_bytes(share)}" if sharing > 1 else f"it has {format_bytes(available)} free"
        for need in self.plan.stages:
            if need.gpu_bytes > share:
                yield Shortfall(
                    f"A task of {need.name} may need {format_bytes(need.gpu_bytes)} on the GPU, but {has}. "
                    f"{_one_of(*self._remedies(need, rows=False), *elsewhere)}",
                    certain=False,
                )

    def _on_disk(self, available: int) -> Iterator[Shortfall]:
        needed = self.plan.scratch_bytes + self.plan.results_bytes
        if needed > available:
            records = sum(stage.n_tasks for stage in self.plan.stages) * self.load.receipt_bytes
            yield Shortfall(
                f"run/ and the results will need about {format_bytes(needed)} of disk space, but only "
                f"{format_bytes(available)} are free. Give a results_dir on a larger disk, sort a part with "
                "tmin and tmax, or set Th_universal and Th_learned to 9 and 8, or more (fewer spikes).",
                certain=records > available,
            )

    def _remedies(self, need: Needs, *, rows: bool) -> tuple[str, ...]:
        """What to do if a task needs too much; `rows`: also what lowers the rows of a block."""
        if not need.n_tiles_read:
            return need.remedies
        smaller = f" or block_batches (now {self.plan.batches_per_task})" * (rows and need.writes_blocks)
        return (f"lower batch_size (now {self.load.tiling.size}){smaller}", *need.remedies)

    def _no_batch(self, has: str, available: int, *elsewhere: str) -> Shortfall:
        load = self.load

        def fits(size: int) -> bool:
            beside = max(Detect.bytes_beside_tile(load, size), Match.bytes_beside_tile(load, size))
            return CUDA_BYTES * load.on_gpu + load.tile_bytes(size) + beside <= available

        size = load.longest_size(fits)
        smaller = [f"lower batch_size (for instance to {size})"] if size else []
        return Shortfall(
            f"One batch of {load.tiling.size} samples on {load.n_channels} channels takes "
            f"at least {format_bytes(load.min_tile_bytes())}, but {has}. "
            f"{_one_of(*smaller, *elsewhere, 'sort the shanks one at a time')}",
            certain=True,
        )


def _one_of(*phrases: str) -> str:
    """A sentence that offers several things to do.

    >>> _one_of("use fewer workers", "lower nt", "take a break")
    'Use fewer workers, lower nt, or take a break.'
    """
    *others, last = phrases
    sentence = f"{', '.join(others)}, or {last}." if others else f"{last}."
    return sentence[0].upper() + sentence[1:]


def _free_bytes(folder: Place) -> int:
    """Free bytes on the disk of a folder that may not exist yet; for an object store, on the disk where files wait."""
    local = Path(tempfile.gettempdir()) if isinstance(folder, ObjectPath) else folder
    return shutil.disk_usage(next(parent for parent in (local, *local.parents) if parent.exists())).free


def _known(n_bytes: float | None) -> int | None:
    return None if n_bytes is None or math.isinf(n_bytes) else int(n_bytes)
