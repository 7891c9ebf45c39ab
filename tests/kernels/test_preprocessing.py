"""Filter, reference, artifacts, whitening and the matrix that undoes drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import butter, sosfreqz
from torch import Tensor

from ks4stream.kernels import preprocessing
from ks4stream.kernels.preprocessing import (
    FILTERED_CHANNELS,
    RANKED_SAMPLES,
    Mover,
    covariance,
    highpass,
    highpass_reach,
    highpass_response,
    local_product,
    local_whitening,
    median_over_channels,
    subtract_reference,
)

RATE = 30_000.0


def filtered(traces: Tensor, cutoff_hz: float = 300.0) -> Tensor:
    response = highpass_response(traces.shape[1], sampling_rate_hz=RATE, cutoff_hz=cutoff_hz)
    return highpass(traces, torch.from_numpy(response))


def tone(frequency_hz: float, n_samples: int = 6000) -> Tensor:
    return torch.sin(2 * np.pi * frequency_hz / RATE * torch.arange(n_samples, dtype=torch.float64)).float()[None]


def test_the_high_pass_removes_a_constant() -> None:
    # 6000 is a fast length: the FFT sees no edge. Rounding of float32 remains.
    assert filtered(torch.full((1, 6000), 1000.0)).abs().max() < 0.01


@pytest.mark.parametrize(("frequency_hz", "gain"), [(50, 0.0), (300, 0.5), (1000, 1.0), (5000, 1.0)])
def test_gain(frequency_hz: float, gain: float) -> None:
    # Whole periods, so no edges. Squared third-order Butterworth: 1/(1 + (fc/f)⁶), within 1 % of 0, ½ and 1.
    torch.testing.assert_close(filtered(tone(frequency_hz)), gain * tone(frequency_hz), atol=0.01, rtol=0)


@pytest.mark.parametrize(("rate_hz", "cutoff_hz"), [(30_000.0, 300.0), (24_414.0625, 150.0), (10_000.0, 3000.0)])
def test_the_response_is_that_of_scipys_filter_forward_and_backward(rate_hz: float, cutoff_hz: float) -> None:
    response = highpass_response(6000, sampling_rate_hz=rate_hz, cutoff_hz=cutoff_hz)
    sections = butter(3, cutoff_hz, btype="high", fs=rate_hz, output="sos")
    _, expected = sosfreqz(sections, worN=np.fft.rfftfreq(2 * (len(response) - 1), 1 / rate_hz), fs=rate_hz)
    np.testing.assert_allclose(response, np.abs(expected) ** 2, rtol=3e-7, atol=1e-15)
    assert response[0] == 0


def test_the_high_pass_reaches_as_far_as_documented() -> None:
    assert highpass_reach(sampling_rate_hz=RATE, cutoff_hz=300) == pytest.approx(442, abs=2)
    assert highpass_reach(sampling_rate_hz=RATE, cutoff_hz=600) < 300  # a higher cutoff forgets sooner


def test_beyond_its_reach_a_sample_has_no_influence() -> None:
    reach = highpass_reach(sampling_rate_hz=RATE, cutoff_hz=300)
    impulse = torch.zeros(1, 6000)
    impulse[0, 3000] = 1
    seen = filtered(impulse)[0].abs()
    # Float32 adds rounding of about 1e-8 to what stays below the documented floor of 1e-8.
    assert seen[: 3000 - reach].max() < 1e-7
    assert seen[3000 + reach + 1 :].max() < 1e-7
    assert seen[:3000].max() > 1e-3  # it looks both ways
    assert seen[3001:].max() > 1e-3


def test_without_a_cutoff_nothing_is_filtered() -> None:
    assert highpass_reach(sampling_rate_hz=RATE, cutoff_hz=0) == 0
    traces = tone(1.0, 601) + 5
    # An FFT there and back, in float32.
    torch.testing.assert_close(filtered(traces, cutoff_hz=0), traces, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_samples", [1, 61, 1000, 1001, 60_963])
def test_ffts_are_even_and_long_enough(n_samples: int) -> None:
    n_fft = 2 * (len(highpass_response(n_samples, sampling_rate_hz=RATE, cutoff_hz=300)) - 1)
    assert n_samples <= n_fft < 1.2 * n_samples + 8


@pytest.mark.parametrize(
    ("rows", "median"), [([[3.0, 0], [1, 0], [9, 6]], [3.0, 0]), ([[1.0], [2], [4], [9]], [3.0]), ([[7.0]], [7.0])]
)
def test_median_of_odd_and_even_numbers_of_channels(rows: list[list[float]], median: list[float]) -> None:
    traces = torch.tensor(rows)
    assert median_over_channels(traces).tolist() == median
    assert traces.tolist() == rows


def test_channels_and_samples_in_chunks_are_as_at_once() -> None:
    traces = torch.from_numpy(np.random.default_rng(0).normal(size=(45, 20_001)).astype(np.float32))
    assert 2 * FILTERED_CHANNELS.cpu < len(traces) and 2 * RANKED_SAMPLES.cpu < traces.shape[1]
    alone = torch.cat([filtered(some, cutoff_hz=300) for some in traces.split(9)])
    torch.testing.assert_close(filtered(traces, cutoff_hz=300), alone, atol=1e-5, rtol=0)  # float32
    assert median_over_channels(traces).equal(traces.median(dim=0).values)


def test_references_are_subtracted_in_place_from_their_own_channels() -> None:
    traces = torch.tensor([[1.0], [3.0], [100.0], [10.0], [20.0]])
    groups = [([0, 1], [0, 1, 2]), ([3, 4], [3, 4])]  # channel 2 is corrected but does not count
    medians = subtract_reference(traces, [(torch.tensor(a), torch.tensor(b)) for a, b in groups])
    assert [median.tolist() for median in medians] == [[2], [15]]
    assert traces[:, 0].tolist() == [-1, 1, 98, -5, 5]


def test_all_references_are_taken_before_any_is_subtracted() -> None:
    traces = torch.tensor([[2.0], [4.0], [9.0]])
    groups = [(torch.tensor([0, 1]), torch.tensor([0, 1])), (torch.tensor([0, 1, 2]), torch.tensor([2]))]
    subtract_reference(traces, groups)
    assert traces[:, 0].tolist() == [-1, 1, 5]


def test_one_reference_for_all_channels() -> None:
    everyone = torch.arange(3)
    traces = torch.tensor([[1.0, 5], [2, 5], [6, 8]])
    (median,) = subtract_reference(traces, [(everyone, everyone)])
    assert median.tolist() == [2, 5]
    assert traces.tolist() == [[-1, 0], [0, 0], [4, 3]]


def test_without_groups_nothing_is_subtracted() -> None:
    traces = torch.tensor([[1.0], [2.0]])
    assert subtract_reference(traces, []) == []
    assert traces[:, 0].tolist() == [1, 2]


def mixed(scale: float = 1.0) -> Tensor:
    """Four channels of noise that leaks between them."""
    rng = np.random.default_rng(1)
    mixing = np.eye(4) + 0.4 * np.eye(4, k=1) + 0.4 * np.eye(4, k=-1)
    return torch.from_numpy((scale * mixing @ rng.normal(size=(4, 5000))).astype(np.float32))


ALL = [np.roll(np.arange(4), -channel) for channel in range(4)]


def test_covariance_takes_no_mean_away() -> None:
    assert covariance(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist() == [[5, 4], [4, 4]]


def test_blanked_samples_do_not_enter_the_covariance() -> None:
    traces = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 2.0]])
    assert covariance(traces, 2).equal(covariance(traces[:, [0, 2]]))


def test_whitened_traces_have_the_identity_as_covariance() -> None:
    traces = mixed()
    whitened = local_whitening(covariance(traces), ALL) @ traces
    # The floor is 1e-6 of the mean variance; the smallest eigenvalue here is above 1e-2 of it.
    torch.testing.assert_close(covariance(whitened), torch.eye(4, dtype=torch.float64), atol=1e-3, rtol=0)


def test_whitening_is_symmetric_if_all_channels_see_all() -> None:
    whitening = local_whitening(covariance(mixed()), ALL)
    torch.testing.assert_close(whitening, whitening.T, atol=1e-5, rtol=0)  # float32


def test_alone_a_channel_is_scaled_to_unit_variance() -> None:
    whitening = local_whitening(torch.diag(torch.tensor([4.0, 25.0]).double()), [np.array([0]), np.array([1])])
    # The floor: half of 1e-6 · 14.5 / 4.
    torch.testing.assert_close(whitening, torch.diag(torch.tensor([0.5, 0.2])), rtol=1e-5, atol=0)


def test_rows_hold_nothing_outside_the_neighbourhood_and_are_zero_without_one() -> None:
    near = [np.array([0, 1]), np.array([], np.int64), np.array([2, 3]), np.array([3, 2])]
    whitening = local_whitening(covariance(mixed()), near)
    assert (whitening != 0).tolist() == [
        [True, True, False, False],
        [False] * 4,
        [False, False, True, True],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_whitened_traces_do_not_depend_on_the_unit_of_the_file(scale: float) -> None:
    traces, scaled = mixed(), mixed(scale)
    once = local_whitening(covariance(traces), ALL) @ traces
    again = local_whitening(covariance(scaled), ALL) @ scaled
    torch.testing.assert_close(again, once, atol=1e-3, rtol=0)  # float32 rounding of traces and covariance


def test_a_dead_flat_channel_does_not_blow_up() -> None:
    traces = mixed()
    traces[2] = 0
    whitening = local_whitening(covariance(traces), ALL)
    assert bool(whitening.isfinite().all())
    assert float((whitening @ traces)[2].abs().max()) < 1e-3  # nothing leaks in through rounding × 1/√floor


@pytest.mark.parametrize("width", [1, 5, 200])
def test_a_local_product_is_the_whole_one(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 channels in rows of 32, some of which have no entries."""
    monkeypatch.setattr(preprocessing, "PRODUCT_SAMPLES", 300)
    draw = torch.Generator().manual_seed(3)
    apart = (torch.arange(100)[:, None] - torch.arange(100)).abs()
    matrix = torch.randn(100, 100, generator=draw).masked_fill(apart >= width, 0.0)
    matrix[30:70] = 0
    traces = torch.randn(100, 1000, generator=draw)
    product = local_product(matrix, traces)
    torch.testing.assert_close(product, matrix @ traces, atol=1e-4, rtol=0)  # sums of up to 100 in another order
    assert not product[32:64].any()


