"""Samples in which no spike can be found: by hand, and what neurons, stimulators and muscles make of traces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ks4stream.geometry import artifact_windows
from ks4stream.kernels.artifacts import (
    LOUD_SAMPLES,
    STEP,
    Window,
    artifacts,
    fill,
    loud,
    noise_level,
    pops,
    repeated,
    sampled,
    widen,
)
from ks4stream.kernels.preprocessing import highpass, highpass_response
from ks4stream.simulate import linear_probe

RATE = 30_000.0
N, PITCH_UM = 32, 25.0
PROBE = linear_probe(N, pitch_um=PITCH_UM)
NOISE = torch.linspace(5, 20, N)  # its s.d. by channel
WINDOWS = [Window(*map(torch.from_numpy, window)) for window in artifact_windows(PROBE, np.zeros(0, np.int64))]


def indices(mask: Tensor) -> list[int]:
    return mask.nonzero().ravel().tolist()


def test_a_burst_of_large_spikes_is_not_loud() -> None:
    """Six half periods of 30 samples, of 400 s.d. on all channels, in a stretch of 1024."""
    traces = noise(4 * LOUD_SAMPLES)
    wave = torch.sin(torch.arange(30) * math.pi / 30)
    for start in range(1100, 1820, 120):
        traces[:, start : start + 30] += 400 * NOISE[:, None] * wave
    assert not loud(sampled(traces, NOISE), WINDOWS, ~everything(traces)).any()


# -- pops ------------------------------------------------------------------------------------------------------

BESIDE = torch.tensor([[1, 1], *([c - 1, c + 1] for c in range(1, N - 1)), [N - 2, N - 2]])


def popped(traces: Tensor, noise: Tensor = NOISE, beside: Tensor = BESIDE) -> list[tuple[int, list[int]]]:
    found = pops(traces, sampled(traces, noise), noise, beside, sampling_rate_hz=RATE)
    return [(channel, indices(mask)) for channel, mask in found]


def test_a_pop_is_on_one_channel_until_it_is_in_the_noise() -> None:
    size = torch.zeros(N)
    size[10] = 300.0
    ((channel, samples),) = popped(event(size))
    assert channel == 10
    # Half a period of 30 samples exceeds 6 of 300 s.d. in all but its first; 15 samples are added on either side.
    assert samples == list(range(2001 - 15, 2030 + 15))


def test_what_reaches_the_channels_beside_it_is_no_pop() -> None:
    size = torch.zeros(N)
    size[10], size[11] = 300.0, 40.0
    assert popped(event(size)) == []


def test_a_pop_is_large() -> None:
    size = torch.zeros(N)
    size[10] = 45.0
    assert popped(event(size)) == []


def test_a_loud_channel_beside_it_does_not_make_a_spike_a_pop() -> None:
    """The channels beside it record a fifth of a spike, which is little relative to their noise."""
    noise_sd = torch.where((torch.arange(N) == 9) | (torch.arange(N) == 11), 300.0, 10.0)
    traces = torch.randn(N, 6000, generator=torch.Generator().manual_seed(2)) * noise_sd[:, None]
    wave = torch.sin(torch.arange(30) * math.pi / 30)
    traces[9:12, 2000:2030] += torch.tensor([[200.0], [1000.0], [200.0]]) * wave
    assert popped(traces, noise_sd) == []


def test_channels_without_others_beside_them_that_record_are_not_tested() -> None:
    size = torch.zeros(N)
    size[10] = 300.0
    assert popped(event(size), beside=torch.full_like(BESIDE, -1)) == []
    disconnected = torch.where(torch.arange(N) == 11, 0.0, NOISE)
    assert popped(event(size), disconnected) == []


# -- dead time -------------------------------------------------------------------------------------------------


def counting(n_channels: int = 3, n_samples: int = 30) -> Tensor:
    """Traces that change at each sample."""
    return torch.arange(n_samples).float().expand(n_channels, n_samples).clone()


@pytest.mark.parametrize(("start", "stop", "found"), [(10, 15, True), (10, 14, False), (0, 5, True), (25, 30, True)])
def test_dead_time_is_at_least_so_many_equal_samples(start: int, stop: int, found: bool) -> None:
    traces = counting()
    traces[:, start:stop] = -1
    assert indices(repeated(traces, torch.arange(3), 5)) == list(range(start, stop)) * found


def test_dead_time_is_that_of_all_channels_with_a_signal() -> None:
    traces = counting()
    traces[0, 5:15] = -1
    traces[1, 10:20] = -1
    traces[2] = 7  # never has a signal
    assert indices(repeated(traces, torch.tensor([0, 1]), 5)) == list(range(10, 15))
    traces[1] = counting(1)
    assert not repeated(traces, torch.tensor([0, 1]), 5).any()


def test_fewer_samples_than_dead_time_takes() -> None:
    assert not repeated(torch.zeros(2, 4), torch.arange(2), 5).any()


# -- filling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masked", "filled"),
    [
        ([2, 3], [0.0, 10, 15, 20, 25, 90]),
        ([0, 1], [70.0, 70, 70, 80, 25, 90]),
        ([4, 5], [0.0, 10, 70, 80, 80, 80]),
        ([1, 4], [0.0, 35, 70, 80, 85, 90]),
        ([], [0.0, 10, 70, 80, 25, 90]),
        (range(6), [0.0] * 6),
    ],
    ids=["inside", "at the start", "at the end", "twice", "nowhere", "everywhere"],
)
def test_masked_samples_are_on_a_straight_line(masked: list[int], filled: list[float]) -> None:
    traces = torch.tensor([[0.0, 10, 70, 80, 25, 90], [0.0, -10, -70, -80, -25, -90]])
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(masked)] = True
    assert fill(traces, mask) is traces
    torch.testing.assert_close(traces, torch.tensor([filled, [-value for value in filled]]))


# -- noise -----------------------------------------------------------------------------------------------------


def noise(n_samples: int = 40_000, seed: int = 0) -> Tensor:
    return torch.randn(N, n_samples, generator=torch.Generator().manual_seed(seed)) * NOISE[:, None]


def everything(traces: Tensor) -> Tensor:
    return torch.ones(traces.shape[1], dtype=torch.bool)


def test_the_noise_is_that_of_most_samples() -> None:
    """A tenth of them is ten times as loud: a median of 55.6 % of the quiet values, 1.13 times as large."""
    traces = noise()
    traces[:, :4000] *= 10
    level = noise_level(traces, traces, everything(traces))
    torch.testing.assert_close(level, 1.13 * NOISE, rtol=0.08, atol=0)  # 4 standard errors of 1.2 / √5000
    kept = everything(traces)
    kept[:4000] = False
    torch.testing.assert_close(noise_level(traces, traces, kept), NOISE, rtol=0.08, atol=0)


def test_a_channel_that_does_not_change_has_no_noise() -> None:
    """Though the reference of the others is subtracted from it."""
    traces = noise(8000)
    raw = traces.clone()
    raw[3] = 17
    level = noise_level(traces, raw, everything(traces))
    assert level[3] == 0 and (level[:3] > 0).all() and (level[4:] > 0).all()


def test_without_samples_there_is_no_noise() -> None:
    traces = noise(100)
    assert not noise_level(traces, traces, ~everything(traces)).any()


def test_every_eighth_sample_is_relative_to_the_noise() -> None:
    traces = torch.tensor([[-1.0], [2.0], [3.0]]) * torch.arange(20)
    size = sampled(traces, torch.tensor([2.0, 0.5, 0.0]))
    torch.testing.assert_close(size, torch.tensor([[0.0, 4, 8], [0, 32, 64], [0, 0, 0]]))
    assert STEP == 8 and traces[0, 1] == -1, "the traces are as they were"


# -- artifacts -------------------------------------------------------------------------------------------------


def event(size: Tensor, start: int = 2000, n_samples: int = 30) -> Tensor:
    """Noise, and half a period of a sine of so many times the noise on each channel."""
    traces = noise(6000)
    wave = torch.sin(torch.arange(n_samples) * math.pi / n_samples)
    traces[:, start : start + n_samples] += (size * NOISE)[:, None] * wave
    return traces


def found(
    traces: Tensor,
    noise: Tensor = NOISE,
    windows: Sequence[Window] = WINDOWS,
    *,
    references: Sequence[tuple[Tensor, Tensor]] = (),
    threshold: float = math.inf,
) -> Tensor:
    size = sampled(traces, noise)
    return artifacts(traces, size, noise, windows, references=references, threshold=threshold, sampling_rate_hz=RATE)


def falling(largest: float, within_um: float, channel: int = 9) -> Tensor:
    """Of a source, by channel: largest / (1 + (distance / within)²)."""
    distance_um = PITCH_UM * (torch.arange(N) - channel).abs()
    return largest / (1 + (distance_um / within_um) ** 2)


def test_noise_is_not_an_artifact() -> None:
    assert not found(noise()).any()


def test_a_large_neuron_that_reaches_most_channels_falls_off() -> None:
    """200 times the noise, and more than 6 times it on 18 channels; on the quarter farthest away, 6 % of it."""
    size = falling(200.0, 45.0)
    assert int((size[:16] > 6).sum()) > 8, "most channels of the lower window"
    assert not found(event(size)).any()


@pytest.mark.parametrize(
    "size", [torch.full((N,), 40.0), torch.linspace(20, 100, N), falling(200, 300)], ids=["flat", "graded", "far"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_does_not_fall_off_is_an_artifact(size: Tensor, sign: int) -> None:
    where = found(event(sign * size))
    assert where[2008:2024].all()
    assert set(indices(where)) <= set(range(2000, 2030))


def test_an_event_on_half_of_the_channels_is_an_artifact() -> None:
    size = torch.where(torch.arange(N) < N // 2, 40.0, 0.0)
    assert found(event(size))[2008:2024].all()
    third = torch.where(torch.arange(N) < N // 4, 40.0, 0.0)
    assert not found(event(third)).any(), "on half of a window's channels, which is not more than half"


def test_what_was_subtracted_counts_as_reach() -> None:
    """The median of the channels leaves much of a large spike on all of them; before, it fell off."""
    size = falling(200.0, 45.0)
    traces = event(size)
    subtracted = torch.zeros(1, 6000)
    subtracted[0, 2000:2030] = 50 * NOISE.mean() * torch.sin(torch.arange(30) * math.pi / 30)
    half = torch.arange(N // 2)
    shared, by_half = [(torch.arange(N), subtracted[0])], [(half, subtracted[0]), (half + N // 2, subtracted[0])]
    for references, is_artifact in (([], True), (shared, False), (by_half, False)):
        mask = found(traces - subtracted, windows=WINDOWS[:1], references=references)
        assert bool(mask.any()) == is_artifact


def test_channels_without_noise_are_not_reached() -> None:
    """Of the lower window 11 of 16 are, and without the one that has no noise 10, which is less than two thirds."""
    traces = event(torch.where(torch.arange(N) < 11, 40.0, 0.0))
    assert found(traces).any()
    silent = NOISE.clone()
    silent[0] = 0
    assert not found(traces, silent).any()


def test_a_neuron_elsewhere_reaches_all_channels_of_a_window_alike() -> None:
    """At its largest contact it is 300 times the noise; on the farther half of the probe 10 to 40 times."""
    probe = linear_probe(N, pitch_um=15.0)
    *_, upper = (Window(*map(torch.from_numpy, of)) for of in artifact_windows(probe, np.zeros(0, np.int64)))
    size = 300 / (1 + (15.0 * torch.arange(N) / 90) ** 2)
    of_window = size[upper.channels]
    assert of_window.min() > 6 and of_window[-4:].mean() > upper.least.max() * of_window.max(), "it hardly falls off"
    traces = event(size)
    alone = traces.clone()
    alone[: N // 2] = 0
    assert found(alone, windows=[upper]).any()
    assert not found(traces, windows=[upper]).any()


def test_no_neuron_reaches_250_um() -> None:
    """It falls to a tenth within 500 µm, as the pulse of an electrode nearby may."""
    size = 400 / (1 + (PITCH_UM * torch.arange(N) / 150) ** 2)
    assert found(event(size)).any()
    near = [window._replace(least=torch.full_like(window.least, 0.25)) for window in WINDOWS]
    assert not found(event(size), windows=near).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_channel_that_reaches_the_threshold_is_part_of_an_artifact(sign: int) -> None:
    traces = torch.zeros(3, 20)
    traces[1, 8], traces[2, 15] = sign * 50.0, sign * 49.9
    assert indices(found(traces, torch.ones(3), [], threshold=50)) == [8]


def test_an_artifact_does_not_include_what_the_filter_made_of_it() -> None:
    """A pulse of 0.5 ms; the filter rings for several ms, at up to 15 % of it, far beyond the noise."""
    raw = torch.zeros(N, 6000)
    raw[:, 3000:3015] = 1000 * NOISE[:, None]
    traces = highpass(raw, torch.from_numpy(highpass_response(6000, sampling_rate_hz=RATE, cutoff_hz=300)))
    beyond = (traces.abs() > 6 * NOISE[:, None]).all(dim=0)
    assert beyond[2900:3100].float().mean() > 0.7
    where = indices(found(traces + noise(6000)))
    assert set(range(3000, 3015)) <= set(where)
    assert len(where) < 60 and min(where) >= 2975 and max(where) < 3040  # 1 ms


# -- loud noise ------------------------------------------------------------------------------------------------


def test_loud_stretches_are_found_with_those_beside_them() -> None:
    traces, n = noise(10 * LOUD_SAMPLES), LOUD_SAMPLES
    traces[:, 4 * n : 5 * n] *= 4
    mask = loud(sampled(traces, NOISE), WINDOWS, ~everything(traces))
    assert indices(mask) == list(range(3 * n, 6 * n))
    traces[:, 4 * n : 5 * n] /= 2
    assert not loud(sampled(traces, NOISE), WINDOWS, ~everything(traces)).any(), "twice as loud is not loud"


def test_noise_on_half_of_the_channels_is_loud() -> None:
    traces, n = noise(10 * LOUD_SAMPLES), LOUD_SAMPLES
    traces[16:, 4 * n : 5 * n] *= 4
    assert loud(sampled(traces, NOISE), WINDOWS, ~everything(traces)).any()
    few = noise(10 * LOUD_SAMPLES)
    few[24:, 4 * n : 5 * n] *= 4
    assert not loud(sampled(few, NOISE), WINDOWS, ~everything(few)).any()


def test_samples_that_are_blank_do_not_make_a_stretch_quiet() -> None:
    traces, n = noise(10 * LOUD_SAMPLES), LOUD_SAMPLES
    traces[:, 4 * n : 5 * n] *= 4
    blank = ~everything(traces)
    blank[4 * n : 4 * n + 3 * n // 4] = True
    traces[:, blank] = 0
    assert loud(sampled(traces, NOISE), WINDOWS, blank)[4 * n : 5 * n].all()
    blank[4 * n : 5 * n] = True
    traces[:, blank] = 0
    assert not loud(sampled(traces, NOISE), WINDOWS, blank).any(), "nothing of it is left"


def test_samples_after_the_last_whole_stretch_belong_to_it() -> None:
    traces, n = noise(4 * LOUD_SAMPLES + 100), LOUD_SAMPLES
    traces[:, 3 * n :] *= 4
    assert indices(loud(sampled(traces, NOISE), WINDOWS, ~everything(traces))) == list(range(2 * n, 4 * n + 100))


def test_without_windows_nothing_is_loud() -> None:
    traces = 100 * noise(5000)
    assert not loud(sampled(traces, NOISE), [], ~everything(traces)).any()


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "margin", "wide"),
    [([0], 2, [0, 1, 2]), ([9], 3, [6, 7, 8, 9]), ([2, 4], 1, [1, 2, 3, 4, 5]), ([5], 0, [5]), ([], 3, [])],
)
def test_masks_widen_up_to_the_ends(where: list[int], margin: int, wide: list[int]) -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[where] = True
    widened = widen(mask, margin)
    assert widened.dtype == torch.bool
    assert indices(widened) == wide
