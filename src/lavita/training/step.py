"""One optimizer step."""

from __future__ import annotations

from lavita.training.config import TrainConfig


def learning_rate(settings: TrainConfig, step: int) -> float:
    """The rate of a step (from 0): up to the set one, constant, and down to 0 in the last `decay_steps`.

    A constant rate can be stopped and decayed at any time, so the length of a run need not be known at its start
    (Haegele et al. 2024, Sec. 3).
    """
    rise = (step + 1) / max(1, settings.warmup_steps)
    fall = (settings.steps - step) / (settings.decay_steps + 1)
    return settings.learning_rate * min(1.0, rise, fall)
