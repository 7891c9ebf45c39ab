"""SpikeGLX: what the ``.meta`` file next to a ``.bin`` says about it.

Written from SpikeGLX's public description of its metadata tags. Newer files (from 2023) give the position of every
saved channel in ``~snsGeomMap``; older ones give column and row on the shank in ``~snsShankMap``, or only
the electrode in ``~imroTbl``, and need the manufacturer's dimensions, which probeinterface has for each part number.

probeinterface's own reader of ``.meta`` files is not used: it needs both ``~imroTbl`` and a part number, and, at 0.4.2,
fails on LF files and on phase 3A's option 4, takes reference sites for contacts, and raises arbitrary errors for a
wrong table. Nor does it check readout tables, so it only reads the one that nothing else understands (NP1110's).
"""

from __future__ import annotations

import codecs
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io.objects import is_remote, locate, name_of, read_metadata, status
from ks4stream.messages import warn
from ks4stream.probe import Probe

# Files of the first years give a type and no part number. The type then stands for its first part, NP and the type's
# number, except for these.
_PART_OF_TYPE = {"0": "NP1000", "21": "NP2000", "24": "NP2010"}
_TYPES_OF_SEVERAL_LAYOUTS = ("0", "1020", "1030", "2003", "2020")  # whose parts differ in stagger or pitch

# Channels with an on-shank reference and no signal, by prefixes of part numbers. SpikeGLX's maps leave them out.
_REFERENCE_CHANNEL = {"NP10": 191, "NP13": 191, "NP14": 191, "PRB_1": 191, "NP2000": 127, "NP2010": 127, "PRB2": 127}
_PHASE_3A_REFERENCES = (36, 75, 112, 151, 188, 227, 264, 303, 340, 379)  # its option 4 has 276 channels

_NP2_AP_GAIN = {"21": 80.0, "24": 80.0}  # fixed in the prototypes; 100 in the probes sold since
_MAX_CHANNELS = 100_000  # in a file
_MAX_NUMBER = 2**53  # in a table of contacts
_JOINTS_SHOWN = 4
_RUN = re.compile(r"([^/\\]+)_g\d+_t[^/\\]*$")  # in the name that a file had: run_g0_t0.imec0.ap.bin
# Files are created when they are first written, some seconds after their first sample; runs are minutes apart.
_CLOCK_TOLERANCE_S = 60.0
_DEFAULT_MAX_INT = {"21": 8192.0, "24": 8192.0, "2003": 2048.0, "2013": 2048.0}  # 512 elsewhere


