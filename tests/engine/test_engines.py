"""The loop and the cluster keep the same promises; the cluster keeps them when workers fail."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest
import torch
from clusters import users_cluster
from distributed import Client, Status, get_worker
from seen_gpus import see_gpus

import ks4stream
from ks4stream import messages
from ks4stream.engine import Engine, Loop, base, one_thread
from ks4stream.engine import cluster as cluster_module
from ks4stream.engine.cluster import IN_FLIGHT_PER_WORKER, Cluster, Share, local_client
from ks4stream.errors import GpuMemoryError, Ks4StreamWarning, LostWorkerError, WorkerError

pytestmark = pytest.mark.slow  # clusters, and waiting for them
PACKAGE = str(Path(ks4stream.__file__).parents[1])


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(n_workers=2, processes=False) as client:
        yield client


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    """Two worker processes; the slowest thing here, so started once."""
    with local_client(n_workers=2, processes=True) as client:
        yield client


@pytest.fixture(params=["loop", "threads"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Loop() if request.param == "loop" else Cluster(request.getfixturevalue("client"))


@dataclass
class Squares:
    """Squares numbers; slow on some, failing on some; notes in which order they were begun."""

    slow: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()
    begun: list[int] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, number: int) -> int:
        with self.lock:
            self.begun.append(number)
        if number in self.failing:
            raise KeyError(f"no square of {number}")
        time.sleep(0.3 if number in self.slow else 0.002)
        return number**2

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None, "begun": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"lock": threading.Lock()})


def settled(client: Client) -> None:
    """Wait until the scheduler has forgotten every task; fail if it does not."""
    for _ in range(1200):  # a minute: other processes may keep the machine busy
        n_tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
        if not n_tasks and not client.futures:
            return
        time.sleep(0.05)
    raise AssertionError(f"{n_tasks} tasks and {len(client.futures)} futures are stuck")


def test_what_could_not_be_sent_as_workers_stopped_is_not_logged_with_a_traceback(client: Client) -> None:
    """Dask logs it as information, at a time when the level of its other messages is no longer ours."""
    assert not logging.getLogger("distributed.batched").isEnabledFor(logging.INFO)
    assert logging.getLogger("distributed.batched").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("slow", [(), (0,), (5, 6)])
def test_results_come_in_the_order_of_the_items(engine: Engine, slow: tuple[int, ...]) -> None:
    items = list(range(40))
    assert list(engine.map(Squares(slow), items, stage="squares")) == [item**2 for item in items]


def test_items_may_be_equal_or_none(engine: Engine) -> None:
    assert list(engine.map(Squares(), [3, 3, 3], stage="squares")) == [9, 9, 9]
    assert list(engine.map(Squares(), [], stage="squares")) == []


def test_two_maps_of_one_stage_do_not_see_each_other(engine: Engine) -> None:
    first = engine.map(Squares(), [1, 2], stage="squares")
    assert next(first) == 1
    assert list(engine.map(Squares(), [5, 6], stage="squares")) == [25, 36]
    assert list(first) == [4]


def test_progress_is_told_from_none_to_all(client: Client) -> None:
    for make in (Loop, lambda progress: Cluster(client, progress)):
        calls: list[tuple[str, int, int]] = []
        list(make(lambda *call: calls.append(call)).map(Squares(), list(range(9)), stage="squares"))  # noqa: B023
        assert calls[0] == ("squares", 0, 9)
        assert calls[-1] == ("squares", 9, 9)
        done = [call[1] for call in calls]
        assert done == sorted(set(done))


def test_a_result_arrives_before_progress_counts_it(client: Client) -> None:
    for make in (Loop, lambda progress: Cluster(client, progress)):
        arrived: list[int] = []
        counted: list[tuple[int, int]] = []
        engine = make(lambda _, done, __: counted.append((done, len(arrived))))  # noqa: B023
        found = list(engine.map(Squares(), list(range(9)), stage="squares", arrived=arrived.append))
        assert sorted(arrived) == found
        assert counted[-1] == (9, 9) and all(done == n for done, n in counted)


def test_larger_priorities_are_begun_first(client: Client) -> None:
    with local_client(n_workers=1, processes=False) as single:
        squares, items = Squares(), list(range(30))
        found = list(Cluster(single).map(squares, items, stage="squares", work=[float(i % 7) for i in items]))
        assert found == [item**2 for item in items]
        wanted = sorted(items, key=lambda i: -(i % 7))
        late = [abs(squares.begun.index(item) - wanted.index(item)) for item in items]
        assert max(late) < IN_FLIGHT_PER_WORKER  # Dask may begin those in flight in an order of its own


def test_only_a_window_of_results_is_held_while_one_is_awaited(client: Client) -> None:
    squares = Squares(slow=(0,))
    results = Cluster(client).map(squares, list(range(100)), stage="squares")
    assert next(results) == 0
    window = IN_FLIGHT_PER_WORKER * 2
    assert len(squares.begun) <= 2 * window + 1  # held and in flight
    list(results)
    assert sorted(squares.begun) == list(range(100))


def most_at_a_time(client: Client, meanwhile: Callable[[], object] = bool) -> int:
    """How many of 60 items run side by side of the later half; the first one is slow, the others soon wait for it."""
    running: set[int] = set()
    together: list[int] = []

    def function(number: int) -> int:
        running.add(number)
        time.sleep(0.3 if number == 0 else 0.02)
        if number == 0:
            meanwhile()
        if number >= 30:
            together.append(len(running))
        running.discard(number)
        return number

    assert list(Cluster(client).map(function, list(range(60)), stage="meeting")) == list(range(60))
    return max(together)


def test_the_cluster_is_kept_busy_after_a_slow_item(client: Client) -> None:
    assert most_at_a_time(client) == 2


def test_a_worker_that_was_idle_gets_the_function_again(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's memory manager drops what a worker has no use for just then, and then gives it no more tasks."""
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.1)
    assert not client.amm.running(), "nothing needs it on this machine"
    assert most_at_a_time(client, client.amm.run_once) == 2


