"""The graph of spikes and landmarks, on examples small enough to count."""

from __future__ import annotations

import pytest
import torch
from dense_rows import DenseRows

from ks4stream.kernels import graph as graph_module
from ks4stream.kernels.graph import FeatureRows, ScatteredRows, choose_landmarks, graph_of, join_to_landmarks


def on_a_line(*positions: float) -> DenseRows:
    """Spikes with one feature."""
    return DenseRows(torch.tensor(positions)[:, None])


def test_scattered_rows_are_features_in_their_slots() -> None:
    features = torch.arange(12, dtype=torch.float32).view(2, 3, 2)  # (n, j, q)
    rows = ScatteredRows(features, torch.tensor([0, 1]), torch.tensor([[2, 0, -1], [1, 2, 0]]), 4)
    expected = torch.tensor([[2, 3, 0, 0, 0, 1, 0, 0], [10, 11, 6, 7, 8, 9, 0, 0]], dtype=torch.float32)
    assert (rows.n, rows.d) == (2, 8)
    assert torch.equal(rows.chunk(0, 2), expected)
    assert torch.equal(rows.take(torch.tensor([1, 1, 0])), expected[[1, 1, 0]])
    assert rows.chunk(2, 2).shape == (0, 8)


def test_shared_columns_are_those_of_channels_that_most_spikes_of_each_group_have() -> None:
    slot = torch.tensor([[0, 1], [1, 2], [2, -1]])  # of each kind
    kind = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    rows = ScatteredRows(torch.ones(10, 2, 3), kind, slot, 4)
    columns = {number: [3 * number, 3 * number + 1, 3 * number + 2] for number in range(4)}

    def shared(*groups: list[int]) -> list[int]:
        return rows.shared_columns([torch.tensor(group) for group in groups]).tolist()

    assert shared([0, 1, 2, 3, 4]) == columns[0] + columns[1]  # four of five have channel 0, all have 1
    assert shared([1, 2, 3, 4]) == columns[1]  # three of four are not enough
    assert shared([4, 5]) == columns[1] + columns[2]
    assert shared([0, 1], [4, 5]) == columns[1]
    assert shared([4, 5], [6, 7]) == columns[2]
    assert shared([0, 1], [6, 7]) == []


@pytest.mark.parametrize(
    ("n", "expected"),
    [(0, []), (1, [0]), (6, [0, 1, 2, 3, 4, 5]), (40, [0, 6, 13, 20, 26, 33]), (1000, list(range(0, 1000, 100)))],
)
def test_landmarks_are_even_and_between_least_and_most(n: int, expected: list[int]) -> None:
    assert choose_landmarks(n, downsampling=20, min_landmarks=6, max_landmarks=10).tolist() == expected


def test_neighbours_are_nearest_and_ties_go_to_the_first() -> None:
    rows = on_a_line(0, 1, 2, 3, 10, 2)
    graph = join_to_landmarks(rows, torch.tensor([0, 2, 4, 5]), n_neighbors=2)
    # from 1 the landmarks at 0, 2 and 2 are equally far; from 2 both landmarks there are nearest
    assert graph.neighbor.tolist() == [[0, 1], [0, 1], [1, 3], [1, 3], [1, 2], [1, 3]]


def test_links_of_landmarks_to_themselves_do_not_count() -> None:
    graph = join_to_landmarks(on_a_line(0, 1, 2, 3, 10, 2), torch.tensor([0, 2, 4, 5]), n_neighbors=2)
    assert graph.is_self.nonzero().tolist() == [[0, 0], [2, 0], [4, 1], [5, 1]]
    assert graph.spike_degree.tolist() == [1, 2, 1, 2, 1, 1]
    assert graph.landmark_degree.tolist() == [1, 5, 0, 2]
    assert graph.n_links == 8
    assert (graph.n_spikes, graph.n_landmarks) == (6, 4)


def test_a_landmark_hidden_behind_copies_of_itself_has_no_link_to_itself() -> None:
    graph = join_to_landmarks(on_a_line(5, 5, 5, 5), torch.arange(4), n_neighbors=2)
    assert graph.neighbor.tolist() == [[0, 1]] * 4
    assert graph.landmark_degree.tolist() == [3, 3, 0, 0]


def test_fewer_landmarks_than_neighbours_are_all_joined() -> None:
    graph = join_to_landmarks(on_a_line(0, 1, 2), torch.tensor([0, 2]), n_neighbors=10)
    assert graph.neighbor.tolist() == [[0, 1]] * 3


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    landmark = torch.arange(0, 300, 4)
    whole = join_to_landmarks(DenseRows(x), landmark, n_neighbors=5)
    monkeypatch.setattr(graph_module, "CHUNK", 64)
    monkeypatch.setattr(graph_module, "INNER_CHUNK", 20)
    parts = join_to_landmarks(DenseRows(x), landmark, n_neighbors=5)
    assert torch.equal(whole.neighbor, parts.neighbor)
    assert whole.neighbor.dtype == torch.int32
    distance = torch.cdist(x.double(), x[landmark].double())
    assert torch.equal(whole.neighbor.long(), distance.topk(5, largest=False).indices.sort(dim=1).values)


def test_rows_are_never_made_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(DenseRows):
        most = 0

        def chunk(self, start: int, stop: int) -> torch.Tensor:
            Watched.most = max(Watched.most, stop - start)
            return super().chunk(start, stop)

    rows: FeatureRows = Watched(torch.zeros(500, 3))
    monkeypatch.setattr(graph_module, "CHUNK", 100)
    join_to_landmarks(rows, torch.arange(0, 500, 50), n_neighbors=3)
    assert Watched.most == 100


def test_graph_of_given_links() -> None:
    graph = graph_of(torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=torch.int32), torch.tensor([0, 2]))
    assert graph.spike_degree.tolist() == [1, 2, 1]
    assert graph.landmark_degree.tolist() == [2, 2]
