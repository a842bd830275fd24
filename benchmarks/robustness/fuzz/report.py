"""The result of a campaign: faults grouped by kind, property and place, as Markdown and JSON."""

from __future__ import annotations

import os
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.fuzz.campaign import KINDS, Result
from benchmarks.robustness.fuzz.properties import PROPERTIES
from benchmarks.speed.machine import describe


def group_faults(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Groups of like faults, most frequent first, each with its first cases."""
    groups: dict[tuple[str, str, str], list[tuple[Result, str]]] = defaultdict(list)
    for result in results:
        for fault in result.faults:
            groups[result.kind, fault.name, fault.place or _pattern(fault.what)].append((result, fault.what))
    return [
        {
            "kind": kind,
            "property": name,
            "place": place,
            "count": len(members),
            "seeds": sorted(result.seed for result, _ in members)[:5],
            "example": members[0][1],
            "input": members[0][0].what[:200],
            "command": members[0][0].command[:200],
        }
        for (kind, name, place), members in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    ]


def write_report(results: Sequence[Result], file: Path, command: str) -> None:
    """Writes `file` (Markdown) and the same facts as JSON beside it.

    Args:
        results: of one campaign.
        file: ends in `.md`; the date is the end of its name.
        command: how the campaign was started.
    """
    from lavita.core.files import write_json, write_text

    machine = describe(torch.device("cpu"))
    groups = group_faults(results)
    kinds = {kind: _count([result for result in results if result.kind == kind]) for kind in KINDS}
    kinds = {kind: counts for kind, counts in kinds.items() if counts["tried"]}
    total = _count(results)
    facts = {
        "command": command,
        "processor": machine.processor,
        "cores": os.cpu_count(),
        "total": total,
        "kinds": kinds,
        "faults": groups,
    }
    write_json(file.with_suffix(".json"), facts)
    head = (
        "| kind | inputs | exit 0 | exit 2 | with a fault | median | slowest | most memory |\n| --- | " + "---: | " * 7
    )
    rows = [_row(kind, counts) for kind, counts in (*kinds.items(), ("all", total))]
    lines = [
        f"# Fuzzing, {file.stem[-10:]}",
        f"`{command}`",
        f"{total['tried']:,} inputs on {os.cpu_count()} cores of an {machine.processor}, each in a process of its own. "
        "Memory is what a command takes beyond the loaded libraries.",
        "\n".join([head.rstrip(), *rows]),
        "Checked for each of them:",
        "\n".join(f"- `{check.__name__}`: {(check.__doc__ or '').strip()}" for check in PROPERTIES),
        "## Faults",
        *([_faults_table(groups)] if groups else ["None."]),
    ]
    write_text(file, "\n\n".join(lines) + "\n")


def print_summary(results: Sequence[Result]) -> None:
    """Prints how many inputs were tried, and the groups of faults."""
    groups = group_faults(results)
    for group in groups:
        print(f"{group['count']:5} {group['kind']:14} {group['property']}: {_cell(group['place'])}")
        print(f"      {group['kind']}:{group['seeds'][0]}  {_cell(group['example'])[:150]}")
    faulty = sum(bool(result.faults) for result in results)
    print(f"{len(results):,} inputs, {faulty:,} with faults in {len(groups)} groups")


def _faults_table(groups: Sequence[dict[str, Any]]) -> str:
    lines = ["| kind | property | where | inputs | for example |", "| --- | --- | --- | ---: | --- |"]
    for group in groups:
        example = f"{group['kind']}:{group['seeds'][0]}: {group['example']}"
        cells = [group["kind"], group["property"], group["place"], str(group["count"]), example[:160]]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable.replace("|", "\\|").replace("<", "&lt;")


def _count(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "tried": len(results),
        "exit_0": sum(result.code == 0 for result in results),
        "exit_2": sum(result.code == 2 for result in results),
        "faulty": sum(bool(result.faults) for result in results),
        "median_seconds": statistics.median(result.seconds for result in results) if results else 0.0,
        "slowest_seconds": max((result.seconds for result in results), default=0.0),
        "most_memory_mib": max((result.memory for result in results), default=0) // 2**20,
    }


def _row(kind: str, counts: dict[str, Any]) -> str:
    numbers = [f"{counts[key]:,}" for key in ("tried", "exit_0", "exit_2", "faulty")]
    times = [f"{counts[key]:.1f} s" for key in ("median_seconds", "slowest_seconds")]
    return f"| {kind} | {' | '.join([*numbers, *times])} | {counts['most_memory_mib']:,} MiB |"


def _pattern(text: str) -> str:
    """A message without what differs from case to case: numbers, quoted values and paths."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", text)
    return re.sub(r"\d[\d,.]*", "N", text)[:120]
