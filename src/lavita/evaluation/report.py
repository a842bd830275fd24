"""Reports: JSON, a table on the console, and a comparison of two that refuses unlike protocols."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.evaluation.frechet import Z_95
from lavita.evaluation.protocol import differences


def write_scores(scores: Mapping[str, Any], out: Path) -> None:
    """Writes a report of `score` as JSON; missing folders are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")


def print_scores(scores: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a report of `scores.score`: a line a score of features, and a line a class.

    Args:
        scores: the report, or what was read from its JSON.
        console: where to print; standard output by default.
    """
    console = console or Console()
    if "scores" in scores:
        _print_features(scores, console)
    if "accuracy" in scores or "motion" in scores:
        _print_classes(scores, console)


def _print_features(report: Mapping[str, Any], console: Console) -> None:
    protocol = report["protocol"]
    table = Table(
        title=escape(f"{protocol['generated']} against {protocol['real']}"),
        caption=f"clips of {protocol['num_frames']} frames at interval {protocol['frame_interval']}, "
        f"{protocol['resolution']}x{protocol['resolution']}",
        box=SIMPLE_HEAD,
    )
    table.add_column("score", no_wrap=True)
    for heading in ("value\n95% interval", "limit", "real vs\nreal", "n real /\ngenerated"):
        table.add_column(heading, justify="right")
    for name, row in report["scores"].items():
        for label, (value, interval, *others) in feature_rows(name, row):
            # The network on a line of its own, or else the table is too wide for a console.
            narrow = escape(label.replace("[", "\n["))
            table.add_row(narrow, f"{value}\n{interval}" if interval else value, *others)
        for quoted in row.get("quoted", ()):
            table.add_row(f"  {quoted['method']}", f"{number(quoted['value'])}\n{quoted['source']}", style="dim")
    console.print(table)
    blind = [name for name, row in report["scores"].items() if not row["sees_order_of_frames"]]
    if blind:
        console.print(f"Blind to the order of frames: {', '.join(blind)}.", markup=False)
    near = report.get("neighbours")
    if near and near["other_real"]:
        chance = near["other_real"]["chance_that_generated_is_nearer"]
        console.print(
            f"A generated clip is nearer to the real ones than another real clip is: {chance:.1%} (50% alike)."
        )
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def feature_rows(name: str, row: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """A score as rows for reading: label; value, interval, limit, floor, numbers of samples."""
    counts = f"{row['num_real']:,} / {row['num_generated']:,}"
    if "precision" in row:
        floor = row["floor"] or {}
        keys = ("precision", "recall", "density", "coverage")
        rows = [(f"  {key}", [number(row[key]), "", "", number(floor.get(key)), ""]) for key in keys]
        return [(name, ["", "", "", "", counts]), *rows]
    if "num_splits" in row:
        spread = f"+- {number(row['std_of_splits'])}, {row['num_splits']} splits"
        return [(name, [number(row["value"]), spread, "", number(row["floor"]), counts])]
    low, high = row["interval_95"]
    limit = number(row.get("infinity"))
    return [(name, [number(row["value"]), f"{number(low)} to {number(high)}", limit, number(row["floor"]), counts])]


def number(value: float | None) -> str:
    """A score for reading: four significant digits, `-` for None."""
    return "-" if value is None else f"{value:.4g}"


def read_report(file: Path) -> dict[str, Any]:
    """Reads a report of `lavita evaluate --out`.

    Raises:
        ValueError: where it is missing, damaged, or says nothing that could be compared.
    """
    try:
        report = json.loads(file.read_text())
        comparable = report["protocol"]["comparable"]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no report of `lavita evaluate` that can be compared") from error
    if not comparable:
        raise ValueError(f"{file}: holds no scores")
    return dict(report)


def compare_reports(first: Path, second: Path, console: Console | None = None) -> None:
    """Prints the scores of two reports side by side.

    Args:
        first: a report's JSON.
        second: another's.
        console: where to print.

    Raises:
        ValueError: where their protocols differ, naming the fields.
    """
    console = console or Console()
    reports = [read_report(first), read_report(second)]
    unlike = differences(*(report["protocol"]["comparable"] for report in reports))
    if unlike:
        raise ValueError(f"{first} and {second} have unlike protocols and cannot be compared: {'; '.join(unlike)}")
    table = Table(caption="the same protocol; intervals are of 95%")
    table.add_column("score")
    for file in (first, second):
        table.add_column(escape(str(file)), justify="right")
    table.add_column("difference", justify="right")
    values = [_values(report) for report in reports]
    for name in values[0]:
        (a, reach_a), (b, reach_b) = values[0][name], values[1][name]
        # Both sides were scored against the same real clips, which makes this a little wider than it has to be.
        reach = (reach_a**2 + reach_b**2) ** 0.5
        sure = f" +- {number(reach)}" if reach else ""
        cells = [f"{number(v)} +- {number(r)}" if r else number(v) for v, r in ((a, reach_a), (b, reach_b))]
        table.add_row(escape(name), *cells, f"{number(b - a)}{sure}")
    console.print(table)


def _values(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Every number of a report, and half the width of its interval or 0."""
    values: dict[str, tuple[float, float]] = {}
    for name, row in report.get("scores", {}).items():
        if "precision" in row:
            values.update({f"{key} {name}": (row[key], 0.0) for key in ("precision", "recall", "density", "coverage")})
        else:
            values[name] = (row["value"], Z_95 * row.get("standard_error", 0.0))
    if "accuracy" in report:
        low, high = report["accuracy"]["interval_95"]
        values["accuracy"] = (report["accuracy"]["accuracy"], (high - low) / 2)
    if "motion" in report:
        values["classes that move as real"] = (report["motion"]["num_within_factor_two"], 0.0)
    return values


def _print_classes(scores: Mapping[str, Any], console: Console) -> None:
    recognised, moved, protocol = scores.get("accuracy"), scores.get("motion"), scores["protocol"]
    table = Table(
        title=f"{protocol['generated']} against {protocol['real']}",
        caption=f"clips of {protocol['num_frames']} frames at interval {protocol['frame_interval']}",
    )
    table.add_column("class")
    if recognised:
        for heading in ("clips", "recognised", "95%\ninterval"):
            table.add_column(heading, justify="right")
    if moved:
        for heading in ("motion\nreal / gen.", "ratio", "within\n2x"):
            table.add_column(heading, justify="right")
    for name in protocol["classes"]:
        cells = [name]
        if recognised:
            cells += _accuracy_cells(
                recognised["per_class_num_clips"][name],
                recognised["per_class"][name],
                recognised["per_class_interval_95"][name],
            )
        if moved:
            row = moved["per_class"][name]
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            within = "yes" if row["within_factor_two"] else "no"
            cells += [f"{row['real']:.2f} / {row['generated']:.2f}", ratio, within]
        table.add_row(*cells)
    table.add_section()
    total = ["all"]
    if recognised:
        total += _accuracy_cells(recognised["num_clips"], recognised["accuracy"], recognised["interval_95"])
    if moved:
        total += ["", "", f"{moved['num_within_factor_two']} of {moved['num_classes']}"]
    table.add_row(*total)
    console.print(table)
    if recognised:
        console.print(_describe_controls(recognised))


def _accuracy_cells(num_clips: int, share: float, interval: Sequence[float]) -> list[str]:
    return [str(num_clips), f"{share:.1%}", f"{100 * interval[0]:.0f}-{interval[1]:.0%}"]


def _describe_controls(recognised: Mapping[str, Any]) -> str:
    controls = recognised["controls"]
    if controls is None:
        return "The classifier was not checked: give held-out videos."
    return (
        f"The classifier on {controls['num_clips']} held-out real clips: {controls['held_out']:.1%}; recoloured "
        f"{controls['recoloured']:.1%}; with patches shuffled {controls['shuffled']:.1%} "
        f"(chance {recognised['chance']:.1%})."
    )
