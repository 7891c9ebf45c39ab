"""Recordings as they come from a real rig: what happens to a recording besides spikes and noise.

Ten clean units (80 to 250 µV) on 32 contacts for a minute, unless said otherwise, and one thing that goes wrong:

- ``big16``, ``big32``, ``big32dense``: one more neuron of 2 mV on 16 or 32 contacts, or of 1.2 mV on 32 in 150 µm.
- ``stim130``, ``stim40``, ``trains200``: stimulation pulses of 0.6 ms, at 130 Hz for 20 s, at 40 Hz throughout, and at
  200 Hz in one of four seconds. Their times are in the truth, as ``pulse_samples``.
- ``dead75``, ``deadpieces``: three quarters of the recording are zero, or half of it in pieces at the last value.
- ``muscle``, ``emg``: loud noise in one of ten seconds, on half of the contacts or on all.
- ``turns``, ``turnsalike``: depths take turns being active; nothing moves.
- ``step20``, ``step40``, ``joined``: the tissue jumps in the middle of a batch, or between two files.
- ``one``, ``two``, ``four``, ``eight``: contacts.
- ``hum``: 50 Hz and harmonics up to 2 kHz, not alike on all contacts.
- ``pops``: 5 mV on one contact, forty times.
- ``dies``, ``noisyhalf``: a contact is silent, or loud, in the second half.
- ``clipped``: a converter of 9 bits that clips at ±150 µV.
- ``light``: steps of up to 1 mV and back after 10 ms on half of the contacts, at 5 Hz.
- ``leaving``: the tissue moves by 120 µm in one direction, so that units leave the probe and others enter.
- ``refchannel``: one contact is the reference, with little noise of its own.
- ``outside``: 64 contacts, of which the upper 20 are outside the brain.
- ``breathing``: the tissue moves by ±2.5 µm at 0.3 Hz.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

from ks4stream.probe import Probe
from ks4stream.simulate import SimulatedRecording, linear_probe, simulate, staggered_probe, tetrode_probe
from ks4stream.simulate.api import from_scene
from ks4stream.simulate.motion import Motion
from ks4stream.simulate.scene import Scene
from ks4stream.simulate.trains import Spikes
from ks4stream.simulate.units import scaled_to_amplitude

Traces = NDArray[np.float32]
"""µV, (time, channel)."""
Change = Callable[[Traces, NDArray[np.int64]], Traces]
"""What is done to the traces at these samples."""

RATE_HZ = 30_000


@dataclass(frozen=True, eq=False)
class ChangedScene(Scene):
    """A scene whose traces are changed when they are read."""

    change: Change = field(kw_only=True)

    def read(self, start: int, stop: int) -> NDArray[np.int16]:
        """Samples start … stop − 1, (time, file channel), in bits."""
        traces_uv = super().read(start, stop) * np.float32(self.gain_uv)
        changed = self.change(traces_uv, start + np.arange(len(traces_uv)))
        return np.clip(np.rint(changed / np.float32(self.gain_uv)), -32768, 32767).astype(np.int16)


def changed(
    recording: SimulatedRecording, change: Change, amplitudes_uv: Any = None, **of_scene: Any
) -> SimulatedRecording:
    """The same recording with other traces."""
    values = {of.name: getattr(recording.scene, of.name) for of in fields(Scene)} | of_scene
    amplitudes_uv = recording.units["amplitude_uv"] if amplitudes_uv is None else amplitudes_uv
    return from_scene(ChangedScene(**values, change=change), amplitudes_uv)


def clean(seed: int, duration_s: float = 60.0, probe: Probe | None = None, **given: Any) -> SimulatedRecording:
    """Ten units of 80 to 250 µV that fire at 3 to 15 Hz."""
    given = {"n_units": 10, "amplitude_range_uv": (80.0, 250.0), "rate_range_hz": (3.0, 15.0)} | given
    return simulate(probe or staggered_probe(32), duration_s, seed=seed, **given)


def _chosen(spikes: Spikes, kept: NDArray[np.bool_]) -> Spikes:
    """Some of the spikes."""
    return Spikes(spikes.sample[kept], spikes.phase[kept], spikes.unit[kept], spikes.relative[kept])


# --- a large neuron -------------------------------------------------------------------------------------------


def _with_big_unit(seed: int, duration_s: float, probe: Probe, amplitude_uv: float) -> SimulatedRecording:
    """One more unit, drawn with another seed."""
    recording = clean(seed, duration_s, probe)
    big = clean(seed + 1000, duration_s, probe, n_units=1, amplitude_range_uv=(amplitude_uv, amplitude_uv))
    scene, n = recording.scene, recording.n_units
    samples = np.concatenate([scene.spikes.sample, big.scene.spikes.sample])
    order = np.argsort(samples, kind="stable")
    spikes = Spikes(
        samples[order],
        np.concatenate([scene.spikes.phase, big.scene.spikes.phase])[order],
        np.concatenate([scene.spikes.unit, np.full(len(big.scene.spikes.unit), n)])[order],
        np.concatenate([scene.spikes.relative, big.scene.spikes.relative])[order],
    )
    units = (*scene.units[:n], big.scene.units[0], *scene.units[n:])
    amplitudes_uv = [*recording.units["amplitude_uv"], amplitude_uv]
    return from_scene(replace(scene, units=units, n_units=n + 1, spikes=spikes), amplitudes_uv)


def big16(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """A neuron of 2 mV on 16 contacts of one column, 25 µm apart."""
    return _with_big_unit(seed, duration_s, linear_probe(16), 2000.0)


def big32(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """A neuron of 2 mV on 32 contacts over 620 µm."""
    return _with_big_unit(seed, duration_s, staggered_probe(32), 2000.0)


def big32dense(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """A neuron of 1.2 mV on 32 contacts over 230 µm: it reaches most of them."""
    return _with_big_unit(seed, duration_s, staggered_probe(32, pitch_um=7.5, column_um=16.0), 1200.0)


# --- stimulation ----------------------------------------------------------------------------------------------


def _stimulated(recording: SimulatedRecording, seed: int, pulse_s: NDArray[np.float64]) -> SimulatedRecording:
    """Biphasic pulses of 0.6 ms with a tail, up to 4 mV at the contact nearest to the electrode."""
    rng = np.random.default_rng((seed, 11))
    y_um = recording.probe.y_um
    gain_uv = 4000.0 / (1 + np.abs(y_um - rng.uniform(y_um.min(), y_um.max())) / 200)
    time_ms = np.arange(60) / RATE_HZ * 1000
    shape = np.where(time_ms < 0.3, 1.0, np.where(time_ms < 0.6, -1.0, -0.15 * np.exp((0.6 - time_ms) / 0.25)))
    starts = np.rint(pulse_s * RATE_HZ).astype(np.int64)

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        near = starts[(starts > sample[0] - len(shape)) & (starts <= sample[-1])]
        added = np.zeros(len(sample) + 2 * len(shape))
        for start in (near - sample[0] + len(shape)).tolist():
            added[start : start + len(shape)] += shape
        return traces_uv + (added[len(shape) : -len(shape), None] * gain_uv).astype(np.float32)

    return changed(recording, change)


PULSES: dict[str, Callable[[float], NDArray[np.float64]]] = {
    "stim130": lambda duration_s: np.arange(20.0, min(40.0, duration_s), 1 / 130),
    "stim40": lambda duration_s: np.arange(0.01, duration_s, 1 / 40),
    "trains200": lambda duration_s: (np.arange(0, duration_s, 4)[:, None] + np.arange(200) / 200).ravel(),
}
"""Times of the pulses in s."""


def stim130(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """130 Hz from 20 to 40 s."""
    return _stimulated(clean(seed, duration_s), seed, PULSES["stim130"](duration_s))


def stim40(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """40 Hz throughout."""
    return _stimulated(clean(seed, duration_s), seed, PULSES["stim40"](duration_s))


def trains200(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """200 Hz in one of four seconds."""
    return _stimulated(clean(seed, duration_s), seed, PULSES["trains200"](duration_s))


# --- dead time ------------------------------------------------------------------------------------------------


def _without(recording: SimulatedRecording, change: Change, spans: list[tuple[int, int]]) -> SimulatedRecording:
    """Without the spikes in some spans, which cannot be found."""
    spikes = recording.scene.spikes
    kept = np.ones(len(spikes.sample), bool)
    for start, stop in spans:
        kept &= (spikes.sample < start) | (spikes.sample >= stop)
    return changed(recording, change, spikes=_chosen(spikes, kept))


def dead75(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Zero but for the last quarter."""
    stop = round(0.75 * duration_s * RATE_HZ)
    return _without(
        clean(seed, duration_s),
        lambda traces_uv, sample: np.where(sample[:, None] < stop, np.float32(0), traces_uv),
        [(0, stop)],
    )


