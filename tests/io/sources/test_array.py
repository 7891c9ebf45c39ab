"""Arrays and memory maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_files import SAMPLES, write

from ks4stream.errors import RecordingError
from ks4stream.io.sources import ArraySource, BinarySource


@pytest.mark.parametrize("shape", [(12,), (2, 3, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordingError, match=r"must have two dimensions, \(time, channel\)"):
        ArraySource(np.zeros(shape, np.int16))


@pytest.mark.parametrize("select", [np.s_[:], np.s_[4:21], np.s_[29:30]])
def test_memory_maps_of_files_are_read_from_the_file(select: slice, tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", SAMPLES, header=b"123456")
    mapping = np.memmap(path, np.int16, mode="r", offset=6).reshape(-1, 3)[select]
    source = ArraySource.open(mapping)
    assert isinstance(source, BinarySource) and source.path == str(path)
    np.testing.assert_array_equal(source.read(0, source.n_samples), SAMPLES[select])


def test_memory_maps_that_are_not_plain_stretches_stay_arrays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", SAMPLES)
    mapping = np.memmap(path, np.int16, mode="r", shape=(30, 3))
    for view in (mapping[:, 1:], mapping[::2]):
        source = ArraySource.open(view)
        assert isinstance(source, ArraySource)
        np.testing.assert_array_equal(source.read(0, source.n_samples), view)
    changed = np.memmap(path, np.int16, mode="c", shape=(30, 3))
    changed[0, 0] = 99
    assert ArraySource.open(changed).read(0, 1)[0, 0] == 99


def test_what_is_read_from_an_array_is_a_copy() -> None:
    array = SAMPLES.copy()
    ArraySource(array).read(0, 5)[:] = 0
    np.testing.assert_array_equal(array, SAMPLES)


def test_large_arrays_are_digested_by_samples_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ks4stream.io.sources.array._DIGEST_WHOLE_BYTES", 1000)
    array = np.zeros((100_000, 2), np.int16)
    digest = ArraySource(array).digest()
    array[2000] = 1  # between two of the places looked at
    assert ArraySource(array).digest() == digest
    array[-1] = 1
    assert ArraySource(array).digest() != digest


def test_small_arrays_are_digested_whole() -> None:
    array = np.zeros((5000, 2), np.int16)
    digests = {ArraySource(array).digest()}
    for sample in (0, 1023, 1024, 2500, 4999):
        array[sample, 1] += 1
        digests.add(ArraySource(array).digest())
    assert len(digests) == 6
