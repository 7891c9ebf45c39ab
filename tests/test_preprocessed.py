"""Preprocessed traces: lazy, and the very values the stages see."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream import simulate
from ks4stream.errors import ProbeError, RecordingError, SettingsError
from ks4stream.io.recording_cache import lifetime
from ks4stream.io.sources import ArraySource
from ks4stream.preprocessed import preprocess
from ks4stream.recording import BaseSource, Recording
from ks4stream.results import Drift, PeakSample, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare
from ks4stream.stages.detection import Detect, Peaks
from ks4stream.stages.drift import DriftResult, EstimateDrift
from ks4stream.stages.preprocessing import Preprocessor

PROBE = simulate.staggered_probe(8)
N_SAMPLES = 40_000
SETTINGS = Settings(batch_size=6000, nearest_chans=8)


@dataclass
class CountingSource:
    """A source that notes every stretch that is read."""

    source: ArraySource
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, start: int, stop: int) -> Any:
        self.reads.append((start, stop))
        return self.source.read(start, stop)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return simulate.simulate(PROBE, 2.0, seed=2, n_units=2).read(0, N_SAMPLES)


@pytest.fixture
def recording(samples: np.ndarray) -> Recording:
    return Recording(CountingSource(ArraySource(samples)), 30_000.0, PROBE)  # type: ignore[arg-type]


@pytest.fixture
def whitening() -> Whitening:
    draw = np.random.default_rng(1)
    return Whitening(np.eye(8) * 0.2 + draw.normal(0, 0.01, (8, 8)), np.zeros(0), 3)


def moving(n_batches: int) -> Drift:
    return Drift(np.linspace(-12, 12, n_batches)[:, None], [80.0])


def seen_by_stages(source: Preprocessor) -> np.ndarray:
    tiles = [source.whitened(tile)[0][:, source.core(tile)] for tile in source.tiling]
    return np.concatenate([traces.numpy() for traces in tiles], axis=1).T


def test_nothing_is_read_before_it_is_computed(recording: Recording, whitening: Whitening) -> None:
    traces = preprocess(recording, SETTINGS, whitening=whitening, drift=moving(7), device="cpu")
    reads = recording.source.reads  # type: ignore[attr-defined]
    assert reads == []
    assert traces.dims == ("time", "channel")
    assert traces.dtype == np.float32
    assert traces.chunks == ((6000,) * 6 + (4000,), (8,))
    found = traces.sel(time=slice(13_000, 13_099)).compute(scheduler="synchronous")
    assert len(reads) == 1, "one tile holds what was asked for"
    assert found.shape == (100, 8)
    np.testing.assert_array_equal(found.time, np.arange(13_000, 13_100))


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_far_is_fetched_once(
    samples: np.ndarray, whitening: Whitening, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the array or what was made of it lives, whatever is computed, though batches see their neighbours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lifetime, "PIECE_BYTES", 8 * 2 * 500)
    far = CountingSource(ArraySource(samples))
    far.is_remote = True  # type: ignore[attr-defined]
    recording = Recording(far, 30_000.0, PROBE)  # type: ignore[arg-type]
    traces = preprocess(
        recording, SETTINGS, whitening=whitening, drift=moving(7), device="cpu", cache_dir=None if keeps else "off"
    )
    assert far.reads == [] and not list(tmp_path.rglob("*.piece"))
    scheduler = "threads" if keeps else "synchronous"  # threads hold what each read last
    first = traces.compute(scheduler=scheduler)
    part = traces[9000:27_000]
    del traces
    gc.collect()
    np.testing.assert_array_equal(part.compute(scheduler=scheduler), first[9000:27_000])
    np.testing.assert_array_equal(first, from_memory(samples, whitening))
    once = [(start, start + 500) for start in range(0, N_SAMPLES, 500)]
    assert (sorted(far.reads) == once) == keeps and set(far.reads) == set(once)
    assert bool(list(tmp_path.rglob("*.piece"))) == keeps
    del part
    gc.collect()
    assert not list(tmp_path.rglob("*.piece"))


def from_memory(samples: np.ndarray, whitening: Whitening) -> np.ndarray:
    recording = Recording(ArraySource(samples), 30_000.0, PROBE)
    traces = preprocess(recording, SETTINGS, whitening=whitening, drift=moving(7), device="cpu")
    return traces.compute(scheduler="synchronous").values


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_CAR": False}, {"invert_sign": True}])
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_values_are_those_of_the_stages(
    recording: Recording, whitening: Whitening, scheduler: str, options: dict[str, bool]
) -> None:
    settings = SETTINGS.replace(**options)
    traces = preprocess(recording, settings, whitening=whitening, drift=moving(7), device="cpu")
    source = prepare(recording, settings).with_whitening(whitening).with_drift(moving(7), settings)
    np.testing.assert_array_equal(traces.compute(scheduler=scheduler), seen_by_stages(source))


def test_the_crop_has_its_own_time(recording: Recording, whitening: Whitening) -> None:
    settings = SETTINGS.replace(tmin=0.1, tmax=1.0)
    traces = preprocess(recording, settings, whitening=whitening, device="cpu")
    np.testing.assert_array_equal(traces.time, np.arange(3000, 30_000))
    later = preprocess(recording, settings.replace(batch_downsampling=2), whitening=whitening, device="cpu")
    assert later.shape == (12_000, 8)  # four and a half batches: the first and the third
    np.testing.assert_array_equal(later.time, np.r_[3000:9000, 15_000:21_000])
    np.testing.assert_array_equal(later, traces.sel(time=later.time))


def test_a_long_recording_costs_no_memory(whitening: Whitening) -> None:
    """Two hundred hours: 10^10 samples of which none exists."""
    n_samples = 200 * 3600 * 30_000

    class Endless(BaseSource):
        is_remote = False
        n_channels, dtype, digest_is_exact = 8, np.dtype(np.int16), True

        def __init__(self) -> None:
            self.n_samples = n_samples

        def read(self, start: int, stop: int) -> np.ndarray:
            return np.random.default_rng(start).integers(-99, 99, (stop - start, 8), np.int16)

        def digest(self) -> str:
            return "endless"

    recording = Recording(Endless(), 30_000.0, PROBE)  # type: ignore[arg-type]
    traces = preprocess(recording, Settings(batch_size=30_000_000), whitening=whitening, device="cpu")
    assert traces.sizes["time"] == n_samples
    assert traces.time[-1] == n_samples - 1


def test_what_is_not_given_is_learned(recording: Recording) -> None:
    traces = preprocess(recording, SETTINGS, client="loop", device="cpu")
    whitened = traces.compute(scheduler="synchronous").values
    covariance = np.cov(whitened.T)
    # All eight channels are within the whitening range, so the covariance is the identity; half of the signal used
    # here are spikes and a few batches' estimate is averaged over batches of different length, hence the tolerance.
    np.testing.assert_allclose(covariance, np.eye(8), atol=0.05)


@pytest.mark.slow
def test_drift_may_be_estimated_on_the_way(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is the sorter's own; here its last step is replaced by a known answer."""

    asked = []

    def known(estimate: EstimateDrift, run: Any) -> DriftResult:
        asked.append(estimate.peaks)
        return DriftResult(moving(7), PeakSample(np.zeros(0), np.zeros(0), np.zeros(0)))

    monkeypatch.setattr(EstimateDrift, "run", known)
    with pytest.warns(UserWarning, match="clean spikes"):
        traces = preprocess(recording, SETTINGS, drift="estimate", client="loop", device="cpu")
    assert len(asked) == 1
    unmoved = preprocess(recording, SETTINGS, client="loop", device="cpu").compute(scheduler="synchronous")
    change = abs(traces.compute(scheduler="synchronous") - unmoved).mean(dim="channel").values
    assert change[18_000:24_000].mean() < 0.2 * change[:6000].mean()  # moved by 0 µm, and by −12


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_drift_is_estimated_from_channels_with_a_signal(samples: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sort: templates do not lie on the channel that is dead."""
    seen: list[np.ndarray] = []

    def looked_for(detect: Detect, run: Any) -> Peaks:
        seen.append(detect.centres.channels)
        return Peaks([])

    monkeypatch.setattr(Detect, "run", looked_for)
    monkeypatch.setattr(EstimateDrift, "run", lambda *_: DriftResult(moving(7), PeakSample(*np.zeros((3, 0)))))
    samples = samples.copy()
    samples[:, 3] = 0
    preprocess(
        Recording(ArraySource(samples), 30_000.0, PROBE), SETTINGS, drift="estimate", client="loop", device="cpu"
    )
    assert 2 in seen[0] and 3 not in seen[0]


def test_what_does_not_belong_is_refused(recording: Recording, whitening: Whitening) -> None:
    with pytest.raises(ProbeError, match="for 5 channels, but recording has 8"):
        preprocess(recording, SETTINGS, whitening=Whitening(np.eye(5), np.zeros(0)))
    with pytest.raises(RecordingError, match="for 6 batches, but recording has 7 of batch_size=6000"):
        preprocess(recording, SETTINGS, whitening=whitening, drift=moving(6))
    with pytest.raises(SettingsError, match="drift='guess' is not valid"):
        preprocess(recording, SETTINGS, whitening=whitening, drift="guess")
    with pytest.raises(ProbeError, match="has no probe"):
        preprocess(recording.with_probe(None), SETTINGS, whitening=whitening)
