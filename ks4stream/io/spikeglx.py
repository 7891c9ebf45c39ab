"""SpikeGLX: what the ``.meta`` file beside a ``.bin`` says about it.

Written after SpikeGLX's public description of its metadata tags. Newer files (2023 on) give every saved
channel's place in ``~snsGeomMap``; older ones give column and row on the shank in ``~snsShankMap``, or only
the electrode in ``~imroTbl``, and need the makers' dimensions, listed here per part number.
"""

from __future__ import annotations

import codecs
import itertools
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import Ks4StreamWarning, ProbeError, RecordingError
from ks4stream.io.objects import is_remote, locate, name_of, read_bytes, status
from ks4stream.probe import Probe


@dataclass(frozen=True)
class ShankLayout:
    """Dimensions of one Neuropixels shank, as its maker publishes them.

    Attributes
    ----------
    n_columns : int
        Contacts per row.
    pitch_x_um, pitch_y_um : float
        Distance between columns and between rows.
    even_x_um, odd_x_um : float
        From the shank's left edge to the leftmost contact of even and of odd rows (rows may be staggered).
    shank_pitch_um : float
        Distance between shanks.
    reference_channel : int or None
        Channel that carries the on-shank reference and no signal.
    """

    n_columns: int
    pitch_x_um: float
    pitch_y_um: float
    even_x_um: float
    odd_x_um: float
    shank_pitch_um: float = 0.0
    reference_channel: int | None = None

    def positions_um(
        self, shank: NDArray[np.int64], column: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return x and y, each of shape (channel,) in µm, of contacts given by shank, column and row."""
        left_um = np.where(row % 2 == 0, self.even_x_um, self.odd_x_um)
        return left_um + self.pitch_x_um * column + self.shank_pitch_um * shank, self.pitch_y_um * row.astype(float)


_NP1 = ShankLayout(2, 32, 20, 27, 11, reference_channel=191)
_NP1_LINEAR = ShankLayout(2, 32, 20, 27, 27, reference_channel=191)
_NHP_STAGGERED = ShankLayout(2, 87, 20, 27, 11, reference_channel=191)
_NHP_LINEAR = ShankLayout(2, 103, 20, 11, 11, reference_channel=191)
_OPTO = ShankLayout(2, 48, 20, 11, 11, reference_channel=191)
_NP2_SINGLE_PROTOTYPE = ShankLayout(2, 32, 15, 27, 27, reference_channel=127)
_NP2_FOUR_PROTOTYPE = ShankLayout(2, 32, 15, 27, 27, 250, reference_channel=127)
_NP2_SINGLE = ShankLayout(2, 32, 15, 27, 27)
_NP2_FOUR = ShankLayout(2, 32, 15, 27, 27, 250)

LAYOUTS: Mapping[str, ShankLayout] = {
    part: layout
    for parts, layout in [
        ("NP1000 NP1001 NP1010 NP1011 NP1012 NP1013 NP1014", _NP1),
        ("PRB_1_2_0480_2 PRB_1_4_0480_1 PRB_1_4_0480_1_C", _NP1),
        ("NP1015 NP1016 NP1017", _NP1_LINEAR),
        ("NP1020 NP1021 NP1030 NP1031", _NHP_STAGGERED),
        ("NP1022 NP1032 NP1033 NP1040 NP1041 NP1042 NP1050 NP1051", _NHP_LINEAR),
        ("NP1100", ShankLayout(8, 6, 6, 14, 14)),
        ("NP1110", ShankLayout(8, 6, 6, 15.5, 15.5)),
        ("NP1120", ShankLayout(2, 4.5, 4.5, 6.75, 6.75)),
        ("NP1121", ShankLayout(1, 0, 3, 6.25, 6.25)),
        ("NP1122", ShankLayout(16, 3, 3, 12.5, 12.5)),
        ("NP1123", ShankLayout(12, 4.5, 4.5, 10.25, 10.25)),
        ("NP1200 NP1210", ShankLayout(2, 32, 31, 56.5, 36.5)),
        ("NP1300 NP1400", _OPTO),
        ("NP2000 PRB2_1_2_0640_0", _NP2_SINGLE_PROTOTYPE),
        ("NP2003 NP2004 NP2005", _NP2_SINGLE),
        ("NP2006", ShankLayout(2, 32, 15, 27, 11)),
        ("NP2010 PRB2_4_2_0640_0", _NP2_FOUR_PROTOTYPE),
        ("NP2013 NP2014 NP2020 NP2021 NP3020 NP3021 NP3022 NP3023 NP3024", _NP2_FOUR),
        ("NP2022", ShankLayout(2, 20, 15, 27, 11, 2141.45)),
        ("NP2300", ShankLayout(2, 48, 15, 11, 11)),
        ("NP3000", ShankLayout(1, 0, 15, 59, 59)),
        ("NP3010 NP3011 NP3012", _NP2_SINGLE),
    ]
    for part in parts.split()
}

# Files of the first years name a type and no part number; phase 3A names neither.
_PART_OF_TYPE = {"0": "NP1000", "21": "NP2000", "24": "NP2010", "2003": "NP2003", "2013": "NP2013"}
_PART_OF_TYPE |= {number: f"NP{number}" for number in ("1020", "1030", "1100", "1120", "1121", "1122", "1123")}
_PART_OF_TYPE |= {number: f"NP{number}" for number in ("1200", "1300", "2020")}

_NP2_AP_GAIN = {"21": 80.0, "24": 80.0}  # fixed in the prototypes; 100 in what is sold since
_JOINTS_SHOWN = 4
_RUN = re.compile(r"([^/\\]+)_g\d+_t[^/\\]*$")  # in the name that a file had: run_g0_t0.imec0.ap.bin
# Files are begun when they are written first, some seconds after their first sample; runs are minutes apart.
_CLOCK_TOLERANCE_S = 60.0
_DEFAULT_MAX_INT = {"21": 8192.0, "24": 8192.0, "2003": 2048.0, "2013": 2048.0}  # 512 elsewhere


@dataclass(frozen=True)
class SpikeGLXMeta:
    """What a ``.meta`` file says.

    Attributes
    ----------
    path : PurePath
        The file; of an object, its name alone.
    stream : str
        ``imec`` (a Neuropixels probe), ``nidq`` or ``obx``.
    n_channels : int
        Channels in the ``.bin``, sync channels included.
    n_neural : int
        How many of them, the first ones, are channels of a probe.
    sampling_rate_hz : float
        Samples per second.
    gain_uv : float or None
        µV per bit; None where it is not the same for all channels, or not told.
    file_size_bytes : int or None
        Size the ``.bin`` had when it was written.
    tags : mapping of str to str
        Every tag, without the leading ``~``.
    """

    path: PurePath
    stream: str
    n_channels: int
    n_neural: int
    sampling_rate_hz: float
    gain_uv: float | None
    file_size_bytes: int | None
    tags: Mapping[str, str] = field(repr=False)

    @property
    def is_lf(self) -> bool:
        """Whether the file holds the LF band of a probe, and nothing of the AP band."""
        return self.stream == "imec" and re.match(r"0\s*,\s*[1-9]", self.tags.get("snsApLfSy", "")) is not None

    @property
    def first_sample(self) -> int | None:
        """The file's first sample, counted from the start of the acquisition; None if that is not told."""
        first = self.tags.get("firstSample", "")
        return int(first) if first.isdecimal() else None

    @property
    def duration_s(self) -> float | None:
        """How long the file was when it was written; None if that is not told."""
        try:
            duration_s = float(self.tags["fileTimeSecs"])
        except (KeyError, ValueError):
            return None
        return duration_s if math.isfinite(duration_s) and duration_s > 0 else None

    @property
    def serial_number(self) -> str | None:
        """The probe's, None if it is not told."""
        return self.tags.get("imDatPrb_sn") or self.tags.get("imProbeSN")

    @property
    def created(self) -> datetime | None:
        """When the file was begun, None if that is not told."""
        try:
            return datetime.fromisoformat(self.tags["fileCreateTime"]).replace(tzinfo=None)
        except (KeyError, ValueError):
            return None

    def probe(self) -> Probe | None:
        """Return the contacts of the saved channels, without the sync channels and unused (reference) sites.

        Shanks are numbered as SpikeGLX does, from 0 on the left; x is measured from the left edge of
        shank 0 and y from the lowest row.

        Returns
        -------
        Probe or None
            None for streams that have no probe, and if the file does not describe its geometry.

        Raises
        ------
        ProbeError
            If the geometry is of a kind that is not known here, or contradicts the number of channels.
        """
        if not self.n_neural:
            return None
        if "snsGeomMap" in self.tags:
            sites = self._sites_of_geom_map()
        elif "snsShankMap" in self.tags:
            sites = self._sites_of_shank_map()
        elif "imroTbl" in self.tags:
            sites = self._sites_of_imro_table()
        else:
            return None
        if len(sites.shank) < self.n_neural:
            raise ProbeError(
                f"{self.path} describes {len(sites.shank)} contacts, but the file has {self.n_neural} probe "
                "channels. Give the probe explicitly (probe)."
            )
        saved = np.arange(self.n_neural)
        used = saved[sites.is_used[saved]]
        return Probe(
            chan_map=used,
            x_um=sites.x_um[used],
            y_um=sites.y_um[used],
            shank=sites.shank[used],
            n_chan_file=self.n_channels,
            name=self.path.stem,
        )

    def _sites_of_geom_map(self) -> _Sites:
        """(part, shanks, shank pitch, shank width)(shank:x:z:used)…, x from the shank's own left edge."""
        header, table = self._table("snsGeomMap", 4)
        try:
            shank_pitch_um = float(header[2])
        except (IndexError, ValueError):
            raise ProbeError(f"{self.path}: the header of ~snsGeomMap gives no distance between shanks.") from None
        shank = table[:, 0].astype(np.int64)
        return _Sites(shank, table[:, 1] + shank_pitch_um * shank, table[:, 2], table[:, 3] > 0)

    def _sites_of_shank_map(self) -> _Sites:
        """(shanks, columns, rows)(shank:column:row:used)…"""
        _, table = self._table("snsShankMap", 4)
        shank, column, row = table[:, :3].astype(np.int64).T
        return _Sites(shank, *self._layout().positions_um(shank, column, row), table[:, 3] > 0)

    def _sites_of_imro_table(self) -> _Sites:
        """(type, channels)(channel … )…, for all acquired channels, saved or not."""
        layout = self._layout()
        _, table = self._table("imroTbl", None)
        entries = table.astype(np.int64)
        part, n_fields = self._part_number(), entries.shape[1]
        shank = np.zeros(len(entries), np.int64)
        if part.startswith("NP1") or part.startswith("PRB_1"):  # channel, bank, reference, gains …
            electrode = entries[:, 1] * 384 + entries[:, 0]
        elif n_fields == 4:  # channel, bank, reference, electrode
            electrode = entries[:, 3]
        elif n_fields == 5:  # channel, shank, bank, reference, electrode
            shank, electrode = entries[:, 1], entries[:, 4]
        else:
            raise self._unknown_geometry(f"~imroTbl has {n_fields} numbers per channel")
        row, column = np.divmod(electrode, layout.n_columns)
        x_um, y_um = layout.positions_um(shank, column, row)
        is_used = entries[:, 0] != (-1 if layout.reference_channel is None else layout.reference_channel)
        saved = self._saved_probe_channels(len(entries))
        return _Sites(shank[saved], x_um[saved], y_um[saved], is_used[saved])

    def _saved_probe_channels(self, n_acquired: int) -> NDArray[np.int64]:
        """Acquired probe channels that are in the file, in the file's order."""
        subset = self.tags.get("snsSaveChanSubset", "all").strip()
        if subset in ("", "all"):
            return np.arange(n_acquired)
        saved: list[int] = []
        try:
            for item in subset.split(","):
                first, _, last = item.partition(":")
                saved.extend(range(int(first), int(last or first) + 1))
            n_ap, n_lf = (int(count) for count in self.tags["acqApLfSy"].split(",")[:2])
        except (KeyError, ValueError):
            raise self._unknown_geometry("snsSaveChanSubset and acqApLfSy do not tell the channels") from None
        # LF channels are numbered after the AP channels and lie on the same contacts.
        channels = [channel % n_acquired for channel in saved if channel < n_ap + n_lf]
        return np.array(channels, np.int64)

    def _part_number(self) -> str:
        part = self.tags.get("imDatPrb_pn", "")
        if part in LAYOUTS:
            return part
        if "imProbeOpt" in self.tags:  # phase 3A; option 4 has its reference sites elsewhere
            return "NP1000" if self.tags["imProbeOpt"].strip() == "3" else "phase 3A option " + self.tags["imProbeOpt"]
        return part or _PART_OF_TYPE.get(self.tags.get("imDatPrb_type", "0"), "")

    def _layout(self) -> ShankLayout:
        part = self._part_number()
        if part not in LAYOUTS:
            raise self._unknown_geometry(f"the dimensions of probe part {part or 'number (none given)'} are not known")
        return LAYOUTS[part]

    def _table(self, tag: str, n_fields: int | None) -> tuple[list[str], NDArray[np.float64]]:
        """Split ``(header)(entry)(entry)…`` into the header's items and a table of the entries' numbers."""
        header, *entries = re.findall(r"\(([^()]*)\)", self.tags[tag]) or [""]
        try:
            table = np.array([re.split(r"[: ]", entry.strip()) for entry in entries], np.float64)
        except ValueError as error:
            raise ProbeError(f"{self.path}: ~{tag} cannot be read ({error}). Give the probe explicitly.") from error
        if table.ndim != 2 or (n_fields is not None and table.shape[1] != n_fields):
            raise ProbeError(
                f"{self.path}: ~{tag} cannot be read: needed are entries of {n_fields or 'equally many'} numbers. "
                "Give the probe explicitly (probe)."
            )
        return header.split(","), table

    def _unknown_geometry(self, reason: str) -> ProbeError:
        return ProbeError(
            f"{self.path} does not give the contacts' positions in a way known here: {reason}. Give the probe "
            "explicitly (probe), or let SpikeGLX 20230202 or later export the file again, which adds ~snsGeomMap."
        )


@dataclass(frozen=True)
class _Sites:
    """Place of each saved probe channel; arrays of shape (channel,)."""

    shank: NDArray[np.int64]
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    is_used: NDArray[np.bool_]


def find_meta(path: str | os.PathLike[str]) -> str | None:
    """Return the location of the ``.meta`` beside a ``.bin`` or ``.cbin``, or None if there is none."""
    stem, suffix = os.path.splitext(locate(path))
    if suffix.lower() not in (".bin", ".cbin"):
        return None
    endings = (".meta",) if suffix.islower() else (".meta", ".META")
    return next((stem + ending for ending in endings if status(stem + ending) is not None), None)


def read_meta(path: str | os.PathLike[str]) -> SpikeGLXMeta:
    """Read a SpikeGLX ``.meta`` file.

    Parameters
    ----------
    path : path or URL
        The ``.meta`` file or object.

    Returns
    -------
    SpikeGLXMeta
        What it says.

    Raises
    ------
    RecordingError
        If it cannot be read or lacks what every SpikeGLX file has.
    """
    location = locate(path)
    found = status(location)
    if found is None:
        raise RecordingError(f"There is no file {location}.")
    content = bytes(read_bytes(location, 0, found.size_bytes))
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as editors on Windows may save it
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors="replace")
    path = PurePath(name_of(location)) if is_remote(location) else PurePath(location)
    tags: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            tags[key.strip().removeprefix("~")] = value.strip()
    stream = tags.get("typeThis", "imec")
    rate_tag = {"nidq": "niSampRate", "obx": "obSampRate"}.get(stream, "imSampRate")
    n_channels = int(_number(tags, "nSavedChans", path))
    if n_channels < 1:
        raise RecordingError(f"{path}: nSavedChans={tags['nSavedChans']}; a file has at least one channel.")
    size = tags.get("fileSizeBytes", "")
    return SpikeGLXMeta(
        path=path,
        stream=stream,
        n_channels=n_channels,
        n_neural=_n_neural(tags, n_channels, path) if stream == "imec" else 0,
        sampling_rate_hz=_number(tags, rate_tag, path),
        gain_uv=_imec_gain_uv(tags) if stream == "imec" else None,
        file_size_bytes=int(size) if size.isdecimal() else None,
        tags=tags,
    )


