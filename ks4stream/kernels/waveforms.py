"""Universal waveforms: isolated spikes, their principal components and typical shapes (section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ks4stream.kernels.memory import ChunkSize, in_chunks

PEAK_REACH = 5  # samples on either side among which the peak of a snippet is the largest
ALONE_REACH = 30  # samples on either side among which it is the only peak
CHANNELS_PER_CHUNK = ChunkSize(cpu=8, gpu=32)  # searched at a time; all their samples may be above threshold
WINDOWS_PER_CHUNK = ChunkSize(cpu=512, gpu=16_384)  # neighbourhoods examined at a time
WINDOW_BYTES = 10  # per sample in a window: its mark, and the same while it is summed
ABOVE_BYTES = 45  # per sample above threshold on these channels: its size, and two copies of its index
KMEANS_RESTARTS = 10
KMEANS_SWEEPS = 100
KMEANS_MAX_SNIPPETS = 50_000  # for k-means: enough for the centres of six shapes


def find_clean_peaks(
    traces: Tensor, near: Tensor, wide: Tensor, *, threshold: float, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Peaks of either sign with ``first <= sample < last`` that are isolated in their neighbourhood.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Whitened traces.
    near, wide : Tensor of int64, shape (c, 9) and (c, 13)
        Channels among which a peak must be the largest, and the only peak; itself included.
    threshold : float
        In noise standard deviations.
    first, last : int
        Samples to report, half-open; more than ``ALONE_REACH`` + ``PEAK_REACH`` from the ends.

    Returns
    -------
    channel, sample : Tensor of int64, shape (n,)
        Sorted by (channel, sample).
    """
    low = first - ALONE_REACH - PEAK_REACH
    traces = traces[:, low : last + ALONE_REACH + PEAK_REACH]
    if not bool(traces.any()):  # blanked throughout, as in dead time
        none = torch.zeros(0, dtype=torch.int64, device=traces.device)
        return none, none
    channel, sample = _largest(traces, near, threshold)
    marks = torch.zeros(traces.shape, dtype=torch.uint8, device=traces.device)
    marks[channel, sample] = 1
    inside = (sample >= first - low) & (sample < last - low)
    channel, sample = channel[inside], sample[inside]
    alone = torch.empty_like(channel, dtype=torch.bool)

    def count_peaks(channel: Tensor, sample: Tensor, alone: Tensor) -> None:
        alone[:] = _windows(marks, wide[channel], sample, ALONE_REACH).sum(dim=(1, 2)) == _repeats(wide, channel)

    in_chunks(count_peaks, channel, sample, alone, size=WINDOWS_PER_CHUNK.on(traces.device))
    return channel[alone], sample[alone] + low


