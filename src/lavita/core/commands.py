"""Runs commands of `lavita` one after the other, each in a process of its own, as a user would."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence


class CommandFailed(Exception):
    """A command ended with an error, which it has printed itself."""

    def __init__(self, code: int) -> None:
        """Keeps the exit code of the command."""
        super().__init__(f"exit code {code}")
        self.code = code


def run_command(arguments: Sequence[str]) -> None:
    """Runs `lavita ARGUMENTS`; Ctrl-C reaches it too, and here only waits for it to save what it has.

    Raises:
        CommandFailed: where its exit code is not 0.
    """
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run([sys.executable, "-m", "lavita", *arguments], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
    if code:
        print("stopped here; the same command goes on from there", file=sys.stderr)
        raise CommandFailed(code)
