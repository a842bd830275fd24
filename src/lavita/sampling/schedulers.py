"""Schedulers for sampling, from diffusers, and the type of the part of them that sampling uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from lavita.core.names import SamplerName, Spacing
from lavita.models.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SCHEDULER_CLASSES = ("DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Names of the classes that `make_scheduler` makes."""


class SchedulerOutput(Protocol):
    """Output of a scheduler's step."""

    prev_sample: torch.Tensor
    """The sample at the next, less noisy timestep."""


@runtime_checkable  # diffusers compares a pipeline's components with the types of its constructor
class Scheduler(Protocol):
    """The part of diffusers' schedulers that sampling uses."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor
    """Timesteps of the loop, falling, (S,)."""
    sigmas: torch.Tensor
    """Noise levels of the loop, (S + 1,); DDPM has none."""
    num_inference_steps: int
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str) -> None:
        """Prepares a loop."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Scales a sample for the model."""

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **options: Any
    ) -> SchedulerOutput:
        """Removes the noise between a timestep and the next one."""


def make_scheduler(
    sampler: str, learn_sigma: bool = True, prediction_type: str = "epsilon", spacing: Spacing = "trailing"
) -> Scheduler:
    """Makes a scheduler with the noise schedule of training.

    Args:
        sampler: `ddpm` is the paper's (250 steps, with the model's learned variance if it has one). `ddim` (eta 0),
            `dpm++` and `unipc` take 8 to 50 steps and use only the predicted noise. `sde-dpm++` draws noise at each
            step, as DDPM does. DDIM is made as DPM-Solver++ of order 1, which it equals (Lu et al. 2022b, Sec. 4):
            diffusers' `DDIMScheduler` assumes a wrong noise level if the number of steps does not divide 1000.
        learn_sigma: whether the model predicts a variance.
        prediction_type: what the model predicts: `epsilon` or `v_prediction`.
        spacing: positions of the steps: `trailing` has equal steps of time down from the last timestep; `karras` has
            equal steps of sigma^(1/7) (Karras et al. 2022, Eq. 5), which is closer to the exact solution from about 20
            steps on. `ddpm` has a spacing of its own.

    Raises:
        ValueError: for an unknown name, or another spacing with ddpm.
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
    solver: dict[str, Any] = {
        **schedule,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": spacing == "karras",
        "final_sigmas_type": "zero",
    }
    if sampler == "ddpm":
        variance = "learned_range" if learn_sigma else "fixed_small"
        return DDPMScheduler(**schedule, variance_type=variance, timestep_spacing="linspace", clip_sample=False)
    if sampler in ("ddim", "dpm++", "sde-dpm++"):
        return DPMSolverMultistepScheduler(
            **solver,
            algorithm_type="sde-dpmsolver++" if sampler == "sde-dpm++" else "dpmsolver++",
            solver_order=1 if sampler == "ddim" else 2,
        )
    if sampler == "unipc":
        return UniPCMultistepScheduler(**solver)
    raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(SAMPLERS)}")


def set_timesteps(scheduler: Scheduler, num_steps: int, device: torch.device | str = "cpu") -> None:
    """Prepares a loop of exactly `num_steps` steps.

    For some numbers (61, 103, 121 ...) rounding gives diffusers' trailing spacing one step more, to timestep -1.
    """
    scheduler.set_timesteps(num_steps, device=device)
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.num_inference_steps = num_steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def uses_learned_variance(scheduler: Scheduler) -> bool:
    """Whether a step takes the model's prediction and its variance, one after the other along the channels."""
    return scheduler.config.get("variance_type") == "learned_range"


def denoise_step(
    scheduler: Scheduler,
    prediction: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """Takes one step of a loop.

    Schedulers separate noise from variance along the second axis, so samples are `(B, C, F, h, w)` here.

    Args:
        scheduler: after `set_timesteps`.
        prediction: output of the model, (B, C, F, h, w), or (B, 2 C, F, h, w) with `uses_learned_variance`.
        timestep: timestep of the step.
        sample: the noisy sample, (B, C, F, h, w).
        generator: source of the noise of schedulers that draw some.

    Returns:
        The less noisy sample, (B, C, F, h, w).
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    return scheduler.step(prediction, timestep, sample, **options).prev_sample
