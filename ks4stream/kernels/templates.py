"""Compare, align and merge templates (sections 5 and 8).

A template is represented by its features U (c, q): its waveform on channel c is ``Σ_q U[c, q] · wPCA[q]``. As the
rows of wPCA are orthonormal, inner products of waveforms are inner products of features. Those of *shifted*
waveforms require only the inner products of shifted components (:func:`lagged_products`); waveforms are never
computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LEFT, MIN_PART = 0.1, 0.1
"""Shares of the energy of the template of a collision: what two others leave at most, and what the second explains at
least in addition to the first. What was learned from 21 to 78 collisions of large neurons left 0.07 at most; of other
templates, similar ones leave as little, but then the second adds nothing."""
MAX_EXCESS = 3.0
"""Maximum number of spikes of a collision's template, relative to that expected of neurons that fire independently, at
all lags. Of the real neurons of simulated recordings, without it 1 % looked like the sum of two others."""
PAIRS_PER_CHUNK = 1 << 16  # pairs of templates in memory over all lags: 32 MB at nt = 61


class Similarity(NamedTuple):
    """Similarity of templates, and the lag at which they are most similar.

    Attributes
    ----------
    value : Tensor, shape (u, u), float32
        Largest correlation over lags −nt … nt; diagonal 1; symmetric.
    lag : Tensor, shape (u, u), int64, samples
        ``roll(v, lag[u, v])``, which moves v later, is aligned with u; antisymmetric.
    """

    value: Tensor
    lag: Tensor


def lagged_products(components: Tensor) -> Tensor:
    """Inner products of components with components shifted later by −nt … nt samples.

    Parameters
    ----------
    components : Tensor, shape (q, w), float32

    Returns
    -------
    Tensor, shape (q, q, l), float32
        ``[q, r, nt + lag] = Σ_w components[q, w] · components[r, w − lag]``, zero beyond the ends.

    Examples
    --------
    >>> lagged_products(torch.tensor([[1.0, 2.0, 0.0]]))[0, 0].tolist()
    [0.0, 0.0, 2.0, 5.0, 2.0, 0.0, 0.0]
    """
    nt = components.shape[1]
    padded = torch.nn.functional.pad(components, (nt, nt))
    shifted = padded.unfold(1, nt, 1)  # (q, l, w): by nt … −nt
    return torch.einsum("qw,rlw->qrl", components, shifted).flip(2)


def similarity(features: Tensor, components: Tensor) -> Similarity:
    """Correlate all pairs of templates, at the lag where each pair is most similar.

    Of equally good lags the smallest is taken; of ``±lag`` the negative one for u > v. Takes 12·u² bytes and about
    100 MB.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32
    components : Tensor, shape (q, w), float32
        wPCA.
    """
    u = len(features)
    unit = _of_unit_norm(features)
    value = features.new_empty(u, u)
    lag = torch.zeros((u, u), dtype=torch.int64, device=features.device)
    step = max(1, PAIRS_PER_CHUNK // max(u, 1))
    for first in range(0, u, step):  # only the lower triangle: the upper one mirrors it
        last = min(first + step, u)
        value[first:last, :last], lag[first:last, :last] = _most_alike(unit[first:last], unit[:last], components)
    return Similarity(_mirrored(value, 1).fill_diagonal_(1.0), _mirrored(lag, -1))


def similarity_to(template: Tensor, others: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Correlate a template with others: its row of :func:`similarity` if it were the first template.

    Parameters
    ----------
    template : Tensor, shape (c, q), float32
    others : Tensor, shape (v, c, q), float32
    components : Tensor, shape (q, w), float32
        wPCA.

    Returns
    -------
    value : Tensor, shape (v,), float32
    lag : Tensor, shape (v,), int64, samples
        Shift to a later time that aligns each of the others with the template.
    """
    unit = _of_unit_norm(template[None])
    parts = [_most_alike(_of_unit_norm(chunk), unit, components) for chunk in others.split(PAIRS_PER_CHUNK)]
    return torch.cat([value[:, 0] for value, _ in parts]), -torch.cat([lag[:, 0] for _, lag in parts])


def _of_unit_norm(features: Tensor) -> Tensor:
    return features / features.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)


