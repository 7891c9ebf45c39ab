"""Correlation of channels with short kernels."""

from __future__ import annotations

import pytest
import torch

from ks4stream.kernels.convolution import SEGMENT, banded, correlate
from ks4stream.kernels.memory import ChunkSize


def plain(traces: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The definition, sample by sample, in float64."""
    (c, t), (p, nt) = traces.shape, kernels.shape
    out = torch.zeros(c, p, t, dtype=torch.float64)
    for w in range(nt):
        for sample in range(t):
            if 0 <= sample + w - nt // 2 < t:
                out[:, :, sample] += traces[:, None, sample + w - nt // 2].double() * kernels[None, :, w].double()
    return out


def test_an_impulse_returns_the_kernel_reversed() -> None:
    traces = torch.zeros(2, 9)
    traces[1, 4] = 1
    kernels = torch.tensor([[1.0, 2.0, 3.0]])
    result = correlate(traces, kernels)
    assert result[0].abs().sum() == 0
    assert result[1, 0].tolist() == [0, 0, 0, 3, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("t", [1, 5, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 7])
@pytest.mark.parametrize(("p", "nt"), [(1, 1), (3, 7), (6, 61)])
def test_both_layouts_agree_with_the_definition(t: int, p: int, nt: int) -> None:
    draw = torch.Generator().manual_seed(t + nt)
    traces, kernels = torch.randn(3, t, generator=draw), torch.randn(p, nt, generator=draw)
    expected = plain(traces, kernels)
    torch.testing.assert_close(correlate(traces, kernels).double(), expected, atol=1e-4, rtol=1e-5)
    time_major = correlate(traces, kernels, layout="ctp")
    assert time_major.is_contiguous()
    torch.testing.assert_close(time_major.double(), expected.transpose(1, 2), atol=1e-4, rtol=1e-5)


def test_one_channel_at_once_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    traces, kernels = torch.randn(5, 100, generator=draw), torch.randn(2, 9, generator=draw)
    alone = [correlate(traces, kernels, layout=layout) for layout in ("cpt", "ctp")]
    monkeypatch.setattr("ks4stream.kernels.convolution.ROWS_PER_CHUNK", ChunkSize(cpu=1, gpu=1))
    for one, layout in zip(alone, ("cpt", "ctp"), strict=True):
        torch.testing.assert_close(correlate(traces, kernels, layout=layout), one)


def test_no_channels_and_same_bytes_again() -> None:
    draw = torch.Generator().manual_seed(1)
    traces, kernels = torch.randn(4, 1000, generator=draw), torch.randn(6, 61, generator=draw)
    assert correlate(traces[:0], kernels).shape == (0, 6, 1000)
    assert torch.equal(correlate(traces, kernels), correlate(traces.clone(), kernels.clone()))


def test_the_band_holds_the_kernel_at_every_offset() -> None:
    band = banded(torch.tensor([[1.0, 2.0, 3.0]]))
    assert band.shape == (1, SEGMENT + 2, SEGMENT)
    assert band[0, :4, 0].tolist() == [1, 2, 3, 0]
    assert band[0, :5, 1].tolist() == [0, 1, 2, 3, 0]
    assert band[0, -3:, -1].tolist() == [1, 2, 3]
