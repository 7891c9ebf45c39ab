"""Who may know whom: imports run downward only, and each layer uses the libraries that are its business."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ks4stream

ROOT = Path(ks4stream.__file__).parent
NUMBERS = {"numpy", "scipy"}
EXTRAS = {"obstore", "boto3", "h5py", "pynwb", "hdmf", "spikeinterface"}
ARRAYS = {"dask.array", "dask.delayed", "xarray"}

# Layer: the layers it may import from beside itself, and the libraries it may use.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "words": (set(), NUMBERS | {"dask.array", "xarray", "spikeinterface"}),
    "kernels": (set(), NUMBERS | {"torch"}),
    "io": ({"words"}, NUMBERS | {"dask.array", "xarray", "zarr", "numcodecs", "probeinterface", "filelock"} | EXTRAS),
    "stages": ({"words", "kernels", "io"}, NUMBERS | {"torch"}),
    "engine": ({"words", "kernels", "stages"}, NUMBERS | ARRAYS | {"torch", "dask", "distributed", "psutil"}),
    "top": (
        {"words", "kernels", "io", "stages", "engine"},
        NUMBERS | ARRAYS | {"torch", "psutil", "matplotlib", "rich", "click", "spikeinterface"},
    ),
}
WORDS = {
    "errors",
    "messages",
    "method",
    "settings",
    "resources",
    "probe",
    "recording",
    "quality",
    "blocks",
    "results",
    "exchange",
    "geometry",
    "labels",
    "unit_waveforms",
    "metrics",
}
LAZY = {"dask", "xarray", "matplotlib", "probeinterface"} | EXTRAS  # used by words and edges within functions only
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(module: str) -> str:
    first = module.removeprefix("ks4stream").lstrip(".").partition(".")[0]
    if first in ("kernels", "io", "stages", "engine"):
        return first
    return "words" if first in WORDS else "top"


def module_of(path: Path) -> str:
    parts = ["ks4stream", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every module a file imports (not for types alone), and whether it does so as it is loaded."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_load) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((name if is_module(name) else str(node.module), at_load) for name in names)
        within = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_layer_imports_only_what_is_below_it(path):
    layer = layer_of(module_of(path))
    for name, _ in imports_of(path):
        if name.split(".")[0] == "ks4stream":
            assert layer_of(name) in {layer} | LAYERS[layer][0], f"{layer} must not know {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_layer_uses_only_its_libraries(path):
    layer = layer_of(module_of(path))
    allowed = LAYERS[layer][1]
    for name, at_load in imports_of(path):
        library = name.split(".")[0]
        if library == "ks4stream" or library in sys.stdlib_module_names:
            continue
        assert any(name == one or name.startswith(f"{one}.") for one in allowed), f"{layer} must not use {name}"
        if layer in ("words", "io") and library in LAZY:
            assert not at_load, f"{name} takes long to load and belongs into the function that needs it"


def test_kernels_know_nothing_of_files_and_logging():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not {name for name, _ in imports_of(path)} & {"os", "pathlib", "logging", "io"}, path.name


def test_no_import_as_a_module_loads_goes_in_a_circle():
    graph = {
        module_of(path): {name for name, at_load in imports_of(path) if at_load and is_module(name)} - {module_of(path)}
        for path in FILES
    }
    TopologicalSorter(graph).prepare()
