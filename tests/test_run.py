"""A run computes steps and knows how long they took."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ks4stream import run as run_module
from ks4stream.engine import Loop
from ks4stream.io.places import Place
from ks4stream.io.run_store import RunStore
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.stages.base import Run as RunOfStage
from ks4stream.stages.base import Stage, Step


class Quick(Step[int]):
    """A step with a result."""

    name = "quick"

    def run(self, run: RunOfStage) -> int:
        return 7


class Finds(Stage[int, int, int]):
    """Finds as many spikes as each item says."""

    name = "finds"

    def items(self, run: RunOfStage) -> Sequence[int]:
        return [1, 2, 3]

    def task(self, item: int, folder: Place) -> int:
        return item

    def found(self, part: int) -> dict[str, int]:
        return {"spikes": part}

    def combine(self, parts: Iterable[int], run: RunOfStage) -> int:
        return sum(parts)


class Display:
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.shares: list[float] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.told.append((done, total))

    def note(self, **facts: Any) -> None:
        self.told += [facts["spikes"]] if "spikes" in facts else []
        self.shares += [facts["share"]] if "share" in facts else []


def test_what_is_found_is_told_before_the_task_counts_and_what_was_found_earlier_at_once(tmp_path: Path) -> None:
    store, told = RunStore(tmp_path), []
    for _ in range(2):
        display = Display()
        assert Run(Loop(display), store, 30_000.0, progress=display).do(Finds(Settings())) == 6
        told.append(display.told)
    assert told == [[(0, 3), 1, (1, 3), 3, (2, 3), 6, (3, 3)], [6, (0, 0)]]


def test_a_display_is_told_which_part_of_a_stage_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, display = RunStore(tmp_path), Display()
    for items in ([1], [1, 2, 3], [1, 2, 3]):
        monkeypatch.setattr(Finds, "items", lambda *_, items=items: items)
        Run(Loop(), store, 30_000.0, progress=display).do(Finds(Settings()))
    assert display.shares == [1.0, pytest.approx(2 / 3), 0.0]


def test_a_display_need_not_take_facts(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))

    assert Run(Loop(progress), RunStore(tmp_path), 30_000.0, progress=progress).do(Finds(Settings())) == 6
    assert calls == [("finds", done, 3) for done in range(4)]


def test_a_step_that_comes_twice_is_logged_with_the_time_of_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([10.0, 13.0, 100.0, 101.0])
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(clock))
    run = Run(Loop(), RunStore(tmp_path), 30_000.0)
    with caplog.at_level(logging.INFO, "ks4stream"):
        assert [run.do(Quick(Settings())) for _ in range(2)] == [7, 7]
    assert caplog.messages == ["quick: 3.00 s", "quick: 1.00 s"]
    assert run.seconds == {"quick": 4.0}


@pytest.mark.parametrize("is_wanted", [False, True])
def test_memory_of_gpus_is_freed_after_each_step_if_that_is_wanted(
    is_wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    run = Run(Loop(), RunStore(tmp_path), 30_000.0, clear_cache=is_wanted)
    for _ in range(2):
        run.do(Quick(Settings()))
    assert len(freed) == 2 * is_wanted
