"""Recordings in HDF5 files: any dataset of shape (time, channel), and the electrical series of NWB.

Each process opens the file at each read, as open h5py objects cannot be sent to other processes.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import Ks4StreamError, RecordingError
from ks4stream.io.formats import is_hdf5, refusal
from ks4stream.io.objects import is_remote, name_of
from ks4stream.io.sources.base import File, OfPath, Opened, check_rank, delivered_dtype, hash_of, status_of, time_first
from ks4stream.messages import warn
from ks4stream.probe import Probe
from ks4stream.recording import is_same_rate

_MIN_SAMPLES = 1000  # of a table that may be a recording; shorter ones hold positions or times of events
_TIMESTAMPS = 100_000  # that give the rate: if rounded to milliseconds, to 3 parts in 10 000 at 30 kHz


@dataclass(frozen=True)
class Hdf5Source(OfPath):
    """Samples in a dataset of an HDF5 file.

    Attributes
    ----------
    path : str
        The file's absolute path.
    dataset : str
        The dataset's path in the file.
    n_samples, n_channels : int
        Its shape.
    file_dtype : numpy.dtype
        Type of the stored samples.
    """

    path: str
    dataset: str
    n_samples: int
    n_channels: int
    file_dtype: np.dtype[Any]

    @staticmethod
    def can_be_opened_again(dataset: Any) -> bool:
        """Whether an open h5py object is a dataset in a read-only file that other processes can open too."""
        return hasattr(dataset, "shape") and dataset.file.mode == "r" and os.path.isfile(dataset.file.filename)

    @classmethod
    def of(cls, dataset: Any) -> Hdf5Source:
        """Describe an open ``h5py.Dataset``.

        Raises
        ------
        RecordingError
            If it is not two-dimensional, or its type is not supported.
        """
        path = os.path.abspath(os.fsdecode(dataset.file.filename))
        what = f"{dataset.name} of {path}"
        check_rank(dataset.shape, what)
        delivered_dtype(dataset.dtype, what)
        return cls(path, dataset.name, int(dataset.shape[0]), int(dataset.shape[1]), np.dtype(dataset.dtype))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.file_dtype)

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return f"{self.path} is an HDF5 file"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel); the file is not kept open."""
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                dataset = file[self.dataset]
                try:
                    return np.asarray(dataset[start:stop]).astype(self.dtype, copy=False)
                except OSError:
                    self._check_filters(dataset)
                    raise
        except (Ks4StreamError, MemoryError):
            raise
        except Exception as error:  # h5py raises many types for a damaged file
            raise RecordingError(
                f"Samples {start} to {stop} of {self.dataset} in {self.path} cannot be read ({error}). The file is "
                "damaged, or has changed since it was opened. Copy it again, or exclude this time (tmin, tmax)."
            ) from error

    def _check_filters(self, dataset: Any) -> None:
        import h5py

        creation = dataset.id.get_create_plist()
        numbers = [creation.get_filter(index)[0] for index in range(creation.get_nfilters())]
        if missing := [str(number) for number in numbers if not h5py.h5z.filter_avail(number)]:
            raise RecordingError(
                f"{self.dataset} in {self.path} is compressed by a filter that is not installed here (number "
                f"{', '.join(missing)}). Install it wherever the recording is read, including workers: pip install "
                "hdf5plugin, and set HDF5_PLUGIN_PATH to its folder (hdf5plugin.PLUGIN_PATH)."
            )

    def digest(self) -> str:
        """Hash of the file's name, size and time of change, and of how it is read."""
        found = status_of(self.path)
        return hash_of(
            "hdf5", name_of(self.path), found.size_bytes, found.tag, self.dataset, self.n_samples, self.n_channels
        )

    @property
    def digest_is_exact(self) -> bool:
        """Yes, if modification times can be trusted."""
        return True


def opens(file: File) -> Opened | None:
    """Open the only electrical series (NWB) or the only table of samples of a file on a disk."""
    path = file.path
    if is_remote(path) or not is_hdf5(file.head):
        return None
    reason = refusal(path, file.head)
    try:
        found = read_series(path)
        time_first(found.source, found.name)
        return found
    except ImportError as error:
        raise RecordingError(f"{reason} Or install the reader: pip install 'ks4stream[hdf5]'.") from error
    except (Ks4StreamError, MemoryError):
        raise
    except Exception as error:  # h5py raises many types for a damaged file
        raise RecordingError(f"{reason} It may be damaged: {error}.") from error


