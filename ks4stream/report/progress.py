"""Progress display: one bar per stage with the time left, or one line per finished stage.

Both are what :func:`ks4stream.sorter.sort` calls as ``progress(stage, done, total)``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from ks4stream.engine import Progress

__all__ = ["shown_progress"]


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """Show the progress of a sort on a console.

    Parameters
    ----------
    console : rich.console.Console
        On a terminal, one bar per stage; in a file or a batch job's log, one line when a stage ends.

    Yields
    ------
    callable
        To be called as ``progress(stage, done, total)``. A stage that starts over gets a new bar.
    """
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:>4.0f} of {task.total:.0f}"),
        _TimeLeft(),
    )
    with ProgressBars(*columns, console=console, refresh_per_second=4) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar per stage."""

    def __init__(self, bars: ProgressBars) -> None:
        self._bars = bars
        self._current: tuple[str, TaskID] | None = None
        self._began = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._current is None or self._current[0] != stage or done == 0:
            self._current = stage, self._bars.add_task(stage, total=total, ends=None)
            self._began = time.monotonic()
        ends = None
        if done:
            ends = self._began + (time.monotonic() - self._began) * total / done
        self._bars.update(self._current[1], completed=done, ends=ends)


class _TimeLeft(ProgressColumn):
    """Time left, from the mean time per task so far; for a finished stage, the time it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(_duration(task.finished_time or 0.0), style="green")
        ends = task.fields["ends"]
        if ends is None:
            return Text("")
        return Text(f"{_duration(max(ends - time.monotonic(), 1.0))} left", style="cyan")


class _Lines:
    """A line for each stage that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self._began = time.monotonic()
        if done == total:
            took = _duration(time.monotonic() - self._began)
            self._console.print(f"{stage}: {total} task{'s' * (total != 1)} in {took}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """Format a duration for people.

    >>> [_duration(seconds) for seconds in (3.21, 75, 7500)]
    ['3.2 s', '1 min 15 s', '2 h 05 min']
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
