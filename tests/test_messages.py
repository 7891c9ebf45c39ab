"""What a sort says is recorded for it alone, and shown by Python's rules."""

from __future__ import annotations

import ast
import logging
import threading
import warnings
from pathlib import Path

import pytest

import ks4stream
from ks4stream import messages
from ks4stream.errors import DriftWarning, FewSpikesWarning


def test_filters_hide_what_is_shown_and_never_what_is_recorded(caplog):
    for rule, n_shown in (("ignore", 0), ("always", 2), ("default", 1)):  # the latter: once for each place
        caplog.clear()
        with warnings.catch_warnings(record=True) as shown, messages.recorded() as said:
            warnings.simplefilter(rule)
            for _ in range(2):
                messages.warn("few", FewSpikesWarning)
        assert said == ["few", "few"]
        assert [record.getMessage() for record in caplog.records] == said
        assert [str(one.message) for one in shown] == said[:n_shown]


def test_as_an_error_it_is_recorded_first(caplog):
    with messages.recorded() as said, pytest.raises(FewSpikesWarning, match="few"):  # pytest's own filter is "error"
        messages.warn("few", FewSpikesWarning)
    assert said == ["few"] == [record.getMessage() for record in caplog.records]


def test_it_is_shown_where_the_caller_says():
    def function() -> None:
        messages.warn("here", DriftWarning, stacklevel=1)
        messages.warn("there", DriftWarning, stacklevel=2)

    with pytest.warns(DriftWarning) as shown:
        function()
    first = function.__code__.co_firstlineno
    assert [one.filename for one in shown] == [__file__] * 2
    assert shown[0].lineno == first + 1 and shown[1].lineno > first + 2


def test_outside_a_sort_it_is_only_shown(caplog):
    with pytest.warns(FewSpikesWarning):
        messages.warn("few", FewSpikesWarning)
    assert not caplog.records


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
            inside.wait()
            messages.warn(f"{name} is here", FewSpikesWarning)
            may_end[name].wait()
            messages.warn(f"{name} goes", FewSpikesWarning)

    show = warnings.showwarning
    threads = {name: threading.Thread(target=sort, args=(name,)) for name in "ab"}
    for thread in threads.values():
        thread.start()
    inside.wait()
    messages.warn("nobody hears", FewSpikesWarning)
    for name in "ab" if order == "first in, first out" else "ba":
        may_end[name].set()
        threads[name].join()
    assert said == {name: [f"{name} is here", f"{name} goes"] for name in "ab"}
    assert warnings.showwarning is show


@pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")
def test_who_starts_a_thread_hands_on_who_listens():
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


def test_all_our_warnings_go_this_way():
    """Otherwise a filter could keep them from the record. The command line alone changes how they are shown."""
    root = Path(ks4stream.__file__).parent
    used = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "warnings" in (getattr(node, "module", None), *(alias.name for alias in node.names))
    }
    assert used == {"messages.py", "cli.py"}
