"""Stage by stage with the truth given: which stage loses the units that are lost?

    python benchmarks/given.py static-1.bin hybrid-2.bin [Th_learned=7 …]

For each recording, one line each of

- ``sort``: a whole sort;
- ``drift``: a whole sort with the true motion in place of the estimate (only where the tissue moves);
- ``matching``: matching with the true units' mean waveforms as templates, each template being a unit;
- ``clustering``: the final clustering and merging of the true spikes, with the features that matching would have given
  them.

The last two also have the true motion.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import quick
import torch
import xarray
from numpy.typing import NDArray
from run_here import run_here

from ks4stream import Recording, Settings, sort
from ks4stream.blocks import Tile
from ks4stream.geometry import Regions
from ks4stream.io.tables import pick_region
from ks4stream.kernels import matching as kernels
from ks4stream.motion import given_drift
from ks4stream.pipeline import cluster_spikes, layout
from ks4stream.results import Templates, Waveforms
from ks4stream.run import Run
from ks4stream.sorter import prepare
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Match, Spikes, spans
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.thresholds import SetThresholds, Thresholds
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

LEAST_DRIFT_UM = 1.0

Truth = dict[str, NDArray[Any]]
Found = tuple[NDArray[np.int64], NDArray[np.int64]]  # samples and units


def main(arguments: list[str] | None = None) -> None:
    """Print the lines of each recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="+", help="recordings, and settings as NAME=VALUE (value as in JSON)")
    parser.add_argument("--without-sorts", action="store_true", help="only single stages")
    options = parser.parse_args(arguments)
    pairs = [text for text in options.given if "=" in text]
    settings = Settings.from_dict(outcome.parse_settings(pairs))
    for text in options.given:
        if text not in pairs:
            for line in lines(quick.as_binary(Path(text)), settings, sorts=not options.without_sorts):
                print(line, flush=True)


def lines(binary: Path, settings: Settings, *, sorts: bool = True) -> Iterator[str]:
    """Yield a line for each stage that is given the truth."""
    truth = quick.read_truth(binary)
    recording = quick.opened(binary, truth)
    motion = true_motion(truth) if np.ptp(truth["drift_um"]) >= LEAST_DRIFT_UM else None
    ways: dict[str, Any] = {}
    if sorts:
        ways["sort"] = lambda: _sorted(recording, settings, None)
        if motion is not None:
            ways["drift"] = lambda: _sorted(recording, settings, motion)
    ways["matching"] = lambda: _matched(recording, settings, truth, motion)
    ways["clustering"] = lambda: _clustered(recording, settings, truth, motion)
    for name, way in ways.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = quick.summary_of(truth, *way())
        yield f"{quick.describe(f'{binary.stem} {name}', found)} {time.perf_counter() - began:6.1f} s"


def true_motion(truth: Truth) -> xarray.DataArray:
    """The true displacement as :func:`ks4stream.sort` takes it, up to the recording's end."""
    time_s, drift_um = truth["drift_time_s"], truth["drift_um"]
    end_s = float(truth["n_samples"]) / float(truth["sampling_rate_hz"])
    coords = {"time": np.append(time_s, max(end_s, time_s[-1] + 1)), "depth": truth["drift_y_um"]}
    return xarray.DataArray(np.concatenate([drift_um, drift_um[-1:]]), dims=("time", "depth"), coords=coords)


def _sorted(recording: Recording, settings: Settings, motion: Any) -> Found:
    sorting = sort(recording, settings, client="loop", drift=motion)
    return sorting.sample[sorting.kept], sorting.unit[sorting.kept]


def _matched(recording: Recording, settings: Settings, truth: Truth, motion: Any) -> Found:
    tiles = prepare(recording, settings)
    with run_here(tiles) as run:
        tiles, waveforms, regions = _prepared(run, tiles, settings, motion)
        templates = true_templates(tiles, waveforms, truth, settings)
        thresholds = run.do(SetThresholds(settings, tiles, waveforms, templates))
        spikes = run.do(Match(settings, tiles, waveforms, templates, regions, thresholds))
        return _column(spikes, "sample"), _column(spikes, "template")


def _clustered(recording: Recording, settings: Settings, truth: Truth, motion: Any) -> Found:
    tiles = prepare(recording, settings)
    with run_here(tiles) as run:
        tiles, waveforms, regions = _prepared(run, tiles, settings, motion)
        templates = true_templates(tiles, waveforms, truth, settings)
        order = np.argsort(truth["spike_samples"], kind="stable")
        true = (truth["spike_samples"][order], truth["spike_units"][order])
        none = Thresholds(np.zeros(len(templates.features)))  # units with low scores stay
        spikes = run.do(MatchTrue(settings, tiles, waveforms, templates, regions, none, *true))
        units = cluster_spikes(run, tiles, settings, waveforms, spikes)
        columns = run.do(Join(settings, units, spikes, waveforms, tiles.probe))
        kept = np.asarray(columns["kept"])
        return np.array(columns["sample"])[kept], np.array(columns["unit"])[kept]


