"""GPUs that this process, and workers that are threads of it, believe to see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def see_gpus(patch: pytest.MonkeyPatch, *free_gb: float, kept_gb: float = 0.0) -> None:
    """One for each number, with so much free memory; of each this process keeps some that it does not use."""

    def number(device: torch.device | int) -> int:
        return (device.index or 0) if isinstance(device, torch.device) else device

    def mem_get_info(device: torch.device | int) -> tuple[int, int]:
        return round(free_gb[number(device)] * 10**9), 200 * 10**9

    patch.setattr(torch.cuda, "is_available", lambda: bool(free_gb))
    patch.setattr(torch.cuda, "device_count", lambda: len(free_gb))
    patch.setattr(torch.cuda, "get_device_name", lambda number: "H200")
    patch.setattr(torch.cuda, "get_device_properties", lambda which: SimpleNamespace(uuid=f"GPU-{number(which)}"))
    patch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    patch.setattr(torch.cuda, "memory_reserved", lambda device: round((1 + kept_gb) * 10**9))
    patch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
