"""Compare the detection pass with its own floor, on tiles of a scenario's recording, in one process on one thread.

    python benchmarks/floor.py nonrigid --seed 201

The floor of a tile is one FFT filter, one whitening product and one convolution with the universal waveforms, by
our own kernels. The pass is what the tile costs in a sort: reading, filter, reference, whitening, detection and
features. Both are taken in turn, several times over; of each tile the medians count.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import outcome
import recordings
import torch
from run_here import run_here
from scenarios import SCENARIOS

from ks4stream import Settings, geometry, load_probe, open_recording
from ks4stream.blocks import Tile
from ks4stream.engine import one_thread
from ks4stream.kernels import convolution, detection
from ks4stream.kernels import preprocessing as filters
from ks4stream.sorter import prepare
from ks4stream.stages import preprocessing
from ks4stream.stages.detection import Detect
from ks4stream.stages.waveforms import LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

STEPS: tuple[tuple[str, Any, str], ...] = (  # label, owner, function: timed where detection calls them
    ("read", preprocessing.Preprocessor, "raw"),
    ("filter", filters, "highpass"),
    ("reference", filters, "subtract_reference"),
    ("whiten", preprocessing.Preprocessor, "whitened"),
    ("convolve", detection, "correlate"),
    ("bounds", detection._PeakSearch, "__init__"),
    ("scores", detection._PeakSearch, "evaluate"),
    ("maxima", detection._PeakSearch, "summits"),
    ("maxima", detection._PeakSearch, "undominated"),
    ("maxima", detection._PeakSearch, "candidates"),
    ("maxima", detection._PeakSearch, "rivals"),
    ("maxima", detection._PeakSearch, "are_largest"),
    ("depth and template", detection, "_describe"),
    ("features", detection, "features"),
)


class Stopwatch:
    """CPU seconds spent in functions themselves, without what they call that is timed too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # per function now running, the seconds of timed functions it called

    @contextmanager
    def time(self, label: str) -> Iterator[None]:
        """Time a block of statements."""
        self._inner.append(0.0)
        began = time.thread_time()
        try:
            yield
        finally:
            whole = time.thread_time() - began
            self.seconds[label] += whole - self._inner.pop()
            self._inner[-1] += whole

    @contextmanager
    def watching(self, steps: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Time functions wherever they are called, for as long as this lasts."""
        before = [(owner, name, getattr(owner, name)) for _, owner, name in steps]
        for label, owner, name in steps:
            setattr(owner, name, self._timed(label, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.time(label):
                return function(*arguments, **options)

        return timed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="static")
    parser.add_argument("--seed", type=int, default=201)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--recording", type=Path, help="a .bin file with its .probe.json instead of a scenario")
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        binary = options.recording
        if binary is None:
            binary, _ = recordings.make(options.scenario, options.seed, Path(folder), seconds=options.seconds)
        detect = make_stage(binary, outcome.parse_settings(options.set))
        found = measure(detect, n_tiles=options.tiles, n_repetitions=options.repetitions)
        print(report(found, detect))
    if options.json:
        options.json.write_text(json.dumps({"machine": outcome.machine(), **found}, indent=1))


def make_stage(binary: Path, settings: dict[str, Any]) -> Detect:
    """Detection with whitening and waveforms learned from the file, as a sort has them in its first pass."""
    probe = binary.with_suffix(".probe.json")
    n_channels = json.loads(probe.read_text())["n_chan"]
    recording = open_recording(binary, n_chan=n_channels, fs=30_000.0, dtype="int16", probe=load_probe(probe))
    known = Settings.from_dict(settings)
    tiles = prepare(recording, known)
    with run_here(tiles) as run:
        tiles = tiles.with_whitening(run.do(LearnWhitening(known, tiles)))
        waveforms = run.do(LearnWaveforms(known, tiles))
    centres = geometry.template_centres(tiles.probe, known, tiles.without_signal)
    return Detect(known, tiles, waveforms, centres, geometry.clustering_regions(centres, known))


class Floor(NamedTuple):
    """What the floor computes with."""

    response: torch.Tensor  # of the filter
    whitening: torch.Tensor  # (c, c)
    shapes: torch.Tensor  # (p, w) universal waveforms

    @classmethod
    def of(cls, detect: Detect) -> Floor:
        """The same as detection."""
        tiles = detect.tiles
        response = filters.highpass_response(
            tiles.tiling.size + 2 * tiles.tiling.halo,
            sampling_rate_hz=tiles.sampling_rate_hz,
            cutoff_hz=tiles.settings.highpass_cutoff,
        )
        assert tiles.whitening is not None
        return cls(torch.from_numpy(response), torch.from_numpy(tiles.whitening.matrix), detect.templates.shapes)


def measure(detect: Detect, *, n_tiles: int, n_repetitions: int) -> dict[str, Any]:
    """CPU and wall seconds of floor and pass, per tile and repetition, and the pass's steps."""
    tiling, least = detect.tiles.tiling, Floor.of(detect)
    chosen = np.unique(np.linspace(0, len(tiling) - 1, n_tiles + 2).astype(int)[1:-1])  # not the padded ends
    tiles = [tiling[int(index)] for index in chosen]
    run_floor(least, detect.tiles.raw(tiles[0]), Stopwatch())  # everything that is made on first use
    run_pass(detect, tiles[0])
    steps: dict[str, list[float]] = defaultdict(list)
    cpu, wall = (np.zeros((2, n_repetitions, len(tiles))) for _ in range(2))
    n_peaks = 0
    for repetition in range(n_repetitions):
        for at, tile in enumerate(tiles):
            traces = detect.tiles.raw(tile)
            floor, whole = Stopwatch(), Stopwatch()
            clocks = [(time.thread_time(), time.perf_counter())]
            run_floor(least, traces, floor)
            clocks.append((time.thread_time(), time.perf_counter()))
            with whole.watching(STEPS), whole.time("rest"):
                n_peaks += run_pass(detect, tile)
            clocks.append((time.thread_time(), time.perf_counter()))
            cpu[:, repetition, at], wall[:, repetition, at] = np.diff(np.array(clocks), axis=0).T
            for begin, watch in (("floor: ", floor), ("", whole)):
                for label, seconds in watch.seconds.items():
                    steps[begin + label].append(seconds)
    return {
        "cpu_s": cpu.tolist(),
        "wall_s": wall.tolist(),
        "steps_cpu_s": {label: float(np.median(seconds)) for label, seconds in steps.items()},
        "peaks_per_tile": n_peaks / (n_repetitions * len(tiles)),
    }


def run_floor(floor: Floor, traces: torch.Tensor, watch: Stopwatch) -> None:
    """Filter, whiten and convolve one tile, no more."""
    with watch.time("filter"):
        traces = filters.highpass(traces, floor.response)
    with watch.time("whiten"):
        traces = filters.local_product(floor.whitening, traces)
    with watch.time("convolve"):
        for piece in traces.split(
            detection.SAMPLES_PER_CHUNK.on(traces.device), dim=1
        ):  # faster than the whole tile at once
            convolution.correlate(piece, floor.shapes, layout="ctp")


def run_pass(detect: Detect, tile: Tile) -> int:
    """Detect one tile's peaks and take their features; return how many there are."""
    traces, peaks = detect.peaks(tile)
    known = detect.templates
    channels, present = known.channels[peaks.centre], known.present[peaks.centre]
    detection.features(traces, known.components, channels, peaks.sample, present)
    return len(peaks.sample)


def report(found: dict[str, Any], detect: Detect) -> str:
    """The ratio and where the time goes, as text."""
    tiles = detect.tiles
    floor, whole = np.median(np.asarray(found["cpu_s"]), axis=1)  # (tile,) each
    wall_floor, wall_whole = np.median(np.asarray(found["wall_s"]), axis=1)
    steps, read = found["steps_cpu_s"], found["steps_cpu_s"].get("read", 0.0)
    ratio = whole / floor
    lines = [
        f"Machine: {outcome.describe(outcome.machine())}; torch {torch.__version__}, {torch.get_num_threads()} thread",
        f"{tiles.probe.n_channels} channels, {len(detect.centres)} centres, tiles of {tiles.tiling.size} + 2 × "
        f"{tiles.tiling.halo} samples, {found['peaks_per_tile']:.0f} peaks per tile",
        f"floor {1e3 * np.median(floor):.1f} ms, pass {1e3 * np.median(whole):.1f} ms of CPU time per tile",
        f"ratio {np.median(ratio):.2f} (over tiles {ratio.min():.2f} to {ratio.max():.2f}); "
        f"of wall times {np.median(wall_whole / wall_floor):.2f}; "
        f"without reading {np.median((whole - read) / floor):.2f}",
        "",
        f"{'step':<22}{'pass':>9}{'floor':>9}  (ms of CPU time, median)",
    ]
    for label in dict.fromkeys([*(label for label, _, _ in STEPS), "rest"]):
        own, least = steps.get(label), steps.get(f"floor: {label}")
        lines.append(f"{label:<22}" + "".join("        –" if ms is None else f"{1e3 * ms:9.1f}" for ms in (own, least)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
