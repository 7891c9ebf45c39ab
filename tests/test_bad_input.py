"""What cannot be sorted is refused before work starts; the message names what was given and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seen_gpus import see_gpus

from ks4stream import simulate
from ks4stream.errors import Ks4StreamError, ProbeError, RecordingError, ResultsError, SettingsError
from ks4stream.io.recordings import open_recording
from ks4stream.planning import plan
from ks4stream.preprocessed import preprocess
from ks4stream.probe import Probe
from ks4stream.settings import Settings
from ks4stream.sorter import sort

RATE = 30_000.0
PROBE = simulate.linear_probe(10, pitch_um=20)
SETTINGS = Settings(batch_size=6000)


def noise(n_samples: int = 15_000, n_channels: int = 10, dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(1).normal(0, 50, (n_samples, n_channels)).astype(dtype)


class Unstarted:
    """An engine's client and progress that must not be reached."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work has started: {name}")

    def __call__(self, *call: Any) -> None:
        raise AssertionError(f"work has started: {call}")


def refuse(source: Any, settings: Settings = SETTINGS, probe: Probe | None = PROBE, **options: Any) -> None:
    """Sort with a client that fails when used: the error must come before."""
    recording = open_recording(source, fs=RATE, probe=probe)
    sort(recording, settings, client=Unstarted(), progress=Unstarted(), **options)


def test_a_file_that_is_not_a_multiple_of_its_channels(tmp_path: Path) -> None:
    path = tmp_path / "odd.bin"
    path.write_bytes(bytes(2 * 10 * 1000 + 6))
    with pytest.raises(RecordingError, match=r"odd\.bin.*20006 bytes.*10.*n_chan"):
        open_recording(path, n_chan=10, fs=RATE, probe=PROBE)


def test_a_channel_map_beyond_the_file() -> None:
    probe = Probe.from_positions(PROBE.positions_um, chan_map=np.arange(10) + 3, name="moved")
    with pytest.raises(ProbeError, match=r"moved maps 3 contact.*up to 12.*10 channels \(0 to 9\).*number of channels"):
        refuse(noise(), probe=probe)


def test_a_probe_in_millimetres() -> None:
    with pytest.raises(ProbeError, match=r"0\.02 apart.*µm.*mm.*Multiply them by 1000"):
        Probe.from_positions(PROBE.positions_um / 1000)


def test_contacts_at_one_place() -> None:
    positions = PROBE.positions_um.copy()
    positions[7] = positions[2]
    with pytest.raises(ProbeError, match=r"channels 2, 7 are at the same position.*Correct their positions"):
        Probe.from_positions(positions)


def test_an_even_waveform() -> None:
    with pytest.raises(SettingsError, match=r"nt=60 is even.*Use 59 or 61"):
        Settings(nt=60)


def test_an_unknown_setting() -> None:
    with pytest.raises(SettingsError, match=r"Unknown setting 'Th_univresal'.*Did you mean 'Th_universal'"):
        Settings.from_dict({"Th_univresal": 9})


@pytest.mark.parametrize("n_samples", [20, 60])
def test_a_recording_shorter_than_one_waveform(n_samples: int) -> None:
    with pytest.raises(RecordingError, match=rf"{n_samples} samples.*nt = 61.*Check the file"):
        refuse(noise(n_samples))


def test_a_crop_that_holds_nothing() -> None:
    with pytest.raises(RecordingError, match=r"tmin=2 s is not before the end of the recording, 0\.5 s"):
        refuse(noise(), SETTINGS.replace(tmin=2.0))
    with pytest.raises(RecordingError, match=r"batch_downsampling=4 leaves none of the recording's 3 batches"):
        refuse(noise(), SETTINGS.replace(batch_downsampling=4))


@pytest.mark.parametrize("cutoff_hz", [RATE / 2, RATE])
def test_a_cutoff_that_the_sampling_rate_does_not_allow(cutoff_hz: float) -> None:
    settings = SETTINGS.replace(highpass_cutoff=cutoff_hz)
    message = rf"highpass_cutoff={cutoff_hz:g} Hz must be below half the sampling rate .*, {RATE / 2:g} Hz\. Lower it"
    with pytest.raises(SettingsError, match=message):
        refuse(noise(), settings)
    with pytest.raises(SettingsError, match=message):
        plan(open_recording(noise(), fs=RATE, probe=PROBE), settings)


