"""Why a unit is not good: trains made by hand, each of which has one fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ks4stream import labels
from ks4stream.blocks import Tiling
from ks4stream.labels import (
    BRIEF,
    FEW_SPIKES,
    LOCKED_TO_ARTIFACTS,
    LOCKED_TO_HUM,
    MIN_ARTIFACTS,
    NOT_REFRACTORY,
    UNDECIDED,
)
from ks4stream.results import Sorting
from ks4stream.settings import Settings

RATE, SECONDS = 30_000, 100
N_SAMPLES = RATE * SECONDS
NO_ARTIFACTS = np.zeros((0, 2), np.int64)
HZ_50, HZ_60 = (LOCKED_TO_HUM.format(line_hz) for line_hz in labels.LINES_HZ)

Train = NDArray[np.int64]
MakeSorting = Callable[..., Any]


def random_train(n: int = 500, first: float = 0, last: float = SECONDS, seed: int = 0) -> Train:
    return np.sort(np.random.default_rng(seed).integers(int(first * RATE), int(last * RATE), n))


def at_seconds(seconds: NDArray[np.float64]) -> Train:
    return np.round(seconds * RATE).astype(np.int64)


def spans(n: int, every: float = 1.0, n_samples: int = 300) -> NDArray[np.int64]:
    """Artifacts of 10 ms."""
    start = at_seconds(0.5 + every * np.arange(n))
    return np.stack([start, start + n_samples], 1)


class Made:
    """Makes sortings of some trains."""

    def __init__(self, make_sorting: MakeSorting) -> None:
        self.make_sorting = make_sorting

    def __call__(self, *trains: Train, artifacts: NDArray[np.int64] = NO_ARTIFACTS, **changes: object) -> Sorting:
        sample = np.concatenate([*trains, np.zeros(0, np.int64)])
        unit = np.repeat(np.arange(len(trains)), [len(train) for train in trains]).astype(np.int32)
        order = np.lexsort((unit, sample))
        settings = Settings(nt=21, n_pcs=3, nearest_chans=5)
        given = {
            "sample": sample[order],
            "unit": unit[order],
            "kept": np.ones(len(sample), bool),
            "refractory": np.ones(len(trains), bool),
            "contamination": np.full(len(trains), 0.2),
            "artifacts": artifacts,
            "n_samples": N_SAMPLES,
            "tiling": Tiling.by_settings(settings, n_samples=N_SAMPLES, sampling_rate_hz=RATE),
            "settings": settings,
        }
        sorting: Sorting = self.make_sorting(n_spikes=len(sample), n_units=len(trains), **(given | changes))
        return sorting


@pytest.fixture
def made(make_sorting: MakeSorting) -> Made:
    return Made(make_sorting)


def test_a_good_unit_has_no_reason_not_to_be(made: Made) -> None:
    sorting = made(random_train(), random_train(seed=1))
    assert sorting.label_reasons == ("", "")
    assert sorting.good.tolist() == [True, True] and sorting.good.dtype == bool


def test_without_units_there_are_no_reasons(made: Made) -> None:
    sorting = made()
    assert sorting.label_reasons == () and sorting.good.shape == (0,)


def test_few_spikes_are_counted_without_duplicates(made: Made) -> None:
    sorting = made(random_train(10), random_train(11), random_train(12))
    assert sorting.label_reasons == (FEW_SPIKES, "", "")
    kept = np.ones(33, bool)
    kept[np.flatnonzero(sorting.unit == 1)[3]] = False
    assert made(random_train(10), random_train(11), random_train(12), kept=kept).label_reasons == (
        *(FEW_SPIKES, FEW_SPIKES),
        "",
    )


def test_the_first_reason_counts(made: Made) -> None:
    refractory = np.array([False, False])
    reasons = made(random_train(5, 0, 1), random_train(), refractory=refractory).label_reasons
    assert reasons == (FEW_SPIKES, NOT_REFRACTORY)


def test_units_that_may_be_refractory_are_told_from_those_that_are_not(made: Made) -> None:
    trains = [random_train(seed=seed) for seed in range(4)]
    refractory, contamination = np.array([True, False, False, False]), np.array([0.1, 0.0, 0.19, 0.2])
    sorting = made(*trains, refractory=refractory, contamination=contamination)
    assert sorting.label_reasons == ("", UNDECIDED, UNDECIDED, NOT_REFRACTORY)
    strict = made(*trains, refractory=refractory, contamination=contamination)
    strict = dataclasses.replace(strict, settings=dataclasses.replace(strict.settings, acg_threshold=0.15))
    assert strict.label_reasons == ("", UNDECIDED, NOT_REFRACTORY, NOT_REFRACTORY)


# -- artifacts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["before", "after"])
def test_spikes_at_one_lag_of_artifacts(made: Made, side: str) -> None:
    """Of 60 spikes 31 or 29, within 0.4 ms, 3 ms before artifacts begin or after they end."""
    artifacts = spans(60)
    jitter = np.random.default_rng(0).integers(0, 12, 60)
    near = artifacts[:, 0] - 90 - jitter if side == "before" else artifacts[:, 1] + 90 + jitter
    elsewhere = artifacts[:, 1] + 6_000 + np.random.default_rng(1).integers(0, 6_000, 60)
    for n, reason in ((31, LOCKED_TO_ARTIFACTS), (29, "")):
        train = np.where(np.arange(60) < n, near, elsewhere)
        assert made(np.sort(train), artifacts=artifacts).label_reasons == (reason,)


def test_a_lag_that_varies_is_no_lock(made: Made) -> None:
    """A neuron that artifacts excite: 1 to 4 ms after they end."""
    artifacts = spans(90)
    train = artifacts[:, 1] + np.random.default_rng(0).integers(30, 120, 90)
    assert made(train, artifacts=artifacts).label_reasons == ("",)


def test_lags_of_more_than_5_ms_do_not_count(made: Made) -> None:
    artifacts = spans(60)
    assert made(artifacts[:, 1] + 160, artifacts=artifacts).label_reasons == ("",)


def test_few_artifacts_lock_nothing(made: Made) -> None:
    for n, reason in ((MIN_ARTIFACTS - 1, ""), (MIN_ARTIFACTS, LOCKED_TO_ARTIFACTS)):
        artifacts = spans(n, every=9.0)
        train = np.sort(np.concatenate([artifacts[:, 1] + 30, artifacts[:, 1] + 37]))  # both within 0.5 ms
        assert made(train, artifacts=artifacts).label_reasons == (reason,)


# -- hum -------------------------------------------------------------------------------------------------------


def humming(hz: NDArray[np.float64], jitter_s: float = 0.001, share: float = 0.3) -> Train:
    """Spikes at one phase of a frequency, given for each period, in a share of the periods."""
    times = np.cumsum(1 / hz)
    draw = np.random.default_rng(0)
    times = times[(times < SECONDS - 1) & (draw.random(len(times)) < share)]
    return at_seconds(times + draw.normal(0, jitter_s, len(times)))


def test_spikes_at_one_phase_of_hum_although_its_frequency_wanders(made: Made) -> None:
    """By 0.02 Hz within a minute and a half, which is more than a period in all."""
    hz = 50 + 0.02 * np.sin(np.linspace(0, 6, 5000))
    assert np.ptp(np.cumsum(1 / hz) - np.arange(1, 5001) / 50) > 0.02 / 2
    assert made(humming(hz), humming(hz * 1.2)).label_reasons == (HZ_50, HZ_60)
    assert (HZ_50, HZ_60) == ("locked to 50 Hz", "locked to 60 Hz")


def test_spikes_at_any_phase_are_not_locked(made: Made) -> None:
    """Random; rhythmic, at 7 Hz; at 50 Hz with a third of a period of jitter; and at 53 Hz."""
    rhythmic = at_seconds(np.arange(7 * 95) / 7 + np.random.default_rng(0).normal(0, 0.004, 7 * 95) + 1)
    others = humming(np.full(5000, 50.0), 0.0066), humming(np.full(5300, 53.0))
    assert made(random_train(), rhythmic, *others).label_reasons == ("",) * 4


@pytest.mark.parametrize("stimuli_hz", [1, 2, 10, 12.5, 25])
def test_responses_to_stimuli_whose_rate_divides_that_of_mains_are_not_locked_to_it(
    made: Made, stimuli_hz: float
) -> None:
    """30 ms after each, with a jitter of 1 ms, which is a twentieth of a period at 50 Hz."""
    onset = 1 + np.arange(95 * stimuli_hz) / stimuli_hz
    train = at_seconds(onset + 0.03 + np.random.default_rng(0).normal(0, 0.001, len(onset)))
    assert made(train).label_reasons == ("",)


def test_few_spikes_in_10_seconds_tell_no_phase(made: Made) -> None:
    """Seven, all at one phase; eight."""
    periods = np.cumsum(np.random.default_rng(0).integers(20, 55, (10, 8)), axis=1)
    seconds = 10 * np.arange(10)[:, None] + 0.5 + 0.02 * periods
    assert made(at_seconds(seconds[:, :7].ravel())).label_reasons == ("",)
    train = at_seconds(seconds.ravel())
    assert made(train).label_reasons == (HZ_50,)


# -- parts of the recording ------------------------------------------------------------------------------------


def test_most_spikes_within_a_tenth_of_the_recording(made: Made) -> None:
    """9 or 12 s of 100; and 9 s with 9 % of the spikes elsewhere, or 20 %."""
    brief, longer = random_train(300, 40, 49), random_train(300, 40, 52)
    few, more = random_train(27, seed=1), random_train(75, seed=1)
    trains = [brief, longer, np.sort(np.append(brief, few)), np.sort(np.append(brief, more))]
    assert made(*trains).label_reasons == (BRIEF, "", BRIEF, "")


def test_a_neuron_that_fires_rarely_but_throughout_is_not_brief(made: Made) -> None:
    assert made(at_seconds(np.linspace(1, 99, 11))).label_reasons == ("",)


def test_dead_time_is_not_time(made: Made) -> None:
    """With 50 of 100 s dead, 7 s are 14 %; one end of the span is within a part, which counts in part."""
    train = random_train(300, 80, 87)
    assert made(train).label_reasons == (BRIEF,)
    assert made(train, artifacts=np.array([[RATE // 10, 50 * RATE]])).label_reasons == ("",)
    assert made(train, artifacts=np.array([[RATE // 10, 20 * RATE]])).label_reasons == (BRIEF,)


def test_the_crop_is_the_recording(made: Made) -> None:
    settings = Settings(nt=21, n_pcs=3, nearest_chans=5, tmin=70, tmax=100)
    tiling = Tiling.by_settings(settings, n_samples=N_SAMPLES, sampling_rate_hz=RATE)
    assert made(random_train(300, 80, 87), settings=settings, tiling=tiling).label_reasons == ("",)


# -- any number of spikes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_size_of_chunks_does_not_matter(made: Made, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """In some of which there may be nothing but duplicates."""
    artifacts = spans(60)
    trains = [
        *(random_train(8), artifacts[:, 1] + 90, humming(np.full(5000, 50.0), share=0.1), random_train(300, 40, 49)),
        *(random_train(50, seed=2), random_train(50, seed=3)),
    ]
    kept = np.random.default_rng(0).random(sum(map(len, trains))) < 0.9
    refractory = np.array([True] * 5 + [False])

    def found() -> tuple[str, ...]:
        return made(*trains, artifacts=artifacts, kept=kept, refractory=refractory).label_reasons

    expected = found()
    assert expected == (FEW_SPIKES, LOCKED_TO_ARTIFACTS, HZ_50, BRIEF, "", NOT_REFRACTORY)
    monkeypatch.setattr(labels, "CHUNK", size)
    assert found() == expected
