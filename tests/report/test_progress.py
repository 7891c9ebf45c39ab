"""What is shown while a sort runs: bars on a terminal, lines in a log, JSON for programs."""

from __future__ import annotations

import doctest
import io
import json
import re
import subprocess
import sys
from typing import Any

import psutil
import pytest
from rich.console import Console
from seen_gpus import see_gpus

from ks4stream.engine import tell
from ks4stream.engine.gpus import Busy
from ks4stream.report import progress
from ks4stream.report.progress import JsonLines, shown_progress

STAGES = [("waveforms", 2), ("detection", 3), ("waveforms", 2), ("empty", 0)]


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "_clock", clock)
    return clock


def a_console(*, force_terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=force_terminal, width=100, color_system=None), text


def show(*, force_terminal: bool) -> str:
    console, text = a_console(force_terminal=force_terminal)
    with shown_progress(console) as report:
        for stage, total in STAGES:
            for done in range(total + 1):
                report(stage, done, total)
    return text.getvalue()


# --- lines --------------------------------------------------------------------------------------------------


def test_a_log_gets_one_line_per_finished_stage() -> None:
    lines = show(force_terminal=False).splitlines()
    ends = [f"{stage}: {f'{total} tasks in' if total else 'nothing left to do,'} " for stage, total in STAGES]
    assert all(line.startswith(end) for line, end in zip(lines, ends, strict=True))
    ending = r" [GM]B of memory( in \d+ processes)?$"  # a worker of an earlier test may not have ended yet
    assert all(re.search(ending, line) for line in lines)


def test_a_long_stage_gets_a_line_each_tenth_but_not_more_often_than_each_30_seconds(clock: Clock) -> None:
    console, text = a_console()
    with shown_progress(console) as report:
        report("matching", 0, 100)
        for done in range(1, 101):  # a tenth takes 20 s, so that 30 s decide
            clock.now = 2.0 * done
            report("matching", done, 100)
    first, *rest = (line.split(", ")[:2] for line in text.getvalue().splitlines())
    assert first == ["matching: 15 of 100", "2 min 50 s left"]
    assert [what for what, _ in rest[:-1]] == [f"matching: {done} of 100" for done in (30, 45, 60, 75, 90)]
    assert rest[-1][0] == "matching: 100 tasks in 3 min 20 s"


def test_where_a_tenth_takes_hours_there_is_a_line_every_ten_minutes(clock: Clock) -> None:
    console, text = a_console()
    with shown_progress(console) as report:
        report("matching", 0, 1000)
        for done in range(1, 40):  # a tenth takes 100 minutes
            clock.now = 60.0 * done
            report("matching", done, 1000)
    said = [line.partition(",")[0] for line in text.getvalue().splitlines()]
    assert said == [f"matching: {done} of 1000" for done in (10, 20, 30)]


def test_lines_have_the_speed_what_was_found_and_where_the_dashboard_is(clock: Clock) -> None:
    console, text = a_console()
    with shown_progress(console) as report:
        tell(report, dashboard="http://[::1]:8787/status", unheard_of=1)
        tell(report, stage="detection", recording_s=120.0)
        report("detection", 0, 2)
        clock.now = 8.0
        tell(report, stage="detection", peaks=1234)
        report("detection", 2, 2)
        report("drift", 0, 1)
        report("drift", 1, 1)
    dashboard, detection, drift = text.getvalue().splitlines()
    assert dashboard == "Dask dashboard: http://[::1]:8787/status"  # which rich would take for markup
    assert detection.startswith("detection: 2 tasks in 8.0 s, 15 × real time, 1,234 peaks, ")
    assert drift.startswith("drift: 1 task in 0.0 s, ") and "peaks" not in drift and "real time" not in drift


def test_a_stage_of_which_nothing_is_left_is_said_to_be_so() -> None:
    console, text = a_console()
    with shown_progress(console) as report:
        report("whitening", 0, 0)
    assert text.getvalue().startswith("whitening: nothing left to do, ")


# --- bars ---------------------------------------------------------------------------------------------------


def test_a_terminal_gets_one_bar_per_stage_a_second_pass_included() -> None:
    text = show(force_terminal=True)
    last_frame = text[text.rindex("✓ waveforms", 0, text.rindex("detection")) :]
    *rows, _ = last_frame.splitlines()[:5]
    assert [line.split()[1] for line in rows] == [stage for stage, _ in STAGES]
    assert last_frame.count("✓") == len(STAGES)


def test_below_the_bars_is_one_line_with_everything_else(clock: Clock) -> None:
    console, text = a_console(force_terminal=True)
    with shown_progress(console) as report:
        tell(report, dashboard="http://10.0.0.1:8787/status")
        tell(report, stage="matching", recording_s=120.0)
        report("matching", 0, 2)
        clock.now = 40.0
        tell(report, stage="matching", spikes=7_000)
        report("matching", 1, 2)
    bar, below = (line.split() for line in text.getvalue().splitlines()[-3:-1])  # the last shows the cursor again
    assert bar[1] == "matching" and bar[-6:] == ["1", "of", "2", "40", "s", "left"]
    words = " ".join(below)
    assert words.startswith("1.5 × real time · 7,000 spikes · ")
    assert "GB of memory" in words and words.endswith(" · http://10.0.0.1:8787/status")


