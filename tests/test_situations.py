"""Recordings as they come from a real rig are sorted: short ones, of those in benchmarks/situations.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ks4stream.io.recordings import open_recording
from ks4stream.results import Sorting
from ks4stream.scoring import Score, score
from ks4stream.settings import Settings
from ks4stream.simulate import SimulatedRecording
from ks4stream.sorter import sort

RATE = 30_000

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ks4stream.errors.Ks4StreamWarning")]


@pytest.fixture
def situations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("situations")


def sorted_and_scored(recording: SimulatedRecording, **changes: Any) -> tuple[Sorting, Score]:
    """Of still tissue; no unit that is called good is false."""
    samples = recording.read(0, len(recording.traces))
    sorting = sort(
        open_recording(samples, fs=RATE, probe=recording.probe),
        Settings(nblocks=0, **changes),
        client="loop",
        device="cpu",
    )
    scored = score(recording.spike_samples, recording.spike_units, sorting.sample, sorting.unit, sampling_rate_hz=RATE)
    assert not sorting.good[scored.false_positive_units].any()
    return sorting, scored


def blanked_share(sorting: Sorting, start_s: float, stop_s: float) -> float:
    """Share of a span of time in which no spikes were looked for."""
    spans = sorting.artifacts.clip(round(start_s * RATE), round(stop_s * RATE))
    return float(np.diff(spans).sum() / (RATE * (stop_s - start_s)))


def test_one_contact(situations: ModuleType) -> None:
    _, scored = sorted_and_scored(situations.one(1, 20.0))
    assert scored.is_well_detected.all()


def test_a_neuron_of_two_millivolts_and_those_beside_it(situations: ModuleType) -> None:
    recording = situations.big32(1, 20.0)
    sorting, scored = sorted_and_scored(recording)
    assert scored.accuracy[recording.units["amplitude_uv"].argmax()] > 0.95
    assert scored.is_well_detected.sum() >= 10  # of 11
    assert blanked_share(sorting, 0, 20) < 0.001


def test_stimulation_at_130_hz(situations: ModuleType) -> None:
    """In the last third, in which a pulse and what is lost beside it take a quarter of the time."""
    sorting, scored = sorted_and_scored(situations.stim130(1, 30.0))
    assert scored.is_well_detected.sum() >= 9  # of 10
    assert blanked_share(sorting, 0, 20) < 0.001
    assert 0.15 < blanked_share(sorting, 20, 30) < 0.4
    assert any("because of artifacts, loud noise or dead time" in text for text in sorting.warnings)


def test_hum_is_told_of_and_its_peaks_are_blanked(situations: ModuleType) -> None:
    sorting, scored = sorted_and_scored(situations.hum(1, 21.0))
    assert scored.is_well_detected.sum() >= 9  # of 10
    assert any("Mains hum at 50 Hz" in text for text in sorting.warnings)


def test_hum_is_subtracted(situations: ModuleType) -> None:
    """Also in a last batch of a second."""
    sorting, scored = sorted_and_scored(situations.hum(1, 21.0), line_frequency=50.0)
    assert scored.is_well_detected.all() and scored.accuracy.mean() > 0.99
    assert not any("hum" in text for text in sorting.warnings)
    assert not any("50 Hz" in reason for reason in sorting.label_reasons)
    assert blanked_share(sorting, 0, 21) < 0.001


def test_zeros_for_most_of_the_time(situations: ModuleType) -> None:
    sorting, scored = sorted_and_scored(situations.dead75(1, 40.0))
    assert scored.is_well_detected.sum() >= 9  # of 10
    assert len(scored.false_positive_units) == 0
    assert blanked_share(sorting, 0, 30) == 1
    assert blanked_share(sorting, 30, 40) < 0.001
