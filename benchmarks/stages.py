"""Compare ks4stream with Kilosort4 stage by stage: the same input to each stage, and what differs in its result.

    python benchmarks/stages.py static --seconds 60 --kilosort-python PYTHON_WITH_KILOSORT --out DIR

Kilosort4's public stage functions run in their own environment (``run_kilosort4.py --stages``) and leave what they
return as plain arrays. Our stages then get *its* whitening, waveforms, shifts, templates and features, one
stage at a time, so that a difference belongs to the stage it appears in. Where the two differ on purpose (a
sentence with → in the specification) the line says so, and where it can, our kernels are run once more without the
departure, so that what remains is ours to explain.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import outcome
import recordings
import torch
from run_here import run_here
from scenarios import SCENARIOS
from scipy.optimize import linear_sum_assignment

from ks4stream import Probe, Settings, geometry, load_probe, open_recording
from ks4stream.blocks import Tile, Tiling
from ks4stream.engine import one_thread
from ks4stream.geometry import Centres
from ks4stream.io.tables import read_column, write_block
from ks4stream.kernels import detection as detection_kernels
from ks4stream.kernels import drift as drift_kernels
from ks4stream.kernels import matching as matching_kernels
from ks4stream.kernels import preprocessing as filters
from ks4stream.kernels import templates as template_kernels
from ks4stream.kernels import waveforms as waveform_kernels
from ks4stream.results import Drift, Templates, Waveforms, Whitening
from ks4stream.scoring import score
from ks4stream.sorter import prepare
from ks4stream.stages.clustering import Circumstances, GraphClustering, scattered_rows
from ks4stream.stages.detection import Detect
from ks4stream.stages.joining import Join
from ks4stream.stages.matching import Match, Spikes
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.pursuit import lowest_score
from ks4stream.stages.registration import Registration
from ks4stream.stages.small_peaks import lowest_peak
from ks4stream.stages.templates import LearnTemplates
from ks4stream.stages.thresholds import Thresholds
from ks4stream.stages.units import ClusterSpikes, Merge, min_unit_spikes
from ks4stream.stages.waveforms import EVERY_BATCH, MAX_SNIPPETS, LearnWaveforms
from ks4stream.stages.whitening import LearnWhitening

NEAR_SAMPLES = 6  # two detections this close in time …
NEAR_UM = 40.0  # … and in depth are of the same spike
FILTER_ENDS = 500  # samples that the high-pass filter reaches
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Line:
    """One figure of the comparison."""

    stage: str
    figure: str
    value: float | str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Pair:
    """What is compared: our tiles, and what Kilosort4's stages returned."""

    tiles: Preprocessor  # knows neither whitening nor drift
    settings: Settings
    theirs: Arrays
    truth: Arrays

    @property
    def probe(self) -> Probe:
        return self.tiles.probe

    @property
    def tiling(self) -> Tiling:
        return self.tiles.tiling

    @property
    def rate_hz(self) -> float:
        return self.tiles.sampling_rate_hz

    @property
    def whitened(self) -> Preprocessor:
        """With Kilosort4's whitening."""
        return self.tiles.with_whitening(Whitening(self.theirs["whitening"], dead=np.zeros(0)))

    @property
    def moved(self) -> Preprocessor:
        """With Kilosort4's whitening and shifts."""
        if "drift_um" not in self.theirs:
            return self.whitened
        drift = Drift(self.theirs["drift_um"], self.theirs["drift_centre_um"])
        return self.whitened.with_drift(drift, self.settings)

    def their_waveforms(self, which: str = "") -> Waveforms:
        """Of the drift-corrected pass, or of the first (``"_1"``)."""
        return Waveforms(self.theirs[f"components{which}"], self.theirs[f"shapes{which}"])

    @functools.cached_property
    def their_templates(self) -> torch.Tensor:
        """Its learned templates as matching has them: the clusters' means that it returns, merged, then aligned.

        By our kernels, in the order that reproduces its spikes; :func:`compare_matching` shows whether they do.
        """
        merged = template_kernels.merge_similar(self.their_means, self.their_counts, self.their_components).features
        return template_kernels.align(merged, self.their_components, torch.from_numpy(self.theirs["shapes"]))

    @property
    def their_means(self) -> torch.Tensor:
        """Mean features of its first clusters."""
        return torch.from_numpy(self.theirs["templates"])

    @property
    def their_counts(self) -> torch.Tensor:
        """Spikes of its first clusters."""
        counts = np.bincount(self.theirs["clusters"].astype(np.int64), minlength=len(self.theirs["templates"]))
        return torch.from_numpy(counts)

    @property
    def their_components(self) -> torch.Tensor:
        """Its wPCA, of the drift-corrected pass."""
        return torch.from_numpy(self.theirs["components"])

    def batches(self, name: str) -> list[tuple[Tile, torch.Tensor]]:
        """Tiles whose traces were kept, with Kilosort4's traces of core and nt samples on either side."""
        kept = zip(self.theirs["batches"], self.theirs[name], strict=True)
        return [(self.tiling[int(b)], torch.from_numpy(traces)) for b, traces in kept]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, compare, print."""
    options = _options(arguments)
    pair = load_pair(options)
    lines: list[Line] = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compare in (
            compare_traces,
            compare_whitening,
            compare_waveforms,
            compare_geometry,
            compare_detection,
            compare_drift,
            compare_clustering,
            compare_templates,
            compare_matching,
            compare_units,
        ):
            lines += compare(pair)
    (options.out / "stages.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
    print(markdown(lines))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="static")
    parser.add_argument("--seed", type=int, default=301)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--recording", type=Path, help="a .bin file with .probe.json and .truth.npz, no scenario")
    parser.add_argument("--channels", type=int, default=None, help="sort the probe's first channels only")
    parser.add_argument("--kilosort-python", required=True, help="python of an environment that holds Kilosort4")
    parser.add_argument("--out", type=Path, required=True, help="what Kilosort4 left there for it is used again")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both")
    parser.add_argument("--threads", type=int, default=1, help="of Kilosort4")
    parser.add_argument("--batches", type=int, default=3, help="batches whose traces are compared")
    return parser.parse_args(arguments)


def load_pair(options: argparse.Namespace) -> Pair:
    """Simulate, let Kilosort4 run stage by stage unless it has, and load what it left."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.recording:
        binary = options.recording
        with np.load(binary.with_suffix(".truth.npz")) as file:
            truth = dict(file)
    else:
        binary, truth = recordings.make(options.scenario, options.seed, options.out, seconds=options.seconds)
    probe_file = binary.with_suffix(".probe.json")
    if options.channels:
        probe = json.loads(probe_file.read_text())
        probe |= {name: probe[name][: options.channels] for name in ("chanMap", "xc", "yc", "kcoords")}
        probe_file = options.out / f"{binary.stem}.first-{options.channels}.probe.json"
        probe_file.write_text(json.dumps(probe))
    settings = outcome.parse_settings(options.set)
    bad = truth["bad_channels"].tolist()
    asked = json.loads(json.dumps(outcome.request(binary, probe_file, settings, bad)))
    folder = options.out / "kilosort4"
    if not (folder / "figures.json").exists() or outcome.read(folder)[0]["asked"] != asked:
        command = [options.kilosort_python, str(Path(__file__).parent / "run_kilosort4.py"), str(binary), "--stages"]
        command += ["--probe", str(probe_file), "--out", str(folder), f"--threads={options.threads}"]
        command += [f"--stage-batches={options.batches}", f"--bad-channels={','.join(map(str, bad))}"]
        subprocess.run([*command, *(f"--set={pair}" for pair in options.set)], check=True)
    recording = open_recording(
        binary,
        n_chan=asked["probe"]["n_chan"],
        fs=30_000.0,
        dtype="int16",
        probe=load_probe(probe_file).drop_channels(bad) if bad else load_probe(probe_file),
    )
    ours = Settings.like_kilosort4(settings)  # same settings as the sorter it is compared with
    with np.load(folder / "stages.npz") as file:
        return Pair(prepare(recording, ours), ours, dict(file), truth)


