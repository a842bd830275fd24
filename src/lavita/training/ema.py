"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


def decay_at(decay: float, step: int) -> float:
    """The decay at a step (from 1): at most `(1 + step) / (10 + step)`, so that short runs forget their start."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Float32 averages of a model's trained weights, sharded like the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts with the model's weights; `decay` in [0, 1) is the limit that `decay_at` reaches in long runs."""
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights after optimizer step `step` (from 1)."""
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay_of(step))

    def decay_of(self, step: int) -> float:
        """The decay at a step (from 1)."""
        return decay_at(self.decay, step)
