"""Geometry of a sort, derived once from the probe and the settings: neighbourhoods, centres, regions.

Everything is decided by distance and shank, never by channel number; ties go to the lower index. Plain NumPy;
channel indices are in probe order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, SettingsWarning
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.settings import Settings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MIN_REFERENCE_CHANNELS = 16  # a shank with fewer good channels is referenced together with others (section 1.2)
FEWEST_REFERENCE_CHANNELS = 6  # fewer are not referenced: the median of so few has much of a spike
WINDOW_CHANNELS, WINDOW_SPAN_UM = 16, 200.0  # in which artifacts are told by their reach, at least (section 1.3)
FAR_SHARE = 0.25  # of the channels of a window, which are compared with the largest one
NEURON_REACH_UM, MIN_FAR = 250.0, 0.25
"""Distance that no neuron reaches, and share of what it reaches anywhere that an artifact has on nearer channels. The
waveforms of neurons fall to less than a tenth within 100 µm, but dense probes are short."""
PEAK_NEIGHBOURS, ALONE_NEIGHBOURS = 9, 13  # section 2
WIDE_PROBE_UM = 200.0  # 2-D arrays have one column of regions per this much width (section 5)
SAME_DEPTH_UM = 1.0  # depths closer than this are one row of contacts (section 3)


def distances_um(a: Floats, b: Floats) -> Floats:
    """Euclidean distances between positions (n, 2) and (m, 2): (n, m)."""
    return np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2))


def nearest_positions(
    a: Floats, b: Floats, count: int, allowed: NDArray[np.bool_] | None = None
) -> tuple[Ints, Floats]:
    """Find the `count` positions of `b` nearest to each position of `a`, nearest first; padded with −1.

    Parameters
    ----------
    a, b : ndarray, shape (n, 2) and (m, 2)
        Positions in µm.
    allowed : ndarray of bool, shape (n, m), optional
        Pairs that may be neighbours (the same shank, say).

    Returns
    -------
    index : ndarray of int64, shape (n, count)
        −1 where fewer positions are allowed.
    distance : ndarray of float64, shape (n, count)
        In µm; infinite where the index is −1.
    """
    index = np.full((len(a), count), -1, np.int64)
    distance = np.full((len(a), count), np.inf)
    kept = min(count, len(b))
    for first in range(0, len(a), 512):  # in chunks: the distances of thousands of centres would take much memory
        rows = slice(first, first + 512)
        d = distances_um(a[rows], b)
        if allowed is not None:
            d[~allowed[rows]] = np.inf
        # Distances that differ only by rounding count as equal: the order on a grid must not depend on the last bit.
        order = np.argsort(np.round(d, 6), axis=1, kind="stable")[:, :kept]
        near = np.take_along_axis(d, order, axis=1)
        index[rows, :kept] = np.where(np.isfinite(near), order, -1)
        distance[rows, :kept] = near
    return index, distance


def channel_neighbours(probe: Probe, count: int, *, same_shank: bool = True, dead: Ints | None = None) -> list[Ints]:
    """For each channel its `count` nearest live channels, itself first; empty for a dead channel."""
    alive = np.ones(probe.n_channels, bool)
    alive[[] if dead is None else dead] = False
    allowed = alive[:, None] & alive[None, :]
    if same_shank:
        allowed &= probe.shank[:, None] == probe.shank[None, :]
    positions = np.column_stack([probe.x_um, probe.y_um])
    index, _ = nearest_positions(positions, positions, min(count, probe.n_channels), allowed)
    return [row[row >= 0] for row in index]


def padded(lists: list[Ints], *, fill: int | None = None) -> Ints:
    """Stack lists of indices in one array (n, longest), padding each with `fill`, or its first entry (0 if empty).

    >>> padded([np.array([3, 4]), np.array([5])]).tolist(), padded([np.array([3, 4]), np.array([5])], fill=-1).tolist()
    ([[3, 4], [5, 5]], [[3, 4], [5, -1]])
    """
    stacked = np.zeros((len(lists), max(map(len, lists), default=1) or 1), np.int64)
    for number, row in enumerate(lists):
        stacked[number] = fill if fill is not None else row[0] if len(row) else 0
        stacked[number, : len(row)] = row
    return stacked


def reference_groups(probe: Probe, dead: Ints) -> list[tuple[Ints, Ints]]:
    """For each common reference the channels it is computed from, and those it is subtracted from (section 1.2).

    There is none of fewer than :data:`FEWEST_REFERENCE_CHANNELS`.
    """
    good = np.setdiff1d(np.arange(probe.n_channels), dead)
    groups, others = [], []
    for shank in np.unique(probe.shank):
        members = np.flatnonzero(probe.shank == shank)
        used = np.intersect1d(members, good)
        if len(used) >= MIN_REFERENCE_CHANNELS:
            groups.append((used, members))
        else:
            others.append(members)
    if others and len(good) >= FEWEST_REFERENCE_CHANNELS:
        groups.append((good, np.sort(np.concatenate(others))))
    return groups


class ArtifactWindow(NamedTuple):
    """Some neighbouring channels, of which an artifact reaches most.

    Attributes
    ----------
    channels : ndarray of int64, shape (w,)
    far : ndarray of float32, shape (w, w)
        Row: a channel. Columns: equal weights of the quarter of the channels that is farthest from it, 0 elsewhere.
    least : ndarray of float32, shape (w,)
        For each channel, the share of what it reaches anywhere that an artifact has there, at least.
    """

    channels: Ints
    far: NDArray[np.float32]
    least: NDArray[np.float32]


def artifact_windows(probe: Probe, dead: Ints) -> list[ArtifactWindow]:
    """Parts of the probe in which artifacts are told from spikes by how far they reach (section 1.3).

    They are the halves of the good channels by shank and depth, and the half between, or all where halves have too few
    channels or are too short; none if even all are.
    """
    good = np.setdiff1d(np.arange(probe.n_channels), dead)
    good = good[np.lexsort((good, probe.y_um[good], probe.shank[good]))]
    half = len(good) // 2
    halves = [good[:half], good[half // 2 : half // 2 + half], good[half:]]
    for parts in (halves, [good]):
        if all(len(part) >= WINDOW_CHANNELS and _span_um(probe, part) >= WINDOW_SPAN_UM for part in parts):
            return [_window(part, probe.positions_um[part]) for part in parts]
    return []


def _span_um(probe: Probe, channels: Ints) -> float:
    return float(np.ptp(probe.positions_um[channels], axis=0).max())


def _window(channels: Ints, positions_um: Floats) -> ArtifactWindow:
    n = max(round(FAR_SHARE * len(channels)), 1)
    apart_um = np.round(distances_um(positions_um, positions_um), 6)
    order = np.argsort(-apart_um, axis=1, kind="stable")[:, :n]
    far = np.zeros((len(channels), len(channels)), np.float32)
    np.put_along_axis(far, order, 1 / n, axis=1)
    nearest_um = np.take_along_axis(apart_um, order, axis=1)[:, -1]
    return ArtifactWindow(channels, far, np.where(nearest_um > NEURON_REACH_UM, 0, MIN_FAR).astype(np.float32))


def vertical_pitch_um(probe: Probe) -> float:
    """Median spacing of the distinct depths of each shank's contacts; 1 µm where every shank has one depth."""
    spacings = [np.diff(_distinct_depths(probe.y_um[probe.shank == shank])) for shank in np.unique(probe.shank)]
    joined = np.concatenate(spacings)
    return float(np.median(joined)) if len(joined) else 1.0


