"""Kilosort4's settings: the names, and the values where nothing else is asked for."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.kilosort4 import run_kilosort
from ks4stream.kilosort4.parameters import DEFAULT_SETTINGS
from ks4stream.settings import Settings

KILOSORT4: dict[str, Any] = {  # `kilosort.DEFAULT_SETTINGS` of release 4.1.7, as it prints
    "n_chan_bin": None,
    "fs": 30000,
    "batch_size": 60000,
    "nblocks": 1,
    "Th_universal": 9,
    "Th_learned": 8,
    "tmin": 0,
    "tmax": math.inf,
    "nt": 61,
    "shift": None,
    "scale": None,
    "batch_downsampling": 1,
    "artifact_threshold": math.inf,
    "nskip": 25,
    "whitening_range": 32,
    "highpass_cutoff": 300,
    "binning_depth": 5,
    "sig_interp": 20,
    "drift_smoothing": [0.5, 0.5, 0.5],
    "nt0min": None,
    "dmin": None,
    "dminx": 32,
    "min_template_size": 10,
    "template_sizes": 5,
    "nearest_chans": 10,
    "nearest_templates": 100,
    "max_channel_distance": 32,
    "max_peels": 100,
    "templates_from_data": True,
    "n_templates": 6,
    "n_pcs": 6,
    "Th_single_ch": 6,
    "acg_threshold": 0.2,
    "ccg_threshold": 0.25,
    "cluster_neighbors": 10,
    "cluster_downsampling": 20,
    "max_cluster_subset": 25000,
    "x_centers": None,
    "cluster_init_seed": 5,
    "duplicate_spike_ms": 0.25,
    "position_limit": 100,
}
ARGUMENTS = {"do_CAR": True, "invert_sign": False}  # of its run_kilosort, which change results as well
RECORDINGS = {"n_chan_bin", "fs"}  # what a recording may know by itself
OWN = {"line_frequency": 0.0, "artifact_margin": 0.25}  # settings that Kilosort4 does not have


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", [name for name in KILOSORT4 if name not in RECORDINGS])
def test_a_setting_has_kilosort4s_default(name: str) -> None:
    value = plain(getattr(Settings.like_kilosort4({}), name))
    assert value == KILOSORT4[name]
    assert isinstance(value, bool) == isinstance(KILOSORT4[name], bool), "True is 1, but it is not the same"


def test_there_are_no_others() -> None:
    """But for those of our own. Its arguments may be settings of ours, by the same names."""
    names = {spec.name for spec in fields(Settings)}
    assert names - set(ARGUMENTS) - set(OWN) == set(KILOSORT4) - RECORDINGS
    for name, value in (ARGUMENTS | OWN).items():
        assert getattr(Settings(), name) == value


def test_the_table_of_the_interface_is_kilosort4s() -> None:
    assert DEFAULT_SETTINGS == KILOSORT4
    for name, value in DEFAULT_SETTINGS.items():
        assert isinstance(value, bool) == isinstance(KILOSORT4[name], bool)


def test_who_calls_run_kilosort_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but the number of channels, which Kilosort4 asks for, too."""
    np.zeros((30_000, 4), np.int16).tofile(tmp_path / "data.bin")
    asked: dict[str, Any] = {}

    class AskedError(Exception):
        pass

    def sort(recording: Any, settings: Settings, **options: Any) -> None:
        asked.update(settings.to_dict() | {"recording": recording})
        raise AskedError

    monkeypatch.setattr(sys.modules[run_kilosort.__module__], "sort", sort)
    probe = {"chanMap": np.arange(4), "xc": np.zeros(4), "yc": 20.0 * np.arange(4), "kcoords": np.zeros(4)}
    with pytest.raises(AskedError):
        run_kilosort({"n_chan_bin": 4}, probe=probe, filename=tmp_path / "data.bin")
    assert asked["recording"].sampling_rate_hz == KILOSORT4["fs"]
    assert asked["recording"].n_channels == 4
    known = {name: value for name, value in KILOSORT4.items() if name not in RECORDINGS}
    assert {name: plain(asked[name]) for name in known} == known
    assert {name: asked.get(name, value) for name, value in ARGUMENTS.items()} == ARGUMENTS


def test_arguments_have_kilosort4s_defaults() -> None:
    parameters = inspect.signature(run_kilosort).parameters
    assert {name: parameters[name].default for name in ARGUMENTS} == ARGUMENTS


def test_the_table_is_that_of_the_kilosort_installed() -> None:
    library = pytest.importorskip("kilosort")
    if library.__version__ != "4.1.7":
        pytest.skip(f"another release, {library.__version__}")
    assert library.DEFAULT_SETTINGS == KILOSORT4
    parameters = inspect.signature(library.run_kilosort).parameters
    assert {name: parameters[name].default for name in ARGUMENTS} == ARGUMENTS
