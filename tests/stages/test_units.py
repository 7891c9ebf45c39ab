"""A region's spikes as units on disk, and which units can be neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import RunHere

from ks4stream import simulate
from ks4stream.blocks import Tiling
from ks4stream.io import mapped as spikes
from ks4stream.io.tables import Receipt, read_column, write_block
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.clustering import Circumstances, GraphClustering
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Spikes
from ks4stream.stages.units import Clusters, ClusterSpikes, Merge, counted_rows, is_neuron, min_unit_spikes

THRESHOLD, MIN_SPIKES, IMPOSSIBLE = 8.0, 5, 30.0
WAVEFORMS = Waveforms(np.ones((1, 3)), np.ones((1, 3)))


def is_one(train: list[int], score: float = 20.0) -> bool:
    scores = np.full(len(train), score, np.float32)
    return is_neuron(np.array(train, np.int64), scores, THRESHOLD, MIN_SPIKES, impossible_samples=IMPOSSIBLE)


def regular(n: int, every: int = 1000) -> list[int]:
    return [every * i for i in range(n)]


@pytest.mark.parametrize(("n", "neuron"), [(0, False), (4, False), (5, True), (50, True)])
def test_a_neuron_has_enough_spikes(n: int, neuron: bool) -> None:
    assert is_one(regular(n)) is neuron


@pytest.mark.parametrize(("score", "neuron"), [(8.0, False), (9.5, False), (9.625, True), (40.0, True)])
def test_scores_stand_clear_of_the_threshold(score: float, neuron: bool) -> None:
    assert is_one(regular(10), score) is neuron


def test_it_is_the_mean_score_that_counts() -> None:
    score = np.where(np.arange(6) < 3, 8.5, 12.0).astype(np.float32)  # mean 10.25
    assert is_neuron(np.array(regular(6)), score, THRESHOLD, MIN_SPIKES, impossible_samples=IMPOSSIBLE)


def pairs(n: int, apart: int) -> list[int]:
    return [time for at in regular(n) for time in (at, at + apart)]


@pytest.mark.parametrize(("apart", "neuron"), [(1, False), (29, False), (30, True), (200, True)])
def test_what_fires_in_impossible_bursts_is_an_artifact(apart: int, neuron: bool) -> None:
    assert is_one(pairs(5, apart)) is neuron


def test_half_of_the_spikes_in_bursts_is_just_possible() -> None:
    alone = [100_000 + time for time in regular(6)]
    assert is_one(pairs(3, 10) + alone)  # 6 of 12
    assert not is_one(pairs(3, 10) + alone[:5])  # 6 of 11


def block(folder: Path, name: str, sample: list[int], region: list[int]) -> Receipt:
    """A block's file; scores are times, features their hundredths."""
    time = np.array(sample, np.int64)
    columns = {
        "sample": time,
        "template": np.array(region, np.int32),  # one per region
        "score": time.astype(np.float32),
        "features": (time / 100).astype(np.float32)[:, None, None],
    }
    return write_block(folder / f"{name}.npz", columns, np.array(region, np.int64), 2)


def in_blocks(receipts: list[Receipt], first: list[int], dropped: list[list[int]]) -> Spikes:
    return Spikes(
        receipts=receipts,
        first=np.array(first),
        dropped=[np.array(rows, np.int64) for rows in dropped],
        artifacts=np.zeros((0, 2), np.int64),
        template_channels=np.zeros((2, 1), np.int64),
        region_of=np.arange(2),
        sampling_rate_hz=30_000.0,
    )


def clustering_of(spikes: Spikes) -> ClusterSpikes:
    settings = Settings(n_pcs=1)
    probe, tiling = simulate.linear_probe(1), Tiling(0, 200, 100, 0, 2)
    return ClusterSpikes(settings, spikes, WAVEFORMS, probe, Circumstances(tiling, 30_000.0), GraphClustering(settings))


def two_blocks(folder: Path) -> Spikes:
    receipts = [block(folder, "a", [5, 3, 70, 90], [0, 1, 1, 0]), block(folder, "b", [101, 130, 150], [0, 0, 1])]
    return in_blocks(receipts, [0, 100], [[1], [0]])


def test_rows_that_were_dropped_do_not_count(tmp_path: Path) -> None:
    matches = two_blocks(tmp_path)  # rows of region 0: 5, 90 | 101, 130; of region 1: 3, 70 | 150
    assert counted_rows(matches, 0).tolist() == [0, 3]
    assert counted_rows(matches, 1).tolist() == [0, 1, 2]


