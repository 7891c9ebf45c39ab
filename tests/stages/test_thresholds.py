from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from runs import RunHere

from ks4stream.io.tables import Receipt, write_block
from ks4stream.kernels import thresholds as kernels
from ks4stream.kernels.thresholds import LOWEST, WITHOUT_NEURON
from ks4stream.settings import Settings
from ks4stream.stages.matching import Spikes
from ks4stream.stages.thresholds import SetThresholds, counted_rows

REGION_OF = np.array([1, 0, 1])  # of each template


def block(folder: Path, name: str, template: NDArray[np.int32], score: NDArray[np.float32]) -> Receipt:
    columns = {"template": template, "score": score}
    return write_block(folder / name, columns, REGION_OF[template], 2)


def in_blocks(receipts: list[Receipt], threshold: list[float], dropped: dict[int, list[int]] | None = None) -> Spikes:
    return Spikes(
        receipts=receipts,
        first=np.arange(len(receipts)),
        dropped=[np.array((dropped or {}).get(number, []), np.int64) for number in range(len(receipts))],
        artifacts=np.zeros((0, 2), np.int64),
        template_channels=np.zeros((3, 1), np.int64),
        region_of=REGION_OF,
        threshold=np.array(threshold, np.float64),
        sampling_rate_hz=30_000.0,
    )


def some(folder: Path) -> list[Receipt]:
    """Region 0 has the rows 6 | 9, 10, all of template 1; region 1 has 5, 8 | 7, of templates 0, 2 and 0."""
    first = block(folder, "0", np.array([0, 1, 2], np.int32), np.array([5, 6, 8], np.float32))
    return [first, block(folder, "1", np.array([1, 1, 0], np.int32), np.array([9, 10, 7], np.float32))]


def test_spikes_that_were_dropped_do_not_count(tmp_path: Path) -> None:
    spikes = in_blocks(some(tmp_path), [0, 0, 0], {0: [1], 1: [1]})  # rows of the files: score 5, score 10
    assert counted_rows(spikes, 0).tolist() == [0, 1]
    assert counted_rows(spikes, 1).tolist() == [1, 2]


def test_spikes_count_above_the_threshold_of_their_template(tmp_path: Path) -> None:
    spikes = in_blocks(some(tmp_path), [5, 9.5, 8.5], {1: [2]})
    assert counted_rows(spikes, 0).tolist() == [2], "only the score of 10"
    assert counted_rows(spikes, 1).tolist() == [], "5 is not above 5, 8 is below 8.5, and 7 was dropped"


def scores(mean: float, n: int, n_background: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    neuron, background = rng.normal(mean, 1, n), LOWEST + rng.exponential(0.5, n_background)
    return rng.permutation(np.concatenate([neuron[neuron > LOWEST], background])).astype(np.float32)


def with_thresholds(spikes: Spikes, folder: Path, **settings: float) -> list[float]:
    threshold: list[float] = SetThresholds(Settings(**settings), spikes).run(RunHere(folder)).threshold.tolist()
    return threshold


@pytest.mark.parametrize("n_blocks", [1, 3, 7])
def test_a_template_has_the_threshold_of_all_of_its_spikes_however_they_are_cut(tmp_path: Path, n_blocks: int) -> None:
    of_template = [scores(7.5, 300, 200, 1), scores(9, 300, 2000, 2)]  # of templates 0 and 1; 2 has none
    score = np.concatenate(of_template)
    template = np.repeat([0, 1], [len(part) for part in of_template]).astype(np.int32)
    receipts = [block(tmp_path, str(n), template[n::n_blocks], score[n::n_blocks]) for n in range(n_blocks)]
    found = with_thresholds(in_blocks(receipts, [LOWEST] * 3), tmp_path)
    alone = [float(kernels.thresholds(part, np.zeros(len(part), np.int32), 1)[0]) for part in of_template]
    assert found == [*alone, WITHOUT_NEURON]
    assert LOWEST < alone[0] < alone[1]


def test_dropped_spikes_have_no_say(tmp_path: Path) -> None:
    score = scores(7.5, 300, 200, 3)
    twice = np.concatenate([score, np.full(500, 5.01, np.float32)])  # which would look like background
    receipt = block(tmp_path, "0", np.zeros(len(twice), np.int32), twice)
    spikes = in_blocks([receipt], [LOWEST] * 3, {0: list(range(len(score), len(twice)))})
    assert with_thresholds(spikes, tmp_path)[0] == kernels.thresholds(score, np.zeros(len(score), np.int32), 1)[0]


def test_a_number_is_the_threshold_of_all(tmp_path: Path) -> None:
    assert with_thresholds(in_blocks(some(tmp_path), [8.0] * 3), tmp_path, Th_learned=8) == [8.0] * 3


def test_without_spikes_or_templates_there_is_nothing_to_set(tmp_path: Path) -> None:
    assert with_thresholds(in_blocks([], [LOWEST] * 3), tmp_path) == [LOWEST] * 3


def test_a_region_without_spikes_above_their_thresholds_has_no_rows(tmp_path: Path) -> None:
    spikes = in_blocks(some(tmp_path), [20, 20, 20])
    assert counted_rows(spikes, 0).tolist() == counted_rows(spikes, 1).tolist() == []
