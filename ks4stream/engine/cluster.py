"""The same work on Dask's distributed scheduler, with a bounded number of tasks in flight."""

# mypy: disable-error-code="no-untyped-call"
# (half of distributed's interface carries no types)

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster, Nanny, Scheduler, SpecCluster, as_completed, wait
from distributed.system import MEMORY_LIMIT

from ks4stream.engine.base import Item, LostWorkerError, Progress, Result, named, no_progress, one_thread

IN_FLIGHT_PER_WORKER = 3  # keeps workers busy while results travel; more would only hold memory
WORKER_MEMORY_BYTES = 3 << 30  # what one worker needs of the machine's memory for itself, torch included
MOST_LOSSES = 3  # times that all workers may die under one map, as scheduler.allowed-failures does for one task
RESTART_SECONDS = 120  # that a dead worker may take to come back
LOCAL_CONFIG = {
    "distributed.worker.profile.enabled": False,  # it asks for Python's lock 100 times a second and worker
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": 1,  # see ks4stream.engine.base.one_thread
    "distributed.scheduler.worker-ttl": None,  # a worker in this process that is not heard of is busy, not lost
}
QUIET_SCHEDULER = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}  # any port: several sorts may run at a time
ADVICE = (
    "Workers died while computing stage {stage!r}, {times} times in a row; mostly they run out of memory. "
    "Use fewer workers per machine, a smaller block_batches or a smaller batch_size."
)


class Cluster:
    """Runs tasks on the workers of a client."""

    def __init__(self, client: Client, progress: Progress | None = None) -> None:
        self._client = client
        self._progress = progress or no_progress

    @property
    def n_workers(self) -> int:
        """Tasks that run at a time: GPUs where workers declare them as a resource, else threads of all workers."""
        return max(self._gpus() or sum(self._client.nthreads().values()), 1)

    @property
    def worker_memory_bytes(self) -> float:
        """The smallest worker's limit, or its share of this machine's memory, for each thread; else infinite."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        are_here = all(address.startswith(("inproc://", "tcp://127.0.0.1:")) for address in workers)
        share = MEMORY_LIMIT / max(len(workers), 1) if are_here else math.inf
        limits = [float(one["memory_limit"] or share) / one["nthreads"] for one in workers.values()]
        return min(limits, default=math.inf)

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, stage: str, priority: Sequence[float] = ()
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in order; see :class:`~ks4stream.engine.base.Engine`.

        Results that arrive early are held until their turn. Without priorities items are begun in order and no
        more results are held than tasks are in flight.
        """
        self._progress(stage, 0, len(items))
        if not len(items):
            return
        tasks = _Tasks(self._client, function, stage, {"GPU": 1} if self._gpus() else None)
        begin = sorted(range(len(items)), key=lambda i: -priority[i]) if len(priority) else range(len(items))
        waiting, early, done, window = deque(begin), dict[int, Result](), 0, IN_FLIGHT_PER_WORKER * self.n_workers
        try:
            for turn in range(len(items)):
                while turn not in early:
                    while waiting and len(tasks) < window and (len(early) < window or len(priority) or not len(tasks)):
                        index = waiting.popleft()
                        tasks.begin(index, items[index])
                    finished, lost = tasks.finished(len(items))
                    early |= finished
                    waiting.extendleft(lost)
                    done += len(finished)
                    if finished:
                        self._progress(stage, done, len(items))
                yield early.pop(turn)
        finally:
            tasks.cancel()

    def _gpus(self) -> int:
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return int(sum(worker["resources"].get("GPU", 0) for worker in workers))


