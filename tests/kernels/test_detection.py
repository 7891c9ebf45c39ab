"""Detection with universal templates, compared with a dense and obvious implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import geometry, simulate
from ks4stream.kernels import detection as kernels
from ks4stream.kernels.convolution import correlate
from ks4stream.kernels.detection import (
    UniversalTemplates,
    detect,
    features,
    for_moved,
    projections,
    universal_templates,
)
from ks4stream.kernels.memory import ChunkSize
from ks4stream.kernels.preprocessing import MIN_NOISE
from ks4stream.probe import Probe
from ks4stream.settings import Settings

NT, REACH = 21, 7


def smooth_shapes(n_shapes: int, nt: int = NT) -> torch.Tensor:
    """Troughs of different widths, unit norm."""
    time = torch.arange(nt) - nt // 2
    shapes = torch.stack([-torch.exp(-((time / (1.5 + w)) ** 2)) + 0.3 * (time == 4 + w) for w in range(n_shapes)])
    return shapes / shapes.norm(dim=1, keepdim=True)


def universal(probe: Probe, shapes: torch.Tensor, **settings: float) -> UniversalTemplates:
    """Templates as made by the stage."""
    options = {"nearest_chans": min(10, probe.n_channels), "nearest_templates": 12} | settings
    centres = geometry.template_centres(probe, Settings(**options))
    return universal_templates(
        shapes,
        shapes,
        channels=torch.from_numpy(centres.channels),
        weights=torch.from_numpy(centres.weights),
        neighbours=torch.from_numpy(centres.neighbours),
        depth_um=torch.from_numpy(probe.y_um.astype(np.float32)),
    )


def dense_scores(traces: torch.Tensor, templates: UniversalTemplates) -> torch.Tensor:
    """A[k, s·P + p, t] everywhere, in float64."""
    matches = correlate(traces, templates.shapes).double()  # (c, p, t)
    return torch.einsum("ksj,kjpt->kspt", templates.weights.double(), matches[templates.channels]).flatten(1, 2)


def oracle(
    traces: torch.Tensor, templates: UniversalTemplates, threshold: float, reach: int, first: int, last: int
) -> list[tuple[int, int]]:
    """All detections, (sample, centre), by computing every score as section 3 defines it."""
    score = dense_scores(traces, templates).abs().amax(dim=1)  # (k, t)
    near = templates.neighbours
    seen = score[near]  # (k, m, t)
    lower = (near < torch.arange(len(near))[:, None])[:, :, None]
    outdone = ((seen > score[:, None]) | ((seen == score[:, None]) & lower)).any(dim=1)
    windows = seen.amax(dim=1).unfold(1, 2 * reach + 1, 1)  # (k, t − 2·reach, window)
    inner = slice(reach, -reach)
    is_peak = (score > threshold) & ~outdone
    is_peak[:, inner] &= (windows[..., :reach].amax(dim=2) < score[:, inner]) & (
        windows[..., reach + 1 :].amax(dim=2) <= score[:, inner]
    )
    sample, centre = is_peak[:, first:last].T.nonzero(as_tuple=True)
    return list(zip((sample + first).tolist(), centre.tolist(), strict=True))


def planted(
    probe: Probe, shapes: torch.Tensor, n_samples: int, n_spikes: int, seed: int, noise: float = 1.0
) -> torch.Tensor:
    """Noise of unit variance, with spikes of both signs and of all sizes around the threshold, some overlapping."""
    draw = torch.Generator().manual_seed(seed)
    traces = noise * torch.randn(probe.n_channels, n_samples, generator=draw)
    for _ in range(n_spikes):
        sample = int(torch.randint(NT, n_samples - NT, (1,), generator=draw))
        position = probe.positions_um[int(torch.randint(probe.n_channels, (1,), generator=draw))]
        distance = torch.from_numpy(np.linalg.norm(probe.positions_um - position, axis=1))
        size = (4 + 30 * torch.rand(1, generator=draw)) * (1 if torch.rand(1, generator=draw) < 0.7 else -1)
        shape = shapes[int(torch.randint(len(shapes), (1,), generator=draw))]
        spread = torch.exp(-((distance / 25) ** 2)).float()
        traces[:, sample - NT // 2 : sample + NT // 2 + 1] += size * spread[:, None] * shape
    return traces


PROBES = {
    "staggered": simulate.staggered_probe(16),
    "several shanks": simulate.multi_shank_probe(3, 6, spacing_um=60),  # nearer to each other than their channels
    "fewer channels than slots": simulate.tetrode_probe(1),
    "tetrodes": simulate.tetrode_probe(3, spacing_um=40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("threshold", [4.0, 9.0])
def test_finds_what_the_dense_version_finds(name: str, threshold: float) -> None:
    probe, shapes = PROBES[name], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 1500, 60, seed=5)
    peaks = detect(traces, templates, threshold=threshold, reach=REACH, first=40, last=1460)
    expected = oracle(traces, templates, threshold, REACH, 40, 1460)
    assert len(expected) > 15
    assert list(zip(peaks.sample.tolist(), peaks.centre.tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", PROBES)
def test_all_scores_or_those_that_matter_give_the_same_peaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SAMPLES_PER_PRODUCT", ChunkSize(cpu=400, gpu=400))  # several, of different lengths
    probe, shapes = PROBES[name], smooth_shapes(3)
    traces, templates = planted(probe, shapes, 1500, 60, seed=5), universal(probe, shapes)
    found = []
    for below in (0.0, 1.1):
        monkeypatch.setattr(kernels, "SEARCHED_BELOW", below)
        found.append(detect(traces, templates, threshold=4.0, reach=REACH, first=40, last=1460))
    assert len(found[0].sample) > 15
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_score_template_and_depth_are_those_of_the_dense_version() -> None:
    probe, shapes = PROBES["staggered"], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 1200, 40, seed=6)
    peaks = detect(traces, templates, threshold=8, reach=REACH, first=40, last=1160)
    dense = dense_scores(traces, templates)[peaks.centre, :, peaks.sample]  # (n, s·p)
    torch.testing.assert_close(peaks.score.double(), dense.abs().amax(dim=1), rtol=1e-5, atol=0)  # float32
    np.testing.assert_array_equal(peaks.template, dense.abs().argmax(dim=1))
    sign = dense.gather(1, peaks.template[:, None])[:, 0].sign()
    assert set(sign.tolist()) == {-1.0, 1.0}
    matches = correlate(traces, shapes).double()
    for n in range(len(peaks.sample)):
        channels = templates.channels[peaks.centre[n]]
        weight = (matches[channels, peaks.template[n] % 3, peaks.sample[n]] * sign[n]).clamp(min=0)
        depth = (weight * templates.depth_um[channels]).sum() / weight.sum()
        assert peaks.depth_um[n] == pytest.approx(float(depth), abs=1e-3)


def exact_templates(n_centres: int = 3) -> UniversalTemplates:
    """One shape, a single 1, and one channel per centre: scores are the samples themselves, without rounding."""
    shape = torch.zeros(1, NT)
    shape[0, NT // 2] = 1
    return universal_templates(
        shape,
        shape,
        channels=torch.arange(n_centres)[:, None],
        weights=torch.ones(n_centres, 1, 1),
        neighbours=torch.arange(n_centres).repeat(n_centres, 1),
        depth_um=torch.arange(n_centres) * 20.0,
    )


def found_in(
    traces: torch.Tensor, *, threshold: float = 9.0, first: int = 40, last: int = 160
) -> list[tuple[int, int]]:
    peaks = detect(traces, exact_templates(len(traces)), threshold=threshold, reach=REACH, first=first, last=last)
    return list(zip(peaks.sample.tolist(), peaks.centre.tolist(), strict=True))


def test_the_threshold_is_strict() -> None:
    traces = torch.zeros(3, 200)
    traces[1, 100] = 9.0
    assert found_in(traces) == []
    traces[1, 100] = float(np.nextafter(np.float32(9.0), np.float32(10)))
    assert found_in(traces) == [(100, 1)]


@pytest.mark.parametrize("offset", range(8))
def test_ties_go_to_the_earliest_then_to_the_lowest_centre(offset: int) -> None:
    traces = torch.zeros(3, 200)
    traces[0, 100 + offset] = traces[1, 100 + offset] = traces[2, 101 + offset] = -12.0
    assert found_in(traces) == [(100 + offset, 0)]
    traces[2, 99 + offset] = 12.0
    assert found_in(traces) == [(99 + offset, 2)]


@pytest.mark.parametrize("offset", range(8))
def test_peaks_rule_each_other_out_within_reach_only(offset: int) -> None:
    traces = torch.zeros(3, 200)
    at = 90 + offset
    traces[0, at], traces[2, at + REACH], traces[1, at + REACH + 1] = 12.0, 11.0, 10.0
    assert found_in(traces) == [(at, 0)]  # each is ruled out by the one before, ruled out or not
    traces[2, at + REACH] = 0
    assert found_in(traces) == [(at, 0), (at + REACH + 1, 1)]


def test_a_peak_belongs_to_the_range_that_holds_it() -> None:
    traces = torch.zeros(2, 200)
    traces[0, 100] = 12.0
    assert found_in(traces, first=40, last=100) == []
    assert found_in(traces, first=100, last=160) == [(100, 0)]
    traces[1, 99] = 13.0  # outside the range, but it rules out the one inside
    assert found_in(traces, first=100, last=160) == []


@pytest.mark.slow
def test_sharper_bounds_change_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, shapes = PROBES["staggered"], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 1500, 60, seed=9)
    evaluated, detected = [], []
    evaluate = kernels._PeakSearch.evaluate

    def counting(search: kernels._PeakSearch, pairs: torch.Tensor) -> None:
        evaluated[-1] += len(pairs)
        evaluate(search, pairs)

    monkeypatch.setattr(kernels._PeakSearch, "evaluate", counting)

    def as_it_was(search: kernels._PeakSearch, pairs: torch.Tensor, bound: torch.Tensor) -> None:
        bound.copy_(search.bound[pairs])

    monkeypatch.setattr(kernels, "SEARCHED_BELOW", 1.1)
    for signed in (0.0, 1.0):  # by sign, or not
        monkeypatch.setattr(kernels, "SIGNED_ABOVE", signed)
        for by_waveform in (kernels._PeakSearch._bound_waveforms, as_it_was):
            with monkeypatch.context() as patch:
                patch.setattr(kernels._PeakSearch, "_bound_waveforms", by_waveform)
                evaluated.append(0)
                detected.append(detect(traces, templates, threshold=4.0, reach=REACH, first=40, last=1460))
    assert len(detected[0].sample) > 30
    for others in detected[1:]:
        assert all(torch.equal(one, other) for one, other in zip(detected[0], others, strict=True))
    both, by_sign, by_waveform, neither = evaluated
    assert both <= by_waveform < by_sign < 0.8 * neither


def test_where_pieces_are_cut_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, shapes = PROBES["staggered"], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 2500, 120, seed=7)
    whole = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    monkeypatch.setattr(kernels, "SAMPLES_PER_CHUNK", ChunkSize(cpu=256, gpu=256))
    chunked = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    assert len(whole.sample) > 50
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_where_memory_is_out_pieces_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with memory for 700 samples and their margins finds the same peaks as one with memory for all."""
    probe, shapes = PROBES["staggered"], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 2500, 120, seed=7)
    whole = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    lengths = []

    def with_little_room(piece: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(piece.shape[1])
        if piece.shape[1] > 700:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return correlate(piece, *args, **options)

    monkeypatch.setattr(kernels, "correlate", with_little_room)
    chunked = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    assert max(lengths) > 2420 and len([length for length in lengths if length <= 700]) == 4
    assert len(whole.sample) > 50
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)  # products of fewer rows may sum otherwise


