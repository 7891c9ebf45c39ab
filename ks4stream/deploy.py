"""Where a sort computes: the caller's Dask client, this thread, or workers on this machine, and how many."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ks4stream.engine import Engine, Loop, Progress, gpus, tell
from ks4stream.errors import LostWorkerError, MachineWarning, RecordingError
from ks4stream.io.recording_cache import CachedSource, forget
from ks4stream.messages import warn
from ks4stream.pipeline import STAGES
from ks4stream.recording import Recording
from ks4stream.resources import Resources
from ks4stream.settings import Settings
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import tiling_of

logger = logging.getLogger("ks4stream")

SPIKES_PER_CHANNEL_HZ = 10.0  # 13 hours of 384 channels with 150 million spikes have 8.3
PYTHON_BYTES = 460 << 20  # a process with torch and distributed, before its first task
PROCESSES_FROM_CHANNEL_S = 1500  # seconds of recording × channels; less is sorted in threads
PROCESS_CHANNEL_S = 250  # about 2 s of one core, as long as a process takes to load torch: at least so much for each
SHARED_GPU_FROM_CHANNEL_S = 40_000  # less is sorted with one process per GPU


@contextmanager
def engine_for(
    recording: Recording,
    settings: Settings,
    resources: Resources,
    device: str,
    progress: Progress | None = None,
    *,
    client: Any,
) -> Iterator[Engine]:
    """The engine to compute with: a client or the scheduler at an address, this thread ("loop"), or this machine.

    `client` is what :func:`client_for` returned when `device` was chosen.
    """
    if client in (None, "loop"):
        tell(progress, device=device)
    if client == "loop":
        yield Loop(progress, device=device)
        return
    from ks4stream.engine import cluster

    with ExitStack() as stack:
        is_own = client is None
        if is_own:
            workers = resources.workers or fitting_workers(recording, settings, resources, device)
            enough = device.startswith("cuda") or for_processes(recording, settings) >= PROCESSES_FROM_CHANNEL_S
            local = cluster.local_client(n_workers=workers, processes=None if enough else False, device=device)
            client = stack.enter_context(local)
        elif isinstance(client, str):
            client = stack.enter_context(cluster.connected(client))
        elif client is cluster.active_client():
            logger.info("Computing on the active Dask client, %r; without one, on this machine.", client)
        if not is_own and not client.scheduler.address.startswith("inproc://"):
            _check_can_be_sent(recording)
        engine = cluster.Cluster(client, progress, device=device)
        if not is_own:
            tell(progress, dashboard=engine.dashboard)
        if not is_own and resources.device is None and device == "cpu" and (idle := engine.workers_with_gpu()):
            warn(
                f"{len(idle)} of the client's workers see a GPU (for instance the one at {idle[0]}), but this process "
                "does not, so the CPUs compute. Pass device='cuda' to use the GPUs, or device='cpu' to keep it so.",
                MachineWarning,
            )
        yield engine


def _check_can_be_sent(recording: Recording) -> None:
    """Raise a RecordingError if the samples cannot be read in other processes, before one is asked to."""
    if recording.source.only_here:
        raise RecordingError(recording.source.only_here)


def client_for(resources: Resources) -> Any:
    """The client that was given, or else the active one, unless workers on this machine were asked for."""
    if resources.client is not None or resources.workers is not None or "distributed" not in sys.modules:
        return resources.client  # in the last case no client can be active
    from ks4stream.engine import cluster

    return cluster.active_client()


def forget_on_workers(client: Any, caches: list[CachedSource]) -> None:
    """Make the workers of a client, or of the scheduler at an address, delete what caches keep on their machines.

    Failures are logged, not raised: the results have been written.
    """
    from ks4stream.engine import cluster

    with ExitStack() as stack:
        if isinstance(client, str):
            try:
                client = stack.enter_context(cluster.connected(client))
            except LostWorkerError as error:
                logger.warning("What was cached on the workers' machines stays there: %s", error)
                return
        cluster.Cluster(client).run_on_workers(partial(forget, caches))


def needs_of(load: Load) -> tuple[Needs, ...]:
    """The needs of each stage and step, in their order."""
    return tuple(stage.needs(load) for stage in STAGES)


def fitting_workers(recording: Recording, settings: Settings, resources: Resources, device: str) -> int:
    """Number of workers for this sort on this machine, by default."""
    from ks4stream.engine import cluster

    channel_s = for_processes(recording, settings)
    if not gpus.visible(device):
        most = cluster.local_workers(device)
        are_threads = channel_s < PROCESSES_FROM_CHANNEL_S or sys.platform == "win32"
        return most if are_threads else min(most, int(channel_s) // PROCESS_CHANNEL_S)
    if channel_s < SHARED_GPU_FROM_CHANNEL_S:
        return cluster.local_workers(device)
    tiling = tiling_of(recording, settings)
    needs = needs_of(Load(recording, settings, tiling, device, SPIKES_PER_CHANNEL_HZ, resources.block_batches))
    share = cluster.Share(
        memory_bytes=PYTHON_BYTES + max(need.memory_bytes for need in needs),
        gpu_bytes=max(need.gpu_bytes for need in needs),
    )
    return cluster.local_workers(device, sharing=share)


def for_processes(recording: Recording, settings: Settings) -> float:
    """How much there is to sort that other processes can read, in seconds × channels; arrays in memory cannot be."""
    if not recording.files or recording.probe is None:
        return 0.0
    tiling = tiling_of(recording, settings)
    return tiling.n_tiles * tiling.size / recording.sampling_rate_hz * recording.probe.n_channels
