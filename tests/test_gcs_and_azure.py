"""gs:// and az:// as s3:// elsewhere: recordings are read, a sort is written and resumed, mistakes are told.

Three servers. Google's XML interface, which obstore speaks, is S3's but for a few headers, so that moto serves it; the
proxy translates the one that matters. fake-gcs-server is one of Google's interface proper, for reading only, as it
takes no uploads by XML (1.54). Azurite is Microsoft's own. The last two run where they are on the PATH, or where
FAKE_GCS_SERVER and AZURITE name their programs (of Azurite's that for blobs alone, azurite-blob).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import pickle
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ks4stream import load_sorting, simulate
from ks4stream.errors import FewSpikesWarning, Ks4StreamWarning, RecordingError, ResultsError
from ks4stream.io import objects
from ks4stream.io.places import ObjectPath, below, copy_there, place, read_range, read_whole, remove, size_of
from ks4stream.io.recordings import open_recording
from ks4stream.io.run_store import ObjectLock
from ks4stream.settings import Settings
from ks4stream.sorter import sort
from ks4stream.stages.matching import Match
from ks4stream.stages.units import ClusterSpikes

pytest.importorskip("obstore")
pytest.importorskip("moto")

pytestmark = pytest.mark.slow  # whole sorts, and servers

FOLDER = "a b#1"
SECRET = base64.b64encode(b"not for anybody to see").decode()
NOWHERE = "127.0.0.1:9"  # nobody listens at port 9 (discard)
PROBE = simulate.linear_probe(8, pitch_um=20)
RATE = 30_000.0
SAMPLES = simulate.simulate(
    PROBE, 3.0, seed=3, n_units=4, amplitude_range_uv=(90, 250), rate_range_hz=(25, 60), hash_per_channel=0
).read(0, 90_000)


@dataclass(frozen=True)
class Cloud:
    """A bucket that holds a flat binary and a Zarr array in FOLDER, and how a process finds it."""

    bucket: str
    surroundings: dict[str, str]
    refused: dict[str, str]  # surroundings that are wrong
    advice: str  # what an error names then

    @property
    def flat(self) -> str:
        return f"{self.bucket}/{FOLDER}/data 1#.dat"

    @property
    def zarr(self) -> str:
        return f"{self.bucket}/{FOLDER}/data 1#.zarr"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of buckets, as fake-gcs-server takes it."""
    root = tmp_path_factory.mktemp("buckets")
    folder = root / "recordings" / FOLDER
    folder.mkdir(parents=True)
    SAMPLES.tofile(folder / "data 1#.dat")
    array = zarr.open_array(
        str(folder / "data 1#.zarr"), mode="w", shape=SAMPLES.shape, dtype=SAMPLES.dtype, chunks=(20_000, 8)
    )
    array[:] = SAMPLES
    array.attrs["sampling_frequency"] = RATE
    return root


