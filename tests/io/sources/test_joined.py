"""Sources joined in time."""

from __future__ import annotations

import numpy as np
import pytest
from sample_files import SAMPLES

from ks4stream.errors import RecordingError
from ks4stream.io.sources import ArraySource, ConcatenatedSource, join


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecordingError, match="part 1 has 2 channels of int16, but part 0 has 3 of int16"):
        ConcatenatedSource((ArraySource(SAMPLES), ArraySource(SAMPLES[:, :2])))
    with pytest.raises(RecordingError, match="part 1 has 3 channels of int32"):
        ConcatenatedSource((ArraySource(SAMPLES), ArraySource(SAMPLES.astype(np.int32))))
    with pytest.raises(RecordingError, match="parts to join is empty"):
        ConcatenatedSource(())


def test_empty_parts_are_passed_over() -> None:
    parts = (SAMPLES[:0], SAMPLES[:5], SAMPLES[:0], SAMPLES[5:])
    source = ConcatenatedSource(tuple(ArraySource(part) for part in parts))
    np.testing.assert_array_equal(source.read(0, 30), SAMPLES)
    np.testing.assert_array_equal(source.read(4, 6), SAMPLES[4:6])


def test_join_leaves_a_single_source_alone() -> None:
    source = ArraySource(SAMPLES)
    assert join([source]) is source
