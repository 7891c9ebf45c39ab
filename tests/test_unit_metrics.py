"""Metrics of all units of a sorting, from spikes grouped by unit."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest

from ks4stream.metrics import METRICS
from ks4stream.results import Diagnostics
from ks4stream.unit_metrics import quality_metrics, write_quality
from ks4stream.unit_waveforms import mean_waveforms


def test_rates_and_amplitudes(make_sorting):
    sorting = make_sorting(gain_uv=2.0, artifacts=np.zeros((0, 2), np.int64))
    whitening = dataclasses.replace(sorting.whitening, noise=np.full(12, 3.0))
    found = quality_metrics(dataclasses.replace(sorting, whitening=whitening))
    own = sorting.kept & (sorting.unit == 1)
    seconds = (sorting.tiling.stop - sorting.tiling.start) / 30_000
    assert found["firing_rate"][1] == pytest.approx(own.sum() / seconds)
    peak = np.abs(mean_waveforms(sorting)[1]).max()
    norm = np.linalg.norm(sorting.unit_features[1])
    assert found["amplitude_median"][1] == pytest.approx(np.median(sorting.score[own]) / norm * peak, rel=1e-5)
    assert found["snr"][1] == pytest.approx(peak / 6.0, rel=1e-5), "3 units of the file are 6 µV"
    assert found.amplitude_unit == "µV"


def test_time_without_spikes_is_no_time(make_sorting):
    whole = make_sorting(artifacts=np.zeros((0, 2), np.int64))
    middle = (whole.tiling.start + whole.tiling.stop) // 2
    half = dataclasses.replace(whole, artifacts=np.array([[middle, whole.tiling.stop]]))
    ratio = quality_metrics(half)["firing_rate"] / quality_metrics(whole)["firing_rate"]
    np.testing.assert_allclose(ratio, 2, rtol=1e-4)


def test_minutes_that_are_mostly_blanked_do_not_count_as_absence(make_sorting):
    n_samples = 4 * 60 * 30_000
    sample = np.arange(400) * (n_samples // 2 // 400)  # in the first two minutes
    changes = {"sample": sample, "n_samples": n_samples, "kept": np.ones(400, bool)}
    present = quality_metrics(make_sorting(artifacts=np.zeros((0, 2), np.int64), **changes))["presence_ratio"]
    assert present.tolist() == [0.5] * 4
    blanked = np.array([[n_samples // 2, n_samples]])
    assert quality_metrics(make_sorting(artifacts=blanked, **changes))["presence_ratio"].tolist() == [1.0] * 4


def test_isolation_is_what_was_found_when_units_were_joined(make_sorting):
    found = np.array([0.75, np.nan, 1.0, 1.0])
    sorting = make_sorting(diagnostics=Diagnostics(isolation=found))
    np.testing.assert_array_equal(quality_metrics(sorting)["nn_isolation"], found)
    assert np.isnan(quality_metrics(dataclasses.replace(sorting, diagnostics=Diagnostics()))["nn_isolation"]).all(), (
        "an older sort"
    )


def test_a_sorting_without_whitening_or_without_units(make_sorting):
    found = quality_metrics(make_sorting(whitening=None))
    assert np.isnan(found["snr"]).all() and not np.isnan(found["firing_rate"]).any()
    assert found.amplitude_unit == "file units"
    assert all(len(found[metric.name]) == 0 for metric in METRICS for found in [quality_metrics(empty(make_sorting))])


def empty(make_sorting):
    return make_sorting(n_units=0, n_spikes=0)


def test_the_table_has_a_row_for_each_unit(make_sorting, tmp_path):
    sorting = make_sorting()
    found = quality_metrics(sorting)
    with write_quality(sorting, found, tmp_path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cluster_id"] for row in rows] == ["0", "1", "2", "3"]
    assert list(rows[0]) == ["cluster_id", *(metric.name for metric in METRICS)]
    for unit, row in enumerate(rows):
        for metric in METRICS:
            expected = found[metric.name][unit]
            assert row[metric.name] == "" if np.isnan(expected) else float(row[metric.name]) == pytest.approx(expected)


def test_phy_shows_the_table(make_sorting, tmp_path):
    model = pytest.importorskip("phylib.io.model")
    found = quality_metrics(make_sorting())
    write_quality(make_sorting(), found, tmp_path)
    shown = model.load_metadata(tmp_path / "quality.csv")
    assert set(shown) == {metric.name for metric in METRICS if not np.isnan(found[metric.name]).all()}
    assert sorted(shown["num_spikes"]) == [0, 1, 2, 3]
