"""Some channels of a source, in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ks4stream.io.sources.base import OfSource, hash_of
from ks4stream.recording import Source


@dataclass(frozen=True)
class ChannelSource(OfSource):
    """Some channels of a source, in an order of their own.

    Attributes
    ----------
    source : Source
    columns : tuple of int
        Which column of the source each channel is.
    """

    source: Source
    columns: tuple[int, ...]

    @property
    def path(self) -> str:
        """Where the source lies; empty if it does not say."""
        return str(getattr(self.source, "path", ""))

    @property
    def chunk_samples(self) -> int:
        """Samples per stored chunk."""
        return self.source.chunk_samples

    @property
    def n_channels(self) -> int:
        """Number of channels that were selected."""
        return len(self.columns)

    @property
    def flat_files(self) -> str:
        """Why there are none."""
        return (
            f"{self.n_channels} of {self.source.n_channels} channels were selected from {self.path or 'the recording'}"
        )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read samples ``start`` to ``stop``, shape (time, channel)."""
        return self.source.read(start, stop)[:, self.columns]

    def digest(self) -> str:
        """Hash of the source's hash and the columns."""
        return hash_of("channels", self.source.digest(), self.columns)
