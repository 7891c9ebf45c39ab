"""Recordings on a real S3 server and on a web server: the same as on disk, through failures, without secrets."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ks4stream.errors import MissingDependencyError, RecordingError
from ks4stream.io import objects
from ks4stream.io.formats import HEAD_BYTES
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import ZarrSource

pytest.importorskip("obstore")
pytest.importorskip("moto")

IS_ZARR_3 = int(zarr.__version__.partition(".")[0]) >= 3
SAMPLES = np.random.default_rng(1).integers(-999, 999, (3000, 4)).astype(np.int16)
AIND = "ecephys_compressed/experiment1_Record Node 104#Neuropix-PXI-100.ProbeA-AP.zarr"
META = """typeThis=imec
nSavedChans=4
imSampRate=30000
snsApLfSy=3,0,1
fileSizeBytes=24000
~snsGeomMap=(NP2013,1,250,70)(0:0:0:1)(0:32:0:1)(0:0:20:1)
"""


def write_zarr(path: Path, samples: Any = SAMPLES, **options: Any) -> Path:
    zarr_format = options.pop("zarr_format", 2)
    more = {"zarr_format": zarr_format} if IS_ZARR_3 else {}
    if "shards" in options:
        array = zarr.create_array(str(path), shape=samples.shape, dtype=samples.dtype, **options, **more)
    else:
        chunks = options.get("chunks", (700, *samples.shape[1:]))
        array = zarr.open_array(str(path), mode="w", shape=samples.shape, dtype=samples.dtype, chunks=chunks, **more)
    array[:] = samples
    array.attrs["sampling_frequency"] = 1000.0
    return path


def write_spikeinterface(path: Path, segments: Any = (SAMPLES[:1100], SAMPLES[1100:])) -> Path:
    group = zarr.open_group(str(path), mode="w", **({"zarr_format": 2} if IS_ZARR_3 else {}))
    group.attrs.update({"sampling_frequency": 1000.0, "num_segments": len(segments)})
    for number, samples in enumerate(segments):
        write_zarr(path / f"traces_seg{number}", samples)
    write_zarr(path / "properties" / "gain_to_uV", np.full((4, 1), 0.195))
    zarr.open_group(str(path / "properties"), mode="a")
    return path


def write_group(path: Path) -> Path:
    zarr.open_group(str(path), mode="w", **({"zarr_format": 2} if IS_ZARR_3 else {}))
    write_zarr(path / "ap")
    return path


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "zarr 2": write_zarr,
    "channels apart": lambda path: write_zarr(path, chunks=(700, 3)),
    "group": write_group,
    "spikeinterface": write_spikeinterface,
}
if IS_ZARR_3:
    LAYOUTS["zarr 3"] = lambda path: write_zarr(path, zarr_format=3)
    LAYOUTS["sharded"] = lambda path: write_zarr(path, zarr_format=3, chunks=(250, 4), shards=(1000, 4))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zarr_on_a_store_is_the_same_as_on_disk(layout: str, object_store: Any, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "a.zarr")
    near = open_recording(path, fs=1000)
    far = open_recording(object_store.put(path, f"{layout}/{AIND}"), fs=1000)
    assert far.name == AIND.rpartition("/")[2] and far.files == (f"s3://recordings/{layout}/{AIND}",)
    assert (far.gain_uv, far.sampling_rate_hz, far.n_samples) == (near.gain_uv, near.sampling_rate_hz, 3000)
    np.testing.assert_array_equal(far.read(1000, 1500), SAMPLES[1000:1500])
    np.testing.assert_array_equal(far.traces.compute(scheduler="synchronous"), SAMPLES)
    assert far.source.digest_is_exact and far.digest() == open_recording(far.files[0], fs=1000).digest()


def test_a_flat_object_is_read_in_ranges(object_store: Any) -> None:
    url = object_store.put(SAMPLES.tobytes(), "flat/data.dat")
    recording = open_recording(url, n_chan=4, fs=1000)
    assert object_store.proxy.sent_bytes.total() == HEAD_BYTES  # by which it is known to be flat
    object_store.proxy.reset_counts()
    block = recording.read(500, 600)
    np.testing.assert_array_equal(block, SAMPLES[500:600])
    assert block.flags.writeable and object_store.proxy.sent_bytes.total() == 800
    assert recording.source.digest_is_exact
    before = recording.digest()
    object_store.put(SAMPLES[::-1].tobytes(), "flat/data.dat")
    assert recording.digest() != before


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f8"])
def test_npy_is_read_in_ranges(version: tuple[int, int], dtype: str, object_store: Any) -> None:
    content = npy(SAMPLES.astype(dtype), version=version)
    recording = open_recording(object_store.put(content, "npy/a b#1.npy"), fs=1000)
    assert (recording.n_samples, recording.n_channels, recording.name) == (3000, 4, "a b#1.npy")
    object_store.proxy.reset_counts()
    np.testing.assert_array_equal(recording.read(500, 600), SAMPLES[500:600])
    assert object_store.proxy.sent_bytes.total() == 400 * np.dtype(dtype).itemsize
    np.testing.assert_array_equal(recording.read(0, 3000), SAMPLES)
    near = open_recording(SAMPLES.astype(dtype), fs=1000)
    assert recording.dtype == near.dtype and recording.source.digest_is_exact


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.asfortranarray(SAMPLES)), r"holds one channel after the other.*numpy\.ascontiguousarray"),
        (npy(SAMPLES[:, 0]), r"a\.npy has shape \(3000,\); it must have two dimensions"),
        (npy(SAMPLES.T.copy()), r"more channels than samples.*transpose"),
        (npy(SAMPLES.astype(np.int8)), "holds int8 samples; supported are"),
        (npy(SAMPLES)[:-1], "cannot be read as a .npy file: it has 24127 bytes, but its header says 24128"),
        (npy(SAMPLES)[:50], "cannot be read as a .npy file: EOF"),
        (npy(SAMPLES, version=(3, 0)), r"cannot be read as a .npy file: its version is \(3, 0\)"),
        (SAMPLES.tobytes(), "cannot be read as a .npy file: the magic string is not correct"),
        (b"", "cannot be read as a .npy file: EOF"),
    ],
)
def test_npy_that_does_not_fit(content: bytes, message: str, object_store: Any) -> None:
    with pytest.raises(RecordingError, match=message):
        open_recording(object_store.put(content, "npy/a.npy"), fs=1000)


def test_nothing_in_npy_is_unpickled(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = npy(np.array([[print]]), allow_pickle=True)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(RecordingError, match="holds object samples"):
        open_recording(object_store.put(content, "npy/pickled.npy"), fs=1000)


def test_spikeglx_metadata_beside_an_object(object_store: Any) -> None:
    url = object_store.put(SAMPLES.tobytes(), "glx/run 1#g0.imec0.ap.bin")
    object_store.put(META.encode(), "glx/run 1#g0.imec0.ap.meta")
    recording = open_recording(url)
    assert recording.sampling_rate_hz == 30_000 and recording.probe is not None
    assert recording.probe.x_um.tolist() == [0, 32, 0]
    np.testing.assert_array_equal(recording.read(0, 3000), SAMPLES)


def test_objects_are_joined_in_time(object_store: Any, tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(SAMPLES[:100].tobytes())
    url = object_store.put(SAMPLES[100:].tobytes(), "joined/b.dat")
    recording = open_recording([tmp_path / "a.dat", url], n_chan=4, fs=1000)
    np.testing.assert_array_equal(recording.read(90, 110), SAMPLES[90:110])


@pytest.mark.slow
def test_web_servers(object_store: Any, tmp_path: Path) -> None:
    """S3 servers answer plain requests too, as web servers do: no listing, no credentials."""
    object_store.put(SAMPLES.tobytes(), "web/a b#1.dat")
    root = f"{object_store.proxy.url}/recordings/web"
    recording = open_recording(f"{root}/a%20b%231.dat", n_chan=4, fs=1000)
    assert recording.name == "a b#1.dat"
    np.testing.assert_array_equal(recording.read(5, 9), SAMPLES[5:9])
    object_store.put(write_spikeinterface(tmp_path / "si.zarr"), "web/si.zarr")
    recording = open_recording(f"{root}/si.zarr")
    np.testing.assert_array_equal(recording.read(1000, 1200), SAMPLES[1000:1200])
    assert not recording.source.digest_is_exact, "chunks cannot be listed"
    object_store.put(write_group(tmp_path / "g.zarr"), "web/g.zarr")
    with pytest.raises(RecordingError, match="a Zarr group on a web server; give the array's own address"):
        open_recording(f"{root}/g.zarr")
    np.testing.assert_array_equal(open_recording(f"{root}/g.zarr/ap").read(0, 9), SAMPLES[:9])


def test_files_by_url(tmp_path: Path) -> None:
    (tmp_path / "a b.dat").write_bytes(SAMPLES.tobytes())
    recording = open_recording((tmp_path / "a b.dat").as_uri(), n_chan=4, fs=1000)
    assert recording.files == (str(tmp_path / "a b.dat"),)


def test_the_digest_follows_every_chunk(object_store: Any, tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr")
    url = object_store.put(path, "digest/a.zarr")
    far, near = ZarrSource.open(url), ZarrSource.open(path)
    before = far.digest(), near.digest()
    zarr.open_array(str(path), mode="r+")[2900, 0] += 1
    object_store.put(path, "digest/a.zarr")
    assert far.digest() != before[0] and near.digest() != before[1]
    assert ZarrSource.open(url).digest() == far.digest()


def test_a_changed_environment_opens_another_store(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = object_store.put(write_zarr(tmp_path / "a.zarr"), "surroundings/a.zarr")
    recording = open_recording(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.client.meta.endpoint_url)
    recording.read(0, 10)
    object_store.proxy.reset_counts()
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.proxy.url)
    recording.read(0, 10)
    assert object_store.proxy.sent_bytes.total()


# -- what lies below a location ------------------------------------------------------------------------


def test_links_that_lead_nowhere_are_listed_as_such(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    found = objects.entries(str(tmp_path))
    assert {name: status is None for name, status in found.items()} == {
        "gone": False,
        "circle": False,
        "sub": True,
        "link": True,
    }
    assert [path for path, _ in objects.listing(str(tmp_path))] == ["circle", "gone"]
    assert objects.status(str(tmp_path / "circle")) is None


def test_files_that_go_while_they_are_listed_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of other processes, say."""
    (tmp_path / "stays").write_bytes(b"1")
    (tmp_path / "goes").write_bytes(b"2")
    for look in ("stat", "lstat"):
        real = getattr(os, look)

        def gone(path: Any, *given: Any, real: Any = real, **options: Any) -> Any:
            if str(path).endswith("goes"):
                raise FileNotFoundError
            return real(path, *given, **options)

        monkeypatch.setattr(os, look, gone)
    assert [*objects.entries(str(tmp_path))] == ["stays"]
    assert [path for path, _ in objects.listing(str(tmp_path))] == ["stays"]
    assert objects.status(str(tmp_path / "goes")) is None


