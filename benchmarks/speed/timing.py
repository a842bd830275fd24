"""Times of things that take turns, and what they come to."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lavita.core.progress import Progress

LEAST_SECONDS = 0.05  # of a timing: what is quicker is called several times
MOST_CALLS = 20
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Spread:
    """A median and its range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One candidate of a section."""

    name: str
    seconds: list[float]
    """Of each round, for one of the section's units."""
    macs: int | None = None
    """Multiply-accumulates of its linear layers and convolutions; None where they are not counted."""
    floor: str | None = None
    """The row that is its floor."""
    ours: str | None = None
    """The row of ours that it is compared with."""
    memory: dict[str, int] | None = None
    """Peak bytes, see `peaks`."""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What was measured of one thing."""

    name: str
    title: str
    unit: str
    """What the seconds are of."""
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peak: str | None = None
    """The row of the large square product, whose rate is the machine's."""
    base: str = "the floor"
    """What the rows' floor is, in words."""

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def ratio(self, row: Row, reference: str | None) -> Spread | None:
        """Of a row's times to another's, round by round."""
        if reference is None or reference == row.name:
            return None
        pairs = zip(row.seconds, self.row(reference).seconds, strict=True)
        return Spread.of([mine / other for mine, other in pairs])

    def share_of_peak(self, row: Row) -> Spread | None:
        """Of the machine's rate of multiply-accumulates, round by round."""
        if self.peak is None or row.macs is None:
            return None
        best = self.row(self.peak)
        assert best.macs is not None
        work = row.macs / best.macs
        pairs = zip(row.seconds, best.seconds, strict=True)
        return Spread.of([work * other / mine for mine, other in pairs])

    def per_product(self, row: Row) -> float | None:
        """The ratio to ours, each divided by its own multiply-accumulates."""
        ratio = self.ratio(row, row.ours)
        if ratio is None or row.macs is None or row.ours is None or not (own := self.row(row.ours).macs):
            return None
        return ratio.median / (row.macs / own)

    def to_json(self) -> dict[str, Any]:
        """What was measured, and what it comes to."""
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
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Times candidates in turn, round by round, each round beginning with another, after each ran once or twice.

    Args:
        candidates: what to call.
        repeats: rounds.
        device: what has to have finished.
        progress: moved on once a call of the warm-up, and once a timing.

    Returns:
        Of each, the seconds of one call in each round.
    """
    names = list(candidates)
    calls = {}
    for name, run in candidates.items():
        first = _seconds(run, 1, device)
        if first < SLOW_SECONDS:  # what made or compiled something is quicker now
            first = _seconds(run, 1, device)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(LEAST_SECONDS / max(first, 1e-9))))
        if progress is not None:
            progress.update(progress.done + 1, f"warm-up: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        gc.collect()
        first_name = number % len(names)
        for name in names[first_name:] + names[:first_name]:
            seconds[name].append(_seconds(candidates[name], calls[name], device) / calls[name])
            if progress is not None:
                progress.update(progress.done + 1, f"round {number + 1}: {name}")
    return seconds


def clock_name(device: torch.device) -> str:
    """Which clock tells times: with one thread that of the processor, which a neighbour on its core does not lengthen.

    Several threads, and GPUs, go by the time of day: the machine should be quiet.
    """
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def timings(num_candidates: int, repeats: int) -> int:
    """Units of `interleave`'s progress."""
    return num_candidates * (repeats + 1)


def _seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    clock = time.process_time if clock_name(device) == "processor" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
