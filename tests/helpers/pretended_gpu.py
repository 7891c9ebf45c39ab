"""A GPU that is none: tensors on the CPU that say they are on "cuda" and, as real ones do, refuse to meet others.

It finds what only a GPU would: a tensor made on the wrong device, an array taken of one that is not here. What it
computes is what the CPU computes, to the last byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ks4stream.engine import gpus

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ANSWERS = {aten._local_scalar_dense.default, aten.equal.default}  # what they return is Python's
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
NOT_HERE = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class GpuTensor(torch.Tensor):
    """Wraps the tensor that it stands for."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not aten.copy_.default:  # the one that goes from device to device
            _check_devices(func, args, kwargs)
        own_args, own_kwargs = tree_map(_held, (args, kwargs))
        result = func(*own_args, **own_kwargs)
        if func in ANSWERS:
            return result
        given = zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)], strict=False)
        written = [
            kwargs.get(argument.name, value)
            for argument, value in given
            if argument.alias_info and argument.alias_info.is_write
        ]
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda one: GpuTensor(one) if isinstance(one, torch.Tensor) else one, result)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, GpuTensor) else one


def _check_devices(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A single number from the CPU may be mixed in, and indices of something on the GPU may lie there."""
    indexed = func in INDEXED
    for one in tree_leaves((args[0], args[2:]) if indexed else (args, kwargs)):
        if isinstance(one, torch.Tensor) and not isinstance(one, GpuTensor) and one.dim() > 0:
            raise RuntimeError(f"{TWO_DEVICES} ({func._schema.name})")
    if indexed and not isinstance(args[0], GpuTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


class _Moves(TorchFunctionMode):
    """Sees to what goes from one device to the other, or is made on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, GpuTensor):
            if name in ("numpy", "__array__"):
                raise TypeError(NOT_HERE)
            if name == "tolist":
                return first.held.tolist()
            if name == "cpu":
                return first.held.clone()
        if name == "to":
            return self._to(func, args, kwargs)
        device = kwargs.pop("device", None)
        if device is None:
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if torch.device(device).type == "cpu" or isinstance(made, GpuTensor):
            return made
        return GpuTensor(made.clone() if name == "as_tensor" else made)

    @staticmethod
    def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Tensor.to(device, …), .to(dtype), .to(other tensor)."""
        tensor, *rest = args
        kwargs.pop("non_blocking", None)
        device = kwargs.pop("device", None)
        if rest and isinstance(rest[0], torch.Tensor):
            device, rest[0] = rest[0].device, rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device):
            device = rest.pop(0)
        if device is not None and torch.device(device).type != tensor.device.type:
            tensor = tensor.held.clone() if isinstance(tensor, GpuTensor) else GpuTensor(tensor.clone())
        return func(tensor, *rest, **kwargs) if rest or kwargs else tensor


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors asked for on "cuda" are wrapped ones in this thread until this ends; none is pinned in any thread."""
    with pytest.MonkeyPatch.context() as patch, _Moves():
        patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # there is no memory to pin it to
        patch.setattr(gpus, "_check_seen", lambda device: None)
        yield