def test_padding_channels_are_of_no_account() -> None:
    """A tetrode has four channels for ten slots: the padding of the others does not matter."""
    probe, shapes = PROBES["tetrodes"], smooth_shapes(3)
    templates = universal(probe, shapes, nearest_chans=10)
    assert (templates.present == 0).any()
    traces = planted(probe, shapes, 1500, 60, seed=8)
    first = detect(traces, templates, threshold=8, reach=REACH, first=40, last=1460)
    padded = templates._replace(channels=torch.where(templates.present > 0, templates.channels, 7))
    other = detect(traces, padded, threshold=8, reach=REACH, first=40, last=1460)
    assert len(first.sample) > 10
    for a, b in zip(first, other, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_found_in_silence() -> None:
    assert found_in(torch.zeros(3, 200)) == []


def test_silence_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pieces of 256 samples, the first three are silent; what is found elsewhere, and types, are the same."""
    probe, shapes = PROBES["staggered"], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 2500, 120, seed=7)
    traces[:, :900] = 0
    whole = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    detect_chunk, searched = kernels._detect_chunk, []

    def noted(chunk: torch.Tensor, *args: Any) -> kernels.TilePeaks:
        searched.append(chunk.shape[1])
        return detect_chunk(chunk, *args)

    monkeypatch.setattr(kernels, "SAMPLES_PER_CHUNK", ChunkSize(cpu=256, gpu=256))
    monkeypatch.setattr(kernels, "_detect_chunk", noted)
    chunked = detect(traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    assert len(searched) == 7 < 2420 / 256 - 2
    assert len(whole.sample) > 30
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
    silent = detect(0 * traces, templates, threshold=7, reach=REACH, first=40, last=2460)
    assert len(searched) == 7
    quiet = detect(1e-3 * traces + 1e-6, templates, threshold=7, reach=REACH, first=40, last=2460)
    assert [(of.shape, of.dtype) for of in silent] == [(of.shape, of.dtype) for of in quiet]


def test_features_are_projections_of_the_window() -> None:
    probe = PROBES["tetrodes"]
    components = torch.linalg.qr(torch.randn(NT, 4, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
    traces = torch.randn(probe.n_channels, 300, generator=torch.Generator().manual_seed(2))
    channels, sample = torch.tensor([[3, 0], [11, 5]]), torch.tensor([50, 200])
    projected = features(traces, components, channels, sample, present=torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    for n in range(2):
        for j in range(2):
            window = traces[channels[n, j], sample[n] - NT // 2 : sample[n] + NT // 2 + 1]
            expected = components @ window * (0 if (n, j) == (1, 1) else 1)
            torch.testing.assert_close(projected[n, j], expected, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("name", PROBES)
def test_projections_are_the_scores_in_traces_that_were_not_moved(name: str) -> None:
    """Where the components span the shapes, so that features lack nothing of them."""
    probe, shapes = PROBES[name], smooth_shapes(3)
    templates = universal(probe, shapes)
    traces = planted(probe, shapes, 1500, 60, seed=9)
    peaks = detect(traces, templates, threshold=7, reach=REACH, first=40, last=1460)
    components = torch.linalg.qr(shapes.T)[0].T.contiguous()
    channels, present = templates.channels[peaks.centre], templates.present[peaks.centre]
    found = features(traces, components, channels, peaks.sample, present)
    projected = projections(found, templates.weights[peaks.centre], shapes, components)
    assert len(projected) > 10
    torch.testing.assert_close(projected, peaks.score, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize("name", PROBES)
def test_scores_of_moved_noise_have_unit_variance(name: str) -> None:
    """Where each channel becomes the mean of itself and another one, and the first one is extrapolated."""
    probe, shapes = PROBES[name], smooth_shapes(2)
    n_channels = probe.n_channels
    moving = 0.5 * torch.eye(n_channels) + 0.5 * torch.eye(n_channels).roll(1, dims=1)
    moving[0] *= 3
    templates = universal(probe, shapes)
    moved = for_moved(templates, moving)
    noise = moving @ torch.randn(n_channels, 20_000, generator=torch.Generator().manual_seed(7))
    before, after = (dense_scores(noise, known).std(dim=2) for known in (templates, moved))
    kept = before > 1.05 * MIN_NOISE
    assert kept.float().mean() > 0.9
    # Correlated over a waveform, 20 000 samples are some 5000 independent ones: a standard error of 1 %.
    torch.testing.assert_close(after[kept], torch.ones_like(after[kept]), atol=0.06, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_finds_what_the_dense_version_finds_in_moved_traces(name: str) -> None:
    probe, shapes = PROBES[name], smooth_shapes(3)
    n_channels = probe.n_channels
    moving = 0.7 * torch.eye(n_channels) + 0.3 * torch.eye(n_channels).roll(1, dims=1)
    moved = for_moved(universal(probe, shapes), moving)
    traces = moving @ planted(probe, shapes, 1500, 60, seed=8)
    peaks = detect(traces, moved, threshold=7, reach=REACH, first=40, last=1460)
    expected = oracle(traces, moved, 7, REACH, 40, 1460)
    assert len(expected) > 10
    assert list(zip(peaks.sample.tolist(), peaks.centre.tolist(), strict=True)) == expected
