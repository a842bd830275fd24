"""What became of every tensor when a model was given the weights of another."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class LoadReport:
    """What became of every tensor; printed, it fits a screen.

    Each of the model's names is in exactly one of `loaded`, `adapted` and `new`, each of the source's in exactly one
    of `used` and `dropped`.
    """

    source: str
    """Where the weights come from."""
    loaded: list[str] = field(default_factory=list)
    """Parameters of the model that are the source's as they stand."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Parameters that are made from the source's, and how."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the source that the model has no use for, and why."""
    new: dict[str, str] = field(default_factory=dict)
    """Parameters that owe nothing to the source, and why."""
    partly_new: list[str] = field(default_factory=list)
    """Those of `adapted` in which a part owes nothing to the source: closed gates, rows of new classes."""
    used: list[str] = field(default_factory=list)
    """Tensors of the source that `loaded` and `adapted` come from."""

    @property
    def fresh(self) -> set[str]:
        """Parameters that only training gives their values, whole or in part."""
        return {*self.new, *self.partly_new}

    def __str__(self) -> str:
        lines = [f"weights of {self.source}", *_paragraph(f"loaded {len(self.loaded)}: ", self.loaded)]
        for title, reasons in (("adapted", self.adapted), ("dropped", self.dropped), ("new", self.new)):
            if reasons:
                lines.append(f"{title} {len(reasons)}:")
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines += _paragraph("  ", names, f" - {reason}")
        return "\n".join(lines)


def _paragraph(start: str, names: Iterable[str], end: str = "") -> list[str]:
    text = f"{start}{', '.join(_grouped(names)) or 'none'}{end}"
    return textwrap.wrap(text, 120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _grouped(names: Iterable[str]) -> list[str]:
    """`blocks.0.mlp`, `blocks.1.mlp`, `blocks.2.mlp` as `blocks.{0..2}.mlp`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?blocks)\.(\d+)\.(.*)", name)
        pattern = f"{match[1]}.*.{match[3]}" if match else name
        numbers.setdefault(pattern, []).extend([int(match[2])] if match else [])
    return [pattern.replace("*", _ranges(found), 1) if found else pattern for pattern, found in numbers.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """`{0..3}` for 0 1 2 3, `{1,3..7}` for 1 3 5 7, `{1,2,5}` for 1 2 5, `4` for 4."""
    rest, parts = sorted(numbers), []
    if len(rest) == 1:
        return str(rest[0])
    while rest:
        steps = np.diff(rest)
        length = 1 if not len(steps) else 1 + int(np.argmin(np.append(steps == steps[0], False)))
        if length > 2:
            first = f"{rest[0]}" if steps[0] == 1 else f"{rest[0]},{rest[1]}"
            parts.append(f"{first}..{rest[length - 1]}")
        else:
            length = 1
            parts.append(str(rest[0]))
        rest = rest[length:]
    return "{" + ",".join(parts) + "}"
