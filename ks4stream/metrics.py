"""What the quality metrics of units are, and limits in use; :mod:`ks4stream.unit_metrics` computes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a metric is.

    Attributes
    ----------
    name : str
        SpikeInterface's name.
    title, unit : str
        For people; without a unit, "".
    digits : int
        Digits after the point that are shown.
    better : {"high", "low", ""}
        Which values are those of good units, if that can be said.
    threshold : float or None
        A limit that is in common use, by the Allen Institute and the International Brain Laboratory.
    help : str
        What it is, in one sentence.
    undefined : str
        What it means if it is not defined for a unit that has spikes, if that is beyond the limit.
    """

    name: str
    title: str
    unit: str
    digits: int
    better: str
    threshold: float | None
    help: str
    undefined: str = ""


METRICS = (
    Metric("num_spikes", "Spikes", "", 0, "high", None, "Number of spikes, without duplicates."),
    Metric("firing_rate", "Firing rate", "Hz", 2, "", None, "Spikes per second of the time that was sorted."),
    Metric(
        "amplitude_median",
        "Amplitude",
        "µV",
        1,
        "high",
        None,
        "Median over the spikes of the largest deflection, in filtered traces.",
    ),
    Metric("snr", "SNR", "", 1, "high", None, "Amplitude of the mean waveform relative to the noise of its channel."),
    Metric(
        "isi_violations_ratio",
        "ISI violations",
        "",
        2,
        "low",
        0.5,
        "Rate of spikes within 1.5 ms of the previous one, relative to that of independent spikes.",
    ),
    Metric(
        "rp_contamination",
        "Contamination",
        "",
        2,
        "low",
        0.1,
        "Share of foreign spikes, by pairs within 1 ms (Llobet et al. 2022).",
    ),
    Metric(
        "sliding_rp_violation",
        "Sliding RP violation",
        "",
        3,
        "low",
        0.1,
        "Smallest contamination that can be excluded with 90 % confidence, whatever the refractory period; empty if "
        "none of up to 35 % can.",
        "> 0.35",
    ),
    Metric(
        "presence_ratio",
        "Presence ratio",
        "",
        2,
        "high",
        0.9,
        "Share of minutes with at least one spike; empty for recordings of less than a minute.",
    ),
    Metric(
        "amplitude_cutoff",
        "Amplitude cutoff",
        "",
        2,
        "low",
        0.1,
        "Share of the spikes that is missing below the smallest amplitudes, if they are distributed symmetrically; "
        "empty for fewer than 500 spikes.",
    ),
    Metric(
        "nn_isolation",
        "Isolation",
        "",
        2,
        "high",
        None,
        "Share of the nearest neighbours of this unit's and another's spikes that are of the same unit, for the most "
        "similar unit near it: 1 if they are apart, about 0.5 if they are one.",
    ),
    Metric(
        "drift_ptp", "Drift, range", "µm", 1, "low", None, "Range of the unit's median depth from minute to minute."
    ),
    Metric("drift_std", "Drift, s.d.", "µm", 1, "low", None, "Standard deviation of the median depth per minute."),
    Metric(
        "stability",
        "Stability",
        "",
        2,
        "high",
        None,
        "Number of spikes in the half of the recording with fewer, relative to the other half.",
    ),
)
"""All metrics, in the order of the tables."""
