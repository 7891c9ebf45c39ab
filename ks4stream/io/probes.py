"""Read and write probe files: Kilosort JSON and ``.mat``, klusta ``.prb``, probeinterface JSON, SpikeGLX ``.meta``.

Nothing in a probe file is ever executed.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ProbeError, RecordingError
from ks4stream.io import spikeglx
from ks4stream.io.objects import read_metadata
from ks4stream.io.prb import evaluate
from ks4stream.messages import warn
from ks4stream.probe import Probe

KILOSORT_NAMES: dict[str, tuple[str, tuple[int, ...]]] = {
    "neuropixPhase3B1_kilosortChanMap": ("neuropixels_1", (191,)),
    "NeuroPix1_default": ("neuropixels_1", (191,)),
    "NP2_kilosortChanMap": ("neuropixels_2_single_shank", ()),
    "NeuroPix2_default": ("neuropixels_2_single_shank", ()),
}
"""Probe names of Kilosort: our probe with the same contacts, and the channels that Kilosort's leaves out (the reference
of Neuropixels 1.0)."""

_UM_PER_UNIT = {"um": 1.0, "µm": 1.0, "mm": 1e3, "m": 1e6}


def load_probe(probe: Probe | Mapping[str, Any] | str | os.PathLike[str]) -> Probe:
    """Load a probe.

    Parameters
    ----------
    probe : Probe, mapping or path
        A :class:`~ks4stream.probe.Probe` (returned unchanged); a mapping with Kilosort's keys ``chanMap``,
        ``xc``, ``yc``, ``kcoords``; a file (Kilosort ``.json`` or ``.mat``, klusta ``.prb``, probeinterface
        ``.json``, SpikeGLX ``.meta``); or the name of a shipped probe (see :func:`shipped_probes`), ours or Kilosort's
        (:data:`KILOSORT_NAMES`), with or without the ending ``.json`` or ``.mat``.

    Returns
    -------
    Probe
        The contacts. Kilosort's ``n_chan`` counts the contacts, not the channels of the file, so
        ``n_chan_file`` is known only from ``.prb`` and ``.meta`` files that have it.

    Raises
    ------
    ProbeError
        If there is no such file or shipped probe, it cannot be read, or its geometry contradicts itself.

    Examples
    --------
    >>> load_probe("tetrode").n_channels
    4
    """
    if isinstance(probe, Probe):
        return probe
    if isinstance(probe, Mapping):
        if _is_probeinterface(probe):
            return _from_probeinterface(dict(probe), "probe")
        return _from_kilosort(probe, str(probe.get("name", "probe")))
    path = Path(probe)
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise ProbeError(
                f"{path} has the suffix {path.suffix or 'nothing'!r}; probe files end in {', '.join(_READERS)}. "
                "Convert it, or pass a dict with chanMap, xc, yc and kcoords."
            )
        return reader(path)
    shipped = shipped_probes()
    name = path.name.removesuffix(".json").removesuffix(".mat")
    if path.name == str(probe):
        own, without = KILOSORT_NAMES.get(name, (name, ()))
        if own in shipped:
            found = _read_json(shipped[own])
            return found.drop_channels(without) if without else found
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    raise ProbeError(
        f"{probe} is neither a probe file nor the name of a shipped probe."
        + (f" Did you mean {near[0]!r}?" if near else "")
        + f" Shipped probes: {', '.join(shipped) or 'none'}."
    )


def save_probe(probe: Probe, path: str | os.PathLike[str]) -> None:
    """Write a probe as Kilosort JSON, which Kilosort4, SpikeInterface and :func:`load_probe` read.

    Parameters
    ----------
    probe : Probe
        The probe; the format does not store its name and ``n_chan_file``.
    path : path
        The file to write, with a name that ends in ``.json``.

    Raises
    ------
    ProbeError
        If the name does not end in ``.json``.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ProbeError(f"{path}: probes are written as JSON; give a name that ends in .json.")
    values = {
        "chanMap": probe.chan_map.tolist(),
        "xc": probe.x_um.tolist(),
        "yc": probe.y_um.tolist(),
        "kcoords": probe.shank.tolist(),
        "n_chan": probe.n_channels,
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def shipped_probes() -> dict[str, Path]:
    """Return the probes that come with ks4stream, with the file of each name.

    Returns
    -------
    dict of str to Path
        Sorted by name.
    """
    installed = Path(str(resources.files("ks4stream"))) / "probes_data"
    checkout = Path(__file__).resolve().parents[2] / "probes"
    for folder in (installed, checkout):
        files = {file.stem: file for file in sorted(folder.glob("*.json"))}
        if files:
            return files
    return {}


# -- formats -------------------------------------------------------------------------------------------


def _content(path: Path) -> bytes:
    try:
        return read_metadata(str(path), path.stat().st_size)
    except (OSError, RecordingError) as error:
        raise ProbeError(str(error)) from error


def _read_json(path: Path) -> Probe:
    try:
        content = json.loads(_content(path))  # detects UTF-8 and UTF-16, with or without a byte order mark
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ProbeError(f"{path} holds a {type(content).__name__}; expected the keys chanMap, xc, yc and kcoords.")
    if _is_probeinterface(content):
        return _from_probeinterface(content, path.stem)
    return _from_kilosort(content, path.stem)


def _read_mat(path: Path) -> Probe:
    """Kilosort's channel map for MATLAB: channels from 1, ``connected`` false for channels that are not sorted."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path)
    except NotImplementedError as error:
        raise ProbeError(f'{path} is a MATLAB 7.3 file; save it again in MATLAB with save(…, "-v7").') from error
    except Exception as error:  # scipy raises exceptions of many types for a damaged file
        raise ProbeError(f"{path} cannot be read as a MATLAB file: {error}.") from error
    _need(content, ("xcoords", "ycoords"), str(path))
    n_contacts = np.size(content["xcoords"])
    is_connected = _vector(content.get("connected", np.ones(n_contacts))).astype(bool)
    columns = {
        "chan_map": _mat_chan_map(content, path),
        "x_um": _vector(content["xcoords"]),
        "y_um": _vector(content["ycoords"]),
        "shank": _vector(content.get("kcoords", np.ones(n_contacts))),
    }
    lengths = {name: len(values) for name, values in {**columns, "connected": is_connected}.items()}
    if len(set(lengths.values())) > 1:
        raise ProbeError(f"{path}: lengths differ: {', '.join(f'{name} {n}' for name, n in lengths.items())}.")
    return Probe(**{name: values[is_connected] for name, values in columns.items()}, name=path.stem)


def _mat_chan_map(content: Mapping[str, Any], path: Path) -> NDArray[Any]:
    """Channels counted from 0, from ``chanMap`` (from 1), ``chanMap0ind`` or both."""
    if "chanMap" not in content and "chanMap0ind" not in content:
        _need(content, ("chanMap",), str(path))
    from_one = _vector(content["chanMap"]) - 1.0 if "chanMap" in content else None
    if from_one is not None and from_one.size and from_one.min() < 0:
        raise ProbeError(f"{path}: chanMap holds 0, but in .mat files it counts from 1 (chanMap0ind counts from 0).")
    if "chanMap0ind" not in content:
        return np.asarray(from_one)
    from_zero = _vector(content["chanMap0ind"]).astype(float)
    if from_one is not None and not np.array_equal(from_one, from_zero):
        raise ProbeError(f"{path} contradicts itself: chanMap is not chanMap0ind + 1. Remove the wrong one.")
    return from_zero


def _read_prb(path: Path) -> Probe:
    """Klusta's probe file: Python source, which is evaluated but never executed."""
    content = _content(path)
    text = content.decode(
        json.detect_encoding(content), errors="replace"
    )  # only comments hold other characters than ASCII
    values = evaluate(text, ("channel_groups", "total_nb_channels"), str(path))
    groups = values.get("channel_groups")
    if not isinstance(groups, dict) or not groups:
        raise ProbeError(f"{path} must assign channel_groups = {{0: {{'channels': […], 'geometry': {{…}}}}}}.")
    chan_map: list[int] = []
    positions: list[Any] = []
    shank: list[int] = []
    for number, (key, group) in enumerate(groups.items()):
        channels, geometry = _prb_group(group, f"{path}: channel group {key!r}")
        chan_map += channels
        positions += geometry
        shank += [key if isinstance(key, int) else number] * len(channels)
    n_chan_file = values.get("total_nb_channels")
    probe = Probe.from_positions(
        np.array(positions, dtype=np.float64).reshape(-1, 2),
        chan_map=chan_map,
        shank=shank,
        n_chan_file=n_chan_file if isinstance(n_chan_file, int) else None,
        name=path.stem,
    )
    return _warn_if_from_one(probe)


def _prb_group(group: Any, what: str) -> tuple[list[int], list[tuple[float, float]]]:
    if not isinstance(group, dict) or "channels" not in group or "geometry" not in group:
        raise ProbeError(f"{what} must have 'channels' and 'geometry'.")
    channels, geometry = group["channels"], group["geometry"]
    if not isinstance(channels, list | tuple | set) or not all(isinstance(number, int | float) for number in channels):
        raise ProbeError(f"{what}: 'channels' must be a list of numbers.")
    if isinstance(geometry, list | tuple):  # in the order of the channels
        if len(geometry) != len(channels):
            raise ProbeError(f"{what} has {len(channels)} channels but {len(geometry)} positions.")
        geometry = dict(zip(channels, geometry, strict=True))
    if not isinstance(geometry, dict):
        raise ProbeError(f"{what}: 'geometry' must give a position for each channel.")
    missing = [channel for channel in channels if channel not in geometry]
    if missing:
        raise ProbeError(f"{what}: 'geometry' lacks a position for channel {', '.join(map(str, missing))}.")
    try:
        return list(channels), [(float(x), float(y)) for x, y in (geometry[channel] for channel in channels)]
    except (TypeError, ValueError) as error:
        raise ProbeError(f"{what}: every position must be two numbers, x and y in µm.") from error


def _read_meta(path: Path) -> Probe:
    probe = spikeglx.read_meta(path).probe()
    if probe is None:
        raise ProbeError(f"{path} does not describe a probe geometry (~snsGeomMap, ~snsShankMap or ~imroTbl).")
    return probe


_READERS = {".json": _read_json, ".mat": _read_mat, ".prb": _read_prb, ".meta": _read_meta}


# -- contents ------------------------------------------------------------------------------------------


def _from_kilosort(content: Mapping[str, Any], name: str) -> Probe:
    """Kilosort4's keys; ``n_chan``, the number of contacts, adds nothing and is not read."""
    _need(content, ("chanMap", "xc", "yc"), name)
    chan_map = _vector(content["chanMap"])
    probe = Probe(
        chan_map=chan_map,
        x_um=_vector(content["xc"]),
        y_um=_vector(content["yc"]),
        shank=_vector(content.get("kcoords", np.zeros(len(chan_map), np.int64))),
        name=name,
    )
    return _warn_if_from_one(probe)


def _warn_if_from_one(probe: Probe) -> Probe:
    """Warn of a channel map that seems to count from 1; only the user can know, so it is never changed."""
    n = probe.n_channels
    if n > 1 and np.array_equal(np.sort(probe.chan_map), np.arange(1, n + 1)):
        warn(
            f"{probe.name}: the channel map of {n} contacts has the numbers 1 to {n}. Channels are counted from 0: if "
            "yours are counted from 1, subtract 1. If you left out channel 0 of the file on purpose, ignore this."
        )
    return probe


def _is_probeinterface(content: Mapping[str, Any]) -> bool:
    return content.get("specification") == "probeinterface" or "probes" in content


def _from_probeinterface(content: dict[str, Any], name: str) -> Probe:
    """One or several probes of the probeinterface library; each shank of each becomes a shank of its own."""
    import probeinterface

    try:
        probes = probeinterface.ProbeGroup.from_dict(content).probes
    except Exception as error:  # the library checks little: a wrong file may fail anywhere in it
        raise ProbeError(f"{name} cannot be read by probeinterface: {error!r}.") from error
    columns: list[NDArray[np.float64]] = [np.empty((4, 0))]
    next_shank = next_contact = 0
    for probe in probes:
        columns.append(_probeinterface_columns(probe, next_shank, next_contact, name))
        next_shank = int(columns[-1][3].max(initial=next_shank - 1)) + 1
        next_contact += probe.get_contact_count()
    chan_map, x_um, y_um, shank = np.concatenate(columns, axis=1)
    return _warn_if_from_one(Probe(chan_map.astype(np.int64), x_um, y_um, shank.astype(np.int64), name=name))


def _probeinterface_columns(probe: Any, first_shank: int, first_contact: int, name: str) -> NDArray[np.float64]:
    """Channel, x, y and shank of one probe's connected contacts, shape (4, contact)."""
    if probe.ndim != 2:
        raise ProbeError(
            f"{name} has {probe.ndim}-dimensional positions; project them with to_2d() and save the probe again."
        )
    positions_um = np.asarray(probe.contact_positions, np.float64) * _UM_PER_UNIT[probe.si_units]
    channels = probe.device_channel_indices
    if channels is None:
        warn(
            f"{name} has no wiring (device_channel_indices): contact i is assumed to be channel i of the file. "
            "If that is wrong, set the wiring with probeinterface."
        )
        channels = first_contact + np.arange(len(positions_um))
    channels = np.asarray(channels)
    shank_ids = probe.shank_ids if probe.shank_ids is not None else np.zeros(len(positions_um))
    shank = first_shank + _shank_numbers(np.asarray(shank_ids))
    is_wired = channels >= 0
    return np.stack([channels, *positions_um.T, shank]).astype(np.float64)[:, is_wired]


def _shank_numbers(shank_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return shank ids as numbers, or numbered 0, 1, … in alphabetical order if they are not numbers."""
    try:
        return shank_ids.astype(np.int64)
    except ValueError:
        return np.unique(shank_ids.astype(str), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _vector(values: Any) -> NDArray[Any]:
    """Flatten the (n, 1) columns and (1, n) rows that MATLAB makes of vectors; leave tables unchanged."""
    array = np.asarray(values)
    return array.reshape(-1) if array.size == max(array.shape, default=0) else array


def _need(content: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        present = ", ".join(str(key) for key in content if not str(key).startswith("__"))
        raise ProbeError(f"{what} lacks {', '.join(missing)}; it has: {present or 'nothing'}.")
