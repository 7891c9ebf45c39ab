"""``kilosort4.log``: what was sorted, how, with which versions, on what machine, and how long it took.

ks4stream logs to the logger ``ks4stream``. :func:`run_log` sends it to a file (and to the console, if asked)
for the duration of one sort and leaves the logger as it was. If several sorts run in one process, each log gets the
messages of its own sort (:mod:`ks4stream.messages`).
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from ks4stream.errors import ResultsError
from ks4stream.messages import DETAIL, listeners, listening
from ks4stream.recording import Recording
from ks4stream.settings import Settings

__all__ = ["LOG_NAME", "log_inputs", "run_log"]

LOG_NAME = "kilosort4.log"
_PACKAGES = ("ks4stream", "numpy", "scipy", "torch", "dask", "distributed", "xarray", "zarr", "matplotlib")

_logger = logging.getLogger("ks4stream")
_lock = threading.Lock()
_attached: dict[logging.Handler, int] = {}  # handlers of all sorts of this process, and the level each wants to see
_level_before = logging.NOTSET  # the logger's level before the first of them was attached


@contextmanager
def run_log(
    folder: str | os.PathLike[str], *, verbose_console: bool | None = None, verbose_log: bool = False
) -> Iterator[logging.Logger]:
    """Log a sort to ``kilosort4.log``.

    Nested for the same folder it changes nothing, so that every level of the interface can use it. An error that ends
    the sort is logged with its traceback and raised again.

    Parameters
    ----------
    folder : path
        Results folder; created if necessary. An existing log is appended to: the log of a resumed run is complete, and
        a run that is refused because another one is writing there does not damage the other's log.
    verbose_console : bool, optional
        None: nothing on the console. False: main messages. True: everything that goes to the file.
    verbose_log : bool, optional
        Also log each task as it ends, and memory after each step.

    Yields
    ------
    logging.Logger
        The logger ``ks4stream``.

    Raises
    ------
    ResultsError
        If the log cannot be written.
    """
    path = Path(folder).absolute() / LOG_NAME
    if any(isinstance(handler, _LogFile) and handler.is_of(path) for handler in tuple(_logger.handlers)):
        yield _logger
        return
    with ExitStack() as stack:
        everything = DETAIL if verbose_log else logging.DEBUG
        handlers = {_file_handler(path): everything}
        if verbose_console is not None:
            handlers[_console_handler()] = everything if verbose_console else logging.INFO
        own = _OfOneSort(stack.enter_context(listening()))
        for handler, level in handlers.items():
            handler.addFilter(own)
            attach(handler, level)
            stack.callback(detach, handler)
        _log_environment()
        began = time.perf_counter()
        try:
            yield _logger
        except BaseException:
            _logger.debug("Stopped after %.1f s by an error:", time.perf_counter() - began, exc_info=True)
            raise
        _logger.info("Finished in %.1f s", time.perf_counter() - began)


def length_before(folder: Path, now_bytes: int) -> int:
    """Size of a folder's log in bytes before this sort began to write to it; its present size if it has not."""
    path = folder.absolute() / LOG_NAME
    logs = [log for log in tuple(_logger.handlers) if isinstance(log, _LogFile) and log.is_of(path)]
    return min((log.bytes_before for log in logs), default=now_bytes)


def log_inputs(recording: Recording, settings: Settings, **options: Any) -> None:
    """Log what is sorted and how: the recording, its probe, every setting, and further options by name."""
    _logger.info("Sorting %r", recording)
    for file in recording.files:
        _logger.debug("file: %s", file)
    default = asdict(Settings())
    for name, value in settings.to_dict().items():
        _logger.debug("%s = %r%s", name, value, "" if value == default[name] else f"  (default {default[name]!r})")
    for name, value in options.items():
        _logger.debug("%s = %r", name, value)
    if recording.probe is not None:
        probe = recording.probe
        for row in zip(probe.chan_map, probe.x_um, probe.y_um, probe.shank, strict=True):
            _logger.debug("channel %d: x %g µm, y %g µm, shank %d", *row)


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    except OSError as error:
        raise ResultsError(
            f"The log {path} cannot be written: {error.strerror or error}. Choose another results_dir."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)-8s %(message)s"))
    return handler


def is_on_console(record: logging.LogRecord) -> bool:
    """Whether a sort that is running shows a record on the console."""
    return any(
        isinstance(handler, _Console) and record.levelno >= handler.level and handler.filter(record)
        for handler in tuple(_logger.handlers)
    )


def _console_handler() -> logging.Handler:
    handler = _Console(sys.stderr)
    handler.setFormatter(logging.Formatter("ks4stream: %(message)s"))
    return handler


class _OfOneSort(logging.Filter):
    """Passes records that are logged where a listener is active."""

    def __init__(self, listener: str) -> None:
        super().__init__()
        self.listener = listener

    def filter(self, record: logging.LogRecord) -> bool:
        return self.listener in listeners()


class _Console(logging.StreamHandler[TextIO]):
    """What one sort shows."""


class _LogFile(logging.FileHandler):
    """A log that ignores a full disk, which the sort itself reports."""

    def __init__(self, path: Path) -> None:
        self.bytes_before = path.stat().st_size if path.exists() else 0
        super().__init__(path, encoding="utf-8")

    def is_of(self, path: Path) -> bool:
        """Whether this handler writes the current sort's records to the file at this path."""
        own = [each.listener for each in self.filters if isinstance(each, _OfOneSort)]
        return self.baseFilename == str(path) and any(name in listeners() for name in own)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def attach(handler: logging.Handler, level: int) -> None:
    """Add a handler to the logger, and lower the logger's level to what the handler wants."""
    global _level_before
    handler.setLevel(level)
    with _lock:
        if not _attached:
            _level_before = _logger.level
        _attached[handler] = level
        _logger.addHandler(handler)
        _logger.setLevel(_wanted_level())


def detach(handler: logging.Handler) -> None:
    """Undo :func:`attach`; sorts may end in any order."""
    with _lock:
        _logger.removeHandler(handler)
        del _attached[handler]
        _logger.setLevel(_wanted_level())
    handler.close()


def _wanted_level() -> int:
    return min([*_attached.values(), *([_level_before] if _level_before or not _attached else [])])


def _log_environment() -> None:
    _logger.info("ks4stream %s", version_of("ks4stream"))
    _logger.debug("Python %s on %s %s", platform.python_version(), platform.platform(), platform.machine())
    _logger.debug("%s", ", ".join(f"{name} {version_of(name)}" for name in _PACKAGES[1:]))
    _logger.debug("%d CPU cores, %s of memory, GPUs: %s", _n_cores(), _memory(), ", ".join(_gpus()) or "none")


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _n_cores() -> int:
    """Number of cores that this process may use, if the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):
        return "an unknown amount"


def _gpus() -> list[str]:
    """Names of the visible GPUs; none if torch is not loaded, as loading it only for a log is too slow."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
