"""The command line: the main job, the options, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result
from clusters import users_cluster

from ks4stream import cli, sorter
from ks4stream.engine import Progress, tell
from ks4stream.errors import Ks4StreamError, Ks4StreamWarning
from ks4stream.settings import Settings

DEMO_SECONDS = 6


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A short demo, run once: its folder and what it said."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, run("demo", "--out", folder, "--seconds", DEMO_SECONDS)


@pytest.fixture
def tetrode_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    np.random.default_rng(0).integers(-100, 100, (60_000, 4), np.int16).tofile(path)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, make_sorting: Callable[..., Any]) -> dict[str, Any]:
    """What the command line asks the sorter for, in place of a sort."""
    arguments: dict[str, Any] = {}

    def sort(recording: Any, settings: Any, **options: Any) -> Any:
        arguments.update(options, recording=recording, settings=settings)
        return make_sorting()

    monkeypatch.setattr(sorter, "sort", sort)
    return arguments


# --- the main job -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_sorts_and_shows_how_well_each_unit_was_found(demo: tuple[Path, Result]) -> None:
    folder, result = demo
    assert result.exit_code == 0, result.output
    assert {"recording.bin", "probe.json", "truth.json", "kilosort4"} <= set(os.listdir(folder))
    truth = json.loads((folder / "truth.json").read_text())
    table = result.stdout[result.stdout.index("accuracy  recall") :].splitlines()[1 : len(truth["units"]) + 1]
    assert sorted(int(line.split()[0]) for line in table) == list(range(len(truth["units"])))
    assert "well" in result.stdout
    assert "the tissue moved by 20.0 µm" in result.stdout
    assert str(folder / "kilosort4") in result.stdout
    for stage in ("simulation", "whitening", "waveforms", "first clustering", "matching", "final clustering"):
        assert f"{stage}: " in result.stderr


@pytest.mark.parametrize("name", ["recording.bin", "probe.json", "truth.json"])
def test_a_demo_does_not_replace_what_is_not_of_a_demo(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    result = run("demo", "--out", tmp_path, "--seconds", "1")
    assert result.exit_code == 1
    assert f"{name} is not from a demo" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.slow
def test_a_file_is_sorted_alike_whatever_the_workers_and_blocks(demo: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = demo
    recording = ("--n-chan", 24, "--fs", 30000, "--probe", folder / "probe.json")
    machine = ("--workers", 1, "--block-batches", 3)
    result = run("sort", folder / "recording.bin", *recording, *machine, "--results-dir", tmp_path / "again")
    assert result.exit_code == 0, result.output
    for name in ("spike_times.npy", "spike_clusters.npy", "amplitudes.npy", "templates.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "kilosort4" / name).read_bytes(), name
    assert f"Results: {tmp_path / 'again'}" in result.stdout
    assert "units (" in result.stdout


@pytest.mark.slow
def test_ctrl_c_stops_cleanly(demo: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = demo
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["sort", folder / "recording.bin", "--n-chan", 24, "--probe", folder / "probe.json"]
    command = [sys.executable, "-m", "ks4stream.cli", *map(str, arguments), "--results-dir", str(tmp_path / "results")]
    said = ""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(scratch)}
    ) as process:
        for line in process.stderr or ():
            said += line
            if line.startswith("whitening"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    assert "Stopping" in said
    assert "Stopped: the sort was not finished." in said
    assert "Traceback" not in said
    assert not list(scratch.glob("ks4stream-*"))
    assert not (tmp_path / "results" / "spike_times.npy").exists()


class Interrupts:
    """Asks the program to stop when it is let go of, where Python drops every exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        self.interrupted = True


