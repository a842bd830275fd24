"""The denoiser: vectors computed ahead of their steps, and guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from sampling.sampled import CLASSES, TEXTS, build_pipeline, largest_error, relative, sample, seeded

from lavita.models.autoencoder import AutoencoderKL
from lavita.models.presets import VARIANTS
from lavita.sampling import denoiser
from lavita.sampling.denoiser import Denoiser, Guidance
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.schedulers import make_scheduler

GUIDED: dict[str, Any] = {"guidance_scale": 1.5}


@pytest.mark.parametrize("condition", ["nothing", "classes", "texts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_computed_ahead_are_those_of_the_forward_pass(
    variant: int, condition: str, make_transformer: MakeTransformer
) -> None:
    fields: dict[str, Any] = {"nothing": {}, "classes": {"num_classes": 3}, "texts": {"text_dim": 5}}[condition]
    model = make_transformer(variant=variant, **fields)
    given: dict[str, Any] = {}
    if condition == "classes":
        given["class_labels"] = torch.tensor([0, 2])
    if condition == "texts":
        given["text_embeds"] = torch.randn(2, 5)
    latents, timesteps = torch.randn(2, 2, 4, 8, 8), torch.tensor([999.0, 500.0, 3.0])
    with torch.no_grad():
        modulation = model.modulate(timesteps, **given)
        assert modulation is not None and len(modulation) == 2 + 1
        for index, timestep in enumerate(timesteps):
            expected = model(latents, timestep.expand(2), **given).sample
            # With them, the timesteps, labels and texts have no effect.
            others = {name: value.flip(0) for name, value in given.items()}
            vectors = [of_all[index] for of_all in modulation]
            found = model(latents, torch.zeros(2), **others, modulation=vectors).sample
            assert relative(found, expected) < 1e-6


def test_all_tokens_have_no_vectors(make_transformer: MakeTransformer) -> None:
    assert make_transformer(conditioning="all_tokens").modulate(torch.tensor([3.0])) is None


def test_how_far_ahead_vectors_are_computed_changes_nothing(
    pipeline: LavitaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    modulate = pipeline.transformer.modulate

    def counted(timesteps: torch.Tensor, *conditions: torch.Tensor | None) -> list[torch.Tensor] | None:
        calls.append(len(timesteps))
        return modulate(timesteps, *conditions)

    monkeypatch.setattr(pipeline.transformer, "modulate", counted)
    expected = sample(pipeline, [0, 1], **GUIDED)
    assert calls == [6], "once for all steps"
    of_a_step = (6 * 2 + 2) * 32 * 4 * 4
    monkeypatch.setattr(denoiser, "MODULATION_BYTES", 2 * of_a_step)
    calls.clear()
    assert relative(sample(pipeline, [0, 1], **GUIDED), expected) < 1e-5
    assert calls == [2, 2, 2]


def test_guidance_is_the_formula(pipeline: LavitaPipeline) -> None:
    pipeline.scheduler = make_scheduler("ddim")
    state = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    signal = float(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).prod())  # of timestep 999
    sizes: list[int] = []
    pipeline.transformer.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    t = torch.tensor([999, 999])
    with torch.no_grad():
        conditional, unconditional = (
            pipeline.transformer(state, t, torch.tensor(labels)).sample[:, :, :4] for labels in ([0, 2], [3, 3])
        )
    sizes.clear()
    for scale in (1.0, 0.0, 2.0):
        # One step of DDIM gives the predicted z_0.
        latents = sample(pipeline, ["boxing", "pong"], num_inference_steps=1, guidance_scale=scale, latents=state)
        noise = unconditional + scale * (conditional - unconditional)
        expected = (state - (1 - signal) ** 0.5 * noise) / signal**0.5
        assert largest_error(latents, expected) < 1e-4
    assert sizes == [2, 4, 4], "without guidance, there is one evaluation per step"


def test_guidance_of_texts_leads_away_from_the_negative_ones(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    """The noise of one step, with prompts and negative prompts whose embeddings are all different."""
    pipeline = build_pipeline(make_transformer, tiny_vae, text_dim=5)
    pipeline.scheduler = make_scheduler("ddim")
    (random,) = seeded(0)
    state, prompts, negatives = (torch.randn(2, *size, generator=random) for size in ((2, 4, 8, 8), (5,), (5,)))
    signal = float(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).prod())  # of timestep 999
    t = torch.tensor([999, 999])
    with torch.no_grad():
        conditional, unconditional = (
            pipeline.transformer(state, t, text_embeds=texts).sample[:, :, :4] for texts in (prompts, negatives)
        )
    assert relative(conditional, unconditional) > 0.1
    for scale in (0.0, 2.0, 7.5):
        latents = pipeline(
            prompt_embeds=prompts,
            negative_prompt_embeds=negatives,
            num_inference_steps=1,
            guidance_scale=scale,
            latents=state,
            precision="fp32",
            output_type="latent",
        ).frames
        noise = unconditional + scale * (conditional - unconditional)
        expected = (state - (1 - signal) ** 0.5 * noise) / signal**0.5
        assert largest_error(torch.as_tensor(latents), expected) < 1e-4


@pytest.mark.parametrize("fields", [CLASSES, TEXTS], ids=["classes", "texts"])
def test_the_variance_of_a_guided_step_is_that_of_the_condition(
    fields: dict[str, int], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(**fields)
    latents, timesteps = torch.randn(2, 2, 4, 8, 8, generator=seeded(0)[0]), torch.tensor([700.0])
    if "num_classes" in fields:
        name, given, without = "class_labels", torch.tensor([0, 2]), torch.tensor([3, 3])
    else:
        name, given, without = "text_embeds", torch.randn(2, 5, generator=seeded(1)[0]), torch.zeros(2, 5)
    both: dict[str, Any] = {"class_labels": None, "text_embeds": None, name: torch.cat([given, without])}
    with torch.no_grad():
        _, variance = Denoiser(model, timesteps, **both, guidance=Guidance(3.0), precision="fp32")(0, latents)
        expected, other = (
            model(latents, timesteps.expand(2), **{name: condition}).sample[:, :, 4:] for condition in (given, without)
        )
    assert relative(expected, other) > 0.01, "the variance depends on the condition"
    assert largest_error(variance, expected) < 1e-5


def test_guidance_in_an_interval_is_none_elsewhere(pipeline: LavitaPipeline) -> None:
    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    everywhere = sample(pipeline, [0, 1], **GUIDED, guidance_interval=(0, 1000))
    assert torch.equal(everywhere, sample(pipeline, [0, 1], **GUIDED))
    timesteps = pipeline.scheduler.timesteps.tolist()
    sizes.clear()
    middle = sample(pipeline, [0, 1], **GUIDED, guidance_interval=(timesteps[3], timesteps[1]))
    assert sizes == [2, 4, 4, 4, 2, 2], "the bounds are part of the interval"
    nowhere = sample(pipeline, [0, 1])
    assert relative(middle, everywhere) > 1e-3 and relative(middle, nowhere) > 1e-3
    outside = sample(pipeline, [0, 1], **GUIDED, guidance_interval=(1, timesteps[-1] - 1))
    assert relative(outside, nowhere) < 1e-6
    alone = sample(pipeline, [1], [1], **GUIDED, guidance_interval=(timesteps[3], timesteps[1]))
    assert relative(alone, middle[1:]) < 1e-5


@pytest.mark.parametrize("interval", [(500, 500), (600, 500), (-1, 500), (0, 1001), (float("nan"), 500)])
def test_intervals_that_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"guidance_interval is .* must be two timesteps in 0\.\.1000, rising"):
        Guidance(1.5, interval)


def test_an_interval_without_guidance_is_refused(pipeline: LavitaPipeline) -> None:
    with pytest.raises(ValueError, match="guidance_interval has no effect with a guidance_scale of 1"):
        sample(pipeline, [0], guidance_scale=1.0, guidance_interval=(100, 900))
