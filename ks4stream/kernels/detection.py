"""Detection with universal templates, without evaluating every template at every sample (section 3).

The score of centre k at sample t is the largest |A[k, s, p, t]|, where A is the correlation B of the centre's channels
with waveform p, summed with the spatial Gaussian s as weights, in moved traces divided by the noise in the sum. B is
computed everywhere. As no weight is negative, no score within a short bin of time is larger than the same sum over the
largest |B| of each channel in the bin; these bounds are also computed everywhere. A is evaluated only in bins that
might contain a local maximum above threshold; everywhere, if these are many. No maximum is missed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ks4stream.kernels.convolution import SEGMENT, correlate
from ks4stream.kernels.memory import ChunkSize, in_chunks
from ks4stream.kernels.preprocessing import MIN_NOISE

BIN = 8  # samples, a power of 2; bins are evaluated as a whole
SAMPLES_PER_CHUNK = ChunkSize(cpu=1 << 14, gpu=1 << 16)  # searched at a time; multiples of BIN and SEGMENT
PAIRS_PER_CHUNK = ChunkSize(cpu=1 << 10, gpu=1 << 16)  # (centre, bin) pairs evaluated, or bounded again, at a time
ROWS_PER_CHUNK = ChunkSize(cpu=1 << 13, gpu=1 << 20)  # (channel, bin) pairs searched for their maximum at a time
CENTRES_PER_CHUNK = ChunkSize(cpu=32, gpu=256)  # whose bounds are one product; neighbours, which share most channels
SUMMIT_CENTRES = 32  # neighbours, one of which is assumed to have the largest score
SAMPLED_BINS, SIGNED_ABOVE = 16, 0.04
"""Share of a group's pairs above threshold, in every so many bins, from which bounds for each sign save more than they
cost."""
SEARCHED_BELOW = 0.5
"""Share of all pairs with a bound above threshold, from which matrix products that evaluate all of them take less time
than the search for those that matter (measured on a CPU)."""
SAMPLES_PER_PRODUCT = ChunkSize(cpu=1 << 8, gpu=1 << 11)  # few, so that the scores of a group stay in the cache
ROUNDING = 1e-5  # share by which bounds are raised, so that rounding cannot make one smaller than its score


class Spread(NamedTuple):
    """Weights of a group of neighbouring centres as one matrix.

    Attributes
    ----------
    channels : Tensor of int64, shape (c',)
        Channels used by any of them.
    weights : Tensor, shape (s · k', c')
        Their spatial Gaussians, ordered by size first; 0 where a centre does not use a channel.
    """

    channels: Tensor
    weights: Tensor


class UniversalTemplates(NamedTuple):
    """What detection needs of the probe and the waveforms, on the device of the traces.

    Attributes
    ----------
    shapes : Tensor, shape (p, w)
        wTEMP.
    components : Tensor, shape (q, w)
        wPCA.
    channels : Tensor of int64, shape (k, j)
        Nearest channels of each centre; padded with arbitrary channels of weight 0.
    present : Tensor, shape (k, j)
        1 where there is a channel, 0 in the padding.
    weights : Tensor, shape (k, s, j)
        Spatial Gaussians of unit norm (see :func:`for_moved`).
    spreads : tuple of Spread
        The same, in groups of :data:`CENTRES_PER_CHUNK` centres.
    neighbours : Tensor of int64, shape (k, m)
        Centres among which a detection must be the largest, itself included.
    is_neighbour : Tensor of bool, shape (k, k)
        The same as a table: True at [a, b] if b is among the neighbours of a.
    depth_um : Tensor, shape (c,)
        Depth of each channel.
    """

    shapes: Tensor
    components: Tensor
    channels: Tensor
    present: Tensor
    weights: Tensor
    spreads: tuple[Spread, ...]
    neighbours: Tensor
    is_neighbour: Tensor
    depth_um: Tensor


def universal_templates(
    shapes: Tensor, components: Tensor, *, channels: Tensor, weights: Tensor, neighbours: Tensor, depth_um: Tensor
) -> UniversalTemplates:
    """Prepare the templates of a probe.

    Parameters
    ----------
    shapes : Tensor, shape (p, w)
    components : Tensor, shape (q, w)
    channels : Tensor of int64, shape (k, j)
        Nearest channels of each centre, padded with −1.
    weights : Tensor, shape (k, s, j)
        Spatial Gaussians of unit norm, not negative, 0 where there is no channel.
    neighbours : Tensor of int64, shape (k, m)
    depth_um : Tensor, shape (c,)
    """
    present, known = (channels >= 0).to(weights), channels.clamp(min=0)
    n_centres = len(channels)
    is_neighbour = torch.zeros(n_centres, n_centres, dtype=torch.bool, device=channels.device)
    spreads = []
    size = CENTRES_PER_CHUNK.on(channels.device)
    for channels_of, weights_of in zip(known.split(size), weights.split(size), strict=True):
        used, slot = channels_of.unique(return_inverse=True)
        matrix = weights_of.new_zeros(weights_of.shape[1], len(channels_of), len(used))
        matrix.scatter_add_(2, slot.expand(weights_of.shape[1], -1, -1), weights_of.transpose(0, 1))
        spreads.append(Spread(used, matrix.flatten(0, 1)))
    return UniversalTemplates(
        shapes=shapes,
        components=components,
        channels=known,
        present=present,
        weights=weights,
        spreads=tuple(spreads),
        neighbours=neighbours,
        is_neighbour=is_neighbour.scatter_(1, neighbours, True),
        depth_um=depth_um,
    )


def for_moved(templates: UniversalTemplates, moving: Tensor) -> UniversalTemplates:
    """The templates for whitened traces that a matrix (c, c) has moved: weights are divided by the noise in sums.

    Interpolation between channels averages their noise, and extrapolation amplifies it. With these weights, scores are
    in noise standard deviations again.
    """
    weights, spreads = [], []
    sizes = [len(spread.weights) // templates.weights.shape[1] for spread in templates.spreads]
    groups = zip(templates.spreads, templates.weights.split(sizes), templates.channels.split(sizes), strict=True)
    for spread, of_group, channels in groups:
        noise = (of_group @ moving[channels]).norm(dim=2).clamp_min(MIN_NOISE)  # (k', s)
        weights.append(of_group / noise[:, :, None])
        spreads.append(spread._replace(weights=spread.weights / noise.T.reshape(-1, 1)))
    return templates._replace(weights=torch.cat(weights), spreads=tuple(spreads))


class TilePeaks(NamedTuple):
    """Peaks of one tile, sorted by (sample, centre).

    Attributes
    ----------
    sample : Tensor of int64, shape (n,)
        Centre of the waveform's window, within the tile.
    centre : Tensor of int64, shape (n,)
    score : Tensor, shape (n,)
        In noise standard deviations.
    template : Tensor of int64, shape (n,)
        Best spatial size s and waveform p, as s · P + p.
    depth_um : Tensor, shape (n,)
        Mean depth of the channels, weighted by their match with the waveform.
    """

    sample: Tensor
    centre: Tensor
    score: Tensor
    template: Tensor
    depth_um: Tensor


def detect(
    traces: Tensor, templates: UniversalTemplates, *, threshold: float, reach: int, first: int, last: int
) -> TilePeaks:
    """Find the peaks of the score with ``first <= sample < last``.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Whitened traces of a tile; `first` and `last` are at least nt//2 + `reach` samples from its ends.
    threshold : float
        Peaks have larger scores (``Th_universal``, or the lowest threshold of a region).
    reach : int
        Samples on either side within which a peak is the largest (``nt0min``); at least BIN − 1.
    first, last : int
        Samples of the tile to report, half-open.

    Returns
    -------
    TilePeaks
    """
    margin, parts = reach + templates.shapes.shape[1] // 2 + BIN, [_no_peaks(traces)]

    def detect_chunk(segment_start: Tensor) -> None:
        start, stop = int(segment_start[0]), min(int(segment_start[-1]) + SEGMENT, last)
        low = start - margin
        chunk = traces[:, max(low, 0) : stop + margin]
        if not bool(chunk.any()):  # blanked throughout, as in dead time
            return
        before, after = max(-low, 0), (low - min(stop + margin, traces.shape[1])) % BIN
        if before or after:  # every chunk begins at the same offset within a bin, and consists of whole bins
            chunk = torch.nn.functional.pad(chunk, (before, after))
        peaks = _detect_chunk(chunk, templates, threshold, reach, margin, margin + stop - start)
        parts.append(peaks._replace(sample=peaks.sample + low))

    in_chunks(detect_chunk, torch.arange(first, last, SEGMENT), size=SAMPLES_PER_CHUNK.on(traces.device) // SEGMENT)
    return TilePeaks(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _no_peaks(traces: Tensor) -> TilePeaks:
    numbers, values = torch.zeros(0, dtype=torch.int64, device=traces.device), traces.new_zeros(0)
    return TilePeaks(sample=numbers, centre=numbers, score=values, template=numbers, depth_um=values)


def _detect_chunk(
    traces: Tensor, templates: UniversalTemplates, threshold: float, reach: int, first: int, last: int
) -> TilePeaks:
    matches = correlate(traces, templates.shapes, layout="ctp")  # (c, t, p)
    search = _PeakSearch(matches, templates, threshold, reach)
    if len(search.pairs) < SEARCHED_BELOW * len(search.bound):
        search.evaluate(search.summits())
        search.evaluate(search.undominated())
    else:
        search.evaluate_all(matches)
    centre, sample, value = search.candidates(first, last)
    search.evaluate(search.rivals(centre, sample, value))
    largest = search.are_largest(centre, sample, value)
    centre, sample = centre[largest], sample[largest]
    order = (sample * len(templates.channels) + centre).argsort()
    return _describe(matches, templates, centre[order], sample[order])


class _PeakSearch:
    """Branch and bound for the local maxima of the score in one chunk.

    A *pair* is a centre and a bin of time, numbered ``centre · n_bins + bin``. Every pair has an upper
    bound; its scores are evaluated only where they could matter. Maps over all pairs are flat.

    Attributes
    ----------
    extremes : Tensor, shape (c · bins, 2 · p)
        Largest match of each waveform with each channel in each bin, and with its sign inverted; at least 0.
    bound : Tensor, shape (k · bins,)
        Upper bound of the scores in the bin.
    pairs : Tensor of int64, shape (n,)
        Pairs whose bound is above threshold, ascending.
    score : Tensor, shape (k · bins, BIN)
        Largest |A| where evaluated, undefined elsewhere.
    best : Tensor, shape (k · bins,)
        Largest score in each bin; −1 where not evaluated.
    """

    def __init__(self, matches: Tensor, templates: UniversalTemplates, threshold: float, reach: int) -> None:
        c, t, p = matches.shape
        self.templates, self.threshold, self.reach = templates, threshold, reach
        self.n_bins, self.n_shapes = t // BIN, p
        self.rows = matches.view(c * self.n_bins, BIN * p)
        whole = (reach + 1) // BIN - 1  # bins on either side that are within reach of every sample of a bin
        self.steps = torch.arange(-whole, whole + 1, device=matches.device)
        self.extremes = _extremes(self.rows, p)
        signs = _halved(self.extremes.view(-1, p), 1, torch.maximum).view(-1, 2).T.contiguous().view(2, c, self.n_bins)
        self.bound = _bounds(signs, templates, threshold)
        self.pairs = _where(self.bound > threshold)
        self.score = matches.new_empty(len(self.bound), BIN)
        self.best = torch.full_like(self.bound, -1.0)

    def evaluate(self, pairs: Tensor) -> None:
        """Fill in the scores of the given pairs."""
        in_chunks(self._evaluate, pairs, size=PAIRS_PER_CHUNK.on(pairs.device))

    def _evaluate(self, pairs: Tensor) -> None:
        largest = functools.reduce(torch.maximum, self._spread(self.rows, pairs).abs_().unbind(1))  # faster than amax
        score = largest.view(-1, BIN, self.n_shapes).amax(dim=2)
        best = score.amax(dim=1)
        self.score.index_copy_(0, pairs, score)
        self.best.index_copy_(0, pairs, best)

    def evaluate_all(self, matches: Tensor) -> None:
        """Fill in all scores, from the matches (c, t, p) that `rows` holds, too."""
        score = self.score.view(-1, matches.shape[1])
        of_spreads = score.split([len(of.weights) // self.templates.weights.shape[1] for of in self.templates.spreads])
        size = SAMPLES_PER_PRODUCT.on(matches.device)
        for spread, of_group in zip(self.templates.spreads, of_spreads, strict=True):
            for some, found in zip(matches.split(size, dim=1), of_group.split(size, dim=1), strict=True):
                around = some.index_select(0, spread.channels).transpose(1, 2)  # (c', p, t): for contiguous maxima
                sums = (spread.weights @ around.flatten(1)).abs_()
                sums = sums.view(-1, len(of_group), self.n_shapes, some.shape[1])  # (s, k', p, t)
                largest = functools.reduce(torch.maximum, sums.unbind(0))
                found.copy_(functools.reduce(torch.maximum, largest.unbind(1)))
        torch.amax(self.score, dim=1, out=self.best)

    def _bound_waveforms(self, pairs: Tensor, bound: Tensor) -> None:
        """Fill in bounds of the given pairs that allow for one waveform, of one sign, on all channels at a time."""
        largest = functools.reduce(torch.maximum, self._spread(self.extremes, pairs).unbind(1))
        torch.mul(largest.amax(dim=1), 1 + ROUNDING, out=bound)

    def _spread(self, of_channels: Tensor, pairs: Tensor) -> Tensor:
        """Weighted sums over the channels of each pair's centre: (c · bins, m) to (n, s, m)."""
        centre = pairs // self.n_bins
        row = self.templates.channels.index_select(0, centre) * self.n_bins + (pairs % self.n_bins)[:, None]
        around = of_channels.index_select(0, row.flatten()).view(*row.shape, of_channels.shape[1])  # (n, j, m)
        return torch.bmm(self.templates.weights.index_select(0, centre), around)

    def summits(self) -> Tensor:
        """Pairs with the largest bound among some centres and the bins around: high scores are likely there."""
        bounds = self.bound.view(-1, self.n_bins)
        n_whole = len(bounds) // SUMMIT_CENTRES * SUMMIT_CENTRES
        parts = bounds[:n_whole].view(-1, SUMMIT_CENTRES, self.n_bins), bounds[None, n_whole:]
        highest = torch.cat([part.amax(dim=1) for part in parts if part.numel()])  # (groups, bins)
        whole = len(self.steps) // 2
        around = torch.nn.functional.max_pool1d(highest[None], 2 * whole + 1, 1, whole)[0]
        group, bin_ = ((highest >= around) & (highest > self.threshold)).nonzero(as_tuple=True)
        members = torch.arange(SUMMIT_CENTRES, device=group.device) + group[:, None] * SUMMIT_CENTRES
        pairs = members.clamp_(max=len(bounds) - 1) * self.n_bins + bin_[:, None]
        return pairs.gather(1, _look_up(self.bound, pairs).argmax(dim=1, keepdim=True))[:, 0]

    def undominated(self) -> Tensor:
        """Pairs not yet evaluated that may still contain a local maximum.

        A pair does not if a neighbour has a score larger than the pair's bound within reach of all its samples. Bounds
        are lowered here by bounding each waveform by itself.
        """
        high = self.pairs[self.best[self.pairs] > self.threshold]
        observer, index = self.templates.is_neighbour[:, high // self.n_bins].nonzero(as_tuple=True)
        visible_max = torch.zeros_like(self.best)
        observed = observer * self.n_bins + (high % self.n_bins).index_select(0, index)
        visible_max.scatter_reduce_(0, observed, self.best[high].index_select(0, index), "amax")
        waiting = self.pairs[self.best[self.pairs] < 0]
        visible = self._around(visible_max, waiting)
        stays = visible <= self.bound[waiting]
        waiting, visible = waiting[stays], visible[stays]
        bound = torch.empty_like(visible)
        in_chunks(self._bound_waveforms, waiting, bound, size=PAIRS_PER_CHUNK.on(waiting.device))
        self.bound.index_copy_(0, waiting, bound)
        return waiting[bound >= visible.clamp_(min=self.threshold)]

    def candidates(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores above threshold that are the largest of those evaluated at their centre and in their bin."""
        pairs = self.pairs[self.best[self.pairs] > self.threshold]
        pairs = pairs[self._around(self.best, pairs) <= self.best[pairs]]
        rivals = self._near(pairs // self.n_bins, pairs % self.n_bins, self.steps.new_zeros(1))  # exceed most of them
        pairs = pairs[_look_up(self.best, rivals).flatten(1).amax(dim=1) <= self.best[pairs]]
        index, offset = (self.score[pairs] == self.best[pairs, None]).nonzero(as_tuple=True)
        pairs = pairs[index]
        sample = (pairs % self.n_bins) * BIN + offset
        inside = (sample >= first) & (sample < last)
        return pairs[inside] // self.n_bins, sample[inside], self.best[pairs[inside]]

    def rivals(self, centre: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """Pairs not yet evaluated in a candidate's neighbourhood that could contain a score as large as its own."""
        pair = self._within_reach(centre, sample)
        pair = pair[_look_up(self.bound, pair) >= value[:, None, None]]
        return pair[self.best[pair] < 0].unique()

    def are_largest(self, centre: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """The exact test: no larger score in the neighbourhood, no equal one earlier or, then, at a lower centre."""
        close = _look_up(self.best, self._within_reach(centre, sample)).amax(dim=2) >= value[:, None]
        candidate, slot = close.nonzero(as_tuple=True)  # and the neighbours that have to be compared sample by sample
        near = self.templates.neighbours[centre[candidate], slot]
        around = torch.arange(-self.reach, self.reach + 1, device=sample.device)
        index = (near * (self.n_bins * BIN) + sample[candidate])[:, None] + around
        other = _look_up(self.score.view(-1), index).where(_look_up(self.best, index // BIN) >= 0, 0)
        precedes = (around < 0) | ((around == 0) & (near < centre[candidate])[:, None])
        own = value[candidate, None]
        exceeded = ((other > own) | ((other == own) & precedes)).any(dim=1)
        return torch.ones_like(sample, dtype=torch.bool).index_fill_(0, candidate[exceeded], False)

    def _within_reach(self, centre: Tensor, sample: Tensor) -> Tensor:
        """Pairs of all neighbours and all bins with samples within reach: (n,) to (n, m, bins)."""
        steps = torch.arange(2 * self.reach // BIN + 2, device=sample.device)
        first, last = (sample - self.reach) // BIN, (sample + self.reach) // BIN
        return self._near(centre, first, steps).minimum(self._near(centre, last, steps[:1]))

    def _near(self, centre: Tensor, bin_: Tensor, steps: Tensor) -> Tensor:
        """Pairs of a centre's neighbours, `steps` bins away: (n,) to (n, m, steps)."""
        near = self.templates.neighbours.index_select(0, centre)[:, :, None] * self.n_bins
        return near + (bin_[:, None] + steps).clamp(0, self.n_bins - 1)[:, None, :]

    def _around(self, values: Tensor, pairs: Tensor) -> Tensor:
        """Largest value of a map in a pair's bin and the whole bins around it."""
        bin_ = pairs % self.n_bins
        near = (bin_[:, None] + self.steps).clamp_(0, self.n_bins - 1).add_((pairs - bin_)[:, None])
        return _look_up(values, near).amax(dim=1)


def _look_up(values: Tensor, index: Tensor) -> Tensor:
    """Entries of a flat map, in the shape of `index`; three times as fast as take on a CPU."""
    return values.index_select(0, index.flatten()).view(index.shape)


def _where(mask: Tensor) -> Tensor:
    """Indices where a flat mask is set, ascending; NumPy is ten times as fast if these are few."""
    return torch.from_numpy(mask.numpy().nonzero()[0]) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def _extremes(rows: Tensor, n_left: int) -> Tensor:
    """Largest of every n_left-th column, then of the same with inverted sign, at least 0: (n, m) to (n, 2 · n_left)."""
    found = rows.new_empty(len(rows), 2 * n_left)

    def some(rows: Tensor, found: Tensor) -> None:
        largest, smallest = _halved(rows, n_left, torch.maximum), _halved(rows, n_left, torch.minimum)
        torch.cat([largest, smallest.neg_()], dim=1, out=found)
        found.clamp_(min=0)

    in_chunks(some, rows, found, size=ROWS_PER_CHUNK.on(rows.device))
    return found


def _halved(part: Tensor, n_left: int, more: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Reduce each row to n_left columns by repeated halving, several times as fast as amax: (n, m) to (n, n_left)."""
    while part.shape[1] > n_left:
        half = n_left * -(-part.shape[1] // (2 * n_left))  # of an odd number, the middle is in both halves
        part = more(part[:, :half], part[:, -half:])
    return part


def _bounds(signs: Tensor, templates: UniversalTemplates, threshold: float) -> Tensor:
    """Upper bounds of the scores of a centre in a bin, whatever the waveform: (2, c, bins) to (k · bins,).

    `signs` are the largest matches of either sign. The larger of them over eight samples is above 3 on every channel
    even in noise, and such values sum up to a threshold of 9 over ten channels. Where that happens too often, each sign
    is bounded by itself: it does not if the sign has to be the same on all channels.
    """
    either = torch.maximum(*signs)
    some = [_spread(spread, either[:, ::SAMPLED_BINS], templates) > threshold for spread in templates.spreads]
    above = torch.stack([bounds.float().mean() for bounds in some]).tolist()
    return torch.cat(
        [
            torch.maximum(*(_spread(spread, sign, templates) for sign in signs))
            if share > SIGNED_ABOVE
            else _spread(spread, either, templates)
            for spread, share in zip(templates.spreads, above, strict=True)
        ]
    ).flatten()


def _spread(spread: Spread, largest: Tensor, templates: UniversalTemplates) -> Tensor:
    """Weighted sums over channels, the largest over all sizes: (c, …) to (k', …)."""
    sums = spread.weights @ largest.index_select(0, spread.channels).flatten(1)  # (s·k', …)
    sizes = sums.view(templates.weights.shape[1], -1, *largest.shape[1:]).unbind(0)
    return functools.reduce(torch.maximum, sizes) * (1 + ROUNDING)


def _describe(matches: Tensor, templates: UniversalTemplates, centre: Tensor, sample: Tensor) -> TilePeaks:
    """Score, template and depth of the peaks."""
    channels = templates.channels[centre]  # (n, j)
    around = matches[channels, sample[:, None]]  # (n, j, p)
    spread = torch.bmm(templates.weights[centre], around).flatten(1)  # (n, s·p)
    template = spread.abs().max(dim=1).indices  # of equal scores the first, on a CPU; bmm of equal inputs is equal
    score = spread.gather(1, template[:, None])[:, 0]
    waveform = (template % matches.shape[2])[:, None, None].expand(-1, channels.shape[1], 1)
    match = around.gather(2, waveform)[:, :, 0] * score.sign()[:, None] * templates.present[centre]  # (n, j)
    weight = match.clamp(min=0)
    depth = (weight * templates.depth_um[channels]).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-12)
    return TilePeaks(sample, centre, score.abs(), template, depth)


def projections(features: Tensor, weights: Tensor, shapes: Tensor, components: Tensor) -> Tensor:
    """Largest projection of waveforms on the universal templates of their centres, in noise s.d. of whitened traces.

    These are the scores, but for what the features lack of the waveforms, and the noise in moved traces.

    Parameters
    ----------
    features : Tensor, shape (n, j, q)
        From :func:`features`.
    weights : Tensor, shape (n, s, j)
        Spatial Gaussians of unit norm of each waveform's centre.
    shapes : Tensor, shape (p, w)
    components : Tensor, shape (q, w)

    Returns
    -------
    Tensor, shape (n,)
    """
    matches = features @ (components @ shapes.T)  # (n, j, p)
    return torch.bmm(weights, matches).abs().amax(dim=(1, 2))


def features(
    traces: Tensor, components: Tensor, channels: Tensor, sample: Tensor, present: Tensor | None = None
) -> Tensor:
    """Project the waveforms around given samples onto the components.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
    components : Tensor, shape (q, w)
    channels : Tensor of int64, shape (n, j)
    sample : Tensor of int64, shape (n,)
        Centre of each window.
    present : Tensor, shape (n, j), optional
        0 where a channel is padding; its features are 0.

    Returns
    -------
    Tensor, shape (n, j, q)
    """
    nt = components.shape[1]
    windows = traces.unfold(1, nt, 1)  # (c, t', w), a view
    projected = windows[channels, (sample - nt // 2)[:, None]] @ components.T
    return projected if present is None else projected * present[:, :, None]
