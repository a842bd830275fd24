"""The commands: parse, call, print. Heavy libraries load inside a command, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

# In the order of the help.
# isort: off
from lavita.cli.options import app
from lavita.cli import demo as demo
from lavita.cli import data as data
from lavita.cli import training as training
from lavita.cli import sampling as sampling
from lavita.cli import sharing as sharing
from lavita.cli import evaluation as evaluation
from lavita.cli import studies as studies
from lavita.cli import config as config

# isort: on
from lavita.core.text import one_line, print_any_text

__all__ = ["app", "main"]


def main() -> None:
    """Runs a command; bad input, as any `ValueError`, is one line on stderr and exit code 2."""
    print_any_text()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
