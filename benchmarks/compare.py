"""Compare ks4stream with Kilosort4 on simulated recordings: same files, same machine, one run.

    python benchmarks/compare.py --kilosort-python PYTHON_WITH_KILOSORT --out DIR

Every scenario is simulated, then sorted by one sorter after the other, each in a process of its own whose wall and
CPU seconds (children included) and peak memory are taken when it ends. One table results, ``compare.md`` and
``compare.json`` in DIR. Hours can be saved with ``--reuse``: Kilosort4's earlier results count where they are of
the same bytes, probe and settings; such rows are marked, and their times are of another run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import recordings
from scenarios import SCENARIOS

from ks4stream.scoring import WELL_DETECTED_SCORE, Score, score

HERE = Path(__file__).parent
ISSUE_SCENARIOS = ("static", "rigid", "nonrigid", "fourshank", "tetrodes", "badchannels")
FIRST_SEED = 201
KILOSORT_SETTINGS = {"tetrodes": ("nblocks=0",), "fourshank": ("nblocks=0",)}
"""Without these Kilosort4 4.1.7 stops with an error; ks4stream keeps its defaults."""

ACCURACY_MARGIN = 0.01
"""Mean accuracies closer than this are equal."""

OURS, THEIRS = "ks4stream", "Kilosort4"
STAGES = (  # label, stages of ks4stream, stages of Kilosort4: what both do between the same two points
    ("preprocessing", ("whitening",), ("preproc",)),
    ("detection and drift", ("waveforms", "detection", "drift"), ("drift", "st0")),
    ("first clustering", ("first clustering",), ("clu0",)),
    ("matching", ("matching",), ("st",)),
    ("final clustering", ("final clustering",), ("clu",)),
    ("merging", ("merging",), ("merge",)),
)


@dataclass
class Run:
    """One sorter on one recording."""

    scenario: str
    seed: int
    sorter: str
    wall_s: float = float("nan")  # of the process, imports included
    sort_s: float = float("nan")  # of the call alone
    cpu_s: float = float("nan")
    peak_memory_mb: float = float("nan")
    stage_s: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reused: bool = False
    error: str = ""
    folder: Path = Path()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and write the table."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    agreements: list[dict[str, Any]] = []
    for scenario, seed in _jobs(options):
        _say(f"{scenario}-{seed}")
        folder = options.recordings or options.out / "recordings"
        binary, truth = recordings.make(scenario, seed, folder, seconds=options.seconds)
        here = [_sort(OURS, scenario, seed, binary, truth, options)]
        if options.kilosort_python or options.reuse:
            here.append(_sort(THEIRS, scenario, seed, binary, truth, options))
        runs += here
        if len(here) == 2 and not any(run.error for run in here):
            agreements.append({"scenario": scenario, "seed": seed, **_agreement(*(run.folder for run in here))})
        if not (options.recordings or options.keep_recordings):
            binary.unlink()
        report = {"machine": outcome.machine(), "options": vars(options), "runs": [asdict(run) for run in runs]}
        report["agreement"] = agreements
        (options.out / "compare.json").write_text(json.dumps(report, indent=1, default=str))
        (options.out / "compare.md").write_text(markdown(runs, agreements, outcome.machine()))
    print((options.out / "compare.md").read_text())
    if any(run.error and run.sorter == OURS for run in runs):
        sys.exit(1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and all results")
    parser.add_argument(
        "--scenarios",
        nargs="+",
        type=_scenario,
        default=[(name, None) for name in ISSUE_SCENARIOS],
        metavar="NAME[:SEED]",
        help=f"of {', '.join(SCENARIOS)}; the issue's six by default",
    )
    parser.add_argument(
        "--seed-offset",
        type=int,
        default=FIRST_SEED,
        help="the n-th scenario gets the seed OFFSET + n: scenarios that share a seed share their units",
    )
    parser.add_argument("--repeats", type=int, default=1, help="recordings per scenario, each with its own seed")
    parser.add_argument("--seconds", type=float, default=None, help="length of all recordings, instead of their own")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--kilosort-python", help="python of an environment that holds Kilosort4")
    which.add_argument("--without-kilosort", action="store_true", help="ks4stream alone (or against --reuse)")
    parser.add_argument("--reuse", type=Path, help="folder of SCENARIO-SEED folders left by run_kilosort4.py")
    parser.add_argument("--recordings", type=Path, help="folder where recordings are made, or found; they are kept")
    parser.add_argument("--keep-recordings", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both sorters")
    parser.add_argument("--threads", type=int, help="threads of Kilosort4 and workers of ks4stream; all cores else")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def _scenario(text: str) -> tuple[str, int | None]:
    name, _, seed = text.partition(":")
    if name not in SCENARIOS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SCENARIOS)}")
    return name, int(seed) if seed else None


def _jobs(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Scenarios and seeds; a seed belongs to a scenario's place in the full list, whichever of them are asked for."""
    names = list(SCENARIOS)
    return [
        (name, (options.seed_offset + names.index(name) if seed is None else seed) + repeat * len(names))
        for repeat in range(options.repeats)
        for name, seed in options.scenarios
    ]


