"""The graph that is clustered: every spike is linked to its nearest landmarks (section 6, steps 1 and 2).

There may be millions of spikes with many features, so they are read only in chunks; ten landmark numbers are kept
for each. Landmarks are a subset of the spikes, few enough to fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ks4stream.kernels.memory import in_chunks

CHUNK = 16_384  # spikes read, or swept over, at a time (section 6, cost)
INNER_CHUNK = 1024  # spikes whose distances to all landmarks are in memory at a time

SHARED_FROM = 0.8  # share of a group's spikes that have a channel if it is used to compare the group


class FeatureRows(Protocol):
    """The spikes of one region as rows of a matrix (n, d) that is never in memory as a whole."""

    @property
    def n(self) -> int:
        """Number of spikes."""

    @property
    def d(self) -> int:
        """Length of a row: channels of the region × components."""

    @property
    def device(self) -> torch.device:
        """Device of the rows."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """Rows ``start … stop−1``, shape (stop − start, d), float32."""

    def take(self, index: Tensor) -> Tensor:
        """Rows at `index` (int64), shape (len(index), d), float32."""


class ChannelRows(FeatureRows, Protocol):
    """Rows that have features on some of the region's channels."""

    def shared_columns(self, groups: Sequence[Tensor]) -> Tensor:
        """Columns of the channels that most spikes of each group have, int64; a group is an index (int64)."""


