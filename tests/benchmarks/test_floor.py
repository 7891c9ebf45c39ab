"""The detection pass against its floor, at toy size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")  # eight seconds have few spikes
def test_every_step_of_the_pass_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(Path(ks4stream.__file__).parents[1]))
    floor = importlib.import_module("floor")
    floor.main(["static", "--seconds", "8", "--tiles", "1", "--repetitions", "1"])
    lines = capsys.readouterr().out.splitlines()
    steps = {line[:22].strip(): line[22:].split() for line in lines if line[22:].strip()}
    for label in {label for label, _, _ in floor.STEPS} - {"features"}:  # of few peaks they may take no time at all
        assert float(steps[label][0]) > 0, label
    for label in ("filter", "whiten", "convolve"):
        assert float(steps[label][1]) > 0, label
    assert any(line.startswith("ratio ") for line in lines)
