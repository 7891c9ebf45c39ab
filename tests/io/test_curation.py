"""What is read from a results folder that Phy has changed, whoever wrote it, and what is not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phy_folders as phy
import pytest
from phy_folders import contents, train, write_folder

from ks4stream.curation import carry_curation
from ks4stream.errors import ResultsError
from ks4stream.io import curation
from ks4stream.io.curation import read_curation, write_curation
from ks4stream.io.places import ObjectPath, read_whole
from ks4stream.io.results_folder import ResultsFolder

UNITS = {0: train(0), 1: train(1, 5), 2: train(2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "kilosort4", UNITS)


def read(folder: Path) -> curation.CuratedFolder:
    return read_curation(folder, folder.parent / "scratch")


@pytest.mark.parametrize("n_at_once", [7, 1 << 20])
def test_clusters_know_the_units_that_they_were_made_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, n_at_once: int
) -> None:
    monkeypatch.setattr(curation, "_ROWS_AT_ONCE", n_at_once)
    merged = phy.merge(folder, 0, 1)
    parts = phy.split(folder, 2, 8000)
    found = read(folder)
    assert found.units == {merged: (0, 1), parts[0]: (2,), parts[1]: (2,)}
    assert found.n_spikes == {merged: 25, parts[0]: 8, parts[1]: 12}
    assert found.merged(merged) == (0, 1) and found.merged(parts[0]) == ()
    assert found.split(parts[0]) == {parts[1]} and found.split(merged) == set()
    assert found.sampling_rate_hz == 30_000 and found.recording_digest == ""


def test_labels_and_columns_of_a_person_are_told_from_those_of_a_sorter(folder: Path) -> None:
    assert [read(folder).decided(unit) for unit in UNITS] == [{}, {}, {}]
    phy.label(folder, group={0: "good", 1: "unsorted"}, quality={1: "best"})
    found = read(folder)
    assert [found.decided(unit) for unit in UNITS] == [{"group": "good"}, {"quality": "best"}, {}]
    assert found.columns["KSLabel"] == {0: "mua", 1: "mua", 2: "mua"}


def test_quality_metrics_are_nobodys_decision_also_as_phy_saves_them(folder: Path) -> None:
    (folder / "quality.csv").write_text("cluster_id,snr,firing_rate\n0,4.5,2\n1,3,1\n2,8,\n")
    phy.write_table(folder / "cluster_snr.tsv", {"snr": {0: "4.5", 1: "3", 2: "8"}})
    assert [read(folder).decided(unit) for unit in UNITS] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("values", "is_measured"),
    [
        (["0.5", "2", ""], True),
        (["3.0", "2.0", "nan"], True),
        (["1e-3", "4", "5"], True),
        (["-inf", "4", "5"], True),
        (["3", "1", "-2"], False),  # a person's rating
        (["0.5", "2", "deep"], False),
        (["", "", ""], False),
    ],
)
def test_columns_of_measurements_are_known_by_their_numbers(folder: Path, values: list[str], is_measured: bool) -> None:
    phy.label(folder, mine=dict(enumerate(values)))
    found = read(folder)
    assert ("mine" in found.measured) == is_measured
    assert [found.is_decided(unit) for unit in UNITS] == [bool(value) and not is_measured for value in values]
    assert [found.decided(unit) for unit in UNITS] == [{"mine": value} if value else {} for value in values]


def test_a_column_in_two_tables_is_read_from_the_one_of_phy(folder: Path) -> None:
    phy.label(folder, quality={0: "Phy's"})
    phy.write_table(folder / "zzz.tsv", {"quality": {0: "another"}, "more": {0: "x"}})
    assert read(folder).decided(0) == {"quality": "Phy's", "more": "x"}


def test_a_folder_of_another_time_is_read(folder: Path) -> None:
    """Columns of unsigned numbers, no clusters before Phy was first opened, and tables as pandas writes them."""
    for name, kind in (("spike_times", np.uint64), ("spike_templates", np.uint32)):
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy").astype(kind)[:, None])
    (folder / "spike_clusters.npy").unlink()
    (folder / "params.py").write_text("dat_path = r'C:\\rec.bin'\nsample_rate = 25000.\nhp_filtered = False\n")
    (folder / "cluster_notes.csv").write_bytes('\ufeff"",cluster_id,notes\r\n0,1.0,"a, b"\r\n1,2.0,\r\n\r\n'.encode())
    found = read(folder)
    assert found.n_spikes == {0: 20, 1: 5, 2: 20} and found.sampling_rate_hz == 25_000
    assert found.sample.shape == (45,)
    assert found.decided(1) == {"notes": "a, b"} and found.decided(2) == {}


def early(folder: Path) -> None:
    """As early versions of Kilosort4 wrote it: each unit has spikes of two of ten templates, numbered otherwise."""
    (folder / "spike_detection_templates.npy").unlink()
    unit = np.load(folder / "spike_clusters.npy")
    np.save(folder / "spike_templates.npy", (np.array([7, 3, 1])[unit] + np.arange(len(unit)) % 2).astype(np.int32))
    np.save(folder / "templates.npy", np.zeros((3, 2, 2), np.float32))


def test_detection_templates_of_early_kilosort4_are_no_merges(folder: Path) -> None:
    early(folder)
    found = read(folder)
    assert found.units == {0: (0,), 1: (1,), 2: (2,)}
    phy.label(folder, group={1: "good"})
    assert [one.cluster for one in carry_curation(folder, write_folder(folder.parent / "new", UNITS)).clusters] == [1]


def test_merges_and_splits_of_early_kilosort4_are_known_by_their_numbers(folder: Path) -> None:
    early(folder)
    parts = phy.split(folder, 2, 8000)
    found = read(folder)
    assert found.units == {0: (0,), 1: (1,)} | dict.fromkeys(parts, (2,))
    assert found.split(parts[0]) == {parts[1]} and found.split(0) == found.split(1) == set()
    merged = phy.merge(folder, 0, parts[0])
    found = read(folder)
    assert found.merged(merged) == (0, 2) and found.merged(1) == ()


def test_in_older_sorts_a_new_number_may_be_that_of_a_unit_without_spikes(folder: Path) -> None:
    (folder / "spike_detection_templates.npy").unlink()
    np.save(folder / "templates.npy", np.zeros((9, 2, 2), np.float32))
    merged = phy.merge(folder, 0, 2)
    assert read(folder).units == {1: (1,), merged: (0, 2)}


def test_large_columns_are_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "LARGE_MAP_BYTES", 100)
    phy.merge(folder, 0, 1)
    found = read(folder)
    assert isinstance(found.sample.base, np.memmap)
    write_curation(found, {}, "", {3: 9})
    assert list(phy.clusters_in(folder)) == [2, 9]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are not listed here")
@pytest.mark.parametrize("held_bytes", [100, 1 << 20])
def test_the_clusters_are_not_mapped_from_the_file_that_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    monkeypatch.setattr(curation, "LARGE_MAP_BYTES", 100)
    monkeypatch.setattr("ks4stream.io.mapped.HELD_BYTES", held_bytes)
    merged = phy.merge(folder, 0, 1)
    found = read(folder)
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "spike_times.npy") in maps and str(folder / "spike_clusters.npy") not in maps
    assert np.array_equal(found.cluster, np.load(folder / "spike_clusters.npy")) and merged in found.cluster


# --- what is refused ------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("bang",)


def pickled(folder: Path) -> None:
    np.save(folder / "spike_clusters.npy", np.array([Bomb()], object), allow_pickle=True)


def an_archive(folder: Path) -> None:
    with (folder / "spike_times.npy").open("wb") as file:
        np.savez(file, a=np.arange(3))


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


DAMAGED = {
    "no times": (lambda folder: (folder / "spike_times.npy").unlink(), "not a results folder.*spike_times.npy"),
    "no parameters": (lambda folder: (folder / "params.py").unlink(), "not a results folder.*params.py"),
    "pickled": (pickled, "spike_clusters.npy cannot be read"),
    "an archive": (an_archive, "spike_times.npy is damaged"),
    "cut short": (lambda folder: os.truncate(folder / "spike_times.npy", 200), "spike_times.npy cannot be read"),
    "one number": (changed("spike_times", lambda _: np.array(3)), "spike_times.npy is damaged"),
    "pairs": (changed("spike_times", lambda t: np.column_stack([t, t])), "spike_times.npy is damaged"),
    "seconds": (changed("spike_times", lambda t: t / 30_000), "spike_times.npy is damaged"),
    "descending": (changed("spike_times", lambda t: t[::-1]), "not ascending"),
    "other spikes": (changed("spike_clusters", lambda c: c[:-1]), "45 spikes, spike_clusters.npy 44"),
    "negative": (changed("spike_clusters", lambda c: c - 1), "spike_clusters.npy is damaged"),
    "huge": (changed("spike_clusters", lambda c: c.astype(np.int64) + (1 << 31)), "spike_clusters.npy is damaged"),
    "templates": (
        lambda folder: (
            (folder / "spike_detection_templates.npy").unlink(),
            (folder / "templates.npy").write_bytes(b""),
        ),
        "templates.npy cannot be read",
    ),
    "no rate": (text("params.py", "dat_path = []\n"), "no sample_rate"),
    "code": (text("params.py", "import os\nsample_rate = os.mkdir('bang') or 3e4\n"), "cannot be read as Phy's"),
    "no code": (text("params.py", "sample_rate = = 3\n"), "cannot be read as Phy's"),
    "nested": (text("params.py", f"sample_rate = {'-' * 99_999}3\n"), "cannot be read as Phy's"),
    "table": (text("cluster_group.tsv", "cluster_id\tgroup\nseven\tgood\n"), "cluster_group.tsv is not a table of"),
    "no whole number": (text("a.csv", "cluster_id,x\n1.5,good\n"), "1.5 is not a cluster"),
    "infinite": (text("a.csv", "cluster_id,x\ninf,good\n"), "is not a table of clusters"),
    "no text": (text("a.csv", b"cluster_id,x\n1,\xff\n"), "a.csv cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_read_is_said_and_nothing_is_run(
    folder: Path, damage: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    damage(folder)
    with pytest.raises(ResultsError, match=message):
        read(folder)
    assert not Path("bang").exists()


def test_a_table_of_any_size_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "_MAX_TEXT_BYTES", 1 << 20)
    with (folder / "cluster_group.tsv").open("ab") as file:
        file.truncate(2 << 20)
    with pytest.raises(ResultsError, match=r"cluster_group\.tsv is larger than 1 MiB"):
        read(folder)


@pytest.mark.parametrize("address", ["https://example.org/sorted", "/nowhere/kilosort4"])
def test_where_there_is_no_folder_is_said(folder: Path, address: str) -> None:
    with pytest.raises(ResultsError, match=r"Nothing can be written|not a results folder"):
        carry_curation(address, folder)


# --- what is written ------------------------------------------------------------------------------------------


def test_a_kill_in_between_leaves_each_file_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install, names = ResultsFolder._install, []

    def killed(self: ResultsFolder, entry: Path, about: Any) -> Any:
        names.append(entry.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return install(self, entry, about)

    before = contents(folder)
    monkeypatch.setattr(ResultsFolder, "_install", killed)
    with pytest.raises(KeyboardInterrupt):
        write_curation(read(folder), {"group": {0: "good"}, "notes": {0: "x"}}, "all", {0: 3, 1: 3})
    assert names == ["spike_clusters.npy", "carried.tsv", "cluster_group.tsv"]
    expected = {"carried.tsv": b"all", "spike_clusters.npy": contents(folder)["spike_clusters.npy"]}
    assert contents(folder) == before | expected and set(phy.clusters_in(folder)) == {2, 3}


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: phy.label(folder, notes={1: "saved meanwhile"}),
        lambda folder: phy.label(folder, group={1: "mua"}),
        lambda folder: phy.merge(folder, 1, 2),
    ],
)
def test_what_is_saved_in_phy_meanwhile_is_not_replaced(folder: Path, save: Callable[[Path], Any]) -> None:
    phy.label(folder, group={1: "good"})
    phy.write_table(folder / "cluster_info.tsv", {"fr": {0: "3", 1: "4"}})
    found = read(folder)
    save(folder)
    before = contents(folder)
    with pytest.raises(ResultsError, match=r"(cluster_notes.tsv|cluster_group.tsv|spike_clusters.npy) in .*Close Phy"):
        write_curation(found, {"group": {0: "good"}}, "all", {0: 3, 1: 3})
    assert contents(folder) == before
    write_curation(read(folder), {"group": {0: "good"}}, "all", {})
    assert phy.column_in(folder, "group") == {0: "good"}


@pytest.mark.slow
def test_results_in_buckets_are_carried(object_store: Any, tmp_path: Path) -> None:
    where = ObjectPath(f"s3://recordings/{tmp_path.name}-{os.getpid()}-{time.monotonic_ns()}")
    first, second = (write_folder(tmp_path / name, UNITS) for name in ("old", "new"))
    phy.label(first, group={phy.merge(first, 0, 2): "good"})
    for path in (first, second):
        object_store.put(path, f"{where.name}/{path.name}")
    (one,) = carry_curation(str(where / "old"), str(where / "new")).clusters
    assert (one.to, one.of_units) == (3, (0, 2))
    for name in ("spike_clusters.npy", "cluster_group.tsv", "carried.tsv"):
        (second / name).write_bytes(read_whole(where / "new" / name))
    assert {number: len(times) for number, times in phy.clusters_in(second).items()} == {1: 5, 3: 40}
    assert phy.column_in(second, "group") == {1: "unsorted", 3: "good"}
