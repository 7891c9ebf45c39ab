"""Decisions of a person, carried to another sort: each rule on spike trains small enough to count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phy_folders as phy
import pytest
from click.testing import CliRunner
from phy_folders import clusters_in, column_in, contents, train, write_folder

from ks4stream import carry_curation, cli
from ks4stream.curation import DIFFERENT, DIVIDED, FEW, TAKEN, TOGETHER, UNHEARD, Carried, CarriedCluster
from ks4stream.errors import CurationWarning, ResultsError, SettingsError
from ks4stream.io.results_folder import ResultsFolder
from ks4stream.report import finish


@pytest.fixture
def old(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the earlier result."""
    return lambda units, **options: write_folder(tmp_path / "old", units, **options)


@pytest.fixture
def new(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the new one."""
    return lambda units, **options: write_folder(tmp_path / "new", units, **options)


def only(carried: Carried) -> CarriedCluster:
    (one,) = carried.clusters
    return one


def by_cluster(carried: Carried) -> dict[int, CarriedCluster]:
    return {one.cluster: one for one in carried.clusters}


# --- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-12, 0, 12])  # 0.4 ms
def test_a_label_goes_to_the_unit_with_the_same_spikes(old, new, shift: int) -> None:
    first = old({0: train(0), 1: train(1), 2: train(2)})
    second = new({0: train(2, shift=shift), 1: train(0, shift=shift), 7: train(1, shift=shift)})
    phy.label(first, group={0: "good", 1: "noise", 2: "my own"})
    carried = carry_curation(first, second)
    assert {one.cluster: one.to for one in carried.clusters} == {0: 1, 1: 7, 2: 0}
    assert column_in(second, "group") == {0: "my own", 1: "good", 7: "noise"}
    assert carried.summary == "3 of 3 decisions carried"


def test_spikes_farther_apart_than_the_tolerance_do_not_match(old, new) -> None:
    first, second = old({0: train(0)}), new({0: train(0, shift=13)})
    phy.label(first, group={0: "good"})
    assert only(carry_curation(first, second)).agreement == 0


def test_half_of_the_spikes_are_enough_and_less_is_not(old, new) -> None:
    first = old({0: train(0, 40), 1: train(1, 40), 2: train(2, 40)})
    second = new({3: train(0, 20), 4: train(1, 18), 5: train(2, 40)})  # 20 / 40, and 18 / 40
    phy.label(first, group={0: "good", 1: "good"})
    before = contents(second)
    carried = carry_curation(first, second, dry_run=True)
    assert contents(second) == before
    half, less = carried.clusters
    assert (half.to, half.agreement) == (3, 0.5)
    assert (less.to, less.agreement, less.why_not, less.detail) == (None, 0.45, DIFFERENT, "best: 4, 0.45")
    assert carried.summary == f"1 of 2 decisions carried; 1 not: {DIFFERENT} (1)"
    carry_curation(first, second)
    assert column_in(second, "group") == {3: "good", 4: "unsorted", 5: "unsorted"}
    carried = carry_curation(first, second, agreement=0.45, over=True)
    assert by_cluster(carried)[1].to == 4


def test_below_one_half_a_unit_goes_to_the_cluster_that_agrees_better(old, new) -> None:
    first = old({0: train(0, 16), 1: train(1, 20)})
    second = new({5: [*train(0, 16), *train(1, 20)]})  # 16 / 36 and 20 / 36
    phy.label(first, group={0: "good", 1: "mua"})
    carried = by_cluster(carry_curation(first, second, agreement=0.3, dry_run=True))
    assert (carried[1].to, carried[0].to, carried[0].why_not) == (5, None, TOGETHER)
    assert carried[0].detail == "cluster 1 in unit 5"


def test_a_unit_that_another_cluster_took_is_named(old, new) -> None:
    first = old({0: train(0, 40), 1: train(1, 20), 2: train(2, 40)})
    second = new({5: [*train(0, 18), *train(1, 20)], 6: train(2, 40)})  # 18 / 60 and 20 / 38
    phy.label(first, group={0: "good"})  # nothing was decided about 1, which the unit is nevertheless
    one = only(carry_curation(first, second, agreement=0.3, dry_run=True))
    assert (one.why_not, one.detail) == (TAKEN, "unit 5 to cluster 1")


def test_other_columns_go_along_and_those_of_sorters_do_not(old, new) -> None:
    first, second = old({0: train(0), 1: train(1)}, label="good"), new({3: train(1), 4: train(0)})
    phy.label(first, notes={0: "drifts, then\tgone"})
    phy.write_table(first / "cluster_mine.csv", {"depth": {1: "deep"}, "checked": {0: "", 1: "2.50"}})
    phy.write_table(first / "cluster_info.tsv", {"fr": {0: "3", 1: "4"}})  # Phy computes it
    phy.label(first, si_unit_id={0: "0", 1: "1"})
    (first / "trials.csv").write_bytes(b"trial,\xe4\n1,2\n")  # of an experiment, not of clusters
    carried = carry_curation(first, second)
    assert [one.values for one in carried.clusters] == [
        {"notes": "drifts, then\tgone"},
        {"depth": "deep", "checked": "2.50"},
    ]
    assert column_in(second, "notes") == {3: "", 4: "drifts, then\tgone"}
    assert column_in(second, "depth") == {3: "deep", 4: ""}
    assert column_in(second, "checked") == {3: "2.50", 4: ""}
    assert {path.name for path in second.glob("cluster_*")} == {
        *("cluster_KSLabel.tsv", "cluster_group.tsv", "cluster_Amplitude.tsv"),
        *("cluster_notes.tsv", "cluster_depth.tsv", "cluster_checked.tsv"),
    }
    assert column_in(second, "KSLabel") == {3: "mua", 4: "mua"}


def test_a_column_that_cannot_name_a_file_is_refused(old, new) -> None:
    first, second = old({0: train(0)}), new({0: train(0)})
    phy.write_table(first / "cluster_mine.csv", {"../../notes": {0: "x"}})
    before = contents(second.parent)
    with pytest.raises(ResultsError, match=r"\.\./notes.*Rename"):
        carry_curation(first, second)
    assert contents(second.parent) == before


# --- merges and splits ----------------------------------------------------------------------------------------


def test_a_merge_is_repeated_as_phy_does_it(old, new) -> None:
    first = old({0: train(0), 1: train(1), 2: train(2)})
    second = new({4: train(1), 5: train(2), 6: train(0, 15)})
    phy.write_table(second / "cluster_Amplitude.tsv", {"Amplitude": {4: "9.0", 5: "7.0", 6: "5.0"}})
    merged = phy.merge(first, 0, 1)
    phy.label(first, group={merged: "good"}, notes={merged: "two halves"})
    templates = (second / "spike_templates.npy").read_bytes()
    one = only(carry_curation(first, second))
    assert (merged, one.merged_from, one.to, one.of_units) == (3, (0, 1), 7, (4, 6))
    assert one.agreement == pytest.approx(35 / 40)
    assert clusters_in(second) == {5: train(2), 7: sorted(train(1) + train(0, 15))}
    assert np.load(second / "spike_clusters.npy").dtype == np.int32
    assert (second / "spike_templates.npy").read_bytes() == templates
    assert column_in(second, "group") == {5: "unsorted", 7: "good"}
    assert column_in(second, "notes") == {5: "", 7: "two halves"}
    assert column_in(second, "KSLabel") == {5: "mua", 7: "mua"}
    assert column_in(second, "Amplitude") == {5: "7.0", 7: "9.0"}, "that of the larger part"


def test_a_merge_without_a_label_is_repeated_too(old, new) -> None:
    first, second = old({0: train(0), 1: train(1)}), new({0: train(0), 1: train(1)})
    phy.merge(first, 0, 1)
    assert only(carry_curation(first, second)).to == 2
    assert list(clusters_in(second)) == [2]
    assert column_in(second, "group") == {2: "unsorted"}


def test_units_are_merged_only_where_a_person_merged_some(old, new) -> None:
    first = old({0: train(0, 20)})
    second = new({0: train(0, 12), 1: train(0, 8, first=12)})
    phy.label(first, group={0: "good"})
    one = only(carry_curation(first, second))
    assert (one.to, one.agreement) == (0, 0.6)
    assert list(clusters_in(second)) == [0, 1]


def test_a_cluster_that_became_several_units_is_listed_with_these(old, new) -> None:
    first = old({0: train(0, 40), 1: train(1, 40)})
    second = new({3: train(0, 18), 4: train(0, 18, first=18), 5: train(1, 40)})
    phy.label(first, group={0: "good"})
    one = only(carry_curation(first, second))
    assert (one.to, one.why_not, one.detail) == (None, DIVIDED, "units 3 and 4, together 0.90")


def test_what_the_new_sort_merged_itself_only_gets_the_label(old, new) -> None:
    first, second = old({0: train(0), 1: train(1)}), new({5: sorted(train(0) + train(1)), 6: train(2)})
    phy.label(first, group={phy.merge(first, 0, 1): "good"})
    one = only(carry_curation(first, second))
    assert (one.to, one.of_units, one.agreement) == (5, (), 1.0)
    assert list(clusters_in(second)) == [5, 6]


def test_units_that_add_more_other_spikes_than_shared_ones_are_not_merged(old, new) -> None:
    first = old({0: train(0), 1: train(1)})
    second = new({0: train(0), 1: [*train(1, 8), *train(5, 12)], 2: train(1, 12, first=8)})
    phy.label(first, group={phy.merge(first, 0, 1): "good"})
    one = only(carry_curation(first, second))
    assert one.of_units == (0, 2) and one.agreement == pytest.approx(32 / 40)
    assert set(clusters_in(second)) == {1, 3}


def test_units_with_the_same_spikes_twice_are_not_merged(old, new) -> None:
    """Each of both coincides with the cluster, but together they have twice its spikes."""
    first = old({0: train(0, 18), 1: train(1, 2)})
    second = new({0: train(0, 18), 1: train(0, 18, shift=3)})
    phy.label(first, group={phy.merge(first, 0, 1): "good"})
    one = only(carry_curation(first, second))
    assert (one.to, one.of_units, one.agreement) == (0, (), 0.9)


def test_units_that_were_merged_for_a_cluster_go_to_no_other(old, new) -> None:
    """Cluster 2, which nobody merged, has the same spikes and agrees better with both units together."""
    first = old({0: train(0, 16), 1: train(1, 16), 2: [*train(0, 20, shift=2), *train(1, 20, shift=2)]})
    second = new({4: train(0, 20), 5: train(1, 20)})
    phy.label(first, group={phy.merge(first, 0, 1): "good", 2: "mua"})
    carried = by_cluster(carry_curation(first, second))
    assert (carried[3].to, carried[3].of_units, carried[3].agreement) == (6, (4, 5), 0.8)
    assert (carried[2].to, carried[2].why_not) == (None, TOGETHER)
    assert column_in(second, "group") == {6: "good"}


def test_of_units_with_the_same_spikes_the_largest_is_merged(old, new) -> None:
    first = old({0: train(0, 36), 1: train(1, 12)})
    second = new({0: train(0, 16, shift=3), 1: [*train(0, 36), 500], 2: train(1, 12)})
    phy.label(first, group={phy.merge(first, 0, 1): "good"})
    one = only(carry_curation(first, second))
    assert one.of_units == (1, 2) and one.agreement == pytest.approx(48 / 49)
    assert list(clusters_in(second)) == [0, 3]


def test_units_are_not_merged_where_one_alone_agrees_better(old, new) -> None:
    first = old({0: train(0, 30), 1: train(1, 30)})
    others = [*train(7, 27), *train(8, 27), *train(9, 9)]
    second = new({5: [*train(0, 30), *train(1, 30), *others], 6: train(0, 12), 7: train(1, 15)})
    phy.merge(first, 0, 1)
    one = only(carry_curation(first, second, agreement=0.4))
    assert (one.to, one.of_units) == (5, ()), "60 / 123, and 27 / 60 of both others together"


def test_units_that_together_agree_too_little_are_not_merged(old, new) -> None:
    first = old({0: train(0, 30), 1: train(1, 30)})
    second = new({0: train(0, 12), 1: train(1, 15), 2: train(5, 30)})
    phy.merge(first, 0, 1)
    one = only(carry_curation(first, second))
    assert (one.to, one.why_not, one.detail) == (None, DIFFERENT, "best: 1, 0.25")
    assert list(clusters_in(second)) == [0, 1, 2]


def test_a_unit_is_merged_once(old, new) -> None:
    """Two clusters with the same spikes, both merged."""
    first = old({0: train(0), 1: train(1), 2: train(0, shift=2), 3: train(1, shift=2)})
    second = new({0: train(0), 1: train(1)})
    phy.label(first, group={phy.merge(first, 0, 1): "good", phy.merge(first, 2, 3): "mua"})
    carried = by_cluster(carry_curation(first, second))
    assert (carried[4].of_units, carried[5].to) == ((0, 1), None)
    assert column_in(second, "group") == {2: "good"}


def test_a_new_number_may_be_that_of_a_unit_without_spikes(old, new) -> None:
    """Phy counts from the last cluster that has spikes; what the tables say of the empty one is not kept."""
    units = {0: train(0), 1: train(1)}
    first, second = old(units), new(units)
    phy.write_table(second / "cluster_Amplitude.tsv", {"Amplitude": {2: "99.0"}})
    phy.merge(first, 0, 1)
    assert only(carry_curation(first, second)).to == 2
    assert column_in(second, "Amplitude") == {} and column_in(second, "KSLabel") == {2: "mua"}


def test_two_merges_get_two_numbers(old, new) -> None:
    units = {unit: train(unit) for unit in range(5)}
    first, second = old(units), new(units)
    phy.merge(first, 3, 1), phy.merge(first, 0, 4)
    carried = carry_curation(first, second)
    assert {one.cluster: (one.to, one.of_units) for one in carried.clusters} == {5: (5, (1, 3)), 6: (6, (0, 4))}
    assert clusters_in(second) == clusters_in(first)


def test_templates_of_other_sorters_may_differ_within_a_unit(old, new) -> None:
    """Such a unit, which has the number of one of its templates, is not a merge; a new number is one."""
    units = {unit: train(unit) for unit in range(4)}
    first, second = old(units), new(units)
    (first / "spike_detection_templates.npy").unlink()
    clusters = np.load(first / "spike_clusters.npy")
    clusters[clusters == 1] = 0
    np.save(first / "spike_clusters.npy", clusters)
    merged = phy.merge(first, 2, 3)
    assert {one.cluster: one.merged_from for one in carry_curation(first, second).clusters} == {merged: (2, 3)}


def test_a_split_is_kept_where_the_new_sort_has_two_units(old, new) -> None:
    first = old({0: train(0, 20), 1: train(1)})
    second = new({0: train(0, 10), 1: train(0, 10, first=10), 2: train(1)})
    one, other = phy.split(first, 0, 10_000)
    phy.label(first, group={one: "good", other: "noise"})
    carried = carry_curation(first, second)
    assert {one.cluster: (one.to, one.split_from) for one in carried.clusters} == {2: (0, (3,)), 3: (1, (2,))}
    assert column_in(second, "group") == {0: "good", 1: "noise", 2: "unsorted"}


@pytest.mark.parametrize(("n_off", "is_carried"), [(2, True), (3, False)])
def test_of_a_split_that_the_new_sort_does_not_have_the_label_of_most_spikes_is_carried(
    old, new, n_off: int, is_carried: bool
) -> None:
    """If at most a tenth of them had been split off; otherwise, the label was given to something else."""
    first, second = old({0: train(0, 20)}), new({4: train(0, 20)})
    large, small = phy.split(first, 0, 1000 * (20 - n_off))
    phy.label(first, group={large: "good", small: "noise"})
    before = contents(second)
    carried = by_cluster(carry_curation(first, second))
    assert (carried[small].to, carried[small].why_not) == (None, TOGETHER)
    assert carried[small].detail == f"cluster {large} in unit 4"
    if is_carried:
        assert (carried[large].to, carried[large].detail) == (4, f"with the spikes of cluster {small}")
        assert column_in(second, "group") == {4: "good"}
    else:
        assert (carried[large].to, carried[large].why_not) == (None, TOGETHER)
        assert carried[large].agreement == 0.85 and contents(second) == before


@pytest.mark.parametrize(("n_off", "is_merged"), [(4, True), (6, False)])
def test_a_cluster_that_was_merged_and_then_split(old, new, n_off: int, is_merged: bool) -> None:
    """The new sort has the units from before, of which the merge would bring together what was split off again."""
    units = {0: train(0, 20), 1: train(1, 20), 2: train(2, 20)}
    first, second = old(units), new(units)
    large, small = phy.split(first, phy.merge(first, 0, 1), 1000 * (20 - n_off // 2))
    phy.label(first, group={2: "good", large: "good", small: "noise"})
    carried = by_cluster(carry_curation(first, second))
    assert carried[2].to == 2 and carried[small].to is None
    assert carried[large].of_units == ((0, 1) if is_merged else ())
    assert list(clusters_in(second)) == ([2, 3] if is_merged else [0, 1, 2])


@pytest.mark.parametrize("before", [15_000, 19_000])
def test_a_lost_split_without_labels_is_not_carried_at_all(old, new, before: int) -> None:
    first, second = old({0: train(0, 20)}), new({4: train(0, 20)})
    phy.split(first, 0, before)
    there = contents(second)
    carried = carry_curation(first, second)
    assert [one.why_not for one in carried.clusters] == [TOGETHER, TOGETHER]
    assert contents(second) == there, "nothing was carried, so nothing is written"


def test_units_that_are_one_in_the_new_sort_are_named(old, new) -> None:
    first = old({0: train(0), 1: train(1, 6), 2: train(2)})
    second = new({4: [*train(0), *train(1, 6)], 5: train(2)})
    phy.label(first, group={0: "good", 1: "mua"})
    carried = by_cluster(carry_curation(first, second))
    assert (carried[0].to, carried[0].outcome) == (4, "carried; with the spikes of cluster 1")
    assert (carried[1].to, carried[1].why_not, carried[1].detail) == (None, TOGETHER, "cluster 0 in unit 4")


# --- recordings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_longer", [True, False])
def test_only_the_time_that_both_sorts_cover_counts(old, new, is_longer: bool) -> None:
    short, long = {0: train(0, 20), 1: train(1, 20)}, {0: train(0, 90), 1: train(1, 90), 2: train(2, 50, first=40)}
    first, second = (old(short), new(long)) if is_longer else (old(long), new(short))
    phy.label(first, group={0: "good", 1: "mua"} | ({} if is_longer else {2: "good"}))
    carried = by_cluster(carry_curation(first, second))
    assert {one: carried[one].to for one in (0, 1)} == {0: 0, 1: 1}
    assert carried[0].agreement >= 0.95
    if not is_longer:
        assert (carried[2].to, carried[2].why_not, carried[2].agreement) == (None, UNHEARD, 0.0)


def test_few_spikes_that_coincide_are_no_agreement(old, new) -> None:
    """The new sort is of a short part, in which 2 of 32 spikes of a cluster are, and a unit has 1."""
    first = old({0: train(0, 90), 1: [5040, 6040, *train(1, 30, first=50)], 2: train(2, 9), 3: train(3, 9)})
    second = new({0: train(0, 40), 4: [6040], 5: train(2, 9), 6: train(3, 8)})
    phy.label(first, group={0: "good", 1: "noise", 2: "mua", 3: "noise"})
    carried = by_cluster(carry_curation(first, second))
    assert carried[0].to == 0 and (carried[0].n_spikes, carried[0].n_compared) == (90, 40)
    one = carried[1]
    assert (one.to, one.n_spikes, one.n_compared, one.agreement) == (None, 32, 2, 0.5)
    assert (one.why_not, one.detail) == (FEW, "unit 4 has 1 of 2")
    assert (carried[2].to, carried[2].why_not, carried[2].detail) == (None, FEW, "unit 5 has 9 of 9")
    assert column_in(second, "group") == {0: "good", 4: "unsorted", 5: "unsorted", 6: "unsorted"}


def test_few_spikes_that_coincide_with_those_of_another_unit_are_not_within_it(old, new) -> None:
    first = old({0: train(0, 90), 1: [3002, *train(1, 30, first=50)]})
    second = new({0: train(0, 40)})
    phy.label(first, group={0: "good", 1: "noise"})
    carried = by_cluster(carry_curation(first, second))
    assert carried[0].outcome == "carried"
    assert (carried[1].why_not, carried[1].detail) == (FEW, "unit 0 has 1 of 1")


def test_ten_spikes_are_enough(old, new) -> None:
    units = {0: train(0), 1: train(1, 10)}
    first, second = old(units), new(units)
    phy.label(first, group={1: "good"})
    assert only(carry_curation(first, second)).to == 1


def test_a_unit_of_which_only_few_spikes_were_compared_is_not_merged(old, new) -> None:
    """The earlier sort is of a short part, in which 1 of 50 spikes of a unit is."""
    first = old({0: train(0), 1: train(1), 2: [1080], 3: train(3)})
    second = new({0: train(0), 1: train(1), 2: [1080, *train(2, 49, first=40)], 3: train(3, 90)})
    phy.label(first, group={phy.merge(first, 0, 1, 2): "good"})
    one = only(carry_curation(first, second))
    assert one.of_units == (0, 1) and one.agreement == pytest.approx(40 / 41)
    assert list(clusters_in(second)) == [2, 3, 4]


def test_another_sampling_rate_is_another_recording(old, new) -> None:
    first, second = old({0: train(0)}), new({0: train(0)}, rate_hz=25_000.0)
    phy.label(first, group={0: "good"})
    with pytest.raises(ResultsError, match=r"30000 Hz.*25000 Hz.*same recording"):
        carry_curation(first, second)


def digest(folder: Path, text: str) -> None:
    (folder / "sorting.zarr").mkdir()
    (folder / "sorting.zarr" / ".zattrs").write_text(
        f'{{"values": {{"provenance": {{"recording_digest": "{text}"}}}}}}'
    )


def test_another_digest_is_another_recording_unless_spikes_agree(old, new) -> None:
    """A longer or converted recording has another digest, too."""
    first, second = old({0: train(0), 1: train(1)}), new({0: train(0), 1: train(9)})
    phy.label(first, group={1: "good"})
    digest(first, "a"), digest(second, "b")
    assert only(carry_curation(first, second)).why_not == DIFFERENT
    np.save(second / "spike_times.npy", np.load(second / "spike_times.npy") + 500)
    with pytest.raises(ResultsError, match=r"different recordings.* 0\.00"):
        carry_curation(first, second)
    (second / "sorting.zarr" / ".zattrs").write_text("{}")
    assert only(carry_curation(first, second)).why_not == DIFFERENT


def test_empty_results_are_results(old, new) -> None:
    first, second = old({0: train(0)}), new({})
    phy.label(first, group={0: "good"})
    assert only(carry_curation(first, second)).why_not == UNHEARD


# --- what is refused ------------------------------------------------------------------------------------------


def test_results_that_nobody_curated_are_refused(old, new) -> None:
    first, second = old({0: train(0)}), new({0: train(0)})
    phy.label(first, group={0: "unsorted"})  # which is Phy's word for no label
    with pytest.raises(ResultsError, match=r"was not curated.*curated results first"):
        carry_curation(first, second)


DECISIONS = {
    "label": lambda folder: phy.label(folder, group={2: "mua"}),
    "note": lambda folder: phy.label(folder, notes={2: "x"}),
    "merge": lambda folder: phy.merge(folder, 1, 2),
    "split": lambda folder: phy.split(folder, 2, 10_000),
}


@pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS)
def test_a_curation_is_replaced_only_when_asked(old, new, decide: Callable[[Path], Any]) -> None:
    units = {unit: train(unit) for unit in range(3)}
    first, second = old(units), new(units)
    phy.label(first, group={0: "good"})
    decide(second)
    before = contents(second)
    with pytest.raises(ResultsError, match=r"has already been curated.*(group|notes|merged or split).*--over"):
        carry_curation(first, second)
    assert contents(second) == before
    assert only(carry_curation(first, second, over=True)).to == 0


def test_tables_of_programs_are_no_curation_and_stay_as_they_are(old, new) -> None:
    units = {unit: train(unit) for unit in range(3)}
    first, second = old(units), new(units)
    for folder, value in ((first, "0.125"), (second, "2.5e-1")):
        phy.label(folder, l_ratio={0: value, 1: value, 2: "nan"}, bc_unitType={0: value, 1: "GOOD", 2: "MUA"})
    phy.label(second, l_ratio={0: "2.5e-1"})
    with pytest.raises(ResultsError, match=r"was not curated"):
        carry_curation(second, first)
    phy.label(first, group={0: "good", 1: "mua"})
    carried = carry_curation(first, second)
    assert [(one.cluster, one.to) for one in carried.clusters] == [(0, 0), (1, 1)]
    assert column_in(second, "group") == {0: "good", 1: "mua", 2: "unsorted"}
    assert column_in(second, "l_ratio") == {0: "2.5e-1", 1: "0.125", 2: ""}
    assert column_in(second, "bc_unitType") == {0: "2.5e-1", 1: "GOOD", 2: "MUA"}


def test_over_another_curation_the_rest_stays(old, new) -> None:
    units = {unit: train(unit) for unit in range(4)}
    first, second = old(units), new(units)
    phy.label(first, group={0: "good", 1: "noise"})
    merged = phy.merge(second, 2, 3)
    phy.label(second, group={1: "good", merged: "mua"}, notes={0: "mine"})
    carry_curation(first, second, over=True)
    assert column_in(second, "group") == {0: "good", 1: "noise", merged: "mua"}
    assert column_in(second, "notes")[0] == "mine" and list(clusters_in(second)) == [0, 1, merged]


def test_what_was_replaced_is_listed(old, new) -> None:
    units = {unit: train(unit) for unit in range(5)}
    first, second = old(units), new(units)
    phy.label(first, group={0: "good", 1: "mua", phy.merge(first, 3, 4): "noise"}, notes={2: "theirs"})
    phy.label(second, group={0: "mua", 1: "mua", 2: "mua", 3: "good", 4: "mua"}, notes={2: "mine", 3: "a", 4: "b"})
    carried = by_cluster(carry_curation(first, second, over=True, dry_run=True))
    assert {one: carried[one].replaced for one in carried} == {
        0: {"group": "mua"},
        1: {},
        2: {"notes": "mine"},
        5: {"group": "good and mua", "notes": "b"},
    }
    carry_curation(first, second, over=True)
    assert column_in(second, "notes") == {0: "", 1: "", 2: "theirs", 5: "a"}
    outcomes = column_in(second, "outcome", "carried.tsv")
    assert outcomes == {
        0: "carried; replaced mua",
        1: "carried",
        2: "carried; replaced notes: mine",
        5: "carried, merged from 3 and 4; replaced good and mua, notes: b",
    }


def test_a_folder_is_not_carried_to_itself(old) -> None:
    first = old({0: train(0)})
    phy.label(first, group={0: "good"})
    with pytest.raises(ResultsError, match="given twice"):
        carry_curation(first, f"{first}/", over=True)


@pytest.mark.parametrize("agreement", [0, -1, 1.1, float("nan")])
def test_an_agreement_out_of_range_is_refused(old, new, agreement: float) -> None:
    with pytest.raises(SettingsError, match="agreement="):
        carry_curation(old({0: train(0)}), new({0: train(0)}), agreement=agreement)


# --- the folder afterwards ------------------------------------------------------------------------------------


def test_the_list_of_decisions_is_no_table_of_clusters(old, new) -> None:
    """Phy and SpikeInterface take every table with a column cluster_id as columns of clusters."""
    first, second = old({0: train(0), 1: train(1)}), new({0: train(0), 1: train(9)})
    phy.label(first, group={0: "good", 1: "mua"})
    carry_curation(first, second)
    assert (second / "carried.tsv").read_text().splitlines() == [
        "old_cluster\tspikes\tcompared\tdecision\tnew_cluster\tagreement\toutcome",
        "0\t20\t20\tgood\t0\t1.00\tcarried",
        f"1\t20\t20\tmua\t\t0.00\tnot carried: {DIFFERENT} (best: 0, 0.00)",
    ]
    assert not [path for path in second.iterdir() if path.name.startswith(".ks4stream")]


def test_what_phy_remembers_of_the_new_results_is_put_away(old, new) -> None:
    """Its cache has the number that the next cluster would have, and its summary would hide the new labels."""
    units = {0: train(0), 1: train(1)}
    first, second = old(units), new(units)
    phy.merge(first, 0, 1)
    (second / ".phy").mkdir()
    (second / ".phy" / "new_cluster_id.pkl").write_bytes(b"2")
    phy.write_table(second / "cluster_info.tsv", {"fr": {0: "1", 1: "2"}})
    carry_curation(first, second)
    assert not (second / ".phy").exists() and (second / ".phy-1" / "new_cluster_id.pkl").read_bytes() == b"2"
    assert not (second / "cluster_info.tsv").exists()


@pytest.fixture
def sort(make_sorting, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a sorting as a sort does, without plots."""
    monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: None)

    def sort(folder: Path, **changes: Any) -> Path:
        finish(make_sorting(**changes), ResultsFolder.open(folder))
        return folder

    return sort


