"""Spans that are known to be unsortable: what is accepted, and what of it reaches the traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream import Settings, open_recording, sort
from ks4stream.blanks import given_spans
from ks4stream.errors import ArtifactWarning, SettingsError
from ks4stream.simulate import linear_probe
from ks4stream.sorter import prepare

RATE = 30_000.0


def spans(given: Any, n_samples: int = 300_000) -> list[list[int]]:
    return given_spans(given, n_samples=n_samples, sampling_rate_hz=RATE).tolist()


def test_integers_are_samples_and_floats_are_seconds() -> None:
    assert spans([[10, 20], [30, 40]]) == [[10, 20], [30, 40]]
    assert spans([[0.001, 0.002]]) == [[30, 60]]
    assert spans(np.array([[10.0, 20.0]]), n_samples=10**7) == [[300_000, 600_000]]


def test_a_pulse_lasts_a_millisecond() -> None:
    assert spans([100]) == [[100, 130]]
    assert spans([0.01]) == [[300, 330]]


def test_spans_are_put_in_order_and_joined_where_they_overlap_or_touch() -> None:
    assert spans([[50, 60], [0, 10], [5, 20], [60, 70], [6, 7]]) == [[0, 20], [50, 70]]


def test_what_is_outside_of_the_recording_is_cut_off() -> None:
    assert spans([[-5, 10], [90, 120]], n_samples=100) == [[0, 10], [90, 100]]
    with pytest.warns(ArtifactWarning, match=r"which has 100 samples or 0.003 s, are ignored \(1 of 3\)"):
        assert spans([[-5, 10], [90, 120], [200, 300]], n_samples=100) == [[0, 10], [90, 100]]
    with pytest.raises(SettingsError, match=r"nothing of it is within the recording, which has 100 samples"):
        spans([[200, 300]], n_samples=100)


def test_nothing_given() -> None:
    assert spans([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# start stop\n10 20\n\n30,40\n", [[10, 20], [30, 40]]),
        ("0.001\n0.002\n", [[30, 90]]),
        ("1\n100\n", [[1, 31], [100, 130]]),
        ("1, 2.0\n", [[30_000, 60_000]]),
        ("\ufeff10,20\r\n", [[10, 20]]),  # as Excel writes it
        ("", []),
    ],
)
def test_text_files(tmp_path: Path, text: str, expected: list[list[int]]) -> None:
    path = tmp_path / "pulses.txt"
    path.write_text(text, encoding="utf-8")
    assert spans(path) == expected
    assert spans(str(path)) == expected


def test_npy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "spans.npy", np.array([[1, 2], [5, 9]]))
    assert spans(tmp_path / "spans.npy") == [[1, 2], [5, 9]]
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(SettingsError, match=r"objects\.npy' cannot be read"):
        spans(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2, 3]], r"shape \(1, 3\)"),
        (["soon"], "type <U4"),
        ([[1.0, np.nan]], "not finite"),
        ([[20, 10]], "span 0 ends before it starts"),
    ],
)
def test_what_is_wrong_is_said(given: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        spans(given)


@pytest.mark.parametrize(
    ("text", "message"), [("1 2\n3\n", "different numbers of columns"), ("1 x\n", "other than num")]
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pulses.txt").write_text(text)
    with pytest.raises(SettingsError, match=message):
        spans(tmp_path / "pulses.txt")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"blank='nowhere\.txt' cannot be read"):
        spans("nowhere.txt")


def test_given_spans_are_blank_and_the_filter_does_not_spread_what_was_there() -> None:
    probe = linear_probe(4)
    clean = np.random.default_rng(0).normal(0, 30, (12_000, 4)).astype(np.int16)
    spoilt = clean.copy()
    spoilt[9000:9030] += 5000
    settings = Settings(batch_size=6000, do_CAR=False)
    given, unspoilt = (
        prepare(open_recording(samples, fs=RATE, probe=probe), settings, blank=[[9000, 9030]])
        for samples in (spoilt, clean)
    )
    for tile in given.tiling:  # the span is in the core of one tile, and in the halo of none
        traces, blank = given.referenced(tile)
        expected, _ = unspoilt.referenced(tile)
        assert (blank.nonzero()[:, 0] + tile.first).tolist() == (list(range(9000, 9030)) if tile.index == 1 else [])
        assert not traces[:, blank].any()
        assert np.array_equal(traces.numpy(), expected.numpy())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ks4stream.errors.FewSpikesWarning")
def test_no_spike_is_found_in_a_given_span(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 30, (60_000, 4)).astype(np.int16)
    samples[::500, 1] -= 600
    recording = open_recording(samples, fs=RATE, probe=linear_probe(4))
    settings = Settings(batch_size=6000, nblocks=0, nearest_chans=4)
    (tmp_path / "pulses.txt").write_text("0.5 0.7\n")
    with pytest.warns(
        ArtifactWarning, match=r"No spikes were looked for in 0\.20 s, 10\.1 % of the recording.*number of spans: 1"
    ):
        found = sort(recording, settings, client="loop", blank=tmp_path / "pulses.txt")
    assert found.artifacts.tolist() == [[15_000 - 15, 21_000 + 15]]  # a quarter of a waveform beside it
    assert len(found.sample)
    assert not ((found.sample >= 15_000 - 15) & (found.sample < 21_000 + 15)).any()
