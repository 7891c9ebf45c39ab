"""The same work on Dask's distributed scheduler, with a bounded number of tasks in flight."""

# mypy: disable-error-code="no-untyped-call"
# (half of distributed's interface carries no types)

from __future__ import annotations

import asyncio
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import psutil
from dask.system import CPU_COUNT
from distributed import (
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    Scheduler,
    SpecCluster,
    as_completed,
    default_client,
    get_worker,
)
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.core import CommClosedError
from distributed.comm.registry import get_backend
from distributed.deploy.subprocess import SubprocessWorker
from distributed.system import MEMORY_LIMIT

from ks4stream.engine import gpus, workers
from ks4stream.engine.base import Item, Progress, Result, log_failures, no_progress, run, with_task_note
from ks4stream.engine.gpus import GpuMemory
from ks4stream.errors import Ks4StreamError, LostWorkerError, WorkerError
from ks4stream.messages import heard_by, listeners, warn

IN_FLIGHT_PER_WORKER = 3  # keeps workers busy while results travel; more would only hold memory
FREE_GPU_SHARE = 0.8  # of a GPU's free memory that workers share: each also keeps freed memory, in fragments
WORKERS_PER_GPU = 4  # at most: a single one leaves the GPU idle between short kernels
WORKER_MEMORY_BYTES = 3 << 30  # what one worker needs of the machine's memory for itself, torch included
MAX_LOSSES = 3  # times that all workers may die before a task ends, like scheduler.allowed-failures for one task
RESTART_SECONDS = 300  # that a dead worker may take to come back
PATIENCE_SECONDS = 10  # without any worker before we say that we are waiting for one
LOOK_SECONDS = 5  # between checks whether workers have joined
SHARED_SECONDS = 5  # that a stage waits for the last workers to fetch its function; busy or hanging ones may take long
START_SECONDS = 300  # that a worker's process may take to load torch, or to tidy up
ANSWER_SECONDS = 10  # that a worker may take to report the lines a task is at
SLOW_SECONDS = 300.0  # that a task may take before it is compared with the others
SLOW_FACTOR = 10  # times as long as the others is too long
MIN_FINISHED = 3  # tasks, to know how long one takes
ALONE_SLOW_SECONDS = 1800.0  # that a task may take while fewer have finished
LOCAL_CONFIG = {
    "distributed.worker.profile.enabled": False,  # takes the GIL 100 times per second and worker
    "distributed.scheduler.worker-ttl": None,  # a silent worker in this process is busy, not lost
    "distributed.scheduler.active-memory-manager.start": False,  # it drops the function from briefly idle workers
}
WORKER_ENVIRONMENT = {  # of the local cluster's processes; overrides Dask's defaults
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # see ks4stream.engine.base.one_thread
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),  # with Dask's 64 kB the pages of every tensor are cleared again
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "PYTHONSAFEPATH": "1",  # else `python -m` would import a torch.py in the current folder
}
QUIET_SCHEDULER = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}  # any port: several sorts may run at once
ADVICE = (
    "Workers died {times} times while computing stage {stage!r}; the usual cause is lack of memory. "
    "Use fewer workers per machine, a smaller block_batches or a smaller batch_size."
)


_log = logging.getLogger(__name__)
_lost_messages = logging.getLogger("distributed.batched")
_clock = time.monotonic


