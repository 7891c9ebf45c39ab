"""The recording's way from a store to the kernels, past a cache on the disk of the machine that computes.

A sort passes over the recording several times, and tiles overlap. :class:`CachedSource` cuts time into *pieces*, as
long as the source's chunks or a few megabytes. A piece that is read for the first time stays on the disk of that
machine, compressed, in a folder named after the recording's digest, and all processes of the machine share it. Pieces
of one read are fetched side by side, and where a thread reads on from where its last read ended, as in a block of
tiles, what comes next is fetched meanwhile.
"""

from ks4stream.io.tile_cache.lifetime import cached, cached_while_held, ending, forget
from ks4stream.io.tile_cache.source import CachedSource

__all__ = ["CachedSource", "cached", "cached_while_held", "ending", "forget"]
