"""Samples of a SpikeInterface recording ("extractor"), read where they lie if possible, or else through it."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.exchange import segment_lengths, spikeinterface_core
from ks4stream.io.objects import child, locate
from ks4stream.io.sources.base import DIGEST_SAMPLES, Opened, content_hash, delivered_dtype
from ks4stream.io.sources.binary import BinarySource
from ks4stream.io.sources.channels import ChannelSource
from ks4stream.io.sources.joined import join
from ks4stream.io.sources.zarr import ZarrSource
from ks4stream.probe import Probe
from ks4stream.recording import BaseSource, Source

_DIGEST_WHOLE_BYTES = 2**28  # a segment up to this size is hashed completely, …
_DIGEST_SPOTS = 32  # … a larger one in this many places
_FILES_OF_A_FOLDER = 100
_COMPARED_SAMPLES = 64  # at both ends of a file, to see whether it holds what the extractor delivers


@dataclass(frozen=True, eq=False)
class ExtractorSource(BaseSource):
    """One segment of a SpikeInterface recording, read through SpikeInterface, a stretch of time at a time.

    It is pickled as SpikeInterface's own dictionary of the recording: where files lie and what is done to their
    samples. Only recordings in memory are sent to other processes with their data.

    Attributes
    ----------
    extractor : spikeinterface.core.BaseRecording
        It must not change while the source is in use.
    segment_index : int
        Which segment.
    """

    extractor: Any
    segment_index: int = 0

    @property
    def n_samples(self) -> int:
        """Number of samples per channel."""
        return int(self.extractor.get_num_samples(segment_index=self.segment_index))

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return int(self.extractor.get_num_channels())

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return delivered_dtype(self.extractor.get_dtype(), name_of(self.extractor))

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return f"the samples are read through SpikeInterface ({type(self.extractor).__name__})"

    @property
    def is_remote(self) -> bool:
        """Whether samples are fetched over a network: what the extractor does is not known."""
        return False

    @property
    def only_here(self) -> str:
        """Why other processes cannot read the samples; empty if they can."""
        if self.extractor.check_serializability("memory"):
            return ""
        return (
            f"{name_of(self.extractor)} exists only in this process: SpikeInterface cannot describe it to worker "
            f"processes ({type(self.extractor).__name__} is not serializable). Save it (recording.save(folder=…)) and "
            "sort the copy, or sort in this process (client='loop')."
        )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Copy samples ``start`` to ``stop``, shape (time, channel)."""
        traces = self.extractor.get_traces(
            segment_index=self.segment_index, start_frame=start, end_frame=stop, return_in_uV=False
        )
        if traces.shape != (stop - start, self.n_channels):
            raise RecordingError(
                f"{name_of(self.extractor)} delivered an array of shape {traces.shape} for samples {start} to {stop} "
                f"of {self.n_channels} channels (segment {self.segment_index})."
            )
        return np.array(traces, dtype=self.dtype, order="C")

    def digest(self) -> str:
        """Hash of shape, type and all samples; of segments over 256 MB, of samples from 32 places."""
        n_spots = -(-self.n_samples // DIGEST_SAMPLES) if self.digest_is_exact else _DIGEST_SPOTS
        return content_hash("spikeinterface", self, n_spots)

    @property
    def digest_is_exact(self) -> bool:
        """Whether all samples are hashed."""
        return self.n_samples * self.n_channels * self.dtype.itemsize <= _DIGEST_WHOLE_BYTES

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by SpikeInterface's dictionary.

        Raises
        ------
        RecordingError
            If SpikeInterface cannot describe the recording to another process.
        """
        if self.only_here:
            raise RecordingError(self.only_here)
        description = self.extractor.to_dict(include_annotations=True, include_properties=True, recursive=True)
        if not self.extractor.check_serializability("pickle"):  # it holds its samples
            return _reopened, (description, self.segment_index)
        return _reopened_once, (pickle.dumps(description), self.segment_index)


def _reopened(description: Mapping[str, Any], segment_index: int) -> ExtractorSource:
    return ExtractorSource(spikeinterface_core().load(description), segment_index)


@lru_cache(maxsize=16)
def _loaded(description: bytes) -> Any:
    return spikeinterface_core().load(pickle.loads(description))


def _reopened_once(description: bytes, segment_index: int) -> ExtractorSource:
    """Open a recording once in each process, whatever the number of tasks and segments."""
    return ExtractorSource(_loaded(description), segment_index)


def is_extractor(value: Any) -> bool:
    """Whether a value is a SpikeInterface recording; SpikeInterface is not imported."""
    core = sys.modules.get("spikeinterface.core")
    return core is not None and isinstance(value, core.BaseRecording)


def opens(extractor: Any) -> Opened:
    """Open a SpikeInterface recording, its segments joined in time.

    Raises
    ------
    MissingDependencyError
        If SpikeInterface is too old.
    RecordingError
        If the samples have a type that is not supported, are floating-point numbers of an unknown unit, or lie in a
        file one channel after the other.
    """
    name = name_of(extractor)
    dtype = delivered_dtype(extractor.get_dtype(), name)
    gain_uv = _common_value(extractor.get_channel_gains())
    offset_uv = _common_value(extractor.get_channel_offsets())
    if dtype.kind == "f" and extractor.get_channel_gains() is None:
        raise RecordingError(
            f"{name} holds {dtype} samples without a gain, so their unit is not known. Say what it is: "
            "recording.set_channel_gains(1) and recording.set_channel_offsets(0) if they are in µV, "
            "recording.set_channel_gains(1e6) if they are in volts; or sort the recording before it was scaled."
        )
    sources = where_they_lie(extractor)
    if sources is None:
        sources = [ExtractorSource(extractor, index) for index in range(extractor.get_num_segments())]
        files = _files_of(extractor)
    else:
        files = files_of(sources)
    return Opened(
        join(sources),
        name,
        files,
        float(extractor.get_sampling_frequency()),
        gain_uv,
        offset_uv if gain_uv is not None else None,
        lambda: probe_of(extractor),
    )


def name_of(extractor: Any) -> str:
    """The recording's name for messages: its own, or that of its class."""
    return str(getattr(extractor, "name", None) or type(extractor).__name__)


def probe_of(extractor: Any) -> Probe | None:
    """The contacts of a SpikeInterface recording, in the order of its channels; None if it has none.

    Contacts that SpikeInterface sorts separately (its groups), and those of different probes and shanks, are on
    different shanks here.

    Raises
    ------
    ProbeError
        If contacts have three coordinates, or positions are missing or occur twice.
    """
    if not extractor.has_channel_location():
        return None
    name = name_of(extractor)
    if extractor.has_3d_probe():
        raise ProbeError(
            f"{name} has contacts with three coordinates (x, y, z), but positions here are across and along the probe. "
            "Choose the two that matter: recording.planarize(axes='xy')."
        )
    positions = np.asarray(extractor.get_channel_locations(), np.float64)
    return Probe.from_positions(positions, shank=_shanks(extractor), n_chan_file=len(positions), name=name)


def _shanks(extractor: Any) -> NDArray[np.int64]:
    """One number for each combination of group, probe and shank; the group itself where that says the same."""
    n_channels = extractor.get_num_channels()
    groups = extractor.get_property("group")
    labels = [np.zeros(n_channels, np.int64) if groups is None else np.asarray(groups)]
    if extractor.has_probe():
        contacts = extractor.get_probegroup().to_numpy(complete=True)
        if len(contacts) == n_channels:
            labels += [contacts[field] for field in ("probe_index", "shank_ids") if field in contacts.dtype.names]
    numbers = [np.unique(label, return_inverse=True)[1].reshape(-1) for label in labels]
    together = np.unique(np.column_stack(numbers), axis=0, return_inverse=True)[1].reshape(-1)
    if labels[0].dtype.kind in "iu" and together.max(initial=0) == numbers[0].max(initial=0):
        return labels[0].astype(np.int64)
    return together.astype(np.int64)


def _common_value(values: Any) -> float | None:
    """The value that all channels share; None if they differ, or there are none."""
    found = np.unique(np.asarray([] if values is None else values, np.float64))
    return float(found[0]) if len(found) == 1 and np.isfinite(found[0]) else None


# -- where samples lie ---------------------------------------------------------------------------------


def where_they_lie(extractor: Any) -> list[Source] | None:
    """Sources that read the extractor's own files, one per segment; None if they must be read through it.

    Raises
    ------
    MissingDependencyError
        If SpikeInterface is too old.
    RecordingError
        If they lie in a file one channel after the other.
    """
    spikeinterface_core()
    parent, columns = _without_slices(extractor)
    sources = _binary_sources(parent) or _zarr_sources(parent)
    if sources is None or [source.n_samples for source in sources] != segment_lengths(extractor):
        return None
    if columns != tuple(range(parent.get_num_channels())):
        sources = [ChannelSource(source, columns) for source in sources]
    return sources if all(_is_same(source, extractor, index) for index, source in enumerate(sources)) else None


def _without_slices(extractor: Any) -> tuple[Any, tuple[int, ...]]:
    """The recording that channels were selected from, as probes and groups do, and which of its channels they are."""
    columns = np.arange(extractor.get_num_channels())
    while type(extractor).__name__ == "ChannelSliceRecording":
        parent, ids = extractor._kwargs["recording"], extractor._kwargs.get("channel_ids")
        if ids is not None:
            columns = np.asarray(parent.ids_to_indices(ids))[columns]
        extractor = parent
    return extractor, tuple(int(column) for column in columns)


def _binary_sources(extractor: Any) -> list[Source] | None:
    if not extractor.binary_compatible_with():
        return None
    about = extractor.get_binary_description()
    if about["time_axis"] != 0:  # SpikeInterface (to 0.105.3) takes a stretch of the file for a stretch of time
        raise RecordingError(
            f"{name_of(extractor)} holds one channel after the other (time_axis=1). SpikeInterface delivers the wrong "
            "samples of such a file, unless it is read all at once. Open it without SpikeInterface: "
            "numpy.memmap(path, dtype, 'r', shape=(channels, samples)).T"
        )
    paths, dtype = about["file_paths"], np.dtype(about["dtype"])
    if about["num_channels"] != extractor.get_num_channels() or len(paths) != extractor.get_num_segments():
        return None
    row_bytes, offset_bytes = about["num_channels"] * dtype.itemsize, int(about["file_offset"])
    sources: list[Source] = []
    for path, n_samples in zip(map(os.fspath, paths), segment_lengths(extractor), strict=True):
        if not os.path.isfile(path) or os.path.getsize(path) < offset_bytes + n_samples * row_bytes:
            return None
        sources.append(BinarySource(locate(path), int(about["num_channels"]), n_samples, dtype, offset_bytes))
    return sources


def _zarr_sources(extractor: Any) -> list[Source] | None:
    if type(extractor).__name__ != "ZarrRecordingExtractor" or extractor._kwargs.get("storage_options"):
        return None
    folder = os.fspath(extractor._kwargs["folder_path"])
    try:
        path = locate(folder)
        return [ZarrSource.open(child(path, f"traces_seg{index}")) for index in range(extractor.get_num_segments())]
    except (RecordingError, ImportError):  # what zarr can read for SpikeInterface, and not for us
        return None


def _is_same(source: Source, extractor: Any, segment_index: int) -> bool:
    """Whether both deliver the same at both ends: a class derived from SpikeInterface's may change the samples."""
    through = ExtractorSource(extractor, segment_index)
    if (source.n_channels, source.dtype) != (through.n_channels, through.dtype):
        return False
    n_samples = min(_COMPARED_SAMPLES, source.n_samples)
    spans = [(0, n_samples), (source.n_samples - n_samples, source.n_samples)]
    return all(np.array_equal(source.read(*span), through.read(*span), equal_nan=True) for span in spans)


def files_of(sources: Iterable[Source]) -> tuple[str, ...]:
    """Files of sources that read samples where they lie."""
    return tuple(dict.fromkeys(map(_path_of, sources)))


def _path_of(source: Source) -> str:
    assert isinstance(source, BinarySource | ZarrSource | ChannelSource)
    return source.path


def _files_of(extractor: Any) -> tuple[str, ...]:
    """Files that a recording is read from; of a folder, some. None if other processes cannot open the recording."""
    if not extractor.check_serializability("pickle"):
        return ()
    paths = dict.fromkeys(_paths_in(extractor.to_dict(recursive=True)))
    return tuple(file for path in paths for file in ([path] if os.path.isfile(path) else _some_files(path)))


def _some_files(folder: str) -> Iterator[str]:
    """Files below a folder: not the folder itself, as results may be written to another place within it."""
    found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in sorted(names))
    return itertools.islice(found, _FILES_OF_A_FOLDER)


def _paths_in(value: Any) -> Iterator[str]:
    """Paths in SpikeInterface's dictionary of a recording, wherever in it they are."""
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and os.path.isabs(path) and os.path.exists(path):
            yield path
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _paths_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _paths_in(entry)