# --- the stages ---------------------------------------------------------------------------------------------


def compare_traces(pair: Pair) -> list[Line]:
    """Filter, reference and whitening of the same samples, with Kilosort4's matrix."""
    ours, alike = [], []
    for tile, whole in pair.batches("whitened"):
        core = pair.tiles.core(tile)
        n, nt = core.stop - core.start, pair.settings.nt
        theirs = whole[:, nt : nt + n]
        ours.append(_relative_difference(pair.whitened.whitened(tile)[0][:, core], theirs))
        inner = slice(nt + FILTER_ENDS, nt + n - FILTER_ENDS)
        alike.append(_relative_difference(_as_reference(pair, tile)[:, inner], whole[:, inner]))
    return [
        Line("traces", "rms difference / rms", max(ours), "→ reference after the filter, both middle values"),
        Line("traces", "the same without these departures", max(alike), "should be rounding"),
    ]


def _as_reference(pair: Pair, tile: Tile) -> torch.Tensor:
    """A batch with nt samples of halo as the reference is said to make it: less its mean, the lower median, filtered.

    Its filter is circular on the batch, so FILTER_ENDS samples at the ends are others.
    """
    nt = pair.settings.nt
    raw = pair.tiles.raw(tile)[:, tile.halo - nt : tile.halo + tile.size + nt]
    raw = raw - raw.mean(dim=1, keepdim=True)
    raw = raw - raw.median(dim=0).values
    cutoff, rate = pair.settings.highpass_cutoff, pair.rate_hz
    response = filters.highpass_response(raw.shape[1], sampling_rate_hz=rate, cutoff_hz=cutoff)
    return torch.from_numpy(pair.theirs["whitening"]) @ filters.highpass(raw, torch.from_numpy(response))


