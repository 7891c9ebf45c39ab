"""Matching pursuit, compared with a dense and obvious implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ks4stream.kernels import matching
from ks4stream.kernels.convolution import correlate
from ks4stream.kernels.matching import (
    PreparedTemplates,
    TileSpikes,
    _score,
    add_windows,
    bisected,
    features,
    for_moved,
    prepare,
    subtract,
    trimmed,
)
from ks4stream.kernels.memory import ChunkSize
from ks4stream.kernels.preprocessing import MIN_NOISE

NT = 21


def components(q: int = 4, nt: int = NT) -> torch.Tensor:
    """Smooth orthonormal waveforms that vanish at the ends."""
    time = torch.linspace(-1, 1, nt, dtype=torch.float64)
    bumps = torch.stack([torch.exp(-8 * time**2) * time**k for k in range(q)])
    return torch.linalg.qr(bumps.T)[0].T.float().contiguous()


def line_probe(n_channels: int, n_near: int = 4) -> tuple[np.ndarray, torch.Tensor]:
    """Positions 20 µm apart, and each channel's nearest channels."""
    positions = np.stack([np.zeros(n_channels), 20.0 * np.arange(n_channels)], axis=1)
    distance = np.abs(positions[:, None, 1] - positions[:, 1])
    near = np.argsort(distance, axis=1, kind="stable")[:, :n_near]
    return positions, torch.as_tensor(near)


def random_units(n_units: int, n_channels: int, draw: torch.Generator, reach: int = 3, q: int = 4) -> torch.Tensor:
    """Templates of norm 15 … 40 on the channels within `reach` of a random one."""
    centre = torch.randint(n_channels, (n_units, 1), generator=draw)
    distance = (torch.arange(n_channels) - centre).abs()
    weight = torch.exp(-distance.float()) * (distance <= reach)
    units = torch.randn(n_units, n_channels, q, generator=draw) * weight[:, :, None]
    size = 15 + 25 * torch.rand(n_units, generator=draw)
    return units * (size / units.norm(dim=(1, 2)))[:, None, None]


def planted(
    units: torch.Tensor, pcs: torch.Tensor, samples: list[int], which: list[int], length: int, sizes: list[float]
) -> torch.Tensor:
    """Traces that contain only the given spikes."""
    traces = torch.zeros(units.shape[1], length)
    half = pcs.shape[1] // 2
    for sample, unit, size in zip(samples, which, sizes, strict=True):
        traces[:, sample - half : sample + half + 1] += size * units[unit] @ pcs
    return traces


def match(traces: torch.Tensor, templates: PreparedTemplates, **changes: Any) -> TileSpikes:
    """Match with Kilosort4's defaults."""
    return matching.match(traces, templates, **({"threshold": 8.0, "max_peels": 100} | changes))


