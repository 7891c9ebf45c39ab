"""Explain the traces as a sum of templates: matching pursuit with learned templates (section 8).

The score of unit u at sample t, ``S[u, t] = B[u, t] / ‖U_u‖ = √G``, in moved traces divided by its noise, is kept in
memory for all units and samples. In each round the most likely spikes are taken, and what they explain is subtracted.
How likely a spike is follows from the energy G, and from how unusual the amplitude is for its unit. A round changes
only a small part of the scores, so everything else is kept from round to round::

    units     sorted into groups that are close together on the probe: a score is a product over the group's channels
    samples   divided into bins of nt, so that a group can have only one peak per bin
    scores    (row, sample)    every unit; changed by a subtraction within ±nt, for units that share channels
    best      (group, sample)  largest log likelihood of the group's units, −∞ where no score exceeds its threshold
    top       (group, bin)     largest of `best` in the bin, its sample and its unit

A peak is a top that is the largest within ±nt samples among the units of all groups that share channels with its own.
It cannot change scores farther away on the probe, so peaks there are subtracted in the same round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream.kernels.convolution import correlate
from ks4stream.kernels.memory import ChunkSize, in_chunks
from ks4stream.kernels.preprocessing import MIN_NOISE
from ks4stream.kernels.templates import lagged_products

DROPPED_ENERGY = 1e-4
"""Share of a template's energy on the channels that are dropped from it. Dropping ε changes a score by √ε = 0.01
noise standard deviations (rms, in noise) and by less than ε of its value (on the unit's own spikes)."""

GROUP_SIZE = 16  # maximum number of units that are scored together
SAMPLES_PER_CHUNK = ChunkSize(cpu=1 << 11, gpu=1 << 15)
"""Samples of all components in memory while scoring; bins or spikes elsewhere."""

ROWS_PER_CHUNK = ChunkSize(cpu=1 << 11, gpu=1 << 16)  # windows of 2·nt − 1 samples while subtracting: 3 MB on a CPU

MAX_PENALTY = 4.0
"""Maximum by which an unusual amplitude lowers the log likelihood of a spike. Spikes in bursts may be far smaller than
others, so where one waveform fits much better than another, amplitudes do not matter."""


class TileSpikes(NamedTuple):
    """Spikes of one tile, sorted by (sample, unit).

    Attributes
    ----------
    sample_index : Tensor, shape (n,), int64
        Centre of the waveform's window, counted from the tile's first sample.
    unit : Tensor, shape (n,), int64
    score : Tensor, shape (n,), float32, noise s.d.
        Projection on the unit-norm template, √G, divided by its noise.
    amplitude : Tensor, shape (n,), float32
        Factor a of the template.
    """

    sample_index: Tensor
    unit: Tensor
    score: Tensor
    amplitude: Tensor

    def at(self, kept: Tensor) -> TileSpikes:
        """Some of the spikes."""
        return TileSpikes(*(column[kept] for column in self))


@dataclass(frozen=True, eq=False)
class PreparedTemplates:
    """Templates prepared for :func:`match` by :func:`prepare`; constant during a sort.

    Rows are the units in group order: row r is unit ``unit_of[r]``.

    Attributes
    ----------
    features : Tensor, shape (u, c, q), float32, noise s.d.
        Templates, zero on the channels that were dropped.
    components : Tensor, shape (q, w), float32
        wPCA.
    norm : Tensor, shape (u,), float32
    noise : Tensor, shape (u,), float32
        Standard deviation of the noise in projections on the unit-norm templates: 1, unless traces were moved.
    spread : Tensor, shape (u,), float32, noise s.d.
        Standard deviation of the scores of each template's spikes; infinite if all are equally likely.
    template_channels : Tensor, shape (u, j), int64
        Channels of a spike's features: those nearest to the template's largest channel, nearest first, padded with −1.
    unit_of : Tensor, shape (row,), int64
    members : Tensor, shape (g, m), int64
        Rows of each group, by ascending unit; padded with u, a row that has no scores.
    near : Tensor, shape (g, x), int64
        Groups that share channels with each group, itself included; padded with the number of groups.
    channels : tuple of slice or Tensor, shape (c',), int64
        Channels of each group's units.
    weights : tuple of Tensor, shape (m, c'·q), float32
        Unit-norm templates of each group's units on these channels, divided by their noise.
    pair_start : Tensor, shape (row + 1,), int64
        Index of each row's first pair.
    pair_row : Tensor, shape (pair,), int64
        Row that shares channels with it.
    pair_gram : Tensor, shape (pair, q·q), float32
        Inner products over channels of the pair's unit-norm templates, that of `pair_row` first, times the row's noise
        and divided by that of `pair_row`.
    lagged : Tensor, shape (q·q, 2·nt − 1), float32
        ``pair_gram @ lagged`` is the amount by which a spike of the row with score 1 reduces the score of `pair_row`
        at −nt+1 … nt−1 samples from the spike.
    """

    features: Tensor
    components: Tensor
    norm: Tensor
    noise: Tensor
    spread: Tensor
    template_channels: Tensor
    unit_of: Tensor
    members: Tensor
    near: Tensor
    channels: tuple[slice | Tensor, ...]
    weights: tuple[Tensor, ...]
    pair_start: Tensor
    pair_row: Tensor
    pair_gram: Tensor
    lagged: Tensor

    @property
    def nt(self) -> int:
        """Samples of a waveform."""
        return self.components.shape[1]

    @property
    def n_units(self) -> int:
        """Number of templates."""
        return len(self.features)


# -- preparing templates -----------------------------------------------------------------------------


def prepare(
    features: Tensor,
    components: Tensor,
    neighbours: Tensor,
    positions: NDArray[np.float64],
    *,
    spread: Tensor | None = None,
    dropped_energy: float = DROPPED_ENERGY,
    group_size: int = GROUP_SIZE,
) -> PreparedTemplates:
    """Prepare templates for matching, on the device of `features`.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32, noise s.d.
        Templates.
    components : Tensor, shape (q, w), float32
        wPCA: orthonormal rows.
    neighbours : Tensor, shape (c, j), int64
        Each channel's nearest channels of its shank, itself first, padded with −1.
    positions : array, shape (c, 2), µm
        Positions of the channels; used only to group units that are close together.
    spread : Tensor, shape (u,), float32, noise s.d., optional
        Standard deviation of the scores of each template's spikes; at least that of the noise, 1, is assumed. Without
        it, all amplitudes are equally likely.
    dropped_energy : float
        See :data:`DROPPED_ENERGY`.
    group_size : int
        Maximum number of units that are scored together.
    """
    device = features.device
    features = trimmed(features, dropped_energy)
    norm = features.norm(dim=(1, 2))
    unit_templates = features / norm.clamp_min(1e-30)[:, None, None]
    largest = largest_channel(features)
    groups = bisected(np.asarray(positions)[largest.numpy()], group_size)
    unit_of = torch.as_tensor(np.concatenate([np.zeros(0, np.int64), *groups]), device=device)
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64, device=device)
    group_of = torch.arange(len(groups), device=device).repeat_interleave(sizes)
    support = (features != 0).any(dim=2)[unit_of]  # (row, c)
    reach = torch.zeros(len(groups), support.shape[1], device=device).index_put_((group_of,), support.float(), True) > 0
    sharing = (reach.float() @ reach.float().T > 0) | torch.eye(len(groups), dtype=torch.bool, device=device)
    ordered = unit_templates[unit_of]
    channels = tuple(_span(row) for row in reach)
    rows = torch.split(torch.arange(len(unit_of), device=device), sizes.tolist())
    pairs = [_pairs(ordered, support, rows[g], sharing[g][group_of], channels[g]) for g in range(len(groups))]
    q, nt = components.shape
    return PreparedTemplates(
        features=features,
        components=components,
        norm=norm,
        noise=torch.ones_like(norm),
        spread=torch.full_like(norm, torch.inf) if spread is None else spread.clamp_min(1.0),
        template_channels=neighbours.to(device)[largest.to(device)],
        unit_of=unit_of,
        members=_padded(torch.arange(len(groups), device=device)[:, None] == group_of, len(unit_of)),
        near=_padded(sharing, len(groups)),
        channels=channels,
        weights=tuple(ordered[r][:, c].reshape(len(r), -1) for r, c in zip(rows, channels, strict=True)),
        pair_start=_starts([count for count, _, _ in pairs], device),
        pair_row=torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *(row for _, row, _ in pairs)]),
        pair_gram=torch.cat([features.new_zeros(0, q * q), *(gram for _, _, gram in pairs)]),
        lagged=lagged_products(components).flip(2)[:, :, 1 : 2 * nt].reshape(q * q, -1),
    )


