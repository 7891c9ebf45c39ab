"""What every engine shares: memory that processes have used."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from ks4stream.engine import base, peak_bytes, resident_bytes

TAKES_200_MB = "x = bytearray(200 << 20); del x; print(flush=True); input()"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told in another way")
def test_the_peaks_of_processes_that_were_started_count():
    before = peak_bytes()
    assert before >= 0.9 * resident_bytes()  # the kernel adds up pages in batches, and both figures lag behind
    with subprocess.Popen([sys.executable, "-c", TAKES_200_MB], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # the memory has been given back, and the process waits
        assert peak_bytes() >= before + (190 << 20)
        child.communicate(b"\n")
    assert peak_bytes() < before + (190 << 20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told in another way")
@pytest.mark.parametrize("name", ["größe".encode(), "größe".encode()[:3]])  # cut, if it is long, within a letter
def test_a_process_may_have_any_name(name):
    code = f"open('/proc/self/comm', 'wb').write({name!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert base._peak_of(psutil.Process(child.pid)) > 0
        assert peak_bytes() > 0
        child.communicate(b"\n")


def test_peaks_that_are_hidden_are_not_known(monkeypatch):
    def hidden(*_, **__):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "children", hidden)
    assert base.peak_bytes() == 0
