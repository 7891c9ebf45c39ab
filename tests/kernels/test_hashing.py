"""Hashes are those that were published, and do not change."""

from __future__ import annotations

import doctest

import numpy as np

from ks4stream.kernels import hashing
from ks4stream.kernels.hashing import splitmix64


def test_the_documented_examples_run() -> None:
    """The first two numbers of the published generator with seed 0."""
    outcome = doctest.testmod(hashing)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_both_numbers_count() -> None:
    number = np.arange(1000)
    assert len(np.unique(np.concatenate([splitmix64(number, other) for other in range(3)]))) == 3000
