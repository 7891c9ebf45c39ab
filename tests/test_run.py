"""A run computes steps and knows how long they took."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ks4stream import run as run_module
from ks4stream.engine import Loop
from ks4stream.io.run_store import RunStore
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.stages.base import Run as RunOfStage
from ks4stream.stages.base import Step


class Quick(Step[int]):
    """A step with a result."""

    name = "quick"

    def run(self, run: RunOfStage) -> int:
        return 7


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
