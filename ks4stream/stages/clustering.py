"""How a region's peaks or spikes are clustered, whichever stage asks (sections 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.kernels import clustering, graph
from ks4stream.kernels.graph import CHUNK, FeatureRows, ScatteredRows
from ks4stream.settings import Settings
from ks4stream.stages.base import Portable
from ks4stream.stages.needs import Load

GPU_FROM_SPIKES = 8192
"""Spikes of a region from which a GPU clusters them faster than a processor, where one is used at all. Fewer are too
little work for the thousands of small steps."""
GRAPH_BYTES = 160  # of a spike while it is clustered: its columns, order, template, ten links and their flags, labels


class ClusterMethod(Protocol):
    """Says which cluster each row belongs to; another method is a frozen, callable dataclass of this form."""

    @property
    def device(self) -> str:
        """Where rows are wanted: "cpu", "cuda"."""
        ...

    @property
    def max_peaks(self) -> int:
        """Peaks of a region beyond which only a sample need be clustered."""
        ...

    def __call__(
        self,
        rows: FeatureRows,
        *,
        sample: NDArray[np.int64] | None = None,
        sampling_rate_hz: float = 30_000.0,
        final: bool = False,
    ) -> NDArray[np.int64]:
        """Cluster the rows of one region.

        Parameters
        ----------
        rows : FeatureRows
            Of n peaks or spikes.
        sample : ndarray of int64, shape (n,), optional
            Their times, ascending, where these may speak against a cluster.
        sampling_rate_hz : float
        final : bool
            Whether the clusters are to be units, rather than templates to match with.

        Returns
        -------
        ndarray of int64, shape (n,)
            Labels, from 0 on without gaps.
        """
        ...


@dataclass(frozen=True, eq=False)
class GraphClustering(Portable):
    """Spikes joined to landmarks, communities of that graph, and a tree of them that is split where it should be."""

    reads: ClassVar[tuple[str, ...]] = (
        "cluster_neighbors",
        "cluster_downsampling",
        "max_cluster_subset",
        "cluster_init_seed",
        "ccg_threshold",
    )

    settings: Settings
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.part(*self.reads))

    def __call__(
        self,
        rows: FeatureRows,
        *,
        sample: NDArray[np.int64] | None = None,
        sampling_rate_hz: float = 30_000.0,
        final: bool = False,
    ) -> NDArray[np.int64]:
        """See :class:`ClusterMethod`."""
        settings = self.settings
        return clustering.cluster_region(
            rows,
            sample=sample,
            sampling_rate_hz=sampling_rate_hz,
            final=final,
            n_neighbors=settings.cluster_neighbors,
            downsampling=settings.cluster_downsampling,
            max_landmarks=settings.landmark_limit,
            seed=settings.cluster_init_seed,
            ccg_threshold=settings.ccg_threshold,
        )

    @property
    def max_peaks(self) -> int:
        """See :class:`ClusterMethod`: as many as landmarks may be drawn from."""
        return self.settings.cluster_downsampling * self.settings.landmark_limit

    @staticmethod
    def n_bytes(load: Load, n: int) -> int:
        """A graph of n spikes and its tree, beside the features."""
        d, settings = load.region_features, load.settings
        m = min(max(n // settings.cluster_downsampling, clustering.MIN_LANDMARKS), settings.landmark_limit, n)
        return int(
            GRAPH_BYTES * n
            + 8 * d * m
            + 12 * clustering.N_CANDIDATES * m  # landmarks, and what seeds would explain
            + 4 * graph.INNER_CHUNK * m  # distances
            + 24 * clustering.N_SEEDS * m  # links of landmarks to clusters
            + 20 * min(graph.CHUNK, n) * d  # rows at a time, spread out; of one cluster in double precision
            + 8 * clustering.N_SEEDS * d * d  # Σxxᵀ of every leaf
        )


def scattered_rows(
    features: NDArray[np.float32],
    kind: NDArray[np.integer[Any]],
    channels: NDArray[np.int64],
    union: NDArray[np.int64],
    n_channels: int,
    device: str,
) -> ScatteredRows:
    """Features (n, j, q), on the channels (k, j; −1: none) of each spike's kind (n,), as rows over those of `union`.

    They are on the device only if it repays that.
    """
    device = device if len(features) >= GPU_FROM_SPIKES else "cpu"
    slot = np.full(n_channels + 1, -1, np.int64)  # the last entry answers for −1
    slot[union] = np.arange(len(union))
    held = torch.from_numpy(features)
    if not isinstance(features, np.memmap):  # else they are too many for the device too, and go there piece by piece
        held = held.to(device)
    return ScatteredRows(held, torch.from_numpy(kind), torch.from_numpy(slot[channels]), len(union), device=device)


def cluster_means(
    rows: ScatteredRows, label: NDArray[np.int64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Weighted mean row (u, d) and summed weight (u,) of each label, summed in float64 in the rows' order."""
    n_labels = int(label.max()) + 1 if len(label) else 0
    total = torch.zeros(n_labels, rows.d, dtype=torch.float64)
    count = np.bincount(label, weight, n_labels).astype(np.float64)
    for first in range(0, rows.n, CHUNK):
        part = slice(first, first + CHUNK)
        values = rows.chunk(first, min(first + CHUNK, rows.n)).cpu().double()
        total.index_add_(0, torch.from_numpy(label[part]), values * torch.from_numpy(weight[part])[:, None])
    return (total / torch.from_numpy(count).clamp(min=1e-12)[:, None]).float().numpy(), count


def on_all_channels(mean: NDArray[np.float32], union: NDArray[np.int64], n_channels: int, n_pcs: int) -> Any:
    """Mean rows (u, d) over the channels of `union` as features (u, c, q), 0 on all others."""
    whole = np.zeros((len(mean), n_channels, n_pcs), np.float32)
    whole[:, union] = mean.reshape(len(mean), len(union), n_pcs)
    return whole
