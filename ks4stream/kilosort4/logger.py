"""Kilosort4's logger, for callers who read the console or ``kilosort4.log`` while functions are called one by one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ks4stream.errors import ResultsError
from ks4stream.kilosort4.arguments import PathLike
from ks4stream.messages import DETAIL
from ks4stream.report.log import LOG_NAME

NAME = "kilosort"

_ours = logging.getLogger("ks4stream")


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
    close_logger()
    path = Path(results_dir) / LOG_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ResultsError(
            f"The log {path} cannot be written: {error.strerror or error}. Choose another results_dir."
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)-8s %(message)s"))
    file.setLevel(logging.DEBUG)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    console.setLevel(logging.DEBUG if verbose_console else logging.INFO)
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.DEBUG)
    for handler in (file, console):
        logger.addHandler(handler)
    _Forwarder.start()


def close_logger() -> None:
    """Undo :func:`setup_logger`."""
    logger = logging.getLogger(NAME)
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    _Forwarder.stop()


@contextmanager
def detailed(is_wanted: bool) -> Iterator[None]:
    """Log more inside, if that is wanted: each task as it ends, and memory after each step."""
    complete = [handler for handler in logging.getLogger(NAME).handlers if handler.level <= logging.DEBUG]
    loggers = [_ours, logging.getLogger(NAME)]
    both: list[logging.Handler | logging.Logger] = [*complete, *loggers]
    before = [(one, one.level) for one in both]
    if is_wanted:
        for one, level in before:
            one.setLevel(min(DETAIL, level or DETAIL))
    try:
        yield
    finally:
        for one, level in before:
            one.setLevel(level)


class _Forwarder(logging.Handler):
    """Passes what ks4stream logs to the logger "kilosort", until that has no handlers any more."""

    level_before = logging.NOTSET

    @classmethod
    def start(cls) -> None:
        if not any(isinstance(handler, cls) for handler in _ours.handlers):
            cls.level_before = _ours.level
            _ours.addHandler(cls())
            _ours.setLevel(logging.DEBUG)

    @classmethod
    def stop(cls) -> None:
        for handler in tuple(_ours.handlers):
            if isinstance(handler, cls):
                _ours.removeHandler(handler)
                _ours.setLevel(cls.level_before)

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(NAME)
        if not logger.handlers:  # callers close them by themselves
            self.stop()
        elif logger.isEnabledFor(record.levelno):
            logger.handle(record)
