"""Does an arcade model draw all players, cars and other objects? Their numbers per frame, real and generated."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lavita.core.files import write_json
from lavita.demo.sprites import compare_sprites

WITHIN = 0.2
"""Largest difference of a ratio from 1 that counts as the same number."""


def study_sprites(real: Path, generated: Path, out: Path | None) -> None:
    """Prints a row per kind of object, and writes them to a JSON file if one is given.

    Args:
        real: folder of arcade videos, one folder per game.
        generated: folder of samples, one folder per game.
        out: JSON file, or None.

    Raises:
        ValueError: if no game is in both folders.
    """
    rows = compare_sprites(real, generated)
    if not rows:
        raise ValueError(f"no folder of an arcade game with .mp4 files is in both {real} and {generated}")
    table = Table("game", "object", "real per frame", "generated", "ratio")
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["game"], row["sprite"], f"{row['real']:.2f}", f"{row['generated']:.2f}", ratio)
    Console().print(table)
    close = sum(row["ratio"] is not None and abs(row["ratio"] - 1) <= WITHIN for row in rows)
    print(f"{close} of {len(rows)} kinds within {WITHIN:.0%} of the real number")
    if out is not None:
        write_json(out, rows)
