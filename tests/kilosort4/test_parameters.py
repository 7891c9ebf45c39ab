"""Kilosort4's tables of settings; their defaults are compared in tests/test_kilosort4_defaults.py."""

from __future__ import annotations

import math

import pytest

from ks4stream.errors import SettingsError
from ks4stream.kilosort4.parameters import DEFAULT_SETTINGS, EXTRA_PARAMETERS, MAIN_PARAMETERS, compare_settings
from ks4stream.settings import Settings

ALL = {**MAIN_PARAMETERS, **EXTRA_PARAMETERS}
KEYS = ["gui_name", "type", "min", "max", "exclude", "default", "step", "description"]


def test_main_and_extra_settings_are_kilosort4s() -> None:
    main = ["n_chan_bin", "fs", "batch_size", "nblocks", "Th_universal", "Th_learned", "tmin", "tmax"]
    assert list(MAIN_PARAMETERS) == main and len(EXTRA_PARAMETERS) == 33
    assert list(DEFAULT_SETTINGS) == list(ALL) and len(DEFAULT_SETTINGS) == 41
    own = {"do_CAR", "invert_sign", "line_frequency", "artifact_margin"}
    assert set(ALL) - {"n_chan_bin", "fs"} == set(Settings().to_dict()) - own


@pytest.mark.parametrize("name", ALL)
def test_a_setting_is_described(name: str) -> None:
    about = ALL[name]
    assert list(about) == KEYS and len(about["description"]) > 20
    assert about["default"] == DEFAULT_SETTINGS[name]
    assert about["default"] is None or isinstance(about["default"], int | about["type"])
    assert "None" in about["description"] or about["default"] is not None or name in ("n_chan_bin", "shift", "scale")


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name]["type"] in (int, float)])
def test_bounds_are_those_that_settings_check(name: str) -> None:
    about = ALL[name]
    if name in ("n_chan_bin", "fs"):
        assert (about["min"], about["max"], about["exclude"]) == (0, math.inf, [0])
        return
    if about["exclude"]:
        with pytest.raises(SettingsError, match="too small"):
            Settings(**{name: about["exclude"][0]})
    if about["min"] > -math.inf:
        with pytest.raises(SettingsError, match="too small"):
            Settings(**{name: about["min"] - 1})
    if about["max"] < math.inf:
        with pytest.raises(SettingsError, match="too large"):
            Settings(**{name: about["max"] + 1})


def test_settings_are_compared_with_the_defaults() -> None:
    assert compare_settings(DEFAULT_SETTINGS) == ({}, [])
    same = {"Th_learned": 8.0, "drift_smoothing": (0.5, 0.5, 0.5), "tmax": math.inf}
    assert compare_settings(same) == ({}, [])
    changed = {"n_chan_bin": 385, "nblocks": 0, "shift": 1.0, "do_CAR": False, "results_dir": "there"}
    assert compare_settings(changed) == ({"n_chan_bin": 385, "nblocks": 0, "shift": 1.0}, ["do_CAR", "results_dir"])
