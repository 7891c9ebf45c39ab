"""A cache takes no more of a disk than it may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from far_source import N_PIECES, PIECE, SAMPLES, FarSource, cache, pieces_in


def test_a_full_cache_keeps_what_it_has(tmp_path: Path) -> None:
    far = FarSource()
    for _ in range(2):
        np.testing.assert_array_equal(cache(far, tmp_path, 2000).read(0, 1000), SAMPLES)
    kept = pieces_in(tmp_path)
    assert 0 < len(kept) < N_PIECES and sum(path.stat().st_size for path in kept) <= 2000
    assert far.fetched.total() == 2 * N_PIECES - len(kept)


@pytest.mark.parametrize("left", [b"", b"cut off"])
@pytest.mark.parametrize("when", ["before a sort", "while it runs"])
def test_an_account_that_was_not_written_is_counted_again(left: bytes, when: str, tmp_path: Path) -> None:
    far = FarSource()
    source = cache(far, tmp_path, 2000)
    source.read(0, 4 * PIECE)
    (account,) = tmp_path.rglob("room")
    account.write_bytes(left)
    if when == "before a sort":
        source = cache(far, tmp_path, 2000)
    np.testing.assert_array_equal(source.read(0, 1000), SAMPLES)
    kept = pieces_in(tmp_path)
    assert 4 < len(kept) < N_PIECES and sum(path.stat().st_size for path in kept) <= 2000
