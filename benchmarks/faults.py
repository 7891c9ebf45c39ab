"""What breaks while a sort runs, and what becomes of the result.

Many sorts of one short recording, each by a process of its own with two worker processes. At a random moment something
is broken: workers or the whole process are killed, files of the run are cut, get another bit or vanish, the disk is
full, the store becomes read-only. Then, as a user would, the same call is made again until it ends. Every result is
compared with that of an undisturbed sort, byte by byte, and a journal tells whether a task that had finished was
computed again. The last two faults need Linux and root: they mount file systems. From the shell::

    python benchmarks/faults.py --out faults --runs 5

Ends with an error if a result differs, an error is unclear, a task is repeated without need, or a process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from ks4stream.errors import ResultsError
from ks4stream.io.run_store import Checkpointed, record_path

N_CHANNELS, SECONDS, N_UNITS, BLOCK_BATCHES = 16, 16.0, 20, 2
DATA, FILLER = "data.bin", "filler"
PATIENCE_S = 300  # for one sort, or for a process to start


# -- the sorting process -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Checkpointed):
    """A remembered task that tells the journal when it is really computed, and when its record has appeared."""

    def __call__(self, item: Any) -> Any:
        task, journal = record_path(self.store.folder, item), journal_of(self.store.folder.parents[1])
        value = Checkpointed(_Noted(self.function, journal, task), self.store)(item)
        note(journal, "end", task)
        return value


@dataclass(frozen=True)
class _Noted:
    function: Callable[[Any], Any]
    journal: Path
    task: Path

    def __call__(self, item: Any) -> Any:
        note(self.journal, "begin", self.task)
        return self.function(item)


def journal_of(folder: Path) -> Path:
    """Where it lies: beside the results folder, whose disk may be full."""
    return folder.with_name(f"{folder.name}.journal")


def note(journal: Path, event: str, task: Path) -> None:
    """Add a line; short ones that are appended in one write do not mix."""
    with journal.open("a") as file:
        file.write(f"{event} {task.parent.name}/{task.name}\n")


def serve(data: Path) -> None:
    """Sort as often as asked: lines of JSON in, a line out for each."""
    from ks4stream import open_recording, run, sort
    from ks4stream.engine.cluster import local_client
    from ks4stream.settings import Settings
    from ks4stream.simulate import linear_probe

    run.Checkpointed = Watched  # type: ignore[misc]  # in place of the tasks of every stage
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    with local_client(n_workers=2, processes=True) as client:
        print(json.dumps("ready"), file=answer)
        for line in sys.stdin:
            order = json.loads(line)
            recording = open_recording(
                data, n_chan=N_CHANNELS, fs=30_000, dtype="int16", probe=linear_probe(N_CHANNELS)
            )
            settings = Settings(batch_size=30_000, nblocks=order["nblocks"])
            try:
                sort(recording, settings, results_dir=order["folder"], client=client, block_batches=BLOCK_BATCHES)
            except ResultsError as error:
                print(json.dumps({"refused": str(error)}), file=answer)
            except Exception as error:
                print(json.dumps({"failed": repr(error)}), file=answer)
            else:
                print(json.dumps({"done": True}), file=answer)


class Sorter:
    """A process that sorts, with two worker processes of its own."""

    def __init__(self, data: Path, log: Path) -> None:
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(data)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])},
            )
        assert self.answer() == "ready"

    def ask(self, folder: Path, nblocks: int) -> None:
        """Begin a sort."""
        assert self._process.stdin is not None
        print(json.dumps({"folder": str(folder), "nblocks": nblocks}), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """What became of it; None if the process was killed."""
        assert self._process.stdout is not None
        patience, began = threading.Timer(PATIENCE_S, self.kill), time.monotonic()
        patience.start()
        found = json.loads(self._process.stdout.readline() or "null")
        patience.cancel()
        hung = found is None and time.monotonic() > began + PATIENCE_S
        return {"hung": f"no answer in {PATIENCE_S} s"} if hung else found

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        found = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in found if "spawn_main" in " ".join(one.cmdline())]

    def kill(self) -> int:
        """Kill the process, not its workers; how many of those are still there after ten seconds."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _, left = psutil.wait_procs(children, timeout=10)
        return len(left)

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


# -- faults --------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a fault may lay hands on."""

    sorter: Sorter
    folder: Path
    chance: random.Random
    orphans: int = 0
    damaged: int = 0

    def moment(self, lines: int) -> None:
        """Wait for a random moment of a sort that leaves so many lines in its journal."""
        wanted, until = self.chance.randrange(2, lines - 2), time.monotonic() + PATIENCE_S
        while len(read_journal(self.folder)) < wanted and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(self.chance.uniform(0, 0.1))

    def files(self) -> list[Path]:
        """Blocks and records that are there."""
        return sorted(path for kind in ("npz", "rows") for path in (self.folder / "run").glob(f"*/*.{kind}"))


