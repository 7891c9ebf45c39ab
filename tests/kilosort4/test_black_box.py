"""The same calls to Kilosort4 itself, in an environment of its own: KILOSORT4_PYTHON=…/bin/python.

Kilosort4 is run, not read.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.io.kilosort_ops import highpass_impulse
from ks4stream.io.phy import export_phy
from ks4stream.kilosort4.binary import BinaryFiltered, BinaryRWFile
from ks4stream.kilosort4.io import load_ops, load_probe, save_ops, save_probe
from ks4stream.kilosort4.parameters import DEFAULT_SETTINGS, EXTRA_PARAMETERS, MAIN_PARAMETERS, compare_settings
from ks4stream.kilosort4.stored import load_sorting
from ks4stream.settings import Settings

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KILOSORT4_PYTHON" not in os.environ, reason="KILOSORT4_PYTHON names no Python with Kilosort4"),
]


def in_kilosort4(script: str, folder: Path, **values: Any) -> Any:
    """Run a script there, with `values` by name; returns its variable `found`, which must be JSON."""
    lines = ["import json, sys, numpy as np, torch", "from pathlib import Path", "CPU = torch.device('cpu')"]
    lines += [f"folder = Path({str(folder)!r})", *(f"{name} = {value!r}" for name, value in values.items())]
    (folder / "script.py").write_text("\n".join([*lines, script, "print(); print('FOUND' + json.dumps(found))"]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["KILOSORT4_PYTHON"], str(folder / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND")[2])


TABLES = """
from kilosort import parameters as p
def plain(about):
    return {name: value.__name__ if name == "type" else value for name, value in about.items() if name != "description"}
found = [[[name, plain(about)] for name, about in table.items()] for table in (p.MAIN_PARAMETERS, p.EXTRA_PARAMETERS)]
found += [p.DEFAULT_SETTINGS, p.compare_settings({"n_chan_bin": 4, "nt": 41, "mine": 1, "nblocks": 1})]
"""


def test_tables_of_settings(tmp_path: Path) -> None:
    main, extra, defaults, compared = in_kilosort4(TABLES, tmp_path)
    for theirs, ours in ((main, MAIN_PARAMETERS), (extra, EXTRA_PARAMETERS)):
        assert [name for name, _ in theirs] == list(ours)
        for name, about in theirs:
            about["exclude"] = [bound for bound in about["exclude"] if not math.isinf(bound)]
            mine = {key: value for key, value in ours[name].items() if key != "description"}
            assert mine | {"type": mine["type"].__name__} == about, name
    assert defaults == DEFAULT_SETTINGS
    assert compared == list(compare_settings({"n_chan_bin": 4, "nt": 41, "mine": 1, "nblocks": 1}))


READ = """
from kilosort.io import BinaryFiltered, BinaryRWFile
found = {}
arrays = {}
for name, options in cases.items():
    file = folder / options.pop("file", "int16.bin")
    b = BinaryRWFile(file, 6, NT=6000, device=CPU, **options)
    pairs = [b.padded_batch_to_torch(i, return_inds=True) for i in range(b.n_batches)]
    facts = [b.n_batches, b.imin, b.imax, *b.shape, b.size, b.n_samples, *np.ravel([inds for _, inds in pairs])]
    found[name] = [int(fact) for fact in facts]
    for i, (X, _) in enumerate(pairs):
        arrays[f"{name} {i}"] = X.numpy()
    arrays[f"{name} slice"] = b[5:40, 1:4]
b = BinaryFiltered(folder / "int16.bin", 6, NT=6000, device=CPU, chan_map=np.array([4, 0, 2]), do_CAR=False,
                   hp_filter=torch.from_numpy(np.load(folder / "hp.npy")),
                   whiten_mat=torch.from_numpy(np.load(folder / "matrix.npy")), invert_sign=True)
for i in range(b.n_batches):
    arrays[f"filtered {i}"] = b.padded_batch_to_torch(i).numpy()