def _number(tags: Mapping[str, str], tag: str, path: PurePath) -> float:
    try:
        value = float(tags[tag])
        if not math.isfinite(value):
            raise ValueError(tag)
        return value
    except KeyError:
        raise RecordingError(
            f"{path} is no SpikeGLX metadata: it has no line {tag}=…. Remove or rename it to open the file "
            "without, giving n_chan and fs."
        ) from None
    except ValueError:
        raise RecordingError(f"{path}: {tag}={tags[tag]} is no number.") from None


def _n_neural(tags: Mapping[str, str], n_channels: int, path: PurePath) -> int:
    """AP or LF channels in the file; the rest, at the end, are sync words."""
    try:
        n_ap, n_lf, _ = (int(count) for count in tags["snsApLfSy"].split(","))
    except (KeyError, ValueError):
        raise RecordingError(f"{path}: snsApLfSy={tags.get('snsApLfSy')}; needed are three channel counts.") from None
    if n_ap + n_lf > n_channels:
        raise RecordingError(
            f"{path} contradicts itself: snsApLfSy={tags['snsApLfSy']} are more than nSavedChans={n_channels}."
        )
    return n_ap or n_lf


def _imec_gain_uv(tags: Mapping[str, str]) -> float | None:
    """µV per bit: voltage range / largest integer / amplification."""
    try:
        range_v = float(tags["imAiRangeMax"])
        probe_type = tags.get("imDatPrb_type", "0")
        max_int = float(tags.get("imMaxInt") or _DEFAULT_MAX_INT.get(probe_type, 512.0))
        amplification = _amplification(tags, probe_type)
    except (KeyError, ValueError):
        return None
    return None if amplification is None else 1e6 * range_v / max_int / amplification


