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


def test_a_loop_repeats_its_clip(tmp_path: Path) -> None:
    looped = importlib.import_module("looped")
    recording = looped.loop(tmp_path, ks4stream.simulate.tetrode_probe(1), clip_s=1.0, seconds=200 * 3600)
    clip = recording.source.source.read(0, 30_000)
    assert recording.n_samples == 200 * 3600 * 30_000 > 2**34
    where = np.arange(2**34 - 20_000, 2**34 + 40_000)
    around = recording.read(2**34 - 20_000, 2**34 + 40_000)
    bare = replace(recording.source, noise_samples=0)
    assert np.array_equal(bare.read(where[0], where[-1] + 1), clip[where % 30_000])
    noise = around.astype(float) - clip[where % 30_000]
    assert abs(noise.std() / looped.NOISE_S_D - 1) < 0.02  # of 240 000 samples: four times what chance allows
    assert np.array_equal(around[100:200], recording.read(2**34 - 19_900, 2**34 - 19_800)), "however it is read"
    assert recording.read(5, 5).shape == (0, 4)


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")  # three seconds have few spikes
def test_memory_is_measured_beside_what_was_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = importlib.import_module("memory")
    table = tmp_path / "memory.csv"
    memory.main(["--minutes", "0.05", "--channels", "16", "--workers", "1", "--clip-seconds", "3", "--set", "nblocks=0",
                 "--csv", str(table)])  # fmt: skip
    (row,) = csv.DictReader(table.read_text().splitlines())
    for who in ("worker", "client"):
        assert 100 < int(row[f"{who}_anonymous_mb"]) <= int(row[f"{who}_resident_mb"])
        assert int(row[f"{who}_stated_mb"]) > 100
    assert "worker: +0%" in capsys.readouterr().out


def test_the_overhead_of_a_task_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    scale = importlib.import_module("scale")
    scale.main(["--tasks", "20", "--workers", "1", "--channels", "16", "--block-seconds", "2"])
    here, there = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert here[:2] == ["this", "thread"] and there[:2] == ["1", "processes"]
    assert float(here[2]) > 0 and float(there[2]) > 0
