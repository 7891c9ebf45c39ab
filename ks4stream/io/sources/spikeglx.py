"""SpikeGLX recordings: a ``.bin``, or a ``.cbin`` made from one, with its ``.meta``."""

from __future__ import annotations

import numpy as np

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io.objects import name_of
from ks4stream.io.sources.base import File, Opened, delivered_dtype
from ks4stream.io.sources.binary import BinarySource
from ks4stream.io.sources.cbin import CbinSource
from ks4stream.io.spikeglx import find_meta, read_meta, warn_of_lf
from ks4stream.messages import warn
from ks4stream.probe import Probe

_DURATION_TOLERANCE = 0.01  # rates are later corrected by some ppm; a wrong number of channels has a larger effect


def opens(file: File) -> Opened | None:
    """Open a file by the ``.meta`` next to it."""
    path, n_chan, dtype = file.path, file.n_chan, file.dtype
    meta_path = find_meta(path)
    if meta_path is None:
        return None
    meta = read_meta(meta_path)
    if n_chan is not None and n_chan != meta.n_channels:
        raise RecordingError(
            f"n_chan={n_chan}, but {meta.path} says that {name_of(path)} has {meta.n_channels} channels. Leave n_chan "
            "out, or remove the .meta file if it belongs to another recording."
        )
    if dtype is not None and delivered_dtype(dtype, "dtype") != np.int16:
        raise RecordingError(f"dtype={dtype}, but SpikeGLX files hold int16 (found {meta.path}). Leave dtype out.")
    source: BinarySource | CbinSource
    if path.lower().endswith(".cbin"):
        source = CbinSource.open(path)
        Opened(source, name_of(path)).check(meta.n_channels, "int16")
    else:
        source = BinarySource.open(path, meta.n_channels, "int16")
    n_bytes = source.n_samples * source.n_channels * source.file_dtype.itemsize
    if meta.file_size_bytes not in (None, n_bytes):
        warn(f"{path} has {n_bytes} bytes, but {meta.path.name} says {meta.file_size_bytes}: was it copied completely?")
    n_expected = 0.0 if meta.duration_s is None else meta.duration_s * meta.sampling_rate_hz
    if meta.file_size_bytes == n_bytes and abs(source.n_samples - n_expected) > _DURATION_TOLERANCE * n_expected > 0:
        warn(
            f"{path} has {source.n_samples} samples of {source.n_channels} channels, but {meta.path.name} gives a "
            f"length of {meta.duration_s:g} s, which is {n_expected:.0f} samples at {meta.sampling_rate_hz:g} Hz: are "
            "its number of channels (nSavedChans) and its sampling rate correct?"
        )
    if meta.is_lf:
        warn_of_lf(path)

    def find_probe() -> Probe | None:
        try:
            return meta.probe()
        except ProbeError as error:  # the samples can be read, and another probe can be given
            warn(str(error))
            return None

    return Opened(
        source,
        name_of(path),
        (path,),
        meta.sampling_rate_hz,
        meta.gain_uv,
        None if meta.gain_uv is None else 0.0,
        find_probe,
        meta,
    )
