"""Results of the stages: frozen values, each array declared once with its axes, dtype and unit.

Axis names follow the legend in :mod:`ks4stream.kernels`. Arrays are NumPy (results are sent between processes
and written to files); kernels convert them to tensors on their device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.blocks import Tiling
from ks4stream.labels import Trains, reasons
from ks4stream.probe import Probe
from ks4stream.recording import FlatFile
from ks4stream.settings import Settings

if TYPE_CHECKING:
    import xarray

Array = NDArray[Any]


def _array(dims: tuple[str, ...], dtype: str, unit: str, doc: str, **default: Any) -> Any:
    """Declare one array of a result; `default` is as for :func:`dataclasses.field`."""
    return field(metadata={"dims": dims, "dtype": dtype, "unit": unit, "doc": doc}, **default)


class Checked:
    """A result that converts its arrays to the declared dtype and rejects a wrong number of dimensions."""

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]
            if "dims" not in spec.metadata:
                continue
            value = np.asarray(getattr(self, spec.name)).astype(spec.metadata["dtype"], copy=False)
            if value.ndim != len(spec.metadata["dims"]):
                raise TypeError(
                    f"{type(self).__name__}.{spec.name} has shape {value.shape}, but its axes are "
                    f"({', '.join(spec.metadata['dims'])})."
                )
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True, eq=False)
class Whitening(Checked):
    """How channels are decorrelated (section 1)."""

    matrix: Array = _array(("c", "c"), "float32", "1/file unit", "row: whitened channel, column: input channel")
    dead: Array = _array(("dead",), "int64", "", "channels without signal (probe order); their rows and columns are 0")
    n_batches: int = 0
    noise: Array = _array(
        ("c_known",),
        "float32",
        "file unit",
        "usual s.d. of the noise of each channel after filter and reference; empty if it is not known",
        default_factory=lambda: np.zeros(0, np.float32),
    )


@dataclass(frozen=True, eq=False)
class Waveforms(Checked):
    """Universal waveforms (section 2)."""

    components: Array = _array(("q", "w"), "float32", "", "wPCA: orthonormal rows")
    shapes: Array = _array(("p", "w"), "float32", "", "wTEMP: unit-norm rows")
    n_snippets: int = 0
    threshold: float = 0.0


@dataclass(frozen=True, eq=False)
class Drift(Checked):
    """How traces are moved along the probe to correct drift (section 4); the tissue moved the other way."""

    shift_um: Array = _array(
        ("b", "g"), "float32", "µm", "correction of each batch; positive: traces move to larger depth"
    )
    centre_um: Array = _array(("g",), "float32", "µm", "depth of the segment centres (yblk)")
    error_um: Array = _array(
        ("b_known", "g_known"),
        "float32",
        "µm",
        "half the difference between estimates from even and from odd peaks; empty if it is not known",
        default_factory=lambda: np.zeros((0, 0), np.float32),
    )


@dataclass(frozen=True, eq=False)
class PeakSample(Checked):
    """A bounded, evenly thinned subset of the first pass's peaks, of those detected in all batches; for plots only."""

    sample: Array = _array(("n",), "int64", "samples", "time, counted from the start of the recording")
    depth_um: Array = _array(("n",), "float32", "µm", "depth along the probe")
    score: Array = _array(("n",), "float32", "noise s.d.", "detection score")
    shank: Array = _array(
        ("n_known",), "int64", "", "of each; empty if it is not known", default_factory=lambda: np.zeros(0, np.int64)
    )


@dataclass(frozen=True, eq=False)
class Templates(Checked):
    """Learned templates, with which spikes are matched, in the space of the waveform components (section 5)."""

    features: Array = _array(
        ("v", "c", "q"), "float32", "noise s.d.", "mean of each cluster of peaks, completed (section 5.4)"
    )
    count: Array = _array(("v",), "float64", "spikes", "number of peaks it represents")
    spread: Array = _array(("v",), "float32", "noise s.d.", "standard deviation of their scores")


