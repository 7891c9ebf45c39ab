"""Files appear whole or not at all, and a refused write says where it was."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from ks4stream.errors import ResultsError
from ks4stream.io.atomic import atomic_write


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_refused_write_says_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    advice = (
        " MB are free"
        if number in (errno.ENOSPC, errno.EDQUOT)
        else "Choose another folder, or check its permissions; then"
    )
    match = f"run cannot be written to: .*{os.strerror(number)}.*{advice}"
    with pytest.raises(ResultsError, match=match) as found, atomic_write(tmp_path / "run" / "a.npz") as file:
        file.write(b"1")
    assert not list((tmp_path / "run").iterdir())
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)  # as it comes from a worker


def test_the_file_keeps_what_it_held_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
