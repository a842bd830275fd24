"""One optimizer step: gradients of a batch, clipping, the decision whether to take the step, the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lavita.core.precision import autocast
from lavita.core.processes import Processes, sum_over, whole
from lavita.models.diffusion import GaussianDiffusion, Losses
from lavita.models.flow import Objective
from lavita.training.batches import Batch
from lavita.training.config import TrainConfig
from lavita.training.optimizers import set_learning_rate
from lavita.training.stability import Verdict
from lavita.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What happened in an optimizer step."""

    loss: float
    """Mean over the clips of all processes, before the update."""
    grad_norm: float
    """Norm of the whole batch's gradient before it was clipped."""
    learning_rate: float
    verdict: Verdict
    taken: bool
    """Whether the weights were updated."""
    clip_losses: torch.Tensor
    """Losses of this process's clips, float32 (B,), on the device."""


def train_step(state: TrainState, batch: Batch, settings: TrainConfig, team: Processes | None = None) -> StepResult:
    """Trains on a batch: forward and backward passes, clipping, optimizers, moving average.

    A step with an infinite gradient, and with `settings.bad_steps="skip"` a spike, changes neither weights nor
    optimizers nor averages, but counts as a step.

    Args:
        state: changed in place.
        batch: this process's clips, on any device; `settings.accumulation` must divide their number.
        settings: precision, accumulation, clipping, learning rate, and what to do with bad steps.
        team: the processes that share the step and call this together; by default one.
    """
    clip_losses = compute_gradients(state, batch, settings)
    return update(state, clip_losses, settings, team)


def compute_gradients(state: TrainState, batch: Batch, settings: TrainConfig) -> torch.Tensor:
    """Adds the gradient of a batch's mean loss, times the loss scale, to the `grad` of the parameters.

    The micro-batches and the processes add up to the gradient of the whole batch.

    Returns:
        The losses of this process's clips, float32 (B,), without a graph.
    """
    device, count = state.parameters[0].device, len(batch.latents)
    if count % settings.accumulation:
        raise ValueError(f"accumulation is {settings.accumulation}, but must divide the {count} clips of a batch")
    micro = count // settings.accumulation
    clip_losses = []
    for first in range(0, count, micro):
        part = batch.part(first, micro, device)
        noisy = noised(state.diffusion, part)
        options = {name: value for name in ("given", "actions") if (value := getattr(part, name)) is not None}
        with state.parallel.gradients_later(first + micro < count):
            with autocast(device, settings.precision):
                output = state.parallel(
                    noisy, part.timesteps, part.class_labels, part.text_embeds, num_images=part.num_images, **options
                )
            losses = training_losses(state.diffusion, output, part, settings)
            (losses.mean() * (state.scale.value / settings.accumulation)).backward()
        clip_losses.append(losses.detach())
    return torch.cat(clip_losses)


def noised(objective: Objective, batch: Batch) -> torch.Tensor:
    """The latents of a batch with its noise at its timesteps, but without noise in frames that are given."""
    noisy = objective.q_sample(batch.latents, batch.timesteps, batch.noise)
    if batch.given is None:
        return noisy
    return torch.where(batch.given[:, :, None, None, None], batch.latents, noisy)


def losses_of(objective: Objective, output: torch.Tensor, batch: Batch) -> Losses:
    """The losses of the clips of a batch, means over the frames that are not given."""
    if batch.given is None:
        return objective.losses(output, batch.latents, batch.timesteps, batch.noise)
    frames = batch.given.shape[1]
    each = objective.losses(
        output.flatten(0, 1)[:, None],
        batch.latents.flatten(0, 1)[:, None],
        batch.timesteps.repeat_interleave(frames),
        batch.noise.flatten(0, 1)[:, None],
    )
    weights = (~batch.given).float() / (~batch.given).sum(1, keepdim=True)  # (B, F + I)

    def mean(losses: torch.Tensor) -> torch.Tensor:
        return (losses.unflatten(0, (-1, frames)) * weights).sum(1)

    return Losses(mean(each.total), mean(each.mse), mean(each.vlb))


def training_losses(objective: Objective, output: torch.Tensor, batch: Batch, settings: TrainConfig) -> torch.Tensor:
    """The losses that are trained on, float32 (B,): with `settings.loss_weighting`, which validation does not have.

    Args:
        objective: the objective.
        output: the model's output for the clips of the batch.
        batch: the clips, on the device of the output.
        settings: the weighting; the bound that trains a learned variance is not weighted.

    Raises:
        ValueError: for weights that the objective does not have.
    """
    losses = losses_of(objective, output, batch)
    if settings.loss_weighting == "uniform":
        return losses.total
    if not isinstance(objective, GaussianDiffusion):
        raise ValueError(
            f"loss_weighting is min_snr, but has no effect with prediction_type={objective.prediction_type}"
        )
    return objective.min_snr_weights(batch.timesteps, settings.min_snr_gamma) * losses.mse + losses.vlb


def update(
    state: TrainState, clip_losses: torch.Tensor, settings: TrainConfig, team: Processes | None = None
) -> StepResult:
    """Ends a step: clips the gradients that have added up, and takes the step unless it would do harm.

    Args:
        state: with gradients; changed in place.
        clip_losses: losses of this process's clips, (B,).
        settings: as for `train_step`.
        team: as for `train_step`.
    """
    team = team or Processes()
    rate = learning_rate(settings, state.step)
    state.scale.unscale([parameter.grad for parameter in state.parameters if parameter.grad is not None])
    # Reading the norm waits for the device; reading the loss right after it costs no second wait.
    largest = math.inf if settings.clip_grad_norm is None else settings.clip_grad_norm  # inf changes no gradient
    norm = whole(torch.nn.utils.clip_grad_norm_(state.parameters, largest)).item()
    own_loss = clip_losses.mean().item()

    verdict: Verdict = "overflow" if state.scale.overflowed(norm) else state.guard.judge(norm)
    taken = verdict == "good" or (verdict == "spike" and settings.bad_steps == "stop")
    if verdict != "overflow":
        state.guard.skipped = 0 if taken else state.guard.skipped + 1
    set_learning_rate(state.optimizers, rate)
    for optimizer in state.optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad()
    state.step += 1
    if taken:
        state.ema.update(state.step)
    for average in state.power:
        average.update(state.step)  # also after a step that was not taken: time passes for the weights that stay
    loss = sum_over(team, torch.tensor([own_loss], dtype=torch.float64)).item() / team.count
    if taken:
        state.losses.append(loss)
    return StepResult(loss, norm, rate, verdict, taken, clip_losses)


def learning_rate(settings: TrainConfig, step: int) -> float:
    """The rate of a step (from 0): it rises to the set one, stays, and falls towards 0 in the last `decay_steps`.

    A constant rate can be stopped and decayed at any time, so the length of a run need not be known at its start
    (Haegele et al. 2024, Sec. 3).
    """
    rise = (step + 1) / max(1, settings.warmup_steps)
    fall = (settings.steps - step) / (settings.decay_steps + 1)
    return settings.learning_rate * min(1.0, rise, fall)
