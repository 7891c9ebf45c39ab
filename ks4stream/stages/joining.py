"""All spikes of all units in time order, one block at a time (section 10)."""

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

SORTED_BYTES = 30  # per spike of the final columns, besides its features, while results are written
ROWS_PER_CHUNK = 16_384
BLOCKS_PER_CHUNK = 256  # whose spans within all trains are looked up together: 2 KB per cluster
BLOCKS_HELD = 3  # the features of a span are in its own block and, where spikes were shifted, in the adjacent ones


SpikeColumns = dict[str, Any]
"""The per-spike columns of a :class:`~ks4stream.results.Sorting`, by name."""


@dataclass(frozen=True, eq=False)
class Join(Step[SpikeColumns]):
    """Sort the spikes of all units by (time, unit), and locate each of them; columns are memory-mapped files."""

    name = "joining"
    reads = ("n_pcs", "position_limit")

    units: Units
    spikes: Spikes
    waveforms: Waveforms
    probe: Probe

    def run(self, run: Run) -> SpikeColumns:
        """Append the spikes of one block after another."""
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

        for span in _spans(self.units, self.spikes.first):
            features = np.empty((len(span["row"]), *receipts[0].row_shape("features")), np.float32)
            block_of = np.searchsorted(first_row, span["row"], side="right") - 1
            for block in np.unique(block_of).tolist():
                in_block = block_of == block
                features[in_block] = features_of(block)[span["row"][in_block] - first_row[block]]
            for lag in np.unique(span["lag"][span["lag"] != 0]).tolist():
                moved = span["lag"] == lag
                features[moved] = features[moved] @ roll_matrix(components, lag).numpy()
            x_um, y_um = positions(features, span["template"], channels, self.probe, self.settings.position_limit)
            columns = {name: span[name] for name in ("sample", "unit", "template", "score", "kept")}
            yield columns | {"features": features, "x_um": x_um, "y_um": y_um}

    @classmethod
    def needs(cls, load: Load) -> Needs:
        """The columns, on disk."""
        scratch_bytes = (4 * load.n_features + SORTED_BYTES) * load.n_spikes
        return Needs(cls.name, scratch_bytes=scratch_bytes, work=load.n_spikes)


def _spans(units: Units, first: NDArray[np.int64]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the spikes of each block, by the first samples (b,) of the blocks; earlier and later ones are included."""
    clusters = units.clusters
    numbers = np.flatnonzero(units.unit_of >= 0)
    columns = [open_columns(receipt) for receipt in clusters.receipts]
    earliest, latest = np.iinfo(np.int64).min // 2, np.iinfo(np.int64).max // 2
    all_edges = np.concatenate([[earliest], first[1:], [latest]])
    for block in range(0, len(all_edges) - 1, BLOCKS_PER_CHUNK):
        edges = all_edges[block : block + BLOCKS_PER_CHUNK + 1]
        bounds = np.empty((len(numbers), len(edges)), np.int64)
        for row, number in enumerate(numbers.tolist()):
            region, in_region = clusters.receipt_and_number[number].tolist()
            start, stop = clusters.receipts[region].start[in_region : in_region + 2]
            times = columns[region]["sample"][start:stop]
            bounds[row] = start + np.searchsorted(times, edges + units.lag_of[number])
        for span in range(len(edges) - 1):
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
    """Spikes in rows `start` to `stop` of each cluster, sorted by (time, unit)."""
    clusters = units.clusters
    filled = np.flatnonzero(stop > start)
    numbers, start, stop = numbers[filled], start[filled], stop[filled]
    region = clusters.receipt_and_number[numbers, 0]
    parts = list(zip(region.tolist(), start.tolist(), stop.tolist(), strict=True))

    def column(name: str, dtype: str) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(columns[r][name][a:b] for r, a, b in parts)])

    number = np.repeat(numbers, stop - start)
    before, lag = column("sample", "int64"), units.lag_of[number]
    offset = [
        clusters.first[n] - clusters.receipts[r].start[k]
        for n, (r, k) in zip(numbers.tolist(), clusters.receipt_and_number[numbers].tolist(), strict=True)
    ]
    kept = [units.kept[a + shift : b + shift] for (_, a, b), shift in zip(parts, offset, strict=True)]
    columns_of_span: dict[str, NDArray[Any]] = {
        "sample": before - lag,
        "unit": units.unit_of[number].astype(np.int32),
        "template": column("template", "int32"),
        "score": column("score", "float32"),
        "kept": np.concatenate([np.zeros(0, bool), *kept]),
        "row": column("row", "int64"),
        "lag": lag,
    }
    order = np.lexsort((number, before, columns_of_span["unit"], columns_of_span["sample"]))
    return {name: values[order] for name, values in columns_of_span.items()}


def positions(
    features: NDArray[np.float32],
    template: NDArray[np.int32],
    template_channels: NDArray[np.int64],
    probe: Probe,
    limit_um: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Position of each spike: mean of the contacts, weighted by the norm of the features on them (section 10).

    Only channels closer than `limit_um` to the template's largest channel (its first) are used.

    Returns
    -------
    x_um, y_um : ndarray of float32, shape (n,)
    """
    position = probe.positions_um[template_channels.clip(0)]  # (v, j, 2)
    near = np.linalg.norm(position - position[:, :1], axis=2) < max(limit_um, 1e-9)
    near &= template_channels >= 0
    located = np.zeros((len(template), 2), np.float32)
    for first in range(0, len(template), ROWS_PER_CHUNK):
        rows = slice(first, first + ROWS_PER_CHUNK)
        weight = np.linalg.norm(features[rows], axis=2) * near[template[rows]]
        total = np.maximum(weight.sum(axis=1), 1e-12)
        located[rows] = (weight[:, :, None] * position[template[rows]]).sum(axis=1) / total[:, None]
    return located[:, 0], located[:, 1]
