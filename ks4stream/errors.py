"""Every error and warning that ks4stream raises on purpose.

All errors derive from :class:`Ks4StreamError` and from the built-in exception that a caller would expect, so that both
``except Ks4StreamError`` and ``except ValueError`` work. A message says what was given, what is needed and what to
change.
"""

from __future__ import annotations


class Ks4StreamError(Exception):
    """Base of all errors raised on purpose by ks4stream."""


class SettingsError(Ks4StreamError, ValueError):
    """A setting is unknown, out of bounds, or contradicts another one or the recording."""


class ProbeError(Ks4StreamError, ValueError):
    """A probe is unreadable, inconsistent, or does not fit the recording."""


class OpsError(Ks4StreamError, ValueError):
    """An ``ops`` of Kilosort4's interface lacks what a function needs, or belongs to another recording."""


class RecordingError(Ks4StreamError, ValueError):
    """A recording cannot be opened, or has nothing that can be sorted."""


class ResultsError(Ks4StreamError, OSError):
    """Results cannot be written to, or read from, the given folder or address."""


class DamagedFileError(ResultsError):
    """A file of a run is corrupt: truncated or modified since it was written.

    Attributes
    ----------
    path : str
        The file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)  # one argument, so that it travels between processes
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} is corrupt (truncated or modified since it was written). Check the disk."


class WorkerError(Ks4StreamError, RuntimeError):
    """A worker cannot compute: it lacks a library, this package or a GPU."""


class LostWorkerError(Ks4StreamError, RuntimeError):
    """Workers died repeatedly while computing, usually for lack of memory."""


class GpuMemoryError(Ks4StreamError, RuntimeError):
    """The GPU is too small for what cannot be split further: one batch, or one region's landmarks."""


class MissingDependencyError(Ks4StreamError, ImportError):
    """A required optional library is not installed; the message names the extra to install."""


class MachineError(Ks4StreamError, MemoryError):
    """The workers, the GPU or the disk are too small for what was asked."""


class Ks4StreamWarning(UserWarning):
    """Base of all warnings issued on purpose by ks4stream."""


class MachineWarning(Ks4StreamWarning):
    """The workers, the GPU or the disk may be too small, depending on the number of spikes."""


class FewSpikesWarning(Ks4StreamWarning):
    """Too few spikes to learn from; the sorting is valid but small or empty."""


class DriftWarning(Ks4StreamWarning):
    """Drift could not be estimated from the data and is taken as zero."""


class BadChannelWarning(Ks4StreamWarning):
    """A channel carries no signal and is left out."""


class ArtifactWarning(Ks4StreamWarning):
    """Much of a recording cannot be sorted."""


class HumWarning(Ks4StreamWarning):
    """The recording has mains hum."""


class MisreadWarning(Ks4StreamWarning):
    """Samples seem to be read differently from how they were written: type, channels, order or unit."""


class SettingsWarning(Ks4StreamWarning):
    """A setting was valid but did not fit the probe, and was lowered."""


class CurationWarning(Ks4StreamWarning):
    """The results folder has a curation or another sorter's results, which are moved before results are written."""


class VersionWarning(Ks4StreamWarning):
    """Workers differ in versions, processor or GPU, so results may differ from run to run."""
