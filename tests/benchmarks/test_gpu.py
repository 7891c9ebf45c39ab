"""What a GPU does during a sort, at toy size, and with none."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{Path(ks4stream.__file__).parents[1]}")


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")  # three seconds have few spikes
def test_a_recording_is_written_once_and_sorted_by_each_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("gpu")
    arguments = ["--minutes", "0.05", "--channels", "12", "--folder", str(tmp_path), "--set", "nblocks=0"]
    for workers in (["1", "2"], ["1"]):
        with pytest.raises(SystemExit) as ended:
            module.main([*arguments, "--workers", *workers, "--out", str(tmp_path / f"{len(workers)}.json")])
        assert not ended.value.code
        told = capsys.readouterr().out
        assert ("Simulated 3 s" in told) == (len(workers) == 2)
        assert "Results are identical." in told
    found = json.loads((tmp_path / "2.json").read_text())
    assert found["identical"] is True
    for run in found["runs"].values():
        assert run["spikes"] > 50
        seconds = {row["stage"]: row["s"] for row in run["stages"]}
        assert seconds["all"] >= seconds["detection"] > 0


def test_what_a_gpu_answers_is_kept_by_stage() -> None:
    gpu = importlib.import_module("gpu").Gpu()
    gpu.note(0.5, 10)
    gpu.enter_stage("detection", 0, 9)
    for busy, taken in [(0.25, 30), (0.75, 20)]:
        gpu.note(busy, taken)
    assert gpu.busy == {"before": [0.5], "detection": [0.25, 0.75]}
    assert gpu.taken == {"before": 10, "detection": 30}