class _Tasks:
    """The tasks of one map that are in flight, and the function they share, which travels to each worker once."""

    def __init__(
        self, client: Client, function: Callable[[Any], Any], stage: str, resources: dict[str, float] | None
    ) -> None:
        self._client, self._function, self._stage, self._resources = client, function, stage, resources
        self._index: dict[Future[Any], int] = {}
        self._ended = as_completed()
        self._losses = 0
        self._client.wait_for_workers(1)  # a cluster whose jobs still wait for their turn is no error
        self._send()

    def __len__(self) -> int:
        return len(self._index)

    def begin(self, index: int, item: Any) -> None:
        """Submit one item."""
        key = (f"{self._stage}-{uuid4().hex}", index)  # never one used before: a known key is not computed again
        future = self._client.submit(_run, self._constants, item, key=key, pure=False, resources=self._resources)
        self._index[future] = index
        self._ended.add(future)

    def finished(self, total: int) -> tuple[dict[int, Any], list[int]]:
        """Wait for something to end: results by index, and indices of tasks that must be begun anew.

        A task is begun anew on another worker by Dask itself, but where no worker is left that holds the function
        it is cancelled. The function is then sent again to the workers that have been started in the meantime.
        """
        results, lost = {}, []
        for future in self._ended.next_batch():
            index = self._index[future]
            try:
                with named(self._stage, index, total):
                    results[index] = future.result()
            except CancelledError:
                lost.append(index)
            except KilledWorker as error:
                raise LostWorkerError(ADVICE.format(stage=self._stage, times=MOST_LOSSES + 1)) from error
            del self._index[future]
        if lost:
            self._start_over()
        return results, sorted(lost, reverse=True)

    def cancel(self) -> None:
        """Let go of everything: tasks not begun will not be, results not asked for are dropped."""
        self._ended.clear()
        if self._client.status != "running":  # a map abandoned and found only after its client was closed
            return
        # also the one that failed: its error holds on to it
        self._client.cancel(list(self._index), force=True)
        self._index.clear()
        self._constants.release()

    def _start_over(self) -> None:
        self._losses += 1
        if self._losses > MOST_LOSSES:
            raise LostWorkerError(ADVICE.format(stage=self._stage, times=self._losses))
        try:
            self._client.wait_for_workers(1, timeout=RESTART_SECONDS)
        except TimeoutError:
            raise LostWorkerError(ADVICE.format(stage=self._stage, times=self._losses)) from None
        self._send()

    def _send(self) -> None:
        """Give the function to one worker, and have the others copy it from there.

        ``scatter(broadcast=True)`` does so too, but if a worker dies meanwhile, the scheduler goes on trying to reach
        it and never answers.
        """
        try:
            self._constants = self._client.scatter(self._function, hash=False)
            wait([
                self._client.submit(_has, self._constants, workers=[address], allow_other_workers=True, pure=False)
                for address in self._client.nthreads()
            ])  # fmt: skip
        except (OSError, CancelledError):  # the one that had it has just died
            self._start_over()


def _has(function: Callable[[Any], Any]) -> None:
    """Nothing but a reason to have the function."""


def _run(function: Callable[[Any], Any], item: Any) -> Any:
    with one_thread():
        return function(item)


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address, for the duration of one sort.

    Raises
    ------
    LostWorkerError
        If no scheduler answers there.
    """
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise LostWorkerError(
            f"No Dask scheduler answers at {address!r} ({error}). Give the address that `dask scheduler` prints, "
            "like tcp://host:8786, or none to compute on this machine."
        ) from error
    with client:
        yield client


@contextmanager
def local_client(*, n_workers: int | None = None, processes: bool | None = None) -> Iterator[Client]:
    """A cluster of this machine for the duration of one sort.

    One worker process per GPU where there are several. Otherwise workers are threads of this process, one per core
    as far as memory reaches, or one for the GPU: torch computes without Python's lock, and nothing has to be started
    or copied.
    """
    gpus = _visible_gpus()
    if n_workers is None:
        n_workers, _ = local_workers()
    if processes is None:
        processes = len(gpus) > 1
    with (
        dask.config.set(LOCAL_CONFIG),
        _same_environment(),
        _cluster(n_workers, processes, gpus) as cluster,
        Client(cluster) as client,
    ):
        yield client


def local_workers() -> tuple[int, int]:
    """Workers that a sort on this machine takes, and the memory that they share, in bytes."""
    return len(_visible_gpus()) or max(1, min(CPU_COUNT, MEMORY_LIMIT // WORKER_MEMORY_BYTES)), MEMORY_LIMIT


def _cluster(n_workers: int, processes: bool, gpus: Sequence[str]) -> SpecCluster:
    if not processes or len(gpus) < 2:
        return LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=processes, memory_limit=0,
            silence_logs=logging.ERROR, scheduler_kwargs=QUIET_SCHEDULER,
        )  # fmt: skip
    options = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR, "resources": {"GPU": 1}}
    workers = {
        number: {"cls": Nanny, "options": options | {"env": {"CUDA_VISIBLE_DEVICES": gpu}}}
        for number, gpu in enumerate(gpus[:n_workers])
    }
    scheduler = {"cls": Scheduler, "options": QUIET_SCHEDULER | {"host": "127.0.0.1", "port": 0}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.ERROR)


def _visible_gpus() -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES knows the GPUs this process sees."""
    named_so = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named_so.split(",") if named_so else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


@contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what starting worker processes does to this process's environment: one thread for OpenMP and BLAS."""
    names = list(dask.config.get("distributed.nanny.pre-spawn-environ"))
    before = {name: os.environ.get(name) for name in [*names, "PYTHONHASHSEED"]}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
