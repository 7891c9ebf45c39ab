"""A plain loop in this thread: the oracle the cluster is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ks4stream.engine import gpus
from ks4stream.engine.base import Item, Progress, Result, log_failures, no_progress, run, with_task_note


class Loop:
    """Runs one task after the other."""

    n_workers = 1

    @property
    def worker_memory_bytes(self) -> float:
        """All of this machine's memory."""
        from distributed.system import MEMORY_LIMIT

        return float(MEMORY_LIMIT)

    @property
    def gpu_memory(self) -> gpus.GpuMemory | None:
        """See :class:`~ks4stream.engine.base.Engine`."""
        found = gpus.free(self._device)
        return gpus.shared([found] if found else [])

    def __init__(self, progress: Progress | None = None, *, device: str = "cpu") -> None:
        self._progress, self._device = progress or no_progress, device

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        stage: str,
        work: Sequence[float] = (),
        arrived: Callable[[Result], object] = lambda result: None,
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in order; see :class:`~ks4stream.engine.base.Engine`."""
        self._progress(stage, 0, len(items))
        for index, item in enumerate(items):
            with with_task_note(stage, index, len(items)):
                result = run(function, item)
            arrived(result)
            self._progress(stage, index + 1, len(items))
            yield result

    def run_on_workers(self, function: Callable[[], object]) -> None:
        """Call a function here; see :class:`~ks4stream.engine.base.Engine`."""
        try:
            function()
        except Exception as error:
            log_failures({"this process": error})