def _amplification(tags: Mapping[str, str], probe_type: str) -> float | None:
    """Amplification of the saved band; None where channels differ."""
    is_lf = tags["snsApLfSy"].split(",")[0] == "0"
    if probe_type.startswith(("2", "30")):  # 2.0 and later: one band, one fixed gain
        return float(tags.get("imChan0apGain") or _NP2_AP_GAIN.get(probe_type, 100.0))
    # Selectable per channel: channel, bank, reference, AP gain, LF gain, filter
    entries = [entry.split() for entry in re.findall(r"\(([^(),]*)\)", tags.get("imroTbl", ""))]
    gains = {float(entry[4 if is_lf else 3]) for entry in entries if len(entry) >= 5}
    if not gains:
        gains = {float(tags["imChan0lfGain" if is_lf else "imChan0apGain"])}
    return gains.pop() if len(gains) == 1 else None


# -- files joined in time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A file that is joined with others.

    Attributes
    ----------
    path : str
    meta : SpikeGLXMeta
    n_samples : int
        That the file really holds.
    """

    path: str
    meta: SpikeGLXMeta
    n_samples: int

    @property
    def name(self) -> str:
        """For messages."""
        return name_of(self.path)

    @property
    def start(self) -> int:
        """First sample of the acquisition, 0 if that is not told."""
        return self.meta.first_sample or 0


def check_joined(parts: Sequence[Part]) -> None:
    """Compare what files that are joined in time say of when they begin.

    Samples are counted from the start of an acquisition, so that only files of one can be compared to the sample; of
    others, the times at which they were made.

    Warns
    -----
    Ks4StreamWarning
        If there are gaps or overlaps between files, they come from different probes, or one was made before the one
        it follows.

    Raises
    ------
    RecordingError
        If files of one acquisition are in the wrong order, or were recorded at the same time from different probes.
    """
    joints = []
    for first, second in itertools.pairwise(parts):
        if first.path == second.path:
            continue  # which is told of elsewhere
        gap_samples = second.start - first.start - first.n_samples
        if not _of_one_acquisition(first.meta, second.meta):
            _check_acquisitions(first, second)
        elif _differ_in_probe(first, second) and gap_samples < 0:
            raise RecordingError(f"{_of_two_probes(first, second)}, at the same time. Sort them apart.")
        elif second.start < first.start:
            raise RecordingError(_wrong_order(parts, first, second))
        elif gap_samples:
            length = f"{abs(gap_samples)} samples ({abs(gap_samples) / first.meta.sampling_rate_hz:.3g} s)"
            joints.append(
                f"{length} are missing between {first.name} and {second.name}"
                if gap_samples > 0
                else f"the last {length} of {first.name} are in {second.name} too"
            )
    if joints:
        _warn(
            "Files that are joined in time do not follow each other: "
            + "; ".join(joints[:_JOINTS_SHOWN])
            + f"; and {len(joints) - _JOINTS_SHOWN} more" * (len(joints) > _JOINTS_SHOWN)
            + ". Spike times count the samples of the files, as if there were neither gaps nor overlaps."
        )


def _of_one_acquisition(first: SpikeGLXMeta, second: SpikeGLXMeta) -> bool:
    """Whether samples of two files are counted, and from the same moment as far as their metadata tell."""
    if first.first_sample is None or second.first_sample is None:
        return False
    runs = {match[1] for meta in (first, second) if (match := _RUN.search(meta.tags.get("fileName", "")))}
    if len(runs) > 1:
        return False
    if first.created and second.created and first.created != second.created:  # alike where both were cut from one file
        later_s = (second.created - first.created).total_seconds()
        counted_s = (second.first_sample - first.first_sample) / first.sampling_rate_hz
        return abs(later_s - counted_s) < _CLOCK_TOLERANCE_S
    return True


def _check_acquisitions(first: Part, second: Part) -> None:
    """Warn of files of different acquisitions that do not seem to follow each other."""
    if _differ_in_probe(first, second):
        _warn(f"{_of_two_probes(first, second)}: units do not go on from one to the other. Sort them apart.")
    before, after = first.meta.created, second.meta.created
    if before is not None and after is not None and after < before:
        _warn(
            f"{second.name} was made at {after}, and {first.name}, which it follows here, at {before}. Are the files "
            "in order of time?"
        )


def _differ_in_probe(first: Part, second: Part) -> bool:
    serials = {first.meta.serial_number, second.meta.serial_number} - {None}
    return len(serials) > 1


def _of_two_probes(first: Part, second: Part) -> str:
    return (
        f"{first.name} and {second.name} come from different probes (serial numbers {first.meta.serial_number} and "
        f"{second.meta.serial_number})"
    )


def _wrong_order(parts: Sequence[Part], first: Part, second: Part) -> str:
    right = (
        ", ".join(part.name for part in sorted(parts, key=lambda part: part.start))
        if all(_of_one_acquisition(first.meta, part.meta) for part in parts)
        else f"{second.name} before {first.name}"
    )
    return (
        f"Files to be joined are not in order of time: {second.name} begins at sample {second.start} of the "
        f"acquisition, and {first.name}, which it follows here, at {first.start}. The right order is {right}."
    )


def _warn(text: str) -> None:
    warnings.warn(text, Ks4StreamWarning, stacklevel=6)
