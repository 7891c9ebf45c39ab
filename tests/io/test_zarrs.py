"""Zarr that is incomplete or damaged is an error with what to do, when it is opened and while it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from ks4stream.errors import Ks4StreamWarning, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import ZarrSource

SAMPLES = np.random.default_rng(2).normal(0, 50, (3000, 4)).astype(np.int16)  # does not compress well
IS_ZARR_3 = int(zarr.__version__.partition(".")[0]) >= 3
FORMATS = [2, 3] if IS_ZARR_3 else [2]


def options(zarr_format: int) -> dict[str, Any]:
    return {"zarr_format": zarr_format} if IS_ZARR_3 else {}


def write_zarr(path: Path, samples: Any = SAMPLES, zarr_format: int = 2, **more: Any) -> Path:
    """Chunks of 700 samples, the last of 200."""
    array = zarr.open_array(
        str(path),
        mode="w",
        shape=samples.shape,
        dtype=samples.dtype,
        chunks=(700, *samples.shape[1:]),
        **options(zarr_format),
        **more,
    )
    array[:] = samples
    array.attrs["sampling_frequency"] = 1000.0
    return path


def write_spikeinterface(path: Path, n_segments: int = 2) -> Path:
    group = zarr.open_group(str(path), mode="w", **options(2))
    group.attrs.update({"sampling_frequency": 1000.0, "num_segments": n_segments})
    for segment in range(n_segments):
        write_zarr(path / f"traces_seg{segment}")
    zarr.open_group(str(path / "properties"), mode="w", **options(2))
    write_zarr(path / "properties" / "gain_to_uV", np.full(4, 0.195))
    return path


def chunk(path: Path, number: int) -> Path:
    for name in (f"{number}.0", f"{number}/0", f"c/{number}/0"):
        if (path / name).is_file():
            return path / name
    raise AssertionError(sorted(path.rglob("*")))


@contextmanager
def limited_memory(n_bytes: int = 2**30) -> Iterator[None]:
    """Let this process have so many bytes of addresses more than it has."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("where the process stands is not told here")
    has = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def metadata(path: Path) -> Path:
    return path / ("zarr.json" if (path / "zarr.json").exists() else ".zarray")


