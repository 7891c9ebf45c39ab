"""Whether two groups of spikes are two neurons, or one neuron whose spikes vary (section 6, step 6).

The spikes of one neuron differ in ways that are known: the tissue moves past the contacts, amplitudes fall within
bursts, and they change over minutes. So groups are compared only where these are the same, in *cells*: windows of time
and ranges of displacement. The spikes are projected on the axis that separates the two groups within cells. If these
are farther apart than two parts of one cluster can be, they are two neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels.correlograms import correlogram

SEPARATE_FROM = 3.0
"""Separation of two neurons: more than that of the halves of a normal distribution (2.65), less than that of the halves
of a uniform one (√12). Between 2.8 and √12, whole sorts hardly differ."""
RIDGE = 1.0  # of the regression: about the variance of the noise, which few spikes do not determine
SPAN = 2.0  # farther projections, of spikes that overlap others, count as ± this

MIN_SIMILARITY = 0.5  # of the means; less similar groups are two neurons
HUGE, SAME_BELOW = 50.0, 0.1
"""Norm of the larger mean, in noise s.d., from which groups are one neuron if the distance of the means, relative to
the larger one and apart from time shifts, is less. The waveforms of a neuron of 2 mV differ by 0.07 between spikes a
quarter of a sample apart, which is many standard deviations of the noise; those of two neurons by more than 0.3."""
CONTINUING_BELOW, LIMIT_PER_UM = 0.6, 0.015
"""Distance of the means, relative to the larger one, below which two groups that were never recorded at the same
displacement are one neuron: that of two means of one size whose similarity is 0.82; and by how much it rises for each
µm between the displacements at which the two are nearest to each other, as a waveform changes when it moves past the
contacts."""
MAX_LIMIT = 0.9
"""Up to which it rises when units are merged (a similarity of 0.6). A neuron is seen at all displacements, unless it
leaves the probe, so two units that take turns are likely to be one."""
OVERRULING_BELOW, OVERRULING_PER_UM = 0.4, 0.025
"""The same two if a few spikes say that the groups are two neurons. Of 855 pairs of parts of one neuron in simulated
recordings, less than 10 µm apart, 97 % had a distance of less than 0.34, and those with few spikes had larger ones."""
TURNS_SHARE = 0.15
"""Groups take turns with the tissue's position if the smaller of their counts in each range of displacement add up to
at most this share of the group with fewer spikes. A few spikes of one part of a neuron are found as those of the other,
because they overlap others, which is why they differ from the rest where they were recorded."""

MAX_WINDOWS, SPIKES_PER_CELL = 8, 8  # windows of time; as many as leave the smaller group so many spikes per cell
RANGE_EFFECT, MIN_RANGE_UM, MAX_RANGE_UM = 2.0, 1.0, 8.0
"""Within a range of displacement, features change by about two standard deviations of the noise. A waveform changes by
some 5 % per µm (:data:`CHANGE_PER_UM`), so the ranges of a large unit are narrow."""

CHANGE_PER_UM = 0.05
WIDENED = (1.0, 2.0)  # factors of the width of ranges; the wider ones are used if the others have too few spikes
MIN_ALONE = 0.6
"""Share of a group's spikes that do not overlap others, relative to the other group's share, below which what sets the
group apart is that its spikes overlap others."""
MIN_IN_CELL, MIN_IN_CELLS = 5, 15  # spikes of either group in a cell; of the smaller group of each cell, in all cells
BURST_MS = 20.0  # maximum interval within a burst
BURST_EXCESS = 1.5  # pairs within a burst, relative to chance
MIN_COUNTED_SHARE = 0.25
"""Minimum share of a group that does not follow other spikes in bursts, if that share is to be compared. Of a group of
small spikes at the end of bursts, little else than background is left."""
FIXED = 1e6  # variance that keeps a direction out of the regression


class Conditions(NamedTuple):
    """What is known of each spike besides its waveform.

    Attributes
    ----------
    sample : ndarray, shape (n,), int64, samples
        Time of the spike.
    displacement_um : ndarray, shape (n,), float32, µm
        Displacement of the tissue at that time, from the drift that was corrected; 0 if none was, NaN where it is not
        known.
    elapsed : ndarray, shape (n,), float64
        Share of the recording before the spike, 0 … 1.
    overlapped : ndarray, shape (n,), bool
        True for spikes that are known to overlap others.
    sampling_rate_hz : float
    """

    sample: NDArray[np.int64]
    displacement_um: NDArray[np.float32]
    elapsed: NDArray[np.float64]
    overlapped: NDArray[np.bool_]
    sampling_rate_hz: float

    @classmethod
    def of_columns(cls, columns: Mapping[str, NDArray[Any]], sampling_rate_hz: float) -> Conditions:
        """From the columns of a table, of which :meth:`columns` are some."""
        displacement_um, elapsed, overlapped = (columns[name] for name in CONDITIONS)
        return cls(columns["sample"], displacement_um, elapsed, overlapped, sampling_rate_hz)

    def columns(self) -> dict[str, NDArray[Any]]:
        """As columns of a table, besides the times."""
        return {name: getattr(self, name) for name in CONDITIONS}

    def at(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Conditions:
        """Those of some spikes."""
        sample, displacement_um, elapsed, overlapped, rate_hz = self
        return Conditions(sample[index], displacement_um[index], elapsed[index], overlapped[index], rate_hz)


CONDITIONS = ("displacement_um", "elapsed", "overlapped")  # besides the times


class Group(NamedTuple):
    """Some spikes to be compared with others.

    Attributes
    ----------
    features : Tensor, shape (n, d), float64, noise s.d.
        On the channels that both groups have.
    conditions : Conditions
    counts : ndarray, shape (n,), bool
        False for spikes that follow another one within a burst, if there are bursts; their amplitudes are smaller.
    """

    features: Tensor
    conditions: Conditions
    counts: NDArray[np.bool_]

    @property
    def n(self) -> int:
        """Number of spikes."""
        return len(self.features)

    def at(self, kept: NDArray[np.bool_]) -> Group:
        """Some of the spikes."""
        return Group(self.features[torch.from_numpy(kept)], self.conditions.at(kept), self.counts[kept])

    def counted(self) -> Group:
        """The spikes that count."""
        return self.at(self.counts)


def are_two(
    a: Group,
    b: Group,
    *,
    time_derivative: Tensor | None = None,
    rolled: Sequence[Tensor] = (),
    max_limit: float = CONTINUING_BELOW,
) -> bool:
    """Whether two groups of spikes come from two neurons rather than one.

    The first of these that can be decided decides, with one exception. In cells and ranges, spikes are never compared
    along the time derivative of the mean, because the peak of a spike is anywhere within a sample, and templates may be
    aligned differently; nor along what the mean loses if it is rolled, as the components do not contain all of the
    rolled waveform.

    1. Means less similar than :data:`MIN_SIMILARITY` are those of two neurons (step 6b). Huge ones that are nearly the
       same (:data:`SAME_BELOW`) are those of one.
    2. Spikes that do not follow another within a burst are compared in cells of time and displacement, if they are at
       least :data:`MIN_COUNTED_SHARE` of each group. Whatever separates them there is not bursting, fading or motion
       (step 6c).
    3. All spikes are compared in ranges of displacement, along directions other than their amplitude, which may have
       changed (step 6d).
    4. If the tissue moved, and the groups were recorded at different displacements, they are one neuron if the mean of
       one group continues that of the other (step 6e). That also decides if the second or the third rule finds two
       neurons, but hardly any spikes of the groups were recorded at the same displacements (:func:`take_turns`).

    Spikes at unknown displacements do not enter. If a group has too few others (less than half, and less than
    :data:`MIN_IN_CELLS`), only the distance of the means of all spikes decides. Too few spikes to decide are those of
    one neuron.

    Two neurons must also be found as such without the spikes that overlap others, if there are any. If these leave less
    than :data:`MIN_IN_CELLS` of a group, or are far more of one group than of the other (:data:`MIN_ALONE`), the
    distance of the means of all spikes has to be that of two neurons instead.

    Parameters
    ----------
    a, b : Group
        Each has at least one spike.
    time_derivative : Tensor, shape (q, q), float64, optional
        ``features @ time_derivative`` are the features of the derivative of a waveform, on each channel
        (:func:`~ks4stream.kernels.templates.time_derivative`). Without it, derivatives are not left out.
    rolled : sequence of Tensor, shape (q, q), float64
        ``features @ matrix`` are those of waveforms rolled there and back, for every lag by which some were rolled.
    max_limit : float
        Up to which the limit of the fourth rule rises with the distance of the displacements at which the groups are
        nearest, for groups of at least :data:`MIN_IN_CELLS` spikes; smaller ones may never have been recorded at the
        same displacement by chance.
    """
    differ = partial(_differ, time_derivative=time_derivative, rolled=rolled, max_limit=max_limit)
    if not differ(a, b):
        return False
    overlapped = [group.conditions.overlapped for group in (a, b)]
    if not any(map(np.any, overlapped)):
        return True
    alone = [group.at(~of) for group, of in zip((a, b), overlapped, strict=True)]
    share = [some.n / group.n for some, group in zip(alone, (a, b), strict=True)]
    if min(some.n for some in alone) < MIN_IN_CELLS or min(share) < MIN_ALONE * max(share):
        return _are_distant(a, b)
    return differ(*alone)


def _differ(a: Group, b: Group, *, time_derivative: Tensor | None, rolled: Sequence[Tensor], max_limit: float) -> bool:
    """Whether two groups of spikes, overlapped or not, come from two neurons: see :func:`are_two`."""
    known = [group.at(~np.isnan(group.conditions.displacement_um)) for group in (a, b)]
    if any(some.n < min(MIN_IN_CELLS, 0.5 * group.n) for some, group in zip(known, (a, b), strict=True)):
        return _are_distant(a, b)
    a, b = known
    mean_a, mean_b = a.features.mean(0), b.features.mean(0)
    if cosine(mean_a, mean_b) < MIN_SIMILARITY:
        return True
    amplitude = (mean_a + mean_b)[None]
    changes = [] if time_derivative is None else [time_derivative]
    changes += [matrix - torch.eye(len(matrix)).to(matrix) for matrix in rolled]
    alike = torch.cat([amplitude[:0], *((amplitude.view(-1, len(of)) @ of).view(1, -1) for of in changes)])
    larger = max(float(mean_a.norm()), float(mean_b.norm()))
    if larger > HUGE and float(_without(mean_a - mean_b, alike).norm()) < SAME_BELOW * larger:
        return False
    width_um = range_width_um(a, b)
    ranges = ranges_of(a, b, width_um)
    apart = _separation_in_cells(a, b, alike, amplitude, width_um)
    if apart is not None and (apart < SEPARATE_FROM or not take_turns(*ranges)):
        return apart >= SEPARATE_FROM
    if max(int(of.max()) for of in ranges) == 0:
        return False
    limit, per_um = CONTINUING_BELOW, LIMIT_PER_UM
    if apart is not None:
        limit, per_um = OVERRULING_BELOW, OVERRULING_PER_UM
        own = [in_majority(*ranges), in_majority(*ranges[::-1])]  # the other spikes are astray
        a, b = (group.at(kept) for group, kept in zip((a, b), own, strict=True))
        ranges = [of[kept] for of, kept in zip(ranges, own, strict=True)]
    if min(a.n, b.n) >= MIN_IN_CELLS:
        x, y = nearest_means(a.features, b.features, *ranges)
        limit = min(limit + per_um * width_um * abs(x.range - y.range), max_limit)
    return distance(a.features, b.features, *ranges) > limit


def _are_distant(a: Group, b: Group) -> bool:
    """Whether the means of all spikes are, wherever the tissue was."""
    return distance(a.features, b.features, np.zeros(a.n, np.int64), np.zeros(b.n, np.int64)) > CONTINUING_BELOW


def _without(vector: Tensor, directions: Tensor) -> Tensor:
    """What is left of a vector (d,) without its part along some directions (k, d)."""
    if not len(directions):
        return vector
    axes, sizes, _ = torch.linalg.svd(directions.T, full_matrices=False)
    axes = axes[:, sizes > 1e-6 * sizes.max()]
    return vector - axes @ (axes.T @ vector)


def _separation_in_cells(a: Group, b: Group, alike: Tensor, amplitude: Tensor, width_um: float) -> float | None:
    """The first separation of steps 6c and 6d for which there are enough spikes.

    Parameters
    ----------
    a, b : Group
    alike : Tensor, shape (k, d), float64
        Directions along which spikes are not compared.
    amplitude : Tensor, shape (1, d), float64
        One more if spikes that follow others in bursts are compared, too.
    width_um : float
        Width of a range of displacement.
    """
    if min(a.n, b.n) < MIN_IN_CELLS:
        return None
    widened = WIDENED if max(int(of.max()) for of in ranges_of(a, b, width_um)) > 0 else WIDENED[:1]
    counted = (a.counted(), b.counted())
    enough_counted = all(some.n >= MIN_COUNTED_SHARE * group.n for some, group in zip(counted, (a, b), strict=True))
    for groups, directions in ((counted, alike), ((a, b), torch.cat([alike, amplitude]))):
        if groups is counted and not enough_counted:
            continue
        for factor in widened:
            ranges = ranges_of(*groups, factor * width_um)
            cells = ranges
            if groups is counted:
                n_windows = windows_for(*ranges)
                cells = [
                    of * n_windows + window_of(group.conditions.elapsed, n_windows)
                    for of, group in zip(ranges, groups, strict=True)
                ]
            apart = separation_within(groups[0].features, groups[1].features, *cells, without=directions)
            if apart is not None:
                return apart
    return None


def range_width_um(a: Group, b: Group) -> float:
    """Width of the ranges of displacement in which two groups are compared."""
    larger = max(float(group.features.mean(0).norm()) for group in (a, b))
    return min(max(RANGE_EFFECT / CHANGE_PER_UM / max(larger, 1e-9), MIN_RANGE_UM), MAX_RANGE_UM)


def take_turns(range_a: NDArray[np.int64], range_b: NDArray[np.int64]) -> bool:
    """Whether hardly any spikes of two groups are in the same ranges of displacement.

    >>> take_turns(np.repeat([0, 1], [9, 1]), np.repeat([1, 2], [10, 10]))
    True
    >>> take_turns(np.repeat([0, 1], [7, 3]), np.repeat([1, 2], [10, 10]))
    False
    """
    together = np.minimum(*_counts_by_range(range_a, range_b)).sum()
    return bool(together <= TURNS_SHARE * min(len(range_a), len(range_b)))


def in_majority(range_a: NDArray[np.int64], range_b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which spikes (n,) of the first group are in ranges in which it has more of them than the second.

    >>> in_majority(np.array([0, 0, 1, 2]), np.array([1, 1, 2])).tolist()
    [True, True, False, False]
    """
    counts_a, counts_b = _counts_by_range(range_a, range_b)
    return np.asarray((counts_a > counts_b)[range_a])


