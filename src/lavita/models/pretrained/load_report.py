"""Report of which tensors a model took from pretrained weights."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class LoadReport:
    """Which tensors a model took from pretrained weights, the source; its string fits a screen.

    Each tensor of the model is in exactly one of `loaded`, `adapted` and `new`, and each tensor of the source is in
    exactly one of `used` and `dropped`.
    """

    source: str
    """Name of the source, for messages."""
    loaded: list[str] = field(default_factory=list)
    """The model's tensors that equal the source's."""
    adapted: dict[str, str] = field(default_factory=dict)
    """The model's tensors that are made from the source's, and how."""
    dropped: dict[str, str] = field(default_factory=dict)
    """The source's tensors that the model does not use, and why."""
    new: dict[str, str] = field(default_factory=dict)
    """The model's tensors that take nothing from the source, and why."""
    partly_new: list[str] = field(default_factory=list)
    """Tensors of `adapted` of which a part takes nothing from the source: closed gates, rows of new classes."""
    used: list[str] = field(default_factory=list)
    """The source's tensors that `loaded` and `adapted` come from."""

    @property
    def fresh(self) -> set[str]:
        """The model's tensors that are new in whole or in part, so that they must be trained."""
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
    """Lines of a list of names, wrapped."""
    text = f"{start}{', '.join(_grouped(names)) or 'none'}{end}"
    return textwrap.wrap(text, 120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _grouped(names: Iterable[str]) -> list[str]:
    """Shortens `blocks.0.mlp`, `blocks.1.mlp`, `blocks.2.mlp` to `blocks.{0..2}.mlp`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?blocks)\.(\d+)\.(.*)", name)
        pattern = f"{match[1]}.*.{match[3]}" if match else name
        numbers.setdefault(pattern, []).extend([int(match[2])] if match else [])
    return [pattern.replace("*", _ranges(found), 1) if found else pattern for pattern, found in numbers.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """Writes 0 1 2 3 as `{0..3}`, 1 3 5 7 as `{1,3..7}`, 1 2 5 as `{1,2,5}`, and 4 as `4`."""
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


def listed(names: list[str]) -> str:
    """Names separated by commas, shortened if there are many."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6} more"
