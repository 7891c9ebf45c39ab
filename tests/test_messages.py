"""What a sort says is recorded for it alone, and shown by Python's rules."""

from __future__ import annotations

import ast
import logging
import threading
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ks4stream
from ks4stream import messages
from ks4stream.errors import FewSpikesWarning, Ks4StreamWarning
from ks4stream.io.probes import load_probe
from ks4stream.io.recording_cache import CachedSource
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import ArraySource
from ks4stream.settings import Settings
from ks4stream.sorter import sort
from ks4stream.stages.preprocessing import Preprocessor, tiling_of


def test_filters_hide_what_is_shown_and_never_what_is_recorded(caplog):
    for rule, n_shown in (("ignore", 0), ("always", 2), ("default", 1)):  # the latter: once for each place
        caplog.clear()
        with warnings.catch_warnings(record=True) as shown, messages.recorded() as said:
            warnings.simplefilter(rule)
            for _ in range(2):
                messages.warn("few", FewSpikesWarning)
        assert said == ["few"]
        assert [record.getMessage() for record in caplog.records] == ["few", "few"]
        assert [str(one.message) for one in shown] == ["few", "few"][:n_shown]


def test_as_an_error_it_is_recorded_first(caplog):
    with messages.recorded() as said, pytest.raises(FewSpikesWarning, match="few"):  # pytest's own filter is "error"
        messages.warn("few", FewSpikesWarning)
    assert said == ["few"] == [record.getMessage() for record in caplog.records]


def line_of(text: str) -> int:
    """Return the number of the only line of this file that ends with `text`."""
    (number,) = (n for n, line in enumerate(Path(__file__).read_text("utf-8").splitlines(), 1) if line.endswith(text))
    return number


@pytest.mark.slow
def test_a_warning_from_deep_inside_names_the_line_that_called_sort():
    """Also through context managers, which put frames of contextlib between ours."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 20, (40_000, 4)).astype(np.int16)
    recording = open_recording(noise, fs=20_000, probe=load_probe("tetrode"))
    settings = Settings(batch_size=10_000, nblocks=0, Th_single_ch=50)
    with pytest.warns(Ks4StreamWarning) as shown:
        sort(recording, settings, client="loop", device="cpu")  # the line to be named
    issued_by = {"clean spikes": "LearnWaveforms", "nearest_chans": "geometry", "If you expected more": "pipeline"}
    for text, where in issued_by.items():
        assert any(text in str(one.message) for one in shown), where
    assert {(one.filename, one.lineno) for one in shown} == {(__file__, line_of("# the line to be named"))}


def test_a_method_made_by_dataclasses_is_not_taken_for_the_caller():
    """Such a method has no file, but the module of its class."""
    namespace: dict[str, Any] = {"__name__": "ks4stream.made", "warn": messages.warn}
    exec("def made():\n    warn('few')", namespace)
    with pytest.warns(Ks4StreamWarning) as shown:
        namespace["made"]()  # outside
    assert [(one.filename, one.lineno) for one in shown] == [(__file__, line_of("# outside"))]


def test_outside_a_sort_it_is_only_shown(caplog):
    with pytest.warns(FewSpikesWarning):
        messages.warn("few", FewSpikesWarning)
    assert not caplog.records


def test_what_is_logged_needs_no_record(caplog):
    """As of a recording that is opened while a log is kept."""
    with messages.listening(), pytest.warns(FewSpikesWarning):
        messages.warn("few", FewSpikesWarning)
    assert [record.getMessage() for record in caplog.records] == ["few"]


def test_where_nothing_is_logged_python_does_not_show_it_once_more(capsys, monkeypatch):
    """Its last resort prints what no handler takes, whatever the filters are."""
    monkeypatch.setattr(logging.getLogger("ks4stream"), "propagate", False)
    with messages.recorded() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        messages.warn("few", FewSpikesWarning)
    assert said == ["few"] and capsys.readouterr().err == ""


def test_what_is_said_elsewhere_is_neither_recorded_nor_shown():
    with messages.recorded() as said:
        with messages.silent():
            messages.warn("twice", FewSpikesWarning)
        with pytest.warns(FewSpikesWarning):
            messages.warn("once", FewSpikesWarning)
    assert said == ["once"]


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
def test_threads_record_their_own(order):
    inside, may_end = threading.Barrier(3), {name: threading.Event() for name in "ab"}
    said: dict[str, list[str]] = {}

    def sort(name: str) -> None:
        with messages.recorded() as said[name]:
            inside.wait(300)
            messages.warn(f"{name} is here", FewSpikesWarning)
            may_end[name].wait(300)
            messages.warn(f"{name} goes", FewSpikesWarning)

    show = warnings.showwarning
    threads = {name: threading.Thread(target=sort, args=(name,)) for name in "ab"}
    for thread in threads.values():
        thread.start()
    inside.wait(300)
    messages.warn("nobody hears", FewSpikesWarning)
    for name in "ab" if order == "first in, first out" else "ba":
        may_end[name].set()
        threads[name].join()
    assert said == {name: [f"{name} is here", f"{name} goes"] for name in "ab"}
    assert warnings.showwarning is show


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_listeners_are_passed_on_to_new_threads():
    def helper(those: tuple[str, ...]) -> None:
        messages.warn("unheard", FewSpikesWarning)
        with messages.heard_by(those):
            messages.warn("by those", FewSpikesWarning)
        messages.hand_on(those)
        messages.warn("by those, too", FewSpikesWarning)

    with messages.recorded() as said:
        thread = threading.Thread(target=helper, args=((*messages.listeners(), "one of another process"),))
        thread.start()
        thread.join()
    assert said == ["by those", "by those, too"]


@dataclass(frozen=True, eq=False)
class Heard(ArraySource):
    """Samples in memory, and who hears those that read them."""

    heard: set[tuple[str, ...]] = field(default_factory=set)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        self.heard.add(messages.listeners())
        return super().read(start, stop)


def test_threads_that_fetch_and_read_ahead_are_heard_by_their_sort(tmp_path):
    """The pool that fetches is shared by all sorts of a process."""
    samples = np.zeros((40_000, 4), np.int16)
    for _ in range(2):
        source = Heard(samples)
        opened = open_recording(samples, fs=10_000, probe=load_probe("tetrode"))
        recording = replace(opened, source=CachedSource(source, "0", 1000, str(tmp_path), 0))
        settings = Settings(batch_size=10_000)
        reader = Preprocessor(recording, tiling_of(recording, settings), settings)
        with messages.listening() as own:
            for _ in reader.read_ahead(list(reader.tiling), tmp_path):
                recording.read(0, 1000)
        assert source.heard == {(own,)}


def test_all_our_warnings_go_this_way():
    """Otherwise a filter could keep them from the record. But the command line changes how they are shown, and Python's
    own, of escapes in a `.prb` file, are nobody's business."""
    root = Path(ks4stream.__file__).parent
    used = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "warnings" in (getattr(node, "module", None), *(alias.name for alias in node.names))
    }
    assert used == {"messages.py", "cli.py", "io/prb.py"}
