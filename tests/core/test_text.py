"""Names in several Unicode forms, and text that an encoding lacks."""

from __future__ import annotations

import io
import sys

import pytest

from lavita.core.text import by_normal_name, normal_name, print_any_text, printable

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
