"""The log: complete, and the logger left as it was."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.objects import write_bytes
from ks4stream.io.places import below, place, read_whole
from ks4stream.io.recordings import open_recording
from ks4stream.report import log_kept, results_folder
from ks4stream.report.log import LOG_NAME, log_inputs, run_log
from ks4stream.settings import Settings

logger = logging.getLogger("ks4stream")


@pytest.fixture(autouse=True)
def logger_is_left_as_it_was():
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_versions_machine_settings_and_stages_are_logged(tmp_path):
    recording = open_recording(np.zeros((60_000, 4), np.int16), fs=30_000, probe="tetrode")
    with run_log(tmp_path / "new"):
        log_inputs(recording, Settings(Th_learned=7), do_CAR=False)
        logging.getLogger("ks4stream.sorter").info("whitening: 1.20 s")
    text = (tmp_path / "new" / LOG_NAME).read_text(encoding="utf-8")
    for part in (
        "torch 2",
        "CPU cores",
        "Th_learned = 7.0  (default 'auto')",
        "Th_universal = 'auto'\n",
        "do_CAR = False",
        "whitening: 1.20 s",
        "channel 3:",
        "Finished in",
    ):
        assert part in text, part


def test_levels(tmp_path, capsys):
    def say():
        logger.log(5, "tiny")
        logger.debug("detail")
        logger.info("news")

    seen = {}
    for verbose_console, verbose_log in ((None, False), (False, True), (True, False)):
        (tmp_path / LOG_NAME).unlink(missing_ok=True)
        with run_log(tmp_path, verbose_console=verbose_console, verbose_log=verbose_log):
            say()
        file, console = (tmp_path / LOG_NAME).read_text(), capsys.readouterr().err
        words = ("tiny", "detail", "news")
        seen[verbose_console, verbose_log] = ([w in file for w in words], [w in console for w in words])
    assert seen[None, False] == ([False, True, True], [False, False, False])
    assert seen[False, True] == ([True, True, True], [False, False, True])
    assert seen[True, False] == ([False, True, True], [False, True, True])


def test_inside_itself_it_changes_nothing(tmp_path):
    with run_log(tmp_path), run_log(tmp_path, verbose_console=True):
        logger.info("once")
    assert (tmp_path / LOG_NAME).read_text().count("once") == 1


@pytest.mark.parametrize("before", [logging.NOTSET, logging.ERROR])
@pytest.mark.parametrize("last", ["a", "b"])
def test_of_two_sorts_each_log_gets_its_own(tmp_path, capsys, last, before):
    """However they overlap; and the logger's level is theirs until the last has ended."""
    inside, may_end = threading.Barrier(3), {name: threading.Event() for name in "ab"}

    def sort(name: str) -> None:
        with run_log(tmp_path / name, verbose_console=True if name == "a" else None):
            inside.wait()
            may_end[name].wait()
            logger.info("%s ends", name)

    logger.setLevel(before)
    threads = {name: threading.Thread(target=sort, args=(name,)) for name in "ab"}
    for thread in threads.values():
        thread.start()
    inside.wait()
    logger.critical("of none of them")
    for name in "ba" if last == "a" else "ab":
        may_end[name].set()
        threads[name].join()
    assert logger.level == before and not logger.handlers
    logger.setLevel(logging.NOTSET)
    logs = {name: (tmp_path / name / LOG_NAME).read_text() for name in "ab"}
    for name, other in ("ab", "ba"):
        assert f"{name} ends" in logs[name] and "Finished in" in logs[name]
        assert f"{other} ends" not in logs[name] and "of none" not in logs[name]
    shown = [line for line in capsys.readouterr().err.splitlines() if "ks4stream:" in line]
    assert any("a ends" in line for line in shown) and not any("b ends" in line for line in shown)


