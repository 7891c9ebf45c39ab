"""Workers that cannot compute, or not the same, are told before there is work for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import users_cluster
from distributed import Client

import ks4stream
from ks4stream.engine import workers
from ks4stream.engine.cluster import Cluster
from ks4stream.errors import VersionWarning, WorkerError

HERE = workers.facts(gpu=False)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A user's cluster without workers, for those that are going to join."""
    with users_cluster(0, host="127.0.0.1", protocol="tcp") as client:
        yield client


def test_equal_workers_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.check(HERE, {"tcp://a:1": dict(HERE), "tcp://b:1": dict(HERE)})


@pytest.mark.parametrize("name", ["Python", "ks4stream", "torch", "numpy", "scipy", "dask", "distributed", "processor"])
def test_what_differs_is_named_with_a_worker(name: str) -> None:
    asked = {"tcp://a:1": dict(HERE), "tcp://b:1": HERE | {name: "another"}}
    with pytest.warns(VersionWarning) as caught:
        workers.check(HERE, asked)
    assert len(caught) == 1
    assert f"{name}: {HERE[name]} here, another at tcp://b:1." in str(caught[0].message)


def test_the_code_itself_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a version is being worked on its number says nothing."""
    package = tmp_path / "ks4stream"
    (package / "engine").mkdir(parents=True)
    monkeypatch.setattr(workers, "__file__", str(package / "engine" / "workers.py"))
    digests = []
    for code in ("a = 1", "a = 2", "a = 1"):
        (package / "some.py").write_text(code)
        digests.append(workers.code_digest.__wrapped__())
    assert digests[0] == digests[2] != digests[1]


def test_gpus_need_only_be_alike_among_workers() -> None:
    here, gpu = HERE | {"GPU": workers.NO_GPU}, {"GPU": "NVIDIA H200"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.check(here, {"tcp://a:1": HERE | gpu, "tcp://b:1": HERE | gpu})
    with pytest.warns(VersionWarning, match="GPU: NVIDIA H200 here, NVIDIA A100 at tcp://b:1"):
        workers.check(HERE | gpu, {"tcp://a:1": HERE | gpu, "tcp://b:1": HERE | {"GPU": "NVIDIA A100"}})
    with pytest.raises(WorkerError, match=r"tcp://b:1 sees no GPU.*default.*device='cpu'.*workers=.*GPU=1"):
        workers.check(HERE | gpu, {"tcp://a:1": HERE | gpu, "tcp://b:1": here})


def test_gpu_workers_that_are_gone_again_are_nothing_to_compare() -> None:
    """As on a computer of a queue that has no GPU itself: the workers that joined ended before they were asked."""
    workers.check(HERE | {"GPU": workers.NO_GPU}, {})


def test_a_worker_that_does_not_answer_is_named() -> None:
    with pytest.raises(WorkerError, match="tcp://a:1 did not answer"):
        workers.check(HERE, {"tcp://a:1": OSError("gone")})


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["torch", "ks4stream"])
def test_a_worker_without_a_library_is_an_error_before_any_task(client: Client, tmp_path: Path, missing: str) -> None:
    """A real worker process in whose Python the library cannot be imported."""
    (tmp_path / "without.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    address = client.scheduler.address  # type: ignore[attr-defined]
    options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--preload", str(tmp_path / "without.py")]
    command = [sys.executable, "-m", "dask", "worker", address, *options]
    paths = os.pathsep.join([str(Path(ks4stream.__file__).parents[1]), *sys.path])
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as worker:
        try:
            client.wait_for_workers(1, timeout=300)
            (there,) = client.nthreads()
            done: list[Any] = []
            with pytest.raises(WorkerError, match=rf"{there} cannot compute.*{missing}.*torch "):
                list(Cluster(client).map(done.append, [1], stage="never"))
        finally:
            worker.kill()
            worker.wait()
    while client.nthreads():  # the next test has a worker of its own
        time.sleep(0.05)
