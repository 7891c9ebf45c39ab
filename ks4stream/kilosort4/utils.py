"""Kilosort4's module ``utils``: where probes are, and what a computation uses."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ks4stream.io.probes import shipped_probes

__all__ = [
    "DOWNLOADS_DIR",
    "PROBE_DIR",
    "download_probes",
    "get_performance",
    "log_performance",
    "ops_as_string",
    "probe_as_string",
]

DOWNLOADS_DIR = Path(os.environ.get("KILOSORT_LOCAL_DOWNLOADS_PATH") or Path.home() / ".kilosort")
"""Kilosort4's folder in this user's home; nothing is downloaded to it here."""

PROBE_DIR = DOWNLOADS_DIR / "probes"
"""Where Kilosort4 keeps probes, and users theirs; ``probe_name`` may name a file in it. Probes that come with ks4stream
need not be there."""

_GB = 1024**3
_SHORT = 1000  # entries of arrays that are written out

logger = logging.getLogger("ks4stream")


def download_probes(probe_dir: str | os.PathLike[str] | None = None) -> None:
    """Copy the probes that come with ks4stream into a folder; nothing is downloaded.

    Parameters
    ----------
    probe_dir : path, optional
        Files that are already there are left alone. By default nothing is done, as these probes are found by name.
    """
    if probe_dir is None:
        return
    folder = Path(probe_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for file in shipped_probes().values():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def get_performance() -> dict[str, dict[str, float | None] | None]:
    """What all programs together use of this machine now.

    Returns
    -------
    dict
        "cpu": ``util``, ``mem_avail``, ``mem_total``, ``mem_used`` and ``mem_pct``. "gpu": the same of the current GPU,
        and ``alloc``, ``alloc_pct``, ``max_alloc`` and ``max_alloc_pct`` of this process; None if there is no GPU.
        ``util`` and ``…_pct`` are percentages, the others GB (2³⁰ bytes).
    """
    import psutil

    memory = psutil.virtual_memory()
    cpu: dict[str, float | None] = {
        "util": float(psutil.cpu_percent()),
        "mem_avail": memory.available / _GB,
        "mem_total": memory.total / _GB,
        "mem_used": (memory.total - memory.available) / _GB,
        "mem_pct": float(memory.percent),
    }
    return {"cpu": cpu, "gpu": _gpu_performance() if torch.cuda.is_available() else None}


def _gpu_performance() -> dict[str, float | None]:
    available, total = torch.cuda.mem_get_info()
    allocated, largest = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        utilization: float | None = float(torch.cuda.utilization())
    except Exception:  # without NVIDIA's management library, or if it cannot be asked
        utilization = None
    return {
        "util": utilization,
        "mem_avail": available / _GB,
        "mem_total": total / _GB,
        "mem_used": (total - available) / _GB,
        "mem_pct": 100 * (total - available) / total,
        "alloc": allocated / _GB,
        "alloc_pct": 100 * allocated / total,
        "max_alloc": largest / _GB,
        "max_alloc_pct": 100 * largest / total,
    }


def log_performance(
    log: logging.Logger | None = None, level: str | None = None, header: str | None = None, reset: bool = False
) -> None:
    """Log what :func:`get_performance` returns.

    Parameters
    ----------
    log : logging.Logger, optional
        By default ks4stream's.
    level : str, optional
        Level of the message; by default "debug".
    header : str, optional
        A line before it.
    reset : bool
        Afterwards, start over with the largest amount of GPU memory.
    """
    lines = [] if header is None else [header]
    for name, found in get_performance().items():
        if found is not None:
            values = (f"{key} {value:.2f}" for key, value in found.items() if value is not None)
            lines.append(f"{name.upper()}: {', '.join(values)}")
    (log or logger).log(logging.getLevelNamesMapping()[(level or "debug").upper()], "\n".join(lines))
    if reset and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def probe_as_string(probe: Mapping[str, Any]) -> str:
    """A probe as Python source, for which NumPy is ``np``."""
    return _source("probe", probe)


def ops_as_string(ops: Mapping[str, Any]) -> str:
    """An ``ops`` as Python source, without ``settings`` and ``probe``, which repeat what it has.

    NumPy is ``np`` in it, and torch ``torch``. Paths are strings, a Dask client is the address of its scheduler, large
    arrays are zeros, and objects of other classes None; a comment says so.
    """
    return _source("ops", {name: value for name, value in ops.items() if name not in ("settings", "probe")})


def _source(name: str, values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        remarks: list[str] = []
        lines.append(f"    {_literal(key, remarks)}: {_literal(value, remarks)},")
        if remarks:
            lines[-1] += f"  # not the values of: {', '.join(remarks)}"
    return "\n".join([f"{name} = {{", *lines, "}", ""])


def _literal(value: Any, remarks: list[str]) -> str:
    """A value as source; what is not written out is added to the remarks."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key, remarks)}: {_literal(one, remarks)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        entries = ", ".join(_literal(one, remarks) for one in value)
        if isinstance(value, tuple):
            return f"({entries},)" if value else "()"
        return f"[{entries}]" if isinstance(value, list) else f"{type(value).__name__}([{entries}])"
    if isinstance(value, np.ndarray):
        return _array(value, "np.array", "np.zeros", f"dtype={value.dtype.str!r}", remarks)
    if torch.is_tensor(value):
        return _array(value, "torch.tensor", "torch.zeros", f"dtype={value.dtype}", remarks)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'
    if isinstance(value, complex):
        return f"complex({_literal(value.real, remarks)}, {_literal(value.imag, remarks)})"
    kinds: tuple[Any, ...] = (bool, int, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return repr(kind(value))  # a subclass may write itself in another way
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, np.dtype | torch.device):
        return repr(str(value))
    if type(value).__module__.startswith("distributed."):
        return repr(str(value.scheduler.address))
    if value is not None:
        remarks.append(f"a {type(value).__name__}")
    return "None"


def _array(value: Any, make: str, make_zeros: str, dtype: str, remarks: list[str]) -> str:
    size, shape = math.prod(value.shape), tuple(value.shape)
    if 0 < size <= _SHORT:
        return f"{make}({_literal(value.tolist(), remarks)}, {dtype})"
    if size:
        remarks.append(f"{'×'.join(map(str, shape))} numbers")
    return f"{make_zeros}({shape}, {dtype})"
