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
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from ks4stream.engine.gpus import GpuMemory
from ks4stream.errors import GpuMemoryError

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, tasks done and tasks in all; first with 0 done."""


class Engine(Protocol):
    """Runs a function over items."""

    @property
    def n_workers(self) -> int:
        """Tasks that run at a time."""
        ...

    @property
    def worker_memory_bytes(self) -> float:
        """Memory there is for each task that runs; infinite where that is not known."""
        ...

    @property
    def gpu_memory(self) -> GpuMemory | None:
        """Of the GPU on which a worker has least; None where none is used, or nothing known. This starts CUDA."""
        ...

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, stage: str, priority: Sequence[float] = ()
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in the items' order.

        What a task has to say it returns: what it warns of or logs in another process stays there. In a thread of this
        one it is heard by those who listen here (:mod:`ks4stream.messages`).

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

    def everywhere(self, function: Callable[[], object]) -> None:
        """Call a function once in each worker's process, to tidy up; what fails there is logged and no error.

        Parameters
        ----------
        function : callable
            Picklable. Several workers of a machine may call it at the same time.
        """
        ...


def run(function: Callable[[Item], Result], item: Item) -> Result:
    """One task, in this process.

    Raises
    ------
    GpuMemoryError
        If the GPU's memory does not suffice.
    """
    with one_thread():
        try:
            return function(item)
        except torch.cuda.OutOfMemoryError as error:
            raise GpuMemoryError(
                f"The GPU is too small, even with all cut small that can be computed in pieces: {error} Use a smaller "
                "batch_size (for clustering max_cluster_subset), fewer workers on this GPU (workers=), or device='cpu'."
            ) from error
        finally:
            give_back_memory(at_most_every_s=GIVEN_BACK_S)


GIVEN_BACK_S = 10.0
"""How often a process that computes gives back what is free. After every tile a third of its time would go into fresh
pages; never, and holes between tensors of many sizes would add up for hours."""

_lock = threading.Lock()
_given_back = 0.0  # when that was last
_clock = time.monotonic
_inside = 0
_before = ExitStack()  # puts back what the first task to come has changed
_threads_before = 1  # torch's, when that came


class _OfThread(threading.local):
    """How deep a thread is inside :func:`one_thread`, and on how many threads torch ran in it before."""

    inside = 0
    n_threads = 1


_own = _OfThread()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, in full precision, and keep the memory it frees for its next tensor.

    On one thread sums are taken in one order, whatever the machine. With TF32 or bfloat16, which a program may have
    allowed for its own products, detection's bounds would not hold. And a third of detection's time would go into
    fresh memory: glibc returns large tensors to the system and has every page of the next one cleared anew.
    All this belongs to the process: of the tasks that run at a time in it, the first to come sets it and the last to
    go resets it and gives back what is free. Only the number of threads belongs to each thread, which puts back its
    own: others that are still inside keep theirs. (That of threads to come belongs to the process, but whoever computes
    comes in here.)
    """
    global _inside, _threads_before
    with _lock:
        if _own.inside == 0:
            _own.n_threads = torch.get_num_threads()  # a thread that is never asked takes the number that others set
            if _inside == 0:
                _threads_before = _own.n_threads
            elif _own.n_threads == 1:  # most likely from others who are inside, and a thread asks for the first time
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
                _as_at_rest()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Take float32 products in float32, whichever of torch's two interfaces was used to allow less."""
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
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20, 32 << 20),  # bytes of those; glibc itself goes up to 32 MB by and by
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1, 64 << 20),  # bytes free at the heap's end before it shrinks
    "MALLOC_ARENA_MAX": (-8, 1, 0),  # heaps; those of other threads than the main one end at 64 MB. 0: by the cores,
    # but where a thread asked for its heap meanwhile, glibc keeps the limit it met
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


def _as_at_rest() -> None:
    if _glibc():
        for name, (number, _, at_rest) in _MALLOPT.items():
            asked = os.environ.get(name, "")
            _glibc().mallopt(number, int(asked) if asked.isdecimal() else at_rest)
    give_back_memory()


def give_back_memory(*, at_most_every_s: float = 0.0) -> None:
    """Return to the system what of the heap is free, unless that was done only just now."""
    global _given_back
    if _glibc() and _clock() - _given_back >= at_most_every_s:
        _glibc().malloc_trim(0)
        _given_back = _clock()


@contextmanager
def named(stage: str, index: int, total: int) -> Iterator[None]:
    """Add to an error raised inside which task it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised in stage {stage!r}, task {index + 1} of {total}.")
        raise


def log_failures(answers: Mapping[str, object]) -> None:
    """Say which workers, by address, an error came from instead of an answer."""
    for address, answer in answers.items():
        if isinstance(answer, Exception):
            _log.warning("Tidying up failed at %s: %r", address, answer)


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
