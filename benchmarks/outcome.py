"""What one run of a sorter leaves in its folder, whichever sorter it was.

``result.npz`` holds ``sample`` and ``unit``, one entry per spike. ``figures.json`` holds what the run was asked to
do (``asked``), what it took (``sort_wall_s``, ``stage_s``, …) and with which versions. Standard library and NumPy
only: this is imported in Kilosort4's environment as well as in ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request(recording: Path, probe: Path, settings: Mapping[str, Any], bad_channels: Sequence[int]) -> dict[str, Any]:
    """Describe what a sorter is asked to do; two runs with equal requests sort the same samples in the same way."""
    return {
        "recording_sha256": file_digest(recording),
        "probe": json.loads(probe.read_text()),
        "settings": dict(settings),
        "bad_channels": sorted(bad_channels),
    }


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE, the value written as in JSON, or a word.

    >>> parse_settings(["nblocks=0", "templates_from_data=false", "Th_learned=auto"])
    {'nblocks': 0, 'templates_from_data': False, 'Th_learned': 'auto'}
    """
    return {name: _parsed(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def _parsed(value: str) -> Any:
    return value if value.isalpha() and value not in ("true", "false", "null") else json.loads(value)


def parse_channels(text: str) -> list[int]:
    """Channels from "7,15,22"; none from an empty text."""
    return [int(channel) for channel in text.split(",") if channel]


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed packages among those named."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The machine this runs on, as far as it bears on times."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def describe(found: Mapping[str, Any]) -> str:
    """What :func:`machine` found, on one line."""
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']:.0f} GB, {found['system']}, "
        f"load average {found['load']:.1f}"
    )


def write(folder: Path, *, sample: Any, unit: Any, figures: Mapping[str, Any]) -> None:
    """Write both files; the figures last, so that a folder that has them is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "result.npz", sample=np.asarray(sample, np.int64), unit=np.asarray(unit, np.int64))
    (folder / "figures.json").write_text(json.dumps(figures, indent=1, default=str))


def add(folder: Path, **figures: Any) -> None:
    """Add to the figures of a folder."""
    path = folder / "figures.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures, indent=1, default=str))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the figures and the arrays ``sample`` and ``unit``."""
    with np.load(folder / "result.npz") as file:
        return json.loads((folder / "figures.json").read_text()), dict(file)
