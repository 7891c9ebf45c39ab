"""From raw to whitened traces (section 1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from ks4stream.kernels.memory import ChunkSize, in_chunks

BUTTERWORTH_ORDER = 3
FILTER_FLOOR = 1e-8  # the impulse response of the squared filter is cut off where it stays below this
WHITENING_FLOOR = 1e-6  # added to the eigenvalues; relative to the mean variance, so independent of the file's unit
INTERPOLATION_NOISE = 0.01  # noise variance of the Gaussian interpolation, section 4
FILTERED_CHANNELS = ChunkSize(cpu=16, gpu=64)  # at a time
PRODUCT_ROWS, PRODUCT_SAMPLES = 32, 1 << 13  # of a product with a matrix that is local, at a time, on a CPU
RANKED_SAMPLES = ChunkSize(cpu=1 << 13, gpu=1 << 15)
NEGLIGIBLE = 1e-7  # entries of the drift matrix below this share of the largest are 0; that is float32's precision
MIN_NOISE = 0.5  # assumed in sums of moved traces; beyond the probe's ends there is little noise, but no signal either


def fft_length(n_samples: int) -> int:
    """The next even length with a fast real FFT."""
    n_fft = int(next_fast_len(n_samples + n_samples % 2, real=True))
    return n_fft if n_fft % 2 == 0 else fft_length(n_fft + 1)


def highpass_response(n_samples: int, *, sampling_rate_hz: float, cutoff_hz: float) -> NDArray[np.float32]:
    """Response of the zero-phase high-pass filter at the frequencies of a real FFT of at least `n_samples`.

    Third-order Butterworth, forward and backward: the squared magnitude.

    Returns
    -------
    ndarray of float32, shape (n_fft // 2 + 1,)
        ``n_fft`` is that of :func:`fft_length`. All ones if `cutoff_hz` is 0.
    """
    n_fft = fft_length(n_samples)
    if cutoff_hz == 0:
        return np.ones(n_fft // 2 + 1, np.float32)
    return _squared_response(n_fft, sampling_rate_hz, cutoff_hz).astype(np.float32)


def _squared_response(n_fft: int, sampling_rate_hz: float, cutoff_hz: float) -> NDArray[np.float64]:
    """In closed form, as importing ``scipy.signal`` takes half a second in each process."""
    with np.errstate(divide="ignore"):  # at frequency zero, where the response is zero
        ratio = math.tan(math.pi * cutoff_hz / sampling_rate_hz) / np.tan(np.pi * np.fft.rfftfreq(n_fft))
    return np.asarray(1 / (1 + ratio ** (2 * BUTTERWORTH_ORDER)))


def highpass_reach(*, sampling_rate_hz: float, cutoff_hz: float) -> int:
    """Lag in samples beyond which the filter's impulse response is below ``FILTER_FLOOR`` (443 at 30 kHz, 300 Hz)."""
    if cutoff_hz == 0:
        return 0
    n_fft = 1 << math.ceil(math.log2(sampling_rate_hz / cutoff_hz * 32))
    impulse = np.abs(np.fft.irfft(_squared_response(n_fft, sampling_rate_hz, cutoff_hz), n=n_fft)[: n_fft // 2])
    return int(np.flatnonzero(impulse >= FILTER_FLOOR)[-1]) + 1


def highpass(traces: Tensor, response: Tensor) -> Tensor:
    """Filter every channel by FFT.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
    response : Tensor, shape (n_fft // 2 + 1,)
        From :func:`highpass_response`; ``n_fft`` at least the number of samples.

    Returns
    -------
    Tensor, shape (c, t)
        Valid farther than :func:`highpass_reach` from both ends.
    """
    n_fft, filtered = 2 * (len(response) - 1), torch.empty_like(traces)

    def some(traces: Tensor, filtered: Tensor) -> None:
        spectrum = torch.fft.rfft(traces, n=n_fft).mul_(response)
        filtered.copy_(torch.fft.irfft(spectrum, n=n_fft)[:, : traces.shape[1]])

    in_chunks(some, traces, filtered, size=FILTERED_CHANNELS.on(traces.device))
    return filtered


def median_over_channels(traces: Tensor) -> Tensor:
    """Median over channels at each sample; for an even number of channels, the mean of the two middle values.

    Parameters
    ----------
    traces : Tensor, shape (c, t)

    Returns
    -------
    Tensor, shape (t,)
    """
    n_channels, n_samples = traces.shape
    low, high = (n_channels - 1) // 2, n_channels // 2
    medians = torch.empty(n_samples, dtype=traces.dtype, device=traces.device)

    def some(rows: Tensor, medians: Tensor) -> None:
        if rows.device.type == "cpu":  # NumPy sorts short rows with vector instructions, ten times as fast as torch
            rows = rows.clone(memory_format=torch.contiguous_format)
            rows.numpy().sort(axis=1)
        else:
            rows = rows.sort(dim=1).values
        torch.add(rows[:, low], rows[:, high], out=medians).mul_(0.5)

    in_chunks(some, traces.T, medians, size=RANKED_SAMPLES.on(traces.device))
    return medians


def subtract_reference(traces: Tensor, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Subtract the common median reference, in place.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
    groups : list of (used, corrected)
        Indices of the channels the median is computed from, and of those it is subtracted from.

    Returns
    -------
    list of Tensor, shape (t,)
        What was subtracted, for each group.
    """
    medians = [median_over_channels(traces if len(used) == len(traces) else traces[used]) for used, _ in groups]
    for (_, corrected), median in zip(groups, medians, strict=True):
        if len(corrected) == len(traces):
            traces -= median
        else:
            traces[corrected] -= median
    return medians


def covariance(traces: Tensor, n_kept: int | None = None) -> Tensor:
    """Mean outer product over samples, without subtracting the mean.

    Parameters
    ----------
    traces : Tensor, shape (c, t)
        0 where they are blanked.
    n_kept : int, optional
        Number of samples that are not blanked, by default all.

    Returns
    -------
    Tensor of float64, shape (c, c)
    """
    return (traces @ traces.T).double() / (traces.shape[1] if n_kept is None else n_kept)


def local_whitening(covariance: Tensor, neighbours: list[NDArray[np.int64]]) -> Tensor:
    """Whitening matrix; each row decorrelates one channel from its neighbourhood.

    Parameters
    ----------
    covariance : Tensor of float64, shape (c, c)
    neighbours : list of ndarray
        For each channel its nearest channels, itself first; empty for a channel that is left out (its row is 0).

    Returns
    -------
    Tensor of float32, shape (c, c)
        Each row is the channel's own row of the ZCA matrix E (D + ε)^−½ Eᵀ of its neighbourhood, zero elsewhere.
    """
    whitening = torch.zeros_like(covariance)
    floor = WHITENING_FLOOR * float(covariance.diagonal().mean())
    for channel, near in enumerate(neighbours):
        if len(near) == 0:
            continue
        around = torch.as_tensor(near, device=covariance.device)
        values, vectors = torch.linalg.eigh(covariance[around][:, around])
        row = (vectors[0] * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T
        whitening[channel, around] = row
    return whitening.float()


def local_product(matrix: Tensor, traces: Tensor) -> Tensor:
    """``matrix @ traces`` for a matrix that is 0 except between channels near each other, as in whitening and drift.

    On a CPU, some neighbouring rows are multiplied at a time, by the channels from the first to the last that they use:
    a fourth of the time for 384 channels.

    Parameters
    ----------
    matrix : Tensor, shape (c, c)
    traces : Tensor, shape (c, t)

    Returns
    -------
    Tensor, shape (c, t)
    """
    if matrix.device.type != "cpu":
        return matrix @ traces
    product = traces.new_empty(traces.shape)
    for rows, of_rows in zip(matrix.split(PRODUCT_ROWS), product.split(PRODUCT_ROWS), strict=True):
        used = (rows != 0).any(dim=0).nonzero()[:, 0].tolist() or [0]
        band = slice(used[0], used[-1] + 1)
        for some, out in zip(traces[band].split(PRODUCT_SAMPLES, 1), of_rows.split(PRODUCT_SAMPLES, 1), strict=True):
            torch.mm(rows[:, band], some, out=out)
    return product


class Mover:
    """Moves whitened traces along the probe (section 4) with the matrix K(y − s, y) (K(y, y) + 0.01 I)⁻¹.

    The matrix to be inverted is factorised once for all shifts.

    Parameters
    ----------
    positions_um : Tensor of float64, shape (c, 2)
    shank : Tensor of int64, shape (c,)
        Shanks are never mixed.
    sigma_um : float
        Width of the Gaussian kernel K.
    """

    def __init__(self, positions_um: Tensor, shank: Tensor, *, sigma_um: float) -> None:
        self._positions_um, self._sigma_um = positions_um, sigma_um
        self._together = (shank[:, None] == shank[None, :]).double()
        noise = INTERPOLATION_NOISE * torch.eye(len(shank), dtype=torch.float64, device=shank.device)
        self._factors = torch.linalg.lu_factor(self._kernel(positions_um) + noise)

    def _kernel(self, positions_um: Tensor) -> Tensor:
        """K between given positions and the contacts: (c, 2) to (c, c)."""
        apart_um = torch.cdist(positions_um, self._positions_um)
        return torch.exp(apart_um**2 / (-2 * self._sigma_um**2)) * self._together

    @property
    def inverse(self) -> Tensor:
        """(K(y, y) + 0.01 I)⁻¹: (c, c), float64."""
        return torch.linalg.lu_solve(
            *self._factors, torch.eye(len(self._together), dtype=torch.float64).to(self._together)
        )

    def matrix(self, shift_um: Tensor) -> Tensor:
        """The matrix for a shift at each channel, (c,), float64; positive moves to larger depth: (c, c), float32."""
        moved = self._positions_um.clone()
        moved[:, 1] -= shift_um
        matrix = torch.linalg.lu_solve(*self._factors, self._kernel(moved), left=False)
        return matrix.masked_fill_(matrix.abs() <= NEGLIGIBLE * matrix.abs().amax(), 0.0).float()
