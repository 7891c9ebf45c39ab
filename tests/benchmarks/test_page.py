"""The page for made-up spikes, at toy size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_row_for_each_number_of_spikes_and_units(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("page")
    page.main(["--spikes", "2000", "4000", "--units", "5", "--channels", "16", "--hours", "0.1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["2,000", "5"], ["4,000", "5"]]
    assert all(0.1 < float(row[-1]) < 5 for row in rows[2:])
