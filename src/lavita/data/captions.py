"""Captions of videos and images: reading tables of them, and drawing a caption for a clip."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavita.core.seeds import numpy_generator
from lavita.data.catalog import Catalog

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
# The first name is the documented one and takes precedence; of the other names a table may have only one.
FILE_COLUMNS = ("file", "video", "video_path", "image", "image_path", "path", "file_path", "file_name", "filename")
TEXT_COLUMNS = ("caption", "text", "prompt")
# The columns of WebVid: the video is <page_dir>/<videoid>.mp4, its caption is in `name`.
WEBVID_FILE, WEBVID_FOLDER, WEBVID_TEXT = "videoid", "page_dir", "name"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CaptionTable:
    """The captions of some files, and how many rows of their table were of no use."""

    captions: Mapping[str, tuple[str, ...]]
    """The captions of each file, in the order of the table."""
    num_rows: int
    num_unused: int
    """Rows about other files."""
    num_empty: int
    """Rows about the files that have no caption."""
    example: str
    """One of the other files; empty if there are none."""


def read_captions(file: Path) -> dict[str, tuple[str, ...]]:
    """Reads a whole table of captions.

    Args:
        file: CSV with a header, JSONL or Parquet (extra `tables`), with the columns `file` (path below the folder of
            the videos, with forward slashes) and `caption`, or other names from `FILE_COLUMNS` and `TEXT_COLUMNS`, or
            the columns of WebVid. Other columns are ignored. A file with several captions has several rows.

    Returns:
        The captions of each file, in the order of the table.

    Raises:
        ValueError: if the table is missing or damaged, if a column is missing or ambiguous, or if a caption is empty.
    """
    captions: dict[str, list[str]] = {}
    for number, names, value in _entries(file):
        if not (text := _caption(value)):
            raise ValueError(f"{file}: line {number} has no caption")
        captions.setdefault(names[0], []).append(text)
    if not captions:
        raise ValueError(f"{file}: holds no captions")
    return {name: tuple(texts) for name, texts in captions.items()}


def find_captions(file: Path, names: Collection[str]) -> CaptionTable:
    """Reads the captions of some files, and keeps nothing else: a table may be many times larger than the folder.

    Args:
        file: see `read_captions`.
        names: the files, as paths below their folder.

    Raises:
        ValueError: for the reasons of `read_captions`; but empty captions are counted.
    """
    captions: dict[str, list[str]] = {}
    num_rows = num_unused = num_empty = 0
    example = ""
    for _, candidates, value in _entries(file):
        num_rows += 1
        name = next((candidate for candidate in candidates if candidate in names), None)
        if name is None:
            num_unused += 1
            example = example or candidates[0]
        elif text := _caption(value):
            captions.setdefault(name, []).append(text)
        else:
            num_empty += 1
    found = {name: tuple(texts) for name, texts in captions.items()}
    return CaptionTable(found, num_rows, num_unused, num_empty, example)


def match_captions(
    file: Path, catalog: Catalog, broken: Literal["skip", "error"] = "skip"
) -> tuple[Mapping[str, tuple[str, ...]], Catalog]:
    """Finds the captions of a catalog, and reduces the catalog to the videos that have one.

    Rows about other files are counted on stderr: tables of web videos list many that no longer exist.

    Args:
        file: see `read_captions`.
        catalog: the videos or images.
        broken: `skip` leaves videos without a caption out and counts them on stderr; `error` raises at the first.

    Raises:
        ValueError: if the table cannot be read, if it has no caption for any of the videos, or, with `broken="error"`,
            if a video has no caption.
    """
    names = {video.name for video in catalog.videos}
    table = find_captions(file, names)
    if not table.captions:
        raise ValueError(
            f"{file}: has no caption for any of the {len(names)} files in {catalog.root}: it lists files such as "
            f"{table.example or 'none'!r}, the folder holds {catalog.videos[0].name!r}"
        )
    if table.num_unused:
        print(
            f"{file}: {table.num_unused:,} of {table.num_rows:,} rows are about files that are not in {catalog.root}, "
            f"such as {table.example}",
            file=sys.stderr,
        )
    if without := [video.name for video in catalog.videos if video.name not in table.captions]:
        if broken == "error":
            raise ValueError(f"{file}: has no caption for {without[0]}, which is in {catalog.root}")
        print(
            f"skipped: {len(without):,} of {len(names):,} files in {catalog.root} have no caption in {file}, such as "
            f"{without[0]}",
            file=sys.stderr,
        )
    return table.captions, catalog.only(table.captions)


def _entries(file: Path) -> Iterator[tuple[int, tuple[str, ...], object]]:
    """Yields for each row its number, the possible names of its file, and the value in the column of captions."""
    file_column = text_column = None
    for number, row in _rows(file):
        if file_column is None or text_column is None:
            file_column, text_column = _pick_columns(file, list(row))
        value = _text(row.get(file_column))
        if not value:
            raise ValueError(f"{file}: line {number} has no {file_column!r}; found: {', '.join(row) or 'nothing'}")
        if file_column == WEBVID_FILE:
            folder = _text(row.get(WEBVID_FOLDER))
            names: tuple[str, ...] = (f"{value}.mp4",)
            if folder and folder.lower() != "nan":  # as pandas writes a missing value
                names = (f"{folder}/{value}.mp4", *names)
        else:
            names = (value.replace("\\", "/").removeprefix("./"),)
        yield number, names, row.get(text_column)


def _text(value: object) -> str:
    """A value as text; tables also hold numbers as identifiers, and None if there is no value."""
    return "" if value is None else str(value).strip()


def _caption(value: object) -> str:
    """A caption on one line; empty if there is none."""
    return " ".join(_text(value).split())


def _pick_columns(file: Path, columns: Sequence[str]) -> tuple[str, str]:
    file_names = [name for name in FILE_COLUMNS if name in columns] or [n for n in (WEBVID_FILE,) if n in columns]
    text_names = [name for name in TEXT_COLUMNS if name in columns]
    if WEBVID_FILE in file_names and WEBVID_TEXT in columns:
        text_names.append(WEBVID_TEXT)
    picked = []
    for content, names, known in (
        ("files", file_names, (*FILE_COLUMNS, WEBVID_FILE)),
        ("captions", text_names, (*TEXT_COLUMNS, f"{WEBVID_TEXT} with {WEBVID_FILE}")),
    ):
        if not names:
            raise ValueError(
                f"{file}: has no column of {content}, which is one of {', '.join(known)}; found: "
                f"{', '.join(columns) or 'nothing'}"
            )
        if len(names) > 1 and names[0] != known[0]:
            raise ValueError(
                f"{file}: {' and '.join(names)} could both be the column of {content}; call one of them {known[0]!r}"
            )
        picked.append(names[0])
    return picked[0], picked[1]


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    suffix = file.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{file}: the name of a table of captions ends in {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if suffix == ".csv":
                reader = csv.reader(stream)
                header = next(reader, [])
                # A short line has no values in its last columns.
                yield from ((reader.line_num, dict(zip(header, values, strict=False))) for values in reader if values)
                return
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}: line {number} is not JSON") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{file}: line {number} is not an object with 'file' and 'caption'")
                yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f'{file}: tables in Parquet need the extra "tables": pip install "lavita[tables]"') from error
    wanted = {*FILE_COLUMNS, *TEXT_COLUMNS, WEBVID_FILE, WEBVID_FOLDER, WEBVID_TEXT}
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in wanted] or names[:1]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error


class CaptionSampler:
    """Draws captions of videos and images, as indices into a list of all texts; index 0 is the empty text."""

    def __init__(self, tables: Sequence[tuple[Mapping[str, tuple[str, ...]], Catalog]], seed: int) -> None:
        """Numbers the captions of some catalogs, as `match_captions` returns them."""
        self.seed = seed
        index_of = {"": 0}
        self._indices: dict[tuple[Path, str], list[int]] = {}
        for captions, catalog in tables:
            for video in catalog.videos:
                indices = [index_of.setdefault(text, len(index_of)) for text in captions[video.name]]
                self._indices[catalog.root, video.name] = indices
        self.texts = list(index_of)

    def draw(self, root: Path, name: str, step: int, index: int) -> int:
        """Draws a caption of a file, each equally likely; a pure function of (seed, step, index)."""
        indices = self._indices[root, name]
        return indices[int(numpy_generator(self.seed, "caption", step, index).integers(len(indices)))]
