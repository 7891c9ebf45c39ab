"""The four numberings of a spike: the example in appendix A of docs/method.md is what the code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ks4stream
from ks4stream import simulate
from ks4stream.blocks import Tiling
from ks4stream.io.tables import Receipt, read_column, write_block
from ks4stream.kernels.borders import Reported, settle
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages.clustering import Circumstances, GraphClustering
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Spikes
from ks4stream.stages.units import Clusters, ClusterSpikes, Units

DOCUMENT = Path(ks4stream.__file__).parent.parent / "docs" / "method.md"
NT = 61
TEMPLATE_REGION = np.array([0, 0, 1])
FOUND: list[list[tuple[str, int, int]]] = [  # per block: spike, sample, template
    [("a", 10, 2), ("b", 30, 0), ("c", 60, 1), ("d", 101, 2)],
    [("d′", 101, 2), ("e", 130, 1), ("f", 150, 0)],
    [("g", 220, 2), ("h", 240, 0)],
]
CLUSTERS = {0: {"b": 0, "f": 0, "h": 0, "c": 1, "e": 1}, 1: {"a": 0, "d": 0, "g": 0}}  # per region


def rows_of_the_document() -> list[list[str]]:
    """The table of appendix A: each spike and its numbers."""
    table = DOCUMENT.read_text(encoding="utf-8").split("\n| spike |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def written(folder: Path) -> tuple[Spikes, list[list[str]]]:
    """The files of the example's blocks, and the names of their rows."""
    receipts, names = [], []
    for number, block in enumerate(FOUND):
        sample, template = (np.array([spike[field] for spike in block]) for field in (1, 2))
        columns = {
            "sample": sample.astype(np.int64),
            "template": template.astype(np.int32),
            "score": np.ones(len(block), np.float32),
            "features": np.ones((len(block), 1, 1), np.float32),
        }
        receipts.append(write_block(folder / f"{number}.rows", columns, TEMPLATE_REGION[template], 2))
        order = np.argsort(TEMPLATE_REGION[template], kind="stable")
        names.append([block[row][0] for row in order])
    none = np.zeros(0, np.int64)
    dropped = [none, np.array([names[1].index("d′")]), none]
    spikes = Spikes(
        receipts=receipts,
        first=np.array([0, 100, 200]),
        dropped=dropped,
        artifacts=np.zeros((0, 2), np.int64),
        template_channels=np.zeros((3, 1), np.int64),
        region_of=TEMPLATE_REGION,
        threshold=np.zeros(3),
        sampling_rate_hz=30_000.0,
    )
    return spikes, names


def test_the_example_of_the_four_numberings(tmp_path: Path) -> None:
    spikes, in_files = written(tmp_path)
    settings, probe = Settings(n_pcs=1), simulate.linear_probe(1)
    everywhere = [name for block in in_files for name in block]
    place: dict[str, dict[str, int]] = {name: {} for name in everywhere}
    for block, names in enumerate(in_files):
        for row, name in enumerate(names):
            place[name] |= {"block": block, "row in block's file": row}
    waveforms = Waveforms(np.eye(1, NT, dtype=np.float32), np.eye(1, NT, dtype=np.float32))
    circumstances = Circumstances(Tiling(0, 300, 100, 0, 3), 30_000.0)
    stage = ClusterSpikes(settings, spikes, waveforms, probe, circumstances, GraphClustering(settings))
    receipts: list[Receipt] = []
    cluster_files: list[str] = []
    for region, clusters in CLUSTERS.items():
        global_row = stage._row_in_files(region)
        rows = spikes.counted(region)
        for row, number in enumerate(global_row):
            place[everywhere[number]] |= {"row among all blocks": int(number), "region": region, "row of region": row}
        names = [everywhere[number] for number in global_row[rows]]  # these are in order of time here
        sample = np.array([time for name in names for block in FOUND for one, time, _ in block if one == name])
        columns = {
            "sample": sample,
            "template": np.zeros(len(names), np.int32),
            "score": np.ones(len(names), np.float32),
            "row": global_row[rows],
        }
        unit = np.array([clusters[name] for name in names])
        receipts.append(write_block(tmp_path / f"clusters-{region}.rows", columns, unit, int(unit.max()) + 1))
        in_cluster_file = [everywhere[number] for number in read_column(receipts[-1], "row")]
        for row, name in enumerate(in_cluster_file):
            place[name] |= {"row in cluster file": row, "place in kept": len(cluster_files) + row}
        cluster_files += in_cluster_file
    clusters_of_all = Clusters(receipts)
    assert clusters_of_all.first.tolist() == [0, 3, 5]
    units = Units(
        clusters_of_all,
        np.arange(3),
        np.zeros(3, np.int64),
        np.ones(8, bool),
        np.zeros((3, 1, 1), np.float32),
        np.zeros(3, bool),
        np.zeros(3),
        np.eye(3, dtype=np.float32),
        np.ones(3),
        {},
    )
    parts = list(Join(settings, units, spikes, waveforms, probe).in_order())
    times = np.concatenate([part["sample"] for part in parts]).tolist()
    assert times == [10, 30, 60, 101, 130, 150, 220, 240]
    assert np.concatenate([part["unit"] for part in parts]).tolist() == [2, 0, 1, 2, 1, 0, 2, 0]
    name_at = {time: name for block in FOUND for name, time, _ in block if name != "d′"}
    for at, time in enumerate(times):
        place[name_at[time]] |= {"place in time": at}
    header = ["block", "row in block's file", "row among all blocks", "region", "row of region"]
    header += ["row in cluster file", "place in kept", "place in time"]
    documented = {row[0]: [int(cell) for cell in row[1:]] for row in rows_of_the_document()}
    assert documented == {name: [place[name][column] for column in header] for name in "abcdefgh"}
    for name, row in (("d′", 6), ("d", 3)):
        assert place[name]["row among all blocks"] == row


def test_the_left_version_of_a_spike_at_the_border_counts() -> None:
    """Of d and d′ of the example."""
    left, right = (
        Reported(np.array([s for _, s, _ in block]), np.array([t for _, _, t in block]), np.array(counts))
        for block, counts in ((FOUND[0], [True, True, True, False]), (FOUND[1], [True, True, True]))
    )
    keep_left, keep_right = settle(left, right, border=100, nt=30, tolerance=20)
    assert keep_left.tolist() == [True, True, True, True]
    assert keep_right.tolist() == [False, True, True]
