"""The spikes of a sorting, unit by unit: they are stored in order of time, and here grouped once, on disk if many."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.io.mapped import release_pages, scratch_array
from ks4stream.results import Sorting

CHUNK = 1 << 20  # spikes at a time


class ByUnit:
    """Times, amplitudes and depths of the kept spikes of each unit.

    Parameters
    ----------
    sorting : Sorting

    Attributes
    ----------
    start : ndarray of int64, shape (u + 1,)
        Number of spikes of all units before each.
    """

    def __init__(self, sorting: Sorting) -> None:
        self._sorting = sorting
        counts = np.zeros(sorting.n_units, np.int64)
        for rows in self._chunks():
            counts += np.bincount(sorting.unit[rows][sorting.kept[rows]], minlength=sorting.n_units)
        self.start = np.concatenate([[0], np.cumsum(counts)])
        shape = (int(self.start[-1]),)
        self._sample, self._score, self._depth_um = (scratch_array(shape, kind) for kind in ("int64", "f4", "f4"))
        columns = (self._sample, sorting.sample), (self._score, sorting.score), (self._depth_um, sorting.y_um)
        filled = self.start[:-1].copy()
        for rows in self._chunks():
            kept = np.flatnonzero(sorting.kept[rows])
            order = np.argsort(sorting.unit[rows][kept], kind="stable")
            kept = kept[order]
            unit = sorting.unit[rows][kept]
            of_each = np.bincount(unit, minlength=sorting.n_units)
            row = np.arange(len(kept)) + np.repeat(filled - np.cumsum(of_each) + of_each, of_each)
            for grouped, column in columns:
                grouped[row] = column[rows][kept]
                release_pages(grouped)
            filled += of_each

    def _chunks(self) -> list[slice]:
        return [slice(at, at + CHUNK) for at in range(0, self._sorting.n_spikes, CHUNK)]

    @property
    def count(self) -> NDArray[np.int64]:
        """Number of kept spikes of each unit: (u,)."""
        return np.diff(self.start)

    def sample(self, unit: int) -> NDArray[np.int64]:
        """Times of a unit's spikes, ascending: (n,), samples."""
        return self._of(self._sample, unit)

    def depth_um(self, unit: int) -> NDArray[np.float32]:
        """Positions of a unit's spikes along the probe: (n,)."""
        return self._of(self._depth_um, unit)

    def scaling(self, unit: int) -> NDArray[np.float64]:
        """Amplitudes of a unit's spikes relative to its template: (n,)."""
        return self._of(self._score, unit) / max(float(self.norm[unit]), 1e-9)

    @cached_property
    def norm(self) -> NDArray[np.float64]:
        """Norm of the template of each unit, which is what its spikes score on average: (u,), noise s.d."""
        return np.linalg.norm(self._sorting.unit_features.astype(np.float64), axis=(1, 2))

    def _of(self, column: NDArray[Any], unit: int) -> NDArray[Any]:
        rows = np.array(column[self.start[unit] : self.start[unit + 1]])
        release_pages(column)
        return rows
