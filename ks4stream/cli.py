"""The command line: ``ks4stream sort``, ``plan``, ``carry``, ``export``, ``report``, ``demo`` and ``probes``.

The settings' options, their help and their conversion are made from the fields of
:class:`~ks4stream.settings.Settings`. Libraries that take long to load are imported by the commands.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import Field, fields, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ks4stream.errors import Ks4StreamError, Ks4StreamWarning, ProbeError
from ks4stream.messages import warn
from ks4stream.settings import AUTO, Settings

if TYPE_CHECKING:
    from ks4stream.engine import Progress
    from ks4stream.io.places import Place
    from ks4stream.planning import Plan
    from ks4stream.recording import Recording
    from ks4stream.report.progress import JsonLines
    from ks4stream.results import Sorting

Command = TypeVar("Command", bound=Callable[..., Any])

_DEBUG = "ks4stream.debug"  # key in the context's meta, which all subcommands share
_STOPPED = "ks4stream.stopped"  # likewise: the _Stopped that a signal asked for
_EVENTS = "ks4stream.events"  # likewise: the JsonLines that a program reads
_TALKATIVE = ("distributed", "distributed.batched", "tornado.application")  # log tracebacks when interrupted
_FAILED = 1
_DEFAULT_FS_HZ = 30_000.0  # as for Kilosort4


# --- shared by all commands ---------------------------------------------------------------------------------


class _Program(click.Group):
    """The commands. Errors become one paragraph, warnings short notes, and Ctrl-C a clean end."""

    def invoke(self, ctx: click.Context) -> Any:
        console = Console(stderr=True)
        try:
            with _clean_stop(console, ctx), _short_notes(console, ctx):
                return super().invoke(ctx)
        except Ks4StreamError as error:
            if ctx.meta.get(_DEBUG):
                raise
            _say(console, f"Error: {_with_notes(error)}", "bold red")
            ctx.exit(_FAILED)
        except _Stopped as stopped:
            _say(console, "Stopped: the sort was not finished.", "bold red")
            ctx.exit(stopped.status)


class _Stopped(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int) -> None:
        self.signal, self.status = signal.Signals(number).name, 128 + number
        super().__init__(f"The sort was stopped by {self.signal} before it was finished.")


@contextmanager
def _clean_stop(console: Console, ctx: click.Context) -> Iterator[None]:
    """Stop cleanly at the first Ctrl-C (or SIGTERM); a second one ends the program at once.

    Python drops exceptions raised in a destructor or during garbage collection: the next progress report raises them
    again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _say(console, "Stopping; running tasks are finished first …", "yellow")
        ctx.meta[_STOPPED] = _Stopped(number)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        raise ctx.meta[_STOPPED]

    def drop(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, _Stopped):
            report(dropped)

    report, sys.unraisablehook = sys.unraisablehook, drop
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        sys.unraisablehook = report
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stoppable:
    """Passes progress on to a display; raises at the next report once a signal asked to stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._meta = progress, click.get_current_context().meta

    def __call__(self, stage: str, done: int, total: int) -> None:
        if _STOPPED in self._meta:
            raise self._meta[_STOPPED]
        self._progress(stage, done, total)

    def note(self, **facts: Any) -> None:
        """Pass on what else is known."""
        from ks4stream.engine import tell

        tell(self._progress, **facts)


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """Show progress on stderr."""
    from ks4stream.report.progress import shown_progress

    with shown_progress(Console(stderr=True)) as progress:
        yield _Stoppable(progress)


@contextmanager
def _events(ctx: click.Context) -> Iterator[JsonLines]:
    """Write events to stdout: warnings, and at the end what went wrong, if anything did in a command that is right."""
    from ks4stream.report.progress import JsonLines

    events = ctx.meta[_EVENTS] = JsonLines(click.echo)
    try:
        yield events
    except click.ClickException:
        raise
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        what = error.signal if isinstance(error, _Stopped) else type(error).__name__
        events.event("end", status=status, error=what, message=_with_notes(error))
        raise
    finally:
        if events.is_lost:  # what could not be written is still in a buffer, which Python would write when it ends
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def _short_notes(console: Console, ctx: click.Context) -> Iterator[None]:
    """Show our warnings as notes, and those of libraries only with ``--debug``."""
    with warnings.catch_warnings():

        def note(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
            if issubclass(category, Ks4StreamWarning):
                _say(console, f"Note: {message}", "yellow")
                if _EVENTS in ctx.meta:
                    ctx.meta[_EVENTS].event("warning", category=category.__name__, message=str(message))
            elif ctx.meta.get(_DEBUG):
                _say(console, warnings.formatwarning(message, category, file, line), "yellow")

        warnings.simplefilter("default")
        warnings.simplefilter("always", Ks4StreamWarning)
        warnings.showwarning = note  # type: ignore[assignment]
        yield


def _with_notes(error: BaseException) -> str:
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text(text, style), soft_wrap=True)  # the terminal wraps lines, so that paths stay whole


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_note_debug,
    help="Show tracebacks of errors, and warnings from libraries.",
)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ks4stream")
@_debug_option
def main() -> None:
    """Sort spikes with the method of Kilosort4, as a dataflow on Dask.

    ks4stream COMMAND --help lists the options of a command.
    """


# --- options made from the settings --------------------------------------------------------------------------


class _Option(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class _SectionedCommand(click.Command):
    """A command whose help has its options in sections, those of the settings last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; click calls this."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for name in sorted(sections, key=lambda name: name.startswith("Settings")):
            with formatter.section(name):
                formatter.write_dl(sections[name])


_KINDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    int: ("INTEGER", int),
    float: ("NUMBER", float),
    bool: ("TRUE|FALSE", lambda text: {"true": True, "false": False}[text.lower()]),
    tuple: ("A,B,C", lambda text: tuple(float(number) for number in text.split(","))),
}

_SETTINGS = {spec.name: spec for spec in fields(Settings)}
_FLAGS = {  # for settings whose option is not just their name
    "do_CAR": ["--do-CAR/--no-CAR", "--do-car/--no-car"],
    "invert_sign": ["--invert-sign/--no-invert-sign"],
}


def _setting_options(command: Command) -> Command:
    """Add an option for each setting, in their order."""
    for spec in reversed(_SETTINGS.values()):
        name = "--" + spec.name.replace("_", "-")
        command = click.option(
            *_FLAGS.get(spec.name, dict.fromkeys([name, name.lower()])),
            spec.name,
            cls=_Option,
            section=f"Settings: {spec.metadata['group']}",
            metavar=_KINDS[spec.metadata["kind"]][0] + "|AUTO" * (spec.metadata["kilosort4"] is not None),
            callback=_read_option,
            help=_setting_help(spec),
        )(command)
    return command


def _setting_help(spec: Field[Any]) -> str:
    """Describe a setting: its meaning, unit, bounds and default."""
    about = spec.metadata
    facts = [about["unit"]] if about["unit"] else []
    for name, sign in (("gt", ">"), ("ge", "≥"), ("le", "≤")):
        if about[name] is not None:
            facts.append(f"{sign} {about[name]:g}")
    default = about["if_none"] or _as_typed(spec.default)
    return f"{about['doc']} [{'; '.join([*facts, f'default: {default}'])}]"


def _as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _read_option(_: click.Context, parameter: click.Parameter, text: str | bool | None) -> Any:
    return _read_setting(str(parameter.name), text) if isinstance(text, str) else text


def _read_setting(name: str, text: str) -> Any:
    """Convert text to the type of a setting; Settings itself refuses unknown names and values out of bounds."""
    if name not in _SETTINGS:
        return text
    about = _SETTINGS[name].metadata
    if about["optional"] and text.lower() == "none":
        return None
    if about["kilosort4"] is not None and text.lower() == AUTO:
        return AUTO
    what, read = _KINDS[about["kind"]]
    try:
        return read(text)
    except (KeyError, ValueError):
        others = " or none" * about["optional"] + f" or {AUTO}" * (about["kilosort4"] is not None)
        raise click.BadParameter(f"{text!r} is not {what}{others}.") from None


