"""Schedulers: every sampler against closed forms on Gaussian data, whose noise predictor is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from sampling.sampled import largest_error, sample, seeded

from lavita.core.names import Spacing
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.transformer import TransformerOutput
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.sampling.schedulers import DIFFUSION_SAMPLERS, denoise_step, make_scheduler, set_timesteps

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
# Means of the classes, and of "no label".
MEANS = np.array([-0.5, 0.3, 0.8, 0.1])
STD = 0.6


def exact_noise(noisy: np.ndarray, t: int, mean: np.ndarray) -> np.ndarray:
    """E[noise | z_t] if z_0 is normal with this mean and `STD`."""
    signal = ALPHA_BAR[t]
    return np.sqrt(1 - signal) * (noisy - np.sqrt(signal) * mean) / (signal * STD**2 + 1 - signal)


def some_variance(noisy: np.ndarray, t: int) -> np.ndarray:
    """A v in [-1, 1] that depends on everything."""
    return np.sin(3 * noisy + t)


def class_means(labels: np.ndarray) -> np.ndarray:
    return MEANS[labels].reshape(-1, 1, 1, 1, 1)


@pytest.fixture
def make_gaussian(
    tiny_vae: AutoencoderKL, make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LavitaPipeline]:
    """Builds a pipeline whose transformer knows the exact noise of Gaussian data; `.seen` are its timesteps."""

    def make(sampler: str, learn_sigma: bool = True, prediction_type: str = "epsilon") -> LavitaPipeline:
        transformer = make_transformer(num_classes=3, learn_sigma=learn_sigma, prediction_type=prediction_type)
        seen: list[int] = []

        def forward(latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, **_: Any) -> Any:
            assert timesteps.shape == class_labels.shape == (len(latents),)
            t = int(timesteps[0])
            seen.append(t)
            noisy = latents.double().numpy()
            prediction = exact_noise(noisy, t, class_means(class_labels.numpy()))
            if prediction_type == "v_prediction":
                prediction = (prediction - np.sqrt(1 - ALPHA_BAR[t]) * noisy) / np.sqrt(ALPHA_BAR[t])
            parts = [prediction] + [some_variance(noisy, t)] * learn_sigma
            return TransformerOutput(sample=torch.from_numpy(np.concatenate(parts, axis=2)).float())

        monkeypatch.setattr(transformer, "forward", forward)
        pipeline = make_pipeline(transformer, tiny_vae)
        pipeline.use_sampler(sampler)
        pipeline.seen = seen
        return pipeline

    return make


# ---- DDPM


def dit_timesteps(count: int) -> list[int]:
    """Evenly spaced, ascending, as DiT's respacing picks them."""
    stride, position, taken = 999 / (count - 1), 0.0, []
    for _ in range(count):
        taken.append(round(position))
        position += stride
    return taken


def ancestral(
    state: np.ndarray, noises: list[np.ndarray], labels: np.ndarray, guidance: float, learn_sigma: bool
) -> np.ndarray:
    """Nichol & Dhariwal 2021, Sec. 4: the posterior of a shortened schedule, in float64."""
    taken = dit_timesteps(len(noises))
    signal = ALPHA_BAR[taken]
    previous = np.append(1.0, signal[:-1])
    betas = 1 - signal / previous
    smallest = betas * (1 - previous) / (1 - signal)
    null = np.full_like(labels, 3)
    for i, noise in zip(reversed(range(len(taken))), noises, strict=True):
        t = taken[i]
        unconditional = exact_noise(state, t, class_means(null))
        predicted = unconditional + guidance * (exact_noise(state, t, class_means(labels)) - unconditional)
        start = (state - np.sqrt(1 - signal[i]) * predicted) / np.sqrt(signal[i])
        mean = (betas[i] * np.sqrt(previous[i]) * start + (1 - previous[i]) * np.sqrt(1 - betas[i]) * state) / (
            1 - signal[i]
        )
        if i == 0:
            return mean
        share = (some_variance(state, t) + 1) / 2 if learn_sigma else 0
        variance = betas[i] ** share * smallest[i] ** (1 - share)
        state = mean + np.sqrt(variance) * noise
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("learn_sigma", "guidance", "prediction_type"),
    [(True, 1.0, "epsilon"), (True, 2.0, "epsilon"), (False, 1.0, "epsilon"), (True, 2.0, "v_prediction")],
)
def test_ddpm_equals_the_respaced_posterior(
    learn_sigma: bool, guidance: float, prediction_type: str, make_gaussian: Callable[..., LavitaPipeline]
) -> None:
    gaussian = make_gaussian("ddpm", learn_sigma, prediction_type)
    labels, seeds, steps = [2, 0], (5, 6), 250
    latents = sample(gaussian, labels, num_inference_steps=steps, guidance_scale=guidance, generator=seeded(*seeds))
    assert gaussian.seen == dit_timesteps(steps)[::-1]

    # Each video's generator: first the noise it starts from, then one for every step.
    generators = seeded(*seeds)
    start = torch.cat([torch.randn(1, 2, 4, 8, 8, generator=g) for g in generators])
    noises = [torch.cat([torch.randn(1, 4, 2, 8, 8, generator=g) for g in generators]) for _ in range(steps)]
    expected = ancestral(
        start.double().numpy(),
        [noise.transpose(1, 2).double().numpy() for noise in noises],
        np.array(labels),
        guidance,
        learn_sigma,
    )
    np.testing.assert_allclose(latents.numpy(), expected, atol=1e-3)


