"""ks4stream under the name ``kilosort``, for programs that import that name."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VERSION = "4.1.7"
"""Version of Kilosort4 whose interface this is."""

MODULES = ("io", "parameters", "plots", "run_kilosort", "utils")

_lock = threading.Lock()
_held: list[_Name] = []  # one, while as_kilosort is entered
_n_entered = 0


@contextmanager
def as_kilosort() -> Iterator[ModuleType]:
    """Let ``import kilosort`` find ks4stream in this process, as long as this is entered.

    Nothing is installed or written, and whatever had the name before has it again afterwards: if it is entered several
    times, also in several threads, after the last of them. It is meant for programs that call Kilosort4 by its name,
    such as SpikeInterface's wrapper: with it, ``run_sorter("kilosort4", …)`` sorts with ks4stream.

    Yields
    ------
    module
        ``kilosort``, with the public names and submodules of :mod:`ks4stream.kilosort4`, and no others.

    Examples
    --------
    >>> with as_kilosort():
    ...     import kilosort
    ...
    ...     print(kilosort.run_kilosort.__module__)
    ks4stream.kilosort4.run_kilosort
    """
    global _n_entered
    modules = _modules()
    with _lock:
        if not _n_entered:
            _held.append(_Name(modules))
        _n_entered += 1
        package = _held[0].modules["kilosort"]
    try:
        yield package
    finally:
        with _lock:
            _n_entered -= 1
            if not _n_entered:
                _held.pop().release()


def _modules() -> dict[str, ModuleType]:
    """The modules by the names under which they can be imported."""
    ours = importlib.import_module("ks4stream.kilosort4")
    modules = {f"kilosort.{name}": importlib.import_module(f"{ours.__name__}.{name}") for name in MODULES}
    package = ModuleType("kilosort", ours.__doc__)
    # Not our package itself: through its path, its modules would be loaded a second time under other names.
    package.__path__ = []
    package.__spec__ = ModuleSpec("kilosort", None, is_package=True)
    vars(package).update({name: getattr(ours, name) for name in (*ours.__all__, "__all__", "__version__")})
    return {"kilosort": package, **modules}


class _Name(metadata.DistributionFinder):
    """Holds the name ``kilosort``, of the modules and of a distribution, until it is released."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.modules = modules
        self._before = self._remove()
        sys.modules.update(modules)
        finders: list[Any] = sys.meta_path
        finders.insert(0, self)

    def release(self) -> None:
        """Give the name back to what had it before."""
        finders: list[Any] = sys.meta_path
        with suppress(ValueError):
            finders.remove(self)
        self._remove()
        sys.modules.update(self._before)

    def _remove(self) -> dict[str, ModuleType]:
        names = [name for name in tuple(sys.modules) if name.split(".")[0] == "kilosort"]
        return {name: sys.modules.pop(name) for name in names}

    def find_spec(self, name: str, *_: Any) -> None:
        """Refuse modules that are not loaded yet, of which another ``kilosort`` on the path may have some."""
        if name.startswith("kilosort."):
            raise ModuleNotFoundError(
                f"No module named {name!r}: ks4stream, which has the name kilosort here, only has "
                f"{', '.join(MODULES)}.",
                name=name,
            )

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        """The distribution with only its name and version, if it is asked for by its name."""
        name = "" if context is None or context.name is None else context.name
        return [_Named()] if re.sub(r"[-_.]+", "-", name).lower() == "kilosort" else []


class _Named(metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        text = f"Metadata-Version: 2.1\nName: kilosort\nVersion: {VERSION}\nSummary: ks4stream under this name\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)
