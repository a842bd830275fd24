"""Names in several Unicode forms, text that an encoding lacks, and files that can be read only once."""

from __future__ import annotations

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lavita.core.text import by_normal_name, normal_name, one_line, print_any_text, printable, read_text

BYTES = "café".encode().decode("ascii", "surrogateescape")  # as Python reads the name under an ASCII locale
NOT_UTF8 = b"\xff.mp4".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("plain.mp4", "plain.mp4"),
        ("cafe\u0301", "caf\xe9"),
        ("caf\xe9", "caf\xe9"),
        (BYTES, "caf\xe9"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        (NOT_UTF8, NOT_UTF8),
        ("\ud83d", "\ud83d"),
        ("\ufb01", "\ufb01"),  # a ligature is another character, not another form
    ],
)
def test_names_have_one_normal_form(name: str, normal: str) -> None:
    assert normal_name(name) == normal and normal_name(normal) == normal


def test_two_names_of_one_form_are_both_named() -> None:
    assert by_normal_name(["a", "cafe\u0301", "a"], "x") == {"a": "a", "caf\xe9": "cafe\u0301"}
    with pytest.raises(ValueError) as caught:
        by_normal_name(["cafe\u0301", "a", "caf\xe9"], "videos")
    assert str(caught.value) == (
        r"videos: 'cafe\u0301' and 'caf\xe9' are one name in two Unicode forms; rename one of them"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [("café 東", "café 東"), (BYTES, "café"), (NOT_UTF8, r"\xff.mp4"), ("\ud83d東", r"\ud83d東")],
)
def test_text_for_a_utf8_file(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_text_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, "ascii", write_through=True))
    print_any_text()
    print("café", NOT_UTF8)
    assert stream.getvalue() == rb"caf\xe9 \udcff.mp4" + b"\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\t c", "a b c"),
        ("in/\x1b[31mred\x1b[0m.mp4", "in/\\x1b[31mred\\x1b[0m.mp4"),
        ("bell\x07 null\0 next\x85line", "bell\\x07 null\\x00 next line"),
        ("\u202egnp.4pm", "\\u202egnp.4pm"),
        ("日本語 é 🎞\ufe0f \u200d", "日本語 é 🎞\ufe0f \u200d"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_only_shows(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_long_message_keeps_both_ends() -> None:
    line = one_line("begin " + "x" * 10_000 + " end")
    assert len(line) == 2000 and line.startswith("begin x") and line.endswith("x end") and "x ... x" in line
    assert one_line("x" * 2000) == "x" * 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As `lavita train --config <(command)` gives one."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit((tmp_path / "pipe").write_bytes, b"a: 1\r\nb: 2\n")
        assert read_text(tmp_path / "pipe") == "a: 1\nb: 2\n"
        assert written.result() == 11
