"""What the user chose: every parameter of the method, declared once.

The names are Kilosort4's. Each field carries its default, bounds, unit, the stage that first reads it
and one line of documentation; the command line, the checks and the documentation are made from them.
What belongs to the recording (its sampling rate, its number of channels) is not a setting, nor is where the
computation runs (:class:`~ks4stream.Resources`), which never changes a result.
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


def _setting(
    default: Any,
    doc: str,
    *,
    stage: str,
    kind: type = float,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unit: str = "",
    optional: bool = False,
) -> Any:
    """Declare one field of :class:`Settings`; bounds are ``least <= value <= most`` or ``above < value``."""
    return field(
        default=default,
        metadata={
            "doc": doc,
            "stage": stage,
            "kind": kind,
            "least": least,
            "above": above,
            "most": most,
            "unit": unit,
            "optional": optional,
        },
    )


def _refuses_unknown_names(cls: Class) -> Class:
    """Have a dataclass say which name was probably meant."""
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
    """Parameters of a sort: frozen, checked on construction.

    Raises
    ------
    SettingsError
        If a name is unknown (the nearest known one is suggested), a value has the wrong type or lies outside its
        bounds, or two values contradict each other.
    """

    # -- the recording -------------------------------------------------------------------------------
    batch_size: int = _setting(
        60000,
        "Length of a batch, the unit of the drift estimate.",
        stage="recording",
        kind=int,
        least=1,
        unit="samples",
    )
    batch_downsampling: int = _setting(1, "Sort every n-th batch only.", stage="recording", kind=int, least=1)
    tmin: float = _setting(0.0, "Where sorting begins.", stage="recording", least=0, unit="s")
    tmax: float = _setting(math.inf, "Where sorting ends.", stage="recording", above=0, unit="s")
    shift: float | None = _setting(None, "Added to the traces after scaling.", stage="recording", optional=True)
    scale: float | None = _setting(
        None, "Factor applied to the traces as they are read.", stage="recording", optional=True
    )
    # -- preprocessing -------------------------------------------------------------------------------
    highpass_cutoff: float = _setting(
        300.0, "Cutoff of the high-pass filter.", stage="preprocessing", least=0, unit="Hz"
    )
    artifact_threshold: float = _setting(
        math.inf,
        "Blank all channels around samples beyond this after filtering, in units of the file.",
        stage="preprocessing",
        least=0,
    )
    do_CAR: bool = _setting(True, "Subtract the common median reference.", stage="preprocessing", kind=bool)
    invert_sign: bool = _setting(False, "Turn the traces upside down.", stage="preprocessing", kind=bool)
    whitening_range: int = _setting(
        32, "Nearest channels that enter a channel's whitening.", stage="whitening", kind=int, least=1
    )
    nskip: int = _setting(
        25, "Every n-th batch enters the whitening estimate.", stage="whitening", kind=int, least=1, unit="batches"
    )
    # -- waveforms -----------------------------------------------------------------------------------
    nt: int = _setting(61, "Samples per waveform; odd.", stage="waveforms", kind=int, least=1, unit="samples")
    nt0min: int | None = _setting(
        None,
        "Sample of a waveform at which its peak lies; int(20·nt/61) by default.",
        stage="waveforms",
        kind=int,
        least=0,
        unit="samples",
        optional=True,
    )
    n_templates: int = _setting(6, "Universal waveforms.", stage="waveforms", kind=int, least=1)
    n_pcs: int = _setting(6, "Principal components of the waveforms.", stage="waveforms", kind=int, least=1)
    templates_from_data: bool = _setting(
        True, "Learn the universal waveforms; False takes those shipped.", stage="waveforms", kind=bool
    )
    Th_single_ch: float = _setting(
        6.0, "Threshold for the waveforms learned from.", stage="waveforms", above=0, unit="noise s.d."
    )
    # -- detection -----------------------------------------------------------------------------------
    Th_universal: float = _setting(
        9.0, "Threshold of universal detection.", stage="detection", above=0, unit="noise s.d."
    )
    dmin: float | None = _setting(
        None,
        "Vertical spacing of template centres times two; median contact spacing by default.",
        stage="detection",
        above=0,
        unit="µm",
        optional=True,
    )
    dminx: float = _setting(
        32.0, "Lateral spacing of template centres times two.", stage="detection", above=0, unit="µm"
    )
    min_template_size: float = _setting(
        10.0, "Width of the smallest spatial Gaussian.", stage="detection", above=0, unit="µm"
    )
    template_sizes: int = _setting(5, "Spatial Gaussians.", stage="detection", kind=int, least=1)
    nearest_chans: int = _setting(10, "Channels of a template centre.", stage="detection", kind=int, least=1)
    nearest_templates: int = _setting(
        100, "Centres among which a detection must be the largest.", stage="detection", kind=int, least=1
    )
    max_channel_distance: float = _setting(
        32.0, "Centres farther than this from every contact are dropped.", stage="detection", least=1, unit="µm"
    )
    # -- drift ---------------------------------------------------------------------------------------
    nblocks: int = _setting(
        1,
        "Depth segments of the drift estimate; 0 skips drift correction, 1 is rigid.",
        stage="drift",
        kind=int,
        least=0,
    )
    binning_depth: float = _setting(5.0, "Depth bin of the fingerprints.", stage="drift", above=0, unit="µm")
    sig_interp: float = _setting(
        20.0, "Width of the interpolation that moves the traces.", stage="drift", above=0, unit="µm"
    )
    drift_smoothing: tuple[float, float, float] = _setting(
        (0.5, 0.5, 0.5), "Smoothing over shift, batch and segment.", stage="drift", kind=tuple
    )
    # -- matching ------------------------------------------------------------------------------------
    Th_learned: float = _setting(
        8.0, "Threshold of matching with learned templates.", stage="matching", above=0, unit="noise s.d."
    )
    max_peels: int = _setting(100, "Rounds of matching pursuit.", stage="matching", kind=int, least=1, most=10_000)
    # -- clustering ----------------------------------------------------------------------------------
    cluster_neighbors: int = _setting(10, "Landmarks each spike is joined to.", stage="clustering", kind=int, least=2)
    cluster_downsampling: int = _setting(
        20, "One spike in n is a landmark, where there are many.", stage="clustering", kind=int, least=1
    )
    max_cluster_subset: int | None = _setting(
        25_000, "Landmarks at most.", stage="clustering", kind=int, least=1, optional=True
    )
    x_centers: int | None = _setting(
        None, "Columns of clustering regions.", stage="clustering", kind=int, least=1, optional=True
    )
    cluster_init_seed: int = _setting(5, "Seed of the start of clustering.", stage="clustering", kind=int, least=1)
    acg_threshold: float = _setting(0.2, "Largest contamination of a good unit.", stage="clustering", above=0)
    ccg_threshold: float = _setting(
        0.25, "Largest contamination of a pair that is merged.", stage="clustering", above=0
    )
    # -- results -------------------------------------------------------------------------------------
    duplicate_spike_ms: float = _setting(
        0.25, "Spikes of a unit closer than this are one.", stage="results", least=0, unit="ms"
    )
    position_limit: float = _setting(
        100.0, "Channels that enter a spike's position lie this close.", stage="results", least=0, unit="µm"
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        if self.nt % 2 == 0:
            raise SettingsError(
                f"nt={self.nt} is even; a waveform needs an odd number of samples to have a centre. "
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
        """Sample of a waveform at which its peak lies (``nt0min``)."""
        return int(20 * self.nt / 61) if self.nt0min is None else self.nt0min

    @property
    def landmark_limit(self) -> int:
        """Landmarks at most (``max_cluster_subset``; a very large number where that is None)."""
        return 2**62 if self.max_cluster_subset is None else self.max_cluster_subset

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
        """A copy with some values changed, checked anew."""
        return replace(self, **changes)

    def part(self, *names: str) -> Settings:
        """Some of the settings, to be handed to what reads these and no others.

        Parameters
        ----------
        *names : str
            Of settings, or of groups of settings ("recording", "preprocessing" …).

        Returns
        -------
        Settings
            Which raises an AttributeError where any other is read.

        Examples
        --------
        >>> part = Settings(nt=41).part("nt", "matching")
        >>> part.nt, part.Th_learned
        (41, 8.0)
        >>> part.n_pcs
        Traceback (most recent call last):
        AttributeError: n_pcs is not among the settings handed on here (nt, Th_learned, max_peels).
        """
        part = object.__new__(_Part)
        held = vars(self)
        vars(part).update(
            (spec.name, held[spec.name])
            for spec in fields(Settings)
            if spec.name in held and (spec.name in names or spec.metadata["stage"] in names)
        )
        return part

    def to_dict(self) -> dict[str, Any]:
        """All values by name, as plain numbers."""
        return asdict(self)


class _Part(Settings):
    """Settings of which only some may be read."""

    def __getattribute__(self, name: str) -> Any:
        held = object.__getattribute__(self, "__dict__")
        if name in Settings.__dataclass_fields__ and name not in held:
            raise AttributeError(f"{name} is not among the settings handed on here ({', '.join(held)}).")
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
        raise SettingsError(f"{spec.name}=None is not possible; it needs a {about['kind'].__name__}.")
    if about["kind"] is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{spec.name}={value!r} must be True or False.")
        return value
    if about["kind"] is tuple:
        return _three_widths(spec.name, value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{spec.name}={value!r} must be a number ({about['kind'].__name__}).") from None
    if isinstance(value, bool) or math.isnan(number):
        raise SettingsError(f"{spec.name}={value!r} must be a number ({about['kind'].__name__}).")
    _check_bounds(spec.name, value, number, about)
    if about["kind"] is int:
        if math.isinf(number) or number != int(number):
            raise SettingsError(f"{spec.name}={value!r} must be a whole number.")
        return int(number)
    return number


def _check_bounds(name: str, value: Any, number: float, about: Mapping[str, Any]) -> None:
    unit = f" {about['unit']}" if about["unit"] else ""
    if about["least"] is not None and number < about["least"]:
        raise SettingsError(f"{name}={value!r} is too small; it must be at least {about['least']}{unit}.")
    if about["above"] is not None and number <= about["above"]:
        raise SettingsError(f"{name}={value!r} is too small; it must be above {about['above']}{unit}.")
    if about["most"] is not None and number > about["most"]:
        raise SettingsError(f"{name}={value!r} is too large; it must be at most {about['most']}{unit}.")


def _three_widths(name: str, value: Any) -> tuple[float, float, float]:
    try:
        widths = tuple(float(width) for width in value)
    except (TypeError, ValueError):
        widths = ()
    if len(widths) != 3 or not all(0 <= width < math.inf for width in widths):
        raise SettingsError(f"{name}={value!r} must be three numbers of at least 0 (shift, batch, segment).")
    return widths
