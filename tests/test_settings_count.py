"""Every setting counts: with another value, the step that should read it finds something else."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import RunHere

from ks4stream import Settings, open_recording, simulate
from ks4stream.io.records import key_of
from ks4stream.io.tables import write_block
from ks4stream.kernels.clustering import cluster_region
from ks4stream.pipeline import find_units
from ks4stream.recording import Recording
from ks4stream.resources import Resources
from ks4stream.results import Waveforms
from ks4stream.run import Run
from ks4stream.sorter import prepare, started
from ks4stream.stages.units import Merge, RegionClusters, Units

MOVED = " after drift correction"
RATE = 30_000
SECONDS = 3
BASE = Settings(
    batch_size=9_000, nearest_chans=6, nearest_templates=40, whitening_range=8, cluster_downsampling=1, nblocks=1
)
MANY_BATCHES = {"batch_size": 3_000, "nskip": 2, "nblocks": 0}  # whitening is learned from at least 25
BASES = {"nskip": MANY_BATCHES, "artifact_margin": {"artifact_threshold": 5_000.0}}
"""Other settings with which some of them are compared."""
CHANGES: dict[str, tuple[Any, str]] = {
    "batch_size": (7_000, "whitening"),
    "batch_downsampling": (2, "whitening"),
    "tmin": (0.5, "whitening"),
    "tmax": (2.5, "whitening"),
    "shift": (2_900.0, "whitening"),
    "scale": (0.5, "whitening"),
    "invert_sign": (True, "waveforms"),  # a covariance is the same
    "highpass_cutoff": (500.0, "whitening"),
    "do_CAR": (False, "whitening"),
    "artifact_threshold": (5_000.0, "whitening"),
    "line_frequency": (50.0, "whitening"),
    "artifact_margin": (1.0, "whitening"),
    "whitening_range": (4, "whitening"),
    "nskip": (1, "whitening"),
    "nt": (41, "whitening"),  # the margin of a batch, which is filtered with it, depends on it
    "nt0min": (15, "waveforms"),
    "n_templates": (4, "waveforms"),
    "n_pcs": (4, "waveforms"),
    "templates_from_data": (False, "waveforms"),
    "Th_single_ch": (9.0, "waveforms"),
    "Th_universal": (20.0, "detection"),
    "dmin": (40.0, "detection"),
    "dminx": (16.0, "detection"),
    "min_template_size": (20.0, "detection"),
    "template_sizes": (3, "detection"),
    "nearest_chans": (4, "detection"),
    "nearest_templates": (5, "detection"),
    "max_channel_distance": (5.0, "detection"),
    "x_centers": (2, "detection"),  # which writes peaks by region
    "nblocks": (2, "drift"),
    "binning_depth": (10.0, "drift"),
    "drift_smoothing": ((2.0, 2.0, 2.0), "drift"),
    "sig_interp": (10.0, "waveforms" + MOVED),
    "cluster_neighbors": (3, "first clustering"),
    "cluster_downsampling": (5, "first clustering"),
    "max_cluster_subset": (50, "first clustering"),
    "cluster_init_seed": (6, "first clustering"),
    "Th_learned": (12.0, "thresholds"),
    "max_peels": (1, "widening"),
    "acg_threshold": (1e-6, "merging"),
    "ccg_threshold": (1e-6, "merging"),
    "duplicate_spike_ms": (5.0, "merging"),
    "position_limit": (15.0, "joining"),
}
"""Another value of each setting, and the first step that finds something else with it."""

OF_MERGING = ("acg_threshold", "ccg_threshold")
"""Tested with trains made for them, as a short recording rarely has spikes in each other's refractory period."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")]


def test_all_settings_are_here() -> None:
    assert CHANGES.keys() == {spec.name for spec in fields(Settings)}
    assert all(getattr(BASE, name) != value for name, (value, _) in CHANGES.items())


class FoundElse(Exception):
    """A step found something else than before."""


Found = list[tuple[str, str]]
"""Name of each step, and the hash of what it found."""


def found(recording: Recording, settings: Settings, folder: Path, before: Found | None = None) -> Found:
    """What each step of a sort finds, until one finds something else than `before`."""
    steps: Found = []
    compute = Run.do

    def do(run: Run, step: Any) -> Any:
        result = compute(run, step)
        values = result._replace(clusters=result.clusters.receipts) if isinstance(result, Units) else result
        has_drift = any(name == "drift" for name, _ in steps)
        steps.append((step.name + MOVED * has_drift, key_of(values)))
        if before is not None and steps[-1] != before[len(steps) - 1]:
            raise FoundElse(steps[-1][0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "do", do)
        patch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)  # as a short recording has few spikes
        patch.setitem(cluster_region.__kwdefaults__, "min_landmarks", 20)  # likewise
        tiles = prepare(recording, settings)
        with started(tiles, settings, Resources(client="loop"), folder) as run:
            find_units(run, tiles, settings)
    return steps