def renumbered(unit: np.ndarray, order: list[int]) -> np.ndarray:
    return np.array(order, np.int32)[unit]


def test_a_real_result_is_carried_and_counts_as_curated(sort, make_sorting, tmp_path: Path) -> None:
    """A sort into the folder that was curated moves it aside, and says how to get the curation back."""
    load_model = pytest.importorskip("phylib.io.model").load_model
    folder, unit = sort(tmp_path / "kilosort4"), make_sorting().unit
    kept = make_sorting().kept
    merged = phy.merge(folder, 0, 3)
    phy.label(folder, group={1: "good", merged: "mua"}, notes={2: "look again"})
    with pytest.warns(CurationWarning, match=r"ks4stream carry .*kilosort4-1 .*kilosort4"):
        sort(folder, unit=renumbered(unit, [3, 0, 2, 1]), score=np.full(400, 9.0))
    aside = tmp_path / "kilosort4-1"
    assert ResultsFolder.open(folder).somebodys() == []
    carried = carry_curation(aside, folder)
    assert {one.cluster: (one.to, one.of_units) for one in carried.clusters} == {1: (0, ()), 2: (2, ()), 4: (4, (1, 3))}
    expected = renumbered(unit, [4, 0, 2, 4])[kept]
    assert np.array_equal(np.load(folder / "spike_clusters.npy"), expected)
    model = load_model(folder / "params.py")
    try:
        assert np.array_equal(model.spike_clusters, expected)
        assert model.metadata["group"] == {0: "good", 2: "unsorted", 4: "mua"}
        assert model.metadata["notes"] == {2: "look again"}
        assert set(model.metadata["KSLabel"]) == set(model.metadata["reason"]) == {0, 2, 4}
        assert model.get_cluster_spikes(4).size == (expected == 4).sum()
        assert model.get_cluster_mean_waveforms(4) is not None
    finally:
        model.close()
    assert "spike_clusters.npy" in ResultsFolder.open(folder).somebodys()
    with pytest.warns(CurationWarning, match="moved to"):
        sort(folder, n_units=3)
    assert (tmp_path / "kilosort4-2" / "carried.tsv").exists() and not (folder / "carried.tsv").exists()
    assert np.array_equal(np.load(tmp_path / "kilosort4-2" / "spike_clusters.npy"), expected)