# --- running a sorter ---------------------------------------------------------------------------------------


def _sort(
    sorter: str, scenario: str, seed: int, binary: Path, truth: dict[str, np.ndarray], options: argparse.Namespace
) -> Run:
    run = Run(scenario, seed, sorter, folder=options.out / sorter.lower() / binary.stem)
    pairs = [*options.set, *(KILOSORT_SETTINGS.get(scenario, ()) if sorter == THEIRS else ())]
    probe = binary.with_suffix(".probe.json")
    bad = truth["bad_channels"].tolist()
    if sorter == THEIRS:
        run.reused = _reuse(options.reuse, outcome.request(binary, probe, outcome.parse_settings(pairs), bad), run)
        if not run.reused and options.without_kilosort:
            run.error = "no earlier result of this recording, probe and settings"
            return run
    if not run.reused:
        script = HERE / ("run_ks4stream.py" if sorter == OURS else "run_kilosort4.py")
        command = [sys.executable if sorter == OURS else options.kilosort_python, str(script), str(binary)]
        command += ["--probe", str(probe), "--out", str(run.folder), "--device", options.device]
        command += [f"--bad-channels={','.join(map(str, bad))}", *(f"--set={pair}" for pair in pairs)]
        if options.threads:
            command += ["--workers" if sorter == OURS else "--threads", str(options.threads)]
        _say(f"{binary.stem}: {sorter}")
        _measure(command, run, options.threads)
    if not run.error:
        _add_outcome(run, truth)
    return run


def _reuse(folder: Path | None, asked: dict[str, Any], run: Run) -> bool:
    """Point `run` to an earlier result of the very same request; False if there is none."""
    if folder is None or not (folder / f"{run.scenario}-{run.seed}" / "figures.json").exists():
        return False
    earlier = folder / f"{run.scenario}-{run.seed}"
    figures, _ = outcome.read(earlier)
    if figures.get("asked") != json.loads(json.dumps(asked)):
        _say(f"{earlier} is not reused: it is of another file, probe or settings")
        return False
    run.folder = earlier
    run.wall_s, run.cpu_s = figures["sort_wall_s"], figures["sort_cpu_s"]
    run.peak_memory_mb = figures["peak_memory_mb"]
    return True