def oracle(
    traces: torch.Tensor,
    templates: PreparedTemplates,
    *,
    threshold: float = 8.0,
    max_peels: int = 100,
    everywhere: bool = False,
) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """Matching pursuit as section 8 defines it, in float64, with all scores computed again in each round.

    A maximum is taken among the units whose groups share channels, or among all units (`everywhere`).
    Returns the spikes (sample, unit), their scores, and the residual.
    """
    nt, units = templates.nt, templates.features.double()
    pcs, half = templates.components.double(), templates.nt // 2
    norm = units.norm(dim=(1, 2))
    n_units, length = len(units), traces.shape[1]
    group = torch.empty(n_units, dtype=torch.int64)
    for number, rows in enumerate(templates.members):
        group[templates.unit_of[rows[rows < n_units]]] = number
    rivals = torch.ones(n_units, n_units, dtype=torch.bool)
    if not everywhere:
        rivals = torch.tensor([[bool((templates.near[g] == h).any()) for h in group] for g in group]).reshape(
            n_units, -1
        )
    residual = traces.double().clone()
    accepted, scores = [], []
    for _ in range(max_peels):
        padded = torch.nn.functional.pad(residual, (half, half)).unfold(1, nt, 1)  # (c, t, w)
        score = torch.einsum("ucq,qw,ctw->ut", units, pcs, padded) / norm.clamp_min(1e-30)[:, None]
        score = score.round(decimals=6)  # equal is what float32 cannot tell apart
        unusual = 0.5 * ((score - norm[:, None]) / templates.spread.double()[:, None]) ** 2
        likelihood = 0.5 * score**2 - unusual.clamp(max=4)
        likelihood[score <= threshold] = -torch.inf
        likelihood[:, :nt], likelihood[:, length - nt :] = -torch.inf, -torch.inf
        peaks = []
        for unit, sample in torch.nonzero(likelihood > -torch.inf).tolist():
            around = likelihood[rivals[unit], sample - nt : sample + nt + 1]
            value = likelihood[unit, sample]
            ties = torch.nonzero(likelihood[:, sample - nt : sample + nt + 1] == value)
            ties = ties[rivals[unit][ties[:, 0]]]
            first = min((lag, other) for other, lag in ties.tolist())
            if value == around.max() and first == (nt, unit):
                peaks.append((sample, unit, float(score[unit, sample])))
        if not peaks:
            break
        for sample, unit, value in peaks:
            residual[:, sample - half : sample + half + 1] -= value / norm[unit] * units[unit] @ pcs
            accepted.append((sample, unit))
            scores.append(value)
    order = sorted(range(len(accepted)), key=lambda i: accepted[i])
    return [accepted[i] for i in order], torch.tensor([scores[i] for i in order]), residual


def as_list(spikes: TileSpikes) -> list[tuple[int, int]]:
    return list(zip(spikes.sample_index.tolist(), spikes.unit.tolist(), strict=True))


def small(n_units: int = 3, n_channels: int = 6, seed: int = 0) -> tuple[torch.Tensor, PreparedTemplates]:
    draw = torch.Generator().manual_seed(seed)
    units = random_units(n_units, n_channels, draw)
    positions, near = line_probe(n_channels)
    return units, prepare(units, components(), near, positions, dropped_energy=0.0)


def test_one_spike_is_found_where_it_is_and_nothing_is_left() -> None:
    units, templates = small()
    traces = planted(units, templates.components, [70], [1], 200, [1.5])
    spikes = match(traces, templates)
    assert as_list(spikes) == [(70, 1)]
    assert spikes.amplitude.item() == pytest.approx(1.5, rel=1e-4)
    assert spikes.score.item() == pytest.approx(1.5 * units[1].norm().item(), rel=1e-4)
    residual = subtract(traces, spikes, templates)
    assert residual.abs().max() < 1e-3
    projected = features(residual, spikes, templates)
    channels = templates.template_channels[1]
    assert channels[0] == units[1].square().sum(1).argmax()
    torch.testing.assert_close(projected[0], 1.5 * units[1][channels], atol=1e-3, rtol=1e-3)


