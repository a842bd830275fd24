"""Prints sections as tables on a terminal and writes them in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.speed.timing import Row, Section, Spread

Cell = Callable[[Section, Row], str]


def _seconds(section: Section, row: Row) -> str:
    spread = Spread.of(row.seconds)
    return _range(spread, lambda value: f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s")


def _range(spread: Spread | None, write: Callable[[float], str]) -> str:
    if spread is None:
        return ""
    return f"{write(spread.median)} ({write(spread.least)} to {write(spread.most)})"


def _times(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _per_product(section: Section, row: Row) -> str:
    value = section.per_product(row)
    return "" if value is None else _times(value)


def _mib(key: str) -> Cell:
    return lambda section, row: f"{row.memory[key] / 2**20:,.0f}" if row.memory and key in row.memory else ""


def _over_smallest(section: Section, row: Row) -> str:
    if not row.memory or "smallest" not in row.memory:
        return ""
    return _times(row.memory["allocated"] / row.memory["smallest"])


BASE = "times the floor"
COLUMNS: dict[str, Cell] = {
    "seconds": _seconds,
    BASE: lambda section, row: _range(section.ratio(row, row.floor), _times),
    "times ours": lambda section, row: _range(section.ratio(row, row.ours), _times),
    "per product": _per_product,
    "of the peak": lambda section, row: _range(section.share_of_peak(row), lambda value: f"{value:.0%}"),
    "allocated, MiB": _mib("allocated"),
    "resident, MiB": _mib("resident"),
    "times the smallest": _over_smallest,
}


def cells(section: Section, ranges: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text, with or without the ranges; empty columns are left out."""
    written = {heading: [cell(section, row) for row in section.rows] for heading, cell in COLUMNS.items()}
    headings = [heading for heading, column in written.items() if any(column)]
    rows = []
    for number, row in enumerate(section.rows):
        words = [written[heading][number] for heading in headings]
        rows.append([row.name, *(word if ranges else word.partition(" (")[0] for word in words)])
    return ["", *(f"times {section.base}" if heading == BASE else heading for heading in headings)], rows


def remarks(section: Section) -> list[str]:
    """Notes on a section and on its rows."""
    return [*section.notes, *(f"{row.name}: {row.note}" for row in section.rows if row.note)]


def print_section(section: Section, console: Console | None = None) -> None:
    """Prints the medians of a section, by default to standard output."""
    console = console or Console()
    headings, rows = cells(section, ranges=False)
    table = Table(title=f"{section.title}: {section.unit}", title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for remark in remarks(section):
        console.print(f"- {remark}", highlight=False)
    console.print()


def markdown(head: Sequence[str], sections: Sequence[Section]) -> str:
    """A page with all sections."""
    lines = ["# Speed", "", *head]
    for section in sections:
        headings, rows = cells(section)
        lines += ["", f"## {section.title}: {section.unit}", ""]
        lines += [_line(headings), _line(["---", *("---:" for _ in headings[1:])]), *map(_line, rows), ""]
        lines += [f"- {remark}" for remark in remarks(section)]
    return "\n".join(lines) + "\n"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"
