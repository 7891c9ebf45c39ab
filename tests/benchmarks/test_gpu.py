"""What a GPU does during a sort, at toy size, and with none."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from seen_gpus import see_gpus

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{Path(ks4stream.__file__).parents[1]}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")  # three seconds have few spikes
def test_a_recording_is_written_once_and_sorted_by_each_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("gpu")
    settings = [f"--set={pair}" for pair in ("nblocks=0", "Th_universal=9", "Th_learned=8")]

    def told(*workers: str) -> str:
        arguments = ["--minutes", "0.05", "--channels", "12", "--folder", str(tmp_path), *settings]
        with pytest.raises(SystemExit) as ended:
            module.main([*arguments, "--workers", *workers, "--out", str(tmp_path / f"{len(workers)}.json")])
        assert not ended.value.code
        return capsys.readouterr().out

    first = told("1", "2")
    assert "Simulated 3 s" in first and "Results are identical." in first
    runs = json.loads((tmp_path / "2.json").read_text())["runs"]
    monkeypatch.setattr(module, "measure", lambda *_: runs["1"])  # how it is sorted was seen
    second = told("1")
    assert "Simulated" not in second and "Results" not in second
    assert runs.keys() == {"1", "2"}
    for run in runs.values():
        assert run["spikes"] > 50
        seconds = {row["stage"]: row["s"] for row in run["stages"]}
        assert seconds["all"] >= seconds["detection"] > 0


def test_it_fails_where_results_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("gpu")
    run = {"wall_s": 1.0, "spikes": 5, "units": 1, "stages": [{"stage": "all", "s": 1.0}]}
    monkeypatch.setattr(module, "written", lambda *_: None)
    monkeypatch.setattr(module, "measure", lambda _, __, n_workers: run | {"digests": {"sample": n_workers}})
    with pytest.raises(SystemExit) as ended:
        module.main(["--folder", str(tmp_path), "--workers", "1", "2"])
    assert ended.value.code
    assert "RESULTS DIFFER." in capsys.readouterr().out


def test_what_gpus_answer_is_kept_by_stage() -> None:
    gpus = importlib.import_module("gpu").Gpus()
    gpus.note([0.5], [10])
    gpus.enter_stage("detection", 0, 9)
    for busy, taken in [([0.0, 0.5], [30, 5]), ([0.5, 1.0], [10, 20])]:
        gpus.note(busy, taken)
    assert gpus.busy == {"before": [0.5], "detection": [0.25, 0.75]}
    assert gpus.taken == {"before": 10, "detection": 30}


def test_gpus_are_watched_by_their_names_until_asking_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names NVML knows them by: their numbers are others than CUDA's."""
    module, answers, asked = importlib.import_module("gpu"), iter([20, 40, 60, 80]), threading.Event()

    def rates(name: str) -> Any:
        for answer in answers:
            return SimpleNamespace(gpu=answer)
        asked.set()
        raise OSError("NVML: GPU is lost")

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUtilizationRates=rates,
        nvmlDeviceGetMemoryInfo=lambda name: SimpleNamespace(used={"GPU-GPU-0": 5, "GPU-GPU-1": 7}[name]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    see_gpus(monkeypatch, 80, 80)
    with pytest.raises(OSError, match="GPU is lost"), module.watched_gpus() as watched:
        assert asked.wait(300)
    assert watched.busy == {"before": pytest.approx([0.3, 0.7])}
    assert watched.taken == {"before": 7}
