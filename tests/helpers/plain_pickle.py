"""Pickles as a program reads them that knows NumPy's arrays and Python's own values, and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

KNOWN = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain value.")
        return super().find_class(module, name)


def load_plain(path: Path) -> Any:
    """What an ``.npy`` file of one object holds."""
    with path.open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file)[2].hasobject
        return _PlainUnpickler(file).load().item()
