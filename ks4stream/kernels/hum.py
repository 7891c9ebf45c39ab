"""Mains hum: how much of a recording it is, and its removal (section 1.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

HIGHEST_HZ = 2500.0  # of the harmonics
RANGE_HZ, STEP_CYCLES = 0.05, 0.1  # around the nominal frequency; in steps that shift the highest harmonic by so much
MAX_HARMONICS = 60
AWAY = 9.0  # times the median distance of the channels' mean from its median, about 6 s.d.; samples beyond do not enter
RIDGE = 1e-3  # of the fit, per sample: where samples of few phases are kept, it is not determined
MIN_PERIODS = 5  # of the mains frequency that a fit takes, at least
FITTED_SAMPLES = 1 << 13  # at a time
WAVE_BYTES = 80  # per sample: times, the mean of the channels, and one harmonic as it is computed
N_PARTS = 64  # of a tile, within which a harmonic hardly shifts
SEGMENT_HZ = 2.0  # resolution of the spectrum in which hum is recognised; 50 and 60 Hz are multiples


def harmonics_of(line_hz: float, sampling_rate_hz: float) -> int:
    """How many harmonics are subtracted; none if `line_hz` is 0."""
    if line_hz == 0:
        return 0
    return min(int(min(HIGHEST_HZ, 0.4 * sampling_rate_hz) // line_hz), MAX_HARMONICS)


def bytes_per_sample(line_hz: float, sampling_rate_hz: float) -> int:
    """Memory that :func:`remove_hum` takes besides the traces and its result, per sample of a tile."""
    n_harmonics = harmonics_of(line_hz, sampling_rate_hz)
    return 8 * n_harmonics + WAVE_BYTES if n_harmonics else 0


def remove_hum(traces: Tensor, kept: Tensor, line_hz: float, sampling_rate_hz: float) -> Tensor:
    """Subtract from each channel the best fit of a sum of harmonics of the mains frequency.

    The frequency of mains differs by some hundredths of a hertz from its nominal value; the one that explains most of
    the mean of all channels is taken.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
    kept : Tensor of bool, shape (t,)
        Samples that were recorded. There is no hum in others, which do not enter the fit.
    line_hz : float
        Nominal frequency, in Hz.
    sampling_rate_hz : float

    Returns
    -------
    Tensor, shape (c, t)
        The traces themselves if fewer samples than those of :data:`MIN_PERIODS` were kept.
    """
    n_harmonics = harmonics_of(line_hz, sampling_rate_hz)
    if n_harmonics == 0 or int(kept.sum()) * line_hz < MIN_PERIODS * sampling_rate_hz:
        return traces
    time_s = torch.arange(traces.shape[1], device=traces.device, dtype=torch.float64) / sampling_rate_hz
    mean = traces.mean(dim=0)
    away = (mean - mean[kept].median()).abs()
    kept = kept & (away <= AWAY * away[kept].median())  # without artifacts, which the fit would spread
    mean = torch.where(kept, mean - mean[kept].mean(), 0.0)
    exact_hz = _exact_frequency(mean, line_hz, n_harmonics, time_s)
    basis = torch.empty(2 * n_harmonics + 1, len(time_s), device=traces.device)
    basis[0] = 1.0  # so that offsets do not matter
    for number, wave in enumerate(_harmonics(exact_hz, n_harmonics, time_s), 1):
        basis[number], basis[n_harmonics + number] = wave.real, wave.imag
    gram = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=traces.device)
    product = torch.zeros(len(basis), len(traces), dtype=torch.float64, device=traces.device)
    for some, some_traces, some_kept in zip(
        *(values.split(FITTED_SAMPLES, -1) for values in (basis, traces, kept)), strict=True
    ):
        fitted = some * some_kept
        gram += fitted @ some.T
        product += fitted @ some_traces.T
    gram.diagonal()[1:] += RIDGE * int(kept.sum())
    size = torch.linalg.solve(gram, product).to(traces.dtype)  # (2k + 1, c)
    left = torch.empty_like(traces)
    for some_left, some_traces, some in zip(
        *(values.split(FITTED_SAMPLES, -1) for values in (left, traces, basis[1:])), strict=True
    ):
        torch.addmm(some_traces, size[1:].T, some, alpha=-1, out=some_left)
    return left


def _harmonics(line_hz: float, n_harmonics: int, time_s: Tensor) -> Iterator[Tensor]:
    """Yield exp(2πi·k·f·t) (t,), complex128, for k = 1 … n; each takes the place of the last."""
    angle = 2 * math.pi * torch.remainder(line_hz * time_s, 1.0)
    first = torch.polar(torch.ones_like(angle), angle)
    wave = first.clone()
    for _ in range(n_harmonics):
        yield wave
        wave *= first


def _exact_frequency(mean: Tensor, line_hz: float, n_harmonics: int, time_s: Tensor) -> float:
    """Frequency near the nominal one at which the harmonics have most energy in the mean of the channels (t,).

    The mean has no offset.
    """
    length = len(mean) // N_PARTS
    if length == 0:
        return line_hz
    time_s, mean = time_s[: length * N_PARTS], mean[: length * N_PARTS]
    step_hz = STEP_CYCLES / (n_harmonics * float(time_s[-1]))
    n_steps = math.ceil(RANGE_HZ / step_hz)
    change_hz = torch.arange(-n_steps, n_steps + 1, device=mean.device, dtype=torch.float64) * step_hz
    angle = 2 * math.pi * change_hz[:, None] * time_s.view(N_PARTS, length).mean(1)  # (f, part)
    energy = torch.zeros_like(change_hz)
    for order, wave in enumerate(_harmonics(line_hz, n_harmonics, time_s), 1):
        parts = (wave * mean).view(N_PARTS, length).sum(1)
        energy += (torch.polar(torch.ones_like(angle), order * angle) @ parts).abs().square()
    return line_hz + float(change_hz[int(energy.argmax())])


def hum_shares(traces: Tensor, lines_hz: Sequence[float], *, lowest_hz: float, sampling_rate_hz: float) -> list[float]:
    """Largest share of a channel's variance that is at harmonics of a frequency, beyond that of noise.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        Filtered.
    lines_hz : sequence of float
        Frequencies, which are multiples of :data:`SEGMENT_HZ`.
    lowest_hz : float
        Cutoff of the filter, in Hz.
    sampling_rate_hz : float

    Returns
    -------
    list of float
        For each frequency; 0 if the traces are shorter than one segment, or there are no harmonics above the cutoff.
    """
    length = round(sampling_rate_hz / SEGMENT_HZ)
    if traces.shape[1] < length:
        return [0.0] * len(lines_hz)
    segments = traces.split(length, 1)[: traces.shape[1] // length]
    power = sum(torch.view_as_real(torch.fft.rfft(segment)).square_().sum(-1) for segment in segments)  # (c, f)
    assert isinstance(power, Tensor)
    first, last = (int(hz // SEGMENT_HZ) for hz in (lowest_hz, min(HIGHEST_HZ, 0.4 * sampling_rate_hz)))
    bins = torch.arange(first + 1, max(last, first + 1), device=traces.device)
    within, total = power[:, first + 1 : last], power.sum(1).clamp_min(1e-30)
    shares = []
    for line_hz in lines_hz:
        is_harmonic = bins % round(line_hz / SEGMENT_HZ) == 0
        if not bool(is_harmonic.any()) or bool(is_harmonic.all()):
            shares.append(0.0)
            continue
        usual = within[:, ~is_harmonic].median(dim=1).values
        excess = (within[:, is_harmonic] - usual[:, None]).clamp_min(0).sum(1) - usual * int(is_harmonic.sum())
        shares.append(max(float((excess / total).max()), 0.0))
    return shares
