"""Universal detection: where any waveform of any size might be, without computing that everywhere (section 3).

The score of centre k at sample t is the largest |A[k, s, p, t]|, A being the correlation B of the centre's channels
with waveform p, summed with the spatial Gaussian s as weights. B is made everywhere. As no weight is negative, no
score within a short bin of time is larger than the same sum over the largest |B| of each channel in the bin; these
bounds are made everywhere too. A is evaluated only in those bins that might
hold a local maximum above threshold. Nothing is missed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ks4stream.kernels.convolution import SEGMENT, correlate
from ks4stream.kernels.memory import ChunkSize, in_chunks

BIN = 8  # samples; a bin is evaluated whole; a power of 2
SAMPLES_PER_CHUNK = ChunkSize(
    cpu=1 << 14, gpu=1 << 16
)  # samples of a tile detected at a time, multiples of BIN and SEGMENT
PAIRS_PER_CHUNK = ChunkSize(cpu=1 << 13, gpu=1 << 16)  # (centre, bin) pairs evaluated at a time
ROWS_PER_CHUNK = ChunkSize(cpu=1 << 13, gpu=1 << 20)  # (channel, bin) pairs searched for their maximum at a time
CENTRES_PER_CHUNK = ChunkSize(cpu=32, gpu=256)  # bounded by one product; neighbours, so that they share most channels
SUMMIT_CENTRES = 32  # neighbours among which one is taken to have the largest score
SHARPENED_ABOVE = 0.04  # share of the pairs of some centres above threshold; elsewhere a sharper bound costs more
ROUNDING = 1e-5  # share by which bounds are raised


class Spread(NamedTuple):
    """Weights of some neighbouring centres as one matrix.

    Attributes
    ----------
    channels : Tensor of int64, shape (c',)
        Channels any of them uses.
    weights : Tensor, shape (s · k', c')
        Spatial Gaussians of all of them, by size first; 0 where a centre does not use a channel; a little too
        large, so that rounding cannot make a bound smaller than its score.
    """

    channels: Tensor
    weights: Tensor


class UniversalTemplates(NamedTuple):
    """What detection needs to know of the probe and the waveforms, on the device of the traces.

    Attributes
    ----------
    shapes : Tensor, shape (p, w)
        wTEMP.
    components : Tensor, shape (q, w)
        wPCA.
    channels : Tensor of int64, shape (k, j)
        Nearest channels of each centre; where there are fewer, any channel with weight 0.
    present : Tensor, shape (k, j)
        1 where there is a channel, else 0.
    weights : Tensor, shape (k, s, j)
        Spatial Gaussians of unit norm.
    spreads : tuple of Spread
        The same, :data:`CENTRES_PER_CHUNK` centres at a time.
    neighbours : Tensor of int64, shape (k, m)
        Centres among which a detection must be the largest, itself included.
    sees : Tensor of bool, shape (k, k)
        The same as a table: [a, b] where b is among the neighbours of a.
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
    sees: Tensor
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
        Nearest channels of each centre; −1 where there are fewer.
    weights : Tensor, shape (k, s, j)
        Spatial Gaussians of unit norm, none negative, 0 where there is no channel.
    neighbours : Tensor of int64, shape (k, m)
    depth_um : Tensor, shape (c,)
    """
    present, known = (channels >= 0).to(weights), channels.clamp(min=0)
    n_centres = len(channels)
    sees = torch.zeros(n_centres, n_centres, dtype=torch.bool, device=channels.device)
    spreads = []
    at_once = CENTRES_PER_CHUNK.on(channels.device)
    for some, heavy in zip(known.split(at_once), weights.split(at_once), strict=True):
        used, slot = some.unique(return_inverse=True)
        matrix = heavy.new_zeros(heavy.shape[1], len(some), len(used))
        matrix.scatter_add_(2, slot.expand(heavy.shape[1], -1, -1), heavy.transpose(0, 1))
        spreads.append(Spread(used, matrix.flatten(0, 1) * (1 + ROUNDING)))
    return UniversalTemplates(
        shapes=shapes,
        components=components,
        channels=known,
        present=present,
        weights=weights,
        spreads=tuple(spreads),
        neighbours=neighbours,
        sees=sees.scatter_(1, neighbours, True),
        depth_um=depth_um,
    )


class Peaks(NamedTuple):
    """Detections of one tile, sorted by (sample, centre).

    Attributes
    ----------
    sample : Tensor of int64, shape (n,)
        Centre of the waveform's window, within the tile.
    centre : Tensor of int64, shape (n,)
    score : Tensor, shape (n,)
        In noise standard deviations.
    template : Tensor of int64, shape (n,)
        s · P + p of the best spatial size and waveform.
    depth_um : Tensor, shape (n,)
        Depth weighted by how well each channel matches the waveform.
    """

    sample: Tensor
    centre: Tensor
    score: Tensor
    template: Tensor
    depth_um: Tensor


def detect(
    traces: Tensor, templates: UniversalTemplates, *, threshold: float, reach: int, first: int, last: int
) -> Peaks:
    """Find the peaks of the score with ``first <= sample < last``.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Whitened traces of a tile; `first` and `last` lie at least nt//2 + `reach` from its ends.
    threshold : float
        ``Th_universal``; a score must be larger.
    reach : int
        Samples on either side within which a peak is the largest (``nt0min``); at least BIN − 1.
    first, last : int
        Samples of the tile to report, half open.

    Returns
    -------
    Peaks
    """
    margin, found = reach + templates.shapes.shape[1] // 2 + BIN, []

    def detect_piece(begins: Tensor) -> None:
        start, stop = int(begins[0]), min(int(begins[-1]) + SEGMENT, last)
        low = start - margin
        piece = traces[:, max(low, 0) : stop + margin]
        before, after = max(-low, 0), (low - min(stop + margin, traces.shape[1])) % BIN
        if before or after:  # pieces begin at the same place of a bin wherever they lie, and are of whole bins
            piece = torch.nn.functional.pad(piece, (before, after))
        part = _detect_piece(piece, templates, threshold, reach, margin, margin + stop - start)
        found.append(part._replace(sample=part.sample + low))

    in_chunks(detect_piece, torch.arange(first, last, SEGMENT), size=SAMPLES_PER_CHUNK.on(traces.device) // SEGMENT)
    return Peaks(*(torch.cat(column) for column in zip(*found, strict=True)))


def _detect_piece(
    traces: Tensor, templates: UniversalTemplates, threshold: float, reach: int, first: int, last: int
) -> Peaks:
    matches = correlate(traces, templates.shapes, layout="ctp")  # (c, t, p)
    search = _PeakSearch(matches, templates, threshold, reach)
    search.evaluate(search.summits())
    search.evaluate(search.undominated())
    centre, sample, value = search.candidates(first, last)
    search.evaluate(search.rivals(centre, sample, value))
    largest = search.are_largest(centre, sample, value)
    centre, sample = centre[largest], sample[largest]
    order = (sample * len(templates.channels) + centre).argsort()
    return _describe(matches, templates, centre[order], sample[order])


class _PeakSearch:
    """Branch and bound for the local maxima of the score in one piece.

    A *pair* is a centre and a bin of time, numbered ``centre · n_bins + bin``. Every pair has an upper
    bound; its scores are evaluated only where they could matter. Maps over all pairs are flat.

    Attributes
    ----------
    bound : Tensor, shape (k · bins,)
        No score in the bin is larger.
    pairs : Tensor of int64, shape (n,)
        Those whose bound is above threshold, ascending.
    score : Tensor, shape (k · bins, BIN)
        Largest |A| where evaluated, else anything.
    best : Tensor, shape (k · bins,)
        Largest score of each bin; −1 where not evaluated.
    """

    def __init__(self, matches: Tensor, templates: UniversalTemplates, threshold: float, reach: int) -> None:
        c, t, p = matches.shape
        self.templates, self.threshold, self.reach = templates, threshold, reach
        self.n_bins, self.n_shapes = t // BIN, p
        self.rows = matches.view(c * self.n_bins, BIN * p)
        whole = (reach + 1) // BIN - 1  # bins on either side that lie within reach of every sample of a bin
        self.steps = torch.arange(-whole, whole + 1, device=matches.device)
        self.bound = _bounds(_folded(self.rows, 1, torch.abs).view(c, -1), templates)
        _sharpen(self.bound.view(-1, self.n_bins), self.rows.view(c, self.n_bins, -1), templates, threshold)
        self.pairs = _where(self.bound > threshold)
        self.score = matches.new_empty(len(self.bound), BIN)
        self.best = torch.full_like(self.bound, -1.0)

    def evaluate(self, pairs: Tensor) -> None:
        """Fill in the scores of the given pairs."""
        in_chunks(self._evaluate, pairs, size=PAIRS_PER_CHUNK.on(pairs.device))

    def _evaluate(self, some: Tensor) -> None:
        centre = some // self.n_bins
        row = self.templates.channels.index_select(0, centre) * self.n_bins + (some % self.n_bins)[:, None]
        around = self.rows.index_select(0, row.flatten()).view(*row.shape, self.rows.shape[1])  # (n, j, BIN·p)
        spread = torch.bmm(self.templates.weights.index_select(0, centre), around).abs_()  # (n, s, BIN·p)
        largest = functools.reduce(torch.maximum, spread.unbind(1))  # several times faster than amax
        score = largest.view(-1, BIN, self.n_shapes).amax(dim=2)
        best = score.amax(dim=1)
        self.score.index_copy_(0, some, score)
        self.best.index_copy_(0, some, best)

    def summits(self) -> Tensor:
        """Of some centres and the bins around the pair with the largest bound: high scores are to be expected."""
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
        """Pairs not evaluated that may still hold a local maximum.

        A pair that sees a score larger than its bound within reach of all its samples holds none.
        """
        shining = self.pairs[self.best[self.pairs] > self.threshold]
        watcher, index = self.templates.sees[:, shining // self.n_bins].nonzero(as_tuple=True)
        sight = torch.zeros_like(self.best)
        watched = watcher * self.n_bins + (shining % self.n_bins).index_select(0, index)
        sight.scatter_reduce_(0, watched, self.best[shining].index_select(0, index), "amax")
        waiting = self.pairs[self.best[self.pairs] < 0]
        return waiting[self._around(sight, waiting) <= self.bound[waiting]]

    def candidates(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores above threshold, the largest of their centre and of their bin, as far as evaluated."""
        pairs = self.pairs[self.best[self.pairs] > self.threshold]
        pairs = pairs[self._around(self.best, pairs) <= self.best[pairs]]
        seen = self._near(pairs // self.n_bins, pairs % self.n_bins, self.steps.new_zeros(1))  # most are exceeded there
        pairs = pairs[_look_up(self.best, seen).flatten(1).amax(dim=1) <= self.best[pairs]]
        one, offset = (self.score[pairs] == self.best[pairs, None]).nonzero(as_tuple=True)
        pairs = pairs[one]
        sample = (pairs % self.n_bins) * BIN + offset
        inside = (sample >= first) & (sample < last)
        return pairs[inside] // self.n_bins, sample[inside], self.best[pairs[inside]]

    def rivals(self, centre: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """Pairs not yet evaluated that could hold a score as large as a candidate's in its neighbourhood."""
        pair = self._within_reach(centre, sample)
        pair = pair[_look_up(self.bound, pair) >= value[:, None, None]]
        return pair[self.best[pair] < 0].unique()

    def are_largest(self, centre: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """The exact test: no larger score in the neighbourhood, no equal one earlier or, then, at a lower centre."""
        close = _look_up(self.best, self._within_reach(centre, sample)).amax(dim=2) >= value[:, None]
        one, index = close.nonzero(as_tuple=True)  # a candidate and a neighbour worth looking at sample by sample
        near = self.templates.neighbours[centre[one], index]
        around = torch.arange(-self.reach, self.reach + 1, device=sample.device)
        place = (near * (self.n_bins * BIN) + sample[one])[:, None] + around
        seen = _look_up(self.score.view(-1), place).where(_look_up(self.best, place // BIN) >= 0, 0)
        before = (around < 0) | ((around == 0) & (near < centre[one])[:, None])
        mine = value[one, None]
        outdone = ((seen > mine) | ((seen == mine) & before)).any(dim=1)
        return torch.ones_like(sample, dtype=torch.bool).index_fill_(0, one[outdone], False)

    def _within_reach(self, centre: Tensor, sample: Tensor) -> Tensor:
        """Pairs of all neighbours and all bins that hold samples within reach: (n,) to (n, m, bins)."""
        steps = torch.arange(2 * self.reach // BIN + 2, device=sample.device)
        first, last = (sample - self.reach) // BIN, (sample + self.reach) // BIN
        return self._near(centre, first, steps).minimum(self._near(centre, last, steps[:1]))

    def _near(self, centre: Tensor, bin_: Tensor, steps: Tensor) -> Tensor:
        """Pairs of a centre's neighbours, some bins away: (n,) to (n, m, steps)."""
        near = self.templates.neighbours.index_select(0, centre)[:, :, None] * self.n_bins
        return near + (bin_[:, None] + steps).clamp(0, self.n_bins - 1)[:, None, :]

    def _around(self, values: Tensor, pairs: Tensor) -> Tensor:
        """Largest of a map's values in a pair's bin and the whole bins around."""
        bin_ = pairs % self.n_bins
        near = (bin_[:, None] + self.steps).clamp_(0, self.n_bins - 1).add_((pairs - bin_)[:, None])
        return _look_up(values, near).amax(dim=1)


def _look_up(values: Tensor, index: Tensor) -> Tensor:
    """Entries of a flat map, in the shape of `index`; on a CPU three times as fast as take."""
    return values.index_select(0, index.flatten()).view(index.shape)


def _where(mask: Tensor) -> Tensor:
    """Where a flat mask is set, ascending; NumPy is an order faster where that is rare."""
    return torch.from_numpy(mask.numpy().nonzero()[0]) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def _folded(rows: Tensor, n_left: int, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Largest prepared value of each row, or of every n_left-th column: (n, m) to (n, n_left).

    Halved again and again, which is several times faster than amax.
    """
    parts = []
    for part in rows.split(ROWS_PER_CHUNK.on(rows.device)):
        part = prepare(part)
        while part.shape[1] > n_left:
            half = n_left * -(-part.shape[1] // (2 * n_left))  # of an odd number the middle counts twice
            part = torch.maximum(part[:, :half], part[:, -half:])
        parts.append(part)
    return torch.cat(parts)


def _bounds(largest: Tensor, templates: UniversalTemplates) -> Tensor:
    """No score of a centre in a bin is larger, whatever the waveform: (c, bins) to (k · bins,)."""
    return torch.cat([_spread(spread, largest, templates) for spread in templates.spreads]).flatten()


def _spread(spread: Spread, largest: Tensor, templates: UniversalTemplates) -> Tensor:
    """Weighted sums over channels, the largest of all sizes: (c, …) to (k', …)."""
    sums = spread.weights @ largest.index_select(0, spread.channels).flatten(1)  # (s·k', …)
    sizes = sums.view(templates.weights.shape[1], -1, *largest.shape[1:]).unbind(0)
    return functools.reduce(torch.maximum, sizes)


def _sharpen(bound: Tensor, rows: Tensor, templates: UniversalTemplates, threshold: float) -> None:
    """Lower the bounds (k, bins) of centres where they let too much through: each waveform and sign by itself.

    Of six waveforms and eight samples, of either sign, the largest noise is above 3 on every channel, which sums up to
    a threshold of 9 over ten of them. Noise that has to have the same sign everywhere does not. `rows` is `matches`
    as (c, bins, BIN·p).
    """
    sizes = [len(spread.weights) // templates.weights.shape[1] for spread in templates.spreads]
    above = (bound > threshold).sum(dim=1).cpu().split(sizes)
    groups = zip(bound.split(sizes), templates.spreads, strict=True)
    crowded = [int(some.sum()) > SHARPENED_ABOVE * some.numel() * bound.shape[1] for some in above]
    if not any(crowded):
        return
    p = len(templates.shapes)
    signs = [_folded(rows.flatten(0, 1), p, sign) for sign in (torch.positive, torch.neg)]
    each = [one.T.reshape(p, *rows.shape[:2]).clamp_(min=0) for one in signs]  # (p, c, bins) per sign
    for some, spread in itertools.compress(groups, crowded):
        some.copy_(functools.reduce(torch.maximum, (_spread(spread, one, templates) for sign in each for one in sign)))


def _describe(matches: Tensor, templates: UniversalTemplates, centre: Tensor, sample: Tensor) -> Peaks:
    """Score, template and depth of the detections."""
    channels = templates.channels[centre]  # (n, j)
    around = matches[channels, sample[:, None]]  # (n, j, p)
    spread = torch.bmm(templates.weights[centre], around).flatten(1)  # (n, s·p)
    template = spread.abs().max(dim=1).indices  # ties: bmm of equal inputs is equal, and the first is taken on a CPU
    score = spread.gather(1, template[:, None])[:, 0]
    waveform = (template % matches.shape[2])[:, None, None].expand(-1, channels.shape[1], 1)
    match = around.gather(2, waveform)[:, :, 0] * score.sign()[:, None] * templates.present[centre]  # (n, j)
    weight = match.clamp(min=0)
    depth = (weight * templates.depth_um[channels]).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-12)
    return Peaks(sample, centre, score.abs(), template, depth)


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
        0 where a channel is only padding; its features are 0.

    Returns
    -------
    Tensor, shape (n, j, q)
    """
    nt = components.shape[1]
    windows = traces.unfold(1, nt, 1)  # (c, t', w), a view
    found = windows[channels, (sample - nt // 2)[:, None]] @ components.T
    return found if present is None else found * present[:, :, None]