class Cluster:
    """Runs tasks on the workers of a client.

    Parameters
    ----------
    client : distributed.Client
    progress : callable, optional
    device : str
        Where tasks compute. Tasks on a GPU go only to workers that declare one as a resource, if any do, and run one
        at a time in each worker.
    """

    def __init__(self, client: Client, progress: Progress | None = None, *, device: str = "cpu") -> None:
        self._client, self._progress, self._device = client, progress or no_progress, device
        self._uses_gpu = device.startswith("cuda")
        self._known: set[str] = set()  # workers whose facts were checked
        self._n_workers = 1

    @property
    def n_workers(self) -> int:
        """Number of concurrent tasks: declared GPUs, else one per worker on a GPU, or all workers' threads on CPUs.

        If the scheduler is lost, it is the latest that was known: when the last stage has ended, nobody needs it.
        """
        found = self._workers()
        if found or self._has_scheduler():
            n_tasks = (1 if self._uses_gpu else worker["nthreads"] for worker in found.values())
            self._n_workers = max(self._gpus() or sum(n_tasks), 1)
        return self._n_workers

    @property
    def worker_memory_bytes(self) -> float:
        """Per thread, the smallest worker's limit, or else its share of this machine's memory; infinite if unknown."""
        found = self._all_workers()
        are_here = all(address.startswith(("inproc://", "tcp://127.0.0.1:")) for address in found)
        share = MEMORY_LIMIT / max(len(found), 1) if are_here else math.inf
        limits = [float(worker["memory_limit"] or share) / worker["nthreads"] for worker in found.values()]
        return min(limits, default=math.inf)

    @property
    def gpu_memory(self) -> GpuMemory | None:
        """As the workers see it; see :class:`~ks4stream.engine.base.Engine`."""
        if not self._uses_gpu:
            return None
        self._check_new_workers()  # raises if they cannot compute
        answers = self._ask(gpus.free, self._device, of=self._workers())
        return gpus.shared(answer for answer in answers.values() if isinstance(answer, gpus.Free))

    @property
    def dashboard(self) -> str | None:
        """Address of the scheduler's dashboard; None if it has none, or does not say."""
        try:  # what is only for people to look at must not end a sort
            if not self._client.run_on_scheduler(find_spec, "bokeh"):
                return None
            return str(self._client.dashboard_link) or None
        except Exception as error:
            _log.debug("No address of a dashboard: %r", error)
            return None

    def workers_with_gpu(self) -> list[str]:
        """Addresses of workers that see a GPU, whether or not it is used; does not start CUDA."""
        answers = self._ask(gpus.visible, "cuda", of=self._all_workers())
        return sorted(address for address, answer in answers.items() if isinstance(answer, list) and answer)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        stage: str,
        work: Sequence[float] = (),
        arrived: Callable[[Result], object] = lambda result: None,
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in order; see :class:`~ks4stream.engine.base.Engine`.

        Results that arrive early are held until their turn. Without `work`, items start in order, and no more
        results are held than tasks are in flight.

        Raises
        ------
        LostWorkerError
            If workers die repeatedly, or the scheduler is lost.
        """
        try:
            yield from self._map(function, items, stage, work, arrived)
        except (OSError, RuntimeError, CancelledError, AttributeError) as error:  # the last from a closed client
            if isinstance(error, Ks4StreamError) or self._has_scheduler():  # raised by a task
                raise
            raise LostWorkerError(
                f"The scheduler was lost while computing stage {stage!r} ({str(error) or repr(error)}). Restart it and "
                "its workers, and run the same sort again: finished tasks are not recomputed."
            ) from error

    def _map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        stage: str,
        work: Sequence[float],
        arrived: Callable[[Result], object],
    ) -> Iterator[Result]:
        self._progress(stage, 0, len(items))
        if not len(items):
            return
        _first_worker(self._client)
        self._check_new_workers()
        tasks = _Tasks(self._client, function, stage, alone=self._uses_gpu, on_gpu=self._gpus() > 0)
        begin = sorted(range(len(items)), key=lambda i: -work[i]) if len(work) else range(len(items))
        waiting, early, done, window = deque(begin), dict[int, Result](), 0, IN_FLIGHT_PER_WORKER * self.n_workers
        looked, may_join = _clock(), True
        try:
            for turn in range(len(items)):
                while turn not in early:
                    if _clock() - looked > LOOK_SECONDS:
                        looked = _clock()
                        tasks.look_for_slow_ones(self._workers(), len(items))
                        may_join = may_join and self._take_in_new_workers()
                        if may_join:
                            if waiting:
                                tasks.share_with(self._workers())
                            window = IN_FLIGHT_PER_WORKER * self.n_workers
                    while waiting and len(tasks) < window and (len(early) < window or len(work) or not len(tasks)):
                        index = waiting.popleft()
                        tasks.begin(index, items[index], work[index] if len(work) else 1.0)
                    finished, lost = tasks.finished(len(items))
                    early |= finished
                    waiting.extendleft(lost)
                    done += len(finished)
                    for result in finished.values():
                        arrived(result)
                    if finished:
                        tasks.losses = 0
                        self._progress(stage, done, len(items))
                yield early.pop(turn)
        finally:
            tasks.cancel()

    def run_on_workers(self, function: Callable[[], object]) -> None:
        """Call a function once in each worker's process; see :class:`~ks4stream.engine.base.Engine`."""
        try:
            answers = self._ask(_in_thread, function, listeners(), of=self._workers())
        except Exception as error:  # for instance, the scheduler is lost
            answers = {"the scheduler": error}
        log_failures(answers)

    def _workers(self) -> dict[str, dict[str, Any]]:
        """The scheduler's information about the workers that tasks may go to, by address."""
        found = self._all_workers()
        declaring = {address: worker for address, worker in found.items() if worker["resources"].get("GPU")}
        return declaring if self._uses_gpu and declaring else found

    def _all_workers(self) -> dict[str, dict[str, Any]]:
        """The scheduler's information about each worker; none if it does not answer.

        ``Client.scheduler_info`` may lack workers: every two seconds the client overwrites what it asked for.
        """
        scheduler: Any = self._client.scheduler
        try:
            found: dict[str, dict[str, Any]] = self._client.sync(scheduler.identity, n_workers=-1)["workers"]
        except Exception:  # of many types, depending on where it is lost
            return {}
        return found

    def _ask(self, function: Callable[..., Any], *given: Any, of: Iterable[str]) -> dict[str, Any]:
        """Each worker's answer, or what asking it raised; a worker that hangs is given up after a while."""
        addresses = list(of)

        async def answers() -> list[Any]:
            asked = (self._client._run(function, *given, workers=[address], on_error="return") for address in addresses)
            limited = (asyncio.wait_for(answer, START_SECONDS) for answer in asked)
            return await asyncio.gather(*limited, return_exceptions=True)

        found = zip(addresses, self._client.sync(answers), strict=True)
        return {
            address: answer[address] if isinstance(answer, dict) else answer
            for address, answer in found
            if answer != {}
        }

    def _has_scheduler(self) -> bool:
        scheduler: Any = self._client.scheduler
        try:
            self._client.sync(scheduler.identity, n_workers=0, callback_timeout=ANSWER_SECONDS)
        except Exception:  # of many types, depending on where it is lost
            return False
        return True

    def _gpus(self) -> int:
        """Number of GPUs that workers declare; 0 if tasks run on CPUs."""
        return self._uses_gpu * int(sum(worker["resources"].get("GPU", 0) for worker in self._workers().values()))

    def _take_in_new_workers(self) -> bool:
        """Whether the workers that joined during a stage, if any, can compute."""
        try:
            self._check_new_workers()
        except WorkerError as error:  # raised at the start of the next stage
            warn(f"{error} This stage continues with the other workers.")
            return False
        return True

    def _check_new_workers(self) -> None:
        """Check that workers that have joined since the last call can compute, and compute as this process does."""
        new = [address for address in self._workers() if address not in self._known]
        if not new:
            return
        ask = partial(workers.facts, gpu=self._uses_gpu, device=self._device)
        # first with a function of the standard library, which every worker can unpickle, so that the error comes back
        answers = self._ask(import_module, workers.__name__, of=new)
        able = [address for address, answer in answers.items() if not isinstance(answer, BaseException)]
        answers |= self._ask(ask, of=able)
        left = self._workers()
        answers = {  # workers that died in the meantime do not matter
            address: answer
            for address, answer in answers.items()
            if address in left and not isinstance(answer, CommClosedError)
        }
        workers.check(ask(), answers)
        self._known |= set(answers)


