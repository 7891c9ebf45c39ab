"""Which peaks waveforms are learned from, and what is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ks4stream.kernels import waveforms
from ks4stream.kernels.memory import ChunkSize
from ks4stream.kernels.waveforms import cut_snippets, find_clean_peaks, principal_components, typical_shapes

NEAR = torch.tensor([[0, 1, 0], [1, 0, 2], [2, 1, 3], [3, 2, 3]])  # three nearest of a line of four; ends padded
WIDE = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 3], [3, 2, 1]])


def peaks(*spikes: tuple[int, int, float], first: int = 50, last: int = 350) -> list[tuple[int, int]]:
    """Isolated peaks of four silent channels with `spikes` (channel, sample, height)."""
    traces = torch.zeros(4, 400)
    for channel, sample, height in spikes:
        traces[channel, sample] = height
    peaks_found = find_clean_peaks(traces, NEAR, WIDE, threshold=6, first=first, last=last)
    return list(zip(*(column.tolist() for column in peaks_found), strict=True))


@pytest.mark.parametrize("height", [-10.0, 10.0])
@pytest.mark.parametrize("channel", [0, 1, 2, 3])
def test_a_clean_peak_of_either_sign_is_found(channel: int, height: float) -> None:
    assert peaks((channel, 100, height)) == [(channel, 100)]


def test_silence_has_no_peaks() -> None:
    assert peaks() == []
    assert peaks((1, 100, -6.0)) == []  # the threshold itself is not above it


def test_silence_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of what is reported, and what may spoil that, there may be peaks."""
    monkeypatch.delattr(waveforms, "_largest")
    assert peaks((1, 10, 9.0)) == []


def test_the_largest_among_the_nearest_is_the_peak() -> None:
    assert peaks((1, 100, -10.0), (2, 100, -8.0), (1, 103, 7.0), (0, 105, 9.0)) == [(1, 100)]


@pytest.mark.parametrize(("apart", "found"), [(20, []), (30, []), (31, [(1, 100), (1, 131)])])
def test_a_pair_within_thirty_samples_is_not_clean(apart: int, found: list[tuple[int, int]]) -> None:
    assert peaks((1, 100, -10.0), (1, 100 + apart, -8.0)) == found


def test_neighbours_farther_off_also_spoil_a_peak() -> None:
    assert peaks((0, 100, -10.0), (2, 110, -8.0)) == [(2, 110)]  # 0 sees 2, but 2 does not see 0
    assert peaks((0, 100, -10.0), (3, 110, -8.0)) == [(0, 100), (3, 110)]  # neither sees the other


def test_only_samples_asked_for_are_reported_but_the_others_spoil_them() -> None:
    assert peaks((1, 49, -10.0), (2, 200, -10.0), (1, 350, -10.0)) == [(2, 200)]
    assert peaks((1, 50, -10.0), (1, 349, -10.0)) == [(1, 50), (1, 349)]
    assert peaks((1, 45, -10.0), (1, 60, -8.0)) == []


def test_peaks_come_by_channel_and_sample() -> None:
    assert peaks((3, 60, -9.0), (0, 300, -9.0), (0, 200, 9.0)) == [(0, 200), (0, 300), (3, 60)]


def moved(seed: int, n_channels: int = 11, n_samples: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """Traces with one sample in fifty above threshold, many of them equal, and the neighbours of each channel."""
    rng = np.random.default_rng(seed)
    traces = rng.normal(size=(n_channels, n_samples)).clip(-4, 4)
    above = rng.uniform(size=traces.shape) < 0.02
    traces[above] = rng.choice([-9.0, -8, -7, 7, 8, 9], size=above.sum())
    traces[:, :300] *= rng.uniform(size=300) < 0.2  # where some peaks stand alone
    order = np.argsort(np.abs(np.subtract.outer(np.arange(n_channels), np.arange(n_channels))), axis=1, kind="stable")
    near, wide = torch.from_numpy(order[:, :5].copy()), torch.from_numpy(order[:, [0, 1, 2, 3, 0]].copy())
    return torch.from_numpy(traces.astype(np.float32)), near, wide


def one_by_one(traces: Tensor, near: Tensor, wide: Tensor, first: int, last: int) -> list[tuple[int, int]]:
    """The definition of `find_clean_peaks` at a threshold of 6, applied sample by sample."""
    size = traces.abs().numpy()
    peaks = {
        (channel, sample)
        for channel, sample in np.argwhere(size > 6).tolist()
        if first - 35 + 5 <= sample < last + 35 - 5
        if size[near[channel].numpy(), sample - 5 : sample + 6].max() <= size[channel, sample]
    }
    return [
        (channel, sample)
        for channel, sample in sorted(peaks)
        if first <= sample < last
        if not any(
            (other, at) in peaks
            for other in set(wide[channel].tolist())
            for at in range(sample - 30, sample + 31)
            if (other, at) != (channel, sample)
        )
    ]


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_pieces_find_what_is_found_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveforms, "CHANNELS_PER_CHUNK", ChunkSize(cpu=at_once, gpu=1))
    monkeypatch.setattr(waveforms, "WINDOWS_PER_CHUNK", ChunkSize(cpu=at_once, gpu=1))
    traces, near, wide = moved(seed=at_once)
    peaks_found = find_clean_peaks(traces, near, wide, threshold=6, first=40, last=2900)
    expected = one_by_one(traces, near, wide, 40, 2900)
    assert list(zip(*(column.tolist() for column in peaks_found), strict=True)) == expected
    assert expected and all(column.dtype == torch.int64 for column in peaks_found)


