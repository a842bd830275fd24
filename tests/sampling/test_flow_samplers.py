"""Samplers of flows: transport by an exact velocity field, and what fits which model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from sampling.sampled import CLASSES, build_pipeline, relative, sample, seeded

from lavita.core.names import CacheName, Spacing
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.transformer import TransformerOutput
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.sampling.recipes import RECIPES
from lavita.sampling.schedulers import (
    DIFFUSION_SAMPLERS,
    FLOW_SAMPLERS,
    SAMPLERS,
    make_scheduler,
    prediction_of,
    set_timesteps,
)

# Per class, and for "no label" in the last row, the mean of each of the 4 latent channels; and their deviations.
MEANS = np.array([[-0.5, 0.2, 1.0, 0.0], [0.3, -1.0, 0.5, 2.0], [0.8, 0.8, -0.8, 0.1], [0.1, 0.0, 0.2, 0.3]])
STDS = np.array([0.6, 1.0, 0.3, 1.7])
FLOW: dict[str, Any] = {"prediction_type": "flow", "learn_sigma": False}
DETERMINISTIC = tuple(sampler for sampler in FLOW_SAMPLERS if sampler != "sde-dpm++")


def channels(values: np.ndarray) -> np.ndarray:
    """(..., C) to (..., 1, C, 1, 1)."""
    return values[..., None, :, None, None]


def exact_velocity(noisy: np.ndarray, time: float, mean: np.ndarray) -> np.ndarray:
    """E[noise - z_0 | z_t] if z_0 is normal with these means and `STDS`."""
    variance = channels(STDS) ** 2
    slope = (time - (1 - time) * variance) / ((1 - time) ** 2 * variance + time**2)
    return np.asarray(-mean + slope * (noisy - (1 - time) * mean))


@pytest.fixture
def make_gaussian(
    tiny_vae: AutoencoderKL, make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LavitaPipeline]:
    """Builds a pipeline whose transformer knows the exact velocity of Gaussian data; `.seen` are its timesteps."""

    def make(sampler: str, shift: float | None = None) -> LavitaPipeline:
        transformer = make_transformer(num_classes=3, flow_shift=shift, **FLOW)
        seen: list[float] = []

        def forward(latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, **_: Any) -> Any:
            assert len(timesteps) == len(class_labels) == len(latents) and timesteps.is_floating_point()
            seen.append(float(timesteps[0]))
            mean = channels(MEANS[class_labels.numpy()])
            velocity = exact_velocity(latents.double().numpy(), seen[-1] / 1000, mean)
            return TransformerOutput(sample=torch.from_numpy(velocity).float())

        monkeypatch.setattr(transformer, "forward", forward)
        pipeline = make_pipeline(transformer, tiny_vae)
        pipeline.use_sampler(sampler)
        pipeline.seen = seen
        return pipeline

    return make


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def transported(state: torch.Tensor, mean: np.ndarray) -> torch.Tensor:
    """End of the flow from pure noise, for Gaussian data: every quantile is mapped to itself."""
    return torch.from_numpy(channels(mean) + channels(STDS) * state.double().numpy()).float()


@pytest.mark.parametrize(
    ("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("shift", [None, 3.0])
def test_transport_converges_to_the_exact_map(
    sampler: str, order: int, shift: float | None, make_gaussian: Callable[..., LavitaPipeline]
) -> None:
    gaussian, state, errors = make_gaussian(sampler, shift), noise(4), []
    for steps in (80, 320):
        gaussian.seen.clear()
        latents = sample(gaussian, [1] * 4, num_inference_steps=steps, latents=state)
        assert len(gaussian.seen) == (2 * steps - 1 if sampler == "heun" else steps)
        errors.append(float((latents - transported(state, MEANS[1])).abs().mean()))
    assert errors[0] < (0.05 if order == 1 else 0.02)
    # A quarter of the step divides the error by 4 to the order, in the limit; rounding dominates errors of about 1e-5.
    coarse, fine = errors
    assert coarse / fine > 4 ** (order - 0.6) or fine < 5e-5


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_samples_have_the_datas_mean_and_spread(sampler: str, make_gaussian: Callable[..., LavitaPipeline]) -> None:
    """At the steps that recipes take, from a perfect model."""
    gaussian = make_gaussian(sampler)
    labels, steps = [2] * 32, 25 if sampler != "sde-dpm++" else 100
    latents = sample(gaussian, labels, num_inference_steps=steps, generator=seeded(*range(32)))
    np.testing.assert_allclose(latents.mean((0, 1, 3, 4)), MEANS[2], atol=0.05 * STDS.max())
    bound = 0.15 if sampler == "euler" else 0.05
    np.testing.assert_allclose(latents.std((0, 1, 3, 4)), STDS, rtol=bound)


def test_guidance_is_the_straight_line_between_the_two_velocities(
    make_gaussian: Callable[..., LavitaPipeline],
) -> None:
    """Guided Gaussians of equal spread are a Gaussian around the guided mean, also in Heun's and UniPC's steps."""
    state = noise(2)
    guided = MEANS[3] + 2.5 * (MEANS[0] - MEANS[3])
    for sampler in ("heun", "unipc"):
        gaussian = make_gaussian(sampler)
        options: dict[str, Any] = {"num_inference_steps": 100, "latents": state, "guidance_scale": 2.5}
        latents = sample(gaussian, [0, 0], **options)
        assert relative(latents, transported(state, guided)) < 2e-3
        assert torch.equal(sample(gaussian, [0, 0], **options, guidance_interval=(0, 1000)), latents)
        late = sample(gaussian, [0, 0], **options, guidance_interval=(0, 300))
        assert relative(late, transported(state, guided)) > 0.1 and relative(late, transported(state, MEANS[0])) > 0.01


@pytest.mark.parametrize("spacing", ["trailing", "quadratic"])
@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_steps_are_equal_or_quadratic_times_shifted(sampler: str, shift: float, spacing: Spacing) -> None:
    scheduler = make_scheduler(sampler, False, "flow", spacing, flow_shift=shift)
    for steps in (1, 2, 3, 25, 61, 999, 1000):
        set_timesteps(scheduler, steps)
        times = np.linspace(1, 0, steps + 1) ** (2 if spacing == "quadratic" else 1)
        expected = shift * times / (1 + (shift - 1) * times)
        if sampler == "heun":
            expected = np.array([expected[0], *np.repeat(expected[1:-1], 2), expected[-1]])
        np.testing.assert_allclose(scheduler.sigmas, expected, atol=2e-6)
        np.testing.assert_allclose(scheduler.timesteps, 1000 * expected[:-1], atol=2e-3)
        assert scheduler.num_inference_steps == steps and prediction_of(scheduler) == "flow"


def test_a_sampler_that_does_not_fit_is_refused(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    assert {*FLOW_SAMPLERS, *DIFFUSION_SAMPLERS} == {*SAMPLERS}
    flow = make_pipeline(make_transformer(**FLOW), tiny_vae)
    diffusion = make_pipeline(make_transformer(), tiny_vae)
    for sampler in SAMPLERS:
        for pipeline, fitting in ((flow, FLOW_SAMPLERS), (diffusion, DIFFUSION_SAMPLERS)):
            if sampler in fitting:
                pipeline.use_sampler(sampler)
                continue
            kind = pipeline.transformer.config["prediction_type"]
            message = f"sampler is {sampler}, which does not fit a model with prediction_type {kind}; allowed: unipc, "
            with pytest.raises(ValueError) as caught:
                pipeline.use_sampler(sampler)
            assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match="spacing is karras, but a flow has steps of time; allowed: trailing, quad"):
        flow.use_sampler("unipc", "karras")
    with pytest.raises(ValueError, match="the transformer predicts flow, but the scheduler expects epsilon"):
        LavitaPipeline(flow.transformer, tiny_vae, make_scheduler("unipc"))
    for sampler in ("euler", "unipc"):
        with pytest.raises(ValueError, match="the transformer predicts epsilon, but the scheduler expects flow"):
            LavitaPipeline(diffusion.transformer, tiny_vae, make_scheduler(sampler, False, "flow"))
    with pytest.raises(ValueError, match="sampler is ddpm, which does not fit a model with prediction_type flow"):
        RECIPES["paper"].prepare(flow)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_saved_flow_makes_the_same_video(
    sampler: str, tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    pipeline = make_pipeline(make_transformer(num_classes=3, flow_shift=2.0, **FLOW), tiny_vae)
    assert prediction_of(pipeline.scheduler) == "flow" and pipeline.scheduler.config["flow_shift"] == 2.0
    pipeline.use_sampler(sampler)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0}
    expected = sample(pipeline, [1, 2], **options)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert torch.equal(sample(loaded, [1, 2], **options), expected)
    # A video depends on its own seed only, not on its batch or on the loop before it.
    alone = sample(loaded, [2], seeds=[1], **options)
    torch.testing.assert_close(alone[0], expected[1], rtol=1e-4, atol=1e-4)
    loaded.use_sampler(sampler)
    assert torch.equal(sample(loaded, [1, 2], **options), expected)


@pytest.mark.parametrize("cache", get_args(CacheName))
@pytest.mark.parametrize("sampler", ["unipc", "heun"])
def test_step_caches_stay_near_the_exact_video(
    sampler: str, cache: CacheName, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    pipeline = build_pipeline(make_transformer, tiny_vae, scale=0.3, **CLASSES, **FLOW)
    pipeline.use_sampler(sampler)
    options: dict[str, Any] = {"num_inference_steps": 24, "guidance_scale": 1.5}
    exact = sample(pipeline, [0, 2], **options)
    cached = sample(pipeline, [0, 2], **options, cache=cache)
    assert 0 < relative(cached, exact) < 0.25
    assert torch.equal(sample(pipeline, [0, 2], **options), exact), "the cache is gone"