@dataclass(frozen=True)
class SpikeGLXMeta:
    """What a ``.meta`` file says.

    Attributes
    ----------
    path : PurePath
        The file; for an object, only its name.
    stream : str
        ``imec`` (a Neuropixels probe), ``nidq`` or ``obx``.
    n_channels : int
        Channels in the ``.bin``, sync channels included.
    n_neural : int
        How many of them are channels of a probe; these come first.
    sampling_rate_hz : float
        Samples per second.
    gain_uv : float or None
        µV per bit; None if it is unknown or differs between channels.
    file_size_bytes : int or None
        Size of the ``.bin`` when it was written.
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
        """The file's first sample, counted from the start of the acquisition; None if unknown."""
        return _whole(self.tags.get("firstSample", ""))

    @property
    def duration_s(self) -> float | None:
        """Length of the file when it was written; None if unknown."""
        try:
            duration_s = float(self.tags["fileTimeSecs"])
        except (KeyError, ValueError):
            return None
        return duration_s if math.isfinite(duration_s) and duration_s > 0 else None

    @property
    def serial_number(self) -> str | None:
        """The probe's serial number; None if unknown."""
        return self.tags.get("imDatPrb_sn") or self.tags.get("imProbeSN")

    @property
    def created(self) -> datetime | None:
        """When the file was created; None if unknown."""
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
            None for streams without a probe, and if the file does not describe the geometry.

        Raises
        ------
        ProbeError
            If the geometry is not of a known kind, or contradicts the number of channels.
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
        return self._sites(self._contacts_um(), shank, row, column, table[:, 3] > 0)

    def _sites_of_imro_table(self) -> _Sites:
        """(type, channels)(channel … )…, for all acquired channels, saved or not."""
        header, table = self._table("imroTbl", None)
        entries = table.astype(np.int64)
        n_fields = entries.shape[1]
        channel, shank = entries[:, 0], np.zeros(len(entries), np.int64)
        references = [number for start, number in _REFERENCE_CHANNEL.items() if self._part_number().startswith(start)]
        if len(header) == 3:  # phase 3A; (serial number, option, channels)(channel, bank, reference, gains)
            electrode = entries[:, 1] * (276 if header[1].strip() == "4" else 384) + channel
            references = list(_PHASE_3A_REFERENCES)
        elif n_fields == 6:  # channel, bank, reference, gains, filter
            electrode = entries[:, 1] * 384 + channel
        elif n_fields == 5:  # channel, shank, bank, reference, electrode
            shank, electrode = entries[:, 1], entries[:, 4]
        elif n_fields == 4:  # channel, bank, reference, electrode
            electrode = entries[:, 3]
        elif n_fields == 3 and len(header) == 6:  # group of channels, two banks
            electrode = self._electrodes_of_groups()
            channel, shank = np.arange(len(electrode)), np.zeros(len(electrode), np.int64)
        else:
            raise self._unknown_geometry(f"~imroTbl has {n_fields} numbers per channel")
        saved = self._saved_probe_channels(len(channel))
        contacts_um = self._contacts_um()
        row, column = np.divmod(electrode[saved], contacts_um.shape[2])
        return self._sites(contacts_um, shank[saved], row, column, ~np.isin(channel[saved], references))

    def _electrodes_of_groups(self) -> NDArray[np.int64]:
        """Electrode of each channel of a probe (NP1110) that is wired in groups of channels."""
        from probeinterface import read_imro

        with TemporaryDirectory() as folder:  # the library only reads files
            path = Path(folder, "table.imro")
            path.write_text(self.tags["imroTbl"], encoding="utf-8")
            try:
                names = read_imro(path).contact_ids
            except Exception as error:  # the library checks little: a wrong table may fail anywhere in it
                raise self._unknown_geometry(f"~imroTbl cannot be read by probeinterface ({error!r})") from error
        return np.array([name.removeprefix("e") for name in names], np.int64)

    def _sites(
        self,
        contacts_um: NDArray[np.float64],
        shank: NDArray[np.int64],
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        is_used: NDArray[np.bool_],
    ) -> _Sites:
        """Sites from their positions on the probe; ``contacts_um`` is the result of :meth:`_contacts_um`."""
        numbers = np.stack([shank, row, column])
        if (numbers < 0).any() or (contacts_um.shape[:3] <= numbers.T).any():
            raise self._unknown_geometry(f"it lists contacts that probe part {self._part_number()} does not have")
        x_um, y_um = contacts_um[shank, row, column].T
        return _Sites(shank, x_um, y_um, is_used)

    def _contacts_um(self) -> NDArray[np.float64]:
        """All contacts of this kind of probe, shape (shank, row, column, 2): x from shank 0's left edge, and y."""
        from probeinterface.neuropixels_tools import build_neuropixels_probe

        part, kind = self._part_number(), self.tags.get("imDatPrb_type", "0")
        try:
            probe = build_neuropixels_probe(part)
        except KeyError:
            raise self._unknown_geometry(f"the dimensions of probe part {part} are not known") from None
        if self._named_part() is None and kind in _TYPES_OF_SEVERAL_LAYOUTS:
            warn(
                f"{self.path} does not give a part number (imDatPrb_pn). The contacts are assumed to lie as on {part}, "
                f"but some probes of type {kind} have another layout. If yours is one of them, give the probe (probe)."
            )
        x_um, y_um = probe.contact_positions.T
        n_per_shank = len(x_um) // probe.get_shank_count()
        n_columns = np.count_nonzero(y_um[:n_per_shank] == y_um[0])
        contacts_um = np.stack([x_um - probe.probe_planar_contour[:, 0].min(), y_um], axis=-1)
        return contacts_um.reshape(probe.get_shank_count(), -1, n_columns, 2)

    def _saved_probe_channels(self, n_acquired: int) -> NDArray[np.int64]:
        """Acquired probe channels that are in the file, in the file's order."""
        subset = self.tags.get("snsSaveChanSubset", "all").strip()
        if subset in ("", "all"):
            return np.arange(n_acquired)
        saved: list[int] = []
        try:
            for item in subset.split(","):
                first, _, last = item.partition(":")
                numbers = range(int(first), int(last or first) + 1)
                if numbers.stop - numbers.start + len(saved) > self.n_channels:
                    raise self._unknown_geometry(f"snsSaveChanSubset lists more than {self.n_channels} channels")
                saved.extend(numbers)
            n_ap, n_lf = (int(count) for count in self.tags["acqApLfSy"].split(",")[:2])
        except ProbeError:
            raise
        except (KeyError, ValueError):
            raise self._unknown_geometry("snsSaveChanSubset and acqApLfSy do not identify the channels") from None
        # LF channels are numbered after the AP channels and lie on the same contacts.
        channels = [channel % n_acquired for channel in saved if channel < n_ap + n_lf]
        return np.array(channels, np.int64)

    def _named_part(self) -> str | None:
        """Part number from its own tag or, since 2026, from the readout table, where the type used to be."""
        if "imProbeOpt" in self.tags:  # phase 3A gives none; all its options have the layout of the probes sold later
            return "NP1000"
        in_table = self.tags.get("imroTbl", "").lstrip("(").partition(",")[0].strip()
        return self.tags.get("imDatPrb_pn") or (in_table if in_table.startswith("NP") else None)

    def _part_number(self) -> str:
        """Part number, or that of the first part of the type."""
        kind = self.tags.get("imDatPrb_type", "0")
        return self._named_part() or _PART_OF_TYPE.get(kind, f"NP{kind}")

    def _table(self, tag: str, n_fields: int | None) -> tuple[list[str], NDArray[np.float64]]:
        """Split ``(header)(entry)(entry)…`` into the header's items and a table of the entries' numbers."""
        header, *entries = re.findall(r"\(([^()]*)\)", self.tags[tag]) or [""]
        try:
            table = np.array([re.split(r"[: ]", entry.strip()) for entry in entries], np.float64)
        except ValueError as error:
            raise ProbeError(f"{self.path}: ~{tag} cannot be read ({error}). Give the probe explicitly.") from error
        if (
            table.ndim != 2
            or (n_fields is not None and table.shape[1] != n_fields)
            or not (np.abs(table) < _MAX_NUMBER).all()  # nor nan
        ):
            raise ProbeError(
                f"{self.path}: ~{tag} cannot be read: all entries must have {n_fields or 'equally many'} numbers. "
                "Give the probe explicitly (probe)."
            )
        return header.split(","), table

    def _unknown_geometry(self, reason: str) -> ProbeError:
        return ProbeError(
            f"{self.path} does not give the positions of the contacts in a supported form: {reason}. Give the probe "
            "explicitly (probe), or export the file again with SpikeGLX 20230202 or later, which adds ~snsGeomMap."
        )


