"""ks4stream as a sorter of SpikeInterface: :func:`register`, then ``run_sorter("ks4stream", recording, …)``.

SpikeInterface has no way to find sorters of other packages, so each process that uses this one by its name must call
:func:`register` first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ks4stream.errors import MissingDependencyError
from ks4stream.exchange import spikeinterface_core, to_spikeinterface
from ks4stream.resources import Resources
from ks4stream.settings import Settings

if TYPE_CHECKING:
    from ks4stream.engine import Progress

__all__ = ["register"]

NAME = "ks4stream"

_OPTIONS: dict[str, tuple[Any, str]] = {
    "scheduler": (
        None,
        "Address of a Dask scheduler that computes, 'tcp://host:8786'; by default the active client of this process, or"
        " else this machine. 'loop' computes in this thread.",
    ),
    "workers": (None, "Number of workers on this machine; by default one per GPU, or else one per core."),
    "device": (None, "Where kernels run, 'cpu', 'cuda' or 'cuda:1'; by default the GPU if there is one."),
    "save_features": (True, "Write the features of all spikes, which Phy's feature view needs."),
    "save_plots": (False, "Write Kilosort4's plots too; report.html shows the same and more."),
    "save_extra_vars": (False, "Write Kilosort4's extra files too."),
    "save_preprocessed_copy": (False, "Write the whitened, drift-corrected traces to temp_wh.dat too."),
    "resume": (True, "Continue where an earlier run in the same folder stopped."),
    "keep_run": (False, "Keep what the tasks found, so that a sort with changed settings in this folder is shorter."),
    "keep_good_only": (False, "Leave out units that are not labelled 'good' when the result is read."),
}
"""Parameters that are not settings: default, and description."""

_OF_SORT = ("save_features", "save_plots", "save_extra_vars", "save_preprocessed_copy", "resume", "keep_run")


def register() -> None:
    """Add the sorter ``"ks4stream"`` to SpikeInterface, in this process.

    Then ``run_sorter``, ``run_sorter_by_property``, ``get_default_sorter_params``, ``get_sorter_params_description``,
    ``available_sorters`` and ``read_sorter_folder`` of ``spikeinterface.sorters`` know it. A new process must call this
    function too before it reads a folder with ``read_sorter_folder``, and so must processes that SpikeInterface starts
    for ``run_sorter_jobs``. Calling it again changes nothing.

    Raises
    ------
    MissingDependencyError
        If SpikeInterface is not installed, or is too old.

    Examples
    --------
    >>> from ks4stream.spikeinterface import register  # doctest: +SKIP
    >>> register()  # doctest: +SKIP
    >>> from spikeinterface.sorters import run_sorter  # doctest: +SKIP
    >>> sorting = run_sorter("ks4stream", recording, folder="sorted")  # doctest: +SKIP
    """
    spikeinterface_core()
    try:
        from spikeinterface.sorters import sorterlist
    except ImportError as error:
        raise MissingDependencyError(
            f"spikeinterface.sorters cannot be imported ({error}); install what it needs with: pip install "
            "'ks4stream[spikeinterface]'."
        ) from error
    sorter = _sorter()
    known = sorterlist.sorter_full_list
    known[:] = [other for other in known if other.sorter_name != NAME] + [sorter]
    sorterlist.sorter_dict[NAME] = sorter


def settings_of(params: Mapping[str, Any]) -> Settings:
    """The settings among a sorter's parameters.

    Raises
    ------
    SettingsError
    """
    return Settings(**{spec.name: params[spec.name] for spec in fields(Settings) if spec.name in params})


def resources_of(params: Mapping[str, Any]) -> Resources:
    """Where to compute, among a sorter's parameters.

    Raises
    ------
    SettingsError
    """
    return Resources(client=params.get("scheduler"), workers=params.get("workers"), device=params.get("device"))


def _described(spec: Any) -> str:
    """The description of a setting, with its unit and what the default stands for."""
    about = spec.metadata
    text: str = about["doc"]
    text += f" In {about['unit']}." if about["unit"] else ""
    return text + (f" None: {about['if_none']}." if about["if_none"] else "")


@lru_cache(maxsize=1)
def _sorter() -> Any:
    """The class that SpikeInterface calls; all its methods are class methods, and all state is in the folder."""
    from spikeinterface.sorters.basesorter import BaseSorter

    class Ks4StreamSorter(BaseSorter):  # type: ignore[misc]
        """Sorts a recording with ks4stream."""

        sorter_name = NAME
        requires_locations = True
        gpu_capability = "nvidia-optional"
        requires_binary_data = False
        handle_multi_segment = True
        sorter_description = "Spike sorting as Kilosort4 does it, as a dataflow on Dask: on this machine or a cluster."
        installation_mesg = "pip install ks4stream"

        @classmethod
        def is_installed(cls) -> bool:
            return True

        @classmethod
        def get_sorter_version(cls) -> str:
            import ks4stream

            return str(ks4stream.__version__)

        @classmethod
        def _dynamic_params(cls) -> tuple[dict[str, Any], dict[str, str]]:
            defaults = {spec.name: spec.default for spec in fields(Settings)}
            descriptions = {spec.name: _described(spec) for spec in fields(Settings)}
            defaults |= {name: default for name, (default, _) in _OPTIONS.items()}
            return defaults, descriptions | {name: text for name, (_, text) in _OPTIONS.items()}

        @classmethod
        def _check_params(cls, recording: Any, output_folder: Path, params: dict[str, Any]) -> dict[str, Any]:
            settings_of(params)
            resources_of(params)
            if recording is not None:
                _opened(recording)
            return params

        @classmethod
        def _check_apply_filter_in_params(cls, params: dict[str, Any]) -> bool:
            return bool(params["highpass_cutoff"] > 0)

        @classmethod
        def _setup_recording(
            cls, recording: Any, sorter_output_folder: Path, params: dict[str, Any], verbose: bool
        ) -> None:
            """Nothing: SpikeInterface has written to the folder how to open the recording where it lies."""

        @classmethod
        def _run_from_folder(cls, sorter_output_folder: Path, params: dict[str, Any], verbose: bool) -> None:
            from ks4stream.sorter import sort

            recording = cls.load_recording_from_folder(Path(sorter_output_folder).parent, with_warnings=False)
            options = {name: params[name] for name in _OF_SORT if name in params}
            with _progress(verbose) as progress:
                sort(
                    _opened(recording),
                    settings_of(params),
                    results_dir=sorter_output_folder,
                    resources=resources_of(params),
                    progress=progress,
                    **options,
                )

        @classmethod
        def _get_result_from_folder(cls, sorter_output_folder: Path) -> Any:
            from ks4stream.io.store import load_sorting

            folder = Path(sorter_output_folder)
            sorting = load_sorting(folder, features=False)
            recorded = _json_of(folder.parent / "recording_attributes.json")  # all there is if the recording is gone
            asked = _json_of(folder.parent / "spikeinterface_params.json").get("sorter_params", {})
            return to_spikeinterface(
                sorting,
                keep_good_only=bool(asked.get("keep_good_only", False)),
                lengths=recorded.get("num_samples"),
                channel_ids=recorded.get("channel_ids"),
            )

    return Ks4StreamSorter


def _opened(recording: Any) -> Any:
    from ks4stream.io.recordings import open_recording

    return open_recording(recording)


def _json_of(path: Path) -> dict[str, Any]:
    """Content of one of SpikeInterface's own files; empty if there is none."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _progress(verbose: bool) -> Iterator[Progress | None]:
    """A display of progress on stderr, if it is wanted."""
    if not verbose:
        yield None
        return
    from rich.console import Console

    from ks4stream.report.progress import shown_progress

    with shown_progress(Console(file=sys.stderr)) as progress:
        yield progress
