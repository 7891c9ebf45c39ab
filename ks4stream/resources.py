"""Where a sort computes, and with what: none of it changes a result."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ks4stream.errors import SettingsError
from ks4stream.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a sort may use. No result depends on it, except that another kind of processor may change last digits.

    Attributes
    ----------
    client : distributed.Client or str, optional
        A client, or the address of a scheduler ("tcp://host:8786"); by default the active client, as in Dask's own
        functions, and without one the cores and GPUs of this machine. The string "loop" computes in this thread, one
        task after another.
    workers : int, optional
        Number of workers on this machine, which then computes whether or not a client is active; by default one per GPU
        (up to four for long recordings), and without a GPU one per core, as memory allows.
    device : str or torch.device, optional
        Where kernels run: "cpu", "cuda" or "cuda:1"; by default the GPU if this process sees one.
    block_batches : int, optional
        Batches per task; by default a minute of recording, or less if that would make fewer than 32 tasks. With a
        different number, a run does not find the blocks that an earlier one finished.
    cache_dir : path, optional
        Folder in which each machine that computes keeps a compressed copy of the recording. By default this is the
        temporary folder, for the duration of the sort, if the recording is in an object store; otherwise there is no
        copy. With "off" the recording is fetched again in every pass. See :func:`ks4stream.io.recording_cache.cached`.
    cache_bytes : int, optional
        Disk space that the cache may use on each machine; by default half of what is free.
    clear_cache : bool
        After each step, free the GPU memory that torch keeps for later, for other programs that share the GPU.

    Raises
    ------
    SettingsError
        If both a client and a number of workers are given, or a number makes no sense.
    """

    client: Any = None
    workers: int | None = None
    device: str | torch.device | None = None
    block_batches: int | None = None
    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: int | None = None
    clear_cache: bool = False

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("block_batches", 1), ("cache_bytes", 0)):
            object.__setattr__(self, name, checked_number(name, getattr(self, name), least))
        if self.client is not None and self.workers is not None:
            raise SettingsError(
                f"workers={self.workers} was given with a client, which has its own workers. Leave one of them out."
            )

    @classmethod
    def given(cls, resources: Resources | None, changes: dict[str, Any]) -> Resources:
        """The resources, or the defaults, with those changes that are not None: None stands for an argument left out.

        To undo a value, use ``dataclasses.replace(resources, workers=None)``.

        Raises
        ------
        SettingsError
            If a name is unknown or names a setting.
        """
        known = [spec.name for spec in fields(cls)]
        for name in changes:
            if name not in known:
                if name in Settings.__dataclass_fields__:
                    raise SettingsError(f"{name} is a setting: pass it as settings=Settings({name}=…).")
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"The resources are {', '.join(known)}."
                raise SettingsError(f"{name} is neither an argument nor a resource. {hint}")
        return replace(resources or cls(), **{name: value for name, value in changes.items() if value is not None})


def checked_number(name: str, value: Any, least: int = 1) -> int | None:
    """Return a number of workers, batches or bytes as an int, or None if it is not given.

    Raises
    ------
    SettingsError
        If it is not a whole number of at least `least`.
    """
    if value is None:
        return None
    try:
        number = least - 1 if isinstance(value, bool | str) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if number < least or number != value:
        raise SettingsError(f"{name}={value!r} must be a whole number of at least {least}.")
    return number
