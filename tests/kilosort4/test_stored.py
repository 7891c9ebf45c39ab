"""Results read back: from our folders, from Kilosort4's, and what is no result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream.errors import ResultsError
from ks4stream.io.phy import export_phy
from ks4stream.kilosort4.stored import load_sorting
from ks4stream.stages.units import labels


@pytest.fixture
def folder(make_sorting: Any, tmp_path: Path) -> Path:
    """The Phy files of a sorting, with extra variables."""
    return export_phy(make_sorting(), tmp_path / "kilosort4", save_extra_vars=True)


def test_seven_values(folder: Path, make_sorting: Any) -> None:
    sorting = make_sorting()
    found = load_sorting(folder, device=torch.device("cpu"))
    assert isinstance(found, tuple) and len(found) == 7
    ops, st, clu, similar_templates, is_ref, est_contam_rate, kept_spikes = found
    assert ops["settings"]["nt"] == sorting.settings.nt and torch.is_tensor(ops["wPCA"])
    assert st.dtype == np.int64 and np.array_equal(st, sorting.sample[sorting.kept])
    assert clu.dtype == np.int32 and np.array_equal(clu, sorting.unit[sorting.kept])
    assert similar_templates.dtype == np.float32 and np.array_equal(similar_templates, sorting.similarity)
    expected = [labels(st[clu == unit], sorting.sampling_rate_hz, 0.2) for unit in range(4)]
    assert any(is_refractory for is_refractory, _ in expected)
    assert is_ref.dtype == np.float64 and est_contam_rate.dtype == np.float64
    assert list(zip(is_ref.tolist(), est_contam_rate.tolist(), strict=True)) == expected
    assert kept_spikes.dtype == bool and np.array_equal(kept_spikes, sorting.kept)


def test_twelve_values(folder: Path, make_sorting: Any) -> None:
    sorting = make_sorting()
    found = load_sorting(str(folder), "cpu", load_extra_vars=True)
    assert len(found) == 12
    tF, Wall, full_st, full_clu, full_amp = found[7:]
    assert torch.equal(tF, torch.from_numpy(sorting.features))
    assert torch.equal(Wall, torch.from_numpy(sorting.unit_features))
    assert full_st.shape == (400, 3) and np.array_equal(full_st[:, 0], sorting.sample - sorting.tiling.start)
    assert np.array_equal(full_clu, sorting.unit) and full_amp.shape == (400,)
    assert np.array_equal(full_clu[found[6]], found[2])


def test_a_curated_sorting(folder: Path) -> None:
    clu = np.load(folder / "spike_clusters.npy")
    np.save(folder / "spike_clusters.npy", np.where(np.isin(clu, [1, 3]), 4, clu))
    _, st, found, _, is_ref, est_contam_rate, _ = load_sorting(folder, "cpu")
    assert set(found) == {0, 2, 4} and len(is_ref) == len(est_contam_rate) == 5
    assert est_contam_rate[4] == labels(st[found == 4], 30_000.0, 0.2)[1]


def forget(folder: Path) -> None:
    """Make an ``ops.npy`` like Kilosort4's, which has nothing of ours."""
    ops = np.load(folder / "ops.npy", allow_pickle=True).item()
    del ops["ks4stream"]
    np.save(folder / "ops.npy", np.array(ops, dtype=object), allow_pickle=True)


def test_labels_are_those_of_the_sorting(make_sorting: Any, tmp_path: Path) -> None:
    """Of five refractory units, the second is locked to artifacts, and the third fires for a second of eleven."""
    artifacts = np.stack([np.arange(60) * 5_000 + 2_000, np.arange(60) * 5_000 + 2_100], 1)
    regular = 3_000 * np.arange(1, 60) + 617 * (np.arange(1, 60) % 4)
    trains = [regular, artifacts[:, 1] + 40, 100_000 + 500 * np.arange(60), regular + 777, regular + 1_555]
    sample = np.concatenate(trains)
    unit = np.repeat(np.arange(5), [len(train) for train in trains]).astype(np.int32)[np.argsort(sample)]
    sorting = make_sorting(
        n_spikes=len(sample),
        n_units=5,
        sample=np.sort(sample),
        unit=unit,
        template=unit,
        artifacts=artifacts,
        kept=np.ones(len(sample), bool),
        refractory=np.ones(5, bool),
    )
    export_phy(sorting, tmp_path)
    found = load_sorting(tmp_path, "cpu")[4]
    of_file = [
        line.split("\t")[1] == "good" for line in (tmp_path / "cluster_KSLabel.tsv").read_text().splitlines()[1:]
    ]
    assert of_file == sorting.good.tolist() == [True, False, False, True, True]
    refractory = [labels(np.sort(train), 30_000.0, 0.2)[0] for train in trains]
    assert found.tolist() == [good and also for good, also in zip(of_file, refractory, strict=True)]
    assert found.any() and refractory[1]


