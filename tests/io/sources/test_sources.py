"""Every source delivers the same samples, whatever they lie in."""

from __future__ import annotations

import pickle
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from sample_files import SAMPLES, write, write_zarr

from ks4stream.errors import RecordingError
from ks4stream.io.sources import (
    ArraySource,
    BinarySource,
    ConcatenatedSource,
    DaskSource,
    ZarrSource,
    delivered_dtype,
    join,
)
from ks4stream.recording import Source


def make_source(kind: str, folder: Path) -> Source:
    if kind == "binary":
        return BinarySource.open(write(folder / "a.bin", SAMPLES), 3)
    if kind == "header":
        return BinarySource.open(write(folder / "h.bin", SAMPLES, b"12345"), 3, offset_bytes=5)
    if kind == "parts":
        parts = (SAMPLES[:11], SAMPLES[11:12], SAMPLES[12:])
        files = [write(folder / f"{i}.bin", part) for i, part in enumerate(parts)]
        return ConcatenatedSource(tuple(BinarySource.open(file, 3) for file in files))
    if kind == "array":
        return ArraySource.open(SAMPLES)
    if kind == "dask":
        return DaskSource(da.from_array(SAMPLES, chunks=(4, 2)))
    return ZarrSource.open(write_zarr(folder / "z.zarr", SAMPLES, int(kind[-1])))


@pytest.mark.parametrize("kind", ["binary", "header", "parts", "array", "dask", "zarr2", "zarr3"])
def test_all_sources_deliver_the_same(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    assert isinstance(source, Source)
    assert (source.n_samples, source.n_channels, source.dtype) == (30, 3, np.int16)
    for start, stop in [(0, 30), (0, 1), (10, 13), (11, 12), (12, 30), (29, 30), (4, 4), (30, 30)]:
        block = source.read(start, stop)
        assert block.dtype == np.int16 and block.flags.writeable
        np.testing.assert_array_equal(block, SAMPLES[start:stop])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(5, 20), SAMPLES[5:20])
    assert copy.digest() == source.digest()


@pytest.mark.parametrize("kind", ["binary", "parts", "zarr2"])
def test_sources_in_files_pickle_without_their_data(kind: str, tmp_path: Path) -> None:
    big = np.zeros((100_000, 3), np.int16)
    source = make_source(kind, tmp_path)
    for file in tmp_path.glob("*.bin"):
        write(file, big)
    assert len(pickle.dumps(source)) < 2000


def test_samples_beyond_two_to_the_31(tmp_path: Path) -> None:
    n_samples = 2**31 + 10
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.seek((n_samples - 1) * 2)
        file.write(np.int16(9).tobytes())
    source = BinarySource.open(path, 1)
    assert source.n_samples == n_samples
    assert source.read(n_samples - 2, n_samples).ravel().tolist() == [0, 9]
    joined = join([source, source])
    assert joined.read(n_samples - 1, n_samples + 1).ravel().tolist() == [9, 0]
    assert joined.n_samples == 2 * n_samples


# -- types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["int16", "uint16", "int32", "float32", ">i2", ">f4", "float64"])
def test_supported_types_are_delivered_native(stored: str, tmp_path: Path) -> None:
    values = np.array([[1, 2], [300, 4], [5, 6]]).astype(stored)
    source = BinarySource.open(write(tmp_path / "a.bin", values), 2, stored)
    expected = np.dtype(np.float32) if stored == "float64" else np.dtype(stored).newbyteorder("=")
    for one in (source, ArraySource.open(values), DaskSource(da.from_array(values))):
        assert one.dtype == expected and one.read(0, 3).dtype == expected
        np.testing.assert_array_equal(one.read(1, 3), [[300, 4], [5, 6]])


@pytest.mark.parametrize("stored", ["int8", "int64", "bool", "complex64", "S2"])
def test_other_types_are_refused(stored: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="supported are int16, uint16, int32, float32"):
        ArraySource(np.zeros((4, 2), stored))
    with pytest.raises(RecordingError, match="supported are int16"):
        BinarySource.open(write(tmp_path / "a.bin", SAMPLES), 3, stored)


def test_unknown_type_names_are_refused() -> None:
    with pytest.raises(RecordingError, match="'int17' is not a NumPy dtype"):
        delivered_dtype("int17")
