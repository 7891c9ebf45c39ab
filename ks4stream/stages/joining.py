"""All spikes of all units in order of time, a block's worth at a time (section 10)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.io.mapped import ColumnWriter, release_pages
from ks4stream.io.tables import open_columns, read_column
from ks4stream.kernels.templates import roll_matrix
from ks4stream.probe import Probe
from ks4stream.results import Sorting, Waveforms
from ks4stream.stages.base import Run, Step
from ks4stream.stages.matching import Spikes
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.units import Units

SORTED_BYTES = 30  # of a spike in order of time, beside its features, while results are written
ROWS_PER_CHUNK = 16_384
BLOCKS_PER_CHUNK = 256  # whose spans within all trains are found together: 2 KB a cluster
BLOCKS_HELD = 3  # features of a span lie in its own block and, where spikes were moved, in its neighbours


SpikeColumns = dict[str, Any]
"""The columns of spikes of a :class:`~ks4stream.results.Sorting`, by name."""


@dataclass(frozen=True, eq=False)
class Join(Step[SpikeColumns]):
    """Put the spikes of all units in order of (time, unit), and say where each was; columns are mapped from files."""

    name = "joining"
    reads = ("n_pcs", "position_limit")

    units: Units
    spikes: Spikes
    waveforms: Waveforms
    probe: Probe

    def run(self, run: Run) -> SpikeColumns:
        """Append the spikes of one block after the other."""
        columns = ColumnWriter(run.scratch / uuid4().hex)
        columns.append(self._no_rows())
        for part in self.in_order():
            columns.append(part)
        return columns.arrays()

    def _no_rows(self) -> SpikeColumns:
        of_row = {"features": (self.spikes.template_channels.shape[1], self.settings.n_pcs)}
        return {
            spec.name: np.zeros((0, *of_row.get(spec.name, ())), spec.metadata["dtype"])
            for spec in fields(Sorting)
            if spec.metadata.get("dims", ())[:1] == ("n",)
        }

    def in_order(self) -> Iterator[SpikeColumns]:
        """Yield the spikes block by block."""
        if not len(self.units.features):
            return
        receipts, channels = self.spikes.receipts, self.spikes.template_channels
        components = torch.from_numpy(self.waveforms.components)
        first_row = np.cumsum([0] + [receipt.n_rows for receipt in receipts])

        @lru_cache(maxsize=BLOCKS_HELD)
        def features_of(block: int) -> NDArray[np.float32]:
            return read_column(receipts[block], "features")

        for found in _spans(self.units, self.spikes.first):
            features = np.empty((len(found["row"]), *receipts[0].row_shape("features")), np.float32)
            block_of = np.searchsorted(first_row, found["row"], side="right") - 1
            for block in np.unique(block_of).tolist():
                mine = block_of == block
                features[mine] = features_of(block)[found["row"][mine] - first_row[block]]
            for lag in np.unique(found["lag"][found["lag"] != 0]).tolist():
                moved = found["lag"] == lag
                features[moved] = features[moved] @ roll_matrix(components, lag).numpy()
            x_um, y_um = positions(features, found["template"], channels, self.probe, self.settings.position_limit)
            columns = {name: found[name] for name in ("sample", "unit", "template", "score", "kept")}
            yield columns | {"features": features, "x_um": x_um, "y_um": y_um}

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """The columns, on disk."""
        return Needs(cls.name, scratch_bytes=(4 * load.n_features + SORTED_BYTES) * load.n_spikes)


def _spans(units: Units, first: NDArray[np.int64]) -> Iterator[dict[str, NDArray[Any]]]:
    """Spikes between the first samples (b,) of two blocks; those before the first and after the last go with these."""
    clusters = units.clusters
    numbers = np.flatnonzero(units.unit_of >= 0)
    columns = [open_columns(receipt) for receipt in clusters.receipts]
    least, most = np.iinfo(np.int64).min // 2, np.iinfo(np.int64).max // 2
    edges = np.concatenate([[least], first[1:], [most]])
    for at in range(0, len(edges) - 1, BLOCKS_PER_CHUNK):
        some = edges[at : at + BLOCKS_PER_CHUNK + 1]
        bounds = np.empty((len(numbers), len(some)), np.int64)
        for row, number in enumerate(numbers.tolist()):
            region, unit = clusters.receipt_and_unit[number].tolist()
            start, stop = clusters.receipts[region].start[unit : unit + 2]
            times = columns[region]["sample"][start:stop]
            bounds[row] = start + np.searchsorted(times, some + units.lag_of[number])
        for span in range(len(some) - 1):
            yield _span(units, numbers, columns, bounds[:, span], bounds[:, span + 1])
            for mapped in columns:
                release_pages(mapped["sample"])


def _span(
    units: Units,
    numbers: NDArray[np.int64],
    columns: list[dict[str, NDArray[Any]]],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Spikes of some rows of each cluster, sorted by (time, unit)."""
    clusters = units.clusters
    filled = np.flatnonzero(stop > start)
    numbers, start, stop = numbers[filled], start[filled], stop[filled]
    region = clusters.receipt_and_unit[numbers, 0]
    parts = list(zip(region.tolist(), start.tolist(), stop.tolist(), strict=True))

    def column(name: str, dtype: str) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(columns[r][name][a:b] for r, a, b in parts)])

    number = np.repeat(numbers, stop - start)
    before, lag = column("sample", "int64"), units.lag_of[number]
    offset = [
        clusters.first[n] - clusters.receipts[r].start[k]
        for n, (r, k) in zip(numbers.tolist(), clusters.receipt_and_unit[numbers].tolist(), strict=True)
    ]
    kept = [units.kept[a + shift : b + shift] for (_, a, b), shift in zip(parts, offset, strict=True)]
    found: dict[str, NDArray[Any]] = {
        "sample": before - lag,
        "unit": units.unit_of[number].astype(np.int32),
        "template": column("template", "int32"),
        "score": column("score", "float32"),
        "kept": np.concatenate([np.zeros(0, bool), *kept]),
        "row": column("row", "int64"),
        "lag": lag,
    }
    order = np.lexsort((number, before, found["unit"], found["sample"]))
    return {name: values[order] for name, values in found.items()}


def positions(
    features: NDArray[np.float32],
    template: NDArray[np.int32],
    template_channels: NDArray[np.int64],
    probe: Probe,
    limit_um: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where each spike was: contacts weighted by the norm of the features there (section 10).

    Only channels closer than `limit_um` to the template's largest (its first) count.

    Returns
    -------
    x_um, y_um : ndarray of float32, shape (n,)
    """
    position = probe.positions_um[template_channels.clip(0)]  # (v, j, 2)
    near = np.linalg.norm(position - position[:, :1], axis=2) < max(limit_um, 1e-9)
    near &= template_channels >= 0
    found = np.zeros((len(template), 2), np.float32)
    for first in range(0, len(template), ROWS_PER_CHUNK):
        rows = slice(first, first + ROWS_PER_CHUNK)
        weight = np.linalg.norm(features[rows], axis=2) * near[template[rows]]
        total = np.maximum(weight.sum(axis=1), 1e-12)
        found[rows] = (weight[:, :, None] * position[template[rows]]).sum(axis=1) / total[:, None]
    return found[:, 0], found[:, 1]
