"""How long a sort will take: by hand from made-up sorts, and from real ones on small recordings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ks4stream
from ks4stream import Recording, Settings, calibration, plan, planning, rates, simulate, sort, sorter, timing
from ks4stream.deploy import needs_of
from ks4stream.engine import Loop
from ks4stream.engine.cluster import local_client
from ks4stream.engine.workers import processor
from ks4stream.errors import RecordingError
from ks4stream.io.run_store import RunStore
from ks4stream.pipeline import STAGES
from ks4stream.results import Diagnostics
from ks4stream.run import Run
from ks4stream.stages.detection import SMALL_PEAKS_WORK
from ks4stream.stages.matching import KNOWN_SHARE
from ks4stream.stages.needs import Load, Needs
from ks4stream.stages.preprocessing import tiling_of
from ks4stream.timing import Measured, expected, measured, speed_up

RATE_HZ = 30_000
BATCH = 15_000
NAMES = {stage.name for stage in STAGES}
SHORT = Settings(batch_size=BATCH)


def recording_of(n_channels: int = 8, *, n_batches: int = 100) -> Recording:
    """Nothing that anybody reads."""
    traces = np.broadcast_to(np.int16(0), (n_batches * BATCH, n_channels))
    return ks4stream.open_recording(traces, fs=RATE_HZ, probe=simulate.staggered_probe(n_channels))


def noise(n_batches: int) -> Recording:
    """Eight channels without spikes."""
    traces = np.random.default_rng(0).normal(0, 20, (n_batches * BATCH, 8)).astype(np.int16)
    return ks4stream.open_recording(traces, fs=RATE_HZ, probe=simulate.staggered_probe(8))


def load_of(recording: Recording | None = None, settings: Settings = SHORT, rate_hz: float = 10.0) -> Load:
    recording = recording or recording_of()
    return Load(recording, settings, tiling_of(recording, settings), "cpu", rate_hz)


def made_up(load: Load, seconds_per_work: float = 1e-6, **changes: Any) -> Measured:
    """A sort of a load in which every stage took as long per unit of work."""
    same = Measured("cpu", processor(), load.n_channels, 1, False, load.spikes_per_channel_hz, 1.5, 2.0, 0, 3.0, {})
    needs = [*needs_of(same.applied(load, keep_rate=False)), Needs(timing.RESULTS, work=1e6)]
    stages = {need.name: (need.work * seconds_per_work, need.work) for need in needs if need.work}
    return replace(same, **({"stages": stages} | changes))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for rates that is not there yet."""
    folder = tmp_path / "cache" / "of rates"
    monkeypatch.setenv("KS4STREAM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def small() -> Recording:
    """Twelve seconds of 16 channels."""
    simulated = simulate.simulate(simulate.staggered_probe(16), 12.0, seed=2, n_units=6)
    traces = simulated.traces.compute(scheduler="sync")
    return ks4stream.open_recording(traces, fs=RATE_HZ, probe=simulated.probe)


# -- work ----------------------------------------------------------------------------------------------------------


def test_work_of_stages_on_tiles_grows_with_tiles_and_channels():
    one = {need.name: need.work for need in needs_of(load_of())}
    longer = {need.name: need.work for need in needs_of(load_of(recording_of(n_batches=200)))}
    assert one["whitening"] == 25 * BATCH * 8, "at least 25 batches"
    assert longer["whitening"] == one["whitening"], "and no more for 200"
    assert longer["detection"] == 2 * one["detection"]
    assert longer["joining"] == 2 * one["joining"] == 2 * 10 * 8 * 100 * BATCH / RATE_HZ


def test_small_peaks_are_planned_for_the_batches_that_have_them():
    short, long = load_of(), load_of(recording_of(n_batches=800))  # of 50 and 400 s; 200 s have small peaks
    work = [next(need.work for need in needs_of(load) if need.name == "detection") for load in (short, long)]
    assert work[1] / work[0] == pytest.approx(8 * (1 + 0.5 * SMALL_PEAKS_WORK) / (1 + SMALL_PEAKS_WORK), rel=1e-12)
    assert (short.n_peaks / short.n_spikes, long.n_peaks / long.n_spikes) == (2.0, 1.5)
    with_number = load_of(recording_of(n_batches=800), Settings(batch_size=BATCH, Th_universal=9))
    assert with_number.n_peaks == with_number.n_spikes


def test_tiles_by_which_thresholds_were_set_are_matched_only_once():
    by_hand = BATCH * (8 + 16)  # channels and templates
    works = {need.name: need.work for need in needs_of(load_of())}
    fixed = {need.name: need.work for need in needs_of(load_of(settings=Settings(batch_size=BATCH, Th_learned=8)))}
    assert works["thresholds"] == 60 * by_hand and works["matching"] == (40 + 60 * KNOWN_SHARE) * by_hand
    assert fixed["matching"] == 100 * by_hand and fixed["thresholds"] == 0


def test_clustering_takes_longer_per_spike_in_larger_regions():
    def per_spike(rate_hz: float) -> float:
        load = load_of(rate_hz=rate_hz)
        return next(need.work for need in needs_of(load) if need.name == "final clustering") / load.n_spikes

    assert per_spike(1) > per_spike(100), "each region takes time of its own"
    assert per_spike(1e5) > per_spike(1e3), "there are more landmarks"


# -- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "need, n_workers, times",
    [
        (Needs("of the calling process"), 4, 1.0),
        (Needs("tiles", n_tasks=5, n_tiles_read=5), 1, 1.0),
        (Needs("tiles", n_tasks=5, n_tiles_read=5), 2, 5 / 3),  # three rounds
        (Needs("tiles", n_tasks=5, n_tiles_read=5), 4, 5 / 2),
        (Needs("tiles", n_tasks=800, n_tiles_read=800), 8, 4 + 4 * timing.THREAD_OF_CORE),  # on four cores
        (Needs("regions", n_tasks=16), 4, 4.0),
        (Needs("regions", n_tasks=5), 4, 2.0),  # one of them is 2.5 times as large as the mean
        (Needs("regions", n_tasks=2), 4, 1.0),
    ],
)
def test_so_many_times_as_fast_as_one_worker(
    need: Needs, n_workers: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert speed_up(need, n_workers, 1, on_gpu=False) == pytest.approx(times)


def test_workers_that_share_a_gpu_wait_for_it():
    tiles = Needs("tiles", n_tasks=800, n_tiles_read=800)
    assert speed_up(tiles, 4, 4, on_gpu=True) == timing.PER_GPU
    assert speed_up(tiles, 8, 4, on_gpu=True) == 2 * timing.PER_GPU
    assert speed_up(tiles, 2, 1, on_gpu=True) == 2


# -- what is expected ----------------------------------------------------------------------------------------------


def expect(load: Load, *sorts: Measured, **changes: Any) -> timing.Timing:
    given: dict[str, Any] = {"n_workers": 1, "workers_per_gpu": 1, "results": False}
    found = expected(load, sorts, **(given | changes))
    assert found is not None
    return found


def test_the_same_recording_again_takes_as_long():
    load = load_of()
    once = made_up(load)
    found = expect(load, once, excerpt="an excerpt")
    assert found.seconds == pytest.approx(
        {"start": 3.0} | {name: seconds for name, (seconds, _) in once.stages.items() if name != "results"}
    )
    factor = math.exp(
        timing.WITHIN * math.hypot(timing.SPREAD, timing.UNSURE_OF_EXCERPT * math.log(_detected_again(found)))
    )
    assert found.low_s == pytest.approx(found.total_s / factor)
    assert found.high_s == pytest.approx(found.total_s * factor)


def _detected_again(found: timing.Timing) -> float:
    """By what factor a sort takes longer if tissue moved."""
    return 1 + (found.seconds["waveforms"] + found.seconds["detection"]) / found.total_s


def test_peaks_are_detected_twice_where_tissue_moved():
    load = load_of()
    still, moving, unknown = (
        expect(load, made_up(load, moved=moved), excerpt="an excerpt").seconds for moved in (0, 1, None)
    )
    assert moving["detection"] == 2 * still["detection"] and unknown["detection"] == 1.5 * still["detection"]
    assert moving["matching"] == still["matching"]
    one_pass = expect(load, made_up(load, moved=None), excerpt="an excerpt").per_pass_s
    assert one_pass["detection"] == pytest.approx(still["detection"]) and one_pass["matching"] == still["matching"]
    others = [made_up(load, moved=moved) for moved in (1, 1, 0)]
    assert expect(load, *others).seconds["detection"] == pytest.approx(1.6 * still["detection"])  # (2 + 1) / (3 + 2)
    without = load_of(settings=Settings(batch_size=BATCH, nblocks=0))
    assert expect(without, made_up(load, moved=1)).seconds["detection"] == still["detection"]


def test_of_several_sorts_the_longer_ones_count_more():
    load = load_of()
    short, long = (replace(made_up(load), stages={"joining": stage}) for stage in ((10.0, 10.0), (90.0, 30.0)))
    found = expect(load, short, long)
    assert found.seconds["joining"] == pytest.approx(load.n_spikes * 100 / 40)
    # Both differ from that: by 1 and by 3 in place of 2.5 per unit of work.
    squares = (10 * math.log(1 / 2.5) ** 2 + 90 * math.log(3 / 2.5) ** 2) / 100
    spread = math.hypot(
        timing.SPREAD, timing.SPREAD_OF_LONGER * math.log((found.total_s - 3) / 90), math.sqrt(squares * 2)
    )
    assert found.high_s / found.total_s == pytest.approx(math.exp(timing.WITHIN * spread))
    assert "detection" in found.missing and "detection" in next(found.rows())[1]


def test_spikes_are_as_many_as_before_unless_it_is_said_how_many():
    load, busier = load_of(rate_hz=10), load_of(rate_hz=30)
    once = made_up(busier)
    assert expect(load, once).seconds["joining"] == 3 * expect(load, once, keep_rate=True).seconds["joining"]


def test_nothing_is_expected_from_nothing():
    assert expected(load_of(), [], n_workers=1, workers_per_gpu=1, results=True) is None
    odd = made_up(load_of(), stages={"of another method": (1.0, 1.0)}, start_s=0.0)
    assert expected(load_of(), [odd, odd], n_workers=1, workers_per_gpu=1, results=True) is None
    assert expect(load_of(), made_up(load_of()), results=True).seconds["results"] > 0


def test_the_sorts_that_count_are_those_of_about_as_many_channels_on_such_a_device():
    load = load_of()
    sorts = [
        made_up(load, n_channels=n_channels, device=device, is_remote=is_remote)
        for n_channels, device, is_remote in (
            (384, "cpu", False),
            (8, "NVIDIA X", False),
            (8, "cpu", True),
            (32, "cpu", False),
            (30, "cpu", False),
        )
    ]
    assert [one.n_channels for one in timing.alike(sorts, recording_of(), 8, "cpu")] == [32, 30], (
        "32 is about as near as 30"
    )
    assert timing.alike(sorts[1:2], recording_of(), 8, "cpu") == []
    assert len(timing.alike(sorts[:1] * 9, recording_of(), 8, "cpu")) == timing.N_SORTS
    trials = [made_up(load, seconds_per_work=1e-8)] * 9
    assert timing.alike([sorts[-1], *trials], recording_of(30), 30, "cpu") == [sorts[-1]]
    assert timing.alike([made_up(load), *trials], recording_of(), 8, "cpu") == [made_up(load)]
    elsewhere = made_up(load, processor="another model")  # several machines share a home folder
    assert timing.alike([elsewhere, made_up(load)], recording_of(), 8, "cpu") == [made_up(load)]


def test_what_was_recalled_does_not_count(tmp_path: Path, make_sorting: Any) -> None:
    """Half of detection was there already, and all of matching."""
    load = load_of()
    n_blocks = load.n_blocks()
    run = Run(Loop(), RunStore(tmp_path), RATE_HZ)
    run.seconds = {"detection": 5.0, "matching": 0.1, "final clustering": 2.0, "merging": 1.0, "drift": 1.0}
    run.recalled = {"detection": (n_blocks, 2 * n_blocks), "matching": (n_blocks, n_blocks)}
    run.recalled["final clustering"] = (1, 4)
    run.n_tiles = {"detection": 100, "matching": 0}
    counts = {"matched spikes": 4000, "peaks": 6000, "templates": 24}
    sorting = make_sorting(diagnostics=Diagnostics(counts=counts))
    found = measured(load, run, sorting, found_s=12.0, results_s=None)
    assert found is not None
    assert (found.spikes_per_channel_hz, found.peaks_per_spike, found.templates_per_channel) == (10.0, 1.5, 3.0)
    assert found.moved == 1 and found.start_s == pytest.approx(2.9)
    works = {need.name: need.work for need in needs_of(found.applied(load, keep_rate=False))}
    assert found.stages["detection"] == (5.0, works["detection"]), "as many tiles as one pass has"
    assert found.stages["final clustering"] == (2.0, 0.75 * works["final clustering"])
    assert found.stages["merging"] == (1.0, works["merging"])
    assert set(found.stages) == {"detection", "final clustering", "merging", "drift"}
    run.recalled = {"detection": (n_blocks, n_blocks)}
    assert measured(load, run, sorting, found_s=12.0, results_s=None) is None


# -- the file ------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again(cache: Path) -> None:
    assert rates.known() == []
    sorts = [made_up(load_of(), n_workers=number + 1, moved=None) for number in range(rates.MAX_SORTS + 2)]
    for one in sorts:
        rates.keep(one)
    assert rates.known() == sorts[2:]


def _edited(text: str, **changes: Any) -> str:
    stored = json.loads(text)
    return json.dumps(stored | {"sorts": [stored["sorts"][0] | changes]})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace(f'"version": {rates.VERSION}', '"version": 1'),
        lambda text: text.replace('"method": ', '"method": 9'),
        lambda text: _edited(text, stages=[]),
        lambda text: _edited(text, stages={"joining": [1.0]}),
        lambda text: _edited(text, stages={"joining": [1.0, 0.0]}),
        lambda text: _edited(text, stages={"joining": [math.nan, 1.0]}),
        lambda text: _edited(text, n_channels="8"),
        lambda text: _edited(text, n_channels=-8),
        lambda text: _edited(text, n_channels=10**400),
        lambda text: _edited(text, start_s=10**400),
        lambda text: _edited(text, stages={"joining": [10**400, 1]}),
        lambda text: _edited(text, stages={"joining": [1e300, 1e-300]}),
        lambda text: _edited(text, start_s=None),
        lambda text: _edited(text, moved=7),
        lambda text: " " * rates.MAX_BYTES + text,
    ],
)
def test_a_damaged_file_is_as_good_as_none(damage: Any, cache: Path) -> None:
    one = made_up(load_of())
    rates.keep(one)
    path = cache / "rates.json"
    path.write_text(damage(path.read_text()))
    assert rates.known() == []
    assert "not known" in str(plan(recording_of(), SHORT, n_workers=1))
    rates.keep(one)
    assert rates.known() == [one]


