"""One small sort, pinned for every version of the method: results do not change under the same version.

When the method was changed and METHOD_VERSION raised, ``python tests/test_method.py`` prints what to add to `RECORDED`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ks4stream import simulate
from ks4stream.errors import FewSpikesWarning
from ks4stream.io.recordings import open_recording
from ks4stream.kernels.thresholds import HIGHEST
from ks4stream.method import METHOD_VERSION
from ks4stream.results import Sorting
from ks4stream.settings import Settings
from ks4stream.sorter import sort


class Pinned(NamedTuple):
    """What a sort found.

    Whole numbers are hashed. Of floats, sums are compared, as their last digits depend on processor and libraries.
    """

    digest: str
    sums: tuple[float, ...]
    made_with: str


RECORDED = {  # by METHOD_VERSION
    3: Pinned(
        "ea06c361c5773048",
        (1.47376, 24.5939, 90.0, 32101.0, 105415.0, 135741.0, 542.684, 12.4174),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    4: Pinned(
        "ea06c361c5773048",
        (1.47376, 24.5939, 90.0, 32101.0, 105415.0, 135741.0, 542.684, 12.4174),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    5: Pinned(
        "50de5a77f75786a4",
        (1.47376, 24.5939, 90.0, 31918.9, 102950.0, 135747.0, 519.804, 12.3927),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    6: Pinned(
        "bd91588ce9f849b8",
        (1.47376, 24.5939, 90.0, 31937.5, 101696.0, 135723.0, 511.227, 12.3956),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    7: Pinned(
        "bd91588ce9f849b8",
        (1.47376, 24.5939, 90.0, 31937.5, 103077.0, 135748.0, 520.599, 12.3908),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    8: Pinned(
        "bd91588ce9f849b8",
        (1.47376, 24.5939, 90.0, 31937.5, 103077.0, 135748.0, 520.599, 12.3908),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    9: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    10: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    11: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    12: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    13: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    14: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    15: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
    16: Pinned(
        "cce0c6f468704d06",
        (1.47376, 24.5939, 90.0, 31975.7, 103105.0, 135746.0, 520.897, 12.3892),
        "torch 2.13.0+cpu, numpy 2.4.6, scipy 1.17.1",
    ),
}
HASHED = ("sample", "unit", "template", "kept", "template_channels", "refractory")
SUMMED = ("whitening", "waveforms", "drift", "score", "features", "y_um", "unit_features", "similarity")
TOLERANCE = 1e-4  # of a sum: kinds of processor differ by 1e-6 at most, and six digits are kept

N_CHANNELS, N_SAMPLES, BATCH, RATE = 12, 240_000, 15_000, 30_000.0
SHIFT_UM = (0, 2, 5, 9, 12, 15, 18, 20, 20, 18, 14, 11, 7, 4, 2, 0)  # of the tissue, by batch


def samples() -> NDArray[np.int16]:
    """Eight units on drifting tissue, in noise; spikes do not overlap, and all stand clear of every threshold.

    Made of whole numbers by a generator that is written out here, so that it is the same with any library.
    """
    draws = Draws()
    traces = sum((draws.below(17, N_SAMPLES * N_CHANNELS) - 8 for _ in range(4)), start=np.int64(0))
    traces = traces.reshape(N_SAMPLES, N_CHANNELS)
    t, depth = np.arange(45)[:, None], 20.0 * np.arange(N_CHANNELS)
    late, choice = draws.below(50, N_SAMPLES // 150), draws.below(9, N_SAMPLES // 150)
    recent = [-1, -1]
    for slot in range(1, N_SAMPLES // 150 - 1):
        unit, start = int(choice[slot]), 150 * slot + int(late[slot])
        if unit == 8 or unit in recent:  # nobody, or a unit that is refractory
            unit = -1
        recent = [recent[1], unit]
        if unit < 0:
            continue
        width, after = 2.5 + 0.6 * (unit % 3), 0.2 + 0.15 * (unit % 4)
        shape = after * np.exp(-(((t - 26) / 7) ** 2)) - np.exp(-(((t - 14) / width) ** 2))
        away = (depth - 12 - 27 * unit - SHIFT_UM[start // BATCH]) / 22
        traces[start : start + 45] += np.rint((130 + 12 * unit) * shape * np.exp(-(away**2))).astype(np.int64)
    return traces.astype(np.int16)


class Draws:
    """Knuth's linear congruential generator."""

    def __init__(self) -> None:
        self.state = 1

    def below(self, limit: int, count: int) -> NDArray[np.int64]:
        """Whole numbers from 0 to below the limit."""
        factors = np.full(count, 6364136223846793005, np.uint64)
        powers = np.multiply.accumulate(factors)
        added = np.add.accumulate(np.concatenate([np.ones(1, np.uint64), powers[:-1]])) * np.uint64(1442695040888963407)
        states = powers * np.uint64(self.state) + added
        self.state = int(states[-1])
        return ((states >> np.uint64(33)) % np.uint64(limit)).astype(np.int64)