def test_empty_objects_that_mark_folders_are_not_listed(object_store: Any) -> None:
    for name in ("", "deep/", "deep/a"):
        object_store.put(b"", f"folders/{name}")
    assert [path for path, _ in objects.listing("s3://recordings/folders")] == ["deep/a"]
    assert [*objects.entries("s3://recordings/folders")] == ["deep"]


def test_deleting_an_empty_list_deletes_nothing(object_store: Any) -> None:
    url = object_store.put(b"a person's", "deleted/a")
    objects.delete(url, [])
    assert objects.status(url) is not None
    objects.delete(url)
    assert objects.status(url) is None


# -- failures ------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is silent for half a second is given up; nothing in these tests takes as long."""
    monkeypatch.setitem(objects.CONNECTION, "read_timeout", "500ms")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["503", "reset", "stall"])
def test_what_fails_for_a_moment_is_read_again(kind: str, object_store: Any, tmp_path: Path, impatient: None) -> None:
    urls = [
        object_store.put(SAMPLES.tobytes(), f"faulty/{kind}.dat"),
        object_store.put(write_zarr(tmp_path / "a.zarr"), f"faulty/{kind}.zarr"),
    ]
    recordings = [open_recording(url, n_chan=4, fs=1000) for url in urls]
    object_store.proxy.kinds, object_store.proxy.share = (kind,), 0.3
    for recording in recordings:
        for start in range(0, 3000, 600):
            np.testing.assert_array_equal(recording.read(start, start + 600), SAMPLES[start : start + 600])
    assert object_store.proxy.faults[kind] >= 3


