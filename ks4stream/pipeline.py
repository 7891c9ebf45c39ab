"""The method, from the first sample to the last unit: read it like the methods section of a paper.

docs/method.md says what each step computes and why.
"""

from __future__ import annotations

import logging

import numpy as np

from ks4stream.errors import FewSpikesWarning
from ks4stream.geometry import Centres, Regions, clustering_regions, template_centres
from ks4stream.messages import warn
from ks4stream.results import Sorting
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.stages.clustering import CLUSTER_METHOD
from ks4stream.stages.detection import Detect
from ks4stream.stages.drift import EstimateDrift
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Match
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.templates import LearnTemplates
from ks4stream.stages.units import ClusterSpikes, Merge, min_unit_spikes
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

logger = logging.getLogger("ks4stream")

FEW_SPIKES = 1000


def find_units(run: Run, tiles: Preprocessor, settings: Settings) -> Sorting:
    """Sort a recording that was prepared.

    Parameters
    ----------
    run : Run
        Where the stages compute, and where what they found is kept.
    tiles : Preprocessor
    settings : Settings

    Returns
    -------
    Sorting
    """
    # Decorrelate the noise of neighbouring channels.
    tiles = tiles.with_whitening(run.do(LearnWhitening(settings, tiles)))

    # Learn what spikes look like on one channel, and detect everything on the probe that looks like it.
    centres, regions = layout(tiles, settings)
    waveforms = run.do(LearnWaveforms(settings, tiles))
    peaks = run.do(Detect(settings, tiles, waveforms, centres, regions))

    # Estimate from the depths of these peaks how the tissue moved. If it did, move the traces back and detect again.
    drift, plotted = None, None
    if settings.nblocks > 0:
        drift, plotted = run.do(EstimateDrift(settings, tiles, peaks))
        if np.any(drift.shift_um):
            tiles = tiles.with_drift(drift, settings)
            waveforms = run.do(LearnWaveforms(settings, tiles))
            peaks = run.do(Detect(settings, tiles, waveforms, centres, regions))

    # Cluster the peaks of each region of the probe; the clusters' means are templates, with which all spikes are found.
    probe, rate = tiles.probe, tiles.sampling_rate_hz
    cluster, min_spikes = CLUSTER_METHOD(settings, tiles.device), min_unit_spikes(tiles.tiling, rate)
    templates = run.do(LearnTemplates(settings, peaks, waveforms, probe, centres, regions, cluster, min_spikes))
    spikes = run.do(Match(settings, tiles, waveforms, templates, regions))

    # Cluster the spikes, merge the clusters that are one neuron, drop those that are none; put all in order of time.
    clusters = run.do(ClusterSpikes(settings, spikes, probe, CLUSTER_METHOD(settings, tiles.device, final=True)))
    units = run.do(Merge(settings, clusters, waveforms, probe, rate, min_spikes))
    columns = run.do(Join(settings, units, spikes, waveforms, probe))

    recording = tiles.recording
    sorting = Sorting(
        **columns,
        template_channels=spikes.template_channels,
        unit_features=units.features,
        similarity=units.similarity,
        refractory=units.refractory,
        contamination=units.contamination,
        settings=settings,
        sampling_rate_hz=rate,
        probe=probe,
        whitening=tiles.whitening,
        waveforms=waveforms,
        drift=drift,
        peaks=plotted,
        artifacts=spikes.artifacts,
        n_samples=recording.n_samples,
        tiling=tiles.tiling,
        files=recording.files,
        dtype=recording.dtype.name,
        n_chan_file=recording.n_channels,
        seconds=dict(run.seconds),
    )
    if sorting.n_spikes < FEW_SPIKES or sorting.n_units < 2:
        warn(
            f"Only {sorting.n_spikes} spikes in {sorting.n_units} units were found. If more were to be expected, check "
            "the probe's units (µm), the channel map, dtype and n_chan, or lower Th_universal and Th_learned.",
            FewSpikesWarning,
        )
    return sorting


def layout(tiles: Preprocessor, settings: Settings) -> tuple[Centres, Regions]:
    """Where on the probe peaks are looked for, and which regions are clustered separately."""
    centres = template_centres(tiles.probe, settings, tiles.without_signal)
    regions = clustering_regions(centres, settings)
    logger.info("%d template centres, %d regions", len(centres), len(regions))
    return centres, regions


STAGES = (LearnWhitening, LearnWaveforms, Detect, EstimateDrift, LearnTemplates, Match, ClusterSpikes, Merge, Join)
"""What the plan sums over."""
