"""What the benchmark of faults counts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ks4stream.io.run_store import RunStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def double(number: int) -> int:
    return 2 * number


def test_a_task_is_noted_when_it_is_really_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    faults = importlib.import_module("faults")
    task = faults.Watched(double, RunStore(tmp_path / "run").stage("x", "0" * 64))
    assert [task(1), task(2), task(2)] == [2, 4, 4]
    journal = faults.read_journal(tmp_path)
    assert [event for event, _ in journal] == ["begin", "end", "begin", "end", "end"]
    assert faults.computed_again(journal) == 0
    records = sorted((tmp_path / "run").glob("*/*.record.npz"))
    records[0].unlink()
    task(1)
    task(2)
    assert faults.computed_again(faults.read_journal(tmp_path)) == 1


def test_what_should_not_have_happened_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    faults = importlib.import_module("faults")
    fine = dict(
        fault="a bit flips",
        nblocks=0,
        identical=True,
        answers=["done"],
        errors=[],
        again=1,
        damaged=1,
        orphans=0,
        seconds=1.0,
    )
    assert faults.Outcome(**fine).problems() == []
    bad = faults.Outcome(**fine | {"identical": False, "errors": ["oh"], "damaged": 0, "orphans": 2})
    assert len(bad.problems()) == 4
    assert "| a bit flips | 2 | 2 × done | 1 | 1 | 2 | 1 | 2 |" in faults.table([faults.Outcome(**fine), bad])