def _measure(command: list[str], run: Run, threads: int | None) -> None:
    """Run a command, its output in a log beside the results, and note what the process and its children took."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    environment = dict(os.environ)
    if threads:
        environment |= dict.fromkeys(recordings.ONE_THREAD, str(threads))
    with (run.folder / "log").open("wb") as log:
        log.write((shlex.join(command) + "\n").encode())
        log.flush()
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        run.wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from under the process object
    run.cpu_s = usage.ru_utime + usage.ru_stime
    run.peak_memory_mb = usage.ru_maxrss / 1024  # in KiB on Linux
    if process.returncode:
        last = (run.folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        run.error = f"ended with {process.returncode}: {''.join(last)[:200]}"
        _say(f"{run.folder.name}: {run.sorter} {run.error}")


def _add_outcome(run: Run, truth: dict[str, np.ndarray]) -> None:
    figures, found = outcome.read(run.folder)
    run.sort_s, run.stage_s, run.versions = figures["sort_wall_s"], figures["stage_s"], figures["versions"]
    against_truth = _scored(truth["spike_samples"], truth["spike_units"], found, ids=np.arange(len(truth["unit_x_um"])))
    run.quality = {**against_truth.summary, "n_good": figures["n_good"], "n_spikes": len(found["sample"])}


def _scored(samples: np.ndarray, units: np.ndarray, found: dict[str, np.ndarray], ids: Any = None) -> Score:
    return score(samples, units, found["sample"], found["unit"], sampling_rate_hz=30_000.0, truth_ids=ids)


def _agreement(ours: Path, theirs: Path) -> dict[str, float]:
    """How well the two sortings agree: ours held against Kilosort4's as if that were the truth."""
    (_, our), (_, their) = outcome.read(ours), outcome.read(theirs)
    held = _scored(their["sample"], their["unit"], our)
    matched = held.accuracy[held.is_matched]
    return {
        "n_kilosort4": len(held.truth_ids),
        "n_ks4stream": len(held.sorted_ids),
        "n_matched": len(matched),
        "n_alike": int((matched >= WELL_DETECTED_SCORE).sum()),
        "mean_agreement": float(matched.mean()) if len(matched) else float("nan"),
    }


# --- the table ----------------------------------------------------------------------------------------------


