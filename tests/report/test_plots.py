"""Plots: drawn for every kind of sorting, thinned where there is much, without touching pyplot."""

from __future__ import annotations

import io
import logging
import sys

import numpy as np
import pytest

from ks4stream.io.places import ObjectPath, read_whole
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.io.store import load_sorting
from ks4stream.recording import FlatFile
from ks4stream.report import finish, plots
from ks4stream.report.plots import (
    plot_diagnostics,
    plot_drift_amount,
    plot_drift_scatter,
    plot_spike_positions,
    write_plots,
)
from ks4stream.results import Drift, PeakSample

NAMES = {"drift_amount.png", "drift_scatter.png", "diagnostics.png", "spike_positions.png"}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(plots, "_DPI", 40)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"n_spikes": 0, "n_units": 0},
        {"n_spikes": 1, "n_units": 1, "n_channels": 2, "n_slots": 2},
        {"peaks": PeakSample([5], [0.0], [9.0]), "drift": Drift(np.zeros((1, 1)), [40.0]), "n_samples": 50_000},
        {"n_spikes": 0, "probe": None, "waveforms": None},
    ],
)
def test_all_plots_are_written(make_sorting, tmp_path, changes):
    written = write_plots(make_sorting(**changes), tmp_path)
    assert {path.name for path in written} == NAMES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_pyplot_stays_untouched():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_empty_plots_say_why(make_sorting):
    empty = make_sorting(n_spikes=0, n_units=0, drift=None, peaks=None, waveforms=None)
    assert texts(plot_drift_amount(empty)) == ["no drift estimate"]
    assert texts(plot_drift_scatter(empty)) == ["no detections"]
    assert texts(plot_diagnostics(empty)) == ["no waveforms", "no waveforms", "no units", "no units"]
    assert texts(plot_spike_positions(empty)) == ["no spikes"]


def test_drift_lines_are_at_the_middle_of_their_batches(make_sorting):
    sorting = make_sorting()
    lines = [line for line in plot_drift_amount(sorting).axes[0].lines if line.get_label().isdigit()]
    assert [line.get_label() for line in lines] == ["20", "80"]
    assert np.allclose(lines[0].get_xdata(), 1 + 2 * np.arange(6))  # seconds
    assert np.allclose(lines[1].get_ydata(), sorting.drift.shift_um[:, 1])
    assert plot_drift_amount(sorting).axes[0].get_ylabel() == "Correction (µm)"  # not how far the tissue moved


def test_many_spikes_are_thinned_evenly(make_sorting, monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 50)
    sorting = make_sorting()
    figure = plot_spike_positions(sorting)
    drawn = sorting.kept[plots.thinned(sorting.n_spikes)].sum()
    assert 25 < drawn < 50  # duplicates among the fifty are left out
    assert len(figure.axes[0].collections[-1].get_offsets()) == drawn
    assert len(plot_drift_scatter(make_sorting()).axes[0].collections[0].get_offsets()) == 50
    assert np.array_equal(plots.thinned(100), np.arange(0, 100, 2))


@pytest.mark.slow
def test_results_on_a_store_name_the_recording_so_that_who_downloads_them_finds_it(
    make_sorting, tmp_path, object_store, caplog
):
    data = tmp_path / "rec.bin"
    data.write_bytes(b"\0" * 26)
    target = ObjectPath("s3://recordings/finished")
    with caplog.at_level(logging.INFO):
        flat_files = (FlatFile(str(data), "<i2", 0, 1, 13),)
        finish(make_sorting(files=(str(data),), flat_files=flat_files), ResultsFolder(target))
    assert f"dat_path = ['{data.resolve().as_posix()}']".encode() in read_whole(target / "params.py")
    (ops,) = np.load(io.BytesIO(read_whole(target / "ops.npy")), allow_pickle=True).reshape(1)
    assert (ops["filename"], ops["data_dir"]) == ([str(data)], str(tmp_path))
    assert load_sorting(str(target)).files == (str(data),)
    assert "draft" not in caplog.text and str(target) in caplog.text


@pytest.mark.slow
def test_finish_writes_folder_store_and_plots(make_sorting, tmp_path):
    sorting = make_sorting()
    folder = tmp_path / "results" / "kilosort4"
    assert finish(sorting, ResultsFolder.open(folder), save_extra_vars=True) is None, "nothing was in the way"
    assert {path.name for path in folder.iterdir()} >= NAMES | {"params.py", "ops.npy", "tF.npy", "sorting.zarr"}
    assert np.array_equal(load_sorting(folder).sample, sorting.sample)