@dataclass(frozen=True)
class _Sites:
    """Position of each saved probe channel; arrays of shape (channel,)."""

    shank: NDArray[np.int64]
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    is_used: NDArray[np.bool_]


def find_meta(path: str | os.PathLike[str]) -> str | None:
    """Return the location of the ``.meta`` next to a ``.bin`` or ``.cbin``, or None if there is none."""
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
        Its contents.

    Raises
    ------
    RecordingError
        If it cannot be read or lacks tags that every SpikeGLX file has.
    """
    location = locate(path)
    found = status(location)
    if found is None:
        raise RecordingError(f"There is no file {location}.")
    content = read_metadata(location, found.size_bytes)
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
    if not 1 <= n_channels <= _MAX_CHANNELS:
        raise RecordingError(f"{path}: nSavedChans={tags['nSavedChans']}; it must be between 1 and {_MAX_CHANNELS}.")
    return SpikeGLXMeta(
        path=path,
        stream=stream,
        n_channels=n_channels,
        n_neural=_n_neural(tags, n_channels, path) if stream == "imec" else 0,
        sampling_rate_hz=_number(tags, rate_tag, path),
        gain_uv=_imec_gain_uv(tags) if stream == "imec" else None,
        file_size_bytes=_whole(tags.get("fileSizeBytes", "")),
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
            f"{path} is not SpikeGLX metadata: it has no line {tag}=…. Remove or rename it to open the file "
            "without it, and give n_chan and fs."
        ) from None
    except ValueError:
        raise RecordingError(f"{path}: {tag}={tags[tag]} is not a number.") from None


def _whole(text: str) -> int | None:
    """A non-negative integer in decimal digits; None if it is something else or has more than 64 bits."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _n_neural(tags: Mapping[str, str], n_channels: int, path: PurePath) -> int:
    """AP or LF channels in the file; the rest, at the end, are sync words."""
    try:
        n_ap, n_lf, _ = (int(count) for count in tags["snsApLfSy"].split(","))
    except (KeyError, ValueError):
        raise RecordingError(f"{path}: snsApLfSy={tags.get('snsApLfSy')}; it must be three channel counts.") from None
    if n_ap + n_lf > n_channels:
        raise RecordingError(
            f"{path} contradicts itself: snsApLfSy={tags['snsApLfSy']} exceeds nSavedChans={n_channels}."
        )
    return n_ap or n_lf


