"""Recordings of SpikeInterface for tests; import only where SpikeInterface is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import probeinterface


def with_contacts(recording: Any, positions_um: Any, *, gain_uv: float | None = 0.195) -> Any:
    """Give a recording a probe whose i-th contact is the i-th channel, and a gain; returns it."""
    positions = np.asarray(positions_um, float)
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(positions=positions, shapes="circle", shape_params={"radius": 5})
    probe.set_device_channel_indices(np.arange(len(positions)))
    recording.set_probe(probe)
    if gain_uv is not None:
        recording.set_channel_gains(gain_uv)
        recording.set_channel_offsets(0.0)
    return recording
