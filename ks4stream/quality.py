"""A quick check of a recording before hours are spent on it: is there a signal, and was it read as it was written?

Samples that are read differently from how they were written still look like a recording and sort into units. But the
numbers give it away:

- **type**: 16-bit samples read with the wrong signedness jump by more than half their range wherever the signal
  crosses the middle of it, and do not if read the other way; likewise if the byte order is wrong, or the bytes are
  those of floats;
- **channels**: in a flat file with interleaved channels, a value is most like the one of the next sample. The lag at
  which values of the flat stream differ least is the number of channels, and no other lag, nor the end of a row, is
  special. If that lag is 1, the channels follow each other, each with all of its samples;
- **unit**: the noise of amplifiers is a few µV. Numbers a million times smaller are volts.

From white noise nothing can be concluded, and then no warning is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from ks4stream.errors import MisreadWarning, RecordingError
from ks4stream.messages import warn
from ks4stream.recording import Recording

STEPS = 8192  # rows of a spot whose steps from sample to sample are examined
JUMP_SHARE = 1e-3  # of a channel's steps, beyond half the range, that raises suspicion; recordings have none
SURE_JUMP_SHARE = 0.01  # … that leaves no doubt; simulated probes and a real one have 0.03 to 0.17
CALM = 0.1  # what remains of the steps if read the way they were written, at most; there it is 0.003 to 0.07
SURE_CALM = 0.07
CHANNEL_SHARE = 0.05  # of the channels that must agree; a single one may be broken in any way
SURE_CHANNEL_SHARE = 0.5
PLAUSIBLE_SHARE = 0.999  # of numbers whose size is that of a sample, if bytes are of floats

FLAT_VALUES = 1 << 20  # of each spot that are compared with later ones
MIN_ROWS = 500  # to distinguish differences between columns from chance (5 to 10 %)
MAX_LAG = 4200  # the channels of the largest probes; raised for a recording that has more
CLIPPED_MADS = 5.0  # so that artifacts and railing channels do not decide
OUTLYING = 20.0  # times the median square, at which squared steps are clipped: of normal steps, 3 in 1000
SHARP = 0.7  # the difference at the lag that is the number of channels, relative to one value earlier and later
# If the given number of channels is right and neighbours are even more alike (they share noise without memory), steps
# into the next row are larger than those within a row, by the inverse of …
CLOSER = 0.6  # … the difference at another lag relative to that at the given number, at most
ALIKE = 1.4  # ratio beyond which two mean squares are not alike

QUIET_UV = 1e-4  # noise below this is in volts: 2 to 30 µV are usual, 0.002 to 0.03 mV, and in narrow bands a tenth


def check_traces(
    recording: Recording,
    *,
    scale: float | None = None,
    start: int = 0,
    stop: int | None = None,
    n_spots: int = 5,
    spot_s: float = 1.0,
) -> list[int]:
    """Check a few spots of a recording before hours are spent on it.

    Reads ``n_spots`` stretches of ``spot_s`` seconds, evenly spaced from start to stop (everything, if
    that is no longer than the stretches together). With a probe, only its channels are checked, except when
    the number of channels itself is checked.

    Parameters
    ----------
    recording : Recording
        The recording to check.
    scale : float, optional
        Factor by which samples will be multiplied.
    start, stop : int, optional
        Range of samples that will be sorted; no others are read. By default all.
    n_spots : int, optional
        How many stretches.
    spot_s : float, optional
        Length of a stretch, in seconds.

    Returns
    -------
    list of int
        Dead channels (columns of the file): constant within every spot.

    Raises
    ------
    RecordingError
        If a sample is NaN or infinite, all are zero, no channel has any signal, or the samples certainly have a
        type other than the one they were read with.

    Warns
    -----
    MisreadWarning
        If the samples seem to have another type or to be in volts, or the file seems to have another number of
        channels or to hold them one after the other.
    """
    probe = recording.probe
    channels = np.arange(recording.n_channels) if probe is None else np.sort(probe.chan_map)
    is_dead = np.ones(len(channels), bool)
    all_zero = True
    steps, noise, stream = _Steps(recording.dtype), _Noise(scale), _FlatStream(recording.n_channels)
    stop = recording.n_samples if stop is None else stop
    for first, last in _spots(stop - start, n_spots, max(1, round(spot_s * recording.sampling_rate_hz))):
        rows = recording.read(start + first, start + last)
        block = rows[:, channels]
        _check_float_type(block, recording)
        _check_finite(block, start + first, channels, recording)
        is_dead &= (block == block[0]).all(axis=0)
        all_zero &= not block.any()
        if recording.source.is_flat:  # otherwise its shape is stored with it
            stream.add(rows)
        steps.add(rows, channels)
        noise.add(block)
    if all_zero:
        raise RecordingError(
            f"{recording.name}: every sample checked is zero, on all {len(channels)} channels. "
            "Check n_chan and dtype, and that the file was copied completely."
        )
    if is_dead.all():
        raise RecordingError(
            f"{recording.name}: each of the {len(channels)} channels is constant in all places checked. "
            "Check n_chan, dtype and the channel map."
        )
    finding = steps.finding(~is_dead, recording) or stream.finding(recording) or noise.finding(~is_dead, recording)
    if finding:
        warn(finding, MisreadWarning)
    return [int(channel) for channel in channels[is_dead]]


def _check_finite(block: NDArray[Any], start: int, channels: NDArray[np.int64], recording: Recording) -> None:
    if block.dtype.kind != "f":
        return
    is_bad = ~np.isfinite(block)
    if is_bad.any():
        time, column = np.argwhere(is_bad)[0]
        sample = start + int(time)
        raise RecordingError(
            f"{recording.name}: channel {channels[column]} is {block[time, column]} at sample {sample} "
            f"({sample / recording.sampling_rate_hz:.3f} s). Samples must be finite: check dtype, replace NaN and "
            "infinite values (for instance with zeros), or leave the channel out with bad_channels."
        )


def _spots(n_samples: int, n_spots: int, length: int) -> list[tuple[int, int]]:
    """Evenly spaced stretches from the first sample to the last; a single one of all samples if they would overlap."""
    if n_samples <= n_spots * length:
        return [(start, min(start + length, n_samples)) for start in range(0, n_samples, length)]
    last = n_samples - length
    return [(start, start + length) for start in (last * i // max(1, n_spots - 1) for i in range(n_spots))]


# -- the type of samples -------------------------------------------------------------------------------


def _check_float_type(block: NDArray[Any], recording: Recording) -> None:
    """Refuse float32 whose bytes are those of integers: two small integers make a tiny float or NaN."""
    if block.dtype != np.float32:
        return
    size = np.abs(block[:STEPS])
    senseless = ~np.isfinite(size) | ((size > 0) & (size < 1e-30)) | (size > 1e30)
    if np.mean(senseless) > 0.5:
        raise RecordingError(
            f"{recording.name}: {100 * np.mean(senseless):.0f} % of the samples checked are NaN or smaller than "
            "1e-30: integers read as float32 look like this. Set dtype to the type that was written, usually 'int16'."
        )


@dataclass
class _Steps:
    """Steps between samples of 16-bit integers, as they were read and as other types, summed by channel."""

    dtype: np.dtype[Any]
    n_steps: Any = 0
    n_jumps: Any = 0
    as_read: Any = 0
    otherwise: dict[str, Any] = field(default_factory=dict)  # by dtype: the sum of steps if samples had that type
    floats: NDArray[np.int16] | None = None  # values as stored in the file, which may be halves of float32

    def add(self, rows: NDArray[Any], channels: NDArray[np.int64]) -> None:
        """Count the steps of a spot."""
        if self.dtype not in (np.int16, np.uint16) or len(rows) < 2:
            return
        block = np.ascontiguousarray(rows[:STEPS, channels])
        limits = np.iinfo(self.dtype)
        inside = (block > limits.min) & (block < limits.max)  # a saturated channel jumps from one end to the other
        counted = inside[1:] & inside[:-1]
        steps = _steps(block)
        jumps = (steps > 2**15) & counted
        self.n_steps = self.n_steps + counted.sum(axis=0)
        self.n_jumps = self.n_jumps + jumps.sum(axis=0)
        self.as_read = self.as_read + np.where(counted, steps, 0).sum(axis=0)
        if self.floats is None and jumps.any():
            self.floats = np.ascontiguousarray(rows[:STEPS]).view(np.int16).ravel()
        sign = "uint16" if self.dtype == np.int16 else "int16"
        for name, other in ((sign, block.view(sign)), (f">{self.dtype.str[1:]}", block.byteswap())):
            self.otherwise[name] = self.otherwise.get(name, 0) + np.where(counted, _steps(other), 0).sum(axis=0)

    def finding(self, is_alive: NDArray[np.bool_], recording: Recording) -> str | None:
        """The warning's text, if there is anything to warn of.

        Raises
        ------
        RecordingError
            If there is no doubt.
        """
        if not np.any(self.n_jumps):
            return None
        share = self.n_jumps / np.maximum(self.n_steps, 1)
        is_sure = np.mean(share[is_alive] > SURE_JUMP_SHARE) > SURE_CHANNEL_SHARE
        for name, summed in self.otherwise.items():
            left = summed / np.maximum(self.as_read, 1)
            seems = is_alive & (share > JUMP_SHARE) & (left < CALM)
            if seems.sum() < max(1.0, CHANNEL_SHARE * is_alive.sum()):
                continue
            found = (
                f"{recording.name}: on {seems.sum()} of {is_alive.sum()} channels {100 * share[seems].mean():.2g} % of "
                f"the steps between samples exceed half the range of {self.dtype}, and if read as {name}, steps are "
                f"{1 / max(left[seems].max(), 1e-9):.0f} times smaller: samples "
            )
            if is_sure and np.median(left[seems]) < SURE_CALM:
                raise RecordingError(f"{found}were written as {name}. {_set_dtype(name)}")
            return f"{found}seem to have been written as {name}. {_set_dtype(name)}"
        suspicious = is_alive & (share > JUMP_SHARE)
        floats = self._float_type() if suspicious.sum() >= max(1.0, CHANNEL_SHARE * is_alive.sum()) else None
        if floats:
            raise RecordingError(
                f"{recording.name}: {100 * share[is_alive].mean():.2g} % of the steps between samples exceed half the "
                f"range of {self.dtype}, and if read as {floats}, samples have plausible sizes: they were written as "
                f"{floats}. {_set_dtype(floats)}"
            )
        return None

    def _float_type(self) -> str | None:
        """The float type whose bytes these are, if any: nearly all values are then neither huge nor tiny."""
        assert self.floats is not None
        halves = self.floats
        pairs = [halves[first : first + (len(halves) - first) // 2 * 2] for first in (0, 1)]  # either may be first
        for name, readings, least, most in (
            ("float32", [pair.view(np.float32) for pair in pairs], 1e-12, 1e9),
            ("float16", [halves.view(np.float16)], 1e-3, 6e4),
        ):
            for numbers in readings:
                size = np.abs(numbers)
                if len(size) and np.mean((size == 0) | ((size > least) & (size < most))) > PLAUSIBLE_SHARE:
                    return name
        return None


def _steps(block: NDArray[Any]) -> NDArray[np.int32]:
    return np.abs(np.diff(block.astype(np.int32), axis=0))


def _set_dtype(name: str) -> str:
    if name == "float16":
        return "float16 is not supported: convert the samples to float32 and set dtype='float32'."
    return f"Set dtype={name!r} (data_dtype in run_kilosort; for an array, array.view({name!r}))."


# -- the number of channels, and their order -----------------------------------------------------------


class _FlatStream:
    """How much values of a flat file differ from later ones, by lag."""

    def __init__(self, n_channels: int) -> None:
        self._n_channels = n_channels
        self._spots: list[NDArray[np.float64]] = []  # (row, channel), in units of the noise, clipped

    def add(self, rows: NDArray[Any]) -> None:
        """Take the first rows of a spot, all channels."""
        values = np.ascontiguousarray(rows[: max(FLAT_VALUES // self._n_channels, 1)], np.float64)
        values -= np.median(values)
        spread = np.median(np.abs(values)) or values.std()
        if spread > 0:
            self._spots.append(np.clip(values / spread, -CLIPPED_MADS, CLIPPED_MADS))

    def finding(self, recording: Recording) -> str | None:
        """The warning's text, if there is anything to warn of."""
        n_channels = self._n_channels
        n_rows = sum(map(len, self._spots))
        n_lags = min(max(MAX_LAG, 2 * n_channels + 2), max((spot.size // 16 for spot in self._spots), default=0))
        if n_rows < MIN_ROWS or n_lags < 2 * n_channels + 2:
            return None
        rough = self._rough_differences(n_lags)
        lags = np.arange(2, n_lags - 1)
        lags = lags[(rough[lags] < np.minimum(rough[lags - 1], rough[lags + 1])) & (lags != n_channels)]
        given = self._difference(n_channels)
        if len(lags):
            closest = int(lags[rough[lags].argmin()])
            found = self._difference(closest)
            beside = min(self._difference(closest - 1), self._difference(closest + 1))
            is_close = found < min(CLOSER * given, SHARP * beside)
            if is_close and self._rows_do_not_show(closest) and not self._is_shared(closest):
                return (
                    f"{recording.name} seems to have {closest} channels, not {n_channels}: values in the file are "
                    f"most like those {closest} values later. Check n_chan (n_chan_bin in run_kilosort), which counts "
                    "all channels in the file, including sync channels."
                )
        is_next = n_channels > 1 and rough[1] <= rough[1:].min() and self._difference(1) < CLOSER * given
        if is_next and self._rows_do_not_show(1):
            return (
                f"{recording.name} seems to hold one channel after the other (or only one channel), not {n_channels} "
                "interleaved ones: values are most like the very next ones in the file. Transpose it: "
                f"numpy.memmap(path, {recording.dtype.name!r}, 'r', shape=({n_channels}, "
                f"{recording.n_samples})).T, preferably into a new file."
            )
        return None

    def _difference(self, lag: int) -> float:
        """Mean square difference of values `lag` apart."""
        steps = [spot.ravel()[lag:] - spot.ravel()[:-lag] for spot in self._spots]
        return float(sum(np.sum(step**2) for step in steps) / sum(map(len, steps)))

    def _rough_differences(self, n_lags: int) -> NDArray[np.float64]:
        """The same for all lags, relative to twice the variance; less accurate where differences are very small."""
        summed = np.zeros(n_lags)
        for spot in self._spots:
            stream = spot.ravel() - spot.mean()
            length = fft.next_fast_len(len(stream) + n_lags, real=True)
            product = fft.irfft(np.abs(fft.rfft(stream, length)) ** 2, length)[:n_lags]
            summed += product * len(stream) / (len(stream) - np.arange(n_lags))
        return 1 - summed / summed[0]

    def _rows_do_not_show(self, lag: int) -> bool:
        """Whether values `lag` later differ as much within a row as across rows."""
        columns = np.arange(self._n_channels)
        across = columns >= self._n_channels - lag % self._n_channels
        if across.all() or not across.any():
            return True
        squares = np.zeros(self._n_channels)
        for spot in self._spots:
            stream = spot.ravel()
            n_whole = (len(stream) - lag) // self._n_channels * self._n_channels
            step = (stream[lag : lag + n_whole] - stream[:n_whole]) ** 2
            step = np.minimum(step, OUTLYING * np.median(step))  # from one channel to the next, in an artifact
            squares += step.reshape(-1, self._n_channels).sum(axis=0)
        within = squares[~across].mean()
        return bool(within and 1 / ALIKE < squares[across].mean() / within < ALIKE)  # 0 where channels are copies

    def _is_shared(self, lag: int) -> bool:
        """Whether rows recur at a lag only because of a signal that all channels share, such as a tone."""
        if self._n_channels == 1 or lag % self._n_channels:
            return False
        rest = _FlatStream(self._n_channels)
        rest._spots = [spot - np.median(spot, axis=1, keepdims=True) for spot in self._spots]
        return rest._difference(lag) >= CLOSER * rest._difference(self._n_channels)


# -- their unit ----------------------------------------------------------------------------------------


class _Noise:
    """Noise from the differences between samples, for numbers with decimals, by spot and channel."""

    def __init__(self, scale: float | None) -> None:
        self._scale = 1.0 if scale is None else abs(scale)
        self._sd: list[NDArray[np.float64]] = []

    def add(self, block: NDArray[Any]) -> None:
        """Measure a spot."""
        if block.dtype.kind == "f" and len(block) > 1:
            steps = np.abs(np.diff(block[:STEPS].astype(np.float64), axis=0))
            self._sd.append(np.median(steps, axis=0) / 0.6745 / np.sqrt(2))

    def finding(self, is_alive: NDArray[np.bool_], recording: Recording) -> str | None:
        """The warning's text, if there is anything to warn of."""
        if not self._sd:
            return None
        noise = float(np.median(np.median(self._sd, axis=0)[is_alive])) * self._scale
        if not 0 < noise < QUIET_UV:
            return None
        return (
            f"{recording.name} seems to be in volts, or scaled otherwise: its noise is {noise:.1g}, where a few µV are "
            "usual. The units found do not depend on it, but artifact_threshold and stored traces are in that unit: "
            f"Settings(scale={1e6 * self._scale:g}) converts to µV."
        )
