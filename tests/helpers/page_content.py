"""Made-up contents of the page that is written after a sort: for any number of units, and of a sort that found none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ks4stream import metrics

METRICS: list[dict[str, Any]] = [dataclasses.asdict(metric) for metric in metrics.METRICS]
REASONS = [
    "few spikes",
    "not refractory",
    "too few spikes to tell if refractory",
    "locked to 50 Hz",
    "in less than a tenth of the recording",
]
LAGS, CCG_LAGS, WIDTH, CHANNELS = 50, 25, 61, 10


def page_content(
    n_units: int = 100,
    *,
    n_channels: int = 384,
    n_shanks: int = 1,
    duration_s: float = 3720.0,
    n_parts: int = 120,
    seed: int = 0,
) -> dict[str, Any]:
    """A plausible content: layout as in Neuropixels, units of all kinds, tissue that drifts, two files."""
    rng = np.random.default_rng(seed)
    probe = _probe(n_channels, n_shanks)
    depth = np.array(probe["y_um"])
    edges_s = np.linspace(0, duration_s, n_parts + 1)
    middle_s = (edges_s[1:] + edges_s[:-1]) / 2
    moved_um = _moved(middle_s, duration_s)
    units = _units(n_units, probe, duration_s, rng)
    good = units["label"].count("good")
    n_spikes = sum(units["num_spikes"])
    time_s = np.arange(1, duration_s, 2.0, dtype=np.float32)
    centre_um = np.linspace(depth.min() + 300, depth.max() - 300, 5)
    displacement = _moved(time_s, duration_s)[:, None] * np.linspace(1.0, 0.7, 5) + rng.normal(0, 0.3, (len(time_s), 5))
    rate_hz = n_spikes / duration_s * (1 + 0.2 * np.sin(middle_s / 300) + rng.normal(0, 0.03, n_parts))
    matched = units["id"][: n_units * 4 // 5]
    blanked = np.where(rng.random(n_parts) < 0.04, rng.random(n_parts) * 0.3, 0.0)
    return {
        "recording": {
            "name": "m042_g0_t0.imec0.ap.bin", "duration_s": duration_s, "start_s": 0.0, "n_channels": n_channels,
            "sampling_rate_hz": 30_000.0, "amplitude_unit": "µV",
        },
        "verdict": {
            "good": good, "mua": n_units - good, "left_out": 9, "n_spikes": n_spikes, "drift_um": 27.4,
            "drift_error_um": 1.8, "blanked_share": 0.011, "blanked_s": 0.011 * duration_s,
            "warnings": [
                {"text": "In 1.1 % of the recording no spikes were looked for, because artifacts are there. Most lie "
                 "around minute 31.", "setting": "artifact_threshold"},
                {"text": "Channel 191 has no signal and was left out.", "setting": "bad_channels"},
                {"text": "The drift estimate of the lowest segment follows the two halves of its peaks only to 6 µm.",
                 "setting": None},
            ],
        },
        "drift": {
            "time_s": time_s, "displacement_um": displacement.astype(np.float32),
            "error_um": np.abs(rng.normal(1.2, 0.4, displacement.shape)).astype(np.float32),
            "centre_um": centre_um.tolist(), "given": False,
        },
        "borders_s": [duration_s * 0.45],
        "rasters": [_rasters(shank, depth, units, duration_s, rng) for shank in range(n_shanks)],
        "probe": probe,
        "units": units,
        "metrics": METRICS,
        "details": _details(units, probe, edges_s, moved_um, rng),
        "time": {
            "edges_s": edges_s.tolist(), "rate_hz": rate_hz.tolist(), "blanked_share": blanked.tolist(),
            "noise": (8 + 2 * rng.random((n_channels, 1)) + rng.random((n_channels, n_parts))).astype(np.float32),
            "explained": (0.72 + 0.05 * np.sin(middle_s / 500) + rng.normal(0, 0.01, n_parts)).tolist(),
        },
        "funnel": [
            {"step": "Peaks detected", "count": int(n_spikes * 1.4), "note": "in two passes; the second is corrected"},
            {"step": "Clusters of peaks", "count": n_units + 80, "note": "learned from 1 in 3 batches"},
            {"step": "Templates matched", "count": n_units + 31, "note": "49 were sums of two others"},
            {"step": "Spikes matched", "count": int(n_spikes * 1.03), "note": ""},
            {"step": "Duplicates removed", "count": int(n_spikes * 0.03), "note": "within 0.25 ms of another"},
            {"step": "Spikes of units", "count": n_spikes, "note": "after merging and leaving out"},
        ],
        "left_out": [
            {"reason": "an artifact's shape", "units": 6, "spikes": 4120},
            {"reason": "a mixture of two larger units", "units": 3, "spikes": 988},
        ],
        "run": _run(),
        "compare": {
            "name": "m042 of 12 November (Kilosort4)", "sampled": True,
            "rows": [{"unit": unit, "other": unit + 3, "agreement": float(1 - rng.beta(1, 6))} for unit in matched],
            "gained": units["id"][len(matched) :], "lost": list(range(7)),
        },
    }  # fmt: skip


def empty_page_content() -> dict[str, Any]:
    """The content of a sort that found nothing, and knows as little as a content may."""
    columns = [
        "id",
        "label",
        "reason",
        "x_um",
        "y_um",
        "shank",
        "channel",
        "similar",
        "similarity",
        *(one["name"] for one in METRICS),
    ]
    return {
        "recording": {
            "name": "silence.bin", "duration_s": 30.0, "start_s": 0.0, "n_channels": 16, "sampling_rate_hz": 25_000.0,
            "amplitude_unit": "file units",
        },
        "verdict": {
            "good": 0, "mua": 0, "left_out": None, "n_spikes": 0, "drift_um": None, "drift_error_um": None,
            "blanked_share": 0.0, "blanked_s": 0.0,
            "warnings": [{"text": "No peaks were found: nothing exceeds the threshold.", "setting": "Th_universal"}],
        },
        "drift": None, "borders_s": [], "rasters": [], "probe": None,
        "units": {name: [] for name in columns},
        "metrics": METRICS,
        "details": {
            "template": np.zeros((0, 0, WIDTH), np.int8), "template_scale": np.zeros(0, np.float32),
            "template_channels": np.zeros((0, 0), np.int16), "template_ms": [0.0] * WIDTH,
            "acg": np.zeros((0, LAGS), np.uint16), "acg_bin_ms": 1.0,
            "nearest": np.zeros((0, 3), np.int32), "similarity": np.zeros((0, 3), np.float32),
            "ccg": np.zeros((0, 3, 2 * CCG_LAGS + 1), np.uint16), "edges_s": [0.0, 30.0],
            "count": np.zeros((0, 1), np.uint16), "amplitude": np.zeros((0, 3, 1), np.float32),
            "depth_um": np.zeros((0, 3, 1), np.float32),
        },
        "time": {"edges_s": [0.0, 30.0], "rate_hz": [0.0], "blanked_share": [0.0], "noise": None, "explained": None},
        "funnel": [], "left_out": [],
        "run": {
            "settings": [{"name": "nblocks", "value": 0, "default": "auto", "changed": True, "help": "segments"}],
            "versions": {}, "digest": "", "device": "cpu", "seconds": {}, "workers": None,
            "resumed": {}, "files": [], "written": "2026-11-30 10:00 UTC", "methods": "", "citations": [],
        },
        "compare": None,
    }  # fmt: skip


def _probe(n_channels: int, n_shanks: int) -> dict[str, Any]:
    channel = np.arange(n_channels)
    shank, row = channel * n_shanks // n_channels, channel % -(-n_channels // n_shanks)
    x_um = np.array([43, 11, 59, 27])[row % 4] + 250 * shank
    bad = [int(number) == 191 for number in channel]
    return {"x_um": x_um.tolist(), "y_um": (row // 2 * 20).tolist(), "shank": shank.tolist(), "bad": bad}


def _units(n: int, probe: dict[str, Any], duration_s: float, rng: np.random.Generator) -> dict[str, Any]:
    channel = rng.integers(0, len(probe["x_um"]), n)
    is_good = rng.random(n) < 0.68
    rate = np.exp(rng.normal(0.7, 1.2, n))
    contamination = np.where(is_good, rng.beta(1, 20, n), rng.beta(3, 5, n))
    columns: dict[str, Any] = {
        "id": np.arange(n).tolist(),
        "label": ["good" if one else "mua" for one in is_good],
        "reason": ["" if one else REASONS[rng.choice(5, p=[0.1, 0.4, 0.3, 0.05, 0.15])] for one in is_good],
        "x_um": (np.array(probe["x_um"])[channel] + rng.normal(0, 6, n)).round(1).tolist(),
        "y_um": (np.array(probe["y_um"])[channel] + rng.normal(0, 8, n)).round(1).tolist(),
        "shank": np.array(probe["shank"])[channel].tolist(),
        "channel": channel.tolist(),
        "num_spikes": np.maximum(1, rate * duration_s).astype(int).tolist(),
        "firing_rate": rate.round(4).tolist(),
        "amplitude_median": np.exp(rng.normal(4.6, 0.5, n)).round(2).tolist(),
        "snr": np.exp(rng.normal(1.9, 0.5, n)).round(3).tolist(),
        "isi_violations_ratio": (contamination * rng.uniform(0.5, 2, n)).round(4).tolist(),
        "rp_contamination": [None if rng.random() < 0.05 else round(float(one), 4) for one in contamination],
        "presence_ratio": np.minimum(1, rng.beta(9, 0.7, n)).round(3).tolist(),
        "amplitude_cutoff": [None if rng.random() < 0.2 else round(float(rng.beta(1, 12)), 4) for _ in range(n)],
        "sliding_rp_violation": [None if rng.random() < 0.3 else round(float(one), 3) for one in contamination],
        "nn_isolation": np.minimum(1, rng.beta(30, 1, n)).round(3).tolist(),
        "drift_ptp": rng.gamma(2, 4, n).round(2).tolist(),
        "drift_std": rng.gamma(2, 1, n).round(2).tolist(),
        "stability": rng.beta(8, 2, n).round(3).tolist(),
        "similar": np.roll(np.arange(n), 1).tolist() if n > 1 else [None] * n,
        "similarity": rng.beta(4, 2, n).round(3).tolist() if n > 1 else [None] * n,
    }
    return columns


def _moved(time_s: Any, duration_s: float) -> Any:
    """Where tissue is, in µm: it settles, and jumps once."""
    return 18 * (1 - np.exp(-time_s / 600)) + 9 * (time_s > 0.62 * duration_s)


def _rasters(
    shank: int,
    depth: Any,
    units: dict[str, Any],
    duration_s: float,
    rng: np.random.Generator,
    ny: int = 300,
    nt: int = 700,
) -> dict[str, Any]:
    y0_um, y1_um = float(depth.min()) - 20, float(depth.max()) + 20
    rows_um = np.linspace(y0_um, y1_um, ny)[:, None]
    moved = _moved(np.linspace(0, duration_s, nt), duration_s)
    mine = [row for row, of in enumerate(units["shank"]) if of == shank]

    def drawn(displacement: Any) -> Any:
        image = rng.gamma(0.4, 12, (ny, nt))
        for row in mine:
            width = (rows_um - (units["y_um"][row] + displacement)) / 9
            image += 60 * units["firing_rate"][row] ** 0.5 * rng.poisson(2, nt) / 2 * np.exp(-(width**2))
        return np.clip(image, 0, 255).astype(np.uint8)

    before, after = drawn(moved), drawn(np.zeros(nt))
    return {
        "shank": shank, "t0_s": 0.0, "t1_s": duration_s, "y0_um": y0_um, "y1_um": y1_um,
        "before": before, "after": after,
    }  # fmt: skip


def _details(
    units: dict[str, Any], probe: dict[str, Any], edges_s: Any, moved_um: Any, rng: np.random.Generator
) -> dict[str, Any]:
    n, n_parts = len(units["id"]), len(edges_s) - 1
    x_um, y_um = np.array(probe["x_um"]), np.array(probe["y_um"])
    ms = (np.arange(WIDTH) - WIDTH // 3) / 30
    template = np.zeros((n, CHANNELS, WIDTH))
    near, used = np.full((n, CHANNELS), -1, np.int16), min(CHANNELS, len(x_um))
    for row in range(n):
        away = np.hypot(x_um - units["x_um"][row], y_um - units["y_um"][row])
        near[row, :used] = np.argsort(away, kind="stable")[:used]
        trough, hump = rng.uniform(0.1, 0.2), rng.uniform(0.25, 0.5)
        shape = -np.exp(-((ms / trough) ** 2)) + rng.uniform(0.2, 0.6) * np.exp(-(((ms - 0.4) / hump) ** 2))
        sizes = np.exp(-away[near[row, :used]] / 30)[:, None]
        template[row, :used] = sizes * shape + rng.normal(0, 0.01, (used, WIDTH))
    peak = np.abs(template).max((1, 2), keepdims=True)
    ids = np.array(units["id"])
    apart = np.hypot(*(np.subtract.outer(np.array(units[axis]), np.array(units[axis])) for axis in ("x_um", "y_um")))
    order = np.argsort(apart + 1e9 * np.eye(n), axis=1, kind="stable")[:, :3]
    nearest = np.full((n, 3), -1, np.int32)
    k = max(0, min(3, n - 1))
    nearest[:, :k] = ids[order[:, :k]]
    lag = np.arange(LAGS)
    rate = np.array(units["firing_rate"])[:, None]
    acg = rng.poisson(
        np.minimum(2000, 40 * rate)
        * (1 - np.exp(-((lag / 4) ** 2)) + 0.4 * np.exp(-(((lag - 8) / 6) ** 2)) * (lag > 2))
    )
    acg[:, 0] = 0
    count = rng.poisson(np.minimum(rate * np.diff(edges_s) * (1 + 0.2 * np.sin(edges_s[:-1] / 400)), 60_000))
    gone = (np.array(units["presence_ratio"])[:, None] < 0.7) & (np.arange(n_parts) > 0.6 * n_parts)
    count = np.where(gone, 0, count)
    spread = np.array([0.82, 1.0, 1.2])[None, :, None] * (1 + 0.05 * np.sin(edges_s[:-1] / 500)) + rng.normal(
        0, 0.01, (n, 3, n_parts)
    )
    amplitude = np.array(units["amplitude_median"])[:, None, None] * spread
    depth = (
        np.array(units["y_um"])[:, None, None]
        + np.array([-6, 0, 6])[None, :, None]
        + rng.normal(0, 0.6, (n, 3, n_parts))
    )
    is_none = (count == 0)[:, None, :]
    return {
        "template": np.rint(template / peak * 127).astype(np.int8),
        "template_scale": (np.array(units["amplitude_median"]) / 1.3 / 127).astype(np.float32),
        "template_channels": near, "template_ms": ms.tolist(),
        "acg": acg.astype(np.uint16), "acg_bin_ms": 1.0,
        "nearest": nearest, "similarity": np.sort(rng.beta(4, 3, (n, 3)), axis=1)[:, ::-1].astype(np.float32),
        "ccg": rng.poisson(np.minimum(2000, 12 * rate)[:, :, None], (n, 3, 2 * CCG_LAGS + 1)).astype(np.uint16),
        "edges_s": edges_s.tolist(), "count": count.astype(np.uint16),
        "amplitude": np.where(is_none, np.nan, amplitude).astype(np.float32),
        "depth_um": np.where(is_none, np.nan, depth).astype(np.float32),
    }  # fmt: skip


def _run() -> dict[str, Any]:
    def setting(name: str, value: Any, default: Any, help: str) -> dict[str, Any]:
        return {"name": name, "value": value, "default": default, "changed": value != default, "help": help}

    return {
        "settings": [
            setting("nblocks", "auto", "auto", "Segments of depth in which drift is estimated; 0: no correction."),
            setting("Th_universal", 8.0, "auto", "Score from which peaks are detected."),
            setting("Th_learned", "auto", "auto", "Score from which spikes of a template count."),
            setting("batch_size", 60_000, 60_000, "Samples of a batch."),
            setting("highpass_cutoff", 250.0, 300.0, "Frequency below which traces are filtered out, in Hz."),
            setting("artifact_threshold", "auto", "auto", "Level beyond which samples count as artifact."),
            setting("bad_channels", [191], None, "Channels that are left out."),
            setting("acg_threshold", 0.2, 0.2, "Largest contamination of a refractory unit."),
            setting("duplicate_spike_ms", 0.25, 0.25, "Spikes of one unit closer than this are duplicates."),
        ],
        "versions": {"ks4stream": "0.2.0", "method": "12", "torch": "2.9.1", "python": "3.11.7"},
        "digest": "5f1c0c6f1dd3a1e2b7f0a5c3f9e0d7c41b2a", "device": "cuda (NVIDIA H200)",
        "seconds": {"whitening": 14.2, "waveforms": 22.8, "peaks": 211.4, "drift": 9.1, "templates": 184.0,
                    "thresholds": 31.5, "spikes": 402.7, "units": 96.3, "results": 18.8},
        "memory_bytes": 6_420_000_000, "workers": 4, "resumed": {"peaks": [186, 186], "templates": [12, 96]},
        "files": ["/data/m042/m042_g0_t0.imec0.ap.bin", "/data/m042/m042_g1_t0.imec0.ap.bin"],
        "written": "2026-11-30 10:00 UTC",
        "methods": "Spikes were sorted with ks4stream 0.2.0 (method 12), an independent implementation of Kilosort4 "
        "(Pachitariu et al., 2024), with the default settings except Th_universal = 8, highpass_cutoff = 250 Hz and "
        "bad_channels = 191.",
        "citations": [
            "Pachitariu M, Sridhar S, Pennington J, Stringer C. Spike sorting with Kilosort4. Nature Methods 21, "
            "914–921 (2024). https://doi.org/10.1038/s41592-024-02232-7",
        ],
    }  # fmt: skip
