"""Every source delivers the same samples, whatever they lie in."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.sources import (
    ArraySource,
    BinarySource,
    ConcatenatedSource,
    DaskSource,
    Source,
    ZarrSource,
    delivered_dtype,
    join,
)

SAMPLES = (np.arange(90).reshape(30, 3) * 7 % 100).astype(np.int16)


def write(path: Path, array: NDArray[Any], header: bytes = b"") -> Path:
    path.write_bytes(header + array.tobytes())
    return path


def write_zarr(path: Path, array: NDArray[Any], zarr_format: int = 2) -> Path:
    # Zarr 2 of the library has one format and no argument for it.
    options = {"zarr_format": zarr_format} if int(zarr.__version__.split(".")[0]) >= 3 else {}
    stored = zarr.open_array(str(path), mode="w", shape=array.shape, dtype=array.dtype, chunks=(7, 2), **options)
    stored[:] = array
    return path


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
    with pytest.raises(RecordingError, match="'int17' is not known to NumPy"):
        delivered_dtype("int17")


# -- flat files ----------------------------------------------------------------------------------------


def test_a_size_that_is_no_multiple_is_refused_with_all_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", SAMPLES, header=b"xy")
    with pytest.raises(RecordingError, match=r"182 bytes.*3 channels × 2 bytes \(int16\): 2 bytes are left over"):
        BinarySource.open(path, 3)
    assert BinarySource.open(path, 3, offset_bytes=2).n_samples == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_channels": 0}, "n_chan=0: a file has at least one channel"),
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
    with pytest.raises(RecordingError, match="ends before sample 30: it has become shorter"):
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


# -- joined --------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecordingError, match="part 1 has 2 channels of int16, part 0 has 3 of int16"):
        ConcatenatedSource((ArraySource(SAMPLES), ArraySource(SAMPLES[:, :2])))
    with pytest.raises(RecordingError, match="part 1 has 3 channels of int32"):
        ConcatenatedSource((ArraySource(SAMPLES), ArraySource(SAMPLES.astype(np.int32))))
    with pytest.raises(RecordingError, match="No parts"):
        ConcatenatedSource(())


def test_empty_parts_are_passed_over() -> None:
    parts = (SAMPLES[:0], SAMPLES[:5], SAMPLES[:0], SAMPLES[5:])
    source = ConcatenatedSource(tuple(ArraySource(part) for part in parts))
    np.testing.assert_array_equal(source.read(0, 30), SAMPLES)
    np.testing.assert_array_equal(source.read(4, 6), SAMPLES[4:6])


def test_join_leaves_a_single_source_alone() -> None:
    source = ArraySource(SAMPLES)
    assert join([source]) is source


# -- arrays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12,), (2, 3, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordingError, match=r"two dimensions are needed, \(time, channel\)"):
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
    monkeypatch.setattr("ks4stream.io.sources._DIGEST_WHOLE_BYTES", 1000)
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


# -- Dask and Zarr -------------------------------------------------------------------------------------


def test_dask_arrays_are_computed_only_where_read() -> None:
    computed: list[int] = []

    def block(block_id: tuple[int, int]) -> NDArray[Any]:
        computed.append(block_id[0])
        return np.full((10, 2), block_id[0], np.int16)

    array = da.map_blocks(block, chunks=((10,) * 5, (2,)), dtype=np.int16, meta=np.empty((0, 0), np.int16))
    source = DaskSource(array)
    assert computed == []
    assert source.read(18, 22)[:, 0].tolist() == [1, 1, 2, 2]
    assert sorted(computed) == [1, 2]


def test_dask_arrays_of_unknown_length_are_refused() -> None:
    array = da.from_array(SAMPLES, chunks=(5, 3))
    with pytest.raises(RecordingError, match="compute_chunk_sizes"):
        DaskSource(array[array[:, 0] > 3])


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


def test_what_is_no_zarr_array_is_refused(tmp_path: Path) -> None:
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
