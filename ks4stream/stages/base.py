"""The base classes of stages: each is one object that declares what it reads, what it computes and what it needs.

A :class:`Step` runs in the calling process and has one result. A :class:`Stage` is a step whose work is divided into
*tasks*, which run wherever the engine places them: :meth:`Stage.items` lists what the tasks are for,
:meth:`Stage.task` computes one of them, and :meth:`Stage.combine` makes one result of theirs. A stage is a frozen
dataclass. Its fields are everything its tasks depend on: it is sent to the workers, and the hash of its fields is the
key under which the results of its tasks are stored. It holds only the settings that it declares, so that a task cannot
read a setting that is not part of the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ks4stream.blocks import Tile, Tiling
from ks4stream.io.places import Place
from ks4stream.settings import Settings
from ks4stream.stages.needs import Load, Needs

Item = TypeVar("Item")
Part = TypeVar("Part")
Result = TypeVar("Result")

Block = tuple[Tile, ...]
"""Consecutive tiles that are processed by one task."""


class Run(Protocol):
    """What a stage can use of the run that it is part of."""

    @property
    def scratch(self) -> Path:
        """Folder on this machine for memory-mapped files."""
        ...

    def map(self, stage: Stage[Item, Part, Any], items: Sequence[Item]) -> Iterator[Part]:
        """Yield the results of ``stage.task`` for the items, in order; stored results are not computed again."""
        ...

    def blocks(self, tiling: Tiling, indices: Sequence[int] | None = None) -> list[Block]:
        """Group the tiles, or those at `indices`, into blocks."""
        ...


class Portable:
    """A dataclass that is pickled without the values derived from its fields (``functools.cached_property``)."""

    def __getstate__(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Step(Portable, Generic[Result]):
    """One step of the method.

    Attributes
    ----------
    name : str
        In lower-case words; for progress, logs, the table of times and the folder of a stage's records.
    reads : tuple of str
        Names of the settings, or of groups of settings, that it reads.
    settings : Settings
        These settings; reading any other raises an AttributeError.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()

    settings: Settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.part(*self.reads))

    def run(self, run: Run) -> Result:
        """Compute the result of the step."""
        raise NotImplementedError

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """Memory and disk that the step needs."""
        return Needs(cls.name)


@dataclass(frozen=True, eq=False)
class Stage(Step[Result], Generic[Item, Part, Result]):
    """A step whose work is done by tasks.

    Attributes
    ----------
    records : tuple of type
        Classes that occur in a task's result, apart from arrays, plain values and receipts.
    """

    records: ClassVar[tuple[type, ...]] = ()

    def items(self, run: Run) -> Sequence[Item]:
        """Items of the tasks: blocks of tiles, or region indices."""
        raise NotImplementedError

    def work(self, items: Sequence[Item]) -> Sequence[float]:
        """Amount of work of each task: the largest are started first. Empty if they are started in order."""
        return ()

    def task(self, item: Item, folder: Place) -> Part:
        """Process one item; all files are written to `folder`."""
        raise NotImplementedError

    def found(self, part: Part) -> dict[str, int]:
        """How many ``peaks`` or ``spikes`` a task has found, for those who watch; empty if it looked for none."""
        return {}

    def combine(self, parts: Iterable[Part], run: Run) -> Result:
        """Combine the results of the tasks, which are in the order of the items."""
        raise NotImplementedError

    def run(self, run: Run) -> Result:
        """Process all items and combine the results."""
        return self.combine(run.map(self, self.items(run)), run)
