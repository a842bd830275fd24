"""Captions of videos and images: tables on disk, and which caption a clip gets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lavita.data.catalog import Catalog
from lavita.runtime import numpy_generator


def read_captions(file: Path) -> dict[str, tuple[str, ...]]:
    """Reads a table of captions.

    Args:
        file: CSV with a header, or JSONL, with the columns `file` (path below the folder of the videos, forward
            slashes) and `caption`; others are ignored. A file of several captions stands on several lines.

    Returns:
        The captions of each file, in the table's order.

    Raises:
        ValueError: for a missing or damaged table, a missing column or an empty caption, naming the line.
    """
    captions: dict[str, list[str]] = {}
    for number, row in _rows(file):
        for column in ("file", "caption"):
            if not isinstance(row.get(column), str) or not str(row[column]).strip():
                raise ValueError(
                    f"{file}: line {number} has no {column!r}; found: {', '.join(map(str, row)) or 'nothing'}"
                )
        captions.setdefault(str(row["file"]), []).append(" ".join(str(row["caption"]).split()))
    if not captions:
        raise ValueError(f"{file}: holds no captions")
    return {name: tuple(texts) for name, texts in captions.items()}


def _rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    if file.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"{file}: a table of captions ends in .csv or .jsonl")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(text.splitlines())
        yield from ((reader.line_num, dict(row)) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}: line {number} is not an object with 'file' and 'caption'")
        yield number, row


class CaptionSampler:
    """Draws a caption of a video or image, as its row in a list of all texts; row 0 is the empty text."""

    def __init__(self, tables: Sequence[tuple[dict[str, tuple[str, ...]], Catalog, Path]], seed: int) -> None:
        """Takes tables of captions, each with the catalog of its files and its path, for messages.

        Raises:
            ValueError: where a file of a catalog has no caption.
        """
        self.seed = seed
        self.texts: list[str] = [""]
        numbers = {"": 0}
        self._rows: dict[tuple[Path, str], list[int]] = {}
        for table, catalog, path in tables:
            for video in catalog.videos:
                if video.name not in table:
                    raise ValueError(f"{path}: has no caption for {video.name}, which is in {catalog.root}")
                rows = self._rows[catalog.root, video.name] = []
                for text in table[video.name]:
                    if text not in numbers:
                        numbers[text] = len(self.texts)
                        self.texts.append(text)
                    rows.append(numbers[text])

    def draw(self, root: Path, name: str, step: int, index: int) -> int:
        """The row of a caption, all of a file's equally likely; a pure function of (seed, step, index)."""
        rows = self._rows[root, name]
        return rows[int(numpy_generator(self.seed, "caption", step, index).integers(len(rows)))]
