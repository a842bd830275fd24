"""Compares two reports, and refuses to if their protocols differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.evaluation.distances.frechet import Z_95
from lavita.evaluation.report.table import number


def read_report(file: Path) -> dict[str, Any]:
    """Reads a report of `lavita evaluate --out`.

    Raises:
        ValueError: if the file is missing, is not a report, or holds no scores.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        comparable = report["protocol"]["comparable"]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not a report of `lavita evaluate` that can be compared") from error
    if not comparable:
        raise ValueError(f"{file}: holds no scores")
    return dict(report)


def compare_reports(first: Path, second: Path, console: Console | None = None) -> None:
    """Prints the scores of two reports side by side.

    Args:
        first: JSON file of a report.
        second: JSON file of another.
        console: where to print; standard output by default.

    Raises:
        ValueError: if their protocols differ; the message names the fields.
    """
    console = console or Console()
    reports = [read_report(first), read_report(second)]
    differing = differences(*(report["protocol"]["comparable"] for report in reports))
    if differing:
        raise ValueError(
            f"{first} and {second} have different protocols and cannot be compared: {'; '.join(differing)}"
        )
    table = Table(caption="same protocol; 95% intervals")
    table.add_column("score")
    for file in (first, second):
        table.add_column(escape(str(file)), justify="right")
    table.add_column("difference", justify="right")
    values = [_values(report) for report in reports]
    for name in values[0]:
        (a, reach_a), (b, reach_b) = values[0][name], values[1][name]
        # Both were scored against the same real clips, which makes this interval a little wider than necessary.
        reach = (reach_a**2 + reach_b**2) ** 0.5
        interval = f" +- {number(reach)}" if reach else ""
        cells = [f"{number(v)} +- {number(r)}" if r else number(v) for v, r in ((a, reach_a), (b, reach_b))]
        table.add_row(escape(name), *cells, f"{number(b - a)}{interval}")
    console.print(table)


def _values(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The scores of a report, each with half the width of its interval, or 0 without one."""
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


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the fields in which two nested mappings differ, as `field: a / b`, sorted by field."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key, "missing"), second.get(key, "missing")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} / {b}")
    return found
