"""Every setting counts: with another value, another result is found."""

from __future__ import annotations

import shutil
from dataclasses import fields

import numpy as np
import pytest

from ks4stream import Settings, open_recording, simulate, sort
from ks4stream.io.results_folder import fingerprint

RATE = 30_000
BASE = Settings(
    batch_size=6_000,
    nearest_chans=6,
    nearest_templates=40,
    whitening_range=8,
    cluster_downsampling=2,
    max_cluster_subset=400,
    artifact_threshold=3_000.0,
    nblocks=1,
)
CHANGES = {
    "batch_size": 7_000,
    "batch_downsampling": 2,
    "tmin": 0.5,
    "tmax": 3.5,
    "shift": 2_900.0,  # towards the threshold of artifacts, as nothing else sees a constant
    "scale": 0.5,
    "highpass_cutoff": 500.0,
    "artifact_threshold": 2_000.0,
    "do_CAR": False,
    "invert_sign": True,
    "whitening_range": 4,
    "nskip": 1,
    "nt": 41,
    "nt0min": 15,
    "n_templates": 4,
    "n_pcs": 4,
    "templates_from_data": False,
    "Th_single_ch": 9.0,
    "Th_universal": 12.0,
    "dmin": 40.0,
    "dminx": 16.0,
    "min_template_size": 20.0,
    "template_sizes": 3,
    "nearest_chans": 4,
    "nearest_templates": 5,
    "max_channel_distance": 5.0,
    "nblocks": 0,
    "binning_depth": 10.0,
    "sig_interp": 10.0,
    "drift_smoothing": (2.0, 2.0, 2.0),
    "Th_learned": 12.0,
    "max_peels": 1,
    "cluster_neighbors": 3,
    "cluster_downsampling": 5,
    "max_cluster_subset": 100,
    "x_centers": 2,
    "cluster_init_seed": 6,
    "acg_threshold": 1e-6,
    "ccg_threshold": 1e-6,
    "duplicate_spike_ms": 5.0,
    "position_limit": 15.0,
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")]


def test_all_settings_are_here():
    assert CHANGES.keys() == {spec.name for spec in fields(Settings)}
    assert all(getattr(BASE, name) != value for name, value in CHANGES.items())


@pytest.fixture(scope="module")
def sorted_once(tmp_path_factory):
    """A recording with drift, bursts and artifacts; the folder of its sort; and what was found, without settings."""
    probe = simulate.staggered_probe(16)
    scene = simulate.simulate(
        probe,
        4.0,
        seed=5,
        n_units=12,
        amplitude_range_uv=(80, 250),
        rate_range_hz=(20, 60),
        drift="rigid",
        drift_range_um=30.0,
    )
    samples = scene.read(0, 4 * RATE)
    samples[60_000:60_060] += 2_500
    recording = open_recording(samples, fs=RATE, probe=probe)
    folder = tmp_path_factory.mktemp("base")
    return recording, folder, found(recording, BASE, folder)


def found(recording, settings, folder):
    sorting = sort(recording, settings, results_dir=folder, client="loop", device="cpu", save_features=False)
    object.__setattr__(sorting, "settings", Settings())
    return fingerprint(sorting), len(np.unique(sorting.unit))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_gives_another_result(name, sorted_once, tmp_path):
    recording, folder, (before, n_units) = sorted_once
    assert n_units > 3
    shutil.copytree(folder / "run", tmp_path / "run")  # what the setting does not affect is recalled
    after, _ = found(recording, BASE.replace(**{name: CHANGES[name]}), tmp_path)
    assert after != before