def _counts_by_range(range_a: NDArray[np.int64], range_b: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Numbers of spikes of two groups in each range of displacement."""
    n = max(int(of.max()) for of in (range_a, range_b)) + 1
    return [np.bincount(of, minlength=n) for of in (range_a, range_b)]


def ranges_of(a: Group, b: Group, width_um: float) -> list[NDArray[np.int64]]:
    """Range of displacement of each spike, of so many µm, numbered from 0."""
    moved_um = [group.conditions.displacement_um for group in (a, b)]
    lowest_um = min((float(of.min()) for of in moved_um if len(of)), default=0.0)
    return [((of - lowest_um) / width_um).astype(np.int64) for of in moved_um]


def windows_for(range_a: NDArray[np.int64], range_b: NDArray[np.int64]) -> int:
    """Number of windows of time such that the smaller group has enough spikes per cell."""
    n_ranges = max(len(np.intersect1d(range_a, range_b)), 1)
    wanted = min(len(range_a), len(range_b)) // (SPIKES_PER_CELL * n_ranges)
    return min(MAX_WINDOWS, max(1, wanted))


def cosine(x: Tensor, y: Tensor) -> float:
    """Similarity of two vectors."""
    return float(x @ y / (x.norm() * y.norm()).clamp_min(1e-30))


def window_of(elapsed: NDArray[np.float64], n_windows: int) -> NDArray[np.int64]:
    """Window of time of each spike."""
    return (elapsed * n_windows).astype(np.int64).clip(0, n_windows - 1)


def distance(a: Tensor, b: Tensor, range_a: NDArray[np.int64], range_b: NDArray[np.int64]) -> float:
    """Distance of two waveforms, relative to the larger one, in the ranges of displacement that are nearest.

    The waveforms are the means of spikes, of which the noise is expected to add to squared norms; it is subtracted. The
    distance of two that do not exceed the noise is 0.
    """
    x, y = nearest_means(a, b, range_a, range_b)
    squares, freedom = 0.0, 0
    for features, of in ((a, range_a), (b, range_b)):
        ranges, index = np.unique(of, return_inverse=True)
        within = torch.from_numpy(index)
        squares += float((features - _means(features, within, len(ranges))[within]).square().sum())
        freedom += len(of) - len(ranges)
    variance = squares / freedom if freedom else float(a.shape[1])  # of a spike, in all features; that of white noise
    noise = [variance / side.n for side in (x, y)]
    larger = max(float(side.mean @ side.mean) - of for side, of in zip((x, y), noise, strict=True))
    apart = float((x.mean - y.mean).square().sum()) - sum(noise)
    return math.sqrt(max(apart, 0.0) / larger) if larger > 0 else 0.0


class RangeMean(NamedTuple):
    """Mean features (d,) of the n spikes of a group in one range of displacement, and the number of that range."""

    mean: Tensor
    n: int
    range: int


def nearest_means(
    a: Tensor, b: Tensor, range_a: NDArray[np.int64], range_b: NDArray[np.int64]
) -> tuple[RangeMean, RangeMean]:
    """Means of two groups, each in one range of displacement: in the two ranges that are nearest to each other.

    Ranges with few spikes (less than :data:`MIN_IN_CELL`, or a tenth of the group's fullest range) do not enter.
    """
    known = []
    for features, of in ((a, range_a), (b, range_b)):
        ranges, index, count = np.unique(of, return_inverse=True, return_counts=True)
        enough = count >= min(max(MIN_IN_CELL, 0.1 * count.max()), count.max())
        means = _means(features, torch.from_numpy(index), len(ranges))
        known.append((ranges[enough], means[torch.from_numpy(enough)], count[enough]))
    (ranges_a, means_a, n_a), (ranges_b, means_b, n_b) = known
    gap = np.abs(ranges_a[:, None] - ranges_b)
    i, j = divmod(int(gap.argmin()), len(ranges_b))
    return RangeMean(means_a[i], int(n_a[i]), int(ranges_a[i])), RangeMean(means_b[j], int(n_b[j]), int(ranges_b[j]))


def _means(features: Tensor, cell: Tensor, n_cells: int) -> Tensor:
    """Mean of the features (n, d) of each cell; 0 in empty ones."""
    total = features.new_zeros(n_cells, features.shape[1]).index_add_(0, cell, features)
    return total / torch.bincount(cell, minlength=n_cells).clamp_min(1)[:, None]


# -- lining up ---------------------------------------------------------------------------------------


def lag_between(a: Group, b: Group, rolls: Mapping[int, Tensor]) -> int:
    """The lag by which one group lines up best with another where both were recorded.

    The mean waveforms of two parts of a neuron, each over the displacements at which it was found, may line up at
    another lag than those at the same displacements. These are compared here if there are enough spikes, or else those
    at the nearest displacements.

    Parameters
    ----------
    a, b : Group
    rolls : mapping of int to Tensor, shape (q, q), float64
        The lags, in samples; ``features @ rolls[lag]`` are delayed by the lag, on each channel. The first is the result
        if no other is better, or if the tissue did not move, as far as is known.
    """
    a, b = (group.at(~np.isnan(group.conditions.displacement_um)) for group in (a, b))
    if not a.n or not b.n:
        return next(iter(rolls))
    ranges = ranges_of(a, b, range_width_um(a, b))
    if max(int(of.max()) for of in ranges) == 0:
        return next(iter(rolls))
    cells, count, both = _cells(*ranges)
    if int(torch.minimum(*count)[both].sum()) >= MIN_IN_CELLS:
        weight = _weight(*count)[both, None].sqrt()
        means = (_means(group.features, cell, len(both))[both] for group, cell in zip((a, b), cells, strict=True))
        x, y = (weight * mean for mean in means)
    else:
        x, y = (side.mean[None] for side in nearest_means(a.features, b.features, *ranges))
    similarity = {}
    for lag, roll in rolls.items():
        rolled = (y.view(len(y), -1, len(roll)) @ roll).flatten(1)
        similarity[lag] = float((x * rolled).sum() / rolled.norm().clamp_min(1e-30))
    return max(similarity, key=similarity.__getitem__)


# -- bursts ------------------------------------------------------------------------------------------


def follow_in_bursts(a: NDArray[np.int64], b: NDArray[np.int64], sampling_rate_hz: float) -> bool:
    """Whether spikes of two trains (sorted times) are close together far more often than by chance."""
    reach = 200
    counts = correlogram(a, b, sampling_rate_hz=sampling_rate_hz, reach_ms=reach)
    lag = np.abs(np.arange(-reach, reach + 1))
    near, far = (lag > 0) & (lag <= BURST_MS), lag > 50
    by_chance = float(counts[far].mean()) * int(near.sum())
    return bool(counts[near].sum() > BURST_EXCESS * by_chance + 4 * math.sqrt(by_chance + 1))


def is_first(sample: NDArray[np.int64], every: NDArray[np.int64], sampling_rate_hz: float) -> NDArray[np.bool_]:
    """Which spikes do not follow any of `every` (sorted times) within a burst.

    >>> is_first(np.array([100, 160, 5000]), np.array([100, 160, 5000]), 1000.0).tolist()
    [True, True, True]
    >>> is_first(np.array([100, 160, 5000]), np.array([100, 160, 5000]), 30_000.0).tolist()
    [True, False, True]
    """
    before = np.searchsorted(every, sample) - 1
    interval = sample - every[np.maximum(before, 0)]
    return (before < 0) | (interval > BURST_MS * sampling_rate_hz / 1000)


def firsts(
    samples: Sequence[NDArray[np.int64]], trains: Sequence[NDArray[np.int64]], sampling_rate_hz: float
) -> list[NDArray[np.bool_]]:
    """Which spikes count in a comparison of two trains (sorted times): all, or with bursts only those that begin one.

    Parameters
    ----------
    samples : two ndarrays, int64, samples
        Spikes that will be compared, of one train each.
    trains : two ndarrays, int64, samples
        All spikes.
    sampling_rate_hz : float
    """
    too_few = min(map(len, samples)) < MIN_IN_CELLS  # for any comparison in cells
    if too_few or not follow_in_bursts(trains[0], trains[1], sampling_rate_hz):
        return [np.ones(len(sample), bool) for sample in samples]
    every = np.sort(np.concatenate(trains))
    return [is_first(sample, every, sampling_rate_hz) for sample in samples]


# -- the test ----------------------------------------------------------------------------------------


def separation_within(
    a: Tensor, b: Tensor, cell_a: NDArray[np.int64], cell_b: NDArray[np.int64], *, without: Tensor | None = None
) -> float | None:
    """How far two groups are apart within the same cells.

    −1 (a) and +1 (b) are regressed on the features, which are centred in each cell on the mean of the two groups'
    means. A cell weighs n·n'/(n + n') for its n and n' spikes, shared equally by the two groups. Each spike is
    projected on the axis of a regression without that spike (by the exact identity of ridge regression, in which the
    means of its cell are regressors, too).

    Parameters
    ----------
    a, b : Tensor, shape (n, d), (n', d), float64
    cell_a, cell_b : ndarray, shape (n,), (n',), int64
        Cell of each spike.
    without : Tensor, shape (k, d), optional
        Directions that the axis is perpendicular to.

    Returns
    -------
    float or None
        See :func:`separation`; None if the groups have too few spikes in the same cells.
    """
    cells, count, both = _cells(cell_a, cell_b)
    if int(torch.minimum(*count)[both].sum()) < MIN_IN_CELLS:
        return None
    inside = [both[cell] for cell in cells]
    cells = [cell[kept] for cell, kept in zip(cells, inside, strict=True)]
    groups = [features[kept] for features, kept in zip((a, b), inside, strict=True)]
    means = [_means(features, cell, len(both)) for features, cell in zip(groups, cells, strict=True)]
    middle = 0.5 * (means[0] + means[1])
    groups = [features - middle[cell] for features, cell in zip(groups, cells, strict=True)]
    weight = _weight(*count) * both
    weight /= weight.sum()
    share = [(0.5 * weight / n.clamp_min(1))[cell] for n, cell in zip(count, cells, strict=True)]
    gram = RIDGE * torch.eye(a.shape[1], dtype=torch.float64)
    for features, of_spike in zip(groups, share, strict=True):
        gram.addmm_((features * of_spike[:, None]).T, features)
    if without is not None:
        directions = without / without.norm(dim=1, keepdim=True).clamp_min(1e-30)
        gram.addmm_(directions.T, directions, alpha=FIXED)
    inverse = torch.linalg.inv(gram)
    axis = 0.5 * inverse @ (weight @ (means[1] - means[0]))
    values = []
    for target, features, of_spike, cell, n in zip((-1.0, 1.0), groups, share, cells, count, strict=True):
        leverage = of_spike * ((features @ inverse) * features).sum(1) + 0.5 / n[cell]
        values.append((features @ axis - leverage * target) / (1.0 - leverage).clamp_min(0.1))
    return separation(values[0], values[1])


def _cells(cell_a: NDArray[np.int64], cell_b: NDArray[np.int64]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Number the cells of two groups: (n,) each; the spikes in each, (cell,); and which have enough of both."""
    names, index = np.unique(np.concatenate([cell_a, cell_b]), return_inverse=True)
    cells = list(torch.split(torch.from_numpy(index), [len(cell_a), len(cell_b)]))
    count = [torch.bincount(cell, minlength=len(names)) for cell in cells]
    return cells, count, (count[0] >= MIN_IN_CELL) & (count[1] >= MIN_IN_CELL)


def _weight(count_a: Tensor, count_b: Tensor) -> Tensor:
    """Weight of each cell by the spikes of two groups: n·n'/(n + n')."""
    return (count_a * count_b / (count_a + count_b).clamp_min(1)).double()


def separation(a: Tensor, b: Tensor) -> float:
    """Distance of the means of two groups, relative to the larger standard deviation, less its standard error.

    The larger one, because a slice cut from the tail of a cluster has a small one.

    Parameters
    ----------
    a, b : Tensor, shape (n,), (n',), float64
        Projections of the two groups, near −1 and 1.

    Returns
    -------
    float
        d′ minus its standard error, from Hedges & Olkin, Statistical Methods for Meta-Analysis (1985), chapter 5.
    """
    a, b = a.clamp(-SPAN, SPAN), b.clamp(-SPAN, SPAN)
    spread = max(float(side.std(correction=0)) for side in (a, b))
    apart = float(b.mean() - a.mean()) / max(spread, 1e-9)
    return apart - math.sqrt(1 / len(a) + 1 / len(b) + apart**2 / (2 * (len(a) + len(b))))