# ---- the fast samplers


def exact_flow(state: torch.Tensor, mean: float) -> torch.Tensor:
    """End of the probability-flow ODE from z_999, for Gaussian data: every quantile is mapped to itself."""
    signal = ALPHA_BAR[999]
    return mean + STD * (state - np.sqrt(signal) * mean) / np.sqrt(signal * STD**2 + 1 - signal)


@pytest.mark.parametrize(
    ("sampler", "at_25", "at_300"),
    # Bounds on the mean absolute error and on the standard deviation's relative error; DDIM is of first order.
    [
        ("ddim", (0.05, 0.12), (0.005, 0.015)),
        ("dpm++", (0.02, 0.05), (0.002, 0.01)),
        ("unipc", (0.02, 0.05), (0.002, 0.01)),
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_fast_samplers_converge_to_the_exact_flow(
    sampler: str,
    prediction_type: str,
    at_25: tuple[float, float],
    at_300: tuple[float, float],
    make_gaussian: Callable[..., LavitaPipeline],
) -> None:
    gaussian = make_gaussian(sampler, prediction_type=prediction_type)
    state = torch.randn(24, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for steps, (bound, spread) in ((25, at_25), (300, at_300)):
        gaussian.seen.clear()
        labels = [1] * len(state)
        latents = sample(gaussian, labels, num_inference_steps=steps, latents=state)
        assert (gaussian.seen[0], len(gaussian.seen)) == (999, steps)
        assert (latents - exact_flow(state, MEANS[1])).abs().mean() < bound
        assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.01)
        assert latents.std().item() == pytest.approx(STD, rel=spread)


@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_the_stochastic_solver_has_the_datas_distribution(
    spacing: Spacing, make_gaussian: Callable[..., LavitaPipeline]
) -> None:
    """Each video draws its own noise at each step, so that the result hardly depends on the initial noise."""
    gaussian = make_gaussian("sde-dpm++")
    gaussian.use_sampler("sde-dpm++", spacing)
    state = torch.randn(24, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"latents": state, "num_inference_steps": 100}
    latents = sample(gaussian, [1] * 24, generator=seeded(*range(24)), **options)
    assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.01)
    assert latents.std().item() == pytest.approx(STD, rel=0.03)
    correlation = np.corrcoef(latents.flatten(), state.flatten())[0, 1]
    assert abs(correlation) < 0.2
    moved = sample(gaussian, [1] * 24, generator=seeded(*range(1, 24), 0), **options)
    assert (latents - moved).abs().max() > 0.1


def test_ddim_equals_diffusers_own(make_gaussian: Callable[..., LavitaPipeline]) -> None:
    gaussian = make_gaussian("ddim")
    state = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"latents": state, "num_inference_steps": 50}
    ours = sample(gaussian, [0, 2], **options)
    gaussian.scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False
    )
    assert largest_error(ours, sample(gaussian, [0, 2], **options)) < 1e-3


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_every_number_of_steps_is_taken_exactly(sampler: str) -> None:
    scheduler = make_scheduler(sampler)
    for steps in (*range(1, 130), 223, 250, 499, 500, 999, 1000):
        set_timesteps(scheduler, steps)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == steps
        assert all(a > b for a, b in pairwise(timesteps)), steps
        assert timesteps[-1] >= 0
        assert timesteps[0] == (0 if (sampler, steps) == ("ddpm", 1) else 999)
        if sampler != "ddpm":
            assert len(scheduler.sigmas) == steps + 1 and scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 61])
