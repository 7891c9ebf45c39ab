"""Comparing, aligning and merging templates."""

from __future__ import annotations

import pytest
import torch

from ks4stream.kernels.templates import (
    align,
    are_sums,
    lagged_products,
    merge_similar,
    similarity,
    similarity_to,
    time_derivative,
)

NT = 21


def components(q: int = 4) -> torch.Tensor:
    """Smooth orthonormal waveforms that vanish at the ends."""
    time = torch.linspace(-1, 1, NT, dtype=torch.float64)
    bumps = torch.stack([torch.exp(-12 * time**2) * time**k for k in range(q)])
    return torch.linalg.qr(bumps.T)[0].T.float().contiguous()


def shifted(waveforms: torch.Tensor, by: int) -> torch.Tensor:
    """Shift later by `by` samples, filling with zeros."""
    out = torch.zeros_like(waveforms)
    if by >= 0:
        out[..., by:] = waveforms[..., : waveforms.shape[-1] - by]
    else:
        out[..., :by] = waveforms[..., -by:]
    return out


def random_features(u: int, c: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(u, c, 4, generator=torch.Generator().manual_seed(seed))


def test_lagged_products_are_inner_products_with_what_was_moved_later() -> None:
    pcs = components()
    products = lagged_products(pcs)
    assert products.shape == (4, 4, 2 * NT + 1)
    for lag in (-NT, -7, 0, 3, NT):
        torch.testing.assert_close(products[:, :, NT + lag], pcs @ shifted(pcs, lag).T)


def test_similarity_agrees_with_waveforms() -> None:
    pcs, features = components(), random_features(7, 5)
    value, lag = similarity(features, pcs)
    waveforms = torch.nn.functional.pad(features @ pcs, (NT, NT))
    waveforms = waveforms / waveforms.norm(dim=(1, 2), keepdim=True)
    lags = torch.arange(-NT, NT + 1)
    every = torch.stack([torch.einsum("ucw,vcw->uv", waveforms, torch.roll(waveforms, int(k), 2)) for k in lags])
    torch.testing.assert_close(value, every.amax(0).fill_diagonal_(1.0))
    there = every.gather(0, (lag + NT)[None])[0]
    torch.testing.assert_close(there, every.amax(0))
    assert torch.equal(value, value.T)
    assert torch.equal(lag, -lag.T)
    assert (value.diag() == 1).all()


def test_similarity_to_one_is_a_row_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ks4stream.kernels.templates.PAIRS_PER_CHUNK", 4)  # and is computed in parts
    pcs, features = components(), random_features(10, 5)
    every = similarity(features, pcs)
    value, lag = similarity_to(features[0], features[1:], pcs)
    torch.testing.assert_close(value, every.value[0, 1:])
    assert torch.equal(lag, every.lag[0, 1:])


def test_a_shifted_copy_lines_up_when_rolled_by_its_lag() -> None:
    pcs = torch.eye(NT)  # all waveforms, so that a shift is exact
    one = torch.zeros(1, 2, NT)
    one[0, 1, 8:12] = torch.tensor([1.0, -3.0, 2.0, 1.0])
    features = torch.cat([one, shifted(one, 4), -one])
    value, lag = similarity(features, pcs)
    assert value[0, 1] == pytest.approx(1.0)
    assert lag[0, 1] == -4
    assert torch.equal(torch.roll(features[1], int(lag[0, 1]), dims=1), features[0])
    assert value[0, 2] < 0.6  # signed


def test_of_equal_lags_the_smallest_counts_and_apart_is_zero() -> None:
    features = torch.zeros(3, 2, NT)
    features[0, 0, 10] = 1.0
    features[1, 0, [8, 12]] = 1.0  # alike at lag 2 and −2
    features[2, 1, 10] = 1.0  # on another channel
    value, lag = similarity(features, torch.eye(NT))
    assert {int(lag[0, 1]), int(lag[1, 0])} == {-2, 2}
    assert int(lag[1, 0]) == -2
    assert (value[2, :2] == 0).all()
    assert (lag[2] == 0).all()


def test_small_pieces_no_templates_and_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pcs, features = components(), random_features(9, 5)
    features[3] = 0.0
    whole = similarity(features, pcs)
    assert whole.value[3, 3] == 1.0
    assert whole.value[3, :3].abs().sum() == 0.0
    monkeypatch.setattr("ks4stream.kernels.templates.PAIRS_PER_CHUNK", 20)
    pieces = similarity(features, pcs)
    torch.testing.assert_close(whole.value, pieces.value)
    assert torch.equal(whole.lag, pieces.lag)
    assert similarity(features[:0], pcs).value.shape == (0, 0)


def test_derivatives_are_those_of_the_waveform() -> None:
    """Half of the difference between samples before and after, as the components represent it."""
    pcs, features = components(), random_features(3, 2)
    waveforms = features @ pcs
    expected = torch.zeros_like(waveforms)
    expected[:, :, 1:-1] = 0.5 * (waveforms[:, :, 2:] - waveforms[:, :, :-2])
    derivative = time_derivative(pcs)
    assert (derivative.dtype, derivative.shape) == (torch.float64, (4, 4))
    found = features.double() @ derivative
    # the first and the last sample have one neighbour only; waveforms are near zero there
    torch.testing.assert_close(found, expected.double() @ pcs.double().T, atol=0.05, rtol=0)


def test_align_moves_the_best_match_to_the_centre() -> None:
    pcs = torch.eye(NT)
    shapes = torch.zeros(2, NT)
    shapes[0, 9:12] = torch.tensor([-1.0, 2.0, -1.0]) / 6**0.5
    shapes[1, 10] = 1.0
    features = torch.zeros(3, 2, NT)
    features[0, 1, 4:7] = torch.tensor([1.0, -2.0, 1.0]) * 3  # upside down, 5 early
    features[1, 0, 13] = 2.0  # 3 late
    features[1, 1, 4] = 1.0  # smaller, elsewhere
    features[2, 0, 10] = 1.0
    aligned = align(features, pcs, shapes)
    torch.testing.assert_close(aligned[0], torch.roll(features[0], 5, dims=1))
    torch.testing.assert_close(aligned[1], torch.roll(features[1], -3, dims=1))
    torch.testing.assert_close(aligned[2], features[2])
    torch.testing.assert_close(align(aligned, pcs, shapes), aligned)


def test_align_agrees_with_the_definition() -> None:
    pcs, features = components(), random_features(6, 3)
    shapes = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) @ pcs, dim=1)
    aligned = align(features, pcs, shapes)
    for template, result in zip(features, aligned, strict=True):
        waveform = template @ pcs
        padded = torch.nn.functional.pad(waveform, (NT // 2, NT // 2))
        correlation = torch.stack([(padded.unfold(1, NT, 1) @ shape).abs() for shape in shapes])
        best = int(correlation.amax(dim=(0, 1)).argmax())
        torch.testing.assert_close(result, torch.roll(waveform, NT // 2 - best, dims=1) @ pcs.T, atol=1e-5, rtol=1e-5)
    assert align(features[:0], pcs, shapes).shape == (0, 3, 4)


def test_merging_weighs_by_count_and_keeps_the_order() -> None:
    one, other = random_features(2, 3, seed=2)
    features = torch.stack([other, one * 1.05, one, one * 1.5])  # the last is too large to be the same
    merged = merge_similar(features, torch.tensor([5.0, 10.0, 30.0, 7.0]), components())
    assert merged.n_spikes.tolist() == [5.0, 40.0, 7.0]
    torch.testing.assert_close(merged.features, torch.stack([other, one * (1.05 * 10 + 30) / 40, one * 1.5]))
    assert merged.n_found.tolist() == [5.0, 40.0, 7.0]


def test_the_numbers_of_spikes_from_which_templates_were_computed_are_added() -> None:
    one = random_features(1, 3, seed=2)
    count, found = torch.tensor([30.0, 10.0]), torch.tensor([3.0, 2.0])
    merged = merge_similar(torch.cat([one, one]), count, components(), n_found=found)
    assert (merged.n_spikes.tolist(), merged.n_found.tolist()) == ([40.0], [5.0])


def test_the_variance_of_merged_scores_is_that_within_and_between() -> None:
    one = random_features(1, 3, seed=2)[0]
    size = one.norm()
    features, count = torch.stack([one, one * 1.1]), torch.tensor([30.0, 10.0])
    merged = merge_similar(features, count, components(), variance=torch.tensor([4.0, 8.0], dtype=torch.float64))
    between = 0.75 * 0.025**2 + 0.25 * 0.075**2  # around the mean norm, 1.025
    assert merged.variance.tolist() == pytest.approx([0.75 * 4 + 0.25 * 8 + between * float(size) ** 2], rel=1e-5)
    apart = merge_similar(features * torch.tensor([1.0, 2.0])[:, None, None], count, components())
    assert apart.variance.tolist() == pytest.approx([0, 0], abs=1e-6)  # of norms in float32


def test_templates_out_of_step_are_rolled_before_they_are_averaged() -> None:
    pcs = torch.eye(NT)  # all waveforms, so that a shift is exact
    one = torch.zeros(2, NT)
    one[0, 8:12] = torch.tensor([1.0, -3.0, 2.0, 1.0])
    one[1, 9:12] = torch.tensor([0.5, -1.0, 0.5])
    features = torch.stack([shifted(one, 3), one, shifted(one, -2)])
    merged = merge_similar(features, torch.tensor([2, 5, 1]), pcs)
    torch.testing.assert_close(merged.features[0], one)  # as if they had all lain where the most numerous lies
    assert merged.n_spikes.tolist() == [8.0]


def test_the_most_numerous_takes_in_its_like_but_not_the_like_of_those() -> None:
    pcs = torch.eye(NT)
    angle = torch.tensor([0.0, 0.4, 0.8])  # neighbours correlate 0.92, the ends 0.70
    features = torch.zeros(3, 2, NT)
    features[:, 0, 10], features[:, 1, 10] = torch.cos(angle), torch.sin(angle)
    assert merge_similar(features, torch.tensor([9, 5, 1]), pcs).n_spikes.tolist() == [14, 1]
    assert merge_similar(features, torch.tensor([1, 5, 1]), pcs).n_spikes.tolist() == [7]
    assert merge_similar(features, torch.tensor([5, 1, 5]), pcs).n_spikes.tolist() == [6, 5]
    assert merge_similar(features, torch.tensor([1, 1, 1]), pcs, threshold=0.95).n_spikes.tolist() == [1, 1, 1]
    assert merge_similar(features[:0], torch.zeros(0), pcs).features.shape == (0, 2, NT)


# -- collisions --------------------------------------------------------------------------------------


def bump(*sizes: float, late: float = 0.0) -> torch.Tensor:
    """A waveform in the middle of the window, with a size on each channel, so many samples late: (c, q)."""
    time = torch.linspace(-1, 1, NT, dtype=torch.float64) - 2 * late / (NT - 1)
    wave = torch.exp(-12 * time**2) @ components().double().T
    return (torch.tensor(sizes, dtype=torch.float64)[:, None] * wave).float()


ONE, OTHER = bump(30, 20, 5, 0), bump(0, 5, 15, 25)
N_SAMPLES = 100_000  # in which two neurons with 500 and 900 spikes collide 94.5 times


def sums_among(features: list[torch.Tensor], count: list[int]) -> list[bool]:
    found: list[bool] = are_sums(torch.stack(features), torch.tensor(count), components(), n_samples=N_SAMPLES).tolist()
    return found


@pytest.mark.parametrize("late", [0, 3, -3])
def test_the_sum_of_two_is_a_collision_if_each_is_more_numerous(late: int) -> None:
    features = [ONE, ONE + bump(0, 5, 15, 25, late=late), OTHER]
    assert sums_among(features, [500, 30, 900]) == [False, True, False]
    assert sums_among(features, [30, 31, 90_000]) == [False] * 3
    assert sums_among(features[:2], [500, 30]) == [False] * 2


@pytest.mark.parametrize(("count", "collision"), [(283, True), (284, False)])
def test_collisions_are_at_most_three_times_as_many_as_expected(count: int, collision: bool) -> None:
    assert sums_among([ONE, ONE + OTHER, OTHER], [500, count, 900]) == [False, collision, False]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(1.1 * ONE, id="like one of them"),
        pytest.param(ONE + 0.3 * OTHER, id="a part of the second is too small"),
        pytest.param(bump(30, 20, 25, 60), id="too large for them"),
        pytest.param(bump(30, -20, 15, -25), id="unlike them"),
        pytest.param(0 * ONE, id="nothing"),
    ],
)
def test_other_templates_are_no_collisions(other: torch.Tensor) -> None:
    assert sums_among([ONE, OTHER, other], [500, 900, 30]) == [False] * 3


def test_only_channels_of_the_collision_count() -> None:
    """Its peaks have features on the channels nearest to it."""
    collision = ONE + OTHER
    collision[0] = 0
    assert sums_among([ONE, collision, OTHER], [500, 30, 900]) == [False, True, False]


def test_collisions_are_no_parts_of_others() -> None:
    far = bump(0, 0, 0, 40)
    features = [ONE, ONE + OTHER, OTHER, ONE + OTHER + far, far]
    assert sums_among(features, [500, 60, 900, 1, 700]) == [False, True, False, False, False]  # three neurons


def test_no_templates_no_collisions() -> None:
    assert are_sums(torch.zeros(0, 3, 4), torch.zeros(0), components(), n_samples=N_SAMPLES).shape == (0,)
