"""What is shown while a sort runs: bars on a terminal or in a notebook, lines in a log, or JSON for programs.

Each display is what :func:`ks4stream.sorter.sort` calls as ``progress(stage, done, total)``. It has a method ``note``
that tells it what else is known (:func:`ks4stream.engine.base.tell`). Displays inherit from :class:`Watch`, which
computes what follows from that: the time left, the speed, and the memory in use.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from ks4stream.engine import Progress, gpus

__all__ = ["JsonLines", "shown_progress"]

LINE_S = 30.0  # at least, between two lines of a stage that is not finished
LINE_SHARE = 0.1  # of its tasks that have ended in between,
SILENCE_S = 600.0  # unless there was no line for so long
EVENT_S = 1.0  # between two events of a stage that is not finished
MEASURE_S = 2.0  # between two measurements of memory and load: each looks at all processes of the machine

_clock = time.monotonic


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Progress]:
    """Show the progress of a sort to people.

    Parameters
    ----------
    console : rich.console.Console, optional
        On a terminal, or in a notebook with ipywidgets, one bar per stage and a line with the speed, the spikes, memory
        and GPUs. In a file or a batch job's log, a line when a stage ends, and some on its way if it is long. By
        default stderr.

    Yields
    ------
    callable
        To be called as ``progress(stage, done, total)``. A stage that starts over gets a new bar.
    """
    console = console or Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        console = Console(file=sys.stderr, force_jupyter=False, force_terminal=False)
        console.print("Install ipywidgets to see progress bars in notebooks.")
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(console)
        return
    watch = _Bars()
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:>4.0f} of {task.total:.0f}"),
        _TimeLeft(),
    )
    with _Rows(*columns, watch=watch, console=console, refresh_per_second=4) as watch.bars:
        yield watch


class Watch:
    """What is known of a sort while it runs.

    Attributes
    ----------
    stage : str
        The present stage; empty before the first.
    done, total : int
        Tasks of the stage that have ended, and all of them.
    peaks, spikes : int or None
        How many were found so far: peaks by detection, in its latest pass, and spikes by matching.
    dashboard : str or None
    """

    def __init__(self) -> None:
        self.stage, self.done, self.total = "", 0, 0
        self.peaks: int | None = None
        self.spikes: int | None = None
        self.dashboard: str | None = None
        self._began = self._ended = _clock()  # the stage, and the latest task
        self._counted = ("", "")  # the stage that told the latest number of peaks or spikes, and the number in words
        self._recording_s: dict[str, float] = {}
        self._expected_s: dict[str, float] = {}
        self._share: dict[str, float] = {}  # of the tasks of a stage, which are to be computed
        self._device = "cpu"
        self._measured: tuple[float, dict[str, Any]] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage is, and show it."""
        is_new = stage != self.stage or done == 0
        self._ended = _clock()
        if is_new:
            self._began = self._ended
        self.stage, self.done, self.total = stage, done, total
        self.show(is_new)

    def note(
        self,
        *,
        stage: str = "",
        recording_s: float | None = None,
        peaks: int | None = None,
        spikes: int | None = None,
        device: str | None = None,
        dashboard: str | None = None,
        expected_s: Mapping[str, float] | None = None,
        share: float | None = None,
        **_: Any,
    ) -> None:
        """Note other facts; they are shown the next time."""
        if recording_s is not None:
            self._recording_s[stage] = recording_s
        if peaks is not None:
            self.peaks, self._counted = peaks, (stage, f"{peaks:,} peaks")
        if spikes is not None:
            self.spikes, self._counted = spikes, (stage, f"{spikes:,} spikes")
        self._device = device or self._device
        self.dashboard = dashboard or self.dashboard
        self._expected_s |= expected_s or {}
        if share is not None:
            self._share[stage] = share

    def show(self, is_new: bool) -> None:
        """Show what is known; called at the beginning of a stage and whenever tasks have ended."""
        raise NotImplementedError

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return _clock() - self._began

    @property
    def left_s(self) -> float | None:
        """Seconds until the stage ends, from the mean time per task; before one has ended, from what was expected."""
        if self.done >= self.total:
            return 0.0
        if self.done:
            return max((self._ended - self._began) * self.total / self.done - self.elapsed_s, 0.0)
        expected = self._expected_s.get(self.stage)
        return None if expected is None else max(expected * self._share.get(self.stage, 1.0) - self.elapsed_s, 0.0)

    @property
    def times_real_time(self) -> float | None:
        """Seconds of recording per second, if the stage goes through the recording and a task has ended."""
        recording_s, took = self._recording_s.get(self.stage, 0.0), self._ended - self._began
        return recording_s * self.done / self.total / took if recording_s and self.done and took > 0 else None

    def measured(self) -> dict[str, Any]:
        """Memory of this process and those that it started, and the load of its GPUs; measured now and then.

        What the system does not tell is None. Pages that processes share, mostly libraries, count in each.
        """
        if self._measured is None or _clock() - self._measured[0] >= MEASURE_S:
            sizes, busy = _memory_of_processes(), gpus.busy(self._device)
            facts = {
                "memory_bytes": sizes and sum(sizes),
                "processes": sizes and len(sizes),
                "gpu_memory_bytes": busy and busy.n_bytes,
                "gpu_percent": busy and busy.percent,
            }
            self._measured = _clock(), facts
        return self._measured[1]

    def phrases(self, *, here: bool) -> list[str]:
        """What is known beside the tasks, in words. If `here`, peaks and spikes only if this stage has found them."""
        rate, now = self.times_real_time, self.measured()
        found = [f"{rate:.{0 if rate >= 10 else 1}f} × real time"] if rate else []
        by, number = self._counted
        if number and (not here or by == self.stage):
            found.append(number)
        if n := now["processes"]:
            found.append(f"{_size(now['memory_bytes'])} of memory" + f" in {n} processes" * (n > 1))
        if now["gpu_memory_bytes"] is not None:
            load = "" if now["gpu_percent"] is None else f" at {now['gpu_percent']:.0f} %"
            found.append(f"GPU{load} with {_size(now['gpu_memory_bytes'])}")
        return found


