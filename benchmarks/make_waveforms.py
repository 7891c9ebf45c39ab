"""Make the waveforms shipped for ``templates_from_data=False``: clean whitened spikes of simulated recordings.

python benchmarks/make_waveforms.py ks4stream/stages/waveforms.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.scenarios import SCENARIOS
from ks4stream.io.recordings import open_recording
from ks4stream.settings import Settings
from ks4stream.sorter import prepare
from ks4stream.stages import waveforms, whitening

PER_RECORDING = 200
SEED = 7  # of the recordings; no benchmark uses it


def main() -> None:
    """Write 200 snippets of each of three kinds of probe."""
    kept = []
    for name in ("static", "fourshank", "tetrodes"):
        simulated = SCENARIOS[name](SEED, duration_s=60.0)
        recording = open_recording(simulated.traces, fs=simulated.sampling_rate_hz, probe=simulated.probe)
        source = prepare(recording, Settings())
        tiles = tuple(source.tiling)
        source = source.with_results(whitening=whitening.combine(source, [whitening.Covariances(source)(tiles)]))
        found = np.concatenate(waveforms.Snippets(source, 8.0, 1000)(tiles))
        kept.append(found[np.linspace(0, len(found) - 1, PER_RECORDING).astype(int)])
    np.savez(Path(sys.argv[1]), snippets=np.concatenate(kept).astype(np.float32))


if __name__ == "__main__":
    main()
