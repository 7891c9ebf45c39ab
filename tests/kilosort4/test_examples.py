"""Scripts as Kilosort4's documentation shows them: only the import differs.

They are written from its documentation pages (basic example, settings, other data formats, probe files, shanks, loading
results, functions of the pipeline), for recordings of a few seconds. With KILOSORT4_PYTHON=…/bin/python, Kilosort4
itself runs them as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from ks4stream import simulate
from ks4stream.io.probes import save_probe
from ks4stream.kilosort4 import arguments, utils

SECONDS, RATE = 3, 30_000

BASIC = """
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from {package} import run_kilosort
from {package}.io import load_ops

settings = {"data_dir": Path("recorded"), "n_chan_bin": 12}
ops, st, clu, tF, Wall, similar_templates, is_ref, est_contam_rate, kept_spikes = run_kilosort(
    settings=settings, probe_name="of_a_lab.json"
)

results_dir = Path(settings["data_dir"]).joinpath("kilosort4")
ops = load_ops(results_dir / "ops.npy")
amplitude_of_unit = np.loadtxt(results_dir / "cluster_Amplitude.tsv", skiprows=1, usecols=1)
contam_pct = np.loadtxt(results_dir / "cluster_ContamPct.tsv", skiprows=1, usecols=1)
chan_map = np.load(results_dir / "channel_map.npy")
templates = np.load(results_dir / "templates.npy")
chan_best = chan_map[(templates**2).sum(axis=1).argmax(axis=-1)]
amplitudes = np.load(results_dir / "amplitudes.npy")
times, units = np.load(results_dir / "spike_times.npy"), np.load(results_dir / "spike_clusters.npy")
firing_rates = np.unique(units, return_counts=True)[1] * ops["fs"] / times.max()

figure, (drift, raster, rates) = plt.subplots(3)
drift.plot(np.arange(ops["Nbatches"]) * ops["batch_size"] / ops["fs"], ops["dshift"])
raster.scatter(times / ops["fs"], chan_best[units], s=0.5, color="k", alpha=0.25)
rates.scatter(firing_rates, amplitude_of_unit, c=contam_pct < 10)
figure.savefig("basic.png")

assert len(times) == len(units) == len(amplitudes) == kept_spikes.sum() > 100
assert len(contam_pct) == len(templates) == len(is_ref) == len(est_contam_rate) == len(Wall) > 2
assert ops["probe"]["n_chan"] == 12 and tF.shape[0] == len(st)
"""

ALL_SETTINGS = """
from {package} import DEFAULT_SETTINGS, run_kilosort
from {package}.utils import PROBE_DIR

settings = DEFAULT_SETTINGS.copy()
settings["n_chan_bin"] = 12
settings["filename"] = "recorded/data.bin"
settings["results_dir"] = "sorted"
settings["probe_path"] = PROBE_DIR / "of_a_lab.json"
settings["nblocks"] = 0
settings["tmax"] = 2.2
results = run_kilosort(settings=settings)

ops, st = results[:2]
assert st[:, 0].max() < 2.2 * 30_000 and ops["settings"]["tmax"] == 2.2
"""

FILE_OBJECT = """
import numpy as np
from {package} import io, run_kilosort
from {package}.utils import PROBE_DIR


