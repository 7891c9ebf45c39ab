"""Where work runs: a plain loop, or a Dask cluster. The only layer that knows ``distributed``.

An :class:`Engine` has one verb for work, ``map(function, items)``: the results of a picklable callable over small
items, in the items' order. Callers never learn where, or in which order, they were computed.
``run_on_workers(function)`` tidies up what tasks have left on the workers' machines.
"""

from ks4stream.engine.base import (
    Engine,
    Progress,
    give_back_memory,
    no_progress,
    one_thread,
    peak_bytes,
    resident_bytes,
    tell,
)
from ks4stream.engine.loop import Loop

__all__ = [
    "Engine",
    "Loop",
    "Progress",
    "give_back_memory",
    "no_progress",
    "one_thread",
    "peak_bytes",
    "resident_bytes",
    "tell",
]
