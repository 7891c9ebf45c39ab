"""The spikes of a sorting, unit by unit: they are stored in order of time, and here grouped once, on disk if many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.io.mapped import LARGE_MAP_BYTES, release_pages, scratch_array
from ks4stream.results import Sorting

CHUNK = 1 << 20  # spikes at a time


class ByUnit:
    """Spikes without duplicates, one unit after the other, in two passes: one counts, one writes into the unit's rows.

    Parameters
    ----------
    sorting : Sorting
    *names : str
        Columns of its spikes that are wanted; in each unit, they are in order of time.
    folder : path, optional
        Where they lie if they are large; by default in the system's temporary folder.

    Attributes
    ----------
    start : ndarray of int64, shape (u + 1,)
        Number of spikes of all units before each, and of all units.
    position_um : ndarray of float64, shape (u, 2)
        Mean x and y of the spikes of each unit; NaN if it has none.
    """

    def __init__(self, sorting: Sorting, *names: str, folder: Path | None = None) -> None:
        n_units = sorting.n_units
        count, total_um = np.zeros(n_units, np.int64), np.zeros((n_units, 2))
        for rows, kept in kept_spikes(sorting, "unit", "x_um", "y_um"):
            unit = sorting.unit[rows][kept]
            count += np.bincount(unit, minlength=n_units)
            for axis, values in enumerate((sorting.x_um, sorting.y_um)):
                total_um[:, axis] += np.bincount(unit, weights=values[rows][kept], minlength=n_units)
        self.start = np.concatenate([[0], np.cumsum(count)])
        self.position_um = total_um / np.where(count, count, np.nan)[:, None]
        n_spikes = int(self.start[-1])
        self._columns = {
            name: scratch_array((n_spikes,), getattr(sorting, name).dtype, folder, held_bytes=LARGE_MAP_BYTES)
            for name in names
        }
        filled = self.start[:-1].copy()
        for rows, kept in kept_spikes(sorting, "unit", *names):
            unit = sorting.unit[rows][kept]
            order = np.argsort(unit, kind="stable")
            unit, here = unit[order], np.bincount(unit, minlength=n_units)
            first = np.cumsum(here) - here  # row of each unit's first spike in this piece
            row = filled[unit] + np.arange(len(unit)) - first[unit]
            for name, column in self._columns.items():
                column[row] = getattr(sorting, name)[rows][kept][order]
                release_pages(column)
            filled += here

    @property
    def count(self) -> NDArray[np.int64]:
        """Number of spikes of each unit: (u,)."""
        return np.diff(self.start)

    def all(self, name: str) -> NDArray[Any]:
        """One column of all units, one after the other; it may be mapped from a file."""
        return self._columns[name]

    def of(self, unit: int, name: str) -> NDArray[Any]:
        """One column of the spikes of a unit: (n,)."""
        rows = np.array(self._columns[name][self.start[unit] : self.start[unit + 1]])
        release_pages(self._columns[name])
        return rows


def kept_spikes(sorting: Sorting, *names: str) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """Slices of the spikes, and which of them are kept; after each, the pages of these columns are released."""
    for at in range(0, sorting.n_spikes, CHUNK):
        rows = slice(at, min(at + CHUNK, sorting.n_spikes))
        yield rows, sorting.kept[rows]
        for name in ("kept", *names):
            release_pages(getattr(sorting, name))