def test_odd_numbers_of_steps_stay_on_the_data(
    sampler: str, steps: int, make_gaussian: Callable[..., LavitaPipeline]
) -> None:
    gaussian = make_gaussian(sampler)
    latents = sample(gaussian, [1] * 8, num_inference_steps=steps, generator=seeded(*range(8)))
    assert len(gaussian.seen) == steps
    assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.05)
    # One step of an exact predictor is the mean of the data.
    assert latents.std().item() == pytest.approx(STD, rel=0.06) if steps == 61 else latents.std() < STD


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_samplers_share_the_trainings_schedule(sampler: str) -> None:
    scheduler: Any = make_scheduler(sampler)
    trained = GaussianDiffusion().alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), trained, rtol=1e-4, atol=0)
    np.testing.assert_allclose(trained.numpy(), ALPHA_BAR, rtol=1e-12)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="sampler is 'pndm'; allowed: unipc, dpm"):
        make_scheduler("pndm")


# ---- spacing


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 8, 25, 100])
def test_karras_spacing_is_its_formula(sampler: str, steps: int) -> None:
    scheduler = make_scheduler(sampler, spacing="karras")
    set_timesteps(scheduler, steps)
    sigmas = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
    ramp = np.linspace(0, 1, steps)
    expected = (sigmas[-1] ** (1 / 7) + ramp * (sigmas[0] ** (1 / 7) - sigmas[-1] ** (1 / 7))) ** 7
    np.testing.assert_allclose(scheduler.sigmas[:-1], expected, rtol=2e-3)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == steps
    nearest = np.abs(np.log(sigmas)[None] - np.log(expected)[:, None]).argmin(axis=1)
    assert np.abs(scheduler.timesteps.numpy() - nearest).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "sde-dpm++", "unipc"])
def test_quadratic_spacing_is_its_formula(sampler: str) -> None:
    scheduler = make_scheduler(sampler, spacing="quadratic")
    for steps in (*range(1, 130), 250, 499, 500, 999, 1000):
        set_timesteps(scheduler, steps)
        timesteps = scheduler.timesteps.numpy()
        assert len(timesteps) == scheduler.num_inference_steps == steps
        assert timesteps[0] == 999 and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all()
        if steps <= 30:
            squares = 1000 * (np.arange(steps, 0, -1) / steps) ** 2 - 1
            assert np.abs(timesteps - squares).max() < 0.51
        expected = np.sqrt((1 - ALPHA_BAR[timesteps]) / ALPHA_BAR[timesteps])
        np.testing.assert_allclose(scheduler.sigmas, [*expected, 0], rtol=1e-3)


@pytest.mark.parametrize(
    ("spacing", "least", "most"), [("trailing", 0.45, 0.62), ("quadratic", 0.92, 1.1)], ids=["trailing", "quadratic"]
)
@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++", "unipc"])
def test_few_equal_steps_lose_spread_and_quadratic_ones_keep_it(
    sampler: str, spacing: Spacing, least: float, most: float
) -> None:
    """Eight steps of an exact predictor of a narrow Gaussian, whose deviation is 0.3; they should return this."""
    scheduler, std = make_scheduler(sampler, spacing=spacing), 0.3
    set_timesteps(scheduler, 8)
    random = torch.Generator().manual_seed(0)
    state = torch.randn(1, 4, 64, 64, generator=random)
    for timestep in scheduler.timesteps:
        signal, noise = ALPHA_BAR[timestep] ** 0.5, (1 - ALPHA_BAR[timestep]) ** 0.5
        start = signal * std**2 / (signal**2 * std**2 + noise**2) * state
        state = denoise_step(scheduler, (state - signal * start) / noise, timestep, state, random)
    assert least < state.std() / std < most


def test_unknown_spacings_are_refused() -> None:
    with pytest.raises(ValueError, match="spacing is 'leading'; allowed: trailing, quadratic, karras"):
        make_scheduler("unipc", spacing="leading")  # type: ignore[arg-type]
    for spacing in ("quadratic", "karras"):
        with pytest.raises(ValueError, match=f"spacing is {spacing}, but ddpm has its own"):
            make_scheduler("ddpm", spacing=spacing)