def deadpieces(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Pieces of 0.2 to 4 s, about half of the time, in which the last value is repeated."""
    rng = np.random.default_rng((seed, 12))
    edges = np.cumsum(np.exp(rng.uniform(np.log(0.2), np.log(4.0), int(duration_s * 3))))
    edges = (edges[edges < duration_s] * RATE_HZ).astype(np.int64)
    spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=False))

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        for start, stop in spans:
            inside = (sample >= start) & (sample < stop)
            if inside.any():
                traces_uv[inside] = traces_uv[max(int(np.argmax(inside)) - 1, 0)]
        return traces_uv

    return _without(clean(seed, duration_s), change, spans)


# --- loud seconds ---------------------------------------------------------------------------------------------


def _loud(recording: SimulatedRecording, seed: int, on: NDArray[np.float64], size_uv: float) -> SimulatedRecording:
    """Noise between 80 and 1000 Hz in one of ten seconds, a part of it common to the contacts."""
    rng = np.random.default_rng((seed, 13))
    band = butter(3, [80, 1000], btype="band", fs=RATE_HZ, output="sos")
    bursts: list[Traces] = []
    for _ in range(int(recording.duration_s // 10)):
        own = rng.standard_normal((RATE_HZ, recording.probe.n_channels))
        noise = sosfiltfilt(band, 0.5 * own + rng.standard_normal((RATE_HZ, 1)), axis=0)
        envelope = np.sin(np.pi * np.arange(RATE_HZ) / RATE_HZ)[:, None] ** 0.5
        bursts.append((size_uv * noise / noise.std() * envelope * on).astype(np.float32))

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        number, within = np.divmod(sample, 10 * RATE_HZ)
        for index in np.unique(number[within < RATE_HZ]).tolist():
            inside = (number == index) & (within < RATE_HZ)
            if index < len(bursts):
                traces_uv[inside] += bursts[index][within[inside]]
        return traces_uv

    return changed(recording, change)


def muscle(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """On the upper half of the contacts, 150 µV."""
    recording = clean(seed, duration_s)
    return _loud(recording, seed, (recording.probe.y_um > np.median(recording.probe.y_um)).astype(float), 150.0)


def emg(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """On all contacts, 100 to 200 µV."""
    return _loud(clean(seed, duration_s), seed, np.linspace(0.7, 1.3, 32), 150.0)


# --- activity and motion --------------------------------------------------------------------------------------


def turns(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """Thirds of the probe take turns of 10 to 30 s; elsewhere, one in ten spikes is left."""
    recording = clean(seed, duration_s, n_units=15)
    rng = np.random.default_rng((seed, 14))
    edges = np.cumsum(rng.uniform(10, 30, int(duration_s // 10)))
    turn = rng.integers(0, 3, len(edges) + 1)
    spikes, y_um = recording.scene.spikes, recording.units["y_um"]
    third = np.digitize(y_um, np.quantile(recording.probe.y_um, [1 / 3, 2 / 3]))
    active = turn[np.searchsorted(edges, spikes.sample / RATE_HZ)] == third[spikes.unit]
    kept = active | (rng.random(len(active)) < 0.1)
    scene = replace(recording.scene, spikes=_chosen(spikes, kept))
    return from_scene(scene, recording.units["amplitude_uv"])


def turnsalike(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """14 units of 150 µV, 40 µm apart; even and odd ones take turns of 15 s, which looks like 40 µm of motion."""
    recording = clean(seed, duration_s, n_units=14, amplitude_range_uv=(150.0, 150.0), rate_range_hz=(8.0, 8.0))
    scene, probe = recording.scene, recording.probe
    y_um = probe.y_um.min() + 40.0 * (1 + np.arange(14))
    units = tuple(
        scaled_to_amplitude(replace(unit, x_um=16.0, y_um=float(y)), probe, np.ones(32, bool), 150.0)
        for unit, y in zip(scene.units[:14], y_um, strict=True)
    )
    its_turn = (scene.spikes.sample // (15 * RATE_HZ)) % 2 == scene.spikes.unit % 2
    spikes = _chosen(scene.spikes, its_turn)
    return from_scene(replace(scene, units=(*units, *scene.units[14:]), spikes=spikes), np.full(14, 150.0))


@dataclass(frozen=True, eq=False)
class Moving(Motion):
    """Any motion, alike at all depths."""

    path_um: Callable[[NDArray[np.float64]], NDArray[np.float64]] = field(kw_only=True)

    def displacement_um(self, time_s: Any, y_um: Any = 0.0) -> NDArray[np.float64]:
        """How far the tissue has moved."""
        time, _ = np.broadcast_arrays(np.asarray(time_s, float), np.asarray(y_um, float))
        return np.asarray(self.path_um(time), float)


def moving(
    recording: SimulatedRecording, path_um: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> SimulatedRecording:
    """The same units in tissue that moves."""
    still = {of.name: getattr(recording.scene.drift, of.name) for of in fields(Motion)}
    scene = replace(recording.scene, drift=Moving(**still, path_um=path_um))
    return from_scene(scene, recording.units["amplitude_uv"])


def _stepping(seed: int, duration_s: float, step_um: float, at_s: float) -> SimulatedRecording:
    return moving(clean(seed, duration_s, n_units=15), lambda time_s: np.where(time_s < at_s, 0.0, step_um))


def step20(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """20 µm, in the middle of the batch in the middle of the recording."""
    return _stepping(seed, duration_s, 20.0, 2 * (duration_s // 4) + 1.0)


def step40(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """40 µm, in the middle of the batch in the middle of the recording."""
    return _stepping(seed, duration_s, 40.0, 2 * (duration_s // 4) + 1.0)


def joined(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """30 µm, after a third of the recording, where a second file begins."""
    return _stepping(seed, duration_s, -30.0, duration_s / 3 + 0.7)


def leaving(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """120 µm in one direction."""
    return moving(clean(seed, duration_s, n_units=15), lambda time_s: 120.0 * (time_s / duration_s - 0.5))


def breathing(seed: int, duration_s: float = 120.0) -> SimulatedRecording:
    """±2.5 µm at 0.3 Hz."""
    return moving(clean(seed, duration_s, n_units=15), lambda time_s: 2.5 * np.sin(2 * np.pi * 0.3 * time_s))


# --- contacts -------------------------------------------------------------------------------------------------


def one(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """One contact and two units, of which one is larger."""
    return clean(seed, duration_s, linear_probe(1), n_units=2, amplitude_range_uv=(120.0, 350.0))


def two(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """Two contacts."""
    return clean(seed, duration_s, linear_probe(2), n_units=2, amplitude_range_uv=(120.0, 350.0))


def four(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """A tetrode and four units."""
    return clean(seed, duration_s, tetrode_probe(1), n_units=4)


def eight(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """Eight contacts in a column, 25 µm apart."""
    return clean(seed, duration_s, linear_probe(8), n_units=5)


def dies(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """The contact at which the largest unit is seen is zero in the second half."""
    recording = clean(seed, duration_s)
    channel, half = _largest_contact(recording), recording.traces.shape[0] // 2

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        traces_uv[sample >= half, channel] = 0
        return traces_uv

    return changed(recording, change)


def noisyhalf(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """A contact beside the one at which the largest unit is seen has noise of 200 µV in the second half."""
    recording = clean(seed, duration_s)
    channel, half = _largest_contact(recording) ^ 1, recording.traces.shape[0] // 2

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        rng = np.random.default_rng((seed, 15, int(sample[0])))
        traces_uv[:, channel] += np.where(sample >= half, 200 * rng.standard_normal(len(sample)), 0)
        return traces_uv

    return changed(recording, change)


def _largest_contact(recording: SimulatedRecording) -> int:
    largest = int(recording.units["amplitude_uv"].argmax())
    return int(np.ptp(recording.templates_uv()[largest], axis=0).argmax())


def refchannel(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """Contact 20 has 1 µV of noise and no spikes."""

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        traces_uv[:, 20] = np.random.default_rng((seed, 16, int(sample[0]))).standard_normal(len(sample))
        return traces_uv

    return changed(clean(seed, duration_s), change)


def outside(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """64 contacts, of which the upper 20 have noise of 4 µV, no spikes, and twice the hum."""
    recording = clean(seed, duration_s, staggered_probe(64), n_units=16)
    scene, inside = recording.scene, recording.units["y_um"] < recording.probe.y_um[40]
    number, kept = np.cumsum(inside) - 1, inside[scene.spikes.unit]
    spikes = Spikes(
        scene.spikes.sample[kept],
        scene.spikes.phase[kept],
        number[scene.spikes.unit[kept]],
        scene.spikes.relative[kept],
    )
    units = (*(scene.units[index] for index in np.flatnonzero(inside)), *scene.units[recording.n_units :])

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        rng = np.random.default_rng((seed, 17, int(sample[0])))
        hum_uv = 40 * np.sin(2 * np.pi * 50 * sample / RATE_HZ)[:, None]
        traces_uv[:, 44:] = 4 * rng.standard_normal((len(sample), 20)) + 2 * hum_uv
        traces_uv[:, :44] += hum_uv
        return traces_uv

    of_scene = {"spikes": spikes, "units": units, "n_units": int(inside.sum())}
    return changed(recording, change, recording.units["amplitude_uv"][inside], **of_scene)


# --- electricity ----------------------------------------------------------------------------------------------


def hum(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """50 Hz of 300 µV with 39 harmonics of 60 to 10 µV, of one phase, between 0.4 and 1.6 times as large by contact."""
    rng = np.random.default_rng((seed, 18))
    order = np.arange(1, 41)
    size_uv = np.where(order == 1, 300.0, 60.0 / np.sqrt(order))
    period = size_uv @ np.cos(2 * np.pi * np.outer(order, np.arange(600)) / 600 + rng.normal(0, 0.3, 40)[:, None])
    gain = rng.uniform(0.4, 1.6, 32)
    return changed(
        clean(seed, duration_s),
        lambda traces_uv, sample: traces_uv + (period[sample % 600][:, None] * gain).astype(np.float32),
    )


def pops(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """5 mV on one contact, which decay within 1 to 5 ms, forty times."""
    rng = np.random.default_rng((seed, 19))
    starts = np.sort(rng.integers(0, round(duration_s * RATE_HZ) - 1000, 40))
    decay_ms, sign = rng.uniform(0.3, 1.5, 40), rng.choice([-1, 1], 40)
    channel = int(rng.integers(0, 32))

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        for start, decay, side in zip(starts.tolist(), decay_ms.tolist(), sign.tolist(), strict=True):
            inside = (sample >= start) & (sample < start + 1000)
            late_ms = (sample[inside] - start) / RATE_HZ * 1000
            traces_uv[inside, channel] += side * 5000 * np.exp(-late_ms / decay)
        return traces_uv

    return changed(clean(seed, duration_s), change)


def clipped(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """Steps of 0.6 µV between ±150 µV."""
    return changed(
        clean(seed, duration_s, lfp_uv=20.0),
        lambda traces_uv, sample: np.clip(np.rint(traces_uv / 0.586) * np.float32(0.586), -150, 149.4),
    )


def light(seed: int, duration_s: float = 60.0) -> SimulatedRecording:
    """At the onset and the end of 10 ms of light, 5 Hz, the lower half of the contacts steps by 0.3 to 1 mV."""
    rng = np.random.default_rng((seed, 20))
    gain_uv = np.where(np.arange(32) < 16, rng.uniform(300, 1000, 32), 0.0)

    def change(traces_uv: Traces, sample: NDArray[np.int64]) -> Traces:
        within_ms = (sample % (RATE_HZ // 5)) / RATE_HZ * 1000
        charge = np.where(within_ms < 10, 1 - np.exp(-within_ms / 0.2), np.exp(-(within_ms - 10) / 0.2))
        return traces_uv + (charge[:, None] * gain_uv).astype(np.float32)

    return changed(clean(seed, duration_s), change)


SITUATIONS: dict[str, Callable[..., SimulatedRecording]] = {
    situation.__name__: situation
    for situation in (
        clean,
        big16,
        big32,
        big32dense,
        stim130,
        stim40,
        trains200,
        dead75,
        deadpieces,
        muscle,
        emg,
        turns,
        turnsalike,
        step20,
        step40,
        joined,
        leaving,
        breathing,
        one,
        two,
        four,
        eight,
        dies,
        noisyhalf,
        refchannel,
        outside,
        hum,
        pops,
        clipped,
        light,
    )
}
