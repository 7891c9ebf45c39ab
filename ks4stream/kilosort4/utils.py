"""Kilosort4's module ``utils``: where probes are, and what a computation uses."""

from __future__ import annotations

import logging
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
    """A probe as Python source."""
    return _source("probe", probe)


def ops_as_string(ops: Mapping[str, Any]) -> str:
    """An ``ops`` as Python source, without ``settings`` and ``probe``, which repeat what it has."""
    return _source("ops", {name: value for name, value in ops.items() if name not in ("settings", "probe")})


def _source(name: str, values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        source, hash_mark, remark = _literal(value).partition("  #")
        lines.append(f"    {key!r}: {source},{hash_mark}{remark}")
    return "\n".join([f"{name} = {{", *lines, "}", ""])


def _literal(value: Any) -> str:
    """A value as source; of large arrays, only shape and type."""
    if torch.is_tensor(value):
        is_short = value.numel() <= _SHORT
        return f"torch.tensor({value.tolist()!r})" if is_short else f"torch.zeros{tuple(value.shape)}  # not its values"
    if isinstance(value, np.ndarray):
        dtype = f"dtype={value.dtype.str!r}"
        is_short = value.size <= _SHORT
        return (
            f"np.array({value.tolist()!r}, {dtype})"
            if is_short
            else f"np.zeros({value.shape}, {dtype})  # not its values"
        )
    return repr(value)
