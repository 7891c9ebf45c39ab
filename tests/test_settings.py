"""Every setting has bounds, and every error names the setting."""

from __future__ import annotations

import math
import pickle
from dataclasses import Field, FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import SettingsError
from ks4stream.settings import UNLIMITED, Settings

NUMBERS = [spec for spec in fields(Settings) if spec.metadata["kind"] in (int, float)]
WHOLE = [spec for spec in NUMBERS if spec.metadata["kind"] is int]
ALONGSIDE: dict[str, dict[str, Any]] = {"nt": {"n_pcs": 1}, "batch_size": {"nt": 1, "n_pcs": 1, "batch_size": 4}}
"""Other settings that must change for settings to be consistent when one is at its bound."""


def named(spec: Field[Any]) -> str:
    return spec.name


def bounded(bound: str) -> list[Field[Any]]:
    return [spec for spec in NUMBERS if spec.metadata[bound] is not None]


def make(name: str, value: Any) -> Settings:
    return Settings(**({name: value} | ALONGSIDE.get(name, {})))


@pytest.mark.parametrize("spec", bounded("ge"), ids=named)
def test_the_least_value_is_taken_and_less_is_not(spec: Field[Any]) -> None:
    least = spec.metadata["ge"]
    accepted = 4 if spec.name == "batch_size" else least  # a batch holds four waveforms
    assert getattr(make(spec.name, least), spec.name) == accepted
    less = least - 1 if spec.metadata["kind"] is int else math.nextafter(least, -math.inf)
    with pytest.raises(SettingsError, match=f"{spec.name}=.* is too small; it must be at least {least}"):
        Settings(**{spec.name: less})


@pytest.mark.parametrize("spec", bounded("gt"), ids=named)
def test_values_above_the_bound_are_taken_and_the_bound_is_not(spec: Field[Any]) -> None:
    bound = spec.metadata["gt"]
    more = math.nextafter(bound, math.inf)
    assert getattr(make(spec.name, more), spec.name) == more
    with pytest.raises(SettingsError, match=f"{spec.name}=.* is too small; it must be above {bound}.*(?<!\\.)\\.$"):
        Settings(**{spec.name: bound})


@pytest.mark.parametrize("spec", bounded("le"), ids=named)
def test_the_largest_value_is_taken_and_more_is_not(spec: Field[Any]) -> None:
    most = spec.metadata["le"]
    assert getattr(make(spec.name, most), spec.name) == most
    with pytest.raises(SettingsError, match=f"{spec.name}=.* is too large; it must be at most {most}"):
        Settings(**{spec.name: most + 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fs", 0),
        ("fs", -1),
        ("batch_size", 0),
        ("nt", 0),
        ("tmin", -0.5),
        ("tmax", 0),
        ("highpass_cutoff", -1),
        ("nskip", 0),
        ("Th_universal", 0),
        ("Th_learned", 0),
        ("cluster_neighbors", 1),
        ("nblocks", -1),
        ("max_peels", 10_001),
        ("max_channel_distance", 0.5),
        ("duplicate_spike_ms", -0.1),
    ],
)
def test_senseless_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings(**{name: value})


@pytest.mark.parametrize("spec", NUMBERS, ids=named)
@pytest.mark.parametrize("value", [True, math.nan, "many", [1, 2], 10**400], ids=lambda value: repr(value)[:9])
def test_what_is_not_a_number_is_refused(spec: Field[Any], value: object) -> None:
    with pytest.raises(SettingsError, match=rf"{spec.name}=.* must be a number \({spec.metadata['kind'].__name__}\)"):
        Settings(**{spec.name: value})


@pytest.mark.parametrize("spec", WHOLE, ids=named)
@pytest.mark.parametrize("value", [5.5, math.inf])
def test_counts_are_whole(spec: Field[Any], value: float) -> None:
    with pytest.raises(SettingsError, match=rf"{spec.name}=.* (must be a whole number|is too large)"):
        Settings(**{spec.name: value})


@pytest.mark.parametrize("spec", [spec for spec in NUMBERS if spec not in WHOLE], ids=named)
def test_only_limits_may_be_infinite(spec: Field[Any]) -> None:
    if spec.name in UNLIMITED:
        assert getattr(Settings(**{spec.name: math.inf}), spec.name) == math.inf
    else:
        with pytest.raises(SettingsError, match=f"{spec.name}=inf (must be finite|is too large)"):
            Settings(**{spec.name: math.inf})


@pytest.mark.parametrize("value", [21.0, np.int64(21), np.float32(21)])
def test_whole_numbers_of_any_type_become_integers(value: Any) -> None:
    assert type(Settings(nt=value).nt) is int
    assert Settings(nt=value).nt == 21


