"""The tree of clusters and the test whether a split is real."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_rows import DenseRows

from ks4stream.kernels.graph import graph_of
from ks4stream.kernels.tree import (
    BIMODAL_FROM,
    N_BINS,
    SMOOTHING_BINS,
    bimodality,
    discriminant,
    flatten,
    leaf_sums,
    links_between,
    merge_tree,
    projection,
    smoothed_histogram,
    smoothing_for,
    split_score,
)


def cloud(n: int, d: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    """Gaussian noise of unit variance, moved along the first feature."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += offset
    return x


# -- links and tree ----------------------------------------------------------------------------------


def test_links_between_clusters_leave_out_those_of_landmarks_to_themselves() -> None:
    graph = graph_of(torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=torch.int32), torch.tensor([0, 2]))
    # spikes 0 and 1 in cluster 0, spike 2 in 1; landmark 0 (spike 0) in cluster 0, landmark 1 (spike 2) in 1
    links = links_between(graph, torch.tensor([0, 0, 1]), torch.tensor([0, 1]), 2)
    assert links.tolist() == [[1, 2], [1, 0]]


def test_the_most_strongly_linked_pair_is_merged_first() -> None:
    links = np.array([[50, 9, 0], [9, 50, 1], [0, 1, 50]])
    tree = merge_tree(links)
    assert (tree.left.tolist(), tree.right.tolist()) == ([0, 3], [1, 2])
    out = links.sum(1)  # = links.sum(0)
    first = 18 / (2 * out[0] * out[1] / out.sum() + 0.001)
    last = 2 / (2 * (out[0] + out[1]) * out[2] / out.sum() + 0.002)
    assert tree.ratio.tolist() == pytest.approx([first, last])
    assert [leaves.tolist() for leaves in tree.leaves_under()] == [[0], [1], [2], [0, 1], [0, 1, 2]]


def test_equal_ratios_are_merged_in_order() -> None:
    tree = merge_tree(np.zeros((3, 3), np.int64))
    assert (tree.left.tolist(), tree.right.tolist()) == ([0, 3], [1, 2])


def test_one_cluster_is_a_tree_without_merges() -> None:
    tree = merge_tree(np.array([[5]]))
    assert tree.n_leaves == 1
    assert flatten(tree, lambda *_: True).tolist() == [0]


def test_the_tree_agrees_with_the_obvious_one() -> None:
    draw = np.random.default_rng(0)
    links = draw.integers(0, 20, (12, 12))
    total, out, into = links.sum(), links.sum(1), links.sum(0)
    groups = {i: [i] for i in range(12)}
    tree = merge_tree(links)
    for merge in range(11):

        def ratio(a: int, b: int) -> float:
            one, two = groups[a], groups[b]
            seen = links[np.ix_(one, two)].sum() + links[np.ix_(two, one)].sum()
            hoped = (out[one].sum() * into[two].sum() + out[two].sum() * into[one].sum()) / total
            return float(seen / (hoped + 0.001 * len(one) * len(two)))

        best = max(ratio(a, b) for a in groups for b in groups if a != b)
        a, b = int(tree.left[merge]), int(tree.right[merge])
        assert tree.ratio[merge] == pytest.approx(best)
        assert ratio(a, b) == pytest.approx(best)
        groups[12 + merge] = groups.pop(a) + groups.pop(b)


def test_together_makes_the_whole_subtree_one_cluster() -> None:
    links = np.array([[9, 9, 1, 0], [9, 9, 0, 1], [1, 0, 9, 8], [0, 1, 8, 9]])
    tree = merge_tree(links)  # (0 1) and (2 3)
    asked: list[list[int]] = []

    def stay_apart(left: np.ndarray, right: np.ndarray, ratio: float) -> bool:
        asked.append(sorted([*left.tolist(), *right.tolist()]))
        return len(left) + len(right) == 4 or 2 in left

    assert flatten(tree, stay_apart).tolist() == [0, 0, 1, 2]
    assert sorted(asked) == [[0, 1], [0, 1, 2, 3], [2, 3]]
    assert flatten(tree, lambda *_: False).tolist() == [0, 0, 0, 0]


# -- regression --------------------------------------------------------------------------------------


def test_sums_of_leaves_are_those_of_their_spikes() -> None:
    x = cloud(50, 3, 0)
    label = torch.arange(50) % 3
    sums = leaf_sums(DenseRows(x), label, 4)
    assert sums.spikes.tolist() == [17, 17, 16, 0]
    y = x[(label == 0) | (label == 2)].double()
    y[:, -1] = 1
    count, first, second = sums.of(np.array([0, 2]))
    assert count == 33
    torch.testing.assert_close(first, y.sum(0))
    torch.testing.assert_close(second, y.T @ y)


