"""Results folders with a few spikes, as a sorter writes them and as Phy changes them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Trains = Mapping[int, Sequence[int]]


def train(unit: int, n: int = 20, *, first: int = 0, shift: int = 0) -> list[int]:
    """Times of spikes that coincide with those of no other unit; `shift` is their jitter, in samples."""
    return [1000 * i + 40 * unit + shift for i in range(first, first + n)]


def write_folder(folder: Path, units: Trains, *, label: str = "mua", rate_hz: float = 30_000.0) -> Path:
    """What a sorter writes: its label is no decision."""
    folder.mkdir()
    times = np.array([time for train in units.values() for time in train], np.int64)
    of = np.array([unit for unit, train in units.items() for _ in train], np.int32)
    order = np.argsort(times, kind="stable")
    np.save(folder / "spike_times.npy", times[order])
    for name in ("spike_clusters", "spike_templates", "spike_detection_templates"):
        np.save(folder / f"{name}.npy", of[order])
    for name, column, value in (
        ("cluster_KSLabel.tsv", "KSLabel", label),
        ("cluster_group.tsv", "KSLabel", label),
        ("cluster_Amplitude.tsv", "Amplitude", "12.5"),
    ):
        write_table(folder / name, {column: dict.fromkeys(units, value)})
    (folder / "params.py").write_text(f"dat_path = ['../rec.bin']\nsample_rate = {rate_hz}\n")
    return folder


def write_table(path: Path, columns: Mapping[str, Mapping[int, str]]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")  # with the line ends of Phy
        rows.writerow(["cluster_id", *columns])
        for number in sorted({one for values in columns.values() for one in values}):
            rows.writerow([number, *(values.get(number, "") for values in columns.values())])


def merge(folder: Path, *units: int) -> int:
    """Merge units as Phy does; returns the new cluster."""
    clusters = np.load(folder / "spike_clusters.npy")
    new = int(clusters.max()) + 1
    clusters[np.isin(clusters, units)] = new
    np.save(folder / "spike_clusters.npy", clusters)
    return new


def split(folder: Path, unit: int, before: int) -> tuple[int, int]:
    """Split a unit at a time as Phy does; returns the new clusters."""
    clusters, times = np.load(folder / "spike_clusters.npy"), np.load(folder / "spike_times.npy")
    new, its = int(clusters.max()) + 1, clusters == unit
    clusters[its & (times < before)], clusters[its & (times >= before)] = new, new + 1
    np.save(folder / "spike_clusters.npy", clusters)
    return new, new + 1


def label(folder: Path, **columns: Mapping[int, str]) -> None:
    """Fill in columns as Phy does; its label is the group."""
    for name, values in columns.items():
        write_table(folder / f"cluster_{name}.tsv", {name: values})


def clusters_in(folder: Path) -> dict[int, list[int]]:
    """Times of the spikes of each cluster."""
    clusters, times = np.load(folder / "spike_clusters.npy"), np.load(folder / "spike_times.npy")
    return {int(one): times[clusters == one].tolist() for one in np.unique(clusters)}


def column_in(folder: Path, column: str, name: str = "") -> dict[int, str]:
    """A column of a table of clusters."""
    with (folder / (name or f"cluster_{column}.tsv")).open(newline="") as file:
        return {
            int(row.get("cluster_id") or row["old_cluster"]): row[column]
            for row in csv.DictReader(file, delimiter="\t")
        }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
