"""What templates are on channels on which the peaks that they were learned from have no features (section 5.4).

There, each spike of a template with amplitude a is a times the unknown waveform, plus noise and other spikes: least
squares over many spikes finds it. Sums are kept in fixed point, so that they do not depend on the order of the spikes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ks4stream.kernels.matching import TileSpikes

FROM_SCORE = 12.0
"""Score of the spikes that are used, noise s.d. Around spikes of small neurons, the residual holds more of their large
neighbours than of themselves."""
FROM_AMPLITUDE = 0.5  # of these spikes; smaller ones are more likely to be those of other neurons
MIN_SQUARES = 10.0  # sum of squared amplitudes: ten spikes as large as the template
NOISE_FACTOR = 2.0  # multiple of the energy expected from noise that is subtracted from the energy of a channel
FIXED_POINT = 1 << 16


class Sums(NamedTuple):
    """Sums over spikes of each template, in units of 1 / :data:`FIXED_POINT`.

    Attributes
    ----------
    product : Tensor, shape (u, j, q), int64
        Of amplitude times features.
    square : Tensor, shape (u,), int64
        Of squared amplitudes.
    """

    product: Tensor
    square: Tensor


def is_used(spikes: TileSpikes) -> Tensor:
    """Which spikes (n,) are used."""
    return (spikes.score > FROM_SCORE) & (spikes.amplitude > FROM_AMPLITUDE)


def sums_over(spikes: TileSpikes, features: Tensor, n_templates: int) -> Sums:
    """Sum over some spikes, of which `features` (n, j, q) are those on the channels of their templates."""
    amplitude = spikes.amplitude.double()
    product = features.new_zeros(n_templates, *features.shape[1:], dtype=torch.int64)
    square = features.new_zeros(n_templates, dtype=torch.int64)
    product.index_add_(0, spikes.unit, _fixed(amplitude[:, None, None] * features))
    square.index_add_(0, spikes.unit, _fixed(amplitude.square()))
    return Sums(product, square)


def _fixed(values: Tensor) -> Tensor:
    return (values * FIXED_POINT).round().long()


def widened(features: Tensor, sums: Sums, channels: Tensor) -> Tensor:
    """Complete templates on the channels on which they are zero.

    Parameters
    ----------
    features : Tensor, shape (u, c, q), float32, noise s.d.
        Templates.
    sums : Sums
    channels : Tensor, shape (u, j), int64
        Those of the sums, padded with −1.

    Returns
    -------
    Tensor, shape (u, c, q), float32, noise s.d.
    """
    square = sums.square.double()
    found = sums.product.double() / square.clamp_min(1.0)[:, None, None]  # (u, j, q)
    square = square / FIXED_POINT
    noise = NOISE_FACTOR * features.shape[2] / square.clamp_min(MIN_SQUARES)[:, None]
    found *= (1.0 - noise / found.square().sum(dim=2).clamp_min(1e-30)).clamp_min(0.0)[:, :, None]
    at = channels.clamp_min(0)[:, :, None].expand(-1, -1, features.shape[2])
    empty = (features.gather(1, at) == 0).all(dim=2)
    filled = empty & (channels >= 0) & (square >= MIN_SQUARES)[:, None]
    return features.scatter_add(1, at, torch.where(filled[:, :, None], found, 0.0).to(features.dtype))