def compare_whitening(pair: Pair) -> list[Line]:
    """The whitening matrix, from the batches it takes and from those we take."""
    theirs, lines = pair.theirs["whitening"], []
    learn = LearnWhitening(pair.settings, pair.tiles)
    same = range(0, len(pair.tiling), pair.settings.nskip)
    for label, chosen, note in (
        ("from the same batches", same, "→ reference after the filter"),
        ("from our choice of batches", pair.tiling.evenly(pair.settings.nskip), "→ at least 25 batches"),
    ):
        with run_here(pair.tiles) as run:
            parts = run.map(learn, run.blocks(pair.tiling, chosen))
            ours = learn.combine(parts, run).matrix
        correlation = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        size = np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        lines.append(Line("whitening", f"least correlation of rows, {label}", float(correlation.min()), note))
        lines.append(Line("whitening", f"row norms, ours / its, {label}", _range(size)))
    return lines


def compare_waveforms(pair: Pair) -> list[Line]:
    """Universal waveforms, learned from its own traces and from ours with its whitening (and shifts)."""
    lines, threshold = [], pair.settings.Th_single_ch
    for which, tiles, kept in (("_1", pair.whitened, "whitened"), ("", pair.moved, "moved")):
        if f"components{which}" not in pair.theirs:
            continue
        theirs = pair.their_waveforms(which)
        name = "waveforms, first pass" if which else "waveforms"
        learn = LearnWaveforms(pair.settings, tiles, threshold=threshold, max_per_tile=MAX_SNIPPETS)
        its = [traces for tile, traces in pair.batches(kept) if tile.index % EVERY_BATCH == 0]
        with run_here(tiles) as run:
            from_its = [[_snippets_by_number(pair, traces) for traces in its]]
            from_some, from_all = (
                list(run.map(learn, run.blocks(pair.tiling, range(0, len(pair.tiling), step))))
                for step in (EVERY_BATCH, 1)
            )
            for label, parts, note in (
                ("its traces, neighbours by number", from_its, "no departure: 1 is expected"),
                ("our traces, neighbours by distance", from_some, "→ by distance within the shank"),
                ("our traces, all batches", from_all, "→ all batches where there are few snippets"),
            ):
                n_snippets = sum(len(snippets) for part in parts for snippets in part)
                ours = learn.combine(parts, run)
                if not ours.n_snippets:
                    lines.append(Line(name, f"{label}: snippets", n_snippets, "too few to learn from"))
                    continue
                overlap = np.linalg.svd(ours.components @ theirs.components.T, compute_uv=False)
                alike = _assigned(ours.shapes @ theirs.shapes.T)
                lines.append(Line(name, f"{label}: cosines of the component spaces", _range(overlap), note))
                note = f"k-means of {n_snippets} snippets, paired one to one"
                lines.append(Line(name, f"{label}: correlation of the shapes", _range(alike), note))
    return lines


