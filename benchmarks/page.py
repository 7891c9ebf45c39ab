"""Time, size and memory of the page about a sort, for spikes that are made up.

    python benchmarks/page.py [--spikes 1000000 10000000] [--units 100 1000] [--channels 384] [--hours 2]

For each number of spikes and units: CPU seconds to compute the quality metrics, and the rest of the page's content, and
to write it; and its size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ks4stream import Settings, simulate
from ks4stream.blocks import Tiling
from ks4stream.io.by_unit import ByUnit
from ks4stream.report.page import write_page
from ks4stream.report.summary import content
from ks4stream.results import Diagnostics, Drift, PeakSample, Sorting, Waveforms, Whitening
from ks4stream.unit_metrics import GROUPED, quality_metrics, write_quality

RATE_HZ = 30_000.0
REFRACTORY_SAMPLES = 75


def made_up(n_spikes: int, n_units: int, n_channels: int, hours: float) -> Sorting:
    """A sorting of a moving probe; every unit has as many spikes, with a refractory period."""
    draw = np.random.default_rng([n_spikes, n_units])
    settings, n_samples = Settings(), round(hours * 3600 * RATE_HZ)
    probe = simulate.staggered_probe(n_channels)
    tiling = Tiling.by_settings(settings, n_samples=n_samples, sampling_rate_hz=RATE_HZ)
    each = n_spikes // n_units
    gaps = draw.exponential(size=(n_units, each)) * (n_samples / each - REFRACTORY_SAMPLES - 1)
    trains = (np.cumsum(gaps, axis=1) + REFRACTORY_SAMPLES * np.arange(each)).astype(np.int64) % n_samples
    sample, unit = trains.ravel(), np.repeat(np.arange(n_units, dtype=np.int32), each)
    order = np.argsort(sample, kind="stable")
    sample, unit = sample[order], unit[order]
    main = np.linspace(0, n_channels - 1, n_units).astype(np.int64)
    distance = np.linalg.norm(probe.positions_um[main][:, None] - probe.positions_um[None], axis=2)
    near = np.argsort(distance, axis=1, kind="stable")[:, : settings.nearest_chans]
    features = np.zeros((n_units, n_channels, settings.n_pcs), np.float32)
    size = draw.lognormal(2.7, 0.5, n_units)
    np.put_along_axis(
        features[:, :, 0], near, size[:, None] * np.exp(-np.take_along_axis(distance, near, 1) / 40), axis=1
    )
    flat = features.reshape(n_units, -1)
    norm = np.linalg.norm(flat, axis=1)
    components = np.linalg.qr(draw.normal(size=(settings.nt, settings.n_pcs)))[0].T
    score = norm[unit] + draw.normal(size=len(unit)).astype(np.float32)
    depth_um = (probe.y_um[main][unit] + draw.normal(0, 8, len(unit))).astype(np.float32)
    n_spans = min(1000, len(tiling))
    return Sorting(
        sample=sample,
        unit=unit,
        template=unit,
        score=score,
        features=np.zeros((len(unit), 0, settings.n_pcs), np.float32),
        kept=np.ones(len(unit), bool),
        x_um=probe.x_um[main][unit].astype(np.float32),
        y_um=depth_um,
        template_channels=near,
        unit_features=features,
        similarity=flat @ flat.T / np.outer(norm, norm),
        refractory=np.ones(n_units, bool),
        contamination=np.zeros(n_units),
        sampling_rate_hz=RATE_HZ,
        settings=settings,
        probe=probe,
        whitening=Whitening(np.eye(n_channels), np.zeros(0), 100, np.ones(n_channels)),
        waveforms=Waveforms(components, components, 1000, 6.5),
        drift=Drift(draw.normal(0, 0.5, (len(tiling), 9)).cumsum(axis=0), np.linspace(0, 3800, 9)),
        peaks=PeakSample(*(column[:: -(-len(sample) // 100_000)] for column in (sample, depth_um, score))),
        diagnostics=Diagnostics(
            np.linspace(0, n_samples, n_spans + 1), np.ones((n_spans, n_channels)), np.ones(n_spans)
        ),
        n_samples=n_samples,
        tiling=tiling,
        gain_uv=0.195,
    )


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spikes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--units", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--hours", type=float, default=2.0)
    options = parser.parse_args(arguments)
    print("| spikes | units | grouping, CPU s | metrics, CPU s | content, CPU s | writing, CPU s | page, MB |")
    print("|---|---|---|---|---|---|---|")
    for n_spikes in options.spikes:
        for n_units in options.units:
            sorting = made_up(n_spikes, n_units, options.channels, options.hours)
            times = [time.process_time()]
            with tempfile.TemporaryDirectory() as folder:
                by_unit = ByUnit(sorting, *GROUPED, folder=Path(folder))
                times.append(time.process_time())
                metrics = quality_metrics(sorting, by_unit)
                write_quality(sorting, metrics, folder)
                times.append(time.process_time())
                shown = content(sorting, by_unit, metrics)
                times.append(time.process_time())
                page = write_page(shown, Path(folder) / "report.html")
                times.append(time.process_time())
                size = page.stat().st_size / 1e6
            steps = " | ".join(f"{step:.2f}" for step in np.diff(times))
            print(f"| {n_spikes:,} | {n_units} | {steps} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
