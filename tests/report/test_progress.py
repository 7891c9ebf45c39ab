"""Progress: bars with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import doctest
import io

from rich.console import Console

from ks4stream.report import progress
from ks4stream.report.progress import shown_progress

STAGES = [("waveforms", 2), ("detection", 3), ("waveforms", 2), ("empty", 0)]


def show(*, force_terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=force_terminal, width=100, color_system=None)
    with shown_progress(console) as report:
        for stage, total in STAGES:
            for done in range(total + 1):
                report(stage, done, total)
    return text.getvalue()


def test_a_log_gets_one_line_per_finished_stage():
    lines = show(force_terminal=False).splitlines()
    assert [line.partition(" in ")[0] for line in lines] == [f"{stage}: {total} tasks" for stage, total in STAGES]
    assert all(line.endswith(" s") for line in lines)


def test_a_terminal_gets_one_bar_per_stage_a_second_pass_included():
    text = show(force_terminal=True)
    last_frame = text[text.rindex("✓ waveforms", 0, text.rindex("detection")) :]
    assert [line.split()[1] for line in last_frame.splitlines()[:4]] == [stage for stage, _ in STAGES]
    assert last_frame.count("✓") == len(STAGES)


def test_the_time_left_follows_from_the_mean_time_per_task():
    with progress.ProgressBars(console=Console(file=io.StringIO())) as bars:
        report = progress._Bars(bars)
        report("detection", 0, 4)
        (task,) = bars.tasks
        assert progress._TimeLeft().render(task).plain == ""
        report._began -= 30.0
        report("detection", 1, 4)
        assert progress._TimeLeft().render(task).plain == "1 min 30 s left"
        report("detection", 4, 4)
        assert progress._TimeLeft().render(task).plain.endswith(" s")


def test_examples():
    assert doctest.testmod(progress).failed == 0
