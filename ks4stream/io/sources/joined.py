"""Several sources, one after the other in time."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import RecordingError
from ks4stream.io.sources.base import hash_of
from ks4stream.recording import BaseSource, FlatFile, Source


@dataclass(frozen=True)
class ConcatenatedSource(BaseSource):
    """Several sources, one after the other in time.

    Attributes
    ----------
    sources : tuple of Source
        The parts, in order of time; all with the same channels and type.

    Raises
    ------
    RecordingError
        If there is no part, or two parts differ in channels or type.
    """

    sources: tuple[Source, ...]
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the parts fit together, and compute where each ends."""
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise RecordingError("The list of parts to join is empty; give at least one.")
        first = self.sources[0]
        for number, part in enumerate(self.sources[1:], start=1):
            if part.n_channels != first.n_channels or part.dtype != first.dtype:
                raise RecordingError(
                    f"Parts cannot be joined in time: part {number} has {part.n_channels} channels of {part.dtype}, "
                    f"but part 0 has {first.n_channels} of {first.dtype}. Only join parts of one recording."
                )
        object.__setattr__(self, "_ends", tuple(itertools.accumulate(part.n_samples for part in self.sources)))

    @property
    def only_here(self) -> str:
        """Why other processes cannot read the samples; empty if they can."""
        return next((part.only_here for part in self.sources if part.only_here), "")

    @property
    def n_samples(self) -> int:
        """Number of samples of all parts together."""
        return self._ends[-1]

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.sources[0].n_channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples as they are delivered."""
        return self.sources[0].dtype

    @property
    def flat_files(self) -> tuple[FlatFile, ...] | str:
        """The flat files of all parts, or why one of them has none."""
        files: tuple[FlatFile, ...] = ()
        for part in self.sources:
            found = part.flat_files if part.n_samples else ()
            if isinstance(found, str):
                return found
            files += found
        return files

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that it joins."""
        return self.sources

    @property
    def is_remote(self) -> bool:
        """Whether a part is."""
        return any(part.is_remote for part in self.sources)

    @property
    def is_flat(self) -> bool:
        """Whether all parts are flat."""
        return all(part.is_flat for part in self.sources)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel), across the joints."""
        pieces = []
        part = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[part] - self.sources[part].n_samples
            piece_stop = min(stop, self._ends[part])
            if piece_stop > start:  # parts may be empty
                pieces.append(self.sources[part].read(start - begin, piece_stop - begin))
            start, part = piece_stop, part + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, self.n_channels), self.dtype)

    def digest(self) -> str:
        """Hash of the parts' hashes, in order."""
        return hash_of("concatenated", *(part.digest() for part in self.sources))

    @property
    def digest_is_exact(self) -> bool:
        """Whether the digests of all parts are exact."""
        return all(part.digest_is_exact for part in self.sources)


def join(sources: Iterable[Source]) -> Source:
    """Return sources joined in time; a single one is returned unchanged."""
    parts = tuple(sources)
    return parts[0] if len(parts) == 1 else ConcatenatedSource(parts)
