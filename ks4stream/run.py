"""One run of the method: where its steps compute, where their results are kept, and how long each took."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ks4stream.blocks import Tiling, tiles_per_task
from ks4stream.engine import Engine, Progress, give_back_memory, gpus, no_progress, resident_bytes, tell
from ks4stream.errors import DamagedFileError
from ks4stream.io.atomic import explain_write_errors
from ks4stream.io.places import place, remove
from ks4stream.io.records import key_of
from ks4stream.io.run_store import Checkpointed, RunStore
from ks4stream.messages import DETAIL
from ks4stream.method import METHOD_VERSION
from ks4stream.stages.base import Block, Item, Part, Result, Stage, Step

logger = logging.getLogger("ks4stream")


@dataclass
class Run:
    """Computes steps, and keeps the results of their tasks.

    Attributes
    ----------
    engine : Engine
    store : RunStore
    sampling_rate_hz : float
    block_batches : int or None
        Batches per task; None chooses.
    clear_cache : bool
        Free the GPU memory that torch keeps, after each step.
    progress : callable
        What is found meanwhile is told to it as well (:func:`~ks4stream.engine.base.tell`).
    seconds : dict of float
        Wall time by step, of all its passes together; the log has each pass.
    recalled : dict of (int, int)
        Numbers of tasks that an earlier run had finished, and of all tasks, by stage, in all passes.
    n_tiles : dict of int
        Number of tiles that this run computed, by stage, in all passes.
    """

    engine: Engine
    store: RunStore
    sampling_rate_hz: float
    block_batches: int | None = None
    clear_cache: bool = False
    progress: Progress = no_progress
    seconds: dict[str, float] = field(default_factory=dict)
    recalled: dict[str, tuple[int, int]] = field(default_factory=dict)
    n_tiles: dict[str, int] = field(default_factory=dict)

    @property
    def scratch(self) -> Path:
        """Folder on this machine for arrays that are mapped into memory."""
        return self.store.scratch

    def do(self, step: Step[Result]) -> Result:
        """Compute a step and return its result."""
        is_here = not isinstance(step, Stage)
        if is_here:
            self.progress(step.name, 0, 1)
        with self._timed(step.name):
            found = step.run(self)
        if is_here:
            self.progress(step.name, 1, 1)
        return found

    def map(self, stage: Stage[Item, Part, Any], items: Sequence[Item]) -> Iterator[Part]:
        """Yield the tasks' results in order: recalled from an earlier run, or computed now and kept in the store."""
        store = self.store.stage(stage.name, key_of(stage, METHOD_VERSION, torch.__version__), stage.records)
        known = store.recall(items)
        before = self.recalled.get(stage.name, (0, 0))
        self.recalled[stage.name] = before[0] + len(known), before[1] + len(items)
        if known:
            logger.info("%s: %d of %d tasks were already finished", stage.name, len(known), len(items))
        missing = [item for index, item in enumerate(items) if index not in known]
        n_tiles = sum(len(item) for item in missing if isinstance(item, tuple))
        self.n_tiles[stage.name] = self.n_tiles.get(stage.name, 0) + n_tiles
        task = Checkpointed(partial(stage.task, folder=store.folder), store)
        found: Counter[str] = Counter()

        def count(*parts: Part) -> None:
            for part in parts:
                found.update(stage.found(part))
            if found:
                tell(self.progress, stage=stage.name, **found)

        share = len(missing) / max(len(items), 1)
        tell(self.progress, stage=stage.name, recording_s=self._recording_s(missing), share=share)
        count(*known.values())
        fresh = self.engine.map(task, missing, stage=stage.name, work=stage.work(missing), arrived=count)
        for index in range(len(items)):
            yield known.pop(index) if index in known else next(fresh)
            logger.log(DETAIL, "%s: task %d of %d has ended", stage.name, index + 1, len(items))
        yield from fresh  # yields nothing more, but runs the generator to its end

    def blocks(self, tiling: Tiling, indices: Sequence[int] | None = None) -> list[Block]:
        """Batches by task; the same on any machine, so that a run finds its blocks again wherever it is resumed."""
        n_tiles = len(tiling) if indices is None else len(indices)
        per_task = self.block_batches or tiles_per_task(tiling, n_tiles, self.sampling_rate_hz)
        return tiling.blocks(per_task, indices)

    def _recording_s(self, items: Sequence[Any]) -> float:
        """Seconds of recording in blocks; regions have none."""
        tiles = (tile for item in items if isinstance(item, tuple) for tile in item)
        return sum(tile.stop - tile.start for tile in tiles) / self.sampling_rate_hz

    def retry_damaged(self, method: Callable[[], Result]) -> Result:
        """Run a method; if a file turns out to be damaged, compute its block again and recall the rest."""
        damaged: set[str] = set()
        while True:
            try:
                return method()
            except DamagedFileError as error:
                if error.path in damaged:  # for the second time: hopeless
                    raise
                damaged.add(error.path)
                logger.warning("%s Its block is computed again.", error)
                with explain_write_errors(self.store.folder):
                    remove(place(error.path))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent_s = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent_s
        give_back_memory()
        if self.clear_cache:
            self.engine.run_on_workers(gpus.clear_cache)
        logger.info("%s: %.2f s", name, spent_s)
        logger.log(DETAIL, "%s: this process uses %.0f MB of memory", name, resident_bytes() / 1e6)
