"""Universal detection: where any waveform of any size might be, without computing that everywhere (section 3).

The score of centre k at sample t is the largest |A[k, s, p, t]|, A being the correlation of the traces with
waveform p spread over the centre's channels by the spatial Gaussian s. As the Gaussians have unit norm,
Cauchy–Schwarz bounds it by ‖B[channels of k, t, p]‖₂, B being each channel's correlation with the waveform.
So B is made everywhere, its largest squares over short bins of time are summed over each centre's
channels, and A is evaluated only in the bins whose sum passes the threshold. Nothing above it is missed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ks4stream.kernels.convolution import correlate

BIN = 4  # samples; a bin is evaluated whole
PIECE = 8192  # samples of a tile detected at a time, a multiple of BIN: a constant of the method
PAIRS_AT_ONCE = 8192  # (centre, bin) pairs evaluated at a time
ROUNDING = 1e-5  # by which the bound is lowered, so that rounding cannot hide a score at the threshold


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
    neighbours: Tensor
    sees: Tensor
    depth_um: Tensor


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
        Samples on either side within which a peak is the largest (``nt0min``).
    first, last : int
        Samples of the tile to report, half open.

    Returns
    -------
    Peaks
    """
    margin = reach + templates.shapes.shape[1] // 2 + BIN
    found = []
    for start in range(first, last, PIECE):
        stop = min(start + PIECE, last)
        low = start - margin
        piece = traces[:, max(low, 0) : stop + margin]
        if low < 0:  # pieces begin at the same place of a bin wherever they lie
            piece = torch.nn.functional.pad(piece, (-low, 0))
        part = _detect_piece(piece, templates, threshold, reach, margin, margin + stop - start)
        found.append(part._replace(sample=part.sample + low))
    return Peaks(*(torch.cat(column) for column in zip(*found, strict=True)))


def _detect_piece(
    traces: Tensor, templates: UniversalTemplates, threshold: float, reach: int, first: int, last: int
) -> Peaks:
    matches = correlate(traces, templates.shapes, layout="ctp")  # (c, t, p)
    tail = -matches.shape[1] % BIN
    if tail:
        matches = torch.nn.functional.pad(matches, (0, 0, 0, tail))
    search = _Search(matches, templates, threshold * (1 - ROUNDING))
    search.evaluate(*search.worth_a_look(reach))
    centre, sample, value = search.candidates(threshold, reach, first, last)
    search.evaluate(*search.rivals(centre, sample, value, reach))
    largest = search.are_largest(centre, sample, value, reach)
    centre, sample = centre[largest], sample[largest]
    order = (sample * len(templates.channels) + centre).argsort()
    return _describe(matches, templates, centre[order], sample[order])


