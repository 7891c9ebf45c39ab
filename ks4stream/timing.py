"""How long a sort will take, by stage, from how long others took.

Each stage says in its `needs` how much `work` there is, in a unit to which its time is proportional. A sort that has
ended, or an excerpt that was sorted, gives the time per unit of work; a plan multiplies it by the expected work. Both
are computed by the same code, one from the spikes that were found and one from those that are assumed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch

from ks4stream.deploy import needs_of
from ks4stream.engine import gpus
from ks4stream.engine.workers import processor
from ks4stream.recording import Recording
from ks4stream.results import Sorting
from ks4stream.run import Run
from ks4stream.stages.needs import CROWDED, Load, Needs

START, RESULTS = "start", "results"
"""Names of what is no stage: checks and the start of workers; files and the page."""
RESULTS_SPIKES = 100_000  # that take as long to write as everything that does not depend on their number
THREAD_OF_CORE = 0.3  # what a processor adds that shares a core with another
PER_GPU = 1.5  # times as much as one worker, several that share a GPU do on tiles: it is busy most of the time
SIMILAR = 1.25  # ratio of numbers of channels up to which rates are taken together
N_SORTS = 5  # from which a plan is made, at most: the latest
SHORT = 1 / 30  # of the time of the longest, below which a sort does not count: trials must not push out real ones
SPREAD, SPREAD_OF_LONGER = 0.2, 0.04
"""Standard deviation of the logarithm of the time, beside what the sorts differ by: of another recording, and for each
factor of e by which it takes longer than what was measured."""
UNSURE_OF_EXCERPT, UNSURE = 0.25, 0.5
"""Standard deviation of the number of detections beyond the first, of which there is one if the tissue moves: if drift
was looked for in an excerpt, and if not."""
WITHIN = 1.64  # standard deviations on both sides: nine of ten times, as far as those above hold


@dataclass(frozen=True)
class Measured:
    """How long one sort, or an excerpt, took. Nothing in it tells which recording it was.

    Attributes
    ----------
    device : str
        "cpu", or the GPU's name.
    processor : str
        Its model, as :func:`ks4stream.engine.workers.processor` tells it.
    n_channels, n_workers : int
    is_remote : bool
        Whether samples were fetched over a network.
    spikes_per_channel_hz, peaks_per_spike, templates_per_channel : float
        What was found; as many peaks as if small ones were looked for in all batches.
    moved : float or None
        1 if the tissue moved, and peaks were detected twice; 0 if not; None if drift was not estimated.
    start_s : float
        Time that is no stage's.
    stages : dict of (float, float)
        For each stage that computed, the time that one worker would have taken, in s, and its work.
    """

    device: str
    processor: str
    n_channels: int
    n_workers: int
    is_remote: bool
    spikes_per_channel_hz: float
    peaks_per_spike: float
    templates_per_channel: float
    moved: float | None
    start_s: float
    stages: dict[str, tuple[float, float]]

    @property
    def busy_s(self) -> float:
        """Time that one worker would have taken for all."""
        return sum(seconds for seconds, _ in self.stages.values())

    def applied(self, load: Load, *, keep_rate: bool) -> Load:
        """The load with as many templates and peaks, and unless `keep_rate` spikes, per channel as there were here."""
        return load.as_found(
            spikes_per_channel_hz=load.spikes_per_channel_hz if keep_rate else self.spikes_per_channel_hz,
            templates_per_channel=self.templates_per_channel,
            rows_per_spike=self.peaks_per_spike,
        )


@dataclass(frozen=True)
class Timing:
    """Expected wall time of a sort.

    Attributes
    ----------
    seconds : dict of float
        By stage in their order, of all passes together, with "start" for checks and the start of workers, and "results"
        if they are written.
    low_s, high_s : float
        A rough range.
    basis : str
        What was measured.
    missing : tuple of str
        Stages that were not, and are left out.
    passes : dict of float
        Expected number of passes of each stage that comes twice if the tissue moves.
    """

    seconds: dict[str, float]
    low_s: float
    high_s: float
    basis: str
    missing: tuple[str, ...] = ()
    passes: dict[str, float] = field(default_factory=dict)

    @property
    def per_pass_s(self) -> dict[str, float]:
        """By stage, one pass."""
        return {name: seconds / self.passes.get(name, 1.0) for name, seconds in self.seconds.items()}

    @property
    def total_s(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())

    def rows(self) -> Iterator[tuple[str, str]]:
        """Rows of a plan's table: a label and its text."""
        total_s, without = self.total_s, f"; without {', '.join(self.missing)}" * bool(self.missing)
        yield "time", f"about {about(total_s)} ({about(self.low_s)} to {about(self.high_s)}), by {self.basis}{without}"
        long = {name: seconds for name, seconds in self.seconds.items() if seconds >= SHOWN_SHARE * total_s}
        for name, seconds in long.items():
            yield f"time: {name}", about(seconds)
        if len(long) < len(self.seconds):
            yield "time: all others", about(total_s - sum(long.values()))


