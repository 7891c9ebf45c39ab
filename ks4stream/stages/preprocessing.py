"""Preprocessing a tile of the recording: read, filter, reference, blank, whiten, correct drift (sections 0, 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ks4stream import geometry
from ks4stream.blocks import Tile, Tiling
from ks4stream.errors import BadChannelWarning, ProbeError, RecordingError, SettingsError
from ks4stream.io import kept_traces
from ks4stream.io.places import Place
from ks4stream.kernels import artifacts as artifact_kernels
from ks4stream.kernels import drift as drift_kernels
from ks4stream.kernels import preprocessing as kernels
from ks4stream.kernels.hum import remove_hum
from ks4stream.messages import hand_on, listeners, warn
from ks4stream.probe import Probe
from ks4stream.recording import Recording
from ks4stream.results import Drift, Whitening
from ks4stream.settings import Settings
from ks4stream.stages.base import Portable

BESIDE_UM = 40.0  # distance of contacts that every large neuron would reach together
DEAD_MS = 2.0  # for which all channels hold their value in dead time, at least
MATCHING_REACH_WAVEFORMS = 16  # halo besides that of the filter, in waveforms: reach of a chain of overlapping spikes


def tiling_of(recording: Recording, settings: Settings) -> Tiling:
    """Divide a recording into tiles whose halo is as long as the farthest reach of the computation.

    Raises
    ------
    RecordingError
        If there are fewer samples to sort than one waveform has.
    SettingsError
        If the filter's cutoff is not below half the sampling rate.
    """
    rate = recording.sampling_rate_hz
    if settings.highpass_cutoff >= rate / 2:
        raise SettingsError(
            f"highpass_cutoff={settings.highpass_cutoff:g} Hz must be below half the sampling rate of "
            f"{recording.name}, {rate / 2:g} Hz. Lower it, or correct the sampling rate (fs)."
        )
    reach = kernels.highpass_reach(sampling_rate_hz=rate, cutoff_hz=settings.highpass_cutoff)
    halo = reach + settings.nt // 2 + MATCHING_REACH_WAVEFORMS * settings.nt
    return Tiling.by_settings(settings, n_samples=recording.n_samples, sampling_rate_hz=rate, halo=halo)


@dataclass
class _AtHand:
    """What tasks have of tiles before they ask for them: those being read ahead, by index, and where some are kept."""

    ahead: dict[int, Future[Tensor]] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Preprocessor(Portable):
    """The tiles of a recording, and everything a worker needs to compute the traces of one.

    Attributes
    ----------
    recording : Recording
        With a probe.
    tiling : Tiling
    settings : Settings
        Those in `reads`; if drift is corrected, those in `reads_if_moved` too.
    dead : ndarray of int64
        Channels without signal (probe order): they are left out of reference and whitening.
    blank : ndarray of int64, shape (m, 2)
        Spans that are known to be unsortable, in samples, half-open, in order.
    whitening, drift : Whitening, Drift or None
        None until they have been estimated.
    device : str
        Where kernels run: "cpu", "cuda".
    """

    reads: ClassVar[tuple[str, ...]] = ("recording", "preprocessing")
    reads_if_moved: ClassVar[tuple[str, ...]] = ("sig_interp",)

    recording: Recording
    tiling: Tiling
    settings: Settings
    dead: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    device: str = "cpu"
    blank: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    whitening: Whitening | None = None
    drift: Drift | None = None

    def __post_init__(self) -> None:
        reads = self.reads if self.drift is None else self.reads + self.reads_if_moved
        object.__setattr__(self, "settings", self.settings.part(*reads))

    def with_whitening(self, whitening: Whitening) -> Preprocessor:
        """Return a copy that whitens."""
        return replace(self, whitening=whitening)

    def with_drift(self, drift: Drift, settings: Settings) -> Preprocessor:
        """Return a copy that corrects the drift, for which it reads more of the settings."""
        return replace(self, drift=drift, settings=settings)

    @property
    def sampling_rate_hz(self) -> float:
        """Sampling rate of the recording."""
        return self.recording.sampling_rate_hz

    @property
    def probe(self) -> Probe:
        """The recording's probe."""
        if self.recording.probe is None:
            raise ProbeError(f"{self.recording.name} has no probe; give one to open_recording(…, probe=…).")
        return self.recording.probe

    @property
    def without_signal(self) -> NDArray[np.int64]:
        """Channels without signal (probe order): those dead in the file or, once known, those of the whitening."""
        return self.dead if self.whitening is None else self.whitening.dead

    def core(self, tile: Tile) -> slice:
        """The samples a tile owns, as a slice of its traces."""
        return slice(tile.halo, tile.halo + tile.stop - tile.start)

    def read_ahead(self, tiles: Sequence[Tile], folder: Place) -> Iterator[Tile]:
        """Yield the tiles of a task; while one is processed, the next one is read.

        `folder` is the one of the task's stage. If the run keeps traces, those that are kept beside it are not read
        from the recording, and the others are added to them.
        """
        at_hand = self._at_hand
        at_hand.folder = kept_traces.folder_for(folder)
        with ThreadPoolExecutor(1, "ks4stream-reader", hand_on, (listeners(),)) as reader:
            try:
                for tile, following in zip_longest(tiles, tiles[1:]):
                    if following is not None and not self._is_kept(following):
                        at_hand.ahead[following.index] = reader.submit(self._read, following)
                    yield tile
            finally:
                for tile in tiles:  # threads may share this object: others are left as they are
                    at_hand.ahead.pop(tile.index, None)

    @cached_property
    def _at_hand(self) -> _AtHand:
        return _AtHand()

    def _kept(self, tile: Tile) -> Path | None:
        """File for the referenced traces of a tile; None if they are not kept.

        Before the noise is known, other artifacts may be found in them.
        """
        folder = self._at_hand.folder
        return None if folder is None or self._noise is None else folder / f"{tile.index}.traces"

    def _is_kept(self, tile: Tile) -> bool:
        path = self._kept(tile)
        return path is not None and path.exists()

    def raw(self, tile: Tile) -> Tensor:
        """Traces of the file in the probe's channel order (c, t): scaled, shifted and inverted as the settings say."""
        reading = self._at_hand.ahead.pop(tile.index, None)
        samples = (reading.result() if reading else self._read(tile)).to(self.device, non_blocking=True)
        mapped = self._chan_map
        samples = (samples[:, mapped] if isinstance(mapped, slice) else samples.index_select(1, mapped)).T
        if self.recording.dtype == np.uint16:  # less 2¹⁵
            samples = samples ^ -(2**15)
        traces = samples.contiguous().float()  # three times as fast as .float().contiguous()
        if self.probe.n_channels == 1:
            traces = traces.clone()  # it may be a view of the recording, and artifacts are filled in place
        if samples.is_floating_point() and not bool(torch.isfinite(traces).all()):
            channel, sample = (~torch.isfinite(traces)).nonzero()[0].tolist()
            raise RecordingError(
                f"{self.recording.name}: channel {self.probe.chan_map[channel]} is not a number near sample "
                f"{tile.first + sample}. Replace such samples, or exclude them with tmin, tmax or bad_channels."
            )
        if self.settings.scale is not None:
            traces *= self.settings.scale
        if self.settings.shift is not None:
            traces += self.settings.shift
        return traces.neg_() if self.settings.invert_sign else traces

    def referenced(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Filtered, referenced and blanked traces (c, t), and a mask of the blanked samples (t,)."""
        path = self._kept(tile)
        if path is not None:
            traces, blank = torch.empty(self.probe.n_channels, tile.length), torch.empty(tile.length, dtype=torch.bool)
            if kept_traces.read(path, traces.numpy(), blank.numpy()):
                return traces, blank
        traces, blank, _ = self.measured(tile)
        if path is not None:
            kept_traces.write(path, traces.numpy(), blank.numpy())
        return traces, blank

    def measured(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the standard deviation of the noise (c,).

        It is the usual one in the recording or, before that is known, that of this tile.
        """
        raw, rate = self.raw(tile), self.sampling_rate_hz
        recorded = slice(max(self.tiling.start - tile.first, 0), min(self.tiling.stop - tile.first, tile.length))
        blank = self._dead_time(raw, recorded) | self._given_blank(tile)
        raw = artifact_kernels.fill(raw, blank)
        if bool(blank.all()):
            return raw, blank, torch.zeros(len(raw), device=raw.device) if self._noise is None else self._noise
        if self.settings.line_frequency:
            raw = self._without_hum(raw, recorded, blank)
        traces, medians = self._filtered(raw)
        noise = self._noise
        if noise is None:
            noise = artifact_kernels.noise_level(traces[:, recorded], raw[:, recorded], ~blank[recorded])
        size = artifact_kernels.sampled(traces, noise)
        for _ in range(artifact_kernels.MAX_ROUNDS):
            found = artifact_kernels.artifacts(
                traces,
                size,
                noise,
                self._windows,
                references=[(corrected, of) for (_, corrected), of in zip(self._groups, medians, strict=True)],
                threshold=self.settings.artifact_threshold,
                sampling_rate_hz=rate,
            )
            pops = artifact_kernels.pops(traces, size, noise, self._beside, sampling_rate_hz=rate)
            if not pops and not bool(found.any()):
                break
            blank |= artifact_kernels.widen(found, round(self.settings.artifact_margin * rate / 1000))
            for channel, mask in pops:
                artifact_kernels.fill(raw[channel : channel + 1], mask)
            del traces  # before others are allocated
            traces, medians = self._filtered(artifact_kernels.fill(raw, blank))  # without what the filter made of it
            size = artifact_kernels.sampled(traces, noise)
        blank |= artifact_kernels.loud(size, self._windows, blank)
        if bool(blank.any()):
            traces = traces.masked_fill_(blank, 0.0)
        return traces, blank, noise

    def _without_hum(self, raw: Tensor, recorded: slice, blank: Tensor) -> Tensor:
        """Raw traces (c, t) without mains hum; what was not recorded, and dead time (t,), has none."""
        kept = torch.zeros_like(blank)
        kept[recorded] = ~blank[recorded]
        raw = remove_hum(raw, kept, self.settings.line_frequency, self.sampling_rate_hz)
        return artifact_kernels.fill(raw, ~kept)

    def _dead_time(self, raw: Tensor, recorded: slice) -> Tensor:
        """Samples (t,) in which all channels hold their value.

        Beyond the crop's ends, that is the value of the last sample, which does not make it dead time.
        """
        blank = torch.zeros(raw.shape[1], dtype=torch.bool, device=raw.device)
        n_samples = round(DEAD_MS * self.sampling_rate_hz / 1000)
        blank[recorded] = artifact_kernels.repeated(raw[:, recorded], self._with_signal, n_samples)
        blank[: recorded.start], blank[recorded.stop :] = blank[recorded.start], blank[recorded.stop - 1]
        return blank

    def _given_blank(self, tile: Tile) -> Tensor:
        """Samples (t,) that are known to be unsortable."""
        mask = torch.zeros(tile.length, dtype=torch.bool, device=self.device)
        first, after = np.searchsorted(self.blank[:, 1], tile.first, "right"), tile.first + tile.length
        for start, stop in self.blank[first : np.searchsorted(self.blank[:, 0], after)].tolist():
            mask[max(start - tile.first, 0) : max(stop - tile.first, 0)] = True
        return mask

    def _filtered(self, raw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Filtered and referenced traces (c, t), and what was subtracted from each group of channels (t,)."""
        traces = kernels.highpass(raw, self._response)
        return traces, kernels.subtract_reference(traces, self._groups)

    def whitened(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Whitened traces (c, t), drift-corrected if the drift is known, and a mask of the blanked samples (t,)."""
        traces, blank = self.referenced(tile)
        moving = self.moving_matrix(tile)
        matrix = self._whitening if moving is None else moving @ self._whitening
        return kernels.local_product(matrix, traces), blank

    def moving_matrix(self, tile: Tile) -> Tensor | None:
        """The matrix (c, c) by which a tile's whitened traces are moved; None if they are not."""
        if self.drift is None or not np.any(self.drift.shift_um[tile.index]):
            return None
        matrix = self._moved_last.get(tile.index)  # it is asked for again when the traces are searched
        if matrix is None:
            matrix = self._drift_matrix(self.drift.shift_um[tile.index])
            self._moved_last.clear()
            self._moved_last[tile.index] = matrix
        return matrix

    @cached_property
    def _moved_last(self) -> dict[int, Tensor]:
        """Matrix of the last tile that was moved, by its index."""
        return {}

    def without_spikes(self, blank: Tensor, nt: int) -> Tensor:
        """Samples (t,) at which no spikes are looked for: blanked ones, and those a quarter of a waveform beside them.

        So much of a waveform that is left is enough to recognise it.
        """
        return artifact_kernels.widen(blank, nt // 4)

    def away_from_edges(self, tile: Tile, sample: Tensor, blank: Tensor, nt: int) -> Tensor:
        """Which spikes (n,) may count: at least `nt` samples from the ends of the crop, and away from blanks (t,)."""
        first, last = self.tiling.start - tile.first + nt, self.tiling.stop - tile.first - nt
        allowed = (sample >= first) & (sample < last)
        if bool(blank.any()):
            allowed &= ~self.without_spikes(blank, nt)[sample]
        return allowed

    def _drift_matrix(self, shift_um: NDArray[np.float32]) -> Tensor:
        """The matrix of section 4 between channels with a signal; rows and columns of dead channels are 0."""
        assert self.drift is not None
        at_channels = drift_kernels.shift_at(self.probe.y_um, self.drift.centre_um, shift_um)
        alive, mover = self._mover
        moving = mover.matrix(torch.from_numpy(at_channels).to(self.device)[alive])
        if len(alive) == self.probe.n_channels:
            return moving
        matrix = torch.zeros(self.probe.n_channels, self.probe.n_channels, device=self.device)
        matrix[alive[:, None], alive] = moving
        return matrix

    def interpolation(self) -> NDArray[np.float32]:
        """Kilosort4's ``iKxx``: the factor of the drift matrix that is the same for all shifts, (c, c)."""
        alive, mover = self._mover
        matrix = torch.zeros(self.probe.n_channels, self.probe.n_channels, device=self.device)
        matrix[alive[:, None], alive] = mover.inverse.float()
        return matrix.cpu().numpy()

    def _read(self, tile: Tile) -> Tensor:
        """A tile of the file, (time, channel in file), in pinned memory for a GPU; uint16 is viewed as int16."""
        samples = np.require(read_tile(self.recording, self.tiling, tile), requirements=("C", "W"))  # torch requires it
        tensor = torch.from_numpy(samples.view(np.int16) if samples.dtype == np.uint16 else samples)
        return tensor if self.device == "cpu" else tensor.pin_memory()

    @cached_property
    def _chan_map(self) -> slice | Tensor:
        """The probe's channels in the file; a slice, which needs no copy, if they are consecutive."""
        first, count = int(self.probe.chan_map[0]), self.probe.n_channels
        if np.array_equal(self.probe.chan_map, np.arange(first, first + count)):
            return slice(first, first + count)
        return torch.from_numpy(self.probe.chan_map.copy()).to(self.device)

    @cached_property
    def _response(self) -> Tensor:
        response = kernels.highpass_response(
            self.tiling.size + 2 * self.tiling.halo,
            sampling_rate_hz=self.recording.sampling_rate_hz,
            cutoff_hz=self.settings.highpass_cutoff,
        )
        return torch.from_numpy(response).to(self.device)

    @cached_property
    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        """Channels from which a reference is computed, and from which it is subtracted."""
        groups = geometry.reference_groups(self.probe, self.dead) if self.settings.do_CAR else []
        return [(torch.from_numpy(a).to(self.device), torch.from_numpy(b).to(self.device)) for a, b in groups]

    @cached_property
    def _with_signal(self) -> Tensor:
        """Channels that have a signal in the file."""
        return torch.from_numpy(np.setdiff1d(np.arange(self.probe.n_channels), self.dead)).to(self.device)

    @cached_property
    def _noise(self) -> Tensor | None:
        """Usual standard deviation of the noise (c,), if it is known."""
        known = None if self.whitening is None or not len(self.whitening.noise) else self.whitening.noise
        return None if known is None else torch.from_numpy(known).to(self.device)

    @cached_property
    def _windows(self) -> list[artifact_kernels.Window]:
        """Parts of the probe in which artifacts are told by how far they reach."""
        return [
            artifact_kernels.Window(*(torch.from_numpy(values).to(self.device) for values in window))
            for window in geometry.artifact_windows(self.probe, self.dead)
        ]

    @cached_property
    def _beside(self) -> Tensor:
        """The two channels nearest to each one (c, 2), or −1 if it does not have two within :data:`BESIDE_UM`."""
        probe = self.probe
        near = geometry.channel_neighbours(probe, 3, dead=self.without_signal)
        beside = np.full((probe.n_channels, 2), -1)
        for channel, others in enumerate(near):
            apart_um = geometry.distances_um(probe.positions_um[[channel]], probe.positions_um[others[1:]])[0]
            close = others[1:][apart_um <= BESIDE_UM]
            if len(close) == 2:
                beside[channel] = close
        return torch.from_numpy(beside).to(self.device)

    @cached_property
    def _mover(self) -> tuple[Tensor, kernels.Mover]:
        """Channels with a signal, and the :class:`Mover` for them."""
        assert self.whitening is not None
        alive = np.setdiff1d(np.arange(self.probe.n_channels), self.whitening.dead)
        positions_um, shank, index = (
            torch.from_numpy(values).to(self.device)
            for values in (self.probe.positions_um[alive], self.probe.shank[alive], alive)
        )
        return index, kernels.Mover(positions_um, shank, sigma_um=self.settings.sig_interp)

    @cached_property
    def _whitening(self) -> Tensor:
        assert self.whitening is not None, "whitened() needs a Whitening"
        return torch.from_numpy(self.whitening.matrix).to(self.device)


def read_tile(recording: Recording, tiling: Tiling, tile: Tile) -> NDArray[Any]:
    """Samples of a tile and its halo, (time, channel in file); the edge value is repeated beyond the crop's ends."""
    first, last = max(tile.first, tiling.start), min(tile.first + tile.length, tiling.stop)
    try:
        samples = recording.read(first, last)
    except Exception as error:
        error.add_note(f"Raised while reading batch {tile.index}, samples {first} to {last} of {recording.name}.")
        raise
    missing = (first - tile.first, tile.first + tile.length - last)
    return np.pad(samples, (missing, (0, 0)), mode="edge") if any(missing) else samples


def dead_channels(recording: Recording, probe: Probe, dead_in_file: list[int]) -> NDArray[np.int64]:
    """Indices (probe order) of the channels among those that are constant in the file."""
    dead = np.flatnonzero(np.isin(probe.chan_map, dead_in_file))
    if len(dead):
        warn(
            f"{recording.name}: channels {probe.chan_map[dead].tolist()} of the file have no signal and are left out.",
            BadChannelWarning,
        )
    return dead
