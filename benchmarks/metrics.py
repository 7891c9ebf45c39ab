"""Quality metrics beside SpikeInterface's, on the same made-up spikes, amplitudes and depths.

    python benchmarks/metrics.py [--spikes 1000000] [--units 100] [--hours 1]

For each metric: the largest difference, the number of units for which both define it and only one does, and the CPU
seconds of both. Needs SpikeInterface, and numba for its contamination by pairs.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from page import RATE_HZ, made_up

from ks4stream.io.by_unit import ByUnit
from ks4stream.kernels import metrics

COLUMNS = ("sample", "score", "y_um")


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spikes", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--hours", type=float, default=1.0)
    options = parser.parse_args(arguments)
    sorting = made_up(options.spikes, options.units, 16, options.hours)
    by_unit, units = ByUnit(sorting, *COLUMNS), range(sorting.n_units)
    trains = [np.unique(by_unit.of(unit, "sample")) for unit in units]  # SpikeInterface counts pairs at one time twice
    scores, depths = ([by_unit.of(unit, name)[: len(trains[unit])] for unit in units] for name in COLUMNS[1:])
    time_of = {"sampling_rate_hz": RATE_HZ, "n_samples": sorting.n_samples}
    edges = metrics.bin_edges(0, sorting.n_samples, int(60 * RATE_HZ))
    theirs = Theirs(trains, scores, depths, sorting.n_samples)
    ours: dict[str, Callable[[int], float]] = {
        "isi_violations_ratio": lambda unit: metrics.isi_violations_ratio(trains[unit], **time_of),
        "rp_contamination": lambda unit: metrics.rp_contamination(trains[unit], **time_of),
        "sliding_rp_violation": lambda unit: metrics.sliding_rp_violation(trains[unit], **time_of),
        "presence_ratio": lambda unit: metrics.presence_ratio(metrics.counts_in(trains[unit], edges)),
        "amplitude_cutoff": lambda unit: metrics.amplitude_cutoff(scores[unit]),
        "drift_ptp": lambda unit: metrics.drift(trains[unit], depths[unit], edges).ptp,
        "drift_std": lambda unit: metrics.drift(trains[unit], depths[unit], edges).std,
    }
    print("| metric | largest difference | defined by both | by one | CPU s | SpikeInterface, CPU s |")
    print("|---|---|---|---|---|---|")
    for name, metric in ours.items():
        began = time.process_time()
        found = np.array([metric(unit) for unit in units])
        took = time.process_time() - began
        began = time.process_time()
        expected = getattr(theirs, name)()
        their_took = time.process_time() - began
        both, one = np.isfinite(found) & np.isfinite(expected), np.isfinite(found) ^ np.isfinite(expected)
        largest = np.abs(found - expected)[both].max(initial=0.0)
        print(f"| `{name}` | {largest:.2g} | {both.sum()} | {one.sum()} | {took:.2f} | {their_took:.2f} |")


class Theirs:
    """SpikeInterface's metrics of the same units."""

    def __init__(
        self, trains: list[NDArray[Any]], scores: list[NDArray[Any]], depths: list[NDArray[Any]], n_samples: int
    ) -> None:
        import spikeinterface.core as si
        from spikeinterface.metrics.quality import misc_metrics

        recording = si.NumpyRecording([np.broadcast_to(np.zeros((1, 2), np.int8), (n_samples, 2))], RATE_HZ)
        recording.set_dummy_probe_from_locations(np.array([[0.0, 0.0], [0.0, 20.0]]))
        recording.set_channel_gains(1.0)
        recording.set_channel_offsets(0.0)
        sorting = si.NumpySorting.from_unit_dict([dict(enumerate(trains))], RATE_HZ)
        self._analyzer = si.create_sorting_analyzer(sorting, recording, sparse=False)
        self._module, self._scores = misc_metrics, scores
        misc_metrics.check_has_required_extensions = lambda *_: None
        by_unit = {unit: np.rec.fromarrays([y], names=["y"]) for unit, y in enumerate(depths)}

        class Locations:
            def get_data(self, outputs: str, concatenated: bool, periods: Any) -> Any:
                return by_unit if concatenated else [by_unit]

        self._analyzer.get_extension = lambda name: Locations()
        self._of("compute_refrac_period_violations", 0)  # numba compiles

    def _of(self, name: str, column: int | None = None) -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(self._module, name)(self._analyzer)
        found = found if column is None else found[column]
        return np.array([found[unit] for unit in self._analyzer.unit_ids], np.float64)

    def isi_violations_ratio(self) -> NDArray[np.float64]:
        return self._of("compute_isi_violations", 0)

    def rp_contamination(self) -> NDArray[np.float64]:
        return self._of("compute_refrac_period_violations", 0)

    def sliding_rp_violation(self) -> NDArray[np.float64]:
        return self._of("compute_sliding_rp_violations")

    def presence_ratio(self) -> NDArray[np.float64]:
        return self._of("compute_presence_ratios")

    def amplitude_cutoff(self) -> NDArray[np.float64]:
        return np.array([self._module.amplitude_cutoff(score) for score in self._scores])

    def drift_ptp(self) -> NDArray[np.float64]:
        return self._of("compute_drift_metrics", 0)

    def drift_std(self) -> NDArray[np.float64]:
        return self._of("compute_drift_metrics", 1)


if __name__ == "__main__":
    main()
