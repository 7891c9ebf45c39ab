"""What a sort will need, said before it begins: from metadata alone, no sample is read.

How many spikes there are nobody knows before; their number, and what follows from it, is an assumption that the plan
states. All else follows from recording, probe and settings. Bytes are those of the arrays that the stages and kernels
make, term by term, so that whoever changes a kernel finds the line to change here; the tests hold them against what
processes really take.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.fft import next_fast_len

from ks4stream import geometry
from ks4stream.blocks import tiles_per_task
from ks4stream.engine import Loop, gpus
from ks4stream.errors import MachineError, MachineWarning, ProbeError
from ks4stream.io.mapped import HELD_BYTES
from ks4stream.io.places import ObjectPath, Place, place
from ks4stream.kernels import clustering, detection, graph, matching
from ks4stream.kernels import drift as drift_kernels
from ks4stream.kernels import waveforms as waveform_kernels
from ks4stream.messages import silent, warn
from ks4stream.recording import Recording
from ks4stream.settings import Settings
from ks4stream.stages import drift, preprocessing, waveforms

SPIKES_PER_CHANNEL_HZ = 10.0  # 13 hours of 384 channels with 150 million spikes have 8.3
TEMPLATES_PER_CHANNEL = 2.0  # learned; published recordings of 384 channels have 300 to 700
PROCESSES_FROM_CHANNEL_S = 10_000  # seconds of recording × channels: less is sorted before processes have paid off
SHARED_GPU_FROM_CHANNEL_S = 40_000  # and before several on a GPU have
CROWDED = 5.0  # spikes of the largest region, in those of an average one

PYTHON_BYTES = 450 << 20  # a process with torch and distributed, before its first task
CLIENT_BYTES = 600 << 20  # the calling process, with Zarr, xarray and Matplotlib and what plots take
HOLES = 1.2  # that arrays of many sizes leave in a heap which gives nothing back (one_thread)
WORKING_BYTES = 32 << 20  # of a task on tiles, besides its arrays: of libraries, and the thread that reads ahead
COPIES = 4  # of a block's rows, as it is finished: by tile, joined, by region, and as they are written
SPIKE_BYTES = 20  # of a row beside its features: sample, template or centre, depth, score
UNIT_SPIKE_BYTES = 24  # of a spike of a region's units: sample, template, score, and where its features are
SORTED_BYTES = 30  # of a spike in order of time, beside its features, while results are written
RECORD_BYTES = 4096  # of a task's record, besides what grows with the regions
RESULT_COPIES = 2  # of the features among the results: Phy's and those of sorting.zarr
RESULT_BYTES = 100  # of a spike in the results, besides
GRAPH_BYTES = 160  # of a spike while it is clustered: its columns, order, template, ten links and their flags, labels
CUDA_BYTES = 600 << 20  # what CUDA and cuFFT take for themselves


@dataclass(frozen=True)
class Stage:
    """What one stage needs.

    Attributes
    ----------
    name : str
    n_tasks : int
    memory_bytes : int
        Of one task, in the memory of the process, which besides needs :data:`PYTHON_BYTES` for itself.
    gpu_bytes : int
        Of one task on the GPU; 0 where none is used.
    """

    name: str
    n_tasks: int
    memory_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Misfit:
    """What does not fit, and which setting to change.

    Attributes
    ----------
    text : str
    certain : bool
        Whether the sort cannot work; otherwise that depends on the spikes there will be.
    """

    text: str
    certain: bool


@dataclass(frozen=True)
class Plan:
    """What a sort will do and need; ``print`` shows it as a table.

    Attributes
    ----------
    recording : str
    duration_s : float
        Of what is sorted.
    n_channels : int
        That are sorted.
    n_batches, batches_per_task : int
    n_centres, n_regions : int
        Universal template centres, and regions that are clustered.
    spikes_per_channel_hz : float
        Assumed.
    n_spikes, n_templates : int
        That follow from what is assumed.
    n_passes : int
        Over the recording, at most: with drift correction the detection runs twice.
    stages : tuple of Stage
    n_tasks : int
        At most, all passes together.
    fetch_bytes : int
        Of the recording, if each sample is fetched once.
    read_bytes : int
        In all passes together, at most.
    client_bytes : int
        Memory of the process that calls.
    scratch_bytes, results_bytes : int
        On disk: ``run``, which may be deleted when the sort is done, and the results beside it.
    n_workers : int
    memory_bytes : int
        Of this machine.
    workers_per_gpu : int
        That share one, where one is used.
    worker_memory_bytes, gpu_memory_bytes, disk_bytes : int or None
        What there is of each: for one task at a time, free on one GPU, free where the results go; None where not
        known.
    misfits : tuple of Misfit
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
    stages: tuple[Stage, ...]
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
    misfits: tuple[Misfit, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing was found that does not fit."""
        return not self.misfits

    @property
    def worker_bytes(self) -> int:
        """Memory a worker needs at most, Python and torch included."""
        return PYTHON_BYTES + max(stage.memory_bytes for stage in self.stages)

    def check(self) -> None:
        """Warn of what may not fit.

        Raises
        ------
        MachineError
            If something certainly does not.
        """
        certain = [misfit.text for misfit in self.misfits if misfit.certain]
        if certain:
            raise MachineError(" ".join(certain))
        for misfit in self.misfits:
            warn(misfit.text, MachineWarning, stacklevel=3)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, texts and lists, for JSON."""
        return asdict(self) | {"worker_bytes": self.worker_bytes, "fits": self.fits}

    def rows(self) -> list[tuple[str, str]]:
        """What is said of each thing, in the order of the table."""
        hours, rest = divmod(round(self.duration_s), 3600)
        there = {  # what there is, where it is known
            name: "" if n_bytes is None else f" (there are {in_words(n_bytes)})"
            for name, n_bytes in (
                ("worker", self.worker_memory_bytes),
                ("gpu", self.gpu_memory_bytes),
                ("disk", self.disk_bytes),
            )
        }
        gpu, sharing = max(stage.gpu_bytes for stage in self.stages), self.workers_per_gpu
        each = f" for each of {sharing} workers that share it" * (sharing > 1)
        return [
            ("recording", f"{hours} h {rest // 60:02d} min {rest % 60:02d} s, {self.n_channels} channels to sort"),
            (
                "batches",
                f"{self.n_batches}, {self.batches_per_task} per task; {self.n_tasks} tasks on "
                f"{self.n_workers} worker{'s' * (self.n_workers != 1)}, in up to {self.n_passes} passes",
            ),
            ("probe", f"{self.n_centres} template centres, {self.n_regions} regions"),
            (
                "assumed",
                f"{self.spikes_per_channel_hz:g} spikes/s per channel: {self.n_spikes:.3g} spikes; "
                f"{self.n_templates} templates",
            ),
            ("read", f"{in_words(self.fetch_bytes)} of recording, {in_words(self.read_bytes)} in all passes"),
            *((f"memory: {stage.name}", in_words(PYTHON_BYTES + stage.memory_bytes)) for stage in self.stages),
            ("memory: a worker", f"{in_words(self.worker_bytes)} at most{there['worker']}"),
            ("memory: this process", f"{in_words(self.client_bytes)} (there are {in_words(self.memory_bytes)})"),
            *([("memory: GPU", f"{in_words(gpu)} at most{each}{there['gpu']}")] if gpu else []),
            ("disk: run/", f"{in_words(self.scratch_bytes)}; may be deleted afterwards{there['disk']}"),
            ("disk: results", in_words(self.results_bytes)),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{text}" for name, text in rows]
        return "\n".join([*lines, *(f"! {misfit.text}" for misfit in self.misfits)])


def in_words(n_bytes: float) -> str:
    """Bytes as people read them.

    >>> in_words(2_345_000_000)
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
    n_workers: int | None = None,
    worker_memory_bytes: float | None = None,
    gpu_memory_bytes: float | None = None,
    workers_per_gpu: int | None = None,
    block_batches: int | None = None,
    device: str | torch.device | None = None,
    spikes_per_channel_hz: float = SPIKES_PER_CHANNEL_HZ,
) -> Plan:
    """Say what a sort will need, and what of it does not fit, before anything but metadata is read.

    Parameters
    ----------
    recording : Recording
        With a probe.
    settings : Settings, optional
    results_dir : path, optional
        Where the results will go; the disk it lies on is looked at, if it is one.
    n_workers : int, optional
        Tasks at a time; by default as many as a sort on this machine would take.
    worker_memory_bytes : float, optional
        Memory for one task at a time; by default each worker's share of this machine's. Infinite: not known.
    gpu_memory_bytes : float, optional
        Of one GPU; by default what is free on the one of this machine's where that is least.
    workers_per_gpu : int, optional
        That share it; by default as many as `n_workers` makes on this machine's.
    block_batches : int, optional
        Batches per task; by default about a minute of recording.
    device : str or torch.device, optional
        As in :func:`ks4stream.sort`.
    spikes_per_channel_hz : float
        Spikes to be expected. Memory of the final clustering and disk follow from it.

    Returns
    -------
    Plan

    Raises
    ------
    RecordingError, ProbeError, SettingsError
        If there is nothing to sort.
    """
    settings = (settings or Settings()).for_recording(recording)
    device = gpus.chosen(device, here=gpu_memory_bytes is None)
    memory_bytes = int(Loop().worker_memory_bytes)
    n_workers = n_workers or local_workers(recording, settings, device)
    need = _Need(recording, settings, n_workers, block_batches, spikes_per_channel_hz, device)
    return need.plan(
        memory_bytes=memory_bytes,
        worker_memory_bytes=_known(worker_memory_bytes or memory_bytes / n_workers),
        gpu_memory_bytes=_known(gpu_memory_bytes or gpus.free_here(device)),
        workers_per_gpu=workers_per_gpu or -(-n_workers // (len(gpus.visible(device)) or n_workers)),
        disk_bytes=None if results_dir is None else _free_bytes(place(results_dir)),
    )


def local_workers(recording: Recording, settings: Settings, device: str) -> int:
    """Workers that a sort on this machine takes."""
    from ks4stream.engine import cluster

    if not gpus.visible(device) or not repays(recording, settings, SHARED_GPU_FROM_CHANNEL_S):
        return cluster.local_workers(device)
    stages = _Need(recording, settings, 1, None, SPIKES_PER_CHANNEL_HZ, device).stages()
    share = cluster.Share(
        memory_bytes=PYTHON_BYTES + max(stage.memory_bytes for stage in stages),
        gpu_bytes=max(stage.gpu_bytes for stage in stages),
    )
    return cluster.local_workers(device, sharing=share)


def repays(recording: Recording, settings: Settings, from_channel_s: float) -> bool:
    """Whether there is so much to sort, in seconds × channels, that processes repay their start.

    Arrays in memory are left there.
    """
    tiling, probe = preprocessing.tiling_of(recording, settings), recording.probe
    sorted_s = tiling.n_tiles * tiling.size / recording.sampling_rate_hz
    return bool(recording.files) and probe is not None and sorted_s * probe.n_channels >= from_channel_s


class _Need:
    """The arithmetic of a plan: what follows from the input, and then the bytes of every stage.

    Letters are those of the kernels: c channels, k centres, j channels of a spike, q components, w samples of a
    waveform, p universal waveforms, t samples of a tile, u templates.
    """

    def __init__(
        self,
        recording: Recording,
        settings: Settings,
        n_workers: int,
        block_batches: int | None,
        rate_hz: float,
        device: str,
    ) -> None:
        self.recording, self.settings, self.n_workers, self.device = recording, settings, n_workers, device
        self.on_gpu = device != "cpu"
        self.block_batches, self.rate_hz = block_batches, rate_hz
        if recording.probe is None:
            raise ProbeError(f"{recording.name} has no probe; give one to open_recording(…, probe=…).")
        self.probe = recording.probe
        self.tiling = preprocessing.tiling_of(recording, settings)
        with silent():  # the sort itself says them
            self.centres = geometry.template_centres(self.probe, settings)
        self.regions = geometry.clustering_regions(self.centres, settings)
        self.n_channels = self.probe.n_channels
        self.per_task = block_batches or tiles_per_task(self.tiling, len(self.tiling), recording.sampling_rate_hz)
        self.per_task = min(self.per_task, len(self.tiling))
        self.n_blocks = -(-len(self.tiling) // self.per_task)
        self.duration_s = len(self.tiling) * self.tiling.size / recording.sampling_rate_hz
        self.n_spikes = round(self.spikes_in(self.duration_s))
        self.n_templates = round(TEMPLATES_PER_CHANNEL * self.n_channels)
        self.n_features = self.centres.channels.shape[1] * settings.n_pcs  # of a spike
        self.row_bytes = 4 * self.n_features + SPIKE_BYTES
        widest = geometry.region_channels(self.centres.channels, self.regions.of_centre, len(self.regions))
        self.region_features = max(map(len, widest)) * settings.n_pcs  # of a region's rows (d)

    def spikes_in(self, seconds: float) -> float:
        """Spikes to be expected."""
        return self.rate_hz * self.n_channels * seconds

    # -- on a tile ---------------------------------------------------------------------------------------------

    def least_tile_bytes(self, size: int | None = None) -> int:
        """What no tile of `size` can do without: the filter's input, spectrum and output."""
        return 12 * self.n_channels * self._fft_samples(size)

    def _fft_samples(self, size: int | None) -> int:
        return int(next_fast_len((size or self.tiling.size) + 2 * self.tiling.halo, real=True))

    def _file_bytes(self, size: int | None = None) -> int:
        return self._fft_samples(size) * self.recording.dtype.itemsize * self.recording.n_channels

    def pinned_bytes(self) -> int:
        """A tile of the file, and from where a GPU fetches it, this one and the next: powers of 2."""
        return self._file_bytes() + 2 * (1 << (self._file_bytes() - 1).bit_length())

    def tile_bytes(self, size: int | None = None) -> int:
        """A tile of the file, its channels in the probe's order, by time and by channel, and what becomes of them.

        That is: the traces, their spectrum, its copy, and the filtered traces.
        """
        read = self._file_bytes(size) + 2 * self._fft_samples(size) * self.recording.dtype.itemsize * self.n_channels
        return read + 16 * self.n_channels * self._fft_samples(size)

    def waveforms_bytes(self) -> int:
        """Beside the tile: which samples are peaks, a few channels' above threshold, what is near some, and snippets.

        Of those few channels all samples may be above threshold, as movement puts them.
        """
        c, t, at_once = self.n_channels, self.tiling.size, waveform_kernels.CHANNELS_AT_ONCE.on(self.device)
        near = geometry.ALONE_NEIGHBOURS * (2 * waveform_kernels.ALONE_REACH + 1)
        return int(
            c * t
            + waveform_kernels.ABOVE_BYTES * min(c, at_once) * t
            + waveform_kernels.WINDOW_BYTES * near * waveform_kernels.WINDOWS_AT_ONCE.on(self.device)
            + 16 * self.settings.nt * self.snippets_of_tile()
        )

    def snippets_of_tile(self) -> int:
        """Clean peaks that a tile hands over, at most: its share, or as many as can stand alone on their channel.

        Movement makes many more of them than there are spikes.
        """
        most = -(-waveforms.MOST_SNIPPETS // self.n_learned_from())
        return min(most, self.n_channels * -(-self.tiling.size // (waveform_kernels.ALONE_REACH + 1)))

    def detection_bytes(self, size: int | None = None) -> int:
        """Beside the tile: one piece of it, and the peaks' waveforms."""
        settings, c, k = self.settings, self.n_channels, len(self.centres)
        p, (_, s, j) = settings.n_templates, self.centres.weights.shape
        samples = min(detection.PIECE.on(self.device), self.tiling.size) + 2 * (settings.nt + detection.BIN)
        seconds = (size or self.tiling.size) / self.recording.sampling_rate_hz
        peaks = self.spikes_in(seconds)
        in_piece = peaks * min(1.0, samples / (size or self.tiling.size))
        return int(
            4 * c * p * samples  # matches with every waveform
            + c * p * samples  # the largest of each bin, by waveform and sign
            + 8 * k * samples  # scores, and maps of centres and bins: bounds, best, sight, pairs
            + 4 * detection.PAIRS_AT_ONCE.on(self.device) * detection.BIN * p * (j + 2 * s)  # pairs that are evaluated
            + 24 * in_piece * settings.nearest_templates * (2 * settings.nt // detection.BIN)  # their rivals
            + 8 * peaks * j * settings.nt  # waveforms of which features are taken
        )

    def matching_bytes(self, size: int | None = None) -> int:
        """Beside the tile: scores of all templates at all samples."""
        settings, c, u, q, w = self.settings, self.n_channels, self.n_templates, self.settings.n_pcs, self.settings.nt
        groups = 2 * u // matching.GROUP_SIZE + 2
        sharing = u * min(u, 8 * TEMPLATES_PER_CHANNEL * settings.nearest_chans)  # pairs that share channels
        return int(
            4 * (u + groups) * (self._fft_samples(size) + 2 * w)  # scores, and the best of each group
            + 8 * u * c * q
            + sharing * (4 * q * q + 8)  # templates, by unit and by group, and their products
            + 8 * c * q * matching.SAMPLES_AT_ONCE.on(self.device)  # projections
            + 2 * matching.ROWS_AT_ONCE.on(self.device) * (4 * q * q + 24 * w)  # what is subtracted at a time
        )

    def block_bytes(self) -> int:
        """The rows of a block as it is finished."""
        seconds = self.per_task * self.tiling.size / self.recording.sampling_rate_hz
        return round(COPIES * self.row_bytes * self.spikes_in(seconds))

    # -- on a region -------------------------------------------------------------------------------------------

    def largest_region(self) -> int:
        """Spikes of the largest region."""
        return round(self.n_spikes * min(1.0, CROWDED / len(self.regions)))

    def first_clustering_bytes(self) -> int:
        """A bounded sample of a region's peaks, read and chosen, and their graph."""
        n = min(self.largest_region(), self.settings.cluster_downsampling * self.settings.landmark_limit)
        choosing = 64 * self.largest_region()  # times and centres of all, and who shares a slice of time
        return max(choosing, self.clustering_bytes(n)) + self.row_bytes * n

    def final_clustering_bytes(self) -> int:
        """All spikes of a region; features of more than :data:`~ks4stream.io.mapped.HELD_BYTES` are left on disk."""
        n = self.largest_region()
        return min(4 * self.n_features * n, HELD_BYTES) + self.clustering_bytes(n)

    def clustering_bytes(self, n: int) -> int:
        """A graph of n spikes and its tree, beside the features."""
        d, settings = self.region_features, self.settings
        m = min(max(n // settings.cluster_downsampling, clustering.LEAST_LANDMARKS), settings.landmark_limit, n)
        return int(
            GRAPH_BYTES * n
            + 8 * d * m
            + 12 * clustering.N_CANDIDATES * m  # landmarks, and what seeds would explain
            + 4 * graph.INNER_CHUNK * m  # distances
            + 24 * clustering.N_SEEDS * m  # links of landmarks to clusters
            + 20 * min(graph.CHUNK, n) * d  # rows at a time, spread out; of one cluster in double precision
            + 8 * clustering.N_SEEDS * d * d  # Σxxᵀ of every leaf
        )

    # -- everything --------------------------------------------------------------------------------------------

    def client_bytes(self) -> int:
        """This process: snippets twice, fingerprints of all batches or on disk, receipts, which spikes are kept."""
        fingerprints = min(self.fingerprint_bytes(), drift.HELD_BYTES) + self.registering_bytes()
        snippets = min(waveforms.MOST_SNIPPETS, round(self.n_spikes)) * self.settings.nt
        receipts = self.n_blocks * self._receipt_bytes()
        return CLIENT_BYTES + 8 * snippets + fingerprints + receipts + min(self.n_spikes, HELD_BYTES)

    def _fingerprint_bins(self) -> int:
        bins = drift_kernels.n_depth_bins(float(np.ptp(self.probe.y_um)), self.settings.binning_depth)
        return bins * drift_kernels.N_AMPLITUDE_BINS if self.settings.nblocks else 0

    def fingerprint_bytes(self) -> int:
        """Peaks counted by batch, depth and amplitude, in two halves of 16 bits."""
        return 4 * len(self.tiling) * self._fingerprint_bins()

    def registering_bytes(self) -> int:
        """Logarithms of some fingerprints, and their likeness at 101 shifts; that of all at 11, in every segment."""
        if not self.settings.nblocks:
            return 0
        segments, bins = 2 * self.settings.nblocks - 1, self._fingerprint_bins()
        some = min(drift_kernels.rows_at_once(bins // drift_kernels.N_AMPLITUDE_BINS), len(self.tiling))
        return 24 * some * bins + 8 * (101 * some + 3 * 11 * len(self.tiling)) * segments

    def scratch_bytes(self, n_detections: int) -> int:
        """Snippets and peaks of each detection, fingerprints; spikes as they were matched, by unit, and by time."""
        snippets = 4 * min(waveforms.MOST_SNIPPETS, self.n_spikes) * self.settings.nt
        of_spike = self.row_bytes + UNIT_SPIKE_BYTES + 4 * self.n_features + SORTED_BYTES
        fingerprints = self.fingerprint_bytes() if self.fingerprint_bytes() > drift.HELD_BYTES else 0
        return n_detections * (snippets + self.row_bytes * self.n_spikes) + fingerprints + of_spike * self.n_spikes

    def _receipt_bytes(self) -> int:
        return 8 * 7 * len(self.regions) + RECORD_BYTES  # rows, and checksums of six columns, by region

    def plan(
        self,
        *,
        memory_bytes: int,
        worker_memory_bytes: int | None,
        gpu_memory_bytes: int | None,
        workers_per_gpu: int,
        disk_bytes: int | None,
    ) -> Plan:
        """All of it, and what does not fit."""
        n, n_passes = len(self.tiling), 3 if self.settings.nblocks else 2
        learning = n_passes - 1  # waveforms are learned anew once tissue was found to move
        sample_bytes = self.recording.n_channels * self.recording.dtype.itemsize
        tile_bytes = sample_bytes * (self.tiling.size + 2 * self.tiling.halo)
        stages = self.stages()
        n_tasks = {stage.name: stage.n_tasks for stage in stages}
        times = {"waveforms": learning, "detection": learning}
        found = Plan(
            recording=self.recording.name,
            duration_s=self.duration_s,
            n_channels=self.n_channels,
            n_batches=n,
            batches_per_task=self.per_task,
            n_centres=len(self.centres),
            n_regions=len(self.regions),
            spikes_per_channel_hz=self.rate_hz,
            n_spikes=self.n_spikes,
            n_templates=self.n_templates,
            n_passes=n_passes,
            stages=stages,
            n_tasks=sum(count * times.get(name, 1) for name, count in n_tasks.items()),
            fetch_bytes=sample_bytes * n * self.tiling.size,
            read_bytes=tile_bytes * (n_passes * n + self.n_whitened_from() + learning * self.n_learned_from()),
            client_bytes=self.client_bytes(),
            scratch_bytes=self.scratch_bytes(learning) + self._records_bytes(stages),
            results_bytes=self.n_spikes * (RESULT_COPIES * 4 * self.n_features + RESULT_BYTES),
            n_workers=self.n_workers,
            memory_bytes=memory_bytes,
            worker_memory_bytes=worker_memory_bytes,
            gpu_memory_bytes=gpu_memory_bytes,
            workers_per_gpu=workers_per_gpu,
            disk_bytes=disk_bytes,
        )
        return replace(found, misfits=tuple(self._misfits(found)))

    def n_whitened_from(self) -> int:
        """Batches that whitening is learned from."""
        return len(self.tiling.evenly(self.settings.nskip))

    def n_learned_from(self) -> int:
        """Batches that waveforms are learned from; all, where there are too few clean spikes."""
        return len(self.tiling.evenly(waveforms.EVERY_BATCH))

    def stages(self) -> tuple[Stage, ...]:
        """What each stage's tasks need."""

        def on_tiles(name: str, n_tiles: int, extra: Callable[[], int], rows: int = 0, tile_rows: int = 0) -> Stage:
            per_task = self.block_batches or tiles_per_task(self.tiling, n_tiles, self.recording.sampling_rate_hz)
            n_tasks, n_bytes = -(-n_tiles // per_task), self.tile_bytes() + extra()
            rows += min(per_task, n_tiles) * tile_rows
            if self.on_gpu:
                return Stage(name, n_tasks, self.pinned_bytes() + rows, CUDA_BYTES + n_bytes)
            return Stage(name, n_tasks, round(HOLES * n_bytes) + WORKING_BYTES + rows)

        def on_regions(name: str, n_bytes: int) -> Stage:
            return Stage(name, len(self.regions), n_bytes, (CUDA_BYTES + n_bytes) * self.on_gpu)

        n, blocks = len(self.tiling), self.block_bytes()
        snippet_bytes = 2 * 4 * self.settings.nt * self.snippets_of_tile()  # as they were cut, and in the record
        return (
            on_tiles("whitening", self.n_whitened_from(), lambda: 0),
            on_tiles("waveforms", self.n_learned_from(), self.waveforms_bytes, tile_rows=snippet_bytes),
            on_tiles("detection", n, self.detection_bytes, blocks),
            on_regions("first clustering", self.first_clustering_bytes()),
            on_tiles("matching", n, self.matching_bytes, blocks),
            on_regions("final clustering", self.final_clustering_bytes()),
        )

    def _records_bytes(self, stages: tuple[Stage, ...]) -> int:
        return sum(stage.n_tasks for stage in stages) * self._receipt_bytes()

    def _misfits(self, found: Plan) -> list[Misfit]:
        misfits = []
        if found.client_bytes > found.memory_bytes:
            misfits.append(
                Misfit(
                    f"This process may need {in_words(found.client_bytes)}, and the machine has "
                    f"{in_words(found.memory_bytes)}. Sort a part with tmin and tmax, raise binning_depth (now "
                    f"{self.settings.binning_depth:g} µm) or Th_learned (fewer spikes).",
                    certain=False,
                )
            )
        if found.worker_memory_bytes is not None:
            misfits += self._in_memory(found, found.worker_memory_bytes)
        if found.gpu_memory_bytes is not None and self.on_gpu:
            misfits += self._on_gpu(found, found.gpu_memory_bytes)
        if found.disk_bytes is not None:
            misfits += self._on_disk(found, found.disk_bytes)
        return misfits

    def _in_memory(self, found: Plan, there: int) -> list[Misfit]:
        if not self.on_gpu and self.least_tile_bytes() > there:
            elsewhere = f"use fewer workers (now {self.n_workers})"
            return [self._no_batch(f"a worker has {in_words(there)}", there, elsewhere)]
        return [
            Misfit(
                f"A task of {stage.name} may need {in_words(PYTHON_BYTES + stage.memory_bytes)}, and a worker has "
                f"{in_words(there)}. Use fewer workers (now {self.n_workers}), or lower "
                f"{self._remedy(stage, rows=True)}.",
                certain=False,
            )
            for stage in found.stages
            if PYTHON_BYTES + stage.memory_bytes > there
        ]

    def _remedy(self, stage: Stage, *, rows: bool) -> str:
        """Settings to lower, and so on, where a stage needs too much; with the rows of a block, or beside them."""
        batch_size = f"batch_size (now {self.tiling.size})"
        less = batch_size + f" or block_batches (now {self.per_task})" * rows
        return {
            "detection": f"{less}, raise dminx or dmin (fewer centres)",
            "matching": less,
            "first clustering": "max_cluster_subset or cluster_downsampling (a smaller sample)",
            "final clustering": "max_cluster_subset (fewer landmarks), or sort a part with tmin and tmax",
        }.get(stage.name, batch_size)

    def _on_gpu(self, found: Plan, there: int) -> list[Misfit]:
        sharing, share = found.workers_per_gpu, there // found.workers_per_gpu
        elsewhere = f"use fewer workers (now {self.n_workers}), or " * (sharing > 1) + 'compute with device="cpu"'
        if self.least_tile_bytes() > there:
            return [self._no_batch(f"the GPU has {in_words(there)} free", there, 'compute with device="cpu"')]
        has = f"a worker's share is {in_words(share)}" if sharing > 1 else f"it has {in_words(there)} free"
        return [
            Misfit(
                f"A task of {stage.name} may need {in_words(stage.gpu_bytes)} on the GPU, and {has}. "
                f"Lower {self._remedy(stage, rows=False)}, or {elsewhere}.",
                certain=False,
            )
            for stage in found.stages
            if stage.gpu_bytes > share
        ]

    def _no_batch(self, there_is: str, there: int, elsewhere: str) -> Misfit:
        return Misfit(
            f"One batch of {self.tiling.size} samples on {self.n_channels} channels takes "
            f"{in_words(self.least_tile_bytes())} at least, and {there_is}. {self._smaller_batch(there)}Otherwise "
            f"{elsewhere}, or sort shanks one by one.",
            certain=True,
        )

    def _on_disk(self, found: Plan, there: int) -> list[Misfit]:
        records, needed = self._records_bytes(found.stages), found.scratch_bytes + found.results_bytes
        if needed <= there:
            return []
        return [
            Misfit(
                f"About {in_words(needed)} of disk will be needed for run/ and the results, and {in_words(there)} are "
                "free. Give a results_dir on a larger disk, sort a part with tmin and tmax, or raise Th_universal and "
                "Th_learned (fewer spikes).",
                certain=records > there,
            )
        ]

    def _smaller_batch(self, there: int) -> str:
        """Advice, as far as a shorter batch would do."""
        size = self.tiling.size
        while size >= 4 * self.settings.nt:
            beside = max(self.detection_bytes(size), self.matching_bytes(size))
            if CUDA_BYTES * self.on_gpu + self.tile_bytes(size) + beside <= there:
                return f"Lower batch_size (to {size}, say). "
            size //= 2
        return ""


def _free_bytes(folder: Place) -> int:
    """Free on the disk where a folder lies, or will lie; of what goes to an object store, where it is made ready."""
    here = Path(tempfile.gettempdir()) if isinstance(folder, ObjectPath) else folder
    return shutil.disk_usage(next(one for one in (here, *here.parents) if one.exists())).free


def _known(n_bytes: float | None) -> int | None:
    return None if n_bytes is None or math.isinf(n_bytes) else int(n_bytes)
