"""A region's spikes as units on disk, how clusters are compared, and which units can be neurons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import RunHere

from ks4stream import simulate
from ks4stream.blocks import Tiling
from ks4stream.io import mapped as spikes
from ks4stream.io.tables import Receipt, read_column, write_block
from ks4stream.kernels import splits
from ks4stream.kernels.merging import GrowingUnit
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.clustering import Circumstances, GraphClustering
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Spikes
from ks4stream.stages.units import (
    Clusters,
    ClusterSpikes,
    Examples,
    Merge,
    RegionClusters,
    Units,
    min_unit_spikes,
    thinned,
    why_no_neuron,
)

THRESHOLD, MIN_SPIKES, IMPOSSIBLE = 8.0, 5, 30.0
WAVEFORMS = Waveforms(*(np.full((1, 3), 3**-0.5, np.float32),) * 2)


def is_neuron(train: NDArray[np.int64], scores: NDArray[np.float32]) -> bool:
    return not why_no_neuron(train, scores, THRESHOLD, MIN_SPIKES, impossible_samples=IMPOSSIBLE)


def is_one(train: list[int], score: float = 20.0) -> bool:
    scores = np.full(len(train), score, np.float32)
    return is_neuron(np.array(train, np.int64), scores)


def regular(n: int, every: int = 1000) -> list[int]:
    return [every * i for i in range(n)]


@pytest.mark.parametrize(("n", "neuron"), [(0, False), (4, False), (5, True), (50, True)])
def test_a_neuron_has_enough_spikes(n: int, neuron: bool) -> None:
    assert is_one(regular(n)) is neuron


@pytest.mark.parametrize(("score", "neuron"), [(8.0, False), (9.5, False), (9.625, True), (40.0, True)])
def test_scores_stand_clear_of_the_threshold(score: float, neuron: bool) -> None:
    varying = (score + np.tile([-1.5, 1.5], 5)).astype(np.float32)
    assert is_neuron(np.array(regular(10)), varying) is neuron


@pytest.mark.parametrize(("mean", "neuron"), [(9.0, False), (9.125, True)])
def test_or_they_vary_little(mean: float, neuron: bool) -> None:
    assert is_one(regular(10), mean) is neuron


def test_scores_that_fall_from_the_threshold_are_background_and_those_with_a_peak_above_it_are_not() -> None:
    rng = np.random.default_rng(1)
    background = THRESHOLD + rng.exponential(1.4, 2000)
    neuron = rng.normal(THRESHOLD + 1.2, 1.0, 2000)
    neuron = neuron[neuron > THRESHOLD]
    assert 1.0 < neuron.mean() - THRESHOLD < 1.5, "neither has the mean that is enough by itself"
    for scores, expected in ((background, False), (neuron, True)):
        train = np.array(regular(len(scores)))
        found = is_neuron(train, scores.astype(np.float32))
        assert found is expected


def test_it_is_the_mean_score_that_counts() -> None:
    score = np.where(np.arange(6) < 3, 8.5, 12.0).astype(np.float32)  # mean 10.25
    assert is_neuron(np.array(regular(6)), score)


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
        threshold=np.zeros(2),
        sampling_rate_hz=30_000.0,
    )


def clustering_of(spikes: Spikes) -> ClusterSpikes:
    settings = Settings(n_pcs=1)
    probe, tiling = simulate.linear_probe(1), Tiling(0, 200, 100, 0, 2)
    return ClusterSpikes(settings, spikes, WAVEFORMS, probe, Circumstances(tiling, 30_000.0), GraphClustering(settings))


def two_blocks(folder: Path) -> Spikes:
    receipts = [block(folder, "a", [5, 3, 70, 90], [0, 1, 1, 0]), block(folder, "b", [101, 130, 150], [0, 0, 1])]
    return in_blocks(receipts, [0, 100], [[1], [0]])


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
        "overlapped": [False, False],
    }


def test_spikes_overlap_others_of_any_region(tmp_path: Path) -> None:
    """Within a quarter of a waveform of 20 samples. Scores are times, and those of less than 6 do not count."""
    waveforms = Waveforms(*(np.full((1, 20), 20**-0.5, np.float32),) * 2)
    times, regions = [5, 10, 60, 65, 100, 106], [1, 0, 0, 1, 0, 1]
    receipts = [block(tmp_path, "a", times[:4], regions[:4]), block(tmp_path, "b", times[4:], regions[4:])]

    def overlapped(dropped: list[list[int]], template_channels: list[list[int]]) -> list[bool]:
        """Of the spikes at 10, 60 and 100."""
        spikes = replace(in_blocks(receipts, [0, 100], dropped), template_channels=np.array(template_channels))
        clustering = replace(clustering_of(spikes), waveforms=waveforms, probe=simulate.linear_probe(4))
        found: list[bool] = clustering._overlapped(0, np.array([10, 60, 100]), np.zeros(3, np.int32)).tolist()
        return found

    assert overlapped([[], []], [[0], [0]]) == [False, True, False]
    assert overlapped([[3], []], [[0], [0]]) == [False, False, False]  # the spike at 65 does not count
    assert overlapped([[], []], [[0, 1, 2], [2, 3, -1]]) == [False, False, False]  # a third of the channels
    assert overlapped([[], []], [[0, 1, -1], [1, 2, 3]]) == [False, True, False]  # a half
    clustering = replace(clustering_of(in_blocks(receipts, [0, 100], [[], []])), waveforms=waveforms)
    assert read_column(clustering.task(0, tmp_path).examples, "overlapped").tolist() == [False, True, False]


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
    spikes = replace(spikes, region_of=np.arange(2).clip(max=n_regions - 1))
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


# -- comparing clusters by some of their spikes ------------------------------------------------------


def test_examples_are_spread_evenly_over_each_cluster() -> None:
    label = np.repeat([0, 2], [1000, 7])
    some = thinned(label, 4)
    assert some.tolist() == [0, 250, 500, 750, 1000, 1002, 1004, 1006]
    assert thinned(label[::-1].copy(), 500)[:500].tolist() == list(range(7, 1007, 2))
    assert thinned(np.zeros(0, np.int64), 4).tolist() == []
    assert len(thinned(np.zeros(501, np.int64), 500)) == 251  # every other


RATE, NT, N_PCS = 30_000.0, 61, 4
LATE = 3  # samples


def smooth_components() -> torch.Tensor:
    """Orthonormal waveforms that vanish at the ends."""
    time = torch.linspace(-1, 1, NT, dtype=torch.float64)
    bumps = torch.stack([torch.exp(-12 * time**2) * time**k for k in range(N_PCS)])
    return torch.linalg.qr(bumps.T)[0].T.float().contiguous()


PCS = smooth_components()


def bump(late: int = 0, width: float = 6.0) -> NDArray[np.float32]:
    """Features (q,) of a waveform of norm 1 in the window, so many samples late."""
    time = torch.arange(NT) - NT // 2 - late
    features = torch.exp(-0.5 * (time / width) ** 2) @ PCS.T
    return (features / features.norm()).numpy().astype(np.float32)


class Table:
    """Clusters of one region in files, each of some spikes with features on the channels of its template."""

    def __init__(self, folder: Path, channels: list[list[int]]) -> None:
        self.folder, self.channels = folder, np.array(channels, np.int64)
        self.columns: list[dict[str, NDArray[Any]]] = []

    def add(
        self,
        sample: NDArray[np.int64],
        template: int,
        features: NDArray[np.float32],
        seed: int,
        displacement_um: float = 0.0,
    ) -> None:
        """A cluster with the mean `features` (j, q) in noise."""
        n, draw = len(sample), np.random.default_rng(seed)
        noisy = features + draw.normal(size=(n, *features.shape))
        self.columns.append(
            {
                "sample": sample,
                "template": np.full(n, template, np.int32),
                "features": noisy.astype(np.float32),
                "displacement_um": np.full(n, displacement_um, np.float32),
                "overlapped": np.zeros(n, bool),
                "elapsed": sample / 3e6,
            }
        )

    def written(self) -> tuple[Clusters, Examples]:
        label = np.repeat(np.arange(len(self.columns)), [len(one["sample"]) for one in self.columns])
        columns = {name: np.concatenate([one[name] for one in self.columns]) for name in self.columns[0]}
        receipt = write_block(self.folder / "examples.rows", columns, label, len(self.columns))
        clusters = Clusters([receipt])
        return clusters, Examples(clusters, [receipt], self.channels, PCS, RATE)

    def are_two(self, *, lag: int = 0) -> bool:
        """Whether the first two clusters are two neurons."""
        clusters, examples = self.written()
        units = [GrowingUnit(number, clusters, len(clusters[number]), torch.zeros(1, 1)) for number in (0, 1)]
        return examples.are_two(units[0], units[1], lag)


def sparse(n: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).integers(0, 3_000_000, n))


EVERYWHERE = [[0, 1, 2, 3]]
ALIKE = np.stack([20 * bump(), 12 * bump(), 8 * bump(), 5 * bump()])
OTHER = np.stack([20 * bump(), 8 * bump(), 16 * bump(), 5 * bump()])


def test_clusters_are_compared_by_the_features_of_their_examples(tmp_path: Path) -> None:
    for mean, two in ((ALIKE, False), (1.1 * ALIKE, True), (OTHER, True)):
        table = Table(tmp_path, EVERYWHERE)
        table.add(sparse(200, 0), 0, ALIKE, 1)
        table.add(sparse(100, 2), 0, mean * (1 + 0.3 * two * np.arange(4)[:, None]), 3)
        assert table.are_two() is two


@pytest.mark.parametrize("lag", [LATE, 0])
def test_a_late_cluster_is_compared_at_its_lag(tmp_path: Path, lag: int) -> None:
    """Its spikes are later than the waveform in the window, which is early."""
    table = Table(tmp_path, EVERYWHERE)
    table.add(sparse(200, 4), 0, ALIKE, 5)
    early = np.stack([size * bump(-LATE) for size in (20, 12, 8, 5)])
    table.add(sparse(200, 6) + LATE, 0, early, 7)
    seen: list[tuple[splits.Group, splits.Group]] = []

    def keep(a: splits.Group, b: splits.Group, **_: object) -> bool:
        seen.append((a, b))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "are_two", keep)
        table.are_two(lag=lag)
    ((a, b),) = seen
    assert np.array_equal(a.conditions.sample, sparse(200, 4))
    assert np.array_equal(b.conditions.sample, sparse(200, 6) + LATE - lag)
    away = float((a.features.mean(0) - b.features.mean(0)).norm())
    assert away < 2 if lag else away > 5  # of noise alone, √(16/200 + 16/200) = 0.4, and what the window cuts off


def test_what_rolling_loses_is_no_difference(tmp_path: Path) -> None:
    """A waveform that is too narrow for the components: of what they lack, a part is within them two samples later."""

    def seen(late: int, sizes: tuple[float, ...]) -> NDArray[np.float32]:
        narrow = torch.exp(-0.5 * ((torch.arange(NT) - NT // 2 - late) / 1.5) ** 2)
        return np.outer(sizes, (narrow / narrow.norm()) @ PCS.T).astype(np.float32)

    def two(sizes: tuple[float, ...]) -> bool:
        table = Table(tmp_path, EVERYWHERE)
        table.add(sparse(300, 20), 0, seen(0, (60, 30, 20, 10)), 21)
        table.add(sparse(300, 22), 0, seen(-2, sizes), 23)
        return table.are_two(lag=2)

    assert not two((60, 30, 20, 10))
    assert two((60, 15, 40, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examples, "_there_and_back", lambda self, lag: torch.eye(N_PCS, dtype=torch.float64))
        assert two((60, 30, 20, 10)), "without knowing what it loses"


def test_clusters_of_a_unit_are_compared_at_their_own_lags(tmp_path: Path) -> None:
    table = Table(tmp_path, EVERYWHERE)
    early = np.stack([size * bump(-LATE) for size in (20, 12, 8, 5)])
    for number, mean in enumerate((ALIKE, early, early)):
        table.add(sparse(100, 8 + number), 0, mean, 11 + number)
    clusters, examples = table.written()
    units = [GrowingUnit(number, clusters, 100, torch.zeros(4, N_PCS)) for number in range(3)]
    units[0].absorb(units[1], LATE, PCS)
    seen: list[list[float]] = []

    def keep(a: splits.Group, b: splits.Group, *, max_limit: float, **_: object) -> bool:
        assert max_limit == splits.MAX_LIMIT
        half = [a.features[:100], a.features[100:], b.features]
        seen.append([float((one.mean(0) - half[0].mean(0)).norm()) for one in half])
        assert np.array_equal(a.conditions.sample[100:], sparse(100, 9) - LATE)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "are_two", keep)
        examples.are_two(units[0], units[2], LATE)
    assert max(seen[0]) < 2


@pytest.mark.parametrize(("templates_say", "moved_um", "lag"), [(2, 20, 3), (5, 20, 3), (0, 20, 2), (2, 0, 2)])
def test_units_line_up_near_the_lag_of_their_templates(
    tmp_path: Path, templates_say: int, moved_um: float, lag: int
) -> None:
    """The second one is three samples early; by its other half, at another displacement, templates see less or more."""
    table = Table(tmp_path, [[0, 1, 2, 3], [3, 2, 1, 0]])
    early = np.stack([size * bump(-LATE) for size in (5, 8, 12, 20)])
    table.add(sparse(100, 60), 0, ALIKE, 61)
    table.add(sparse(100, 62), 1, early, 63)
    table.add(sparse(100, 64), 1, ALIKE[::-1], 65, moved_um)
    clusters, examples = table.written()
    units = [GrowingUnit(number, clusters, 100, torch.zeros(4, N_PCS)) for number in range(3)]
    units[1].absorb(units[2], 0, PCS)
    assert examples.line_up(units[0], units[1], templates_say) == lag
    assert examples.line_up(units[1], units[0], -templates_say) == -lag


def test_units_without_common_channels_line_up_as_their_templates_do(tmp_path: Path) -> None:
    table = Table(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7]])
    for number in range(2):
        table.add(sparse(100, 66 + number), number, ALIKE, 68 + number, 10.0 * number)
    clusters, examples = table.written()
    units = [GrowingUnit(number, clusters, 100, torch.zeros(8, N_PCS)) for number in range(2)]
    assert examples.line_up(units[0], units[1], 7) == 7


def test_at_most_so_many_examples_are_compared(tmp_path: Path) -> None:
    table = Table(tmp_path, EVERYWHERE)
    for number in range(3):
        table.add(sparse(400, number), 0, ALIKE, 20 + number)
    clusters, examples = table.written()
    units = [GrowingUnit(number, clusters, 400, torch.zeros(4, N_PCS)) for number in range(3)]
    units[0].absorb(units[1], 0, PCS)
    sizes: list[tuple[int, int]] = []

    def keep(a: splits.Group, b: splits.Group, **_: object) -> bool:
        sizes.append((a.n, b.n))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "are_two", keep)
        assert examples.are_two(units[0], units[2], 0)
    assert sizes == [(400, 400)]  # every other of 800


def test_clusters_are_compared_on_the_channels_that_both_have(tmp_path: Path) -> None:
    """Zeros on the other ones are no difference."""
    table = Table(tmp_path, [[0, 1, 2, 3], [4, 3, 1, 2]])
    table.add(sparse(200, 14), 0, ALIKE, 15)
    table.add(sparse(100, 16), 1, np.stack([15 * bump(), *ALIKE[[3, 1, 2]]]), 17)
    assert not table.are_two()
    table = Table(tmp_path, [[0, 1, 2, 3], [4, 3, 1, 2]])
    table.add(sparse(200, 14), 0, ALIKE, 15)
    table.add(sparse(100, 16), 1, np.stack([15 * bump(), *OTHER[[3, 1, 2]]]), 17)
    assert table.are_two()


def test_fewer_than_three_common_channels_are_those_of_two_neurons(tmp_path: Path) -> None:
    for channels, two in (([4, 5, 2, 3], True), ([4, 1, 2, 3], False)):
        table = Table(tmp_path, [[0, 1, 2, 3], channels])
        table.add(sparse(200, 18), 0, np.repeat(ALIKE[:1], 4, 0), 19)
        table.add(sparse(100, 20), 1, np.repeat(ALIKE[:1], 4, 0), 21)
        assert table.are_two() is two


def test_clusters_on_few_channels_are_compared_on_these(tmp_path: Path) -> None:
    table = Table(tmp_path, [[0, 1, -1, -1], [0, 1, -1, -1]])
    for number in range(2):
        table.add(sparse(100, 22 + number), number, ALIKE, 24 + number)
    assert not table.are_two()


def test_spikes_that_follow_in_bursts_do_not_count(tmp_path: Path) -> None:
    """A neuron whose second spike, 5 ms later, is smaller; found as two clusters."""
    first = np.cumsum(np.random.default_rng(26).integers(6_000, 14_000, 300))
    table = Table(tmp_path, EVERYWHERE)
    table.add(first, 0, ALIKE, 27)
    table.add(first + 150, 0, 0.6 * ALIKE, 28)
    assert not table.are_two()
    table = Table(tmp_path, EVERYWHERE)
    table.add(first, 0, ALIKE, 27)
    table.add(sparse(300, 29), 0, 0.6 * ALIKE, 28)
    assert table.are_two()


def test_isolation_is_that_from_the_most_similar_unit_nearby(tmp_path: Path) -> None:
    """A unit cut in two, one that is apart, one of few spikes, one far away, and one of a late cluster."""
    table = Table(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 4, 5, 6]])
    table.add(sparse(300, 30), 0, ALIKE, 31)
    table.add(sparse(150, 32), 0, ALIKE, 33)
    table.add(sparse(200, 34), 0, 2 * OTHER, 35)
    table.add(sparse(9, 36), 0, 2 * OTHER, 37)
    table.add(sparse(200, 38), 1, ALIKE, 39)
    table.add(sparse(200, 40), 2, ALIKE[[0, 0, 0, 0]], 41)  # has one channel of the first, three of the last but one
    _, examples = table.written()
    halves = [{0: 0}, {1: 0}, {2: 0}, {3: 0}, {4: 0}, {5: 0}]
    found = examples.isolation(halves)
    assert found[:2] == pytest.approx(0.5, abs=0.09)  # 3 · 0.5 / √300: neighbours of a spike count as one
    assert found[0] == found[1]
    assert found[[2, 4, 5]].tolist() == [1.0, 1.0, 1.0] and np.isnan(found[3])
    assert examples.isolation([{0: 0, 1: 0}, {2: 0}]).tolist() == [1.0, 1.0], "together they are apart from the rest"
    late = Table(tmp_path, EVERYWHERE)
    late.add(sparse(200, 42), 0, ALIKE, 43)
    late.add(sparse(200, 44), 0, np.stack([size * bump(-LATE) for size in (20, 12, 8, 5)]), 45)
    _, examples = late.written()
    assert examples.isolation([{0: 0}, {1: 0}]).tolist() == [1.0, 1.0]
    assert examples.isolation([{0: 0}, {1: LATE}])[0] < 0.8, "moved, they are alike"


# -- what matching left of larger waveforms ----------------------------------------------------------


def units_of(folder: Path, trains: list[NDArray[np.int64]], features: NDArray[np.float32]) -> Units:
    """Units of clusters of one region, with their means (cluster, c, 1) on channels 20 µm apart."""
    sample = np.concatenate(trains)
    columns = {"sample": sample, "score": np.full(len(sample), 30, np.float32)}
    examples = {
        **{name: sample * 0 for name in ("displacement_um", "elapsed", "template")},
        "overlapped": np.zeros(len(sample), bool),
        "sample": sample,
        "features": np.zeros((len(sample), 1, 1), np.float32),
    }
    label = np.repeat(np.arange(len(trains)), [len(train) for train in trains])
    regions = [
        RegionClusters(
            write_block(folder / "clusters.rows", columns, label, len(trains)),
            write_block(folder / "examples.rows", examples, label, len(trains)),
            features,
            np.full(len(trains), THRESHOLD),
        )
    ]
    probe = simulate.linear_probe(features.shape[1], pitch_um=20)
    merge = Merge(Settings(n_pcs=1), regions, np.zeros((1, 1), np.int64), WAVEFORMS, probe, RATE, MIN_SPIKES)
    return merge.run(RunHere(folder))


@pytest.mark.parametrize(
    ("share", "distance_um", "size", "stays"),
    [(1.0, 0, 10, False), (0.5, 100, 10, False), (0.45, 0, 10, True), (1.0, 240, 10, True), (0.0, 0, 10, True)],
)
def test_units_that_coincide_with_a_larger_one_nearby_are_left_out(
    tmp_path: Path, share: float, distance_um: int, size: float, stays: bool
) -> None:
    n = 100
    large = 30_000 * np.arange(n)
    small = np.where(np.arange(n) < round(share * n), large + 12, large + 15_000)
    features = np.zeros((2, 20, 1), np.float32)
    features[0, 0], features[1, distance_um // 20] = 30, size
    features[1, (distance_um // 20 + 1) % 20] = 0.9 * size  # less similar than one that may be merged
    units = units_of(tmp_path, [large, small], features)
    assert units.unit_of.tolist() == ([0, 1] if stays else [0, -1])
    assert len(units.features) == 1 + stays


@pytest.mark.parametrize(
    ("large_norm", "small_norm", "share", "distance_um", "stays"),
    [
        *((60, 25, 1.0, 340, False), (60, 25, 0.45, 340, True)),
        *((60, 35, 1.0, 340, True), (60, 35, 1.0, 200, False)),  # not much smaller
        *((45, 10, 1.0, 340, True), (45, 10, 1.0, 200, False)),  # not huge
    ],
)
def test_units_that_coincide_with_a_huge_one_at_any_distance_are_left_out(
    tmp_path: Path, large_norm: float, small_norm: float, share: float, distance_um: int, stays: bool
) -> None:
    """If they have less than half of its norm."""
    n = 100
    large = 30_000 * np.arange(n)
    small = np.where(np.arange(n) < round(share * n), large + 12, large + 15_000)
    features = np.zeros((2, 20, 1), np.float32)
    features[0, 0], features[1, distance_um // 20] = large_norm, small_norm
    units = units_of(tmp_path, [large, small], features)
    assert units.unit_of.tolist() == ([0, 1] if stays else [0, -1])


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