@pytest.mark.parametrize("spec", fields(Settings), ids=named)
def test_none_is_allowed_only_where_it_means_something(spec: Field[Any]) -> None:
    if spec.metadata["optional"]:
        assert getattr(Settings(**{spec.name: None}), spec.name) is None
    else:
        with pytest.raises(SettingsError, match=f"{spec.name}=None is not allowed"):
            Settings(**{spec.name: None})


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_a_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(SettingsError, match=r"templates_from_data=.* must be True or False"):
        Settings.from_dict({"templates_from_data": value})


@pytest.mark.parametrize("value", [0.5, (1, 2), (1, 2, 3, 4), (1, 2, -1), (1, 2, math.inf), (1, 2, math.nan), "abc"])
def test_smoothing_takes_three_widths(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"drift_smoothing=.* three numbers, each at least 0"):
        Settings(drift_smoothing=value)


def test_an_even_waveform_is_refused_with_the_odd_lengths_beside_it() -> None:
    with pytest.raises(SettingsError, match=r"nt=60 is even.*Use 59 or 61"):
        Settings(nt=60)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nt": 21, "nt0min": 21}, "nt0min=21 must lie within the waveform of nt=21"),
        ({"tmin": 5, "tmax": 5}, "tmax=5.0 s must be later than tmin=5.0 s"),
        ({"nt": 5, "n_pcs": 6}, "n_pcs=6 cannot exceed nt=5"),
        ({"n_templates": 1000}, "n_templates=1000 cannot exceed 8·nt = 488"),
        ({"batch_size": 243}, "at least 4·nt = 244"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("wrong", "right"), [("n_chan", "n_chan_bin"), ("th_learned", "Th_learned"), ("nblock", "nblocks")]
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f"Unknown setting '{wrong}'. Did you mean '{right}'"):
        Settings.from_dict({wrong: 4})


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(SettingsError, match=r"Unknown setting 'zzz'\. Known settings: Th_learned, .*whitening_range"):
        Settings.from_dict({"zzz": 1})


def test_settings_make_the_round_trip_through_a_dictionary() -> None:
    settings = Settings(nblocks=3, drift_smoothing=(1, 2, 3), tmax=60, max_cluster_subset=None)
    assert Settings.from_dict(settings.to_dict()) == settings
    assert settings != Settings()


def test_replace_changes_a_copy_and_checks_it() -> None:
    settings = Settings(nt=41)
    changed = settings.replace(nblocks=5)
    assert (changed.nt, changed.nblocks, settings.nblocks) == (41, 5, "auto")
    with pytest.raises(SettingsError, match="nt=40 is even"):
        settings.replace(nt=40)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().nt = 41  # type: ignore[misc]


@pytest.mark.parametrize(("values", "sample"), [({}, 20), ({"nt": 31}, 10), ({"nt0min": 0}, 0), ({"nt0min": 7}, 7)])
def test_the_peak_lies_a_third_into_the_waveform_by_default(values: dict[str, int], sample: int) -> None:
    assert Settings(**values).peak_sample == sample


def test_no_limit_on_landmarks_is_a_very_large_one() -> None:
    assert Settings(max_cluster_subset=100).landmark_limit == 100
    assert Settings(max_cluster_subset=None).landmark_limit > 10**15


# -- against the recording -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", NUMBERS, ids=named)
def test_a_setting_that_is_out_of_all_bounds_is_the_one_named(spec: Field[Any]) -> None:
    try:
        Settings(**{spec.name: 10**9 + 1})
    except SettingsError as error:
        assert f"{spec.name}=" in str(error)


@pytest.mark.parametrize(("name", "there"), [("fs", "fs"), ("n_chan_bin", "n_chan")])
@pytest.mark.parametrize("make", [lambda values: Settings(**values), Settings.from_dict])
def test_what_belongs_to_the_recording_is_said_where_it_is_opened(make: Any, name: str, there: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} belongs to the recording .*open_recording\(…, {there}=…\)"):
        make({name: 10})


def test_a_dictionary_holds_plain_values() -> None:
    """It can be stored, and read elsewhere, without this package."""
    assert {type(value) for value in Settings().to_dict().values()} <= {int, float, bool, tuple, str, type(None)}


def test_a_part_holds_what_was_named_and_nothing_else() -> None:
    part = Settings(nt=41, Th_learned=7).part("nt", "matching")
    assert (part.nt, part.Th_learned, part.max_peels) == (41, 7, 100)
    again = pickle.loads(pickle.dumps(part))
    assert again == part != Settings(nt=43).part("nt", "matching")
    for same in (part, again, part.part("nt", "matching")):
        assert same.nt == 41
        with pytest.raises(AttributeError, match=r"n_pcs is not among the settings declared here \(nt, Th_learned"):
            _ = same.n_pcs
