"""Text from outside: names in any Unicode form, files in several encodings, a terminal that lacks characters."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Characters that make a terminal show what follows in another order."""


def normal_name(name: str) -> str:
    """The form in which names are compared: composed (NFC), and read as UTF-8 whatever the locale is.

    A Mac decomposes the names of files, most other sources compose them. Bytes that Python could not decode, because
    the locale is ASCII or because they are not UTF-8, are one surrogate each (PEP 383); the latter stay so.
    """
    if name.isascii():
        return name
    with suppress(UnicodeEncodeError):  # another surrogate, as JSON may hold
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", name)


def by_normal_name(names: Iterable[str], where: object) -> dict[str, str]:
    """Names by their normal form.

    Args:
        names: the names.
        where: what they are in, for the message.

    Raises:
        ValueError: if two different names have the same normal form.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(normal_name(name), name)
        if other != name:
            raise ValueError(f"{where}: {other!a} and {name!a} are one name in two Unicode forms; rename one of them")
    return found


def printable(text: str) -> str:
    r"""Text that UTF-8 can hold: bytes that Python could not decode (see `normal_name`) become characters or `\xff`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:
            return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def one_line(text: str, most: int = 2000) -> str:
    r"""A message as one line that a terminal only shows: what it would obey, as in the names of files, becomes `\x1b`.

    Args:
        text: any text.
        most: number of characters; the middle of a longer text is left out.
    """
    line = " ".join(text.split())
    line = "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(letter) in _DIRECTIONS
        else letter
        for letter in line
    )
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 + 5 :]}"


def text_encoding(file: Path) -> str:
    """The encoding of a text file: UTF-8, or that of its byte order mark.

    Raises:
        ValueError: if it begins like UTF-16 without a mark.
        OSError: if it cannot be read.
    """
    with file.open("rb") as stream:
        return _encoding_of(stream.read(4), file)


def _encoding_of(head: bytes, file: Path) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise ValueError(f"{file}: line 1 is not UTF-8 (it begins with the bytes {head.hex(' ')}); save it as UTF-8")
    return "utf-8"


def read_text(file: Path) -> str:
    r"""Reads a text file in the encoding of `text_encoding`, with `\n` at the ends of its lines.

    Raises:
        ValueError: if it has another encoding; the message names the first bad line and byte.
        OSError: if it cannot be read.
    """
    data = file.read_bytes()  # at once: a pipe, as of `--config <(command)`, can be opened only once
    try:
        text = data.decode(_encoding_of(data[:4], file))
    except UnicodeError as error:
        raise undecodable(file, error) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def undecodable(file: Path, error: UnicodeError) -> ValueError:
    """The error for a file that is not in the encoding of `text_encoding`, with the place of the first bad byte."""
    encoding = text_encoding(file)
    if not encoding.startswith("utf-8"):
        return ValueError(f"{file}: begins like {encoding.upper()}, but is not ({error}); save it as UTF-8")
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                byte = f"byte {bad.start + 1} is 0x{line[bad.start]:02x}"
                return ValueError(f"{file}: line {number} is not UTF-8 ({byte}); save it as UTF-8")
    return ValueError(f"{file}: is not UTF-8 ({error}); save it as UTF-8")


def print_any_text() -> None:
    r"""Lets standard output show a character that its encoding lacks as `\xe9`, as standard error does, not raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