def test_overlapping_spikes_of_two_units_are_both_found() -> None:
    units, templates = small()
    traces = planted(units, templates.components, [70, 76], [1, 2], 200, [1.5, 1.0])
    assert {(70, 1), (76, 2)} <= set(as_list(match(traces, templates)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n_units", "n_channels", "group_size"), [(6, 5, 16), (20, 30, 3), (25, 60, 4), (7, 12, 1)])
def test_agrees_with_the_dense_version_on_overlapping_spikes(
    n_units: int, n_channels: int, group_size: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    units = random_units(n_units, n_channels, draw)
    positions, near = line_probe(n_channels)
    spread = 1 + 3 * torch.rand(n_units, generator=draw) if seed % 2 else None
    templates = prepare(units, components(), near, positions, spread=spread, dropped_energy=0.0, group_size=group_size)
    length, n_spikes = 1500, 5 * n_channels
    samples = torch.randint(NT, length - NT, (n_spikes,), generator=draw).tolist()
    which = torch.randint(n_units, (n_spikes,), generator=draw).tolist()
    sizes = (0.6 + torch.rand(n_spikes, generator=draw)).tolist()
    traces = planted(units, templates.components, samples, which, length, sizes)
    traces += torch.randn(traces.shape, generator=draw)

    expected, scores, residual = oracle(traces, templates)
    spikes = match(traces, templates)

    assert as_list(spikes) == expected
    assert len(expected) > n_spikes / 2
    torch.testing.assert_close(spikes.score.double(), scores.double(), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(subtract(traces, spikes, templates).double(), residual, atol=2e-3, rtol=1e-4)


@pytest.mark.slow
def test_maxima_nearby_or_everywhere_give_the_same_spikes_up_to_rare_chains() -> None:
    draw = torch.Generator().manual_seed(11)
    units = random_units(25, 60, draw)
    positions, near = line_probe(60)
    templates = prepare(units, components(), near, positions, group_size=2)
    samples = torch.randint(NT, 1980, (300,), generator=draw).tolist()
    which = torch.randint(25, (300,), generator=draw).tolist()
    traces = planted(units, templates.components, samples, which, 2000, [1.0] * 300)
    traces += torch.randn(traces.shape, generator=draw)
    nearby, everywhere = set(as_list(match(traces, templates))), set(oracle(traces, templates, everywhere=True)[0])
    assert len(nearby ^ everywhere) <= 0.02 * len(everywhere)


def box_templates(weights: list[list[float]], spread: list[float] | None = None) -> PreparedTemplates:
    """Units whose waveform is the middle sample only, so that scores are exact."""
    delta = torch.zeros(1, 5)
    delta[0, 2] = 1.0
    units = torch.tensor(weights)[:, :, None]
    positions, near = line_probe(units.shape[1], 2)
    of_scores = None if spread is None else torch.tensor(spread)
    return prepare(units, delta, near, positions, spread=of_scores, dropped_energy=0.0, group_size=1)


def test_equal_scores_earliest_then_lowest_unit() -> None:
    templates = box_templates([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])  # units 0 and 2 are the same
    traces = torch.zeros(2, 40)
    traces[1, [15, 18]] = 10.0
    spikes = match(traces, templates, max_peels=1)
    assert as_list(spikes) == [(15, 0)]
    assert as_list(match(traces, templates)) == [(15, 0), (18, 0)]
    assert spikes.score.tolist() == [10.0]
    assert spikes.amplitude.tolist() == [5.0]


def test_far_apart_on_the_probe_is_one_round_nearby_takes_two() -> None:
    templates = box_templates([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 2.0]])
    traces = torch.zeros(3, 40)
    traces[0, 15], traces[1, 15] = 10.0, 12.0
    assert as_list(match(traces, templates, max_peels=1)) == [(15, 0), (15, 1)]
    traces[2, 16] = 12.5  # score 12.5/√2 of unit 2, which overlaps unit 1
    assert as_list(match(traces, templates, max_peels=1)) == [(15, 0), (15, 1)]
    assert as_list(match(traces, templates, max_peels=2)) == [(15, 0), (15, 1), (16, 2)]


def test_of_two_units_with_similar_waveforms_the_one_whose_amplitude_is_usual_has_the_spike() -> None:
    """The waveform of the larger unit fits better, by (10.6² − 10.5²)/2 = 1."""
    templates = box_templates([[20.0, 2.0], [10.0, 0.0]], spread=[2.0, 2.0])
    traces = torch.zeros(2, 60)
    traces[:, 15] = torch.tensor([10.5, 1.0])
    traces[:, 40] = torch.tensor([20.0, 1.0])
    assert as_list(match(traces, templates)) == [(15, 1), (40, 0)]
    either = box_templates([[20.0, 2.0], [10.0, 0.0]])
    assert as_list(match(traces, either)) == [(15, 0), (40, 0)], "all amplitudes are equally likely"


def test_a_much_better_waveform_decides_whatever_its_amplitude() -> None:
    """As in a burst: by at most 4 (MAX_PENALTY) for the amplitude, and (15.8² − 15²)/2 = 12.5 for the waveform."""
    templates = box_templates([[60.0, 20.0], [15.0, 0.0]], spread=[2.0, 2.0])
    traces = torch.zeros(2, 40)
    traces[:, 15] = torch.tensor([15.0, 5.0])
    spikes = match(traces, templates)
    assert as_list(spikes) == [(15, 0)]
    assert spikes.score.tolist() == pytest.approx([250**0.5]), "not the likelihood"
    assert spikes.amplitude.tolist() == pytest.approx([0.25])


def test_amplitudes_vary_at_least_as_much_as_the_noise() -> None:
    narrow, noise = (box_templates([[20.0, 0.0], [0.0, 10.0]], spread=[s, s]) for s in (0.0, 1.0))
    traces = torch.zeros(2, 40)
    traces[:, 15] = torch.tensor([18.0, 11.0])
    assert narrow.spread.tolist() == noise.spread.tolist() == [1.0, 1.0]
    assert as_list(match(traces, narrow)) == [(15, 0), (15, 1)]


def test_the_threshold_is_strict_and_nothing_within_nt_of_the_ends_counts() -> None:
    templates = box_templates([[2.0]])
    traces = torch.zeros(1, 40)
    traces[0, [4, 5, 20, 34, 35]] = torch.tensor([20.0, 10.0, 8.0, 9.0, 20.0])
    assert as_list(match(traces, templates)) == [(5, 0), (34, 0)]
    assert as_list(match(traces, templates, threshold=7.9)) == [(5, 0), (20, 0), (34, 0)]
    assert as_list(match(torch.full((1, 10), 20.0), templates)) == [], "nothing is searched"


def test_units_have_their_own_thresholds() -> None:
    """Neither their groups nor their channels are in the order of the units."""
    positions, near = line_probe(4)
    pcs, features = components(), torch.zeros(4, 4, 4)
    features[torch.arange(4), torch.tensor([2, 0, 3, 1]), 0] = 10.0
    templates = prepare(features, pcs, near, positions, group_size=1)
    traces = planted(features, pcs, [30] * 4, [0, 1, 2, 3], 60, [1.0] * 4)
    assert as_list(match(traces, templates, threshold=9.0)) == [(30, 0), (30, 1), (30, 2), (30, 3)]
    threshold = torch.tensor([9.0, 11.0, 11.0, 9.0])
    assert as_list(match(traces, templates, threshold=threshold)) == [(30, 0), (30, 3)]


def test_no_units_no_spikes_and_an_empty_template() -> None:
    positions, near = line_probe(4)
    none = prepare(torch.zeros(0, 4, 4), components(), near, positions)
    noise = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    for templates in (none, small(3, 4)[1], prepare(torch.zeros(2, 4, 4), components(), near, positions)):
        spikes = match(noise, templates, threshold=50.0)
        assert [len(part) for part in spikes] == [0, 0, 0, 0]
        assert spikes.sample_index.dtype == spikes.unit.dtype == torch.int64
        assert torch.equal(subtract(noise, spikes, templates), noise)
        assert features(noise, spikes, templates).shape == (0, 4, 4)


def test_silence_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = small(3, 4)[1]
    quiet = match(torch.full((4, 300), 1e-6), templates, threshold=4.0)
    monkeypatch.delattr("ks4stream.kernels.matching._ScoreMap")
    silent = match(torch.zeros(4, 300), templates, threshold=4.0)
    assert [(of.shape, of.dtype) for of in silent] == [(of.shape, of.dtype) for of in quiet]


def test_padded_channels_have_features_zero() -> None:
    units = random_units(2, 3, torch.Generator().manual_seed(3))
    near = torch.tensor([[0, 1, -1], [1, 0, -1], [2, -1, -1]])
    templates = prepare(units, components(), near, np.zeros((3, 2)))
    traces = planted(units, templates.components, [60], [0], 150, [2.0])
    spikes = match(traces, templates)
    projected = features(subtract(traces, spikes, templates), spikes, templates)
    assert (projected[:, templates.template_channels[0] < 0] == 0).all()
    assert (projected[:, templates.template_channels[0] >= 0] != 0).any()


def test_windows_are_added_in_order_by_any_number_of_threads() -> None:
    draw = torch.Generator().manual_seed(8)
    first, values = torch.randint(5000, (3000, 1), generator=draw), torch.randn(3000, 41, generator=draw)
    index, n_threads = first + torch.arange(41), torch.get_num_threads()
    totals = []
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            totals.append(torch.zeros(5041))
            add_windows(totals[-1], index, values)
    finally:
        torch.set_num_threads(n_threads)
    expected = np.zeros(5041, np.float32)
    np.add.at(expected, index.flatten().numpy(), values.flatten().numpy())
    for total in totals:
        np.testing.assert_array_equal(total.numpy(), expected)


@pytest.mark.slow
def test_same_bytes_again() -> None:
    draw = torch.Generator().manual_seed(5)
    units = random_units(20, 30, draw)
    positions, near = line_probe(30)
    traces = torch.randn(30, 3000, generator=draw) * 4
    templates, again = (prepare(units.clone(), components(), near, positions, group_size=4) for _ in range(2))
    spikes, other = match(traces, templates), match(traces.clone(), again)
    assert len(spikes.unit) > 20
    for one, two in zip(spikes, other, strict=True):
        assert torch.equal(one, two)
    residual = subtract(traces, spikes, templates)
    assert torch.equal(residual, subtract(traces, other, again))
    assert torch.equal(features(residual, spikes, templates), features(residual, other, again))


@pytest.mark.slow
def test_small_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(6)
    units = random_units(20, 30, draw)
    positions, near = line_probe(30)
    traces = torch.randn(30, 2000, generator=draw) * 4
    templates = prepare(units, components(), near, positions, group_size=4)
    whole = match(traces, templates)
    residual = subtract(traces, whole, templates)
    monkeypatch.setattr("ks4stream.kernels.matching.SAMPLES_PER_CHUNK", ChunkSize(cpu=100, gpu=100))
    monkeypatch.setattr("ks4stream.kernels.matching.ROWS_PER_CHUNK", ChunkSize(cpu=7, gpu=7))
    pieces = match(traces, templates)
    assert as_list(pieces) == as_list(whole)
    torch.testing.assert_close(pieces.score, whole.score, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(subtract(traces, pieces, templates), residual, atol=1e-3, rtol=1e-5)


def test_dropping_weak_channels_changes_scores_by_no_more_than_promised() -> None:
    draw = torch.Generator().manual_seed(7)
    units = random_units(20, 30, draw, reach=30)
    positions, near = line_probe(30)
    full = prepare(units, components(), near, positions, dropped_energy=0.0)
    local = prepare(units, components(), near, positions, dropped_energy=1e-4)
    assert (local.features != 0).float().mean() < 0.6
    dropped = 1 - (local.norm / full.norm) ** 2
    assert dropped.max() <= 1.01e-4
    noise = torch.randn(30, 2000, generator=draw)
    projected = correlate(noise, components())
    one, two = (torch.einsum("ucq,cqt->ut", m.features / m.norm[:, None, None], projected) for m in (full, local))
    assert (one - two).square().mean().sqrt() < 0.01


def test_trimming_drops_the_weakest_channels_first() -> None:
    template = torch.tensor([[[10.0], [1.0], [0.5], [3.0]]])
    assert trimmed(template, 0.0).tolist() == template.tolist()
    assert (trimmed(template, 1.3 / 110.25)[0, :, 0] != 0).tolist() == [True, False, False, True]
    assert (trimmed(template, 1.2 / 110.25)[0, :, 0] != 0).tolist() == [True, True, False, True]


def test_groups_are_halved_along_the_longer_extent() -> None:
    positions = np.array([[x, y] for x in (0.0, 1000.0) for y in range(4)])
    assert [g.tolist() for g in bisected(positions, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [g.tolist() for g in bisected(positions, 2)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sorted(np.concatenate(bisected(positions, 3)).tolist()) == list(range(8))
    assert bisected(np.zeros((0, 2)), 4) == []


# -- moved traces --------------------------------------------------------------------------------------


def moving_by_half(n_channels: int) -> torch.Tensor:
    """Each channel becomes the mean of itself and the next one; the first is extrapolated, and the last one is 0."""
    moving = 0.5 * torch.eye(n_channels) + 0.5 * torch.eye(n_channels).roll(1, dims=1)
    moving[0] *= 3
    moving[-1] = 0
    return moving


def test_scores_of_moved_noise_have_unit_variance() -> None:
    draw, (positions, near) = torch.Generator().manual_seed(1), line_probe(12)
    units = random_units(20, 12, draw)
    units[0] = 0
    units[0, 11, 0] = 20  # only on the channel that moves away: no noise is left
    moving = moving_by_half(12)
    templates = for_moved(prepare(units, components(), near, positions), moving)
    traces = moving @ torch.randn(12, 60_000, generator=draw)
    scores = torch.empty(20, 50_000)
    _score(traces, templates, 100, scores)
    spread = torch.empty(20)
    spread[templates.unit_of] = scores.std(dim=1)
    kept = templates.noise > MIN_NOISE
    assert kept.sum() > 10
    # Correlated over a waveform, 50 000 samples are some 5000 independent ones: a standard error of 1 %.
    torch.testing.assert_close(spread[kept], torch.ones_like(spread[kept]), atol=0.05, rtol=0)
    assert spread[0] == 0 and templates.noise[0] == MIN_NOISE
    assert templates.noise[kept].min() < 0.9 and templates.noise.max() > 1.1


def test_spikes_in_moved_traces_are_found_with_their_amplitudes_and_leave_nothing() -> None:
    draw, (positions, near) = torch.Generator().manual_seed(2), line_probe(12)
    units, pcs, moving = random_units(6, 12, draw), components(), moving_by_half(12)
    templates = prepare(units, pcs, near, positions, dropped_energy=0.0)
    moved = for_moved(templates, moving)
    at, which, sizes = [100, 200, 300, 400, 500], [0, 1, 2, 3, 4], [1.0, 0.8, 1.2, 1.0, 0.9]
    traces = planted(units, pcs, at, which, 600, sizes)
    found = match(traces, moved)
    assert (found.sample_index.tolist(), found.unit.tolist()) == (at, which)
    assert found.amplitude.tolist() == pytest.approx(sizes, abs=0.01)
    noise = moved.noise[found.unit]
    torch.testing.assert_close(found.score, found.amplitude * templates.norm[found.unit] / noise)
    assert subtract(traces, found, moved).abs().max() < 0.01 * traces.abs().max()
    low = 0.5 * float((templates.norm / moved.noise).min() + templates.norm.min())  # between its two scores
    smallest = int(templates.norm.argmin())
    alone = planted(units, pcs, [100], [smallest], 300, [1.0])
    assert match(alone, moved, threshold=low).unit.tolist() == [smallest]
    assert match(alone, templates, threshold=low).unit.tolist() == []


def test_which_template_has_a_spike_does_not_depend_on_the_noise() -> None:
    """Of two similar templates the one that explains more, and whose amplitude is as usual, has the spike."""
    positions, near = line_probe(12)
    pcs, units = components(), torch.zeros(2, 12, 4)
    units[0, 5, :2] = torch.tensor([1.0, 0.1])
    units[0, 6] = 0.5 * units[0, 5]
    units[1] = units[0]
    units[1, 5, 1] = 0.31
    units *= (torch.tensor([10.0, 13.0]) / units.norm(dim=(1, 2)))[:, None, None]
    templates = prepare(units, pcs, near, positions, spread=torch.ones(2))
    traces = planted(units, pcs, [50], [0], 100, [1.0])
    for known in (templates, for_moved(templates, moving_by_half(12))):
        found = match(traces, known, threshold=5.0)
        assert found.unit.tolist() == [0]
        assert found.amplitude.tolist() == pytest.approx([1.0], abs=0.01)


def test_not_moving_changes_nothing() -> None:
    draw, (positions, near) = torch.Generator().manual_seed(3), line_probe(12)
    templates = prepare(random_units(9, 12, draw), components(), near, positions)
    traces = 3 * torch.randn(12, 2000, generator=draw)
    usual, moved = match(traces, templates), match(traces, for_moved(templates, torch.eye(12)))
    assert len(usual.unit) > 10
    for one, other in zip(usual, moved, strict=True):
        torch.testing.assert_close(one, other)
