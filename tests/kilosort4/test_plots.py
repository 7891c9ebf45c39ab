"""Kilosort4's plots: its files, of what its functions return, before and after the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream.errors import OpsError, ResultsError
from ks4stream.io.kilosort_ops import ops_from_sorting
from ks4stream.io.phy import export_phy
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.io.run_store import open_store
from ks4stream.kilosort4 import plots
from ks4stream.kilosort4.plots import plot_diagnostics, plot_drift_amount, plot_drift_scatter, plot_spike_positions
from ks4stream.report import plots as drawing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sortings that are drawn; figures are written as text, as rendering one takes a second."""
    found: list[Any] = []
    for name in ("plot_drift_amount", "plot_drift_scatter", "plot_diagnostics", "plot_spike_positions"):
        draw = getattr(drawing, name)

        def noted(sorting: Any, draw: Any = draw) -> Any:
            found.append(sorting)
            return draw(sorting)

        monkeypatch.setattr(plots.plots, name, noted)
    monkeypatch.setattr(plots.plots, "save_plot", lambda figure, path: path.write_text("a picture"))
    return found


@pytest.fixture
def ops(make_sorting: Any, tmp_path: Path) -> dict[str, Any]:
    """An `ops` before the results."""
    found = ops_from_sorting(make_sorting(), tmp_path / "kilosort4")
    return {name: value for name, value in found.items() if not name.startswith("n_units")}


