"""Write docs/settings.md from the fields of :class:`ks4stream.Settings`.

Run it after a change of ``ks4stream/settings.py``; a test compares the committed page with the fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import Field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from ks4stream.settings import Settings

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
<!-- Written by docs/make_settings.py; change that file or ks4stream/settings.py, and run it again. -->

# Settings

This page lists every setting, and which ones to try first. Names are Kilosort4's, and so are defaults, except for
three: the two thresholds and `nblocks` follow from the data ("auto"); `run_kilosort` keeps Kilosort4's 9, 8 and 1.

Everything that changes a result is a setting, and nothing else is. The number of workers, the device, and the number of
batches per task never change a result, except that another kind of processor may change last digits; see
[Machines and clusters](clusters.md).

In Python, `Settings` checks all values on construction, and refuses unknown names:

```python
import ks4stream

settings = ks4stream.Settings(Th_learned=7, nblocks=0)
finer = settings.replace(batch_size=30_000)  # the same with one change
from_file = ks4stream.Settings.from_dict({{"Th_learned": 7, "tmax": 600}})
```

On the command line, every setting is an option with dashes instead of underscores, such as `--Th-learned 7`
(`do_CAR=False` is `--no-CAR`); `--set Th_learned=7` does the same. `ks4stream sort --help` lists them.

## The ones to try first

{tries}

The unit "noise s.d." is the standard deviation of the noise in the whitened traces.
"""

TRIES = (
    (
        "`Th_universal`, `Th_learned`",
        "9 and 8",
        "You want Kilosort4's thresholds, for instance to compare. By default (auto), smaller peaks are used where "
        "they agree, and each template has a threshold that follows from the scores of its spikes, so that small units "
        "are found where the background is quiet.",
    ),
    (
        "`Th_universal`, `Th_learned`",
        "10 and 9",
        "There are too many units that look like noise, or too many spikes for memory or disk.",
    ),
    (
        "`nblocks`",
        "0",
        "Short or sparse probes, 2-D arrays, or preparations that cannot move. Drift is not corrected then.",
    ),
    ("`nblocks`", "a number", "`report.html` shows that tissue moves in more, or fewer, parts than were found."),
    ("`tmin`, `tmax`", "seconds", "The first minutes are unusable, or you want a quick look at a part."),
    (
        "`batch_size`",
        "30000",
        "Fast drift, which is not followed within a batch. At 1 µm per second, sorts were slightly worse with it.",
    ),
    (
        "`batch_size`",
        "120000 or more",
        "Few channels or few spikes. The drift estimate then uses more peaks per batch.",
    ),
    ("`do_CAR`", "False", "The recording has been referenced already."),
    ("`acg_threshold`", "lower", "Only cleaner units should be labelled good."),
)

INTRODUCTIONS = {
    "recording": "What is read, how it is divided, and how values are scaled. The sampling rate and the number of "
    "channels are not settings: they belong to the recording (`open_recording(…, fs=…, n_chan=…)`, `--fs` and "
    "`--n-chan`).",
    "preprocessing": "Filter, common reference, and blanking of artifacts.",
    "whitening": "How channels are decorrelated.",
    "waveforms": "The universal waveforms, learned from isolated peaks on single channels.",
    "detection": "The detection of peaks with universal templates all over the probe.",
    "drift": "How the movement of the tissue along the probe is estimated and corrected.",
    "matching": "Matching pursuit: learned templates are matched and subtracted, round by round.",
    "clustering": "The two clusterings, the merging of units and their labels.",
    "results": "Duplicates and positions of spikes.",
}


def page() -> str:
    """Return the page."""
    tries = _table(("setting", "try", "when"), TRIES)
    parts = [HEAD.format(tries=tries)]
    for group, specs in groupby(fields(Settings), key=lambda spec: spec.metadata["group"]):
        table = _table(("setting", "default", "unit", "bounds", "meaning"), map(_row, specs))
        parts.append(f"## {group.capitalize()}\n\n{INTRODUCTIONS[group]}\n\n{table}\n")
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(spec: Field[Any]) -> tuple[str, ...]:
    about = spec.metadata
    default = about["if_none"] or _value(spec.default)
    return f"`{spec.name}`", default, about["unit"], _bounds(about), about["doc"].replace("|", "\\|")


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    if value is None:
        return "none"
    if isinstance(value, float):
        return "infinity" if math.isinf(value) else f"{value:g}"
    return str(value)


def _bounds(about: Any) -> str:
    if about["kind"] is bool:
        return "True or False"
    signs = (("gt", ">"), ("ge", "≥"), ("le", "≤"))
    bounds = [f"{sign} {about[name]:g}" for name, sign in signs if about[name] is not None]
    others = ["or none"] * about["optional"] + ["or auto"] * (about["kilosort4"] is not None)
    return ", ".join([*bounds, *others])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
