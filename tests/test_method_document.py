"""docs/method.md says what the code does: citations lead somewhere, and its tables hold the code's own numbers."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ks4stream
from ks4stream import kernels
from ks4stream.kernels import splits
from ks4stream.settings import OF_RECORDING, Settings

ROOT = Path(ks4stream.__file__).parent.parent
DOCUMENT = ROOT / "docs" / "method.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


# -- what the code cites -----------------------------------------------------------------------------

NUMBERS = r"\d+(?:\.\d+)?[a-f]?"
SERIES = rf"{NUMBERS}(?:(?:, | and ){NUMBERS})*"
CITED_SECTION = re.compile(rf"\b[Ss]ections? ({SERIES})(?:, ([A-Za-z]+)\))?")
CITED_STEP = re.compile(rf"\b[Ss]teps? ({SERIES})")


FOLDERS = ("ks4stream", "tests", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


def citations(text: str) -> Iterator[tuple[str, str]]:
    """Kind and name of everything that a text cites: ("section", "1.4"), ("step", "6c"), ("part", "8 borders")."""
    text = re.sub(r"\n\s*(?:# )?", " ", text)  # a citation may run over the end of a line
    for series, part in CITED_SECTION.findall(text):
        names = re.findall(NUMBERS, series)
        yield from (("section", name) for name in names)
        if part:
            yield "part", f"{names[-1]} {part.lower()}"
    for series in CITED_STEP.findall(text):
        yield from (("step", name) for name in re.findall(NUMBERS, series))


def headings(text: str) -> dict[str, list[str]]:
    """Titles below each numbered section, itself included."""
    found: dict[str, list[str]] = {}
    section = ""
    for level, title in re.findall(r"^(#{2,4}) (.+)$", text, flags=re.MULTILINE):
        if level == "##":
            section = (re.match(r"\d+", title) or [""])[0]
        found.setdefault(section, []).append(title)
    return found


def targets(text: str) -> set[tuple[str, str]]:
    """All that may be cited of the document, as :func:`citations` names it."""
    titles = headings(text)
    found = {("section", section) for section in titles if section}
    for section, below in titles.items():
        for title in below:
            if number := re.match(rf"({section}\.\d+) ", title):
                found.add(("section", number[1]))
            found |= {("part", f"{section} {word.lower()}") for word in re.findall(r"[A-Za-z]+", title)}
    return found | {("step", name) for name in re.findall(r"(?:### |\*\*)Step (\d[a-z]?): ", text)}


CITING = [path for path in SOURCES if any(citations(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("path", CITING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_code_cites_is_there(path: Path) -> None:
    missing = set(citations(path.read_text(encoding="utf-8"))) - targets(TEXT)
    assert not missing, f"{path.relative_to(ROOT)} cites what docs/method.md does not have: {sorted(missing)}"


def test_citations_are_read() -> None:
    said = "# sections 1.4, 9 and 10\n'''Once (section 8,\n    Borders): step 6c of section 6, steps 5 and 6.'''"
    assert set(citations(said)) == {
        *(("section", name) for name in ("1.4", "9", "10", "8", "6")),
        *(("step", name) for name in ("6c", "5", "6")),
        ("part", "8 borders"),
    }


def test_there_is_something_to_cite_and_something_cited() -> None:
    cited = {one for path in CITING for one in citations(path.read_text(encoding="utf-8"))}
    assert {("section", str(number)) for number in range(11)} <= targets(TEXT)
    assert {("step", "6c"), ("section", "1.4"), ("part", "8 borders"), ("part", "6 cost")} <= cited & targets(TEXT)
    assert ("section", "11") not in targets(TEXT) and ("step", "7") not in targets(TEXT)


# -- what the document refers to ---------------------------------------------------------------------


def test_figures_are_there_and_small() -> None:
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert len(figures) == len(set(figures)) >= 4
    for figure in figures:
        path = DOCUMENT.parent / figure
        assert path.is_file(), figure
        assert path.stat().st_size < 80_000, figure


@pytest.mark.slow
def test_figures_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_figures", DOCUMENT.parent / "make_figures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_figures", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "DURATION_S", 20.0)  # enough for every figure, and a third of the time
    monkeypatch.setattr(sys, "argv", ["make_figures.py", "--out", str(tmp_path)])
    script.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCUMENT.parent / "figures").iterdir()}


def test_modules_and_names_are_there() -> None:
    for path, names in re.findall(r"`((?:ks4stream|tests)/[\w/]+\.py|ks4stream(?:/\w+)+)(?:: ([\w, ]+))?`", TEXT):
        assert (ROOT / path).exists(), path
        module = importlib.import_module(path.removesuffix(".py").replace("/", ".")) if names else None
        for name in names.split(", ") if names else ():
            assert hasattr(module, name), f"{path} has no {name}"


def test_links_lead_to_headings() -> None:
    titles = [
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    ]
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert anchor in titles, anchor


def test_letters_are_those_of_the_kernels() -> None:
    letters = re.findall(r"^(\w(?:, \w)?) {3,}\S", str(kernels.__doc__), re.M)
    assert len(letters) > 10
    assert [row[0] for row in table("letter")] == letters


# -- settings and constants --------------------------------------------------------------------------


def table(first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has that name."""
    lines = TEXT.split(f"\n| {first_column} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def value_of(text: str) -> Any:
    """A number, a tuple, None or True as Python writes it, a quotient, or inf."""
    if text == "inf":
        return math.inf
    if quotient := re.fullmatch(r"(\d+)/(\d+)", text):
        return int(quotient[1]) / int(quotient[2])
    return ast.literal_eval(text)


def test_settings_are_all_there_with_their_defaults() -> None:
    said = {row[0]: value_of(row[1]) for row in table("setting")}
    assert said == {spec.name: spec.default for spec in fields(Settings)}
    assert all(f"`{name}`" in TEXT for name in OF_RECORDING)


def test_settings_are_explained_where_the_table_says() -> None:
    for name, _, _, where in table("setting"):
        for number in re.findall(r"\d+(?:\.\d+)?", where):
            start = re.search(rf"^##+ {re.escape(number)}\.? ", TEXT, re.M)
            assert start, where
            level = len(TEXT[start.start() :].split(" ")[0])
            part = re.split(rf"^#{{2,{level}}} ", TEXT[start.end() :], maxsplit=1, flags=re.M)[0]
            if "step" not in where or number == "6":
                assert name in part, f"{name} is not in section {number}"


def constants() -> dict[str, Any]:
    return {row[0]: value_of(row[1]) for row in table("constant")}


def in_the_code(constant: str) -> Any:
    """The value of "kernels/splits.py: RIDGE", or of the default of an argument, "…: merge_similar(threshold)"."""
    path, name = constant.split(": ")
    module = importlib.import_module("ks4stream." + path.removesuffix(".py").replace("/", "."))
    function, _, argument = name.removesuffix(")").partition("(")
    found: Any = module
    for part in function.split("."):
        found = getattr(found, part)
    return inspect.signature(found).parameters[argument].default if argument else found


@pytest.mark.parametrize("constant", constants())
def test_constants_are_those_of_the_code(constant: str) -> None:
    assert constants()[constant] == in_the_code(constant)


def test_a_constant_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SEPARATE_FROM", 3.1)
    assert constants()["kernels/splits.py: SEPARATE_FROM"] != in_the_code("kernels/splits.py: SEPARATE_FROM")


def test_constants_name_sections_that_are_there() -> None:
    for row in table("constant"):
        said = re.sub(r"^(?=\d)", "section ", row[3].split(":")[0])
        assert set(citations(said)) <= targets(TEXT), row[3]
        assert row[3] == "version of this page" or set(citations(said)), row[3]


def test_the_version_is_that_of_the_code() -> None:
    assert f"This is version {in_the_code('method.py: METHOD_VERSION')} of the method" in TEXT
