"""A probe is checked on construction, and its operations return new probes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ks4stream.errors import ProbeError
from ks4stream.probe import Probe


def two_shanks(**changes: object) -> Probe:
    """Three contacts on shank 1, two on shank 4, channel 2 of the file unused."""
    fields: dict[str, object] = {
        "chan_map": [0, 1, 3, 4, 5],
        "x_um": [0, 0, 0, 250, 250],
        "y_um": [0, 20, 40, 0, 20],
        "shank": [1, 1, 1, 4, 4],
        "name": "two",
    }
    return Probe(**(fields | changes))  # type: ignore[arg-type]


def test_fields_become_typed_read_only_arrays() -> None:
    probe = two_shanks(chan_map=np.array([0.0, 1.0, 3.0, 4.0, 5.0]))
    assert probe.n_channels == 5
    assert probe.chan_map.dtype == np.int64 and probe.shank.dtype == np.int64
    assert probe.x_um.dtype == np.float64 and probe.y_um.dtype == np.float64
    np.testing.assert_array_equal(probe.positions_um, [[0, 0], [0, 20], [0, 40], [250, 0], [250, 20]])
    with pytest.raises(ValueError, match="read-only"):
        probe.x_um[0] = 1


def test_the_callers_arrays_are_copied() -> None:
    x_um = np.zeros(5)
    probe = two_shanks(x_um=x_um, y_um=[0, 20, 40, 60, 80])
    x_um[0] = 7
    assert probe.x_um[0] == 0


def test_from_positions_numbers_channels_and_puts_them_on_one_shank() -> None:
    probe = Probe.from_positions([(0, 0), (0, 20), (16, 10)])
    assert probe.chan_map.tolist() == [0, 1, 2] and probe.shank.tolist() == [0, 0, 0]
    assert probe.y_um.tolist() == [0, 20, 10]
    with pytest.raises(ProbeError, match=r"shape \(3,\), expected \(channel, 2\)"):
        Probe.from_positions([0, 20, 40])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_um": [0, 0, 0, 250]}, "lengths differ: chan_map 5, x_um 4"),
        ({"x_um": [[0, 0, 0, 250, 250]]}, r"x_um has shape \(1, 5\)"),
        ({"x_um": ["a", "b", "c", "d", "e"]}, "x_um holds something that is not a number"),
        ({"y_um": [0, 20, np.nan, 0, np.inf]}, "y_um is nan for contact 2, 4"),
        ({"chan_map": [0, 1, -1, 4, 5]}, "chan_map holds -1"),
        ({"chan_map": [0, 1, 1, 4, 5]}, "chan_map names channel 1 more than once"),
        ({"chan_map": [0, 1, 2.5, 4, 5]}, "chan_map holds 2.5, expected whole numbers"),
        ({"chan_map": [0, 1, np.nan, 4, 5]}, "chan_map holds nan"),
        ({"shank": ["a", "a", "a", "b", "b"]}, "shank holds <U1 values"),
        ({"y_um": [0, 20, 20, 0, 20]}, r"channels 1, 3 are at the same position \(x 0 µm, y 20 µm, shank 1\)"),
        ({"n_chan_file": 5}, "up to 5, but the file has 5 channels"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        two_shanks(**changes)


def test_a_probe_without_contacts_is_refused() -> None:
    with pytest.raises(ProbeError, match="no contacts"):
        Probe([], [], [], [])  # type: ignore[arg-type]


def test_millimetres_are_refused_and_the_factor_named() -> None:
    with pytest.raises(ProbeError, match=r"0\.02 apart.*look like mm. Multiply them by 1000"):
        two_shanks(x_um=[0, 0, 0, 0.25, 0.25], y_um=[0, 0.02, 0.04, 0, 0.02])


def test_small_and_flat_probes_are_not_taken_for_millimetres() -> None:
    Probe.from_positions([(0, 0), (3, 0), (6, 0)])  # no extent in y at all
    Probe.from_positions([(0, 0)])
    Probe.from_positions([(0, 0), (0, 0)], shank=[0, 1])  # two wires, each a shank of its own


def test_the_same_place_on_two_shanks_is_legal() -> None:
    assert two_shanks(x_um=[0, 0, 0, 0, 0]).n_channels == 5


def test_select_shanks() -> None:
    probe = two_shanks()
    assert probe.select_shanks(4).chan_map.tolist() == [4, 5]
    assert probe.select_shanks([4, 1]) == probe
    assert probe.select_shanks(np.int64(1)).y_um.tolist() == [0, 20, 40]
    with pytest.raises(ProbeError, match="two has no shank 2; it has 1, 4"):
        probe.select_shanks([1, 2])
    with pytest.raises(ProbeError, match="shank_idx is empty"):
        probe.select_shanks([])


def test_drop_channels_takes_channels_of_the_file() -> None:
    probe = two_shanks()
    left = probe.drop_channels([3, 5])
    assert left.chan_map.tolist() == [0, 1, 4] and left.y_um.tolist() == [0, 20, 0]
    assert probe.drop_channels(3).n_channels == 4
    assert probe.drop_channels([]) == probe
    with pytest.raises(ProbeError, match=r"no contact on channel 2, 9\. .* between 0 and 5"):
        probe.drop_channels([2, 9])
    with pytest.raises(ProbeError, match="names all 5 channels"):
        probe.drop_channels([0, 1, 3, 4, 5])


def test_check_file_names_both_numbers() -> None:
    two_shanks().check_file(6)
    with pytest.raises(ProbeError, match=r"up to 5, but the file has 4 channels \(0 to 3\)"):
        two_shanks().check_file(4)


def test_digest_and_equality_are_of_the_content() -> None:
    probe = two_shanks()
    assert len(probe.digest()) == 64
    assert two_shanks(name="other") == probe and hash(two_shanks(name="other")) == hash(probe)
    assert two_shanks(x_um=[-0.0, 0, 0, 250, 250]).digest() == probe.digest()
    for changes in ({"chan_map": [0, 1, 3, 5, 4]}, {"y_um": [0, 20, 41, 0, 20]}, {"shank": [1, 1, 1, 5, 5]}):
        assert two_shanks(**changes).digest() != probe.digest()
    assert probe != "two"


def test_digest_is_the_same_everywhere() -> None:
    assert Probe.from_positions([(0, 0), (0, 20)]).digest().startswith("53435d3b6d7cf0fe")


def test_a_pickled_probe_is_equal_and_read_only() -> None:
    copy = pickle.loads(pickle.dumps(two_shanks(n_chan_file=6)))
    assert copy == two_shanks(n_chan_file=6)
    assert not copy.x_um.flags.writeable


def test_repr_is_one_line() -> None:
    assert repr(two_shanks()) == "<Probe 'two': 5 channels, 2 shanks>"
