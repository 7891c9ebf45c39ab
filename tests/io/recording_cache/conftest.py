from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ks4stream.io.recording_cache import lifetime


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where caches lie by default; pieces are as long as the tests' chunks."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(lifetime, "PIECE_BYTES", 1)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"
