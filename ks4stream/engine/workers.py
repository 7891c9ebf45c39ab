"""Whether all workers compute the same: versions, processor and GPUs of each process.

Results are the same to the last bit only if the code, the libraries, the processor and (if used) the GPU model are.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ks4stream.stages.units  # noqa: F401  so that a worker has loaded all that tasks need
from ks4stream.engine.base import one_thread
from ks4stream.engine.gpus import visible
from ks4stream.errors import VersionWarning, WorkerError
from ks4stream.messages import warn

LIBRARIES = ("torch", "numpy", "scipy", "dask", "distributed")
NO_GPU = "none"
Facts = dict[str, str]


_for_life = ExitStack()


def dask_setup(worker: object) -> None:
    """Called by Dask in a local worker process when it starts.

    What a task otherwise sets while it runs is set for good, as the process does nothing else. It would return its
    memory to the system after every task, and the system would clear it page by page for the next.
    """
    _for_life.enter_context(one_thread())


@functools.cache
def code_digest() -> str:
    """Hash of this package's code: versions do not change while code is being worked on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def facts(*, gpu: bool, device: str = "cuda") -> Facts:
    """What results depend on in this process.

    Parameters
    ----------
    gpu : bool
        Whether the GPU is used and its model matters: asking for it starts CUDA.
    device : str
        Which GPU: "cuda" is any.
    """
    found = {"Python": platform.python_version(), "ks4stream": f"{_version('ks4stream')} (code {code_digest()})"}
    found |= {name: _version(name) for name in LIBRARIES}
    found["processor"] = processor()
    if gpu:
        names = {torch.cuda.get_device_name(number) for number in visible(device)}
        found["GPU"] = ", ".join(sorted(names)) or NO_GPU
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def processor() -> str:
    """Vendor, family and model if the system says, and the instruction set that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = [known[name] for name in ("vendor_id", "cpu family", "model") if name in known]
    return " ".join([*(model or [platform.machine(), platform.processor()]), torch.backends.cpu.get_cpu_capability()])


def check(here: Facts, workers: Mapping[str, Facts | BaseException]) -> None:
    """Compare the workers with this process.

    Parameters
    ----------
    here : dict of str
        Facts of this process.
    workers : dict of str to dict of str, or to an exception
        By address: each worker's facts, or what asking for them raised.

    Raises
    ------
    WorkerError
        If a worker lacks a library, our code or a GPU that was asked for.

    Warns
    -----
    VersionWarning
        If something that results depend on differs between workers.
    """
    for address, answer in workers.items():
        if isinstance(answer, ImportError | AttributeError):  # the latter from a version without this function
            raise WorkerError(
                f"The worker at {address} cannot compute: {answer}. Install this process's versions on all workers: "
                + ", ".join(f"{name} {here[name]}" for name in ("ks4stream", "torch", "numpy"))
                + "."
            ) from answer
        if isinstance(answer, Exception):
            raise WorkerError(f"The worker at {address} did not answer: {answer!r}. Restart it.") from answer
    known = {address: answer for address, answer in workers.items() if isinstance(answer, dict)}
    for address, answer in known.items():
        if answer.get("GPU") == NO_GPU:
            raise WorkerError(
                f"The worker at {address} sees no GPU, or none with the number asked for, but the device is 'cuda', "
                "which is the default if this process sees a GPU. Pass device='cpu' to use the workers' CPUs, "
                "or workers= to compute on this machine. Or start the workers that have a GPU with --resources GPU=1: "
                "tasks then go only to those."
            )
    if here.get("GPU") == NO_GPU:  # nothing here runs on a GPU, so the workers' need only be alike among themselves
        here = here | {"GPU": next((answer["GPU"] for answer in known.values()), NO_GPU)}
    differences = [line for name in here for line in _differences(name, here[name], known)]
    if differences:
        warn(
            "The workers differ. Results are identical from run to run, to the last bit, only if versions, processors "
            "and (if used) GPU models are. " + "; ".join(differences) + ".",
            VersionWarning,
        )


def _differences(name: str, here: str, workers: Mapping[str, Facts]) -> list[str]:
    """For each value that differs from ours, one worker that has it."""
    others = {answer.get(name, "unknown"): address for address, answer in workers.items()}
    others.pop(here, None)
    return [f"{name}: {here} here, {value} at {address}" for value, address in sorted(others.items())]