BAD_RESOURCES = [
    ("workers", 0, r"workers=0 must be a whole number of at least 1"),
    ("workers", -2, r"workers=-2 must be"),
    ("workers", True, r"workers=True must be"),
    ("block_batches", -1, r"block_batches=-1 must be"),
    ("block_batches", 1.5, r"block_batches=1.5 must be"),
    ("block_batches", "2", r"block_batches='2' must be"),
    ("cache_bytes", -1, r"cache_bytes=-1 must be a whole number of at least 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_RESOURCES)
def test_resources_that_make_no_sense(name: str, value: object, message: str) -> None:
    recording = open_recording(noise(), fs=RATE, probe=PROBE)
    for function in (sort, preprocess, plan):
        with pytest.raises(SettingsError, match=message):
            function(recording, SETTINGS, **{name: value})  # type: ignore[operator]


def test_a_plan_for_a_number_of_workers_that_makes_no_sense() -> None:
    for name in ("n_workers", "workers_per_gpu"):
        with pytest.raises(SettingsError, match=f"{name}=-2 must be a whole number of at least 1"):
            plan(open_recording(noise(), fs=RATE, probe=PROBE), SETTINGS, **{name: -2})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_numbers(value: float) -> None:
    samples = noise(dtype="float32")
    samples[7000, 3] = value
    with pytest.raises(RecordingError, match=rf"channel 3 is {value} at sample 7000.*replace NaN|channel 3 is .* 7000"):
        refuse(samples)


def test_a_nan_where_nobody_looked_is_an_error_while_it_is_read() -> None:
    """Only a few seconds of a long recording are looked at beforehand; the task that meets the sample says where."""
    samples = noise(270_000, dtype="float32")
    samples[40_000, 3] = np.nan
    with pytest.raises(RecordingError, match=r"channel 3 is not a number near sample 40000.*tmin") as caught:
        sort(open_recording(samples, fs=RATE, probe=PROBE), SETTINGS, client="loop", device="cpu")
    assert any(note.startswith("Raised in stage") for note in caught.value.__notes__)


def test_samples_that_are_all_zero() -> None:
    with pytest.raises(RecordingError, match=r"every sample checked is zero, on all 10 channels.*Check n_chan"):
        refuse(np.zeros((15_000, 10), np.int16))


def test_samples_that_never_change() -> None:
    with pytest.raises(RecordingError, match=r"each of the 10 channels is constant.*channel map"):
        refuse(np.full((15_000, 10), 7, np.int16))


def test_channels_of_which_the_common_reference_leaves_nothing() -> None:
    samples = np.tile(noise(n_channels=1), 10)
    with pytest.raises(RecordingError, match=r"no channel has any signal.*with the same signal.*do_CAR=False"):
        sort(open_recording(samples, fs=RATE, probe=PROBE), SETTINGS, client="loop", device="cpu")


def test_a_results_folder_that_cannot_be_written(tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file, not a folder")
    with pytest.raises(ResultsError, match="occupied"):
        refuse(noise(), results_dir=occupied)
    with pytest.raises(ResultsError, match="occupied"):
        refuse(noise(), results_dir=occupied / "kilosort4")
    assert occupied.read_text() == "a file, not a folder"


def test_no_probe() -> None:
    with pytest.raises(ProbeError, match=r"has no probe; give one"):
        refuse(noise(), probe=None)


def test_artifacts_everywhere() -> None:
    with pytest.raises(RecordingError, match=r"In all 3 batches.*artifact_threshold=10"):
        sort(open_recording(noise(), fs=RATE, probe=PROBE), SETTINGS.replace(artifact_threshold=10), client="loop")


def test_everything_given_as_blank() -> None:
    """The threshold, which is infinite, is not to blame."""
    recording = open_recording(noise(), fs=RATE, probe=PROBE)
    with pytest.raises(RecordingError, match=r"In all 3 batches.*spans given as blank, or where all") as refused:
        sort(recording, SETTINGS, client="loop", blank=[[0, 15_000]])
    assert "artifact_threshold" not in str(refused.value)


@pytest.mark.parametrize("function", [sort, plan, preprocess])
def test_what_is_not_a_recording_or_not_settings(function: Any) -> None:
    """A path, and a dictionary as Kilosort4 takes them."""
    with pytest.raises(RecordingError, match=r"of type str; it must be a ks4stream\.Recording\. open_recording"):
        function("data.bin", SETTINGS)
    recording = open_recording(noise(), fs=RATE, probe=PROBE)
    with pytest.raises(SettingsError, match=r"of type dict; they must be a ks4stream\.Settings\. Settings\.from_dict"):
        function(recording, {"nblocks": 0})


DEVICES = [
    ("gpu", "device='gpu' is not a valid device; it must be 'cpu', 'cuda' .any GPU. or 'cuda:1'"),
    ("mps", "device='mps' is not a valid device"),
    ("cuda:x", "device='cuda:x' is not a valid device"),
    ("", "device='' is not a valid device"),
    ("cuda", "device='cuda', but this process sees no GPU .*device='cpu'"),
    ("cuda:7", "device='cuda:7', but this process sees no GPU"),
]


@pytest.mark.parametrize(("device", "message"), DEVICES)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    see_gpus(monkeypatch)
    recording = open_recording(noise(), fs=RATE, probe=PROBE)
    for client in ("loop", None):
        with pytest.raises(SettingsError, match=message):
            sort(recording, SETTINGS, client=client, device=device, progress=Unstarted())
        with pytest.raises(SettingsError, match=message):
            preprocess(recording, SETTINGS, client=client, device=device)
    with pytest.raises(SettingsError, match=message):
        plan(recording, SETTINGS, device=device)


def test_a_gpu_beyond_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 80, 80)
    with pytest.raises(SettingsError, match=r"device='cuda:2', but this process sees 2 GPU\(s\).*to 'cuda:1'"):
        sort(open_recording(noise(), fs=RATE, probe=PROBE), SETTINGS, client="loop", device="cuda:2")


def test_samples_of_another_type() -> None:
    """Read as int16 what was written as uint16."""
    unsigned = (noise().astype(np.int32) + 32768).astype(np.uint16)
    with pytest.raises(RecordingError, match=r"half the range of int16.*Set dtype='uint16'"):
        refuse(unsigned.view(np.int16))


@pytest.mark.parametrize("error", [ProbeError, RecordingError, SettingsError])
def test_errors_are_ours_and_what_a_caller_expects(error: type[Exception]) -> None:
    assert issubclass(error, Ks4StreamError)
    assert issubclass(error, ValueError)
    assert issubclass(ResultsError, OSError)
