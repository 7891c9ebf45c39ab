"""Drift estimation: fingerprints of activity over depth, and their registration (section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

N_AMPLITUDE_BINS = 20
MAX_SCORE = 99.0  # larger scores are clipped to this
REFERENCE_BATCH = 300  # the first reference; in a shorter recording, the middle batch
OTHER_REFERENCES = (0.1, 0.3, 0.7, 0.9)  # others, at these shares of the recording
BATCHES_TRIED = 200  # batches on which first references are tried, at most
LARGER_BY = 1.1  # factor of the squared norm of the mean fingerprint from which another first reference is better
RIGID_ITERATIONS = 10  # the last one only compares
RIGID_REACH = 15  # largest shift tested in one iteration, in bins
SEGMENT_REACH = 5  # largest shift tested per segment after the rigid shift, in bins
BLOCKS_TRIED, MIN_BLOCK_UM = (1, 2, 3, 4, 6, 8, 12), 300.0  # for nblocks="auto"
EQUAL_WITHIN = 0.23  # bins; errors whose mean squares differ by less than its square count as equal
TRUNCATED = 4.0  # standard deviations of the Gaussians that smooth, beyond which they are 0
UPSAMPLING = 10  # steps per bin of the final shift
MIN_DEPTH_BINS = 16  # with fewer depth bins a shift cannot be determined
BINS_PER_CHUNK = 1 << 19  # of the fingerprints that are compared at a time: a few megabytes


def n_depth_bins(span_um: float, bin_um: float) -> int:
    """Number of depth bins from 1 µm below the lowest contact to the highest."""
    return 1 + math.ceil((span_um + 1) / bin_um)


def fingerprint_bins(
    depth_um: NDArray[np.float32],
    score: NDArray[np.float32],
    *,
    lowest_um: float,
    bin_um: float,
    n_bins: int,
    threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bins of a fingerprint in which peaks are counted, by depth and by logarithm of the score.

    Parameters
    ----------
    depth_um, score : ndarray, shape (n,)
    lowest_um : float
        Depth of the lowest contact.
    threshold : float
        ``Th_universal``, the lower edge of the first amplitude bin; the last one ends at 100.

    Returns
    -------
    z, a : ndarray of int64, shape (n,)
        Depth bin and amplitude bin.
    """
    z = np.floor((depth_um.astype(float) - (lowest_um - 1)) / bin_um).astype(np.int64).clip(0, n_bins - 1)
    level = np.log(np.minimum(score.astype(float), MAX_SCORE) / threshold) / math.log(100 / threshold)
    return z, (level * N_AMPLITUDE_BINS).astype(np.int64).clip(0, N_AMPLITUDE_BINS - 1)


