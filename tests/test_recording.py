"""A recording describes its samples and reads nothing until asked."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io.sources import ArraySource, ConcatenatedSource, DaskSource
from ks4stream.probe import Probe
from ks4stream.recording import BaseSource, Recording, Source


@dataclass(frozen=True)
class CountingSource(BaseSource):
    """Sample t of channel c is t + c, modulo 1000; counts what is read."""

    is_remote = False

    n_samples: int = 250
    n_channels: int = 4
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.int16))
    reads: list[tuple[int, int]] = field(default_factory=list)
    digest_is_exact: bool = True
    flat_files: str = "the samples are counted"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        self.reads.append((start, stop))
        return ((np.arange(start, stop)[:, None] + np.arange(self.n_channels)) % 1000).astype(self.dtype)

    def digest(self) -> str:
        return "counting"


def recording_of(array: NDArray[Any], **fields: Any) -> Recording:
    return Recording(ArraySource(array), 100.0, **fields)


def three_contacts() -> Probe:
    return Probe([3, 0, 2], [0, 0, 10], [0, 20, 40], [1, 1, 2])  # type: ignore[arg-type]


def test_description() -> None:
    recording = Recording(CountingSource(), 100.0)
    assert (recording.n_samples, recording.n_channels, recording.dtype) == (250, 4, np.int16)
    assert recording.duration_s == 2.5
    assert isinstance(recording.source, Source)


def test_traces_are_lazy_and_right() -> None:
    source = CountingSource()
    traces = Recording(source, 100.0, probe=three_contacts(), gain_uv=0.5, offset_uv=0.0).traces
    assert traces.dims == ("time", "channel") and traces.shape == (250, 4) and traces.dtype == np.int16
    assert traces.data.chunks == ((100, 100, 50), (4,))
    assert traces.attrs == {"sampling_rate_hz": 100.0, "gain_uv": 0.5, "offset_uv": 0.0}
    assert traces.channel.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(traces.x_um, [0, np.nan, 10, 0])
    np.testing.assert_array_equal(traces.y_um, [20, np.nan, 40, 0])
    assert traces.shank.values.tolist() == [1, -1, 2, 1]
    assert source.reads == []
    expected = CountingSource().read(0, 250)
    np.testing.assert_array_equal(traces.compute(scheduler="synchronous"), expected)
    assert sorted(source.reads) == [(0, 100), (100, 200), (200, 250)]


@pytest.mark.parametrize(
    "key",
    [
        np.s_[95:105],
        np.s_[95:105, 1],
        np.s_[7],
        np.s_[-1, -1],
        np.s_[200:100:-3, 1:3],
        np.s_[:150:50, [2, 0]],
        np.s_[5:5],
        np.s_[[3, 120]],
    ],
)
def test_slices_of_traces_read_no_more_than_they_need(key: Any) -> None:
    source = CountingSource()
    part = Recording(source, 100.0).traces.data[key].compute(scheduler="synchronous")
    np.testing.assert_array_equal(part, CountingSource().read(0, 250)[key])
    assert sum(stop - start for start, stop in source.reads) <= 200


@pytest.mark.slow
def test_traces_of_two_hundred_hours_are_made_at_once() -> None:
    source = CountingSource(n_samples=200 * 3600 * 30000, n_channels=384)
    recording = Recording(source, 30000.0)
    traces = recording.traces
    assert traces.nbytes > 2**43 and source.reads == []
    last = traces.data[-2:, 5].compute(scheduler="synchronous")
    np.testing.assert_array_equal(last, recording.read(recording.n_samples - 2, recording.n_samples)[:, 5])


@pytest.mark.parametrize(("stored", "length"), [(30, 90), (70, 70), (170, 170), (400, 400)])
def test_traces_are_cut_where_chunks_are_stored(stored: int, length: int) -> None:
    """So that each is fetched once; of joined recordings too, whose parts begin anywhere."""

    @dataclass(frozen=True)
    class Stored(CountingSource):
        @property
        def chunk_samples(self) -> int:
            return stored

    parts = (Stored(n_samples=250), CountingSource(n_samples=101), Stored(n_samples=180))
    traces = Recording(ConcatenatedSource(parts), 100.0).traces
    found = traces.compute(scheduler="synchronous")
    np.testing.assert_array_equal(found, np.concatenate([CountingSource().read(0, n) for n in (250, 101, 180)]))
    for part in (parts[0], parts[2]):
        cuts = [*range(0, part.n_samples, length), part.n_samples]
        assert sorted(part.reads) == list(pairwise(cuts))
    assert sorted(parts[1].reads) == [(0, 100), (100, 101)]


def test_traces_of_a_dask_array_are_that_array() -> None:
    array = da.ones((20, 2), dtype=np.int16, chunks=(5, 2))
    assert Recording(DaskSource(array), 100.0).traces.data.chunks == ((5, 5, 5, 5), (2,))


def test_read_is_bounded() -> None:
    recording = Recording(CountingSource(), 100.0, name="r")
    np.testing.assert_array_equal(recording.read(248, 250), [[248, 249, 250, 251], [249, 250, 251, 252]])
    assert recording.read(250, 250).shape == (0, 4)
    for start, stop in [(-1, 5), (5, 251), (6, 5)]:
        with pytest.raises(RecordingError, match=f"r: samples {start} to {stop} were requested.* 0 to 250"):
            recording.read(start, stop)


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, np.nan, np.inf])
def test_the_rate_must_be_positive(rate_hz: float) -> None:
    with pytest.raises(RecordingError, match="not a sampling rate"):
        Recording(CountingSource(), rate_hz)


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(RecordingError, match=r"empty \(0 samples of 4 channels\)"):
        Recording(CountingSource(n_samples=0), 100.0)


def test_the_probe_must_fit_the_file() -> None:
    recording = Recording(CountingSource(), 100.0)
    assert recording.with_probe(three_contacts()).probe == three_contacts()
    assert recording.probe is None
    with pytest.raises(ProbeError, match="up to 4, but the file has 4 channels"):
        recording.with_probe(Probe.from_positions([(0, 20 * i) for i in range(5)]))


def test_digest_is_of_data_and_rate() -> None:
    array = np.arange(60, dtype=np.int16).reshape(20, 3)
    recording = recording_of(array)
    assert recording_of(array.copy(), name="other", gain_uv=2.0).digest() == recording.digest()
    assert recording_of(array.astype(np.int32)).digest() != recording.digest()
    assert Recording(ArraySource(array), 101.0).digest() != recording.digest()
    array[11, 1] += 1
    assert recording_of(array).digest() != recording_of(array - np.int16(1)).digest()


def test_a_recording_can_be_pickled() -> None:
    recording = recording_of(np.arange(60, dtype=np.int16).reshape(20, 3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(recording)).read(2, 4), recording.read(2, 4))


def test_repr_is_one_line() -> None:
    assert repr(Recording(CountingSource(), 100.0, name="r")) == (
        "<Recording 'r': 2.5 s, 4 channels of int16 at 100 Hz, None>"
    )