def test_an_error_names_its_stage_and_leaves_nothing_behind(engine: Engine, client: Client) -> None:
    squares = Squares(failing=(7,))
    with pytest.raises(KeyError, match="no square of 7") as caught:
        list(engine.map(squares, list(range(500)), stage="squares"))
    assert caught.value.__notes__ == ["Raised in stage 'squares', task 8 of 500."]
    settled(client)
    assert len(squares.begun) < 100  # what was not begun is not computed
    assert list(engine.map(Squares(), [2], stage="squares")) == [4]


def test_a_consumer_that_stops_leaves_nothing_behind(client: Client) -> None:
    squares = Squares()
    results = Cluster(client).map(squares, list(range(500)), stage="squares")
    assert [next(results), next(results)] == [0, 1]
    results.close()  # type: ignore[attr-defined]
    settled(client)
    assert len(squares.begun) < 100


def test_a_map_may_be_abandoned_and_outlive_its_client() -> None:
    with local_client(n_workers=1, processes=False) as own:
        results = Cluster(own).map(Squares(), list(range(50)), stage="squares")
        next(results)
    results.close()  # type: ignore[attr-defined]


def test_an_interrupt_leaves_nothing_behind(client: Client) -> None:
    """Ctrl-C arrives in this thread, wherever it is in the map: here in the report of progress."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    squares = Squares()
    with pytest.raises(KeyboardInterrupt):
        list(Cluster(client, interrupt).map(squares, list(range(500)), stage="squares"))
    settled(client)
    assert len(squares.begun) < 100


def test_tasks_run_on_one_thread_and_others_are_left_alone(engine: Engine) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            inside = list(engine.map(lambda _: torch.get_num_threads(), list(range(8)), stage="threads"))
        assert inside == [1] * 8
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_overlapping_users_of_one_thread_keep_it_until_the_last_has_gone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("last", ["first", "second"])
def test_overlapping_threads_get_back_their_own_number(last: str) -> None:
    """Also the one that goes first, and one that asks for the first time while the other is inside."""
    names = ("first", "second")
    came, gone = ({name: threading.Event() for name in names} for _ in range(2))
    found: dict[str, list[int]] = {}

    def compute(name: str) -> None:
        if name == "second":
            came["first"].wait(300)
        with one_thread():
            found[name] = [torch.get_num_threads()]
            came[name].set()
            came["second"].wait(300)
            if name == last:
                gone[names[name == "first"]].wait(300)
            with one_thread():
                pass
            found[name].append(torch.get_num_threads())
        found[name].append(torch.get_num_threads())
        gone[name].set()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = [threading.Thread(target=compute, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == {name: [1, 1, 2] for name in names}
        assert later == [torch.get_num_threads()] == [2]
    finally:
        torch.set_num_threads(before)


FAULTS_WHILE_WORKING_AND_AFTER = """
import resource, threading
import numpy as np
from ks4stream.engine import one_thread

def faults_of(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        np.ones(10 << 20)  # 80 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    with one_thread():
        faults_of(1)
        print(faults_of(5))

with one_thread():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
work()
print(faults_of(5))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another allocator than glibc's")
def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    code = [sys.executable, "-c", FAULTS_WHILE_WORKING_AND_AFTER]
    done = subprocess.run(code, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": PACKAGE})
    in_a_thread, in_the_main_thread, afterwards = (int(line) for line in done.stdout.split())
    assert in_a_thread < 100
    assert in_the_main_thread < 100
    assert afterwards > 5 * 40  # the pages of each array, of 2 MB at most, are fetched anew


def test_what_is_free_is_given_back_now_and_then_between_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        trimmed = 0

        def malloc_trim(self, pad: int) -> None:
            self.trimmed += 1

        def mallopt(self, number: int, value: int) -> None:
            pass

    library, clock = Library(), [1000.0]
    monkeypatch.setattr(base, "_glibc", lambda: library)
    monkeypatch.setattr(base, "_clock", lambda: clock[0])
    monkeypatch.setattr(base, "_given_back", 0.0)
    with one_thread():
        for number in range(50):  # a second each
            base.run(Squares(), number)
            clock[0] += 1.0
        assert library.trimmed == 5
    assert library.trimmed == 6, "and at the end in any case"


def test_threads_of_this_process_share_the_function_itself(client: Client) -> None:
    """No copy is made, however large its constants."""
    squares = Squares()
    list(Cluster(client).map(squares, [1, 2, 3], stage="squares"))
    assert sorted(squares.begun) == [1, 2, 3]


class CountsItsTravels:
    """Leaves a file each time a copy of it arrives in another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> int:
        time.sleep(0.01)
        return os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / f"{os.getpid()}-{time.time_ns()}").touch()


@pytest.mark.slow
def test_constants_travel_to_each_process_once(processes: Client, tmp_path: Path) -> None:
    used = set(Cluster(processes).map(CountsItsTravels(tmp_path), list(range(30)), stage="travels"))
    assert os.getpid() not in used
    arrivals = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert {int(pid) for pid in arrivals} >= used
    assert len(arrivals) <= 4  # two workers, and once more for each from the other where Dask dropped a copy


class DiesOnce:
    """Ends its process on item 3, unless it has done so before."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, number: int) -> int:
        if number == 3 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return number**2


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_tasks_only(processes: Client, tmp_path: Path) -> None:
    found = list(Cluster(processes).map(DiesOnce(tmp_path / "died"), list(range(20)), stage="dying"))
    assert found == [number**2 for number in range(20)]
    assert (tmp_path / "died").exists()


@dataclass(frozen=True)
class WhoComputes:
    """Says which worker computed."""

    def __call__(self, number: int) -> str:
        time.sleep(0.05)
        return str(get_worker().address)


def test_workers_that_join_during_a_stage_take_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.1)
    with local_client(n_workers=1, processes=False) as client:
        engine, computed = Cluster(client), []
        for address in engine.map(WhoComputes(), list(range(80)), stage="joined"):
            computed.append(address)
            if len(computed) == 5:
                client.cluster.scale(4)
                client.wait_for_workers(4, timeout=300)
        assert len(set(computed)) == 4
        n_first = sum(address == computed[0] for address in computed)
        assert n_first < 60, "four share what is left"


@pytest.mark.slow
def test_a_worker_that_joins_and_cannot_compute_ends_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.1)
    with local_client(n_workers=1, processes=False) as client:
        engine, found = Cluster(client), []
        for number, address in enumerate(engine.map(WhoComputes(), list(range(80)), stage="unfit")):
            found.append(address)
            if number == 0:
                monkeypatch.setattr(cluster_module.workers, "check", _unfit)
                client.cluster.scale(2)
                expected = pytest.warns(Ks4StreamWarning, match="lacks torch.*continues with the other workers")
                expected.__enter__()
                client.wait_for_workers(2, timeout=300)
        expected.__exit__(None, None, None)
        assert len(found) == 80


