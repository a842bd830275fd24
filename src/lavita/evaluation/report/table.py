"""Reports as JSON and as tables on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.core.files import write_text


def write_scores(scores: Mapping[str, Any], out: Path) -> None:
    """Writes a report as JSON.

    Raises:
        ValueError: if a score is not a finite number.
    """
    write_text(out, json.dumps(scores, indent=1, allow_nan=False) + "\n")


def print_scores(scores: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a report: one row per metric of features, and one row per class for class metrics.

    Args:
        scores: the report.
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
            # The network is on a line of its own, as the table would be too wide for a console otherwise.
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
        console.print(f"A generated clip is nearer to real clips than another real clip: {chance:.1%} (50%: alike).")
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def feature_rows(name: str, row: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Formats a score as rows of a label and five cells: value, interval, limit, floor, numbers of samples."""
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
    """Formats a score with four significant digits; `-` for None."""
    return "-" if value is None else f"{value:.4g}"


def _print_classes(scores: Mapping[str, Any], console: Console) -> None:
    recognised, moved, protocol = scores.get("accuracy"), scores.get("motion"), scores["protocol"]
    table = Table(
        title=escape(f"{protocol['generated']} against {protocol['real']}"),
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
        cells = [escape(name)]
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
        return "The classifier was not checked; --held-out checks it."
    return (
        f"The classifier on {controls['num_clips']} held-out real clips: {controls['held_out']:.1%}; recoloured "
        f"{controls['recoloured']:.1%}; with patches shuffled {controls['shuffled']:.1%} "
        f"(chance {recognised['chance']:.1%})."
    )
