"""The positions of the contacts.

A :class:`Probe` holds the positions of the *sorted* channels and their columns in the file. It is a frozen
value, checked on construction; :mod:`ks4stream.io.probes` reads and writes probe files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ks4stream.errors import ProbeError

_MIN_SPACING_UM = 1.0  # the densest probes made have contacts 3 µm apart
_SAME_POSITION_UM = 1e-3  # contacts closer than this are one contact listed twice


@dataclass(frozen=True, eq=False)
class Probe:
    """Contacts of one recording, one row per channel that is sorted.

    Two probes are equal if they have the same channels at the same positions; names are not compared.

    Attributes
    ----------
    chan_map : ndarray of int64, shape (channel,)
        Column of each contact in the file, counted from 0.
    x_um, y_um : ndarray of float64, shape (channel,)
        Position across and along the probe, in µm; y grows towards the probe's base.
    shank : ndarray of int64, shape (channel,)
        Shank of each contact (Kilosort's ``kcoords``); any integers.
    n_chan_file : int or None
        Number of channels in the file; None if the probe's source does not say.
    name : str
        For messages and logs.

    Raises
    ------
    ProbeError
        On construction, if the geometry contradicts itself.

    Examples
    --------
    >>> probe = Probe([0, 1, 3], x_um=[0, 0, 0], y_um=[0, 25, 50], shank=[0, 0, 0])
    >>> probe.n_channels
    3
    >>> probe.drop_channels([1]).chan_map.tolist()
    [0, 3]
    """

    chan_map: NDArray[np.int64]
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    shank: NDArray[np.int64]
    n_chan_file: int | None = None
    name: str = "probe"

    def __post_init__(self) -> None:
        """Convert the fields to read-only arrays and check that they agree."""
        for field, values in {
            "chan_map": _integers(self.chan_map, "chan_map", self.name),
            "x_um": _positions(self.x_um, "x_um", self.name),
            "y_um": _positions(self.y_um, "y_um", self.name),
            "shank": _integers(self.shank, "shank", self.name),
        }.items():
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        self._check_lengths()
        self._check_chan_map()
        self._check_positions()
        self._check_units()
        if self.n_chan_file is not None:
            object.__setattr__(self, "n_chan_file", int(self.n_chan_file))
            self.check_file(self.n_chan_file)

    @classmethod
    def from_positions(
        cls,
        positions_um: ArrayLike,
        *,
        chan_map: ArrayLike | None = None,
        shank: ArrayLike | None = None,
        n_chan_file: int | None = None,
        name: str = "probe",
    ) -> Probe:
        """Make a probe from a table of positions.

        Parameters
        ----------
        positions_um : array_like, shape (channel, 2)
            x and y of each contact, in µm.
        chan_map : array_like, shape (channel,), optional
            Column of each contact in the file; by default contact i is column i.
        shank : array_like, shape (channel,), optional
            Shank of each contact; by default all are on shank 0.
        n_chan_file : int, optional
            Channels in the file.
        name : str, optional
            For messages and logs.

        Raises
        ------
        ProbeError
            If the table does not have shape (channel, 2), or the geometry contradicts itself.
        """
        table = np.asarray(positions_um, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 2:
            raise ProbeError(
                f"{name}: positions have shape {table.shape}, expected (channel, 2): "
                "one row per contact with its x and y in µm."
            )
        return cls(
            chan_map=np.arange(len(table)) if chan_map is None else chan_map,  # type: ignore[arg-type]
            x_um=table[:, 0],
            y_um=table[:, 1],
            shank=np.zeros(len(table), np.int64) if shank is None else shank,  # type: ignore[arg-type]
            n_chan_file=n_chan_file,
            name=name,
        )

    @property
    def n_channels(self) -> int:
        """Number of channels that are sorted."""
        return len(self.chan_map)

    @property
    def positions_um(self) -> NDArray[np.float64]:
        """Contact positions, shape (channel, 2), x and y in µm."""
        return np.column_stack([self.x_um, self.y_um])

    def select_shanks(self, shank_idx: int | Iterable[int]) -> Probe:
        """Keep the contacts of some shanks, in their current order.

        Parameters
        ----------
        shank_idx : int or iterable of int
            Shanks to keep, as named in ``shank``.

        Raises
        ------
        ProbeError
            If the probe does not have such a shank, or `shank_idx` is empty.
        """
        wanted = _integers(_one_or_many(shank_idx), "shank_idx", self.name)
        present = np.unique(self.shank)
        unknown = np.setdiff1d(wanted, present)
        if unknown.size:
            raise ProbeError(
                f"{self.name} has no shank {_listing(unknown)}; it has {_listing(present)}. "
                "Choose shank_idx among these."
            )
        if not wanted.size:
            raise ProbeError(f"{self.name}: shank_idx is empty; choose among the shanks {_listing(present)}.")
        return self._keep(np.isin(self.shank, wanted))

    def drop_channels(self, bad_channels: int | Iterable[int]) -> Probe:
        """Drop channels.

        Parameters
        ----------
        bad_channels : int or iterable of int
            Channels to drop, by their column in the *file* (values of ``chan_map``), as in
            Kilosort4's ``bad_channels``.

        Raises
        ------
        ProbeError
            If the probe has no contact on one of the channels, or no contact would be left.
        """
        bad = _integers(_one_or_many(bad_channels), "bad_channels", self.name)
        unknown = np.setdiff1d(bad, self.chan_map)
        if unknown.size:
            raise ProbeError(
                f"{self.name} has no contact on channel {_listing(unknown)}. bad_channels are columns of the "
                f"file, counted from 0; those of this probe are between {self.chan_map.min()} and "
                f"{self.chan_map.max()}."
            )
        keep = ~np.isin(self.chan_map, bad)
        if not keep.any():
            raise ProbeError(
                f"bad_channels names all {self.n_channels} channels of {self.name}: nothing is left to sort."
            )
        return self._keep(keep)

    def check_file(self, n_chan: int) -> None:
        """Check that a file with ``n_chan`` channels contains every channel of the probe.

        Parameters
        ----------
        n_chan : int
            Number of channels in the file, sorted or not.

        Raises
        ------
        ProbeError
            If the channel map points beyond the file.
        """
        beyond = self.chan_map[self.chan_map >= n_chan]
        if beyond.size:
            counts_from_one = self.chan_map.min() > 0 and beyond.max() == n_chan
            raise ProbeError(
                f"{self.name} maps {beyond.size} contact(s) to channel(s) up to {beyond.max()}, but the file has "
                f"{n_chan} channels (0 to {n_chan - 1}). "
                + ("The map has no channel 0 and seems to count from 1: subtract 1, or u" if counts_from_one else "U")
                + "se the probe this file was recorded with, or correct the number of channels (n_chan; n_chan_bin in "
                "run_kilosort)."
            )

    def digest(self) -> str:
        """Hash of what matters to a sort: channels, positions and shanks, but not the name.

        Returns
        -------
        str
            64 hexadecimal digits, the same on every machine.
        """
        content = hashlib.sha256(b"ks4stream.Probe/1")
        for values, dtype in [(self.chan_map, "<i8"), (self.x_um, "<f8"), (self.y_um, "<f8"), (self.shank, "<i8")]:
            content.update(len(values).to_bytes(8, "little"))
            content.update((values + 0).astype(dtype).tobytes())  # + 0 makes -0.0 the same as 0.0
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether both probes have the same channels at the same positions."""
        if not isinstance(other, Probe):
            return NotImplemented
        return self.n_chan_file == other.n_chan_file and self.digest() == other.digest()

    def __hash__(self) -> int:
        """Hash of the content, so that equal probes are the same dictionary key."""
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the fields, so that a copy is checked and made read-only again."""
        return type(self), (self.chan_map, self.x_um, self.y_um, self.shank, self.n_chan_file, self.name)

    def __repr__(self) -> str:
        """Describe the probe on one line."""
        n_shanks = len(np.unique(self.shank))
        return f"<Probe {self.name!r}: {self.n_channels} channels, {n_shanks} shank{'s' * (n_shanks != 1)}>"

    def _keep(self, mask: NDArray[np.bool_]) -> Probe:
        return replace(
            self, chan_map=self.chan_map[mask], x_um=self.x_um[mask], y_um=self.y_um[mask], shank=self.shank[mask]
        )

    def _check_lengths(self) -> None:
        lengths = {field: len(getattr(self, field)) for field in ("chan_map", "x_um", "y_um", "shank")}
        if len(set(lengths.values())) > 1:
            raise ProbeError(
                f"{self.name}: lengths differ: "
                + ", ".join(f"{field} {n}" for field, n in lengths.items())
                + ". Each must have one value per contact."
            )
        if self.n_channels == 0:
            raise ProbeError(f"{self.name} has no contacts; there is nothing to sort.")

    def _check_chan_map(self) -> None:
        if self.chan_map.min() < 0:
            raise ProbeError(
                f"{self.name}: chan_map holds {self.chan_map.min()}; channels are columns of the file, counted "
                "from 0. Leave unconnected contacts out."
            )
        channels, counts = np.unique(self.chan_map, return_counts=True)
        if (counts > 1).any():
            raise ProbeError(
                f"{self.name}: chan_map names channel {_listing(channels[counts > 1])} more than once; "
                "each contact must have its own channel."
            )

    def _check_positions(self) -> None:
        positions = np.column_stack([self.shank, np.round(self.positions_um / _SAME_POSITION_UM)]).astype(np.int64)
        _, which, counts = np.unique(positions, axis=0, return_inverse=True, return_counts=True)
        which = which.reshape(-1)
        if (counts > 1).any():
            crowd = np.flatnonzero(which == np.flatnonzero(counts > 1)[0])
            first = crowd[0]
            raise ProbeError(
                f"{self.name}: channels {_listing(self.chan_map[crowd])} are at the same position "
                f"(x {self.x_um[first]:g} µm, y {self.y_um[first]:g} µm, shank {self.shank[first]}). "
                "Correct their positions, put them on different shanks, or leave all but one out."
            )

    def _check_units(self) -> None:
        spacing = _median_spacing(self.positions_um, self.shank)
        if spacing is not None and spacing < _MIN_SPACING_UM:
            raise ProbeError(
                f"{self.name}: neighbouring contacts are {spacing:.3g} apart (median). Positions must be in µm, "
                "and no probe is that dense: these look like mm. Multiply them by 1000 (metres by 1 000 000)."
            )


def _one_or_many(values: Any) -> Any:
    if np.ndim(values) == 0 and not isinstance(values, Iterable):
        return [values]
    return values if isinstance(values, Sequence | np.ndarray) else list(values)


def _integers(values: ArrayLike, field: str, name: str) -> NDArray[np.int64]:
    """Return a new int64 vector; whole numbers stored as floats (as MATLAB does) are accepted."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ProbeError(f"{name}: {field} has shape {array.shape}, expected one value per contact.")
    if array.dtype.kind not in "iuf" and array.size:
        raise ProbeError(f"{name}: {field} holds {array.dtype} values, expected whole numbers.")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.round(array))).all():
        odd = array[~(np.isfinite(array) & (array == np.round(array)))][0]
        raise ProbeError(f"{name}: {field} holds {odd}, expected whole numbers.")
    return array.astype(np.int64)