def read_series(path: str) -> Opened:
    """Find the recording in an HDF5 file.

    Raises
    ------
    OSError
        If it cannot be opened as HDF5.
    RecordingError
        If it does not hold exactly one.
    """
    import h5py

    tables: list[str] = []
    series: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if len(item.shape or ()) == 2 and max(item.shape) >= _MIN_SAMPLES and min(item.shape) > 0:
                with suppress(RecordingError):  # not of a type that samples have
                    delivered_dtype(item.dtype)
                    tables.append(name)
        elif item.attrs.get("neurodata_type") in ("ElectricalSeries", b"ElectricalSeries"):
            series.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        # Acquired data only: processed data are often the LF band.
        series = [name for name in series if name.startswith("acquisition/")] or series
        found = [f"{name}/data" for name in series] or tables
        if len(found) != 1:
            raise RecordingError(
                f"{path} is an HDF5 file with {len(found)} "
                + ("electrical series" if series else f"tables of {_MIN_SAMPLES} samples or more")
                + "; it must have exactly one. Open it with h5py and pass the dataset with the traces, "
                + f"h5py.File({path!r})['NAME']"
                + (f", where NAME is one of {', '.join(sorted(found)[:8])}." if found else ".")
            )
        source = Hdf5Source.of(file[found[0]])
        if series:
            return _described(source, file[series[0]])
        return Opened(source, name_of(path), (path,))


def _described(source: Hdf5Source, group: Any) -> Opened:
    """An electrical series with its NWB metadata: volts are data · conversion · channel_conversion + offset."""
    rate_hz = float(group["starting_time"].attrs["rate"]) if "starting_time" in group else None
    if rate_hz is None and "timestamps" in group:
        rate_hz = _rate_of(group["timestamps"], f"{group.name} of {source.path}")
    factors = np.unique(group["channel_conversion"][:]) if "channel_conversion" in group else np.ones(1)
    gain_uv = 1e6 * float(group["data"].attrs.get("conversion", 1.0)) * float(factors[0]) if len(factors) == 1 else None
    offset_uv = 1e6 * float(group["data"].attrs.get("offset", 0.0))
    return Opened(
        source,
        name_of(source.path),
        (source.path,),
        rate_hz,
        gain_uv,
        None if gain_uv is None else offset_uv,
        partial(_find_probe, source, group.name),
    )


def _rate_of(timestamps: Any, what: str) -> float | None:
    """Samples per second from the first timestamps, which may be rounded; None if these make no sense."""
    first = np.asarray(timestamps[:_TIMESTAMPS], np.float64)
    lasts_s = float(first[-1] - first[0]) if len(first) > 1 else 0.0
    if not (math.isfinite(lasts_s) and lasts_s > 0):
        return None
    rate_hz = (len(first) - 1) / lasts_s
    stamped_s, counted_s = float(timestamps[-1] - first[0]), (len(timestamps) - 1) / rate_hz
    if not is_same_rate(stamped_s, counted_s):
        warn(
            f"{what} has {len(timestamps)} samples, which last {counted_s:.3f} s at the {rate_hz:.6g} Hz of its first "
            f"timestamps, but the last timestamp is {stamped_s:.3f} s after the first: there are gaps, or the rate "
            "changes. Spike times count samples as if they were contiguous, at one rate."
        )
    return rate_hz


def _find_probe(source: Hdf5Source, group: str) -> Probe | None:
    import h5py

    try:
        with h5py.File(source.path, "r") as file:
            return _probe(file[group], file, source)
    except MemoryError:
        raise
    except Exception as error:  # the samples can be read, and another probe can be given
        warn(f"The probe stored in {source.path} is ignored: {error}")
        return None


def _probe(group: Any, file: Any, source: Hdf5Source) -> Probe | None:
    """Contacts from the electrodes table (rel_x and rel_y, in µm); each electrode group is a shank."""
    table = file.get("general/extracellular_ephys/electrodes")
    if table is None or "electrodes" not in group or not {"rel_x", "rel_y"} <= set(table):
        return None
    rows = np.asarray(group["electrodes"][:], np.int64)
    x_um, y_um = (np.asarray(table[name][:], np.float64)[rows] for name in ("rel_x", "rel_y"))
    if len(rows) != source.n_channels or not np.isfinite([x_um, y_um]).all() or not (np.ptp(x_um) or np.ptp(y_um)):
        return None
    names = np.asarray(table["group_name"].asstr()[:])[rows] if "group_name" in table else np.zeros(len(rows))
    shank = np.unique(names, return_inverse=True)[1]
    return Probe(np.arange(len(rows)), x_um, y_um, shank, n_chan_file=len(rows), name=name_of(source.path))