def _unfit(*_: Any) -> None:
    raise WorkerError("The new worker lacks torch.")


def test_workers_that_join_are_seen_while_a_task_takes_its_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.01)
    looks, looked = [0], threading.Event()

    def look(self: Cluster) -> None:
        looks[0] += 1
        if looks[0] == 3:
            looked.set()

    monkeypatch.setattr(Cluster, "_check_new_workers", look)
    assert list(Cluster(client).map(lambda _: looked.wait(300), [1], stage="long")) == [True]


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_a_task_that_hangs_is_told_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With its worker, and in the log the lines at which it stands, and until then nothing is said of any other."""
    n_items, clock, done = 12, Clock(), [0]
    monkeypatch.setattr(cluster_module, "_clock", clock)
    monkeypatch.setattr(cluster_module, "SLOW_SECONDS", 100.0)
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", -1.0)
    caplog.set_level("INFO", "ks4stream")
    of_which: list[str] = []
    looks, seen, look = [0], set[int](), cluster_module._Tasks.look_for_slow_ones

    def counted(self: Any, *given: Any) -> None:
        look(self, *given)
        seen.update(index for (_, index), _ in self._running)
        looks[0] += 1

    def looked_twice() -> None:  # the first look may have begun before
        before = looks[0]
        _wait_until(lambda: looks[0] >= before + 2)

    monkeypatch.setattr(cluster_module._Tasks, "look_for_slow_ones", counted)

    def waiting_here() -> int:  # Dask may move a task to the worker that hangs
        processing = client.processing()[of_which[0]]
        return sum(isinstance(key, tuple) and key[1] < n_items - 1 for key in processing)

    def hangs_on_the_last(number: int) -> int:
        if number == n_items - 1:
            of_which.append(str(get_worker().address))
            # from when it is seen to run, time counts
            _wait_until(lambda: number in seen and done[0] + waiting_here() == n_items - 1)
            clock.now += 99  # in time
            looked_twice()
            assert not said
            clock.now += 2
            _wait_until(lambda: "hangs_on_the_last" in caplog.text)
            clock.now += 1000
            looked_twice()
        return number

    with messages.recorded() as said:
        engine = Cluster(client, lambda stage, n, total: done.__setitem__(0, n))
        assert list(engine.map(hangs_on_the_last, list(range(n_items)), stage="hung")) == list(range(n_items))
    (text,) = said
    assert f"Task 12 of 12 of stage 'hung' has been running on the worker at {of_which[0]} for 101 s" in text
    assert "kill its process" in text
    assert "in hangs_on_the_last" in caplog.text


def test_a_slow_task_is_judged_by_the_amount_of_its_work(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest regions are begun first, and take as long as that."""
    monkeypatch.setattr(cluster_module, "SLOW_SECONDS", 0.0)
    clock = Clock()
    monkeypatch.setattr(cluster_module, "_clock", clock)
    begun, may_end = threading.Event(), threading.Event()
    tasks = cluster_module._Tasks(client, lambda _: (begun.set(), may_end.wait(300)), "large")
    try:
        tasks._took = [1.0, 2.0, 3.0]  # seconds for a unit of work
        tasks.begin(0, 0, work=5.0)
        begun.wait(300)
        with messages.recorded() as said:
            for seconds, n_said in ((0.0, 0), (99.0, 0), (2.0, 1), (100.0, 1)):  # ten times 2 s for each of 5
                clock.now += seconds
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tasks.look_for_slow_ones({}, 1)
                assert len(said) == n_said
        assert "others of this size took 10 s" in said[0]
    finally:
        may_end.set()
        tasks.cancel()


def test_a_task_that_waits_for_the_gpu_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker with several threads, one task at a time computes on it."""
    clock, may_end = Clock(), threading.Event()
    monkeypatch.setattr(cluster_module, "_clock", clock)
    begun: list[int] = []
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        tasks = cluster_module._Tasks(client, lambda i: (begun.append(i), may_end.wait(300)), "gpu", alone=True)
        try:
            tasks.begin(0, 0)
            tasks.begin(1, 1)
            _wait_until(lambda: len(begun) == 1 and _who_wait_for_the_gpu(client) == [False, True])
            tasks.look_for_slow_ones({}, 2)  # from here on, time counts
            clock.now += cluster_module.ALONE_SLOW_SECONDS + 1
            with pytest.warns(Ks4StreamWarning, match=f"Task {begun[0] + 1} of 2") as said:
                tasks.look_for_slow_ones({}, 2)
            assert len(said) == 1
        finally:
            may_end.set()
            tasks.cancel()


def _who_wait_for_the_gpu(client: Client) -> list[bool]:
    """Whether each task that a worker has begun waits for its turn."""
    lines = [at for of_worker in client.call_stack().values() for at in of_worker.values()]
    return sorted(map(cluster_module._waits_for_the_gpu, lines))


def test_a_task_that_hangs_is_told_although_one_sent_earlier_waits_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask moves tasks between workers, so those sent first need not be those that run."""
    clock, begun, may_end = Clock(), threading.Event(), threading.Event()
    monkeypatch.setattr(cluster_module, "_clock", clock)
    with local_client(n_workers=1, processes=False) as client:
        tasks = cluster_module._Tasks(client, lambda _: (begun.set(), may_end.wait(300)), "moved")
        try:
            tasks.begin(0, 0)
            begun.wait(300)
            clock.now -= 50
            tasks.begin(1, 1)
            while len(client.processing()[next(iter(client.nthreads()))]) < 2:
                time.sleep(0.01)
            tasks.look_for_slow_ones({}, 2)  # from here on, time counts
            clock.now += cluster_module.ALONE_SLOW_SECONDS + 1
            with pytest.warns(Ks4StreamWarning, match="Task 1 of 2"):
                tasks.look_for_slow_ones({}, 2)
        finally:
            may_end.set()
            tasks.cancel()


