"""Spikes as Kilosort4's functions hand them to each other: arrays ``st`` and ``tF``, in order of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import OpsError
from ks4stream.geometry import Regions
from ks4stream.io.mapped import release_pages, scratch_array
from ks4stream.io.tables import read_column, write_block
from ks4stream.kilosort4.ops import settings_of, template_channels_of, tiling_in
from ks4stream.run import Run
from ks4stream.stages.detection import Peaks
from ks4stream.stages.matching import Spikes, template_regions
from ks4stream.stages.preprocessing import Preprocessor


def drift_table(peaks: Peaks, tiles: Preprocessor, above: float, scratch: Path) -> NDArray[np.float64]:
    """Kilosort4's ``st0``: the peaks of the first pass with scores above some threshold, in order of time.

    Returns
    -------
    ndarray of float64, shape (n_peaks, 6)
        Seconds, counted from the first sorted sample; depth in µm; score; template centre; batch; template centre. (In
        Kilosort4, the fourth column is the universal template and the sixth its centre; here, each centre has one.)
    """
    n_peaks = sum(int(np.count_nonzero(read_column(receipt, "score") > above)) for receipt in peaks.receipts)
    table = scratch_array((n_peaks, 6), np.float64, scratch)
    tiling, at = tiles.tiling, 0
    for receipt in peaks.receipts:
        sample, centre, depth_um, score = (read_column(receipt, n) for n in ("sample", "centre", "depth_um", "score"))
        order = np.lexsort((depth_um, score, sample))
        order = order[score[order] > above]
        columns = ((sample - tiling.start) / tiles.sampling_rate_hz, depth_um, score, centre, tiling.tile_of(sample))
        table[at : at + len(order)] = np.column_stack([*columns, centre])[order]
        at += len(order)
        release_pages(table)
    return table


def table_of(spikes: Spikes, start: int, n_pcs: int, scratch: Path) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Kilosort4's ``st`` and ``tF``, in order of time and then of template.

    Parameters
    ----------
    spikes : Spikes
    start : int
        First sorted sample.
    n_pcs : int
    scratch : path
        Folder for features that are too many for memory.

    Returns
    -------
    st : ndarray of float64, shape (n_spikes, 3)
        Time in samples, counted from `start`; template; score.
    tF : ndarray of float32, shape (n_spikes, nearest_chans, n_pcs)
    """
    counted = [_counted(spikes, block) for block in range(len(spikes.receipts))]
    n_spikes = sum(int(rows.sum()) for rows in counted)
    st = np.zeros((n_spikes, 3))
    for column, name in enumerate(("sample", "template", "score")):
        parts = (read_column(receipt, name)[rows] for receipt, rows in zip(spikes.receipts, counted, strict=True))
        st[:, column] = np.concatenate([np.zeros(0), *parts])
    order = np.lexsort((st[:, 1], st[:, 0]))
    shape = (n_spikes, spikes.template_channels.shape[1], n_pcs)
    features, rank, at = scratch_array(shape, np.float32, scratch), np.argsort(order), 0
    for receipt, rows in zip(spikes.receipts, counted, strict=True):
        features[rank[at : at + int(rows.sum())]] = read_column(receipt, "features")[rows]
        at += int(rows.sum())
        release_pages(features)
    st[:, 0] -= start
    return st[order], features


def _counted(spikes: Spikes, block: int) -> NDArray[np.bool_]:
    counted = np.ones(spikes.receipts[block].n_rows, bool)
    counted[spikes.dropped[block]] = False
    return counted


def spikes_from(
    run: Run,
    tiles: Preprocessor,
    regions: Regions,
    st: NDArray[np.float64],
    tF: NDArray[np.float32],
    template_channels: NDArray[np.int64],
    threshold: NDArray[np.float64],
    artifacts: NDArray[np.int64],
) -> Spikes:
    """Write spikes that a caller has passed to files of blocks, from which they can be clustered.

    They are removed with the scratch folder of the run. All of them are clustered, even those below the `threshold`
    (v,) of their template, which only decides whether a cluster counts as a unit.
    """
    order = np.lexsort((st[:, 1], st[:, 0]))
    sample = st[order, 0].astype(np.int64) + tiles.tiling.start
    region_of = template_regions(template_channels, tiles.probe, regions)
    folder = run.scratch / uuid4().hex  # within the results folder, which all workers see
    folder.mkdir()
    blocks = run.blocks(tiles.tiling) if len(template_channels) else []
    first = np.array([block[0].start for block in blocks], np.int64)
    edges = np.concatenate([[0], np.searchsorted(sample, first[1:]), [len(sample)]])
    receipts = []
    for number in range(len(blocks)):
        rows = order[edges[number] : edges[number + 1]]
        columns = {
            "sample": sample[edges[number] : edges[number + 1]],
            "template": st[rows, 1].astype(np.int32),
            "score": st[rows, 2].astype(np.float32),
            "features": tF[rows],
        }
        path = folder / f"spikes-{number:08d}.rows"
        receipts.append(write_block(path, columns, region_of[columns["template"]], len(regions)))
        release_pages(tF)
    return Spikes(
        receipts=receipts,
        first=first,
        dropped=[np.zeros(0, np.int64)] * len(receipts),
        artifacts=artifacts,
        template_channels=template_channels,
        region_of=region_of,
        threshold=threshold,
        sampling_rate_hz=tiles.sampling_rate_hz,
    )


def check_spikes(ops: dict[str, Any], st: NDArray[np.float64], tF: NDArray[np.float32]) -> None:
    """Check that spikes fit each other, the templates and the recording.

    Raises
    ------
    OpsError
        If they do not.
    """
    if st.ndim != 2 or st.shape[1] != 3 or tF.ndim != 3 or len(st) != len(tF):
        raise OpsError(
            f"st has shape {st.shape} and tF {tuple(tF.shape)}; they must be (n_spikes, 3) and (n_spikes, "
            "nearest_chans, n_pcs), as detect_spikes returns them. Drop the same spikes from both."
        )
    n_templates, n_slots = template_channels_of(ops).shape
    wanted = (n_slots, settings_of(ops).n_pcs)
    if tF.shape[1:] != wanted:
        raise OpsError(f"tF has shape {tuple(tF.shape)}; it must be (n_spikes, {wanted[0]}, {wanted[1]}), by ops.")
    tiling, nt = tiling_in(ops), settings_of(ops).nt
    if not np.isfinite(st).all():
        raise OpsError("st has values that are not numbers. Drop these spikes, from tF as well.")
    # Merging moves spikes of a unit by up to nt, so that those at the ends may lie a little outside.
    if len(st) and not (st[:, 0].min() >= -nt and st[:, 0].max() < tiling.stop - tiling.start + nt):
        raise OpsError(
            f"st has times from {st[:, 0].min():.0f} to {st[:, 0].max():.0f}, but {tiling.stop - tiling.start} samples "
            "are sorted. Times count from the first sorted sample."
        )
    if len(st) and not (st[:, 1].min() >= 0 and st[:, 1].max() < n_templates):
        raise OpsError(
            f"st has templates {st[:, 1].min():g} to {st[:, 1].max():g}, but ops has {n_templates}. Pass st and ops of "
            "the same detect_spikes."
        )


def in_order(st: NDArray[np.float64], unit: NDArray[Any]) -> NDArray[np.int64]:
    """Order of spikes by time and then by unit, as a sorting has them."""
    return np.lexsort((unit, st[:, 0]))
