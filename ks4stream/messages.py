"""Warnings and log records of a sort, kept apart from those of other sorts in the same process.

All our own warnings go through :func:`warn`. It first records them for the sort they come from, whatever Python's
warning filters are and whether or not the same warning was shown before, and then shows them by Python's rules, as
warnings of the line that called into this package.

A context variable names the listeners: it decides which sort a warning belongs to, and whose log a record goes to. A
new thread starts without it, so whoever starts one passes it on with :func:`listeners` and :func:`hand_on` or
:func:`heard_by`. Listeners are unknown in other processes: tasks there return whatever they have to report.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import uuid4

from ks4stream.errors import Ks4StreamWarning

_listeners: ContextVar[tuple[str, ...]] = ContextVar("ks4stream_listeners", default=())
_is_silent: ContextVar[bool] = ContextVar("ks4stream_is_silent", default=False)
_records: dict[str, list[str]] = {}  # by listener: the warnings recorded for it

DETAIL = 5
"""Level of log records with more detail than DEBUG: every task, and memory after every step."""

_logger = logging.getLogger("ks4stream")


def warn(message: str, category: type[Ks4StreamWarning] = Ks4StreamWarning) -> None:
    """Record a warning once for the sort it comes from, write it to the log, and show it as :func:`warnings.warn` does.

    It names the line outside this package that called into it, however deep in the package it is issued.
    """
    if _is_silent.get():
        return
    records = [record for listener in _listeners.get() if (record := _records.get(listener)) is not None]
    for record in records:
        if message not in record:  # a stage that is computed again warns again
            record.append(message)
    # Without handlers, logging's last resort would show it, whatever the filters are.
    if _listeners.get() and _logger.hasHandlers():
        _logger.warning("%s", message)
    warnings.warn(message, category, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Return the `stacklevel` by which :func:`warn` names the line that called into this package.

    That is the caller of the outermost frame of the package, as frames of other modules (contextlib, torch, Dask) may
    lie between its frames. Frames are told by the name of their module: methods that dataclasses makes have no file.
    """
    frames = traceback.walk_stack(sys._getframe(1))
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    return 1 + max(level for level, name in enumerate(names, 1) if name == __name__.partition(".")[0])


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the texts of our warnings that are issued inside, whether or not they are shown."""
    texts: list[str] = []
    with listening() as listener:
        _records[listener] = texts
        try:
            yield texts
        finally:
            del _records[listener]


@contextmanager
def silent() -> Iterator[None]:
    """Neither record nor show our warnings, which are issued elsewhere too."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


@contextmanager
def listening() -> Iterator[str]:
    """Add a listener, which gets what is logged and warned of inside, as the present ones do; yields its name."""
    listener = uuid4().hex
    with heard_by((*listeners(), listener)):
        yield listener


def listeners() -> tuple[str, ...]:
    """Names of the current listeners; in another process they are unknown."""
    return _listeners.get()


@contextmanager
def heard_by(names: tuple[str, ...]) -> Iterator[None]:
    """Make these, and only these, the listeners of what is logged and warned of inside."""
    token = _listeners.set(names)
    try:
        yield
    finally:
        _listeners.reset(token)


def hand_on(names: tuple[str, ...]) -> None:
    """Make these, and only these, the listeners of this thread from now on."""
    _listeners.set(names)