def _settings_given(ctx: click.Context, options: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The settings that were given by option or by ``--set``; others keep their defaults."""
    given = {
        name: value
        for name, value in options.items()
        if name in _SETTINGS and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    for text in assignments:
        name, value = _read_assignment(text)
        if name in given:
            raise click.BadParameter(f"{name} is given twice; give it once.", param_hint="--set")
        given[name] = value
    return given


def _read_assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} must be NAME=VALUE, for instance Th_learned=7.", param_hint="--set")
    return name, _read_setting(name, value)


def _read_integers(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers of an option that may be repeated."""
    text = ",".join(text for text in texts if text)
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} must be whole numbers separated by commas, for instance 3,191.") from None


def _read_time(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time like 2026-03-01T14:30:00+01:00.") from None


def _read_metadata(file: str) -> dict[str, Any]:
    example = '{"experimenter": ["Doe, Jane"]}'
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{file} cannot be read as JSON: {error}.", param_hint="--metadata") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"{file} must hold one JSON object, like {example}.", param_hint="--metadata")
    return found


# --- ks4stream sort ------------------------------------------------------------------------------------------


@main.command("sort", cls=_SectionedCommand)
@click.argument("files", nargs=-1, required=True, metavar="FILE [FILE ...]")
@_setting_options
@click.option(
    "--n-chan",
    "--n-chan-bin",
    "n_chan",
    type=int,
    metavar="INTEGER",
    cls=_Option,
    section="Recording",
    help="Number of channels in the file, sorted or not. Not needed if the recording's metadata give it.",
)
@click.option(
    "--fs",
    type=float,
    metavar="NUMBER",
    cls=_Option,
    section="Recording",
    help="Sampling rate. [Hz; default: that of the recording's metadata, otherwise 30000]",
)
@click.option(
    "--probe",
    cls=_Option,
    section="Recording",
    help="Probe file (.json, .mat, .prb, .meta) or the name of an included probe (see: ks4stream probes). Not needed "
    "if the recording's metadata describe the probe.",
)
@click.option("--dtype", cls=_Option, section="Recording", help="Type of the samples in the file. [default: int16]")
@click.option(
    "--bad-channels",
    callback=_read_integers,
    multiple=True,
    metavar="INTEGERS",
    cls=_Option,
    section="Recording",
    help="Channels (columns of the file, from 0) to leave out, for instance 3,191.",
)
@click.option(
    "--shank",
    "shanks",
    callback=_read_integers,
    multiple=True,
    metavar="INTEGERS",
    cls=_Option,
    section="Recording",
    help="Sort only these shanks, for instance 0,2.",
)
@click.option(
    "--blank",
    metavar="FILE",
    cls=_Option,
    section="Recording",
    help="Text file of artifacts whose times are known: on each line the start of a pulse of 1 ms, or the start and "
    "the stop of a span. Integers are samples, numbers with a decimal point are seconds.",
)
@click.option(
    "--results-dir",
    metavar="FOLDER",
    cls=_Option,
    section="Results and machine",
    help="Folder or s3:// address for the results. [default: kilosort4/ next to the first file, or in the "
    "current folder if the file is at a URL]",
)
@click.option(
    "--plots",
    "save_plots",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="Also write Kilosort4's plots; report.html shows the same and more.",
)
@click.option(
    "--save-extra-vars",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="Also write tF, Wall, full_st, full_clu and full_amp.",
)
@click.option(
    "--no-features",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="Do not write the features of the spikes, which are most of the results of a long recording.",
)
@click.option(
    "--fresh",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="Start over instead of resuming an earlier run into the same folder.",
)
@click.option(
    "--keep-run/--no-keep-run",
    default=True,
    cls=_Option,
    section="Results and machine",
    help="Keep run/, so that after a change of settings only the affected stages are computed again. [default: keep]",
)
@click.option(
    "--cache",
    "cache_dir",
    metavar="FOLDER|off",
    cls=_Option,
    section="Results and machine",
    help="Folder in which a copy of the recording is kept for later sorts, or off. [default: for the duration of the "
    "sort, in the temporary folder, if the recording is at a URL; otherwise off]",
)
@click.option(
    "--cache-gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    cls=_Option,
    section="Results and machine",
    help="Disk space that the cache may use on each machine. [default: half of what is free]",
)
@click.option(
    "--device",
    cls=_Option,
    section="Results and machine",
    help="Device that computes: cpu, cuda or cuda:1. [default: cuda if there is a GPU, otherwise cpu]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="INTEGER",
    cls=_Option,
    section="Results and machine",
    help="Number of workers on this machine. [default: one per GPU, up to four for long recordings; without a GPU one "
    "per core, as memory allows]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    cls=_Option,
    section="Results and machine",
    help="Address of a running Dask scheduler whose workers compute, such as tcp://host:8786. [default: this machine "
    "computes]",
)
@click.option(
    "--block-batches",
    type=click.IntRange(min=1),
    metavar="INTEGER",
    cls=_Option,
    section="Results and machine",
    help="Batches per task; never changes a result. [default: a minute of recording, or less]",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    cls=_Option,
    section="Results and machine",
    help="Any setting by its name in Kilosort4, for instance Th_learned=7; may be repeated.",
)
@click.option(
    "--quiet", is_flag=True, cls=_Option, section="Results and machine", help="Print nothing but warnings and errors."
)
@click.option(
    "--json-progress",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="For programs: print progress, warnings and the result to stdout as one JSON object per line, and nothing "
    "else.",
)
@_debug_option
@click.pass_context
def sort_command(
    ctx: click.Context,
    /,
    files: tuple[str, ...],
    probe: str | None,
    dtype: str | None,
    bad_channels: tuple[int, ...],
    shanks: tuple[int, ...],
    results_dir: str | None,
    assignments: tuple[str, ...],
    quiet: bool,
    json_progress: bool,
    **options: Any,
) -> None:
    """Sort a recording into units.

    FILE is a flat binary file, a SpikeGLX, .cbin, .npy, NWB or HDF5 file, or a Zarr folder. Several files are joined in
    time. With the extra "cloud", most of them may also be at s3://bucket/key, gs://, az:// or https:// addresses.

    A SpikeGLX .meta next to a .bin supplies channels, rate and contacts. Other flat files need --n-chan and --probe,
    and --fs if the rate is not 30 kHz.
    """
    if options["scheduler"] and options["workers"]:
        raise click.UsageError(
            "--scheduler and --workers exclude each other: a scheduler has its own workers. Leave one of them out."
        )
    if quiet and json_progress:
        raise click.UsageError("--quiet and --json-progress exclude each other. Leave one of them out.")
    from ks4stream.io.places import place
    from ks4stream.io.recordings import default_results_dir

    with _events(ctx) if json_progress else nullcontext() as events:
        recording, settings = _asked_for(ctx, files, options, assignments, probe, dtype, bad_channels, shanks)
        folder = place(results_dir or default_results_dir(files[0]))
        if events:
            _send_start(events, recording, folder)
        elif not quiet:
            click.echo(f"Sorting {recording!r}")
        _sort(
            recording,
            settings,
            folder,
            quiet=quiet,
            events=events,
            resume=not options["fresh"],
            save_features=not options["no_features"],
            cache_bytes=options["cache_gb"] and round(options["cache_gb"] * 1e9),
            **{
                name: options[name]
                for name in (
                    "workers",
                    "scheduler",
                    "device",
                    "block_batches",
                    "save_plots",
                    "save_extra_vars",
                    "keep_run",
                    "cache_dir",
                    "blank",
                )
            },
        )


def _asked_for(
    ctx: click.Context,
    files: tuple[str, ...],
    options: dict[str, Any],
    assignments: Sequence[str],
    probe: str | None,
    dtype: str | None,
    bad_channels: tuple[int, ...],
    shanks: tuple[int, ...],
) -> tuple[Recording, Settings]:
    """The recording to sort and the settings."""
    settings = Settings.from_dict(_settings_given(ctx, options, assignments))  # before a file is opened
    recording = _open(files, n_chan=options["n_chan"], fs=options["fs"], probe=probe, dtype=dtype)
    return _with_channels(recording, bad_channels, shanks), settings


def _open(
    files: Sequence[str], *, n_chan: int | None, fs: float | None, probe: str | None, dtype: str | None
) -> Recording:
    from ks4stream.io.probes import shipped_probes
    from ks4stream.io.recordings import may_tell_rate, open_recording
    from ks4stream.recording import is_same_rate

    recording = open_recording(
        files[0] if len(files) == 1 else list(files),
        n_chan=n_chan,
        default_fs=_DEFAULT_FS_HZ if fs is None and not all(map(may_tell_rate, files)) else fs,
        dtype=dtype,
        probe=probe,
    )
    rate = recording.sampling_rate_hz
    if fs is not None and not is_same_rate(fs, rate):
        warn(f"{recording.name} is read at {fs:g} Hz, as --fs says, not at the {rate:g} Hz of its metadata.")
        recording = replace(recording, sampling_rate_hz=fs)
    if recording.probe is None:
        raise ProbeError(
            f"The contact positions of {recording.name} are not known. Give --probe: a file (.json, .mat, .prb, "
            f".meta), or one of the shipped probes {', '.join(shipped_probes())}."
        )
    return recording


def _with_channels(recording: Recording, bad_channels: Sequence[int], shanks: Sequence[int]) -> Recording:
    """The recording with the channels that are to be sorted."""
    probe = recording.probe
    assert probe is not None
    if shanks:
        probe = probe.select_shanks(shanks)
    return recording.with_probe(probe.drop_channels(bad_channels) if bad_channels else probe)


def _sort(
    recording: Recording,
    settings: Settings,
    folder: Place,
    *,
    scheduler: str | None = None,
    quiet: bool = False,
    events: JsonLines | None = None,
    **options: Any,
) -> Sorting:
    """Sort with progress on stderr, then print what was found and where it is; or, for programs, send events."""
    from ks4stream.engine import no_progress
    from ks4stream.report import run_log
    from ks4stream.sorter import sort

    began = time.monotonic()
    is_here = isinstance(folder, Path)
    log = run_log(folder) if isinstance(folder, Path) else nullcontext()
    unseen = events or (no_progress if quiet else None)
    with log, nullcontext(_Stoppable(unseen)) if unseen else _shown_progress() as progress:
        sorting = sort(recording, settings, results_dir=folder, client=scheduler, progress=progress, **options)
    took_s = time.monotonic() - began
    if events:
        _send_end(events, sorting, folder, took_s)
    elif not quiet:
        click.echo(
            f"{_n_units(sorting)} ({int(sorting.good.sum())} good) with {int(sorting.kept.sum())} spikes, "
            f"in {took_s:.0f} s\n"
            f"Results: {folder}"
            + f"\nLook at: {folder / 'report.html'}, then: phy template-gui {folder / 'params.py'}"
            * is_here
        )
    return sorting


def _n_units(sorting: Sorting) -> str:
    return f"{sorting.n_units} unit{'s' * (sorting.n_units != 1)}"


def _send_start(events: JsonLines, recording: Recording, folder: Place) -> None:
    events.event(
        "start",
        recording=recording.name,
        seconds=recording.n_samples / recording.sampling_rate_hz,
        channels=recording.probe.n_channels if recording.probe else recording.n_channels,
        results=str(folder),
    )


def _send_end(events: JsonLines, sorting: Sorting, folder: Place, took_s: float) -> None:
    events.event(
        "end",
        status="finished",
        results=str(folder),
        units=sorting.n_units,
        good_units=int(sorting.good.sum()),
        spikes=int(sorting.kept.sum()),
        elapsed_s=round(took_s, 2),
    )


# --- ks4stream plan ------------------------------------------------------------------------------------------


_ONLY_SORTING = {
    "save_plots",
    "save_extra_vars",
    "no_features",
    "fresh",
    "keep_run",
    "cache_dir",
    "cache_gb",
    "scheduler",
    "quiet",
    "json_progress",
    "debug",
}


@main.command(
    "plan",
    cls=_SectionedCommand,
    params=[parameter for parameter in sort_command.params if parameter.name not in _ONLY_SORTING],
)
@click.option(
    "--worker-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    cls=_Option,
    section="Results and machine",
    help="Memory of each worker. [default: its share of this machine's memory]",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    cls=_Option,
    section="Results and machine",
    help="Memory of each GPU. [default: what is free on this machine's GPUs]",
)
@click.option(
    "--spikes-per-channel",
    type=click.FloatRange(min=0, min_open=True),
    metavar="HZ",
    cls=_Option,
    section="Results and machine",
    help="Expected spikes per second and channel. [default: 10]",
)
@click.option(
    "--calibrate",
    is_flag=True,
    cls=_Option,
    section="Results and machine",
    help="Sort a few batches now, in seconds, to estimate how long a sort takes on this machine. [default: estimate it "
    "from the last sorts on this machine]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, with all sizes in bytes.")
@_debug_option
@click.pass_context
def plan_command(
    ctx: click.Context,
    /,
    files: tuple[str, ...],
    probe: str | None,
    dtype: str | None,
    bad_channels: tuple[int, ...],
    shanks: tuple[int, ...],
    results_dir: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate the memory, disk space and time that a sort needs.

    Takes the files and options of ks4stream sort. The recording is read only with --calibrate. If something does not
    fit, says so and exits with status 1.
    """
    recording, settings = _asked_for(ctx, files, options, assignments, probe, dtype, bad_channels, shanks)
    from ks4stream.io.places import place
    from ks4stream.io.recordings import default_results_dir
    from ks4stream.planning import plan

    worker_gb, gpu_gb = options["worker_memory"], options["gpu_memory"]
    found = plan(
        recording,
        settings,
        results_dir=place(results_dir or default_results_dir(files[0])),
        n_workers=options["workers"],
        worker_memory_bytes=worker_gb and worker_gb * 1e9,
        gpu_memory_bytes=gpu_gb and gpu_gb * 1e9,
        block_batches=options["block_batches"],
        device=options["device"],
        spikes_per_channel_hz=options["spikes_per_channel"],
        calibrate=options["calibrate"],
    )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found)
    if not found.fits:
        ctx.exit(_FAILED)


def _show(found: Plan) -> None:
    """Print a plan as a table, then what does not fit."""
    table = Table(title=found.recording, show_header=False, title_justify="left")
    for row in found.rows():
        table.add_row(*row)
    Console().print(table)
    for shortfall in found.shortfalls:
        _say(Console(), f"{'Will not fit' if shortfall.certain else 'May not fit'}: {shortfall.text}", "bold red")


# --- ks4stream carry -----------------------------------------------------------------------------------------


@main.command("carry")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.option(
    "--agreement",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.5,
    show_default=True,
    metavar="NUMBER",
    help="Least share of spikes, of all that either has, that a cluster and a unit have in common; besides, these must "
    "be at least 10. Below 0.5, two clusters may agree with the same unit, which then goes to the one that agrees "
    "better.",
)
@click.option(
    "--over",
    is_flag=True,
    help="Also if NEW has already been curated: what is carried replaces what was decided there about the same units, "
    "and the list says what was replaced.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be carried.")
@_debug_option
def carry_command(old: str, new: str, agreement: float, over: bool, dry_run: bool) -> None:
    """Carry decisions made in Phy over to a new sort of the same recording.

    OLD is the results folder that was curated, of ks4stream or Kilosort4, and NEW that of the new sort; addresses like
    s3://bucket/sorted are understood. Labels, other columns of a person's, and merges are carried where units agree.
    Columns of Bombcell, and columns of numbers with decimals, are a program's, and no decision by themselves.
    What became of each decision is listed, and written to carried.tsv in NEW.
    """
    from ks4stream.curation import carry_curation

    carried = carry_curation(old, new, agreement=agreement, over=over, dry_run=dry_run)
    header, *rows = carried.rows()
    table = Table(*(name.replace("_", " ") for name in header))
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
    click.echo(carried.summary + "; nothing was written" * (dry_run or not carried.n_carried))


# --- ks4stream export ----------------------------------------------------------------------------------------


@main.command("export")
@click.argument("results", metavar="RESULTS")
@click.option(
    "--nwb", metavar="FILE", type=click.Path(path_type=Path), required=True, help="NWB file to write; needs pynwb."
)
@click.option(
    "--session-start",
    metavar="TIME",
    callback=_read_time,
    help="When the recording began, for instance 2026-03-01T14:30:00+01:00; without a time zone, in that of this "
    "machine. [default: what SpikeGLX noted, if its .meta is still next to the recording]",
)
@click.option(
    "--metadata",
    "metadata_file",
    metavar="FILE",
    help="JSON file with what NWB calls experimenter, institution, session_id, … and subject.",
)
@click.option("--location", default="unknown", show_default=True, help="Brain region of all electrodes.")
@click.option(
    "--gain-uv",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NUMBER",
    help="µV per unit of the recording's samples. [default: what the recording's metadata said]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@_debug_option
def export_command(
    results: str,
    nwb: Path,
    session_start: datetime | None,
    metadata_file: str | None,
    location: str,
    gain_uv: float | None,
    overwrite: bool,
) -> None:
    """Write a sorting to an NWB file: units with their spike times and mean waveforms, electrodes, and settings.

    RESULTS is a results folder or a sorting.zarr, on disk or at an address like s3://bucket/sorted. What was sorted is
    exported: changes made in Phy are not.
    """
    from ks4stream.io.nwb import write_nwb
    from ks4stream.io.store import map_sorting

    metadata = None if metadata_file is None else _read_metadata(metadata_file)
    sorting = map_sorting(results)
    if gain_uv is not None:
        sorting = replace(sorting, gain_uv=gain_uv)
    write_nwb(sorting, nwb, session_start=session_start, metadata=metadata, location=location, overwrite=overwrite)
    click.echo(f"{_n_units(sorting)} with {int(sorting.kept.sum())} spikes: {nwb}")


# --- ks4stream report ----------------------------------------------------------------------------------------


@main.command("report")
@click.argument("results", metavar="RESULTS")
@click.option("--compare", metavar="OTHER", help="Results of another sort of the same recording, to compare with.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Page to write. [default: report.html in RESULTS]",
)
@_debug_option
def report_command(results: str, compare: str | None, out: Path | None) -> None:
    """Write the page about a sorting: one HTML file that needs no other and no network.

    RESULTS is a results folder or a sorting.zarr, on disk or at an address like s3://bucket/sorted. Every sort writes
    this page; write it again to compare with another sort, or for results of an earlier version.
    """
    from ks4stream.io.places import place
    from ks4stream.report import rewrite_page

    click.echo(rewrite_page(place(results), out, compare=place(compare) if compare else None))


# --- ks4stream demo, ks4stream probes ------------------------------------------------------------------------


@main.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("ks4stream-demo"),
    show_default=True,
    help="Folder for the recording, the ground truth and the results.",
)
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Length of the recording, in seconds.")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Random seed; another seed makes another recording."
)
@_debug_option
def demo_command(out: Path, seconds: float, seed: int) -> None:
    """Sort a simulated recording with known units and drift, and show how well each unit was found."""
    from ks4stream import demo

    click.echo(f"Simulating {seconds:g} s of {demo.N_CHANNELS} channels with {demo.N_UNITS} units in drifting tissue")
    with _shown_progress() as progress:
        made = demo.make_recording(out, duration_s=seconds, seed=seed, progress=progress)
    recording = made.open()
    sorting = _sort(recording, Settings(), out / "kilosort4")
    click.echo("\nHow well each unit was found (spikes shared with the matched unit / all spikes; good from 0.8):\n")
    click.echo(demo.score_table(made, sorting))
    click.echo(
        f"\nThe recording, its probe and the ground truth: {out}\nTo run the same sort: ks4stream sort {made.path} "
        f"--n-chan {recording.n_channels} --fs {recording.sampling_rate_hz:g} --probe {made.probe_path}"
    )


@main.command("probes")
@_debug_option
def probes_command() -> None:
    """List the probes that come with ks4stream, for --probe."""
    from ks4stream.io.probes import load_probe, shipped_probes

    for name in shipped_probes():
        probe = load_probe(name)
        n_shanks = len(set(probe.shank.tolist()))
        click.echo(f"{name:<28}{probe.n_channels:>4} channels, {n_shanks} shank{'s' * (n_shanks != 1)}")


if __name__ == "__main__":
    main()