@dataclass(frozen=True, eq=False)
class Diagnostics(Checked):
    """What happened on the way, for the report: no result depends on it.

    Attributes
    ----------
    counts : dict of int
        Numbers of peaks, templates, spikes …, by what they are.
    left_out : dict of (int, int)
        Numbers of clusters that are no units, and of their spikes, by reason.
    """

    edge: Array = _array(
        ("k_edge",),
        "int64",
        "samples",
        "first sample of each span of time, and the one after the last",
        default_factory=lambda: np.zeros(1, np.int64),
    )
    noise: Array = _array(
        ("k", "c"),
        "float32",
        "usual noise s.d.",
        "root mean square of whitened traces without spikes; about 1 if they are as loud as usual",
        default_factory=lambda: np.zeros((0, 0), np.float32),
    )
    explained: Array = _array(
        ("k",),
        "float32",
        "",
        "share of the energy of whitened traces, noise included, that spikes explain",
        default_factory=lambda: np.zeros(0, np.float32),
    )
    isolation: Array = _array(
        ("u_known",),
        "float64",
        "",
        "share of the nearest neighbours of the spikes of a unit and of another near it that are of the same unit; "
        "the least over the others, NaN for a unit with few spikes; empty if it is not known",
        default_factory=lambda: np.zeros(0),
    )
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Inputs and software of a sorting: with settings, what it takes to reproduce it on such a processor.

    Attributes
    ----------
    ks4stream, torch, numpy, scipy, python : str
        Versions.
    method : int
        Version of the method, raised whenever a change alters any result.
    device : str
        Kind of device the kernels ran on: "cpu", "cuda".
    recording : str
        The recording's name.
    recording_digest : str
        Its :meth:`~ks4stream.recording.Recording.digest` when the sort began.
    digest_is_exact : bool
        Whether any change of the samples changes the digest; False if it covers only some of them.
    """

    ks4stream: str = ""
    torch: str = ""
    numpy: str = ""
    scipy: str = ""
    method: int = 0
    device: str = ""
    recording: str = ""
    recording_digest: str = ""
    digest_is_exact: bool = False
    python: str = ""


@dataclass(frozen=True, eq=False)
class Sorting(Checked):
    """A finished sorting: spikes sorted by (time, unit), and the units they belong to.

    Duplicates are included; `kept` is False for them. Times are counted from the start of the recording,
    whatever ``tmin`` is.
    """

    sampling_rate_hz: float
    sample: Array = _array(("n",), "int64", "samples", "spike time (peak of the waveform)")
    unit: Array = _array(("n",), "int32", "", "final unit, 0 … n_units−1")
    template: Array = _array(("n",), "int32", "", "learned template that found the spike")
    score: Array = _array(("n",), "float32", "noise s.d.", "score of matching (section 8.1)")
    features: Array = _array(("n", "j", "q"), "float32", "noise s.d.", "on channels `template_channels[template]`")
    kept: Array = _array(("n",), "bool", "", "False for duplicates")
    x_um: Array = _array(("n",), "float32", "µm", "position across the probe")
    y_um: Array = _array(("n",), "float32", "µm", "position along the probe")
    template_channels: Array = _array(
        ("v", "j"),
        "int64",
        "",
        "channels of features, per learned template; nearest first, padded with −1 (features there are 0)",
    )
    unit_features: Array = _array(("u", "c", "q"), "float32", "noise s.d.", "Wall: final template of each unit")
    similarity: Array = _array(("u", "u"), "float32", "", "largest correlation over lags, diagonal 1")
    refractory: Array = _array(("u",), "bool", "", "at least 11 spikes, R < acg_threshold and Q < 0.2 (section 7.2)")
    contamination: Array = _array(("u",), "float64", "", "est_contam_rate")
    settings: Settings = field(default_factory=Settings)
    probe: Probe | None = None
    whitening: Whitening | None = None
    waveforms: Waveforms | None = None
    drift: Drift | None = None
    peaks: PeakSample | None = None
    artifacts: Array = _array(
        ("span", "edge"),
        "int64",
        "samples",
        "first sample of each blanked span, and the sample after its last",
        default_factory=lambda: np.zeros((0, 2), np.int64),
    )
    n_samples: int = 0
    tiling: Tiling = Tiling(start=0, stop=0, size=1, halo=0, n_tiles=0)  # how time was divided into batches
    files: tuple[str, ...] = ()
    flat_files: tuple[FlatFile, ...] | str = "it is not known where the samples are stored"  # or why there are none
    dtype: str = "int16"  # of the samples as they were read
    n_chan_file: int = 0
    gain_uv: float | None = None  # µV per unit of the file, the same for all sorted channels; None if unknown
    provenance: Provenance = Provenance()
    seconds: dict[str, float] = field(default_factory=dict)  # wall time per stage
    recalled: dict[str, tuple[int, int]] = field(default_factory=dict)  # tasks of an earlier run, and all, per stage
    n_workers: int = 0  # number of tasks at a time; 0 if it is not known
    memory_bytes: int = 0  # peaks of the calling process and of the workers that it started, in all; 0: not known
    diagnostics: Diagnostics | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def label_reasons(self) -> tuple[str, ...]:
        """Why each unit is not labelled good, or "" if it is (section 7.3): shape (u,)."""
        return reasons(
            Trains(
                sample=self.sample,
                unit=self.unit,
                kept=self.kept,
                refractory=self.refractory,
                contamination=self.contamination,
                acg_threshold=self.settings.acg_threshold,
                artifacts=self.artifacts,
                tiling=self.tiling,
                sampling_rate_hz=self.sampling_rate_hz,
            )
        )

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which units are labelled good: shape (u,)."""
        return np.array([not reason for reason in self.label_reasons], np.bool_)

    @property
    def n_units(self) -> int:
        """Number of final units."""
        return len(self.contamination)

    @property
    def n_channels(self) -> int:
        """Number of channels that are sorted."""
        return int(self.unit_features.shape[1]) if self.probe is None else self.probe.n_channels

    @property
    def n_spikes(self) -> int:
        """Number of spikes, duplicates included."""
        return len(self.sample)

    def to_dataset(self) -> xarray.Dataset:
        """View the sorting as an :class:`xarray.Dataset`, without copying; mapped arrays stay mapped.

        Returns
        -------
        xarray.Dataset
            Variables by their names here, along spike, unit, channel, sample …
            Those of spikes have the prefix ``spike_`` (``spike_unit``, as ``unit`` is an axis), those of nested
            results the result's name (``drift_shift_um``). Attributes give unit and meaning. If a matrix has the same
            axis twice, the second is called ``other_unit`` and so on. Features that were not loaded are left out.
        """
        from ks4stream.exchange import to_dataset

        return to_dataset(self)

    def to_spikeinterface(self, recording: Any = None, *, keep_good_only: bool = False) -> Any:
        """Make a SpikeInterface sorting of the kept spikes.

        Parameters
        ----------
        recording : spikeinterface.core.BaseRecording, optional
            The recording that was sorted. It gives the segments and the channels' ids, and is registered with the
            sorting. Without it there is one segment, and channels are called by their column in the file.
        keep_good_only : bool
            Leave out units whose label is "mua".

        Returns
        -------
        spikeinterface.core.NumpySorting
            Unit ids are those of `unit`. Times are samples of their segment; spikes whose waveform lies on both sides
            of a border between segments are left out. Properties of units: ``KSLabel``, ``ContamPct`` and ``Amplitude``
            as in the Phy folder; ``main_channel_id`` and ``main_channel_index`` (column in the file), of the largest
            peak to peak; its ``shank``; ``x_um``, ``y_um`` and ``depth`` (again y), the mean of the spikes' positions;
            ``template``, whitened, in multiples of the noise's standard deviation, (unit, sample, slot), on
            ``template_channel_ids``, (unit, slot): the `nearest_chans` channels where it is largest, the main one
            first.

        Raises
        ------
        MissingDependencyError
            If SpikeInterface is not installed, or is too old.
        RecordingError, ProbeError
            If it is not the recording that was sorted.
        """
        from ks4stream.exchange import to_spikeinterface

        return to_spikeinterface(self, recording, keep_good_only=keep_good_only)

    def to_motion(self, recording: Any = None) -> Any:
        """The drift as SpikeInterface's ``Motion``.

        Parameters
        ----------
        recording : spikeinterface.core.BaseRecording, optional
            The recording that was sorted, which gives the segments and when they start; without it there is one
            segment that starts at 0 s.

        Returns
        -------
        spikeinterface.core.Motion
            One bin per batch and depth. Its displacement is that of the tissue, so it has the opposite sign of
            ``drift.shift_um``.

        Raises
        ------
        MissingDependencyError
            If SpikeInterface is not installed, or is too old.
        ResultsError
            If the sorting has no drift.
        RecordingError, ProbeError
            If it is not the recording that was sorted.
        """
        from ks4stream.exchange import to_motion

        return to_motion(self, recording)