def test_the_time_left_follows_from_the_mean_time_per_task_and_is_counted_down(clock: Clock) -> None:
    watch = progress._Bars()
    watch.bars = progress.ProgressBars(console=a_console()[0])
    watch("detection", 0, 4)
    (task,) = watch.bars.tasks
    assert progress._TimeLeft().render(task).plain == ""
    clock.now = 30.0
    watch("detection", 1, 4)
    assert progress._TimeLeft().render(task).plain == "1 min 30 s left"
    clock.now = 50.0
    assert progress._TimeLeft().render(task).plain == "1 min 10 s left"
    watch("detection", 4, 4)
    assert progress._TimeLeft().render(task).plain.endswith(" s")


def test_before_a_task_has_ended_the_time_left_is_what_was_expected(clock: Clock) -> None:
    watch = JsonLines(lambda _: None)
    tell(watch, expected_s={"matching": 60.0})
    watch("detection", 0, 2)
    assert watch.left_s is None
    watch("matching", 0, 2)
    clock.now = 20.0
    assert watch.left_s == 40.0
    watch("matching", 1, 2)
    assert watch.left_s == 20.0


def test_what_an_earlier_run_finished_is_not_expected_again(clock: Clock) -> None:
    watch = JsonLines(lambda _: None)
    tell(watch, expected_s={"matching": 60.0})
    tell(watch, stage="matching", share=0.25)
    watch("matching", 0, 5)
    assert watch.left_s == 15.0


def test_a_notebook_without_ipywidgets_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as kernels do
    with shown_progress(Console(force_jupyter=True)) as report:
        report("matching", 0, 1)
        report("matching", 1, 1)
    hint, line = capsys.readouterr().err.splitlines()
    assert "ipywidgets" in hint and line.startswith("matching: 1 task in ") and "\x1b" not in line


# --- JSON ---------------------------------------------------------------------------------------------------


def test_a_program_gets_an_object_per_line_at_most_one_per_second_and_the_ends(clock: Clock) -> None:
    lines: list[str] = []
    report = JsonLines(lines.append)
    tell(report, stage="matching", recording_s=90.0)
    report("matching", 0, 9)
    for done in range(1, 10):
        clock.now = 0.3 * done
        tell(report, stage="matching", spikes=100 * done)
        report("matching", done, 9)
    events = [json.loads(line) for line in lines]
    assert all("\n" not in line for line in lines)
    assert [event["done"] for event in events] == [0, 4, 8, 9]
    assert {event["event"] for event in events} == {"stage"}
    assert [event["spikes"] for event in events] == [None, 400, 800, 900]
    assert [event["left_s"] for event in events] == [None, 1.5, 0.3, 0.0]
    assert events[1]["elapsed_s"] == 1.2 and events[1]["times_real_time"] == pytest.approx(33.333)
    assert events[1]["peaks"] is None and events[1]["dashboard"] is None
    assert events[1]["memory_bytes"] > 10e6 and events[1]["gpu_percent"] is None


def test_a_program_gets_no_stage_of_which_nothing_is_left(clock: Clock) -> None:
    lines: list[str] = []
    report = JsonLines(lines.append)
    report("detection", 0, 0)
    report("matching", 0, 1)
    assert [json.loads(line)["stage"] for line in lines] == ["matching"]


# --- memory and GPUs ----------------------------------------------------------------------------------------


def test_memory_is_that_of_all_processes_and_measured_every_two_seconds(clock: Clock) -> None:
    watch = JsonLines(lambda _: None)
    alone = watch.measured()
    command = [sys.executable, "-c", "held = b'x' * 200_000_000; print(); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()  # now it holds them
        clock.now = 1.9
        assert watch.measured() == alone
        clock.now = 2.0
        both = watch.measured()
        child.communicate(b"\n")
    assert both["processes"] == alone["processes"] + 1
    assert both["memory_bytes"] > alone["memory_bytes"] + 150_000_000


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), PermissionError(13, "Permission denied", "/proc/1/stat")])
def test_a_system_that_hides_processes_does_not_end_a_sort(
    error: Exception, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, "children", refuse)
    lines: list[str] = []
    JsonLines(lines.append)("matching", 0, 2)
    event = json.loads(lines[0])
    assert event["memory_bytes"] is None and event["processes"] is None
    console, text = a_console()
    with shown_progress(console) as report:
        report("matching", 0, 1)
        report("matching", 1, 1)
    assert text.getvalue() == "matching: 1 task in 0.0 s\n"


def test_gpus_are_shown_where_this_machine_computes_on_them(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    see_gpus(monkeypatch, 10)
    monkeypatch.setattr(progress.gpus, "busy", lambda device: Busy(3 * 10**9, 87.0) if device == "cuda" else None)
    watch = JsonLines(lambda _: None)
    assert not any("GPU" in phrase for phrase in watch.phrases(here=True))
    tell(watch, device="cuda")
    clock.now = 5.0
    assert watch.phrases(here=True)[-1] == "GPU at 87 % with 3.0 GB"
    assert watch.measured()["gpu_percent"] == 87.0


def test_examples() -> None:
    assert doctest.testmod(progress).failed == 0
