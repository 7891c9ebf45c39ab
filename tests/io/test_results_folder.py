"""Whose files lie in a results folder: what a sort may replace, what it moves, and what it leaves alone."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import CurationWarning, RecordingError, ResultsError
from ks4stream.io import objects
from ks4stream.io import results_folder as results_folder_module
from ks4stream.io.atomic import atomic_write
from ks4stream.io.objects import listing
from ks4stream.io.places import ObjectPath, Place, below, place, read_whole, remove
from ks4stream.io.results_folder import (
    EARLY,
    EXTRA,
    FEATURES,
    LOG,
    RECORD,
    STORE,
    WRITTEN,
    ResultsFolder,
    _digest,
    fingerprint,
)
from ks4stream.recording import FlatFile
from ks4stream.report import announce, finish, plot_names, results_folder, run_log, written_early
from ks4stream.results import Sorting

MakeSorting = Callable[..., Sorting]


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place of either kind, for results."""
    if request.param == "folder":
        (tmp_path / "session").mkdir()
        return tmp_path / "session" / "kilosort4"
    pytest.importorskip("obstore")
    request.getfixturevalue("object_store")
    return ObjectPath(f"s3://recordings/results/{tmp_path.name}-{os.getpid()}-{time.monotonic_ns()}/kilosort4")


def put(where: Place, content: bytes | str) -> None:
    with atomic_write(where) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def contents(where: Place) -> dict[str, bytes]:
    """All that lies in a place, by path."""
    return {path: read_whole(where / path) for path, _ in listing(str(where))}


def names(where: Place) -> set[str]:
    return {name for name, _ in below(where)}


def draw_nothing(sorting: Sorting, folder: Path) -> None:
    """The plots' files without plots, which take a second each."""
    for name in plot_names(sorting):
        (folder / name).write_bytes(b"a picture")


def store_nothing(sorting: Sorting, store: Path, *, features: bool) -> None:
    """A store of two files instead of a hundred, each of which is a request to a bucket."""
    (store / "sample").mkdir(parents=True, exist_ok=True)
    for name in (".zgroup", "sample/0"):
        (store / name).write_bytes(b"a chunk")


def n_spikes_in(where: Place) -> int:
    return len(np.load(BytesIO(read_whole(where / "kept_spikes.npy"))))


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place | None]:
    """A function that writes a sorting's results where they belong, as a sort does, but for plots and store."""
    monkeypatch.setattr("ks4stream.report.plots.write_plots", draw_nothing)
    monkeypatch.setattr("ks4stream.report.save_sorting", store_nothing)

    def write(sorting: Sorting, where: Place, *recording: str, **options: Any) -> Place | None:
        return finish(sorting, ResultsFolder.open(where, recording), **options)

    return write


@pytest.mark.slow
def test_all_that_is_written_stands_in_the_list(make_sorting: MakeSorting, tmp_path: Path) -> None:
    finish(make_sorting(), ResultsFolder.open(tmp_path), save_extra_vars=True, preprocessed=[])
    assert names(tmp_path) == {*WRITTEN, RECORD}


OTHERS = {
    "recording.npy": b"the recording",
    "behaviour.npy": b"1",
    "trials.tsv": b"trial\tcorrect\n0\t1\n",
    "video.png": b"2",
    "notes.md": b"# Good day",
    "plan.csv": b"depth,region\n",
    "lfp/data.npy": b"3",
    "run.tsv": b"",
}


