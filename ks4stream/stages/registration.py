"""Kilosort4's drift estimate: fingerprints of the batches are registered to each other (section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.errors import DriftWarning
from ks4stream.io.mapped import StreamedArray, release_pages, scratch_array
from ks4stream.kernels import drift as kernels
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.results import Drift
from ks4stream.settings import AUTO, Settings
from ks4stream.stages.needs import Load
from ks4stream.stages.small_peaks import common_peak

HELD_BYTES = 8 << 20  # of fingerprints in memory; larger ones are in a file and read a few batches at a time
MIN_FINGERPRINT_SCORE = 9.0
"""Minimum score of the peaks that are counted, if detection finds smaller ones: those are mostly of distant neurons,
and so many that all depths look alike."""
MIN_RELIABILITY = 0.5  # correlation of the shifts estimated from the two halves of the peaks; lower ones are noise
UNCERTAIN_BINS, MUCH_UNCERTAIN = 1.0, 0.1
"""There is a warning if half the difference between the estimates from the two halves exceeds one bin in more than a
tenth of batches and segments; where it does, it is usually several bins, as a half is aligned with other neurons."""
STILL_BINS = 1.0  # s.d. of unreliable shifts up to which they are set to zero without a warning


class Registration:
    """Registers the fingerprints of the batches, as Kilosort4 does; shifts that cannot be determined are 0."""

    reads: ClassVar[tuple[str, ...]] = ("nblocks", "binning_depth", "drift_smoothing", "Th_universal")

    def __init__(self, settings: Settings, tiling: Tiling, probe: Probe, scratch: Path | None = None) -> None:
        self._settings, self._tiling = settings, tiling
        self._lowest_um = float(probe.y_um.min())
        self._span_um = float(np.ptp(probe.y_um))
        self._n_bins = kernels.n_depth_bins(self._span_um, settings.binning_depth)
        shape = (len(tiling), 2, self._n_bins, kernels.N_AMPLITUDE_BINS)  # (b, half, z, a)
        self._counts = scratch_array(shape, np.uint16, scratch, held_bytes=HELD_BYTES)

    def add(self, sample: NDArray[np.int64], depth_um: NDArray[np.float32], score: NDArray[np.float32]) -> None:
        """Count the peaks by batch, half, depth and amplitude."""
        threshold = max(common_peak(self._settings), MIN_FINGERPRINT_SCORE)
        large = score >= threshold
        sample, depth_um, score = sample[large], depth_um[large], score[large]
        tile = self._tiling.tile_of(sample)
        rank, _ = kernels.rank_within(tile)
        bins = kernels.fingerprint_bins(
            depth_um,
            score,
            lowest_um=self._lowest_um,
            bin_um=self._settings.binning_depth,
            n_bins=self._n_bins,
            threshold=threshold,
        )
        np.add.at(self._counts, (tile, rank % 2, *bins), 1)
        release_pages(self._counts)

    def estimate(self) -> Drift:
        """Register all fingerprints; if the result is not reliable, the shift is 0, with a warning."""
        return self.of(StreamedArray(self._counts))

    def of(self, counts: StreamedArray | NDArray[np.uint16]) -> Drift:
        """Shifts of all batches from their fingerprints (b, half, z, a)."""
        n_batches, smoothing = counts.shape[0], self._settings.drift_smoothing
        blocks = blocks_of(self._settings, self._span_um)
        if self._n_bins < kernels.MIN_DEPTH_BINS or n_batches < 2:  # not worth a warning on every tetrode
            return self._drift(np.zeros((n_batches, 2 * blocks[0] - 1)))

        def registered(halves: slice, blocks: list[int]) -> list[NDArray[np.float64]]:
            shifts = kernels.Registered.rigidly(counts, halves).in_segments(blocks, smoothing)
            return [shift - np.median(shift, axis=0) for shift in shifts]

        even, odd = (registered(slice(half, half + 1), blocks) for half in (0, 1))
        nblocks = kernels.best_nblocks(blocks, even, odd, self._n_bins)
        (shift,) = registered(slice(None), [nblocks])
        halves = [half[blocks.index(nblocks)] for half in (even, odd)]
        error, reliability = np.abs(halves[0] - halves[1]) / 2, _correlation(*halves)
        if reliability < MIN_RELIABILITY:
            if shift.std() > STILL_BINS:
                warn(
                    "Drift is taken as zero: the correlation of the shifts estimated from even and from odd peaks is "
                    f"only {reliability:.2f} (few peaks).",
                    DriftWarning,
                )
            return self._drift(np.zeros_like(shift), error)
        uncertain = float(np.mean(error > UNCERTAIN_BINS))
        if uncertain > MUCH_UNCERTAIN:
            warn(
                f"Drift is uncertain in {100 * uncertain:.0f} % of the recording: there, shifts estimated from even "
                f"and from odd peaks differ by more than {2 * UNCERTAIN_BINS * self._settings.binning_depth:g} µm. "
                "See drift.error_um of the result for where; units there may be cut into pieces.",
                DriftWarning,
            )
        return self._drift(shift, error)

    def _drift(self, shift: NDArray[np.float64], error: NDArray[np.float64] | None = None) -> Drift:
        """Shifts and errors of segments (b, g) in bins, as a Drift in µm."""
        bin_um = self._settings.binning_depth
        segments = kernels.segment_bounds(self._n_bins, (shift.shape[1] + 1) // 2)
        centre_um = self._lowest_um - 1 + bin_um * np.mean(segments, axis=1)
        known = {} if error is None else {"error_um": error * bin_um}
        return Drift(shift_um=shift * bin_um, centre_um=centre_um, **known)

    @staticmethod
    def n_bytes(load: Load) -> tuple[int, int]:
        """Fingerprints of all batches, in memory or on disk, and the arrays of the registration."""
        n, span_um = len(load.tiling), float(np.ptp(load.probe.y_um))
        segments = [2 * blocks - 1 for blocks in blocks_of(load.settings, span_um)]
        depth_bins = kernels.n_depth_bins(span_um, load.settings.binning_depth)
        bins = depth_bins * kernels.N_AMPLITUDE_BINS
        fingerprints = 4 * n * bins  # two halves of 16 bits
        beside = 2 * kernels.smoothing_reach(load.settings.drift_smoothing)
        n_chunk = min(kernels.batches_per_chunk(depth_bins) + beside, n)
        # Logarithms of a chunk of fingerprints and of the batches beside it; their similarity at 11 shifts by depth,
        # and, for one number of blocks at a time, in each segment, then at 101 shifts. Those on which first references
        # are tried; the shifts of all.
        tried = 4 * bins * min(n, kernels.BATCHES_TRIED)
        comparing = n_chunk * (24 * bins + 8 * (11 * 3 * depth_bins + (3 * 11 + 101) * max(segments)))
        registering = tried + comparing + 8 * 4 * n * sum(segments)
        return min(fingerprints, HELD_BYTES) + registering, fingerprints if fingerprints > HELD_BYTES else 0


def blocks_of(settings: Settings, span_um: float) -> list[int]:
    """Numbers of depth blocks, of which the best one is taken."""
    return kernels.blocks_tried(span_um) if settings.nblocks == AUTO else [int(settings.nblocks)]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = (a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0
