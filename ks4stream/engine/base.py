"""What every engine promises."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch

from ks4stream.engine.gpus import GpuMemory
from ks4stream.errors import GpuMemoryError

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the number of tasks done and their total; first with 0 done.

Tasks that an earlier run finished do not count: the total is 0 if there are no others.
A display that has a method ``note(**facts)`` also gets what else is known: see :func:`tell`.
"""


class Engine(Protocol):
    """Runs a function over items."""

    @property
    def n_workers(self) -> int:
        """Number of tasks that run at a time."""
        ...

    @property
    def worker_memory_bytes(self) -> float:
        """Memory available to each running task; infinite if unknown."""
        ...

    @property
    def gpu_memory(self) -> GpuMemory | None:
        """Memory of the GPU on which a worker has least; None if no GPU is used or nothing is known. Starts CUDA."""
        ...

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        stage: str,
        work: Sequence[float] = (),
        arrived: Callable[[Result], object] = lambda result: None,
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in the items' order.

        A task must return whatever it has to report: warnings and log records of another process stay there. Those of
        a thread of this process reach the current listeners (:mod:`ks4stream.messages`).

        Parameters
        ----------
        function : callable
            Picklable; it travels to each worker once, with all constants it holds.
        items : sequence
            Small and picklable.
        stage : str
            For progress and error messages.
        work : sequence of float, optional
            How much there is to do for each item, in any unit. Those with most start first, and it is from the time
            per work of finished items that one is known to be slow. All results may be held until the last is there.
        arrived : callable, optional
            Called here with each result as soon as it is there, before progress is told and in whatever order.

        Raises
        ------
        Exception
            What the first failing task raised, with a note that names the stage; tasks not yet started are dropped.
        """
        ...

    def run_on_workers(self, function: Callable[[], object]) -> None:
        """Call a function once in each worker's process, to tidy up; failures there are logged, not raised.

        Parameters
        ----------
        function : callable
            Picklable. Several workers of a machine may call it at the same time.
        """
        ...


def resident_bytes() -> int:
    """Memory that this process uses."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Most memory that this process and each of those that it started has used so far, in all; 0 if it is not known."""
    total = 0
    with suppress(psutil.Error, OSError):  # the system may hide processes
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with suppress(psutil.Error, OSError, StopIteration):  # it has ended
                total += _peak_of(process)
    return total


def _peak_of(process: psutil.Process) -> int:
    if sys.platform != "linux":
        return int(getattr(process.memory_info(), "peak_wset", 0))  # on Windows
    lines = Path(f"/proc/{process.pid}/status").read_bytes().split(b"\n")  # with its name, which may be any bytes
    return 1024 * int(next(line for line in lines if line.startswith(b"VmHWM:")).split()[1])


def run(function: Callable[[Item], Result], item: Item) -> Result:
    """Run one task in this process.

    Raises
    ------
    GpuMemoryError
        If the GPU runs out of memory.
    """
    with one_thread():
        try:
            return function(item)
        except torch.cuda.OutOfMemoryError as error:
            raise GpuMemoryError(
                f"Out of GPU memory even with the smallest chunks: {error} Use a smaller batch_size (for clustering, a "
                "smaller max_cluster_subset), fewer workers on this GPU (workers=), or device='cpu'."
            ) from error
        finally:
            give_back_memory(at_most_every_s=GIVEN_BACK_S)


GIVEN_BACK_S = 10.0
"""How often a computing process returns free memory to the system. If it did so after every tile, a third of its time
would go into fresh pages; if never, holes between tensors of many sizes would add up for hours."""

_lock = threading.Lock()
_given_back = 0.0  # when that was last done
_clock = time.monotonic
_inside = 0
_before = ExitStack()  # undoes what the first task to enter has changed
_threads_before = 1  # torch's number of threads when that task entered


class _OfThread(threading.local):
    """How deep a thread is inside :func:`one_thread`, and on how many threads torch ran in it before."""

    inside = 0
    n_threads = 1