class _Begun(NamedTuple):
    """A task in flight: its item's number, its constants, the time it was sent, and how much work it is."""

    number: int
    constants: Any
    sent: float
    work: float


class _Tasks:
    """The tasks of one map that are in flight, and their shared function, which travels to each worker once."""

    def __init__(
        self, client: Client, function: Callable[[Any], Any], stage: str, *, alone: bool = False, on_gpu: bool = False
    ) -> None:
        self._client, self._function, self._stage, self._alone = client, function, stage, alone
        self._resources = {"GPU": 1} if on_gpu else None
        self._shared: dict[str, Future[Any]] = {}  # by worker: the task that makes it fetch the function
        self._index: dict[Future[Any], _Begun] = {}
        self._took: list[float] = []  # seconds from sending a task to its end, per unit of work
        self._running: dict[tuple[Any, str], float] = {}  # by key and worker: when it was first seen running there
        self._reported: set[int] = set()  # items that were reported as slow
        self._silent: dict[str, float] = {}  # by worker that did not answer: when it was last asked
        self._stuck: dict[Any, float] = {}  # by key: since when no worker was seen that would run it
        self._has_told_of_stuck = False
        self._ended = as_completed(loop=client.loop)  # by default the loop of the latest client of this process
        self.losses = 0  # of all workers, since a task has ended
        self._send()

    def __len__(self) -> int:
        return len(self._index)

    def begin(self, index: int, item: Any, work: float = 1.0) -> None:
        """Submit one item; `work` is how much there is to do, in any unit."""
        key = (f"{self._stage}-{uuid4().hex}", index)  # never one used before: Dask would not compute it again
        future = self._client.submit(
            _run, self._constants, item, self._alone, listeners(), key=key, pure=False, resources=self._resources
        )
        self._index[future] = _Begun(index, self._constants, _clock(), max(work, 1.0))
        self._ended.add(future)

    def finished(self, total: int) -> tuple[dict[int, Any], list[int]]:
        """Tasks that have ended: results by index, and indices of tasks that must be restarted. Waits briefly.

        Dask itself restarts a task on another worker, but cancels it if no worker is left that holds the function.
        The function is then sent again to the workers that have started in the meantime.
        """
        results, lost, is_function_lost = {}, [], False
        for future in _next_batch(self._ended):
            task = self._index[future]
            try:
                with with_task_note(self._stage, task.number, total):
                    results[task.number] = future.result()
                self._took.append((_clock() - task.sent) / task.work)
            except CancelledError:
                lost.append(task.number)
                is_function_lost |= task.constants is self._constants  # otherwise they have been sent again since
            except KilledWorker as error:
                raise LostWorkerError(ADVICE.format(stage=self._stage, times=MAX_LOSSES + 1)) from error
            del self._index[future]
        if is_function_lost:
            self._start_over()
        return results, sorted(lost, reverse=True)

    def look_for_slow_ones(self, present: Mapping[str, Mapping[str, Any]], total: int) -> None:
        """Warn of tasks that run much longer than others of this stage took, in proportion to their work.

        A task counts as running from when its worker was first asked for its lines and could report them: until then
        it waits for another task there, which may be another sort's. On a worker that does not answer, the tasks
        sent first count as running, one in each of its threads; it is rarely asked again, as the map waits for answers.
        """
        usual = statistics.median(self._took) if len(self._took) >= MIN_FINISHED else math.inf
        now, in_flight = _clock(), {future.key: task for future, task in self._index.items()}
        ask: dict[str, list[Any]] = {}
        first: dict[str, list[Any]] = {}  # taken to run if the worker does not answer
        processing = self._client.processing()
        self._look_whether_any_can_run(in_flight.keys(), processing, present, now)
        for address, keys in processing.items():
            sent = sorted((key for key in keys if key in in_flight), key=lambda key: in_flight[key].sent)
            asked = [key for key in sent if self._is_slow(in_flight[key], address, key, usual, now)]
            if asked and now - self._silent.get(address, -math.inf) > SLOW_SECONDS:
                ask[address] = asked
                first[address] = sent[: 1 if self._alone else present.get(address, {}).get("nthreads", 1)]
        for (address, keys), answer in zip(ask.items(), self._stacks(list(ask.values())), strict=True):
            if isinstance(answer, KeyError):  # one of the tasks has ended
                continue
            if isinstance(answer, dict):
                lines = {key: at for key, at in answer.get(address, {}).items() if not _waits_for_the_gpu(at)}
            else:
                self._silent[address] = now
                lines = {key: [f"The worker did not answer: {answer!r}"] for key in keys if key in first[address]}
            for key in lines.keys() & in_flight.keys():
                ran = (key, address) in self._running
                since = self._running.setdefault((key, address), now)
                if ran:
                    self._warn_slow(in_flight[key], address, now - since, usual, total)
                    _log.info(
                        "Stage %r, task %d, at %s:\n%s",
                        self._stage,
                        in_flight[key].number + 1,
                        address,
                        "".join(lines[key]).rstrip(),
                    )

    def _look_whether_any_can_run(
        self,
        in_flight: Collection[Any],
        processing: Mapping[str, Iterable[Any]],
        present: Mapping[str, Mapping[str, Any]],
        now: float,
    ) -> None:
        """Warn, once, if no worker is left that would run any of the tasks: Dask then waits, as long as it takes.

        Those that declared a GPU may have gone, or workers may be paused, as Dask does when their memory is almost full
        until some of it is free.
        """
        paused = {address for address, worker in present.items() if worker.get("status") == "paused"}
        can_run = {
            key
            for address, keys in processing.items()
            for key in keys
            if address not in paused or (key, address) in self._running
        }
        self._stuck = {key: self._stuck.get(key, now) for key in in_flight if key not in can_run}
        waited_s = now - max(self._stuck.values(), default=now)  # the least: some may just not have been taken in
        if len(self._stuck) < len(in_flight) or waited_s <= SLOW_SECONDS or self._has_told_of_stuck:
            return
        self._has_told_of_stuck = True
        why, remedy = "none takes a task", "Start workers, or restart those that there are"
        if paused:
            why = f"Dask has paused {len(paused)} (for instance the one at {min(paused)}), whose memory is almost full"
            remedy = "Restart these, or start workers with more memory"
        elif self._resources:
            why, remedy = "none is left that declares a GPU", "Start one with --resources GPU=1"
        warn(
            f"No worker has been there for {waited_s:.0f} s to run the tasks of stage {self._stage!r}: {why}. "
            f"{remedy}, and the sort goes on. Or stop it and run it again: finished tasks are not recomputed."
        )

    def _is_slow(self, task: _Begun, address: str, key: Any, usual: float, now: float) -> bool:
        """Whether a task has run for too long, or is not yet known to run."""
        longest = ALONE_SLOW_SECONDS if usual == math.inf else max(SLOW_SECONDS, SLOW_FACTOR * usual * task.work)
        since = self._running.get((key, address), -math.inf)
        return task.number not in self._reported and now - since > longest

    def _stacks(self, keys: Sequence[list[Any]]) -> list[Any]:
        """The lines that tasks are at, by worker and key, or what asking raised; all workers are asked at once."""
        scheduler: Any = self._client.scheduler

        async def answers() -> list[Any]:
            asked = (asyncio.wait_for(scheduler.call_stack(keys=of_worker), ANSWER_SECONDS) for of_worker in keys)
            return await asyncio.gather(*asked, return_exceptions=True)

        found: list[Any] = self._client.sync(answers) if keys else []
        return found

    def _warn_slow(self, task: _Begun, address: str, ran_s: float, usual: float, total: int) -> None:
        self._reported.add(task.number)
        others = "too few others have finished to know how long one should take"
        if usual < math.inf:
            others = f"others of this size took {usual * task.work:.2g} s (median)"
        warn(
            f"Task {task.number + 1} of {total} of stage {self._stage!r} has been running on the worker at {address} "
            f"for {ran_s:.0f} s; {others}. If that worker hangs because its disk, network or GPU does not respond, "
            "kill its process: another worker then gets the task. Or stop the sort and run it again: finished tasks "
            "are not recomputed. The log shows the lines the task is at."
        )

    def cancel(self) -> None:
        """Release everything: tasks not yet started are cancelled, results not yet fetched are dropped."""
        self._ended.clear()
        if self._client.status != "running":  # an abandoned map, collected only after its client was closed
            return
        # also the task that failed: its error keeps a reference to it
        self._client.cancel([*self._index, *self._shared.values()], force=True)
        self._index.clear()
        self._shared.clear()
        self._constants.release()

    def _start_over(self) -> None:
        self.losses += 1
        if self.losses > MAX_LOSSES:
            raise LostWorkerError(ADVICE.format(stage=self._stage, times=self.losses))
        if _first_worker(self._client, RESTART_SECONDS) is None and not self._client.nthreads():
            raise LostWorkerError(ADVICE.format(stage=self._stage, times=self.losses))
        self._send()

    def _send(self) -> None:
        """Send the function to one worker, the first that answers, and have the others copy it from there.

        ``scatter(broadcast=True)`` does so too, but if a worker dies in the meantime, the scheduler keeps trying to
        reach it and never answers.
        """
        try:
            first = _first_worker(self._client)
            self._constants = self._client.scatter(self._function, hash=False, workers=first and [first])
            self._shared = {}
            self.share_with(self._client.nthreads())
            with suppress(TimeoutError):  # the others get it when they are free
                for fetching in as_completed(
                    list(self._shared.values()), loop=self._client.loop, timeout=SHARED_SECONDS
                ):
                    if fetching.cancelled():
                        raise CancelledError(fetching.key)
        except (OSError, KeyError, CancelledError):  # the worker that had it has just died
            self._start_over()

    def share_with(self, addresses: Iterable[str]) -> None:
        """Make workers that lack the function fetch it, as Dask prefers workers that have it.

        New workers lack it, and so do those that Dask's active memory manager has found briefly idle.
        """
        try:
            having = self._client.who_has([self._constants]).get(self._constants.key, ())
        except CancelledError:  # the last worker that had it has died
            self._start_over()
            return
        for address in addresses:
            fetching = self._shared.get(address)
            if address not in having and (fetching is None or fetching.done()):
                self._shared[address] = self._client.submit(
                    _has, self._constants, workers=[address], allow_other_workers=True, pure=False
                )


