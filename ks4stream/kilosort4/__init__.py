"""Kilosort4's Python interface, laid out as the package ``kilosort`` is: a lab changes one import.

    from ks4stream.kilosort4 import run_kilosort
    from ks4stream.kilosort4.io import load_probe

The functions compute the stages of :func:`ks4stream.sort`; their arguments and results are Kilosort4's.
"""

from __future__ import annotations

from ks4stream.kilosort4 import io, parameters, plots, utils
from ks4stream.kilosort4.name import VERSION, as_kilosort
from ks4stream.kilosort4.parameters import DEFAULT_SETTINGS
from ks4stream.kilosort4.run_kilosort import run_kilosort
from ks4stream.kilosort4.utils import DOWNLOADS_DIR, PROBE_DIR

__all__ = [
    "DEFAULT_SETTINGS",
    "DOWNLOADS_DIR",
    "PROBE_DIR",
    "as_kilosort",
    "io",
    "parameters",
    "plots",
    "run_kilosort",
    "utils",
]

__version__ = VERSION
