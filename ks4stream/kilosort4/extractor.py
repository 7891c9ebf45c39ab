"""Kilosort4's wrapper of a recording of SpikeInterface."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.sources import join
from ks4stream.io.sources.extractor import files_of, is_extractor, name_of, where_they_lie
from ks4stream.recording import Recording, sliced

__all__ = ["RecordingExtractorAsArray"]


class RecordingExtractorAsArray:
    """A recording of SpikeInterface as an array of shape (time, channel), for a ``file_object``.

    Only what is indexed is read. Segments are joined in time. A sort reads flat files and SpikeInterface's Zarr folders
    where they lie. Of other recordings, other processes get SpikeInterface's own description; the samples are sent
    along only if they are in memory.

    Parameters
    ----------
    recording_extractor : spikeinterface.core.BaseRecording

    Attributes
    ----------
    recording_extractor
    shape : tuple of int
    dtype : numpy.dtype

    Raises
    ------
    RecordingError
        If it is not a recording of SpikeInterface.
    """

    ndim = 2

    def __init__(self, recording_extractor: Any) -> None:
        missing = [name for name in ("get_traces", "get_num_segments") if not hasattr(recording_extractor, name)]
        if missing:
            raise RecordingError(
                f"A recording of SpikeInterface is needed, but a {type(recording_extractor).__name__} was given. "
                "Arrays can be passed as file_object as they are."
            )
        self.recording_extractor = recording_extractor
        segments = range(recording_extractor.get_num_segments())
        lengths = [int(recording_extractor.get_num_samples(segment_index=index)) for index in segments]
        self._first = list(accumulate(lengths, initial=0))
        self.shape = (self._first[-1], int(recording_extractor.get_num_channels()))
        self.dtype: np.dtype[Any] = np.dtype(recording_extractor.get_dtype())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Samples by (time, channel)."""
        return sliced(self._read, self.shape, self.dtype, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RecordingError("A recording of SpikeInterface is only read.")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the recording, which SpikeInterface does by its own dictionary."""
        return type(self), (self.recording_extractor,)

    def as_recording(self) -> Recording | None:
        """The same samples, read where they lie; None if they can only be read through SpikeInterface.

        Raises
        ------
        MissingDependencyError
            If SpikeInterface is too old.
        RecordingError
            If they lie in a file one channel after the other.
        """
        extractor = self.recording_extractor
        sources = where_they_lie(extractor) if is_extractor(extractor) else None
        if sources is None:
            return None
        return Recording(
            source=join(sources),
            sampling_rate_hz=float(extractor.get_sampling_frequency()),
            probe=None,
            name=name_of(extractor),
            files=files_of(sources),
        )

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        pieces = [np.empty((0, self.shape[1]), self.dtype)]
        for index, first in enumerate(self._first[:-1]):
            begin, end = max(start, first), min(stop, self._first[index + 1])
            if begin < end:
                pieces.append(
                    self.recording_extractor.get_traces(
                        segment_index=index, start_frame=begin - first, end_frame=end - first
                    )
                )
        return np.concatenate(pieces) if len(pieces) > 2 else np.asarray(pieces[-1])