def test_what_fails_for_good_is_an_error_that_names_it(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objects.PATIENT, "max_retries", 2)
    recording = open_recording(object_store.put(SAMPLES.tobytes(), "broken/data.dat"), n_chan=4, fs=1000)
    object_store.proxy.kinds, object_store.proxy.share = ("503",), 1.0
    with pytest.raises(RecordingError, match=r"s3://recordings/broken/data\.dat cannot be read .*503") as caught:
        recording.read(0, 10)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://recordings/none.zarr", r"no object, Zarr array or Zarr group s3://recordings/none\.zarr.*percent-enc"),
        ("s3://no-such-bucket/a.dat", r"no object.* s3://no-such-bucket/a\.dat\. Check bucket and key"),
        ("s3://recordings", "is a whole bucket or server"),
        ("s3:///a", "expected s3://BUCKET/KEY"),
        ("s3://a//b", "with single slashes"),
        ("ftp://host/a.dat", r"cannot be read from ftp://\. Give a path, or one of s3://, gs://, az://, https://"),
    ],
)
def test_wrong_addresses(url: str, message: str, object_store: Any) -> None:
    with pytest.raises(RecordingError, match=message):
        open_recording(url, n_chan=4, fs=1000)


def test_wrong_credentials(object_store: Any) -> None:
    url = object_store.put(SAMPLES.tobytes(), "denied/data.dat")
    object_store.proxy.kinds, object_store.proxy.share = ("403",), 1.0
    with pytest.raises(RecordingError, match=r"may not be read with the credentials.*AWS_PROFILE.*AWS_SKIP_SIGNATURE"):
        open_recording(url, n_chan=4, fs=1000)


