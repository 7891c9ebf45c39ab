"""Zarr arrays; what is damaged is tested in test_zarrs.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from sample_files import SAMPLES, write_zarr

from ks4stream.errors import RecordingError
from ks4stream.io.sources import ZarrSource


def test_zarr_arrays_within_a_group(tmp_path: Path) -> None:
    write_zarr(tmp_path / "g" / "raw" / "ap", SAMPLES)
    source = ZarrSource.open(tmp_path / "g" / "raw" / "ap")
    np.testing.assert_array_equal(source.read(3, 9), SAMPLES[3:9])


def test_zarr_digest_follows_the_samples(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", SAMPLES)
    source = ZarrSource.open(path)
    digest = source.digest()
    zarr.open_array(str(path), mode="r+")[3, 1] = 99
    assert source.digest() != digest


def test_a_zarr_array_that_is_replaced_is_opened_again(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", SAMPLES)
    assert ZarrSource.open(path).n_samples == 30
    os.utime(path / ".zarray" if (path / ".zarray").exists() else path / "zarr.json", ns=(0, 0))
    write_zarr(path, SAMPLES[:8])
    assert ZarrSource.open(path).n_samples == 8


def test_what_is_not_a_zarr_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="is not a Zarr array"):
        ZarrSource.open(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ".zarray").write_text("{}")
    with pytest.raises(RecordingError, match="cannot be opened as a Zarr array"):
        ZarrSource.open(tmp_path / "broken")
    with pytest.raises(RecordingError, match="two dimensions"):
        ZarrSource.open(write_zarr_vector(tmp_path / "v.zarr"))


def write_zarr_vector(path: Path) -> Path:
    zarr.open_array(str(path), mode="w", shape=(4,), dtype=np.int16)[:] = 1
    return path