def _most_alike(rows: Tensor, columns: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Largest correlation and its lag for all pairs of templates (u, c, q) and (v, c, q) of unit norm: both (u, v)."""
    q, nt = components.shape
    lags = torch.arange(-nt, nt + 1, device=rows.device)
    lags = lags[torch.argsort(lags.abs(), stable=True)]  # 0, −1, 1, −2, … so that argmax prefers the smallest
    products = lagged_products(components)[:, :, nt + lags].reshape(q * q, -1)  # (q·r, l)
    gram = torch.einsum("ucq,vcr->uvqr", rows, columns)
    best = (gram.reshape(-1, q * q) @ products).max(dim=1)
    shape = (len(rows), len(columns))
    return best.values.view(shape), lags[best.indices].view(shape)


def _mirrored(lower: Tensor, sign: int) -> Tensor:
    """Fill the upper triangle with `sign` times the lower one."""
    return lower.tril() + sign * lower.tril(-1).T


def roll_matrix(components: Tensor, lag: int) -> Tensor:
    """Compute the matrix that delays features by `lag` samples; the edge value is repeated for samples rolled in.

    Parameters
    ----------
    components : Tensor, shape (q, w), float32
        wPCA, orthonormal rows.
    lag : int
        Positive values shift to later samples.

    Returns
    -------
    Tensor, shape (q, q), float32
        ``features @ roll_matrix(components, lag)`` are the features of the delayed waveform.
    """
    n_samples = components.shape[1]
    source = (torch.arange(n_samples, device=components.device) - lag).clamp(0, n_samples - 1)
    return components[:, source] @ components.T


def time_derivative(components: Tensor) -> Tensor:
    """Compute the matrix that differentiates features by time, per sample: (q, w) to (q, q), float64.

    ``features @ time_derivative(components)`` are the features of the waveform's derivative (central differences).
    """
    return 0.5 * (roll_matrix(components, -1) - roll_matrix(components, 1)).double()


def align(features: Tensor, components: Tensor, shapes: Tensor) -> Tensor:
    """Roll each template so that its correlation with a universal waveform is largest at the centre of the window.

    Section 5: reconstruct over time through wPCA, correlate with wTEMP, roll so that the largest |correlation| of any
    channel and waveform is at ``nt // 2``, project back. Of equal maxima the earliest sample is taken.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32
    components : Tensor, shape (q, w), float32
        wPCA.
    shapes : Tensor, shape (p, w), float32
        wTEMP.

    Returns
    -------
    Tensor, shape (u, c, q), float32
    """
    nt = components.shape[1]
    shifts = torch.arange(nt, device=features.device) - nt // 2
    # wTEMP centred on each sample of the window, cut off at its ends, in the space of the components
    moved = torch.nn.functional.pad(shapes, (nt, nt)).unfold(1, nt, 1)[:, nt - shifts]  # (p, t, w)
    basis = torch.einsum("qw,ptw->qpt", components, moved)  # (q, p, t)
    aligned = torch.empty_like(features)
    rolled = torch.stack([torch.roll(components, -int(s), dims=1) for s in shifts])  # (t, q, w)
    turn = torch.einsum("tqw,rw->tqr", rolled, components)  # features before → features after the roll
    for unit, template in enumerate(features):  # one at a time, to bound memory
        correlation = torch.einsum("cq,qpt->cpt", template, basis).abs()
        aligned[unit] = template @ turn[correlation.amax(dim=(0, 1)).argmax()]
    return aligned


class Merged(NamedTuple):
    """Templates after merging.

    Attributes
    ----------
    features : Tensor, shape (v, c, q), float32
    n_spikes : Tensor, shape (v,), float64
        Number of spikes each represents.
    variance : Tensor, shape (v,), float64
        Variance of the scores of these spikes.
    n_found : Tensor, shape (v,), float64
        Number of spikes from which each was computed.
    """

    features: Tensor
    n_spikes: Tensor
    variance: Tensor
    n_found: Tensor

    def at(self, kept: Tensor) -> Merged:
        """Some of the templates."""
        return Merged(*(column[kept] for column in self))


def merge_similar(
    features: Tensor,
    count: Tensor,
    components: Tensor,
    *,
    variance: Tensor | None = None,
    n_found: Tensor | None = None,
    threshold: float = 0.9,
    norm_tolerance: float = 0.2,
) -> Merged:
    """Merge templates of nearly the same shape and size, in descending order of spike count (section 5).

    In that order (ties: lowest number) each remaining template absorbs all other remaining templates with similarity >
    `threshold` and ``2|a − b| / (a + b) < norm_tolerance`` for the norms a, b. The result is their mean, weighted by
    counts, each rolled by the lag at which it is most similar to the absorbing template: without that, the mean of two
    misaligned templates would resemble neither. They are in the order of the absorbing templates.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32
    count : Tensor, shape (u,)
        Number of spikes each template represents.
    components : Tensor, shape (q, w), float32
        wPCA.
    variance : Tensor, shape (u,), float64, optional
        Variance of the scores of these spikes; 0 if it is not given.
    n_found : Tensor, shape (u,), optional
        Number of spikes from which each was computed; by default those it represents.
    threshold, norm_tolerance : float
        Constants of the method.
    """
    norm = features.norm(dim=(1, 2))
    far = 2 * (norm[:, None] - norm).abs() >= norm_tolerance * (norm[:, None] + norm)
    pairs = similarity(features, components)
    alike = ((pairs.value > threshold) & ~far).cpu()
    leader = torch.full((len(features),), -1, dtype=torch.int64)
    for unit in torch.argsort(count.cpu(), descending=True, stable=True).tolist():
        if leader[unit] < 0:
            leader[(leader < 0) & alike[unit]] = unit
            leader[unit] = unit
    leader = leader.to(features.device)
    lag, rolled = pairs.lag.gather(0, leader[None])[0], features.clone()
    for shift in lag[lag != 0].unique().tolist():
        rolled[lag == shift] = features[lag == shift] @ roll_matrix(components, shift)
    kept, index = torch.unique(leader, return_inverse=True)
    weight = torch.zeros(len(kept), len(features), dtype=torch.float64, device=features.device)
    weight[index, torch.arange(len(features))] = count.double()
    total = weight.sum(dim=1)
    found = (weight > 0).double() @ (count if n_found is None else n_found).double()
    weight /= total.clamp_min(1e-30)[:, None]
    mean = torch.einsum("vu,ucq->vcq", weight.to(features), rolled)
    between = (norm - mean.norm(dim=(1, 2))[index]).double().square()
    within = torch.zeros_like(between) if variance is None else variance
    return Merged(mean, total, (weight * (within + between)).sum(dim=1), found)


def are_sums(features: Tensor, count: Tensor, components: Tensor, *, n_samples: int) -> Tensor:
    """Which templates are those of collisions: the sum of two others, each of which represents more spikes.

    Neurons that fire often collide often, in a long recording many times at similar lags, and the peaks of collisions
    form clusters. Without templates of their own they are matched by those of both neurons.

    Either of the two may be delayed by up to half a window. The search is greedy: each template that represents more
    spikes, at the lag at which it explains most, with each of the others, at the lag at which that explains most of the
    rest. On the channels on which the sum is not zero, they leave less than :data:`MAX_LEFT` of its energy, and both
    explain more than either does alone, by more than :data:`MIN_PART` of the energy. As waveforms may resemble a sum by
    chance, there are also no more spikes than :data:`MAX_EXCESS` times the number of collisions that is expected.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32
    count : Tensor, shape (u,)
        Number of spikes each template represents.
    components : Tensor, shape (q, w), float32
        wPCA.
    n_samples : int
        Length of the recording in which these were found.

    Returns
    -------
    Tensor, shape (u,), bool
    """
    nt, half = components.shape[1], components.shape[1] // 2
    delays = lagged_products(components)[:, :, nt - half : nt + half + 1].permute(2, 1, 0)  # (l, r, q)
    present, count = (features != 0).any(dim=2), count.to(features.device).double()
    most = MAX_EXCESS * count[:, None] * count * len(delays) / n_samples  # collisions of a pair, at most
    sums = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for unit in torch.argsort(count.cpu(), descending=True, stable=True).tolist():
        channels = present[unit]
        larger = torch.nonzero((count > count[unit]) & ~sums & (present & channels).any(dim=1))[:, 0]
        often = (most[larger][:, larger] >= count[unit]).fill_diagonal_(False)
        larger, often = larger[often.any(dim=1)], often[often.any(dim=1)][:, often.any(dim=1)]
        if not len(larger):
            continue
        template = features[unit, channels].flatten()
        energy = float(template @ template)
        delayed = torch.einsum("vcr,lrq->vlcq", features[larger][:, channels], delays).flatten(2)  # (v, l, c·q)
        change = delayed.square().sum(dim=2) - 2 * delayed @ template  # by how much each alone changes what is left
        alone, lag = change.min(dim=1)
        first = delayed[torch.arange(len(larger)), lag]  # (v, c·q)
        both = alone[:, None, None] + change + 2 * torch.einsum("vd,wld->vwl", first, delayed)
        both = both.amin(dim=2)  # (v, w)
        second = torch.minimum(alone[:, None], alone) - both  # what the other one explains in addition
        found = (energy + both < MAX_LEFT * energy) & (second > MIN_PART * energy) & often
        sums[unit] = bool(found.any())
    return sums
