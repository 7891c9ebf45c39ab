"""How far the tissue moved, batch by batch (section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import DriftWarning
from ks4stream.io.mapped import StreamedArray, release_pages, scratch_array
from ks4stream.io.tables import Receipt, read_column
from ks4stream.kernels import drift as kernels
from ks4stream.messages import warn
from ks4stream.results import Drift, PeakSample
from ks4stream.stages.preprocessing import Preprocessor

HELD_BYTES = 8 << 20  # of fingerprints; more lie in a file and are read some batches at a time
MOST_PLOTTED = 100_000  # peaks kept for the drift scatter plot
LEAST_RELIABILITY = 0.5  # correlation of the shifts told by the two halves of the peaks, below which they are noise
STILL_BINS = 1.0  # noise in the shifts up to which a recording is called still without a warning


def depth_range(source: Preprocessor) -> tuple[float, int]:
    """Depth of the lowest contact and the number of depth bins."""
    y = source.probe.y_um
    return float(y.min()), kernels.n_depth_bins(float(np.ptp(y)), source.settings.binning_depth)


def combine(
    source: Preprocessor, receipts: Sequence[Receipt], *, scratch: Path | None = None
) -> tuple[Drift, PeakSample]:
    """Register the peaks of all tiles; where they cannot tell, the shift is 0 and a warning says so."""
    lowest, n_bins = depth_range(source)
    shape = (len(source.tiling), 2, n_bins, kernels.N_AMPLITUDE_BINS)
    counts = scratch_array(shape, np.uint16, scratch, held_bytes=HELD_BYTES)
    plotted = []
    most = -(-MOST_PLOTTED // len(source.tiling))
    for receipt in receipts:
        sample, depth, score = (read_column(receipt, name) for name in ("sample", "depth_um", "score"))
        order = np.lexsort((depth, score, sample))
        sample, depth, score = sample[order], depth[order], score[order]
        tile = source.tiling.tile_of(sample)
        rank, n_in_tile = rank_within(tile)
        bins = kernels.fingerprint_bins(
            depth,
            score,
            lowest_um=lowest,
            bin_um=source.settings.binning_depth,
            n_bins=n_bins,
            threshold=source.settings.Th_universal,
        )
        np.add.at(counts, (tile, rank % 2, *bins), 1)
        release_pages(counts)
        kept = rank * most % n_in_tile < most  # `most` of each tile, evenly; all where there are no more
        plotted.append((sample[kept], depth[kept], score[kept]))
    sample_of_peaks = PeakSample(*(np.concatenate(column) for column in zip(*plotted, strict=True)))
    return estimate(source, StreamedArray(counts)), sample_of_peaks


def rank_within(group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place of each row within its group, and the number of rows in it, of groups (n,) in ascending order.

    Even and odd peaks are told apart within a tile, and thinned there: a block may be any number of tiles.

    >>> rank_within(np.array([0, 0, 0, 2, 5, 5]))
    (array([0, 1, 2, 0, 0, 1]), array([3, 3, 3, 1, 2, 2]))
    """
    first, after = (np.searchsorted(group, group, side=side) for side in ("left", "right"))
    return np.arange(len(group)) - first, after - first


def estimate(source: Preprocessor, counts: StreamedArray | NDArray[np.uint16]) -> Drift:
    """Shifts of all batches from their fingerprints (b, half, z, a)."""
    settings = source.settings
    lowest, n_bins = depth_range(source)
    segments = kernels.segment_bounds(n_bins, settings.nblocks)
    centre = lowest - 1 + settings.binning_depth * np.array([(first + last) / 2 for first, last in segments])
    none = Drift(shift_um=np.zeros((counts.shape[0], len(segments))), centre_um=centre)
    if n_bins < kernels.FEWEST_BINS:  # nothing to tell it from: not worth a warning on every tetrode
        return none
    if counts.shape[0] < 2:
        return none

    def register(parts: slice) -> NDArray[np.float64]:
        found = kernels.register(counts, parts, n_blocks=settings.nblocks, smoothing=settings.drift_smoothing)
        return found - np.median(found, axis=0)

    shift = register(slice(None))
    halves = [register(slice(half, half + 1)) for half in (0, 1)]
    reliability = _correlation(halves[0], halves[1])
    if reliability < LEAST_RELIABILITY:
        if shift.std() <= STILL_BINS:
            return none
        return _undecided(none, f"even and odd peaks tell shifts that correlate by {reliability:.2f} only (few peaks)")
    return Drift(shift_um=shift * settings.binning_depth, centre_um=centre)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = (a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def _undecided(none: Drift, why: str) -> Drift:
    warn(f"Drift is taken as zero: {why}.", DriftWarning, stacklevel=3)
    return none
