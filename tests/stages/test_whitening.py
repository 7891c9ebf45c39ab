"""Whitening is learned from what is usual: not from dead time, loud seconds, or channels that die."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from runs import RunHere

from ks4stream import simulate
from ks4stream.errors import BadChannelWarning, HumWarning, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.results import Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare
from ks4stream.stages.whitening import LearnWhitening, Measured

RATE = 30_000
PROBE = simulate.staggered_probe(32)
SETTINGS = Settings(batch_size=6000)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return simulate.simulate(PROBE, 2.0, seed=1, n_units=5).read(0, 2 * RATE)


def stage(samples: np.ndarray) -> LearnWhitening:
    return LearnWhitening(SETTINGS, prepare(open_recording(samples, fs=RATE, probe=PROBE), SETTINGS))


def learned(samples: np.ndarray, folder: Path, blocks: int = 1) -> Whitening:
    return stage(samples).run(RunHere(folder, blocks))


def difference(a: Whitening, b: Whitening) -> float:
    """Largest, relative to the largest value."""
    return float(np.abs(a.matrix - b.matrix).max() / np.abs(b.matrix).max())


def test_the_noise_is_that_of_the_traces(tmp_path: Path) -> None:
    sd = np.linspace(20, 60, 32)
    noise = np.rint(np.random.default_rng(0).normal(0, sd, (2 * RATE, 32))).astype(np.int16)
    settings = SETTINGS.replace(do_CAR=False)
    learn = LearnWhitening(settings, prepare(open_recording(noise, fs=RATE, probe=PROBE), settings))
    found = learn.run(RunHere(tmp_path))
    assert found.n_batches == 10
    # The filter takes 2 % of the variance of white noise. Estimated from 1000 samples by the median, it has a
    # standard error of 1.17 / √1000 = 4 %; the 0.75 quantile of ten such estimates is 2.5 % too large, ± 1.7 %.
    np.testing.assert_allclose(found.noise, 1.025 * np.sqrt(0.98) * sd, rtol=0.05)


def test_dead_time_changes_nothing(samples: np.ndarray, tmp_path: Path) -> None:
    """Three quarters are zeros; the live part begins with a batch, so that the same batches are used."""
    live = samples[:12_000]
    mostly_dead = np.concatenate([np.zeros((36_000, 32), np.int16), live])
    found, expected = learned(mostly_dead, tmp_path), learned(live, tmp_path)
    assert (found.n_batches, found.dead.tolist()) == (2, [])
    assert difference(found, expected) < 1e-4  # float32 rounding of filtered traces
    np.testing.assert_allclose(found.noise, expected.noise, rtol=1e-4)


def test_dead_time_within_a_batch_is_not_counted(samples: np.ndarray, tmp_path: Path) -> None:
    """Half of a batch is left; other samples have other spikes."""
    live = samples[:15_000]
    found = learned(np.concatenate([np.zeros((45_000, 32), np.int16), live]), tmp_path)
    expected = learned(live, tmp_path)
    assert found.n_batches == 3
    # Covariances of 15 000 samples, divided into batches that weigh differently: a batch of 3000 is a third of all. If
    # the zeros of that batch were counted, its variance would be half of what it is, and a third less would be 17 %.
    assert difference(found, expected) < 0.1
    np.testing.assert_allclose(found.noise, expected.noise, rtol=0.1)


def test_a_channel_that_dies_is_left_out_with_a_warning(samples: np.ndarray, tmp_path: Path) -> None:
    dies = samples.copy()
    dies[RATE:, 5] = 0
    with pytest.warns(BadChannelWarning, match=r"channels \[5\] of the file have no signal in a part"):
        found = learned(dies, tmp_path)
    assert found.dead.tolist() == [5]
    assert not found.matrix[5].any() and not found.matrix[:, 5].any()
    # The usual noise of the others is what it was: the reference has one channel less, of 32.
    others = np.delete(np.arange(32), 5)
    np.testing.assert_allclose(found.noise[others], learned(samples, tmp_path).noise[others], rtol=0.02)


def test_a_loud_second_does_not_enter_the_covariance(samples: np.ndarray, tmp_path: Path) -> None:
    """But for one of ten batches that is not used; if it were, variances would be several times as large."""
    loud = samples.copy()
    loud[12_000:18_000] += np.random.default_rng(0).normal(0, 300, (6000, 32)).astype(np.int16)
    found, expected = learned(loud, tmp_path), learned(samples, tmp_path)
    assert (found.n_batches, expected.n_batches) == (9, 10)
    assert difference(found, expected) < 0.05


def test_if_each_batch_is_loud_in_some_window_all_are_used(tmp_path: Path) -> None:
    """Of five batches, two are loud on one half of the channels, two on the other, and one on the half between."""
    level = np.ones((5, 32), np.float32)
    order = np.argsort(PROBE.y_um, kind="stable")
    level[:2, order[:16]], level[2:4, order[16:]], level[4, order[8:24]] = 9, 9, 9
    covariances = [np.diag(row.astype(float) ** 2) for row in level]
    learn = stage(np.random.default_rng(0).normal(0, 50, (30_000, 32)).astype(np.int16))
    measured = [Measured(*of, [0.0, 0.0]) for of in zip(covariances, level, strict=True)]
    found = learn.combine([measured], RunHere(tmp_path))
    assert found.n_batches == 5


@pytest.mark.parametrize("blocks", [3, 10])
def test_the_same_bytes_for_any_grouping(samples: np.ndarray, tmp_path: Path, blocks: int) -> None:
    loud = samples.copy()
    loud[12_000:18_000] += np.random.default_rng(0).normal(0, 300, (6000, 32)).astype(np.int16)
    one, other = learned(loud, tmp_path), learned(loud, tmp_path, blocks)
    assert one.matrix.tobytes() == other.matrix.tobytes() and one.noise.tobytes() == other.noise.tobytes()


def test_covariances_that_are_too_large_for_memory_lie_on_disk(
    samples: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learned(samples, tmp_path)
    monkeypatch.setattr("ks4stream.io.mapped.HELD_BYTES", 0)
    assert learned(samples, tmp_path).matrix.tobytes() == expected.matrix.tobytes()


@pytest.mark.parametrize(("hz", "other_hz"), [(50, 60), (60, 50)])
def test_there_is_a_warning_of_hum(hz: int, other_hz: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 30, (2 * RATE, 32))
    angle = 2 * np.pi * hz * np.arange(2 * RATE) / RATE
    wave = sum(np.cos(number * angle + number**2) for number in range(1, 40))
    settings = SETTINGS.replace(batch_size=15_000)
    noisy = np.rint(noise + 5 * wave[:, None] * np.linspace(0, 1, 32)).astype(np.float32)
    noisy[:30_000] = 0  # most batches do not count
    for given, expected in ((noisy, True), (np.rint(noise).astype(np.float32), False)):
        learn = LearnWhitening(settings, prepare(open_recording(given, fs=RATE, probe=PROBE), settings))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learn.run(RunHere(tmp_path))
        told = [str(of.message) for of in caught if issubclass(of.category, HumWarning)]
        assert len(told) == expected
        if expected:
            assert f"Mains hum at {hz} Hz" in told[0] and f"line_frequency={hz} subtracts it" in told[0]
            assert str(other_hz) not in told[0]


def test_nothing_is_learned_where_all_is_blanked(samples: np.ndarray, tmp_path: Path) -> None:
    learn = stage(samples)
    nothing = [Measured(None, np.zeros(32, np.float32), [0.0, 0.0])] * 3
    with pytest.raises(RecordingError, match=r"In all 3 batches .*, most samples are blanked"):
        learn.combine([nothing], RunHere(tmp_path))
