"""The public names: few, loaded on first use, and the same for type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ks4stream

NAMES = [
    "open_recording",
    "load_probe",
    "Recording",
    "Probe",
    "Settings",
    "Resources",
    "plan",
    "sort",
    "Sorting",
    "load_sorting",
    "mean_waveforms",
    "quality_metrics",
    "write_nwb",
    "carry_curation",
    "preprocess",
    "run_kilosort",
    "simulate",
    "scoring",
    "errors",
]


def test_all_is_what_was_agreed():
    assert ks4stream.__all__ == NAMES
    assert set(NAMES) <= set(dir(ks4stream))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_and_is_documented(name):
    value = getattr(ks4stream, name)
    assert inspect.getdoc(value)
    assert getattr(ks4stream, name) is value


def test_the_version_is_the_installed_one():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert ks4stream.__version__ == version("ks4stream")
    except PackageNotFoundError:
        pytest.skip("ks4stream is not installed, only on the path")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="run_kilosrot"):
        ks4stream.run_kilosrot  # noqa: B018


def test_no_public_function_has_the_name_of_a_module():
    """Python sets a module that was imported as an attribute of the package: it would hide the function."""
    package = Path(ks4stream.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert modules & set(NAMES) == set(ks4stream._MODULES)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(ks4stream.__file__).read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = ks4stream._HOME | dict.fromkeys(ks4stream._MODULES, "ks4stream")
    assert imported == homes == {name: homes[name] for name in NAMES}


def test_importing_the_package_loads_nothing_heavy():
    code = "import ks4stream, sys; print([m for m in ('torch', 'numpy', 'dask', 'xarray', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_read_the_types_of_what_is_installed():
    """Without the file py.typed they take an installed package for one without."""
    modulefinder = pytest.importorskip("mypy.modulefinder")
    installed = modulefinder.SearchPaths((), (), (str(Path(ks4stream.__file__).parents[1]),), ())
    assert modulefinder.FindModuleCache(installed, None, None).find_module("ks4stream") == ks4stream.__file__


def test_the_examples_of_all_modules_are_run(pytestconfig):
    """By pytest itself, where it is called without files."""
    assert pytestconfig.getoption("doctestmodules")
    assert "ks4stream" in pytestconfig.getini("testpaths")
