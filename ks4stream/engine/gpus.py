"""The GPUs that a process sees, and how much of their memory is free."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch

from ks4stream.errors import SettingsError


class GpuMemory(NamedTuple):
    """Memory of the GPU on which each worker has least.

    Attributes
    ----------
    n_bytes : int
        Bytes free on it before the sort.
    n_workers : int
        Number of workers that share it.
    """

    n_bytes: int
    n_workers: int


class Free(NamedTuple):
    """What one process sees of the GPU it computes on.

    Attributes
    ----------
    gpu : str
        Identifies it among all machines.
    n_bytes : int
        Bytes free on it.
    kept_bytes : int
        Bytes that this process holds and does not use.
    """

    gpu: str
    n_bytes: int
    kept_bytes: int


class Busy(NamedTuple):
    """What GPUs are doing, for all programs that use them.

    Attributes
    ----------
    n_bytes : int
        Bytes used, of all of them together; without NVIDIA's library, of those on which this process computes.
    percent : float or None
        Mean share of the time in which they computed; None if NVIDIA's library for Python (nvidia-ml-py) is missing.
    """

    n_bytes: int
    percent: float | None


def busy(device: str) -> Busy | None:
    """What the GPUs that `device` stands for are doing; None if there are none, or it cannot be told.

    It never raises. Nor does it start CUDA on a GPU, which would take hundreds of megabytes of it for a process that
    only watches: without NVIDIA's library, only those on which this process computes are asked.
    """
    with suppress(Exception):  # the library is missing, or says that this GPU, or a part of one, does not tell
        if numbers := visible(device):
            used = [torch.cuda.device_memory_used(number) for number in numbers]
            return Busy(sum(used), sum(map(torch.cuda.utilization, numbers)) / len(numbers))
    with suppress(Exception):  # an error of CUDA is for those who compute
        ours = [number for number in visible(device) if torch.cuda.memory_reserved(number) > 0]
        free_and_all = [torch.cuda.mem_get_info(number) for number in ours]
        return Busy(sum(total - n_free for n_free, total in free_and_all), None) if ours else None
    return None


def clear_cache() -> None:
    """Free the GPU memory that torch keeps in this process for later."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def chosen(device: str | torch.device | None, *, here: bool = True) -> str:
    """The device to compute on: the one that was asked for, or by default the GPU if this process sees one.

    Parameters
    ----------
    device : str, torch.device or None
    here : bool
        Whether this process, or another of this machine, computes: it must see the GPU. Otherwise the workers are
        asked (:func:`ks4stream.engine.workers.check`).

    Raises
    ------
    SettingsError
        If it is not a CPU or an NVIDIA GPU, or no GPU has that number.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = torch.device("meta")  # refused below
    if asked.type not in ("cpu", "cuda"):
        raise SettingsError(
            f"device={str(device)!r} is not a valid device; it must be 'cpu', 'cuda' (any GPU) or 'cuda:1'."
        )
    if asked.type == "cpu":
        return "cpu"
    if here:
        _check_seen(str(asked))
    return str(asked)


def _check_seen(device: str) -> None:
    if visible(device):
        return
    count = torch.cuda.device_count()
    if count:
        raise SettingsError(
            f"device={device!r}, but this process sees {count} GPU(s), 'cuda:0' to 'cuda:{count - 1}'. Choose one of "
            "those, or check CUDA_VISIBLE_DEVICES."
        )
    why = f"torch {torch.__version__} was built without CUDA" if torch.version.cuda is None else "CUDA finds none"
    raise SettingsError(
        f"device={device!r}, but this process sees no GPU ({why}). Pass device='cpu', install a torch with CUDA, or "
        "pass a client whose workers have a GPU."
    )


def visible(device: str) -> list[int]:
    """Numbers of the GPUs that a device stands for here: all for "cuda", one for "cuda:1", none for "cpu"."""
    asked = torch.device(device)
    numbers = range(torch.cuda.device_count()) if asked.type == "cuda" else ()
    return [number for number in numbers if asked.index in (None, number)]


def for_processes(device: str) -> list[str]:
    """For each GPU, the CUDA_VISIBLE_DEVICES of a process in which `device` is that GPU.

    A GPU that was asked for by number keeps its number in that process; otherwise it is the only one there.
    """
    numbers, asked = visible(device), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = asked.split(",") if asked else [str(number) for number in range(torch.cuda.device_count())]
    return [",".join(names)] if torch.device(device).index is not None and numbers else [names[n] for n in numbers]


def free(device: str) -> Free | None:
    """Free memory of the GPU that `device` is in this process; None if there is none. Starts CUDA."""
    if not visible(device):
        return None
    which = torch.device(device)
    n_bytes, _ = torch.cuda.mem_get_info(which)
    kept = torch.cuda.memory_reserved(which) - torch.cuda.memory_allocated(which)
    return Free(f"{platform.node()} {torch.cuda.get_device_properties(which).uuid}", n_bytes, kept)


def free_here(device: str) -> int | None:
    """Fewest bytes free on any of the GPUs that `device` stands for; None if there is none."""
    found = [free(f"cuda:{number}") for number in visible(device)]
    return min((gpu.n_bytes + gpu.kept_bytes for gpu in found if gpu), default=None)


def shared(found: Iterable[Free]) -> GpuMemory | None:
    """Of the GPUs that all processes see, the one on which each process has least; None if there are no processes."""
    by_gpu: dict[str, list[Free]] = {}
    for view in found:
        by_gpu.setdefault(view.gpu, []).append(view)
    memory = [
        GpuMemory(min(view.n_bytes for view in views) + sum(view.kept_bytes for view in views), len(views))
        for views in by_gpu.values()
    ]
    return min(memory, key=lambda gpu: gpu.n_bytes / gpu.n_workers, default=None)
