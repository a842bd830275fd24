"""Times of candidates that take turns, and the ratios between them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from lavita.core.progress import Progress

Clock = Literal["processor", "wall"]
MIN_SECONDS = 0.05  # per timing: faster candidates are called several times
MAX_CALLS = 20
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Spread:
    """A median and its range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One candidate of a section."""

    name: str
    seconds: list[float]
    """Seconds per unit of the section, one value per round."""
    macs: int | None = None
    """Multiply-accumulates of its linear layers and convolutions; None if they are not counted."""
    floor: str | None = None
    """Name of the row that is its floor."""
    ours: str | None = None
    """Name of the row of ours that it is compared with."""
    memory: dict[str, int] | None = None
    """Peak bytes, see `peaks`."""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """All measurements of one kind of work."""

    name: str
    title: str
    unit: str
    """The work that the seconds are for."""
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peak: str | None = None
    """Name of the row of the large square product, whose rate is the machine's."""
    base: str = "the floor"
    """What the rows' floor is, in words."""

    def row(self, name: str) -> Row:
        """The row with a name."""
        return next(row for row in self.rows if row.name == name)

    def ratio(self, row: Row, reference: str | None) -> Spread | None:
        """A row's times over another row's, round by round."""
        if reference is None or reference == row.name:
            return None
        pairs = zip(row.seconds, self.row(reference).seconds, strict=True)
        return Spread.of([seconds / other for seconds, other in pairs])

    def share_of_peak(self, row: Row) -> Spread | None:
        """A row's rate of multiply-accumulates over the machine's, round by round."""
        if self.peak is None or row.macs is None:
            return None
        best = self.row(self.peak)
        assert best.macs is not None
        work = row.macs / best.macs
        pairs = zip(row.seconds, best.seconds, strict=True)
        return Spread.of([work * other / seconds for seconds, other in pairs])

    def per_product(self, row: Row) -> float | None:
        """The ratio to ours, each time divided by its own multiply-accumulates."""
        ratio = self.ratio(row, row.ours)
        if ratio is None or row.macs is None or row.ours is None or not (own := self.row(row.ours).macs):
            return None
        return ratio.median / (row.macs / own)

    def to_json(self) -> dict[str, Any]:
        """The measurements and the figures computed from them."""
        result = asdict(self)
        for row, values in zip(self.rows, result["rows"], strict=True):
            values["computed"] = {
                "seconds": asdict(Spread.of(row.seconds)),
                "times_the_floor": _dict(self.ratio(row, row.floor)),
                "times_ours": _dict(self.ratio(row, row.ours)),
                "times_ours_per_product": self.per_product(row),
                "share_of_peak": _dict(self.share_of_peak(row)),
            }
        return result

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Section:
        """The reverse of `to_json`."""
        rows = [Row(**{key: value for key, value in row.items() if key != "computed"}) for row in values["rows"]]
        return cls(**{**values, "rows": rows})


def _dict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Times candidates in turn, round by round, after one or two calls of each; every round starts with another one.

    Args:
        candidates: functions to call.
        repeats: number of rounds.
        device: waited for after the calls.
        progress: advanced after each candidate's warm-up and after each timing.
        clock: clock to use; by default `default_clock`.

    Returns:
        The seconds of one call in each round, for each candidate.
    """
    names = list(candidates)
    clock = clock or default_clock(device)
    calls = {}
    for name, run in candidates.items():
        first = _seconds(run, 1, device, clock)
        if first < SLOW_SECONDS:  # the first call may have compiled or allocated
            first = _seconds(run, 1, device, clock)
        calls[name] = max(1, min(MAX_CALLS, math.ceil(MIN_SECONDS / max(first, 1e-9))))
        if progress is not None:
            progress.update(progress.done + 1, f"warm-up: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        gc.collect()
        first_name = number % len(names)
        for name in names[first_name:] + names[:first_name]:
            seconds[name].append(_seconds(candidates[name], calls[name], device, clock) / calls[name])
            if progress is not None:
                progress.update(progress.done + 1, f"round {number + 1}: {name}")
    return seconds


def default_clock(device: torch.device) -> Clock:
    """The processor's clock for one CPU thread, which other processes on the same core do not slow down.

    Several threads, and GPUs, are timed by the wall clock: the machine should be quiet.
    """
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def num_timings(num_candidates: int, repeats: int) -> int:
    """Units by which `interleave` advances its progress."""
    return num_candidates * (repeats + 1)


def _seconds(run: Callable[[], Any], calls: int, device: torch.device, clock: Clock) -> float:
    now = time.process_time if clock == "processor" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start
