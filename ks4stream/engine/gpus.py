"""The GPUs that a process sees, and what is free of their memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ks4stream.errors import SettingsError


class GpuMemory(NamedTuple):
    """Memory of the GPU on which each worker has least.

    Attributes
    ----------
    n_bytes : int
        Free on it before the sort.
    n_workers : int
        That share it.
    """

    n_bytes: int
    n_workers: int


class Free(NamedTuple):
    """What one process sees of the GPU it computes on.

    Attributes
    ----------
    gpu : str
        Which one it is, of all machines.
    n_bytes : int
        Free on it.
    kept_bytes : int
        That this process holds and does not use.
    """

    gpu: str
    n_bytes: int
    kept_bytes: int


def chosen(device: str | torch.device | None, *, here: bool = True) -> str:
    """The device to compute on: what was asked for, or by default the GPU if this process sees one.

    Parameters
    ----------
    device : str, torch.device or None
    here : bool
        Whether it is this process, or one of this machine, that computes: it must see the GPU. Else workers are asked
        (:func:`ks4stream.engine.workers.check`).

    Raises
    ------
    SettingsError
        If it is not a CPU or NVIDIA GPU, or there is none of that number.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = torch.device("meta")  # not to be computed on
    if asked.type not in ("cpu", "cuda"):
        raise SettingsError(f"device={str(device)!r} is not possible; needed is 'cpu', 'cuda' (any GPU) or 'cuda:1'.")
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
            f"device={device!r}, but this process sees {count} GPU(s), 'cuda:0' to 'cuda:{count - 1}'. Name one of "
            "those, or look at CUDA_VISIBLE_DEVICES."
        )
    why = f"torch {torch.__version__} was built without CUDA" if torch.version.cuda is None else "CUDA finds none"
    raise SettingsError(
        f"device={device!r}, but this process sees no GPU ({why}). Pass device='cpu', install a torch with CUDA, or "
        "give a client whose workers have one."
    )


def visible(device: str) -> list[int]:
    """Numbers of the GPUs that a device stands for here: of "cuda" all, of "cuda:1" one, of "cpu" none."""
    asked = torch.device(device)
    there = range(torch.cuda.device_count()) if asked.type == "cuda" else ()
    return [number for number in there if asked.index in (None, number)]


def for_processes(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be in a process for each GPU, so that `device` is that one there.

    One that is asked for by its number has the same number there; else it is the only one.
    """
    numbers, asked = visible(device), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = asked.split(",") if asked else [str(number) for number in range(torch.cuda.device_count())]
    return [",".join(names)] if torch.device(device).index is not None and numbers else [names[n] for n in numbers]


def free(device: str) -> Free | None:
    """What is free on the GPU that `device` is in this process; None where it has none. This starts CUDA."""
    if not visible(device):
        return None
    which = torch.device(device)
    n_bytes, _ = torch.cuda.mem_get_info(which)
    kept = torch.cuda.memory_reserved(which) - torch.cuda.memory_allocated(which)
    return Free(f"{platform.node()} {torch.cuda.get_device_properties(which).uuid}", n_bytes, kept)


def free_here(device: str) -> int | None:
    """Bytes free on the one of the GPUs that `device` stands for where there are fewest; None where there is none."""
    found = [free(f"cuda:{number}") for number in visible(device)]
    return min((one.n_bytes + one.kept_bytes for one in found if one), default=None)


def shared(found: Iterable[Free]) -> GpuMemory | None:
    """Of what all processes see, the GPU on which each has least; None of no process."""
    by_gpu: dict[str, list[Free]] = {}
    for one in found:
        by_gpu.setdefault(one.gpu, []).append(one)
    memory = [
        GpuMemory(min(one.n_bytes for one in those) + sum(one.kept_bytes for one in those), len(those))
        for those in by_gpu.values()
    ]
    return min(memory, key=lambda one: one.n_bytes / one.n_workers, default=None)
