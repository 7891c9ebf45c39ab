"""Spans that a person knows to be unsortable, such as the pulses of a stimulator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ks4stream.errors import ArtifactWarning, SettingsError
from ks4stream.messages import warn

PULSE_MS = 1.0  # of which only the time is given

WANTED = (
    "give times of pulses, or two columns with the start and the stop of each span; integers are samples, and numbers "
    "with a decimal point are seconds from the start of the recording"
)


def given_spans(given: Any, *, n_samples: int, sampling_rate_hz: float) -> NDArray[np.int64]:
    """Spans in samples, half-open and in order, without overlaps.

    Parameters
    ----------
    given : array_like, shape (n,) or (n, 2), or path
        Starts of pulses, which last 1 ms, or starts and stops. Integers are samples, floats are seconds. In a text
        file, each line has one or two numbers, separated by commas or blanks; lines that begin with ``#`` are skipped.
        It may also be a ``.npy`` file.
    n_samples : int
        Length of the recording.
    sampling_rate_hz : float

    Returns
    -------
    ndarray of int64, shape (m, 2)

    Raises
    ------
    SettingsError
        If it is something else, a span ends before it starts, or none is within the recording.

    Warns
    -----
    ArtifactWarning
        If some are outside of the recording.
    """
    name = f"blank={os.fspath(given)!r}" if isinstance(given, str | os.PathLike) else "blank"
    values = _read(Path(given), name) if isinstance(given, str | os.PathLike) else np.asarray(given)
    if values.size == 0:
        return np.zeros((0, 2), np.int64)
    if values.dtype.kind not in "iuf" or values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] != 2):
        raise SettingsError(f"{name} has shape {values.shape} and type {values.dtype}: {WANTED}.")
    if not np.isfinite(values).all():
        raise SettingsError(f"{name} has values that are not finite: {WANTED}.")
    samples = values if values.dtype.kind in "iu" else np.rint(values * sampling_rate_hz)
    spans = samples.astype(np.int64)
    if spans.ndim == 1:
        spans = np.column_stack([spans, spans + max(round(PULSE_MS * sampling_rate_hz / 1000), 1)])
    wrong = np.flatnonzero(spans[:, 1] < spans[:, 0])
    if len(wrong):
        raise SettingsError(f"{name}: span {wrong[0]} ends before it starts ({values[wrong[0]].tolist()}): {WANTED}.")
    inside = (spans[:, 1] > 0) & (spans[:, 0] < n_samples)
    if not inside.any():
        raise SettingsError(
            f"{name}: nothing of it is within the recording, which has {n_samples} samples or "
            f"{n_samples / sampling_rate_hz:.3f} s: {WANTED}."
        )
    if not inside.all():
        warn(
            f"{name}: spans outside of the recording, which has {n_samples} samples or "
            f"{n_samples / sampling_rate_hz:.3f} s, are ignored ({np.count_nonzero(~inside)} of {len(spans)}). If all "
            "numbers are integers, they are samples; otherwise, all are seconds.",
            ArtifactWarning,
        )
    return _joined(spans[inside].clip(0, n_samples))


def _joined(spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spans in order of time; those that overlap or touch are one."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reached = np.maximum.accumulate(spans[:, 1])
    opens = np.append(True, spans[1:, 0] > reached[:-1])
    return np.column_stack([spans[opens, 0], reached[np.append(opens[1:], True)]])


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name} cannot be read: {error}") from error
    rows = [line.replace(",", " ").split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len({len(row) for row in rows}) > 1:
        raise SettingsError(f"{name} has lines with different numbers of columns: {WANTED}.")
    try:
        whole = all(text.lstrip("+-").isdigit() for row in rows for text in row)
        values = np.array([[int(text) if whole else float(text) for text in row] for row in rows])
    except ValueError as error:
        raise SettingsError(f"{name} has something other than numbers ({error}): {WANTED}.") from error
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
