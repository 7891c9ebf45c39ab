"""What the page shows of a sorting: bounded, complete, and true to the spikes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.by_unit import ByUnit
from ks4stream.kernels.correlograms import correlogram
from ks4stream.metrics import METRICS
from ks4stream.report import summary
from ks4stream.report.comparison import compared
from ks4stream.results import Diagnostics, Provenance
from ks4stream.settings import Settings
from ks4stream.unit_metrics import GROUPED, quality_metrics
from ks4stream.unit_waveforms import mean_waveforms


def content_of(sorting):
    by_unit = ByUnit(sorting, *GROUPED)
    return summary.content(sorting, by_unit, quality_metrics(sorting, by_unit))


def as_json(value):
    return json.dumps(value, default=lambda array: array.tolist(), allow_nan=True)


def diagnostics(n_channels=12):
    return Diagnostics(
        edge=np.array([0, 120_000, 330_000]),
        noise=np.array([[1.0], [2.0]]) * np.ones(n_channels),
        explained=np.array([0.25, np.nan]),
        counts={"peaks": 900, "templates": 7, "matched spikes": 500, "clusters": 6, "merged clusters": 5, "units": 4},
        left_out={"too few spikes": (1, 3)},
    )


def test_every_array_has_the_units_and_channels_of_the_sorting(make_sorting):
    sorting = make_sorting(diagnostics=diagnostics())
    found = content_of(sorting)
    assert {len(column) for column in found["units"].values()} == {4}
    assert {metric["name"] for metric in found["metrics"]} <= found["units"].keys()
    assert len(found["probe"]["x_um"]) == 12
    for name, array in found["details"].items():
        if isinstance(array, np.ndarray):
            assert len(array) == 4, name
    assert found["time"]["noise"].shape == (12, summary.TIME_BINS)


def test_its_size_does_not_grow_with_the_recording(make_sorting):
    short = content_of(make_sorting(diagnostics=diagnostics()))
    sample = np.sort(np.random.default_rng(0).integers(0, 30_000 * 7200, 20_000))
    tall = make_sorting(n_spikes=20_000, sample=sample, n_samples=30_000 * 7200, diagnostics=diagnostics())
    drift = dataclasses.replace(tall.drift, error_um=np.ones_like(tall.drift.shift_um))
    long = content_of(dataclasses.replace(tall, drift=drift))
    sizes = [len(as_json({**each, "drift": None})) for each in (short, long)]
    assert sizes[1] < 1.5 * sizes[0], "numbers have more digits, but there are not more of them"
    n_points = {len(long["drift"][name]) for name in ("time_s", "displacement_um", "error_um")}
    assert n_points == {1200} and len(tall.drift.shift_um) == 3600, "every third batch"


def test_time_strip_and_raster_have_every_spike(make_sorting):
    sorting = make_sorting()
    found = content_of(sorting)
    time = found["time"]
    edges = np.array(time["edges_s"])
    live_s = np.diff(edges) * (1 - np.array(time["blanked_share"], float))
    counted = np.nansum(np.array(time["rate_hz"], float) * live_s)
    in_span = sorting.kept & (sorting.sample < sorting.tiling.stop)
    assert counted == pytest.approx(in_span.sum(), rel=1e-4)  # six digits are kept
    assert np.array(time["blanked_share"], float) @ np.diff(edges) == pytest.approx(300 / 30_000, rel=1e-4)
    (raster,) = found["rasters"]
    assert raster["before"].shape == raster["after"].shape
    first = next(i for i in range(sorting.n_spikes) if sorting.kept[i])
    column = int(sorting.sample[first] / sorting.tiling.stop * summary.RASTER_TIMES)
    assert raster["after"][:, column].any()


def test_each_shank_has_a_raster(make_sorting):
    sorting = make_sorting()
    probe = dataclasses.replace(sorting.probe, shank=(np.arange(12) >= 6).astype(np.int64) * 3)
    peaks = dataclasses.replace(sorting.peaks, shank=np.full(500, 3))
    rasters = content_of(dataclasses.replace(sorting, probe=probe, peaks=peaks))["rasters"]
    assert [entry["shank"] for entry in rasters] == [0, 3]
    assert rasters[0]["before"] is None and rasters[1]["before"].any()
    on_first = probe.shank[sorting.template_channels[:, 0]][sorting.template] == 0
    assert on_first.any() and not on_first.all()
    assert rasters[0]["after"].any() and rasters[1]["after"].any()


def test_noise_and_explained_energy_are_those_of_their_time(make_sorting):
    sorting = make_sorting(diagnostics=diagnostics(), gain_uv=2.0)
    whitening = dataclasses.replace(sorting.whitening, noise=np.full(12, 3.0))
    time = content_of(dataclasses.replace(sorting, whitening=whitening))["time"]
    assert set(time["noise"][0].tolist()) == {6.0, 12.0}, "3 units of the file, of 2 µV; then twice as much"
    assert time["explained"][0] == 0.25 and time["explained"][-1] is None


def test_details_of_a_unit(make_sorting):
    sorting = make_sorting(similarity=np.array([[1, 0.3, 0, 0.8], [0.3, 1, 0, 0], [0, 0, 1, 0], [0.8, 0, 0, 1]]))
    details = content_of(sorting)["details"]
    assert details["nearest"].tolist() == [[3, 1, -1], [0, -1, -1], [-1, -1, -1], [0, -1, -1]]
    np.testing.assert_allclose(details["similarity"][0], [0.8, 0.3, 0])
    trains = [sorting.sample[sorting.kept & (sorting.unit == unit)] for unit in range(4)]
    acg = correlogram(trains[0], sampling_rate_hz=30_000.0, reach_ms=50)
    assert details["acg"][0].tolist() == acg[50:].tolist() and acg.sum()
    ccg = correlogram(trains[0], trains[3], sampling_rate_hz=30_000.0, reach_ms=50)
    assert details["ccg"][0, 0].tolist() == ccg.tolist()
    assert details["count"].sum(axis=1).tolist() == [np.sum(train < sorting.tiling.stop) for train in trains]
    waveforms = mean_waveforms(sorting)
    for unit in range(4):
        channels = details["template_channels"][unit]
        shown = details["template"][unit] * details["template_scale"][unit]
        known = channels >= 0
        step = details["template_scale"][unit]
        np.testing.assert_allclose(shown[known], waveforms[unit].T[channels[known]], atol=0.51 * step)
    low, middle, high = details["amplitude"][0]
    some = details["count"][0] > 0
    assert np.isnan(middle[~some]).all()
    assert (low[some] <= middle[some]).all() and (middle[some] <= high[some]).all()


def test_quantiles_are_those_of_each_bin():
    values = np.array([5.0, 1, 3, 2, 4, 7])
    found = summary._quantiles(values, np.array([0, 5, 5, 6]))
    assert found[:, 0].tolist() == [1, 3, 5] and np.isnan(found[:, 1]).all() and found[:, 2].tolist() == [7, 7, 7]


def test_correlograms_of_very_many_pairs_keep_their_shape():
    assert summary._small(np.array([0, 1_000_000, 500_000])).tolist() == [0, 65535, 32767]


def test_verdict_says_what_to_change(make_sorting):
    warnings = ("Only 3 spikes were found; set Th_universal lower.", "Something else.")
    found = content_of(make_sorting(warnings=warnings, diagnostics=diagnostics()))["verdict"]
    assert [entry["setting"] for entry in found["warnings"]] == ["Th_universal", None]
    assert found["good"] + found["mua"] == 4 and found["left_out"] == 1
    assert found["blanked_s"] == pytest.approx(0.01)


def test_changed_settings_are_marked_and_told_in_the_methods(make_sorting):
    sorting = make_sorting()
    run = content_of(dataclasses.replace(sorting, settings=sorting.settings.replace(Th_learned=7)))["run"]
    changed = {entry["name"] for entry in run["settings"] if entry["changed"]}
    assert changed == {"Th_learned", "nt", "n_pcs", "nearest_chans"}
    assert "Th_learned = 7" in run["methods"]
    assert {entry["name"] for entry in run["settings"]} == Settings().to_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_units": 0, "n_spikes": 0},
        {"drift": None, "peaks": None},
        {"whitening": None},
        {"probe": None},
        {"waveforms": None},
        {"artifacts": np.zeros((0, 2), np.int64)},
        {"contamination": np.full(4, np.nan)},
        {"kept": np.zeros(400, bool)},
    ],
    ids=[
        "empty",
        "no drift",
        "no whitening",
        "no probe",
        "no waveforms",
        "no artifacts",
        "no labels",
        "all duplicates",
    ],
)
def test_whatever_is_missing(make_sorting, changes):
    found = content_of(make_sorting(**changes))
    as_json(found)
    assert len(found["units"]["id"]) == changes.get("n_units", 4)
    assert len(found["metrics"]) == len(METRICS)


def test_a_sorting_agrees_with_itself(make_sorting):
    sorting = make_sorting(kept=np.ones(400, bool))
    found = compared(sorting, sorting, "earlier")
    assert [(row["unit"], row["other"], row["agreement"]) for row in found["rows"]] == [(u, u, 1.0) for u in range(4)]
    assert (found["gained"], found["lost"], found["sampled"]) == ([], [], False)


@pytest.mark.parametrize("most", [10_000, 200])
def test_units_that_were_gained_and_lost(make_sorting, monkeypatch, most):
    monkeypatch.setattr("ks4stream.report.comparison.MAX_SPIKES", most)
    monkeypatch.setattr("ks4stream.report.comparison.N_WINDOWS", 3)
    sorting = make_sorting(kept=np.ones(400, bool))
    sample = np.where(sorting.unit == 2, sorting.sample + 300, sorting.sample)
    order = np.argsort(sample, kind="stable")
    unit = ((sorting.unit + 1) % 4)[order]
    other = dataclasses.replace(sorting, sample=sample[order], unit=unit, kept=np.ones(400, bool))
    found = compared(sorting, other, "earlier")
    assert [(row["unit"], row["other"]) for row in found["rows"]] == [(0, 1), (1, 2), (3, 0)]
    assert (found["gained"], found["lost"], found["not_compared"]) == ([2], [3], 0)
    assert found["sampled"] == (most == 200)


def test_units_without_spikes_in_the_time_of_both_are_not_compared(make_sorting):
    sorting = make_sorting(kept=np.ones(400, bool))
    other = dataclasses.replace(sorting, kept=sorting.unit != 2)
    found = compared(sorting, other, "earlier")
    assert [row["unit"] for row in found["rows"]] == [0, 1, 3]
    assert (found["gained"], found["lost"], found["not_compared"]) == ([2], [], 1)


def test_sortings_of_different_recordings_are_not_compared(make_sorting):
    one, other = (make_sorting(provenance=Provenance(recording_digest=digest)) for digest in ("a", "b"))
    with pytest.raises(ResultsError, match="another recording"):
        compared(one, other, "earlier")
