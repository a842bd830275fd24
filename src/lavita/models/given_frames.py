"""Frames of a clip that are given: the model fills in the rest, as in image-to-video, continuation and interpolation.

A given frame takes part without noise, at every timestep, and a vector that is added to its tokens says that it is
given. Which frames those are is a mask; the kinds below are the masks that training draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

GivenKind = Literal["first", "start", "last", "ends", "every"]
KINDS: tuple[GivenKind, ...] = get_args(GivenKind)
"""`first`: the first frame; `start`: the first few; `last`: the last frame; `ends`: the first and the last; `every`:
every second, or third, and so on, up to half of the clip."""


@dataclass(frozen=True)
class GivenMasks:
    """Which frames training clips are given."""

    kinds: Sequence[GivenKind] = ()
    """The kinds that are drawn, each equally often; none for a model of whole clips."""
    dropout: float = 0.2
    """Probability that no frame is given."""

    def draw(self, num_frames: int, random: torch.Generator) -> torch.Tensor:
        """Draws the given frames of a clip of F frames, bool (F,); at least one frame is left to the model.

        How many numbers are drawn from the generator does not depend on what they are.
        """
        share, choice, size = torch.rand(3, generator=random, dtype=torch.float64).tolist()
        given = torch.zeros(num_frames, dtype=torch.bool)
        if share >= self.dropout and num_frames > 1:
            masks = _masks(self.kinds[int(choice * len(self.kinds))], num_frames)
            given[list(masks[int(size * len(masks))])] = True
        return given


def kinds_of(given: torch.Tensor) -> set[GivenKind]:
    """The kinds that draw a mask, bool (F,)."""
    places = torch.nonzero(given)[:, 0].tolist()
    return {kind for kind in KINDS if places in [list(mask) for mask in _masks(kind, len(given))]}


def _masks(kind: GivenKind, num_frames: int) -> Sequence[Sequence[int]]:
    """The places of the given frames in each mask of a kind."""
    last = num_frames - 1
    if kind == "start":
        return [range(count) for count in range(1, num_frames)]
    if kind == "every":
        return [range(0, num_frames, step) for step in range(2, max(2, num_frames // 2) + 1)]
    return [{"first": [0], "last": [last], "ends": [0, last] if last > 1 else [0]}[kind]]
