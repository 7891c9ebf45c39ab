"""A first look at a recording: what is dead, broken or was read in another way than it was written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal

from ks4stream import simulate
from ks4stream.errors import MisreadWarning, RecordingError
from ks4stream.io.recording_cache import cached
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import ArraySource, ConcatenatedSource
from ks4stream.probe import Probe
from ks4stream.quality import check_traces
from ks4stream.recording import BaseSource, Recording

RATE = 30_000.0


@dataclass(frozen=True)
class CountingSource(BaseSource):
    """Sample t of channel c is t + c, modulo 1000; counts what is read."""

    is_remote = False

    n_samples: int = 250
    n_channels: int = 4
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.int16))
    reads: list[tuple[int, int]] = field(default_factory=list)
    digest_is_exact: bool = True

    def read(self, start: int, stop: int) -> NDArray[Any]:
        self.reads.append((start, stop))
        return ((np.arange(start, stop)[:, None] + np.arange(self.n_channels)) % 1000).astype(self.dtype)

    def digest(self) -> str:
        return "counting"


def recording_of(array: NDArray[Any], **fields: Any) -> Recording:
    return Recording(ArraySource(array), 100.0, **fields)


# -- dead, silent, not finite --------------------------------------------------------------------------


def test_check_traces_reads_five_spots_of_a_second() -> None:
    source = CountingSource(n_samples=10_000)
    assert check_traces(Recording(source, 100.0)) == []
    assert source.reads == [(0, 100), (2475, 2575), (4950, 5050), (7425, 7525), (9900, 10_000)]


def test_check_traces_reads_all_of_a_short_recording_once() -> None:
    source = CountingSource(n_samples=250)
    assert check_traces(Recording(source, 100.0)) == []
    assert source.reads == [(0, 100), (100, 200), (200, 250)]


def test_check_traces_reads_only_what_is_sorted() -> None:
    source = CountingSource(n_samples=100_000)
    assert check_traces(Recording(source, 100.0), start=1000, stop=11_000) == []
    assert source.reads == [(1000 + start, 1100 + start) for start in (0, 2475, 4950, 7425, 9900)]


def test_check_traces_finds_dead_channels_by_their_place_in_the_file() -> None:
    array = np.random.default_rng(1).integers(-50, 50, (300, 5)).astype(np.int16)
    array[:, 1] = 7
    array[:, 4] = 0
    recording = recording_of(array)
    assert check_traces(recording) == [1, 4]
    probe = Probe([4, 0, 2], [0, 0, 0], [0, 20, 40], [0, 0, 0])  # type: ignore[arg-type]
    assert check_traces(recording.with_probe(probe)) == [4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_traces_names_the_sample_that_is_not_finite(value: float) -> None:
    array = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    array[130, 2] = value
    with pytest.raises(RecordingError, match=rf"channel 2 is {value} at sample 130 \(1\.300 s\)"):
        check_traces(recording_of(array))
    probe = Probe.from_positions([(0, 0), (0, 20)])
    assert check_traces(recording_of(array, probe=probe)) == []


def test_check_traces_refuses_silence() -> None:
    with pytest.raises(RecordingError, match="every sample checked is zero, on all 3 channels"):
        check_traces(recording_of(np.zeros((300, 3), np.int16)))
    with pytest.raises(RecordingError, match="each of the 3 channels is constant"):
        check_traces(recording_of(np.full((300, 3), 4, np.uint16)))


# -- read in another way than written ------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces() -> NDArray[np.int16]:
    """A second of 16 channels with noise that neighbours share, slow potentials, offsets and spikes."""
    made = simulate.simulate(simulate.staggered_probe(16), 1.0, seed=5, n_units=8)
    return np.asarray(made.traces)


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[..., Recording]:
    """A function that writes samples to a flat file and opens it."""

    def write(samples: NDArray[Any], n_chan: int, dtype: Any = None) -> Recording:
        path = tmp_path / "flat.bin"
        row_bytes = n_chan * np.dtype(dtype or samples.dtype).itemsize
        content = np.ascontiguousarray(samples).tobytes()
        path.write_bytes(content[: len(content) // row_bytes * row_bytes])
        return open_recording(path, n_chan=n_chan, fs=RATE, dtype=dtype or samples.dtype)

    return write


def filtered(samples: NDArray[Any], kind: str, cutoff_hz: float) -> NDArray[np.float32]:
    sos = signal.butter(3, cutoff_hz, kind, fs=RATE, output="sos")
    return np.asarray(signal.sosfiltfilt(sos, samples, axis=0), np.float32)


def white(samples: NDArray[Any], reach: float = 0.0) -> NDArray[np.int16]:
    """Noise without memory, which channels share within a reach (in channels), or all of them."""
    rng, n_channels = np.random.default_rng(2), samples.shape[1]
    own = rng.normal(0, 50, samples.shape)
    if not np.isfinite(reach):
        return (0.2 * own + rng.normal(0, 50, (len(own), 1))).astype(np.int16)
    if reach:
        apart = np.abs(np.subtract.outer(np.arange(n_channels), np.arange(n_channels)))
        own = own @ np.linalg.cholesky(np.exp(-apart / reach)).T
    return own.astype(np.int16)


def railing(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """Every fourth channel jumps from rail to rail, as those of a headstage that is not connected."""
    broken = samples.copy()
    rails = np.random.default_rng(3).integers(0, 2, broken[:, ::4].shape)
    broken[:, ::4] = np.where(rails, 32767, -32768)
    return broken


def hum(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    wave = 3000 * np.sin(2 * np.pi * 50 * np.arange(len(samples)) / RATE)
    return (samples + wave[:, None]).astype(np.int16)


def tone(samples: NDArray[np.int16], frequency_hz: float, times_noise: float = 5.0) -> NDArray[np.int16]:
    """A tone that all channels share, as from a power supply or a pump."""
    noise = np.median(np.abs(np.diff(samples.astype(float), axis=0))) / 0.6745 / np.sqrt(2)
    wave = times_noise * noise * np.cos(0.3 + 2 * np.pi * frequency_hz * np.arange(len(samples)) / RATE)
    return (samples + wave[:, None]).astype(np.int16)


def half_dead(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    dead = samples.copy()
    dead[:, 1::2] = 0
    return dead


WELL_READ: dict[str, Callable[[NDArray[np.int16]], NDArray[Any]]] = {
    "raw": lambda x: x,
    "one channel": lambda x: x[:, :1],
    "two channels": lambda x: x[:, :2],
    "a tetrode, filtered": lambda x: filtered(x[:, :4], "high", 300),
    "in another order": lambda x: x[:, np.random.default_rng(1).permutation(x.shape[1])],
    "with a sync channel": lambda x: np.c_[x, np.where(np.arange(len(x)) % 3000 < 100, 64, 0).astype(np.int16)],
    "high-pass": lambda x: filtered(x, "high", 300),
    "high-pass, referenced": lambda x: filtered(x - np.median(x, axis=1, keepdims=True), "high", 300),
    "smooth": lambda x: filtered(x, "low", 100),
    "smooth integers": lambda x: filtered(x, "low", 100).round().astype(np.int16),
    "hum": hum,
    "in microvolts": lambda x: x * np.float32(0.195),
    "in millivolts": lambda x: x * np.float32(0.195e-3),
    "in millivolts, in a narrow band": lambda x: filtered(x, "low", 2000) * np.float32(0.195e-3),
    "large offset": lambda x: (x + 15_000).astype(np.int16),
    "saturated": lambda x: np.clip(40.0 * x, -32768, 32767).astype(np.int16),
    "channels that rail": railing,
    "half dead": half_dead,
    "a tone of 10 kHz": lambda x: tone(x, 10_000),
    "a tone of half the rate": lambda x: tone(x, RATE / 2),
    "a loud tone of half the rate": lambda x: tone(x, RATE / 2, 20),
    "a tone of 7.5 kHz": lambda x: tone(x, 7500, 3),
    "a tone of 7.91 kHz": lambda x: tone(x, 7910, 4),
    "a tetrode and a tone": lambda x: tone(x[:, :4], 10_000),
    "channels that are copies": lambda x: np.repeat(x[:, :8], 2, axis=1),
    "channels that are copies, side by side": lambda x: np.tile(x[:, :8], (1, 2)),
    "all channels are copies": lambda x: np.repeat(white(x)[:, :1], 16, axis=1),
    "white noise": white,
    "white noise that neighbours share": lambda x: white(x, 8.0),
    "white noise that all share": lambda x: white(x, np.inf),
    "short": lambda x: x[:1000],
    "unsigned around the middle": lambda x: (x.astype(np.int32) + 32768).astype(np.uint16),
    "unsigned, 12 bits": lambda x: (x.astype(np.int32) + 2048).clip(0, 4095).astype(np.uint16),
}


@pytest.mark.parametrize("kind", WELL_READ)
def test_nothing_is_said_of_what_was_read_well(traces, file_of, kind):
    samples = WELL_READ[kind](traces)
    check_traces(file_of(samples, samples.shape[1]))  # warnings are errors


REFUSED: dict[str, tuple[Callable[[NDArray[np.int16]], NDArray[Any]], str, str]] = {
    "unsigned as signed": (
        lambda x: (x.astype(np.int32) + 32768).astype(np.uint16),
        "int16",
        r"on \d+ of 16 channels.*half the range of int16.*written as uint16\. Set dtype='uint16'",
    ),
    "signed as unsigned": (lambda x: x, "uint16", r"half the range of uint16.*Set dtype='int16'"),
    "bytes in the other order": (lambda x: x.astype(">i2"), "<i2", r"Set dtype='>i2'"),
    "float32 as int16": (lambda x: x * np.float32(0.195), "int16", r"written as float32\. Set dtype='float32'"),
    "float16 as int16": (lambda x: (0.195 * x).astype(np.float16), "int16", r"written as float16\. .*convert"),
    "int16 as float32": (lambda x: x, "float32", r"integers read as float32 look like this\..* Set dtype"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_type_that_is_wrong_without_doubt_is_refused(traces, file_of, mistake):
    written, dtype, message = REFUSED[mistake]
    with pytest.raises(RecordingError, match=message):
        check_traces(file_of(written(traces), 16, dtype))


def test_an_array_is_judged_by_its_type_too(traces):
    with pytest.raises(RecordingError, match=r"for an array, array\.view\('uint16'\)"):
        check_traces(open_recording((traces.astype(np.int32) + 32768).astype(np.uint16).view(np.int16), fs=RATE))


def test_a_few_channels_around_the_middle_are_told_of(traces, file_of):
    """Most have an offset, so that nothing is certain; but those few would be nonsense."""
    around_zero = traces - np.median(traces, axis=0).astype(np.int16)
    offset = np.where(np.arange(16) < 3, 0, 9000)
    unsigned = (around_zero.astype(np.int32) + 32768 + offset).astype(np.uint16)
    with pytest.warns(MisreadWarning, match=r"on 3 of 16 channels.*seem to have been written as uint16"):
        check_traces(file_of(unsigned, 16, "int16"))


@pytest.mark.parametrize("n_chan", [1, 2, 5, 8, 14, 15, 17, 18, 32, 48])
def test_a_wrong_number_of_channels_is_told_with_the_right_one(traces, file_of, n_chan):
    with pytest.warns(MisreadWarning, match=rf"seems to have 16 channels, not {n_chan}: .*Check n_chan"):
        check_traces(file_of(traces, n_chan))


def test_a_forgotten_sync_channel_is_told(traces, file_of):
    """Also where the probe's channels alone are sorted: the number is that of the file."""
    with_sync = WELL_READ["with a sync channel"](traces)
    recording = file_of(with_sync, 16).with_probe(Probe.from_positions([(0, 20), (0, 40)]))
    with pytest.warns(MisreadWarning, match="seems to have 17 channels, not 16"):
        check_traces(recording)


