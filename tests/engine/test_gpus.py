"""Which GPUs there are, and what is free of them."""

from __future__ import annotations

import pytest
import torch
from seen_gpus import see_gpus

from ks4stream.engine import gpus
from ks4stream.engine.gpus import Busy, Free, GpuMemory


@pytest.mark.parametrize(
    ("device", "asked", "numbers", "names"),
    [
        ("cuda", None, [0, 1], ["0", "1"]),
        ("cuda", "7,GPU-5", [0, 1], ["7", "GPU-5"]),
        ("cuda:1", None, [1], ["0,1"]),
        ("cuda:1", "7,GPU-5", [1], ["7,GPU-5"]),
        ("cuda:2", None, [], []),
        ("cpu", "7,GPU-5", [], []),
    ],
)
def test_a_device_stands_for_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: str | None, numbers: list[int], names: list[str]
) -> None:
    see_gpus(monkeypatch, 10, 20)
    if asked is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert gpus.visible(device) == numbers
    assert gpus.for_processes(device) == names


def test_what_a_process_keeps_and_does_not_use_is_free_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 10, 20, kept_gb=3)
    assert gpus.free_here("cuda") == 13 * 10**9
    assert gpus.free_here("cuda:1") == 23 * 10**9
    assert gpus.free_here("cpu") is None
    found = gpus.free("cuda:1")
    assert found is not None and found.gpu.endswith("GPU-1") and found[1:] == (20 * 10**9, 3 * 10**9)


def test_the_gpu_counts_where_each_has_least() -> None:
    found = [Free("a", 10, 0), Free("b", 16, 1), Free("b", 15, 2), Free("c", 30, 0)]
    assert gpus.shared(found) == GpuMemory(n_bytes=18, n_workers=2)
    assert gpus.shared([]) is None


def test_what_gpus_do_is_known_with_nvidias_library_or_where_this_process_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(number: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    see_gpus(monkeypatch, 10, 20)
    monkeypatch.setattr(torch.cuda, "device_memory_used", missing)
    assert gpus.busy("cuda") == Busy((190 + 180) * 10**9, None)
    asked: list[int] = []

    def mem_get_info(number: int) -> tuple[int, int]:
        asked.append(number)
        return 20 * 10**9, 200 * 10**9

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: number * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert gpus.busy("cuda") == Busy(180 * 10**9, None) and gpus.busy("cuda:0") is None
    assert asked == [1], "asking starts CUDA on a GPU"
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda number: (number + 1) * 10**9)
    monkeypatch.setattr(torch.cuda, "utilization", lambda number: 40 + 20 * number)
    assert gpus.busy("cuda") == Busy(3 * 10**9, 50.0)
    assert gpus.busy("cuda:1") == Busy(2 * 10**9, 60.0)
    assert gpus.busy("cpu") is None


def test_an_error_of_cuda_does_not_reach_who_only_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    see_gpus(monkeypatch, 10)
    monkeypatch.setattr(torch.cuda, "device_memory_used", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert gpus.busy("cuda") is None
