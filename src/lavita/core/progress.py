"""A progress line with an ETA, and notes about the data, on stderr."""

from __future__ import annotations

import os
import sys
import time


class Progress:
    """A live line with an ETA on a terminal; elsewhere, such as in a log file, one line every 30 seconds."""

    def __init__(self, what: str, total: int, done: int = 0, active: bool = True) -> None:
        """Starts at `done` of `total` units of work called `what`; prints nothing unless `active`."""
        self.what, self.total, self.done = what, total, done
        self._first, self._start = done, time.monotonic()
        self._active, self._live = active, sys.stderr.isatty()
        self._printed = float("-inf")
        self._width = 0

    def update(self, done: int, note: str = "") -> None:
        """Reports that `done` units are finished, with a note such as the loss."""
        self.done = done
        if not self._active:
            return
        now = time.monotonic()
        finished = done >= self.total
        if now - self._printed < (0.1 if self._live else 30) and not finished:
            return
        self._printed = now
        elapsed = now - self._start
        fresh = done - self._first
        left = f"ETA {clock(elapsed / fresh * (self.total - done))}" if fresh and not finished else ""
        timing = left or f"took {clock(elapsed)}" if fresh else ""
        line = "  ".join(part for part in (f"{self.what} {done:,}/{self.total:,}", note, timing) if part)
        if self._live:
            end = "\n" if finished else "\r"
            print(line.ljust(self._width), end=end, file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Prints a separate line without breaking the live one."""
        if not self._active:
            return
        print(f"\r{text.ljust(self._width)}" if self._live else text, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Prints a line on stderr; of the processes that `torchrun` started, only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
