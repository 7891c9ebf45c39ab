"""Samples in which no spike can be found: dead time, artifacts and loud noise (section 1.3).

The waveform of a neuron falls off with the distance from it. What reaches most channels of a wide part of the probe
without falling off is an artifact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MEDIAN_TO_SD = 1.4826  # of normally distributed noise: its s.d. relative to the median of its absolute values
MEAN_TO_SD = math.sqrt(math.pi / 2)  # and relative to their mean
DEVIATIONS, SHARE, STEP = 6.0, 2 / 3, 8
"""An artifact exceeds 6 standard deviations of the noise on more than two thirds of the channels of a window, which two
simultaneous spikes do not reach; every 8th sample is tested."""
NEAR_SAMPLES = 16  # within which channels reach their largest values, as spikes travel and filters ring
EVENT_MS = 3.0  # around a sample found, in which every sample is tested
CORE_SHARE = 0.2  # of the largest value within 2 ms; smaller values are what the filter made of larger ones
CORE_MS = 2.0
MAX_ROUNDS = 4  # of filling artifacts and filtering again
POP_DEVIATIONS, POP_SHARE, POP_GAP_MS = 50.0, 0.05, 0.5
"""A pop exceeds 50 standard deviations on one channel, and less than a twentieth of that on the contacts beside it, up
to 40 µm away, which every neuron of this size would reach. It lasts until the channel has been within 6 standard
deviations for half a millisecond."""
LOUD, LOUD_SHARE, LOUD_SAMPLES = 2.5, 0.5, 1024
"""Stretches of 1024 samples are loud if the noise is 2.5 times its usual size on more than half of the channels of a
window."""


class Window(NamedTuple):
    """Some neighbouring channels, of which an artifact reaches most.

    Attributes
    ----------
    channels : Tensor of int64, shape (w,)
    far : Tensor, shape (w, w), float32
        Row: a channel. Columns: equal weights of the quarter of the channels that is farthest from it, 0 elsewhere.
    least : Tensor, shape (w,), float32
        For each channel, the share of what it reaches anywhere that an artifact has there, at least.
    """

    channels: Tensor
    far: Tensor
    least: Tensor


def repeated(traces: Tensor, channels: Tensor, min_samples: int) -> Tensor:
    """Samples (t,) that are part of a run of at least so many equal ones, on all of these channels.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        As they are in the file.
    channels : Tensor of int64, shape (v,)
        Without those that never have a signal.
    min_samples : int
    """
    mask = torch.zeros(traces.shape[1], dtype=torch.bool, device=traces.device)
    step = max(min_samples // 4, 1)
    for number, channel in enumerate(channels.tolist()):
        coarse = traces[channel, ::step]  # of which such a run contains three
        same = coarse[1:] == coarse[:-1]
        if not bool((same[1:] & same[:-1]).any()):  # nearly always for the first channel
            return torch.zeros_like(mask)
        same = traces[channel, 1:] == traces[channel, :-1]
        found = _in_long_runs(same, min_samples - 1)
        found = torch.cat([found, found[-1:]]) | torch.cat([found[:1], found])
        mask = found if number == 0 else mask & found
    return mask


def _in_long_runs(mask: Tensor, length: int) -> Tensor:
    """Keep runs of at least so many set samples: (t,) to (t,)."""
    if len(mask) < length or not bool(mask.any()):
        return torch.zeros_like(mask)
    begins = -torch.nn.functional.max_pool1d(-mask[None].float(), length, 1)[0] > 0
    wide = torch.nn.functional.pad(begins.float(), (length - 1, length - 1))
    return torch.nn.functional.max_pool1d(wide[None], length, 1)[0] > 0


def fill(traces: Tensor, mask: Tensor) -> Tensor:
    """Replace masked samples by straight lines between those beside them, in place; by 0 if all are masked.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
    mask : Tensor of bool, shape (t,)

    Returns
    -------
    Tensor, shape (c, t)
        `traces`.
    """
    if not bool(mask.any()):
        return traces
    if bool(mask.all()):
        return traces.zero_()
    n = len(mask)
    index = torch.arange(n, device=mask.device)
    before = torch.cummax(torch.where(mask, -1, index), 0).values
    after = n - 1 - torch.cummax(torch.where(mask.flip(0), -1, index), 0).values.flip(0)  # n if there is none
    inside = mask.nonzero()[:, 0]
    left, right = before[inside], after[inside]
    left, right = torch.where(left < 0, right, left), torch.where(right >= n, left, right)
    share = ((inside - left).float() / (right - left).clamp_min(1)).clamp(0, 1)
    traces[:, inside] = torch.lerp(traces[:, left], traces[:, right], share)
    return traces


def noise_level(traces: Tensor, raw: Tensor, kept: Tensor) -> Tensor:
    """Standard deviation of the noise, estimated by the median; 0 for channels that do not change, or without samples.

    Parameters
    ----------
    traces, raw : Tensor, shape (c, t)
        With and without filter and reference, which a channel without a signal has, too.
    kept : Tensor of bool, shape (t,)

    Returns
    -------
    Tensor, shape (c,)
    """
    at = kept.nonzero()[::STEP, 0]
    if len(at) == 0:
        return torch.zeros(len(traces), device=traces.device)
    before = raw[:, at]
    level = traces[:, at].abs().median(dim=1).values * MEDIAN_TO_SD
    return level.masked_fill((before == before[:, :1]).all(dim=1), 0.0)


def sampled(traces: Tensor, noise: Tensor) -> Tensor:
    """Absolute values of every eighth sample, relative to the s.d. of the noise: (c, t), (c,) to (c, t / 8)."""
    return traces[:, ::STEP].abs().mul_(_inverse(noise)[:, None])


def artifacts(
    traces: Tensor,
    size: Tensor,
    noise: Tensor,
    windows: Sequence[Window],
    *,
    references: Sequence[tuple[Tensor, Tensor]],
    threshold: float,
    sampling_rate_hz: float,
) -> Tensor:
    """Samples (t,) of artifacts, without what the filter made of them before and after.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Filtered and referenced.
    size : Tensor, shape (c, t / 8)
        From :func:`sampled`.
    noise : Tensor, shape (c,)
        Its standard deviation.
    windows : sequence of Window
    references : sequence of (channels, reference)
        What was subtracted (t,) from which channels. With few channels, the median has much of a large spike, which it
        leaves on all of them.
    threshold : float
        Any channel that reaches it is part of an artifact; may be infinite.
    sampling_rate_hz : float
    """
    mask = torch.zeros(traces.shape[1], dtype=torch.bool, device=traces.device)
    if not math.isinf(threshold):
        mask |= (traces.abs() >= threshold).any(dim=0)
    beyond = (size > DEVIATIONS).float()
    for window in windows:
        at = (beyond[window.channels].mean(dim=0) > SHARE).nonzero()[:, 0] * STEP
        at = at[_does_not_fall_off(traces, references, noise, window, at)]
        if len(at):
            mask |= _cores(traces, noise, window.channels, at, sampling_rate_hz)
    return mask


def _does_not_fall_off(
    traces: Tensor, references: Sequence[tuple[Tensor, Tensor]], noise: Tensor, window: Window, at: Tensor
) -> Tensor:
    """At which samples (n,) a window has what no neuron causes: (n,), bool."""
    if len(at) == 0:
        return at > 0
    near = at[:, None] + torch.arange(-NEAR_SAMPLES, NEAR_SAMPLES + 1, STEP, device=at.device)
    near = near.clamp(0, traces.shape[1] - 1)
    before = traces[:, near]  # (c, n, l)
    for channels, reference in references:
        before[channels] += reference[near]
    reached = before.abs_().amax(dim=2) * _inverse(noise)[:, None]  # (c, n)
    within = reached[window.channels]
    largest = within.argmax(dim=0)
    far = (window.far[largest] * within.T).sum(dim=1)
    # Relative to all channels: a neuron elsewhere reaches all channels of a window alike.
    return far >= (window.least[largest] * reached.amax(dim=0)).clamp_min(DEVIATIONS)


def _cores(traces: Tensor, noise: Tensor, channels: Tensor, at: Tensor, sampling_rate_hz: float) -> Tensor:
    """Samples (t,) near those found (n,) that exceed the noise as far, and are not much smaller than others beside."""
    per_ms = sampling_rate_hz / 1000
    found = torch.zeros(traces.shape[1], dtype=torch.bool, device=traces.device)
    found[at] = True
    near = widen(found, round(EVENT_MS * per_ms)).nonzero()[:, 0]
    size = traces[channels[:, None], near].abs_() * _inverse(noise)[channels, None]
    mean = torch.zeros(len(found), device=traces.device)
    mean[near] = size.mean(dim=0)
    reach = round(CORE_MS * per_ms)
    largest = torch.nn.functional.max_pool1d(mean[None], 2 * reach + 1, 1, reach)[0]
    beyond = torch.zeros_like(found)
    beyond[near] = (size > DEVIATIONS).float().mean(dim=0) > SHARE
    return beyond & (mean >= CORE_SHARE * largest)


def pops(
    traces: Tensor, size: Tensor, noise: Tensor, beside: Tensor, *, sampling_rate_hz: float
) -> list[tuple[int, Tensor]]:
    """Artifacts of single channels.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Filtered and referenced.
    size : Tensor, shape (c, t / 8)
        From :func:`sampled`.
    noise : Tensor, shape (c,)
        Its standard deviation.
    beside : Tensor of int64, shape (c, k)
        The channels beside each one. Channels are not tested if one of these is −1, or has no noise.
    sampling_rate_hz : float

    Returns
    -------
    list of (channel, mask)
        Channels with pops, ascending, and the samples (t,) of these.
    """
    tested = (beside >= 0).all(dim=1) & (noise[beside] > 0).all(dim=1)
    far_beyond = (size > POP_DEVIATIONS) & tested[:, None]
    if not bool(far_beyond.any()):
        return []
    near = NEAR_SAMPLES // STEP
    reached = torch.nn.functional.max_pool1d((size * noise[:, None])[None], 2 * near + 1, 1, near)[0]  # file unit
    found = []
    for channel in far_beyond.any(dim=1).nonzero()[:, 0].tolist():
        around = reached[beside[channel]].amax(dim=0)
        at = (far_beyond[channel] & (around < POP_SHARE * reached[channel])).nonzero()[:, 0] * STEP
        if len(at):
            beyond = traces[channel].abs() > DEVIATIONS * noise[channel]
            found.append((channel, _runs_with(beyond, at, round(POP_GAP_MS * sampling_rate_hz / 1000))))
    return found


def _runs_with(mask: Tensor, at: Tensor, gap: int) -> Tensor:
    """The runs of a mask (t,), whose gaps are shorter than so many samples, that contain one of the samples at (n,)."""
    joined = widen(mask, gap)
    run = torch.cumsum(joined & ~torch.cat([torch.zeros_like(joined[:1]), joined[:-1]]), 0)
    chosen = torch.zeros(int(run[-1]) + 1, dtype=torch.bool, device=mask.device)
    chosen[run[at]] = True
    return joined & chosen[run]


def loud(size: Tensor, windows: Sequence[Window], blank: Tensor) -> Tensor:
    """Samples (t,) of loud stretches, and of those beside them.

    Parameters
    ----------
    size : Tensor, shape (c, t / 8)
        From :func:`sampled`.
    windows : sequence of Window
    blank : Tensor of bool, shape (t,)
        Samples that do not count.
    """
    n_blocks = len(blank) // LOUD_SAMPLES
    if not windows or n_blocks == 0:
        return torch.zeros_like(blank)
    size, kept = (of[..., : n_blocks * LOUD_SAMPLES // STEP] for of in (size, ~blank[::STEP]))
    if not bool(kept.all()):
        size = size * kept
    kept = kept.view(n_blocks, -1).float().mean(dim=1)
    level = size.clamp_max(DEVIATIONS).reshape(len(size), n_blocks, -1).mean(dim=2) * MEAN_TO_SD  # not by few spikes
    is_loud = (level > LOUD * kept).float()
    found = torch.stack([is_loud[window.channels].mean(dim=0) > LOUD_SHARE for window in windows]).any(dim=0) & (
        kept > 0
    )
    if not bool(found.any()):
        return torch.zeros_like(blank)
    block = (torch.arange(len(blank), device=blank.device) // LOUD_SAMPLES).clamp_max(n_blocks - 1)
    return widen(found, 1)[block]


def _inverse(noise: Tensor) -> Tensor:
    """1 / s.d., 0 for channels without noise: (c,)."""
    return torch.where(noise > 0, 1 / noise.clamp_min(1e-30), torch.zeros_like(noise))


def widen(mask: Tensor, margin: int) -> Tensor:
    """Extend a mask by `margin` samples on either side of where it is set: (t,) to (t,)."""
    if margin == 0 or not bool(mask.any()):
        return mask
    return torch.nn.functional.max_pool1d(mask[None].float(), 2 * margin + 1, 1, margin)[0] > 0