def test_no_credentials_means_anonymous(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = object_store.put(SAMPLES.tobytes(), "public/data.dat")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    np.testing.assert_array_equal(open_recording(url, n_chan=4, fs=1000).read(0, 9), SAMPLES[:9])


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://somewhere/a.dat", "AWS_ENDPOINT_URL"),
        ("gs://somewhere/a.dat", "GOOGLE_SKIP_SIGNATURE"),
        ("az://somewhere/a.dat", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("http://127.0.0.1:9/a.dat", "Check the address"),
    ],
)
def test_stores_that_do_not_answer(url: str, remedy: str, object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at port 9 (discard)."""
    monkeypatch.setitem(objects.HASTY, "max_retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(RecordingError, match=f"{re.escape(url)}.* cannot be read .*{remedy}.*network"):
        open_recording(url, n_chan=4, fs=1000)


def test_each_scheme_has_its_store(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    kinds = {scheme: type(objects._store(f"{scheme}://name/key", False)).__name__ for scheme in objects.SCHEMES}
    assert kinds == {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore", "https": "HTTPStore", "http": "HTTPStore"}


@pytest.mark.slow
def test_zarr_that_does_not_fit(object_store: Any, tmp_path: Path) -> None:
    wrong = object_store.put(write_zarr(tmp_path / "v.zarr", SAMPLES[:, 0]), "wrong/rank.zarr")
    with pytest.raises(RecordingError, match=r"wrong/rank\.zarr has shape \(3000,\); it must have two dimensions"):
        open_recording(wrong)
    wrong = object_store.put(write_zarr(tmp_path / "t.zarr", SAMPLES.T), "wrong/axis.zarr")
    with pytest.raises(RecordingError, match=r"more channels than samples.*transpose"):
        open_recording(wrong)
    segments = (SAMPLES[:99], SAMPLES[99:, :3])
    wrong = object_store.put(write_spikeinterface(tmp_path / "s.zarr", segments), "wrong/segments.zarr")
    with pytest.raises(RecordingError, match="part 1 has 3 channels"):
        open_recording(wrong)


# -- secrets -------------------------------------------------------------------------------------------


def test_no_secret_leaves_the_process(object_store: Any, tmp_path: Path) -> None:
    for source, key in [(SAMPLES.tobytes(), "a.dat"), (write_zarr(tmp_path / "a.zarr"), "a.zarr")]:
        recording = open_recording(object_store.put(source, f"secret/{key}"), n_chan=4, fs=1000)
        recording.read(0, 10)  # what was opened here must not travel either
        assert object_store.secret.encode() not in pickle.dumps(recording)
        assert object_store.secret not in repr(recording) + repr(recording.source)


@pytest.mark.parametrize(
    "url", ["https://me:SeCrEt@host/a.dat", "https://host/a.dat?X-Amz-Signature=SeCrEt", "s3://key:SeCrEt@bucket/a.dat"]
)
def test_addresses_with_secrets_are_refused_unseen(url: str) -> None:
    with pytest.raises(RecordingError, match=r"contains a user, a password or a query.*in the environment") as caught:
        open_recording(url, n_chan=4, fs=1000)
    assert "SeCrEt" not in str(caught.value) and caught.value.__context__ is None


def test_texts_of_errors_are_cleaned() -> None:
    text = "GET https://me:word@host/a?sig=abc failed: <Error><StringToSign>x</StringToSign></Error>\nDebug source: key"
    assert objects._without_secrets(text) == "GET https://host/a failed"


def test_a_missing_library_is_named() -> None:
    code = """
import sys
sys.modules["obstore"] = None
from ks4stream.io.recordings import open_recording
try:
    open_recording("s3://bucket/a.dat", n_chan=4, fs=1000)
except Exception as error:
    print(type(error).__name__, error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.startswith(MissingDependencyError.__name__) and "pip install 'ks4stream[cloud]'" in found
