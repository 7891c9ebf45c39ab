"""The traces, read only when they are needed.

A :class:`Recording` is a frozen description: where samples come from (a :class:`Source`), their sampling rate, and
where the contacts are. Creating one reads nothing; :meth:`Recording.read` reads one stretch of time, and
:attr:`Recording.traces` is all of it as a lazy array. Files are opened by :mod:`ks4stream.io.recordings`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.probe import Probe

if TYPE_CHECKING:
    import dask.array
    import xarray


SAME_RATE = 1e-3
"""Share by which two sampling rates may differ and still be the same: metadata hold measured rates, people give
nominal ones."""


def is_same_rate(one_hz: float, other_hz: float) -> bool:
    """Whether two sampling rates are the same.

    >>> is_same_rate(30_000, 29_999.95), is_same_rate(30_000, 25_000)
    (True, False)
    """
    return abs(one_hz - other_hz) <= SAME_RATE * other_hz


@dataclass(frozen=True)
class FlatFile:
    """Samples as they lie in a file or object: channels interleaved, one sample after the other, without gaps.

    Attributes
    ----------
    path : str
        The file's absolute path, or the object's URL.
    dtype : str
        Type of the stored samples with its byte order, as NumPy writes it: "<i2".
    offset_bytes : int
        Where the first sample starts.
    n_samples, n_channels : int
        Shape of what is read.
    """

    path: str
    dtype: str
    offset_bytes: int
    n_samples: int
    n_channels: int

    @property
    def end_bytes(self) -> int:
        """Where the last sample ends."""
        return self.offset_bytes + self.n_samples * self.n_channels * np.dtype(self.dtype).itemsize


@runtime_checkable
class Source(Protocol):
    """Samples that can be read by time; immutable, and cheap to pickle where they lie in files.

    Samples are counted from 0 and may exceed 2^31. ``read`` delivers ``dtype`` in native byte order:
    int16, uint16, int32 or float32. :class:`BaseSource` has what most sources say of themselves.
    """

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        ...

    @property
    def n_channels(self) -> int:
        """Number of channels, sorted or not."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as :meth:`read` delivers them."""
        ...

    @property
    def flat_files(self) -> tuple[FlatFile, ...] | str:
        """The flat files that hold the samples, in order of time; or a sentence that says why there are none."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop`` (half open, within the source), shape (time, channel)."""
        ...

    def digest(self) -> str:
        """Hash that changes when the data do; the same in every process."""
        ...

    @property
    def digest_is_exact(self) -> bool:
        """Whether any change of the data changes the digest; False where only some samples enter it."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether samples are fetched over a network, so that a copy on the local disk saves time."""
        ...

    @property
    def is_flat(self) -> bool:
        """Whether the shape of the data is not stored with them, so that what a caller said of it may be wrong."""
        ...

    @property
    def chunk_samples(self) -> int:
        """Number of samples that are stored, and so have to be read, together."""
        ...

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that it joins in time; none if it is a single one."""
        ...

    @property
    def only_here(self) -> str:
        """Why other processes cannot read the samples, and what to do; empty if they can."""
        ...

    def to_dask(self) -> dask.array.Array | None:
        """Return the Dask array that it is made of, if it is."""
        ...


class BaseSource:
    """A source of which nothing special is to be said; a format's source inherits it and overrides what differs."""

    @property
    def is_flat(self) -> bool:
        """Whether the shape of the data is not stored with them: no."""
        return False

    @property
    def chunk_samples(self) -> int:
        """Number of samples that are stored together: any number can be read."""
        return 1

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that it joins in time: none."""
        return ()

    @property
    def only_here(self) -> str:
        """Why other processes cannot read the samples: they can."""
        return ""

    def to_dask(self) -> dask.array.Array | None:
        """Return the Dask array that it is made of: none."""
        return None


@dataclass(frozen=True, eq=False)
class Recording:
    """One recording: samples, their rate and the probe.

    Attributes
    ----------
    source : Source
        Where the samples come from.
    sampling_rate_hz : float
        In Hz.
    probe : Probe or None
        The contacts of the channels to be sorted; None if they are not (yet) known.
    gain_uv, offset_uv : float or None
        µV = gain_uv · sample + offset_uv, the same for all channels that are sorted; None if unknown.
    name : str
        For messages and logs.
    files : tuple of str
        Files with the samples, in order of time; empty for arrays in memory.

    Raises
    ------
    RecordingError
        On construction, if it holds no samples or the rate is not a positive number.
    ProbeError
        On construction, if the probe has channels that the source does not have.
    """

    source: Source
    sampling_rate_hz: float
    probe: Probe | None = None
    gain_uv: float | None = None
    offset_uv: float | None = None
    name: str = "recording"
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without reading."""
        rate = self.sampling_rate_hz
        if not (math.isfinite(rate) and rate > 0):
            raise RecordingError(
                f"{self.name}: fs={rate} is not a sampling rate; it must be a positive number of samples per second."
            )
        if self.n_samples < 1 or self.n_channels < 1:
            raise RecordingError(
                f"{self.name} is empty ({self.n_samples} samples of {self.n_channels} channels): "
                "there is nothing to sort."
            )
        if self.probe is not None:
            self.probe.check_file(self.n_channels)

    @classmethod
    def given(cls, recording: Recording) -> Recording:
        """The recording that was passed to a function.

        Raises
        ------
        RecordingError
            If it is something else, such as a path or an array.
        """
        if not isinstance(recording, Recording):
            raise RecordingError(
                f"The recording is of type {type(recording).__name__}; it must be a ks4stream.Recording. "
                "open_recording(…, fs=…, probe=…) makes one of a path or an array."
            )
        return recording

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return self.source.n_samples

    @property
    def n_channels(self) -> int:
        """Number of channels in the file, sorted or not."""
        return self.source.n_channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        return self.source.dtype

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.n_samples / self.sampling_rate_hz

    @property
    def traces(self) -> xarray.DataArray:
        """All channels of the file as a lazy array; nothing is read until it is computed.

        Returns
        -------
        xarray.DataArray
            dims ``time, channel`` over a Dask array in chunks of about one second (of whole stored chunks, if the
            file has any), in the file's dtype and units. Coordinates: ``channel`` (column in the file)
            and, where there is a probe, ``x_um``, ``y_um`` (NaN) and ``shank`` (-1, for channels that are not
            sorted). There is no coordinate for time, which would exceed memory for long recordings: sample i is at
            i / ``sampling_rate_hz``.
        """
        import xarray as xr

        attrs: dict[str, Any] = {"sampling_rate_hz": self.sampling_rate_hz}
        if self.gain_uv is not None:
            attrs["gain_uv"] = self.gain_uv
        if self.offset_uv is not None:
            attrs["offset_uv"] = self.offset_uv
        array = _lazy_array(self.source, self.sampling_rate_hz)
        return xr.DataArray(array, dims=("time", "channel"), coords=self._channel_coords(), attrs=attrs, name="traces")

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read a stretch of all channels.

        Parameters
        ----------
        start, stop : int
            Samples, counted from the recording's first; half open.

        Returns
        -------
        ndarray, shape (time, channel)
            In the file's dtype and units.

        Raises
        ------
        RecordingError
            If the stretch is not within the recording.
        """
        start, stop = int(start), int(stop)
        if not 0 <= start <= stop <= self.n_samples:
            raise RecordingError(
                f"{self.name}: samples {start} to {stop} were requested, but it has samples 0 to {self.n_samples}."
            )
        return self.source.read(start, stop)

    def with_probe(self, probe: Probe | None) -> Recording:
        """Return the same recording with another probe.

        Raises
        ------
        ProbeError
            If the probe has channels that the file does not have.
        """
        return replace(self, probe=probe)

    def digest(self) -> str:
        """Hash of the data: samples (of files: name, size and time of change), shape, type and rate.

        It includes neither probe nor gain, which have their own identity.

        Returns
        -------
        str
            64 hexadecimal digits.
        """
        facts = ("ks4stream.Recording/1", self.source.digest(), self.n_samples, self.n_channels, self.dtype.str)
        return hashlib.sha256(repr((*facts, float(self.sampling_rate_hz))).encode()).hexdigest()

    def __repr__(self) -> str:
        """Describe the recording on one line."""
        return (
            f"<Recording {self.name!r}: {self.duration_s:.6g} s, {self.n_channels} channels of {self.dtype} "
            f"at {self.sampling_rate_hz:g} Hz, {self.probe!r}>"
        )

    def _channel_coords(self) -> dict[str, Any]:
        coords: dict[str, Any] = {"channel": np.arange(self.n_channels, dtype=np.int64)}
        if self.probe is not None:
            x_um, y_um = np.full((2, self.n_channels), np.nan)
            shank = np.full(self.n_channels, -1, np.int64)
            x_um[self.probe.chan_map] = self.probe.x_um
            y_um[self.probe.chan_map] = self.probe.y_um
            shank[self.probe.chan_map] = self.probe.shank
            coords |= {"x_um": ("channel", x_um), "y_um": ("channel", y_um), "shank": ("channel", shank)}
        return coords


def _lazy_array(source: Source, rate_hz: float) -> dask.array.Array:
    """A source in chunks of about a second, each made of whole stored chunks, so that every chunk is read once."""
    import dask.array as da

    array: dask.array.Array | None = source.to_dask()
    if array is not None:  # no second graph around it
        return array
    if source.parts:  # they are stored separately
        concatenate: Any = da.concatenate  # untyped
        joined: dask.array.Array = concatenate([_lazy_array(part, rate_hz) for part in source.parts])
        return joined
    stored = source.chunk_samples
    from_array: Any = da.from_array  # untyped
    lazy: dask.array.Array = from_array(
        _Sliceable(source),
        chunks=(max(1, round(rate_hz / stored)) * stored, source.n_channels),
        name=False,  # Dask would read the content to derive a name from it
        asarray=False,
        fancy=False,
        inline_array=True,
        meta=np.empty((0, 0), source.dtype),
    )
    return lazy


class _Sliceable:
    """A source as Dask wants it: shape, dtype and indexing by (time, channel)."""

    ndim = 2

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shape = (source.n_samples, source.n_channels)
        self.dtype = source.dtype

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Read what a slice or an index in time selects, then select channels."""
        return sliced(self.source.read, self.shape, self.dtype, key)


def sliced(
    read: Callable[[int, int], NDArray[Any]], shape: tuple[int, int], dtype: np.dtype[Any], key: Any
) -> NDArray[Any]:
    """Index samples by (time, channel), as an array of this shape and type would be.

    Parameters
    ----------
    read : callable
        ``read(start, stop)`` returns the samples of all channels, (time, channel).
    shape : tuple of int
    dtype : numpy.dtype
    key : slice, int, or tuple of an index in time and any index of channels
        In time, a slice or an integer; an ellipsis or nothing selects everything.
    """
    time, *channel = key if isinstance(key, tuple) else (key,)
    if time is Ellipsis:
        time = slice(None)
    if isinstance(time, slice):
        wanted = range(shape[0])[time]
        if not len(wanted):
            block = np.empty((0, shape[1]), dtype)
        else:
            first, last = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
            block = read(first, last + 1)[:: wanted.step]
    else:
        sample = range(shape[0])[time]
        block = read(sample, sample + 1)[0]
    return block[(..., *channel)] if channel else block
