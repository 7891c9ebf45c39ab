"""What every engine promises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from ks4stream.errors import Ks4StreamError

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, tasks done and tasks in all; first with 0 done."""


class LostWorkerError(Ks4StreamError, RuntimeError):
    """Workers died again and again while computing, most often for want of memory."""


class Engine(Protocol):
    """Runs a function over items."""

    @property
    def n_workers(self) -> int:
        """Tasks that run at a time."""
        ...

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, stage: str, priority: Sequence[float] = ()
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in the items' order.

        What a task has to say it returns: warnings it raises stay in the process it runs in.

        Parameters
        ----------
        function : callable
            Picklable; it travels to each worker once, with all constants it holds.
        items : sequence
            Small and picklable.
        stage : str
            For progress and error messages.
        priority : sequence of float, optional
            Items with larger numbers are begun first. All results may then be held until the last is there.

        Raises
        ------
        Exception
            What the first failing task raised, with a note that names the stage; tasks not begun are dropped.
        """
        ...


_threads_lock = threading.Lock()
_threads_inside, _threads_before = 0, 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums are then taken in one order, whatever the machine.

    The number belongs to the process: of the tasks that run at a time in it, the first to come sets it and the
    last to go resets it.
    """
    global _threads_inside, _threads_before
    with _threads_lock:
        if _threads_inside == 0:
            _threads_before = torch.get_num_threads()
        _threads_inside += 1
        torch.set_num_threads(1)  # by every one: part of the setting belongs to the thread
    try:
        yield
    finally:
        with _threads_lock:
            _threads_inside -= 1
            if _threads_inside == 0:
                torch.set_num_threads(_threads_before)


@contextmanager
def named(stage: str, index: int, total: int) -> Iterator[None]:
    """Add to an error raised inside which task it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised in stage {stage!r}, task {index + 1} of {total}.")
        raise


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