def _imec_gain_uv(tags: Mapping[str, str]) -> float | None:
    """µV per bit: voltage range / largest integer / amplification."""
    try:
        range_v = float(tags["imAiRangeMax"])
        probe_type = tags.get("imDatPrb_type", "0")
        max_int = float(tags.get("imMaxInt") or _DEFAULT_MAX_INT.get(probe_type, 512.0))
        gain_uv = 1e6 * range_v / max_int / (_amplification(tags, probe_type) or math.nan)
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return gain_uv if math.isfinite(gain_uv) and gain_uv > 0 else None


def _amplification(tags: Mapping[str, str], probe_type: str) -> float | None:
    """Amplification of the saved band; None if channels differ."""
    is_lf = tags["snsApLfSy"].split(",")[0] == "0"
    if probe_type.startswith(("2", "30")):  # 2.0 and later: one band, one fixed gain
        return float(tags.get("imChan0apGain") or _NP2_AP_GAIN.get(probe_type, 100.0))
    header = tags.get("imroTbl", "").partition(")")[0].split(",")
    if len(header) == 6:  # selectable for all channels at once: type, columns, reference, AP gain, LF gain, filter
        return float(header[4 if is_lf else 3])
    # Selectable per channel: channel, bank, reference, AP gain, LF gain, filter
    entries = [entry.split() for entry in re.findall(r"\(([^(),]*)\)", tags.get("imroTbl", ""))]
    gains = {float(entry[4 if is_lf else 3]) for entry in entries if len(entry) >= 5}
    if not gains:
        gains = {float(tags["imChan0lfGain" if is_lf else "imChan0apGain"])}
    return gains.pop() if len(gains) == 1 else None


def warn_of_lf(path: str) -> None:
    """Warn that a file holds no spikes."""
    warn(f"{path} holds the LF band, which is too slow for spikes; those are in the .ap.bin of the same run.")


# -- files joined in time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A file that is joined with others.

    Attributes
    ----------
    path : str
    meta : SpikeGLXMeta
    n_samples : int
        Number of samples that the file really holds.
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
        """First sample, counted from the start of the acquisition; 0 if unknown."""
        return self.meta.first_sample or 0


def check_joined(parts: Sequence[Part]) -> None:
    """Check that files that are joined in time follow each other.

    Samples are counted from the start of an acquisition, so only files of the same one can be compared by sample; the
    others are compared by the times at which they were created.

    Warns
    -----
    Ks4StreamWarning
        If there are gaps or overlaps between files, they come from different probes, or one was created before the one
        that precedes it.

    Raises
    ------
    RecordingError
        If files of one acquisition are in the wrong order, or were recorded at the same time from different probes.
    """
    joints = []
    for first, second in itertools.pairwise(parts):
        if first.path == second.path:
            continue  # reported elsewhere
        gap_samples = second.start - first.start - first.n_samples
        if not _of_one_acquisition(first.meta, second.meta):
            _check_acquisitions(first, second)
        elif _differ_in_probe(first, second) and gap_samples < 0:
            raise RecordingError(f"{_of_two_probes(first, second)}, at the same time. Sort them separately.")
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
        warn(
            "Files that are joined in time do not follow each other: "
            + "; ".join(joints[:_JOINTS_SHOWN])
            + f"; and {len(joints) - _JOINTS_SHOWN} more" * (len(joints) > _JOINTS_SHOWN)
            + ". Spike times count the samples of the files as if there were neither gaps nor overlaps."
        )


def _of_one_acquisition(first: SpikeGLXMeta, second: SpikeGLXMeta) -> bool:
    """Whether the metadata of two files count samples, and count them from the same moment."""
    if first.first_sample is None or second.first_sample is None:
        return False
    runs = {match[1] for meta in (first, second) if (match := _RUN.search(meta.tags.get("fileName", "")))}
    if len(runs) > 1:
        return False
    if first.created and second.created and first.created != second.created:  # equal if both were cut from one file
        later_s = (second.created - first.created).total_seconds()
        counted_s = (second.first_sample - first.first_sample) / first.sampling_rate_hz
        return abs(later_s - counted_s) < _CLOCK_TOLERANCE_S
    return True


def _check_acquisitions(first: Part, second: Part) -> None:
    """Warn of files of different acquisitions that do not seem to follow each other."""
    if _differ_in_probe(first, second):
        warn(f"{_of_two_probes(first, second)}: units cannot continue from one to the other. Sort them separately.")
    before, after = first.meta.created, second.meta.created
    if before is not None and after is not None and after < before:
        warn(
            f"{second.name} was created at {after}, but {first.name}, which precedes it here, at {before}. Are the "
            "files in order of time?"
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
        f"The files to join are not in order of time: {second.name} begins at sample {second.start} of the "
        f"acquisition, but {first.name}, which precedes it here, at {first.start}. The right order is {right}."
    )
