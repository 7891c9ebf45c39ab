"""A cache for recordings on remote stores, on the disk of each machine that computes.

A sort passes over the recording several times, and tiles overlap. :class:`CachedSource` cuts time into *pieces*, as
long as the source's chunks or a few megabytes. When a piece is first read, it is stored on the disk of that machine,
compressed, in a folder named after the recording's digest, and shared by all processes of the machine. The pieces of
one read are fetched concurrently, and if a thread continues where its last read ended, as in a block of tiles, the
next pieces are fetched ahead.
"""

from ks4stream.io.recording_cache.lifetime import cached, cached_while_held, ending, forget
from ks4stream.io.recording_cache.source import CachedSource

__all__ = ["CachedSource", "cached", "cached_while_held", "ending", "forget"]
