"""A case: a folder with inputs, a command on them, and what is known about the right outcome."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.robustness.fuzz.material import Material

Build = Callable[[random.Random, Path, Material], "Case"]
"""Writes the inputs of a case below the working folder of its command. All choices come from the generator."""


@dataclass(frozen=True)
class Case:
    """A command, run in the folder that its inputs were written into."""

    arguments: tuple[str, ...]
    """Arguments of `lavita`. Paths are relative: inputs below `in`, outputs below `out`."""
    what: str
    """What is wrong with the input, in a few words."""
    must_fail: bool = False
    """Whether no output can be right, so that exit code 0 is a fault."""
    num_videos: int | None = None
    """Video files in the input, good and bad, if that is known."""
    num_frames: int | None = None
    """Frames of `in/fuzzed.*` before its end was cut off; the reader may report these or a broken video."""
    writable: tuple[str, ...] = ("out",)
    """Folders that the command may write into."""
    as_nobody: bool = False
    """Whether the command runs without the rights of root, to whom no file is unreadable."""
    seconds: float = 40.0
    """Time limit: processor time, and twice as much on the clock."""


def generator(kind: str, seed: int) -> random.Random:
    """The source of every choice in a case."""
    return random.Random(f"{kind}:{seed}")


def working_folder(sandbox: Path) -> Path:
    """Where the command of a case runs: so deep that a path with a few `..` stays inside the sandbox."""
    return sandbox / "1" / "2" / "3" / "4"
