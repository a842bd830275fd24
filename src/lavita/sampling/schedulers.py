"""Schedulers for sampling, from diffusers, and the type of the part of them that sampling uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from lavita.core.names import SamplerName, Spacing
from lavita.models.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS
from lavita.models.flow import FLOW, shift_time

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
FLOW_SAMPLERS: tuple[SamplerName, ...] = ("unipc", "dpm++", "sde-dpm++", "euler", "heun")
DIFFUSION_SAMPLERS: tuple[SamplerName, ...] = ("unipc", "dpm++", "sde-dpm++", "ddim", "ddpm")
FLOW_PREDICTION = "flow_prediction"
"""Diffusers' name of what a flow predicts."""
# Pure noise has no signal at all, whose logarithm the multistep solvers need.
MOST_NOISE = 1 - 1e-6
_QUADRATIC = "has_quadratic_spacing"
SCHEDULER_CLASSES = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
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

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str) -> None:
        """Prepares a loop."""

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **options: Any
    ) -> SchedulerOutput:
        """Removes the noise between a timestep and the next one."""


def make_scheduler(
    sampler: str,
    learn_sigma: bool = True,
    prediction_type: str = "epsilon",
    spacing: Spacing = "trailing",
    flow_shift: float | None = None,
) -> Scheduler:
    """Makes a scheduler with the noise schedule of training.

    A diffusion model takes `DIFFUSION_SAMPLERS`, a flow `FLOW_SAMPLERS`.

    Args:
        sampler: `ddpm` is the paper's (250 steps, with the model's learned variance if it has one). `ddim` (eta 0),
            `dpm++` and `unipc` take 8 to 50 steps and use only the predicted noise. `sde-dpm++` draws noise at each
            step, as DDPM does. DDIM is made as DPM-Solver++ of order 1, which it equals (Lu et al. 2022b, Sec. 4):
            diffusers' `DDIMScheduler` assumes a wrong noise level if the number of steps does not divide 1000. `euler`
            and `heun` integrate the velocity of a flow; `heun` evaluates the model twice in each step but the last.
        learn_sigma: whether the model predicts a variance.
        prediction_type: what the model predicts: `epsilon`, `v_prediction` or `flow`.
        spacing: positions of the steps: `trailing` has equal steps of time down from the last timestep; `quadratic` has
            times proportional to the square of the remaining steps (Song et al. 2021, App. D.2), so that steps get
            smaller towards the data: with few equal steps, the last one is so large that it averages over detail
            (docs/speed.md); `karras` has equal steps of sigma^(1/7) (Karras et al. 2022, Eq. 5). `ddpm` has a spacing
            of its own, and a flow no `karras`.
        flow_shift: shift of a flow's timesteps, see `flow.shift_time`; None is 1.

    Raises:
        ValueError: for an unknown name, a sampler that does not fit the prediction type, or a spacing that does not fit
            the sampler or the prediction type.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(SAMPLERS)}")
    fitting = FLOW_SAMPLERS if prediction_type == FLOW else DIFFUSION_SAMPLERS
    if sampler not in fitting:
        raise ValueError(
            f"sampler is {sampler}, which does not fit a model with prediction_type {prediction_type}; allowed: "
            f"{', '.join(fitting)}"
        )
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing is {spacing!r}; allowed: {', '.join(get_args(Spacing))}")
    if sampler == "ddpm" and spacing != "trailing":
        raise ValueError(f"spacing is {spacing}, but ddpm has its own")
    scheduler = _make(sampler, learn_sigma, prediction_type, spacing, flow_shift)
    setattr(scheduler, _QUADRATIC, spacing == "quadratic")
    return scheduler


def _make(
    sampler: str, learn_sigma: bool, prediction_type: str, spacing: Spacing, flow_shift: float | None
) -> Scheduler:
    if prediction_type == FLOW:
        return _make_flow_scheduler(sampler, spacing, 1.0 if flow_shift is None else flow_shift)
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
    return _multistep(sampler, solver)


def _multistep(sampler: str, options: dict[str, Any]) -> Scheduler:
    if sampler == "unipc":
        return UniPCMultistepScheduler(**options)
    return DPMSolverMultistepScheduler(
        **options,
        algorithm_type="sde-dpmsolver++" if sampler == "sde-dpm++" else "dpmsolver++",
        solver_order=1 if sampler == "ddim" else 2,
    )


def _make_flow_scheduler(sampler: str, spacing: Spacing, shift: float) -> Scheduler:
    if spacing == "karras":
        raise ValueError(f"spacing is {spacing}, but a flow has steps of time; allowed: trailing, quadratic")
    if sampler in ("euler", "heun"):
        kind = FlowMatchEulerDiscreteScheduler if sampler == "euler" else FlowMatchHeunDiscreteScheduler
        return kind(num_train_timesteps=NUM_TIMESTEPS, shift=shift)
    solver: dict[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "prediction_type": FLOW_PREDICTION,
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "final_sigmas_type": "zero",
    }
    return _multistep(sampler, solver)


def prediction_of(scheduler: Scheduler) -> str:
    """What a scheduler expects the model to predict, by the names of `make_scheduler`."""
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)):
        return FLOW
    prediction = str(scheduler.config["prediction_type"])
    return FLOW if prediction == FLOW_PREDICTION else prediction


def set_timesteps(scheduler: Scheduler, num_steps: int, device: torch.device | str = "cpu") -> None:
    """Prepares a loop of exactly `num_steps` steps.

    For some numbers (61, 103, 121 ...) rounding gives diffusers' trailing spacing one step more, to timestep -1. For
    flows, diffusers has other steps in each scheduler, some of them from timesteps that are cut to integers: here all
    take equal steps of time, shifted, and the model is told the exact time.
    """
    scheduler.set_timesteps(num_steps, device=device)
    if prediction_of(scheduler) == FLOW:
        _set_flow_timesteps(scheduler, num_steps, device)
        return
    if getattr(scheduler, _QUADRATIC, False):
        _set_quadratic_timesteps(scheduler, num_steps, device)
        return
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.num_inference_steps = num_steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def _set_quadratic_timesteps(scheduler: Any, num_steps: int, device: torch.device | str) -> None:
    left = torch.arange(num_steps, 0, -1)  # steps that are left
    # Where the squares are closer than the timesteps, neighbouring timesteps are taken.
    timesteps = (NUM_TIMESTEPS * (left / num_steps).square()).round().long().maximum(left) - 1
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    scheduler.timesteps = timesteps.to(device)
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(scheduler.sigmas)
    scheduler.num_inference_steps = num_steps


def _set_flow_timesteps(scheduler: Any, num_steps: int, device: torch.device | str) -> None:
    is_multistep = "flow_shift" in scheduler.config
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if getattr(scheduler, _QUADRATIC, False):
        times = times.square()
    sigmas = shift_time(times, scheduler.config["flow_shift" if is_multistep else "shift"]).float()
    if is_multistep:
        sigmas[0] = MOST_NOISE
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        # Each step ends with an evaluation at the time at which the next one begins, except for the last step.
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas, scheduler.timesteps = sigmas, (NUM_TIMESTEPS * sigmas[:-1]).to(device)
    scheduler.set_begin_index(0)  # the steps are counted instead of looked up by their timesteps


def initial_scale(scheduler: Any) -> float:
    """Standard deviation of the noise that a loop starts from; diffusers' schedulers for flows do not say: 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def model_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Scales a sample for the model, if the scheduler does so; diffusers' schedulers for flows do not."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


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