def test_two_sorts_into_one_folder_both_write_to_its_log(tmp_path):
    """The second one is going to be refused, and its log says so."""
    began, may_end = threading.Event(), threading.Event()

    def sort() -> None:
        with run_log(tmp_path):
            began.set()
            may_end.wait()

    thread = threading.Thread(target=sort)
    thread.start()
    began.wait()
    with run_log(tmp_path):
        logger.info("refused")
    may_end.set()
    thread.join()
    text = (tmp_path / LOG_NAME).read_text()
    assert text.count("refused") == 1 and text.count("Finished in") == 2


def test_a_run_that_is_resumed_is_told_as_a_whole(tmp_path):
    for text in ("first", "second"):
        with run_log(tmp_path):
            logger.info(text)
    text = (tmp_path / LOG_NAME).read_text()
    assert 0 < text.index("first") < text.index("second")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_keeps_silent(tmp_path, capsys):
    (tmp_path / LOG_NAME).symlink_to("/dev/full")
    with pytest.raises(KeyError, match="the reason"), run_log(tmp_path):
        logger.info("something")
        raise KeyError("the reason")
    assert capsys.readouterr().err == ""


def test_an_error_is_logged_and_goes_on(tmp_path):
    with pytest.raises(KeyError), run_log(tmp_path):
        raise KeyError("lost")
    text = (tmp_path / LOG_NAME).read_text()
    assert "Traceback" in text and "KeyError: 'lost'" in text and "Finished" not in text


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="another results_dir"), run_log(tmp_path / "file"):
        pass


# -- copies in an object store -------------------------------------------------------------------------------------


def belongs() -> None:
    """The results belong to this run."""


def taken_over() -> None:
    raise ResultsError("another run has the results")


def log_of_a_sort(target, check, act=lambda: None, after=lambda: None):
    """Log as a sort does: while its store is locked, if it gets that far, `act` is called; `after`, thereafter."""
    with ExitStack() as stack:
        _, folder = stack.enter_context(results_folder(target))
        log = stack.enter_context(log_kept(folder, target))
        stack.enter_context(run_log(folder))
        stack.callback(after)
        with nullcontext() if check is None else log.owned(check):
            act()


def fail():
    raise KeyError("the reason")


def test_the_copy_of_a_log_has_its_end(object_store, tmp_path):
    target = place("s3://recordings/log-end")
    for check in (None, belongs):  # an error may come before the store is locked
        with pytest.raises(KeyError):
            log_of_a_sort(target, check, fail)
    log_of_a_sort(target, belongs)
    text = read_whole(target / LOG_NAME).decode()
    assert text.count("KeyError: 'the reason'") == text.count("Traceback") == 2
    assert text.count("Finished in") == 1 and text.rstrip().endswith(" s")
    log_of_a_sort(tmp_path, belongs)
    assert (tmp_path / LOG_NAME).read_text().count("Finished in") == 1, "a folder has the log itself"


def test_the_log_of_another_run_is_not_replaced(object_store):
    target = place("s3://recordings/log-of-another")

    def other_ends():
        write_bytes(str(target / LOG_NAME), b"the other's")

    def refused():
        other_ends()
        fail()

    for check, act, after in (
        (None, refused, belongs),
        (taken_over, belongs, belongs),
        (belongs, belongs, other_ends),  # it begins and ends after this one has unlocked the store
    ):
        with suppress(KeyError):
            log_of_a_sort(target, check, act, after)
        assert read_whole(target / LOG_NAME) == b"the other's"
    log_of_a_sort(target, belongs, other_ends)  # it was refused
    assert b"Finished in" in read_whole(target / LOG_NAME)
    empty = place("s3://recordings/log-of-nobody")
    log_of_a_sort(empty, taken_over)
    assert not list(below(empty))


def test_a_log_that_cannot_be_copied_does_not_hide_an_error(object_store, monkeypatch):
    def refused(*_):
        raise ResultsError("refused")

    monkeypatch.setattr("ks4stream.report.write_file", refused)
    with pytest.raises(KeyError, match="the reason"):
        log_of_a_sort(place("s3://recordings/log-refused"), belongs, fail)