@pytest.mark.parametrize("why", ["none is left that declares a GPU", "Dask has paused 1 .*memory is almost full"])
def test_tasks_that_no_worker_would_run_are_told_of_once(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask lets them wait, and they run when there is one."""
    clock, paused = Clock(), "paused" in why
    monkeypatch.setattr(cluster_module, "_clock", clock)
    with local_client(n_workers=1, processes=False) as client:

        def set_status(status: Status) -> None:
            client.run(lambda dask_worker: setattr(dask_worker, "status", status))
            _wait_until(lambda: [worker["status"] for worker in workers().values()] == [status.name])

        workers, found = Cluster(client)._workers, dict[int, int]()
        tasks = cluster_module._Tasks(client, Squares(), "stuck", on_gpu=not paused)
        if paused:
            set_status(Status.paused)
        try:
            tasks.begin(3, 3)
            tasks.look_for_slow_ones(workers(), 1)
            clock.now += 299  # a warning would be an error
            tasks.look_for_slow_ones(workers(), 1)
            clock.now += 2
            with pytest.warns(Ks4StreamWarning, match=rf"No worker .* for 301 s .*'stuck': {why}"):
                tasks.look_for_slow_ones(workers(), 1)
            clock.now += 1000
            tasks.look_for_slow_ones(workers(), 1)
            if paused:
                set_status(Status.running)
                _wait_until(lambda: bool(found.update(tasks.finished(1)[0]) or found))
                assert found == {3: 9}
        finally:
            tasks.cancel()


def test_workers_are_known_whatever_the_client_asks_meanwhile(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two seconds it asks for everything but the workers, and keeps the answer in place of what we asked for."""

    async def ask_for_no_workers(self: Client, n_workers: int = 0) -> None:
        self._scheduler_identity = {"workers": {}}  # type: ignore[attr-defined]

    monkeypatch.setattr(Client, "_update_scheduler_info", ask_for_no_workers)
    engine = Cluster(client)
    assert (engine.n_workers, len(engine._workers())) == (2, 2)
    assert engine.worker_memory_bytes == Loop().worker_memory_bytes / 2


def test_a_task_that_waits_behind_another_sorts_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, may_end, may_end_too, begun = Clock(), threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(cluster_module, "_clock", clock)
    with local_client(n_workers=1, processes=False) as client:
        other = cluster_module._Tasks(client, lambda _: (begun.set(), may_end.wait(300)), "before")
        in_turn = threading.Event()
        tasks = cluster_module._Tasks(client, lambda _: (in_turn.set(), may_end_too.wait(300)), "behind")
        tasks._took = [1.0, 1.0, 1.0]
        other.begin(0, 0)
        begun.wait(300)
        tasks.begin(0, 0)
        while len(client.processing()[next(iter(client.nthreads()))]) < 2:
            time.sleep(0.01)
        clock.now += 10_000
        try:
            with messages.recorded() as said:
                tasks.look_for_slow_ones({}, 1)
                may_end.set()
                in_turn.wait(300)
                tasks.look_for_slow_ones({}, 1)
                clock.now += 299
                tasks.look_for_slow_ones({}, 1)
            assert not said
            clock.now += 2
            with pytest.warns(Ks4StreamWarning, match="has been running on the worker at .* for 301 s"):
                tasks.look_for_slow_ones({}, 1)
        finally:
            may_end.set()
            may_end_too.set()
            tasks.cancel()
            other.cancel()


def test_a_task_that_hangs_without_others_is_told_later(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, begun, may_end = Clock(), threading.Event(), threading.Event()
    monkeypatch.setattr(cluster_module, "_clock", clock)
    tasks = cluster_module._Tasks(client, lambda _: (begun.set(), may_end.wait(300)), "alone")
    try:
        tasks.begin(0, 0)
        begun.wait(300)
        tasks.look_for_slow_ones({}, 1)
        clock.now += 1799  # half an hour, but for a second; a warning would be an error
        tasks.look_for_slow_ones({}, 1)
        clock.now += 2
        with pytest.warns(Ks4StreamWarning, match="for 1801 s; too few others"):
            tasks.look_for_slow_ones({}, 1)
    finally:
        may_end.set()
        tasks.cancel()


def test_workers_that_hang_are_asked_side_by_side(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not again soon, although tasks wait behind those that hang: nothing is sent to others meanwhile."""
    clock, asked, may_end = Clock(), [0, 0, 0], threading.Event()  # now, at most at a time, and in all
    both = threading.Barrier(3)  # with this thread

    async def hang(**_: Any) -> None:
        asked[0] += 1
        asked[1] = max(asked[:2])
        asked[2] += 1
        try:
            await asyncio.sleep(300)
        finally:
            asked[0] -= 1

    caplog.set_level("INFO", "ks4stream")
    monkeypatch.setattr(cluster_module, "_clock", clock)
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(client.scheduler, "call_stack", hang, raising=False)
    tasks = cluster_module._Tasks(client, lambda number: number > 1 or (both.wait(300), may_end.wait(300)), "hung")
    try:
        for number in range(2):
            tasks.begin(number, number)
        both.wait(300)
        clock.now += 1  # so that those that hang are the first that were sent
        for number in range(2, 6):
            tasks.begin(number, number)
        _wait_until(lambda: [len(keys) > 1 for keys in client.processing().values()] == [True, True])
        tasks._took = [1.0, 1.0, 1.0]
        for _ in range(3):
            tasks.look_for_slow_ones({}, 6)
        assert asked == [0, 2, 2]
        clock.now += 10_000
        with pytest.warns(Ks4StreamWarning) as said:
            tasks.look_for_slow_ones({}, 6)
        assert len(said) == 2 and caplog.text.count("The worker did not answer: TimeoutError()") == 2
        assert asked == [0, 2, 4]
    finally:
        may_end.set()
        tasks.cancel()


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_a_stage_begins_without_workers_that_are_busy_or_hang(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "SHARED_SECONDS", 0.2, raising=False)
    begun, may_end = threading.Event(), threading.Event()
    others = cluster_module._Tasks(client, lambda _: (begun.set(), may_end.wait(300)), "other")
    others.begin(0, 0)
    try:
        begun.wait(300)
        for _ in range(2):
            assert list(Cluster(client).map(Squares(), [1, 2, 3], stage="beside")) == [1, 4, 9]
        assert not any(future.done() for future in others._index)
    finally:
        may_end.set()
        others.cancel()


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_a_cluster_that_adapts_begins_from_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with users_cluster(0) as client:
        client.cluster.adapt(minimum=0, maximum=1, interval="50ms")
        found: list[int] = []
        engine = Cluster(client)
        sort = threading.Thread(
            target=lambda: found.extend(engine.map(Squares(), [1, 2, 3], stage="first")), daemon=True
        )
        sort.start()
        sort.join(300)
        assert found == [1, 4, 9]


@pytest.mark.parametrize("when", ["many tasks are left", "a look is due", "the next stage begins"])
def test_a_lost_scheduler_is_reported_wherever_it_is_noticed(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.0 if when == "a look is due" else 1e6)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),  # to find it again
        users_cluster(1, timeout_s=1, silence_logs=50) as client,
    ):
        cluster, may_end = client.cluster, threading.Event()

        def function(number: int) -> int:
            if number == 2:
                cluster.loop.add_callback(cluster.scheduler.close)
                may_end.wait(300)
            return number

        engine = Cluster(client)
        if when == "the next stage begins":
            assert list(engine.map(function, [1], stage="lost")) == [1]
            client.sync(cluster.scheduler.close)
        try:
            with pytest.raises(LostWorkerError, match=r"scheduler was lost.*'lost'.*not recomputed"):
                list(engine.map(function, list(range(50)), stage="lost"))
        finally:
            may_end.set()


def test_a_lost_scheduler_is_reported() -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),  # to find it again
        users_cluster(1, timeout_s=1, silence_logs=50) as client,
    ):
        cluster, may_end = client.cluster, threading.Event()

        def function(number: int) -> None:
            cluster.loop.add_callback(cluster.scheduler.close)
            may_end.wait(300)

        try:
            with pytest.raises(LostWorkerError, match=r"scheduler was lost.*'lost'.*not recomputed"):
                list(Cluster(client).map(function, [1], stage="lost"))
        finally:
            may_end.set()


def test_a_scheduler_that_is_lost_when_the_stages_have_ended_ends_no_sort() -> None:
    """This process then merges for a while, and the client has given up; only another stage would need it."""
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),  # to find it again
        users_cluster(2, timeout_s=1, silence_logs=50) as client,
    ):
        engine = Cluster(client)
        assert list(engine.map(Squares(), [1, 2], stage="last")) == [1, 4]
        assert engine.n_workers == 2
        client.sync(client.cluster.scheduler.close)
        assert engine.n_workers == 2, "while the client looks for it"
        _wait_until(lambda: client.status == "closed")
        assert engine.n_workers == 2
        with pytest.raises(LostWorkerError, match=r"scheduler was lost.*'another'.*not recomputed"):
            list(engine.map(Squares(), [1], stage="another"))


@pytest.mark.parametrize("last", [0, 1])
def test_two_clusters_in_one_process_leave_its_settings_alone(last: int) -> None:
    """In whatever order they end; nor does anybody else compute with them, as with a user's own client."""

    def state() -> tuple[Any, ...]:
        return dict(os.environ), copy.deepcopy(dask.config.config), dict(distributed.client._global_clients)

    before = state()
    both = [local_client(n_workers=1, processes=False) for _ in range(2)]
    clients = [one.__enter__() for one in both]
    try:
        assert state() == before
        maps = [Cluster(client).map(Squares(), [1, 2, 3], stage="both") for client in clients]
        assert [list(pair) for pair in zip(*maps, strict=True)] == [[1, 1], [4, 4], [9, 9]]
    finally:
        for one in (both[not last], both[last]):
            one.__exit__(None, None, None)
    assert state() == before


def test_what_a_task_logs_goes_to_the_sort_it_belongs_to(engine: Engine) -> None:
    """Threads of a local cluster, or of a user's, begin without knowing."""

    def speak(number: int) -> tuple[str, ...]:
        return messages.listeners()

    with messages.listening() as own:
        assert set(engine.map(speak, [1, 2, 3, 4], stage="speaking")) == {(own,)}
    assert set(engine.map(speak, [1, 2, 3, 4], stage="speaking")) == {()}


def test_tidying_up_is_told_to_the_sort_it_belongs_to(engine: Engine, tmp_path: Path) -> None:
    def speak() -> None:
        (tmp_path / f"{time.monotonic_ns()}").write_text(" ".join(messages.listeners()))

    with messages.listening() as own:
        engine.run_on_workers(speak)
    assert [path.read_text() for path in tmp_path.iterdir()] == [own] * engine.n_workers


class HangsOnce:
    """Travels by its name, so that workers that are threads see this one."""

    may_end, called, lock = threading.Event(), 0, threading.Lock()

    @classmethod
    def hang(cls) -> None:
        with cls.lock:  # both workers call it at a time
            cls.called += 1
            is_first = cls.called == 1
        if is_first:
            cls.may_end.wait(300)


def test_tidying_up_does_not_wait_for_a_worker_that_hangs(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_module, "START_SECONDS", 3.0)
    Cluster(client).run_on_workers(HangsOnce.hang)
    HangsOnce.may_end.set()
    assert HangsOnce.called == 2
    assert caplog.text.count("Tidying up failed at inproc://") == caplog.text.count("TimeoutError()") == 1


def test_waiting_for_the_first_worker_raises_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "PATIENCE_SECONDS", 0.1)
    with local_client(n_workers=1, processes=False) as client:
        client.cluster.scale(0)
        while client.nthreads():
            time.sleep(0.05)
        with pytest.warns(Ks4StreamWarning, match="has no workers yet.*dask worker inproc://") as said:
            later = threading.Thread(target=lambda: (_wait_until(lambda: len(said) > 0), client.cluster.scale(1)))
            later.start()
            assert list(Cluster(client).map(Squares(), [1, 2, 3], stage="late")) == [1, 4, 9]
        later.join()


def test_waiting_for_a_worker_that_is_busy_takes_no_more_memory_with_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PATIENCE_SECONDS", 0.05)
    both, may_end = threading.Barrier(3), threading.Event()
    others = cluster_module._Tasks(client, lambda _: (both.wait(300), may_end.wait(300)), "other")
    for number in range(2):
        others.begin(number, number)

    async def n_coroutines() -> int:
        return len(asyncio.all_tasks())

    try:
        both.wait(300)
        before = client.sync(n_coroutines)
        assert cluster_module._first_worker(client, 1.0) is None  # asks again and again
        assert client.sync(n_coroutines) < before + 20
    finally:
        may_end.set()
        others.cancel()


def _wait_until(condition: Callable[[], bool], longest_s: float = 300.0) -> None:
    end = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_lost_with_all_workers_is_sent_and_computed_again(client: Client) -> None:
    """The scheduler cancels tasks whose constants are gone; a few times they are begun anew, then it is an error."""

    class Loses(Cluster):
        losses = 0

    real = cluster_module._Tasks.finished

    def lossy(self: Any, total: int) -> tuple[dict[int, Any], list[int]]:
        results, lost = real(self, total)
        if results and Loses.losses:
            Loses.losses -= 1
            lost += list(results)
            self._start_over()
            return {}, lost
        return results, lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module._Tasks, "finished", lossy)
        Loses.losses = 3
        assert list(Loses(client).map(Squares(), list(range(9)), stage="lossy")) == [n**2 for n in range(9)]
        Loses.losses = 4
        with pytest.raises(LostWorkerError, match=r"'lossy'.*block_batches"):
            list(Loses(client).map(Squares(), list(range(9)), stage="lossy"))
    settled(client)


def test_workers_may_be_lost_any_number_of_times_while_tasks_end_in_between(client: Client) -> None:
    """In a stage of many hours, on machines that are taken away now and then."""
    real, n_losses, is_due = cluster_module._Tasks.finished, [0], [True]

    def losing_every_other_time(self: Any, total: int) -> tuple[dict[int, Any], list[int]]:
        results, lost = real(self, total)
        is_lost, is_due[0] = bool(results) and is_due[0], bool(results) != is_due[0]
        if is_lost:
            n_losses[0] += 1
            self._start_over()
            return {}, lost + list(results)
        return results, lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module._Tasks, "finished", losing_every_other_time)
        assert list(Cluster(client).map(Squares(), list(range(40)), stage="often")) == [n**2 for n in range(40)]
    assert n_losses[0] > cluster_module.MAX_LOSSES + 1
    settled(client)


