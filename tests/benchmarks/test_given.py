"""Single stages with the truth given, on a small scene."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_stages_that_are_given_the_truth_find_large_units(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    given, scenarios = importlib.import_module("given"), importlib.import_module("scenarios")
    scenarios.main(["fading50", "--seed", "5", "--seconds", "12", "--out", str(tmp_path)])
    capsys.readouterr()
    given.main([str(tmp_path / "fading50-5"), "nblocks=0", "--without-sorts"])
    matching, clustering = capsys.readouterr().out.splitlines()
    assert matching.startswith("fading50-5 matching")
    assert clustering.startswith("fading50-5 clustering")
    assert all(" of  3" in line for line in (matching, clustering))
    assert "≥.8  3" in matching


def test_the_true_motion_reaches_the_end(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    given = importlib.import_module("given")
    truth = {
        "drift_time_s": np.arange(3.0),
        "drift_y_um": np.array([0.0, 100.0]),
        "drift_um": np.arange(6.0).reshape(3, 2),
        "n_samples": np.array(90_000),
        "sampling_rate_hz": np.array(30_000.0),
    }
    motion = given.true_motion(truth)
    assert motion.time.values.tolist() == [0, 1, 2, 3]
    assert motion.values[-1].tolist() == [4, 5]