def test_the_axis_is_that_of_weighted_ridge_regression() -> None:
    x = torch.cat([cloud(30, 4, 1), cloud(10, 4, 2, 3.0)])
    label = torch.tensor([0] * 30 + [1] * 10)
    fit = discriminant(leaf_sums(DenseRows(x), label, 2), np.array([0]), np.array([1]), ridge=0.01)
    y = x.double().clone()
    y[:, -1] = 1
    weight = torch.where(label == 0, 0.5 / 30, 0.5 / 10).double()
    gram = (y * weight[:, None]).T @ y + 0.01 * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(gram, ((2.0 * label - 1) * weight) @ y)
    torch.testing.assert_close(fit.weight, expected)


def test_leaving_one_out_is_what_it_says() -> None:
    x = torch.cat([cloud(12, 4, 3), cloud(8, 4, 4, 2.0)])
    label = torch.tensor([0] * 12 + [1] * 8)
    sums = leaf_sums(DenseRows(x), label, 2)
    fit = discriminant(sums, np.array([0]), np.array([1]), ridge=0.01)
    projected = projection(DenseRows(x), torch.arange(12, 20), 1, fit, leave_one_out=True)
    y = x.double().clone()
    y[:, -1] = 1
    weight = torch.where(label == 0, 0.5 / 12, 0.5 / 8).double()
    for spike in (12, 19):
        rest = torch.arange(20) != spike
        gram = (y[rest] * weight[rest, None]).T @ y[rest] + 0.01 * torch.eye(4, dtype=torch.float64)
        axis = torch.linalg.solve(gram, ((2.0 * label[rest] - 1) * weight[rest]) @ y[rest])
        assert float(projected[spike - 12]) == pytest.approx(float(y[spike] @ axis))


# -- histogram ---------------------------------------------------------------------------------------


def test_the_histogram_counts_what_lies_within() -> None:
    histogram = smoothed_histogram(torch.tensor([-1.0, -1.0, 1.0, 2.0, -2.5], dtype=torch.float64))
    assert histogram.shape == (N_BINS,)
    assert histogram.sum() == pytest.approx(3)
    assert int(histogram.argmax()) == int((-1.0 + 2.0) * N_BINS / 4)
    assert histogram.max() == pytest.approx(2 / (SMOOTHING_BINS * np.sqrt(2 * np.pi)), rel=1e-3)


def test_two_peaks_are_bimodal_and_one_is_not() -> None:
    bins = np.arange(N_BINS)

    def peak(at: int, height: float) -> np.ndarray:
        return height * np.exp(-0.5 * ((bins - at) / 30) ** 2)

    assert bimodality(peak(100, 1) + peak(300, 5)) > 0.9
    assert bimodality(peak(199, 1)) < 0.1
    assert bimodality(peak(250, 1)) < 0.1
    assert bimodality(np.zeros(N_BINS)) == 0.0


def test_the_score_is_the_trough_over_the_lower_peak() -> None:
    histogram = np.zeros(N_BINS)
    histogram[90:110], histogram[110:290], histogram[290:310] = 4.0, 1.0, 10.0
    assert bimodality(histogram) == pytest.approx(0.75)


def test_few_spikes_are_smoothed_more() -> None:
    many = torch.linspace(-1.5, -0.5, 100_000, dtype=torch.float64)
    few = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    assert smoothing_for(many, few) > 10
    assert smoothing_for(few, few) == smoothing_for(few + 0.1, few)
    assert smoothing_for(many, many + 2) == SMOOTHING_BINS
    assert smoothing_for(few[:1], few[:1]) == SMOOTHING_BINS


@pytest.mark.parametrize("n", [40, 200, 4000])
def test_a_cloud_cut_in_two_is_one_and_two_clouds_are_two(n: int) -> None:
    d = 60
    one = cloud(n, d, 5)
    halves = (one[:, 0] > 0).long()
    two = torch.cat([cloud(n // 2, d, 6), cloud(n - n // 2, d, 7, 9.0)])
    sides = (torch.arange(n) >= n // 2).long()
    scores = []
    for x, label in ((one, halves), (two, sides)):
        rows = DenseRows(x)
        members = (torch.nonzero(label == 0)[:, 0], torch.nonzero(label == 1)[:, 0])
        scores.append(split_score(rows, leaf_sums(rows, label, 2), (np.array([0]), np.array([1])), members))
    assert scores[0] < 0.4
    assert scores[1] > BIMODAL_FROM


def test_sides_of_one_spike_can_be_scored() -> None:
    rows = DenseRows(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    sums = leaf_sums(rows, torch.tensor([0, 1]), 2)
    score = split_score(rows, sums, (np.array([0]), np.array([1])), (torch.tensor([0]), torch.tensor([1])))
    assert np.isfinite(score)
