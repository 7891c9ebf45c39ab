"""Make the waveforms shipped for ``templates_from_data=False``: clean whitened spikes of simulated recordings.

python benchmarks/make_waveforms.py ks4stream/stages/waveforms.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from run_here import run_here
from scenarios import SCENARIOS

from ks4stream.io.recordings import open_recording
from ks4stream.settings import Settings
from ks4stream.sorter import prepare
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

PER_RECORDING, MAX_PER_TILE = 200, 1000
THRESHOLD = 8.0
SEED = 7  # of the recordings; no benchmark uses it


def main() -> None:
    """Write 200 snippets of each of three kinds of probe."""
    kept = []
    for name in ("static", "fourshank", "tetrodes"):
        simulated = SCENARIOS[name](SEED, duration_s=60.0)
        recording = open_recording(simulated.traces, fs=simulated.sampling_rate_hz, probe=simulated.probe)
        settings = Settings(nskip=1)  # whitening from all batches
        tiles = prepare(recording, settings)
        with run_here(tiles) as run:
            tiles = tiles.with_whitening(run.do(LearnWhitening(settings, tiles)))
            learn = LearnWaveforms(settings, tiles, threshold=THRESHOLD, max_per_tile=MAX_PER_TILE)
            parts = run.map(learn, run.blocks(tiles.tiling))
            found = np.concatenate([snippets for part in parts for snippets in part])
        kept.append(found[np.linspace(0, len(found) - 1, PER_RECORDING).astype(int)])
    np.savez(Path(sys.argv[1]), snippets=np.concatenate(kept).astype(np.float32))


if __name__ == "__main__":
    main()
