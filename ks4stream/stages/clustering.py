"""Clustering the peaks or spikes of a region, for any stage (sections 6 and 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.kernels import clustering, graph
from ks4stream.kernels.drift import shift_at
from ks4stream.kernels.graph import CHUNK, ChannelRows, ScatteredRows
from ks4stream.kernels.splits import Conditions
from ks4stream.results import Drift
from ks4stream.settings import Settings
from ks4stream.stages.base import Portable
from ks4stream.stages.needs import CROWDED, Load

GPU_FROM_SPIKES = 8192
"""Number of spikes in a region from which a GPU clusters them faster than a CPU, if a GPU is used. With fewer, the
thousands of small steps are too little work for it."""
GRAPH_BYTES = 240
"""Per spike during clustering: its columns, order, template and labels, ten links and their flags, in the graph of the
region and in that of one of its clusters."""
LANDMARKS_PER_SPIKE, COMPARISONS, SPIKES_PER_REGION = 15_000, 1.5, 150
"""How long it takes to compare a spike with landmarks, to compare one with those of other clusters, and whatever a
region takes by itself, in spikes: fitted to recordings of 16 s, 2 min and 10 min."""


FAST_UM = 8.0
"""Movement between the batch before, a batch, and the one after, above which the displacement in it is not known."""


@dataclass(frozen=True, eq=False)
class Circumstances(Portable):
    """When and at which displacement of the tissue spikes were recorded.

    Attributes
    ----------
    tiling : Tiling
    sampling_rate_hz : float
    drift : Drift or None
        The correction that was applied.
    """

    tiling: Tiling
    sampling_rate_hz: float
    drift: Drift | None = None

    def of(self, sample: NDArray[np.int64], depth_um: float) -> Conditions:
        """Conditions of spikes at the times `sample` (n,), at some depth; the displacement is not known at jumps."""
        tiling, displacement_um = self.tiling, np.zeros(len(sample), np.float32)
        if self.drift is not None and np.any(self.drift.shift_um):
            depth, centre_um = np.array([depth_um]), self.drift.centre_um
            moved_um = np.array([-shift_at(depth, centre_um, shift_um)[0] for shift_um in self.drift.shift_um])
            around = np.lib.stride_tricks.sliding_window_view(np.pad(moved_um, 1, mode="edge"), 3)
            moved_um[np.ptp(around, axis=1) > FAST_UM] = np.nan
            displacement_um = moved_um[tiling.tile_of(sample)].astype(np.float32)
        elapsed = (sample - tiling.start) / max(tiling.stop - tiling.start, 1)
        return Conditions(sample, displacement_um, elapsed, np.zeros(len(sample), bool), self.sampling_rate_hz)


class ClusterMethod(Protocol):
    """Assigns rows to clusters.

    Another method is a frozen dataclass with this interface, named in :data:`CLUSTER_METHOD`.
    """

    def __init__(self, settings: Settings, device: str = "cpu", *, final: bool = False) -> None:
        """Take what it needs of the settings; `final` clusters will be units, others templates for matching."""
        ...

    @property
    def settings(self) -> Settings:
        """The settings that it reads."""
        ...

    @property
    def device(self) -> str:
        """Device on which rows are to be computed: "cpu", "cuda"."""
        ...

    def __call__(
        self, rows: ChannelRows, conditions: Conditions, *, components: torch.Tensor | None = None
    ) -> NDArray[np.int64]:
        """Cluster the rows of one region.

        Parameters
        ----------
        rows : ChannelRows
            Features of n peaks or spikes, in order of time.
        conditions : Conditions
            Their times, and the displacement of the tissue.
        components : Tensor, shape (q, w), float32, optional
            wPCA, on which the waveforms were projected.

        Returns
        -------
        ndarray of int64, shape (n,)
            Labels from 0, without gaps.
        """
        ...

    @property
    def max_peaks(self) -> int:
        """Maximum number of peaks of a region to cluster; of more, a subset is enough."""
        ...

    @staticmethod
    def n_bytes(load: Load, n: int) -> int:
        """Memory for clustering n peaks or spikes, without their features."""
        ...


@dataclass(frozen=True, eq=False)
class GraphClustering(Portable):
    """Communities in the graph of spikes and landmarks, joined where they are one neuron, and divided further."""

    reads: ClassVar[tuple[str, ...]] = (
        "cluster_neighbors",
        "cluster_downsampling",
        "max_cluster_subset",
        "cluster_init_seed",
    )

    settings: Settings
    device: str = "cpu"
    final: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        reads = (*self.reads, "ccg_threshold") if self.final else self.reads
        object.__setattr__(self, "settings", self.settings.part(*reads))

    def __call__(
        self, rows: ChannelRows, conditions: Conditions, *, components: torch.Tensor | None = None
    ) -> NDArray[np.int64]:
        """See :class:`ClusterMethod`."""
        settings = self.settings
        return clustering.cluster_region(
            rows,
            conditions,
            final=self.final,
            components=components,
            n_neighbors=settings.cluster_neighbors,
            downsampling=settings.cluster_downsampling,
            max_landmarks=settings.landmark_limit,
            seed=settings.cluster_init_seed,
            ccg_threshold=settings.ccg_threshold if self.final else math.inf,  # only final clusters are compared
        )

    @property
    def max_peaks(self) -> int:
        """See :class:`ClusterMethod`: as many as the maximum number of landmarks can represent."""
        return self.settings.cluster_downsampling * self.settings.landmark_limit

    @staticmethod
    def n_bytes(load: Load, n: int) -> int:
        """Bytes of the graph of n spikes and of the comparisons of its clusters, besides the features."""
        d, k, settings = load.region_features, clustering.N_COMPONENTS, load.settings
        m = min(max(n // settings.cluster_downsampling, clustering.MIN_LANDMARKS), settings.landmark_limit, n)
        return int(
            GRAPH_BYTES * n
            + 4 * k * n  # principal components
            + 8 * k * m
            + 20
            * d
            * (clustering.COMPONENT_SPIKES + 2 * clustering.COMPARED_SPIKES + d)  # from which they are computed
            + 12 * clustering.N_CANDIDATES * m  # landmarks, and the energy that candidates explain
            + 4 * graph.INNER_CHUNK * m  # distances
            + 24 * clustering.N_SEEDS * m  # links of landmarks to clusters
            + 20 * min(graph.CHUNK, n) * d  # a chunk of dense rows; those of one cluster in double precision
            + 24 * clustering.N_SEEDS * d  # means of every cluster
        )


def clustering_work(load: Load, n: float) -> float:
    """Work of clustering n peaks or spikes of all regions, in time that one takes by itself.

    Besides that, each spike is compared with all landmarks of its region; of large clusters, only some spikes are
    compared with those of others; and some time goes with each region, however few spikes it has.
    """
    settings, n_regions = load.settings, len(load.regions)
    in_crowded = CROWDED / 2 * n / n_regions  # where the typical spike is
    m = min(max(in_crowded / settings.cluster_downsampling, clustering.MIN_LANDMARKS), settings.landmark_limit)
    n_compared = min(n, clustering.COMPARED_SPIKES * load.n_templates)
    return n * (1 + m / LANDMARKS_PER_SPIKE) + COMPARISONS * n_compared + SPIKES_PER_REGION * n_regions


CLUSTER_METHOD: type[ClusterMethod] = GraphClustering
"""The method of both clusterings."""


def scattered_rows(
    features: NDArray[np.float32],
    kind: NDArray[np.integer[Any]],
    channels: NDArray[np.int64],
    union: NDArray[np.int64],
    n_channels: int,
    device: str,
) -> ScatteredRows:
    """Rows over the channels of `union`, from features (n, j, q) on the channels (k, j; −1: none) of each kind (n,).

    They are on the device only if there are enough of them.
    """
    device = device if len(features) >= GPU_FROM_SPIKES else "cpu"
    slot = np.full(n_channels + 1, -1, np.int64)  # the last entry is that of channel −1
    slot[union] = np.arange(len(union))
    tensor = torch.from_numpy(features)
    if not isinstance(features, np.memmap):  # mapped features are too large for the device, and are copied in chunks
        tensor = tensor.to(device)
    return ScatteredRows(tensor, torch.from_numpy(kind), torch.from_numpy(slot[channels]), len(union), device=device)


def cluster_means(
    rows: ScatteredRows, label: NDArray[np.int64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Weighted mean row (u, d) and total weight (u,) of each label, summed in float64 in the order of the rows."""
    n_labels = int(label.max()) + 1 if len(label) else 0
    total = torch.zeros(n_labels, rows.d, dtype=torch.float64)
    count = np.bincount(label, weight, n_labels).astype(np.float64)
    for first in range(0, rows.n, CHUNK):
        part = slice(first, first + CHUNK)
        values = rows.chunk(first, min(first + CHUNK, rows.n)).cpu().double()
        total.index_add_(0, torch.from_numpy(label[part]), values * torch.from_numpy(weight[part])[:, None])
    return (total / torch.from_numpy(count).clamp(min=1e-12)[:, None]).float().numpy(), count


