"""Mains hum: a sum of harmonics is subtracted and spikes stay, and its share of a recording is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from ks4stream.kernels.hum import MIN_PERIODS, hum_shares, remove_hum

RATE = 30_000.0
N, N_SAMPLES = 4, 63_000  # 2.1 s, as a tile has by default
HARMONICS = range(1, 40)
SIZES = torch.tensor([3000.0, -1000.0, 200.0, 0.0])  # of the hum on each channel


def noise(n_samples: int = N_SAMPLES, seed: int = 0) -> Tensor:
    return torch.randn(N, n_samples, generator=torch.Generator().manual_seed(seed))


def hum(hz: float = 50.013, harmonics: Iterable[int] = HARMONICS, n_samples: int = N_SAMPLES) -> Tensor:
    """Of the s.d. 1: harmonics of the same size, each with another phase."""
    angle = 2 * math.pi * hz * torch.arange(n_samples, dtype=torch.float64) / RATE
    waves = [torch.cos(number * angle + number**2) for number in harmonics]
    return (torch.stack(waves).sum(0) * math.sqrt(2 / len(waves))).float()


def everything(traces: Tensor) -> Tensor:
    return torch.ones(traces.shape[1], dtype=torch.bool)


def sd(traces: Tensor) -> Tensor:
    return traces.square().mean(dim=1).sqrt()


@pytest.mark.parametrize("hz", [49.97, 50.0, 50.013])
def test_harmonics_of_any_size_are_subtracted(hz: float) -> None:
    """But for 5 %: the frequency is found to 0.0005 Hz, which is 0.1 radians per second of the 39th harmonic."""
    traces = SIZES[:, None] * hum(hz)
    left = remove_hum(traces, everything(traces), 50.0, RATE)
    assert (sd(left)[:3] < 0.05 * SIZES[:3].abs()).all()
    assert not left[3].any()


def test_spikes_and_noise_stay_as_they_are() -> None:
    """But for 101 of the 10 500 degrees of freedom below 2.5 kHz, in which the spikes have a variance of 2.7."""
    spikes = torch.zeros(N, N_SAMPLES)
    wave = -20 * torch.exp(-0.5 * (torch.arange(-20, 21) / 4.0) ** 2)
    starts = torch.randint(100, N_SAMPLES - 100, (60,), generator=torch.Generator().manual_seed(1))
    for start in starts.tolist():
        spikes[:, start : start + 41] += wave
    clean = noise() + spikes + 500  # an offset, too
    left = remove_hum(clean + 0.5 * hum(), everything(clean), 50.0, RATE)
    at = (starts[:, None] + torch.arange(41)).ravel()
    assert (left - clean)[:, at].abs().max() < 0.04 * wave.abs().max()
    assert (sd(left - clean) < 0.2).all()


def test_nothing_is_changed_in_place() -> None:
    traces = noise() + hum()
    before = traces.clone()
    assert remove_hum(traces, everything(traces), 50.0, RATE) is not traces
    assert torch.equal(traces, before)


@pytest.mark.parametrize("n_kept", [6_000, 30_000])
def test_samples_without_hum_do_not_enter_the_fit(n_kept: int) -> None:
    """A short last batch, or dead time: if they did, most of the hum would stay."""
    kept = torch.zeros(N_SAMPLES, dtype=torch.bool)
    kept[:n_kept] = True
    kept[1000:1500] = False
    traces = (SIZES[:, None] * hum() + 77) * kept + 123
    left = remove_hum(traces, kept, 50.0, RATE)[:, kept] - 200
    assert (sd(left)[:3] < 0.05 * SIZES[:3].abs()).all()


def test_a_fit_takes_some_periods() -> None:
    traces = noise() + hum()
    for n_samples, changed in ((MIN_PERIODS * 600 - 1, False), (MIN_PERIODS * 600, True)):
        kept = everything(traces)
        kept[n_samples:] = False
        assert torch.equal(remove_hum(traces, kept, 50.0, RATE), traces) != changed
    assert remove_hum(traces, everything(traces), 2600.0, RATE) is traces, "there is no harmonic of it below 2.5 kHz"


def test_other_frequencies_stay() -> None:
    traces = noise() + hum(60.0, (1, 2, 3, 4, 6, 7))  # not 300 Hz, which is one of 50 Hz, too
    left = remove_hum(traces, everything(traces), 50.0, RATE)
    assert (sd(left - traces) < 0.05).all()


# -- how much there is -----------------------------------------------------------------------------------------


def share(traces: Tensor, line_hz: float = 50.0) -> float:
    (found,) = hum_shares(traces, [line_hz], lowest_hz=300.0, sampling_rate_hz=RATE)
    return found


@pytest.mark.parametrize("n_samples", [15_000, 60_000])
def test_noise_has_no_hum(n_samples: int) -> None:
    for seed in range(5):
        assert share(noise(n_samples, seed)) < 0.005 > share(noise(n_samples, seed), 60.0)


@pytest.mark.parametrize("line_hz", [50.0, 60.0])
@pytest.mark.parametrize("sd", [0.1, 0.5, 2.0])
def test_the_share_is_that_of_the_variance_of_the_channel_with_most_hum(line_hz: float, sd: float) -> None:
    """Above the cutoff of the filter, at 350 or 360 Hz to 1 kHz; frequencies of mains are not exact."""
    traces = noise(60_000)
    traces[2] += sd * hum(line_hz + 0.01, range(7 if line_hz == 50 else 6, 17), 60_000)
    assert share(traces, line_hz) == pytest.approx(sd**2 / (1 + sd**2), rel=0.1, abs=0.005)


def test_60_hz_is_not_taken_for_50() -> None:
    """Each fifth harmonic of 60 Hz is one of 50 Hz, too, each sixth the other way round."""
    traces = noise(60_000) + hum(60.0, range(6, 26), 60_000)
    assert share(traces, 50.0) < 0.3 * share(traces, 60.0)
    traces = noise(60_000) + hum(50.0, range(7, 31), 60_000)
    assert share(traces, 60.0) < 0.3 * share(traces, 50.0)


def test_of_traces_shorter_than_half_a_second_nothing_is_known() -> None:
    traces = 100 * hum(n_samples=15_000).expand(N, -1)
    assert share(traces) > 0.5
    assert share(traces[:, :14_999]) == 0


def test_silence_has_no_hum() -> None:
    assert share(torch.zeros(N, 30_000)) == 0