np.savez(folder / "arrays.npz", **arrays)
"""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "crop": {"tmin": 0.1, "tmax": 0.6},
    "every second": {"batch_downsampling": 2},
    "scaled": {"scale": 2.0, "shift": 3.0},
    "uint16": {"file": "uint16.bin", "dtype": "uint16"},
    "int32": {"file": "int32.bin", "dtype": "int32"},
    "float32": {"file": "float32.bin", "dtype": "float32"},
    "tail": {"file": "tail.bin"},
}


def test_batches(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-500, 500, (25_000, 6)).astype(np.int16)
    for dtype in ("int16", "uint16", "int32", "float32"):
        (samples.astype(np.int32) + 2**15 * (dtype == "uint16")).astype(dtype).tofile(tmp_path / f"{dtype}.bin")
    samples[:24_060].tofile(tmp_path / "tail.bin")
    matrix = np.random.default_rng(1).normal(0, 0.1, (3, 3)).astype(np.float32)
    impulse = highpass_impulse(Settings(), 30_000)
    np.save(tmp_path / "matrix.npy", matrix)
    np.save(tmp_path / "hp.npy", impulse)
    theirs = in_kilosort4(READ, tmp_path, cases=CASES)
    arrays = np.load(tmp_path / "arrays.npz")
    for name, options in CASES.items():
        options = dict(options)
        bfile = BinaryRWFile(tmp_path / options.pop("file", "int16.bin"), 6, NT=6000, device=CPU, **options)
        pairs = [bfile.padded_batch_to_torch(index, return_inds=True) for index in range(bfile.n_batches)]
        facts = [bfile.n_batches, bfile.imin, bfile.imax, *bfile.shape, bfile.size, bfile.n_samples]
        assert facts + [place for _, inds in pairs for place in inds] == theirs[name], name
        for index, (batch, _) in enumerate(pairs):
            np.testing.assert_array_equal(batch.numpy(), arrays[f"{name} {index}"], err_msg=name)
        np.testing.assert_array_equal(bfile[5:40, 1:4], arrays[f"{name} slice"], err_msg=name)
    filtered = BinaryFiltered(
        tmp_path / "int16.bin",
        6,
        NT=6000,
        device=CPU,
        chan_map=[4, 0, 2],
        do_CAR=False,
        hp_filter=impulse,
        whiten_mat=matrix,
        invert_sign=True,
    )
    assert filtered.n_batches == 5
    for index in range(4):  # each batch is filtered alone there, so that its ends differ; and the last is filled up
        found, theirs = filtered.padded_batch_to_torch(index).numpy(), arrays[f"filtered {index}"]
        assert found.shape == theirs.shape == (3, 6122)
        np.testing.assert_allclose(found[:, 500:-500], theirs[:, 500:-500], rtol=0, atol=0.001)  # s.d. 50


SAVED = """
from kilosort import io
ops = io.load_ops(folder / "ops.npy", device=CPU)
found = [sorted(ops["is_tensor"]), [torch.is_tensor(ops[n]) for n in ops["is_tensor"]], ops["nt"], ops["filename"],
         torch.is_tensor(ops["preprocessing"]["whiten_mat"]), ops["wPCA"].tolist()]
theirs = {"filename": folder / "a.bin", "data_dir": folder, "results_dir": folder, "wPCA": ops["wPCA"], "nothing": None,
          "settings": {"data_dir": folder, "filename": folder / "a.bin", "results_dir": folder}, "dmin": np.float32(20),
          "preprocessing": {"whiten_mat": torch.eye(2), "hp_filter": torch.zeros(3)}, "Nbatches": np.int64(4)}
