"""The log: complete, and the logger left as it was."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.recordings import open_recording
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
    for part in ("torch 2", "CPU cores", "Th_learned = 7.0  (default 8.0)", "Th_universal = 9.0\n", "do_CAR = False",
                 "whitening: 1.20 s", "channel 3:", "Finished in"):  # fmt: skip
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
