"""Rows to be clustered, as a matrix in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DenseRows:
    """Rows of a matrix in memory.

    Parameters
    ----------
    features : Tensor, shape (n, d), float32, noise s.d.
        One row per spike.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self.n, self.d = features.shape
        self.device = features.device

    def chunk(self, start: int, stop: int) -> Tensor:
        """Rows ``start … stop−1``."""
        return self._features[start:stop].float()

    def take(self, index: Tensor) -> Tensor:
        """Rows at `index`."""
        return self._features[index].float()

    def shared_columns(self, groups: Sequence[Tensor]) -> Tensor:
        """All columns: each row has every feature."""
        return torch.arange(self.d, device=self.device)
