"""Spikes of a sorting, unit by unit."""

from __future__ import annotations

import numpy as np
import pytest

from ks4stream.io import by_unit
from ks4stream.io.by_unit import ByUnit


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_spikes_are_grouped_by_unit_whatever_is_read_at_a_time(make_sorting, monkeypatch, chunk):
    monkeypatch.setattr(by_unit, "CHUNK", chunk)
    sorting = make_sorting()
    found = ByUnit(sorting, "sample", "y_um")
    assert found.count.sum() == found.start[-1] == sorting.kept.sum()
    for unit in range(sorting.n_units):
        own = sorting.kept & (sorting.unit == unit)
        for name in ("sample", "y_um"):
            np.testing.assert_array_equal(found.of(unit, name), getattr(sorting, name)[own])
        np.testing.assert_allclose(
            found.position_um[unit], [column[own].mean(dtype=float) for column in (sorting.x_um, sorting.y_um)]
        )


def test_columns_may_be_on_disk(make_sorting, monkeypatch):
    monkeypatch.setattr(by_unit, "LARGE_MAP_BYTES", 0)
    sorting = make_sorting()
    found = ByUnit(sorting, "sample")
    assert isinstance(found.all("sample"), np.memmap)
    own = sorting.kept & (sorting.unit == 2)
    np.testing.assert_array_equal(found.of(2, "sample"), sorting.sample[own])


def test_a_unit_without_spikes_is_nowhere(make_sorting):
    found = ByUnit(make_sorting(kept=np.zeros(400, bool)), "sample")
    assert np.isnan(found.position_um).all() and not found.count.any()