@pytest.fixture(scope="module")
def recording() -> Recording:
    """A few neurons in drifting tissue, and an artifact of one channel, which only a threshold can find."""
    probe = simulate.staggered_probe(16)
    scene = simulate.simulate(
        probe,
        SECONDS,
        seed=6,
        n_units=8,
        amplitude_range_uv=(90, 250),
        rate_range_hz=(40, 90),
        drift="rigid",
        drift_range_um=30.0,
        hash_per_channel=0,
    )
    samples = scene.read(0, SECONDS * RATE)
    samples[60_000:60_020, 3] += 9_000
    return open_recording(samples, fs=RATE, probe=probe)


@pytest.fixture(scope="module")
def before(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was found with some settings, and the folder of the run; computed once."""
    known: dict[str, tuple[Settings, Found, Path]] = {}

    def get(**changes: Any) -> tuple[Settings, Found, Path]:
        if str(changes) not in known:
            settings, folder = BASE.replace(**changes), tmp_path_factory.mktemp("base")
            known[str(changes)] = settings, found(recording, settings, folder), folder
        return known[str(changes)]

    return get


def test_all_steps_are_taken(before: Any) -> None:
    settings, steps, _ = before()
    assert settings == BASE
    twice = ["waveforms", "detection"]
    once = ["first clustering", "widening", "thresholds", "matching", "final clustering", "merging", "joining"]
    assert [name for name, _ in steps] == ["whitening", *twice, "drift", *(f"{name}{MOVED}" for name in twice + once)]


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in OF_MERGING])
def test_another_value_finds_something_else(name: str, recording: Recording, before: Any, tmp_path: Path) -> None:
    settings, steps, folder = before(**BASES.get(name, {}))
    value, step = CHANGES[name]
    shutil.copytree(folder / "run", tmp_path / "run")  # what the setting does not affect is recalled
    with pytest.raises(FoundElse) as caught:
        found(recording, settings.replace(**{name: value}), tmp_path, steps)
    assert str(caught.value) in (step, step + MOVED)


@pytest.mark.parametrize("name", OF_MERGING)
def test_refractory_periods(name: str, tmp_path: Path) -> None:
    """Of one neuron, or of its two halves, with far fewer coincidences than by chance."""
    n_clusters = 1 if name == "acg_threshold" else 2
    draw = np.random.default_rng(0)
    sample = 600 * np.arange(1_000) + draw.integers(0, 500, 1_000)
    sample[1:6:2] = sample[0:6:2] + 30
    columns = {"sample": sample, "score": np.full(len(sample), 20, np.float32)}
    receipt = write_block(tmp_path / "clusters.rows", columns, np.arange(len(sample)) % n_clusters, n_clusters)
    n = len(sample)
    sides = 10 * (-1.0) ** (1 + np.arange(n) % n_clusters)  # by their features, they are two neurons
    features = np.stack([np.full(n, 20.0), sides, np.zeros(n)], 1)[:, :, None] + draw.normal(size=(n, 3, 1))
    examples = {
        "sample": sample,
        "template": np.zeros(n, np.int32),
        "features": features.astype(np.float32),
        "displacement_um": np.zeros(n, np.float32),
        "elapsed": np.arange(n) / n,
        "overlapped": np.zeros(n, bool),
    }
    clusters = RegionClusters(
        receipt,
        write_block(tmp_path / "examples.rows", examples, np.arange(n) % n_clusters, n_clusters),
        np.full((n_clusters, 3, 1), 20, np.float32),
        np.full(n_clusters, 8.0),
    )
    waveforms, probe = Waveforms(np.ones((1, 3)), np.ones((1, 3))), simulate.linear_probe(3)

    def good_units(settings: Settings) -> list[bool]:
        merge = Merge(settings, [clusters], np.array([[0, 1, 2]]), waveforms, probe, float(RATE), 5)
        units: list[bool] = merge.run(RunHere(tmp_path)).refractory.tolist()
        return units

    value, step = CHANGES[name]
    assert step == Merge.name
    assert good_units(Settings(n_pcs=1)) == [True]
    assert good_units(Settings(n_pcs=1, **{name: value})) == ([False] if n_clusters == 1 else [True, True])
