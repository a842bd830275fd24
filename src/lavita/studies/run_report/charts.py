"""Chooses and draws the charts of a report from the logs of its runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lavita.studies.run_report.curves import Curve, colour_of, draw_levels, draw_panel, draw_profile
from lavita.studies.run_report.reading import Record, Run, is_number

TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "clips_per_second": "clips/s",
}
ALARMING_EVENTS = ("spike", "not-finite")


class Charts(NamedTuple):
    """The charts of a report, as SVG."""

    progress: list[str]
    """Quantities over the steps."""
    noise: list[str]
    """Validation losses by noise level."""


def make_charts(runs: Sequence[Run]) -> Charts:
    """Draws a chart for each quantity that at least one run has logged."""
    return Charts([svg for svg in _progress(runs) if svg], _noise(runs))


def _progress(runs: Sequence[Run]) -> list[str]:
    marks = [
        (event["step"], colour_of(index))
        for index, run in enumerate(runs)
        for event in run.events
        if event["event"] == "resume"
    ]
    stops = [
        (event["step"], colour_of(index))
        for index, run in enumerate(runs)
        for event in run.events
        if event["event"] in ALARMING_EVENTS
    ]
    panels = [
        draw_panel(
            "loss",
            _lines(runs, lambda run: run.metrics, "loss"),
            smoothed=True,
            points=_lines(runs, lambda run: run.validation, "loss"),
            marks=marks,
            stops=stops,
        ),
        draw_panel("validation loss", _lines(runs, lambda run: run.validation, "loss"), marks=marks),
    ]
    if any(row.get("simple") != row.get("loss") for run in runs for row in run.validation):
        panels.append(
            draw_panel("validation: L_simple", _lines(runs, lambda run: run.validation, "simple"), marks=marks)
        )
    for key in _keys(runs, lambda run: run.scores):
        if not key.endswith("_standard_error"):
            panels.append(draw_panel(key, _lines(runs, lambda run: run.scores, key, errors=True), marks=marks))
    for key in _keys(runs, lambda run: run.metrics):
        if key not in ("loss", "seconds"):
            smoothed = key in ("grad_norm", "clips_per_second")
            curves = _lines(runs, lambda run: run.metrics, key)
            panels.append(
                draw_panel(TITLES.get(key, key.replace("_", " ")), curves, smoothed, marks=marks, stops=stops)
            )
    return panels


def _keys(runs: Sequence[Run], read: Callable[[Run], list[Record]]) -> list[str]:
    """The names of the logged quantities, those in `TITLES` first."""
    found = dict.fromkeys(key for run in runs for row in read(run) for key, value in row.items() if is_number(value))
    return [*(key for key in TITLES if key in found), *(key for key in found if key not in TITLES and key != "step")]


def _lines(runs: Sequence[Run], read: Callable[[Run], list[Record]], key: str, errors: bool = False) -> list[Curve]:
    curves = []
    for index, run in enumerate(runs):
        rows = [row for row in read(run) if _is_float(row.get(key))]
        reach = [_error(row.get(f"{key}_standard_error")) for row in rows] if errors else None
        curves.append(
            Curve(run.name, colour_of(index), [row["step"] for row in rows], [float(row[key]) for row in rows], reach)
        )
    return curves


def _error(value: Any) -> float:
    return float(value) if is_number(value) else 0.0


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _noise(runs: Sequence[Run]) -> list[str]:
    measured = [(index, run, [row for row in run.validation if _levels(row)]) for index, run in enumerate(runs)]
    measured = [(index, run, rows) for index, run, rows in measured if rows]
    if not measured:
        return []
    counts = {len(rows[-1]["by_noise"]) for _, _, rows in measured}
    panels = []
    if len(counts) == 1:
        profiles = []
        for index, run, rows in measured:
            last = Curve(run.name, colour_of(index), range(len(rows[-1]["by_noise"])), rows[-1]["by_noise"])
            first = rows[0]["by_noise"] if len(rows) > 1 and len(rows[0]["by_noise"]) == len(last.values) else None
            profiles.append((last, first))
        panels.append(draw_profile("validation loss by noise level", profiles))
    for _, run, rows in measured:
        title = "validation loss over time" if len(runs) == 1 else f"validation loss over time: {run.name}"
        panels.append(draw_levels(title, [row["step"] for row in rows], [row["by_noise"] for row in rows]))
    return panels


def _levels(row: Record) -> bool:
    values = row.get("by_noise")
    return isinstance(values, list) and len(values) > 1 and all(is_number(value) for value in values)
