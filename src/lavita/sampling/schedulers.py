"""Noise schedulers for sampling, from diffusers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from lavita.core.names import SamplerName, Spacing
from lavita.models.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


def make_scheduler(
    sampler: str, learn_sigma: bool = True, prediction_type: str = "epsilon", spacing: Spacing = "trailing"
) -> SchedulerMixin:
    """A scheduler of the training's noise schedule.

    Args:
        sampler: `ddpm` is the paper's (250 steps; with the model's learned variance where it has one); `ddim`
            (eta 0), `dpm++` and `unipc` take 8 to 50 steps and use the predicted noise only; `sde-dpm++` draws noise at
            each step, as ddpm does. DDIM is DPM-Solver++ of
            order 1 (Lu et al. 2022b, Sec. 4), and made so: `DDIMScheduler` assumes a wrong noise level after each
            step where the number of steps does not divide 1000.
        learn_sigma: whether the model predicts a variance.
        prediction_type: what else it predicts: `epsilon` or `v_prediction`.
        spacing: where the steps lie: `trailing` are equal steps of time down from the last; `karras` are equal steps of
            sigma^(1/7) (Karras et al. 2022, Eq. 5), nearer to the exact solution from about 20 steps on. ddpm has its
            own.

    Raises:
        ValueError: for another name, or a spacing for ddpm.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing is {spacing!r}; allowed: {', '.join(get_args(Spacing))}")
    if sampler == "ddpm" and spacing != "trailing":
        raise ValueError(f"spacing is {spacing}, but ddpm has its own")
    schedule: dict[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "linear",
        "prediction_type": prediction_type,
    }
    if sampler == "ddpm":
        variance = "learned_range" if learn_sigma else "fixed_small"
        return DDPMScheduler(**schedule, variance_type=variance, timestep_spacing="linspace", clip_sample=False)
    if sampler in ("ddim", "dpm++", "sde-dpm++"):
        return DPMSolverMultistepScheduler(
            **schedule,
            algorithm_type="sde-dpmsolver++" if sampler == "sde-dpm++" else "dpmsolver++",
            solver_order=1 if sampler == "ddim" else 2,
            timestep_spacing="trailing",
            use_karras_sigmas=spacing == "karras",
            final_sigmas_type="zero",
        )
    if sampler == "unipc":
        return UniPCMultistepScheduler(
            **schedule,
            timestep_spacing="trailing",
            use_karras_sigmas=spacing == "karras",
            final_sigmas_type="zero",
        )
    raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(SAMPLERS)}")


def set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device | str = "cpu") -> None:
    """Makes a scheduler take exactly `num_steps` steps.

    For some numbers (61, 103, 121 ...) floating point gives diffusers' trailing spacing one more, to timestep -1.
    """
    scheduler.set_timesteps(num_steps, device=device)
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.num_inference_steps = num_steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
