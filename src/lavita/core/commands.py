"""Runs `lavita` commands one after the other, each in its own process, as a user would."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence


class CommandFailed(Exception):
    """A command failed; it has already printed its error."""

    def __init__(self, code: int) -> None:
        """Stores the exit code of the command."""
        super().__init__(f"exit code {code}")
        self.code = code


def run_command(arguments: Sequence[str]) -> None:
    """Runs `lavita ARGUMENTS` and waits; Ctrl-C also reaches that process, which saves its work before it exits.

    Raises:
        CommandFailed: if the exit code is not 0.
    """
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run([sys.executable, "-m", "lavita", *arguments], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
    if code:
        if code != 2:  # bad input, which the command has named
            print("stopped; run the same command again to continue from here", file=sys.stderr)
        raise CommandFailed(code)