@pytest.mark.slow
def test_files_are_pictures(ops: dict[str, Any], make_sorting: Any, tmp_path: Path) -> None:
    sorting, folder = make_sorting(), tmp_path / "kilosort4"
    plot_drift_amount(ops, folder)
    plot_drift_scatter(np.random.default_rng(0).uniform(1, 90, (500, 6)), folder)
    plot_diagnostics(torch.from_numpy(sorting.unit_features), sorting.unit, ops, str(folder))
    written = {"drift_amount.png", "drift_scatter.png", "diagnostics.png"}
    assert {path.name for path in folder.iterdir()} == {*written, "ks4stream.json"}
    assert ResultsFolder.open(folder).somebodys() == []
    export_phy(sorting, folder)
    plot_spike_positions(sorting.unit, sorting.refractory, folder)
    for name in (*written, "spike_positions.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_drift(ops: dict[str, Any], make_sorting: Any, tmp_path: Path, drawn: list[Any]) -> None:
    drift, tiling = make_sorting().drift, make_sorting().tiling
    plot_drift_amount(ops, tmp_path)
    assert np.array_equal(drawn[0].drift.shift_um, drift.shift_um)
    assert np.array_equal(drawn[0].drift.centre_um, drift.centre_um)
    assert np.array_equal(drawn[0].tiling.centres, tiling.centres)
    plot_drift_amount(ops, tmp_path, tmin=2.5)
    assert drawn[1].tiling.start == 75_000
    with pytest.raises(OpsError, match="dshift is None"):
        plot_drift_amount(ops | {"dshift": None}, tmp_path)


def test_peaks(tmp_path: Path, drawn: list[Any]) -> None:
    st0 = np.column_stack([np.linspace(0, 3, 7), np.arange(7) * 20, np.full(7, 9), np.zeros((7, 3))])
    plot_drift_scatter(st0, tmp_path, 1.0)
    peaks = drawn[0].peaks
    np.testing.assert_allclose(peaks.sample / drawn[0].sampling_rate_hz, st0[:, 0] + 1, atol=1e-4)
    assert np.array_equal(peaks.depth_um, st0[:, 1]) and np.array_equal(peaks.score, st0[:, 2])
    plot_drift_scatter(np.tile(st0, (20_000, 1)), tmp_path)
    assert len(drawn[1].peaks.sample) == drawing.MAX_POINTS
    plot_drift_scatter(st0[:0], tmp_path)
    for wrong in (None, st0[:, 0]):
        with pytest.raises(OpsError, match="st0 must be the table"):
            plot_drift_scatter(wrong, tmp_path)  # type: ignore[arg-type]


def test_diagnostics(ops: dict[str, Any], make_sorting: Any, tmp_path: Path, drawn: list[Any]) -> None:
    sorting = make_sorting()
    plot_diagnostics(sorting.unit_features, sorting.unit, ops, tmp_path)
    (found,) = drawn
    assert np.array_equal(found.unit_features, sorting.unit_features) and np.array_equal(found.unit, sorting.unit)
    assert np.array_equal(found.waveforms.components, sorting.waveforms.components)
    assert found.probe == sorting.probe and np.isnan(found.contamination).all()
    (legend,) = [
        axes.get_legend() for axes in drawing.plot_diagnostics(found).axes if "count" in axes.get_title(loc="left")
    ]
    assert [text.get_text() for text in legend.get_texts()] == ["not labelled (4)"]
    with pytest.raises(OpsError, match="clu0 has units 0 to 9, but Wall0 has 4"):
        plot_diagnostics(sorting.unit_features, sorting.unit * 3, ops, tmp_path)


@pytest.mark.parametrize("curated", [False, True])
def test_positions(make_sorting: Any, tmp_path: Path, drawn: list[Any], curated: bool) -> None:
    sorting = make_sorting()
    with pytest.raises(ResultsError, match="save the results before"):
        plot_spike_positions(sorting.unit, sorting.refractory, tmp_path)
    export_phy(sorting, tmp_path)
    if curated:
        (tmp_path / "cluster_group.tsv").write_text("cluster_id\tgroup\n0\tnoise\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plot_spike_positions(sorting.unit, sorting.refractory, tmp_path)
    plot_spike_positions(sorting.unit[sorting.kept], sorting.refractory, tmp_path)
    for found in drawn:
        assert np.array_equal(found.unit, sorting.unit[sorting.kept]) and found.kept.all()
        assert np.array_equal(found.x_um, sorting.x_um[sorting.kept])
        assert np.array_equal(found.good, sorting.refractory) and found.probe.n_channels == 12
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        **before,
        "spike_positions.png": b"a picture",
    }
    with pytest.raises(ResultsError, match="clu has 3 spikes, but"):
        plot_spike_positions(sorting.unit[:3], sorting.refractory, tmp_path)
    with pytest.raises(OpsError, match="is_refractory has 2"):
        plot_spike_positions(sorting.unit, sorting.refractory[:2], tmp_path)


def test_of_finished_results_a_plot_is_replaced_in_its_place(
    make_sorting: Any, tmp_path: Path, drawn: list[Any]
) -> None:
    """Whoever loads results and draws again does not want them moved."""
    sorting, folder = make_sorting(), tmp_path / "kilosort4"
    export_phy(sorting, folder)
    (folder / "cluster_group.tsv").write_text("cluster_id\tgroup\n0\tnoise\n")
    plot_drift_amount(ops_from_sorting(sorting, folder), folder)
    assert (folder / "drift_amount.png").read_text() == "a picture"
    assert (folder / "spike_times.npy").exists() and [path.name for path in tmp_path.iterdir()] == ["kilosort4"]


def test_plots_touch_nothing_else(
    ops: dict[str, Any], make_sorting: Any, tmp_path: Path, drawn: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither other results, whosever they are, nor files of a folder for figures."""
    st0, sorting = np.ones((3, 6)), make_sorting()
    theirs, figures, ours = (tmp_path / name for name in ("theirs", "figures", "kilosort4"))
    for folder, names in (
        (theirs, ("spike_times.npy", "cluster_group.tsv", "drift_amount.png")),
        (figures, ("metrics.csv", "spike_counts.npy", "notes.txt")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("cluster_id,snr\n0,3\n")
    with ResultsFolder.open(ours).draft() as draft:
        export_phy(sorting, draft, home=ours)
        ResultsFolder.open(ours).replace(draft, "key")
    (ours / "cluster_group.tsv").write_text("cluster_id\tgroup\n0\tgood\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", "ks4stream"):
        for folder in (theirs, figures, ours):
            plot_drift_amount(ops, folder)
            plot_drift_scatter(st0, folder)
            plot_diagnostics(sorting.unit_features, sorting.unit, ops, folder)
    assert "which stays as it is: drift_scatter.png was written to" in caplog.text
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    plotted = {"drift_amount.png", "drift_scatter.png", "diagnostics.png"}
    assert {path.relative_to(tmp_path).as_posix() for path in after.keys() - before.keys()} == {
        *(f"{folder}/ks4stream.early/{name}" for folder in ("theirs", "kilosort4") for name in plotted),
        *(f"figures/{name}" for name in plotted),
    }


def test_plots_of_a_run_belong_to_its_results(tmp_path: Path, drawn: list[Any]) -> None:
    with open_store(tmp_path / "run", data="0"):
        pass
    plot_drift_scatter(np.ones((3, 6)), tmp_path)
    assert (tmp_path / "ks4stream.json").exists() and ResultsFolder.open(tmp_path).somebodys() == []


def test_a_plot_that_is_drawn_again_stays_ours(make_sorting: Any, tmp_path: Path, drawn: list[Any]) -> None:
    sorting = make_sorting()
    with ResultsFolder.open(tmp_path).draft() as draft:
        export_phy(sorting, draft, home=tmp_path)
        (draft / "spike_positions.png").write_text("another picture")
        ResultsFolder.open(tmp_path).replace(draft, "key")
    plot_spike_positions(sorting.unit, sorting.refractory, tmp_path)
    plot_drift_amount(ops_from_sorting(sorting, tmp_path), tmp_path)
    results = ResultsFolder.open(tmp_path)
    assert results.somebodys() == [] and results.missing("key", ["spike_positions.png", "drift_amount.png"]) == set()
