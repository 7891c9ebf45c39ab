"""Kilosort4's logger, for callers who read the console or ``kilosort4.log`` while functions are called one by one."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ks4stream.errors import ResultsError
from ks4stream.kilosort4.arguments import PathLike
from ks4stream.messages import DETAIL
from ks4stream.report.log import LOG_NAME, attach, detach, is_on_console

NAME = "kilosort"

_ours, _theirs = logging.getLogger("ks4stream"), logging.getLogger(NAME)
_lock = threading.RLock()
_forwarder: _Forwarder | None = None  # while there are handlers
_level_before = logging.NOTSET  # of the logger "kilosort", while there is a forwarder
_n_detailed = 0


def setup_logger(results_dir: PathLike, verbose_console: bool = False) -> None:
    """Log to ``kilosort4.log`` and to the console from now on, until :func:`close_logger`.

    The handlers are those of the logger "kilosort", as callers such as SpikeInterface expect.

    Parameters
    ----------
    results_dir : path
        Created if necessary.
    verbose_console : bool
        Show on the console everything that goes to the file.

    Raises
    ------
    ResultsError
        If the log cannot be written.
    """
    global _forwarder, _level_before
    with _lock:
        close_logger()
        path = Path(results_dir) / LOG_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _LogFile(path, encoding="utf-8")
        except OSError as error:
            raise ResultsError(
                f"The log {path} cannot be written: {error.strerror or error}. Choose another results_dir."
            ) from error
        file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)-8s %(message)s"))
        file.setLevel(DETAIL)  # the forwarder decides what it gets of our messages
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        console.setLevel(DETAIL if verbose_console else logging.INFO)
        _level_before = _theirs.level
        _theirs.setLevel(DETAIL)
        for handler in (file, console):
            _theirs.addHandler(handler)
        _forwarder = _Forwarder()
        _show_detail()


def close_logger() -> None:
    """Undo :func:`setup_logger`."""
    with _lock:
        for handler in tuple(_theirs.handlers):
            _theirs.removeHandler(handler)
            handler.close()
        _stop_if_unused()


@contextmanager
def detailed(is_wanted: bool) -> Iterator[None]:
    """Log more inside, if that is wanted: each task as it ends, and memory after each step."""
    global _n_detailed
    if not is_wanted:
        yield
        return
    wish = logging.NullHandler()  # also without setup_logger, for handlers that callers have added
    attach(wish, DETAIL)
    with _lock:
        _n_detailed += 1
        _show_detail()
    try:
        yield
    finally:
        with _lock:
            _n_detailed -= 1
            _show_detail()
        detach(wish)


def _show_detail() -> None:
    """Forward detail as long as somebody wants it."""
    if _forwarder is not None:
        attach(_forwarder, DETAIL if _n_detailed else logging.DEBUG)


def _stop_if_unused() -> None:
    """Leave both loggers as they were before :func:`setup_logger` once all handlers are gone or closed."""
    global _forwarder
    with _lock:
        if not all(map(_is_closed, _theirs.handlers)):  # another thread has set them up meanwhile
            return
        if _forwarder is not None:
            # A new list, as a message may be on its way through the old one.
            _ours.handlers = [handler for handler in _ours.handlers if handler is not _forwarder]
            detach(_forwarder)
            _forwarder = None
            _theirs.setLevel(_level_before)
        for handler in tuple(_theirs.handlers):
            _theirs.removeHandler(handler)


class _LogFile(logging.FileHandler):
    """A log that stays closed; one of logging would open its file again for the next message."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_closed(self):
            super().emit(record)


class _Forwarder(logging.Handler):
    """Passes what ks4stream logs to the handlers of "kilosort", until all of them are gone or closed.

    It passes nothing to handlers further up, which get the same messages from the logger "ks4stream", and nothing to a
    file or the console that shows them already.
    """

    def emit(self, record: logging.LogRecord) -> None:
        handlers = [handler for handler in tuple(_theirs.handlers) if not _is_closed(handler)]
        if not handlers:  # callers close them by themselves
            _stop_if_unused()
        elif _theirs.isEnabledFor(record.levelno) and _theirs.filter(record):
            written, is_shown = _files(record), is_on_console(record)
            for handler in handlers:
                is_seen = getattr(handler, "baseFilename", None) in written or (is_shown and _is_console(handler))
                if record.levelno >= handler.level and not is_seen:
                    handler.handle(record)


def _files(record: logging.LogRecord) -> set[str]:
    """Files to which our own logger writes a message, such as the log of a whole sort."""
    return {
        handler.baseFilename
        for handler in tuple(_ours.handlers)
        if isinstance(handler, logging.FileHandler) and record.levelno >= handler.level and handler.filter(record)
    }


def _is_console(handler: logging.Handler) -> bool:
    """Whether it is ours, and callers have not sent it elsewhere."""
    return type(handler) is logging.StreamHandler and handler.stream is sys.stdout


def _is_closed(handler: logging.Handler) -> bool:
    return bool(getattr(handler, "_closed", False))  # logging has no other name for it
