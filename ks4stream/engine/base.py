"""What every engine promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, tasks done and tasks in all; first with 0 done."""


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

        Parameters
        ----------
        function : callable
            Picklable; it travels to each worker once, with all constants it holds.
        items : sequence
            Small and picklable.
        stage : str
            For progress and error messages.
        priority : sequence of float, optional
            Items with larger numbers are begun first.
        """
        ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums are then taken in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
