"""Recordings with known spikes, of any length, computed only where they are read.

:func:`simulate` describes a recording: where the units are, when they fire, how the tissue moves, what the
noise is like. The traces are a lazy Dask array whose values depend only on the seed and the sample number,
never on the chunks: time is divided into fixed *epochs* of :data:`EPOCH_SAMPLES`, every random number of an
epoch comes from a generator keyed by (seed, purpose, epoch), and a chunk is assembled from the epochs it
overlaps.
"""

from ks4stream.simulate.api import SimulatedRecording, simulate
from ks4stream.simulate.motion import Motion
from ks4stream.simulate.probes import linear_probe, multi_shank_probe, staggered_probe, tetrode_probe
from ks4stream.simulate.streams import EPOCH_SAMPLES

__all__ = [
    "EPOCH_SAMPLES",
    "Motion",
    "SimulatedRecording",
    "linear_probe",
    "multi_shank_probe",
    "simulate",
    "staggered_probe",
    "tetrode_probe",
]