@pytest.mark.parametrize("n_chan", [2, 8, 17])
def test_a_wrong_number_of_channels_is_told_beside_a_tone(traces, file_of, n_chan):
    """With the right one, or where the tone comes back after three samples, three times that."""
    with pytest.warns(MisreadWarning, match=rf"seems to have (16|48) channels, not {n_chan}: "):
        check_traces(file_of(tone(traces, 10_000), n_chan))


@pytest.mark.parametrize("kind", ["raw", "high-pass", "hum", "in another order"])
def test_one_channel_after_the_other_is_told(traces, file_of, kind):
    samples = WELL_READ[kind](traces)
    with pytest.warns(MisreadWarning, match=r"one channel after the other.*shape=\(16, 30000\)\)\.T"):
        check_traces(file_of(samples.T, 16))


def test_volts_are_told_with_the_factor(traces, file_of):
    volts = traces * np.float32(0.195e-6)
    with pytest.warns(MisreadWarning, match=r"scaled otherwise: its noise is .e-0[56].*Settings\(scale=1e\+06\)"):
        check_traces(file_of(volts, 16))
    check_traces(file_of(volts, 16), scale=1e6)


def test_the_shape_of_an_array_is_believed(traces, tmp_path):
    """It is stored with it: whoever reshaped it knew more than its numbers tell."""
    wrong = traces.reshape(-1, 8)
    np.save(tmp_path / "wrong.npy", wrong)
    check_traces(open_recording(wrong, fs=RATE))
    check_traces(open_recording(tmp_path / "wrong.npy", fs=RATE))


def test_files_that_are_joined_or_cached_are_flat_still(traces, file_of, tmp_path):
    wrong = file_of(traces, 8)
    joined = Recording(ConcatenatedSource((wrong.source, wrong.source)), RATE)
    with cached(joined, tmp_path / "cache") as kept:
        for recording in (joined, kept):
            with pytest.warns(MisreadWarning, match="16 channels, not 8"):
                check_traces(recording)
    mixed = Recording(ConcatenatedSource((wrong.source, ArraySource(traces.reshape(-1, 8)))), RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_traces(mixed)
