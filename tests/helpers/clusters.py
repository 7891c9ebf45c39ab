"""Clusters as a user starts them, beside whatever else runs on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client, LocalCluster

from ks4stream.engine.cluster import QUIET_SCHEDULER


@contextmanager
def users_cluster(
    n_workers: int, *, processes: bool = False, timeout_s: float | None = None, **options: Any
) -> Iterator[Client]:
    """A client of a user's own cluster, with one thread per worker unless `options` say otherwise.

    On any free port: `dashboard_address=None` alone still asks for 8787, which another cluster may have.
    """
    options = {"threads_per_worker": 1, "memory_limit": 0, "silence_logs": 40} | options
    with (
        LocalCluster(n_workers=n_workers, processes=processes, scheduler_kwargs=QUIET_SCHEDULER, **options) as cluster,
        Client(cluster) as client,
    ):
        if timeout_s is not None:
            client._timeout = timeout_s  # from now on: to connect, it may need longer on a busy machine
        yield client
