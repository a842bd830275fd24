"""Compares the reports of evaluations."""

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


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested mappings differ, as `field: a / b`, sorted by field."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        mine, other = first.get(key, "missing"), second.get(key, "missing")
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key}: {mine} / {other}")
    return found
