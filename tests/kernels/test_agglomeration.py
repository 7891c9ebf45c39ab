"""Which clusters are joined, and in which order."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ks4stream.kernels import agglomeration
from ks4stream.kernels.agglomeration import EXPECTED_FLOOR, MIN_RATIO, AreTwo, agglomerate, links_between
from ks4stream.kernels.graph import graph_of

Asked = list[tuple[list[int], list[int]]]


def asked_of(answer: Callable[[set[int], set[int]], bool]) -> tuple[AreTwo, Asked]:
    """A comparison, and the pairs of groups that it was asked about."""
    asked: Asked = []

    def are_two(a: np.ndarray, b: np.ndarray) -> bool:
        asked.append((a.tolist(), b.tolist()))
        return answer(set(a.tolist()), set(b.tolist()))

    return are_two, asked


def never(a: set[int], b: set[int]) -> bool:
    return False


def always(a: set[int], b: set[int]) -> bool:
    return True


def test_links_between_clusters_leave_out_those_of_landmarks_to_themselves() -> None:
    graph = graph_of(torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=torch.int32), torch.tensor([0, 2]))
    # spikes 0 and 1 in cluster 0, spike 2 in 1; landmark 0 (spike 0) in cluster 0, landmark 1 (spike 2) in 1
    links = links_between(graph, torch.tensor([0, 0, 1]), torch.tensor([0, 1]), 2)
    assert links.tolist() == [[1, 2], [1, 0]]
    assert links.dtype == np.int64


def test_links_are_counted_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    neighbor = torch.stack([torch.randperm(20, generator=generator)[:4] for _ in range(60)]).int()
    graph = graph_of(neighbor, torch.arange(0, 60, 3))
    spike_label, landmark_label = torch.arange(60) % 5, torch.arange(20) % 5
    whole = links_between(graph, spike_label, landmark_label, 5)
    expected = np.zeros((5, 5), np.int64)
    for spike in range(60):
        for landmark in neighbor[spike].tolist():
            expected[spike % 5, landmark % 5] += 3 * landmark != spike
    assert np.array_equal(whole, expected)
    monkeypatch.setattr(agglomeration, "CHUNK", 7)
    assert np.array_equal(links_between(graph, spike_label, landmark_label, 5), whole)


def test_the_most_strongly_linked_pair_is_compared_first() -> None:
    links = np.array([[50, 2, 0], [2, 50, 9], [0, 9, 50]])
    are_two, asked = asked_of(always)
    assert agglomerate(links, are_two).tolist() == [0, 1, 2]
    assert asked == [([1], [2]), ([0], [1])]  # 0 and 2 have no links


def test_strength_is_relative_to_what_is_expected() -> None:
    """The large pair has more links, but less than expected of clusters so large."""
    links = np.array([[900, 90, 0, 0], [90, 900, 0, 0], [0, 0, 20, 10], [0, 0, 10, 20]])
    are_two, asked = asked_of(always)
    agglomerate(links, are_two)
    assert asked == [([2], [3]), ([0], [1])]


def test_equal_ratios_are_compared_in_order() -> None:
    are_two, asked = asked_of(always)
    agglomerate(np.ones((3, 3), np.int64), are_two)
    assert asked == [([0], [1]), ([0], [2]), ([1], [2])]


def test_joined_clusters_are_one_group() -> None:
    are_two, asked = asked_of(never)
    links = np.array([[50, 2, 9], [2, 50, 0], [9, 0, 50]])
    assert agglomerate(links, are_two).tolist() == [0, 0, 0]
    assert asked == [([0], [2]), ([0, 2], [1])]


def test_groups_are_numbered_in_the_order_of_their_first_clusters() -> None:
    are_two, _ = asked_of(lambda a, b: {min(a) % 2, min(b) % 2} == {0, 1})
    assert agglomerate(np.ones((5, 5), np.int64), are_two).tolist() == [0, 1, 0, 1, 0]


def test_a_pair_is_compared_again_after_one_of_the_two_has_grown() -> None:
    """Two parts of a neuron may look apart until what is between them has joined one of them."""
    links = np.array([[50, 9, 8], [9, 50, 6], [8, 6, 50]])
    are_two, asked = asked_of(lambda a, b: (a, b) == ({0}, {1}))
    assert agglomerate(links, are_two).tolist() == [0, 0, 0]
    assert asked == [([0], [1]), ([0], [2]), ([0, 2], [1])]


def test_a_pair_of_which_neither_has_grown_is_compared_once() -> None:
    links = np.array([[50, 9, 0, 0], [9, 50, 0, 0], [0, 0, 50, 4], [0, 0, 4, 50]])
    are_two, asked = asked_of(lambda a, b: a == {0})
    assert agglomerate(links, are_two).tolist() == [0, 1, 2, 2]
    assert asked == [([0], [1]), ([2], [3])]


def test_clusters_with_few_links_are_not_compared() -> None:
    links = np.array([[1000, 9], [9, 1000]])  # 18 of 1009 expected
    assert agglomerate(links, asked_of(never)[0]).tolist() == [0, 0]
    links = np.array([[1000, 5], [5, 1000]])  # 10 of 1005
    assert 10 / (1005 + EXPECTED_FLOOR) < MIN_RATIO
    are_two, asked = asked_of(never)
    assert agglomerate(links, are_two).tolist() == [0, 1]
    assert asked == []


def test_similar_pairs_are_compared_without_links_after_all_others() -> None:
    links = np.diag([50, 50, 50, 50])
    links[0, 1] = links[1, 0] = 4
    similar = np.zeros((4, 4), bool)
    similar[2, 3] = similar[3, 2] = True
    are_two, asked = asked_of(never)
    assert agglomerate(links, are_two, similar=similar).tolist() == [0, 0, 1, 1]
    assert asked == [([0], [1]), ([2], [3])]
    assert similar.sum() == 2  # not changed


def test_a_group_is_similar_to_what_one_of_its_clusters_is_similar_to() -> None:
    links = np.diag([50, 50, 50])
    links[0, 1] = links[1, 0] = 4
    similar = np.zeros((3, 3), bool)
    similar[1, 2] = similar[2, 1] = True
    are_two, asked = asked_of(never)
    assert agglomerate(links, are_two, similar=similar).tolist() == [0, 0, 0]
    assert asked == [([0], [1]), ([0, 1], [2])]


@pytest.mark.parametrize("links", [0, 5])
def test_one_cluster_is_one_group(links: int) -> None:
    assert agglomerate(np.array([[links]]), lambda *_: pytest.fail("nothing to compare")).tolist() == [0]


def test_clusters_without_any_links_stay() -> None:
    assert agglomerate(np.zeros((3, 3), np.int64), lambda *_: pytest.fail("no links")).tolist() == [0, 1, 2]


def plainly(links: np.ndarray, are_two: AreTwo, similar: np.ndarray) -> list[list[int]]:
    """The same with sets, all ratios computed from the clusters each time."""
    total, out, into = links.sum(), links.sum(1), links.sum(0)
    groups, two = [[i] for i in range(len(links))], set()

    def ratio(a: list[int], b: list[int]) -> float:
        seen = links[np.ix_(a, b)].sum() + links[np.ix_(b, a)].sum()
        expected = (out[a].sum() * into[b].sum() + out[b].sum() * into[a].sum()) / total
        found = float(seen / (expected + EXPECTED_FLOOR * len(a) * len(b)))
        return found if found >= MIN_RATIO or similar[np.ix_(a, b)].any() else -1.0

    while True:
        pairs = [
            (-ratio(a, b), a[0], b[0])
            for a in groups
            for b in groups
            if a[0] < b[0] and (tuple(a), tuple(b)) not in two
        ]
        pairs = [pair for pair in pairs if pair[0] <= 0]
        if not pairs:
            return groups
        _, first, second = min(pairs)
        a, b = (next(group for group in groups if group[0] == start) for start in (first, second))
        if are_two(np.array(a), np.array(b)):
            two.add((tuple(a), tuple(b)))
        else:
            groups.remove(b)
            groups[groups.index(a)] = sorted(a + b)


@pytest.mark.parametrize("seed", range(20))
def test_the_groups_are_those_of_an_obvious_implementation(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = 14
    links = draw.integers(0, 30, (n, n)) * (draw.random((n, n)) < 0.4)
    similar = np.triu(draw.random((n, n)) < 0.05, 1)
    similar |= similar.T
    neuron = draw.integers(0, 4, n)

    def answer(a: set[int], b: set[int]) -> bool:
        kinds = np.bincount(neuron[sorted(a | b)])
        return bool(kinds.max() < 0.6 * kinds.sum())

    ours, theirs = asked_of(answer), asked_of(answer)
    found = agglomerate(links, ours[0], similar=similar)
    expected = plainly(links, theirs[0], similar)
    assert ours[1] == theirs[1]
    assert sorted(np.flatnonzero(found == number).tolist() for number in range(found.max() + 1)) == sorted(expected)


def test_the_documented_examples_run() -> None:
    outcome = doctest.testmod(agglomeration)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize(("n_small", "again"), [(5, False), (15, True)])
def test_a_pair_is_compared_again_when_one_of_them_has_grown_by_a_tenth(n_small: int, again: bool) -> None:
    """0 and 1 are two; then 2, which has a twentieth or a sixth of the spikes of 0, is joined to it."""
    links = np.array([[60, 40, 1], [40, 60, 0], [1, 0, n_small - 1]])
    asked: list[tuple[list[int], list[int]]] = []

    def are_two(a: agglomeration.Clusters, b: agglomeration.Clusters) -> bool:
        asked.append((a.tolist(), b.tolist()))
        return 1 in (*a, *b)

    assert agglomerate(links, are_two).tolist() == [0, 1, 0]
    assert asked.count(([0], [1])) == 1
    assert (([0, 2], [1]) in asked) is again
