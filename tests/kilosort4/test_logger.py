"""Kilosort4's logger: what callers expect of its handlers, and that nothing is left behind."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ks4stream.errors import ResultsError
from ks4stream.kilosort4.logger import close_logger, detailed
from ks4stream.kilosort4.run_kilosort import setup_logger
from ks4stream.messages import DETAIL
from ks4stream.report.log import run_log

THEIRS, OURS = logging.getLogger("kilosort"), logging.getLogger("ks4stream")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = list(OURS.handlers), OURS.level, THEIRS.level
    yield
    close_logger()
    assert (list(OURS.handlers), OURS.level, THEIRS.level) == before and not THEIRS.handlers


def console() -> logging.StreamHandler:
    (handler,) = [handler for handler in THEIRS.handlers if type(handler) is logging.StreamHandler]
    return handler


class Kept(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def assert_nothing_is_left() -> None:
    assert not THEIRS.handlers and THEIRS.level == logging.NOTSET
    assert not [handler for handler in OURS.handlers if type(handler).__module__ == "ks4stream.kilosort4.logger"]


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
    assert_nothing_is_left()


def test_handlers_that_were_closed_but_not_removed_stay_closed(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    for handler in THEIRS.handlers:
        handler.close()
    THEIRS.info("not written")
    OURS.info("not written")
    assert "not written" not in (tmp_path / "kilosort4.log").read_text()
    assert_nothing_is_left()


def test_the_message_that_takes_the_forwarder_away_reaches_the_handlers_after_it(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    OURS.addHandler(kept := Kept())
    for handler in THEIRS.handlers.copy():
        THEIRS.removeHandler(handler)
        handler.close()
    OURS.info("a message")
    OURS.removeHandler(kept)
    assert kept.seen == ["a message"]


def test_root_handlers_get_a_message_once(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    logging.getLogger().addHandler(kept := Kept())
    OURS.warning("ours")
    THEIRS.warning("theirs")
    logging.getLogger().removeHandler(kept)
    assert kept.seen == ["ours", "theirs"]
    assert (tmp_path / "kilosort4.log").read_text().count("ours") == 1


def test_a_sort_with_its_own_log_there_is_logged_once(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    console().setStream(shown := io.StringIO())
    with run_log(tmp_path), run_log(tmp_path / "other"):
        OURS.info("inside")
    OURS.info("outside")
    log = (tmp_path / "kilosort4.log").read_text()
    assert log.count("inside") == log.count("outside") == 1
    assert shown.getvalue().count("inside") == 1


@pytest.mark.parametrize(("of_logger", "of_sort"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_sort_that_shows_its_messages_shows_them_once(
    of_logger: bool, of_sort: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As ``run_kilosort`` after `setup_logger`: each message on one of the two streams."""
    setup_logger(tmp_path, verbose_console=of_logger)
    with run_log(tmp_path, verbose_console=of_sort):
        OURS.info("inside")
        OURS.debug("a detail")
    OURS.info("outside")
    shown = "".join(capfd.readouterr())
    assert shown.count("inside") == shown.count("outside") == 1
    assert shown.count("a detail") == (of_logger or of_sort)


def test_a_console_that_was_sent_elsewhere_gets_what_a_sort_shows(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    console().setStream(shown := io.StringIO())
    with run_log(tmp_path, verbose_console=False):
        OURS.info("inside")
    assert shown.getvalue().count("inside") == 1


def test_a_sort_that_overlaps_changes_no_levels(tmp_path: Path) -> None:
    before = OURS.level
    with run_log(tmp_path / "other"):
        setup_logger(tmp_path)
    OURS.debug("a detail")
    assert "a detail" in (tmp_path / "kilosort4.log").read_text()
    close_logger()
    assert OURS.level == before


def test_threads_may_set_it_up(tmp_path: Path) -> None:
    def set_up(number: int) -> None:
        for _ in range(20):
            setup_logger(tmp_path / str(number))
            OURS.debug("a detail")

    with ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(set_up, number) for number in range(6)]:
            each.result()
    assert len(THEIRS.handlers) == 2
    close_logger()
    assert_nothing_is_left()


def test_it_may_be_closed_while_more_detail_is_wanted(tmp_path: Path) -> None:
    before = OURS.level
    setup_logger(tmp_path)
    with detailed(True):
        close_logger()
    assert OURS.level == before
    with detailed(True):
        setup_logger(tmp_path)
        OURS.log(DETAIL, "a task")
    OURS.log(DETAIL, "after it")
    log = (tmp_path / "kilosort4.log").read_text()
    assert "a task" in log and "after it" not in log


def test_handlers_that_callers_have_added_get_more_detail(tmp_path: Path) -> None:
    OURS.addHandler(kept := Kept())
    with detailed(True):
        OURS.log(DETAIL, "a task")
    OURS.removeHandler(kept)
    assert kept.seen == ["a task"]


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
