"""Kilosort4's way to say what to sort and where results go: files, folders, probes, shanks, progress bars."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ks4stream.engine import Progress
from ks4stream.errors import ProbeError, RecordingError, ResultsError, SettingsError
from ks4stream.io.places import place
from ks4stream.io.probes import shipped_probes
from ks4stream.io.recordings import default_results_dir, may_tell_rate, open_recording
from ks4stream.kilosort4.extractor import RecordingExtractorAsArray
from ks4stream.kilosort4.utils import PROBE_DIR
from ks4stream.probe import Probe
from ks4stream.recording import Recording, is_same_rate
from ks4stream.settings import OF_RECORDING, Settings

PathLike = str | os.PathLike[str]

_PLACES = ("filename", "data_dir", "results_dir", "data_dtype", "probe", "probe_name", "probe_path")
_BINARY_SUFFIXES = (".bin", ".dat", ".bat", ".raw")
_DEFAULT_FS = 30_000.0


def split_settings(settings: Mapping[str, Any] | Settings) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split Kilosort4's settings into the method's, the recording's, and those that name files and probes.

    Raises
    ------
    SettingsError
        If ``n_chan_bin`` is missing, a name is unknown, or `settings` is not a dictionary.
    """
    if not isinstance(settings, Settings | Mapping):
        raise SettingsError(
            f"settings must be a dictionary, not {settings!r}; for example, run_kilosort({{'n_chan_bin': 385}})."
        )
    values = settings.to_dict() if isinstance(settings, Settings) else dict(settings)
    places = given_places(**{name: values.pop(name, None) for name in _PLACES})
    of_recording = {name: values.pop(name, None) for name in OF_RECORDING}
    if of_recording["n_chan_bin"] is None:
        raise SettingsError(
            "n_chan_bin is missing; settings must give the number of channels in the file, sorted or not: "
            "run_kilosort(settings={'n_chan_bin': 385})."
        )
    Settings.like_kilosort4(values)  # so that a bad setting is reported before a missing file
    return values, of_recording, places


def given_places(**places: Any) -> dict[str, Any]:
    """The places that are set; callers such as SpikeInterface pass an empty string for "not set"."""
    return {name: value for name, value in places.items() if value is not None and not _is_blank(value)}


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def files_of(places: Mapping[str, Any], *, needed: bool) -> list[PathLike]:
    """The files to sort: those given by name, or the only one in the folder."""
    files = places.get("filename")
    if files is not None:
        return list(files) if isinstance(files, list | tuple) else [files]
    if places.get("data_dir") is not None:
        return [only_binary(Path(places["data_dir"]))] if needed else []
    if needed:
        raise RecordingError("Nothing to sort: give filename, data_dir or file_object.")
    return []


def only_binary(folder: Path) -> Path:
    if not folder.is_dir():
        raise RecordingError(f"data_dir={folder} is not a folder. Give the folder of the binary file, or filename.")
    found = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _BINARY_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise RecordingError(
            f"data_dir={folder} must hold exactly one file that ends in {', '.join(_BINARY_SUFFIXES)}; found: "
            f"{names}. Give the file as filename."
        )
    return found[0]


def results_folder(places: Mapping[str, Any], files: Sequence[PathLike]) -> Path:
    if places.get("results_dir") is not None:
        folder = place(places["results_dir"])
        if isinstance(folder, Path):
            return folder
        raise ResultsError(
            f"run_kilosort can only write into a folder, not to {folder}; use ks4stream.sort(…, results_dir=…)."
        )
    if files:
        return default_results_dir(files[0])
    if places.get("data_dir") is not None:
        return Path(places["data_dir"]) / "kilosort4"
    raise SettingsError("A file_object does not say where results go; give results_dir.")


def opened(
    files: Sequence[PathLike], file_object: Any, known: Mapping[str, Any], places: Mapping[str, Any]
) -> Recording:
    """Open the recording with its probe.

    The rate is that of the recording's metadata (with which ``fs`` of the settings must agree), else ``fs``, else
    30 kHz.

    Raises
    ------
    SettingsError
        If rate or number of channels of the recording differ from the settings; the rate by more than 1 part in 1000,
        as metadata hold measured rates (29999.95 Hz) and people give nominal ones (30000).
    """
    fs, n_chan = known["fs"], known["n_chan_bin"]
    default_fs = fs
    if fs is None and (file_object is not None or not all(map(may_tell_rate, files))):
        default_fs = _DEFAULT_FS
    if isinstance(file_object, RecordingExtractorAsArray):
        file_object = file_object.as_recording() or file_object
    source = file_object if file_object is not None else files[0] if len(files) == 1 else list(files)
    recording = open_recording(
        source, n_chan=n_chan, default_fs=default_fs, dtype=places.get("data_dtype"), probe=probe_in(places)
    )
    if fs is not None and not is_same_rate(fs, recording.sampling_rate_hz):
        rate = recording.sampling_rate_hz
        raise SettingsError(f"fs={fs:g} Hz, but {recording.name} has {rate:g} Hz. Leave fs out of the settings.")
    if n_chan != recording.n_channels:
        raise SettingsError(
            f"n_chan_bin={n_chan}, but {recording.name} has {recording.n_channels} channels. Correct n_chan_bin."
        )
    if recording.probe is None:
        raise ProbeError(
            f"The contact positions of {recording.name} are not known; give probe (a dictionary with chanMap, xc, yc "
            f"and kcoords, or a file), or probe_name (shipped: {', '.join(shipped_probes())})."
        )
    return recording


