"""Traces as the stages see them, for people: filtered, referenced, whitened and drift-corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ks4stream.deploy import client_for
from ks4stream.engine import gpus
from ks4stream.errors import ProbeError, SettingsError
from ks4stream.io.recording_cache import cached_while_held
from ks4stream.motion import given_drift
from ks4stream.pipeline import find_peaks, layout
from ks4stream.recording import Recording
from ks4stream.resources import Resources
from ks4stream.results import Drift, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare, started
from ks4stream.stages.drift import EstimateDrift
from ks4stream.stages.preprocessing import Preprocessor, tiling_of
from ks4stream.stages.whitening import LearnWhitening

if TYPE_CHECKING:
    import xarray

ESTIMATE = "estimate"


def preprocess(
    recording: Recording,
    settings: Settings | None = None,
    *,
    whitening: Whitening | None = None,
    drift: Drift | str | Any | None = None,
    resources: Resources | None = None,
    **of_resources: Any,
) -> xarray.DataArray:
    """Return the traces that are sorted (filtered, referenced, whitened, drift-corrected) as a lazy array.

    Parameters
    ----------
    recording : Recording
        With a probe.
    settings : Settings, optional
    whitening : Whitening, optional
        That of a finished sorting (``sorting.whitening``); by default it is estimated now from some batches.
    drift : Drift, "estimate", xarray.DataArray or spikeinterface.core.Motion, optional
        That of a finished sorting (``sorting.drift``), or what :func:`ks4stream.sort` takes instead of an estimate, or
        "estimate" to estimate it now, which takes a pass over the whole recording; by default drift is not corrected.
    resources : Resources, optional
        As in :func:`ks4stream.sort`: `client` and `workers` are used to estimate what is not given; `device` is where
        traces are computed later. With a cache, samples that several batches share are fetched once; a cache in the
        temporary folder is kept until the array and everything derived from it are garbage-collected.
    **of_resources
        Any field of :class:`~ks4stream.Resources`.

    Returns
    -------
    xarray.DataArray of float32
        dims ``time, channel``, in standard deviations of the noise; one Dask chunk per batch. ``time`` counts
        samples of the recording, as spike times do; tmin and tmax limit its range. If whitening and drift are
        given (or drift is not corrected), nothing has been read yet.

    Raises
    ------
    RecordingError, ProbeError, SettingsError
        If the recording cannot be preprocessed, or `whitening` or `drift` belongs to another one.
    ResultsError
        If `cache_dir` cannot be created.

    Examples
    --------
    >>> traces = preprocess(  # doctest: +SKIP
    ...     recording, sorting.settings, whitening=sorting.whitening, drift=sorting.drift
    ... )
    >>> traces.sel(time=slice(spike - 20, spike + 40)).compute()  # doctest: +SKIP
    """
    from ks4stream.engine.lazy import whitened_traces

    if isinstance(drift, str) and drift != ESTIMATE:
        raise SettingsError(f"drift={drift!r} is not valid; give a Drift, {ESTIMATE!r}, or None for no correction.")
    recording, settings = Recording.given(recording), Settings.given(settings)
    resources = Resources.given(resources, of_resources)
    recording = cached_while_held(recording, resources.cache_dir, resources.cache_bytes)
    client = client_for(resources)
    device = gpus.chosen(resources.device, here=client in (None, "loop"))
    if whitening is None:
        tiles = prepare(recording, settings, device=device)
    else:
        tiles = Preprocessor(recording, tiling_of(recording, settings), settings, dead=whitening.dead, device=device)
        _check_whitening(tiles, whitening)
    is_estimated = isinstance(drift, str)
    given = None if drift is None or is_estimated else given_drift(drift, tiles)
    if whitening is None or is_estimated:
        tiles = _learned(tiles, settings, resources, whitening, client=client, with_drift=is_estimated)
    else:
        tiles = tiles.with_whitening(whitening)
    return whitened_traces(tiles if given is None else tiles.with_drift(given, settings))


def _learned(
    tiles: Preprocessor,
    settings: Settings,
    resources: Resources,
    whitening: Whitening | None,
    *,
    client: Any,
    with_drift: bool,
) -> Preprocessor:
    """Estimate the whitening, unless given, and the drift, if requested."""
    with started(tiles, settings, resources, None, client=client) as run:
        tiles = tiles.with_whitening(whitening or run.do(LearnWhitening(settings, tiles)))
        if not with_drift:
            return tiles
        _, peaks = find_peaks(run, tiles, settings, *layout(tiles, settings))
        return tiles.with_drift(run.do(EstimateDrift(settings, tiles, peaks)).drift, settings)


def _check_whitening(tiles: Preprocessor, whitening: Whitening) -> None:
    if len(whitening.matrix) != tiles.probe.n_channels:
        raise ProbeError(
            f"The given whitening is for {len(whitening.matrix)} channels, but {tiles.recording.name} has "
            f"{tiles.probe.n_channels} to be sorted. Give that of the same recording and probe, or none."
        )
