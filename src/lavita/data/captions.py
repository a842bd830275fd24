"""Captions of videos and images: reading tables of them, and drawing a caption for a clip."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lavita.core.progress import say
from lavita.core.seeds import numpy_generator
from lavita.core.text import by_normal_name, normal_name
from lavita.data.catalog import Catalog
from lavita.data.tables import Row, read_rows

# The first name is the documented one and takes precedence; of the other names a table may have only one.
FILE_COLUMNS = ("file", "video", "video_path", "image", "image_path", "path", "file_path", "file_name", "filename")
TEXT_COLUMNS = ("caption", "text", "prompt")
# The columns of WebVid: the video is <page_dir>/<videoid>.mp4, its caption is in `name`.
WEBVID_FILE, WEBVID_FOLDER, WEBVID_TEXT = "videoid", "page_dir", "name"
KNOWN_COLUMNS = frozenset({*FILE_COLUMNS, *TEXT_COLUMNS, WEBVID_FILE, WEBVID_FOLDER, WEBVID_TEXT})
# What programs write where a value is missing, in lower case; CSV has nothing else for it.
MISSING = frozenset({"", "nan", "null", "none", "<na>"})
# From here on not every whole number is a floating-point number, so that one may stand for another identifier.
INEXACT = 2**53


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
            the columns of WebVid. Other columns are ignored. A file with several captions has several rows, or a list
            of captions in one.

    Returns:
        The captions of each file, in the order of the table; the names of the files are in their normal form
        (`core.text.normal_name`).

    Raises:
        ValueError: if the table is missing or damaged, if a column is missing or ambiguous, if a value is of another
            type than a text or a list of texts, or if there is no caption in a row.
    """
    captions: dict[str, list[str]] = {}
    for number, names, texts in _entries(file):
        if not texts:
            raise ValueError(f"{file}: line {number} has no caption")
        captions.setdefault(normal_name(names[0]), []).extend(texts)
    if not captions:
        raise ValueError(f"{file}: holds no captions")
    return {name: tuple(texts) for name, texts in captions.items()}


def find_captions(file: Path, names: Collection[str]) -> CaptionTable:
    """Reads the captions of some files, and keeps nothing else: a table may be many times larger than the folder.

    Args:
        file: see `read_captions`.
        names: the files, as paths below their folder. The table may have them in another Unicode form.

    Raises:
        ValueError: for the reasons of `read_captions`, but rows without a caption are counted; or if two names are one
            in different Unicode forms.
    """
    captions: dict[str, list[str]] = {}
    num_rows = num_unused = num_empty = 0
    example = ""
    known = by_normal_name(names, file)
    for _, candidates, texts in _entries(file):
        num_rows += 1
        name = next((known[form] for form in map(normal_name, candidates) if form in known), None)
        if name is None:
            num_unused += 1
            example = example or candidates[0]
        elif texts:
            captions.setdefault(name, []).extend(texts)
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
        say(
            f"{file}: {table.num_unused:,} of {table.num_rows:,} rows are about files that are not in {catalog.root}, "
            f"such as {table.example}",
        )
    if table.num_empty:
        say(f"{file}: {table.num_empty:,} of {table.num_rows:,} rows have no caption")
    if without := [video.name for video in catalog.videos if video.name not in table.captions]:
        if broken == "error":
            raise ValueError(f"{file}: has no caption for {without[0]}, which is in {catalog.root}")
        say(
            f"skipped: {len(without):,} of {len(names):,} files in {catalog.root} have no caption in {file}, such as "
            f"{without[0]}",
        )
    return table.captions, catalog.only(table.captions)


def _entries(file: Path) -> Iterator[tuple[int, tuple[str, ...], list[str]]]:
    """Yields for each row its number, the possible names of its file, and its captions, of which there may be none."""
    file_column = text_column = None
    is_csv = file.suffix.lower() == ".csv"
    for number, row in read_rows(file, KNOWN_COLUMNS):
        if file_column is None or text_column is None:
            file_column, text_column = _pick_columns(file, list(row))
        try:
            names = _names(row, file_column)
            texts = _captions(row.get(text_column), text_column, is_csv)
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: {error}") from error
        if not names:
            raise ValueError(f"{file}: line {number} has no {file_column!r}; found: {', '.join(row) or 'nothing'}")
        yield number, names, texts


def _names(row: Row, column: str) -> tuple[str, ...]:
    """The possible names of a row's file; none if it has no file."""
    value = _identifier(row.get(column), column)
    if not value:
        return ()
    if column != WEBVID_FILE:
        return (value.replace("\\", "/").removeprefix("./"),)
    if re.fullmatch(r"\d+\.0", value):  # as pandas writes a whole number in a column with missing values
        value = value.removesuffix(".0")
    folder = _identifier(row.get(WEBVID_FOLDER), WEBVID_FOLDER)
    name = f"{value}.mp4"
    return (name,) if folder.lower() in MISSING else (f"{folder}/{name}", name)


def _identifier(value: object, column: str) -> str:
    """The name of a file or folder, which may be a whole number; empty if there is none.

    Raises:
        ValueError: for a value of another type.
    """
    if _is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < INEXACT:
        value = int(value)  # pandas makes a column of integers with missing values one of floats
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value).strip()
    raise ValueError(f"{column!r} is {_shown(value)}, but must be a text or a whole number")


def _captions(value: object, column: str, is_csv: bool) -> list[str]:
    """The captions in a cell, each on one line; none if it is empty.

    Raises:
        ValueError: for a value of another type than a text or a list of texts.
    """
    if is_csv and isinstance(value, str) and re.match(r"""\[\s*["']""", value.strip()):
        value = _written_list(value.strip())
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if _is_missing(text):
            continue
        if not isinstance(text, str):
            raise ValueError(f"{column!r} is {_shown(value)}, but must be a text or a list of texts")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{column!r} is {ascii(text)[:60]}, which holds half a character (a surrogate)") from error
        texts.append(" ".join(text.split()))
    return [text for text in texts if text.lower() not in MISSING]


def _written_list(text: str) -> object:
    """The list that a cell of a CSV table shows, as JSON or as Python prints it; other texts stay as they are.

    Raises:
        ValueError: for what looks like a list, but is none: NumPy prints them without commas.
    """
    for read, write in ((json.loads, None), (ast.literal_eval, repr)):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        # Python joins 'a' 'b' to one text, silently.
        if isinstance(value, list) and (write is None or write(value) == text):
            return value
    if text.endswith(("']", '"]')):
        raise ValueError(f"{_shown(text)} looks like a list of captions, but is not one in JSON or Python")
    return text


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: object) -> str:
    """A value and its type, shortened."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


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

    def draw(self, root: Path, name: str, step: int, *place: int) -> int:
        """Draws a caption of a file, each equally likely; a pure function of (seed, step, place).

        Args:
            root: the folder of its catalog.
            name: its name in the catalog.
            step: step of the training.
            place: index of the clip, then of its image, if it is one.
        """
        indices = self._indices[root, name]
        return indices[int(numpy_generator(self.seed, "caption", step, *place).integers(len(indices)))]