class FileObject:
    # Samples that are computed while they are read
    shape = (np.memmap("recorded/data.bin", "int16").size // 12, 12)
    dtype = np.dtype("int16")

    def __getitem__(self, items):
        return np.memmap("recorded/data.bin", "int16", "r", shape=self.shape)[items] * np.int16(2)


probe = io.load_probe(PROBE_DIR / "of_a_lab.json")
ops, st, *_ = run_kilosort(
    {"n_chan_bin": 12, "nblocks": 0},
    probe=probe,
    filename="recorded/data.bin",
    file_object=FileObject(),
    results_dir="of_object",
)
assert len(st) > 100
"""

PROBE_DICTIONARY = """
import numpy as np
from {package} import run_kilosort
from {package}.io import load_probe, save_probe

n_chan = 12
probe = {
    "chanMap": np.arange(n_chan),
    "xc": np.zeros(n_chan),
    "yc": 20.0 * np.arange(n_chan),
    "kcoords": np.zeros(n_chan),
    "n_chan": n_chan,
}
save_probe(probe, "made.json")
probe = load_probe("made.json")
ops, *_ = run_kilosort(
    {"n_chan_bin": 12, "nblocks": 0},
    probe=probe,
    filename="recorded/data.bin",
    results_dir="by_dictionary",
    bad_channels=[11],
)
assert ops["probe"]["chanMap"].tolist() == list(range(11))
"""

SHANKS = """
from pathlib import Path

import numpy as np
from {package} import run_kilosort

xc, yc = np.repeat([0.0, 250.0], 8), np.tile(20.0 * np.arange(8), 2)
probe = {"chanMap": np.arange(16), "xc": xc, "yc": yc, "kcoords": np.repeat([0, 1], 8), "n_chan": 16}
settings = {"n_chan_bin": 16, "nblocks": 0, "nearest_chans": 8}
run_kilosort(settings, probe=probe, filename="two_shanks.bin", results_dir="by_shank", shank_idx=[0, 1])

for shank in (0, 1):
    found = np.load(Path("by_shank") / f"shank_{shank}" / "channel_map.npy")
    assert found.ravel().tolist() == list(range(8 * shank, 8 * shank + 8))
"""

SPIKEINTERFACE = """
import spikeinterface.core as si
from {package} import io, run_kilosort
from {package}.utils import PROBE_DIR

recording = si.read_binary("recorded/data.bin", sampling_frequency=30_000, dtype="int16", num_channels=12)
ops, st, *_ = run_kilosort(
    {"n_chan_bin": recording.get_num_channels(), "fs": recording.get_sampling_frequency(), "nblocks": 0},
    probe=io.load_probe(PROBE_DIR / "of_a_lab.json"),
    filename="recorded/data.bin",
    file_object=io.RecordingExtractorAsArray(recording),
    results_dir="of_extractor",
)
assert len(st) > 100
"""

LOAD_SORTING = """
import matplotlib.pyplot as plt
import numpy as np
from {package} import run_kilosort
from {package}.run_kilosort import load_sorting
from {package}.utils import PROBE_DIR

settings = {"n_chan_bin": 12, "filename": "recorded/data.bin", "probe_path": PROBE_DIR / "of_a_lab.json", "nblocks": 0}
run_kilosort(settings, results_dir="with_extras", save_extra_vars=True)

ops, st, clu, similar_templates, is_ref, est_contam_rate, kept_spikes = load_sorting("with_extras")
for unit in np.flatnonzero(is_ref):
    times = st[clu == unit] / ops["fs"]
    plt.hist(np.diff(times), bins=np.arange(0, 0.1, 0.001), alpha=0.5, label=f"{unit}: {est_contam_rate[unit]:.2f}")
plt.legend()
plt.savefig("intervals.png")

_, st, clu, *_, kept_spikes, tF, Wall, full_st, full_clu, full_amp = load_sorting("with_extras", load_extra_vars=True)
assert len(full_st) == len(full_clu) == len(full_amp) == len(tF) == len(kept_spikes)
assert np.array_equal(full_clu[kept_spikes], clu) and len(Wall) == len(is_ref) == len(similar_templates)
"""

PARTS = """
import time
from pathlib import Path

import numpy as np
import torch
from {package} import DEFAULT_SETTINGS, io, plots
from {package}.run_kilosort import (
    close_logger,
    cluster_spikes,
    compute_drift_correction,
    compute_preprocessing,
    detect_spikes,
    get_run_parameters,
    initialize_ops,
    save_sorting,
    set_files,
    setup_logger,
)
from {package}.utils import PROBE_DIR

device, tic0 = torch.device("cpu"), time.time()
settings = {**DEFAULT_SETTINGS, "n_chan_bin": 12, "nt0min": 20}
probe = io.load_probe(PROBE_DIR / "of_a_lab.json")
filename, data_dir, results_dir, probe = set_files(
    settings, Path("recorded/data.bin"), probe, None, None, Path("in_parts"), None, None
)
results_dir.mkdir(parents=True, exist_ok=True)
setup_logger(results_dir)
ops, settings = initialize_ops(settings, probe, "int16", True, False, device, False)
n_chan_bin, fs, NT, *_ = get_run_parameters(ops)
assert (n_chan_bin, fs, NT) == (12, 30_000, 60_000)

ops = compute_preprocessing(ops, device, tic0=tic0)
ops, bfile, st0 = compute_drift_correction(ops, device, tic0=tic0)
io.save_ops(ops, results_dir)
plots.plot_drift_amount(ops, results_dir)
plots.plot_drift_scatter(st0, results_dir)
traces = bfile.padded_batch_to_torch(0, ops)
assert traces.shape[0] == 12 and bfile.n_batches == ops["Nbatches"]

st, tF, Wall0, clu0 = detect_spikes(ops, device, bfile, tic0=tic0)
plots.plot_diagnostics(Wall0, clu0, ops, results_dir)
clu, Wall, st, tF = cluster_spikes(st, tF, ops, device, bfile, tic0=tic0)
ops, similar_templates, is_ref, est_contam_rate, kept_spikes = save_sorting(
    ops, results_dir, st, clu, tF, Wall, bfile.imin, tic0=tic0
)
plots.plot_spike_positions(clu[kept_spikes], is_ref, results_dir)
close_logger()

assert len(st) == len(clu) == len(tF) == len(kept_spikes) and len(Wall) == len(is_ref)
assert len(np.load(results_dir / "spike_times.npy")) == kept_spikes.sum() > 100
"""

EXAMPLES = {
    "basic": BASIC,
    "all settings": ALL_SETTINGS,
    "file object": FILE_OBJECT,
    "file object of SpikeInterface": SPIKEINTERFACE,
    "probe dictionary": PROBE_DICTIONARY,
    "shanks": SHANKS,
    "load_sorting": LOAD_SORTING,
    "parts": PARTS,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning"),
    pytest.mark.filterwarnings("default:::spikeinterface"),  # its own
    pytest.mark.filterwarnings("default:::probeinterface"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts read: two recordings, and a probe in the folder of probes."""
    folder = tmp_path_factory.mktemp("made")
    line, shanks = simulate.linear_probe(12, pitch_um=20), simulate.multi_shank_probe(2, 8)
    busy: dict[str, Any] = {"amplitude_range_uv": (90, 250), "rate_range_hz": (25, 60), "hash_per_channel": 0}
    for name in ("recorded", "probes"):
        (folder / name).mkdir()
    for probe, name, seed in ((line, "recorded/data.bin", 3), (shanks, "two_shanks.bin", 5)):
        recording = simulate.simulate(probe, float(SECONDS), seed=seed, n_units=6, **busy)
        recording.read(0, SECONDS * RATE).tofile(folder / name)
    save_probe(line, folder / "probes" / "of_a_lab.json")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own for each script."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def code(name: str, package: str) -> str:
    return EXAMPLES[name].replace("{package}", package)


@pytest.mark.parametrize("name", EXAMPLES)
def test_only_the_import_differs(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "file object of SpikeInterface":
        pytest.importorskip("spikeinterface")
    for module in (arguments, utils):
        monkeypatch.setattr(module, "PROBE_DIR", here / "probes")
    monkeypatch.setattr("ks4stream.stages.waveforms.MIN_SNIPPETS", 100)  # as a short recording has few spikes
    if name != "basic":  # the plots of a short sort take as long as the rest of it
        monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
    matplotlib.use("Agg")
    try:
        exec(compile(code(name, "ks4stream.kilosort4"), name, "exec"), {"__name__": "__main__"})
    finally:
        plt.close("all")


@pytest.mark.skipif("KILOSORT4_PYTHON" not in os.environ, reason="KILOSORT4_PYTHON names no Python with Kilosort4")
@pytest.mark.parametrize("name", EXAMPLES)
def test_kilosort4_runs_the_same_script(name: str, here: Path) -> None:
    """In an environment of its own, as Kilosort4 is not a dependency."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"KILOSORT_LOCAL_DOWNLOADS_PATH": str(here), "MPLBACKEND": "Agg"}
    command = [os.environ["KILOSORT4_PYTHON"], "-c", code(name, "kilosort")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
    if "No module named 'spikeinterface'" in done.stderr:
        pytest.skip("SpikeInterface is not installed there")
    assert done.returncode == 0, done.stderr
