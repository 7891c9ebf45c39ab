"""A run of the method in this thread, for benchmarks that compute some of its stages themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ks4stream.engine import Loop, one_thread
from ks4stream.run import Run
from ks4stream.sorter import run_store
from ks4stream.stages.preprocessing import Preprocessor


@contextmanager
def run_here(tiles: Preprocessor) -> Iterator[Run]:
    """A run that computes one task after the other and keeps its files until it ends."""
    with one_thread(), run_store(tiles, None, fresh=True) as store:
        yield Run(Loop(), store, tiles.sampling_rate_hz)
