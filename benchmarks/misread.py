"""Does a recording that was read in another way than it was written say so, and one that was read well say nothing?

    python benchmarks/misread.py --recording run_g0_t0.imec0.ap.bin

All scenarios, an array of contacts of each layout of Neuropixels probes, and a recording of one's own if given, a
second or two of each. *As written*: looked at raw, filtered, referenced, in µV, with channels in another order, one and
four channels alone, beside a tone; nothing may be said. *Misread*: written to a file and read with each mistake;
something has to be said. Fails if there is a false alarm, or if a mistake is caught on fewer than eight recordings.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from probeinterface.neuropixels_tools import build_neuropixels_probe
from scenarios import SCENARIOS
from scipy import signal

from ks4stream import Probe, open_recording
from ks4stream.errors import MisreadWarning, RecordingError
from ks4stream.quality import check_traces
from ks4stream.simulate import simulate

MIN_RECORDINGS = 8  # recordings on which each mistake has to be caught
PARTS = (  # of Neuropixels probes, one for each layout of contacts
    "NP1000",
    "NP1020",
    "NP1100",
    "NP1120",
    "NP1121",
    "NP1122",
    "NP1123",
    "NP1200",
    "NP1300",
    "NP2000",
    "NP3000",
)
Samples = NDArray[Any]
Reading = tuple[Samples, int, str]  # what is in the file, and the channels and type that it is read with


def main(arguments: Sequence[str] | None = None) -> None:
    """Look at all recordings in all ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, nargs="*", default=[], help="int16, with metadata or --n-chan, --fs")
    parser.add_argument("--n-chan", type=int)
    parser.add_argument("--fs", type=float)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each recording")
    parser.add_argument("--contacts", type=int, default=96, help="of each kind of probe")
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, samples, rate in recordings(options):
            said = {way: look(folder, rate, *reading) for way, reading in well_read(samples, rate)}
            said = {"as written": "; ".join(f"{way}: {text}" for way, text in said.items() if text)}
            said |= {mistake: look(folder, rate, *reading(samples)) for mistake, reading in MISTAKES.items()}
            found[name] = said
            missed = ", ".join(mistake for mistake in MISTAKES if not said[mistake]) or "nothing"
            alarm = "FALSE ALARM, " * bool(said["as written"])
            print(f"{name:<12} {samples.shape[1]:>4} channels: {alarm}missed: {missed}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    alarms = [f"{name}: {said['as written']}" for name, said in found.items() if said["as written"]]
    print(f"\nFalse alarms on {len(found)} recordings, each in {len(WAYS)} ways: {len(alarms)}", *alarms, sep="\n")
    caught = {mistake: [said[mistake] for said in found.values() if said[mistake]] for mistake in MISTAKES}
    for mistake, texts in caught.items():
        n_refused = sum(text.startswith("refused") for text in texts)
        print(f"{mistake:<28} caught on {len(texts):>2} of {len(found)}, refused on {n_refused:>2}")
    if alarms or min(map(len, caught.values())) < MIN_RECORDINGS:
        sys.exit(1)


def recordings(options: argparse.Namespace) -> Iterator[tuple[str, Samples, float]]:
    """Name, samples (time, channel) as int16, and rate."""
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        made = scenario(700 + number, duration_s=max(2.0, options.seconds))
        yield name, np.asarray(made.traces[: round(options.seconds * made.sampling_rate_hz)]), made.sampling_rate_hz
    for number, part in enumerate(PARTS):
        probe = Probe.from_positions(build_neuropixels_probe(part).contact_positions[: options.contacts])
        made = simulate(probe, max(1.0, options.seconds), seed=800 + number, n_units=20, hash_per_channel=1.0)
        yield part, np.asarray(made.traces[: round(options.seconds * made.sampling_rate_hz)]), made.sampling_rate_hz
    for path in options.recording:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = open_recording(path, n_chan=options.n_chan, fs=options.fs)
        stop = min(own.n_samples, round(options.seconds * own.sampling_rate_hz))
        yield "own", own.read(0, stop).astype(np.int16), own.sampling_rate_hz


def look(folder: str, rate: float, samples: Samples, n_chan: int, dtype: str) -> str:
    """What is said of samples in a file that is read with so many channels of a type; nothing: an empty string."""
    path = Path(folder) / "samples.bin"
    content = np.ascontiguousarray(samples).tobytes()
    path.write_bytes(content[: len(content) - len(content) % (n_chan * np.dtype(dtype).itemsize)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_traces(open_recording(path, n_chan=n_chan, fs=rate, dtype=dtype))
        except RecordingError as error:
            return f"refused: {error}"
    return "; ".join(f"warned: {one.message}" for one in caught if issubclass(one.category, MisreadWarning))


# -- ways to read well -----------------------------------------------------------------------------------


def _high_pass(samples: Samples, rate: float) -> Samples:
    return signal.sosfiltfilt(signal.butter(3, 300, "high", fs=rate, output="sos"), samples, axis=0).astype("float32")


def _tone(samples: Samples, rate: float, frequency_hz: float) -> Samples:
    """With a tone that all channels share, four times the noise."""
    noise = np.median(np.abs(np.diff(samples.astype(float), axis=0))) / 0.6745 / np.sqrt(2)
    wave = 4 * noise * np.cos(0.3 + 2 * np.pi * frequency_hz * np.arange(len(samples)) / rate)
    return (samples + wave[:, None]).astype(np.int16)


WAYS: dict[str, Callable[[Samples, float], Samples]] = {
    "raw": lambda x, rate: x,
    "unsigned": lambda x, rate: (x.astype(np.int32) + 2**15).astype(np.uint16),
    "µV": lambda x, rate: x * np.float32(0.2),
    "filtered": lambda x, rate: _high_pass(x, rate).round().astype(np.int16),
    "filtered, referenced": lambda x, rate: _high_pass(x - np.median(x, axis=1, keepdims=True), rate),
    "another order": lambda x, rate: x[:, np.random.default_rng(1).permutation(x.shape[1])],
    "four channels": lambda x, rate: x[:, :4],
    "one channel": lambda x, rate: x[:, :1],
    "one sample in ten": lambda x, rate: x[::10],
    "a tone of a third of the rate": lambda x, rate: _tone(x, rate, rate / 3),
    "a tone of half the rate": lambda x, rate: _tone(x, rate, rate / 2),
    "a tone of 7.5 kHz": lambda x, rate: _tone(x, rate, 7500),
    "a tone of 7.91 kHz": lambda x, rate: _tone(x, rate, 7910),
    "four channels and a tone": lambda x, rate: _tone(x[:, :4], rate, rate / 3),
}


def well_read(samples: Samples, rate: float) -> Iterator[tuple[str, Reading]]:
    """The same recording in many ways, each read as it was written."""
    for name, change in WAYS.items():
        changed = change(samples, rate)
        yield name, (changed, changed.shape[1], changed.dtype.str)


# -- mistakes --------------------------------------------------------------------------------------------

MISTAKES: dict[str, Callable[[Samples], Reading]] = {
    "uint16 read as int16": lambda x: ((x.astype(np.int32) + 2**15).astype(np.uint16), x.shape[1], "int16"),
    "int16 read as uint16": lambda x: (x, x.shape[1], "uint16"),
    "one channel too few": lambda x: (x, x.shape[1] - 1, "int16"),
    "one channel too many": lambda x: (x, x.shape[1] + 1, "int16"),
    "half the channels": lambda x: (x, x.shape[1] // 2, "int16"),
    "twice the channels": lambda x: (x, x.shape[1] * 2, "int16"),
    "one channel after the other": lambda x: (x.T, x.shape[1], "int16"),
    "volts": lambda x: (x * np.float32(2e-7), x.shape[1], "float32"),
    "float32 read as int16": lambda x: (x * np.float32(0.2), x.shape[1], "int16"),
    "float16 read as int16": lambda x: ((0.2 * x).astype(np.float16), x.shape[1], "int16"),
    "int16 read as float32": lambda x: (x, x.shape[1], "float32"),
    "bytes in the other order": lambda x: (x.byteswap(), x.shape[1], "int16"),
}


if __name__ == "__main__":
    main()