@pytest.fixture(params=[*FORMATS, "blosc", "raw", "nested"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same samples in each way in which chunks are stored."""
    more: dict[Any, dict[str, Any]] = {
        "blosc": {"compressor": numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE)},  # SpikeInterface's own
        "raw": {"compressor": None},
        "nested": {"dimension_separator": "/"},
    }
    zarr_format = request.param if isinstance(request.param, int) else 2
    return write_zarr(tmp_path / "a.zarr", zarr_format=zarr_format, **more.get(request.param, {}))


# -- a codec that is not installed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "package"),
    [
        ("wavpack", r"pip install wavpack-numcodecs\."),
        ("flac", r"pip install flac-numcodecs\."),
        ("imagecodecs_jpegxl", r"pip install imagecodecs-numcodecs\."),
        ("of_our_own", "the package that registers of_our_own for numcodecs"),
    ],
)
@pytest.mark.parametrize("zarr_format", FORMATS)
def test_the_package_of_a_codec_is_named(zarr_format: int, codec: str, package: str, tmp_path: Path) -> None:
    path = write_spikeinterface(tmp_path / "si.zarr") if zarr_format == 2 else tmp_path / "a.zarr"
    array = path / "traces_seg0" if zarr_format == 2 else write_zarr(path, zarr_format=3)
    described = json.loads(metadata(array).read_text())
    if zarr_format == 2:
        described["compressor"] = {"id": codec, "level": 1}
    else:
        described["codecs"] = [described["codecs"][0], {"name": f"numcodecs.{codec}", "configuration": {}}]
    metadata(array).write_text(json.dumps(described))
    with pytest.raises(RecordingError, match=rf"compressed with {codec}, which is not installed here.*{package}"):
        open_recording(path)


# -- a codec that executes -----------------------------------------------------------------------------


class Executes(numcodecs.abc.Codec):  # type: ignore[misc]
    """Stands for numcodecs' own, which has unpickled in some versions and refuses to in others."""

    codec_id = "pickle"
    n_decoded = 0

    def encode(self, buf: Any) -> Any:
        return buf

    def decode(self, buf: Any, out: Any = None) -> Any:
        Executes.n_decoded += 1
        return buf


@pytest.mark.parametrize("place", ["compressor", "filters", "properties", "codecs"])
def test_metadata_that_name_pickle_are_refused_and_nothing_is_decoded(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "codecs" and not IS_ZARR_3:
        pytest.skip("version 2 has no such metadata")
    monkeypatch.setitem(numcodecs.registry.codec_registry, "pickle", Executes)
    monkeypatch.setattr(Executes, "n_decoded", 0)
    if place == "codecs":
        array = path = write_zarr(tmp_path / "a.zarr", zarr_format=3)
    else:
        path = write_spikeinterface(tmp_path / "si.zarr")
        array = path / ("properties/gain_to_uV" if place == "properties" else "traces_seg0")
    described = json.loads(metadata(array).read_text())
    codec = {"id": "pickle"}
    described |= {
        "compressor": {"compressor": codec},
        "properties": {"compressor": codec},
        "filters": {"filters": [codec]},
        "codecs": {"codecs": [described.get("codecs", [None])[0], {"name": "numcodecs.pickle", "configuration": {}}]},
    }[place]
    metadata(array).write_text(json.dumps(described))
    with pytest.raises(RecordingError, match="names the codec 'pickle', which would execute"):
        open_recording(path).read(0, 700)
    assert not Executes.n_decoded


# -- when it is opened ---------------------------------------------------------------------------------


def test_whole_arrays_are_opened_without_a_word(stored: Path) -> None:
    source = ZarrSource.open(stored)
    assert source.is_complete
    np.testing.assert_array_equal(source.read(0, 3000), SAMPLES)


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize(
    "change", ["", "{", "[]", "null", "cut", '("shape", [-3000, 4])', '("shape", ["x", 4])', '("shape", null)']
)
def test_damaged_metadata_are_an_error(zarr_format: int, change: str, tmp_path: Path) -> None:
    path = metadata(write_zarr(tmp_path / "a.zarr", zarr_format=zarr_format))
    text = path.read_text()
    if change.startswith("("):
        name, value = json.loads(f"[{change[1:-1]}]")
        path.write_text(json.dumps(json.loads(text) | {name: value}))
    else:
        path.write_text(text[:-30] if change == "cut" else change)
    with pytest.raises(RecordingError, match=r"a\.zarr.*(copy|Copy) it again"):
        open_recording(tmp_path / "a.zarr")


def test_damaged_members_of_a_group_are_an_error(tmp_path: Path) -> None:
    whole = write_spikeinterface(tmp_path / "si.zarr")
    assert open_recording(whole).gain_uv == 0.195
    for number, damage in enumerate(["attributes", "segments", "first", "second", "array", "gain", "gain's chunk"]):
        path = Path(shutil.copytree(whole, tmp_path / f"{number}.zarr"))
        message = "Copy it again|copy it again"
        if damage == "attributes":
            (path / ".zattrs").write_text('{"sampling_freq')
        elif damage == "segments":
            (path / ".zattrs").write_text('{"sampling_frequency": 1000.0, "num_segments": "two"}')
        elif damage in ("first", "second"):
            segment = ("first", "second").index(damage)
            shutil.rmtree(path / f"traces_seg{segment}")
            message = rf"should hold 2 segment\(s\), but traces_seg{segment} cannot be found"
        elif damage == "array":
            (path / "traces_seg0" / ".zarray").write_text("{")
        elif damage == "gain":
            (path / "properties" / "gain_to_uV" / ".zarray").write_text("{")
        else:
            (path / "properties" / "gain_to_uV" / "0").write_bytes(b"x")
        with pytest.raises(RecordingError, match=message):
            open_recording(path)


def test_chunks_that_are_not_stored_are_told_of(stored: Path) -> None:
    """By Zarr's rules they are the fill value, and may have been left out on purpose."""
    chunk(stored, 4).unlink()
    with pytest.warns(Ks4StreamWarning, match=r"1 of the 5 chunks .*\(samples 2800 to 3000\), and read as 0"):
        source = ZarrSource.open(stored)
    assert not source.is_complete and not source.read(2800, 3000).any()
    chunk(stored, 3).unlink()
    chunk(stored, 1).unlink()
    with pytest.warns(Ks4StreamWarning, match=r"3 of the 5 chunks .*\(samples 700 to 1400, 2100 to 3000\)"):
        open_recording(stored)
    for number in (0, 2):
        chunk(stored, number).unlink()
    with pytest.raises(RecordingError, match=r"none of its 5 chunks\. Copy it again"):
        open_recording(stored)


def test_metadata_that_promise_too_much_are_an_error_and_take_no_memory(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr")
    described = json.loads(metadata(path).read_text())
    metadata(path).write_text(json.dumps(described | {"shape": [10**12, 4], "chunks": [700, 4]}))
    with limited_memory(), pytest.raises(RecordingError, match="should have 1428571429 chunks, but 5 are stored"):
        open_recording(path)
    group = write_spikeinterface(tmp_path / "si.zarr")
    attributes = json.loads((group / ".zattrs").read_text())
    (group / ".zattrs").write_text(json.dumps(attributes | {"num_segments": 10**10}))
    with limited_memory(), pytest.raises(RecordingError, match=r"10000000000 .*traces_seg2 cannot be found"):
        open_recording(group)


def test_an_empty_chunk_is_an_error_at_once(stored: Path) -> None:
    chunk(stored, 2).write_bytes(b"")
    with pytest.raises(RecordingError, match=r"a chunk of the recording, is empty"):
        open_recording(stored)


def test_a_store_that_may_not_be_listed_is_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise RecordingError("may not be listed")

    monkeypatch.setattr("ks4stream.io.zarrs.listing", refuse)
    source = ZarrSource.open(stored)
    assert not source.is_complete
    np.testing.assert_array_equal(source.read(0, 3000), SAMPLES)


@pytest.mark.skipif(not IS_ZARR_3, reason="version 2 of zarr has no shards")
def test_shards_are_counted_and_not_the_chunks_in_them(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    array = zarr.create_array(str(path), shape=(3000, 4), dtype="int16", shards=(1400, 4), chunks=(700, 2))
    array[:] = SAMPLES
    source = ZarrSource.open(path)
    assert source.is_complete
    np.testing.assert_array_equal(source.read(10, 2990), SAMPLES[10:2990])
    shard = chunk(path, 1)
    content = shard.read_bytes()
    shard.write_bytes(content[:-40])
    with pytest.raises(RecordingError, match=r"Samples 1500 to 1600 of .* cannot be read"):
        source.read(1500, 1600)
    shard.unlink()
    with pytest.raises(RecordingError, match="has gone since"):
        source.read(1500, 1600)


# -- while it is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 17, 500, -1])
def test_a_chunk_that_is_cut_short_is_an_error(stored: Path, keep: int) -> None:
    source = ZarrSource.open(stored)
    damaged = chunk(stored, 1)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:keep])
    with pytest.raises(RecordingError, match=r"Samples 1300 to 1500 of .* cannot be read|was cut short"):
        source.read(1300, 1500)
    np.testing.assert_array_equal(source.read(1400, 3000), SAMPLES[1400:])


def test_noise_in_place_of_a_chunk_is_an_error(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr")
    source = ZarrSource.open(path)
    chunk(path, 1).write_bytes(np.random.default_rng(1).bytes(900))
    with pytest.raises(RecordingError, match=r"Copy"):
        source.read(700, 701)


def test_a_chunk_that_goes_is_an_error_and_not_zeros(stored: Path) -> None:
    source = ZarrSource.open(stored)
    source.read(0, 3000)
    chunk(stored, 1).unlink()
    with pytest.raises(RecordingError, match="has gone since the recording was opened"):
        source.read(1300, 1500)
    shutil.rmtree(stored)  # as where a disk is no longer mounted
    with pytest.raises(RecordingError, match="has gone since the recording was opened"):
        source.read(0, 10)


def test_an_array_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    source = ZarrSource.open(write_zarr(tmp_path / "a.zarr"))
    write_zarr(tmp_path / "a.zarr", SAMPLES[:1400])
    with pytest.raises(RecordingError, match=r"ends before sample 1500: .* when it held 3000 samples"):
        source.read(1300, 1500)


@pytest.fixture
def url(object_store: Any, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    write_zarr(tmp_path / "a.zarr", compressor=numcodecs.Blosc())
    yield object_store.put(tmp_path / "a.zarr", "damaged/a.zarr"), object_store
    keys = object_store.client.list_objects_v2(Bucket="recordings", Prefix="damaged/").get("Contents", [])
    for found in keys:
        object_store.client.delete_object(Bucket="recordings", Key=found["Key"])


def test_objects_are_looked_at_as_files_are(url: tuple[str, Any]) -> None:
    address, object_store = url
    source = ZarrSource.open(address)
    assert source.is_complete
    np.testing.assert_array_equal(source.read(0, 3000), SAMPLES)
    content = object_store.client.get_object(Bucket="recordings", Key="damaged/a.zarr/1.0")["Body"].read()
    object_store.put(content[:-30], "damaged/a.zarr/1.0")
    with pytest.raises(RecordingError, match=r"s3://.*1\.0, a chunk of the recording, was cut short: it has"):
        source.read(700, 800)
    object_store.client.delete_object(Bucket="recordings", Key="damaged/a.zarr/1.0")
    with pytest.raises(RecordingError, match=r"s3://.*1\.0, a chunk of the recording, has gone"):
        source.read(700, 800)
    with pytest.warns(Ks4StreamWarning, match=r"1 of the 5 chunks of s3://.*samples 700 to 1400"):
        assert not ZarrSource.open(address).read(700, 800).any()
    object_store.put(b"", "damaged/a.zarr/2.0")
    with pytest.raises(RecordingError, match=r"s3://.*2\.0, a chunk of the recording, is empty"):
        ZarrSource.open(address)
