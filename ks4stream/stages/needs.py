"""What there is to do, as far as it is known before a sample is read, and what a stage needs for it.

Bytes are those of the arrays that stages and kernels make, term by term; each stage states its own, beside the code
that makes them. Letters are those of the kernels: c channels, k centres, j channels of a spike, q components, w samples
of a waveform, p universal waveforms, t samples of a tile, u templates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from scipy.fft import next_fast_len

from ks4stream import geometry
from ks4stream.blocks import Tiling, tiles_per_task
from ks4stream.errors import ProbeError
from ks4stream.messages import silent
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.settings import Settings

TEMPLATES_PER_CHANNEL = 2.0  # learned; published recordings of 384 channels have 300 to 700
CROWDED = 5.0  # spikes of the largest region, in those of an average one

HOLES = 1.2  # that arrays of many sizes leave in a heap which gives nothing back (one_thread)
WORKING_BYTES = 32 << 20  # of a task on tiles, besides its arrays: of libraries, and the thread that reads ahead
CUDA_BYTES = 600 << 20  # what CUDA and cuFFT take for themselves
COPIES = 4  # of a block's rows, as it is finished: by tile, joined, by region, and as they are written
SPIKE_BYTES = 20  # of a row beside its features: sample, template or centre, depth, score
RECORD_BYTES = 4096  # of a task's record, besides what grows with the regions


@dataclass(frozen=True)
class Needs:
    """What a stage needs.

    Attributes
    ----------
    name : str
    n_tasks : int
        0 for a step in the calling process.
    memory_bytes : int
        Memory of one task, besides what Python and its libraries take.
    gpu_bytes : int
        Of one task on the GPU; 0 where none is used.
    client_bytes : int
        Memory of the calling process.
    scratch_bytes : int
        On the disk, for the files that the stage writes.
    passes : int
        How often the stage runs, at most.
    n_tiles_read : int
        Tiles that one pass reads.
    remedies : str
        What to lower where a task needs too much; on tiles, what besides ``batch_size``.
    writes_blocks : bool
        Whether a task holds the rows of a block, which are fewer in a smaller block.
    """

    name: str
    n_tasks: int = 0
    memory_bytes: int = 0
    gpu_bytes: int = 0
    client_bytes: int = 0
    scratch_bytes: int = 0
    passes: int = 1
    n_tiles_read: int = 0
    remedies: str = ""
    writes_blocks: bool = False


@dataclass(frozen=True)
class Load:
    """What there is to sort, and what follows from it before a sample is read.

    Attributes
    ----------
    recording : Recording
    settings : Settings
    tiling : Tiling
    device : str
    spikes_per_channel_hz : float
        Assumed.
    block_batches : int or None
        Batches per task; None for what :func:`~ks4stream.blocks.tiles_per_task` says.
    """

    recording: Recording
    settings: Settings
    tiling: Tiling
    device: str
    spikes_per_channel_hz: float
    block_batches: int | None = None
    probe: Probe = field(init=False)

    def __post_init__(self) -> None:
        if self.recording.probe is None:
            raise ProbeError(f"{self.recording.name} has no probe; give one to open_recording(…, probe=…).")
        object.__setattr__(self, "probe", self.recording.probe)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device != "cpu"

    @property
    def n_channels(self) -> int:
        """Channels that are sorted (c)."""
        return self.probe.n_channels

    @cached_property
    def centres(self) -> geometry.Centres:
        """Universal template centres, as they are where no channel is dead."""
        with silent():  # the sort itself says them
            return geometry.template_centres(self.probe, self.settings)

    @cached_property
    def regions(self) -> geometry.Regions:
        """Regions that are clustered."""
        return geometry.clustering_regions(self.centres, self.settings)

    @cached_property
    def region_features(self) -> int:
        """Features in a row of the widest region (d)."""
        widest = geometry.region_channels(self.centres.channels, self.regions.of_centre, len(self.regions))
        return max(map(len, widest)) * self.settings.n_pcs

    @property
    def n_features(self) -> int:
        """Features of a spike (j·q)."""
        return self.centres.channels.shape[1] * self.settings.n_pcs

    @property
    def row_bytes(self) -> int:
        """A peak or a spike in the file of its block."""
        return 4 * self.n_features + SPIKE_BYTES

    @property
    def duration_s(self) -> float:
        """Of what is sorted."""
        return len(self.tiling) * self.tiling.size / self.recording.sampling_rate_hz

    @property
    def n_spikes(self) -> int:
        """Spikes to be expected."""
        return round(self.spikes_in(self.duration_s))

    @property
    def n_templates(self) -> int:
        """Learned templates to be expected (u)."""
        return round(TEMPLATES_PER_CHANNEL * self.n_channels)

    @property
    def largest_region(self) -> int:
        """Spikes to be expected in the region that has most."""
        return round(self.n_spikes * min(1.0, CROWDED / len(self.regions)))

    @property
    def receipt_bytes(self) -> int:
        """What a task of a block hands back: rows, and checksums of six columns, by region."""
        return 8 * 7 * len(self.regions) + RECORD_BYTES

    @property
    def detections(self) -> int:
        """Passes of detection, at most: waveforms are learned and peaks found again where tissue moved."""
        return 2 if self.settings.nblocks else 1

    def spikes_in(self, seconds: float) -> float:
        """Spikes to be expected in a stretch of time."""
        return self.spikes_per_channel_hz * self.n_channels * seconds

    def tiles_per_task(self, n_tiles: int | None = None) -> int:
        """Tiles that a task takes of `n_tiles`, or of all."""
        n_tiles = len(self.tiling) if n_tiles is None else n_tiles
        wanted = self.block_batches or tiles_per_task(self.tiling, n_tiles, self.recording.sampling_rate_hz)
        return min(wanted, n_tiles)

    def n_blocks(self, n_tiles: int | None = None) -> int:
        """Tasks for `n_tiles`, or for all tiles."""
        return -(-(len(self.tiling) if n_tiles is None else n_tiles) // self.tiles_per_task(n_tiles))

    # -- a tile ------------------------------------------------------------------------------------------------

    def fft_samples(self, size: int | None = None) -> int:
        """Samples of the filter's transform of a tile whose core has `size`."""
        return int(next_fast_len((size or self.tiling.size) + 2 * self.tiling.halo, real=True))

    def file_bytes(self, size: int | None = None) -> int:
        """A tile as it lies in the file."""
        return self.fft_samples(size) * self.recording.dtype.itemsize * self.recording.n_channels

    def min_tile_bytes(self, size: int | None = None) -> int:
        """What no tile of `size` can do without: the filter's input, spectrum and output."""
        return 12 * self.n_channels * self.fft_samples(size)

    def tile_bytes(self, size: int | None = None) -> int:
        """A tile of the file, its channels in the probe's order, by time and by channel, and what becomes of them.

        That is: the traces, their spectrum, its copy, and the filtered traces.
        """
        read = self.file_bytes(size) + 2 * self.fft_samples(size) * self.recording.dtype.itemsize * self.n_channels
        return read + 16 * self.n_channels * self.fft_samples(size)

    def pinned_bytes(self) -> int:
        """A tile of the file, and from where a GPU fetches it, this one and the next: powers of 2."""
        return self.file_bytes() + 2 * (1 << (self.file_bytes() - 1).bit_length())

    def block_bytes(self) -> int:
        """The rows of a block as it is finished."""
        seconds = self.tiles_per_task() * self.tiling.size / self.recording.sampling_rate_hz
        return round(COPIES * self.row_bytes * self.spikes_in(seconds))

    # -- tasks -------------------------------------------------------------------------------------------------

    def on_tiles(self, name: str, beside: int, *, n_tiles: int | None = None, rows: int = 0, **more: object) -> Needs:
        """What tasks on tiles need that take `beside` in addition to the tile, and hand over `rows` bytes."""
        n_bytes = self.tile_bytes() + beside
        if self.on_gpu:
            memory_bytes, gpu_bytes = self.pinned_bytes() + rows, CUDA_BYTES + n_bytes
        else:
            memory_bytes, gpu_bytes = round(HOLES * n_bytes) + WORKING_BYTES + rows, 0
        return Needs(name, self.n_blocks(n_tiles), memory_bytes, gpu_bytes, **more)  # type: ignore[arg-type]

    def on_regions(self, name: str, n_bytes: int, **more: object) -> Needs:
        """What tasks on regions need."""
        gpu_bytes = (CUDA_BYTES + n_bytes) * self.on_gpu
        return Needs(name, len(self.regions), n_bytes, gpu_bytes, **more)  # type: ignore[arg-type]

    def longest_size(self, fits: Callable[[int], bool]) -> int | None:
        """The largest batch, halved again and again, that `fits`; None where the shortest does not."""
        size = self.tiling.size
        while size >= 4 * self.settings.nt:
            if fits(size):
                return size
            size //= 2
        return None