def score_variances(
    rows: ScatteredRows, label: NDArray[np.int64], weight: NDArray[np.float64], mean: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Variance of the scores of each label's rows: their projections on its mean row (u, d), around its norm; (u,)."""
    means = torch.from_numpy(mean).double()
    norm = means.norm(dim=1)
    unit = means / norm.clamp_min(1e-12)[:, None]
    total, count = torch.zeros(len(mean), dtype=torch.float64), torch.zeros(len(mean), dtype=torch.float64)
    for first in range(0, rows.n, CHUNK):
        of, heavy = torch.from_numpy(label[first : first + CHUNK]), torch.from_numpy(weight[first : first + CHUNK])
        score = (rows.chunk(first, min(first + CHUNK, rows.n)).cpu().double() * unit[of]).sum(dim=1)
        total.index_add_(0, of, heavy * (score - norm[of]).square())
        count.index_add_(0, of, heavy)
    return (total / count.clamp_min(1e-12)).numpy()


def on_all_channels(mean: NDArray[np.float32], union: NDArray[np.int64], n_channels: int, n_pcs: int) -> Any:
    """Convert mean rows (u, d) over the channels of `union` to features (u, c, q), 0 on all other channels."""
    whole = np.zeros((len(mean), n_channels, n_pcs), np.float32)
    whole[:, union] = mean.reshape(len(mean), len(union), n_pcs)
    return whole