class _Rows(ProgressBars):
    """Bars, and a line below them."""

    def __init__(self, *columns: ProgressColumn, watch: Watch, **options: Any) -> None:
        self._watch = watch
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The parts of the display; rich calls this."""
        yield self.make_tasks_table(self.tasks)
        if self._watch.stage:
            dashboard = [self._watch.dashboard] if self._watch.dashboard else []
            yield Text("  " + " · ".join([*self._watch.phrases(here=False), *dashboard]), style="dim")


class _Bars(Watch):
    """One bar per stage."""

    bars: ProgressBars

    def __init__(self) -> None:
        super().__init__()
        self._current: TaskID | None = None

    def show(self, is_new: bool) -> None:
        """Move the stage's bar, or begin a new one."""
        if self._current is None or is_new:
            if self._current is not None:
                self.bars.update(self._current, watch=None)
            self._current = self.bars.add_task(self.stage, total=self.total, watch=self)
        self.bars.update(self._current, completed=self.done)


class _TimeLeft(ProgressColumn):
    """Time left, counted down; for a finished stage, the time it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(_duration(task.finished_time or 0.0), style="green")
        watch = task.fields["watch"]
        left = watch and watch.left_s
        return Text("" if left is None else f"{_duration(max(left, 1.0))} left", style="cyan")


class _Lines(Watch):
    """A line for each stage that is done, and some on its way if it is long."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._said = (0.0, 0)  # when the latest line was printed, and how many tasks had ended
        self._said_dashboard: str | None = None

    def show(self, is_new: bool) -> None:
        """Print a line if there is something new to say."""
        if self.dashboard != self._said_dashboard:
            self._said_dashboard = self.dashboard
            self._say(f"Dask dashboard: {self.dashboard}")
        if is_new:
            self._said = self._began, 0
        if self.done == self.total:
            done = f"{self.total} task{'s' * (self.total != 1)} in {_duration(self.elapsed_s)}"
            what = f"{self.stage}: {done if self.total else 'nothing left to do'}"
            self._say(", ".join([what, *self.phrases(here=True)]))
        elif self._is_due():
            self._said = _clock(), self.done
            left = f"{_duration(max(self.left_s or 0.0, 1.0))} left"
            self._say(", ".join([f"{self.stage}: {self.done} of {self.total}", left, *self.phrases(here=True)]))

    def _is_due(self) -> bool:
        silent_s, done = _clock() - self._said[0], self.done - self._said[1]
        return done > 0 and (silent_s >= SILENCE_S or (silent_s >= LINE_S and done >= LINE_SHARE * self.total))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class JsonLines(Watch):
    """One JSON object per line, for programs; ``docs/clusters.md`` lists the fields.

    Parameters
    ----------
    write : callable
        Called with each line, without its end. If it raises an OSError, nothing is written from then on.

    Attributes
    ----------
    is_lost : bool
        Whether that has happened.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self._write = write
        self._sent = 0.0
        self.is_lost = False

    def event(self, event: str, **fields: Any) -> None:
        """Write an event with its fields, which JSON must know."""
        if self.is_lost:
            return
        try:
            self._write(json.dumps({"event": event, "time_s": round(time.time(), 3), **fields}))
        except OSError as error:  # whoever read them is gone, which must not end a sort
            self.is_lost = True
            with suppress(OSError):
                print(f"Note: Progress cannot be written any more ({error}). The sort goes on.", file=sys.stderr)

    def show(self, is_new: bool) -> None:
        """Write where the stage is, unless that was done just now, or nothing of it is left to compute."""
        if self.total == 0:  # by which a program may divide
            return
        if not is_new and self.done < self.total and _clock() - self._sent < EVENT_S:
            return
        self._sent = _clock()
        left, rate = self.left_s, self.times_real_time
        self.event(
            "stage",
            stage=self.stage,
            done=self.done,
            total=self.total,
            elapsed_s=round(self.elapsed_s, 2),
            left_s=None if left is None else round(left, 2),
            times_real_time=None if rate is None else round(rate, 3),
            peaks=self.peaks,
            spikes=self.spikes,
            **self.measured(),
            dashboard=self.dashboard,
        )


def _memory_of_processes() -> list[int] | None:
    """Bytes of this process and of each that it started; None if the system hides processes of other users."""
    sizes = []
    try:
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            try:
                sizes.append(process.memory_info().rss)
            except psutil.Error:  # it has ended
                continue
    except (psutil.Error, OSError):
        return None
    return sizes


def _size(n_bytes: float) -> str:
    """Format a size for people.

    >>> [_size(n_bytes) for n_bytes in (250e6, 12.34e9)]
    ['0.2 GB', '12.3 GB']
    """
    return f"{n_bytes / 1e9:.1f} GB"


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
