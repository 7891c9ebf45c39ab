"""Preprocessing a tile: any file type, any crop, any dead channels."""

from __future__ import annotations

import importlib
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.errors import BadChannelWarning
from ks4stream.io import kept_traces
from ks4stream.io.recordings import open_recording
from ks4stream.probe import Probe
from ks4stream.recording import BaseSource
from ks4stream.results import Drift, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare
from ks4stream.stages.preprocessing import Preprocessor, read_tile, tiling_of

RATE = 30_000.0
PROBE = simulate.linear_probe(8, pitch_um=20)
SETTINGS = Settings(batch_size=6000)


@pytest.fixture
def situations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("situations")


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return simulate.simulate(PROBE, 1.0, seed=1, n_units=3).read(0, 20_000)


def source_of(samples: np.ndarray, settings: Settings = SETTINGS, probe: Probe = PROBE, **options: Any) -> Preprocessor:
    return prepare(open_recording(samples, fs=RATE, probe=probe), settings, **options)


def referenced(source: Preprocessor) -> torch.Tensor:
    """All cores, side by side: (c, t)."""
    return torch.cat([source.referenced(tile)[0][:, source.core(tile)] for tile in source.tiling], dim=1)


@pytest.mark.slow
def test_types_of_the_file_say_the_same(samples: np.ndarray) -> None:
    expected = referenced(source_of(samples))
    assert expected.std() > 1
    for other in (
        samples.astype(np.float32),
        samples.astype(np.int32),
        (samples.astype(np.int32) + 2**15).astype(np.uint16),
        np.asfortranarray(samples),
    ):
        assert torch.equal(referenced(source_of(other)), expected)


class Noted(BaseSource):
    """A source that records which thread reads what, and fails from a given sample on."""

    is_remote = False

    def __init__(self, samples: np.ndarray, broken_from: int) -> None:
        self.samples, self.broken_from = samples, broken_from
        self.reads: list[tuple[int, bool]] = []
        self.n_samples, self.n_channels = samples.shape
        self.dtype, self.digest_is_exact = samples.dtype, True

    def read(self, start: int, stop: int) -> np.ndarray:
        self.reads.append((start, threading.current_thread() is threading.main_thread()))
        if stop > self.broken_from:
            raise OSError("the disk is gone")
        return self.samples[start:stop]

    def digest(self) -> str:
        return "noted"


def test_the_next_tile_is_read_while_one_is_worked_on(samples: np.ndarray, tmp_path: Path) -> None:
    source = source_of(samples)
    noted = Noted(samples, len(samples) + 1)
    ahead = replace(source, recording=replace(source.recording, source=noted))
    tiles = list(source.tiling)
    for tile in ahead.read_ahead(tiles, tmp_path):
        assert torch.equal(ahead.referenced(tile)[0], source.referenced(tile)[0])
        assert len(noted.reads) <= tile.index + 2  # never more than one ahead
    assert len(noted.reads) == len(tiles) == 4
    assert [mine for _, mine in sorted(noted.reads)] == [True, False, False, False]
    assert not ahead._at_hand.ahead


