"""What a stage is: one object that knows what it reads, what it computes where, and what that needs.

A :class:`Step` runs in the calling process and finds one thing. A :class:`Stage` is a step whose work is cut into
*tasks*, which run wherever the engine puts them: :meth:`Stage.items` says over what, :meth:`Stage.task` is one of them,
:meth:`Stage.combine` makes one result of theirs. A stage is a frozen dataclass whose fields are all that its tasks
depend on: it travels to the workers, and the key under which what its tasks found is kept is the hash of its fields.
Of the settings it holds those that it declares and no others, so that nothing can be read which the key does not know.
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
"""Consecutive tiles that one task computes."""


class Run(Protocol):
    """What a stage may ask of the run that it is part of."""

    @property
    def scratch(self) -> Path:
        """Folder on this machine for what is mapped into memory."""
        ...

    def map(self, stage: Stage[Item, Part, Any], items: Sequence[Item]) -> Iterator[Part]:
        """Yield what ``stage.task`` finds for each of the items, in their order; what is known is not computed."""
        ...

    def blocks(self, tiling: Tiling, indices: Sequence[int] | None = None) -> list[Block]:
        """Cut the tiles, or those at `indices`, into blocks."""
        ...


class Portable:
    """A dataclass that travels without what it made of its fields (``functools.cached_property``)."""

    def __getstate__(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Step(Portable, Generic[Result]):
    """One line of the method.

    Attributes
    ----------
    name : str
        For progress, logs and the table of times.
    reads : tuple of str
        The settings that it reads, by their own names or those of their groups.
    settings : Settings
        These settings; any other raises an AttributeError.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()

    settings: Settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.part(*self.reads))

    def run(self, run: Run) -> Result:
        """Find what the step is for."""
        raise NotImplementedError

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """What it takes of memory and disk."""
        return Needs(cls.name)


@dataclass(frozen=True, eq=False)
class Stage(Step[Result], Generic[Item, Part, Result]):
    """A step whose work is done by tasks.

    Attributes
    ----------
    records : tuple of type
        Classes that a task's result is made of, besides arrays, plain values and receipts.
    """

    records: ClassVar[tuple[type, ...]] = ()

    def items(self, run: Run) -> Sequence[Item]:
        """What the tasks are for: blocks of tiles or numbers of regions."""
        raise NotImplementedError

    def work(self, items: Sequence[Item]) -> Sequence[float]:
        """How much each task has to do: the largest are begun first. Empty where they are begun in order."""
        return ()

    def task(self, item: Item, folder: Place) -> Part:
        """Compute one item; whatever it writes goes into `folder`."""
        raise NotImplementedError

    def combine(self, parts: Iterable[Part], run: Run) -> Result:
        """Make one result of what the tasks found, which comes in the order of the items."""
        raise NotImplementedError

    def run(self, run: Run) -> Result:
        """Compute all items and combine them."""
        return self.combine(run.map(self, self.items(run)), run)