def test_tables_of_kilosort4(folder: Path, make_sorting: Any) -> None:
    forget(folder)
    sorting = make_sorting()
    *_, is_ref, est_contam_rate, _ = load_sorting(folder, "cpu")
    assert is_ref.dtype == np.float64 and np.array_equal(is_ref, sorting.good)
    np.testing.assert_allclose(est_contam_rate, sorting.contamination, rtol=0, atol=0.0006)


def test_tables_of_kilosort4_that_were_curated(folder: Path) -> None:
    """Phy writes them again, with units that were merged or split."""
    forget(folder)
    clu = np.load(folder / "spike_clusters.npy")
    np.save(folder / "spike_clusters.npy", np.where(clu == 1, 4, clu))
    (folder / "cluster_KSLabel.tsv").write_text("cluster_id\tKSLabel\n0\tgood\n2\tmua\n3\tgood\n4\tgood\n")
    (folder / "cluster_ContamPct.tsv").write_text("cluster_id\tContamPct\n4\t7.5\n3\t2.0\n2\t100.0\n0\t1.0\n")
    _, _, found, _, is_ref, est_contam_rate, _ = load_sorting(folder, "cpu")
    assert set(found) == {0, 2, 3, 4}
    assert is_ref.tolist() == [True, False, False, True, True]
    np.testing.assert_allclose(est_contam_rate, [0.01, np.nan, 1.0, 0.02, 0.075])


def test_an_empty_sorting(make_sorting: Any, tmp_path: Path) -> None:
    export_phy(make_sorting(n_spikes=0, n_units=0), tmp_path, save_extra_vars=True)
    found = load_sorting(tmp_path, "cpu", load_extra_vars=True)
    assert [len(values) for values in found[1:]] == [0] * 11


def test_a_folder_of_an_early_kilosort4(folder: Path) -> None:
    """It did not save which spikes are kept."""
    (folder / "kept_spikes.npy").unlink()
    found = load_sorting(folder, "cpu")
    assert found[6].all() and len(found[6]) == len(found[1])


def test_what_holds_no_results(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="There is no results folder"):
        load_sorting(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"there is no ops\.npy, spike_times\.npy.*shank_<n>"):
        load_sorting(tmp_path)
    (folder / "tF.npy").unlink()
    with pytest.raises(ResultsError, match=r"has no tF\.npy\. Sort with save_extra_vars=True"):
        load_sorting(folder, load_extra_vars=True)
    assert len(load_sorting(folder, "cpu")) == 7


class Runs:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > ran",)


@pytest.mark.parametrize("name", ["ops", "spike_times", "spike_clusters", "similar_templates", "kept_spikes"])
def test_nothing_pickled_is_run(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    np.save(folder / f"{name}.npy", np.array([Runs()], dtype=object), allow_pickle=True)
    with pytest.raises(ResultsError, match=f"{name}.npy"):
        load_sorting(folder, "cpu")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("spike_times.npy", b"", "cannot be read"),
        ("ops.npy", b"\x93NUMPY", "cannot be read"),
        ("cluster_KSLabel.tsv", b"cluster_id\tKSLabel\nzero\tgood\n", "not a table of units"),
        ("cluster_KSLabel.tsv", b"cluster_id\tKSLabel\n0\n", "not a table of units"),
        ("cluster_ContamPct.tsv", b"cluster_id\tContamPct\n0\tmuch\n", "not a number"),
        ("cluster_ContamPct.tsv", b"\xff\xfe", "not a table of units"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: bytes, said: str) -> None:
    forget(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ResultsError, match=said) as caught:
        load_sorting(folder, "cpu")
    assert name in str(caught.value)
