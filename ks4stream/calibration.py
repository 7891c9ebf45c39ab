"""How fast this machine is on a recording: a few of its batches are sorted in this process."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ks4stream import report
from ks4stream.errors import RecordingError
from ks4stream.io.scratch import scratch_folder
from ks4stream.messages import silent
from ks4stream.pipeline import find_units
from ks4stream.recording import Recording
from ks4stream.resources import Resources
from ks4stream.results import Waveforms
from ks4stream.settings import Settings
from ks4stream.sorter import prepare, started
from ks4stream.stages.base import Run
from ks4stream.stages.needs import Load, kept_bytes
from ks4stream.stages.preprocessing import tiling_of
from ks4stream.stages.waveforms import MAX_SNIPPETS, LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening
from ks4stream.timing import Measured, measured

MIN_BATCHES, MAX_BATCHES, CHANNEL_BATCHES = 5, 10, 2000
"""Batches that are sorted: at most, and with many channels fewer, so that it takes no more than about a minute."""


class Excerpt(NamedTuple):
    """What was measured, on how many batches, and how many seconds that took."""

    measured: Measured
    n_batches: int
    took_s: float


@dataclass(frozen=True, eq=False)
class _LearnAtOnce(LearnWaveforms):
    """Learns from the first attempt: in the whole recording it will do, as there are more batches."""

    def run(self, run: Run) -> Waveforms:
        """Use the clean spikes that there are."""
        if not self.settings.templates_from_data:
            return self.shipped()
        tiling = self.tiles.tiling
        once = replace(self, threshold=self.settings.Th_single_ch, max_per_tile=-(-MAX_SNIPPETS // len(tiling)))
        return once.combine(run.map(once, run.blocks(tiling)), run)


def calibrate(recording: Recording, settings: Settings, *, device: str) -> Excerpt:
    """Sort some batches, evenly spread over the recording, in this thread and in a temporary folder.

    Raises
    ------
    RecordingError
        If they have no spikes.
    """
    tiling = tiling_of(recording, settings)
    n_batches, keep_traces = len(tiling), kept_bytes(tiling, recording.n_channels, device) > 0  # as a sort of all does
    wanted = min(max(CHANNEL_BATCHES // recording.n_channels, MIN_BATCHES), MAX_BATCHES)
    step = settings.batch_downsampling * -(-n_batches // wanted)
    settings = settings.replace(batch_downsampling=step)
    began = time.perf_counter()
    with silent():  # a sort emits these warnings, if they hold for the whole recording
        # On a GPU, what only the first use takes does not count.
        found = [_sorted(recording, settings, device, keep_traces) for _ in range(1 if device == "cpu" else 2)][-1]
    if found is None:
        raise RecordingError(
            f"No spikes were found in {n_batches // -(-n_batches // wanted)} batches of {recording.name}, so that they "
            "do not tell how long a sort takes. Check the probe's units (µm), the channel map, dtype and n_chan; or "
            "plan without calibrating."
        )
    return Excerpt(found, len(tiling_of(recording, settings)), time.perf_counter() - began)


def _sorted(recording: Recording, settings: Settings, device: str, keep_traces: bool) -> Measured | None:
    """Sort all batches.

    So few do not tell whether the tissue moves by less than a bin of depth; that is then taken as unknown.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        tiles = prepare(recording, settings, device=device)
        resources = Resources(device=device)
        run = stack.enter_context(started(tiles, settings, resources, None, client="loop", keep_traces=keep_traces))
        learn = _LearnAtOnce(settings, tiles.with_whitening(run.do(LearnWhitening(settings, tiles))))
        sorting = find_units(run, tiles, settings, known_waveforms=run.do(learn))
        writing = time.perf_counter()
        with report.results_folder(stack.enter_context(scratch_folder()) / "results") as (results, _):
            report.finish(sorting, results, save_plots=False)  # as sort does by default
        load = Load(recording, settings, tiles.tiling, device, 0.0)
        found = measured(load, run, sorting, found_s=writing - began, results_s=time.perf_counter() - writing)
    moved_um = 0.0 if sorting.drift is None else float(np.ptp(sorting.drift.shift_um, axis=0).max())
    return replace(found, moved=None) if found and moved_um < settings.binning_depth else found
