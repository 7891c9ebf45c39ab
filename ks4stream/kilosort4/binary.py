"""Kilosort4's readers of a recording, batch by batch: samples as they are stored, or preprocessed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.fft import next_fast_len

from ks4stream.blocks import Tile, Tiling
from ks4stream.engine import gpus
from ks4stream.errors import OpsError, RecordingError
from ks4stream.io.recordings import open_recording
from ks4stream.io.sources import ArraySource
from ks4stream.kernels.artifacts import Window
from ks4stream.kernels.preprocessing import FILTER_FLOOR
from ks4stream.kilosort4.ops import array, drift_of, probe_of
from ks4stream.probe import Probe
from ks4stream.recording import Recording, sliced
from ks4stream.results import Whitening
from ks4stream.settings import Settings
from ks4stream.stages.preprocessing import Preprocessor, read_tile, tiling_of

__all__ = ["BinaryFiltered", "BinaryRWFile"]

PathLike = str | os.PathLike[str]


class BinaryRWFile:
    """The samples of a recording as they are stored, from ``tmin`` to ``tmax``; it is not written to.

    Parameters
    ----------
    filename : path, or list of paths
        Anything that :func:`ks4stream.open_recording` opens; several files are joined in time. Not used with a
        `file_object`.
    n_chan_bin : int
        Number of channels in the file, sorted or not.
    fs : float
        Sampling rate, in Hz.
    NT : int
        Samples per batch.
    nt : int
        Samples that a batch is extended by on either side.
    nt0min : int
        Sample of the peak within a waveform; not used.
    device : str or torch.device, optional
        Where tensors are made; by default the GPU if this process sees one.
    write : bool
        Must be False.
    dtype : dtype-like, optional
        Type of the samples in the file; int16 by default.
    tmin, tmax : float
        Where reading begins and ends, in seconds.
    shift, scale : float, optional
        Samples are read as ``scale * sample + shift``.
    file_object : array-like, optional
        Samples to read instead of a file: anything with ``shape``, ``dtype`` and slices, (time, channel).
    batch_downsampling : int
        Only every n-th batch is a batch here.

    Attributes
    ----------
    recording : Recording
    imin, imax : int
        First sample, and the one after the last. As in a sort, the last batch is left out if it has fewer than `nt`
        samples.
    total_samples : int
        Number of samples in the file.
    n_batches : int

    Raises
    ------
    RecordingError
        If it cannot be opened, there is less than a waveform to read, or `write` is True.
    SettingsError
        If there is no such device.
    """

    def __init__(
        self,
        filename: PathLike | Sequence[PathLike] | None,
        n_chan_bin: int,
        fs: float = 30_000,
        NT: int = 60_000,
        nt: int = 61,
        nt0min: int = 20,
        device: str | torch.device | None = None,
        write: bool = False,
        dtype: DTypeLike | None = None,
        tmin: float = 0.0,
        tmax: float = math.inf,
        shift: float | None = None,
        scale: float | None = None,
        file_object: Any = None,
        batch_downsampling: int = 1,
    ) -> None:
        if write:
            raise RecordingError(_READ_ONLY)
        recording = _opened(filename, n_chan_bin, fs, dtype, file_object)
        tiling = Tiling.of(
            n_samples=recording.n_samples,
            size=NT,
            halo=nt,
            shortest=nt,
            start=round(tmin * fs),
            stop=None if math.isinf(tmax) else round(tmax * fs),
            step=batch_downsampling,
        )
        self._set(recording, tiling, nt, nt0min, gpus.chosen(device), filename)
        self.shift, self.scale = shift, scale

    def _set(self, recording: Recording, tiling: Tiling, nt: int, nt0min: int, device: str, filename: Any) -> None:
        self.recording, self.filename = recording, filename
        self.n_chan_bin, self.fs, self.dtype = recording.n_channels, recording.sampling_rate_hz, recording.dtype.name
        self.total_samples = recording.n_samples
        self.NT, self.nt, self.nt0min = tiling.size, nt, nt0min
        self.imin, self.imax = tiling.start, tiling.stop
        self.n_batches, self.batch_downsampling = len(tiling), tiling.step
        self.device = torch.device(device)
        self._tiling = replace(tiling, halo=nt)

    @property
    def n_samples(self) -> int:
        """Number of samples from ``imin`` to ``imax``."""
        return self.imax - self.imin

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples from ``imin`` to ``imax``, and of channels in the file."""
        return self.n_samples, self.n_chan_bin

    @property
    def size(self) -> int:
        """Number of samples of all channels together."""
        return self.n_samples * self.n_chan_bin

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, key: Any) -> Any:
        """Samples by (time, channel), as an array; time is counted from ``imin``."""
        return sliced(self._read, self.shape, self._read(0, 0).dtype, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RecordingError(_READ_ONLY)

    def padded_batch_to_torch(self, ibatch: int, return_inds: bool = False) -> Any:
        """Read a batch and `nt` samples on either side of it.

        Beyond the ends of what is sorted, the samples there are repeated, also to fill up the last batch.

        Parameters
        ----------
        ibatch : int
        return_inds : bool
            Also return where the batch lies.

        Returns
        -------
        X : Tensor of float32, shape (n_chan_bin, NT + 2 nt)
        inds : list of int
            Only if `return_inds` is True: first sample, and the one after the last, counted from the file's first,
            without the filling.

        Raises
        ------
        IndexError
            If there is no such batch.
        """
        tile = self._tile(ibatch)
        samples = self._scaled(read_tile(self.recording, self._tiling, tile)).astype(np.float32, copy=False)
        traces = torch.from_numpy(np.ascontiguousarray(samples.T)).to(self.device)
        return (traces, self._inds(tile)) if return_inds else traces

    def close(self) -> None:
        """Nothing need be closed: files are open only while something is read."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        """Describe it on one line."""
        return f"<{type(self).__name__} of {self.recording.name!r}: {self.n_batches} batches of {self.NT} samples>"

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        return self._scaled(self.recording.read(self.imin + start, self.imin + stop))

    def _scaled(self, samples: NDArray[Any]) -> NDArray[Any]:
        if samples.dtype == np.uint16:  # as in a sort
            samples = samples.astype(np.float32) - 2**15
        if self.scale is not None:
            samples = samples.astype(np.float32) * np.float32(self.scale)
        return samples if self.shift is None else samples.astype(np.float32) + np.float32(self.shift)

    def _tile(self, ibatch: int) -> Tile:
        try:
            return self._tiling[int(ibatch)]
        except IndexError:
            raise IndexError(f"There is no batch {ibatch}; {self.recording.name} has {self.n_batches}.") from None

    def _inds(self, tile: Tile) -> list[int]:
        return [tile.start - self.nt, tile.stop + self.nt]


class BinaryFiltered(BinaryRWFile):
    """The preprocessed traces of a recording, batch by batch.

    Traces are computed as in a sort, as far as the arguments say: channels selected, sign inverted, filtered,
    referenced, artifacts blanked, whitened, and moved back against the drift. A filter reaches into neighbouring
    batches. Where Kilosort4 differs: it filters each batch alone and after taking the reference, subtracts the mean of
    each channel in a batch, takes the lower of two middle values as their median, and blanks a whole batch for one
    artifact.

    Parameters
    ----------
    filename, n_chan_bin, fs, NT, nt, nt0min, device, dtype, tmin, tmax, shift, scale, file_object, batch_downsampling
        As for :class:`BinaryRWFile`.
    chan_map : array-like of int, optional
        Columns of the file to use, in this order; by default all.
    hp_filter : array-like, shape (n_taps,), optional
        Impulse response of the high-pass filter (``ops['fwav']``); None does not filter.
    whiten_mat : array-like, shape (n_channels, n_channels), optional
        ``ops['Wrot']``; None does not whiten.
    dshift : array-like, shape (n_batches, n_blocks), optional
        Drift in µm (``ops['dshift']``). To correct it, the positions of the contacts must be known, which are those of
        the ``ops`` that is given with each batch.
    do_CAR : bool
        Subtract the common median reference.
    artifact_threshold : float
        Blank all channels around samples that reach this.
    invert_sign : bool

    Attributes
    ----------
    tiles : Preprocessor
        What computes the traces.

    Raises
    ------
    RecordingError, SettingsError, ProbeError
        If the recording cannot be opened, or an argument is not valid.
    OpsError
        If matrix, drift and channels do not fit each other.
    """

    def __init__(
        self,
        filename: PathLike | Sequence[PathLike] | None,
        n_chan_bin: int,
        fs: float = 30_000,
        NT: int = 60_000,
        nt: int = 61,
        nt0min: int = 20,
        chan_map: ArrayLike | None = None,
        hp_filter: Any = None,
        whiten_mat: Any = None,
        dshift: Any = None,
        device: str | torch.device | None = None,
        do_CAR: bool = True,
        artifact_threshold: float | None = math.inf,
        invert_sign: bool = False,
        dtype: DTypeLike | None = None,
        tmin: float = 0.0,
        tmax: float = math.inf,
        shift: float | None = None,
        scale: float | None = None,
        file_object: Any = None,
        batch_downsampling: int = 1,
    ) -> None:
        settings = Settings(
            batch_size=NT,
            nt=nt,
            batch_downsampling=batch_downsampling,
            tmin=tmin,
            tmax=tmax,
            shift=shift,
            scale=scale,
            highpass_cutoff=0,
            artifact_threshold=math.inf if artifact_threshold is None else artifact_threshold,
            do_CAR=bool(do_CAR),
            invert_sign=bool(invert_sign),
        )
        recording = _opened(filename, n_chan_bin, fs, dtype, file_object)
        impulse = None if hp_filter is None else array(hp_filter, np.float64).ravel()
        whitening = None if whiten_mat is None else _whitening(array(whiten_mat, np.float32))
        channels = np.arange(n_chan_bin) if chan_map is None else array(chan_map, np.int64)
        if whitening is not None and len(whitening.matrix) != len(channels):
            raise OpsError(f"whiten_mat has {len(whitening.matrix)} channels, but chan_map has {len(channels)}.")
        tiling = tiling_of(recording, settings)
        tiles = _OfArguments(
            recording.with_probe(_without_positions(channels)),
            replace(tiling, halo=tiling.halo + _reach(impulse)),
            settings,
            dead=np.zeros(0, np.int64) if whitening is None else whitening.dead,
            device=gpus.chosen(device),
            whitening=whitening,
            impulse=impulse,
        )
        self._set(recording.with_probe(None), tiles.tiling, nt, nt0min, tiles.device, filename)
        self.shift, self.scale = shift, scale
        self.tiles: Preprocessor = tiles
        self.dshift = None if dshift is None else array(dshift, np.float32)
        if self.dshift is not None and len(self.dshift) != self.n_batches:
            raise OpsError(f"dshift has {len(self.dshift)} rows, but there are {self.n_batches} batches.")

    @classmethod
    def of(cls, tiles: Preprocessor, nt: int = 61, nt0min: int = 20) -> BinaryFiltered:
        """The traces that the stages of a sort see.

        Parameters
        ----------
        tiles : Preprocessor
            With whitening and drift, if they are known.
        nt : int
            Samples that a batch is extended by on either side.
        nt0min : int
            Sample of the peak within a waveform; not used.
        """
        found = cls.__new__(cls)
        found._set(tiles.recording, tiles.tiling, nt, nt0min, tiles.device, list(tiles.recording.files))
        found.shift, found.scale = tiles.settings.shift, tiles.settings.scale
        found.tiles, found.dshift = tiles, None if tiles.drift is None else tiles.drift.shift_um
        return found

    @property
    def chan_map(self) -> NDArray[np.int64]:
        """Columns of the file, (n_channels,)."""
        return self.tiles.probe.chan_map

    @property
    def whiten_mat(self) -> torch.Tensor | None:
        """The whitening matrix (n_channels, n_channels)."""
        whitening = self.tiles.whitening
        return None if whitening is None else torch.from_numpy(whitening.matrix.copy()).to(self.device)

    def padded_batch_to_torch(  # type: ignore[override]
        self, ibatch: int, ops: Mapping[str, Any] | None = None, return_inds: bool = False, skip_preproc: bool = False
    ) -> Any:
        """Traces of a batch and of `nt` samples on either side of it.

        Parameters
        ----------
        ibatch : int
        ops : mapping, optional
            Where contacts are, for the drift that the constructor was given.
        return_inds : bool
            Also return where the batch lies.
        skip_preproc : bool
            Neither filter nor whiten nor correct drift.

        Returns
        -------
        X : Tensor of float32, shape (n_channels, NT + 2 nt)
        inds : list of int
            As for :class:`BinaryRWFile`.

        Raises
        ------
        IndexError
            If there is no such batch.
        """
        tile = self.tiles.tiling[self._tile(ibatch).index]
        traces = _traces(self._with(ops, skip_preproc), tile)[:, tile.halo - self.nt :][:, : self.NT + 2 * self.nt]
        return (traces, self._inds(tile)) if return_inds else traces

    def __getitem__(self, key: Any) -> torch.Tensor:
        """Traces by (time, channel), not corrected for drift.

        Parameters
        ----------
        key : slice or int, or tuple of it and an index of the sorted channels
            Time is counted from ``imin``.

        Returns
        -------
        Tensor of float32, shape (n_channels, time)
        """

        def read(start: int, stop: int) -> NDArray[Any]:
            tiling = replace(self.tiles.tiling, size=stop - start, n_tiles=1, step=1)
            tile = Tile(0, self.imin + start, self.imin + stop, tiling.halo, tiling.size)
            tiles = replace(self.tiles, tiling=tiling, drift=None)
            found: NDArray[Any] = _traces(tiles, tile)[:, tiles.core(tile)].T.cpu().numpy()
            return found

        traces = sliced(read, (self.n_samples, len(self.chan_map)), np.dtype(np.float32), key)
        return torch.from_numpy(np.ascontiguousarray(traces.T)).to(self.device)

    def filter(
        self,
        X: torch.Tensor,
        ops: Mapping[str, Any] | None = None,
        ibatch: int | None = None,
        skip_preproc: bool = False,
    ) -> torch.Tensor:
        """Preprocess samples.

        Parameters
        ----------
        X : Tensor, shape (n_chan_bin, time)
            Samples, scaled and shifted.
        ops : mapping, optional
            As for :meth:`padded_batch_to_torch`.
        ibatch : int, optional
            The batch whose drift is corrected; by default none is.
        skip_preproc : bool
            As for :meth:`padded_batch_to_torch`.

        Returns
        -------
        Tensor of float32, shape (n_channels, time)
        """
        tiles, samples = self._with(ops, skip_preproc), np.ascontiguousarray(array(X, np.float32).T)
        drift = tiles.drift
        if drift is not None:
            rows = drift.shift_um[:0] if ibatch is None else drift.shift_um[ibatch : ibatch + 1]
            drift = replace(drift, shift_um=rows) if len(rows) else None
        tiling = Tiling(0, len(samples), size=len(samples), halo=tiles.tiling.halo, n_tiles=1)
        tiles = replace(
            tiles,
            recording=replace(tiles.recording, source=ArraySource(samples)),
            tiling=tiling,
            settings=_changed(tiles.settings, scale=None, shift=None),
            drift=drift,
        )
        return _traces(tiles, tiling[0])[:, tiles.core(tiling[0])]

    def cores(self, ops: Mapping[str, Any] | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Traces of all batches, one after the other.

        Parameters
        ----------
        ops : mapping, optional
            As for :meth:`padded_batch_to_torch`.

        Yields
        ------
        start : int
            First sample, counted from the file's first.
        traces : ndarray of float32, shape (time, n_channels)
        """
        tiles = self._with(ops, False)
        for tile in tiles.tiling:
            yield tile.start, _traces(tiles, tile)[:, tiles.core(tile)].T.cpu().numpy()

    def _with(self, ops: Mapping[str, Any] | None, skip_preproc: bool) -> Preprocessor:
        """The tiles, with the drift if an ``ops`` says where contacts are."""
        tiles = self.tiles
        if isinstance(tiles, _OfArguments) and ops is not None and self.dshift is not None and not skip_preproc:
            tiles = tiles.moving(self.dshift, ops)
        if not skip_preproc:
            return tiles
        tiles = replace(tiles, settings=_changed(tiles.settings, highpass_cutoff=0.0), whitening=None, drift=None)
        return replace(tiles, impulse=None) if isinstance(tiles, _OfArguments) else tiles


@dataclass(frozen=True, eq=False)
class _OfArguments(Preprocessor):
    """Tiles with a filter given by its impulse response, of contacts whose positions may not be known.

    Attributes
    ----------
    impulse : ndarray of float64, shape (n_taps,), or None
        Its middle is at ``n_taps // 2``.
    has_positions : bool
        Otherwise artifacts cannot be told by how far they reach.
    """

    impulse: NDArray[np.float64] | None = None
    has_positions: bool = False

    def moving(self, shift_um: NDArray[np.float32], ops: Mapping[str, Any]) -> _OfArguments:
        """The same for contacts at the positions of an ``ops``, with a drift."""
        known = dict(ops) | {"dshift": shift_um}
        return replace(
            self,
            recording=self.recording.with_probe(probe_of(known)),
            settings=_changed(self.settings, sig_interp=float(ops.get("sig_interp", Settings().sig_interp))),
            drift=drift_of(known),
            has_positions=True,
        )

    @cached_property
    def _response(self) -> torch.Tensor:
        n_fft = next_fast_len(self.tiling.size + 2 * self.tiling.halo, real=True)
        while n_fft % 2:
            n_fft = next_fast_len(n_fft + 1, real=True)
        if self.impulse is None:
            return torch.ones(n_fft // 2 + 1, device=self.device)
        lag = np.arange(len(self.impulse)) - len(self.impulse) // 2
        near = np.abs(lag) < n_fft // 2
        taps = np.zeros(n_fft)
        taps[lag[near]] = self.impulse[near]
        return torch.from_numpy(np.fft.rfft(taps).astype(np.complex64)).to(self.device)

    @cached_property
    def _windows(self) -> list[Window]:
        return super()._windows if self.has_positions else []

    @cached_property
    def _beside(self) -> torch.Tensor:
        beside: torch.Tensor = super()._beside
        return beside if self.has_positions else torch.full_like(beside, -1)


_READ_ONLY = "Recordings are only read here; numpy.ndarray.tofile writes a flat file."


def _opened(
    filename: PathLike | Sequence[PathLike] | None, n_chan: int, fs: float, dtype: DTypeLike | None, file_object: Any
) -> Recording:
    source = file_object
    if source is None:
        source = list(filename) if isinstance(filename, list | tuple) else filename
        if not source:
            raise RecordingError("Nothing to read: give filename or file_object.")
    return open_recording(source, n_chan=n_chan, fs=fs, dtype=dtype)


def _changed(settings: Settings, **changes: Any) -> Settings:
    """A part of the settings with some values changed, as settings; batches are those of the tiling."""
    values = {name: value for name, value in vars(settings).items() if name != "batch_size"}
    return Settings(**values | changes)


def _traces(tiles: Preprocessor, tile: Tile) -> torch.Tensor:
    return (tiles.referenced(tile) if tiles.whitening is None else tiles.whitened(tile))[0]


def _whitening(matrix: NDArray[np.float32]) -> Whitening:
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1]:
        raise OpsError(f"whiten_mat has shape {matrix.shape}; it must be (n_channels, n_channels).")
    return Whitening(matrix=matrix, dead=np.flatnonzero(~matrix.any(axis=1)))


def _without_positions(chan_map: NDArray[np.int64]) -> Probe:
    """Contacts on one shank; where they are does not matter to what is computed."""
    n_channels = len(chan_map)
    positions_um = np.column_stack([np.zeros(n_channels), 20.0 * np.arange(n_channels)])
    return Probe.from_positions(positions_um, chan_map=chan_map)


def _reach(impulse: NDArray[np.float64] | None) -> int:
    """Lag in samples beyond which an impulse response is below :data:`FILTER_FLOOR`."""
    if impulse is None or not (strong := np.flatnonzero(np.abs(impulse) >= FILTER_FLOOR)).size:
        return 0
    return int(np.abs(strong - len(impulse) // 2).max())
