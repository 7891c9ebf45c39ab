"""A run without an engine and a store, for tests of stages: tasks one after the other, files in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ks4stream.blocks import Tiling
from ks4stream.stages.base import Block, Stage


@dataclass
class RunHere:
    """Does what :class:`ks4stream.run.Run` does, and keeps nothing."""

    scratch: Path
    block_batches: int = 1

    def map(self, stage: Stage[Any, Any, Any], items: Sequence[Any]) -> Iterator[Any]:
        return (stage.task(item, self.scratch) for item in items)

    def blocks(self, tiling: Tiling, indices: Sequence[int] | None = None) -> list[Block]:
        return tiling.blocks(self.block_batches, indices)
