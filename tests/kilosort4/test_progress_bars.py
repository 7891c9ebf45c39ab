"""Progress bars that have only some of what a tqdm bar has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ks4stream.errors import SettingsError
from ks4stream.kilosort4.arguments import progress_of


class Updated:
    """Counts."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, n: int = 1) -> None:
        self.n += n


def show(bar: Any) -> None:
    """Two stages of 2 and 3 tasks."""
    progress = progress_of(bar)
    assert progress is not None
    for stage, total in (("detection", 2), ("matching", 3)):
        for done in range(total + 1):
            progress(stage, done, total)


def test_a_bar_that_only_has_update_runs_on() -> None:
    show(bar := Updated())
    assert bar.n == 5


def test_its_total_is_that_of_the_stages_so_far() -> None:
    class Bar(Updated):
        total: int | None = None

    bar = Bar()
    progress = progress_of(bar)
    assert progress is not None
    progress("detection", 1, 2)
    assert (bar.n, bar.total) == (1, 2)
    progress("detection", 2, 2)
    progress("matching", 0, 3)
    assert (bar.n, bar.total) == (2, 5)
    progress("matching", 1, 3)
    progress("matching", 0, 3)  # computed again
    assert (bar.n, bar.total) == (3, 8)


def test_a_total_that_cannot_be_set_stays() -> None:
    class Bar(Updated):
        @property
        def total(self) -> int:
            return 100

    show(bar := Bar())
    assert (bar.n, bar.total) == (5, 100)


def test_a_bar_may_have_no_description() -> None:
    class Bar(Updated):
        def reset(self, total: int) -> None:
            self.n, self.total = 0, total

    show(bar := Bar())
    assert (bar.n, bar.total) == (3, 3)


def test_a_bar_may_have_a_description_only() -> None:
    class Bar(Updated):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def set_description(self, text: str) -> None:
            self.said.append(text)

    show(bar := Bar())
    assert bar.n == 5 and bar.said == ["detection", "matching"]


def test_what_can_be_called_is_called() -> None:
    class Called(Updated):
        def __call__(self, stage: str, done: int, total: int) -> None:
            seen.append((stage, done, total))

    seen: list[tuple[str, int, int]] = []
    show(bar := Called())
    assert bar.n == 0 and len(seen) == 7


@pytest.mark.parametrize("made", [dict, set, str])
def test_collections_are_not_bars(made: Callable[[], Any]) -> None:
    with pytest.raises(SettingsError, match="is not a progress bar"):
        progress_of(made())