def _next_batch(ended: as_completed) -> list[Future[Any]]:
    """Tasks that have ended since the last call; waits briefly if there are none."""
    if not ended.has_ready():
        with ended.thread_condition:  # not for long: the notification may have come just before
            ended.thread_condition.wait(timeout=0.1)
    return list(ended.next_batch(block=False))


def _first_worker(client: Client, timeout_s: float = math.inf) -> str | None:
    """Address of the first worker that answers a task; an adaptive cluster starts one for it.

    A worker that hangs or is kept busy by another sort is passed over. Waits as long as it takes, with a warning: it is
    not an error if a cluster's jobs are still queued. None if the time is up.
    """
    asked: dict[str, Future[Any]] = {}
    ended = as_completed(loop=client.loop)  # one for all: what it starts for each task stays until the task has ended
    waited_s, has_warned = 0.0, False
    while waited_s < timeout_s:
        known = list(client.nthreads())
        for address in known or [""]:  # "": any worker that joins
            if address not in asked:
                where = {"workers": [address], "allow_other_workers": True} if address else {}
                asked[address] = client.submit(int, pure=False, **where)
                ended.add(asked[address])
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            if answered := _next_batch(ended):
                return next((address for found in client.who_has(answered[:1]).values() for address in found), None)
        waited_s += PATIENCE_SECONDS
        if has_warned or (known and waited_s < SLOW_SECONDS):
            continue
        has_warned = True
        address = client.scheduler_info(n_workers=0)["address"]
        text = (
            f"The scheduler at {address} has no workers yet; the sort continues when the first one joins. Start one "
            f"with `dask worker {address}`, or check your jobs in the queue."
        )
        if known:
            text = (
                f"None of the {len(known)} workers of the scheduler at {address} has started a task for "
                f"{waited_s:.0f} s: another sort keeps them busy, or they hang. This sort waits for the first free one."
            )
        warn(text)
    return None


