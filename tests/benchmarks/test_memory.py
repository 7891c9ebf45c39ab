"""Memory and overhead, at toy size."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{Path(ks4stream.__file__).parents[1]}")


@pytest.mark.slow
def test_a_recording_without_end_is_simulated_where_it_is_read() -> None:
    module = importlib.import_module("endless")
    recording = module.endless(ks4stream.simulate.staggered_probe(8), seconds=200 * 3600)
    assert recording.n_samples == 200 * 3600 * 30_000 > 2**34
    around = recording.read(2**34 - 20_000, 2**34 + 40_000)
    assert np.array_equal(around[100:200], recording.read(2**34 - 19_900, 2**34 - 19_800)), "however it is read"
    assert recording.read(5, 5).shape == (0, 8)

    trains, minute = recording.source.scene.spikes, 1_800_000
    before, after = trains.within(0, minute), trains.within(minute, 2 * minute)
    both = trains.within(0, 2 * minute)
    assert np.array_equal(both.sample, np.concatenate([before.sample, after.sample]))
    assert np.all(np.diff(both.sample) >= 0)
    shared = np.intersect1d(before.sample, after.sample - minute)
    assert len(before.sample) > 100 and len(shared) < 0.02 * len(before.sample), "every minute has trains of its own"
    bare = replace(recording.source.scene, spikes=module.MinuteByMinute((), 1))
    with_spikes = recording.read(0, 300_000).astype(int)
    assert np.abs(with_spikes - bare.read(0, 300_000)).max() > 100, "and its spikes are in the samples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")  # three seconds have few spikes
def test_memory_is_measured_beside_what_was_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = importlib.import_module("memory")
    table = tmp_path / "memory.csv"
    settings = [f"--set={pair}" for pair in ("nblocks=0", "Th_universal=9", "Th_learned=8")]
    memory.main(["--minutes", "0.05", "--channels", "16", "--workers", "1", *settings, "--csv", str(table)])
    (row,) = csv.DictReader(table.read_text().splitlines())
    for who in ("worker", "client"):
        assert 100 < int(row[f"{who}_anonymous_mb"]) <= int(row[f"{who}_resident_mb"])
        assert int(row[f"{who}_stated_mb"]) > 100
    told = capsys.readouterr().out
    assert "worker: +0%" in told
    assert "| minutes | before | whitening | waveforms | detection" in told


@pytest.mark.slow
def test_the_overhead_of_a_task_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    scale = importlib.import_module("scale")
    scale.main(["--tasks", "20", "--workers", "1", "--channels", "16", "--block-seconds", "2"])
    here, there = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert here[:2] == ["this", "thread"] and there[:2] == ["1", "processes"]
    assert float(here[2]) > 0 and float(there[2]) > 0
