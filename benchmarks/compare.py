"""Compare ks4stream with Kilosort4 and with SpikeInterface's sorters: same files, same machine, one run.

    python benchmarks/compare.py --kilosort-python PYTHON_WITH_KILOSORT --out DIR
    python benchmarks/compare.py --kilosort-python … --spikeinterface-python … --files a-1.bin b-2.bin --out DIR

Every recording is sorted by one sorter after the other, each in a process of its own whose wall and CPU seconds
(children included) and peak memory are taken when it ends. One table results, ``compare.md`` and ``compare.json`` in
DIR; its first row of each recording is that of an ideal detector (see limit.py).

What other sorters found is not computed again: their earlier results in DIR, and in the folders that ``--reuse``
names, count where they are of the same bytes, probe, settings and versions. Such rows are marked, and their times are
of another run.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import limit
import numpy as np
import outcome
import quick
import recordings
import run_spikeinterface
from scenarios import ALL, SCENARIOS

from ks4stream.scoring import WELL_DETECTED_SCORE, Score, score

HERE = Path(__file__).parent
DEFAULT_SCENARIOS = ("static", "rigid", "nonrigid", "fourshank", "tetrodes", "badchannels")
FIRST_SEED = 201
KILOSORT_SETTINGS = {"tetrodes": ("nblocks=0",), "fourshank": ("nblocks=0",)}
"""Without these Kilosort4 4.1.7 stops with an error; ks4stream keeps its defaults."""

KILOSORT_PACKAGES = ("kilosort", "torch", "numpy", "scipy", "scikit-learn")

ACCURACY_MARGIN = 0.01
"""Mean accuracies closer than this are equal."""

OURS, THEIRS, LIMIT = "ks4stream", "Kilosort4", "limit"
OTHERS = {"spykingcircus2": "SpyKING CIRCUS 2", "tridesclous2": "Tridesclous 2", "lupin": "Lupin"}
"""SpikeInterface's own sorters and what they are called in the tables."""

MEANS = (
    ("mean_accuracy", "accuracy"),
    ("n_well_detected", "found ≥ 0.8"),
    ("n_very_well_detected", "≥ 0.95"),
    ("n_false_positive", "false"),
    ("n_false_good", "false good"),
    ("n_background", "background"),
    ("n_redundant", "redundant"),
    ("n_overmerged", "merged"),
)
STAGES = (  # label, stages of ks4stream, stages of Kilosort4: what both do between the same two points
    ("preprocessing", ("whitening",), ("preproc",)),
    ("detection and drift", ("waveforms", "detection", "drift"), ("drift", "st0")),
    ("first clustering", ("first clustering",), ("clu0",)),
    ("matching", ("widening", "thresholds", "matching"), ("st",)),
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
    kept = kept_results([options.out, *options.reuse])
    for scenario, seed, binary, truth in _recordings(options):
        _say(binary.stem)
        if not options.without_limit:
            runs.append(_limit(scenario, seed, binary, options.out / "limits"))
        here = {OURS: _sort(OURS, scenario, seed, binary, truth, options, kept)}
        if options.kilosort_python or options.reuse:
            here[THEIRS] = _sort(THEIRS, scenario, seed, binary, truth, options, kept)
        for sorter in options.sorters if options.spikeinterface_python else ():
            here[sorter] = _sort(sorter, scenario, seed, binary, truth, options, kept)
        runs += here.values()
        both = [here[sorter] for sorter in (OURS, THEIRS) if sorter in here and not here[sorter].error]
        if len(both) == 2:
            agreements.append({"scenario": scenario, "seed": seed, **_agreement(*(run.folder for run in both))})
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
        default=[(name, None) for name in DEFAULT_SCENARIOS],
        metavar="NAME[:SEED]",
        help=f"of {', '.join(ALL)}; the first six by default",
    )
    parser.add_argument(
        "--seed-offset",
        type=int,
        default=FIRST_SEED,
        help="the n-th scenario gets the seed OFFSET + n: scenarios that share a seed share their units",
    )
    parser.add_argument("--repeats", type=int, default=1, help="recordings per scenario, each with its own seed")
    parser.add_argument("--seconds", type=float, default=None, help="length of all recordings, instead of their own")
    parser.add_argument(
        "--files", nargs="+", type=Path, metavar="NAME-SEED.bin", help="these recordings, probe and truth beside them"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--kilosort-python", help="python of an environment that holds Kilosort4")
    which.add_argument("--without-kilosort", action="store_true", help="none, or only its results in --reuse")
    parser.add_argument("--spikeinterface-python", help="python of an environment that holds SpikeInterface")
    parser.add_argument(
        "--sorters",
        nargs="+",
        default=list(OTHERS),
        metavar="SORTER",
        help="those of SpikeInterface to run, by its names for them; all of its own by default",
    )
    parser.add_argument("--without-limit", action="store_true", help="no ideal detector")
    parser.add_argument(
        "--reuse", type=Path, nargs="+", default=[], help="folders that hold what run_….py left, at any depth"
    )
    parser.add_argument("--recordings", type=Path, help="folder where recordings are made, or found; they are kept")
    parser.add_argument("--keep-recordings", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both sorters")
    parser.add_argument("--threads", type=int, help="threads of Kilosort4 and workers of ks4stream; all cores else")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def _scenario(text: str) -> tuple[str, int | None]:
    name, _, seed = text.partition(":")
    if name not in ALL:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ALL)}")
    return name, int(seed) if seed else None


