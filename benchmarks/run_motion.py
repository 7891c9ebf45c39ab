"""Estimate the motion of one recording by one of the presets of SpikeInterface, in an environment that holds it.

    PYTHON_WITH_SPIKEINTERFACE benchmarks/run_motion.py dredge_fast rec.bin --probe rec.probe.json --out motion.npz

Leaves ``time_s`` (t,), ``depth_um`` (d,), ``displacement_um`` (t, d) and ``cpu_s`` in the file. Traces are filtered and
referenced first; presets keep their defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import run_spikeinterface


def main() -> None:
    """Estimate the motion of one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from spikeinterface.preprocessing import common_reference, compute_motion, highpass_filter

    probe = json.loads(options.probe.read_text())
    recording = run_spikeinterface.opened(options.recording, probe, [], 0.195)
    filtered = common_reference(highpass_filter(recording.astype("float32"), 300.0))
    began = time.process_time()
    motion = compute_motion(filtered, preset=options.preset, n_jobs=1, progress_bar=False)
    np.savez(
        options.out,
        time_s=motion.temporal_bins_s[0],
        depth_um=motion.spatial_bins_um,
        displacement_um=motion.displacement[0],
        cpu_s=time.process_time() - began,
    )


if __name__ == "__main__":
    main()