def _prepared(
    run: Run, tiles: Preprocessor, settings: Settings, motion: Any
) -> tuple[Preprocessor, Waveforms, Regions]:
    tiles = tiles.with_whitening(run.do(LearnWhitening(settings, tiles)))
    if motion is not None:
        tiles = tiles.with_drift(given_drift(motion, tiles), settings)
    _, regions = layout(tiles, settings)
    return tiles, run.do(LearnWaveforms(settings, tiles)), regions


def true_templates(tiles: Preprocessor, waveforms: Waveforms, truth: Truth, settings: Settings) -> Templates:
    """The true units' mean waveforms in the traces that are sorted, by their features, and the spread of scores."""
    nt, components = settings.nt, torch.from_numpy(waveforms.components)
    units, rows = [], []
    for tile in tiles.tiling:
        traces, blank = tiles.whitened(tile)
        here = (truth["spike_samples"] >= tile.start) & (truth["spike_samples"] < tile.stop)
        at = window_centre(truth["spike_samples"][here], tile, settings)
        far = tiles.away_from_edges(tile, torch.from_numpy(at), blank, nt).numpy()
        windows = traces.unfold(1, nt, 1).permute(1, 0, 2)[torch.from_numpy(at[far] - nt // 2)]
        units.append(truth["spike_units"][here][far])
        rows.append(windows @ components.T)  # (n, c, q)
    unit, features = np.concatenate(units), torch.cat(rows)
    n_units = len(truth["unit_x_um"])
    count = np.bincount(unit, minlength=n_units)
    known = torch.from_numpy(np.maximum(count, 1))
    total = torch.zeros((n_units, *features.shape[1:]), dtype=torch.float64)
    mean = total.index_add_(0, torch.from_numpy(unit), features.double()) / known[:, None, None]
    norm = mean.flatten(1).norm(dim=1).numpy().clip(1e-9)
    score = (features * mean[unit]).sum(dim=(1, 2)).numpy() / norm[unit]
    spread = np.sqrt(np.bincount(unit, (score - norm[unit]) ** 2, minlength=n_units) / known.numpy())
    return Templates(
        features=mean.float().numpy(), count=count.astype(np.float64), spread=spread.clip(1e-3).astype(np.float32)
    )


def window_centre(sample: NDArray[np.int64], tile: Tile, settings: Settings) -> NDArray[np.int64]:
    """Centres of the windows of spikes, counted from the tile's first sample."""
    return sample - tile.first + settings.nt // 2 - settings.peak_sample


@dataclass(frozen=True, eq=False)
class MatchTrue(Match):
    """What matching would return had it found exactly the true spikes, each with the amplitude 1."""

    name = "matching of true spikes"

    true_sample: NDArray[np.int64]
    true_unit: NDArray[np.int64]

    def _rows(self, tile: Tile, artifacts: list[NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        settings, prepared = self.settings, self.prepared
        traces, blank = self.tiles.whitened(tile)
        artifacts.append(spans(blank[self.tiles.core(tile)].cpu().numpy()) + tile.start)
        # Of the halo, too: spikes there overlap with those of the core.
        first, last = tile.first + settings.nt, tile.first + tile.length - settings.nt
        span = slice(*np.searchsorted(self.true_sample, [first, last]))
        sample, unit = self.true_sample[span], torch.from_numpy(self.true_unit[span])
        at = torch.from_numpy(window_centre(sample, tile, settings))
        ones = torch.ones(len(unit))
        spikes = kernels.TileSpikes(at, unit, ones, ones)  # the score is computed below
        residual = kernels.subtract(traces, spikes, prepared)
        core = (sample >= tile.start) & (sample < tile.stop)
        core &= self.tiles.away_from_edges(tile, at, blank, settings.nt).numpy()
        spikes = kernels.TileSpikes(*(column[torch.from_numpy(core)] for column in spikes))
        features = kernels.features(residual, spikes, prepared)
        own = prepared.features[spikes.unit[:, None], prepared.template_channels[spikes.unit].clamp_min(0)]
        score = (features * own).sum(dim=(1, 2)) / own.norm(dim=(1, 2)).clamp_min(1e-6)
        return {
            "sample": sample[core],
            "template": spikes.unit.numpy().astype(np.int32),
            "score": score.numpy(),
            "features": features.numpy(),
            "counts": np.ones(int(core.sum()), dtype=bool),
        }


def _column(spikes: Spikes, name: str) -> NDArray[Any]:
    """One column of all spikes that count."""
    regions = range(int(spikes.region_of.max(initial=-1)) + 1)
    parts = [pick_region(spikes.receipts, name, region, spikes.counted(region)) for region in regions]
    return np.concatenate([np.zeros(0, np.int64), *parts])


if __name__ == "__main__":
    main()