class _Search:
    """Branch and bound for the local maxima of the score in one piece.

    Every (centre, bin) pair has an upper bound; its scores are evaluated only where they could matter.

    Attributes
    ----------
    bound : Tensor, shape (k, bins)
        No score in the bin is larger; 0 where that is not above threshold.
    score : Tensor, shape (k, bins · BIN)
        Largest |A| where evaluated, else 0.
    best : Tensor, shape (k, bins)
        Largest score of each bin; −1 where not evaluated.
    """

    def __init__(self, matches: Tensor, templates: UniversalTemplates, threshold: float) -> None:
        c, t, p = matches.shape
        self.templates = templates
        self.n_bins = t // BIN
        self.rows = matches.view(c * self.n_bins, BIN * p)
        self.n_shapes = p
        self.threshold = threshold
        lowest, highest = torch.aminmax(self.rows, dim=1)
        energy = torch.maximum(highest, lowest.neg_()).square_().view(c, self.n_bins)
        bound = _sum_over_channels(energy, templates).sqrt_()
        self.bound = bound.masked_fill_(bound <= threshold, 0)
        self.score = matches.new_zeros(len(bound), t)
        self.best = torch.full_like(bound, -1.0)

    def worth_a_look(self, reach: int) -> tuple[Tensor, Tensor]:
        """Pairs that may hold a local maximum.

        First the pairs whose bound is the largest among the bins around it are evaluated. Any other pair that
        sees such a score, larger than its own bound, anywhere within reach of all its samples holds no maximum.
        """
        whole = (reach + 1) // BIN - 1  # bins on either side that lie within reach of every sample of a bin
        around = torch.nn.functional.max_pool1d(self.bound[None], 2 * whole + 1, 1, whole)[0]
        self.evaluate(*((self.bound == around) & (self.bound > 0)).nonzero(as_tuple=True))
        found = torch.nn.functional.max_pool1d(self._best_in_sight()[None], 2 * whole + 1, 1, whole)[0]
        return ((self.bound > 0) & (self.best < 0) & (self.bound >= found)).nonzero(as_tuple=True)

    def _best_in_sight(self) -> Tensor:
        """Largest score above threshold, as far as known, among each centre's neighbours: (k, bins)."""
        centre, bin_ = (self.best > self.threshold).nonzero(as_tuple=True)
        watcher, index = self.templates.sees[:, centre].nonzero(as_tuple=True)
        sight = torch.zeros_like(self.best).view(-1)
        seen = self.best[centre, bin_].index_select(0, index)
        sight.scatter_reduce_(0, watcher * self.n_bins + bin_.index_select(0, index), seen, "amax")
        return sight.view_as(self.best)

    def evaluate(self, centre: Tensor, bin_: Tensor) -> None:
        """Fill in the scores of the given pairs."""
        t = self.templates
        for k, b in zip(centre.split(PAIRS_AT_ONCE), bin_.split(PAIRS_AT_ONCE), strict=True):
            row = t.channels.index_select(0, k) * self.n_bins + b[:, None]  # (n, j)
            around = self.rows.index_select(0, row.flatten()).view(*row.shape, self.rows.shape[1])  # (n, j, BIN·p)
            largest = torch.bmm(t.weights.index_select(0, k), around).abs_().amax(dim=1)  # (n, BIN·p)
            score = largest.view(-1, BIN, self.n_shapes).amax(dim=2)
            self.score.view(-1, BIN).index_copy_(0, k * self.n_bins + b, score)
            self.best[k, b] = score.amax(dim=1)

    def candidates(self, threshold: float, reach: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluated scores above threshold that no score in the whole bins around exceeds, as far as evaluated."""
        centre, bin_ = (self.best > threshold).nonzero(as_tuple=True)
        best = self.best[centre, bin_]
        whole = (reach + 1) // BIN - 1
        for step in range(-whole, whole + 1):
            near = (bin_ + step).clamp(0, self.n_bins - 1)
            alive = self.best[centre, near] <= best
            centre, bin_, best = centre[alive], bin_[alive], best[alive]
        for step in range(-whole, whole + 1):
            near = (bin_ + step).clamp(0, self.n_bins - 1)
            pair = self.templates.neighbours.index_select(0, centre) * self.n_bins + near[:, None]
            alive = self.best.view(-1).take(pair).amax(dim=1) <= best
            centre, bin_, best = centre[alive], bin_[alive], best[alive]
        value = self.score.view(-1, BIN).index_select(0, centre * self.n_bins + bin_)  # (n, BIN)
        pair, offset = (value == best[:, None]).nonzero(as_tuple=True)
        centre, sample, value = centre[pair], bin_[pair] * BIN + offset, best[pair]
        inside = (sample >= first) & (sample < last)
        return centre[inside], sample[inside], value[inside]

    def rivals(self, centre: Tensor, sample: Tensor, value: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Pairs not yet evaluated that could hold a score as large as a candidate's in its neighbourhood."""
        steps = torch.arange(2 * reach // BIN + 2, device=sample.device)
        bin_ = (sample[:, None] - reach) // BIN + steps  # (n, bins of the window)
        bin_ = bin_.minimum((sample[:, None] + reach) // BIN)
        near = self.templates.neighbours[centre]  # (n, m)
        pair = near[:, :, None] * self.n_bins + bin_[:, None, :]
        open_ = (self.bound.view(-1)[pair] >= value[:, None, None]) & (self.best.view(-1)[pair] < 0)
        pair = pair[open_].unique()
        return pair // self.n_bins, pair % self.n_bins

    def are_largest(self, centre: Tensor, sample: Tensor, value: Tensor, reach: int) -> Tensor:
        """The exact test: no larger score in the neighbourhood, no equal one earlier or, then, at a lower centre."""
        around = torch.arange(-reach, reach + 1, device=sample.device)
        kept = [torch.zeros(0, dtype=torch.bool, device=sample.device)]
        for k, t, v in zip(centre.split(512), sample.split(512), value.split(512), strict=True):
            near = self.templates.neighbours[k]  # (n, m)
            score = self.score[near[:, :, None], (t[:, None] + around)[:, None, :]]  # (n, m, window)
            before = (around < 0) | ((around == 0) & (near < k[:, None])[:, :, None])
            v = v[:, None, None]
            kept.append(~((score > v) | ((score == v) & before)).flatten(1).any(dim=1))
        return torch.cat(kept)


def _sum_over_channels(energy: Tensor, templates: UniversalTemplates) -> Tensor:
    """Sum over each centre's channels: (c, bins) to (k, bins)."""
    bound = energy.new_zeros(len(templates.channels), energy.shape[1])
    for slot in range(templates.channels.shape[1]):
        bound.addcmul_(energy.index_select(0, templates.channels[:, slot]), templates.present[:, slot, None])
    return bound


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