def probe_in(places: Mapping[str, Any]) -> Any:
    """The probe, in whichever form it was given; None if it was not.

    A name is looked for in Kilosort4's folder of probes first.
    """
    for name in ("probe", "probe_path", "probe_name"):
        if name in places:
            is_here = name == "probe_name" and (PROBE_DIR / places[name]).is_file()
            return PROBE_DIR / places[name] if is_here else places[name]
    return None


def shanks_of(shank_idx: float | Sequence[float] | None) -> list[tuple[int | None, str]]:
    """The shanks to sort separately, each with its folder; all together is one job without a folder of its own."""
    if shank_idx is None:
        return [(None, "")]
    chosen = np.atleast_1d(np.asarray(shank_idx, np.float64)).ravel().tolist()
    if not chosen:
        raise SettingsError("shank_idx is an empty list; give the shanks to sort, or None for all.")
    if any(shank != int(shank) for shank in chosen):
        raise SettingsError(f"shank_idx={shank_idx} must be whole numbers, the values of kcoords.")
    return [(int(shank), f"shank_{int(shank)}") for shank in chosen]


def with_channels(recording: Recording, shank: int | None, bad_channels: Sequence[int] | None) -> Recording:
    """The recording with the channels that are to be sorted."""
    assert recording.probe is not None
    return recording.with_probe(chosen_channels(recording.probe, recording.n_channels, shank, bad_channels))


def chosen_channels(
    probe: Probe, n_channels: int, shank: int | Sequence[int] | None, bad_channels: Sequence[int] | None
) -> Probe:
    """The contacts of some shanks, without bad channels.

    Raises
    ------
    ProbeError
        If there is no such shank or channel.
    """
    bad = np.unique(np.asarray([] if bad_channels is None else bad_channels, np.int64))
    beyond = bad[(bad < 0) | (bad >= n_channels)]
    if len(beyond):
        raise ProbeError(f"bad_channels={beyond.tolist()} lie outside the file's channels 0 to {n_channels - 1}.")
    if shank is not None:
        probe = probe.select_shanks(shank)
    on_probe = np.intersect1d(bad, probe.chan_map)  # the others are not sorted anyway
    return probe.drop_channels(on_probe) if len(on_probe) else probe


# -- progress ------------------------------------------------------------------------------------------


def progress_of(bar: Any) -> Progress | None:
    """The callable that :func:`ks4stream.sorter.sort` wants, for a progress bar of any of the usual kinds."""
    if bar is None:
        return None
    show = getattr(bar, "emit", None) or getattr(bar, "setValue", None)  # a Qt signal, a Qt progress bar
    if show is not None:
        return lambda stage, done, total: show(100 * done // max(total, 1))
    if hasattr(bar, "update") and hasattr(bar, "reset"):
        return _Tqdm(bar)
    if callable(bar):
        found: Progress = bar
        return found
    if hasattr(bar, "update") and not isinstance(bar, Mapping | Set):
        return _Tqdm(bar)
    raise SettingsError(
        f"progress_bar={bar!r} is not a progress bar; give a tqdm bar or another with update(n), a Qt progress bar or "
        "signal, or a callable progress(stage, done, total)."
    )


class _Tqdm:
    """One round of a tqdm bar per stage; a bar that cannot be reset counts the tasks of all stages.

    How many tasks will follow is not known then: the total of such a bar, if it has one, is that of the stages so far.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._stage: str | None = None
        self._done = 0  # of this stage
        self._total = 0  # of all stages so far

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._done:
            self._begin(stage, total)
        self._bar.update(done - self._done)
        self._done = done

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._done = stage, 0
        self._total += total
        if hasattr(self._bar, "reset"):
            self._bar.reset(total=total)
        elif hasattr(self._bar, "total"):
            with suppress(AttributeError):  # it cannot be set
                self._bar.total = self._total
        if hasattr(self._bar, "set_description"):
            self._bar.set_description(stage)
