"""Flat files: what is refused, and what their digest follows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sample_files import SAMPLES, write

from ks4stream.errors import RecordingError
from ks4stream.io.sources import BinarySource


def test_a_size_that_is_not_a_multiple_is_refused_with_all_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", SAMPLES, header=b"xy")
    with pytest.raises(RecordingError, match=r"182 bytes.*3 channels × 2 bytes \(int16\): 2 bytes are left over"):
        BinarySource.open(path, 3)
    assert BinarySource.open(path, 3, offset_bytes=2).n_samples == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_channels": 0}, "n_chan=0 is not possible; give the number of channels"),
        ({"n_channels": 3, "offset_bytes": -2}, "offset_bytes=-2"),
        ({"n_channels": 3, "offset_bytes": 180}, r"holds no samples \(180 bytes\)"),
    ],
)
def test_impossible_descriptions_are_refused(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=message):
        BinarySource.open(write(tmp_path / "a.bin", SAMPLES), **arguments)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="There is no file"):
        BinarySource.open(tmp_path / "none.bin", 3)
    with pytest.raises(RecordingError, match="holds no samples"):
        BinarySource.open(write(tmp_path / "a.bin", SAMPLES[:0]), 3)


def test_a_file_that_shrinks_or_goes_is_an_error_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", SAMPLES)
    source = BinarySource.open(path, 3)
    write(path, SAMPLES[:20])
    np.testing.assert_array_equal(source.read(0, 20), SAMPLES[:20])
    with pytest.raises(RecordingError, match="ends before sample 30: it has been truncated"):
        source.read(15, 30)
    path.unlink()
    with pytest.raises(RecordingError, match=r"a\.bin cannot be read"):
        source.read(0, 5)


def test_the_digest_of_a_file_follows_its_time_and_not_its_folder(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    paths = [write(tmp_path / "a.bin", SAMPLES), write(tmp_path / "moved" / "a.bin", SAMPLES)]
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))
    sources = [BinarySource.open(path, 3) for path in paths]
    assert sources[0].digest() == sources[1].digest()
    assert sources[0].digest() != BinarySource.open(paths[0], 9).digest()
    os.utime(paths[0], ns=(10**18, 10**18 + 1))
    assert sources[0].digest() != sources[1].digest()
