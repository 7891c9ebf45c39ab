"""Whose files lie in a results folder: what a sort may replace, what it moves, and what it leaves alone."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import CurationWarning, ResultsError
from ks4stream.io.objects import listing
from ks4stream.io.phy import write_preprocessed_copy
from ks4stream.io.places import ObjectPath, Place, below, place, read_whole, remove, size_of
from ks4stream.io.records import appearing
from ks4stream.io.results_folder import LOG, PLOTS, RECORD, STORE, WRITTEN, ResultsFolder, fingerprint
from ks4stream.report import announce, finish
from ks4stream.results import Sorting

MakeSorting = Callable[..., Sorting]


@pytest.fixture(params=["folder", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place of either kind, for results."""
    if request.param == "folder":
        (tmp_path / "session").mkdir()
        return tmp_path / "session" / "kilosort4"
    pytest.importorskip("obstore")
    request.getfixturevalue("object_store")
    return ObjectPath(f"s3://recordings/results/{tmp_path.name}-{os.getpid()}-{time.monotonic_ns()}/kilosort4")


def put(where: Place, content: bytes | str) -> None:
    with appearing(where) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def contents(where: Place) -> dict[str, bytes]:
    """All that lies in a place, by path."""
    return {path: read_whole(where / path) for path, _ in listing(str(where))}


def names(where: Place) -> set[str]:
    return {name for name, _ in below(where)}


def draw_nothing(sorting: Sorting, folder: Path) -> None:
    """The plots' files without plots, which take a second each."""
    for name in PLOTS[: 4 if sorting.drift is not None else 2]:
        (folder / name).write_bytes(b"a picture")


def store_nothing(sorting: Sorting, store: Path, *, features: bool) -> None:
    """A store of two files instead of a hundred, each of which is a request to a bucket."""
    (store / "sample").mkdir(parents=True, exist_ok=True)
    for name in (".zgroup", "sample/0"):
        (store / name).write_bytes(b"a chunk")


def n_spikes_in(where: Place) -> int:
    return len(np.load(BytesIO(read_whole(where / "kept_spikes.npy"))))


@pytest.fixture
def write(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Place | None]:
    """A function that writes a sorting's results where they belong, as a sort does, but for plots and store."""
    monkeypatch.setattr("ks4stream.report.plots.write_plots", draw_nothing)
    monkeypatch.setattr("ks4stream.report.save_sorting", store_nothing)

    def write(sorting: Sorting, where: Place, *recording: str, **options: Any) -> Place | None:
        results = ResultsFolder.open(where, recording)
        folder = where if isinstance(where, Path) else tmp_path_factory.mktemp("here")
        return finish(sorting, results, folder, **options)

    return write


def test_all_that_is_written_stands_in_the_list(make_sorting: MakeSorting, tmp_path: Path) -> None:
    sorting = make_sorting()
    finish(sorting, ResultsFolder.open(tmp_path), save_extra_vars=True)
    write_preprocessed_copy(sorting, tmp_path, [])
    assert names(tmp_path) == {*WRITTEN, RECORD, STORE}


OTHERS = {
    "recording.npy": b"the recording", "behaviour.npy": b"1", "trials.tsv": b"trial\tcorrect\n0\t1\n",
    "video.png": b"2", "notes.md": b"# Good day", "plan.csv": b"depth,region\n", "lfp/data.npy": b"3", "run.tsv": b"",
}  # fmt: skip


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
    put(where / ".phy" / "cache.bin", b"") if isinstance(where, ObjectPath) else (where / ".phy").mkdir()
    assert write(make_sorting(n_spikes=50, drift=None), where, save_features=False) is None
    assert not names(where) & {"tF.npy", "pc_features.npy", "drift_amount.png", ".phy"}
    assert names(where) >= {"spike_times.npy", STORE, "diagnostics.png"}
    assert not names(where.parent) - {where.name}, "nothing was moved"


def edit(name: str, content: bytes | str) -> Callable[[Place], None]:
    return lambda where: put(where / name, content)


def merge_two_units(where: Place) -> None:
    put(where / "spike_clusters.npy", read_whole(where / "spike_clusters.npy")[:-1] + b"\x07")