def _positions(values: ArrayLike, field: str, name: str) -> NDArray[np.float64]:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ProbeError(f"{name}: {field} holds something that is not a number ({error}).") from error
    if array.ndim != 1:
        raise ProbeError(f"{name}: {field} has shape {array.shape}, expected one value per contact.")
    if not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array))
        raise ProbeError(
            f"{name}: {field} is {array[rows[0]]} for contact {_listing(rows)}. Every contact must have a position "
            "in µm; leave out those that have none."
        )
    return array


def _median_spacing(positions_um: NDArray[np.float64], shank: NDArray[np.int64]) -> float | None:
    """Median distance to the nearest contact on the same shank; None if no shank has two."""
    from scipy.spatial import cKDTree

    nearest = []
    for number in np.unique(shank):
        own = positions_um[shank == number]
        if len(own) > 1:
            nearest.append(cKDTree(own).query(own, k=2)[0][:, 1])
    return float(np.median(np.concatenate(nearest))) if nearest else None


def _listing(values: Iterable[Any], max_items: int = 8) -> str:
    """Format numbers for a message: all if they are few, otherwise the first ones and how many more there are."""
    items = [str(value) for value in values]
    if len(items) <= max_items:
        return ", ".join(items)
    return f"{', '.join(items[:max_items])} and {len(items) - max_items} more"
