"""The user's choices: every parameter of the method, declared once.

The names are Kilosort4's. Each field carries its default, bounds, unit, one line of documentation and the group it is
listed in; the command line, the checks and the documentation are generated from them. Stages declare which settings, or
whole groups of them, they read. Properties of the recording (its sampling rate, its number of channels) are not
settings, and neither is where the computation runs (:class:`~ks4stream.Resources`), which never changes a result.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import wraps
from typing import Any, TypeVar

from ks4stream.errors import SettingsError

Class = TypeVar("Class", bound=type)

OF_RECORDING = {"n_chan_bin": "n_chan", "fs": "fs"}
"""Settings of Kilosort4 that belong to the recording, and what ``open_recording`` calls them."""

AUTO = "auto"
"""Value of a setting that follows from the recording."""

UNLIMITED = ("tmax", "artifact_threshold", "max_channel_distance", "position_limit")
"""Settings that may be infinite: they are limits, and there is then none."""


def _setting(
    default: Any,
    doc: str,
    *,
    group: str,
    kind: type = float,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    unit: str = "",
    optional: bool = False,
    if_none: str = "",
    kilosort4: float | None = None,
) -> Any:
    """Declare one field of :class:`Settings`.

    Bounds are ``ge <= value``, ``gt < value`` and ``value <= le``; `if_none` says what the default None stands for.
    With `kilosort4`, Kilosort4's default, the value may be :data:`AUTO`, and is that by default.
    """
    return field(
        default=default,
        metadata={
            "doc": doc,
            "group": group,
            "kind": kind,
            "ge": ge,
            "gt": gt,
            "le": le,
            "unit": unit,
            "optional": optional,
            "if_none": if_none,
            "kilosort4": kilosort4,
        },
    )


def _refuses_unknown_names(cls: Class) -> Class:
    """Make a dataclass reject unknown keywords and suggest the name that was probably meant."""
    initialize, known = cls.__init__, {spec.name for spec in fields(cls)}  # type: ignore[misc]

    @wraps(initialize)
    def checked(self: Any, **values: Any) -> None:
        for name in values:
            if name in OF_RECORDING:
                raise SettingsError(
                    f"{name} belongs to the recording and is not a setting: open_recording(…, {OF_RECORDING[name]}=…)."
                )
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *OF_RECORDING], n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known settings: {', '.join(sorted(known))}."
                raise SettingsError(f"Unknown setting {name!r}.{hint}")
        initialize(self, **values)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_refuses_unknown_names
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that changes the result of a sort; frozen, and checked on construction.

    Names are Kilosort4's, and so are defaults, except for ``Th_universal``, ``Th_learned`` and ``nblocks``; those of
    Kilosort4 are given by :meth:`like_kilosort4`.

    Raises
    ------
    SettingsError
        If a name is unknown (the nearest known one is suggested), a value has the wrong type or lies outside its
        bounds, or two values contradict each other.
    """

    # -- recording -----------------------------------------------------------------------------------
    batch_size: int = _setting(
        60000,
        "Length of a batch, for which one drift is estimated; at least 4·nt.",
        group="recording",
        kind=int,
        ge=1,
        unit="samples",
    )
    batch_downsampling: int = _setting(1, "Sort only every n-th batch.", group="recording", kind=int, ge=1)
    tmin: float = _setting(0.0, "Time at which sorting begins.", group="recording", ge=0, unit="s")
    tmax: float = _setting(math.inf, "Time at which sorting ends.", group="recording", gt=0, unit="s")
    scale: float | None = _setting(
        None, "Factor applied to the traces as they are read.", group="recording", optional=True
    )
    shift: float | None = _setting(None, "Offset added to the traces after scaling.", group="recording", optional=True)
    invert_sign: bool = _setting(False, "Invert the sign of the traces.", group="recording", kind=bool)
    # -- preprocessing -------------------------------------------------------------------------------
    highpass_cutoff: float = _setting(300.0, "Cutoff of the high-pass filter.", group="preprocessing", ge=0, unit="Hz")
    do_CAR: bool = _setting(True, "Subtract the common median reference.", group="preprocessing", kind=bool)
    artifact_threshold: float = _setting(
        math.inf,
        "Blank all channels around samples that reach this after filtering, in units of the file.",
        group="preprocessing",
        ge=0,
    )
    line_frequency: float = _setting(
        0.0,
        "Subtract mains hum of this frequency and its harmonics; 0: do not.",
        group="preprocessing",
        ge=0,
        unit="Hz",
    )
    artifact_margin: float = _setting(
        0.25, "Also blank this much before and after an artifact.", group="preprocessing", ge=0, le=10, unit="ms"
    )
    # -- whitening -----------------------------------------------------------------------------------
    whitening_range: int = _setting(
        32, "Number of nearest channels used to whiten a channel.", group="whitening", kind=int, ge=1
    )
    nskip: int = _setting(
        25, "Estimate the whitening from every n-th batch.", group="whitening", kind=int, ge=1, unit="batches"
    )
    # -- waveforms -----------------------------------------------------------------------------------
    nt: int = _setting(61, "Length of a waveform; odd.", group="waveforms", kind=int, ge=1, unit="samples")
    nt0min: int | None = _setting(
        None,
        "Sample of the peak within a waveform.",
        group="waveforms",
        kind=int,
        ge=0,
        unit="samples",
        optional=True,
        if_none="int(20·nt/61)",
    )
    n_templates: int = _setting(6, "Number of universal waveforms.", group="waveforms", kind=int, ge=1)
    n_pcs: int = _setting(6, "Number of principal components of the waveforms.", group="waveforms", kind=int, ge=1)
    templates_from_data: bool = _setting(
        True,
        "Learn the universal waveforms from the recording; False uses those that come with ks4stream.",
        group="waveforms",
        kind=bool,
    )
    Th_single_ch: float = _setting(
        6.0, "Single-channel threshold for learning waveforms.", group="waveforms", gt=0, unit="noise s.d."
    )
    # -- detection -----------------------------------------------------------------------------------
    Th_universal: float | str = _setting(
        AUTO,
        "Threshold of detection with universal templates; auto: 9, in some batches 6.5, to learn small templates.",
        group="detection",
        gt=0,
        unit="noise s.d.",
        kilosort4=9.0,
    )
    dmin: float | None = _setting(
        None,
        "Twice the vertical spacing of template centres.",
        group="detection",
        gt=0,
        unit="µm",
        optional=True,
        if_none="median contact spacing",
    )
    dminx: float = _setting(32.0, "Twice the lateral spacing of template centres.", group="detection", gt=0, unit="µm")
    min_template_size: float = _setting(
        10.0, "Width of the smallest spatial Gaussian.", group="detection", gt=0, unit="µm"
    )
    template_sizes: int = _setting(5, "Number of spatial sizes.", group="detection", kind=int, ge=1)
    nearest_chans: int = _setting(10, "Number of channels per template centre.", group="detection", kind=int, ge=1)
    nearest_templates: int = _setting(
        100, "Number of neighbouring centres among which a peak must be the largest.", group="detection", kind=int, ge=1
    )
    max_channel_distance: float = _setting(
        32.0, "Largest distance of a template centre from the nearest contact.", group="detection", ge=1, unit="µm"
    )
    # -- drift ---------------------------------------------------------------------------------------
    nblocks: int | str = _setting(
        AUTO,
        "Depth blocks of the drift estimate (2n − 1 overlapping segments): 1 is rigid, 0 turns it off; auto: chosen "
        "by comparing the estimates from two halves of the peaks.",
        group="drift",
        kind=int,
        ge=0,
        kilosort4=1,
    )
    binning_depth: float = _setting(
        5.0, "Size of the depth bins of the drift estimate.", group="drift", gt=0, unit="µm"
    )
    sig_interp: float = _setting(
        20.0, "Width of the interpolation that corrects drift.", group="drift", gt=0, unit="µm"
    )
    drift_smoothing: tuple[float, float, float] = _setting(
        (0.5, 0.5, 0.5), "Smoothing of the drift estimate over shift, batch and segment.", group="drift", kind=tuple
    )
    # -- matching ------------------------------------------------------------------------------------
    Th_learned: float | str = _setting(
        AUTO,
        "Threshold of matching with learned templates; auto: for each template, from the data.",
        group="matching",
        gt=0,
        unit="noise s.d.",
        kilosort4=8.0,
    )
    max_peels: int = _setting(
        100, "Maximum number of rounds of matching pursuit.", group="matching", kind=int, ge=1, le=10_000
    )
    # -- clustering ----------------------------------------------------------------------------------
    cluster_neighbors: int = _setting(
        10, "Number of landmarks each spike is linked to.", group="clustering", kind=int, ge=2
    )
    cluster_downsampling: int = _setting(
        20, "One spike in n is a landmark, but at least 500 per region.", group="clustering", kind=int, ge=1
    )
    max_cluster_subset: int | None = _setting(
        25_000, "Maximum number of landmarks per region.", group="clustering", kind=int, ge=1, optional=True
    )
    x_centers: int | None = _setting(
        None,
        "Number of columns of clustering regions.",
        group="clustering",
        kind=int,
        ge=1,
        optional=True,
        if_none="one per 200 µm of width",
    )
    cluster_init_seed: int = _setting(5, "Random seed of the clustering.", group="clustering", kind=int, ge=1)
    acg_threshold: float = _setting(
        0.2,
        "Largest contamination (rate of refractory violations relative to chance) of a good unit.",
        group="clustering",
        gt=0,
    )
    ccg_threshold: float = _setting(
        0.25, "Largest rate of coincidences of a merged pair, relative to chance.", group="clustering", gt=0
    )
    # -- results -------------------------------------------------------------------------------------
    duplicate_spike_ms: float = _setting(
        0.25, "Spikes of one unit closer than this are duplicates.", group="results", ge=0, unit="ms"
    )
    position_limit: float = _setting(
        100.0, "Largest distance of the channels used to locate a spike.", group="results", ge=0, unit="µm"
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        if self.nt % 2 == 0:
            raise SettingsError(
                f"nt={self.nt} is even; a waveform must have an odd number of samples, so that it has a centre. "
                f"Use {self.nt - 1} or {self.nt + 1}."
            )
        if self.nt0min is not None and self.nt0min >= self.nt:
            raise SettingsError(f"nt0min={self.nt0min} must lie within the waveform of nt={self.nt} samples.")
        if self.tmax <= self.tmin:
            raise SettingsError(f"tmax={self.tmax} s must be later than tmin={self.tmin} s.")
        if self.n_pcs > self.nt:
            raise SettingsError(f"n_pcs={self.n_pcs} cannot exceed nt={self.nt}.")
        if self.n_templates > 8 * self.nt:
            raise SettingsError(f"n_templates={self.n_templates} cannot exceed 8·nt = {8 * self.nt}.")
        if self.batch_size < 4 * self.nt:
            raise SettingsError(
                f"batch_size={self.batch_size} is too short for nt={self.nt}: a batch needs at least 4·nt = "
                f"{4 * self.nt} samples. "
                "Raise batch_size (60000 is 2 s at 30 kHz)."
            )

    @property
    def peak_sample(self) -> int:
        """Sample of the peak within a waveform (``nt0min``)."""
        return int(20 * self.nt / 61) if self.nt0min is None else self.nt0min

    @property
    def landmark_limit(self) -> int:
        """Maximum number of landmarks (``max_cluster_subset``; a very large number if that is None)."""
        return 2**62 if self.max_cluster_subset is None else self.max_cluster_subset

    @classmethod
    def given(cls, settings: Settings | None) -> Settings:
        """The settings that were passed to a function, or the defaults if none were.

        Raises
        ------
        SettingsError
            If they are something else, such as a dictionary.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Settings):
            raise SettingsError(
                f"settings are of type {type(settings).__name__}; they must be a ks4stream.Settings. "
                "Settings.from_dict(…) makes one of a dictionary."
            )
        return settings

    @classmethod
    def like_kilosort4(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from a mapping of names to values; those that are not given are as in Kilosort4.

        Raises
        ------
        SettingsError
            As for ``Settings(**values)``.
        """
        numbers = {spec.name: spec.metadata["kilosort4"] for spec in fields(cls)}
        return cls(**{name: number for name, number in numbers.items() if number is not None} | dict(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from a mapping of names to values.

        Raises
        ------
        SettingsError
            As for ``Settings(**values)``.
        """
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some values changed, checked again."""
        return replace(self, **changes)

    def part(self, *names: str) -> Settings:
        """Return a subset of the settings, for code that may read only these.

        Parameters
        ----------
        *names : str
            Names of settings, or of groups of settings ("recording", "preprocessing" …).

        Returns
        -------
        Settings
            Reading any other setting from it raises an AttributeError.

        Examples
        --------
        >>> part = Settings(nt=41).part("nt", "matching")
        >>> part.nt, part.max_peels
        (41, 100)
        >>> part.n_pcs
        Traceback (most recent call last):
        AttributeError: n_pcs is not among the settings declared here (nt, Th_learned, max_peels).
        """
        part = object.__new__(_Part)
        held = vars(self)
        vars(part).update(
            (spec.name, held[spec.name])
            for spec in fields(Settings)
            if spec.name in held and (spec.name in names or spec.metadata["group"] in names)
        )
        return part

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name, as plain numbers."""
        return asdict(self)


class _Part(Settings):
    """A subset of the settings; the others cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        held = object.__getattribute__(self, "__dict__")
        if name in Settings.__dataclass_fields__ and name not in held:
            raise AttributeError(f"{name} is not among the settings declared here ({', '.join(held)}).")
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"Settings.part({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Part) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def _checked(spec: Field[Any], value: Any) -> Any:
    """Return `value` as the type of its field, or raise SettingsError."""
    about = spec.metadata
    if value is None:
        if about["optional"]:
            return None
        raise SettingsError(f"{spec.name}=None is not allowed; it must be of type {about['kind'].__name__}.")
    if about["kilosort4"] is not None and isinstance(value, str) and value == AUTO:
        return AUTO
    if about["kind"] is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{spec.name}={value!r} must be True or False.")
        return value
    if about["kind"] is tuple:
        return _three_widths(spec.name, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        or_auto = "" if about["kilosort4"] is None else f", or {AUTO!r}"
        raise SettingsError(f"{spec.name}={value!r} must be a number ({about['kind'].__name__}){or_auto}.") from None
    if isinstance(value, bool) or math.isnan(number):
        raise SettingsError(f"{spec.name}={value!r} must be a number ({about['kind'].__name__}).")
    _check_bounds(spec.name, value, number, about)
    if about["kind"] is int:
        if math.isinf(number) or number != int(number):
            raise SettingsError(f"{spec.name}={value!r} must be a whole number.")
        return int(number)
    if math.isinf(number) and spec.name not in UNLIMITED:
        raise SettingsError(f"{spec.name}={value!r} must be finite.")
    return number


def _check_bounds(name: str, value: Any, number: float, about: Mapping[str, Any]) -> None:
    unit = f" {about['unit']}".rstrip(".") if about["unit"] else ""  # the sentence ends with "s.d."
    if about["ge"] is not None and number < about["ge"]:
        raise SettingsError(f"{name}={value!r} is too small; it must be at least {about['ge']}{unit}.")
    if about["gt"] is not None and number <= about["gt"]:
        raise SettingsError(f"{name}={value!r} is too small; it must be above {about['gt']}{unit}.")
    if about["le"] is not None and number > about["le"]:
        raise SettingsError(f"{name}={value!r} is too large; it must be at most {about['le']}{unit}.")


def _three_widths(name: str, value: Any) -> tuple[float, float, float]:
    try:
        widths = tuple(float(width) for width in value)
    except (TypeError, ValueError):
        widths = ()
    if len(widths) != 3 or not all(0 <= width < math.inf for width in widths):
        raise SettingsError(f"{name}={value!r} must be three numbers, each at least 0 (shift, batch, segment).")
    return widths
