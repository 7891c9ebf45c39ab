"""What sorts on this machine measured, in a small file, for later plans.

It has the speed of each stage and nothing that tells which recordings were sorted. A file that cannot be read or
written is as good as none: no sort fails for it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ks4stream.errors import Ks4StreamError
from ks4stream.io.atomic import atomic_write
from ks4stream.method import METHOD_VERSION
from ks4stream.timing import Measured

VARIABLE, OFF = "KS4STREAM_CACHE", "off"
VERSION = 2  # of the file and of the units of work: with others, what it has means nothing
MAX_SORTS = 50
MAX_BYTES = 1 << 20  # many times what they take
LARGE = 1e18  # than which no number in it is larger, and its inverse than which none is smaller

_log = logging.getLogger(__name__)


def file() -> Path | None:
    """Where they are kept: the folder that ``KS4STREAM_CACHE`` names, or the user's cache; None if that is "off"."""
    if asked := os.environ.get(VARIABLE, "").strip():
        return None if asked == OFF else Path(asked) / "rates.json"
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        return None
    if sys.platform == "darwin":
        cache = home / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return cache / "ks4stream" / "rates.json"


def known() -> list[Measured]:
    """What earlier sorts with this version of the method measured, the latest last."""
    path = file()
    try:
        if path is None or path.stat().st_size > MAX_BYTES:
            return []
        stored = json.loads(path.read_text(encoding="utf-8"))
        if (stored["version"], stored["method"]) != (VERSION, METHOD_VERSION):
            return []
        return [_checked(values) for values in stored["sorts"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        _log.info("%s cannot be read, so plans do not know the speed of this machine: %r", path, error)
        return []


def keep(one: Measured) -> None:
    """Add what a sort measured."""
    path = file()
    if path is None:
        return
    sorts = [asdict(sort) for sort in (*known(), one)[-MAX_SORTS:]]
    text = json.dumps({"version": VERSION, "method": METHOD_VERSION, "sorts": sorts}, indent=1)
    try:
        with atomic_write(path) as stream:
            stream.write(text.encode())
    except (OSError, Ks4StreamError) as error:
        _log.info("The speed of this machine is not kept for later plans: %s", error)


def _checked(values: dict[str, Any]) -> Measured:
    """One sort of the file.

    Raises
    ------
    ValueError, TypeError, KeyError, AttributeError, OverflowError
        If it is not what was written.
    """
    one = Measured(**{spec.name: values[spec.name] for spec in fields(Measured)})
    stages = {str(name): (float(seconds), float(work)) for name, (seconds, work) in one.stages.items()}
    found = [one.spikes_per_channel_hz, one.peaks_per_spike, one.templates_per_channel, one.n_channels, one.n_workers]
    positive = [*found, *(number for pair in stages.values() for number in pair)]
    if not all(1 / LARGE < number < LARGE for number in positive):
        raise ValueError("a number is not positive, or too large")
    if not (0 <= one.start_s < LARGE and one.moved in (None, 0, 1)):
        raise ValueError(f"start_s={one.start_s!r} or moved={one.moved!r} makes no sense")
    return replace(one, stages=stages)