def largest_channel(features: Tensor) -> Tensor:
    """Largest channel of each template, computed on the CPU, so the same on every machine: (u, c, q) to (u,)."""
    return features.cpu().square().sum(dim=2).argmax(dim=1)


def trimmed(features: Tensor, dropped_energy: float) -> Tensor:
    """Set a template's weakest channels to zero, together at most `dropped_energy` of its energy.

    Parameters
    ----------
    features : Tensor, shape (u, c, q)
    dropped_energy : float
        Share of the sum of squares.
    """
    energy = features.double().square().sum(dim=2).cpu()  # on the CPU: sums in one order everywhere
    rising, order = torch.sort(energy, dim=1, stable=True)
    weak = rising.cumsum(dim=1) <= dropped_energy * rising.sum(dim=1, keepdim=True)
    drop = torch.zeros_like(weak).scatter_(1, order, weak)
    return features.masked_fill(drop.to(features.device)[:, :, None], 0.0)


def bisected(positions: NDArray[np.float64], size: int) -> list[NDArray[np.int64]]:
    """Group points that are close together: halve along the longer extent until a group has at most `size`.

    >>> [group.tolist() for group in bisected(np.array([[0, 0], [0, 90], [0, 10], [0, 80]]), 2)]
    [[0, 2], [1, 3]]
    """

    def halve(index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if len(index) <= size:
            return [np.sort(index)]
        axis = np.argmax(np.ptp(positions[index], axis=0))
        index = index[np.argsort(positions[index, axis], kind="stable")]
        return halve(index[: len(index) // 2]) + halve(index[len(index) // 2 :])

    return halve(np.arange(len(positions), dtype=np.int64)) if len(positions) else []


def for_moved(templates: PreparedTemplates, moving: Tensor) -> PreparedTemplates:
    """The templates for whitened traces that a matrix (c, c) has moved, whose scores have unit noise again.

    Interpolation between channels averages their noise, and extrapolation amplifies it. A score is the projection on a
    template relative to this noise. Which of two templates has a spike is still decided by what they explain.
    """
    seen = torch.einsum("ucq,cd->udq", templates.features, moving).norm(dim=(1, 2))
    noise = (seen / templates.norm.clamp_min(1e-30)).clamp_min(MIN_NOISE)
    of_row = noise[templates.unit_of]
    weights, first = [], 0
    for of_group in templates.weights:
        weights.append(of_group / of_row[first : first + len(of_group), None])
        first += len(of_group)
    counts = templates.pair_start.diff()
    relative = of_row.repeat_interleave(counts) / of_row[templates.pair_row]
    gram = templates.pair_gram * relative[:, None]
    return replace(templates, noise=noise, weights=tuple(weights), pair_gram=gram)


def _span(mask: Tensor) -> slice | Tensor:
    """Indices of the true entries; as a slice, which needs no copy, if that contains few others."""
    index = torch.nonzero(mask)[:, 0]
    if len(index) and int(index[-1] - index[0]) < 1.25 * len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _pairs(
    templates: Tensor, support: Tensor, rows: Tensor, sharing: Tensor, channels: slice | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `rows`: how many rows share channels with it, which ones, and their inner products over channels."""
    q = templates.shape[2]
    others = torch.nonzero(sharing)[:, 0]
    shared = support[rows][:, channels].float() @ support[others][:, channels].float().T > 0  # (row, other)
    row, other = torch.nonzero(shared, as_tuple=True)
    gram = torch.einsum("vcq,ucr->uvqr", templates[others][:, channels], templates[rows][:, channels])
    return shared.sum(dim=1), others[other], gram[row, other].reshape(-1, q * q)


def _starts(counts: list[Tensor], device: torch.device) -> Tensor:
    """Cumulative sum of counts, starting with 0."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=device), *counts]).cumsum(0)


def _padded(mask: Tensor, fill: int) -> Tensor:
    """Indices of the true entries of each row, ascending, padded with `fill`."""
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    width = int(mask.sum(dim=1).max()) if mask.numel() else 0
    return torch.where(mask, column, fill).sort(dim=1).values[:, :width]


# -- matching ----------------------------------------------------------------------------------------


def match(traces: Tensor, templates: PreparedTemplates, *, threshold: float | Tensor, max_peels: int) -> TileSpikes:
    """Find spikes by matching pursuit, everywhere but in the outer nt samples.

    Parameters
    ----------
    traces : Tensor, shape (c, t), float32, noise s.d.
        Whitened, drift corrected.
    templates : PreparedTemplates
    threshold : float or Tensor, shape (u,), noise s.d.
        Spikes have larger scores; of all units, or of each.
    max_peels : int
        Maximum number of rounds.
    """
    nt = templates.nt
    none = torch.zeros(0, dtype=torch.int64, device=traces.device)
    empty = _RoundPeaks(none, none, none, traces.new_zeros(0))
    rounds = [empty]
    if templates.n_units and traces.shape[1] > 2 * nt and bool(traces.any()):  # not blanked throughout
        search = _ScoreMap(traces, templates, threshold)
        for _ in range(max_peels):
            peaks = search.peaks()
            if not len(peaks.sample):
                break
            search.subtract(peaks)
            rounds.append(peaks)
    _, sample, row, score = (torch.cat(parts) for parts in zip(*rounds, strict=True))
    unit = templates.unit_of[row]
    order = torch.argsort(sample * templates.n_units + unit, stable=True)
    unit, score = unit[order], score[order]
    return TileSpikes(sample[order], unit, score, score * templates.noise[unit] / templates.norm[unit])


class _RoundPeaks(NamedTuple):
    """Peaks of one round."""

    group: Tensor
    sample: Tensor
    row: Tensor
    score: Tensor


class _ScoreMap:
    """Scores of one tile and their maxima, updated as spikes are subtracted.

    The time axis is that of the traces, and ends at least one bin after the last sample that is searched. The outer nt
    samples, which are not searched, have the score −∞, which no subtraction changes.
    """

    def __init__(self, traces: Tensor, templates: PreparedTemplates, threshold: float | Tensor) -> None:
        nt, n_groups, n_searched = templates.nt, len(templates.members), traces.shape[1] - 2 * templates.nt
        self.templates = templates
        of_row = torch.cat([templates.unit_of, templates.unit_of[:1]])  # the last one has no scores
        self.threshold = torch.as_tensor(threshold).to(templates.norm).expand(templates.n_units)[of_row]
        self.norm, self.spread, self.noise = templates.norm[of_row], templates.spread[of_row], templates.noise[of_row]
        self.n_bins = -(-n_searched // nt) + 2
        width = self.n_bins * nt
        self.scores = traces.new_full((templates.n_units + 1, width), -torch.inf)
        _score(traces, templates, nt, self.scores[:, nt : nt + n_searched])
        self.best = traces.new_full((n_groups + 1, width), -torch.inf)
        self.top = traces.new_full((n_groups + 1, self.n_bins), -torch.inf)
        self.top_sample = torch.zeros_like(self.top, dtype=torch.int64)
        self.top_row = torch.zeros_like(self.top_sample)
        highest = self.scores.view(-1, self.n_bins, nt).amax(dim=2)
        above = highest > self.threshold[:, None]  # few bins have any such score
        dirty = torch.zeros_like(self.top, dtype=torch.bool)
        dirty[:-1] = above[templates.members].any(dim=1)
        self._refresh(dirty)

    def _refresh(self, dirty: Tensor) -> None:
        """Recompute the maxima in the bins (g, bin) that a subtraction changed."""
        nt = self.templates.nt
        scores = self.scores.view(-1, self.n_bins, nt)
        best = self.best.view(-1, self.n_bins, nt)

        def refresh(group: Tensor, bin_: Tensor) -> None:
            rows = self.templates.members[group]  # (n, m)
            values = scores[rows, bin_[:, None]]  # (n, m, w)
            place, member = torch.nonzero(values.amax(dim=2) > self.threshold[rows], as_tuple=True)  # few of them
            row = rows[place, member]
            likelihood = self._likelihood(values[place, member], row[:, None])  # (k, w)
            largest = values.new_full((len(rows), nt), -torch.inf)
            largest.scatter_reduce_(0, place[:, None].expand_as(likelihood), likelihood, "amax")
            top, offset = largest.max(dim=1)  # the earliest
            at_top = likelihood.gather(1, offset[place, None])[:, 0] == top[place]
            last = self.templates.n_units - 1  # where nothing is above the threshold
            top_row = torch.full_like(bin_, last)
            top_row.scatter_reduce_(0, place, row.where(at_top, last), "amin")  # the lowest unit
            best[group, bin_] = largest
            self.top[group, bin_] = top
            self.top_sample[group, bin_] = bin_ * nt + offset
            self.top_row[group, bin_] = top_row

        size = SAMPLES_PER_CHUNK.on(dirty.device)  # at 16 units a group 8 MB on a CPU
        in_chunks(refresh, *torch.nonzero(dirty, as_tuple=True), size=size)

    def _likelihood(self, score: Tensor, row: Tensor) -> Tensor:
        """Log likelihood of spikes of the units in `row` with some scores; −∞ for those not above the threshold."""
        projection = score * self.noise[row]
        unusual = (projection - self.norm[row]).div_(self.spread[row]).square_().mul_(0.5).clamp_(max=MAX_PENALTY)
        return projection.square_().mul_(0.5).sub_(unusual).masked_fill_(score <= self.threshold[row], -torch.inf)

    def peaks(self) -> _RoundPeaks:
        """Return the tops that nothing of a nearby group within ±nt samples exceeds or precedes."""
        group, bin_ = torch.nonzero(self.top > -torch.inf, as_tuple=True)
        stands = ~self._exceeded_by_bin_maximum(group, bin_)
        group, bin_ = group[stands], bin_[stands]
        stands = ~self._exceeded(group, bin_)
        group, bin_ = group[stands], bin_[stands]
        sample, row = self.top_sample[group, bin_], self.top_row[group, bin_]
        return _RoundPeaks(group, sample, row, self.scores[row, sample])

    def _exceeded_by_bin_maximum(self, group: Tensor, bin_: Tensor) -> Tensor:
        """Which tops are exceeded by the top of a nearby bin: cheap, and decides most cases, including equal values."""
        unit_of = self.templates.unit_of
        near = self.templates.near[group][:, :, None]  # (n, x, 1)
        bins = (bin_[:, None] + torch.arange(-1, 2, device=bin_.device))[:, None]  # (n, 1, 3)
        value, sample = self.top[group, bin_][:, None, None], self.top_sample[group, bin_][:, None, None]
        unit = unit_of[self.top_row[group, bin_]][:, None, None]
        other_value, other_sample = self.top[near, bins], self.top_sample[near, bins]
        other_unit = unit_of[self.top_row[near, bins]]
        precedes = (other_sample < sample) | ((other_sample == sample) & (other_unit < unit))
        better = (other_value > value) | ((other_value == value) & precedes)
        return (better & ((other_sample - sample).abs() <= self.templates.nt)).flatten(1).any(dim=1)

    def _exceeded(self, group: Tensor, bin_: Tensor) -> Tensor:
        """Which tops are exceeded by anything within ±nt samples.

        The top of a nearby bin may be too far away while another of its samples is not. Equal values at the same sample
        need no test: such a value is itself a top, or in a bin whose top exceeds this one.
        """
        nt = self.templates.nt
        sample, value = self.top_sample[group, bin_], self.top[group, bin_]
        windows = self.best.unfold(1, 2 * nt + 1, 1)  # (g, t, 2·nt + 1)
        exceeded = torch.zeros_like(group, dtype=torch.bool)

        def compare(group: Tensor, sample: Tensor, value: Tensor, exceeded: Tensor) -> None:
            around = windows[self.templates.near[group], sample[:, None] - nt]  # (n, x, 2·nt + 1)
            limit = value[:, None, None]
            exceeded |= (around > limit).flatten(1).any(1) | (around[:, :, :nt] == limit).flatten(1).any(1)

        in_chunks(compare, group, sample, value, exceeded, size=SAMPLES_PER_CHUNK.on(group.device))
        return exceeded

    def subtract(self, peaks: _RoundPeaks) -> None:
        """Subtract what `peaks` explain from the scores, in the order of the peaks, and update the maxima."""
        templates, nt = self.templates, self.templates.nt
        start = templates.pair_start[peaks.row]
        count = templates.pair_start[peaks.row + 1] - start
        peak = torch.arange(len(count), device=count.device).repeat_interleave(count)
        pair = torch.arange(len(peak), device=count.device) + (start - count.cumsum(0) + count)[peak]
        reach = torch.arange(1 - nt, nt, device=count.device)
        flat = self.scores.view(-1)

        def subtract(peak: Tensor, pair: Tensor) -> None:
            fall = templates.pair_gram[pair] @ templates.lagged * -peaks.score[peak, None]  # (n, l)
            origin = templates.pair_row[pair] * self.scores.shape[1] + peaks.sample[peak]
            # Peaks that do not affect each other may still change the same scores.
            add_windows(flat, origin[:, None] + reach, fall)

        in_chunks(subtract, peak, pair, size=ROWS_PER_CHUNK.on(peak.device))
        self._refresh(self._reached(peaks))

    def _reached(self, peaks: _RoundPeaks) -> Tensor:
        """Mark the bins (g, bin) changed by a subtraction: in nearby groups, the peak's own bin and those beside it."""
        dirty = torch.zeros_like(self.top, dtype=torch.bool)
        near = self.templates.near[peaks.group][:, :, None]
        beside = torch.arange(-1, 2, device=near.device)
        dirty[near, (peaks.sample // self.templates.nt)[:, None, None] + beside] = True
        dirty[-1], dirty[:, 0], dirty[:, -1] = False, False, False  # the padding
        return dirty


def _score(traces: Tensor, templates: PreparedTemplates, first: int, out: Tensor) -> None:
    """Fill `out` (row, t) with the scores of all units, starting at sample `first`."""
    half, step = templates.nt // 2, SAMPLES_PER_CHUNK.on(traces.device)
    for start in range(0, out.shape[1], step):
        stop = min(start + step, out.shape[1])
        left = max(first + start - half, 0)
        projected = correlate(traces[:, left : first + stop + half], templates.components)  # (c, q, t)
        begin = first + start - left
        projected = projected[:, :, begin : begin + stop - start]
        row = 0
        for channels, weights in zip(templates.channels, templates.weights, strict=True):
            torch.mm(weights, projected[channels].flatten(0, 1), out=out[row : row + len(weights), start:stop])
            row += len(weights)
        del projected  # before the next one is allocated


def add_windows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values, some of them at the same place, always in the same order: float sums depend on it.

    Parameters
    ----------
    total : Tensor, shape (n,), float32
        Changed in place.
    index : Tensor, shape (window, l), int64
    values : Tensor, shape (window, l), float32
    """
    if total.device.type == "cpu":  # where index_put_ adds by atomics when there are several threads
        total.index_add_(0, index.flatten(), values.flatten())
    else:  # where index_add_ adds by atomics, and index_put_ sorts
        total.index_put_((index,), values, accumulate=True)


# -- residual and features ---------------------------------------------------------------------------


def subtract(traces: Tensor, spikes: TileSpikes, templates: PreparedTemplates) -> Tensor:
    """Return the residual: `traces` minus the templates of all spikes.

    Parameters
    ----------
    traces : Tensor, shape (c, t), float32
    spikes : TileSpikes
        Sorted, with windows inside the traces.
    templates : PreparedTemplates

    Returns
    -------
    Tensor, shape (c, t), float32
    """
    residual = traces.clone()
    c, t = traces.shape
    support = (templates.features != 0).any(dim=2)
    channels = _padded(support, c)  # (u, x)
    window = torch.arange(templates.nt, device=traces.device) - templates.nt // 2
    padded = torch.cat(
        [templates.features, templates.features.new_zeros(templates.n_units, 1, templates.features.shape[2])], 1
    )
    on_channels = padded.gather(1, channels[:, :, None].expand(-1, -1, padded.shape[2]))  # (u, x, q)
    flat = residual.view(-1)
    step = max(1, ROWS_PER_CHUNK.on(traces.device) // max(channels.shape[1], 1))
    for chunk in torch.split(torch.arange(len(spikes.unit), device=traces.device), step):
        unit = spikes.unit[chunk]
        spike, slot = torch.nonzero(channels[unit] < c, as_tuple=True)
        unit = unit[spike]
        scaled = on_channels[unit, slot] * -spikes.amplitude[chunk][spike, None]
        origin = channels[unit, slot] * t + spikes.sample_index[chunk][spike]
        add_windows(flat, origin[:, None] + window, scaled @ templates.components)
    return residual


def features(residual: Tensor, spikes: TileSpikes, templates: PreparedTemplates) -> Tensor:
    """Features of each spike: the residual around it plus its own template, on the channels nearest to its largest.

    Parameters
    ----------
    residual : Tensor, shape (c, t), float32
        From :func:`subtract`.
    spikes : TileSpikes
    templates : PreparedTemplates

    Returns
    -------
    Tensor, shape (n, j, q), float32
        On channels ``templates.template_channels[spikes.unit]``; zero where that is −1.
    """
    channels = templates.template_channels[spikes.unit]  # (n, j)
    windows = residual.unfold(1, templates.nt, 1)
    out = residual.new_empty(*channels.shape, len(templates.components))
    # Chunks of one size: with so few columns, the sums of a row depend on how many rows are multiplied at a time.
    size = SAMPLES_PER_CHUNK.on(residual.device)
    for chunk in torch.split(torch.arange(len(channels), device=residual.device), size):
        start = spikes.sample_index[chunk, None] - templates.nt // 2
        left = windows[channels[chunk].clamp_min(0), start] @ templates.components.T
        own = templates.features[spikes.unit[chunk, None], channels[chunk].clamp_min(0)]
        out[chunk] = left + spikes.amplitude[chunk, None, None] * own
    return out.masked_fill_((channels < 0)[:, :, None], 0.0)
