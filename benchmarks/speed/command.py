"""Runs sections of the speed benchmark one after the other, then writes all files at once."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.speed.machine import Machine, describe, measure_limits
from benchmarks.speed.plots import draw
from benchmarks.speed.setup import TINY, Setup, build_model
from benchmarks.speed.tables import markdown, print_section
from benchmarks.speed.timing import Section
from lavita.core.files import write_json, write_text
from lavita.models.compilation import compile_blocks

RESULT, TABLE = "result.json", "table.md"


def run_sections(setup: Setup, sections: Sequence[str], out: Path | None = None) -> list[Section]:
    """Measures, prints, and writes `result.json`, `table.md` and plots into `out`, all at the end.

    Args:
        setup: settings of all sections.
        sections: names of modules of `benchmarks.speed` with a function `run`.
        out: folder; files of an earlier run are replaced.

    Raises:
        ValueError: for an `out` that is not a folder, or a preset that does not fit the machine.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is not a folder")
    if setup.compiled:  # fails now if there is no compiler
        compile_blocks(build_model(replace(setup, **TINY)))
    console = Console()
    machine = describe(setup.torch_device)
    console.print(machine.line(), highlight=False)
    slow = "" if machine.fast_bf16 or setup.precision == "fp32" else " (slow on this machine)"
    console.print(
        f"{setup.preset}, {setup.batch_size} x {setup.num_frames} frames of {setup.sample_size} x {setup.sample_size} "
        f"latents, {setup.precision}{slow}; {setup.repeats} rounds",
        highlight=False,
    )
    limits = measure_limits(setup.torch_device, setup.dtype, setup.repeats)
    console.print(f"{_limits(limits)}\n", highlight=False)
    measured = []
    for name in sections:
        run: Callable[[Setup], Section] = import_module(f"benchmarks.speed.{name}").run
        section = run(setup)
        print_section(section, console)
        measured.append(section)
    if out is not None:
        write(out, setup, machine, limits, measured)
        console.print(out, highlight=False)
    return measured


def write(out: Path, setup: Setup, machine: Machine, limits: dict[str, Any], sections: Sequence[Section]) -> None:
    """Writes all files of a benchmark into a temporary folder and then moves them into `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine.to_json(),
        "setup": setup.to_json(),
        "limits": limits,
        "command": sys.argv[1:],
        "sections": [section.to_json() for section in sections],
    }
    head = [machine.line(), "", f"{setup.preset}, {setup.precision}; {_limits(limits)}", ""]
    head += ["Seconds are medians over rounds in which the rows took turns, ratios medians of the rounds' ratios."]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=out.parent) as name:
        folder = Path(name)
        write_json(folder / RESULT, result)
        write_text(folder / TABLE, markdown(head, sections))
        draw(sections, folder)
        out.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.replace(out / file.name)


def read_sections(path: Path) -> list[Section]:
    """The sections of a `result.json`."""
    return [Section.from_json(values) for values in json.loads(path.read_text(encoding="utf-8"))["sections"]]


def _limits(limits: dict[str, Any]) -> str:
    product, copy = limits["gflops"], limits["copy_gigabytes_per_second"]
    return (
        f"a square product of {limits['square_side']} runs at {product['median']:,.0f} GFLOP/s in {limits['dtype']} "
        f"({product['least']:,.0f} to {product['most']:,.0f}), a copy of {limits['copied_bytes'] >> 20} MiB reads and "
        f"writes {copy['median']:.1f} GB/s ({copy['least']:.1f} to {copy['most']:.1f})"
    )
