"""The method, from the first sample to the last unit: read it like the methods section of a paper.

docs/method.md says what each step computes and why.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from ks4stream.engine import peak_bytes
from ks4stream.errors import FewSpikesWarning
from ks4stream.geometry import Centres, Regions, clustering_regions, template_centres
from ks4stream.messages import warn
from ks4stream.results import Diagnostics, Drift, Sorting, Templates, Waveforms
from ks4stream.run import Run
from ks4stream.settings import Settings
from ks4stream.stages.clustering import CLUSTER_METHOD, Circumstances
from ks4stream.stages.detection import Detect, Peaks
from ks4stream.stages.drift import EstimateDrift
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Match, Spikes
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.templates import LearnTemplates
from ks4stream.stages.thresholds import SetThresholds
from ks4stream.stages.units import ClusterSpikes, Merge, Units, min_unit_spikes
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening
from ks4stream.stages.widening import Widen

logger = logging.getLogger("ks4stream")

FEW_SPIKES = 1000


def find_units(
    run: Run,
    tiles: Preprocessor,
    settings: Settings,
    drift: Drift | None = None,
    known_waveforms: Waveforms | None = None,
) -> Sorting:
    """Sort a recording that was prepared.

    Parameters
    ----------
    run : Run
        Where the stages compute, and where what they found is kept.
    tiles : Preprocessor
    settings : Settings
    drift : Drift, optional
        Used in place of an estimate.
    known_waveforms : Waveforms, optional
        Used in place of those that would be learned.

    Returns
    -------
    Sorting
    """
    # Decorrelate the noise of neighbouring channels.
    tiles = tiles.with_whitening(run.do(LearnWhitening(settings, tiles)))

    # Detect everything that looks like a spike. If its depths show that the tissue moved, move the traces back and
    # detect again.
    centres, regions = layout(tiles, settings)
    if drift is not None and np.any(drift.shift_um):
        tiles = tiles.with_drift(drift, settings)
    waveforms, peaks = find_peaks(run, tiles, settings, centres, regions, known_waveforms)
    plotted = None
    if drift is None and settings.nblocks != 0:
        drift, plotted = run.do(EstimateDrift(settings, tiles, peaks))
        if np.any(drift.shift_um):
            tiles = tiles.with_drift(drift, settings)
            waveforms, peaks = find_peaks(run, tiles, settings, centres, regions, known_waveforms)

    # Learn the templates of the neurons from these peaks, find all their spikes, and sort them into units.
    templates, spikes = find_spikes(run, tiles, settings, waveforms, peaks, centres, regions)
    units = cluster_spikes(run, tiles, settings, waveforms, spikes)
    columns = run.do(Join(settings, units, spikes, waveforms, tiles.probe))

    recording = tiles.recording
    sorting = Sorting(
        **columns,
        template_channels=spikes.template_channels,
        unit_features=units.features,
        similarity=units.similarity,
        refractory=units.refractory,
        contamination=units.contamination,
        settings=settings,
        sampling_rate_hz=tiles.sampling_rate_hz,
        probe=tiles.probe,
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
        gain_uv=recording.gain_uv,
        seconds=dict(run.seconds),
        recalled=dict(run.recalled),
        n_workers=run.engine.n_workers,
        memory_bytes=peak_bytes(),
        diagnostics=with_units(diagnostics(peaks, templates, spikes), units),
    )
    if sorting.n_spikes < FEW_SPIKES or sorting.n_units < 2:
        n_units = f"{sorting.n_units} unit{'s' * (sorting.n_units != 1)}"
        found = f"Only {sorting.n_spikes} spikes in {n_units}" if sorting.n_spikes else "No spikes"
        warn(
            f"{found} were found. If you expected more, check the probe's units (µm), the channel map, dtype and "
            "n_chan, or set Th_universal and Th_learned lower.",
            FewSpikesWarning,
        )
    return sorting


def diagnostics(peaks: Peaks, templates: Templates, spikes: Spikes) -> Diagnostics:
    """What happened on the way to the spikes, for the report."""
    edge, energy = spikes.energy or (np.zeros(1, np.int64), np.zeros((0, 2, 0), np.float32))
    of_traces, rest = energy.sum(axis=2, dtype=np.float64).T
    n_spikes = int(spikes.of_region.sum()) - sum(map(len, spikes.dropped))
    return Diagnostics(
        edge=edge,
        noise=np.sqrt(energy[:, 1]),
        explained=1 - np.divide(rest, of_traces, out=np.full(len(rest), np.nan), where=of_traces > 0),
        counts={"peaks": int(peaks.of_region.sum()), "templates": len(templates.features), "matched spikes": n_spikes},
    )


def with_units(found: Diagnostics, units: Units) -> Diagnostics:
    """The same with what happened on the way from spikes to units."""
    n_units = len(units.features)
    n_merged = n_units + sum(n_left_out for n_left_out, _ in units.left_out.values())
    counts = {"clusters": len(units.unit_of), "merged clusters": n_merged, "units": n_units}
    return replace(found, isolation=units.isolation, counts=found.counts | counts, left_out=units.left_out)


def layout(tiles: Preprocessor, settings: Settings) -> tuple[Centres, Regions]:
    """Where on the probe peaks are looked for, and which regions are clustered separately."""
    centres = template_centres(tiles.probe, settings, tiles.without_signal)
    regions = clustering_regions(centres, settings)
    logger.info("%d template centres, %d regions", len(centres), len(regions))
    return centres, regions


def find_peaks(
    run: Run,
    tiles: Preprocessor,
    settings: Settings,
    centres: Centres,
    regions: Regions,
    known_waveforms: Waveforms | None = None,
) -> tuple[Waveforms, Peaks]:
    """Learn what spikes look like on one channel, and detect everything on the probe that looks like it."""
    waveforms = known_waveforms or run.do(LearnWaveforms(settings, tiles))
    return waveforms, run.do(Detect(settings, tiles, waveforms, centres, regions))


def find_spikes(
    run: Run,
    tiles: Preprocessor,
    settings: Settings,
    waveforms: Waveforms,
    peaks: Peaks,
    centres: Centres,
    regions: Regions,
) -> tuple[Templates, Spikes]:
    """Cluster the peaks of each region of the probe; with the clusters' means as templates, find all spikes."""
    cluster = CLUSTER_METHOD(settings, tiles.device)
    min_spikes = min_unit_spikes(tiles.tiling, tiles.sampling_rate_hz)
    circumstances = Circumstances(tiles.tiling, tiles.sampling_rate_hz, tiles.drift)
    learn = LearnTemplates(
        settings, peaks, waveforms, tiles.probe, centres, regions, circumstances, cluster, min_spikes
    )
    templates = run.do(Widen(settings, tiles, waveforms, run.do(learn)))
    thresholds = run.do(SetThresholds(settings, tiles, waveforms, templates))
    return templates, run.do(Match(settings, tiles, waveforms, templates, regions, thresholds))


def cluster_spikes(run: Run, tiles: Preprocessor, settings: Settings, waveforms: Waveforms, spikes: Spikes) -> Units:
    """Cluster the spikes of each region, merge the clusters that are one neuron, and drop those that are none."""
    probe, rate = tiles.probe, tiles.sampling_rate_hz
    circumstances = Circumstances(tiles.tiling, rate, tiles.drift)
    cluster = CLUSTER_METHOD(settings, tiles.device, final=True)
    clusters = run.do(ClusterSpikes(settings, spikes, waveforms, probe, circumstances, cluster))
    min_spikes = min_unit_spikes(tiles.tiling, rate)
    return run.do(Merge(settings, clusters, spikes.template_channels, waveforms, probe, rate, min_spikes))


STAGES = (
    LearnWhitening,
    LearnWaveforms,
    Detect,
    EstimateDrift,
    LearnTemplates,
    Widen,
    SetThresholds,
    Match,
    ClusterSpikes,
    Merge,
    Join,
)
"""What the plan sums over."""