@contextmanager
def running(command: list[str], log: Path, **surroundings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block."""
    with log.open("wb") as file:
        surroundings = dict(os.environ) | surroundings
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, env=surroundings)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(300)


def said(process: subprocess.Popen[bytes], log: Path, words: str) -> str:
    """What a server writes, as soon as it holds some words."""
    end = time.monotonic() + 300
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    return log.read_text()


def program(name: str, variable: str) -> str:
    found = shutil.which(os.environ.get(variable, name))
    if found is None:
        pytest.skip(f"{name} is not on the PATH, and {variable} does not name it")
    return found


@pytest.fixture(scope="module")
def moto(_s3: Any, recordings: Path) -> Cloud:
    for path in sorted(path for path in recordings.rglob("*") if path.is_file()):
        _s3.put(path, path.relative_to(recordings / "recordings").as_posix())
    found = {"GOOGLE_BASE_URL": _s3.proxy.url, "GOOGLE_BEARER_TOKEN": SECRET}
    nobody = {"GOOGLE_BASE_URL": _s3.proxy.url, "GCE_METADATA_HOST": NOWHERE}  # it takes any token
    return Cloud("gs://recordings", found, nobody, "GOOGLE_APPLICATION_CREDENTIALS")


@pytest.fixture(scope="module")
def fake_gcs_server(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    log = tmp_path_factory.mktemp("fake-gcs-server") / "log"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [
        program("fake-gcs-server", "FAKE_GCS_SERVER"),
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        host.partition(":")[2],
        "-public-host",
        host,
        "-backend",
        "memory",
        "-data",
        str(recordings),
    ]
    with running(command, log) as process:
        said(process, log, "server started")
        found = {"GOOGLE_BASE_URL": f"http://{host}", "GOOGLE_SKIP_SIGNATURE": "true"}
        nobody = {"GOOGLE_BASE_URL": f"http://{host}", "GCE_METADATA_HOST": NOWHERE}
        yield Cloud("gs://recordings", found, nobody, "GOOGLE_APPLICATION_CREDENTIALS")


@pytest.fixture(scope="module")
def azurite(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    log = tmp_path_factory.mktemp("azurite") / "log"
    command = [
        program("azurite-blob", "AZURITE"),
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--silent",
        "--disableTelemetry",
    ]
    with running(command, log, AZURITE_ACCOUNTS=f"lab:{SECRET}") as process:
        host = said(process, log, "successfully listens").rpartition("http://")[2].split()[0]
        make_container(host, "recordings")
        account = {"AZURE_STORAGE_ACCOUNT_NAME": "lab", "AZURE_STORAGE_ENDPOINT": f"http://{host}/lab"}
        found = account | {"AZURE_STORAGE_ACCOUNT_KEY": SECRET}
        wrong = account | {"AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"wrong").decode()}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.items():
                patch.setenv(name, value)
            copy_there(recordings / "recordings", ObjectPath("az://recordings"))
        yield Cloud("az://recordings", found, wrong, "AZURE_STORAGE_ACCOUNT_KEY")


def make_container(host: str, name: str) -> None:
    """Make a container in the account "lab", which obstore cannot."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = ["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in headers.items())]
    text = "\n".join([*lines, f"/lab/lab/{name}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(SECRET), text.encode(), hashlib.sha256)).decode()
    connection = http.client.HTTPConnection(host, timeout=300)
    headers |= {"Authorization": f"SharedKey lab:{signature}", "Content-Length": "0"}
    connection.request("PUT", f"/lab/{name}?restype=container", headers=headers)
    assert connection.getresponse().status == 201
    connection.close()


@pytest.fixture(params=["moto", "fake_gcs_server", "azurite"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Each server, and how it is found in the environment."""
    found: Cloud = request.getfixturevalue(request.param)
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in found.surroundings.items():
        monkeypatch.setenv(name, value)
    return found


WRITABLE = pytest.mark.parametrize("cloud", ["moto", "azurite"], indirect=True)


def test_recordings_are_read(cloud: Cloud) -> None:
    flat = open_recording(cloud.flat, n_chan=8, fs=RATE)
    for recording in (flat, open_recording(cloud.zarr)):
        assert recording.files[0] in (cloud.flat, cloud.zarr) and recording.sampling_rate_hz == RATE
        np.testing.assert_array_equal(recording.read(19_000, 41_000), SAMPLES[19_000:41_000])
        np.testing.assert_array_equal(recording.traces.compute(scheduler="threads"), SAMPLES)
        assert recording.source.digest_is_exact and SECRET.encode() not in pickle.dumps(recording)
    assert flat.digest() == open_recording(cloud.flat, n_chan=8, fs=RATE).digest()


def test_what_is_not_there_is_told(cloud: Cloud) -> None:
    for url in (f"{cloud.bucket}/nothing.dat", cloud.flat.replace("recordings", "no-such-bucket")):
        with pytest.raises(RecordingError, match=r"There is no object.*Check bucket and key"):
            open_recording(url, n_chan=8, fs=RATE)


def test_credentials_that_are_refused_are_told(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objects.HASTY, "max_retries", 1)
    monkeypatch.setitem(objects.PATIENT, "max_retries", 1)
    for name in cloud.surroundings:
        monkeypatch.delenv(name)
    for name, value in cloud.refused.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecordingError, match=f"credentials.*{cloud.advice}") as caught:
        open_recording(cloud.flat, n_chan=8, fs=RATE)
    assert SECRET not in str(caught.value)
    with pytest.raises(ResultsError, match=f"credentials.*{cloud.advice}"):
        objects.write_bytes(f"{cloud.bucket}/refused", b"1")
    with pytest.raises(RecordingError, match=f"credentials.*{cloud.advice}"):
        list(below(ObjectPath(f"{cloud.bucket}/{FOLDER}")))


@WRITABLE
def test_files_and_objects_come_and_go(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    large = np.random.default_rng(0).bytes(12 << 20)  # of several parts
    (tmp_path / "deep" / "large #1").write_bytes(large)
    (tmp_path / "small").write_bytes(b"0123456789")
    there = ObjectPath(f"{cloud.bucket}/come and go")
    copy_there(tmp_path, there)
    assert sorted(below(there)) == [("deep", True), ("small", False)]
    assert read_whole(there / "deep" / "large #1") == large
    assert (size_of(there / "small"), read_range(there / "small", 2, 5)) == (10, b"234")
    with pytest.raises(EOFError):
        read_range(there / "small", 20, 22)
    with pytest.raises(FileNotFoundError):
        read_whole(there / "nothing")
    remove(there / "nothing")
    remove(there, folder=True)
    assert list(below(there)) == []
    with pytest.raises(ResultsError, match="no such bucket"):
        objects.write_bytes(f"{cloud.bucket.partition(':')[0]}://no-such-bucket/a", b"1")


@WRITABLE
def test_a_lock_is_held_by_one(cloud: Cloud) -> None:
    path = ObjectPath(f"{cloud.bucket}/{FOLDER}/lock")
    for _ in range(2):  # the second finds it free
        with ObjectLock(path, renewed_s=0.05) as held:
            with (
                pytest.warns(Ks4StreamWarning, match="Another run .* holds"),
                pytest.raises(ResultsError, match="Another run is writing"),
                ObjectLock(path, looked_s=0.2),
            ):
                pass
            held.renew()
    with (
        ObjectLock(path, renewed_s=60) as left,
        pytest.warns(Ks4StreamWarning, match="Another run"),
        ObjectLock(path, lease_s=0.2, looked_s=0.1),
        pytest.raises(ResultsError, match="was taken over by another run"),
    ):
        left.renew()


@WRITABLE
def test_a_sort_goes_on_there(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    def sorted_to(url: str, target: str | None) -> Any:
        recording = open_recording(url, n_chan=8, fs=RATE, probe=PROBE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FewSpikesWarning)
            settings = Settings(batch_size=15_000, nblocks=0, nearest_chans=8, Th_universal=9)
            return sort(recording, settings, results_dir=target, client="loop", device="cpu", block_batches=2)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    target = f"{cloud.bucket}/{FOLDER}/sorted"
    with monkeypatch.context() as patch:
        patch.setattr(ClusterSpikes, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sorted_to(cloud.zarr, target)
    with monkeypatch.context() as patch:
        patch.setattr(Match, "task", lambda *_: pytest.fail("it is finished"))
        sorted_to(cloud.zarr, target)
    found, expected = load_sorting(target), sorted_to(cloud.flat, None)
    assert found.n_spikes > 100
    for spec in fields(found):
        if "dims" in spec.metadata:
            np.testing.assert_array_equal(getattr(found, spec.name), getattr(expected, spec.name), err_msg=spec.name)
    assert {name for name, _ in below(place(target))} >= {"params.py", "sorting.zarr", "run", "kilosort4.log"}