def a_worker_killed(scene: Scene) -> None:
    scene.chance.choice(scene.sorter.workers()).kill()


def both_workers_killed(scene: Scene) -> None:
    for worker in scene.sorter.workers():
        worker.kill()


def process_killed(scene: Scene) -> None:
    scene.orphans += scene.sorter.kill()


def file_cut(scene: Scene) -> None:
    path = _chosen(scene)
    os.truncate(path, scene.chance.randrange(path.stat().st_size))


def file_with_another_bit(scene: Scene) -> None:
    path = _chosen(scene)
    with path.open("r+b") as file:
        file.seek(at := scene.chance.randrange(path.stat().st_size))
        byte = file.read(1)[0] ^ 1 << scene.chance.randrange(8)
        file.seek(at)
        file.write(bytes([byte]))


def file_deleted(scene: Scene) -> None:
    _chosen(scene).unlink()


def _chosen(scene: Scene) -> Path:
    scene.damaged += 1
    return scene.chance.choice(scene.files())


def disk_full(scene: Scene) -> None:
    left = shutil.disk_usage(scene.folder).free
    with suppress(OSError), (scene.folder / FILLER).open("wb") as file:
        file.write(bytes(max(left - 20_000, 0)))


def disk_emptied(scene: Scene) -> None:
    (scene.folder / FILLER).unlink()


def store_read_only(scene: Scene) -> None:
    run, aside = str(scene.folder / "run"), scene.folder / "aside"  # where nothing is being written, as it must not be
    aside.mkdir()
    _mount("--bind", run, str(aside))
    _mount("-o", "remount,bind,ro", str(aside))
    _mount("--bind", str(aside), run)
    subprocess.run(["umount", str(aside)], check=True)


def store_writable(scene: Scene) -> None:
    subprocess.run(["umount", "-l", str(scene.folder / "run")], check=True)  # a task may still be writing


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for a folder, in memory."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Fault:
    """What happens at the random moment, and before the same call is made again."""

    name: str
    then: Callable[[Scene], None]
    later: Callable[[Scene], None] | None = None
    mounts: bool = False


FAULTS = [
    Fault("a worker is killed", a_worker_killed),
    Fault("both workers are killed", both_workers_killed),
    Fault("the process is killed", process_killed),
    Fault("the process is killed, a file is cut", process_killed, file_cut),
    Fault("the process is killed, a bit flips", process_killed, file_with_another_bit),
    Fault("the process is killed, a file is deleted", process_killed, file_deleted),
    Fault("a file is cut", file_cut),
    Fault("a bit flips", file_with_another_bit),
    Fault("a file is deleted", file_deleted),
    Fault("the disk is full", disk_full, disk_emptied, mounts=True),
    Fault("the store is read-only", store_read_only, store_writable, mounts=True),
]


# -- what is counted -----------------------------------------------------------------------------------------


def read_journal(folder: Path) -> list[tuple[str, str]]:
    """Events and tasks; a line that a killed process left unfinished is none."""
    path = journal_of(folder)
    lines = path.read_text().splitlines() if path.exists() else []
    return [(event, task) for event, _, task in (line.partition(" ") for line in lines) if task.endswith(".npz")]


def computed_again(journal: list[tuple[str, str]]) -> int:
    """Tasks that began although they had finished before."""
    finished: set[str] = set()
    again = 0
    for event, task in journal:
        if event == "begin":
            again += task in finished
        else:
            finished.add(task)
    return again


def note_finished(folder: Path) -> None:
    """Add to the journal what has a record: a worker may be killed before it can tell."""
    for path in (folder / "run").glob("*/*.record.npz"):
        note(journal_of(folder), "end", path)


