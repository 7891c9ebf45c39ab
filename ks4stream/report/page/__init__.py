"""The page that a person looks at the morning after a sort: one HTML file, which asks for nothing from elsewhere.

It answers: did it work, what moved, what was lost, which units can be used, what should be changed? The page knows
nothing of sortings. :func:`write_page` gets one dictionary, the *content*, of plain values (what JSON can hold) and
NumPy arrays. Letters of axes: u units, c channels of the probe, g segments of the drift estimate, b its batches, j
channels of a template, w its samples, L lags of auto-correlograms, M largest lag of cross-correlograms, k neighbours, T
spans of time. What is followed by ``| None`` may be None or left out, and any list may be empty: the page then says so
in a sentence. Columns are lists; in them, None stands for what is not defined::

    {
        "recording": {
            "name": str, "duration_s": float, "start_s": float, "n_channels": int, "sampling_rate_hz": float,
            "amplitude_unit": str,  # "µV" or "file units"
        },
        "verdict": {
            "good": int, "mua": int,  # units
            "left_out": int | None,  # clusters that are no neuron
            "n_spikes": int,
            "drift_um": float | None, "drift_error_um": float | None,  # range of the estimate, and its error
            "blanked_share": float, "blanked_s": float, "observed_s": float,  # time in which spikes were looked for
            "warnings": [{"text": str, "setting": str | None}],  # the name of the setting to change
        },
        "drift": {
            "time_s": (b,) float32,
            "displacement_um": (b, g) float32,  # of the tissue, positive towards larger depth
            "error_um": (b, g) float32 | None,  # half of the difference between the two halves of the peaks
            "centre_um": [g numbers],
            "given": bool,  # by the user, not estimated
        } | None,
        "borders_s": [numbers],  # where files or sessions were joined
        "rasters": [{  # one per shank
            "shank": int, "t0_s": float, "t1_s": float, "y0_um": float, "y1_um": float,
            "before": (ny, nt) uint8 | None, "after": (ny, nt) uint8 | None,  # row 0: smallest depth; 255: darkest
        }],
        "probe": {"x_um": [c], "y_um": [c], "shank": [c], "bad": [c bools]} | None,  # bad: without signal
        "units": {
            "id": [u], "label": ["good" or "mua"], "reason": [str, "" if good], "x_um": [u], "y_um": [u],
            "shank": [u], "channel": [u],  # number of the channel in the file
            "num_spikes": [u], "any metric": [u],
            "similar": [u], "similarity": [u],  # the unit with the most similar template; None if none is similar
        },
        "metrics": [{
            "name": str,  # of a column of units
            "title": str, "unit": str, "digits": int, "threshold": float | None,
            "better": "low" | "high" | None, "help": str,  # one sentence
            "undefined": str | None,  # what None means, if that is beyond the threshold
        }],
        "details": {
            "template": (u, j, w) int8, "template_scale": (u,) float32,  # their product has the amplitude's unit
            "template_channels": (u, j) int16,  # rows of the probe's columns; -1: none
            "template_ms": [w numbers],
            "acg": (u, L) uint16, "acg_bin_ms": float,  # from lag 0
            "nearest": (u, k) int32, "similarity": (u, k) float32,  # numbers of units; -1: none
            "ccg": (u, k, 2 M + 1) uint16,  # lags of the near unit after this one
            "edges_s": [T + 1 numbers], "observed_s": [T], "count": (u, T) uint32,
            "amplitude": (u, 3, T) float32, "depth_um": (u, 3, T) float32,  # 10, 50, 90 %; NaN: no spikes
        } | None,
        "time": {
            "edges_s": [T + 1 numbers], "rate_hz": [T], "blanked_share": [T],
            "noise": (c, T) float32 | None,  # standard deviation, in the amplitude's unit
            "explained": [T] | None,  # share of the energy of whitened traces, noise included, that spikes explain
        },
        "funnel": [{"step": str, "count": int, "note": str}],  # detections, templates, spikes …
        "left_out": [{"reason": str, "units": int, "spikes": int}],
        "run": {
            "settings": [{"name": str, "value": any, "default": any, "changed": bool, "help": str}],
            "versions": {str: str}, "digest": str, "device": str, "seconds": {stage: float},
            "memory_bytes": int | None,  # peaks of all processes on this machine, in all
            "workers": int | None, "resumed": {stage: [known, all]}, "files": [str],
            "written": str, "methods": str,  # a paragraph to paste
            "citations": [str],
        },
        "compare": {
            "name": str, "sampled": bool, "rows": [{"unit": int, "other": int, "agreement": float}],
            "gained": [ids], "lost": [ids of the other sort],
            "not_compared": int,  # units of both without spikes in the time that was compared
        } | None,
    }

``page.html`` is the frame, ``page.css`` what it looks like. The scripts share one scope and are joined in the order of
:data:`SCRIPTS`; ``vendor/`` holds Observable Plot, which draws the charts, and how it was made. Nothing in the content
becomes HTML: scripts set text, and JSON is escaped so that it cannot end its element. The page's security policy allows
these scripts, known by their hashes, and no request. A browser of 2024 or later is needed.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SCRIPTS", "write_page"]

SCRIPTS = ("base.js", "charts.js", "verdict.js", "quality.js", "table.js", "unit.js", "run.js", "main.js")
"""The page's own scripts, in the order in which they are joined."""

_HERE = Path(__file__).parent
_SENT = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"}  # JavaScript has arrays of them
_MANTISSA_BITS = 13  # kept of quantiles that are only drawn: to 0.25 µm at a depth of 4 mm
_DRAWN = ("amplitude", "depth_um")


def write_page(content: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a sorting as one HTML file.

    Parameters
    ----------
    content : dict
        What the page shows, as described at the top of this module. It is not changed.
    path : Path
        The file; an existing one is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    TypeError
        If the content has a value that neither JSON nor NumPy's numbers can hold.
    """
    path.write_bytes(_page(content).encode("utf-8", "replace"))  # names of files may hold bytes that are no text
    return path


def _page(content: Mapping[str, Any]) -> str:
    rest = dict(content)
    details = dict(rest.pop("details", None) or {})
    details.update({name: _rounded(details[name]) for name in _DRAWN if details.get(name) is not None})
    plot, own = _read("vendor/plot.js"), "\n".join(['"use strict";', *(_read(name) for name in SCRIPTS)])
    parts = {
        "policy": f"default-src 'none'; script-src {_hash(plot)} {_hash(own)}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "title": html.escape(str(rest["recording"]["name"])),
        "style": _read("page.css"),
        "content": _json(rest),
        "details": _json(details),
        "plot": plot,
        "script": own,
    }
    # In one pass, so that no part is searched for places of others.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON in ASCII that neither ends the element it stands in nor begins a comment there."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """The same with arrays packed, and None for numbers that JSON lacks."""
    if isinstance(value, np.ndarray):
        return _packed(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _packed(values: NDArray[Any]) -> dict[str, Any]:
    """An array's bytes, little endian and deflated, in base64."""
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    if values.dtype.name not in _SENT:
        raise TypeError(f"The page takes arrays of {', '.join(sorted(_SENT))}, and got one of {values.dtype}.")
    raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    packed = base64.b64encode(zlib.compress(raw, 9)).decode()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "base64": packed}


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers to 13 bits, so that they take half of the bytes when they are deflated."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = 23 - _MANTISSA_BITS
    rounded = (bits + np.uint32(1 << (dropped - 1))) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), np.float32(np.nan))
