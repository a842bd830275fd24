"""The records in a folder of samples: how its videos are made, and from which prompts.

`generation.json` holds the settings that all videos share. `prompts.jsonl` has a line with `file` and `caption` for
each video of a prompt: it is a table of captions, too. `given.jsonl` has a line with `file` and `given` for each video
that was given frames: their places and a hash of their pixels. A file that is there is kept only if these records say
that it is the video that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lavita.core.files import write_text
from lavita.core.text import printable
from lavita.data.catalog import read_generation
from lavita.video.formats import GENERATION, GIVEN, PROMPTS


def check_generation(out: Path, settings: Mapping[str, Any]) -> None:
    """Checks that the videos in a folder were made in the same way.

    Raises:
        ValueError: for the first setting that differs.
    """
    before = read_generation(out)
    if before is not None and before.get("draws", 1) != settings["draws"]:
        raise ValueError(
            f"{out}: holds videos of a version that drew other noise from the same seed; use another folder"
        )
    for key in {**settings, **(before or {})}:
        if before is not None and before.get(key) != settings.get(key):
            raise ValueError(
                f"{out}: holds videos made with {key}={before.get(key)}, not {settings.get(key)}; use another folder"
            )


def write_generation(out: Path, settings: Mapping[str, Any]) -> None:
    """Records how the videos in a folder are made, in its `generation.json`."""
    write_text(out / GENERATION, json.dumps(settings, indent=1))


class Table(NamedTuple):
    """A table with a line for each file."""

    file: str
    key: str
    """What its lines have besides `file`."""
    what: str


PROMPT_TABLE = Table(PROMPTS, "caption", "the prompt")
GIVEN_TABLE = Table(GIVEN, "given", "the given frames")


def check_files(out: Path, table: Table, values: Mapping[Path, str | None]) -> None:
    """Checks that the files that are there already are the ones that are asked for.

    Args:
        out: the folder, whose `generation.json` has been checked.
        table: the table in it.
        values: the files that are asked for, with what the table should say of them; None for nothing.

    Raises:
        ValueError: for the first file that is not recorded, or of which the table says something else.
    """
    existing = [path for path in values if path.exists()]
    if existing and read_generation(out) is None:
        raise ValueError(f"{existing[0]}: is there, but no {out / GENERATION} says how it was made; use another folder")
    recorded = _read_table(out, table)
    for path in existing:
        value = values[path]
        found = recorded.get(path.relative_to(out).as_posix())
        if value is not None and found != value:
            made = f"was made from {table.what} {found!r}" if found is not None else f"is not recorded in {table.file}"
            raise ValueError(f"{path}: {made}, but {value!r} was asked for; use another folder")


def record_files(out: Path, table: Table, values: Mapping[Path, str | None]) -> None:
    """Adds files that are about to be written to a table; lines that are there already stay."""
    recorded = _read_table(out, table)
    lines = []
    for path, value in values.items():
        name = path.relative_to(out).as_posix()
        if value is not None and recorded.get(name) != value:
            row = {"file": name, table.key: value}
            # Escaped only if UTF-8 cannot hold it: a table is for people, too.
            lines.append(json.dumps(row, ensure_ascii=value != printable(value)) + "\n")
    if not lines:
        return
    out.mkdir(parents=True, exist_ok=True)
    # Appended, not rewritten: commands with other seeds or prompts may be writing to the same folder.
    with (out / table.file).open("ab") as stream:
        # A line break first, in case a command was killed in the middle of a line.
        stream.write(("\n" if stream.tell() else "").encode() + "".join(lines).encode())


def _read_table(out: Path, table: Table) -> dict[str, str]:
    """What a table says of each recorded file; a line that was cut off records nothing."""
    values = {}
    try:
        lines = (out / table.file).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            values[row["file"]] = row[table.key]
        except (ValueError, TypeError, KeyError):
            continue
    return values