def segment_bounds(n_bins: int, nblocks: int) -> list[tuple[int, int]]:
    """Half-overlapping depth segments, 2·nblocks − 1 of n_bins // nblocks bins each.

    >>> segment_bounds(100, 2)
    [(0, 50), (25, 75), (50, 100)]
    """
    length = max(n_bins // nblocks, 1)
    starts = np.round(np.linspace(0, n_bins - length, 2 * nblocks - 1)).astype(int)
    return [(int(start), int(start) + length) for start in starts]


class Counts(Protocol):
    """Peaks counted by :func:`fingerprint_bins`: an array (b, h, z, a) of uint16, or an object indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of batches, parts, depth bins and amplitude bins."""

    def __getitem__(self, index: Any, /) -> NDArray[np.uint16]:
        """Counts of some batches, or of some parts of them."""


@dataclass(frozen=True)
class Registered:
    """Fingerprints of all batches that are aligned by a rigid shift, and can then be aligned in segments.

    Shifts do not wrap around: bins shifted in from beyond the probe contain the mean (0), and the total
    rigid shift is at most half of the depth bins.

    Attributes
    ----------
    counts : ndarray, shape (b, h, z, a), or an object indexed like one
        Read a few batches at a time.
    parts : slice
        Parts (second axis) that are summed.
    shift : ndarray of int64, shape (b,)
        In whole bins.
    reference : ndarray, shape (z, a)
        The mean fingerprint that the batches align with.
    """

    counts: Counts
    parts: slice
    shift: NDArray[np.int64]
    reference: NDArray[np.float64]

    @classmethod
    def rigidly(cls, counts: Counts, parts: slice = slice(None)) -> Registered:
        """Find the rigid shifts."""
        return cls(counts, parts, *_register_rigidly(counts, parts))

    def in_segments(self, nblocks: Sequence[int], smoothing: tuple[float, float, float]) -> list[NDArray[np.float64]]:
        """Align the segments of the batches on their own.

        Parameters
        ----------
        nblocks : sequence of int
            Numbers of depth segments if they did not overlap; see :func:`segment_bounds`.
        smoothing : tuple of float
            Widths of the smoothing over shift, batch and segment.

        Returns
        -------
        list of ndarray of float64, shape (b, g)
            For each of `nblocks`, shifts in depth bins; positive moves a batch to larger depth.
        """
        n_batches, _, n_bins, _ = self.counts.shape
        steps = np.arange(-min(SEGMENT_REACH, n_bins // 2), min(SEGMENT_REACH, n_bins // 2) + 1)
        bounds = [np.array(segment_bounds(n_bins, n)) for n in nblocks]
        shifts = [np.zeros((n_batches, len(of))) for of in bounds]
        beside = smoothing_reach(smoothing)
        for rows in _chunks(self.counts):
            around = slice(max(rows.start - beside, 0), min(rows.stop + beside, n_batches))
            prints = _prints(self.counts[around, self.parts])
            product = _products_at_depths(prints, self.reference, self.shift[around], steps)
            below = np.concatenate([np.zeros_like(product[..., :1]), np.cumsum(product, axis=2)], axis=2)
            core = slice(rows.start - around.start, min(rows.stop, n_batches) - around.start)
            for shift, of in zip(shifts, bounds, strict=True):
                similarity = below[..., of[:, 1]] - below[..., of[:, 0]]  # (step, b, g)
                smooth = gaussian_filter(similarity, smoothing, mode="reflect", truncate=TRUNCATED)[:, core]
                shift[rows] = self.shift[rows, None] + _peak_between_bins(smooth, int(steps[-1]))
        return shifts


def smoothing_reach(smoothing: tuple[float, float, float]) -> int:
    """Number of batches on either side that smoothing reaches."""
    return int(TRUNCATED * smoothing[1] + 0.5)


def blocks_tried(span_um: float) -> list[int]:
    """Numbers of depth blocks, of which :func:`best_nblocks` chooses: 1, and those that are at least 300 µm long.

    >>> blocks_tried(620), blocks_tried(3820)
    ([1, 2], [1, 2, 3, 4, 6, 8, 12])
    """
    return [n for n in BLOCKS_TRIED if n == 1 or n * MIN_BLOCK_UM <= span_um]


def best_nblocks(
    nblocks: Sequence[int], even: Sequence[NDArray[np.float64]], odd: Sequence[NDArray[np.float64]], n_bins: int
) -> int:
    """Number of depth blocks with which the estimate from one half best predicts the most detailed one from the other.

    Too few cannot follow the tissue; too many follow the noise, which differs between the halves.

    Parameters
    ----------
    nblocks : sequence of int
        Ascending.
    even, odd : sequence of ndarray, shape (b, g)
        Shifts in depth bins estimated from the two halves, for each of these.
    n_bins : int
        Number of depth bins.

    Returns
    -------
    int
        Of those whose errors count as equal to the smallest one, the smallest number.
    """
    centres = [np.mean(segment_bounds(n_bins, n), axis=1) for n in nblocks]

    def detail(shift: NDArray[np.float64], centre: NDArray[np.float64]) -> NDArray[np.float64]:
        fine = shift @ _interpolation(centre, centres[-1])
        return np.asarray(fine - fine.mean(axis=1, keepdims=True))  # what is rigid is no reason for more blocks

    finest = detail(even[-1], centres[-1]), detail(odd[-1], centres[-1])
    errors = [
        (np.square(detail(of_even, centre) - finest[1]).mean() + np.square(detail(of_odd, centre) - finest[0]).mean())
        / 2
        for of_even, of_odd, centre in zip(even, odd, centres, strict=True)
    ]
    return next(n for n, error in zip(nblocks, errors, strict=True) if error <= min(errors) + EQUAL_WITHIN**2)


def _interpolation(centre: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix (g, d) by which shifts at segment centres (g,) are interpolated as in :func:`shift_at`."""
    return np.stack([shift_at(at, centre, unit) for unit in np.eye(len(centre))])


def _prints(counts: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Fingerprints (b, z, a) of counts (b, h, z, a): log2(1 + count), minus the mean over depth."""
    prints = np.log2(1.0 + counts.sum(axis=1, dtype=np.uint32))
    return np.asarray(prints - prints.mean(axis=1, keepdims=True))


def batches_per_chunk(n_bins: int) -> int:
    """Number of batches compared at a time, given the number of depth bins of their fingerprints."""
    return max(BINS_PER_CHUNK // (n_bins * N_AMPLITUDE_BINS), 1)


def _chunks(counts: Counts) -> list[slice]:
    n_batches, _, n_bins, _ = counts.shape
    size = batches_per_chunk(n_bins)
    return [slice(start, start + size) for start in range(0, n_batches, size)]


def _register_rigidly(counts: Counts, parts: slice = slice(None)) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Shifts in whole bins (b,), and the mean fingerprint that they align with (z, a).

    With some first references, batches at another displacement are aligned with the wrong neurons, and remain so. So
    others are tried on some of the batches, and the one with which their mean fingerprint is largest counts instead, if
    it is larger by more than the few percent by which a reference matters otherwise.
    """
    n_batches = counts.shape[0]
    places = [min(REFERENCE_BATCH, n_batches // 2), *(int(share * n_batches) for share in OTHER_REFERENCES)]
    first = [_prints(counts[place : place + 1, parts])[0] for place in places]
    tried = counts[:: -(-n_batches // BATCHES_TRIED), parts]
    sizes = [float(np.square(_align(tried, reference)[1]).sum()) for reference in first]
    best = int(np.argmax(sizes))
    return _align(counts, first[best if sizes[best] > LARGER_BY * sizes[0] else 0], parts)


def _align(
    counts: Counts, reference: NDArray[np.float64], parts: slice = slice(None)
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Shifts in whole bins (b,) by which all fingerprints align with a reference (z, a), then their mean, and so on.

    Returns the last mean, too.
    """
    n_batches, _, n_bins, _ = counts.shape
    reach = min(RIGID_REACH, n_bins // 2)
    steps = np.array(sorted(range(-reach, reach + 1), key=lambda step: (abs(step), step)))  # ties: the smallest
    total = np.zeros(n_batches, np.int64)
    for _ in range(RIGID_ITERATIONS - 1):
        mean = np.zeros_like(reference)
        for rows in _chunks(counts):
            prints = _prints(counts[rows, parts])
            best = steps[np.argmax(_compare(prints, reference, total[rows], steps), axis=1)]
            total[rows] = np.clip(total[rows] + best, -(n_bins // 2), n_bins // 2)
            for shift in np.unique(total[rows]):
                mean += _shifted(prints[total[rows] == shift].sum(axis=0), int(shift))
        if np.array_equal(mean / n_batches, reference):
            break
        reference = mean / n_batches
    return total, reference


def _products_at_depths(
    prints: NDArray[np.float64], reference: NDArray[np.float64], base: NDArray[np.int64], steps: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Inner products as of :func:`_compare`, at each depth of the reference: (step, b, z)."""
    n_bins = len(reference)
    products = np.zeros((len(steps), len(prints), n_bins))
    for shift in np.unique(base):
        rows = np.flatnonzero(base == shift)
        some = prints[rows]
        for index, moved in enumerate((shift + steps).tolist()):
            if abs(moved) < n_bins:
                to, of = slice(max(moved, 0), n_bins + min(moved, 0)), slice(max(-moved, 0), n_bins - max(moved, 0))
                products[index, rows, to] = np.einsum("bza,za->bz", some[:, of], reference[to])
    return products


def _compare(
    prints: NDArray[np.float64], reference: NDArray[np.float64], base: NDArray[np.int64], steps: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Inner products of each print (b, z, a), shifted by ``base + steps``, with the reference (z, a): (b, step)."""
    wanted = base[:, None] + steps[None, :]
    shifts = np.unique(wanted)
    moved = np.stack([_shifted(reference, -int(shift)).ravel() for shift in shifts], axis=1)  # the other way round
    products = prints.reshape(len(prints), -1) @ moved
    return np.asarray(np.take_along_axis(products, np.searchsorted(shifts, wanted), axis=1))


def _shifted(values: NDArray[np.float64], shift: int) -> NDArray[np.float64]:
    """Shift rows (z, a) to larger depth by `shift` bins; rows shifted in are 0."""
    moved = np.zeros_like(values)
    n = len(values)
    if abs(shift) < n:
        moved[max(shift, 0) : n + min(shift, 0)] = values[max(-shift, 0) : n + min(-shift, 0)]
    return moved


def _peak_between_bins(similarity: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Shift of largest similarity (shift, b, g) after upsampling with a Gaussian of one bin: (b, g), in bins."""
    coarse = np.arange(-reach, reach + 1)
    fine = np.arange(-reach * UPSAMPLING, reach * UPSAMPLING + 1) / UPSAMPLING
    fine = fine[np.argsort(np.abs(fine), kind="stable")]  # ties: the smallest
    kernel = np.exp(-0.5 * (fine[:, None] - coarse[None, :]) ** 2)
    return fine[np.argmax(np.tensordot(kernel, similarity, axes=(1, 0)), axis=0)]


def shift_at(
    depth_um: NDArray[np.float64], centre_um: NDArray[np.floating], shift_um: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Shift at given depths, linear between segment centres and extrapolated outside: (c,), (g,), (g,) to (c,).

    If there are more segments than depth bins, several have the same centre; between two such, it is that of the first.
    """
    if len(centre_um) == 1:
        return np.full(len(depth_um), float(shift_um[0]))
    segment = np.clip(np.searchsorted(centre_um, depth_um) - 1, 0, len(centre_um) - 2)
    width = centre_um[segment + 1].astype(float) - centre_um[segment]
    along = np.divide(depth_um - centre_um[segment], width, out=np.zeros(len(depth_um)), where=width > 0)
    return np.asarray(shift_um[segment] * (1 - along) + shift_um[segment + 1] * along, np.float64)


def rank_within(group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of each row within its group, and the number of rows in the group, for ascending groups (n,).

    Peaks are divided into even and odd ones, and thinned, within a tile, as a block may be any number of tiles.

    >>> rank_within(np.array([0, 0, 0, 2, 5, 5]))
    (array([0, 1, 2, 0, 0, 1]), array([3, 3, 3, 1, 2, 2]))
    """
    first, after = (np.searchsorted(group, group, side=side) for side in ("left", "right"))
    return np.arange(len(group)) - first, after - first
