"""Traces as the stages see them, for people: filtered, referenced, whitened and moved back."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ks4stream import geometry
from ks4stream.engine import gpus, one_thread
from ks4stream.errors import ProbeError, RecordingError, SettingsError
from ks4stream.io.tile_cache import cached_while_held
from ks4stream.recording import Recording
from ks4stream.results import Drift, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import SortRun, client_for, engine_for, prepare, run_store
from ks4stream.stages import drift as drift_stage
from ks4stream.stages import preprocessing
from ks4stream.stages.preprocessing import Preprocessor

if TYPE_CHECKING:
    import torch
    import xarray

ESTIMATE = "estimate"


def preprocess(
    recording: Recording,
    settings: Settings | None = None,
    *,
    whitening: Whitening | None = None,
    drift: Drift | str | None = None,
    do_CAR: bool | None = None,
    invert_sign: bool | None = None,
    device: str | torch.device | None = None,
    client: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> xarray.DataArray:
    """Filter, reference and whiten a recording, and undo its drift, lazily: the traces that are sorted.

    Parameters
    ----------
    recording : Recording
        With a probe.
    settings : Settings, optional
    whitening : Whitening, optional
        Of a finished sorting (``sorting.whitening``); by default learned now, from a sample of the batches.
    drift : Drift or "estimate", optional
        Of a finished sorting (``sorting.drift``), or estimated now, which is a pass over the whole recording; by
        default traces are not moved.
    do_CAR, invert_sign : bool, optional
        In place of those of the settings. Of a finished sorting, ``sorting.settings`` has them.
    device
        As in :func:`ks4stream.sort`.
    client : distributed.Client or str, optional
        Where to learn what is not given, as in :func:`ks4stream.sort`. Where traces are computed later is Dask's
        business as with any lazy array.
    cache_dir : path, optional
        Where the recording is kept, so that samples which several batches see are fetched once: by default in the
        temporary folder if it lies on an object store, until the array and all that was made of it are garbage, and
        not at all otherwise. In a folder given here it stays; "off" keeps it nowhere.

    Returns
    -------
    xarray.DataArray of float32
        dims ``time, channel``, in multiples of the noise's standard deviation; one Dask chunk per batch. ``time`` is
        the sample of the recording, as spike times are; with tmin and tmax it is that of the crop. If whitening and
        drift are given (or no drift is wanted) nothing has been read yet.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
        If the recording cannot be preprocessed, or what is given belongs to another one.
    ResultsError
        If `cache_dir` cannot be made.

    Examples
    --------
    >>> traces = preprocess(  # doctest: +SKIP
    ...     recording, sorting.settings, whitening=sorting.whitening, drift=sorting.drift
    ... )
    >>> traces.sel(time=slice(spike - 20, spike + 40)).compute()  # doctest: +SKIP
    """
    from ks4stream.engine.lazy import whitened_traces

    if isinstance(drift, str) and drift != ESTIMATE:
        raise SettingsError(f"drift={drift!r} is unknown; give a Drift, {ESTIMATE!r}, or None for none.")
    settings = (settings or Settings()).for_recording(recording).given(do_CAR=do_CAR, invert_sign=invert_sign)
    recording = cached_while_held(recording, cache_dir)
    client, device_given = client_for(client), device is not None
    device = gpus.chosen(device, here=client in (None, "loop"))
    if whitening is None:
        source = prepare(recording, settings, device=device)
    else:
        tiling = preprocessing.tiling_of(recording, settings)
        source = Preprocessor(recording, tiling, settings, dead=whitening.dead, device=device)
        _check_whitening(source, whitening)
    if isinstance(drift, Drift):
        _check_drift(source, drift)
    if whitening is None or drift == ESTIMATE:
        source = _learned(source, whitening, drift == ESTIMATE, client, device_given)
    else:
        source = source.with_results(whitening=whitening)
    return whitened_traces(source.with_results(drift=drift) if isinstance(drift, Drift) else source)


def _learned(
    source: Preprocessor, whitening: Whitening | None, with_drift: bool, client: Any, device_given: bool
) -> Preprocessor:
    """Learn the whitening, unless given, and the drift, if wanted."""
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        store = stack.enter_context(run_store(source, None, fresh=True))
        run = SortRun(source, stack.enter_context(engine_for(source, client, device_given=device_given)), store, None)
        source = source.with_results(whitening=whitening or run.learn_whitening(source))
        if not with_drift:
            return source
        centres = geometry.template_centres(source.probe, source.settings)
        regions = geometry.clustering_regions(centres, source.settings)
        peaks = run.detect(source, centres, regions, run.learn_waveforms(source))
        moved, _ = drift_stage.combine(source, peaks)
        return source.with_results(drift=moved)


def _check_whitening(source: Preprocessor, whitening: Whitening) -> None:
    if len(whitening.matrix) != source.probe.n_channels:
        raise ProbeError(
            f"The whitening given is for {len(whitening.matrix)} channels, but {source.recording.name} has "
            f"{source.probe.n_channels} to be sorted. Give that of the same recording and probe, or none."
        )


def _check_drift(source: Preprocessor, drift: Drift) -> None:
    if len(drift.shift_um) != len(source.tiling):
        raise RecordingError(
            f"The drift given is for {len(drift.shift_um)} batches, but {source.recording.name} has "
            f"{len(source.tiling)} of batch_size={source.tiling.size}. Give that of the same recording and settings "
            "(batch_size, batch_downsampling, tmin, tmax), or drift='estimate'."
        )
