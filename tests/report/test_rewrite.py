"""``ks4stream report``: the page written again, beside another sort, and for results that have none."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ks4stream.cli import main
from ks4stream.errors import ResultsError
from ks4stream.io.results_folder import PAGE, QUALITY, ResultsFolder
from ks4stream.report import finish, rewrite_page
from ks4stream.results import Provenance


@pytest.fixture
def written(make_sorting, tmp_path, monkeypatch):
    """A results folder without plots, and its sorting."""
    monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
    sorting = make_sorting(provenance=Provenance(recording="morning.bin", recording_digest="a"))
    folder = tmp_path / "kilosort4"
    finish(sorting, ResultsFolder.open(folder))
    return folder, sorting


def content_of(page: Path):
    """What a page holds, apart from its arrays."""
    text = page.read_text(encoding="utf-8")
    found = [json.loads(part) for part in re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', text)]
    return next(part for part in found if "verdict" in part)


def array(packed):
    raw = zlib.decompress(base64.b64decode(packed["base64"]))
    return np.frombuffer(raw, packed["dtype"]).reshape(packed["shape"])


def test_a_sort_writes_the_page_and_the_metrics(written):
    folder, sorting = written
    content = content_of(folder / PAGE)
    assert content["recording"]["name"] == "morning.bin"
    assert content["verdict"]["n_spikes"] == sorting.kept.sum()
    assert content["compare"] is None
    assert array(content["rasters"][0]["after"]).any()
    assert len((folder / QUALITY).read_text(encoding="utf-8").splitlines()) == 1 + sorting.n_units
    assert ResultsFolder(folder).somebodys() == []


def test_a_page_that_was_written_again_is_still_ours(written):
    folder, _ = written
    before = (folder / PAGE).read_bytes()
    assert rewrite_page(folder, compare=folder) == folder / PAGE
    assert (folder / PAGE).read_bytes() != before
    assert ResultsFolder(folder).somebodys() == []


def test_a_page_that_somebody_changed_is_replaced_but_not_taken_for_ours(written):
    folder, _ = written
    (folder / PAGE).write_text("a note")
    rewrite_page(folder, compare=folder)
    assert "verdict" in content_of(folder / PAGE)
    assert ResultsFolder(folder).somebodys() == [PAGE]


def test_results_of_a_version_without_a_page_get_one(written):
    folder, _ = written
    record = json.loads((folder / "ks4stream.json").read_text())
    for name in (PAGE, QUALITY):
        (folder / name).unlink()
        del record["files"][name]
    (folder / "ks4stream.json").write_text(json.dumps(record))
    rewrite_page(folder)
    assert (folder / PAGE).exists() and (folder / QUALITY).exists()
    assert ResultsFolder(folder).somebodys() == []
    rewrite_page(folder)
    assert ResultsFolder(folder).somebodys() == []


def test_metrics_that_somebody_changed_stay(written):
    folder, _ = written
    (folder / QUALITY).write_text("cluster_id,mine\n0,1\n")
    rewrite_page(folder)
    assert (folder / QUALITY).read_text() == "cluster_id,mine\n0,1\n"


def test_the_command_compares_and_writes_elsewhere(written, tmp_path):
    folder, sorting = written
    other = tmp_path / "other"
    finish(dataclasses.replace(sorting, unit=(sorting.unit + 1) % 4), ResultsFolder.open(other))
    before = (folder / PAGE).read_bytes()
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(folder), "--compare", str(other), "--out", str(out)])
    assert (done.exit_code, done.output.strip()) == (0, str(out))
    rows = content_of(out)["compare"]["rows"]
    assert [(row["unit"], row["other"], row["agreement"]) for row in rows] == [(u, (u + 1) % 4, 1.0) for u in range(4)]
    assert (folder / PAGE).read_bytes() == before


@pytest.mark.parametrize("name", ["", "nothing"])
def test_without_a_sorting_there_is_nothing_to_show(tmp_path, name):
    with pytest.raises(ResultsError, match="does not hold a sorting"):
        rewrite_page(tmp_path / name)


def test_a_page_of_another_recording_is_no_comparison(written, tmp_path):
    folder, sorting = written
    finish(
        dataclasses.replace(sorting, provenance=Provenance(recording_digest="b")), ResultsFolder.open(tmp_path / "b")
    )
    with pytest.raises(ResultsError, match="another recording"):
        rewrite_page(folder, compare=tmp_path / "b")
