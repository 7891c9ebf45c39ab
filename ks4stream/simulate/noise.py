"""Everything but spikes: coloured noise, the slow potential, artifacts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from ks4stream.probe import Probe
from ks4stream.simulate.streams import EPOCH_SAMPLES, FloatArray, generator

_FFT_SAMPLES = 32_768
# An FFT is longer than an epoch by the length of the noise filter, so that one FFT makes one epoch.
_FILTER_SAMPLES = _FFT_SAMPLES - EPOCH_SAMPLES


@dataclass(frozen=True, eq=False)
class Noise:
    """Gaussian noise: shared between neighbours, coloured in time, plus each contact's own.

    White noise of each spatial mode passes through its own filter, and the modes are mixed to channels, which
    gives exactly the cross-spectra S_shared(f)·K + S_own(f)·I with one draw per channel and sample.
    """

    response: NDArray[np.float32]  # (mode, frequency)
    mixing: NDArray[np.float32]  # (channel, mode)
    seed: int

    def epoch(self, index: int) -> NDArray[np.float32]:
        """Return the noise of one epoch, (channel, EPOCH_SAMPLES), in µV."""
        # The filter reaches back into the previous epoch. An epoch draws its tail first, so that the next
        # epoch can draw that tail without the rest.
        tail_before, _ = self._white(index - 1, tail_only=True)
        tail, head = self._white(index)
        white = np.concatenate([tail_before, head, tail], axis=1)
        coloured = fft.irfft(fft.rfft(white, axis=1) * self.response, n=_FFT_SAMPLES, axis=1)
        first = _FILTER_SAMPLES // 2
        traces_uv: NDArray[np.float32] = self.mixing @ coloured[:, first : first + EPOCH_SAMPLES]
        return traces_uv

    def _white(self, index: int, *, tail_only: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        # Keys must not be negative: the epoch before the first is number 0.
        rng = generator(self.seed, "noise", index + 1)
        n_modes = len(self.response)
        tail = rng.standard_normal((n_modes, _FILTER_SAMPLES), dtype=np.float32)
        n_head = 0 if tail_only else EPOCH_SAMPLES - _FILTER_SAMPLES
        return tail, rng.standard_normal((n_modes, n_head), dtype=np.float32)


def make_noise(probe: Probe, *, noise_uv: float, sampling_rate_hz: float, seed: int) -> Noise:
    """Return noise of `noise_uv` rms between 300 and 6000 Hz, 60 % of its power shared over distance."""
    frequency_hz = fft.rfftfreq(_FFT_SAMPLES, 1 / sampling_rate_hz)
    shared_power = (1 + (300 / np.maximum(frequency_hz, 5.0)) ** 1.5) / (1 + (frequency_hz / 5000) ** 4)
    own_power = 1 / (1 + (frequency_hz / 9000) ** 8)
    in_band = (frequency_hz > 300) & (frequency_hz < 6000)

    position_um = np.stack([probe.x_um, probe.y_um], axis=1)
    distance_um = np.hypot(*np.moveaxis(position_um[:, None] - position_um[None, :], -1, 0))
    kernel = 0.75 * np.exp(-distance_um / 80.0) + 0.25  # neighbours, and a common mode
    variance, modes = np.linalg.eigh(kernel)
    # A white input of variance 1 has density 1 in every bin, so a bin contributes 2 / n of the power.
    per_bin = 2 * noise_uv**2 / _FFT_SAMPLES
    shared = 0.6 * shared_power / (shared_power[in_band].sum() * per_bin / noise_uv**2)
    own = 0.4 * own_power / (own_power[in_band].sum() * per_bin / noise_uv**2)
    amplitude = noise_uv * np.sqrt(shared * np.maximum(variance, 0)[:, None] + own)
    gain = generator(seed, "channels").uniform(0.9, 1.1, probe.n_channels)
    return Noise(_shortened(amplitude), (gain[:, None] * modes).astype(np.float32), seed)


def _shortened(amplitude: FloatArray) -> NDArray[np.float32]:
    """Return the response (mode, frequency) of the zero-phase filters, truncated to _FILTER_SAMPLES."""
    impulse = fft.irfft(amplitude, n=_FFT_SAMPLES, axis=1)
    lag = np.minimum(np.arange(_FFT_SAMPLES), _FFT_SAMPLES - np.arange(_FFT_SAMPLES))
    window = np.cos(0.5 * np.pi * np.clip(lag / (_FILTER_SAMPLES / 2 - 1), 0, 1)) ** 2
    response: NDArray[np.float32] = fft.rfft(impulse * window, axis=1).real.astype(np.float32)
    return response


@dataclass(frozen=True, eq=False)
class SlowPotential:
    """Offsets, and a local field potential: a sum of sines whose amplitude varies along the probe."""

    frequency_hz: FloatArray  # (sine,)
    phase_rad: FloatArray  # (sine,)
    size_uv: NDArray[np.float32]  # (sine, channel)
    offset_uv: NDArray[np.float32]  # (channel,)

    def at(self, time_s: FloatArray) -> NDArray[np.float32]:
        """Return the potential (time, channel) in µV."""
        sines = np.sin(2 * np.pi * time_s[:, None] * self.frequency_hz + self.phase_rad)
        return sines.astype(np.float32) @ self.size_uv + self.offset_uv


def make_slow_potential(probe: Probe, *, lfp_uv: float, seed: int) -> SlowPotential:
    """Draw offsets, and 16 sines whose sum has a standard deviation of `lfp_uv`."""
    rng = generator(seed, "channels", 1)
    frequency_hz = np.exp(rng.uniform(np.log(0.3), np.log(20), 16))
    size = 1 / (1 + frequency_hz / 2)
    gradient = rng.uniform(-0.5, 0.5, len(size))[:, None] * (probe.y_um - probe.y_um.mean()) / 500
    size_uv = lfp_uv * np.sqrt(2 / np.sum(size**2)) * size[:, None] * (1 + np.clip(gradient, -0.9, 0.9))
    return SlowPotential(
        frequency_hz,
        rng.uniform(0, 2 * np.pi, len(size)),
        size_uv.astype(np.float32),
        rng.normal(0, 40, probe.n_channels).astype(np.float32),
    )


@dataclass(frozen=True, eq=False)
class Artifacts:
    """Brief, large, ringing events on all channels, similar but not identical on each."""

    spans: NDArray[np.int64]  # (artifact, 2): first sample, sample after the last
    peak_uv: FloatArray  # (artifact,)
    cycles: FloatArray  # (artifact,)
    channel_gain: FloatArray  # (artifact, channel)

    def add_to(self, traces_uv: NDArray[np.float32], start: int) -> None:
        """Add the artifacts that overlap traces (time, channel) beginning at sample `start`."""
        stop = start + len(traces_uv)
        for i in np.flatnonzero((self.spans[:, 0] < stop) & (self.spans[:, 1] > start)):
            first, last = max(self.spans[i, 0], start), min(self.spans[i, 1], stop)
            progress = (np.arange(first, last) - self.spans[i, 0]) / np.diff(self.spans[i])
            course = np.sin(2 * np.pi * self.cycles[i] * progress) * np.exp(-3 * progress)
            traces_uv[first - start : last - start] += np.outer(self.peak_uv[i] * course, self.channel_gain[i])


def draw_artifacts(n: int, *, n_channels: int, n_samples: int, sampling_rate_hz: float, seed: int) -> Artifacts:
    """Draw `n` artifacts, away from both ends of the recording."""
    rng = generator(seed, "artifacts")
    starts = np.sort(rng.integers(n_samples // 50, n_samples - n_samples // 50, n))
    lengths = np.rint(rng.uniform(2.0, 6.0, n) * sampling_rate_hz / 1000).astype(np.int64)
    return Artifacts(
        np.stack([starts, starts + lengths], axis=1).astype(np.int64),
        rng.choice([-1.0, 1.0], n) * rng.uniform(1500, 4000, n),
        rng.uniform(1.0, 3.0, n),
        rng.uniform(0.6, 1.4, (n, n_channels)),
    )
