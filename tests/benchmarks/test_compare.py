"""The comparison with Kilosort4, at toy size and without it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 3.0


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare")


@pytest.fixture
def outcome(compare: ModuleType) -> ModuleType:
    return importlib.import_module("outcome")


def run_compare(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user would, on one core."""
    package = str(Path(ks4stream.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package}
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--out", str(out), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_toy_run_writes_a_table(tmp_path):
    done = run_compare(tmp_path, "--without-kilosort", "--scenarios", "static:7", "--seconds", str(SECONDS))
    assert done.returncode == 0, done.stderr
    limit, run = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert (limit["sorter"], limit["quality"]["n_truth"]) == ("limit", 20)
    assert (run["scenario"], run["seed"], run["sorter"]) == ("static", 7, "ks4stream")
    assert run["quality"]["n_truth"] == 20
    assert run["quality"]["n_matched"] > 0
    assert 0 < run["sort_s"] < run["wall_s"]
    assert run["cpu_s"] > 1
    assert 100 < run["peak_memory_mb"] < 4000
    assert {"whitening", "detection", "matching"} <= set(run["stage_s"])
    table = (tmp_path / "compare.md").read_text()
    assert "| static | 7 | limit |" in table
    assert "| static | 7 | ks4stream |" in table
    assert not list((tmp_path / "recordings").glob("*.bin")), "recordings are large and not kept"


def test_a_sorter_that_fails_is_reported_and_does_not_end_the_comparison(compare, tmp_path):
    run = compare.Run("static", 1, "Kilosort4", folder=tmp_path / "run")
    compare._measure([sys.executable, "-c", "raise SystemExit('no such probe')"], run, threads=1)
    assert "ended with 1: no such probe" in run.error
    assert run.cpu_s > 0
    assert "static-1, Kilosort4: ended with 1" in compare.markdown([run], [], _machine())


@pytest.mark.parametrize("changed", [None, "content", "settings", "bad channels", "versions", "sorter"])
def test_earlier_results_count_only_for_the_identical_request(compare, outcome, tmp_path, changed):
    binary, probe = tmp_path / "static-1.bin", tmp_path / "static-1.probe.json"
    binary.write_bytes(bytes(100))
    probe.write_text('{"n_chan": 2}')
    figures = {
        "sorter": "kilosort4",
        "asked": outcome.request(binary, probe, {"nblocks": 0}, [1]),
        "versions": {"kilosort": "4.1.7"},
        "sort_wall_s": 10.0,
        "sort_cpu_s": 9.0,
        "peak_memory_mb": 800.0,
    }
    earlier = tmp_path / "earlier" / "anywhere" / "static-1"
    outcome.write(earlier, sample=[5], unit=[0], figures=figures)
    outcome.add(earlier, process={"wall_s": 11.0, "cpu_s": 12.0, "peak_memory_mb": 900.0})
    if changed == "content":
        binary.write_bytes(bytes(99) + b"1")
    asked = outcome.request(
        binary, probe, {"nblocks": 1 if changed == "settings" else 0}, [] if changed == "bad channels" else [1]
    )
    versions = {"kilosort": "4.2.0" if changed == "versions" else "4.1.7"}
    kept = compare.kept_results([tmp_path / "earlier"])
    run = compare.Run("static", 1, "Kilosort4")
    sorter = "lupin" if changed == "sorter" else "kilosort4"
    assert compare._reuse(kept, sorter, asked, versions, run) is (changed is None)
    if changed is None:
        assert (run.wall_s, run.cpu_s, run.peak_memory_mb) == (11.0, 12.0, 900.0)
    else:
        assert np.isnan(run.wall_s)
    if changed == "versions":
        assert compare._reuse(kept, sorter, asked, None, run), "without an environment to ask, any version counts"


def test_every_scenario_has_its_own_seed_whichever_are_asked_for(compare):
    def seeds(*options: str) -> dict[str, int]:
        return dict(compare._jobs(compare._options(["--out", "x", "--without-kilosort", *options])))

    every = seeds("--seed-offset", "10")
    assert len(every) == len(set(every.values())) == 6
    assert seeds("--seed-offset", "10", "--scenarios", "tetrodes") == {"tetrodes": every["tetrodes"]}
    assert seeds("--scenarios", "tetrodes:103") == {"tetrodes": 103}


def test_the_report_tells_reused_times_and_shortfalls(compare):
    runs = [
        _run(compare, "ks4stream", accuracy=0.80, well=15, wall=10.0),
        _run(compare, "Kilosort4", accuracy=0.82, well=14, wall=500.0),
        _run(compare, "ks4stream", accuracy=0.90, well=16, wall=10.0, scenario="rigid"),
        _run(compare, "Kilosort4", accuracy=0.905, well=16, wall=900.0, scenario="rigid", reused=True),
    ]
    agreement = {"n_kilosort4": 14, "n_ks4stream": 16, "n_matched": 13, "n_alike": 12, "mean_agreement": 0.95}
    text = compare.markdown(runs, [{"scenario": "static", "seed": 1, **agreement}], _machine())
    assert "| rigid | 1 | Kilosort4* |" in text
    assert "- static-1: accuracy 0.800 against 0.820" in text
    assert "rigid-1: accuracy" not in text, "within the margin"
    means = next(line for line in text.splitlines() if line.startswith("| Kilosort4 | 2 |"))
    assert means.endswith("| 50.0 | 50.0 |"), "the reused run's times count for no ratio"


def test_every_table_has_the_limit_and_the_means_of_all_sorters(compare):
    limit = {"mean_accuracy": 0.95, "n_well_detected": 19, "n_very_well_detected": 18, "n_truth": 20}
    runs = [
        compare.Run("static", 1, "limit", quality=limit),
        _run(compare, "ks4stream", accuracy=0.90, well=17, wall=10.0),
        _run(compare, "Lupin", accuracy=0.91, well=18, wall=40.0),
        compare.Run("rigid", 1, "limit", quality=limit),
        _run(compare, "ks4stream", accuracy=0.70, well=12, wall=10.0, scenario="rigid"),
        compare.Run("rigid", 1, "Lupin", error="ended with 1"),
    ]
    text = compare.markdown(runs, [], _machine())
    assert "| static | 1 | limit | 0.950 | 19 of 20 | 18 | – | – | – | – | – | – | – |" in text
    assert "| static | 1 | Lupin | 0.910 | 18 of 20 | 16 | 0 | – | 1 | 0 | 0 | 18 | 40.0 |" in text
    assert "| Lupin | 1 | 0.910 | 18.0 | 16.0 | 0.000 | – | 1.000 | 0.000 | 0.000 | 4.000 | 4.000 |" in text
    assert "- rigid-1, Lupin: ended with 1" in text


def test_recordings_may_be_files(compare, tmp_path):
    np.savez(tmp_path / "a_b-3.truth.npz", spike_samples=np.arange(2))
    options = compare._options(["--out", "x", "--without-kilosort", "--files", str(tmp_path / "a_b-3.bin")])
    ((name, seed, binary, truth),) = compare._recordings(options)
    assert (name, seed, binary.name, len(truth["spike_samples"])) == ("a_b", 3, "a_b-3.bin", 2)


def _run(compare, sorter, *, accuracy, well, wall, scenario="static", reused=False):
    quality = {
        "mean_accuracy": accuracy,
        "n_well_detected": well,
        "n_very_well_detected": well - 2,
        "n_truth": 20,
        "n_false_positive": 0,
        "n_background": 1,
        "n_redundant": 0,
        "n_overmerged": 0,
        "n_sorted": 18,
    }
    return compare.Run(
        scenario, 1, sorter, wall_s=wall, sort_s=wall, cpu_s=wall, peak_memory_mb=900.0, quality=quality, reused=reused
    )


def _machine():
    return {"processor": "p", "cores": 2, "memory_gb": 8.0, "system": "s", "load": 0.0}