async def _in_thread(function: Callable[[], object], heard: tuple[str, ...]) -> None:
    """Call a function in a thread, while the worker's event loop keeps answering."""
    with heard_by(heard):
        await asyncio.to_thread(function)


def _has(function: Callable[[Any], Any]) -> None:
    """Do nothing: submitted only to make a worker fetch the function."""


_gpu = threading.Lock()  # of this process, which may be a worker with several threads


def _run(function: Callable[[Any], Any], item: Any, alone: bool, heard: tuple[str, ...]) -> Any:
    with _gpu if alone else nullcontext(), heard_by(heard):
        return run(function, item)


def _waits_for_the_gpu(lines: Sequence[str]) -> bool:
    """Whether a task is still where :func:`_run` waits for its turn, by the lines it is at, innermost last."""
    return bool(lines) and f", in {_run.__name__}\n" in lines[-1]


def active_client() -> Client | None:
    """The client that Dask itself would compute with here, if any; None within a task, which must not wait."""
    try:
        get_worker()
    except ValueError:
        pass
    else:
        return None
    try:
        found = default_client()
    except ValueError:
        return None
    return found if found.status == "running" and not found.asynchronous else None


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address, for the duration of one sort.

    Raises
    ------
    LostWorkerError
        If no scheduler answers there.
    """
    try:
        _check_address(address)
        client = Client(address, set_as_default=False)  # otherwise another sort would take it for its caller's
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls:// without certificates
        raise LostWorkerError(
            f"No Dask scheduler answers at {address!r} ({error}). Give the address that `dask scheduler` prints, "
            "like tcp://host:8786, or leave it out to compute on this machine."
        ) from error
    with client:
        yield client


def _check_address(address: str) -> None:
    """Check what a client would only find out after it has started threads, which then keep the program from ending.

    Raises
    ------
    ValueError
        If Dask does not know the protocol, or the port is missing.
    """
    scheme, location = parse_address(address)
    get_backend(scheme)
    if scheme in ("tcp", "tls"):
        parse_host_port(location)


class Share(NamedTuple):
    """What each of several workers on this machine may need.

    Attributes
    ----------
    memory_bytes : int
        The machine's memory, including that of the process itself.
    gpu_bytes : int
        A GPU's memory.
    """

    memory_bytes: int
    gpu_bytes: int


@contextmanager
def local_client(
    *, n_workers: int | None = None, processes: bool | None = None, device: str = "cpu"
) -> Iterator[Client]:
    """A cluster on this machine for the duration of one sort.

    Parameters
    ----------
    n_workers : int, optional
        By default that of :func:`local_workers`.
    processes : bool, optional
        Whether workers are processes, which take some seconds to load torch, rather than threads of this process, which
        share its GIL. By default True if there are several workers. On Windows they are always threads.
    device : str
        Where tasks will compute: with "cuda", each process gets one of the GPUs this one sees, in turn.

    Raises
    ------
    LostWorkerError
        If the processes do not start.
    """
    if n_workers is None:
        n_workers = local_workers(device)
    if processes is None:
        processes = n_workers > 1
    # Dask logs the traceback of a message that was still to be sent when a connection was closed, perhaps after this
    # context has ended; the level is therefore not restored.
    if _lost_messages.level == logging.NOTSET:
        _lost_messages.setLevel(logging.WARNING)
    paths = [path for path in sys.path if isinstance(path, str)]  # Python passes over what is not
    environment = WORKER_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    with ExitStack() as stack:
        with _starting, dask.config.set(LOCAL_CONFIG), _environment(environment):
            in_processes = processes and sys.platform != "win32"
            cluster = _processes(n_workers, gpus.for_processes(device)) if in_processes else _threads(n_workers)
            stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        try:
            client.wait_for_workers(n_workers, timeout=START_SECONDS)
        except TimeoutError:
            raise LostWorkerError(
                f"Only {len(client.nthreads())} of {n_workers} worker processes had started after {START_SECONDS} s. "
                "Their output is above; fewer workers need less memory."
            ) from None
        yield client


def local_workers(device: str = "cpu", *, sharing: Share | None = None) -> int:
    """Number of workers for a sort on this machine.

    Parameters
    ----------
    device : str
        Where they compute. There is one for each GPU, if there are any; otherwise one for each core, as memory
        allows. On Windows, where workers are threads, they would take turns on the first GPU, so there is one.
    sharing : Share, optional
        What each may need, if several may share a GPU: as many as the GPU's free memory, the cores and the machine's
        memory allow, at most :data:`WORKERS_PER_GPU`.
    """
    most = max(1, min(CPU_COUNT, MEMORY_LIMIT // WORKER_MEMORY_BYTES))
    n_gpus = len(gpus.visible(device))
    if n_gpus and sys.platform == "win32":
        return 1
    if not (n_gpus and sharing):
        return n_gpus or most
    most = min(most, MEMORY_LIMIT // sharing.memory_bytes)
    fitting = int(FREE_GPU_SHARE * (gpus.free_here(device) or 0)) // sharing.gpu_bytes
    return n_gpus * max(1, min(fitting, most // n_gpus, WORKERS_PER_GPU))


def _threads(n_workers: int) -> SpecCluster:
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        processes=False,
        memory_limit=0,
        silence_logs=logging.ERROR,
        scheduler_kwargs=QUIET_SCHEDULER,
    )


class _Program(SubprocessWorker):
    """A worker's process. It may exit by itself while it is being closed, which Dask's own class takes for an error."""

    async def close(self) -> None:
        while True:
            try:
                return await super().close()
            except psutil.NoSuchProcess:  # one of its children ended after it was listed; next time it is not listed
                await asyncio.sleep(0.01)


def _processes(n_workers: int, on_gpus: Sequence[str]) -> SpecCluster:
    """Workers as programs of their own: unlike those of multiprocessing, they do not run the caller's script again.

    Each has a nanny, which restarts it when it dies, and one of the GPUs, if there are any.
    """
    options = {
        "nthreads": 1,
        "memory_limit": 0,
        "silence_logs": logging.ERROR,
        "preload": [workers.__name__],
        "death_timeout": START_SECONDS,  # else it looks for the scheduler forever if this process is killed meanwhile
    }
    own: list[dict[str, Any]] = [
        {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": on_gpus[number % len(on_gpus)]}} if on_gpus else {}
        for number in range(n_workers)
    ]
    return SpecCluster(
        workers={
            number: {"cls": _Program, "options": {"worker_kwargs": options | special}}
            for number, special in enumerate(own)
        },
        scheduler={"cls": Scheduler, "options": QUIET_SCHEDULER | {"host": "127.0.0.1", "port": 0}},
        silence_logs=logging.ERROR,
    )


_starting = threading.Lock()  # held while this process's settings are changed to start workers, and then restored


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set these values in this process's environment, for programs that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