def outcome(folder: Path) -> dict[str, str]:
    """Digests of all arrays of the sorting and of the files for Phy, by name."""
    from dataclasses import fields

    from ks4stream import load_sorting

    sorting = load_sorting(folder)
    found = {
        spec.name: sha256(getattr(sorting, spec.name).tobytes()).hexdigest()
        for spec in fields(sorting)
        if "dims" in spec.metadata
    }
    files = [path for kind in ("*.npy", "*.tsv", "*.py") for path in folder.glob(kind) if path.name != "ops.npy"]
    return found | {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Outcome:
    """What became of one run."""

    fault: str
    nblocks: int
    identical: bool
    answers: list[str]
    errors: list[str]
    again: int
    damaged: int
    orphans: int
    seconds: float

    def problems(self) -> list[str]:
        """What should not have happened."""
        return [
            *(["the result differs"] if not self.identical else []),
            *(
                f"unclear: {error}"
                for error in self.errors
                if "cannot be written to" not in error or "continue where" not in error or "MB are free" not in error
            ),
            *([f"{self.again} finished tasks were computed again"] if self.again > self.damaged else []),
            *([f"{self.orphans} processes were left"] if self.orphans else []),
        ]


class Bench:
    """Runs faults, one after the other, on one recording."""

    def __init__(self, out: Path) -> None:
        from ks4stream.simulate import linear_probe, simulate

        out.mkdir(parents=True, exist_ok=True)
        self._out, self._data, self._log = out, out / DATA, out / "stderr.txt"
        scene = simulate(linear_probe(N_CHANNELS), SECONDS, seed=6, n_units=N_UNITS, drift="rigid", drift_range_um=60.0)
        scene.write_binary(self._data)
        self._sorter = Sorter(self._data, self._log)
        self._expected: dict[int, dict[str, str]] = {}
        self._lines: dict[int, int] = {}
        for nblocks in (0, 1):
            folder = out / f"undisturbed-{nblocks}"
            began = time.monotonic()
            self._sorter.ask(folder, nblocks)
            assert self._sorter.answer() == {"done": True}
            self._expected[nblocks] = outcome(folder)
            self._lines[nblocks] = len(read_journal(folder))
            print(
                f"undisturbed, nblocks={nblocks}: {self._lines[nblocks] // 2} tasks, {time.monotonic() - began:.1f} s",
                flush=True,
            )

    def run(self, fault: Fault, seed: int, nblocks: int) -> Outcome:
        """Sort, break, and call again until it ends, and once more after damage that the sort may not have met."""
        folder = self._out / f"{fault.name.replace(' ', '-').replace(',', '')}-{seed}"
        if not fault.mounts:
            return self._run(fault, folder, seed, nblocks)
        with small_disk(folder):
            return self._run(fault, folder, seed, nblocks)

    def _run(self, fault: Fault, folder: Path, seed: int, nblocks: int) -> Outcome:
        scene = Scene(self._sorter, folder, random.Random(f"{fault.name} {seed}"))
        began = time.monotonic()
        self._sorter.ask(folder, nblocks)
        scene.moment(self._lines[nblocks])
        fault.then(scene)
        answers = [self._sorter.answer()]
        note_finished(folder)
        if not self._sorter.is_alive:
            self._sorter = scene.sorter = Sorter(self._data, self._log)
        if fault.later:
            fault.later(scene)
        if answers[-1] != {"done": True} or scene.damaged:
            self._sorter.ask(folder, nblocks)
            answers.append(self._sorter.answer())
        return Outcome(
            fault.name,
            nblocks,
            answers[-1] == {"done": True} and outcome(folder) == self._expected[nblocks],
            ["killed" if one is None else next(iter(one)) for one in answers],
            [next(iter(one.values())) for one in answers if one and "done" not in one],
            computed_again(read_journal(folder)),
            scene.damaged,
            scene.orphans,
            time.monotonic() - began,
        )

    def close(self) -> None:
        """End the sorting process."""
        self._sorter.close()


def table(outcomes: list[Outcome]) -> str:
    """One line per fault."""
    lines = [
        "| fault | runs | answers | identical | errors, all clear | finished tasks computed again | files damaged "
        "| processes left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(one.fault for one in outcomes):
        own = [one for one in outcomes if one.fault == name]
        answers = Counter(" → ".join(one.answers) for one in own)
        lines.append(
            "| "
            + " | ".join(
                map(
                    str,
                    (
                        name,
                        len(own),
                        ", ".join(f"{count} × {kind}" for kind, count in answers.items()),
                        sum(one.identical for one in own),
                        sum(len(one.errors) for one in own),
                        sum(one.again for one in own),
                        sum(one.damaged for one in own),
                        sum(one.orphans for one in own),
                    ),
                )
            )
            + " |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("faults"), help="a folder that is made")
    parser.add_argument("--runs", type=int, default=4, help="of each fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="faults with this in their name, a regular expression")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    may_mount = sys.platform == "linux" and os.geteuid() == 0
    faults = [fault for fault in FAULTS if re.search(options.only, fault.name) and (may_mount or not fault.mounts)]
    bench, outcomes = Bench(options.out.absolute()), []
    for number in range(options.runs):
        for fault in faults:
            one = bench.run(fault, options.seed + number, nblocks=number % 2)
            outcomes.append(one)
            verdict = "; ".join(one.problems()) or "as it should be"
            print(
                f"{one.fault}, nblocks={one.nblocks}: {' → '.join(one.answers)}, {one.seconds:.1f} s, {verdict}",
                *one.errors,
                sep="\n    ",
                flush=True,
            )
            (options.out / "faults.md").write_text(table(outcomes) + "\n")
    bench.close()
    print(table(outcomes))
    return int(any(one.problems() for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
