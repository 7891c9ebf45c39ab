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
DEVIATIONS, SHARE, STEP = 6.0, 0.5, 8
"""An artifact exceeds 6 standard deviations of the noise on more than half of the channels of a window; every 8th
sample is tested."""
MIN_FAR = 0.15
"""And on the quarter of the channels that is farthest from the largest one, the mean of what it reaches is at least
this share of what it reaches there. The waveforms of neurons fall to less than a tenth within 100 µm."""
NEAR_SAMPLES = 16  # within which channels reach their largest values, as spikes travel and filters ring
EVENT_MS = 3.0  # around a sample found, in which every sample is tested
CORE_SHARE = 0.2  # of the largest value within 2 ms; smaller values are what the filter made of larger ones
CORE_MS = 2.0
MAX_ROUNDS = 4  # of filling artifacts and filtering again
LOUD, LOUD_SAMPLES = 3.0, 1024
"""Stretches of 1024 samples are loud if the noise is 3 times its usual size on more than half of the channels of a
window."""


class Window(NamedTuple):
    """Some neighbouring channels, of which an artifact reaches more than half.

    Attributes
    ----------
    channels : Tensor of int64, shape (w,)
    far : Tensor, shape (w, w), float32
        Row: a channel. Columns: equal weights of the quarter of the channels that is farthest from it, 0 elsewhere.
    """

    channels: Tensor
    far: Tensor


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
    for number, channel in enumerate(channels.tolist()):  # nearly always, the first one has no such run
        same = traces[channel, 1:] == traces[channel, :-1]
        found = _in_long_runs(same, min_samples - 1)
        found = torch.cat([found, found[-1:]]) | torch.cat([found[:1], found])
        mask = found if number == 0 else mask & found
        if not bool(mask.any()):
            break
    return mask


def _in_long_runs(mask: Tensor, length: int) -> Tensor:
    """Keep runs of at least so many set samples: (t,) to (t,)."""
    if mask.numel() < length or not bool(mask.any()):
        return torch.zeros_like(mask)
    whole = -torch.nn.functional.max_pool1d(-mask[None].float(), length, 1)[0] > 0  # begins such a run
    wide = torch.nn.functional.pad(whole.float(), (length - 1, length - 1))
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


def artifacts(
    traces: Tensor,
    noise: Tensor,
    windows: Sequence[Window],
    *,
    reference: Tensor,
    threshold: float,
    sampling_rate_hz: float,
) -> Tensor:
    """Samples (t,) of artifacts, without what the filter made of them before and after.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Filtered and referenced.
    noise : Tensor, shape (c,)
        Its standard deviation.
    windows : sequence of Window
    reference : Tensor, shape (c, t) or (1, t)
        What was subtracted. With few channels, the median has much of a large spike, which it leaves on all of them.
    threshold : float
        Any channel that reaches it is part of an artifact; may be infinite.
    sampling_rate_hz : float
    """
    mask = torch.zeros(traces.shape[1], dtype=torch.bool, device=traces.device)
    if not math.isinf(threshold):
        mask |= (traces.abs() >= threshold).any(dim=0)
    for window in windows:
        found = _without_falling_off(traces, reference, noise, window)
        if bool(found.any()):
            mask |= _cores(traces, noise, window.channels, found, sampling_rate_hz)
    return mask


def _without_falling_off(traces: Tensor, reference: Tensor, noise: Tensor, window: Window) -> Tensor:
    """Samples (t,), of which every eighth was tested, at which a window has what no neuron causes."""
    found = torch.zeros(traces.shape[1], dtype=torch.bool, device=traces.device)
    size = _relative(traces[:, ::STEP], noise, window.channels)
    at = ((size > DEVIATIONS).float().mean(dim=0) > SHARE).nonzero()[:, 0]
    if len(at):
        beside = torch.arange(-(NEAR_SAMPLES // STEP), NEAR_SAMPLES // STEP + 1, device=at.device)
        near = (at[:, None] + beside).clamp(0, size.shape[1] - 1) * STEP
        own = window.channels if len(reference) > 1 else torch.zeros_like(window.channels)
        before = traces[window.channels[:, None, None], near] + reference[own[:, None, None], near]
        reached = (before.abs() * _inverse(noise)[window.channels, None, None]).amax(dim=2)  # (w, n)
        largest, channel = reached.max(dim=0)
        far = (window.far[channel] * reached.T).sum(dim=1)
        found[at[far >= MIN_FAR * largest] * STEP] = True
    return found


def _cores(traces: Tensor, noise: Tensor, channels: Tensor, found: Tensor, sampling_rate_hz: float) -> Tensor:
    """Samples (t,) near those found that exceed the noise as far, and are not much smaller than others beside them."""
    per_ms = sampling_rate_hz / 1000
    near = widen(found, round(EVENT_MS * per_ms)).nonzero()[:, 0]
    size = _relative(traces[:, near], noise, channels)
    mean = torch.zeros(len(found), device=traces.device)
    mean[near] = size.mean(dim=0)
    reach = round(CORE_MS * per_ms)
    largest = torch.nn.functional.max_pool1d(mean[None], 2 * reach + 1, 1, reach)[0]
    beyond = torch.zeros_like(found)
    beyond[near] = (size > DEVIATIONS).float().mean(dim=0) > SHARE
    return beyond & (mean >= CORE_SHARE * largest)


def loud(traces: Tensor, noise: Tensor, windows: Sequence[Window], blank: Tensor) -> Tensor:
    """Samples (t,) of loud stretches, and of those beside them.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Filtered, 0 where they are blank.
    noise : Tensor, shape (c,)
        Its usual standard deviation.
    windows : sequence of Window
    blank : Tensor of bool, shape (t,)
        Samples that do not count.
    """
    n_blocks = traces.shape[1] // LOUD_SAMPLES
    found = torch.zeros(n_blocks, dtype=torch.bool, device=traces.device)
    if not windows or n_blocks == 0:
        return torch.zeros_like(blank)
    kept = (~blank[: n_blocks * LOUD_SAMPLES : STEP]).view(n_blocks, -1).float().mean(dim=1)
    for window in windows:
        size = _relative(traces[:, : n_blocks * LOUD_SAMPLES : STEP], noise, window.channels)
        level = size.view(len(size), n_blocks, -1).mean(dim=2) * MEAN_TO_SD / kept.clamp_min(1e-6)
        found |= (level > LOUD).float().mean(dim=0) > SHARE
    found &= kept > 0
    if not bool(found.any()):
        return torch.zeros_like(blank)
    block = (torch.arange(len(blank), device=blank.device) // LOUD_SAMPLES).clamp_max(n_blocks - 1)
    return widen(found, 1)[block]


def _relative(traces: Tensor, noise: Tensor, channels: Tensor) -> Tensor:
    """Absolute values relative to the noise, on some channels: (w, t). Channels without noise have none."""
    return traces.index_select(0, channels).abs_() * _inverse(noise)[channels, None]


def _inverse(noise: Tensor) -> Tensor:
    """1 / s.d., 0 for channels without noise: (c,)."""
    return torch.where(noise > 0, 1 / noise.clamp_min(1e-30), torch.zeros_like(noise))


def widen(mask: Tensor, margin: int) -> Tensor:
    """Extend a mask by `margin` samples on either side of where it is set: (t,) to (t,)."""
    if margin == 0 or not bool(mask.any()):
        return mask
    return torch.nn.functional.max_pool1d(mask[None].float(), 2 * margin + 1, 1, margin)[0] > 0
