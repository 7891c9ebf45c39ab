"""Neighbourhoods, centres and regions of probes small enough to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ks4stream.errors import ProbeError, SettingsWarning
from ks4stream.geometry import (
    artifact_windows,
    channel_neighbours,
    clustering_regions,
    nearest_positions,
    padded,
    reference_groups,
    region_channels,
    template_centres,
    vertical_pitch_um,
)
from ks4stream.probe import Probe
from ks4stream.settings import Settings


def linear(n: int, *, pitch: float = 20.0) -> Probe:
    return Probe.from_positions([(0.0, pitch * i) for i in range(n)])


def two_shanks(n_left: int, n_right: int) -> Probe:
    positions = [(0.0, 20.0 * i) for i in range(n_left)] + [(250.0, 20.0 * i) for i in range(n_right)]
    return Probe.from_positions(positions, shank=[3] * n_left + [7] * n_right)


def settings(**changes: Any) -> Settings:
    return Settings(**({"nearest_chans": 2, "nearest_templates": 3} | changes))


def test_neighbours_come_by_distance_and_ties_go_to_the_lower_index() -> None:
    neighbours = [row.tolist() for row in channel_neighbours(linear(5), 3)]
    assert neighbours == [[0, 1, 2], [1, 0, 2], [2, 1, 3], [3, 2, 4], [4, 3, 2]]


def test_neighbours_depend_on_positions_not_on_channel_numbers() -> None:
    probe = Probe.from_positions([(0, 40), (0, 0), (0, 60), (0, 20)])
    assert [row.tolist() for row in channel_neighbours(probe, 2)] == [[0, 2], [1, 3], [2, 0], [3, 0]]


def test_neighbours_stay_on_the_shank_unless_told_otherwise() -> None:
    probe = Probe.from_positions([(0, 0), (30, 0), (0, 50)], shank=[0, 1, 0])
    assert [row.tolist() for row in channel_neighbours(probe, 2)] == [[0, 2], [1], [2, 0]]
    assert [row.tolist() for row in channel_neighbours(probe, 2, same_shank=False)] == [[0, 1], [1, 0], [2, 0]]


def test_dead_channels_have_no_neighbours_and_are_not_neighbours() -> None:
    neighbours = channel_neighbours(linear(4), 2, dead=np.array([1]))
    assert [row.tolist() for row in neighbours] == [[0, 2], [], [2, 3], [3, 2]]


def test_distances_that_differ_by_rounding_are_equal() -> None:
    positions = np.array([[0.0, 0.0], [0.0, 20.0 + 1e-9], [0.0, -20.0]])
    assert nearest_positions(positions[:1], positions, 3)[0].tolist() == [[0, 1, 2]]


def test_missing_neighbours_are_minus_one_at_infinite_distance() -> None:
    index, distance = nearest_positions(np.zeros((1, 2)), np.array([[3.0, 4.0]]), 2)
    assert index.tolist() == [[0, -1]]
    assert distance.tolist() == [[5.0, np.inf]]


def test_short_lists_are_padded_with_their_own_first_entry() -> None:
    lists = [np.array([4, 5, 6]), np.array([7]), np.array([], np.int64)]
    assert padded(lists).tolist() == [[4, 5, 6], [7, 7, 7], [0, 0, 0]]
    assert padded(lists, fill=-1).tolist() == [[4, 5, 6], [7, -1, -1], [-1, -1, -1]]


def groups_of(probe: Probe, dead: list[int]) -> list[tuple[list[int], list[int]]]:
    return [(used.tolist(), to.tolist()) for used, to in reference_groups(probe, np.array(dead, np.int64))]


def test_a_shank_of_sixteen_has_its_own_reference_and_one_of_fifteen_shares_all() -> None:
    left, right = list(range(16)), list(range(16, 31))
    assert groups_of(two_shanks(16, 15), []) == [(left, left), (left + right, right)]


def test_dead_channels_do_not_count_but_are_corrected() -> None:
    left, right = list(range(17)), list(range(17, 33))
    assert groups_of(two_shanks(17, 16), [0]) == [(left[1:], left), (right, right)]
    assert groups_of(two_shanks(17, 16), [0, 1, 17]) == [(left[2:] + right[1:], left + right)]


def test_without_good_channels_there_is_no_reference() -> None:
    assert groups_of(linear(2), [0, 1]) == []


@pytest.mark.parametrize(("n", "n_groups"), [(1, 0), (4, 0), (5, 0), (6, 1), (8, 1)])
def test_few_channels_have_no_reference(n: int, n_groups: int) -> None:
    """Their median has much of a spike."""
    assert groups_of(linear(n), []) == [(list(range(n)), list(range(n)))] * n_groups


def test_good_channels_are_counted_for_a_reference() -> None:
    assert groups_of(linear(7), [2]) == [([0, 1, 3, 4, 5, 6], list(range(7)))]
    assert groups_of(linear(7), [2, 3]) == []


def windows_of(probe: Probe, dead: list[int]) -> list[list[int]]:
    return [window.channels.tolist() for window in artifact_windows(probe, np.array(dead, np.int64))]


@pytest.mark.parametrize(
    ("n", "pitch_um"), [(15, 40.0), (16, 13.0), (0, 20.0)], ids=["few channels", "195 µm", "no channels"]
)
def test_where_a_neuron_may_reach_all_channels_artifacts_are_not_told_by_reach(n: int, pitch_um: float) -> None:
    probe = linear(max(n, 1), pitch=pitch_um)
    assert windows_of(probe, list(range(n, probe.n_channels))) == []


def test_a_short_probe_is_one_window() -> None:
    assert windows_of(linear(16), []) == [list(range(16))]
    assert windows_of(linear(31), []) == [list(range(31))]  # halves of 15
    assert windows_of(linear(40, pitch=10.0), []) == [list(range(40))]  # halves of 190 µm


def test_windows_are_the_halves_and_the_half_between() -> None:
    assert windows_of(linear(32), []) == [list(range(16)), list(range(8, 24)), list(range(16, 32))]
    assert windows_of(linear(33), []) == [list(range(16)), list(range(8, 24)), list(range(16, 33))]


def test_windows_are_by_depth_not_by_number() -> None:
    upside_down = Probe.from_positions([(0.0, 20.0 * i) for i in range(31, -1, -1)])
    assert windows_of(upside_down, [])[0] == list(range(31, 15, -1))


def test_windows_go_by_shank() -> None:
    assert windows_of(two_shanks(16, 16), []) == [list(range(16)), list(range(8, 24)), list(range(16, 32))]


def test_dead_channels_are_in_no_window() -> None:
    good = [*range(5), *range(6, 34)]
    assert windows_of(linear(34), [5]) == [good[:16], good[8:24], good[16:]]
    assert windows_of(linear(33), [5, 6]) == [[*range(5), *range(7, 33)]]


def test_the_farthest_quarter_of_a_window_has_equal_weights() -> None:
    ((channels, far, _),) = artifact_windows(linear(16), np.zeros(0, np.int64))
    assert far.shape == (len(channels), len(channels)) == (16, 16)
    assert far.dtype == np.float32
    np.testing.assert_array_equal(far.sum(axis=1), 1)
    assert set(np.unique(far)) == {0, 0.25}
    assert np.flatnonzero(far[0]).tolist() == [12, 13, 14, 15]
    assert np.flatnonzero(far[15]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(far[7]).tolist() == [0, 1, 14, 15]  # of 1 and 13, which are equally far, the lower one


def test_beyond_the_reach_of_neurons_any_share_is_that_of_an_artifact() -> None:
    (window,) = artifact_windows(linear(16, pitch=30.0), np.zeros(0, np.int64))
    # The nearest channel of the quarter that is farthest from one of the first four is channel 12: 360 … 270 µm away.
    assert (window.least == 0).tolist() == [*[True] * 4, *[False] * 8, *[True] * 4]
    assert set(window.least.tolist()) == {0.0, 0.25}


@pytest.mark.parametrize(
    ("positions", "pitch"),
    [
        ([(0, 0), (0, 20), (0, 40)], 20.0),
        ([(0, 0), (32, 0.5), (0, 20), (32, 20.5)], 20.0),  # 0.5 µm apart is one row
        ([(0, 0), (0, 15), (0, 30), (0, 100)], 15.0),  # the median
        ([(0, 0), (50, 0)], 1.0),  # one depth
    ],
)
def test_vertical_pitch(positions: list[tuple[float, float]], pitch: float) -> None:
    assert vertical_pitch_um(Probe.from_positions(positions)) == pitch


def test_centres_lie_at_half_the_pitch_from_the_lowest_contact_to_the_highest() -> None:
    centres = template_centres(linear(4), settings())
    assert centres.pitch_um == 20
    assert centres.position_um.tolist() == [[0, 10 * i] for i in range(7)]
    assert centres.channels.tolist() == [[0, 1], [0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]


def test_the_user_may_space_the_centres() -> None:
    assert template_centres(linear(4), settings(dmin=60)).position_um[:, 1].tolist() == [0, 30, 60]


def test_centres_far_from_every_contact_are_dropped() -> None:
    probe = Probe.from_positions([(0, 0), (0, 200)])
    kept = template_centres(probe, settings(dmin=20, max_channel_distance=30)).position_um[:, 1]
    assert kept.tolist() == [0, 10, 20, 180, 190, 200]  # 30 µm is not closer than 30 µm


def test_centres_far_from_every_live_contact_are_dropped() -> None:
    centres = template_centres(linear(4), settings(max_channel_distance=15), dead=np.array([0, 3]))
    assert centres.position_um[:, 1].tolist() == [10, 20, 30, 40, 50]
    assert set(centres.channels.ravel().tolist()) == {1, 2}


def test_weights_have_unit_norm_and_fall_off_with_distance() -> None:
    centres = template_centres(linear(4), settings(template_sizes=3, min_template_size=10))
    assert centres.weights.shape == (7, 3, 2)
    norm = np.linalg.norm(centres.weights, axis=2)
    np.testing.assert_allclose(norm, 1, atol=1e-6)  # float32 holds seven digits
    ratio = centres.weights[0, :, 1] / centres.weights[0, :, 0]  # 20 µm against 0 µm
    np.testing.assert_allclose(ratio, np.exp([-4.0, -1.0, -4 / 9]), rtol=1e-5)  # float32, two roundings and a norm


def test_shanks_have_their_own_grids_channels_and_neighbours() -> None:
    centres = template_centres(two_shanks(2, 1), settings())
    assert centres.position_um.tolist() == [[0, 0], [0, 10], [0, 20], [250, 0]]
    assert centres.shank.tolist() == [3, 3, 3, 7]
    assert centres.channels.tolist() == [[0, 1], [0, 1], [1, 0], [2, -1]]
    assert centres.neighbours.tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 3, 3]]
    assert centres.weights[3, :, 0].tolist() == [1] * 5
    assert centres.weights[3, :, 1].tolist() == [0] * 5


def test_a_probe_of_fewer_channels_than_asked_for_takes_all_and_says_so() -> None:
    with pytest.warns(SettingsWarning, match="nearest_chans=10 but the probe has 3 channels; using 3"):
        centres = template_centres(linear(3), settings(nearest_chans=10))
    assert centres.channels.shape == (5, 3)


def test_when_no_centre_is_near_a_contact_the_error_says_how_far() -> None:
    diamond = Probe.from_positions([(0, 50), (50, 0), (100, 50), (50, 100)])
    with pytest.raises(ProbeError, match=r"None of the 1 template centres .*=32\.0 µm .* nearest is 50\.0 µm away"):
        template_centres(diamond, settings(dmin=400, dminx=400))


def test_regions_are_two_pitches_high() -> None:
    regions = clustering_regions(template_centres(linear(4), settings()), settings())
    assert regions.position_um.tolist() == [[0, 19], [0, 59]]
    assert regions.of_centre.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_every_centre_has_a_region_on_its_shank_and_every_region_a_centre() -> None:
    centres = template_centres(two_shanks(9, 4), settings())
    regions = clustering_regions(centres, settings())
    assert regions.shank[regions.of_centre].tolist() == centres.shank.tolist()
    assert np.unique(regions.of_centre).tolist() == list(range(len(regions)))


def test_a_wide_array_has_columns_of_regions() -> None:
    probe = Probe.from_positions([(x, y) for y in (0, 20) for x in (0, 400)])
    centres = template_centres(probe, settings(dminx=800))
    assert centres.position_um[:, 0].tolist() == [0, 400] * 3
    assert clustering_regions(centres, settings()).of_centre.tolist() == [0, 1] * 3
    assert clustering_regions(centres, settings(x_centers=1)).of_centre.tolist() == [0] * 6


def test_positions_go_to_the_nearest_region_of_their_shank() -> None:
    regions = clustering_regions(template_centres(two_shanks(4, 4), settings()), settings())
    position = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 500.0]])
    region = regions.region_at(position, np.array([3, 7, 3]))
    assert regions.shank[region].tolist() == [3, 7, 3]
    assert regions.position_um[region].tolist() == [[0, 19], [250, 19], [0, 59]]


def test_a_region_has_the_channels_of_its_members() -> None:
    channels = np.array([[2, 1], [1, -1], [5, 2]])
    channels_of = region_channels(channels, np.array([0, 0, 2]), 3)
    assert [row.tolist() for row in channels_of] == [[1, 2], [], [2, 5]]