def test_nothing_fails_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("KS4STREAM_CACHE", str(in_the_way))
    rates.keep(made_up(load_of()))
    assert rates.known() == [] and in_the_way.read_text() == ""
    monkeypatch.setenv("KS4STREAM_CACHE", "off")
    rates.keep(made_up(load_of()))
    assert rates.known() == [] and rates.file() is None


@pytest.mark.parametrize(
    "platform, variables, folder",
    [
        ("linux", {}, "home/.cache"),
        ("linux", {"XDG_CACHE_HOME": "elsewhere"}, "elsewhere"),
        ("darwin", {}, "home/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "local"}, "local"),
    ],
)
def test_the_file_is_in_the_users_cache(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KS4STREAM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rates.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert rates.file() == Path(folder) / "ks4stream" / "rates.json"


# -- real sorts ----------------------------------------------------------------------------------------------------


class Watching:
    """A display that is told what is expected."""

    def __init__(self) -> None:
        self.expected_s: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def note(self, **facts: Any) -> None:
        self.expected_s |= facts.get("expected_s", {})


def test_the_workers_of_a_client_are_not_expected_to_be_as_fast_as_this_machine(
    cache: Path, monkeypatch: pytest.MonkeyPatch, make_sorting: Any
) -> None:
    recording = noise(4)
    rates.keep(made_up(load_of(recording)))
    monkeypatch.setattr(sorter, "find_units", lambda *_: make_sorting())
    here, elsewhere = Watching(), Watching()
    sort(recording, SHORT, client="loop", device="cpu", progress=here)
    assert here.expected_s["detection"] > 0
    with local_client(n_workers=1, processes=False) as client:
        sort(recording, SHORT, client=client, device="cpu", progress=elsewhere)
    assert elsewhere.expected_s == {}


def test_writing_counts_only_if_what_is_usual_was_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch, make_sorting: Any, tmp_path: Path
) -> None:
    results_s = []

    def measured(*_: Any, **of_sort: Any) -> None:
        results_s.append(of_sort["results_s"])

    monkeypatch.setattr(sorter, "measured", measured)
    monkeypatch.setattr(sorter, "find_units", lambda *_: make_sorting())
    monkeypatch.setattr("ks4stream.report.plots.write_plots", lambda *_: [])
    for folder, options in (("a", {}), ("a", {}), ("b", {"save_plots": True}), ("c", {"save_extra_vars": True})):
        sort(noise(4), SHORT, client="loop", device="cpu", results_dir=tmp_path / folder, **options)
    written, *others = results_s
    assert written > 0 and others == [None, None, None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")
def test_a_plan_tells_time_once_a_sort_has_ended(cache: Path, small: Recording, tmp_path: Path) -> None:
    assert plan(small, SHORT, n_workers=1).time is None
    sorting = sort(small, SHORT, client="loop", results_dir=tmp_path / "results")
    (one,) = rates.known()
    assert one.spikes_per_channel_hz * 16 * 12 == pytest.approx(sorting.diagnostics.counts["matched spikes"], rel=0.01)
    found = plan(small, SHORT, n_workers=1, results_dir=tmp_path)
    assert found.time is not None and set(found.time.seconds) == NAMES | {"start", "results"}
    assert all(seconds > 0 for seconds in found.time.seconds.values()) and not found.time.missing
    # It is the recording from which the rates are, so that they give its own times back.
    for name in ("whitening", "first clustering", "thresholds", "matching", "final clustering"):
        assert found.time.seconds[name] == pytest.approx(sorting.seconds[name], rel=0.05), name
    per_pass_s, passes = sorting.seconds["detection"] / (1 + one.moved), 1 + (one.moved + 1) / 3
    assert found.time.seconds["detection"] == pytest.approx(per_pass_s * passes, rel=0.05)
    assert found.time.low_s < found.time.total_s < found.time.high_s
    assert "by the last sort of 16 channels" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["time"]["seconds"] == found.time.seconds
    text = (cache / "rates.json").read_text()
    assert small.name not in text and str(tmp_path) not in text
    seen = Watching()
    sort(small, SHORT, client="loop", results_dir=tmp_path / "results", progress=seen)  # everything is recalled
    assert seen.expected_s["detection"] > 0, "whoever watches the next sort is told"
    assert rates.known() == [one]


@pytest.mark.slow
def test_an_excerpt_times_every_stage_and_counts_spikes(
    cache: Path, small: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAX_BATCHES", 6)
    found = plan(small, SHORT, n_workers=2, results_dir=".", calibrate=True)
    assert found.time is not None and not found.time.missing
    assert set(found.time.seconds) == NAMES | {"start", "results"}
    assert all(seconds > 0 for seconds in found.time.seconds.values())
    assert "by an excerpt of 6 batches, sorted in" in str(found)
    assert found.n_batches == 24, "the plan itself is of the whole recording"
    assert found.is_counted and 1 < found.spikes_per_channel_hz < 30 and "counted" in dict(found.rows())
    assert rates.known() == [], "an excerpt is no sort"
    told = plan(small, SHORT, n_workers=2, spikes_per_channel_hz=7, calibrate=True)
    assert told.spikes_per_channel_hz == 7 and not told.is_counted and "results" not in told.time.seconds


def test_an_excerpt_without_spikes_is_refused():
    with pytest.raises(RecordingError, match="No spikes were found in 6 batches"):
        plan(noise(6), SHORT, calibrate=True)


def test_rates_of_this_machine_say_nothing_of_the_workers_of_a_client(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_of()
    rates.keep(made_up(load))
    assert planning._alike(load, is_here=True) and not planning._alike(load, is_here=False)
