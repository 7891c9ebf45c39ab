"""Recordings with known spikes, of any length, computed only where they are read.

:func:`simulate` describes a recording: where the units sit, when they fire, how the tissue moves, what the
noise is like. The traces are a lazy Dask array whose values depend on the seed and on the sample alone,
never on how the array is cut: time is divided into fixed *blocks* of :data:`BLOCK_SAMPLES`, every random
number of a block comes from a generator keyed by (seed, purpose, block), and a chunk is put together from
the blocks it touches.
"""

from ks4stream.simulate.api import SimulatedRecording, simulate
from ks4stream.simulate.drift import Drift
from ks4stream.simulate.probes import linear_probe, multi_shank_probe, staggered_probe, tetrode_probe
from ks4stream.simulate.streams import BLOCK_SAMPLES

__all__ = [
    "BLOCK_SAMPLES",
    "Drift",
    "SimulatedRecording",
    "linear_probe",
    "multi_shank_probe",
    "simulate",
    "staggered_probe",
    "tetrode_probe",
]