def _jobs(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Scenarios and seeds; a seed belongs to a scenario's place in the full list, whichever of them are asked for."""
    names = list(ALL)
    return [
        (name, (options.seed_offset + names.index(name) if seed is None else seed) + repeat * len(SCENARIOS))
        for repeat in range(options.repeats)
        for name, seed in options.scenarios
    ]


def _recordings(options: argparse.Namespace) -> Iterator[tuple[str, int, Path, dict[str, np.ndarray]]]:
    """Name, seed, file and truth of each recording; those that are made here exist until the next one."""
    if options.files:
        for given in options.files:
            name, _, seed = given.stem.rpartition("-")
            yield name or given.stem, int(seed) if name else 0, given, quick.read_truth(given)
        return
    folder = options.recordings or options.out / "recordings"
    for scenario, seed in _jobs(options):
        binary, truth = recordings.make(scenario, seed, folder, seconds=options.seconds)
        yield scenario, seed, binary, truth
        if not (options.recordings or options.keep_recordings):
            binary.unlink()


# --- running a sorter ---------------------------------------------------------------------------------------


def _limit(scenario: str, seed: int, binary: Path, folder: Path) -> Run:
    return Run(scenario, seed, LIMIT, quality=limit.limit_of(binary, folder).summary)


def _sort(
    sorter: str,
    scenario: str,
    seed: int,
    binary: Path,
    truth: dict[str, np.ndarray],
    options: argparse.Namespace,
    kept: dict[str, list[Path]],
) -> Run:
    run = Run(scenario, seed, OTHERS.get(sorter, sorter), folder=options.out / sorter.lower() / binary.stem)
    pairs = [*options.set, *(KILOSORT_SETTINGS.get(scenario, ()) if sorter == THEIRS else ())]
    pairs = pairs if sorter in (OURS, THEIRS) else []  # other sorters do not know the settings of these two
    probe = binary.with_suffix(".probe.json")
    bad = truth["bad_channels"].tolist()
    if sorter != OURS:
        python = options.kilosort_python if sorter == THEIRS else options.spikeinterface_python
        asked = outcome.request(binary, probe, outcome.parse_settings(pairs), bad)
        versions = _installed(python, KILOSORT_PACKAGES if sorter == THEIRS else run_spikeinterface.packages(sorter))
        run.reused = _reuse(kept, sorter.lower(), asked, versions, run)
        if not run.reused and python is None:
            run.error = "no earlier result of this recording, probe and settings"
            return run
    if not run.reused:
        script = {OURS: "run_ks4stream.py", THEIRS: "run_kilosort4.py"}.get(sorter, "run_spikeinterface.py")
        command = [sys.executable if sorter == OURS else python, str(HERE / script)]
        if sorter not in (OURS, THEIRS):
            command += [sorter, f"--gain-uv={float(truth['gain_uv'])}"]
        command += [str(binary), "--probe", str(probe), "--out", str(run.folder), "--device", options.device]
        command += [f"--bad-channels={','.join(map(str, bad))}", *(f"--set={pair}" for pair in pairs)]
        if options.threads:
            command += ["--workers" if sorter == OURS else "--threads", str(options.threads)]
        _say(f"{binary.stem}: {run.sorter}")
        _measure(command, run, options.threads)
    if not run.error:
        _add_outcome(run, truth)
    return run


def kept_results(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders below these that hold a sorter's result, by the sorter's name."""
    kept: dict[str, list[Path]] = {}
    for folder in folders:
        for figures in sorted(folder.rglob("figures.json")):
            kept.setdefault(json.loads(figures.read_text()).get("sorter", ""), []).append(figures.parent)
    return kept


@cache
def _installed(python: str | None, packages: tuple[str, ...]) -> dict[str, str] | None:
    """Versions of packages in another environment; None if there is none to ask."""
    if python is None:
        return None
    program = f"import json, outcome; print(json.dumps(outcome.versions(*{packages!r})))"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([python, "-c", program], env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _reuse(
    kept: dict[str, list[Path]], sorter: str, asked: dict[str, Any], versions: dict[str, str] | None, run: Run
) -> bool:
    """Point `run` to an earlier result of the very same request and versions; False if there is none."""
    asked = json.loads(json.dumps(asked))
    for earlier in kept.get(sorter, ()):
        figures, _ = outcome.read(earlier)
        if figures.get("asked") != asked or (versions is not None and figures.get("versions") != versions):
            continue
        run.folder = earlier
        process = figures.get("process", {})  # times of the whole process, if compare.py started it
        run.wall_s = process.get("wall_s", figures["sort_wall_s"])
        run.cpu_s = process.get("cpu_s", figures["sort_cpu_s"])
        run.peak_memory_mb = process.get("peak_memory_mb", figures["peak_memory_mb"])
        return True
    return False


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
    elif (run.folder / "figures.json").exists():
        took = {"wall_s": run.wall_s, "cpu_s": run.cpu_s, "peak_memory_mb": run.peak_memory_mb}
        outcome.add(run.folder, process=took)


def _add_outcome(run: Run, truth: dict[str, np.ndarray]) -> None:
    figures, found = outcome.read(run.folder)
    run.sort_s, run.stage_s, run.versions = figures["sort_wall_s"], figures["stage_s"], figures["versions"]
    run.quality = quick.summary_of(truth, found["sample"], found["unit"], figures.get("good_units"))
    run.quality |= {"n_good": figures["n_good"], "n_spikes": len(found["sample"])}


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
    parts = ["# ks4stream and other sorters on the same recordings", _about(runs, machine)]
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
        ]
    if means := _mean_rows(runs):
        parts += ["## On average, over the recordings that all of these sorted", _table(means)]
    if agreements:
        parts.append("\n".join(_shortfalls(runs)))
    failed = [f"- {run.scenario}-{run.seed}, {run.sorter}: {run.error}" for run in runs if run.error]
    if failed:
        parts += ["## Without result", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _about(runs: Sequence[Run], machine: dict[str, Any]) -> str:
    lines = [f"Machine: {outcome.describe(machine)}."]
    for sorter in dict.fromkeys(run.sorter for run in runs):
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
            "found ≥ 0.8": f"{run.quality['n_well_detected']} of {run.quality['n_truth']}",
            "≥ 0.95": run.quality["n_very_well_detected"],
            "false": run.quality.get("n_false_positive", "–"),
            "false good": run.quality.get("n_false_good", "–"),
            "background": run.quality.get("n_background", "–"),
            "redundant": run.quality.get("n_redundant", "–"),
            "merged": run.quality.get("n_overmerged", "–"),
            "units": run.quality.get("n_sorted", "–"),
            "wall s": run.wall_s,
            "sort s": run.sort_s,
            "CPU s": run.cpu_s,
            "peak MB": run.peak_memory_mb if np.isnan(run.peak_memory_mb) else round(run.peak_memory_mb),
        }
        for run in runs
        if not run.error
    ]


def _stage_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        if not run.error and run.sorter in (OURS, THEIRS):
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
    """Means of each sorter over the recordings that all finished, and median ratios of the times taken in this run."""
    sorters = list(dict.fromkeys(run.sorter for run in runs))
    done = {(run.scenario, run.seed, run.sorter): run for run in runs if not run.error}
    keys = [key for key in dict.fromkeys(key[:2] for key in done) if all((*key, sorter) in done for sorter in sorters)]
    if len(sorters) < 2 or not keys:
        return []
    rows = []
    for sorter in sorters:
        own = [done[*key, sorter] for key in keys]
        row: dict[str, Any] = {"": sorter, "recordings": len(own)}
        for name, label in MEANS:
            values = [run.quality.get(name, float("nan")) for run in own]
            row[label] = float(np.mean(values))
        for name, label in (("wall_s", "wall"), ("cpu_s", "CPU")):
            times = [(getattr(run, name), getattr(done[*key, OURS], name)) for key, run in zip(keys, own, strict=True)]
            ratios = [
                theirs / ours for (theirs, ours), run in zip(times, own, strict=True) if not run.reused and theirs > 0
            ]
            row[f"{label} / ours"] = float(np.median(ratios)) if ratios else float("nan")
        rows.append(row)
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
        if not isinstance(value, float):
            return str(value)
        return "–" if np.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
