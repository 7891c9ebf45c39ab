"""All spikes in time order, and their positions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ks4stream.io.tables import write_block
from ks4stream.kernels.templates import roll_matrix
from ks4stream.probe import Probe
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.stages import joining
from ks4stream.stages.joining import Join, positions
from ks4stream.stages.matching import Spikes
from ks4stream.stages.units import Clusters, Units

LINE = Probe.from_positions([(0, 0), (0, 20), (30, 20), (0, 400)])
WAVEFORMS = Waveforms(components=np.linalg.qr(np.random.default_rng(0).normal(size=(61, 3)))[0].T, shapes=np.eye(2))

# Clusters 0, 1 and 3 are the final units 1, 0 and 1; cluster 2 is not a neuron. Spikes of cluster 3 are 4 samples late.
UNIT_OF, LAG_OF = np.array([1, 0, -1, 1]), np.array([0, 0, 0, 4])
N_SPIKES = 400


def all_spikes() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    sample = np.sort(draw.integers(0, 1000, N_SPIKES))  # crowded: many at the same time
    return {
        "sample": sample,
        "cluster": draw.integers(0, 4, N_SPIKES),
        "kept": draw.random(N_SPIKES) < 0.8,
        "features": draw.normal(size=(N_SPIKES, 2, 3)).astype(np.float32),
    }


def sorted_spikes(folder: Path, edges: list[int]) -> dict[str, np.ndarray]:
    """The same spikes, cut into blocks at `edges`."""
    spikes = all_spikes()
    bounds = [0, *edges, 1000]
    receipts, row = [], np.zeros(N_SPIKES, np.int64)
    for number, (first, last) in enumerate(pairwise(bounds)):
        rows = np.flatnonzero((spikes["sample"] >= first) & (spikes["sample"] < last))
        region = spikes["cluster"][rows] // 2
        row[rows[np.argsort(region, kind="stable")]] = sum(r.n_rows for r in receipts) + np.arange(len(rows))
        receipts.append(write_block(folder / f"block{number}.npz", {"features": spikes["features"][rows]}, region, 2))
    of_regions = []
    for region in (0, 1):
        rows = np.flatnonzero(spikes["cluster"] // 2 == region)
        columns = {
            "sample": spikes["sample"][rows],
            "template": np.full(len(rows), region, np.int32),
            "score": rows.astype(np.float32),
            "row": row[rows],
        }
        of_regions.append(write_block(folder / f"r{region}-{len(edges)}.npz", columns, spikes["cluster"][rows] % 2, 2))
    kept = np.concatenate([spikes["kept"][spikes["cluster"] == number] for number in range(4)])
    units = Units(
        clusters=Clusters(of_regions),
        unit_of=UNIT_OF,
        lag_of=LAG_OF,
        kept=kept,
        features=np.zeros((2, 4, 3), np.float32),
        refractory=np.zeros(2, bool),
        contamination=np.zeros(2),
        similarity=np.eye(2, dtype=np.float32),
        isolation=np.ones(2),
        left_out={},
    )
    block_spikes = Spikes(
        receipts=receipts,
        first=np.array(bounds[:-1]),
        dropped=[np.zeros(0, np.int64)] * len(receipts),
        artifacts=np.zeros((0, 2), np.int64),
        template_channels=np.array([[0, 1], [1, 2]]),
        region_of=np.array([0, 1]),
        threshold=np.zeros(2),
        sampling_rate_hz=30_000.0,
    )
    parts = list(Join(Settings(), units, block_spikes, WAVEFORMS, LINE).in_order())
    assert len(parts) == len(edges) + 1  # a block's worth at a time
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_spikes_are_in_order_of_their_moved_times_then_of_units(tmp_path: Path) -> None:
    columns, spikes = sorted_spikes(tmp_path, []), all_spikes()
    which = columns["score"].astype(int)
    cluster = spikes["cluster"][which]
    assert sorted(which) == np.flatnonzero(spikes["cluster"] != 2).tolist()  # every spike of a unit once
    assert np.array_equal(columns["sample"], spikes["sample"][which] - LAG_OF[cluster])
    assert np.array_equal(columns["unit"], UNIT_OF[cluster])
    assert np.array_equal(columns["kept"], spikes["kept"][which])
    assert np.array_equal(np.lexsort((columns["unit"], columns["sample"])), np.arange(len(which)))


def test_features_come_from_the_blocks_and_are_moved_with_the_spike(tmp_path: Path) -> None:
    columns, spikes = sorted_spikes(tmp_path, [500]), all_spikes()
    which = columns["score"].astype(int)
    late = spikes["cluster"][which] == 3
    own = spikes["features"][which]
    assert np.array_equal(columns["features"][~late], own[~late])
    rolled = own[late] @ roll_matrix(torch.from_numpy(WAVEFORMS.components), 4).numpy()
    np.testing.assert_allclose(columns["features"][late], rolled, atol=1e-6)  # float32


@pytest.mark.parametrize("edges", [[500], [100, 101, 300, 700], list(range(10, 1000, 10))])
def test_the_same_from_any_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edges: list[int]) -> None:
    monkeypatch.setattr(joining, "BLOCKS_PER_CHUNK", 3)
    whole, cut = sorted_spikes(tmp_path, []), sorted_spikes(tmp_path, edges)
    for name, values in whole.items():
        assert values.dtype == cut[name].dtype
        assert np.array_equal(values, cut[name]), name


def locate(features: list[list[float]], channels: list[int], limit_um: float = 100) -> tuple[float, float]:
    rows = np.array([features], np.float32)
    x, y = positions(rows, np.zeros(1, np.int32), np.array([channels]), LINE, limit_um)
    assert x.dtype == y.dtype == np.float32
    return float(x[0]), float(y[0])


def test_contacts_weigh_by_the_norm_of_their_features() -> None:
    assert locate([[3, 4], [0, -15]], [0, 1]) == (0, 15)  # norms 5 and 15
    assert locate([[1, 0], [0, 1]], [1, 2]) == (15, 20)


def test_only_contacts_near_the_templates_first_count() -> None:
    assert locate([[2], [2], [9]], [0, 1, 3]) == (0, 10)
    assert locate([[2], [2]], [0, 1], limit_um=20) == (0, 0)  # 20 µm is not closer than 20 µm
    assert locate([[2], [2]], [1, 0], limit_um=0) == (0, 20)  # its own position at least


def test_missing_channels_do_not_count() -> None:
    assert locate([[2], [7]], [1, -1]) == (0, 20)


def test_every_spike_has_the_channels_of_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ks4stream.stages.joining.ROWS_PER_CHUNK", 2)  # and is computed in parts
    features, template = np.ones((5, 1, 1), np.float32), np.array([1, 0, 1, 2, 0], np.int32)
    x, y = positions(features, template, np.array([[0], [2], [3]]), LINE, 100)
    assert x.tolist() == [30, 0, 30, 0, 0]
    assert y.tolist() == [20, 0, 20, 400, 0]