def markdown(runs: Sequence[Run], agreements: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Write the report: quality, cost, time per stage, agreement, and the means over recordings."""
    parts = ["# ks4stream and Kilosort4 on the same recordings", _about(runs, machine)]
    parts += ["## Units and cost", _table(_quality_rows(runs)), "## Seconds per stage", _table(_stage_rows(runs))]
    if agreements:
        columns = ("scenario", "seed", "n_kilosort4", "n_ks4stream", "n_matched", "n_alike", "mean_agreement")
        parts += [
            "## Agreement between the sorters",
            "Units of either, those that match (agreement ≥ 0.5), those that are alike (≥ 0.8), and how well the "
            "matched agree on average, Kilosort4's sorting being held as the truth.",
            _table([{name: row[name] for name in columns} for row in agreements]),
            "## Kilosort4's time over ks4stream's",
            _table(_ratio_rows(runs)),
            "## Both on average",
            _table(_mean_rows(runs)),
            "\n".join(_shortfalls(runs)),
        ]
    failed = [f"- {run.scenario}-{run.seed}, {run.sorter}: {run.error}" for run in runs if run.error]
    if failed:
        parts += ["## Without result", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _about(runs: Sequence[Run], machine: dict[str, Any]) -> str:
    lines = [f"Machine: {outcome.describe(machine)}."]
    for sorter in (OURS, THEIRS):
        used = next((run.versions for run in runs if run.sorter == sorter and run.versions), None)
        if used:
            lines.append(f"{sorter}: " + ", ".join(f"{name} {number}" for name, number in used.items()) + ".")
    lines.append("Seconds and memory are of whole processes, imports and output included; “sort s” is the call alone.")
    if any(run.reused for run in runs):
        lines.append("Rows marked * were computed earlier, on the identical file; their times are of that other run.")
    return "\n".join(lines)


def _quality_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    return [
        {
            "scenario": run.scenario,
            "seed": run.seed,
            "sorter": run.sorter + "*" * run.reused,
            "accuracy": run.quality["mean_accuracy"],
            "well detected": f"{run.quality['n_well_detected']} of {run.quality['n_truth']}",
            "false positive": run.quality["n_false_positive"],
            "redundant": run.quality["n_redundant"],
            "over-merged": run.quality["n_overmerged"],
            "units": run.quality["n_sorted"],
            "wall s": run.wall_s,
            "sort s": run.sort_s,
            "CPU s": run.cpu_s,
            "peak MB": round(run.peak_memory_mb),
        }
        for run in runs
        if not run.error
    ]


def _stage_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        if not run.error:
            took = _grouped_seconds(run)
            rows.append({"scenario": run.scenario, "seed": run.seed, "sorter": run.sorter + "*" * run.reused, **took})
    return rows


def _grouped_seconds(run: Run) -> dict[str, float]:
    """Seconds of the stages that correspond; what belongs to none of them is the rest of the call."""
    column = 1 if run.sorter == OURS else 2
    took = {group[0]: sum(run.stage_s.get(name, 0.0) for name in group[column]) for group in STAGES}
    return took | {"rest": run.sort_s - sum(took.values()), "whole sort": run.sort_s}


def _ratio_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How many times longer Kilosort4 took, stage by stage."""
    rows = []
    for ours, theirs in _pairs(runs):
        our, their = _grouped_seconds(ours), _grouped_seconds(theirs)
        ratios = {stage: their[stage] / our[stage] if our[stage] else float("nan") for stage in our}
        rows.append({"scenario": ours.scenario, "seed": f"{ours.seed}{'*' * theirs.reused}", **ratios})
    return rows


def _pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Ours and Kilosort4's, of the recordings that both sorted."""
    done = {(run.scenario, run.seed, run.sorter): run for run in runs if not run.error}
    keys = dict.fromkeys((scenario, seed) for scenario, seed, _ in done)
    return [(done[*key, OURS], done[*key, THEIRS]) for key in keys if {(*key, OURS), (*key, THEIRS)} <= set(done)]


def _mean_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means over the recordings that both sorters finished, and median ratios of the times taken in this run."""
    pairs, rows = _pairs(runs), []
    for sorter, own in zip((OURS, THEIRS), zip(*pairs, strict=True), strict=True):
        row: dict[str, Any] = {"": sorter, "recordings": len(own)}
        for name in ("mean_accuracy", "n_well_detected", "n_false_positive", "n_redundant", "n_overmerged"):
            row[name.removeprefix("n_").replace("_", " ")] = float(np.mean([run.quality[name] for run in own]))
        rows.append(row)
    for name, label in (("wall_s", "wall"), ("sort_s", "sort"), ("cpu_s", "CPU")):
        ratios = [getattr(theirs, name) / getattr(ours, name) for ours, theirs in pairs if not theirs.reused]
        rows[0][f"{label} ratio"] = 1.0
        rows[1][f"{label} ratio"] = float(np.median(ratios)) if ratios else "not of this run"
    return rows


def _shortfalls(runs: Sequence[Run]) -> list[str]:
    """Say on which recordings ours is behind Kilosort4's, if on any."""
    behind = []
    for ours, theirs in _pairs(runs):
        our, their, where = ours.quality, theirs.quality, f"{ours.scenario}-{ours.seed}"
        if our["mean_accuracy"] < their["mean_accuracy"] - ACCURACY_MARGIN:
            behind.append(f"- {where}: accuracy {our['mean_accuracy']:.3f} against {their['mean_accuracy']:.3f}")
        for name, label, sign in (("n_well_detected", "well detected", 1), ("n_false_positive", "false positive", -1)):
            if sign * our[name] < sign * their[name]:
                behind.append(f"- {where}: {label} {our[name]} against {their[name]}")
    return ["ks4stream is behind on:", *behind] if behind else ["ks4stream is behind on no recording."]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table of rows with the same columns."""
    if not rows:
        return "None."

    def text(value: Any) -> str:
        return (f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}") if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
