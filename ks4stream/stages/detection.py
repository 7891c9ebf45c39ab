"""Detection of peaks with universal templates; peaks are written to files by region (section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.blocks import Tile
from ks4stream.geometry import Centres, Regions
from ks4stream.io.places import Place
from ks4stream.io.tables import Receipt, read_column, write_block
from ks4stream.kernels import detection as kernels
from ks4stream.results import Waveforms
from ks4stream.stages.base import Block, Run, Stage
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.small_peaks import common_peak, complete_batches, lowest_peak

SMALL_PEAKS_WORK = 0.6
"""Additional time that small peaks take, relative to the time without them: 0.3 to 1.0 on three recordings."""


@dataclass(frozen=True)
class Peaks:
    """All peaks, in the files of their blocks, grouped by region.

    Columns: ``sample``, ``centre``, ``depth_um``, ``score``, ``features``.
    """

    receipts: list[Receipt]
    shank_of_region: NDArray[np.int64] | None = None  # None: the probe has one shank

    @property
    def of_region(self) -> NDArray[np.int64]:
        """Number of peaks in each region."""
        return rows_of_region(self.receipts)

    def in_time(
        self,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]:
        """Yield time, depth (µm), score and shank of all peaks in time order, block by block."""
        for receipt in self.receipts:
            sample, depth, score = (read_column(receipt, name) for name in ("sample", "depth_um", "score"))
            order = np.lexsort((depth, score, sample))
            shank = np.zeros(len(sample), np.int64)
            if self.shank_of_region is not None:
                shank = np.repeat(self.shank_of_region, np.diff(receipt.start))
            yield sample[order], depth[order], score[order], shank[order]


def rows_of_region(receipts: Sequence[Receipt]) -> NDArray[np.int64]:
    """Number of rows of each region in all blocks."""
    starts = [receipt.start for receipt in receipts]
    return np.diff(np.stack(starts), axis=1).sum(axis=0) if starts else np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Detect(Stage[Block, Receipt, Peaks]):
    """Detect the peaks of every tile and write them, with their features."""

    name = "detection"
    reads = ("waveforms", "detection")

    tiles: Preprocessor
    waveforms: Waveforms
    centres: Centres
    regions: Regions

    def items(self, run: Run) -> Sequence[Block]:
        """All batches."""
        return run.blocks(self.tiles.tiling)

    def task(self, item: Block, folder: Place) -> Receipt:
        """Detect the peaks of a block and write them with their features, grouped by region."""
        tiles = [self._rows(tile) for tile in self.tiles.read_ahead(item, folder)]
        columns = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        region = self.regions.of_centre[columns["centre"]]
        path = folder / f"peaks-{item[0].index:08d}-{item[-1].index:08d}.rows"
        return write_block(path, columns, region, len(self.regions))

    def found(self, part: Receipt) -> dict[str, int]:
        """Peaks of a block."""
        return {"peaks": part.n_rows}

    def combine(self, parts: Iterable[Receipt], run: Run) -> Peaks:
        """All blocks."""
        return Peaks(list(parts), self.regions.shank)

    def peaks(self, tile: Tile) -> tuple[Tensor, kernels.TilePeaks]:
        """Whitened traces (c, t), and the peaks whose reported time is in the tile's core.

        ``TilePeaks.sample`` is the centre of the window; :meth:`time_of` converts it to the time in the recording.
        """
        settings = self.settings
        traces, blank = self.tiles.whitened(tile)
        core = self.tiles.core(tile)
        to_centre = settings.nt // 2 - settings.peak_sample
        moving = self.tiles.moving_matrix(tile)
        peaks = kernels.detect(
            traces,
            self.templates if moving is None else kernels.for_moved(self.templates, moving),
            threshold=lowest_peak(settings) if self.complete[tile.index] else common_peak(settings),
            reach=max(settings.peak_sample, kernels.BIN - 1),  # detection requires a window that contains a bin
            first=core.start + to_centre,
            last=core.stop + to_centre,
        )
        allowed = self.tiles.away_from_edges(tile, peaks.sample - to_centre, blank, settings.nt)
        return traces, kernels.TilePeaks(*(column[allowed] for column in peaks))

    def time_of(self, tile: Tile, sample: Tensor) -> Tensor:
        """Time of the waveform's peak in the recording, from the window's centre in the tile."""
        return sample + (tile.first - self.settings.nt // 2 + self.settings.peak_sample)

    def _rows(self, tile: Tile) -> dict[str, NDArray[np.generic]]:
        traces, peaks = self.peaks(tile)
        known = self.templates
        channels, present = known.channels[peaks.centre], known.present[peaks.centre]
        features = kernels.features(traces, known.components, channels, peaks.sample, present)
        return {
            "sample": self.time_of(tile, peaks.sample).cpu().numpy(),
            "centre": peaks.centre.cpu().numpy().astype(np.int32),
            "depth_um": peaks.depth_um.cpu().numpy(),
            "score": peaks.score.cpu().numpy(),
            "features": features.cpu().numpy(),
        }

    @cached_property
    def complete(self) -> NDArray[np.bool_]:
        """Batches (b,) in which small peaks are detected, too."""
        return complete_batches(self.settings, self.tiles.tiling, self.tiles.sampling_rate_hz)

    @cached_property
    def templates(self) -> kernels.UniversalTemplates:
        """The universal templates as tensors."""

        def tensor(values: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.tiles.device)

        return kernels.universal_templates(
            tensor(self.waveforms.shapes),
            tensor(self.waveforms.components),
            channels=tensor(self.centres.channels),
            weights=tensor(self.centres.weights),
            neighbours=tensor(self.centres.neighbours),
            depth_um=tensor(self.tiles.probe.y_um.astype(np.float32)),
        )

    @staticmethod
    def bytes_beside_tile(load: Load, size: int | None = None) -> int:
        """Bytes of one chunk of a tile, and of the waveforms of the peaks."""
        settings, c, k = load.settings, load.n_channels, len(load.centres)
        p, (_, s, j) = settings.n_templates, load.centres.weights.shape
        samples = min(kernels.SAMPLES_PER_CHUNK.on(load.device), load.tiling.size) + 2 * (settings.nt + kernels.BIN)
        size = size or load.tiling.size
        peaks = load.spikes_in(size / load.recording.sampling_rate_hz)
        in_chunk = peaks * min(1.0, samples / size)
        of_pairs = kernels.PAIRS_PER_CHUNK.on(load.device) * kernels.BIN * p * (j + 2 * s)
        group = min(kernels.CENTRES_PER_CHUNK.on(load.device), k)
        of_all = kernels.SAMPLES_PER_PRODUCT.on(load.device) * p * (2 * min(c, group * j) + (s + 1) * group)
        return int(
            4 * c * p * samples  # matches with every waveform
            + c * p * samples  # the largest of each bin, by waveform and sign
            + 8 * k * samples  # scores, and maps of centres and bins: bounds, best, visible maxima, pairs
            + 4 * max(of_pairs, of_all)  # scores that are evaluated
            + 24 * in_chunk * settings.nearest_templates * (2 * settings.nt // kernels.BIN)  # their rivals
            + 8 * peaks * j * settings.nt  # waveforms of which features are taken
        )

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """One chunk of the tile, and the rows of a block."""
        small = SMALL_PEAKS_WORK * load.complete_share * (lowest_peak(load.settings) < common_peak(load.settings))
        return load.on_tiles(
            cls.name,
            cls.bytes_beside_tile(load),
            rows=load.block_bytes(load.peaks_per_spike),
            scratch_bytes=round(load.row_bytes * load.n_peaks),
            passes=load.detections,
            n_tiles_read=len(load.tiling),
            work=load.samples_in(len(load.tiling)) * len(load.centres) * (1 + small),
            remedies=("raise dminx or dmin (fewer centres)",),
            writes_blocks=True,
        )
