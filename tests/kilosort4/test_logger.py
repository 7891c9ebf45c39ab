"""Kilosort4's logger: what callers expect of its handlers, and that nothing is left behind."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from ks4stream.errors import ResultsError
from ks4stream.kilosort4.logger import close_logger, detailed
from ks4stream.kilosort4.run_kilosort import setup_logger
from ks4stream.messages import DETAIL

THEIRS, OURS = logging.getLogger("kilosort"), logging.getLogger("ks4stream")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = list(OURS.handlers), OURS.level
    yield
    close_logger()
    assert (list(OURS.handlers), OURS.level) == before and not THEIRS.handlers


def console() -> logging.StreamHandler:
    (handler,) = [handler for handler in THEIRS.handlers if type(handler) is logging.StreamHandler]
    return handler


@pytest.mark.parametrize("verbose", [False, True])
def test_what_is_logged_goes_to_the_file_and_the_console(verbose: bool, tmp_path: Path) -> None:
    setup_logger(tmp_path / "new", verbose_console=verbose)
    console().setStream(shown := io.StringIO())
    OURS.info("a message")
    OURS.debug("a detail")
    THEIRS.info("a caller's")
    log = (tmp_path / "new" / "kilosort4.log").read_text()
    assert "a message" in log and "a detail" in log and "a caller's" in log
    assert "a message" in shown.getvalue() and ("a detail" in shown.getvalue()) is verbose


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        setup_logger(tmp_path / name)
    OURS.info("once")
    assert "once" not in (tmp_path / "first" / "kilosort4.log").read_text()
    assert (tmp_path / "second" / "kilosort4.log").read_text().count("once") == 1


def test_callers_may_close_the_handlers_themselves(tmp_path: Path) -> None:
    """As SpikeInterface does at its end."""
    setup_logger(tmp_path)
    for handler in THEIRS.handlers.copy():
        THEIRS.removeHandler(handler)
        handler.close()
    OURS.info("not written")  # takes the forwarder away
    assert "not written" not in (tmp_path / "kilosort4.log").read_text()
    assert not [handler for handler in OURS.handlers if type(handler).__module__ == "ks4stream.kilosort4.logger"]


def test_more_detail_where_it_is_wanted(tmp_path: Path) -> None:
    for verbose_console in (False, True):
        setup_logger(tmp_path / str(verbose_console), verbose_console=verbose_console)
        console().setStream(shown := io.StringIO())
        for is_wanted in (False, True):
            with detailed(is_wanted):
                OURS.log(DETAIL, "a task, %s", is_wanted)
        OURS.log(DETAIL, "after it")
        log = (tmp_path / str(verbose_console) / "kilosort4.log").read_text()
        assert "a task, True" in log and "a task, False" not in log and "after it" not in log
        assert ("a task, True" in shown.getvalue()) is verbose_console and "a task, False" not in shown.getvalue()


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="another results_dir"):
        setup_logger(tmp_path / "file")