def test_a_full_disk_leaves_the_new_results_as_they_were(old, new, monkeypatch: pytest.MonkeyPatch) -> None:
    units = {0: train(0), 1: train(1)}
    first, second = old(units), new(units)
    phy.label(first, group={phy.merge(first, 0, 1): "good"})
    before = contents(second)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ks4stream.io.curation.save_stream", full)
    with pytest.raises(ResultsError, match="cannot be written to: No space left"):
        carry_curation(first, second)
    assert contents(second) == before


@pytest.mark.parametrize("n_written", range(6))
def test_a_call_that_failed_halfway_can_be_repeated(
    old, new, n_written: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    units = {unit: train(unit) for unit in range(4)}
    first, second, whole = old(units), new(units), write_folder(tmp_path / "whole", units)
    phy.label(first, group={3: "mua", phy.merge(first, 0, 1): "good"}, notes={2: "mine"})
    carry_curation(first, whole)
    phy.write_table(second / "cluster_info.tsv", {"fr": {0: "3", 1: "4"}})
    before, install, names = contents(second), ResultsFolder._install, []

    def refused(self: ResultsFolder, entry: Path, about: Any) -> Any:
        names.append(entry.name)
        if len(names) > n_written:
            raise PermissionError(13, "Permission denied")
        return install(self, entry, about)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "_install", refused)
        with pytest.raises(ResultsError, match=r"Permission denied.*repeat the call, with --over") as raised:
            carry_curation(first, second)
    assert "results_dir" not in str(raised.value)
    if not n_written:
        assert contents(second) == before and names == ["spike_clusters.npy"]
    carry_curation(first, second, over=n_written > 0)
    assert clusters_in(second) == clusters_in(whole)
    for name in ("group", "KSLabel", "Amplitude", "notes"):
        assert column_in(second, name) == column_in(whole, name)
    assert not (second / "cluster_info.tsv").exists()


# --- the command line -----------------------------------------------------------------------------------------


def test_the_command_shows_what_became_of_each_decision(old, new) -> None:
    first, second = old({0: train(0), 1: train(1)}), new({3: train(0), 4: train(9)})
    phy.label(first, group={0: "good", 1: "noise"})
    before = contents(second)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.main, ["carry", str(first), str(second), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert f"1 of 2 decisions carried; 1 not: {DIFFERENT} (1); nothing was written" in shown.output
    assert "old cluster" in shown.output and "noise" in shown.output
    assert contents(second) == before
    done = CliRunner().invoke(cli.main, ["carry", str(first), str(second)])
    assert done.exit_code == 0 and done.output.endswith("(1)\n")
    assert column_in(second, "group") == {3: "good", 4: "unsorted"}
    again = CliRunner().invoke(cli.main, ["carry", str(first), str(second)])
    assert again.exit_code == 1 and "--over" in again.output
    assert CliRunner().invoke(cli.main, ["carry", str(first), str(second), "--over"]).exit_code == 0
    assert CliRunner().invoke(cli.main, ["carry", str(first), str(second), "--agreement", "1.5"]).exit_code == 2
