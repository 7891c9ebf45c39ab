"""ks4stream under the name ``kilosort``: found while that is wanted, and gone afterwards."""

from __future__ import annotations

import importlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from types import ModuleType

import pytest

from ks4stream import kilosort4
from ks4stream.kilosort4 import as_kilosort
from ks4stream.kilosort4.name import MODULES


def test_its_modules_and_its_version_are_found_by_that_name() -> None:
    with as_kilosort() as package:
        assert importlib.import_module("kilosort") is package
        assert package.run_kilosort is kilosort4.run_kilosort and package.io is kilosort4.io
        from kilosort.io import load_probe
        from kilosort.run_kilosort import detect_spikes

        assert load_probe.__module__.startswith("ks4stream.") and detect_spikes.__module__.startswith("ks4stream.")
        assert metadata.version("kilosort") == package.__version__ == "4.1.7"
        assert importlib.util.find_spec("kilosort") is not None
        assert metadata.version("KiloSort") == "4.1.7"  # names of distributions are compared normalised
        assert metadata.version("numpy")  # others are found as before


def test_only_kilosorts_modules_are_found() -> None:
    with as_kilosort() as package:
        for name in ("parts", "ops", "arguments"):
            with pytest.raises(ModuleNotFoundError, match="ks4stream, which has the name"):
                importlib.import_module(f"kilosort.{name}")
        with pytest.raises(ImportError):
            from kilosort import parts  # noqa: F401
        assert sorted(name for name in sys.modules if name.split(".")[0] == "kilosort") == [
            "kilosort",
            *(f"kilosort.{name}" for name in MODULES),
        ]
        assert package.__path__ == [] and package.__all__ == kilosort4.__all__


def test_what_had_the_name_before_has_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("kilosort")
    monkeypatch.setitem(sys.modules, "kilosort", theirs)
    monkeypatch.setitem(sys.modules, "kilosort.io", ModuleType("kilosort.io"))
    finders = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), as_kilosort():
        assert sys.modules["kilosort"] is not theirs
        raise ZeroDivisionError
    assert sys.modules["kilosort"] is theirs and sys.meta_path == finders
    assert "kilosort.run_kilosort" not in sys.modules


def test_it_may_be_entered_twice() -> None:
    with as_kilosort():
        with as_kilosort():
            pass
        assert metadata.version("kilosort") == "4.1.7" and "kilosort.io" in sys.modules
    assert "kilosort" not in sys.modules or sys.modules["kilosort"] is not kilosort4


def test_the_last_to_leave_gives_the_name_back(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("kilosort")
    monkeypatch.setitem(sys.modules, "kilosort", theirs)
    finders = list(sys.meta_path)
    first, second = as_kilosort(), as_kilosort()
    package = first.__enter__()
    assert second.__enter__() is package
    first.__exit__(None, None, None)
    assert sys.modules["kilosort"] is package and metadata.version("kilosort") == "4.1.7"
    second.__exit__(None, None, None)
    assert sys.modules["kilosort"] is theirs and sys.meta_path == finders
    assert "kilosort.io" not in sys.modules


def test_threads_may_enter_it() -> None:
    finders, before = list(sys.meta_path), sys.modules.get("kilosort")
    together = threading.Barrier(4)

    def enter() -> bool:
        together.wait()
        for _ in range(200):
            with as_kilosort() as package:
                if sys.modules.get("kilosort") is not package or "kilosort.io" not in sys.modules:
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(each.result() for each in [pool.submit(enter) for _ in range(4)])
    assert sys.meta_path == finders and sys.modules.get("kilosort") is before


def test_all_that_kilosort4_documents_is_there() -> None:
    names = {
        "run_kilosort": (
            "run_kilosort set_files initialize_ops get_run_parameters compute_preprocessing compute_drift_correction "
            "detect_spikes cluster_spikes save_sorting load_sorting setup_logger close_logger"
        ),
        "io": (
            "load_probe save_probe remove_bad_channels select_shank find_binary load_ops save_ops save_to_phy "
            "save_preprocessing bfile_from_ops RecordingExtractorAsArray BinaryFiltered BinaryRWFile"
        ),
        "parameters": "MAIN_PARAMETERS EXTRA_PARAMETERS DEFAULT_SETTINGS compare_settings",
        "plots": "plot_drift_amount plot_drift_scatter plot_diagnostics plot_spike_positions",
        "utils": "PROBE_DIR DOWNLOADS_DIR download_probes",
    }
    for module, expected in names.items():
        found = importlib.import_module(f"ks4stream.kilosort4.{module}")
        assert [name for name in expected.split() if not hasattr(found, name)] == []
        assert getattr(kilosort4, module) is found or module == "run_kilosort"  # a function hides the module
    assert kilosort4.DEFAULT_SETTINGS is kilosort4.parameters.DEFAULT_SETTINGS
    assert kilosort4.PROBE_DIR == kilosort4.utils.PROBE_DIR