def _snippets_by_number(pair: Pair, traces: torch.Tensor) -> np.ndarray:
    """Snippets of its own traces of a batch, with the reference's neighbourhoods of ±4 and ±6 channels."""
    nt, settings = pair.settings.nt, pair.settings
    near, wide = (
        _channels_around(len(traces), (count - 1) // 2)
        for count in (geometry.PEAK_NEIGHBOURS, geometry.ALONE_NEIGHBOURS)
    )
    channel, sample = waveform_kernels.find_clean_peaks(
        traces, near, wide, threshold=settings.Th_single_ch, first=nt, last=traces.shape[1] - nt
    )
    return waveform_kernels.cut_snippets(traces, channel, sample, nt=nt, peak_sample=settings.peak_sample).numpy()


def _channels_around(n_channels: int, reach: int) -> torch.Tensor:
    """Channels within `reach` by number, itself first and in place of those beyond the ends: (c, 2·reach + 1)."""
    offsets = np.array([0, *range(-reach, 0), *range(1, reach + 1)])
    rows = np.arange(n_channels)[:, None] + offsets
    return torch.from_numpy(np.where((rows >= 0) & (rows < n_channels), rows, np.arange(n_channels)[:, None]))


def compare_geometry(pair: Pair) -> list[Line]:
    """Centres, their channels and weights."""
    theirs = np.column_stack([pair.theirs["centre_x"], pair.theirs["centre_y"]])
    ours = geometry.template_centres(pair.probe, pair.settings)
    at, distance = geometry.nearest_positions(ours.position_um, theirs, 1)
    same = distance[:, 0] < 0.01
    lines = [
        Line("geometry", "centres, ours and its", f"{len(ours)} and {len(theirs)}", "→ a grid per shank"),
        Line("geometry", "of ours at the same place", _share(same)),
    ]
    if same.any():
        rows = at[same, 0]
        channels, weights = (
            pair.theirs["centre_channels"].T[rows],
            np.moveaxis(pair.theirs["centre_weights"], 2, 0)[rows],
        )
        spread = [_scattered(pair, *both) for both in ((ours.channels[same], ours.weights[same]), (channels, weights))]
        most = float(np.abs(spread[0] - spread[1]).max())
        lines.append(Line("geometry", "largest difference of a weight there", most, "ties between channels may differ"))
    return lines


def _scattered(pair: Pair, channels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights (k, s, j) on channels (k, j; −1 for none) as (k, s, c)."""
    spread = np.zeros((*weights.shape[:2], pair.probe.n_channels + 1))
    np.put_along_axis(spread, np.broadcast_to(channels[:, None], weights.shape), weights, axis=2)
    return spread[:, :, :-1]


def compare_detection(pair: Pair) -> list[Line]:
    """Universal detection with its whitening and waveforms: on its traces, on ours, and against the truth."""
    if "peaks" not in pair.theirs:
        return [Line("detection", "not compared", "–", "with nblocks=0 Kilosort4 returns no detections")]
    to_centre = pair.settings.nt // 2 - pair.settings.peak_sample
    seconds, depth, amplitude, template, batch = pair.theirs["peaks"].T[:5]
    their_sample = np.rint(seconds * pair.rate_hz).astype(np.int64) - to_centre  # it reports the window's centre
    detect = _detection(pair, pair.whitened, pair.their_waveforms("_1"), their_centres(pair))
    lines = []

    nt = pair.settings.nt
    pairs, n_ours, n_theirs = [], 0, 0
    for tile, traces in pair.batches("whitened"):
        found = _detect_in_batch(pair, detect, tile, traces)
        sample = found.sample.numpy() - nt + tile.start - to_centre
        rows = np.flatnonzero(batch == tile.index)
        i, j = _pair_up(sample, found.depth_um.numpy(), their_sample[rows], depth[rows])
        n_ours, n_theirs = n_ours + len(sample), n_theirs + len(rows)
        columns = (sample, found.depth_um.numpy(), found.score.numpy(), found.template.numpy())
        pairs.append(
            np.array([c[i] for c in columns])
            - np.array([c[rows][j] for c in (their_sample, depth, amplitude, template)])
        )
    time, place, size, shape = np.concatenate(pairs, axis=1)
    lines += [
        Line("detection", "on its traces: of ours found by it", _share_of(len(time), n_ours)),
        Line("detection", "on its traces: of its found by us", _share_of(len(time), n_theirs)),
        Line("detection", "on its traces: at the same sample", _share(time == 0)),
        Line("detection", "on its traces: of the same template", _share(shape == 0)),
        Line("detection", "on its traces: difference in depth, µm", _range(place), "of pairs"),
        Line("detection", "on its traces: difference in score", _range(size), "of pairs"),
    ]

    sample, place = _peaks(detect)
    i, j = _pair_up(sample, place, their_sample, depth)
    lines += [
        Line("detection", "on ours: of ours found by it", _share_of(len(i), len(sample))),
        Line("detection", "on ours: of its found by us", _share_of(len(j), len(their_sample))),
    ]
    lines += _against_truth("detection", pair, sample=sample, theirs=their_sample)
    sample, _ = _peaks(_detection(pair, pair.whitened, detect.waveforms, our_centres(pair)))
    return [
        *lines,
        Line("detection", "with our centres: detections, ours and its", f"{len(sample)} and {len(their_sample)}"),
    ]


def our_centres(pair: Pair) -> Centres:
    """Centres as a sort has them."""
    return geometry.template_centres(pair.probe, pair.settings)


def their_centres(pair: Pair) -> Centres:
    """Kilosort4's centres in the form of ours."""
    position = np.column_stack([pair.theirs["centre_x"], pair.theirs["centre_y"]])
    near, _ = geometry.nearest_positions(position, position, min(pair.settings.nearest_templates, len(position)))
    return Centres(
        position_um=position,
        shank=np.zeros(len(position), np.int64),
        channels=pair.theirs["centre_channels"].T.copy(),
        weights=np.moveaxis(pair.theirs["centre_weights"], 2, 0).copy(),
        neighbours=near,
        pitch_um=pair.settings.dmin or geometry.vertical_pitch_um(pair.probe),
    )


def _detection(pair: Pair, tiles: Preprocessor, waveforms: Waveforms, centres: Centres) -> Detect:
    regions = geometry.clustering_regions(centres, pair.settings)
    return Detect(pair.settings, tiles, waveforms, centres, regions)


def _peaks(detect: Detect) -> tuple[np.ndarray, np.ndarray]:
    """Times and depths of all peaks of the recording."""
    times, depths = [], []
    for tile in detect.tiles.tiling:
        _, peaks = detect.peaks(tile)
        times.append(detect.time_of(tile, peaks.sample).numpy())
        depths.append(peaks.depth_um.numpy())
    return np.concatenate(times), np.concatenate(depths)


def compare_drift(pair: Pair) -> list[Line]:
    """Shifts from its detections, and traces moved by its shifts."""
    if "peaks" not in pair.theirs:
        return [Line("drift", "not compared", "–", "nblocks=0")]
    _, depth, amplitude, _, batch = pair.theirs["peaks"].T[:5]
    settings, y_um = pair.settings, pair.probe.y_um
    n_bins = drift_kernels.n_depth_bins(float(np.ptp(y_um)), settings.binning_depth)
    bins = drift_kernels.fingerprint_bins(
        depth,
        amplitude,
        lowest_um=float(y_um.min()),
        bin_um=settings.binning_depth,
        n_bins=n_bins,
        threshold=lowest_peak(settings),
    )
    counts = np.zeros((len(pair.tiling), 2, n_bins, drift_kernels.N_AMPLITUDE_BINS), np.uint16)
    np.add.at(counts, (batch.astype(int), np.arange(len(batch)) % 2, *bins), 1)
    registered = drift_kernels.Registered.rigidly(counts)
    (ours,) = registered.in_segments([settings.nblocks], settings.drift_smoothing)
    ours, theirs = ours * settings.binning_depth, pair.theirs["drift_um"]
    difference = (ours - np.median(ours, axis=0)) - (theirs - np.median(theirs, axis=0))
    decided = Registration(settings, pair.tiling, pair.probe).of(counts)
    traces = [
        _relative_difference(
            pair.moved.whitened(tile)[0][:, tile.halo : tile.halo + tile.stop - tile.start],
            moved[:, settings.nt : settings.nt + tile.stop - tile.start],
        )
        for tile, moved in pair.batches("moved")
    ]
    return [
        Line("drift", "its shifts, µm", _range(theirs)),
        Line("drift", "our shifts from its detections, µm", _range(ours)),
        Line("drift", "difference after subtracting medians, µm", _range(difference), "→ no circular shifts"),
        Line("drift", "our shifts as decided, µm", _range(decided.shift_um), "→ 0 where the fingerprints cannot tell"),
        Line(
            "drift",
            "segment centres, ours − its, µm",
            _range(decided.centre_um - pair.theirs["drift_centre_um"]),
            "its one bin low",
        ),
        Line("drift", "traces moved by its shifts: rms difference / rms", max(traces), "as for traces above"),
    ]


def compare_clustering(pair: Pair) -> list[Line]:
    """First clustering of the very same detections; needs the traces of all its batches."""
    if len(pair.theirs["batches"]) < len(pair.tiling):
        return [Line("first clustering", "not compared", "–", "needs --batches of at least as many as there are")]
    traces = pair.batches("moved" if "moved" in pair.theirs else "whitened")
    centres = their_centres(pair)
    detect = _detection(pair, pair.moved, pair.their_waveforms(), centres)
    columns: dict[str, list[np.ndarray]] = {"sample": [], "centre": [], "features": []}
    for tile, whitened in traces:
        peaks = _detect_in_batch(pair, detect, tile, whitened)
        channels = detect.templates.channels[peaks.centre]
        features = detection_kernels.features(whitened, detect.templates.components, channels, peaks.sample)
        columns["sample"].append(peaks.sample.numpy() + tile.start - pair.settings.nt)
        columns["centre"].append(peaks.centre.numpy())
        columns["features"].append(features.numpy())
    sample, centre, features = (np.concatenate(column) for column in columns.values())
    batch = np.repeat(np.arange(len(traces)), [len(column) for column in columns["sample"]])
    label = pair.theirs["clusters"].astype(np.int64)
    if len(sample) != len(label):
        return [Line("first clustering", "not compared", f"{len(sample)} and {len(label)}", "detections differ")]
    order = np.lexsort((sample, centre, batch))  # the order it keeps them in
    sample, centre, features = sample[order], centre[order], features[order]
    spread = _feature_rows(pair, features, centres.channels[centre])
    means = np.stack([spread[label == one].mean(axis=0) for one in range(len(pair.theirs["templates"]))])
    away = np.linalg.norm(means - pair.theirs["templates"]) / np.linalg.norm(pair.theirs["templates"])
    regions, cluster = detect.regions, GraphClustering(pair.settings)
    region = regions.of_centre[centre]
    lines = [
        Line(
            "first clustering",
            "means of its clusters over our detections: difference / norm",
            float(away),
            "0: detections, order and features are the same",
        )
    ]
    ours = np.zeros(len(label), np.int64)
    for one in np.unique(region).tolist():
        rows = np.flatnonzero(region == one)
        rows = rows[np.lexsort((centre[rows], sample[rows]))]
        union = geometry.region_channels(centres.channels, regions.of_centre, len(regions))[one]
        spikes = scattered_rows(features[rows], centre[rows], centres.channels, union, pair.probe.n_channels, "cpu")
        conditions = when_recorded(pair).of(sample[rows], float(regions.position_um[one, 1]))
        components = torch.from_numpy(pair.their_waveforms().components)
        ours[rows] = ours.max() + 1 + cluster(spikes, conditions, components=components)
        sizes = " / ".join(
            ", ".join(str(n) for n in sorted(np.unique(labels[rows], return_counts=True)[1], reverse=True))
            for labels in (ours, label)
        )
        figure = f"region {one}, {len(rows)} spikes: clusters, ours / its"
        note = "→ below 1000 it makes one cluster" if len(rows) < 1000 else ""
        lines.append(Line("first clustering", figure, sizes, note))
    shift = pair.settings.nt // 2 - pair.settings.peak_sample
    for whose, labels in (("our", ours), ("its", label)):
        lines.append(_held_against_truth("first clustering", f"{whose} clusters", pair, sample - shift, labels))
    return lines


def when_recorded(pair: Pair) -> Circumstances:
    """Times and displacements of spikes, with its shifts."""
    return Circumstances(pair.tiling, pair.rate_hz, pair.moved.drift)


def _detect_in_batch(pair: Pair, detect: Detect, tile: Tile, traces: torch.Tensor) -> detection_kernels.TilePeaks:
    """Peaks of one of its batches, the traces of which have nt samples on either side of the core."""
    nt, to_centre = pair.settings.nt, pair.settings.nt // 2 - pair.settings.peak_sample
    return detection_kernels.detect(
        traces,
        detect.templates,
        threshold=lowest_peak(pair.settings),
        reach=pair.settings.peak_sample,
        first=nt + to_centre,
        last=nt + to_centre + tile.stop - tile.start,
    )


def compare_templates(pair: Pair) -> list[Line]:
    """Learned templates from detection with its whitening, shifts and waveforms."""
    shapes, theirs = pair.their_waveforms(), pair.their_templates
    components = torch.from_numpy(shapes.components)
    centres, cluster = our_centres(pair), GraphClustering(pair.settings)
    detect = _detection(pair, pair.moved, shapes, centres)
    min_spikes = min_unit_spikes(pair.tiling, pair.rate_hz)
    with run_here(pair.moved) as run:
        peaks = run.do(detect)
        when = when_recorded(pair)
        learn = LearnTemplates(
            pair.settings, peaks, shapes, pair.probe, centres, detect.regions, when, cluster, min_spikes
        )
        found = run.do(learn)
    ours, n_peaks = torch.from_numpy(found.features), int(peaks.of_region.sum())
    alike = template_kernels.similarity(torch.cat([ours, theirs]), components).value[: len(ours), len(ours) :].numpy()
    aligned = template_kernels.align(pair.their_means, components, torch.from_numpy(shapes.shapes))
    as_ours = template_kernels.merge_similar(aligned, pair.their_counts, components).features
    order = _relative_difference(as_ours, theirs) if as_ours.shape == theirs.shape else float("nan")
    largest = theirs.square().sum(dim=2).argmax(dim=1).numpy()
    its_largest = pair.theirs["template_channel"]
    numbered_alike = len(largest) == len(its_largest) and bool((largest == its_largest).all())
    means = f"{len(theirs)} and {len(its_largest)}"
    return [
        Line("templates", "its clusters, merged and aligned by us and by it: templates", means),
        Line("templates", "… largest on the same channels, in the same order", str(numbered_alike)),
        Line("templates", "… aligned before merging, as we do: difference / norm", order, "the reference merges first"),
        Line("templates", "detections, ours and its", f"{n_peaks} and {len(pair.theirs['clusters'])}"),
        Line("templates", "regions, ours", len(detect.regions)),
        Line("templates", "templates, ours and its", f"{len(ours)} and {len(theirs)}", "→ no floor of 1000 spikes"),
        Line("templates", "of its, similar (> 0.9) to one of ours", _share(alike.max(axis=0, initial=0) > 0.9)),
        Line("templates", "of ours, similar (> 0.9) to one of its", _share(alike.max(axis=1, initial=0) > 0.9)),
    ]


def compare_matching(pair: Pair) -> list[Line]:
    """Matching pursuit with its templates: on its traces, on ours, and against the truth."""
    their_sample, their_template, their_score = pair.theirs["spikes"].T
    their_sample, their_template = np.rint(their_sample).astype(np.int64), their_template.astype(np.int64)
    count, any_amplitude = np.ones(len(pair.their_templates)), np.full(len(pair.their_templates), np.inf, np.float32)
    learned = Templates(pair.their_templates.numpy(), count, any_amplitude)
    lines = []
    regions = geometry.clustering_regions(our_centres(pair), pair.settings)
    thresholds = Thresholds(np.full(len(learned.features), lowest_score(pair.settings)))
    match = Match(pair.settings, pair.moved, pair.their_waveforms(), learned, regions, thresholds)
    if "moved" in pair.theirs:
        lines += _match_their_traces(pair, match, their_sample, their_template)
    with run_here(pair.moved) as run:
        spikes = run.do(match)
        ours = {name: _column(spikes, name) for name in ("sample", "template", "score", "features")}
    i, j = _pair_up(ours["sample"], ours["template"] * 1e6, their_sample, their_template * 1e6)
    lines += [
        Line("matching", "spikes, ours and its", f"{len(ours['sample'])} and {len(their_sample)}"),
        Line("matching", "on ours: of ours found by it", _share_of(len(i), len(ours["sample"])), "same template"),
        Line("matching", "on ours: of its found by us", _share_of(len(j), len(their_sample)), "same template"),
        Line("matching", "on ours: at the same sample", _share(ours["sample"][i] == their_sample[j])),
        Line("matching", "on ours: score, ours / its", _range(ours["score"][i] / their_score[j])),
    ]
    same = ours["sample"][i] == their_sample[j]
    spread = _feature_rows(pair, ours["features"][i[same]], spikes.template_channels[ours["template"][i[same]]])
    reference = _feature_rows(
        pair, pair.theirs["features"][j[same]], their_feature_channels(pair)[their_template[j[same]]]
    )
    away = _distances(spread, reference)
    lines.append(Line("matching", "on ours: features, difference / norm", _range(away), "where at the same sample"))
    return [*lines, *_against_truth("matching", pair, sample=ours["sample"], theirs=their_sample)]


def _match_their_traces(pair: Pair, match: Match, sample: np.ndarray, template: np.ndarray) -> list[Line]:
    """Spikes in the middle of its own batches, which see nothing beyond nt samples."""
    nt, shift = pair.settings.nt, pair.settings.peak_sample - pair.settings.nt // 2
    n_pairs, n_ours, n_theirs, exact = 0, 0, 0, 0
    channels, away, scores = match.template_channels, [np.zeros(0)], [np.zeros(0)]
    for tile, traces in pair.batches("moved"):
        found = matching_kernels.match(
            traces, match.prepared, threshold=match.lowest, max_peels=pair.settings.max_peels
        )
        time = found.sample_index.numpy() - nt + tile.start + shift
        inner = (tile.start + 2 * nt, tile.stop - 2 * nt)
        mine = (time >= inner[0]) & (time < inner[1])
        its = (sample >= inner[0]) & (sample < inner[1])
        unit = found.unit.numpy()[mine]
        i, j = _pair_up(time[mine], unit * 1e6, sample[its], template[its] * 1e6)
        n_pairs, n_ours, n_theirs = n_pairs + len(i), n_ours + int(mine.sum()), n_theirs + int(its.sum())
        exact += int((time[mine][i] == sample[its][j]).sum())
        residual = matching_kernels.subtract(traces, found, match.prepared)
        features = matching_kernels.features(residual, found, match.prepared).numpy()[mine][i]
        own = _feature_rows(pair, features, channels[unit[i]])
        at = np.flatnonzero(its)[j]
        reference = _feature_rows(pair, pair.theirs["features"][at], their_feature_channels(pair)[template[at]])
        away.append(_distances(own, reference))
        scores.append(found.score.numpy()[mine][i] / pair.theirs["spikes"][at, 2])
    return [
        Line("matching", "on its traces: of ours found by it", _share_of(n_pairs, n_ours), "same template"),
        Line("matching", "on its traces: of its found by us", _share_of(n_pairs, n_theirs), "same template"),
        Line("matching", "on its traces: at the same sample", _share_of(exact, n_pairs)),
        Line("matching", "on its traces: score, ours / its", _range(np.concatenate(scores))),
        Line("matching", "on its traces: features, difference / norm", _range(np.concatenate(away))),
    ]


def _column(spikes: Spikes, name: str) -> np.ndarray:
    blocks = zip(spikes.receipts, spikes.dropped, strict=True)
    return np.concatenate([np.delete(read_column(receipt, name), dropped, axis=0) for receipt, dropped in blocks])


def their_feature_channels(pair: Pair) -> np.ndarray:
    """Channels of its features, per template: (v, j)."""
    return pair.theirs["feature_channels"][:, pair.theirs["template_channel"]].T.copy()


def _feature_rows(pair: Pair, features: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Features (n, j, q) on channels (n, j; −1 for none) as (n, c, q)."""
    spread = np.zeros((len(features), pair.probe.n_channels + 1, features.shape[2]))
    np.put_along_axis(spread, np.repeat(channels[:, :, None], features.shape[2], axis=2), features, axis=1)
    return spread[:, :-1]


def _distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Relative difference of each spike's features (n, c, q)."""
    return np.linalg.norm(ours - theirs, axis=(1, 2)) / np.linalg.norm(theirs, axis=(1, 2))


def compare_units(pair: Pair) -> list[Line]:
    """Final clustering and merging of its spikes with its features."""
    sample, template, amplitude = pair.theirs["spikes"].T
    sample, template = np.rint(sample).astype(np.int64), template.astype(np.int32)
    regions = geometry.clustering_regions(our_centres(pair), pair.settings)
    largest = pair.theirs["template_channel"]
    region_of = regions.region_at(pair.probe.positions_um[largest], pair.probe.shank[largest])
    columns = {
        "sample": sample,
        "template": template,
        "score": amplitude.astype(np.float32),
        "features": pair.theirs["features"].astype(np.float32),
    }
    settings, probe, shapes = pair.settings, pair.probe, pair.their_waveforms()
    with run_here(pair.tiles) as run:
        receipt = write_block(run.scratch / "spikes.rows", columns, region_of[template], len(regions))
        spikes = Spikes(
            receipts=[receipt],
            first=np.zeros(1, np.int64),
            dropped=[np.zeros(0, np.int64)],
            artifacts=np.zeros((0, 2), np.int64),
            template_channels=their_feature_channels(pair),
            region_of=region_of,
            threshold=np.full(len(region_of), lowest_score(settings)),
            sampling_rate_hz=pair.rate_hz,
        )
        found = run.do(ClusterSpikes(settings, spikes, shapes, probe, when_recorded(pair), GraphClustering(settings)))
        min_spikes = min_unit_spikes(pair.tiling, pair.rate_hz)
        ours = run.do(Merge(settings, found, spikes.template_channels, shapes, probe, pair.rate_hz, min_spikes))
        joined = run.do(Join(settings, ours, spikes, shapes, probe))
    our_sample, our_unit = joined["sample"], joined["unit"]
    before = sum(len(region.features) for region in found)
    final = pair.theirs["final_spikes"][:, 0]
    held = score(np.rint(final), pair.theirs["final_unit"], our_sample, our_unit, sampling_rate_hz=pair.rate_hz)
    lines = [
        Line("units", "clusters, ours before merging", before),
        Line("units", "units, ours and its", f"{len(ours.features)} and {len(held.truth_ids)}", "→ no floor of 1000"),
        Line("units", "of its, matched by one of ours", _share(held.is_matched), "agreement ≥ 0.5"),
        Line("units", "agreement of the matched", _range(held.accuracy[held.is_matched])),
    ]
    lines.append(_held_against_truth("units", "our units", pair, our_sample, our_unit))
    lines.append(_held_against_truth("units", "its units", pair, np.rint(final), pair.theirs["final_unit"]))
    return lines


# --- figures ------------------------------------------------------------------------------------------------


def _held_against_truth(stage: str, whose: str, pair: Pair, sample: np.ndarray, unit: np.ndarray) -> Line:
    held = score(
        pair.truth["spike_samples"], pair.truth["spike_units"], sample, unit, sampling_rate_hz=pair.rate_hz
    ).summary
    names = ("mean_accuracy", "n_well_detected", "n_false_positive", "n_redundant", "n_overmerged")
    figures = ", ".join(f"{held[name]:.3g}" for name in names)
    return Line(stage, f"{whose}: accuracy, well detected, false positive, redundant, over-merged", figures)


def _against_truth(stage: str, pair: Pair, *, sample: np.ndarray, theirs: np.ndarray) -> list[Line]:
    """Share of the true spikes with a spike, of whatever kind, within 0.4 ms."""
    tolerance = int(0.4e-3 * pair.rate_hz)
    truth = pair.truth["spike_samples"]
    shares = [_share(_distance(truth, np.sort(times)) <= tolerance) for times in (sample, theirs)]
    return [Line(stage, "true spikes found, by us and by it", " and ".join(shares), "all of the probe's units")]


def _distance(times: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each time to the nearest of `others`, sorted."""
    if not len(others):
        return np.full(len(times), np.inf)
    after = np.searchsorted(others, times).clip(0, len(others) - 1)
    before = (after - 1).clip(0)
    return np.minimum(np.abs(others[after] - times), np.abs(others[before] - times))


def _pair_up(
    sample: np.ndarray, depth: np.ndarray, other_sample: np.ndarray, other_depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pair events one to one, nearest first, within NEAR_SAMPLES in time and NEAR_UM in depth."""
    order = np.argsort(other_sample, kind="stable")
    times = other_sample[order]
    first = np.searchsorted(times, sample - NEAR_SAMPLES)
    count = np.searchsorted(times, sample + NEAR_SAMPLES, side="right") - first
    i = np.repeat(np.arange(len(sample)), count)
    j = order[np.repeat(first, count) + np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)]
    close = np.abs(depth[i] - other_depth[j]) <= NEAR_UM
    i, j = i[close], j[close]
    nearest_first = np.lexsort((np.abs(depth[i] - other_depth[j]), np.abs(sample[i] - other_sample[j])))
    taken, other_taken = np.zeros(len(sample), bool), np.zeros(len(other_sample), bool)
    pairs = []
    for a, b in zip(i[nearest_first], j[nearest_first], strict=True):
        if not (taken[a] or other_taken[b]):
            taken[a] = other_taken[b] = True
            pairs.append((a, b))
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _assigned(similarity: np.ndarray) -> np.ndarray:
    """Similarities of the best one-to-one pairing."""
    return similarity[linear_sum_assignment(-similarity)]


def _relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _orthonormality(rows: np.ndarray) -> float:
    return float(np.abs(rows @ rows.T - np.eye(len(rows))).max())


def _range(values: np.ndarray) -> str:
    """Least, median and largest."""
    if not np.size(values):
        return "none"
    return f"{np.min(values):.3g} … {np.median(values):.3g} … {np.max(values):.3g}"


def _share(mask: np.ndarray) -> str:
    return _share_of(int(np.sum(mask)), np.size(mask))


def _share_of(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} % of {whole}" if whole else "none"


def markdown(lines: Sequence[Line]) -> str:
    """The comparison as a table."""

    def text(value: float | str) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [("stage", "figure", "value", "note"), ("---",) * 4]
    rows += [(line.stage, line.figure, text(line.value), line.note) for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