SHOWN_SHARE = 0.02  # of the time, below which a stage has no row of its own


def about(seconds: float) -> str:
    """Format an expected time for people.

    >>> [about(seconds) for seconds in (0.2, 48, 100, 2010, 7800, 400_000)]
    ['1 s', '48 s', '1.7 min', '34 min', '2.2 h', '111 h']
    """
    if seconds < 89.5:
        return f"{max(seconds, 1.0):.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 89.5 * 60 else (seconds / 3600, "h")
    return f"{value:.{0 if value >= 9.95 else 1}f} {unit}"


def device_name(device: str) -> str:
    """What rates are measured on: "cpu", or the name of the first GPU that a device stands for."""
    numbers = gpus.visible(device)
    return str(torch.cuda.get_device_name(numbers[0])) if numbers else torch.device(device).type


def sharing(device: str, n_workers: int) -> int:
    """Number of workers of this machine that share a GPU."""
    return -(-n_workers // (len(gpus.visible(device)) or n_workers))


def speed_up(need: Needs, n_workers: int, workers_per_gpu: int, *, on_gpu: bool) -> float:
    """How many times as fast as one worker a number of workers compute a stage.

    A step without tasks is computed by the calling process alone. There may be fewer tasks than workers in the end; the
    largest region may take as long as all others together; and workers share cores, or a GPU.
    """
    if need.n_tasks <= 1 or n_workers == 1:
        return 1.0
    if need.n_tiles_read:
        most = need.n_tasks / -(-need.n_tasks // n_workers)
        if on_gpu:
            return max(min(most, PER_GPU * n_workers / workers_per_gpu), 1.0)
    else:
        most = need.n_tasks / min(CROWDED / 2, need.n_tasks)
    cores = psutil.cpu_count(logical=False) or n_workers
    return max(min(most, n_workers, cores + THREAD_OF_CORE * max(n_workers - cores, 0)), 1.0)


def measured(load: Load, run: Run, sorting: Sorting, *, found_s: float, results_s: float | None) -> Measured | None:
    """What a run that has ended tells of the machine; None if nothing was found, or all was recalled.

    Parameters
    ----------
    load : Load
        Of the recording; the numbers of spikes and templates in it are replaced.
    run : Run
    sorting : Sorting
    found_s : float
        Wall time of all but writing results.
    results_s : float or None
        Wall time of writing all results; None if that was not done.
    """
    counts = sorting.diagnostics.counts if sorting.diagnostics else {}
    n_spikes, n_workers = counts.get("matched spikes", 0), run.engine.n_workers
    if not n_spikes or all(known == n_tasks for known, n_tasks in run.recalled.values()):
        return None
    detections = run.recalled["detection"][1] / load.n_blocks()
    found = Measured(
        device=device_name(load.device),
        processor=processor(),
        n_channels=load.n_channels,
        n_workers=n_workers,
        is_remote=load.recording.source.is_remote,
        spikes_per_channel_hz=n_spikes / (load.n_channels * load.duration_s),
        peaks_per_spike=counts["peaks"] / n_spikes / load.detected_share,
        templates_per_channel=counts["templates"] / load.n_channels,
        moved=min(round(detections) - 1, 1) if "drift" in run.seconds else None,
        start_s=max(found_s - sum(run.seconds.values()), 0.0),
        stages={},
    )
    seconds = run.seconds | ({} if results_s is None else {RESULTS: results_s})
    for need in _needs(found.applied(load, keep_rate=False), results=True):
        share = _computed(need, run)
        if need.work and share and seconds.get(need.name):
            faster = speed_up(need, n_workers, sharing(load.device, n_workers), on_gpu=load.on_gpu)
            found.stages[need.name] = seconds[need.name] * faster, need.work * share
    return found


def _needs(load: Load, *, results: bool) -> tuple[Needs, ...]:
    """Needs of all stages, and of writing results."""
    writing = Needs(RESULTS, work=load.n_spikes + RESULTS_SPIKES)
    return (*needs_of(load), *([writing] if results else []))


def _computed(need: Needs, run: Run) -> float:
    """How much of a stage's work in one pass was computed, not recalled, in all passes together."""
    if not need.n_tasks:
        return 1.0
    if need.n_tiles_read:
        return run.n_tiles.get(need.name, 0) / need.n_tiles_read
    known, n_tasks = run.recalled.get(need.name, (0, 0))
    return (n_tasks - known) / max(n_tasks, 1)


def alike(sorts: Sequence[Measured], recording: Recording, n_channels: int, device: str) -> list[Measured]:
    """The latest sorts on such a machine, with about as many channels as is nearest to those that are sorted.

    The file that has them may be in a home folder that many machines share.
    """
    wanted = device_name(device), processor(), recording.source.is_remote
    usable = [sort for sort in sorts if (sort.device, sort.processor, sort.is_remote) == wanted]
    ratio = [abs(math.log(sort.n_channels / n_channels)) for sort in usable]
    limit = min(ratio, default=0.0) + math.log(SIMILAR)
    near = [sort for sort, far in zip(usable, ratio, strict=True) if far <= limit]
    longest_s = max((sort.busy_s for sort in near), default=0.0)
    return [sort for sort in near if sort.busy_s >= SHORT * longest_s][-N_SORTS:]


def expected(
    load: Load,
    sorts: Sequence[Measured],
    *,
    n_workers: int,
    workers_per_gpu: int,
    results: bool,
    keep_rate: bool = False,
    excerpt: str = "",
) -> Timing | None:
    """Expect a time for a load.

    Parameters
    ----------
    load : Load
    sorts : sequence of Measured
        From which to expect it.
    n_workers, workers_per_gpu : int
    results : bool
        Whether results are written.
    keep_rate : bool
        Take the spikes of `load`; otherwise there are as many per channel as in `sorts`.
    excerpt : str
        What `sorts` is, if it is an excerpt of this recording.

    Returns
    -------
    Timing or None
        None if there are no sorts, or none timed a stage that is needed.
    """
    if not sorts:
        return None
    known = [sort.moved for sort in sorts if sort.moved is not None]
    # Other recordings hardly tell whether this one moves; with few of them, it is about as likely as not.
    certain = excerpt and known
    moves = (statistics.fmean(known) if certain else (sum(known) + 1) / (len(known) + 2)) * (load.detections - 1)

    def seconds_by(some: Sequence[Measured], moves: float) -> dict[str, float]:
        """Seconds by stage, by some of the sorts; stages that they lack are left out."""
        middle = _middle(some)
        seconds = {START: middle.start_s}
        for need in _needs(middle.applied(load, keep_rate=keep_rate), results=results):
            pairs = [sort.stages[need.name] for sort in some if need.name in sort.stages]
            if need.work and pairs:
                rate = sum(busy_s for busy_s, _ in pairs) / sum(work for _, work in pairs)
                faster = speed_up(need, n_workers, workers_per_gpu, on_gpu=load.on_gpu)
                seconds[need.name] = rate * need.work * (1 + moves * (need.passes > 1)) / faster
        return seconds

    seconds = seconds_by(sorts, moves)
    if len(seconds) == 1:  # none of the stages was ever timed
        return None
    needs = _needs(load, results=results)
    total_s = sum(seconds.values())
    busy_s, most_busy = (total_s - seconds[START]) * n_workers, max(sort.busy_s for sort in sorts)
    still_s, moving_s = (sum(seconds_by(sorts, other).values()) for other in (0, load.detections - 1))
    spreads = [
        SPREAD,
        SPREAD_OF_LONGER * math.log(max(busy_s / most_busy, 1.0)),
        (UNSURE_OF_EXCERPT if certain else UNSURE) * math.log(moving_s / still_s),
        *_scatter(sorts, [seconds_by([sort], moves) for sort in sorts], seconds),
    ]
    factor = math.exp(WITHIN * math.hypot(*spreads))
    n_channels = sorted({sort.n_channels for sort in sorts})
    last = "the last sort" if len(sorts) == 1 else f"the last {len(sorts)} sorts"
    return Timing(
        seconds,
        low_s=total_s / factor,
        high_s=total_s * factor,
        basis=excerpt or f"{last} of {' to '.join(map(str, dict.fromkeys(n_channels[:1] + n_channels[-1:])))} channels",
        missing=tuple(need.name for need in needs if need.work and need.name not in seconds),
        passes={need.name: 1 + moves for need in needs if need.passes > 1},
    )


def _middle(sorts: Sequence[Measured]) -> Measured:
    """A sort that found as many spikes, peaks and templates as the median of some, and started as they did."""
    names = ("spikes_per_channel_hz", "peaks_per_spike", "templates_per_channel", "start_s")
    return replace(sorts[-1], **{name: statistics.median(getattr(sort, name) for sort in sorts) for name in names})


def _scatter(sorts: Sequence[Measured], apart: Sequence[dict[str, float]], together: dict[str, float]) -> list[float]:
    """Root mean square by which times expected from each sort differ from that of all, in logarithms; long ones count
    more."""
    weight = [sort.busy_s for sort in sorts]
    names = [one.keys() - {START} for one in apart]
    differences = [
        math.log(sum(one[name] for name in known) / sum(together[name] for name in known))
        for one, known in zip(apart, names, strict=True)
        if known
    ]
    if len(sorts) == 1 or len(differences) < len(sorts):
        return []
    mean = sum(w * d**2 for w, d in zip(weight, differences, strict=True)) / sum(weight)
    return [math.sqrt(mean * len(sorts) / (len(sorts) - 1))]
