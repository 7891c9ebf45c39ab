"""The documentation: its examples run, its command lines are understood, and its tables are those of the code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import distributed
import numpy as np
import pytest

import ks4stream
from ks4stream import results, simulate
from ks4stream.cli import main
from ks4stream.io.probes import load_probe
from ks4stream.io.results_folder import LOG, RECORD, WRITTEN
from ks4stream.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SECONDS = 4.0  # of the recording that the examples sort
RUN = {"python"} | ({"python spikeinterface"} if importlib.util.find_spec("spikeinterface") else set())
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page: its first line, what stands after the fence, and its text."""

    line: int
    info: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(text.count("\n", 0, found.start(2)), found[1].strip(), found[2])


def examples(page: Path) -> list[Block]:
    """Blocks that are run: those that need a library, where it is installed."""
    return [block for block in blocks(page) if block.info in RUN]


def commands(page: Path) -> Iterator[list[str]]:
    """Every call of the command line, without what the shell makes of the rest of its line."""
    for block in blocks(page):
        if block.info == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["ks4stream"]:
                        yield words[1:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("recorded")
    probe = load_probe("linear_16")
    truth = simulate.simulate(
        probe, SECONDS, seed=3, n_units=10, rate_range_hz=(20.0, 40.0), amplitude_range_uv=(80.0, 250.0)
    )
    truth.write_binary(folder / "data.bin")
    for name in ("morning.bin", "evening.bin"):
        truth.read(0, 60_000).tofile(folder / name)
    np.save(folder / "data.npy", truth.read(0, 60_000))
    (folder / "probe.json").write_text((ROOT / "probes" / "linear_16.json").read_text(encoding="utf-8"))
    return folder


class InThisProcess(distributed.Client):
    """A client whose own workers are threads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"processes": False} if "n_workers" in options else {}) | options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(
    page: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, with common names, in a folder that has a small recording.

    A short recording has few spikes to learn waveforms from, and processes take longer to start than it takes to sort:
    workers are threads.
    """
    monkeypatch.setattr(distributed, "Client", InThisProcess)
    monkeypatch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)
    folder = tmp_path / "here"
    shutil.copytree(recorded, folder)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "example"}
    for block in examples(page):
        code = compile("\n" * block.line + block.text, str(page), "exec")  # so that errors tell the page's line
        exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_what_they_are(page: Path) -> None:
    known = {"python", "python no-run", "python spikeinterface", "bash", "text"}
    assert {block.info for block in blocks(page)} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_understood(page: Path) -> None:
    """Their options exist and take such values; nothing is sorted."""
    for name, *arguments in commands(page):
        command = main.commands[name]
        try:
            command.make_context(name, list(arguments))
        except click.exceptions.Exit:  # of --help
            assert "--help" in arguments


def test_the_readme_has_two_commands_for_the_machine() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("pip install ") for line in lines) == 2
    assert len(lines) <= 100


def script(name: str) -> types.ModuleType:
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_current() -> None:
    make_settings = script("make_settings")
    assert make_settings.PAGE.read_text(encoding="utf-8") == make_settings.page(), "run docs/make_settings.py"


def test_every_setting_that_is_named_exists() -> None:
    """In calls of ``Settings`` on any page."""
    names = {spec.name for spec in fields(Settings)}
    for page in PAGES:
        for name in re.findall(r"Settings\(([^)]*)\)", page.read_text(encoding="utf-8")):
            assert set(re.findall(r"(\w+)=", name)) <= names, page.name


def test_the_page_of_results_has_every_file() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    missing = [name for name in (*WRITTEN, RECORD, LOG, "run/") if f"`{name}`" not in text]
    assert missing == []


@pytest.mark.parametrize(
    "kind",
    [results.Sorting, results.Whitening, results.Waveforms, results.Drift, results.PeakSample, results.Diagnostics],
)
def test_the_page_of_results_has_every_array(kind: type) -> None:
    """With its axes, type and unit, as they are declared."""
    assert is_dataclass(kind)
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    prefix = (
        ""
        if kind is results.Sorting
        else {
            results.Whitening: "whitening/",
            results.Waveforms: "waveforms/",
            results.Drift: "drift/",
            results.PeakSample: "peaks/",
            results.Diagnostics: "diagnostics/",
        }[kind]
    )
    for spec in fields(kind):
        if "dims" in spec.metadata:
            about = spec.metadata
            row = f"| `{prefix}{spec.name}` | {', '.join(about['dims'])} | {about['dtype']} | {about['unit']} |"
            assert row.replace("|  |", "| |") in text.replace("|  |", "| |"), row


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    missing = [name for name in ks4stream.__all__ if not re.search(rf"^::: ks4stream\.{name}$", text, re.MULTILINE)]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in text] == []
