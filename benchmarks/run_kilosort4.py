"""Run Kilosort4 on one recording, as a black box, in whatever environment holds it.

    PYTHON_WITH_KILOSORT benchmarks/run_kilosort4.py rec.bin --probe rec.probe.json --out DIR [--set nblocks=0]

Leaves ``result.npz`` and ``figures.json`` in DIR (see outcome.py), and Kilosort4's own files in ``DIR/kilosort4``.
With ``--stages`` its public functions are called in turn and what each of them returned is left in ``stages.npz``,
plain arrays for stages.py.

Only Kilosort4's documented functions are called; nothing of it is imported by ks4stream.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import outcome

LEARNED_FROM, MAX_LEARNED_FROM = 25, 8
"""Universal waveforms are learned from every 25th batch; ``--stages`` keeps the traces of the first of these too."""


def main() -> None:
    """Sort one file."""
    options = _options()

    import torch
    from kilosort.io import load_probe

    if options.threads:
        torch.set_num_threads(options.threads)
    settings = outcome.parse_settings(options.set)
    bad = outcome.parse_channels(options.bad_channels)
    asked = outcome.request(options.recording, options.probe, settings, bad)
    options.out.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "settings": {"n_chan_bin": asked["probe"]["n_chan"], **settings},
        "probe": load_probe(options.probe),
        "bad_channels": bad or None,
        "device": torch.device(options.device),
    }
    began, cpu = time.perf_counter(), time.process_time()
    if options.stages:
        sample, unit, figures = _run_in_stages(options.recording, options.out, given, options.stage_batches)
    else:
        sample, unit, figures = _run(options.recording, options.out, given)
    figures |= {
        "sorter": "kilosort4",
        "asked": asked,
        "sort_wall_s": time.perf_counter() - began,
        "sort_cpu_s": time.process_time() - cpu,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "versions": outcome.versions("kilosort", "torch", "numpy", "scipy", "scikit-learn"),
        "machine": platform.platform(),
    }
    outcome.write(options.out, sample=sample, unit=unit, figures=figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value as in JSON")
    parser.add_argument("--bad-channels", default="", help="columns of the file, comma separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice by default")
    parser.add_argument("--stages", action="store_true", help="call the stages in turn, keep what they return")
    parser.add_argument(
        "--stage-batches", type=int, default=3, help="batches whose traces --stages keeps, and 0, 25, …"
    )
    return parser.parse_args()


def _run(recording: Path, out: Path, given: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Sort in one call: times and units of the kept spikes, and figures."""
    from kilosort import run_kilosort

    ops, st, clu, _, _, _, is_ref, _, kept = run_kilosort(
        given["settings"],
        probe=given["probe"],
        filename=recording,
        results_dir=out / "kilosort4",
        device=given["device"],
        bad_channels=given["bad_channels"],
    )
    return (
        st[kept, 0],
        np.asarray(clu)[kept],
        {"n_good": int(np.sum(is_ref)), "good_units": np.flatnonzero(is_ref).tolist(), "stage_s": _stage_seconds(ops)},
    )


def _stage_seconds(ops: dict[str, Any]) -> dict[str, float]:
    """Kilosort4's own times per stage, as its ``ops`` report them."""
    begin = "runtime_"
    return {name.removeprefix(begin): float(value) for name, value in ops.items() if name.startswith(begin)}


def _run_in_stages(
    recording: Path, out: Path, given: dict[str, Any], n_batches: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Sort by calling the public stage functions in turn, as their documentation shows."""
    import torch
    from kilosort.parameters import DEFAULT_SETTINGS

    # the package has a function of the module's name, which hides it
    ks = importlib.import_module("kilosort.run_kilosort")
    device, began = given["device"], time.time()
    settings = DEFAULT_SETTINGS | given["settings"]
    files, data_dir, results_dir, probe = ks.set_files(
        settings, recording, given["probe"], None, None, out / "kilosort4", given["bad_channels"], None
    )
    settings |= {"filename": files, "data_dir": data_dir, "results_dir": results_dir}
    ops, _ = ks.initialize_ops(settings, probe, "int16", True, False, device, False)
    np.random.seed(1)  # noqa: NPY002 as run_kilosort does, or its k-means differs from run to run
    torch.manual_seed(1)

    ops = ks.compute_preprocessing(ops, device, tic0=began)
    kept: dict[str, Any] = {"whitening": ops["Wrot"], "n_batches": ops["Nbatches"]}
    ops, bfile, peaks = ks.compute_drift_correction(ops, device, tic0=began)
    last = int(ops["Nbatches"]) - 1
    spread = np.linspace(0, last, max(n_batches, 2)).astype(int)[:n_batches]
    batches = np.union1d(spread, np.arange(0, last + 1, LEARNED_FROM)[:MAX_LEARNED_FROM])
    kept |= {"batches": batches, "whitened": np.stack([_array(bfile.padded_batch_to_torch(b)) for b in batches])}
    if peaks is not None:  # with nblocks=0 there is no first pass
        kept |= {"drift_um": ops["dshift"], "drift_centre_um": ops["yblk"], "peaks": peaks}
        kept |= {"moved": np.stack([_array(bfile.padded_batch_to_torch(b, ops)) for b in batches])}
        kept |= _copies(ops, components_1="wPCA", shapes_1="wTEMP")

    st, features, templates, clusters = ks.detect_spikes(ops, device, bfile, tic0=began)
    kept |= {"spikes": st, "features": features, "templates": templates, "clusters": clusters}
    kept |= _copies(ops, components="wPCA", shapes="wTEMP", centre_x="xcup", centre_y="ycup")
    kept |= _copies(ops, centre_channels="iC", centre_weights="weigh", feature_channels="iCC", template_channel="iU")
    kept = {name: _array(value) for name, value in kept.items()}  # before the next stage changes it

    unit, unit_features, st, features = ks.cluster_spikes(st, features, ops, device, bfile, tic0=began)
    kept |= {"final_unit": unit, "final_features": _array(unit_features), "final_spikes": st}
    np.savez(out / "stages.npz", **kept)
    ops, _, is_ref, _, kept_spikes = ks.save_sorting(
        ops, results_dir, st, unit, features, unit_features, bfile.imin, tic0=began
    )
    figures = {"n_good": int(np.sum(is_ref)), "stage_s": _stage_seconds(ops)}
    return st[kept_spikes, 0], unit[kept_spikes], figures


def _copies(ops: dict[str, Any], **names: str) -> dict[str, Any]:
    return {ours: _array(ops[theirs]) for ours, theirs in names.items()}


def _array(value: Any) -> np.ndarray:
    """A copy as a plain array."""
    return value.detach().cpu().numpy().copy() if hasattr(value, "detach") else np.array(value)


if __name__ == "__main__":
    main()