class ScatteredRows:
    """Rows computed on demand from compact features: a spike's features on its own channels, zeros elsewhere.

    Parameters
    ----------
    features : Tensor, shape (n, j, q), float32, noise s.d.
        Features on the nearest channels of each spike; may be a mapped file.
    kind : Tensor, shape (n,), int
        Template, or centre, of each spike: spikes of one kind have the same channels.
    slot_of : Tensor, shape (k, j), int64
        Index of each kind's channels among the channels of the region; −1 where the feature is padding or the
        channel does not belong to the region. No index occurs twice in a row.
    n_slots : int
        Number of channels of the region; ``d = n_slots · q``.
    device : torch.device or str, optional
        Device of the rows; by default that of the features.
    """

    def __init__(
        self, features: Tensor, kind: Tensor, slot_of: Tensor, n_slots: int, *, device: torch.device | str | None = None
    ) -> None:
        self._features, self._n_slots = features, n_slots
        self.n = features.shape[0]
        self.d = n_slots * features.shape[2]
        self.device = torch.device(device or features.device)
        self.kind = kind.to(features.device)
        # One additional slot takes the padding, and is cut off again.
        self._slot_of = torch.where(slot_of < 0, n_slots, slot_of).to(self.device)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Rows ``start … stop−1``."""
        return self._scatter(self._features[start:stop], self.kind[start:stop])

    def take(self, index: Tensor) -> Tensor:
        """Rows at `index`."""
        index = index.to(self._features.device)
        return self._scatter(self._features[index], self.kind[index])

    def shared_columns(self, groups: Sequence[Tensor]) -> Tensor:
        """Columns of the channels that at least :data:`SHARED_FROM` of the spikes of each group have."""
        shared = torch.ones(self._n_slots, dtype=torch.bool, device=self.device)
        for index in groups:
            slot = self._slot_of[self.kind[index.to(self.kind.device)].to(self.device).long()]
            count = torch.bincount(slot.flatten(), minlength=self._n_slots + 1)[:-1]
            shared &= count >= SHARED_FROM * len(index)
        return torch.nonzero(shared.repeat_interleave(self.d // self._n_slots))[:, 0]

    def _scatter(self, features: Tensor, kind: Tensor) -> Tensor:
        features = features.to(self.device)
        b, _, q = features.shape
        rows = torch.zeros((b, self._n_slots + 1, q), dtype=torch.float32, device=self.device)
        slot = self._slot_of[kind.to(self.device).long()]
        rows.scatter_(1, slot[:, :, None].expand(features.shape), features.float())
        return rows[:, : self._n_slots].reshape(b, self.d)


class SpikeGraph(NamedTuple):
    """Spikes and the landmarks they are linked to.

    Attributes
    ----------
    landmark : Tensor, shape (m,), int64
        Spike index of each landmark, ascending.
    neighbor : Tensor, shape (n, 10), int32
        Nearest landmarks of each spike, ascending.
    is_self : Tensor, shape (n, 10), bool
        Where a landmark is linked to itself. Such links do not count in the degrees.
    spike_degree : Tensor, shape (n,), int64
        kᵢ, the number of links of each spike.
    landmark_degree : Tensor, shape (m,), int64
        kⱼ, the number of links of each landmark.
    n_links : int
        Sum of the adjacency matrix (m in section 6).
    """

    landmark: Tensor
    neighbor: Tensor
    is_self: Tensor
    spike_degree: Tensor
    landmark_degree: Tensor
    n_links: int

    @property
    def n_spikes(self) -> int:
        """Number of spikes."""
        return self.neighbor.shape[0]

    @property
    def n_landmarks(self) -> int:
        """Number of landmarks."""
        return self.landmark.shape[0]


def choose_landmarks(n: int, *, downsampling: int, min_landmarks: int, max_landmarks: int) -> Tensor:
    """Choose evenly spaced spikes: one in `downsampling`, but at least `min_landmarks` and at most `max_landmarks`.

    If there are fewer than `min_landmarks` spikes, all of them.

    Returns
    -------
    Tensor, shape (m,), int64
        Indices, ascending.

    Examples
    --------
    >>> choose_landmarks(10, downsampling=4, min_landmarks=1, max_landmarks=100).tolist()
    [0, 3, 6]
    >>> choose_landmarks(4, downsampling=4, min_landmarks=100, max_landmarks=100).tolist()
    [0, 1, 2, 3]
    """
    wanted = min(max(-(-n // downsampling), min_landmarks), max_landmarks, n)
    return torch.arange(wanted, dtype=torch.int64) * n // max(wanted, 1)


def nearest_landmarks(
    rows: Tensor, landmarks: Tensor, half_squared: Tensor, n_neighbors: int, *, out: Tensor | None = None
) -> Tensor:
    """Find the nearest landmarks of each row; ties go to the first.

    Parameters
    ----------
    rows : Tensor, shape (n, d), float32
    landmarks : Tensor, shape (m, d), float32
    half_squared : Tensor, shape (m,), float32
        Half the squared norm of each landmark.
    n_neighbors : int
        At most m.
    out : Tensor, shape (n, m), float32, optional
        Buffer for the distances.

    Returns
    -------
    Tensor, shape (n, n_neighbors), int64
        Landmark numbers, ascending.
    """
    # ‖x − y‖² = ‖x‖² − 2(x·y − ‖y‖²/2): the first term is the same for all landmarks of a spike.
    nearness = torch.addmm(half_squared, rows, landmarks.T, beta=-1.0, out=out)
    m = landmarks.shape[0]
    if n_neighbors >= m:
        return torch.arange(m, device=rows.device).expand(rows.shape[0], m)
    value, index = torch.topk(nearness, n_neighbors + 1, dim=1)
    tied = torch.nonzero(value[:, n_neighbors - 1] == value[:, n_neighbors]).flatten()
    index = index[:, :n_neighbors]
    if tied.numel():  # topk may return any of them
        order = torch.sort(nearness[tied], dim=1, descending=True, stable=True).indices
        index[tied] = order[:, :n_neighbors]
    return index.sort(dim=1).values


def join_to_landmarks(rows: FeatureRows, landmark: Tensor, *, n_neighbors: int) -> SpikeGraph:
    """Link every spike to its nearest landmarks, by exact Euclidean distances, in chunks.

    Parameters
    ----------
    rows : FeatureRows
        Spikes of one region.
    landmark : Tensor, shape (m,), int64
        Indices of the spikes that are landmarks, ascending.
    n_neighbors : int
        Links per spike (``cluster_neighbors``); all landmarks if there are fewer.

    Returns
    -------
    SpikeGraph
    """
    landmark = landmark.to(rows.device)
    points = rows.take(landmark)  # (m, d)
    half_squared = 0.5 * (points * points).sum(1)
    n_links = min(n_neighbors, landmark.shape[0])
    neighbor = torch.empty((rows.n, n_links), dtype=torch.int32, device=rows.device)

    buffer = points.new_empty(0, len(points))  # the same for every chunk: new ones would fragment the heap

    def link(spikes: Tensor, links: Tensor) -> None:
        nonlocal buffer
        if len(buffer) < len(spikes):
            buffer = points.new_empty(len(spikes), len(points))
        links.copy_(nearest_landmarks(spikes, points, half_squared, n_links, out=buffer[: len(spikes)]))

    for start in range(0, rows.n, CHUNK):
        x = rows.chunk(start, min(start + CHUNK, rows.n))
        in_chunks(link, x, neighbor[start : start + len(x)], size=INNER_CHUNK)
    return graph_of(neighbor, landmark)


def graph_of(neighbor: Tensor, landmark: Tensor) -> SpikeGraph:
    """Complete a graph from its links: mark links of landmarks to themselves, and count the others.

    Parameters
    ----------
    neighbor : Tensor, shape (n, 10), int32
        Landmarks each spike is linked to.
    landmark : Tensor, shape (m,), int64
        Spike index of each landmark.
    """
    is_self = torch.zeros_like(neighbor, dtype=torch.bool)
    own = torch.arange(landmark.shape[0], dtype=neighbor.dtype, device=neighbor.device)
    is_self[landmark] = neighbor[landmark] == own[:, None]
    spike_degree = neighbor.shape[1] - is_self.sum(1)
    links = torch.bincount(neighbor.flatten(), minlength=landmark.shape[0])
    landmark_degree = links - is_self[landmark].any(1).long()
    return SpikeGraph(landmark, neighbor, is_self, spike_degree, landmark_degree, int(landmark_degree.sum()))