def test_ctrl_c_in_a_destructor_is_not_lost(tetrode_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def sort(recording: Any, settings: Any, *, progress: Progress, **_: Any) -> Any:
        del recording
        Interrupts()
        told.append("went on")
        progress("whitening", 0, 1)
        told.append("went on for too long")

    monkeypatch.setattr(sorter, "sort", sort)
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--results-dir", tetrode_file.parent / "r")
    assert result.exit_code == 130
    assert "Stopping" in result.stderr and "Stopped: the sort was not finished." in result.stderr
    assert told == ["went on"]


# --- options ------------------------------------------------------------------------------------------------


def test_help_comes_quickly_as_a_program_of_its_own() -> None:
    code = "import sys; sys.argv = ['ks4stream', '--help']\nfrom ks4stream.cli import main\nimport atexit\n"
    code += "atexit.register(lambda: print('torch' in sys.modules))\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout and "sort" in done.stdout and "probes" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_sort_starts_without_what_it_does_not_need_yet() -> None:
    slow = {"scipy.signal", "scipy.stats", "xarray", "pandas", "matplotlib", "distributed", "probeinterface"}
    code = "import sys, ks4stream.sorter, ks4stream.report.progress\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ks4stream.pipeline" in loaded and not loaded & slow


def test_the_package_can_be_run_as_a_program() -> None:
    command = [sys.executable, "-m", "ks4stream", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: python -m ks4stream plan" in done.stdout


def test_every_setting_has_an_option_with_unit_bounds_and_default() -> None:
    text = " ".join(run("sort", "--help").output.split())
    for spec in fields(Settings):
        name = "--n-chan" if spec.name == "n_chan_bin" else "--" + spec.name.replace("_", "-")
        assert f"{name} " in text or f"{name}," in text
    assert "[noise s.d.; > 0; default: auto]" in text
    assert "[≥ 1; ≤ 10000; default: 100]" in text
    assert "[default: 0.5,0.5,0.5]" in text
    assert "--Th-universal, --th-universal NUMBER|AUTO " in text


def test_settings_are_given_by_option_or_by_name(tetrode_file: Path, asked: dict[str, Any]) -> None:
    result = run(
        "sort",
        tetrode_file,
        "--n-chan",
        4,
        "--probe",
        "tetrode",
        "--th-universal",
        7,
        "--Th-learned",
        "6.5",
        "--drift-smoothing",
        "1,2,3",
        "--templates-from-data",
        "false",
        "--max-cluster-subset",
        "none",
        "--set",
        "nblocks=0",
        "--set",
        "tmax=1.5",
    )
    assert result.exit_code == 0, result.output
    assert asked["settings"] == Settings(
        Th_universal=7,
        Th_learned=6.5,
        drift_smoothing=(1, 2, 3),
        templates_from_data=False,
        max_cluster_subset=None,
        nblocks=0,
        tmax=1.5,
    )


def test_a_rate_that_is_given_corrects_metadata(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Not by the little by which the measured rate differs from the one that was meant."""
    array = zarr.open_array(str(tmp_path / "a.zarr"), mode="w", shape=(60_000, 4), dtype="i2", chunks=(60_000, 4))
    array[:] = np.random.default_rng(0).integers(-100, 100, (60_000, 4))
    for told, used in [(30_000.0, 25_000.0), (24_999.95, 24_999.95)]:
        array.attrs["sampling_frequency"] = told
        result = run("sort", tmp_path / "a.zarr", "--fs", 25000, "--probe", "tetrode")
        assert result.exit_code == 0, result.output
        assert asked["recording"].sampling_rate_hz == used
        is_told = "read at 25000 Hz, as --fs says, not at the 30000 Hz" in " ".join(result.stderr.split())
        assert is_told == (told == 30_000)


def test_recording_and_machine_are_passed_on(tetrode_file: Path, asked: dict[str, Any]) -> None:
    result = run(
        "sort",
        tetrode_file,
        tetrode_file,
        "--n-chan",
        4,
        "--fs",
        20000,
        "--probe",
        "tetrode",
        "--bad-channels",
        "1,3",
        "--no-car",
        "--invert-sign",
        "--device",
        "cpu",
        "--block-batches",
        5,
        "--workers",
        2,
        "--fresh",
        "--cache-gb",
        1.5,
    )
    assert result.exit_code == 0, result.output
    assert asked["recording"].sampling_rate_hz == 20000
    assert asked["recording"].n_samples == 120_000
    assert asked["recording"].probe.chan_map.tolist() == [0, 2]
    assert (asked["settings"].do_CAR, asked["settings"].invert_sign) == (False, True)
    assert (asked["device"], asked["block_batches"], asked["cache_bytes"]) == ("cpu", 5, 1_500_000_000)
    assert asked["workers"] == 2
    assert asked["resume"] is False
    assert asked["results_dir"] == tetrode_file.parent / "kilosort4"


def test_channels_to_leave_out_may_be_given_one_by_one(tetrode_file: Path, asked: dict[str, Any]) -> None:
    """Of an option that is repeated, click takes the last value: the others would be sorted."""
    channels = ("--bad-channels", 0, "--bad-channels", "1,3", "--shank", 0, "--shank", 0)
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", *channels)
    assert result.exit_code == 0, result.output
    assert asked["recording"].probe.chan_map.tolist() == [2]


def test_a_running_scheduler_is_used(tetrode_file: Path, asked: dict[str, Any]) -> None:
    with users_cluster(3) as client:
        address = client.scheduler_info()["address"]
        machine = ("--scheduler", address)
        result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", *machine)
        assert result.exit_code == 0, result.output
        assert asked["client"] == address
        result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", *machine, "--workers", 2)
        assert result.exit_code == 2
        assert "exclude each other" in result.output


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named(tetrode_file: Path) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}):
        result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--scheduler", "tcp://127.0.0.1:1")
    assert result.exit_code == 1
    assert "No Dask scheduler answers at 'tcp://127.0.0.1:1'" in result.output


def test_shanks_can_be_chosen(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "data.bin"
    np.random.default_rng(0).integers(-9, 9, (3000, 384), np.int16).tofile(path)
    result = run("sort", path, "--n-chan", 384, "--probe", "neuropixels_2_four_shank", "--shank", "1,3")
    assert result.exit_code == 0, result.output
    assert set(asked["recording"].probe.shank.tolist()) == {1, 3}


def test_the_readme_shows_options_that_exist() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    known = {flag for command in cli.main.commands.values() for parameter in command.params for flag in parameter.opts}
    shown = [line for line in readme.splitlines() if line.startswith("ks4stream ")]
    assert len(shown) >= 4
    assert {word for line in shown for word in line.split() if word.startswith("--")} - {"--help"} <= known
    assert {line.split()[1] for line in shown} <= set(cli.main.commands)


def test_probes_are_listed() -> None:
    lines = run("probes").output.splitlines()
    assert [line.split() for line in lines if "tetrode" in line] == [["tetrode", "4", "channels,", "1", "shank"]]


# --- what is said when something is wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "Th_univrsal=8"), "Unknown setting 'Th_univrsal'. Did you mean 'Th_universal'?"),
        (("--nt", 60), "nt=60 is even"),
        (("--Th-learned", -1), "it must be above 0 noise s.d."),
        (("--n-chan", 7), "7"),
        (("--bad-channels", 99), "no contact on channel 99"),
        (("--probe", "tetrod"), "Did you mean 'tetrode'?"),
        (("--tmin", 2), "tmin=2 s is not before the end of the recording"),
    ],
)
def test_an_error_is_one_paragraph_with_status_1(tetrode_file: Path, arguments: tuple[Any, ...], said: str) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("Error:") == 1
    assert said in result.stderr
    assert result.stderr.startswith("Error: ") or "\nError: " in result.stderr
    assert "Traceback" not in result.output


def test_a_recording_without_a_probe_is_told_of_the_shipped_ones(tetrode_file: Path) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4)
    assert result.exit_code == 1
    assert "--probe" in result.stderr and "neuropixels_1" in result.stderr


def test_an_error_of_a_task_says_where_it_arose(tetrode_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sort(*_: Any, **__: Any) -> None:
        error = Ks4StreamError("channel 3 is not a number.")
        error.add_note("Raised in stage 'detection', task 2 of 9.")
        raise error

    monkeypatch.setattr(sorter, "sort", sort)
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode")
    assert result.stderr == "Error: channel 3 is not a number. Raised in stage 'detection', task 2 of 9.\n"


def test_results_that_cannot_be_written_are_an_error_before_work_starts(tetrode_file: Path) -> None:
    arguments = ("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--results-dir", tetrode_file)
    result = run(*arguments)
    assert result.exit_code == 1
    assert str(tetrode_file) in result.stderr
    assert run("demo", "--out", tetrode_file).exit_code == 1


def test_debug_shows_where_an_error_came_from(tetrode_file: Path) -> None:
    for arguments in (("--debug", "sort", tetrode_file), ("sort", tetrode_file, "--debug")):
        assert isinstance(run(*arguments).exception, Ks4StreamError)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nt", "many"), "'many' is not INTEGER."),
        (("--nt0min", "x"), "'x' is not INTEGER or none."),
        (("--set", "nblocks"), "'nblocks' must be NAME=VALUE"),
        (("--set", "Th_learned=7", "--Th-learned", 8), "Th_learned is given twice"),
        (("--set", "nt=61", "--set", "nt=81"), "nt is given twice"),
        (("--bad-channels", "1-3"), "'1-3' must be whole numbers"),
        (("--Th-unversal", 8), "--Th-universal"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(tetrode_file: Path, arguments: tuple[Any, ...], said: str) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_our_warnings_are_notes_and_those_of_libraries_are_not_shown(
    tetrode_file: Path, monkeypatch: pytest.MonkeyPatch, make_sorting: Callable[..., Any]
) -> None:
    def sort(*_: Any, **__: Any) -> Any:
        warnings.warn("only few spikes", Ks4StreamWarning, stacklevel=1)
        warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        return make_sorting()

    monkeypatch.setattr(sorter, "sort", sort)
    arguments = ("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Note: only few spikes\n" in result.stderr
    assert "deprecated" not in result.stderr
    assert "deprecated" in run(*arguments, "--debug").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_its_status_and_leaves_the_handlers_alone(
    tetrode_file: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def sort(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)
        time.sleep(1)

    monkeypatch.setattr(sorter, "sort", sort)
    before = signal.getsignal(number)
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode")
    assert result.exit_code == 128 + number
    assert "Stopped" in result.stderr
    assert signal.getsignal(number) is before


# --- quiet, and for programs ---------------------------------------------------------------------------------


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch, make_sorting: Callable[..., Any]) -> None:
    """A sort that reports progress and warns."""

    def sort(*_: Any, progress: Any, **__: Any) -> Any:
        tell(progress, stage="matching", recording_s=2.0)
        for done in range(3):
            tell(progress, stage="matching", spikes=50 * done)
            progress("matching", done, 2)
        warnings.warn("only few spikes", Ks4StreamWarning, stacklevel=1)
        warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        return make_sorting()

    monkeypatch.setattr(sorter, "sort", sort)


def test_quiet_prints_nothing_but_warnings(tetrode_file: Path, sorts: None) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "Note: only few spikes\n"


def test_quiet_prints_errors(tetrode_file: Path) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, "--quiet")
    assert result.exit_code == 1 and result.stdout == ""
    assert "Give --probe" in " ".join(result.stderr.split())


def test_a_program_reads_one_object_per_line_from_start_to_end(tetrode_file: Path, sorts: None, tmp_path: Path) -> None:
    arguments = ("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--results-dir", tmp_path / "results")
    result = run(*arguments, "--json-progress")
    assert result.exit_code == 0
    assert result.stderr == "Note: only few spikes\n"
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "stage", "stage", "warning", "end"]
    start, _, stage, warning, end = events
    assert start["seconds"] == 2.0 and start["channels"] == 4 and start["recording"] == "data.bin"
    assert start["results"] == end["results"] == str(tmp_path / "results")
    assert (stage["stage"], stage["done"], stage["total"], stage["spikes"]) == ("matching", 2, 2, 100)
    assert stage["left_s"] == 0.0 and stage["elapsed_s"] >= 0.0 and stage["memory_bytes"] > 0
    assert warning["category"] == "Ks4StreamWarning" and warning["message"] == "only few spikes"
    assert end["status"] == "finished" and {"units", "good_units", "spikes", "elapsed_s"} <= end.keys()
    documented = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert not [name for event in events for name in event if f"`{name}`" not in documented]


def test_a_program_reads_why_a_sort_failed(tetrode_file: Path) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, "--json-progress")
    assert result.exit_code == 1 and "Error: " in result.stderr
    (end,) = map(json.loads, result.stdout.splitlines())
    assert end["event"] == "end" and end["status"] == "failed"
    assert end["error"] == "ProbeError" and "Give --probe" in end["message"]


@pytest.mark.parametrize("option", ["--quiet", "--json-progress"])
def test_a_signal_stops_whatever_is_shown(tetrode_file: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    def sort(*_: Any, progress: Progress, **__: Any) -> None:
        with suppress(KeyboardInterrupt):  # as where Python drops every exception
            signal.raise_signal(signal.SIGTERM)
            time.sleep(1)
        progress("whitening", 0, 1)
        pytest.fail("it went on")

    monkeypatch.setattr(sorter, "sort", sort)
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", option)
    assert result.exit_code == 128 + signal.SIGTERM
    if option == "--json-progress":
        end = json.loads(result.stdout.splitlines()[-1])
        assert (end["event"], end["status"], end["error"]) == ("end", "stopped", "SIGTERM")
        assert end["message"] == "The sort was stopped by SIGTERM before it was finished."


def test_a_command_that_is_wrong_has_no_end(tetrode_file: Path) -> None:
    result = run("sort", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--json-progress", "--set", "foo")
    assert result.exit_code == 2 and "must be NAME=VALUE" in " ".join(result.stderr.split())
    assert result.stdout == ""


WITHOUT_A_READER = """
import sys
from types import SimpleNamespace
import numpy as np
from ks4stream import sorter
from ks4stream.cli import main

def sort(*_, progress, **__):
    input()
    for done in range(3):
        progress("matching", done, 2)
    return SimpleNamespace(n_units=1, good=np.ones(1), kept=np.ones(1))

sorter.sort = sort
main()
"""


def test_a_sort_goes_on_if_nobody_reads_its_events(tetrode_file: Path) -> None:
    options = ["--n-chan", "4", "--probe", "tetrode", "--json-progress"]
    command = [sys.executable, "-c", WITHOUT_A_READER, "sort", str(tetrode_file), *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["event"] == "start"
        process.stdout.close()
        print(file=process.stdin, flush=True)
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said.count("\n") == 1 and said.startswith("Note: Progress cannot be written any more"), said


def test_quiet_and_for_programs_exclude_each_other(tetrode_file: Path) -> None:
    assert "exclude each other" in run("sort", tetrode_file, "--quiet", "--json-progress").stderr


def test_a_plan_is_a_table_and_reads_nothing(tetrode_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ks4stream.recording.Recording.read", lambda *_: pytest.fail("the recording was read"))
    done = run("plan", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--batch-size", 30_000)
    assert done.exit_code == 0, done.output
    for text in ("2, 1 per task", "4 channels to sort", "memory: detection", "disk: run/"):
        assert text in done.output


def test_a_plan_tells_no_time_from_batches_of_noise(tetrode_file: Path) -> None:
    given = ("plan", tetrode_file, "--n-chan", 4, "--probe", "tetrode")
    assert "not known" in run(*given).stdout and "--calibrate" in run(*given).stdout
    done = run(*given, "--calibrate")
    assert done.exit_code == 1 and "No spikes were found in 1 batches of" in done.stderr.replace("\n", " ")


def test_a_plan_as_json_ends_with_1_where_something_does_not_fit(tetrode_file: Path) -> None:
    given = ("plan", tetrode_file, "--n-chan", 4, "--probe", "tetrode", "--json", "--workers", 3)
    good, bad = run(*given), run(*given, "--worker-memory", "0.001")
    assert good.exit_code == 0 and bad.exit_code == 1
    assert json.loads(good.stdout)["n_workers"] == 3 and json.loads(good.stdout)["fits"]
    (shortfall,) = json.loads(bad.stdout)["shortfalls"]
    assert shortfall["certain"] and "a worker has 1.0 MB" in shortfall["text"]


def test_no_option_is_there_twice() -> None:
    for name, command in cli.main.commands.items():
        options = [option for parameter in command.params for option in parameter.opts]
        assert len(options) == len(set(options)), name