def test_cancelled_tasks_are_run_again_and_never_taken_for_results(client: Client) -> None:
    tasks = cluster_module._Tasks(client, Squares(slow=(0, 1)), "cancelled")
    tasks.begin(0, 0)
    tasks.begin(1, 1)
    client.cancel(list(tasks._index), force=True)
    results: dict[int, int] = {}
    lost: list[int] = []
    while len(tasks):
        found, gone = tasks.finished(2)
        results |= found
        lost += gone
    assert (sorted(lost), results) == ([0, 1], {})
    tasks.cancel()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, and workers that are threads of it, believe to see a GPU."""
    see_gpus(monkeypatch, 80)


def many_threads(n_workers: int, **options: Any) -> AbstractContextManager[Client]:
    """A user's own cluster, with four threads per worker."""
    return users_cluster(n_workers, threads_per_worker=4, **options)


class Together:
    """Tells how many of its tasks run at a time, itself included."""

    def __init__(self) -> None:
        self.now, self.lock = 0, threading.Lock()

    def __call__(self, number: int) -> int:
        with self.lock:
            self.now += 1
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
            return self.now + 1


@pytest.mark.parametrize("options", [{}, {"resources": {"GPU": 1}}])
def test_a_gpu_has_one_task_at_a_time_declared_or_not(a_gpu: None, options: dict[str, Any]) -> None:
    with many_threads(1, **options) as client:
        engine = Cluster(client, device="cuda")
        assert engine.n_workers == 1
        assert set(engine.map(Together(), list(range(12)), stage="gpu")) == {1}
        plain = Cluster(client)  # that computes on the processor
        assert plain.n_workers == 4
        both = threading.Barrier(2)  # breaks if there are never two at a time
        assert sorted(plain.map(lambda _: both.wait(300), list(range(12)), stage="cpu")) == [0] * 6 + [1] * 6


