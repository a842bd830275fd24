"""What keeps a long run from harm: loss scaling for fp16, and a watch over steps that go wrong."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

import torch

from lavita.core.processes import Processes
from lavita.training.batches import Batch

Verdict = Literal["good", "spike", "not-finite", "overflow"]
HISTORY = 100  # gradient norms that a spike is measured against
ENOUGH = 20  # of them, before anything counts as a spike
MOST_SKIPPED = 10  # steps in a row


class StepGuard:
    """Judges each step by its gradient's norm, which all processes share, before the weights change.

    A spike is a norm of more than `spike_factor` times the median of the last 100.
    """

    def __init__(self, spike_factor: float) -> None:
        """`spike_factor` 0 knows no spikes."""
        self.spike_factor = spike_factor
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0
        """Steps skipped in a row."""

    def judge(self, norm: float) -> Verdict:
        """What to think of a step whose gradient has this norm."""
        if not math.isfinite(norm):
            return "not-finite"
        enough = self.spike_factor and len(self.norms) >= ENOUGH
        is_spike = enough and norm > self.spike_factor * median(self.norms)
        self.norms.append(norm)
        return "spike" if is_spike else "good"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"norms": list(self.norms), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's."""
        self.norms.extend(state["norms"])
        self.skipped = state["skipped"]


class LossScale:
    """Scales the loss so that fp16 gradients neither vanish nor overflow (Micikevicius et al. 2018, Sec. 3.2).

    `torch.amp.GradScaler` decides for each optimizer and each process apart; here several optimizers and the shards of
    several processes must skip a step together, so the decision hangs on the norm of the whole gradient.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool) -> None:
        """One that is not `enabled` is always 1."""
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._good = 0

    @torch.no_grad()
    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divides gradients by the scale."""
        if self.enabled:
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def overflowed(self, norm: float) -> bool:
        """Whether a step must be left out because its gradient, of this norm, overflowed; moves the scale."""
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
        """For a checkpoint."""
        return {"value": self.value, "good": self._good}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's."""
        self.value, self._good = state["value"], state["good"]


def name_clips(batch: Batch, losses: torch.Tensor, team: Processes) -> list[dict[str, Any]]:
    """Where the clips of a step come from, over all processes, with their losses, the worst first."""
    mine = [
        {"video": draw.video.name, "start": draw.start, "flip": draw.flip, "loss": loss}
        for draw, loss in zip(batch.draws, losses.tolist(), strict=True)
    ]
    everyone = [clip for share in team.gather(mine) for clip in share]
    # What is no number is worse than any.
    return sorted(everyone, key=lambda clip: -clip["loss"] if clip["loss"] == clip["loss"] else float("-inf"))
