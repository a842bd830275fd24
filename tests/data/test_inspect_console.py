"""What `lavita data inspect` prints: its numbers, each in its place, also where a list is shortened."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_data import write_videos

from lavita.data.inspect import NUM_SHOWN, CaptionCoverage, Inspection, inspect_dataset, print_inspection


@pytest.fixture
def found(tmp_path: Path) -> Inspection:
    return inspect_dataset(write_videos(tmp_path / "v", ["a/0.mp4"], 2))


def printed(found: Inspection) -> str:
    """On one line, with single spaces."""
    console = Console(file=io.StringIO(), width=300)
    print_inspection(found, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_captions(found: Inspection) -> None:
    covered = CaptionCoverage(
        num_captions=1234,
        num_videos=77,
        without=("x.mp4", "y.mp4", "z.mp4", "w.mp4"),
        num_rows=5678,
        num_rows_unused=910,
        unused_example="gone.mp4",
        num_rows_empty=11,
    )
    assert (
        "captions 1,234 for 77 videos; 4 videos have none: x.mp4, y.mp4, z.mp4 and 1 more; 910 of 5,678 rows are "
        "about files that are not here, such as gone.mp4; 11 rows are empty"
    ) in printed(replace(found, captions=covered))


def test_long_lists_end_with_the_number_of_the_rest(found: Inspection) -> None:
    classes = {f"class-{number:02}": number + 1 for number in range(NUM_SHOWN + 5)}
    sizes = {f"{100 + number}x100": 50 - number for number in range(NUM_SHOWN + 3)}
    broken = tuple(f"{number}.mp4: is broken" for number in range(NUM_SHOWN + 7))
    text = printed(replace(found, classes=classes, sizes=sizes, broken=broken))
    assert f"class-{NUM_SHOWN - 1} {NUM_SHOWN} and 5 more" in text and f"class-{NUM_SHOWN} " not in text
    rest = list(sizes.values())[NUM_SHOWN:]
    assert f"3 more {sum(rest)}" in text
    assert f"broken {NUM_SHOWN + 7}, listed below" in text and "and 7 more, all in --json" in text


def test_names_with_brackets_are_printed_as_they_are(found: Inspection) -> None:
    assert "[/x] 3" in printed(replace(found, classes={"[/x]": 3, "[red]": 2}))