def test_tasks_go_only_to_workers_that_declare_a_gpu(a_gpu: None, client: Client) -> None:
    with many_threads(1, resources={"GPU": 1}) as own:
        cluster = own.cluster
        assert cluster is not None
        one = own.submit(lambda: None)  # a second worker without a GPU joins
        one.result()
        cluster.worker_spec["plain"] = {  # type: ignore[attr-defined]
            "cls": cluster.new_spec["cls"],  # type: ignore[attr-defined]
            "options": {**cluster.new_spec["options"], "resources": {}},  # type: ignore[attr-defined]
        }
        cluster.sync(cluster._correct_state)  # type: ignore[attr-defined]
        own.wait_for_workers(2)
        engine = Cluster(own, device="cuda")
        assert engine.n_workers == 1
        used = set(engine.map(lambda _: get_worker().address, list(range(12)), stage="gpu"))
        assert used == set(engine._workers())
        assert Cluster(own).n_workers == 8


@pytest.mark.slow
def test_one_process_per_gpu_each_seeing_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 80, 80)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with local_client(device="cuda") as client:
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["3", "5"]
        assert Cluster(client, device="cuda").n_workers == 2


@pytest.mark.slow
def test_processes_know_a_gpu_that_was_asked_for_by_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 80, 80)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert cluster_module.local_workers("cuda:1") == 1
    with local_client(processes=True, device="cuda:1") as client:
        assert list(client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()) == ["3,5"]
        assert Cluster(client, device="cuda:1").n_workers == 1