(folder / "theirs").mkdir()
io.save_ops(theirs, folder / "theirs")
probe = io.load_probe(folder / "probe.json")
found.append({name: np.asarray(value).tolist() for name, value in probe.items()})
io.save_probe(probe, folder / "their_probe.json")
"""


def test_ops_and_probes_are_read_by_both(tmp_path: Path) -> None:
    words = {"chanMap": [2, 0, 1], "xc": [0, 16, 0], "yc": [0, 20, 40], "kcoords": [1, 1, 1]}
    save_probe(words, tmp_path / "probe.json")
    ops = {
        "nt": 61,
        "filename": [tmp_path / "a.bin"],
        "wPCA": torch.eye(2),
        "iU": torch.arange(3),
        "dshift": np.ones(2),
    }
    save_ops(ops | {"preprocessing": {"whiten_mat": torch.eye(2), "hp_filter": torch.zeros(3)}}, tmp_path)
    names, are_tensors, nt, filename, is_tensor, matrix, probe = in_kilosort4(SAVED, tmp_path)
    assert names == ["iU", "wPCA"] and all(are_tensors) and nt == 61 and is_tensor and matrix == [[1, 0], [0, 1]]
    assert filename == [str(tmp_path / "a.bin")]
    assert probe == words | {"n_chan": 3}
    theirs = load_ops(tmp_path / "theirs" / "ops.npy", CPU)
    assert theirs["results_dir"] == tmp_path / "theirs" or theirs["results_dir"] == tmp_path
    assert torch.equal(theirs["wPCA"], torch.eye(2)) and torch.equal(
        theirs["preprocessing"]["whiten_mat"], torch.eye(2)
    )
    assert theirs["nothing"] is None and theirs["Nbatches"] == 4 and theirs["dmin"] == np.float32(20)
    again = load_probe(tmp_path / "their_probe.json")
    assert {name: np.asarray(value).tolist() for name, value in again.items()} == probe


LOADED = """
from kilosort.run_kilosort import load_sorting
values = load_sorting(folder, device=CPU, load_extra_vars=True)
found = [len(values), sorted(map(str, values[0]))]
np.savez(folder / "values.npz", *[np.asarray(value) for value in values[1:]])
"""


def test_our_results_are_loaded_by_kilosort4(tmp_path: Path, make_sorting: Any) -> None:
    export_phy(make_sorting(), tmp_path, save_extra_vars=True)
    n_values, names = in_kilosort4(LOADED, tmp_path)
    ours = load_sorting(tmp_path, CPU, load_extra_vars=True)
    assert n_values == len(ours) == 12 and names == sorted(ours[0])
    theirs = np.load(tmp_path / "values.npz")
    for number, value in enumerate(ours[1:]):
        if number in (3, 4):  # labels and contamination, which each computes in its own way
            assert value.shape == theirs[f"arr_{number}"].shape == (4,)
            continue
        np.testing.assert_array_equal(np.asarray(value), theirs[f"arr_{number}"])


SORTED = """
from kilosort import run_kilosort
from kilosort.run_kilosort import load_sorting
probe = {"chanMap": np.arange(12), "xc": np.zeros(12), "yc": 20.0 * np.arange(12), "kcoords": np.zeros(12)}
torch.manual_seed(0)
run_kilosort({"n_chan_bin": 12, "tmin": 0.5, "nblocks": 0, "batch_size": 30_000}, probe=probe | {"n_chan": 12},
             filename=folder / "recording.bin",
             results_dir=folder / "theirs", device=CPU, save_extra_vars=True)
values = load_sorting(folder / "theirs", device=CPU, load_extra_vars=True)
tensors = sorted(name for name, value in values[0].items() if torch.is_tensor(value))
found = [sorted(values[0]), tensors, sorted(values[0]["preprocessing"])]
np.savez(folder / "values.npz", *[np.asarray(value) for value in values[1:]])
"""


def test_kilosort4s_results_are_loaded(tmp_path: Path) -> None:
    recording = simulate.simulate(
        simulate.linear_probe(12, pitch_um=20), 10.0, seed=3, n_units=6, amplitude_range_uv=(90, 250)
    )
    recording.read(0, 300_000).tofile(tmp_path / "recording.bin")
    names, tensors, preprocessing = in_kilosort4(SORTED, tmp_path)
    ops, *ours = load_sorting(tmp_path / "theirs", CPU, load_extra_vars=True)
    assert sorted(ops) == names
    assert sorted(name for name, value in ops.items() if torch.is_tensor(value)) == tensors
    assert sorted(ops["preprocessing"]) == preprocessing and torch.is_tensor(ops["preprocessing"]["whiten_mat"])
    theirs = np.load(tmp_path / "values.npz")
    assert len(ours[0]) > 100 and isinstance(ours[6], torch.Tensor)
    for number, value in enumerate(ours):  # contamination is rounded in the table
        tolerance = 0.0006 if number == 4 else 0
        assert np.asarray(value).dtype == theirs[f"arr_{number}"].dtype
        np.testing.assert_allclose(np.asarray(value), theirs[f"arr_{number}"], rtol=0, atol=tolerance)