CURATIONS = {
    "labels": edit("cluster_group.tsv", "cluster_id\tgroup\n0\tgood\n1\tnoise\n"),
    "merges": merge_two_units,
    "a note of Phy's": edit("cluster_note.tsv", "cluster_id\tnote\n0\tlovely\n"),
    "metrics": edit("quality.csv", "cluster_id,snr\n0,5.0\n"),
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
        return  # each is some hundred requests
    write(make_sorting(), where)
    curate(where)
    put(where / "notes.md", "not of the sorting")
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
    put(tmp_path / "a" / LOG, "theirs\n")
    put(tmp_path / "a" / "spike_times.npy", b"1")
    results = ResultsFolder.open(tmp_path / "a")
    with (tmp_path / "a" / LOG).open("a") as log:
        log.write("ours\n")
    with pytest.warns(CurationWarning):
        finish(make_sorting(), results)
    assert (tmp_path / "a-1" / LOG).read_text() == "theirs\n"


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


def test_the_same_result_is_written_again_where_some_of_it_is_gone_and_nothing_was_curated(
    write: Any, make_sorting: MakeSorting, where: Place
) -> None:
    write(make_sorting(), where)
    before = names(where)
    remove(where / "templates.npy")
    write(make_sorting(), where)
    assert names(where) == before
    CURATIONS["labels"](where)
    remove(where / "pc_features.npy")  # to make room
    assert write(make_sorting(), where) is None
    assert names(where) == before - {"pc_features.npy"}


def test_half_a_result_is_replaced(
    write: Any, make_sorting: MakeSorting, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sort was killed while it wrote: nobody has curated that."""
    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "_described", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(make_sorting(), where, save_extra_vars=True)
    assert size_of(where / "spike_times.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(make_sorting(), where) is None
    assert "tF.npy" not in names(where)


@pytest.mark.parametrize(
    "change",
    [{"n_spikes": 399}, {"contamination": [0.02, 0.3, 0.6, 0.9]}, {"artifacts": [[0, 9]]}, {"drift": None},
     {"similarity": np.ones((4, 4))}],
)  # fmt: skip
def test_another_result_has_another_fingerprint(make_sorting: MakeSorting, change: dict[str, Any]) -> None:
    assert fingerprint(make_sorting(**change)) != fingerprint(make_sorting())
    assert fingerprint(make_sorting(**change)) == fingerprint(make_sorting(**change, seconds={}, files=("moved",)))


def test_options_of_writing_count(make_sorting: MakeSorting) -> None:
    assert fingerprint(make_sorting(), save_features=True) != fingerprint(make_sorting(), save_features=False)


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
    put(tmp_path / "kilosort4" / "params.py", b"of another sorter")
    read_only(monkeypatch, "params.py")
    with pytest.warns(CurationWarning):
        write(make_sorting(), tmp_path / "kilosort4")


def test_a_folder_in_a_files_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "templates.npy").mkdir()
    with pytest.raises(ResultsError, match=r"templates.npy is read-only, or a folder"):
        ResultsFolder.open(tmp_path)


def test_where_nothing_can_be_put_beside_it_the_numbered_folder_lies_within(
    write: Any, make_sorting: MakeSorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a volume that is mounted into a container, what lies beside it is lost with the container."""
    put(tmp_path / "volume" / "params.py", b"of another sorter")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.warns(CurationWarning, match="results-1"):
        aside = write(make_sorting(), tmp_path / "volume")
    assert aside == tmp_path / "volume" / "results-1"
    assert contents(aside) == {"params.py": b"of another sorter"}


def test_a_whole_bucket_holds_the_numbered_folder(
    write: Any, make_sorting: MakeSorting, object_store: Any
) -> None:
    object_store.client.create_bucket(Bucket="whole")
    where = place("s3://whole")
    put(where / "params.py", b"of another sorter")
    with pytest.warns(CurationWarning, match="s3://whole/results-1"):
        aside = write(make_sorting(), where)
    assert contents(aside) == {"params.py": b"of another sorter"}


def test_large_objects_are_copied_as_well(object_store: Any, monkeypatch: pytest.MonkeyPatch, where: Place) -> None:
    from ks4stream.io import objects

    if isinstance(where, Path):
        return
    put(where / "a", b"content")
    monkeypatch.setattr(objects, "_COPIED_BYTES", 3)
    objects.copy(str(where / "a"), str(where / "b"), 7)
    assert contents(where) == {"a": b"content", "b": b"content"}
