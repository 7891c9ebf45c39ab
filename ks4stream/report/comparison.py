"""How a sorting agrees with another one of the same recording: which units only one of them has."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ResultsError
from ks4stream.results import Sorting
from ks4stream.scoring import score

MAX_SPIKES = 2_000_000  # of both sortings that are compared
N_WINDOWS = 50  # of time, evenly spaced, in which spikes are compared if there are more


def compared(sorting: Sorting, other: Sorting, name: str) -> dict[str, Any]:
    """Compare two sortings of one recording; only their spikes and tilings are read.

    Parameters
    ----------
    sorting, other : Sorting
    name : str
        What the other is called.

    Returns
    -------
    dict
        As ``compare`` in :mod:`ks4stream.report.page`.

    Raises
    ------
    ResultsError
        If they are of different recordings.
    """
    digests = {one.provenance.recording_digest for one in (sorting, other)} - {""}
    if sorting.sampling_rate_hz != other.sampling_rate_hz or len(digests) > 1:
        raise ResultsError(
            f"{name} is a sorting of another recording ({other.provenance.recording or 'unknown'}, "
            f"{other.sampling_rate_hz:g} Hz); this one is of {sorting.provenance.recording or 'unknown'}, "
            f"{sorting.sampling_rate_hz:g} Hz. Compare sortings of the same recording."
        )
    start = max(sorting.tiling.start, other.tiling.start)
    stop = max(start, min(sorting.tiling.stop, other.tiling.stop))
    share = min(1.0, MAX_SPIKES / max(sorting.n_spikes + other.n_spikes, 1))
    edges = np.linspace(start, stop, N_WINDOWS + 1)[:-1] if share < 1 else np.array([start], float)
    windows = [(int(edge), int(edge + share * (stop - start) / len(edges))) for edge in edges]
    spikes, others = _spikes_in(sorting, windows), _spikes_in(other, windows)
    found = score(*spikes, *others, sampling_rate_hz=sorting.sampling_rate_hz)
    same = found.is_matched
    return {
        "name": name,
        "sampled": share < 1,
        "rows": [
            {"unit": int(unit), "other": int(label), "agreement": round(float(agreement), 4)}
            for unit, label, agreement in zip(
                found.truth_ids[same], found.matched_unit[same], found.accuracy[same], strict=True
            )
        ],
        "gained": found.truth_ids[~same].tolist(),
        "lost": np.setdiff1d(found.sorted_ids, found.matched_unit[same]).tolist(),
        "not_compared": sorting.n_units + other.n_units - len(found.truth_ids) - len(found.sorted_ids),
    }


def _spikes_in(sorting: Sorting, windows: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times and units of the kept spikes in some windows of time."""
    parts = [slice(*np.searchsorted(sorting.sample, window).tolist()) for window in windows]
    sample = np.concatenate([sorting.sample[:0], *(sorting.sample[part][sorting.kept[part]] for part in parts)])
    unit = np.concatenate([sorting.unit[:0], *(sorting.unit[part][sorting.kept[part]] for part in parts)])
    return sample, unit.astype(np.int64)