def test_few_channels_are_multiplied_in_parts_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "PRODUCT_SAMPLES", 300)
    draw = torch.Generator().manual_seed(3)
    matrix, traces = torch.randn(7, 7, generator=draw), torch.randn(7, 1000, generator=draw)
    # sums of seven numbers in another order
    torch.testing.assert_close(local_product(matrix, traces), matrix @ traces, atol=1e-5, rtol=0)


def test_the_product_of_a_local_matrix_does_not_read_the_rest() -> None:
    traces = torch.ones(200, 10)
    traces[150:] = torch.nan
    assert local_product(torch.eye(200), traces)[:128].isfinite().all()


def test_the_drift_matrix_is_local() -> None:
    """Of 384 channels 20 µm apart; what is left out is less than the rounding of the rest."""
    y = 20.0 * np.arange(384)
    positions = np.column_stack([np.zeros(len(y)), y])
    matrix = moved(7.0, positions)
    apart = (torch.arange(384)[:, None] - torch.arange(384)).abs()
    assert not matrix[apart > 40].any()
    exact = Mover(torch.from_numpy(positions), torch.zeros(384, dtype=torch.int64), sigma_um=20)
    whole = exact._kernel(torch.from_numpy(positions - [0, 7.0])) @ exact.inverse
    assert float((matrix - whole).norm(dim=1).max()) < 1e-6  # float32 and 1e-7 for each entry that is left out


