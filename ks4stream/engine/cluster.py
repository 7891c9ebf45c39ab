"""The same work on Dask's distributed scheduler, with a bounded number of tasks in flight."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from distributed import Client, LocalCluster, as_completed

from ks4stream.engine.base import Item, Progress, Result, no_progress, one_thread

IN_FLIGHT_PER_WORKER = 3  # keeps workers busy while results travel; more would only hold memory
WORKER_MEMORY_BYTES = 3 << 30  # what one worker needs of the machine's memory for itself, torch included


class Cluster:
    """Runs tasks on the workers of a client."""

    def __init__(self, client: Client, progress: Progress | None = None) -> None:
        self._client = client
        self._progress = progress or no_progress

    @property
    def n_workers(self) -> int:
        """Threads of all workers."""
        return max(sum(self._client.nthreads().values()), 1)

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, stage: str, priority: Sequence[float] = ()
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in order; see :class:`~ks4stream.engine.base.Engine`.

        Results that arrive early are held until their turn. Where there are no priorities items are begun in
        order, so at most the window of results is held; with priorities (regions) all of them may be.
        """
        self._progress(stage, 0, len(items))
        constants = self._client.scatter(function, broadcast=True, hash=False)
        begin = sorted(range(len(items)), key=lambda i: -priority[i]) if len(priority) else list(range(len(items)))
        waiting, done, early, turn = iter(begin), 0, {}, 0
        running = as_completed(with_results=True, raise_errors=True)
        index_of: dict[str, int] = {}

        def submit_next() -> None:
            index = next(waiting, None)
            if index is not None:
                future = self._client.submit(_run, constants, items[index], pure=False, key=f"{stage}-{index}-{id(early)}")
                index_of[future.key] = index
                running.add(future)

        for _ in range(IN_FLIGHT_PER_WORKER * self.n_workers):
            submit_next()
        try:
            for future, result in running:
                early[index_of.pop(future.key)] = result
                future.release()
                done += 1
                self._progress(stage, done, len(items))
                while turn in early:
                    yield early.pop(turn)
                    turn += 1
                if len(early) <= IN_FLIGHT_PER_WORKER * self.n_workers or len(priority):
                    submit_next()
                while not index_of and turn < len(items):
                    submit_next()
        finally:
            running.clear()


def _run(function: Callable[[Any], Any], item: Any) -> Any:
    with one_thread():
        return function(item)


@contextmanager
def local_client(*, n_workers: int | None = None, processes: bool | None = None) -> Iterator[Client]:
    """A cluster of this machine for the duration of one sort.

    One worker per visible GPU; without a GPU one per core, as far as memory reaches. Workers are threads of
    this process on a machine without several GPUs: torch computes without Python's lock, and nothing has to be
    started or copied.
    """
    n_gpus = torch.cuda.device_count()
    if n_workers is None:
        n_workers = n_gpus or max(1, min(len(os.sched_getaffinity(0)), _memory_bytes() // WORKER_MEMORY_BYTES))
    quiet = logging.getLogger("distributed").level
    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=n_gpus > 1 if processes is None else processes,
            dashboard_address=None, silence_logs=logging.ERROR, memory_limit=0,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        try:
            yield client
        finally:
            logging.getLogger("distributed").setLevel(quiet)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