_own = _OfThread()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, in full precision, and keep the memory it frees for its next tensor.

    On one thread, sums are taken in one order on any machine. With TF32 or bfloat16, which a program may have
    allowed for its own products, detection's bounds would not hold. And without keeping freed memory, a third of
    detection's time would go into fresh pages: glibc returns large tensors to the system, which then clears every page
    of the next one.
    All this belongs to the process: of the tasks running in it at the same time, the first to enter sets it, and the
    last to leave resets it and returns free memory. Only the number of threads belongs to each thread, which restores
    its own: others that are still inside keep theirs. (The number for future threads belongs to the process, but every
    thread that computes enters here.)
    """
    global _inside, _threads_before
    with _lock:
        if _own.inside == 0:
            _own.n_threads = torch.get_num_threads()  # a thread that never asks takes the number that others set
            if _inside == 0:
                _threads_before = _own.n_threads
            elif _own.n_threads == 1:  # most likely set by other threads inside, as this thread asks for the first time
                _own.n_threads = _threads_before
            torch.set_num_threads(1)
        if _inside == 0:
            _before.enter_context(_full_precision())
            _keep_freed_memory()
        _own.inside += 1
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _own.inside -= 1
            _inside -= 1
            if _own.inside == 0:
                torch.set_num_threads(_own.n_threads)
            if _inside == 0:
                _before.close()
                _restore_malloc()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in float32, whichever of torch's two interfaces was used to allow less."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two contradict each other, because the newer one (torch 2.9) was used
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")  # sets all of them
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


_MALLOPT = {  # by the environment variable that sets it: number in glibc's malloc.h, value at work, value at rest
    "MALLOC_MMAP_MAX_": (-4, 0, 1 << 16),  # blocks, however large, that are not part of the heap
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20, 32 << 20),  # bytes of those; glibc itself raises it gradually up to 32 MB
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1, 64 << 20),  # bytes free at the heap's end before it shrinks
    "MALLOC_ARENA_MAX": (-8, 1, 0),  # heaps; those of threads other than the main one end at 64 MB. 0: by the number
    # of cores, but if a thread has asked for its heap in the meantime, glibc keeps the limit that held then
}


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def _keep_freed_memory() -> None:
    if _glibc():
        for number, at_work, _ in _MALLOPT.values():
            _glibc().mallopt(number, at_work)


def _restore_malloc() -> None:
    if _glibc():
        for name, (number, _, at_rest) in _MALLOPT.items():
            asked = os.environ.get(name, "")
            _glibc().mallopt(number, int(asked) if asked.isdecimal() else at_rest)
    give_back_memory()


def give_back_memory(*, at_most_every_s: float = 0.0) -> None:
    """Return the free part of the heap to the system, unless that was done within the last `at_most_every_s`."""
    global _given_back
    if _glibc() and _clock() - _given_back >= at_most_every_s:
        _glibc().malloc_trim(0)
        _given_back = _clock()


@contextmanager
def with_task_note(stage: str, index: int, total: int) -> Iterator[None]:
    """Add a note to an error raised inside that names the task it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised in stage {stage!r}, task {index + 1} of {total}.")
        raise


def log_failures(answers: Mapping[str, object]) -> None:
    """Log the workers, by address, that raised an error instead of answering."""
    for address, answer in answers.items():
        if isinstance(answer, Exception):
            _log.warning("Tidying up failed at %s: %r", address, answer)


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


def tell(progress: Progress | None, **facts: Any) -> None:
    """Tell a display what is known besides the tasks that are done, if it has a method ``note(**facts)``.

    Displays ignore facts that they do not know. There are:

    ``device``
        Where this machine computes; not told if others do.
    ``dashboard``
        Address of the Dask dashboard, or None.
    ``stage`` and ``recording_s``
        How many seconds of recording the tasks of a stage go through; 0 if they are not about time.
    ``stage`` and ``peaks`` or ``spikes``
        How many of them the stage has found so far.
    ``stage`` and ``share``
        Which part of the stage's tasks is to be computed; the others were finished by an earlier run.
    ``expected_s``
        By stage, how many seconds one pass with all its tasks may take.
    """
    note = getattr(progress, "note", None)
    if note is not None:
        note(**facts)
