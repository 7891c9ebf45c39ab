"""A sort in Kilosort4's steps with everything that callers write in between, as its wrappers and scripts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.kilosort4.io import BinaryFiltered, bfile_from_ops, load_ops, save_ops, save_preprocessing, save_to_phy
from ks4stream.kilosort4.parts import (
    cluster_spikes,
    compute_drift_correction,
    compute_preprocessing,
    detect_spikes,
    initialize_ops,
    save_sorting,
    set_files,
)
from ks4stream.kilosort4.plots import plot_diagnostics, plot_drift_amount, plot_drift_scatter, plot_spike_positions
from ks4stream.kilosort4.run_kilosort import run_kilosort
from ks4stream.kilosort4.stored import load_sorting

CPU = torch.device("cpu")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waveforms are learned from the few spikes of a short recording."""
    monkeypatch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A drifting recording, its probe and settings."""
    probe = simulate.linear_probe(12, pitch_um=20)
    recording = simulate.simulate(
        probe,
        3.0,
        seed=3,
        n_units=6,
        drift="rigid",
        drift_range_um=20.0,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(40, 90),
        hash_per_channel=0,
    )
    path = tmp_path_factory.mktemp("scene") / "recording.bin"
    recording.read(0, 90_000).tofile(path)
    words = {"chanMap": probe.chan_map, "xc": probe.x_um, "yc": probe.y_um, "kcoords": probe.shank, "n_chan": 12}
    return path, words, {"n_chan_bin": 12, "batch_size": 15_000, "nearest_chans": 8}


def test_results_with_all_files_in_two_sittings(scene: Any, tmp_path: Path) -> None:
    path, probe, settings = scene
    whole, folder = tmp_path / "whole", tmp_path / "kilosort4"
    run_kilosort(
        settings,
        probe=probe,
        filename=path,
        results_dir=whole,
        device="cpu",
        client="loop",
        save_extra_vars=True,
        save_preprocessed_copy=True,
    )
    *_, probe = set_files(dict(settings), path, probe, "", "", folder, None, None)
    ops, _ = initialize_ops(
        settings | {"filename": path, "results_dir": folder}, probe, "int16", True, False, CPU, True
    )
    ops = compute_preprocessing(ops | {"client": "loop"}, CPU)
    save_ops(ops)

    ops = load_ops(folder / "ops.npy", CPU)
    ops, bfile, st0 = compute_drift_correction(ops, CPU)
    save_preprocessing(folder / "temp_wh.dat", ops, bfile)
    plot_drift_amount(ops, folder)
    plot_drift_scatter(st0, folder)
    save_ops(ops, folder)
    assert ResultsFolder.open(folder).somebodys() == []

    ops = load_ops(folder / "ops.npy", CPU)
    bfile = bfile_from_ops(ops, device=CPU)
    st, tF, Wall0, clu0 = detect_spikes(ops, CPU, BinaryFiltered(path, 12, NT=15_000, device=CPU))  # only its samples
    plot_diagnostics(Wall0, clu0, ops, folder)
    clu, Wall, st, tF = cluster_spikes(st, tF, ops, CPU, bfile)
    ops, similar_templates, is_ref, est_contam_rate, kept_spikes = save_sorting(
        ops, folder, st, clu, tF, Wall, bfile.imin, save_extra_vars=True, save_preprocessed_copy=True
    )
    written = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    for name in set(written) - {"ks4stream.json", "ops.npy", "report.html", "kilosort4.log"}:  # with times and folders
        assert written[name] == (whole / name).read_bytes(), name
    assert set(written) | {"kilosort4.log"} == {path.name for path in whole.glob("*.*") if path.is_file()}
    assert ResultsFolder.open(folder).somebodys() == []
    assert [path.name for path in tmp_path.glob("kilosort4*")] == ["kilosort4"]

    plot_spike_positions(clu, is_ref, folder)
    found = load_sorting(folder, CPU, load_extra_vars=True)
    assert found[0]["n_units_total"] == len(Wall)
    assert np.array_equal(found[1], st[kept_spikes, 0]) and np.array_equal(found[2], clu[kept_spikes])
    assert np.array_equal(found[3], similar_templates) and np.array_equal(found[4], is_ref)
    assert np.array_equal(found[5], est_contam_rate)
    assert np.array_equal(found[6], kept_spikes) and torch.equal(found[7], tF) and torch.equal(found[8], Wall)
    assert np.array_equal(found[9], st) and np.array_equal(found[10], clu)
    traces = bfile_from_ops(found[0], device=CPU)  # of a finished sorting that was loaded
    assert torch.equal(traces.padded_batch_to_torch(3), bfile.padded_batch_to_torch(3))
    other = tmp_path / "other"
    save_preprocessing(other / "temp_wh.dat", ops | {"results_dir": other}, bfile)
    there, *rest = save_to_phy(st, clu, tF, Wall, probe, ops, bfile.imin, other, "int16")
    assert there == other and all(map(np.array_equal, rest, (similar_templates, is_ref, est_contam_rate, kept_spikes)))
    assert np.array_equal(np.load(other / "spike_times.npy"), np.load(folder / "spike_times.npy"))
    assert (other / "temp_wh.dat").read_bytes() == written["temp_wh.dat"]  # kept, but not what Phy shows
    assert "recording.bin" in (other / "params.py").read_text()
