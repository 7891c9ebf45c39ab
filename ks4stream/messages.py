"""What is said while a sort runs, and to which sort: several may run in one process.

All our own warnings go through :func:`warn`. It first records them for the sort they come from, whatever filters
Python's warnings have and whichever of them were shown before, and then shows them by Python's rules.

Which sort that is, and whose log a record belongs to, is kept in a context variable: who listens. A new thread begins
without it, so whoever starts one hands it on with :func:`listeners` and :func:`hand_on` or :func:`heard_by`. Listeners
are not known in other processes: tasks there return what they have to say.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import uuid4

from ks4stream.errors import Ks4StreamWarning

_listeners: ContextVar[tuple[str, ...]] = ContextVar("ks4stream_listeners", default=())
_is_silent: ContextVar[bool] = ContextVar("ks4stream_is_silent", default=False)
_records: dict[str, list[str]] = {}  # of the listeners of this process that keep warnings

_logger = logging.getLogger("ks4stream")


def warn(message: str, category: type[Ks4StreamWarning] = Ks4StreamWarning, stacklevel: int = 1) -> None:
    """Record a warning once for the sort it comes from, write it to the log, and show it as :func:`warnings.warn` does.

    Parameters
    ----------
    message : str
    category : type of Ks4StreamWarning
    stacklevel : int
        As that of :func:`warnings.warn`: 1 names the line that calls this, 2 the caller of that function.
    """
    if _is_silent.get():
        return
    records = [record for listener in _listeners.get() if (record := _records.get(listener)) is not None]
    for record in records:
        if message not in record:  # a stage that is computed again says the same again
            record.append(message)
    if _listeners.get() and _logger.hasHandlers():  # else Python's last resort would show it, against its filters
        _logger.warning("%s", message)
    warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the text of our warnings that come from inside, however they are shown."""
    said: list[str] = []
    with listening() as listener:
        _records[listener] = said
        try:
            yield said
        finally:
            del _records[listener]


@contextmanager
def silent() -> Iterator[None]:
    """Neither record nor show our warnings, as they are said elsewhere."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


@contextmanager
def listening() -> Iterator[str]:
    """The name of a new listener, who hears what is said inside, beside those who do already."""
    listener = uuid4().hex
    with heard_by((*listeners(), listener)):
        yield listener


def listeners() -> tuple[str, ...]:
    """Names of those who hear what is said here; in another process they are unknown."""
    return _listeners.get()


@contextmanager
def heard_by(those: tuple[str, ...]) -> Iterator[None]:
    """What is said inside is heard by those who are named, and by nobody else."""
    token = _listeners.set(those)
    try:
        yield
    finally:
        _listeners.reset(token)


def hand_on(those: tuple[str, ...]) -> None:
    """What this thread says from now on is heard by those who are named."""
    _listeners.set(those)