def _largest(traces: Tensor, near: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Samples above threshold that no nearby sample exceeds, sorted by (channel, sample).

    A few channels at a time: movement artifacts put whole per cents of all samples above threshold, but few of these
    are the largest.
    """
    peaks = []

    def compare(channel: Tensor, sample: Tensor, largest: Tensor) -> None:
        windows = _windows(traces, near[channel], sample, PEAK_REACH).abs_()
        largest[:] = windows.amax(dim=(1, 2)) <= traces[channel, sample].abs()

    size = CHANNELS_PER_CHUNK.on(traces.device)
    for i, chunk in enumerate(traces[:, PEAK_REACH:-PEAK_REACH].split(size)):
        channel, sample = (chunk.abs() > threshold).nonzero(as_tuple=True)
        channel, sample = channel + i * size, sample + PEAK_REACH
        largest = torch.empty_like(channel, dtype=torch.bool)
        in_chunks(compare, channel, sample, largest, size=WINDOWS_PER_CHUNK.on(traces.device))
        peaks.append((channel[largest], sample[largest]))
    channels, samples = zip(*peaks, strict=True)
    return torch.cat(channels), torch.cat(samples)


def _windows(values: Tensor, rows: Tensor, sample: Tensor, reach: int) -> Tensor:
    """Gather ``values[rows, sample ± reach]``: (c, t), (n, j), (n,) to (n, j, 2·reach + 1)."""
    around = sample[:, None] + torch.arange(-reach, reach + 1, device=sample.device)
    return values[rows[:, :, None], around[:, None, :]]


def _repeats(wide: Tensor, channel: Tensor) -> Tensor:
    """How often a channel occurs in its own row of `wide` (rows of small shanks are padded with it)."""
    return (wide == wide[:, :1]).sum(dim=1)[channel]


def cut_snippets(traces: Tensor, channel: Tensor, sample: Tensor, *, nt: int, peak_sample: int) -> Tensor:
    """Waveforms of the peaks on their own channels, scaled to unit norm: (c, t), (n,), (n,) to (n, w)."""
    around = sample[:, None] + torch.arange(nt, device=sample.device) - peak_sample
    snippets = traces[channel[:, None], around]
    return snippets / snippets.norm(dim=1, keepdim=True)


def principal_components(snippets: Tensor, count: int) -> Tensor:
    """First right singular vectors of the snippets, without subtracting the mean.

    Computed as eigenvectors of the nt × nt Gram matrix in float64; signs are chosen such that the largest entry
    of each is positive, so that the result is unique.

    Parameters
    ----------
    snippets : Tensor, shape (n, w)

    Returns
    -------
    Tensor of float32, shape (q, w)
    """
    gram = torch.zeros(snippets.shape[1], snippets.shape[1], dtype=torch.float64)
    for chunk in snippets.cpu().split(16_384):
        gram += chunk.double().T @ chunk.double()
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count].T
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return (vectors * vectors.gather(1, largest).sign()).float().to(snippets.device)


def typical_shapes(snippets: Tensor, count: int, *, seed: int) -> Tensor:
    """k-means centres of the snippets, scaled to unit norm, most numerous first.

    Parameters
    ----------
    snippets : Tensor, shape (n, w)
        At least `count` of them.
    seed : int
        Seed of the initialisations, which are drawn on the CPU.

    Returns
    -------
    Tensor of float32, shape (p, w)
    """
    chosen = (
        torch.arange(min(len(snippets), KMEANS_MAX_SNIPPETS)) * len(snippets) // min(len(snippets), KMEANS_MAX_SNIPPETS)
    )
    points = snippets.cpu()[chosen]
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _spread_start(points, count, generator)) for _ in range(KMEANS_RESTARTS)]
    centres, labels, _ = min(runs, key=lambda run: run[2])
    numerous = torch.bincount(labels, minlength=count).argsort(descending=True, stable=True)
    centres = centres[numerous]
    return (centres / centres.norm(dim=1, keepdim=True)).to(snippets.device)


def _spread_start(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further centre is drawn with probability ∝ squared distance to the nearest previous one."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = ((points - points[chosen[0]]) ** 2).sum(dim=1).double()
    for _ in range(count - 1):
        mass = distance.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * mass[-1]
        chosen.append(min(int(torch.searchsorted(mass, draw)), len(points) - 1))
        distance = torch.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(dim=1).double())
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, float]:
    """Lloyd's algorithm until labels no longer change: centres (p, w), labels (n,), sum of squared distances."""
    labels = torch.full((len(points),), -1)
    for _ in range(KMEANS_SWEEPS):
        gain = points @ centres.T * 2 - (centres**2).sum(dim=1)
        best = gain.max(dim=1)
        if torch.equal(best.indices, labels):
            break
        labels = best.indices
        member = torch.nn.functional.one_hot(labels, len(centres)).float()
        count = member.sum(dim=0)[:, None]
        centres = torch.where(count > 0, member.T @ points / count.clamp(min=1), centres)
    cost = float((points**2).sum(dtype=torch.float64) - best.values.sum(dtype=torch.float64))
    return centres, labels, cost