def _distinct_depths(values: Floats) -> Floats:
    """Sort values and drop those within SAME_DEPTH_UM of the previous one."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], np.diff(ordered) > SAME_DEPTH_UM])]


@dataclass(frozen=True, eq=False)
class Centres:
    """Centres of the universal templates, and their channels and neighbours.

    Attributes
    ----------
    position_um : ndarray, shape (k, 2)
    shank : ndarray of int64, shape (k,)
    channels : ndarray of int64, shape (k, j)
        Nearest channels of the same shank, nearest first; −1 where the shank has fewer.
    weights : ndarray of float32, shape (k, s, j)
        Spatial Gaussians of unit norm; 0 where there is no channel.
    neighbours : ndarray of int64, shape (k, m)
        Nearest centres of the same shank, itself first; padded with the centre itself.
    pitch_um : float
        ``dmin``.
    """

    position_um: Floats
    shank: Ints
    channels: Ints
    weights: NDArray[np.float32]
    neighbours: Ints
    pitch_um: float

    def __len__(self) -> int:
        return len(self.shank)


def template_centres(probe: Probe, settings: Settings, dead: Ints | None = None) -> Centres:
    """Place the universal templates (section 3): a grid per shank, centres far from every live contact dropped.

    Raises
    ------
    ProbeError
        If no centre is within ``max_channel_distance`` of a contact.
    """
    pitch = settings.dmin if settings.dmin is not None else vertical_pitch_um(probe)
    contacts = np.column_stack([probe.x_um, probe.y_um])
    grids = [_grid(contacts[probe.shank == shank], pitch / 2, settings.dminx / 2) for shank in np.unique(probe.shank)]
    position = np.concatenate(grids)
    shank = np.repeat(np.unique(probe.shank), [len(grid) for grid in grids])
    n_slots = min(settings.nearest_chans, probe.n_channels)
    if n_slots < settings.nearest_chans:
        warn(
            f"nearest_chans={settings.nearest_chans} but the probe has {probe.n_channels} channels; using {n_slots}.",
            SettingsWarning,
        )
    alive = ~np.isin(np.arange(probe.n_channels), [] if dead is None else dead)
    channels, distance = nearest_positions(
        position, contacts, n_slots, (shank[:, None] == probe.shank[None, :]) & alive
    )
    close = distance[:, 0] < settings.max_channel_distance
    if not close.any():
        raise ProbeError(
            f"None of the {len(position)} template centres is within max_channel_distance="
            f"{settings.max_channel_distance} µm of a contact; the nearest is {distance[:, 0].min():.1f} µm away. "
            "Raise max_channel_distance, or lower dmin and dminx."
        )
    position, shank, channels, distance = position[close], shank[close], channels[close], distance[close]
    near, _ = nearest_positions(position, position, settings.nearest_templates, shank[:, None] == shank[None, :])
    near = near[:, (near >= 0).any(axis=0)]
    return Centres(
        position_um=position,
        shank=shank,
        channels=channels,
        weights=_gaussians(distance, settings.min_template_size, settings.template_sizes),
        neighbours=np.where(near >= 0, near, np.arange(len(near))[:, None]),
        pitch_um=pitch,
    )


def _grid(contacts: Floats, step_y_um: float, step_x_um: float) -> Floats:
    (x0, y0), (x1, y1) = contacts.min(axis=0), contacts.max(axis=0)
    x = np.linspace(x0, x1, round((x1 - x0) / step_x_um) + 1)
    y = np.arange(y0, y1 + step_y_um * 1e-6, step_y_um)
    return np.column_stack([np.tile(x, len(y)), np.repeat(y, len(x))])


def _gaussians(distance: Floats, smallest_um: float, n_sizes: int) -> NDArray[np.float32]:
    """Weights exp(−d² / (σ (1 + i))²), normalised over the slots: (k, j) to (k, s, j)."""
    widths = smallest_um * (1 + np.arange(n_sizes))
    weights = np.exp(-((distance[:, None, :] / widths[:, None]) ** 2))
    norm = np.linalg.norm(weights, axis=2, keepdims=True)
    return (weights / np.maximum(norm, np.finfo(float).tiny)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Regions:
    """Groups of template centres of one shank whose peaks are clustered together (section 5).

    Attributes
    ----------
    position_um : ndarray, shape (r, 2)
    shank : ndarray of int64, shape (r,)
    of_centre : ndarray of int64, shape (k,)
        Region of each template centre.
    """

    position_um: Floats
    shank: Ints
    of_centre: Ints

    def __len__(self) -> int:
        return len(self.shank)

    def region_at(self, position_um: Floats, shank: Ints) -> Ints:
        """Region nearest to each position (n, 2) on its shank: (n,)."""
        index, _ = nearest_positions(position_um, self.position_um, 1, shank[:, None] == self.shank[None, :])
        return index[:, 0]


def clustering_regions(centres: Centres, settings: Settings) -> Regions:
    """Divide each shank into regions of about two vertical pitches of the contacts."""
    positions, shanks = [], []
    for shank in np.unique(centres.shank):
        inside = centres.position_um[centres.shank == shank]
        y0, y1, pitch = inside[:, 1].min(), inside[:, 1].max(), centres.pitch_um
        y = np.arange(y0 + pitch - 1, y1 + pitch + 1, 2 * pitch)
        width = np.ptp(inside[:, 0])
        n_columns = settings.x_centers or max(1, round(width / WIDE_PROBE_UM))
        x = inside[:, 0].min() + width * (np.arange(n_columns) + 0.5) / n_columns
        positions.append(np.column_stack([np.tile(x, len(y)), np.repeat(y, len(x))]))
        shanks.append(np.full(len(x) * len(y), shank, np.int64))
    position, shank_of = np.concatenate(positions), np.concatenate(shanks)
    draft = Regions(position, shank_of, np.zeros(0, np.int64))
    owner = draft.region_at(centres.position_um, centres.shank)
    used, compact = np.unique(owner, return_inverse=True)
    return Regions(position[used], shank_of[used], compact.astype(np.int64))


def region_channels(channels: Ints, region: Ints, n_regions: int) -> list[Ints]:
    """For each region the union of the channels (n, j; −1 for none) of its members."""
    return [np.unique(rows[rows >= 0]) for rows in (channels[region == r] for r in range(n_regions))]
