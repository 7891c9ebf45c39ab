"""The size of a sort, estimated before any sample is read, and the memory and disk that a stage needs for it.

Bytes are those of the arrays allocated by stages and kernels, term by term; each stage states its own, next to the
code that allocates them. Letters are those of the kernels: c channels, k centres, j channels of a spike, q components,
w samples of a waveform, p universal waveforms, t samples of a tile, u templates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ks4stream import geometry
from ks4stream.blocks import Tiling, tiles_per_task
from ks4stream.errors import ProbeError
from ks4stream.kernels.hum import bytes_per_sample
from ks4stream.kernels.preprocessing import FILTERED_CHANNELS, fft_length
from ks4stream.messages import silent
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.settings import AUTO, Settings
from ks4stream.stages.small_peaks import complete_batches

WIDE_CHANNELS = 32
"""Channels of a template, or ``nearest_chans`` if that is more: on Neuropixels probes, those within 120 to 160 µm of
its largest one, along the shank."""
TEMPLATES_PER_CHANNEL = 2.0  # learned templates; published recordings of 384 channels have 300 to 700
CROWDED = 5.0  # number of spikes in the largest region, relative to an average region

HOLES = 1.2  # fragmentation by arrays of many sizes in a heap that does not return memory (one_thread)
WORKING_BYTES = 40 << 20  # per task on tiles, besides its arrays: libraries, and the thread that reads ahead
CUDA_BYTES = 600 << 20  # used by CUDA and cuFFT themselves
COPIES = 4  # of the rows of a block at the end of its task: by tile, joined, by region, and as they are written
SPIKE_BYTES = 20  # per row besides its features: sample, template or centre, depth, score
ROWS_PER_SPIKE = 2.0  # peaks, or spikes, above the lowest threshold per one that counts, if the data set thresholds
KEPT_BYTES = 2 << 30
"""Of filtered traces, which several stages need, kept on disk: those of 9 minutes of 32 channels. They are computed
again for each stage if the recording is longer."""
RECORD_BYTES = 4096  # per record of a task, besides what grows with the number of regions


@dataclass(frozen=True)
class Needs:
    """Memory and disk that a stage needs, and how much there is to compute.

    Attributes
    ----------
    name : str
    n_tasks : int
        0 for a step in the calling process.
    memory_bytes : int
        Memory of one task, besides that of Python and its libraries.
    gpu_bytes : int
        GPU memory of one task; 0 if no GPU is used.
    client_bytes : int
        Memory of the calling process.
    scratch_bytes : int
        Disk space for the files that the stage writes.
    passes : int
        Maximum number of times the stage runs.
    n_tiles_read : int
        Number of tiles read in one pass.
    remedies : tuple of str
        What to do if a task needs too much, for instance "lower nblocks"; for tasks on tiles, besides a lower
        ``batch_size``.
    writes_blocks : bool
        Whether a task keeps the rows of a block in memory, of which smaller blocks have fewer.
    work : float
        Amount of work in one pass, to which the stage's time is proportional; in a unit of its own. 0 if it takes no
        time worth mentioning.
    """

    name: str
    n_tasks: int = 0
    memory_bytes: int = 0
    gpu_bytes: int = 0
    client_bytes: int = 0
    scratch_bytes: int = 0
    passes: int = 1
    n_tiles_read: int = 0
    remedies: tuple[str, ...] = ()
    writes_blocks: bool = False
    work: float = 0.0


def kept_bytes(tiling: Tiling, n_channels: int, device: str) -> int:
    """Bytes of the filtered traces of all tiles, with a mask of blanked samples, if they are to be kept; otherwise 0.

    They are not if they are too many, or computed on a GPU, which takes less time than copying them from there.
    """
    n_bytes = (4 * n_channels + 1) * (tiling.size + 2 * tiling.halo) * len(tiling)
    return n_bytes if device == "cpu" and n_bytes <= KEPT_BYTES else 0


@dataclass(frozen=True)
class Load:
    """The size of a sort, and what follows from it before any sample is read.

    Attributes
    ----------
    recording : Recording
    settings : Settings
    tiling : Tiling
    device : str
    spikes_per_channel_hz : float
        Assumed rate of spikes.
    block_batches : int or None
        Batches per task; None for the default of :func:`~ks4stream.blocks.tiles_per_task`.
    templates_per_channel : float
        Assumed number of learned templates.
    rows_per_spike : float or None
        Peaks per spike that counts; None for an upper bound.
    """

    recording: Recording
    settings: Settings
    tiling: Tiling
    device: str
    spikes_per_channel_hz: float
    block_batches: int | None = None
    templates_per_channel: float = TEMPLATES_PER_CHANNEL
    rows_per_spike: float | None = None
    probe: Probe = field(init=False)

    def __post_init__(self) -> None:
        if self.recording.probe is None:
            raise ProbeError(f"{self.recording.name} has no probe; give one to open_recording(…, probe=…).")
        object.__setattr__(self, "probe", self.recording.probe)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is used."""
        return self.device != "cpu"

    @property
    def n_channels(self) -> int:
        """Number of channels that are sorted (c)."""
        return self.probe.n_channels

    @cached_property
    def centres(self) -> geometry.Centres:
        """Centres of the universal templates, assuming that no channel is dead."""
        with silent():  # the sort itself emits these warnings
            return geometry.template_centres(self.probe, self.settings)

    @cached_property
    def regions(self) -> geometry.Regions:
        """Regions of the clustering."""
        return geometry.clustering_regions(self.centres, self.settings)

    @cached_property
    def region_features(self) -> int:
        """Number of features in a row of the widest region (d)."""
        widest = geometry.region_channels(self.centres.channels, self.regions.of_centre, len(self.regions))
        return max(map(len, widest)) * self.settings.n_pcs

    @property
    def n_features(self) -> int:
        """Number of features of a spike (j·q)."""
        return self.centres.channels.shape[1] * self.settings.n_pcs

    @property
    def row_bytes(self) -> int:
        """Bytes of a peak or a spike in the file of its block."""
        return 4 * self.n_features + SPIKE_BYTES

    @property
    def duration_s(self) -> float:
        """Duration that is sorted, in seconds."""
        return len(self.tiling) * self.tiling.size / self.recording.sampling_rate_hz

    @property
    def n_spikes(self) -> int:
        """Expected number of spikes."""
        return round(self.spikes_in(self.duration_s))

    @property
    def n_templates(self) -> int:
        """Expected number of learned templates (u)."""
        return round(self.templates_per_channel * self.n_channels)

    @property
    def largest_region(self) -> int:
        """Expected number of spikes in the largest region."""
        return round(self.n_spikes * min(1.0, CROWDED / len(self.regions)))

    @property
    def receipt_bytes(self) -> int:
        """Bytes that a task on a block returns: number of rows, and checksums of six columns, by region."""
        return 8 * 7 * len(self.regions) + RECORD_BYTES

    @property
    def kept_bytes(self) -> int:
        """Bytes of filtered traces that are kept on disk."""
        return kept_bytes(self.tiling, self.n_channels, self.device)

    @property
    def detections(self) -> int:
        """Maximum number of detection passes: if tissue moved, waveforms are learned and peaks detected again."""
        return 2 if self.settings.nblocks else 1

    @cached_property
    def complete_share(self) -> float:
        """Share of the batches in which small peaks are detected, too."""
        return float(complete_batches(self.settings, self.tiling, self.recording.sampling_rate_hz).mean())

    @property
    def detected_share(self) -> float:
        """Share of all peaks above the lowest threshold that are detected, if half of them are small."""
        return (1 + self.complete_share) / 2

    @property
    def peaks_per_spike(self) -> float:
        """Peaks above the lowest threshold, per spike that counts, where all of them are detected."""
        if self.rows_per_spike is not None:
            return self.rows_per_spike
        return ROWS_PER_SPIKE if self.settings.Th_universal == AUTO else 1.0

    def spikes_in(self, seconds: float) -> float:
        """Expected number of spikes in a span of time."""
        return self.spikes_per_channel_hz * self.n_channels * seconds

    @property
    def n_peaks(self) -> float:
        """Expected number of peaks that are detected."""
        return self.detected_share * self.peaks_per_spike * self.n_spikes

    def as_found(self, **found: float) -> Load:
        """The same load with other assumptions; what follows from the probe is not computed again."""
        load = replace(self, **found)  # type: ignore[arg-type]
        of_probe = ("centres", "regions", "region_features")
        load.__dict__.update({name: value for name, value in self.__dict__.items() if name in of_probe})
        return load

    def samples_in(self, n_tiles: float) -> float:
        """Samples per channel of so many tiles, without their halos."""
        return n_tiles * self.tiling.size

    def tiles_per_task(self, n_tiles: int | None = None) -> int:
        """Number of tiles per task for `n_tiles` tiles, or for all."""
        n_tiles = len(self.tiling) if n_tiles is None else n_tiles
        wanted = self.block_batches or tiles_per_task(self.tiling, n_tiles, self.recording.sampling_rate_hz)
        return min(wanted, n_tiles)

    def n_blocks(self, n_tiles: int | None = None) -> int:
        """Number of blocks of `n_tiles` tiles, or of all."""
        return -(-(len(self.tiling) if n_tiles is None else n_tiles) // self.tiles_per_task(n_tiles))

    # -- a tile ------------------------------------------------------------------------------------------------

    def fft_samples(self, size: int | None = None) -> int:
        """Samples of the filter's FFT for a tile with a core of `size` samples."""
        return fft_length((size or self.tiling.size) + 2 * self.tiling.halo)

    def file_bytes(self, size: int | None = None) -> int:
        """Bytes of a tile as it is stored in the file."""
        return self.fft_samples(size) * self.recording.dtype.itemsize * self.recording.n_channels

    def min_tile_bytes(self, size: int | None = None) -> int:
        """Minimum bytes of a tile with a core of `size` samples: input, output and some work of the filter."""
        return (8 * self.n_channels + 12 * min(FILTERED_CHANNELS.cpu, self.n_channels)) * self.fft_samples(size)

    def tile_bytes(self, size: int | None = None) -> int:
        """Bytes of a tile: as read, its channels in the probe's order (time-major, then channel-major), and filtered.

        Filtering takes the traces, the filtered traces and, of some channels at a time, spectrum, its copy and result;
        subtracting hum takes the traces, those without hum, and all its harmonics, if that is more.
        """
        read = self.file_bytes(size) + 2 * self.fft_samples(size) * self.recording.dtype.itemsize * self.n_channels
        filtering = 12 * min(FILTERED_CHANNELS.on(self.device), self.n_channels)
        hum = bytes_per_sample(self.settings.line_frequency, self.recording.sampling_rate_hz)
        return read + (8 * self.n_channels + max(filtering, hum)) * self.fft_samples(size)

    def pinned_bytes(self) -> int:
        """Bytes of a tile of the file, and of pinned memory for this tile and the next, rounded up to powers of 2."""
        return self.file_bytes() + 2 * (1 << (self.file_bytes() - 1).bit_length())

    def block_bytes(self, rows_per_spike: float = 1.0) -> int:
        """Bytes of the rows of a block at the end of its task."""
        seconds = self.tiles_per_task() * self.tiling.size / self.recording.sampling_rate_hz
        return round(COPIES * self.row_bytes * rows_per_spike * self.spikes_in(seconds))

    # -- tasks -------------------------------------------------------------------------------------------------

    def on_tiles(self, name: str, beside: int, *, n_tiles: int | None = None, rows: int = 0, **more: object) -> Needs:
        """Needs of tasks on tiles that take `beside` bytes in addition to the tile, and `rows` bytes for their rows."""
        n_bytes = self.tile_bytes() + beside
        if self.on_gpu:
            memory_bytes, gpu_bytes = self.pinned_bytes() + rows, CUDA_BYTES + n_bytes
        else:
            memory_bytes, gpu_bytes = round(HOLES * n_bytes) + WORKING_BYTES + rows, 0
        return Needs(name, self.n_blocks(n_tiles), memory_bytes, gpu_bytes, **more)  # type: ignore[arg-type]

    def on_regions(self, name: str, n_bytes: int, **more: object) -> Needs:
        """Needs of tasks on regions."""
        gpu_bytes = (CUDA_BYTES + n_bytes) * self.on_gpu
        return Needs(name, len(self.regions), n_bytes, gpu_bytes, **more)  # type: ignore[arg-type]

    def longest_size(self, fits: Callable[[int], bool]) -> int | None:
        """The largest batch that `fits`, by repeated halving; None if the shortest does not."""
        size = self.tiling.size
        while size >= 4 * self.settings.nt:
            if fits(size):
                return size
            size //= 2
        return None