def test_what_else_lies_there_is_left_alone(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    """Results go to a session's own folder, where its recording lies."""
    for name, content in OTHERS.items():
        if isinstance(where, Path):
            (where / name).parent.mkdir(parents=True, exist_ok=True)
        put(where / name, content)
    recording = str(where / "recording.npy")
    for sorting in (make_sorting(), make_sorting(n_spikes=50)):
        assert write(sorting, where, recording) is None
        there = contents(where)
        assert {name: there[name] for name in OTHERS} == OTHERS
        assert n_spikes_in(where) == sorting.n_spikes


def test_a_recording_of_a_name_like_a_results_is_left_alone(
    write: Any, make_sorting: MakeSorting, where: Place
) -> None:
    put(where / "spike_band.npy", b"the recording")
    recording = str(where / "spike_band.npy")
    for n_spikes in (400, 50):
        assert write(make_sorting(n_spikes=n_spikes), where, recording) is None
        assert read_whole(where / "spike_band.npy") == b"the recording"
    put(where / "cluster_group.tsv", "cluster_id\tgroup\n")
    with pytest.warns(CurationWarning, match="moved to"):
        aside = write(make_sorting(), where, recording)
    assert read_whole(where / "spike_band.npy") == b"the recording" and "spike_band.npy" not in names(aside)


@pytest.mark.parametrize("name", ["temp_wh.dat", "templates.npy", RECORD])
def test_a_recording_that_would_be_overwritten_is_refused(where: Place, name: str) -> None:
    put(where / name, b"the recording")
    with pytest.raises(ResultsError, match=f"{name} is the recording.*another results_dir"):
        ResultsFolder.open(where, [str(where / name)])
    assert read_whole(where / name) == b"the recording"


def test_a_result_nobody_touched_is_replaced_as_a_whole(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    write(make_sorting(), where, save_extra_vars=True)
    for name in (".phy/state.json", "phy.log"):  # of somebody who has only looked
        if isinstance(where, Path):
            (where / name).parent.mkdir(exist_ok=True)
        put(where / name, b"looked")
    assert write(make_sorting(n_spikes=50, drift=None), where, save_features=False) is None
    assert not names(where) & {"tF.npy", "pc_features.npy", "drift_amount.png", ".phy"}
    assert names(where) >= {"spike_times.npy", STORE, "diagnostics.png", ".phy-1"}
    assert not names(where.parent) - {where.name}, "nothing was moved"


def edit(name: str, content: bytes | str) -> Callable[[Place], None]:
    return lambda where: put(where / name, content)


def merge_two_units(where: Place) -> None:
    put(where / "spike_clusters.npy", read_whole(where / "spike_clusters.npy")[:-1] + b"\x07")


CURATIONS = {
    "labels": edit("cluster_group.tsv", "cluster_id\tgroup\n0\tgood\n1\tnoise\n"),
    "merges": merge_two_units,
    "a note of Phy's": edit("cluster_note.tsv", "cluster_id\tnote\n0\tlovely\n"),
    "metrics": edit("quality.csv", '\ufeff"cluster_id","snr"\n0,5.0\n'),
    "bombcell": edit("cluster_bc_unitType.tsv", "cluster_id\tbc_unitType\n0\tGOOD\n"),
    "attributes": edit("spike_depth_class.npy", b"\x93NUMPY"),
    "the traces' address": edit("params.py", "dat_path = ['/elsewhere/raw.bin']\n"),
    "units that look the same": edit("similar_templates.npy", b"\x93NUMPY"),
}


@pytest.mark.parametrize("curate", CURATIONS.values(), ids=CURATIONS)
def test_a_curation_is_moved_whole_and_numbered(
    write: Any, make_sorting: MakeSorting, where: Place, curate: Callable[[Place], None]
) -> None:
    if isinstance(where, ObjectPath) and curate not in (CURATIONS["labels"], CURATIONS["bombcell"]):
        pytest.skip("the others differ by names only, and each is some hundred requests")
    write(make_sorting(), where)
    curate(where)
    put(where / "notes.md", "not of the sorting")
    put(where / "phy.log", "goes along")
    before = contents(where)
    for number in (1, 2):
        with pytest.warns(CurationWarning, match="moved into a numbered folder"):
            announce(ResultsFolder.open(where))
        with pytest.warns(CurationWarning, match=f"moved to .*kilosort4-{number}"):
            aside = write(make_sorting(n_spikes=50 * number), where)
        assert str(aside) == f"{where}-{number}"
        assert contents(aside) | {"notes.md": b"not of the sorting"} == before
        assert n_spikes_in(where) == 50 * number
        curate(where)
        before = contents(where)


def test_the_results_of_another_sorter_are_moved(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    """The default folder is Kilosort4's, too."""
    theirs = {"spike_times.npy": b"1", "params.py": b"2", "cluster_KSLabel.tsv": b"3", "rez2.mat": b"4", LOG: b"5"}
    for name, content in theirs.items():
        put(where / name, content)
    with pytest.warns(CurationWarning):
        aside = write(make_sorting(), where)
    assert contents(aside) == theirs
    assert read_whole(where / LOG) == b"5", "the log goes on"


def test_an_earlier_log_is_moved_without_what_was_said_since(
    write: Any, make_sorting: MakeSorting, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    put(folder / LOG, "theirs\n")
    put(folder / "spike_times.npy", b"1")
    with pytest.warns(CurationWarning), run_log(folder), results_folder(folder) as (results, _):
        finish(make_sorting(), results)
    assert (tmp_path / "a-1" / LOG).read_text() == "theirs\n"
    assert (folder / LOG).read_text().startswith("theirs\n")


def touch(where: Place) -> None:
    content = read_whole(where / "cluster_group.tsv")
    if isinstance(where, ObjectPath):
        remove(where / "cluster_group.tsv")
    put(where / "cluster_group.tsv", content)


def test_content_counts_and_not_its_time(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    write(make_sorting(), where)
    touch(where)
    remove(where / "spike_positions.npy")
    assert not ResultsFolder.open(where).somebodys()
    put(where / "cluster_group.tsv", read_whole(where / "cluster_group.tsv").replace(b"good", b"bad!"))
    assert ResultsFolder.open(where).somebodys() == ["cluster_group.tsv"], "as long as before"


def test_a_table_that_is_not_of_units_is_not_of_the_sorting(
    write: Any, make_sorting: MakeSorting, where: Place
) -> None:
    write(make_sorting(), where)
    put(where / "trials.csv", "trial,my_cluster_id\n")
    assert not ResultsFolder.open(where).somebodys()


def test_the_same_result_again_touches_nothing(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    write(make_sorting(), where)
    for curate in CURATIONS.values():
        curate(where)
    before, stamps = contents(where), dict(listing(str(where)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(make_sorting(seconds={"whitening": 99.0}, warnings=()), where) is None
    assert contents(where) == before
    assert dict(listing(str(where))) == stamps
    assert names(where.parent) == {where.name}


def test_what_is_gone_of_the_same_result_comes_back_and_a_curation_stays(
    write: Any, make_sorting: MakeSorting, where: Place
) -> None:
    write(make_sorting(), where)
    before = names(where)
    for _ in range(2):
        remove(where / "templates.npy")
        assert write(make_sorting(), where) is None
        assert names(where) == before
        CURATIONS["labels"](where)
    assert ResultsFolder.open(where).somebodys() == ["cluster_group.tsv"]


class Killed(BaseException):
    """In place of a signal that nothing catches."""


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Die before the n-th file is moved into place, or aside."""
    left = [number]

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*given, **options)

        return counted

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, count(getattr(Path, name)))
        with pytest.raises(Killed):
            act()


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_half_a_result_is_replaced_and_what_somebody_puts_there_is_not(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where, save_extra_vars=True)
    killed_at(monkeypatch, number, lambda: write(make_sorting(n_spikes=50), where))
    assert not ResultsFolder.open(where).somebodys(), "all of it is ours"
    CURATIONS["labels"](where)
    assert ResultsFolder.open(where).somebodys() == ["cluster_group.tsv"]
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        write(make_sorting(n_spikes=60), where)
    assert n_spikes_in(where) == 60 and "tF.npy" not in names(where)
    assert not [name for name in names(where) if name.startswith(".ks4stream-")], "drafts go"


def test_drafts_of_the_record_and_the_log_that_a_killed_process_left_go(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "kilosort4"

    def killed(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
        write(make_sorting(), where)
    assert [name for name in names(where) if name.endswith(".draft")]
    (where / f"kilosort4.{'01' * 16}.draft").write_text("a part of a log")
    kept = {f"thesis.{'01' * 16}.draft", "ks4stream.letter.draft"}
    for name in kept:
        (where / name).write_text("of a person")
    write(make_sorting(), where)
    assert {name for name in names(where) if name.endswith(".draft")} == kept


@pytest.mark.parametrize("number", [2, 3, 10])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_move_that_was_interrupted_goes_on(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, theirs: bool
) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    CURATIONS["labels"](where)
    if theirs:
        remove(where / RECORD)
    before = contents(where)
    killed_at(monkeypatch, number, ResultsFolder.open(where).set_aside)
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        assert write(make_sorting(n_spikes=50), where) == tmp_path / "kilosort4-1"
    assert contents(tmp_path / "kilosort4-1") == before
    assert names(tmp_path) == {"kilosort4", "kilosort4-1"}


def stop_moving(monkeypatch: pytest.MonkeyPatch, where: Place, act: Callable[[], Any]) -> None:
    """Die when some of a sorting has been moved; in a bucket, when all has been copied and some has been deleted."""
    if isinstance(where, Path):
        killed_at(monkeypatch, 12, act)
        return

    def delete(location: str, paths: Any = None) -> None:
        objects.delete(location, paths[:20] if paths else paths)
        if paths:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ks4stream.io.places.objects", SimpleNamespace(**{**vars(objects), "delete": delete}))
        with pytest.raises(Killed):
            act()


def everything(where: Place) -> set[bytes]:
    """All that lies in a place and in its neighbours."""
    return {*contents(where.parent).values()}


def test_a_move_that_goes_on_replaces_nothing(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another sorter wrote into the folder since, or Phy that was still open."""
    write(make_sorting(), where)
    CURATIONS["labels"](where)
    (where / ".phy").mkdir() if isinstance(where, Path) else None
    put(where / ".phy" / "state.json", "1")
    before = everything(where) - {read_whole(where / RECORD)}
    stop_moving(monkeypatch, where, ResultsFolder.open(where).set_aside)
    (where / ".phy").mkdir() if isinstance(where, Path) else None
    theirs = {".phy/state.json": b"2", "amplitudes.npy": b"theirs", "cluster_group.tsv": b"cluster_id\tgroup\n"}
    for name, content in theirs.items():
        put(where / name, content)
    with pytest.warns(CurationWarning, match="kilosort4-2"):
        write(make_sorting(n_spikes=50), where)
    assert everything(where) >= before | {*theirs.values()}
    assert (
        contents(ObjectPath(f"{where}-2") if isinstance(where, ObjectPath) else Path(f"{where}-2")).items()
        >= theirs.items()
    )
    assert n_spikes_in(where) == 50 and not ResultsFolder.open(where).somebodys()


def test_a_folder_that_was_renamed_has_other_neighbours(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(make_sorting(), tmp_path / "new")
    CURATIONS["labels"](tmp_path / "new")
    stop_moving(monkeypatch, tmp_path / "new", ResultsFolder.open(tmp_path / "new").set_aside)
    (tmp_path / "new").rename(tmp_path / "old")
    put(tmp_path / "old-1" / "somebodys.npy", b"from a year ago")
    with pytest.warns(CurationWarning, match="old-2"):
        write(make_sorting(n_spikes=50), tmp_path / "old")
    assert names(tmp_path / "old-1") == {"somebodys.npy"}


def test_a_move_within_a_bucket_goes_on_with_the_copies_it_made(
    write: Any, make_sorting: MakeSorting, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = place("s3://recordings/copied/kilosort4")
    write(make_sorting(), where)
    CURATIONS["labels"](where)
    before, left, real = contents(where), [5], objects.copy

    def killed(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(*given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("ks4stream.io.places.objects.copy", killed)
        ResultsFolder.open(where).set_aside()
    assert contents(where).items() >= {name: before[name] for name in {*before} - {RECORD}}.items()
    assert ResultsFolder.open(where).set_aside() == ObjectPath(f"{where}-1")
    assert contents(ObjectPath(f"{where}-1")) == before and not names(where)


def test_what_is_written_to_while_it_is_copied_is_not_deleted(
    write: Any, make_sorting: MakeSorting, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, real = place("s3://recordings/edited/kilosort4"), objects.copy
    write(make_sorting(), where)
    CURATIONS["labels"](where)

    def edited(location: str, *given: Any) -> None:
        real(location, *given)
        if location.endswith("cluster_group.tsv"):
            put(where / "cluster_group.tsv", "saved meanwhile")

    monkeypatch.setattr("ks4stream.io.places.objects.copy", edited)
    with pytest.warns(CurationWarning) as said:
        write(make_sorting(n_spikes=50), where)
    assert len(said) == 2, "a folder each"
    assert b"saved meanwhile" in everything(where) and n_spikes_in(where) == 50


@pytest.mark.parametrize("whole", [False, True])
def test_a_move_of_which_only_the_record_is_left_goes_on(
    write: Any, make_sorting: MakeSorting, object_store: Any, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if whole:
        object_store.client.create_bucket(Bucket="left")
    else:
        object_store.put(b"a person's", "left/kilosort4")  # an object of the name of the prefix
    where = place("s3://left" if whole else "s3://recordings/left/kilosort4")
    put(where / "spike_times.npy", b"of another sorter")

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    results = ResultsFolder.open(where)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("ks4stream.io.results_folder.remove", killed)
        results.set_aside()
    assert names(where) - {"results-1"} == {RECORD}
    with pytest.warns(CurationWarning):
        aside = write(make_sorting(), where)
    assert contents(aside) == {"spike_times.npy": b"of another sorter"}
    assert whole or read_whole(place("s3://recordings/left/kilosort4")) == b"a person's"


MOMENTS = ["_described", "_retire_cache", "_write_record"]


@pytest.mark.parametrize("curated_before", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_saved_while_results_are_replaced_is_moved(
    write: Any,
    make_sorting: MakeSorting,
    where: Place,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    curated_before: bool,
) -> None:
    """Hashes of many GB take minutes, as does copying them to a bucket."""
    if isinstance(where, ObjectPath) and curated_before:
        pytest.skip("is no different from a folder")
    write(make_sorting(), where)
    if curated_before:
        CURATIONS["labels"](where)
    at = results_folder_module if moment == "_described" else ResultsFolder
    real, saved = getattr(at, moment), []

    def saving(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        if not saved and (moment != "_described" or ".ks4stream-" in str(given[0]) or "contents" in str(given[0])):
            saved.append(put(where / "cluster_group.tsv", "saved meanwhile"))
        return found

    results = ResultsFolder.open(where)
    with monkeypatch.context() as patch, pytest.warns(CurationWarning):
        patch.setattr(at, moment, saving)
        finish(make_sorting(n_spikes=50), results)
    assert saved and b"saved meanwhile" in everything(where)
    assert n_spikes_in(where) == 50 and not ResultsFolder.open(where).somebodys()


def test_a_table_that_is_saved_under_another_name_meanwhile_is_moved_with_the_others(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phy saves all its tables at once; they hold the earlier unit numbers."""
    write(make_sorting(), where)
    saved, real = ("cluster_group.tsv", "cluster_note.tsv", "my_labels.csv"), ResultsFolder._retire_cache

    def saving(results: ResultsFolder) -> None:
        for name in saved:
            put(where / name, "cluster_id\tnote\n0\tdrifts away\n")
        put(where / "notes.md", "not of the sorting")
        real(results)

    monkeypatch.setattr(ResultsFolder, "_retire_cache", saving)
    with pytest.warns(CurationWarning, match="edits in .* were moved to .*kilosort4-1") as said:
        aside = write(make_sorting(n_spikes=50), where)
    assert len(said) == 1 and names(aside) == {*saved}
    assert names(where) >= {"cluster_group.tsv", "notes.md"} and not names(where) & {*saved[1:]}
    assert n_spikes_in(where) == 50 and not ResultsFolder.open(where).somebodys()


def test_what_is_saved_again_while_it_is_moved_is_moved_again(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(make_sorting(), where, save_extra_vars=True)
    left = {name: [b"second save", b"third save"] for name in ("cluster_group.tsv", "tF.npy")}
    retire, copy, rename = ResultsFolder._retire_cache, objects.copy, Path.rename

    def saving(results: ResultsFolder) -> None:
        for name in left:
            put(where / name, b"first save")
        retire(results)

    def save_again(path: str) -> None:
        if Path(path).name in left and left[Path(path).name]:
            put(where / Path(path).name, left[Path(path).name].pop(0))

    def copied(location: str, *given: Any) -> None:
        copy(location, *given)
        save_again(location)

    def renamed(path: Path, target: Path) -> Path:
        found = rename(path, target)
        save_again(str(path))
        return found

    with monkeypatch.context() as patch, pytest.warns(CurationWarning) as said:
        patch.setattr(ResultsFolder, "_retire_cache", saving)
        patch.setattr(objects, "copy", copied)
        patch.setattr(Path, "rename", renamed)
        write(make_sorting(n_spikes=50), where)
    assert not any(left.values()) and everything(where) >= {b"first save", b"second save", b"third save"}
    assert len(said) == 3 and "tF.npy" not in names(where)
    assert n_spikes_in(where) == 50 and not ResultsFolder.open(where).somebodys()


def test_what_is_saved_as_soon_as_it_is_written_is_not_ours(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge, which leaves a file as long as before."""
    put_file, move_file, chunk = objects.write_file, Path.replace, where / STORE / "sample" / "0"

    def uploaded(location: str, path: Path) -> Any:
        found = put_file(location, path)
        merge_two_units(where) if path.name == "spike_clusters.npy" else None
        put(chunk, b"a chunk!") if location == str(chunk) else None
        return found

    def moved(path: Path, target: Path) -> Any:
        found = move_file(path, target)
        if path.name in ("spike_clusters.npy", STORE):
            merge_two_units(where) if path.name == "spike_clusters.npy" else put(chunk, b"a chunk!")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(objects, "write_file", uploaded)
        patch.setattr(Path, "replace", moved)
        write(make_sorting(), where)
    assert ResultsFolder.open(where).somebodys() == [STORE, "spike_clusters.npy"]


def test_what_is_saved_while_something_is_added_stays(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(make_sorting(), where, save_features=False)
    results, real = ResultsFolder.open(where), ResultsFolder._write_record

    def saving(results: ResultsFolder, content: Any) -> None:
        real(results, content)
        put(where / STORE / "my_analysis.json", "saved meanwhile")

    monkeypatch.setattr(ResultsFolder, "_write_record", saving)
    with pytest.warns(CurationWarning, match=r"sorting.zarr .*stay as they are"):
        finish(make_sorting(), results)
    assert read_whole(where / STORE / "my_analysis.json") == b"saved meanwhile"
    assert names(where) >= {*FEATURES}


@pytest.mark.parametrize("numbers", [(12, 1), (12, 8), (30, 20)])
def test_of_two_kills_in_a_row_all_that_is_left_is_ours(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int]
) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    for n_spikes, number in zip((50, 60), numbers, strict=True):
        killed_at(monkeypatch, number, lambda n_spikes=n_spikes: write(make_sorting(n_spikes=n_spikes), where))
        assert not ResultsFolder.open(where).somebodys()
    assert write(make_sorting(n_spikes=70), where) is None
    assert names(tmp_path) == {"kilosort4"}


@pytest.mark.parametrize("adds", [False, True])
def test_a_part_of_the_store_is_ours(
    write: Any, make_sorting: MakeSorting, object_store: Any, monkeypatch: pytest.MonkeyPatch, adds: bool
) -> None:
    where, real = place(f"s3://recordings/part-{adds}/kilosort4"), objects.write_file

    def killed(location: str, path: Path) -> str:
        if location.endswith(".zgroup"):
            raise Killed
        return real(location, path)

    write(make_sorting(), where, save_features=not adds)
    again = make_sorting(n_spikes=400 if adds else 50)
    for _ in range(1 + adds):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("ks4stream.io.results_folder.objects.write_file", killed)
            write(again, where)
        assert names(where / STORE) == {"sample"} and not ResultsFolder.open(where).somebodys()
    put(where / STORE / "my_analysis.json", "{}")
    assert ResultsFolder.open(where).somebodys() == [STORE]
    remove(where / STORE / "my_analysis.json")
    assert write(again, where) is None
    assert names(where / STORE) == {"sample", ".zgroup"} and names(where) >= {*FEATURES}
    assert not ResultsFolder.open(where).somebodys() and names(where.parent) == {"kilosort4"}


def test_empty_objects_that_mark_folders_do_not_matter(
    write: Any, make_sorting: MakeSorting, object_store: Any
) -> None:
    """Consoles and other tools make them; they cannot be asked for or removed."""
    where = place("s3://recordings/markers/kilosort4")
    for name in ("", ".phy/", ".phy/deep/", f"{STORE}/", f"{STORE}/sample/", f"{STORE}/mine/"):
        object_store.put(b"", f"markers/kilosort4/{name}")
    for name in (".phy/state.json", f"{STORE}/.zgroup", "spike_times.npy"):
        object_store.put(b"of another sorter", f"markers/kilosort4/{name}")
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        aside = write(make_sorting(), where)
    assert {*contents(aside)} == {".phy/state.json", f"{STORE}/.zgroup", "spike_times.npy"}
    assert not ResultsFolder.open(where).somebodys()
    assert write(make_sorting(n_spikes=50), where) is None and n_spikes_in(where) == 50


@pytest.mark.parametrize("content", [None, "", "short"])
def test_a_log_that_is_cut_while_it_is_sorted_is_no_error(
    make_sorting: MakeSorting, write: Any, tmp_path: Path, content: str | None
) -> None:
    where = tmp_path / "kilosort4"
    put(where / LOG, "of another sorter")
    put(where / "spike_times.npy", b"of another sorter")
    results = ResultsFolder.open(where)
    remove(where / LOG)
    if content is not None:
        put(where / LOG, content)
    with pytest.warns(CurationWarning):
        aside = finish(make_sorting(), results)
    assert contents(aside) == {"spike_times.npy": b"of another sorter"} | ({LOG: b"short"} if content else {})


def test_results_that_go_while_others_are_added_are_told(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where, save_features=False)

    def moved(sorting: Sorting, folder: Path) -> None:
        draw_nothing(sorting, folder)
        (tmp_path / "mine").mkdir(exist_ok=True)
        for name in names(where) - {folder.name}:
            (where / name).rename(tmp_path / "mine" / name)

    with monkeypatch.context() as patch, pytest.raises(ResultsError, match=r"moved or replaced.*write all of them"):
        patch.setattr("ks4stream.report.plots.write_plots", moved)
        write(make_sorting(), where)
    assert not names(where)
    write(make_sorting(), where)
    assert names(where) >= {"spike_times.npy", *FEATURES}


def test_what_was_not_asked_for_is_added_to_a_curated_result(
    write: Any, make_sorting: MakeSorting, where: Place
) -> None:
    write(make_sorting(), where, save_features=False)
    CURATIONS["labels"](where)
    before = contents(where)
    assert write(make_sorting(), where, save_extra_vars=True) is None
    there = contents(where)
    assert {*there} - {*before} == {*EXTRA, *FEATURES}
    assert {name for name in before if there[name] != before[name]} == {RECORD}
    assert ResultsFolder.open(where).somebodys() == ["cluster_group.tsv"]


def test_what_somebody_changed_is_not_replaced_by_what_is_added(
    write: Any, make_sorting: MakeSorting, tmp_path: Path
) -> None:
    write(make_sorting(), tmp_path)
    CURATIONS["the traces' address"](tmp_path)
    before = read_whole(tmp_path / "params.py")
    with pytest.warns(CurationWarning, match=r"params.py .*stay as they are"):
        write(make_sorting(), tmp_path, preprocessed=[])
    assert read_whole(tmp_path / "params.py") == before and "temp_wh.dat" in names(tmp_path)


def test_params_follow_a_recording_that_was_moved(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    def moved_to(name: str) -> Sorting:
        (tmp_path / name).write_bytes(b"\0" * 26)
        return make_sorting(flat_files=(FlatFile(str(tmp_path / name), "<i2", 0, 1, 13),))

    where = tmp_path / "kilosort4"
    write(moved_to("old.bin"), where)
    write(moved_to("new.bin"), where)
    assert "new.bin" in (where / "params.py").read_text()
    CURATIONS["labels"](where)
    write(moved_to("newer.bin"), where)
    assert "new.bin" in (where / "params.py").read_text(), "of what was curated nothing is touched"


def test_the_cache_is_renamed_to_what_is_free(write: Any, make_sorting: MakeSorting, where: Place) -> None:
    write(make_sorting(), where)
    put(where / ".phy-1", "not a folder")
    (where / ".phy").mkdir() if isinstance(where, Path) else None
    put(where / ".phy" / "state.json", "looked")
    assert write(make_sorting(n_spikes=50), where) is None
    assert read_whole(where / ".phy-2" / "state.json") == b"looked" and read_whole(where / ".phy-1") == b"not a folder"


# -- links ------------------------------------------------------------------------------------------------


def test_what_links_lead_to_is_left_alone(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    for name, target in {"templates.npy": "raw.bin", STORE: "store", ".phy": "cache"}.items():
        (tmp_path / target).mkdir() if "." not in target else (tmp_path / target).write_bytes(b"raw")
        remove(where / name, folder=name == STORE)
        (where / name).symlink_to(tmp_path / target)
    with pytest.warns(CurationWarning):
        write(make_sorting(n_spikes=50), where)
    assert (tmp_path / "raw.bin").read_bytes() == b"raw"
    assert (tmp_path / "kilosort4-1" / "templates.npy").is_symlink()
    (where / "temp_wh.dat").symlink_to(tmp_path / "raw.bin")
    with pytest.warns(CurationWarning, match="temp_wh.dat"):
        write(make_sorting(n_spikes=50), where, preprocessed=[])
    assert (tmp_path / "raw.bin").read_bytes() == b"raw"


def test_links_that_lead_nowhere_are_moved_like_files(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    """What they led to lies on a disk that is not mounted, say."""
    where = tmp_path / "kilosort4"
    links = ("cluster_info.tsv", "templates.npy", f"{STORE}/gone", "circle.tsv")
    for number, name in enumerate(links, 1):
        write(make_sorting(n_spikes=50 * number), where)
        remove(where / name)
        (where / name).symlink_to(where / name if name == "circle.tsv" else tmp_path / "nowhere")
        if name == "circle.tsv":  # it cannot be told that it is a table of units
            assert not ResultsFolder.open(where).somebodys()
            continue
        with pytest.warns(CurationWarning, match=f"kilosort4-{number}"):
            aside = write(make_sorting(n_spikes=10), where)
        assert aside is not None and (aside / name).is_symlink()


def test_copies_that_share_their_bytes_do_not_change(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    where, snapshot = tmp_path / "kilosort4", tmp_path / "snapshot"
    write(make_sorting(), where)
    snapshot.mkdir()
    for name in ("params.py", "ops.npy", "spike_times.npy"):
        os.link(where / name, snapshot / name)
    before = contents(snapshot)
    write(make_sorting(), where, preprocessed=[])
    write(make_sorting(n_spikes=50), where)
    assert contents(snapshot) == before


def test_a_folder_that_is_a_link_has_its_neighbours_where_it_leads(
    write: Any, make_sorting: MakeSorting, tmp_path: Path
) -> None:
    (tmp_path / "disk" / "ks").mkdir(parents=True)
    (tmp_path / "ks").symlink_to(tmp_path / "disk" / "ks")
    put(tmp_path / "disk" / "ks" / "spike_times.npy", b"theirs")
    with pytest.warns(CurationWarning):
        write(make_sorting(), tmp_path / "ks")
    assert read_whole(tmp_path / "disk" / "ks-1" / "spike_times.npy") == b"theirs"


def test_a_recording_is_known_by_any_path(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    (tmp_path / "session").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "session")
    put(tmp_path / "session" / "temp_wh.dat", b"the recording")
    with pytest.raises(ResultsError, match="is the recording"):
        ResultsFolder.open(tmp_path / "session", [str(tmp_path / "alias" / "temp_wh.dat")])


def test_results_within_the_recording_are_refused(where: Place) -> None:
    with pytest.raises(ResultsError, match="lies within it"):
        ResultsFolder.open(where / "raw.zarr" / "0", [str(where / "raw.zarr")])
    with pytest.raises(ResultsError, match="is the recording"):
        ResultsFolder.open(where / "raw.zarr", [str(where / "raw.zarr")])


@pytest.mark.parametrize(
    "change",
    [
        {"n_spikes": 399},
        {"contamination": [0.02, 0.3, 0.6, 0.9]},
        {"artifacts": [[0, 9]]},
        {"drift": None},
        {"similarity": np.ones((4, 4))},
    ],
)
def test_another_result_has_another_fingerprint(make_sorting: MakeSorting, change: dict[str, Any]) -> None:
    assert fingerprint(make_sorting(**change)) != fingerprint(make_sorting())
    assert fingerprint(make_sorting(**change)) == fingerprint(make_sorting(**change, seconds={}, files=("moved",)))


def test_large_files_are_told_by_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pc_features.npy"
    path.write_bytes(bytes(range(256)) * 16)
    monkeypatch.setattr("ks4stream.io.results_folder._WHOLE_BYTES", 1000)
    monkeypatch.setattr("ks4stream.io.results_folder._SLICES", 8)
    first = _digest(path, 4096)
    assert _digest(path, 4096) == first
    path.write_bytes(bytes(range(256)) * 15 + bytes(256))
    assert _digest(path, 4096) != first


def test_the_store_counts(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    put(where / STORE / "my_analysis.json", b"{}")
    assert ResultsFolder.open(where).somebodys() == [STORE]


# -- before work -----------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="Choose another results_dir"):
        ResultsFolder.open(tmp_path / "file")
    with pytest.raises(ResultsError, match="cannot be written"):
        ResultsFolder.open(tmp_path / "file" / "kilosort4")
    assert isinstance(ResultsFolder.open(tmp_path / "new" / "kilosort4").place, Path)
    assert (tmp_path / "new" / "kilosort4").is_dir()


def read_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Files that may not be written to; root, as whom tests may run, may write to any."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in names and real(path, mode))


def test_only_what_will_be_replaced_needs_to_be_writable(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "raw.ap.bin", b"the recording, protected as it should be")
    write(make_sorting(), tmp_path)
    read_only(monkeypatch, "raw.ap.bin", "notes.npy")
    ResultsFolder.open(tmp_path)
    read_only(monkeypatch, "params.py")
    with pytest.raises(ResultsError, match=r"params.py is read-only"):
        ResultsFolder.open(tmp_path)


def test_what_will_be_moved_may_be_read_only(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "kilosort4" / "spike_times.npy", b"of another sorter")
    read_only(monkeypatch, "spike_times.npy")
    with pytest.warns(CurationWarning):
        write(make_sorting(), tmp_path / "kilosort4")


@pytest.mark.parametrize("name", [STORE, ".phy"])
def test_folders_that_will_be_moved_need_to_be_writable(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A colleague's, in a results folder of a group: renaming a folder into another one changes it."""
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    CURATIONS["labels"](where)
    (where / name).mkdir(exist_ok=True)
    before = contents(where)
    read_only(monkeypatch, name, "lfp")
    (where / "lfp").mkdir()
    with pytest.raises(ResultsError, match=rf"{name} is a folder that you may not write to.*another results_dir"):
        ResultsFolder.open(where)
    assert contents(where) == before and names(tmp_path) == {"kilosort4"}
    (where / name).rename(tmp_path / "elsewhere")
    (where / name).symlink_to(tmp_path / "elsewhere")  # a link can be moved
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        write(make_sorting(n_spikes=50), where)


def test_what_is_not_of_a_sorting_is_neither_replaced_nor_moved(where: Place) -> None:
    put(where / "channel_map.npy", b"of my own scripts")
    with pytest.raises(ResultsError, match=r"channel_map.npy does not belong to a sorting"):
        ResultsFolder.open(where)


def test_what_appears_while_it_is_sorted_is_moved(make_sorting: MakeSorting, write: Any, tmp_path: Path) -> None:
    results = ResultsFolder.open(tmp_path / "kilosort4")
    put(tmp_path / "kilosort4" / "channel_map.npy", b"of my own scripts")
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        finish(make_sorting(), results)
    assert contents(tmp_path / "kilosort4-1") == {"channel_map.npy": b"of my own scripts"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "ks4stream.Results/1"}',
        '{"format": "ks4stream.Results/1", "state": "moving", "home": "", "number": "/../../x", "within": false, '
        '"before": {}}',
    ],
)
def test_a_record_that_is_not_understood_makes_nothing_ours(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, content: str
) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    put(where / RECORD, content)
    assert "spike_times.npy" in ResultsFolder.open(where).somebodys()
    with pytest.warns(CurationWarning, match="kilosort4-1"):
        write(make_sorting(), where)
    assert names(tmp_path) == {"kilosort4", "kilosort4-1"}


def test_a_table_that_cannot_be_read_is_not_taken_for_a_curation(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(make_sorting(), tmp_path)
    put(tmp_path / "locked.csv", b"cluster_id")
    real = Path.open

    def locked(path: Path, *given: Any, **options: Any) -> Any:
        if path.name == "locked.csv":
            raise PermissionError(13, "Permission denied")
        return real(path, *given, **options)

    monkeypatch.setattr(Path, "open", locked)
    assert not ResultsFolder.open(tmp_path).somebodys()


@pytest.mark.parametrize("name", [RECORD, "cluster_group.tsv", f"{STORE}/.zgroup"])
def test_what_cannot_be_read_is_told_before_work_starts(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A colleague's who lets nobody else read it; root, as whom tests may run, may read anything."""
    write(make_sorting(), tmp_path)
    touch(tmp_path)
    (tmp_path / STORE / ".zgroup").touch()
    real = Path.open

    def private(path: Path, *given: Any, **options: Any) -> Any:
        if path == tmp_path / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *given, **options)

    monkeypatch.setattr(Path, "open", private)
    with pytest.raises(ResultsError, match=rf"{name} cannot be read: Permission denied.*change the permissions"):
        ResultsFolder.open(tmp_path)


def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def private(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", private)
    with pytest.raises(ResultsError, match=r"Permission denied.*change the permissions"):
        ResultsFolder.open(tmp_path)


def test_a_record_that_a_store_does_not_hand_out_is_an_error(
    write: Any, make_sorting: MakeSorting, object_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a sign that the results are somebody's."""
    where = place("s3://recordings/unread/kilosort4")
    write(make_sorting(), where)

    def refused(location: str, *_: Any) -> Any:
        raise RecordingError(f"{location} may not be read.")

    monkeypatch.setattr(objects, "read_bytes", refused)
    with pytest.raises(RecordingError, match=f"{RECORD} may not be read"):
        ResultsFolder.open(where).somebodys()


def test_a_folder_in_a_files_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "templates.npy").mkdir()
    with pytest.raises(ResultsError, match=r"templates.npy is a folder, in the way"):
        ResultsFolder.open(tmp_path)


def test_where_nothing_can_be_put_beside_it_the_numbered_folder_lies_within(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a volume that is mounted into a container, what lies beside it is lost with the container."""
    put(tmp_path / "volume" / "spike_times.npy", b"of another sorter")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.warns(CurationWarning, match="results-1"):
        aside = write(make_sorting(), tmp_path / "volume")
    assert aside == tmp_path / "volume" / "results-1"
    assert contents(aside) == {"spike_times.npy": b"of another sorter"}


def test_where_nothing_can_be_renamed_out_of_it_the_numbered_folder_lies_within(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bind mounts and quotas do not look like other file systems."""
    where, real = tmp_path / "volume", Path.rename
    put(where / "spike_times.npy", b"of another sorter")

    def rename(path: Path, target: Path) -> Path:
        if path.is_relative_to(where) and not target.is_relative_to(where):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.warns(CurationWarning, match="results-1"):
        aside = write(make_sorting(), where)
    assert contents(where / "results-1") == {"spike_times.npy": b"of another sorter"}
    assert aside == where / "results-1" and names(tmp_path) == {"volume"}


def test_a_whole_bucket_holds_the_numbered_folder(write: Any, make_sorting: MakeSorting, object_store: Any) -> None:
    object_store.client.create_bucket(Bucket="whole")
    where = place("s3://whole")
    put(where / "spike_times.npy", b"of another sorter")
    with pytest.warns(CurationWarning, match="s3://whole/results-1"):
        aside = write(make_sorting(), where)
    assert contents(aside) == {"spike_times.npy": b"of another sorter"}


def test_large_objects_are_copied_as_well(object_store: Any, monkeypatch: pytest.MonkeyPatch, where: Place) -> None:
    if isinstance(where, Path):
        pytest.skip("files are renamed")
    put(where / "a", b"content")
    monkeypatch.setattr(objects, "_COPIED_BYTES", 3)
    objects.copy(str(where / "a"), str(where / "b"), 7)
    assert contents(where) == {"a": b"content", "b": b"content"}


# -- before the results are complete ------------------------------------------------------------------


def early(where: Place, tmp_path: Path, **files: bytes) -> Place:
    """Add files early, as plots that are drawn while a sort goes on."""
    draft = tmp_path / "draft"
    draft.mkdir(exist_ok=True)
    for name, content in files.items():
        (draft / f"{name}.png").write_bytes(content)
    return ResultsFolder.open(where).add_early(draft)


def test_early_files_are_ours_and_go_with_the_results(
    write: Any, make_sorting: MakeSorting, where: Place, tmp_path: Path
) -> None:
    assert early(where, tmp_path, drift_amount=b"1", drift_scatter=b"2") == where
    assert names(where) == {"drift_amount.png", "drift_scatter.png", RECORD}
    assert early(where, tmp_path, drift_amount=b"3", diagnostics=b"4") == where
    assert read_whole(where / "drift_amount.png") == b"3"
    results = ResultsFolder.open(where)
    assert results.somebodys() == [] and results.missing("any", ["diagnostics.png"]) is None
    write(make_sorting(drift=None, peaks=None), where)
    assert not {"drift_amount.png", "drift_scatter.png"} & names(where)
    assert read_whole(where / "diagnostics.png") == b"a picture"
    assert ResultsFolder.open(where).somebodys() == []


def with_labels(where: Place) -> None:
    put(where / "cluster_group.tsv", "cluster_id\tgroup\n0\tgood\n")


def by_another_sorter(where: Place) -> None:
    for name in ("spike_times.npy", "ops.npy", "drift_amount.png"):
        put(where / name, "of another sorter")
    with_labels(where)


@pytest.mark.filterwarnings("ignore::ks4stream.errors.CurationWarning")
@pytest.mark.parametrize("owner", ["nobody", "curated", "another sorter"])
def test_early_files_leave_a_sorting_until_it_is_replaced(
    write: Any, make_sorting: MakeSorting, where: Place, tmp_path: Path, owner: str
) -> None:
    if owner == "another sorter":
        if isinstance(where, Path):
            where.mkdir()
        by_another_sorter(where)
    else:
        write(make_sorting(), where)
    if owner == "curated":
        with_labels(where)
    before = contents(where)
    for content in (b"1", b"2"):
        assert early(where, tmp_path, drift_amount=content) == where / EARLY
    assert contents(where) == {**before, f"{EARLY}/drift_amount.png": b"2"}
    aside = write(make_sorting(n_units=3), where)
    assert (aside is None) == (owner == "nobody")
    if aside is not None:
        assert read_whole(aside / "cluster_group.tsv") == before["cluster_group.tsv"]
    assert read_whole(where / "drift_amount.png") == b"a picture" and EARLY not in names(where)
    assert ResultsFolder.open(where).somebodys() == []


def test_early_files_leave_the_same_result(write: Any, make_sorting: MakeSorting, where: Place, tmp_path: Path) -> None:
    write(make_sorting(), where)
    with_labels(where)
    before = contents(where)
    early(where, tmp_path, drift_amount=b"1")
    write(make_sorting(), where)
    assert contents(where) == before


def test_an_early_file_that_was_changed_is_left_alone(where: Place, tmp_path: Path) -> None:
    assert early(where, tmp_path, drift_amount=b"1") == where
    put(where / "drift_amount.png", "mine")
    assert early(where, tmp_path, drift_amount=b"2") == where / EARLY
    assert read_whole(where / "drift_amount.png") == b"mine"
    assert ResultsFolder.open(where).somebodys() == ["drift_amount.png"]


def test_early_files_make_a_sorting_of_nothing_else(where: Place, tmp_path: Path) -> None:
    """Tables of a user that only look like those of a sorting."""
    others = {"metrics.csv": b"cluster_id,snr\n0,3\n", "spike_counts.npy": b"1", "cluster_info.tsv": b"2"}
    if isinstance(where, Path):
        where.mkdir()
    for name, content in others.items():
        put(where / name, content)
    assert early(where, tmp_path, drift_amount=b"1") == early(where, tmp_path, drift_scatter=b"2") == where
    assert ResultsFolder.open(where).somebodys() == []
    assert others.items() <= contents(where).items() and not ResultsFolder.open(where).holds_sorting()


def test_files_of_results_are_exchanged(write: Any, make_sorting: MakeSorting, tmp_path: Path) -> None:
    where = tmp_path / "kilosort4"
    write(make_sorting(), where)
    put(where / "drift_amount.png", "changed")
    (tmp_path / "draft").mkdir()
    for name in ("diagnostics.png", "drift_amount.png", "temp_wh.dat", "ops.npy"):
        (tmp_path / "draft" / name).write_bytes(b"1")
    results = ResultsFolder.open(where)
    results.exchange(tmp_path / "draft")
    assert read_whole(where / "drift_amount.png") == read_whole(where / "ops.npy") == b"1"
    assert results.somebodys() == ["drift_amount.png", "ops.npy"]
    assert results.holds_sorting() and results.missing(fingerprint(make_sorting()), ["temp_wh.dat"]) == set()


def test_a_kill_while_early_files_are_added_leaves_only_ours(
    write: Any, make_sorting: MakeSorting, where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install, calls = ResultsFolder._install, []

    def killed(self: ResultsFolder, entry: Path, about: Any) -> Any:
        calls.append(entry.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return install(self, entry, about)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResultsFolder, "_install", killed)
        early(where, tmp_path, drift_amount=b"1", drift_scatter=b"2")
    assert names(where) == {"drift_amount.png", RECORD}
    assert ResultsFolder.open(where).somebodys() == []


def test_an_early_file_that_is_kept_belongs_to_the_results_afterwards(
    write: Any, make_sorting: MakeSorting, where: Place, tmp_path: Path
) -> None:
    early(where, tmp_path, spike_positions=b"1", drift_amount=b"2", drift_scatter=b"3")
    sorting = make_sorting(drift=None, peaks=None)
    write(sorting, where, kept={"drift_amount.png", "spike_positions.png", "diagnostics.png"})
    assert "drift_scatter.png" not in names(where)
    assert read_whole(where / "drift_amount.png") == b"2"
    assert read_whole(where / "spike_positions.png") == b"a picture"  # which is one of the new results
    assert ResultsFolder.open(where).somebodys() == []
    write(sorting, where)  # the same result: nothing is touched
    assert read_whole(where / "drift_amount.png") == b"2"
    write(make_sorting(n_units=3, drift=None, peaks=None), where)
    assert "drift_amount.png" not in names(where)


@pytest.mark.filterwarnings("ignore::ks4stream.errors.CurationWarning")
@pytest.mark.parametrize("is_shown", [True, False])
def test_a_preprocessed_copy_beside_another_result_is_added_to_the_next(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, is_shown: bool
) -> None:
    sorting, where = make_sorting(), tmp_path / "kilosort4"
    write(make_sorting(n_units=3), where)
    with_labels(where)
    content = b"\1\2" * (sorting.n_samples * sorting.n_chan_file)
    with written_early(where) as draft:
        (draft / "temp_wh.dat").write_bytes(content)
    assert "temp_wh.dat" not in names(where) and ResultsFolder(where).somebodys() == ["cluster_group.tsv"]
    copy = where / "temp_wh.dat"
    assert write(sorting, where, kept={copy.name}, preprocessed=copy if is_shown else None) == tmp_path / "kilosort4-1"
    assert copy.read_bytes() == content and EARLY not in names(where)
    assert ("temp_wh.dat" in (where / "params.py").read_text()) == is_shown
    with written_early(where) as draft:  # of the same result, which has it
        (draft / "temp_wh.dat").write_bytes(content)
    assert write(sorting, where, kept={copy.name}) is None and EARLY not in names(where)
    assert ResultsFolder.open(where).somebodys() == []
    copy.unlink()
    with written_early(where) as draft:  # of the same result, which lacks it
        (draft / "temp_wh.dat").write_bytes(content)
    write(sorting, where, kept={copy.name})
    assert copy.read_bytes() == content and ResultsFolder.open(where).somebodys() == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_preprocessed_copy_that_was_written_early_is_kept(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    sorting, where = make_sorting(), tmp_path / "kilosort4"
    copy = where / "temp_wh.dat"
    with pytest.raises(ResultsError, match="There is no preprocessed copy"):
        write(sorting, where, preprocessed=copy)
    with written_early(where) as draft:
        (draft / copy.name).write_bytes(b"short")
    with pytest.raises(ResultsError, match="has 5 bytes, but the preprocessed traces"):
        write(sorting, where, preprocessed=copy)
    content = b"\1\2" * (sorting.n_samples * sorting.n_chan_file)
    with written_early(where) as draft:
        (draft / copy.name).write_bytes(content)
    inode = copy.stat().st_ino
    write(sorting, where, preprocessed=copy)
    assert copy.read_bytes() == content
    assert (copy.stat().st_ino == inode) == has_links
    assert "dat_path = ['temp_wh.dat']" in (where / "params.py").read_text()
    assert ResultsFolder.open(where).somebodys() == []
    assert not [name for name in names(where) if name.startswith(".ks4stream-")]