@pytest.mark.parametrize(
    ("n_gpus", "task_gb", "cores", "memory_gb", "n_workers"),
    [
        (1, None, 16, 128, 1),
        (1, (5, 1), 16, 128, 4),  # no more repay it
        (1, (30, 1), 16, 128, 2),  # nor fit
        (1, (33, 1), 16, 128, 1),  # some is left free
        (1, (100, 1), 16, 128, 1),  # whether it fits is another matter
        (1, (5, 1), 3, 128, 3),
        (1, (5, 50), 16, 128, 2),  # as the machine's memory has it
        (2, (5, 1), 16, 128, 8),
        (2, (17, 1), 16, 128, 4),  # the smaller one carries two
        (2, (5, 1), 16, 20, 6),
        (2, (5, 1), 1, 128, 2),
        (0, (5, 1), 16, 20, 6),
    ],
)
def test_as_many_workers_share_a_gpu_as_machine_and_gpu_carry(
    monkeypatch: pytest.MonkeyPatch,
    n_gpus: int,
    task_gb: tuple[int, int] | None,
    cores: int,
    memory_gb: int,
    n_workers: int,
) -> None:
    see_gpus(monkeypatch, *(80, 50)[:n_gpus])
    monkeypatch.setattr(cluster_module, "CPU_COUNT", cores)
    monkeypatch.setattr(cluster_module, "MEMORY_LIMIT", memory_gb * 10**9)
    share = task_gb and Share(gpu_bytes=task_gb[0] * 10**9, memory_bytes=task_gb[1] * 10**9)
    assert cluster_module.local_workers("cuda", sharing=share or None) == n_workers


def test_on_windows_one_thread_computes_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads would compute on the first one in turn."""
    see_gpus(monkeypatch, 80, 80)
    monkeypatch.setattr(sys, "platform", "win32")
    assert cluster_module.local_workers("cuda", sharing=Share(10**9, 10**9)) == 1


def test_an_engine_knows_the_memory_of_the_gpu_that_its_workers_share(a_gpu: None) -> None:
    with many_threads(2) as client:
        assert Cluster(client, device="cuda").gpu_memory == (80 * 10**9, 2)
        assert Cluster(client).gpu_memory is None
    assert Loop(device="cuda").gpu_memory == (80 * 10**9, 1)
    assert Loop().gpu_memory is None


@pytest.mark.slow
def test_worker_processes_have_an_environment_of_their_own(monkeypatch: pytest.MonkeyPatch, processes: Client) -> None:
    """One thread for OpenMP and torch loaded, while this process is left as it was."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    before = dict(os.environ)
    with cluster_module._environment(cluster_module.WORKER_ENVIRONMENT):
        assert os.environ["MKL_NUM_THREADS"] == "1"
    assert dict(os.environ) == before

    def look() -> tuple[bool, bool, dict[str, str]]:
        return "torch" in sys.modules, dask.config.get("distributed.worker.profile.enabled"), dict(os.environ)

    for loaded, profiled, environment in processes.run(look).values():
        assert loaded and not profiled
        assert cluster_module.WORKER_ENVIRONMENT.items() <= environment.items()


SCRIPT = """
from ks4stream.engine.cluster import Cluster, local_client
print("begun", flush=True)
with local_client(n_workers=2, processes=True) as client:
    print(list(Cluster(client).map(abs, [-1, -2, 3], stage="script")))
"""


@pytest.mark.slow
def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path) -> None:
    """Unlike with processes made by multiprocessing, which run it again. Nor is what lies in the current folder run."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (data := tmp_path / "data").mkdir()
    for name in ("dask", "torch", "ks4stream"):
        (data / f"{name}.py").write_text("raise SystemExit('this is not to be run')")
    command, environment = [sys.executable, str(tmp_path / "script.py")], os.environ | {"PYTHONPATH": PACKAGE}
    done = subprocess.run(command, capture_output=True, text=True, cwd=data, env=environment)
    assert done.stdout.splitlines() == ["begun", "[1, 2, 3]"], done.stderr
    assert "not to be run" not in done.stderr


STARTS_WORKERS = """
from ks4stream.engine import cluster
cluster.START_SECONDS = 15
with cluster.local_client(n_workers=1, processes=True):
    pass
