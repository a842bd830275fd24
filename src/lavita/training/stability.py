"""Steps that go wrong: loss scaling for fp16, and the detection of spikes and of infinite gradients."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

import torch

from lavita.core.processes import Processes
from lavita.training.batches import Batch

Verdict = Literal["good", "spike", "not-finite", "overflow"]
HISTORY = 100
"""Gradient norms that a spike is measured against."""
ENOUGH = 20
"""Norms that must be known before anything counts as a spike."""
MOST_SKIPPED = 10
"""Steps in a row that may be skipped."""


class StepGuard:
    """Judges each step by the norm of its gradient, which is the same in all processes, before the weights change."""

    def __init__(self, spike_factor: float) -> None:
        """A norm of more than `spike_factor` times the median of the last 100 is a spike; with 0 none is."""
        self.spike_factor = spike_factor
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0
        """Steps skipped in a row."""

    def judge(self, norm: float) -> Verdict:
        """Judges a step whose gradient has this norm, and remembers the norm."""
        if not math.isfinite(norm):
            return "not-finite"
        enough = self.spike_factor and len(self.norms) >= ENOUGH
        is_spike = enough and norm > self.spike_factor * median(self.norms)
        self.norms.append(norm)
        return "spike" if is_spike else "good"

    def state(self) -> dict[str, Any]:
        """The values of a checkpoint."""
        return {"norms": list(self.norms), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues with the values of a checkpoint."""
        self.norms.extend(state["norms"])
        self.skipped = state["skipped"]


class LossScale:
    """Scales the loss so that fp16 gradients neither vanish nor overflow (Micikevicius et al. 2018, Sec. 3.2).

    `torch.amp.GradScaler` decides separately for each optimizer and each process; here several optimizers and the
    shards of several processes must skip a step together, so the norm of the whole gradient decides.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool) -> None:
        """Starts at 2^16; a scale that is not `enabled` is always 1."""
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._good = 0

    @torch.no_grad()
    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divides gradients by the scale."""
        if self.enabled:
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def overflowed(self, norm: float) -> bool:
        """Whether a step must be skipped because its gradient, of this norm, overflowed; adjusts the scale.

        The scale halves at an overflow and doubles after `GROWTH_INTERVAL` steps without one.
        """
        if not self.enabled:
            return False
        if not math.isfinite(norm) and self.value > 1.0:
            self.value, self._good = self.value / 2, 0
            return True
        self._good += 1
        if self._good == self.GROWTH_INTERVAL:
            self.value, self._good = self.value * 2, 0
        return False

    def state(self) -> dict[str, Any]:
        """The values of a checkpoint."""
        return {"value": self.value, "good": self._good}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues with the values of a checkpoint."""
        self.value, self._good = state["value"], state["good"]


def name_clips(batch: Batch, losses: torch.Tensor, team: Processes) -> list[dict[str, Any]]:
    """The clips of a step over all processes, with their losses, the worst first.

    Args:
        batch: this process's clips.
        losses: their losses, (B,).
        team: the processes, which call this together.

    Returns:
        For each clip its `video`, `start`, `flip` and `loss`.
    """
    own = [
        {"video": draw.video.name, "start": draw.start, "flip": draw.flip, "loss": loss}
        for draw, loss in zip(batch.draws, losses.tolist(), strict=True)
    ]
    clips = [clip for share in team.gather(own) for clip in share]
    # Sort NaN losses first.
    return sorted(clips, key=lambda clip: float("-inf") if math.isnan(clip["loss"]) else -clip["loss"])


def not_finite(step: int, loss: float, norm: float, advice: str) -> FloatingPointError:
    """The error that ends a run at a step (from 1) whose loss or gradient is not finite."""
    return FloatingPointError(f"the loss is {loss} and the norm of its gradient {norm} at step {step}; {advice}")
