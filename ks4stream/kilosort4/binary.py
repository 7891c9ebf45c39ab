"""Stand-in."""

from __future__ import annotations

from dataclasses import dataclass

from ks4stream.recording import Recording
from ks4stream.stages.preprocessing import Preprocessor


@dataclass(frozen=True, eq=False)
class BinaryFiltered:
    """The preprocessed traces."""

    tiles: Preprocessor

    @classmethod
    def of(cls, tiles: Preprocessor) -> BinaryFiltered:
        """Of tiles."""
        return cls(tiles)

    @property
    def recording(self) -> Recording:
        """Recording."""
        return self.tiles.recording

    @property
    def imin(self) -> int:
        """First sorted sample."""
        return self.tiles.tiling.start

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.tiles.tiling)