def test_a_regions_spikes_are_written_by_cluster_with_their_place_in_the_blocks(tmp_path: Path) -> None:
    clusters = clustering_of(two_blocks(tmp_path)).task(0, tmp_path)
    assert clusters.features.shape == (1, 1, 1)
    assert read_column(clusters.receipt, "sample").tolist() == [5, 130]
    assert read_column(clusters.receipt, "score").tolist() == [5, 130]
    assert read_column(clusters.receipt, "row").tolist() == [0, 5]  # of 4 + 3 rows, grouped by region
    examples = {name: read_column(clusters.examples, name).ravel().tolist() for name in clusters.examples.kind}
    assert examples == {
        "sample": [5, 130],
        "template": [0, 0],
        "features": pytest.approx([0.05, 1.3]),
        "displacement_um": [0, 0],
        "elapsed": [0.025, 0.65],
    }


@pytest.mark.parametrize("n_regions", [1, 2])
def test_regions_all_of_whose_spikes_were_dropped_have_no_units(tmp_path: Path, n_regions: int) -> None:
    """For example, a single spike outside its tile's core that the neighbouring tile does not report."""
    columns = {
        "sample": np.array([5, 9]),
        "template": np.array([0, n_regions - 1], np.int32),
        "score": np.full(2, 10, np.float32),
        "features": np.ones((2, 1, 1), np.float32),
    }
    receipt = write_block(tmp_path / "a.npz", columns, np.array([0, n_regions - 1]), n_regions)
    spikes, run = in_blocks([receipt], [0], [[0, 1]]), RunHere(tmp_path)
    regions = clustering_of(spikes).run(run)
    assert [region.features.shape for region in regions] == [(0, 1, 1)] * n_regions
    settings, probe = Settings(n_pcs=1), simulate.linear_probe(1)
    units = Merge(settings, regions, spikes.template_channels, WAVEFORMS, probe, 30_000.0, MIN_SPIKES).run(run)
    assert units.features.shape == (0, 1, 1)
    columns = Join(settings, units, spikes, WAVEFORMS, probe).run(run)
    assert columns["sample"].shape == (0,) and columns["features"].shape == (0, 1, 1)


def test_where_there_was_no_spike_there_are_no_units(tmp_path: Path) -> None:
    nothing, run, settings = in_blocks([], [], []), RunHere(tmp_path), Settings(n_pcs=1)
    probe, regions = simulate.linear_probe(1), clustering_of(nothing).run(run)
    units = Merge(settings, regions, nothing.template_channels, WAVEFORMS, probe, 30_000.0, MIN_SPIKES).run(run)
    assert (units.features.shape, units.similarity.shape, units.contamination.shape) == ((0, 1, 1), (0, 0), (0,))
    assert Join(settings, units, nothing, WAVEFORMS, probe).run(run)["features"].shape == (0, 1, 1)


def test_a_region_too_large_for_memory_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features are in a file in the folder of its stage, which may not exist before the task."""
    clustering = clustering_of(two_blocks(tmp_path))
    held = clustering.task(0, tmp_path)
    monkeypatch.setattr(spikes, "HELD_BYTES", 0)
    mapped = clustering.task(0, tmp_path / "not" / "made")
    assert mapped.receipt.digest() == held.receipt.digest()
    assert mapped.examples.digest() == held.examples.digest()
    assert np.array_equal(mapped.features, held.features)


def test_clusters_are_numbered_through_all_regions(tmp_path: Path) -> None:
    receipts = [
        write_block(tmp_path / f"{n}.npz", {"sample": np.array(times, np.int64)}, np.array(unit, np.int64), n_units)
        for n, (times, unit, n_units) in enumerate([([1, 2, 3], [0, 1, 0], 2), ([], [], 0), ([9], [0], 1)])
    ]
    clusters = Clusters(receipts)
    assert [clusters[number].tolist() for number in range(3)] == [[1, 3], [2], [9]]
    assert clusters.n_spikes.tolist() == [2, 1, 1]
    assert clusters.first.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "min_spikes"), [(1, 5), (15, 5), (17, 5), (18, 6), (30, 10), (60, 20), (61, 20), (200 * 3600, 20)]
)
def test_a_unit_has_a_spike_in_three_seconds_but_five_in_any_and_twenty_suffice(seconds: int, min_spikes: int) -> None:
    tiling = Tiling.of(n_samples=seconds * 30_000, size=30_000, halo=0, shortest=61)
    assert min_unit_spikes(tiling, 30_000.0) == min_spikes
