"""ks4stream under the name ``kilosort``, for programs that import that name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

VERSION = "4.1.7"
"""Version of Kilosort4 whose interface this is."""

MODULES = ("io", "parameters", "plots", "run_kilosort", "utils")


@contextmanager
def as_kilosort() -> Iterator[ModuleType]:
    """Let ``import kilosort`` find ks4stream in this process, as long as this is entered.

    Nothing is installed or written, and whatever had the name before has it again afterwards. It is meant for programs
    that call Kilosort4 by its name, such as SpikeInterface's wrapper: with it, ``run_sorter("kilosort4", …)`` sorts
    with ks4stream.

    Yields
    ------
    module
        :mod:`ks4stream.kilosort4`.

    Examples
    --------
    >>> with as_kilosort():
    ...     import kilosort
    ...
    ...     print(kilosort.__name__)
    ks4stream.kilosort4
    """
    package = importlib.import_module("ks4stream.kilosort4")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "kilosort"}
    for name in before:
        del sys.modules[name]
    finder: Any = _Metadata()
    sys.modules["kilosort"] = package
    for name in MODULES:
        sys.modules[f"kilosort.{name}"] = importlib.import_module(f"ks4stream.kilosort4.{name}")
    sys.meta_path.insert(0, finder)
    try:
        yield package
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "kilosort"]:
            del sys.modules[name]
        sys.modules.update(before)


class _Metadata(metadata.DistributionFinder):
    """Finds the metadata of a distribution ``kilosort``: only its name and version."""

    def find_spec(self, *_: Any) -> None:
        """No modules are found here."""

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        """The distribution, if it is asked for by its name."""
        return [_Named()] if context is not None and context.name == "kilosort" else []


class _Named(metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        text = f"Metadata-Version: 2.1\nName: kilosort\nVersion: {VERSION}\nSummary: ks4stream under this name\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)
