"""Every benchmark starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ks4stream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_benchmark_can_be_imported() -> None:
    """In a process of its own, for some of them set what the whole process computes with."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert len(names) > 15
    places = [str(BENCHMARKS), str(Path(ks4stream.__file__).parents[1])]
    program = f"import importlib, sys; sys.path[:0] = {places!r}; [importlib.import_module(name) for name in {names!r}]"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