def test_however_many_samples_are_above_threshold_few_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, windows = [], waveforms._windows

    def watched(values: Tensor, rows: Tensor, sample: Tensor, reach: int) -> Tensor:
        looked_at.append(len(sample))
        return windows(values, rows, sample, reach)

    monkeypatch.setattr(waveforms, "_windows", watched)
    traces, near, wide = moved(seed=0, n_samples=60_000)
    find_clean_peaks(traces, near, wide, threshold=6, first=40, last=59_900)
    assert sum(looked_at) > 10_000  # of 660,000 samples
    assert max(looked_at) <= 512


def test_snippets_have_unit_norm_and_keep_their_sign() -> None:
    traces = torch.zeros(2, 30)
    traces[1, 9:12] = torch.tensor([3.0, -12.0, 4.0])  # norm 13
    traces[0, 20] = 5.0
    snippets = cut_snippets(traces, torch.tensor([1, 0]), torch.tensor([10, 20]), nt=5, peak_sample=2)
    expected = torch.tensor([[0, 3, -12, 4, 0], [0, 0, 13.0, 0, 0]]) / 13
    torch.testing.assert_close(snippets, expected, atol=1e-6, rtol=0)  # float32


def noise(n: int, width: int = 9) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(n, width)).astype(np.float32))


def test_components_are_orthonormal_and_their_largest_entry_is_positive() -> None:
    components = principal_components(noise(200), 4)
    torch.testing.assert_close(components @ components.T, torch.eye(4), atol=1e-6, rtol=0)  # rounded to float32
    assert bool((components.gather(1, components.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_components_come_by_what_they_explain_without_taking_a_mean_away() -> None:
    snippets = torch.tensor([[0.0, -5, 0], [0, -5, 0], [2, 0, 0], [-2, 0, 0], [0, 0, 1]])
    assert principal_components(snippets, 3).abs().round(decimals=6).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_the_sign_of_the_snippets_does_not_change_the_components() -> None:
    assert torch.equal(principal_components(noise(50), 3), principal_components(-noise(50), 3))


def three_kinds(spread: float = 0.02) -> tuple[Tensor, Tensor]:
    """Snippets near three shapes: 60, 10 and 30 of them."""
    shapes = torch.eye(9)[[1, 4, 7]] * torch.tensor([[-1.0], [1.0], [-1.0]])
    snippets = shapes.repeat_interleave(torch.tensor([60, 10, 30]), dim=0) + spread * noise(100)
    return snippets / snippets.norm(dim=1, keepdim=True), shapes


def test_typical_shapes_are_found_most_numerous_first() -> None:
    snippets, shapes = three_kinds()
    shapes_found = typical_shapes(snippets, 3, seed=1)
    # The mean of ten snippets with noise of 0.02 is off by 0.006 in each of 27 entries; five times that.
    torch.testing.assert_close(shapes_found, shapes[[0, 2, 1]], atol=0.03, rtol=0)


@pytest.mark.slow
def test_typical_shapes_have_unit_norm_and_follow_the_seed() -> None:
    shapes_found = typical_shapes(noise(300), 6, seed=3)
    torch.testing.assert_close(shapes_found.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)  # float32
    assert torch.equal(typical_shapes(noise(300), 6, seed=3), shapes_found)
    assert not torch.equal(typical_shapes(noise(300), 6, seed=4), shapes_found)


def test_as_many_shapes_as_snippets_are_the_snippets() -> None:
    snippets = torch.eye(5)[:3]
    shapes_found = typical_shapes(snippets, 3, seed=0)
    assert sorted(shapes_found.tolist()) == sorted(snippets.tolist())
