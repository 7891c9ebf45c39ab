"""Probes by folder, what a computation uses, and dictionaries as source."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ks4stream.io.probes import shipped_probes
from ks4stream.kilosort4.utils import (
    PROBE_DIR,
    download_probes,
    get_performance,
    log_performance,
    ops_as_string,
    probe_as_string,
)


def test_probes_are_copied_where_they_are_wanted(tmp_path: Path) -> None:
    download_probes()
    folder = tmp_path / "probes"
    folder.mkdir()
    (folder / "tetrode.json").write_text("my own")
    download_probes(folder)
    assert {file.stem for file in folder.iterdir()} == set(shipped_probes())
    assert (folder / "tetrode.json").read_text() == "my own"
    assert PROBE_DIR.name == "probes"


def test_performance(caplog: pytest.LogCaptureFixture) -> None:
    found = get_performance()
    cpu = found["cpu"]
    assert cpu is not None and set(cpu) == {"util", "mem_avail", "mem_total", "mem_used", "mem_pct"}
    assert cpu["mem_avail"] + cpu["mem_used"] == pytest.approx(cpu["mem_total"])
    assert torch.cuda.is_available() or found["gpu"] is None
    with caplog.at_level(logging.DEBUG, "ks4stream"), caplog.at_level(logging.DEBUG, "mine"):
        log_performance(header="after detection")
        log_performance(logging.getLogger("mine"), "info", reset=True)
    assert caplog.records[0].message.startswith("after detection\nCPU: util ")
    assert (caplog.records[1].name, caplog.records[1].levelname) == ("mine", "INFO")


def test_dictionaries_as_source() -> None:
    probe = {"chanMap": np.arange(3), "xc": np.zeros(3), "n_chan": 3}
    found: dict = {}
    exec(probe_as_string(probe), {"np": np}, found)
    assert found["probe"].keys() == probe.keys() and np.array_equal(found["probe"]["chanMap"], probe["chanMap"])
    ops = {"nt": 61, "x_centers": None, "settings": {"nt": 61}, "probe": probe, "wPCA": torch.eye(2)}
    exec(ops_as_string(ops), {"torch": torch}, found)
    assert found["ops"].keys() == {"nt", "x_centers", "wPCA"} and torch.equal(found["ops"]["wPCA"], torch.eye(2))
    assert "torch.zeros" in ops_as_string({"tF": torch.zeros(100, 100)})


def test_whatever_an_ops_holds_is_source() -> None:
    """Infinities, paths, scalars, and what is not written out, also within other values."""
    ops = {
        "tmax": np.inf,
        "position_limit": np.float32(100),
        "none": np.array([np.nan, -np.inf]),
        "filename": [Path("a  # b") / "c.bin"],
        "pair": (1,),
        "nothing": (),
        "flags": {"a": np.bool_(True), "b": {2}, 3: frozenset({1j})},
        "text": "two  # words",
        "types": [np.dtype("int16"), torch.device("cpu")],
        "wPCA": torch.tensor([[1, np.inf]], dtype=torch.float64),
        "of_objects": np.array([None, 1.5], dtype=object),
        "empty": np.zeros((0, 3)),
        "ks4stream": {"peaks": {"sample": np.ones(2000)}, "after": 1},
        "tF": torch.ones(50, 50),
        "progress": print,
    }
    source = ops_as_string(ops)
    found: dict = {}
    exec(source, {"np": np, "torch": torch}, found)
    found = found["ops"]
    assert found.keys() == ops.keys()
    for name in ("tmax", "position_limit", "pair", "nothing", "flags", "text"):
        assert found[name] == ops[name]
    for name in ("none", "wPCA", "empty"):
        np.testing.assert_array_equal(found[name], ops[name])
        assert found[name].dtype == ops[name].dtype and found[name].shape == ops[name].shape
    assert found["filename"] == [str(ops["filename"][0])] and found["types"] == ["int16", "cpu"]
    assert found["of_objects"].tolist() == [None, 1.5] and found["progress"] is None
    assert found["ks4stream"]["after"] == 1 and not found["ks4stream"]["peaks"]["sample"].any()
    assert found["tF"].shape == (50, 50) and "# not the values of: 50×50 numbers" in source
