"""Make the probe files of this folder from the makers' published geometry, with probeinterface.

Run ``python probes/make_probes.py`` from the repository; needs no network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import probeinterface
from probeinterface.neuropixels_tools import build_neuropixels_probe

from ks4stream.io.probes import save_probe
from ks4stream.probe import Probe

N_READOUT = 384  # channels a Neuropixels probe records at once

# Neuropixels 2.0, four shanks: electrodes are read out in blocks of 48. Entry [shank][block % 8] is the
# block of 48 channels that reads it (imec's wiring).
BLOCK = 48
CHANNEL_BLOCK = [[0, 2, 4, 6, 5, 7, 1, 3], [1, 3, 5, 7, 4, 6, 0, 2], [4, 6, 0, 2, 1, 3, 5, 7], [5, 7, 1, 3, 0, 2, 4, 6]]


def single_shank(part_number: str, name: str) -> Probe:
    """Bank 0, the 384 contacts nearest the tip; there contact i is channel i."""
    positions_um = build_neuropixels_probe(part_number).contact_positions[:N_READOUT]
    return Probe.from_positions(positions_um, name=name)


def four_shank(part_number: str, name: str) -> Probe:
    """The 96 contacts nearest the tip of each shank, in the order of their channels."""
    contacts = build_neuropixels_probe(part_number)
    shank = np.asarray(contacts.shank_ids).astype(int)
    electrode = np.array([int(name.partition("e")[2]) for name in contacts.contact_ids])
    chosen = np.flatnonzero(electrode < N_READOUT // 4)
    block = np.array(CHANNEL_BLOCK)[shank[chosen], electrode[chosen] // BLOCK]
    channel = BLOCK * block + electrode[chosen] % BLOCK
    order = np.argsort(channel)
    chosen = chosen[order]
    return Probe.from_positions(
        contacts.contact_positions[chosen], chan_map=channel[order], shank=shank[chosen], name=name
    )


def linear(n_contacts: int, pitch_um: float, name: str) -> Probe:
    """One column; contact 0 is nearest the tip."""
    contacts = probeinterface.generate_linear_probe(num_elec=n_contacts, ypitch=pitch_um)
    return Probe.from_positions(contacts.contact_positions, name=name)


def tetrode(radius_um: float, name: str) -> Probe:
    """Four wires twisted together, their tips on a circle."""
    positions_um = np.round(probeinterface.generate_tetrode(radius_um).contact_positions, 6) + 0.0
    return Probe.from_positions(positions_um, name=name)


def make_all() -> list[Probe]:
    """Every probe of this folder."""
    return [
        single_shank("NP1000", "neuropixels_1"),
        single_shank("NP2003", "neuropixels_2_single_shank"),
        four_shank("NP2013", "neuropixels_2_four_shank"),
        linear(16, 50.0, "linear_16"),  # NeuroNexus A1x16-3mm-50
        tetrode(10.0, "tetrode"),  # 12.7 µm wire with its insulation: centres 14 µm apart
    ]


if __name__ == "__main__":
    for probe in make_all():
        save_probe(probe, Path(__file__).parent / f"{probe.name}.json")
