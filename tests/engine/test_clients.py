"""Whose workers compute: a client's that was given, the active one's, or this machine's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clusters import users_cluster
from distributed import Client
from seen_gpus import see_gpus

from ks4stream import simulate, sorter
from ks4stream.deploy import client_for, engine_for, forget_on_workers
from ks4stream.engine import workers
from ks4stream.engine.cluster import Cluster, active_client, connected, local_client
from ks4stream.errors import LostWorkerError, MachineWarning, WorkerError
from ks4stream.io.recordings import open_recording
from ks4stream.kilosort4 import run_kilosort
from ks4stream.preprocessed import preprocess
from ks4stream.recording import Recording
from ks4stream.resources import Resources
from ks4stream.settings import Settings
from ks4stream.sorter import sort

pytestmark = pytest.mark.slow  # clusters
RATE = 30_000.0
SETTINGS = Settings(batch_size=6000, nblocks=0, nearest_chans=4)


@pytest.fixture(scope="module")
def active() -> Iterator[Client]:
    """A client as a user makes one, which Dask then takes for all it computes."""
    with users_cluster(1) as client:
        yield client


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The clients that computed."""
    found: list[object] = []

    class Watched(Cluster):
        def __init__(self, client: Client, *rest: object, **options: object) -> None:
            found.append(client)
            super().__init__(client, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("ks4stream.engine.cluster.Cluster", Watched)
    return found


def test_the_dashboard_of_a_users_cluster_is_told_if_it_has_one(
    active: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    class Display:
        def __call__(self, stage: str, done: int, total: int) -> None: ...

        def note(self, **facts: Any) -> None:
            told.append(facts)

    def told_of(client: Any) -> list[dict[str, Any]]:
        told.clear()
        with engine_for(recording(), SETTINGS, Resources(), "cpu", Display(), client=client):
            return list(told)

    monkeypatch.setitem(sys.modules, "bokeh", None)  # the scheduler is in this process
    assert told_of(active) == [{"dashboard": None}]
    monkeypatch.delitem(sys.modules, "bokeh")
    (tmp_path / "bokeh.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert told_of(active) == [{"dashboard": active.dashboard_link}]
    assert active.dashboard_link.startswith("http://")
    assert told_of(None) == told_of("loop") == [{"device": "cpu"}]  # our own has none


def recording() -> Recording:
    samples = np.random.default_rng(1).normal(0, 50, (15_000, 4)).astype(np.int16)
    return open_recording(samples, fs=RATE, probe=simulate.linear_probe(4))


def test_the_active_client_is_found_as_dask_does(active: Client) -> None:
    assert active_client() is active
    assert client_for(Resources()) is active
    for client in ("loop", "tcp://host:1"):
        assert client_for(Resources(client=client)) == client
    assert client_for(Resources(workers=2)) is None
    with Client(active.scheduler.address) as later:  # type: ignore[attr-defined]
        assert active_client() is later
    assert active_client() is active


def test_where_there_is_none_this_machine_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there() -> Client:
        raise ValueError("No clients found")

    monkeypatch.setattr("ks4stream.engine.cluster.default_client", none_there)
    assert active_client() is None and client_for(Resources()) is None
    for unusable in ({"status": "closed", "asynchronous": False}, {"status": "running", "asynchronous": True}):
        monkeypatch.setattr("ks4stream.engine.cluster.default_client", partial(SimpleNamespace, **unusable))
        assert active_client() is None


def test_a_task_does_not_wait_for_workers_of_its_own_cluster(active: Client) -> None:
    """It may be the only one they can work on."""
    assert active.submit(active_client, pure=False).result() is None


def test_the_client_of_a_sort_does_not_become_the_active_one(active: Client) -> None:
    with local_client(n_workers=1, processes=False) as own:
        assert active_client() is active is not own
    with connected(active.scheduler.address) as other:  # type: ignore[attr-defined]
        assert active_client() is active is not other


@pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")
def test_sorts_and_preprocessing_go_to_the_active_client_and_say_so(
    active: Client, seen: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ks4stream"):
        sort(recording(), SETTINGS, device="cpu")
    assert seen == [active]
    assert "Computing on the active Dask client" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "ks4stream"):
        preprocess(recording(), SETTINGS, device="cpu")
    assert "Computing on the active Dask client" in caplog.text
    assert seen == [active, active]
    sort(recording(), SETTINGS, device="cpu", workers=1)
    assert len(seen) == 3 and seen[2] is not active


def test_run_kilosort_tidies_up_where_the_active_client_computed(
    active: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    module = sys.modules[run_kilosort.__module__]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "ending", lambda *_: ["a cache"])
    monkeypatch.setattr(module, "forget_on_workers", lambda client, caches: asked.append(client))
    monkeypatch.setattr(module._Job, "run", lambda *_: None)
    (tmp_path / "a.bin").write_bytes(bytes(8 * 1000))
    for options in ({}, {"torch_thread_lim": 1}):
        run_kilosort({"n_chan_bin": 4}, probe=simulate.linear_probe(4), filename=tmp_path / "a.bin", **options)
    assert asked == [active]


def test_tidying_up_where_no_scheduler_is_left_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    forget_on_workers("no-port", [])
    assert "stays there: No Dask scheduler answers at 'no-port'" in caplog.text


# -- workers that have what this process has not ---------------------------------------------------------


def test_a_gpu_that_only_workers_have_is_used_if_asked_for(active: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process need not see one: whether a worker does is asked there."""
    see_gpus(monkeypatch)
    with pytest.raises(WorkerError, match="sees no GPU, or none with the number asked for"):
        sort(recording(), SETTINGS, client=active, device="cuda")


def test_a_gpu_of_a_number_that_a_worker_lacks_is_an_error_before_work(
    active: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, 80)
    assert workers.facts(gpu=True, device="cuda:0")["GPU"] == "H200"
    with pytest.raises(WorkerError, match="sees no GPU, or none with the number asked for"):
        sort(recording(), SETTINGS, client=active, device="cuda:7")


def test_gpus_of_workers_that_are_not_used_are_told_of(active: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # here; workers are threads of this process
    monkeypatch.setattr(sorter, "find_units", stop)
    told = pytest.warns(MachineWarning, match=r"1 of the client's workers see a GPU.*device='cuda'")
    with told, pytest.raises(Stopped):
        sort(recording(), SETTINGS, client=active)
    with pytest.raises(Stopped):  # warnings are errors
        sort(recording(), SETTINGS, client=active, device="cpu")


@pytest.mark.parametrize("address", ["tls://127.0.0.1:9", "no-port", "foo://x:1"])
def test_an_address_that_leads_nowhere_is_told(address: str) -> None:
    with pytest.raises(LostWorkerError, match="No Dask scheduler answers at"), connected(address):
        pass


@pytest.mark.parametrize("address", ["lopp", "tcp://host", "foo://x:1", ""])
def test_no_client_is_made_for_what_is_not_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails while it is made keeps its threads, for which the program waits at its end."""
    monkeypatch.setattr("ks4stream.engine.cluster.Client", None)
    with pytest.raises(LostWorkerError, match="No Dask scheduler answers at"), connected(address):
        pass


def test_a_path_that_python_passes_over_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("anywhere")])
    with local_client(n_workers=1, processes=False) as own:
        assert own.submit(int).result() == 0


class Stopped(Exception):
    """There was no need to go on."""


def stop(*_: object) -> None:
    raise Stopped