def sorted_by(device: str) -> Sorting:
    recording = open_recording(samples(), fs=RATE, probe=simulate.linear_probe(N_CHANNELS, pitch_um=20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSpikesWarning)
        return sort(recording, Settings(batch_size=BATCH), client="loop", device=device)


def pinned(found: Sorting) -> Pinned:
    digest = hashlib.sha256()
    for name in HASHED:
        values = np.asarray(getattr(found, name))
        digest.update(f"{name} {values.shape}".encode() + values.astype("<i8").tobytes())
    assert found.whitening is not None and found.waveforms is not None and found.drift is not None
    parts = (found.whitening.matrix, found.waveforms.shapes, found.drift.shift_um)
    arrays = [*parts, *(getattr(found, name) for name in SUMMED[len(parts) :])]
    sums = tuple(float(f"{np.abs(array).sum(dtype=float):.6g}") for array in arrays)
    made_with = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scipy"))
    return Pinned(digest.hexdigest()[:16], sums, made_with)


def entry(version: int, of: Pinned) -> str:
    """The lines to add to `RECORDED`."""
    return f'    {version}: Pinned(\n        "{of.digest}", {of.sums},\n        "{of.made_with}",\n    ),'


def check(found: Pinned) -> None:
    expected = RECORDED.get(METHOD_VERSION)
    if expected is None:
        pytest.fail(
            f"METHOD_VERSION is {METHOD_VERSION} now; add to RECORDED of {__file__}:\n{entry(METHOD_VERSION, found)}"
        )
    differ = [] if found.digest == expected.digest else [f"one of {', '.join(HASHED)}"]
    differ += [
        name
        for name, one, other in zip(SUMMED, found.sums, expected.sums, strict=True)
        if one != pytest.approx(other, rel=TOLERANCE)
    ]
    if differ:
        pytest.fail(
            f"Method {METHOD_VERSION} finds something else than it did: {'; '.join(differ)}. If the method was "
            "changed, raise METHOD_VERSION in ks4stream/method.py, or runs that go on would mix old results with "
            f"new ones, and add to RECORDED of {__file__}:\n{entry(METHOD_VERSION + 1, found)}\n"
            f"If it was not, look at the libraries: it was recorded with {expected.made_with}."
        )


@pytest.mark.slow
def test_the_recording_is_the_same_everywhere() -> None:
    assert hashlib.sha256(samples().astype("<i2").tobytes()).hexdigest()[:16] == "6e26694f005be2e2"


@pytest.mark.slow
def test_results_change_only_with_the_version_of_the_method() -> None:
    found = sorted_by("cpu")
    assert found.n_units == 8 and found.score.min() > HIGHEST + 2, "nothing is near a threshold"
    assert found.drift is not None and np.any(found.drift.shift_um)
    check(pinned(found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_they_are_the_same_on_a_gpu() -> None:
    check(pinned(sorted_by("cuda")))


if __name__ == "__main__":
    print(entry(METHOD_VERSION, pinned(sorted_by("cpu"))))