Y = 20.0 * np.arange(30)


def moved(shift_um: float, positions: np.ndarray | None = None, shank: list[int] | None = None) -> Tensor:
    positions = np.column_stack([np.zeros(len(Y)), Y]) if positions is None else positions
    shanks = [0] * len(positions) if shank is None else shank
    shifts = torch.full((len(positions),), shift_um, dtype=torch.float64)
    return Mover(torch.from_numpy(positions), torch.tensor(shanks), sigma_um=20).matrix(shifts)


def bump(centre_um: float) -> Tensor:
    return torch.from_numpy(np.exp(-((Y - centre_um) ** 2) / (2 * 40.0**2)).astype(np.float32))


def test_no_shift_changes_distant_contacts_by_the_ridge_only() -> None:
    apart = np.column_stack([np.zeros(4), 200.0 * np.arange(4)])
    # Contacts ten widths apart share exp(−50): what is left is 1 / (1 + 0.01).
    torch.testing.assert_close(moved(0, apart), torch.eye(4) / 1.01, atol=1e-6, rtol=0)


# A bump of 40 µm is smooth for an interpolation of 20 µm on contacts 20 µm apart: the ridge of 0.01 against
# kernel eigenvalues of about 1 costs 1 %, and as much again is left for the interpolation.
@pytest.mark.parametrize("shift_um", [-20.0, -7.0, 0.0, 13.0, 40.0])
def test_a_positive_shift_moves_a_bump_to_larger_depth(shift_um: float) -> None:
    torch.testing.assert_close(moved(shift_um) @ bump(300), bump(300 + shift_um), atol=0.02, rtol=0)


def test_shanks_never_mix() -> None:
    positions = np.array([[0.0, 0], [10, 0], [0, 20], [10, 20]])
    matrix = moved(15, positions, shank=[0, 1, 0, 1])
    assert (matrix != 0).tolist() == [[True, False] * 2, [False, True] * 2] * 2
