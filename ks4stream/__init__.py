"""Spike sorting with the method of Kilosort4, as a dataflow on Dask.

Names are loaded on first use, so that importing the package takes almost no time. Three of them are modules:
``simulate`` makes recordings with known spikes, ``scoring`` measures how well a sorting found them, and ``errors`` has
all errors and warnings.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ks4stream import errors, scoring, simulate
    from ks4stream.curation import carry_curation
    from ks4stream.io.nwb import write_nwb
    from ks4stream.io.probes import load_probe
    from ks4stream.io.recordings import open_recording
    from ks4stream.io.store import load_sorting
    from ks4stream.kilosort4.run_kilosort import run_kilosort
    from ks4stream.planning import plan
    from ks4stream.preprocessed import preprocess
    from ks4stream.probe import Probe
    from ks4stream.recording import Recording
    from ks4stream.resources import Resources
    from ks4stream.results import Sorting
    from ks4stream.settings import Settings
    from ks4stream.sorter import sort
    from ks4stream.unit_metrics import quality_metrics
    from ks4stream.unit_waveforms import mean_waveforms

__all__ = [
    "open_recording",
    "load_probe",
    "Recording",
    "Probe",
    "Settings",
    "Resources",
    "plan",
    "sort",
    "Sorting",
    "load_sorting",
    "mean_waveforms",
    "quality_metrics",
    "write_nwb",
    "carry_curation",
    "preprocess",
    "run_kilosort",
    "simulate",
    "scoring",
    "errors",
]

_HOME = {
    "open_recording": "ks4stream.io.recordings",
    "load_probe": "ks4stream.io.probes",
    "Recording": "ks4stream.recording",
    "Probe": "ks4stream.probe",
    "Settings": "ks4stream.settings",
    "Resources": "ks4stream.resources",
    "plan": "ks4stream.planning",
    "sort": "ks4stream.sorter",
    "Sorting": "ks4stream.results",
    "load_sorting": "ks4stream.io.store",
    "mean_waveforms": "ks4stream.unit_waveforms",
    "quality_metrics": "ks4stream.unit_metrics",
    "write_nwb": "ks4stream.io.nwb",
    "carry_curation": "ks4stream.curation",
    "preprocess": "ks4stream.preprocessed",
    "run_kilosort": "ks4stream.kilosort4.run_kilosort",
}
_MODULES = ("simulate", "scoring", "errors")


def __getattr__(name: str) -> Any:
    """Load a public name on first use; later uses find it at once."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")  # which also sets the attribute
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("ks4stream")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__, "__version__"})
