"""Two sorts in two threads of one process, as programs with windows and notebooks have them."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ks4stream import messages, simulate
from ks4stream.io.recordings import open_recording
from ks4stream.recording import BaseSource, Recording
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.sorter import sort

pytestmark = pytest.mark.slow  # whole sorts
RATE = 30_000.0
PROBE = simulate.linear_probe(10, pitch_um=20)
SETTINGS = Settings(batch_size=15_000, nblocks=0, Th_universal=9)
NAMES = ("first", "second")
WAIT_S = 300  # none of this is waited for; only a test that fails gives up after it

logger = logging.getLogger("ks4stream")


@dataclass(frozen=True)
class Talkative(BaseSource):
    """Samples in memory; every time they are read is logged, by whatever thread reads them."""

    is_remote = False

    samples: NDArray[np.int16]
    name: str

    @property
    def n_samples(self) -> int:
        return len(self.samples)

    @property
    def n_channels(self) -> int:
        return self.samples.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.samples.dtype

    @property
    def flat_files(self) -> str:
        return "they are in memory"

    @property
    def digest_is_exact(self) -> bool:
        return True

    def digest(self) -> str:
        return self.name

    def read(self, start: int, stop: int) -> NDArray[Any]:
        logging.getLogger("ks4stream.test").info("read for %s", self.name)
        return self.samples[start:stop]


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    """Two different ones; the second has a dead channel."""
    found = {}
    for seed, name in enumerate(NAMES):
        truth = simulate.simulate(
            PROBE,
            2.0,
            seed=seed,
            n_units=3,
            dead_channels=(4,) * seed,
            amplitude_range_uv=(120, 250),
            hash_per_channel=0,
        )
        samples = truth.read(0, 60_000)
        opened = open_recording(samples, fs=RATE, probe=PROBE)
        found[name] = Recording(**{**opened.__dict__, "source": Talkative(samples, name), "name": name})
    return found


def sorted_by(recording: Recording, folder: Path, progress: Callable[..., None] = lambda *_: None) -> Sorting:
    found = sort(recording, SETTINGS, results_dir=folder, client="loop", device="cpu", progress=progress)
    assert not messages.listeners(), "who listened to this sort does no more"
    return found


@pytest.fixture(scope="module")
def alone(recordings: dict[str, Recording], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Sorting, str]]:
    """Each sorted by itself, and its log."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, recording in recordings.items():
            folder = tmp_path_factory.mktemp(name)
            found[name] = sorted_by(recording, folder), (folder / "kilosort4.log").read_text()
    return found


def state() -> dict[str, Any]:
    """What a sort finds and has to leave as it was."""
    return {
        "showwarning": warnings.showwarning,
        "filters": list(warnings.filters),
        "level": logger.level,
        "handlers": list(logger.handlers),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "precision": torch.get_float32_matmul_precision(),
        "dask": dask.config.config.get("scheduler"),
        "clients": list(distributed.client._global_clients),
    }


@pytest.mark.parametrize("last", NAMES)
def test_each_has_its_own_warnings_log_and_results(
    recordings: dict[str, Recording], alone: dict[str, tuple[Sorting, str]], tmp_path: Path, last: str
) -> None:
    """They begin one after the other, and end in this order or in the other; a user may ignore warnings."""
    began, ended = ({name: threading.Event() for name in NAMES} for _ in range(2))
    asked = threading.Barrier(2)
    found: dict[str, Sorting] = {}
    threads_after: dict[str, tuple[int, int]] = {}

    def run(name: str) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == "whitening":  # the other one begins, and both are inside
                began[name].set()
                assert began["second"].wait(WAIT_S)
            if stage == "results" and name == last:
                assert ended[NAMES[name == "first"]].wait(WAIT_S)

        before = torch.get_num_threads()
        asked.wait(WAIT_S)  # both threads, before either sort begins
        if name == "second":
            assert began["first"].wait(WAIT_S)
        try:
            found[name] = sorted_by(recordings[name], tmp_path / name, progress)
        finally:
            threads_after[name] = before, torch.get_num_threads()
            began[name].set()
            ended[name].set()

    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = state()
            threads = [threading.Thread(target=run, args=(name,)) for name in NAMES]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert state() == before
    finally:
        torch.set_num_threads(n_threads)
    assert threads_after == dict.fromkeys(NAMES, (2, 2))
    for name, other in zip(NAMES, NAMES[::-1], strict=True):
        single, single_log = alone[name]
        for array in ("sample", "unit", "template", "score", "features", "kept", "x_um", "y_um", "unit_features"):
            assert getattr(found[name], array).tobytes() == getattr(single, array).tobytes(), array
        assert single.n_spikes > 0
        assert found[name].warnings == single.warnings
        log = (tmp_path / name / "kilosort4.log").read_text()
        assert [log.count(text) for text in single.warnings] == [1] * len(single.warnings)
        assert log.count(f"read for {name}") == single_log.count(f"read for {name}") > 4
        assert f"read for {other}" not in log
    said = [alone[name][0].warnings for name in NAMES]
    assert any("channels [4] of the file have no signal" in text for text in said[1])
    assert said[0] and not any("have no signal" in text for text in said[0])
