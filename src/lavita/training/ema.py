"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


def decay_at(decay: float, step: int, warmup: bool = True) -> float:
    """The decay at a step (from 1): with a warm-up at most `(1 + step) / (10 + step)`.

    Short runs then forget their start; 0.9999 is reached at step 89,990.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class EMA:
    """Float32 averages of a model's trained weights, sharded like the weights."""

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        """Starts with the model's weights; for `decay`, in [0, 1), and `warmup` see `decay_at`."""
        self.decay, self.warmup = decay, warmup
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights after optimizer step `step` (from 1)."""
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay_of(step))

    def decay_of(self, step: int) -> float:
        """The decay at a step (from 1)."""
        return decay_at(self.decay, step, self.warmup)