def test_what_goes_wrong_while_reading_ahead_names_the_batch(samples: np.ndarray, tmp_path: Path) -> None:
    source = source_of(samples)
    tiles = list(source.tiling)
    noted = Noted(samples, broken_from=tiles[2].start)
    ahead = replace(source, recording=replace(source.recording, source=noted))
    done = []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        for tile in ahead.read_ahead(tiles, tmp_path):
            ahead.referenced(tile)
            done.append(tile.index)
    assert caught.value.__notes__[0].startswith(f"Raised while reading batch {len(done)}, samples ")
    assert not ahead._at_hand.ahead


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Folder of a stage, beside which traces are kept."""
    (tmp_path / "run" / "scratch").mkdir(parents=True)
    kept_traces.make_folder(tmp_path / "run", 1)
    return tmp_path / "run" / "detection-0"


def whitening_of(source: Preprocessor, noise: float) -> Whitening:
    n_channels = source.probe.n_channels
    known = np.full(n_channels, noise, np.float32)
    return Whitening(np.eye(n_channels, dtype=np.float32), source.dead, noise=known)


def test_traces_that_are_kept_are_neither_read_nor_computed_again(samples: np.ndarray, kept: Path) -> None:
    source = source_of(samples, blank=[[9000, 9100]])
    tiles = list(source.tiling)
    source = source.with_whitening(whitening_of(source, 15.0))
    expected = [source.whitened(tile) for tile in tiles]
    assert expected[1][1].any()
    for block in (tiles[1:3], tiles):  # the first task keeps two tiles, the second one uses them and keeps the others
        noted = Noted(samples, len(samples) + 1)
        there = {int(path.stem) for path in kept_traces.folder_for(kept).iterdir()}
        some = replace(source, recording=replace(source.recording, source=noted))
        for tile in some.read_ahead(block, kept):
            for found, wanted in zip(some.whitened(tile), expected[tile.index], strict=True):
                assert torch.equal(found, wanted)
        assert len(noted.reads) == len({tile.index for tile in block} - there)
    assert len(there) == 2
    noted = Noted(samples, 0)  # reads nothing
    moved = np.full((len(tiles), 1), 15.0, np.float32)
    drift = Drift(moved, np.zeros(1, np.float32))
    expected = [source.with_drift(drift, SETTINGS).whitened(tile)[0] for tile in tiles]
    some = replace(source, recording=replace(source.recording, source=noted)).with_drift(drift, SETTINGS)
    for tile in some.read_ahead(tiles, kept):  # what is kept is not whitened or moved yet
        assert torch.equal(some.whitened(tile)[0], expected[tile.index])


def test_traces_are_not_kept_before_the_noise_is_known_or_where_they_are_not_wanted(
    samples: np.ndarray, kept: Path, tmp_path: Path
) -> None:
    source = source_of(samples)
    for tile in source.read_ahead(list(source.tiling), kept):
        source.referenced(tile)
    source = source.with_whitening(whitening_of(source, 15.0))
    (tmp_path / "other").mkdir()
    for tile in source.read_ahead(list(source.tiling), tmp_path / "other"):
        source.referenced(tile)
    for tile in source.tiling:  # by itself, not in a task
        source.referenced(tile)
    assert not list(kept_traces.folder_for(kept).iterdir()) and not list((tmp_path / "other").iterdir())


@pytest.mark.slow
def test_scale_shift_and_sign(samples: np.ndarray) -> None:
    expected = referenced(source_of(samples))
    assert torch.equal(referenced(source_of(-samples, SETTINGS.replace(invert_sign=True))), expected)
    assert torch.equal(referenced(source_of(samples, SETTINGS.replace(scale=4))), expected * 4)  # a power of two
    shifted = referenced(source_of(samples, SETTINGS.replace(shift=500)))
    torch.testing.assert_close(shifted, expected, rtol=0, atol=0.01)  # bits; the filter takes the shift away


def test_the_channel_map_picks_and_orders(samples: np.ndarray) -> None:
    order = np.array([6, 2, 0, 3, 7, 5, 4, 1])
    wide = np.zeros((len(samples), 12), np.int16)
    wide[:, order + 3] = samples
    probe = Probe.from_positions(PROBE.positions_um, chan_map=order + 3)
    assert torch.equal(referenced(source_of(wide, probe=probe)), referenced(source_of(samples)))


@pytest.mark.slow
def test_tiles_agree_where_they_overlap(samples: np.ndarray) -> None:
    """Beyond the reach of the filter, division into batches has no effect."""
    source = source_of(samples)
    whole = referenced(source)
    for size in (3000, 7000, 20_000):
        other = referenced(source_of(samples, SETTINGS.replace(batch_size=size)))
        # bits; float32 rounding of FFTs of different length on traces of some hundred bits
        torch.testing.assert_close(other, whole[:, : other.shape[1]], rtol=0, atol=2e-3)


def test_a_crop_sees_nothing_beyond_its_ends(samples: np.ndarray) -> None:
    source = source_of(samples, SETTINGS.replace(tmin=0.1, tmax=0.5))
    alone = source_of(samples[3000:15_000])
    assert [tile.start for tile in source.tiling] == [3000, 9000]
    assert torch.equal(referenced(source), referenced(alone))
    tile = source.tiling[0]
    seen = read_tile(source.recording, source.tiling, tile)
    assert len(seen) == tile.length
    np.testing.assert_array_equal(seen[: tile.halo], np.broadcast_to(samples[3000], (tile.halo, 8)))


def test_times_that_are_not_binary_fractions() -> None:
    recording = open_recording(np.zeros((90_000, 8), np.int16), fs=RATE, probe=PROBE)
    tiling = tiling_of(recording, SETTINGS.replace(tmin=2.3, tmax=2.9))  # 2.3 · 30000 = 68999.99999999999
    assert (tiling.start, tiling.stop) == (69_000, 87_000)


def test_a_dead_channel_enters_nothing(samples: np.ndarray) -> None:
    broken = samples.copy()
    broken[:, 3] = 77
    with pytest.warns(BadChannelWarning, match=r"\[3\]"):
        source = source_of(broken)
    others = Probe.from_positions(np.delete(PROBE.positions_um, 3, axis=0))
    without = referenced(source_of(np.delete(samples, 3, axis=1), probe=others))
    traces = referenced(source)
    assert torch.equal(traces[[0, 1, 2, 4, 5, 6, 7]], without)


@pytest.mark.parametrize("shift", [-13.0, 6.5])
def test_a_dead_channel_stays_silent_when_traces_are_moved(samples: np.ndarray, shift: float) -> None:
    broken = samples.copy()
    broken[:, 3] = 77
    alive = [0, 1, 2, 4, 5, 6, 7]
    with pytest.warns(BadChannelWarning):
        source = source_of(broken)
    whitening = np.diag([0.1, 0.1, 0.1, 0, 0.1, 0.1, 0.1, 0.1])
    drift = Drift(np.full((len(source.tiling), 1), shift), [70.0])
    source = source.with_whitening(Whitening(whitening, [3])).with_drift(drift, SETTINGS)
    others = Probe.from_positions(PROBE.positions_um[alive])
    without = source_of(broken[:, alive], probe=others)
    without = without.with_whitening(Whitening(np.eye(7) * 0.1, [])).with_drift(drift, SETTINGS)
    traces, _ = source.whitened(source.tiling[1])
    expected, _ = without.whitened(without.tiling[1])
    assert not traces[3].any()
    torch.testing.assert_close(traces[alive], expected, rtol=1e-4, atol=1e-4)  # float32, other matrix shapes


def test_artifacts_are_blanked_on_all_channels_and_filled_before_filtering(samples: np.ndarray) -> None:
    spoilt = samples.copy()
    spoilt[8000:8002, 2] += 5000
    source = source_of(spoilt, SETTINGS.replace(artifact_threshold=2000))
    tile = source.tiling[1]
    traces, blank = source.referenced(tile)
    where = blank.nonzero()[:, 0] + tile.first
    assert where.tolist() == list(range(8000 - 8, 8001 + 8 + 1))  # 0.25 ms on either side
    assert not traces[:, blank].any()
    clean, none = source_of(samples).referenced(tile)
    assert not none.any()
    changed = (traces - clean)[:, ~blank].abs().amax(dim=0)
    apart = (torch.arange(tile.length) + tile.first - 8000)[~blank].abs()
    # A straight line in place of 18 samples of noise, and not 191 bits as without it; then the filter forgets.
    assert changed.max() < clean.std()
    assert changed[apart > 460].max() < 1e-3


@pytest.mark.parametrize(("margin_ms", "n_samples"), [(0.0, 2), (1.0, 62)])
def test_the_margin_of_artifacts(samples: np.ndarray, margin_ms: float, n_samples: int) -> None:
    spoilt = samples.copy()
    spoilt[8000:8002, 2] += 5000
    source = source_of(spoilt, SETTINGS.replace(artifact_threshold=2000, artifact_margin=margin_ms))
    assert int(source.referenced(source.tiling[1])[1].sum()) == n_samples


class Shown(Noted):
    """Returns views of its samples, as a source may."""

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.samples[start:stop]


def test_filling_leaves_a_recording_in_memory_as_it_is() -> None:
    """Of one channel in float32, traces would be a view of it."""
    samples = np.random.default_rng(0).normal(0, 30, (18_000, 1)).astype(np.float32)
    samples[9_000:9_010] += 5000
    before = samples.copy()
    one = simulate.linear_probe(1)
    settings = SETTINGS.replace(artifact_threshold=1000, nearest_chans=1, whitening_range=1, scale=2.0, shift=3.0)
    source = source_of(samples, settings, one)
    source = replace(source, recording=replace(source.recording, source=Shown(samples, 0)))
    assert source.referenced(source.tiling[1])[1].any()
    assert np.array_equal(samples, before)


def test_between_pulses_traces_are_as_without_pulses(situations: ModuleType) -> None:
    """4 mV at 130 Hz, with a tail of which a part is left."""
    recording = situations.clean(1, 1.0)
    stimulated = situations._stimulated(recording, 1, np.arange(0.3, 0.7, 1 / 130))
    assert np.abs(stimulated.read(0, 30_000).astype(int) - recording.read(0, 30_000)).max() * 0.195 > 3_900  # µV
    source, clean = (source_of(of.read(0, 30_000), probe=recording.probe) for of in (stimulated, recording))
    tile = source.tiling[2]
    (traces, blank), (expected, none) = source.referenced(tile), clean.referenced(tile)
    assert not none.any()
    left = ~source.without_spikes(blank, SETTINGS.nt)
    assert left.float().mean() > 0.7
    spread = source._filtered(source.raw(tile))[0]  # the filter's ringing, if nothing is filled
    errors = [float((of - expected)[:, left].std() / expected.std()) for of in (traces, spread)]
    assert errors[0] < 0.35 and errors[1] > 1.5


def test_blanks_do_not_depend_on_the_division_into_batches(situations: ModuleType) -> None:
    """Once the usual noise is known."""
    recording = situations.stim40(1, 1.0)
    samples, noise = recording.read(0, 30_000), np.full(32, 50, np.float32)
    masks = []
    for size in (5_000, 6_000, 30_000):
        source = source_of(samples, SETTINGS.replace(batch_size=size), recording.probe)
        source = source.with_whitening(Whitening(np.eye(32), [], noise=noise))
        masks.append(torch.cat([source.referenced(tile)[1][source.core(tile)] for tile in source.tiling]))
    assert masks[0].any()
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_dead_time_is_blanked_and_what_is_beside_it_is_as_if_the_crop_ended_there(samples: np.ndarray) -> None:
    """Zeros would be a step of the offset, which the filter would spread."""
    dead = samples + np.int16(500)
    dead[:9_000] = 0
    source, cropped = source_of(dead), source_of(dead, SETTINGS.replace(tmin=0.3))
    tile = source.tiling[1]
    traces, blank = source.referenced(tile)
    assert (blank.nonzero()[:, 0] + tile.first).tolist() == list(range(tile.first, 9_000))
    # float32 rounding of FFTs in which the samples are at other places
    at = slice(tile.halo + 3_000, tile.halo + 6_000)
    torch.testing.assert_close(traces[:, at], referenced(cropped)[:, :3_000], rtol=0, atol=0.01)


@pytest.mark.parametrize("changes", [{}, {"line_frequency": 50.0}, {"do_CAR": False}])
def test_a_tile_that_is_dead_throughout_is_not_filtered(
    samples: np.ndarray, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = samples.copy()
    dead[3_000:] = 500 + np.arange(8)
    source = source_of(dead, SETTINGS.replace(**changes))
    monkeypatch.delattr(Preprocessor, "_filtered")
    traces, blank, noise = source.measured(source.tiling[1])
    assert traces.shape == (8, source.tiling[1].length) and not traces.any() and traces.dtype == torch.float32
    assert blank.all() and noise.tolist() == [0] * 8
    usual = np.arange(8, dtype=np.float32)
    known = source.with_whitening(Whitening(np.eye(8), [], noise=usual))
    assert known.measured(source.tiling[2])[2].tolist() == usual.tolist()
    with pytest.raises(AttributeError):
        source.measured(source.tiling[0])


@pytest.mark.parametrize(("n_samples", "found"), [(59, False), (60, True)])
def test_dead_time_takes_two_milliseconds_and_all_channels(samples: np.ndarray, n_samples: int, found: bool) -> None:
    held = samples.copy()
    held[8_000 : 8_000 + n_samples] = samples[8_000]
    source = source_of(held)
    assert int(source.referenced(source.tiling[1])[1].sum()) == n_samples * found
    held[8_000 : 8_000 + n_samples, 3] = samples[8_000 : 8_000 + n_samples, 3]
    source = source_of(held)
    assert not source.referenced(source.tiling[1])[1].any()


def test_padding_beyond_the_crop_is_not_dead_time(samples: np.ndarray) -> None:
    source = source_of(samples[:9_000])
    for tile in source.tiling:
        assert not source.referenced(tile)[1].any()


def test_no_spikes_are_looked_for_a_quarter_of_a_waveform_beside_a_blank(samples: np.ndarray) -> None:
    source = source_of(samples)
    tile = source.tiling[1]
    blank = torch.zeros(tile.length, dtype=torch.bool)
    blank[1000:1003] = True
    at = torch.tensor([984, 985, 1001, 1017, 1018])
    assert source.away_from_edges(tile, at, blank, 61).tolist() == [True, False, False, False, True]
    assert source.without_spikes(blank, 61).nonzero()[:, 0].tolist() == list(range(985, 1018))
    first = source.tiling[0]
    at = torch.tensor([60, 61]) + first.halo
    assert source.away_from_edges(first, at, blank[:0], 61).tolist() == [False, True]


def test_a_short_last_batch_is_not_taken_for_an_artifact() -> None:
    """Beyond the end of the recording a tile contains padding, which must not affect the noise estimate."""
    probe = simulate.staggered_probe(32)
    source = source_of(np.random.default_rng(0).normal(0, 30, (6300, 32)).astype(np.int16), probe=probe)
    assert [tile.stop - tile.start for tile in source.tiling] == [6000, 300]
    for tile in source.tiling:
        assert not source.referenced(tile)[1].any()


@pytest.mark.parametrize(("pitch_um", "found"), [(5, False), (20, True)])
def test_artifacts_are_told_by_their_reach_where_no_neuron_reaches_as_far(pitch_um: float, found: bool) -> None:
    samples = np.random.default_rng(0).normal(0, 30, (12_000, 16)).astype(np.int16)
    samples[8000:8030] += (1500 * np.arange(-8, 8)).astype(np.int16)  # more than the reference takes away
    source = source_of(samples, probe=simulate.linear_probe(16, pitch_um=pitch_um))
    assert bool(source.referenced(source.tiling[1])[1].any()) == found


def humming(samples: np.ndarray) -> np.ndarray:
    """With hum at 50.01 Hz and its harmonics up to 1 kHz, of another size on each channel."""
    angle = 2 * np.pi * 50.01 * np.arange(len(samples)) / RATE
    wave = sum(np.cos(number * angle + number) for number in range(1, 21))
    return samples + 30 * wave[:, None] * np.linspace(-1, 5, samples.shape[1])


def test_hum_is_subtracted_before_the_filter(samples: np.ndarray) -> None:
    """Also from a last batch that is shorter than the others: 0.07 s, of which most is padding."""
    clean = referenced(source_of(samples[:20_000].astype(np.float32)))
    spoilt = humming(samples[:20_000]).astype(np.float32)
    rest, far = [(referenced(source_of(spoilt, SETTINGS.replace(line_frequency=hz))) - clean) for hz in (50, 0)]
    assert clean.shape[1] == 20_000 and far.std() > 2 * clean.std()
    for batch, share in ((slice(100, 6_000), 0.1), (slice(18_000, 19_900), 0.15)):
        assert rest[:, batch].std() < share * far[:, batch].std()


def test_hum_is_subtracted_beside_dead_time(samples: np.ndarray) -> None:
    """Which has none, and fills three quarters of a batch."""
    spoilt, clean = humming(samples).astype(np.float32), samples.astype(np.float32)
    for of in (spoilt, clean):
        of[6_000:10_500] = 0
    settings = SETTINGS.replace(line_frequency=50.0)
    traces, blank = source_of(spoilt, settings).referenced(source_of(spoilt).tiling[1])
    expected, same = source_of(clean).referenced(source_of(clean).tiling[1])
    assert torch.equal(blank, same) and blank.any()
    left = slice(1449 + 4_500 + 30, 1449 + 6_000)
    assert (traces - expected)[:, left].std() < 0.5 * expected[:, left].std()


def test_without_hum_line_frequency_changes_little(samples: np.ndarray) -> None:
    traces, clean = (referenced(source_of(samples, SETTINGS.replace(line_frequency=hz))) for hz in (60, 0))
    assert not torch.equal(traces, clean)
    assert (traces - clean).std() < 0.2 * clean.std()  # 83 of 1500 degrees of freedom below 2.5 kHz


def test_damage_outside_of_what_is_sorted_does_not_stop_a_sort():
    samples = np.random.default_rng(3).normal(0, 50, (4 * int(RATE), 4)).astype(np.float32)
    samples[: int(RATE)] = np.nan
    samples[-int(RATE) :] = 0
    probe = Probe.from_positions([(0, 20 * i) for i in range(4)])
    settings = Settings(tmin=1.0, tmax=3.0, batch_size=6000)
    assert not prepare(open_recording(samples, fs=RATE, probe=probe), settings).dead.any()