"""


@pytest.mark.slow
def test_workers_whose_program_is_killed_while_they_start_end_too() -> None:
    """They would look for its scheduler forever."""
    code, environment = [sys.executable, "-c", STARTS_WORKERS], os.environ | {"PYTHONPATH": PACKAGE}
    with subprocess.Popen(code, env=environment, stderr=subprocess.DEVNULL) as program:
        started = psutil.Process(program.pid).children
        try:
            _wait_until(lambda: any(_is_worker(process) for process in started(recursive=True)))
            left = started(recursive=True)
        finally:
            program.kill()
    try:
        assert not psutil.wait_procs(left, timeout=300)[1]
    finally:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_worker(process: psutil.Process) -> bool:
    """Whether it is a worker, which loads torch for seconds before it looks for the scheduler, and not its nanny."""
    with suppress(psutil.NoSuchProcess):
        return any("spawn_main" in word for word in process.cmdline())
    return False


def test_a_process_that_ends_while_it_is_ended_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is gone when Dask is about to kill it, and one that is not."""
    gone, left = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "1000"])
    children = [psutil.Process(gone.pid), psutil.Process(left.pid)]
    gone.wait()
    listed = iter([children, children[1:]])
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: next(listed))

    async def start_and_close() -> int | None:
        program = cluster_module._Program("tcp://none:1")
        program.process = process = await asyncio.create_subprocess_exec("sleep", "1000")
        await program.close()
        return process.returncode

    assert asyncio.run(start_and_close()) == left.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("how_many", [1, 2])
def test_killed_workers_cost_no_result(processes: Client, how_many: int) -> None:
    """The function is sent again only where no worker is left that has it."""
    sent: list[int] = []
    real = cluster_module._Tasks._send
    processes.wait_for_workers(2, timeout=300)  # one may still be on its way back from the last test
    before = set(processes.run(os.getpid).values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module._Tasks, "_send", lambda self: (sent.append(1), real(self)))
        results = Cluster(processes).map(SlowSquares(), list(range(60)), stage="killed")
        found = [next(results) for _ in range(4)]
        for pid in sorted(before)[:how_many]:
            os.kill(pid, signal.SIGKILL)
        while len(found) < 20:  # tasks in flight end or are begun anew
            found.append(next(results))
        processes.wait_for_workers(2, timeout=300)
        found += results
    assert [square for square, _ in found] == [number**2 for number in range(60)]
    # one that came back beside a survivor gets tasks only as Dask steals them for it
    assert len({pid for _, pid in found} - before) >= how_many - 1
    assert len(sent) >= how_many


@pytest.mark.slow
def test_the_last_worker_with_the_function_may_die_while_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next look at the workers finds that nobody has it."""
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0)
    with local_client(n_workers=1, processes=True) as client:
        results = Cluster(client).map(SlowSquares(), list(range(12)), stage="killed")
        found = [next(results) for _ in range(3)]
        (before,) = client.run(os.getpid)
        os.kill(found[0][1], signal.SIGKILL)
        _wait_until(lambda: before not in client.scheduler_info()["workers"])
        client.wait_for_workers(1, timeout=300)
        found += results
    assert [square for square, _ in found] == [number**2 for number in range(12)]


class SlowSquares:
    """A number's square, and the process it was computed in."""

    def __call__(self, number: int) -> tuple[int, int]:
        time.sleep(0.02)
        return number**2, os.getpid()


PRECISIONS = """
import warnings
import torch
from ks4stream.engine import one_thread

def state():
    found = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:  # torch finds that its older and its newer interface contradict each other
            found.append("mixed")
    newer = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return found, [backend.fp32_precision for backend in newer if hasattr(backend, "fp32_precision")]

def set_newer():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"

warnings.simplefilter("error")
for allow in (
    lambda: None,
    set_newer,
    lambda: torch.set_float32_matmul_precision("medium"),
):
    allow()
    before = state()
    with one_thread():
        inside = state()
    assert inside[0] == ["highest", False] and set(inside[1]) <= {"ieee"}, inside
    assert state() == before, (before, state())
    print(before)
"""


@pytest.mark.slow
def test_products_are_of_full_precision_within_tasks_only() -> None:
    code = [sys.executable, "-c", PRECISIONS]
    done = subprocess.run(code, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PACKAGE})
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) >= 2  # the program's own choice was another each time


class Visits:
    """Leaves a file for every call, and fails if it is told to."""

    def __init__(self, folder: Path, *, fails: bool = False) -> None:
        self.folder, self.fails = folder, fails

    def __call__(self) -> None:
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        if self.fails:
            raise OSError("no way")


@pytest.mark.parametrize("fails", [False, True])
def test_run_on_workers_runs_once_in_each_worker_and_only_logs_failures(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    engine.run_on_workers(Visits(tmp_path, fails=fails))
    assert len(list(tmp_path.iterdir())) == engine.n_workers
    told = [record for record in caplog.records if record.name.startswith("ks4stream")]
    assert len(told) == fails * engine.n_workers and all("no way" in record.getMessage() for record in told)


@pytest.mark.slow
def test_everywhere_is_in_every_process(processes: Client, tmp_path: Path) -> None:
    processes.wait_for_workers(2, timeout=300)
    Cluster(processes).run_on_workers(Visits(tmp_path))
    pids = [int(path.name.split("-")[0]) for path in tmp_path.iterdir()]
    assert sorted(pids) == sorted(processes.run(os.getpid).values())


def test_tidying_up_without_a_scheduler_is_no_error(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with local_client(n_workers=1, processes=False) as own:
        engine = Cluster(own)
    engine.run_on_workers(Visits(tmp_path))
    assert "Tidying up failed" in caplog.text and not list(tmp_path.iterdir())


def test_a_gpu_too_small_for_a_batch_names_the_setting(engine: Engine) -> None:
    def function(number: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(GpuMemoryError, match=r"CUDA out of memory.*batch_size"):
        list(engine.map(function, [1], stage="large"))


def test_memory_for_a_task_is_the_machines_or_the_workers_limit(client: Client) -> None:
    whole = Loop().worker_memory_bytes
    assert Cluster(client).worker_memory_bytes == whole / 2
    with users_cluster(1, threads_per_worker=2, memory_limit="1GB") as own:
        assert Cluster(own).worker_memory_bytes == 0.5e9
