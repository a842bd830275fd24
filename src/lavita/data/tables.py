"""Tables: the rows of CSV, JSONL and Parquet files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lavita.core.text import text_encoding, undecodable

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = Mapping[str, Any]


def read_rows(file: Path, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    """Reads a table row by row; it may be larger than the memory.

    Args:
        file: CSV with a header, JSONL or Parquet (extra `tables`).
        columns: the columns of interest, none of which may be there twice. Parquet gives no others.

    Yields:
        The number of a row (of a text file, that of its last line) and its values by column. Those of CSV are all
        texts; a short line has none in its last columns.

    Raises:
        ValueError: if the table is missing or damaged, has a column twice or is in another encoding than UTF-8, or
            UTF-16 with a byte order mark.
    """
    suffix = file.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{file}: the name of a table ends in {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet_rows(file, columns)
        return
    try:
        with file.open(encoding=text_encoding(file), newline="") as stream:
            yield from _csv_rows(file, stream, columns) if suffix == ".csv" else _jsonl_rows(file, stream)
    except UnicodeError as error:
        raise undecodable(file, error) from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


def _csv_rows(file: Path, stream: TextIO, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(stream, strict=True)  # otherwise a quote that is never closed takes in the rest of the table
    try:
        header = next(reader, [])
        _check_header(file, header, columns)
        for values in reader:
            if any(value.strip() for value in values[len(header) :]):
                raise ValueError(
                    f"{file}: line {reader.line_num} has {len(values)} values for {len(header)} columns; a value with "
                    "commas needs quotes"
                )
            if values:
                yield reader.line_num, dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise ValueError(f"{file}: cannot be read: line {reader.line_num}: {error}") from error


def _jsonl_rows(file: Path, stream: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except _RepeatedKey as error:
            raise ValueError(f"{file}: line {number} has {error} twice") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}: line {number} is not an object with 'file' and 'caption'")
        yield number, row


class _RepeatedKey(Exception):
    """A JSON object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _RepeatedKey(repr(Counter(key for key, _ in pairs).most_common(1)[0][0]))
    return row


def _check_header(file: Path, header: Sequence[str], columns: Collection[str]) -> None:
    if twice := [name for name, count in Counter(header).items() if count > 1 and name in columns]:
        raise ValueError(f"{file}: has the column {twice[0]!r} twice")


def _parquet_rows(file: Path, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f'{file}: tables in Parquet need the extra "tables": pip install "lavita[tables]"') from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_header(file, names, columns)
            wanted = [name for name in names if name in columns] or names[:1]
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: a text after line {number} is not UTF-8 ({error})") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error
