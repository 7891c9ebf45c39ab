"""Which samples a batch owns and which it only reads: the time arithmetic of the package.

::

    recording   0 ───────────────────────────────────────────────────────────── n_samples
    crop            start ═══════════════════════════════════════════ stop
    batches              │ core 0      │ core 1      │ core 2   │
    tile 1          [halo│ core 1      │halo]

A *tile* is one batch (its *core*) with a *halo* on both sides, always ``batch_size + 2·halo`` samples
long. Every sample of the crop belongs to exactly one core, and every spike to the tile whose core contains
it. Kernels process one tile at a time, so tiles determine the result; a *block* is a run of tiles computed by
one task, and never changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.settings import Settings


@dataclass(frozen=True, slots=True)  # there may be hundreds of thousands
class Tile:
    """One batch and its halo; samples are counted from the start of the recording.

    Attributes
    ----------
    index : int
        Batch number, counted from 0 in the sorted (downsampled) sequence.
    start, stop : int
        The core: samples the tile owns, half-open.
    halo : int
        Samples read on either side of the core.
    size : int
        Common length of the cores; the core of the last tile may be shorter and is padded.
    """

    index: int
    start: int
    stop: int
    halo: int
    size: int

    @property
    def first(self) -> int:
        """First sample read (may be negative: before the recording the edge value is repeated)."""
        return self.start - self.halo

    @property
    def length(self) -> int:
        """Number of samples read, the same for every tile."""
        return self.size + 2 * self.halo


@dataclass(frozen=True)
class Tiling:
    """The batches of a cropped recording.

    Attributes
    ----------
    start, stop : int
        Crop, in samples of the recording, half-open. Beyond it the edge values are repeated.
    size : int
        Samples per batch.
    halo : int
        Samples a tile reads on either side of its core.
    n_tiles : int
        Number of batches after downsampling.
    step : int
        Every `step`-th batch is sorted (``batch_downsampling``).

    Examples
    --------
    >>> tiling = Tiling.of(n_samples=1000, size=300, halo=50, shortest=61)
    >>> [(tile.start, tile.stop) for tile in tiling]
    [(0, 300), (300, 600), (600, 900), (900, 1000)]
    >>> Tiling.of(n_samples=950, size=300, halo=50, shortest=61).n_tiles  # a tail of 50 is dropped
    3
    """

    start: int
    stop: int
    size: int
    halo: int
    n_tiles: int
    step: int = 1

    @classmethod
    def of(
        cls,
        *,
        n_samples: int,
        size: int,
        halo: int,
        shortest: int,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> Tiling:
        """Cut ``[start, stop)`` of a recording into batches; a tail shorter than `shortest` is dropped.

        Raises
        ------
        RecordingError
            If fewer than `shortest` samples remain, or downsampling leaves no batch.
        """
        stop = n_samples if stop is None else min(stop, n_samples)
        if stop - start < shortest:
            raise RecordingError(
                f"The recording has {max(stop - start, 0)} samples to sort (of {n_samples}), fewer than one waveform "
                f"(nt = {shortest}). Check the file, n_chan_bin, dtype, tmin and tmax."
            )
        n_whole, tail = divmod(stop - start, size)
        n_batches = n_whole + (tail >= shortest)
        n_tiles = n_batches // step
        if n_tiles == 0:
            raise RecordingError(
                f"batch_downsampling={step} leaves none of the recording's {n_batches} batches; lower it."
            )
        if n_batches == n_whole:
            stop = start + n_whole * size  # no tile reads the samples of a dropped tail
        return cls(start=start, stop=stop, size=size, halo=halo, n_tiles=n_tiles, step=step)

    @classmethod
    def by_settings(cls, settings: Settings, *, n_samples: int, sampling_rate_hz: float, halo: int = 0) -> Tiling:
        """Cut a recording between ``tmin`` and ``tmax`` into batches of ``batch_size``.

        Raises
        ------
        RecordingError
            If there are fewer samples to sort than one waveform has.
        """
        start = round(settings.tmin * sampling_rate_hz)
        if 0 < n_samples <= start:
            raise RecordingError(
                f"tmin={settings.tmin:g} s is not before the end of the recording, {n_samples / sampling_rate_hz:g} s. "
                "Lower it, or check n_chan, dtype and the sampling rate (fs)."
            )
        return cls.of(
            n_samples=n_samples,
            size=settings.batch_size,
            halo=halo,
            shortest=settings.nt,
            start=start,
            stop=None if math.isinf(settings.tmax) else round(settings.tmax * sampling_rate_hz),
            step=settings.batch_downsampling,
        )

    @property
    def centres(self) -> NDArray[np.floating]:
        """Middle of each batch, in samples of the recording."""
        return self.start + np.arange(self.n_tiles) * (self.step * self.size) + self.size / 2

    def __len__(self) -> int:
        return self.n_tiles

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < self.n_tiles:
            raise IndexError(index)
        start = self.start + index * self.step * self.size
        return Tile(index, start, min(start + self.size, self.stop), self.halo, self.size)

    def __iter__(self) -> Iterator[Tile]:
        return (self[index] for index in range(self.n_tiles))

    def tile_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the tile whose core contains each sample."""
        return (np.asarray(samples, np.int64) - self.start) // (self.size * self.step)

    def evenly(self, every: int, *, min_tiles: int = 25, max_tiles: int = 200) -> list[int]:
        """Return the indices of every `every`-th tile, evenly spaced: at least `min_tiles` and at most `max_tiles`.

        If there are fewer than `min_tiles`, all of them.

        >>> Tiling.of(n_samples=100_000, size=1000, halo=0, shortest=1).evenly(50, min_tiles=4)
        [0, 25, 50, 75]
        """
        wanted = min(max(-(-self.n_tiles // every), min_tiles), max_tiles, self.n_tiles)
        return [int(i) for i in (np.arange(wanted, dtype=np.int64) * self.n_tiles) // wanted]

    def blocks(self, tiles_per_block: int, indices: Sequence[int] | None = None) -> list[tuple[Tile, ...]]:
        """Group the tiles (or those at `indices`) into runs of at most `tiles_per_block`."""
        chosen = range(self.n_tiles) if indices is None else indices
        return [
            tuple(self[i] for i in chosen[at : at + tiles_per_block]) for at in range(0, len(chosen), tiles_per_block)
        ]


BLOCK_SECONDS = 60.0  # of recording per task, at most
MIN_BLOCKS = 32  # if the recording has that many batches, so that no worker waits long for the last task


def tiles_per_task(tiling: Tiling, n_tiles: int, sampling_rate_hz: float) -> int:
    """How many of `n_tiles` tiles one task processes: a minute's, or fewer if there would be fewer than 32 tasks.

    The same on every machine, so that a run finds its blocks again wherever it is resumed.
    """
    longest = max(int(BLOCK_SECONDS * sampling_rate_hz / tiling.size), 1)
    return min(longest, -(-n_tiles // MIN_BLOCKS))


def observed_spans(tiling: Tiling, artifacts: NDArray[np.int64]) -> NDArray[np.int64]:
    """What was sorted: the batches without blanked artifacts, as spans [start, stop) in samples, shape (span, 2).

    >>> tiling = Tiling.of(n_samples=1000, size=300, halo=50, shortest=61)
    >>> observed_spans(tiling, np.array([[100, 120], [110, 150]])).tolist()
    [[0, 100], [150, 1000]]
    """
    cores = np.array([(tile.start, tile.stop) for tile in tiling], np.int64).reshape(-1, 2)
    if tiling.step == 1:
        cores = np.array([[cores[0, 0], cores[-1, 1]]]) if len(cores) else cores
    edges = np.concatenate([cores.ravel(), artifacts.ravel()])
    change = np.zeros((len(edges), 2), np.int64)  # of the number of batches, and of artifacts, that we are in
    change[: cores.size, 0] = np.tile([1, -1], len(cores))
    change[cores.size :, 1] = np.tile([1, -1], len(artifacts))
    order = np.argsort(edges, kind="stable")
    edges, depth = edges[order], np.cumsum(change[order], axis=0)
    last = np.append(np.diff(edges) > 0, True)[: len(edges)]
    edges, seen = edges[last], ((depth[:, 0] > 0) & (depth[:, 1] == 0))[last]
    before = np.insert(seen, 0, False)[:-1] if len(seen) else seen
    return np.column_stack([edges[seen & ~before], edges[~seen & before]])


def covered(edges: NDArray[Any], spans: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number of samples between edges (b + 1,), ascending, that are in spans (m, 2), which do not overlap: (b,).

    >>> covered(np.array([0, 10, 20]), np.array([[8, 11], [12, 13]])).tolist()
    [2.0, 2.0]
    """
    if not len(spans):
        return np.zeros(len(edges) - 1)
    start, stop = spans[:, 0], spans[:, 1]
    before = np.concatenate([[0.0], np.cumsum(stop - start)])
    index = np.searchsorted(start, edges, side="right")  # spans that begin before each edge
    beyond = np.where(index > 0, np.maximum(stop[np.maximum(index - 1, 0)] - edges, 0), 0)
    return np.diff(before[index] - beyond)
