"""Sampling: every sampler against closed forms on Gaussian data, whose noise predictor is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file

from lavita.models.autoencoder import AutoencoderKL
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.transformer import LavitaTransformer3DModel, TransformerOutput
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.schedulers import SAMPLERS, make_scheduler, set_timesteps

MakeTransformer = Callable[..., LavitaTransformer3DModel]

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
# Of each class, and of "no label".
MEANS = np.array([-0.5, 0.3, 0.8, 0.1])
STD = 0.6


def exact_noise(noisy: np.ndarray, t: int, mean: np.ndarray) -> np.ndarray:
    """E[noise | z_t] where z_0 is normal with this mean and `STD`."""
    signal = ALPHA_BAR[t]
    return np.sqrt(1 - signal) * (noisy - np.sqrt(signal) * mean) / (signal * STD**2 + 1 - signal)


def some_variance(noisy: np.ndarray, t: int) -> np.ndarray:
    """A v in [-1, 1] that depends on everything."""
    return np.sin(3 * noisy + t)


def class_means(labels: np.ndarray) -> np.ndarray:
    return MEANS[labels].reshape(-1, 1, 1, 1, 1)


@pytest.fixture
def make_gaussian(tiny_vae: AutoencoderKL, make_transformer: MakeTransformer) -> Callable[..., LavitaPipeline]:
    """Builds a pipeline whose transformer knows the exact noise of Gaussian data; `.seen` are its timesteps."""

    def make(sampler: str, learn_sigma: bool = True, prediction_type: str = "epsilon") -> LavitaPipeline:
        transformer = make_transformer(num_classes=3, learn_sigma=learn_sigma, prediction_type=prediction_type)

        def forward(latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> Any:
            assert timesteps.shape == labels.shape == (len(latents),)
            t = int(timesteps[0])
            pipeline.seen.append(t)
            noisy = latents.double().numpy()
            prediction = exact_noise(noisy, t, class_means(labels.numpy()))
            if prediction_type == "v_prediction":
                prediction = (prediction - np.sqrt(1 - ALPHA_BAR[t]) * noisy) / np.sqrt(ALPHA_BAR[t])
            parts = [prediction] + [some_variance(noisy, t)] * learn_sigma
            return TransformerOutput(sample=torch.from_numpy(np.concatenate(parts, axis=2)).float())

        transformer.forward = forward  # type: ignore[method-assign]
        pipeline = LavitaPipeline(transformer, tiny_vae, make_scheduler(sampler, learn_sigma, prediction_type))
        pipeline.seen = []
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_near(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


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
    latents = gaussian(
        class_labels=labels,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=seeded(*seeds),
        output_type="latent",
    ).frames
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
    """Where the probability-flow ODE takes z_999, for Gaussian data: every quantile to itself."""
    signal = ALPHA_BAR[999]
    return mean + STD * (state - np.sqrt(signal) * mean) / np.sqrt(signal * STD**2 + 1 - signal)


@pytest.mark.parametrize(
    ("sampler", "at_25", "at_300"),
    # Bounds on the mean absolute error and the standard deviation's relative one; DDIM is of first order.
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
        latents = gaussian(labels, num_inference_steps=steps, latents=state, output_type="latent").frames
        assert (gaussian.seen[0], len(gaussian.seen)) == (999, steps)
        assert (latents - exact_flow(state, MEANS[1])).abs().mean() < bound
        assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.01)
        assert latents.std().item() == pytest.approx(STD, rel=spread)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_the_stochastic_solver_has_the_datas_distribution(
    spacing: str, make_gaussian: Callable[..., LavitaPipeline]
) -> None:
    """Its noise is new at each step and each video's own, so the start decides less and less of the outcome."""
    gaussian = make_gaussian("sde-dpm++")
    gaussian.use_sampler("sde-dpm++", spacing)
    state = torch.randn(24, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"latents": state, "num_inference_steps": 100, "output_type": "latent"}
    latents = gaussian([1] * 24, generator=seeded(*range(24)), **options).frames
    assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.01)
    assert latents.std().item() == pytest.approx(STD, rel=0.03)
    correlation = np.corrcoef(latents.flatten(), state.flatten())[0, 1]
    assert abs(correlation) < 0.2
    moved = gaussian([1] * 24, generator=seeded(*range(1, 24), 0), **options).frames
    assert (latents - moved).abs().max() > 0.1


def test_ddim_equals_diffusers_own(make_gaussian: Callable[..., LavitaPipeline]) -> None:
    gaussian = make_gaussian("ddim")
    state = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"latents": state, "num_inference_steps": 50, "output_type": "latent"}
    ours = gaussian([0, 2], **options).frames
    gaussian.scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False
    )
    assert_near(ours, gaussian([0, 2], **options).frames, 1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
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
    latents = gaussian([1] * 8, num_inference_steps=steps, generator=seeded(*range(8)), output_type="latent").frames
    assert len(gaussian.seen) == steps
    assert latents.mean().item() == pytest.approx(MEANS[1], abs=0.05)
    # One step of an exact predictor is the mean of the data.
    assert latents.std().item() == pytest.approx(STD, rel=0.06) if steps == 61 else latents.std() < STD


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_share_the_trainings_schedule(sampler: str) -> None:
    scheduler = make_scheduler(sampler)
    trained = GaussianDiffusion().alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), trained, rtol=1e-4, atol=0)
    np.testing.assert_allclose(trained.numpy(), ALPHA_BAR, rtol=1e-12)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="sampler is 'euler'; allowed: unipc, dpm"):
        make_scheduler("euler")


# ---- what a video depends on


@pytest.mark.parametrize("sampler", ["unipc", "sde-dpm++", "ddpm"])
def test_a_seeds_video_does_not_depend_on_its_batch(sampler: str, pipeline: LavitaPipeline) -> None:
    pipeline.scheduler = make_scheduler(sampler)

    def make(labels: list[int], *seeds: int) -> torch.Tensor:
        options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "latent"}
        return pipeline(labels, generator=seeded(*seeds), **options).frames

    together = make([0, 1, 2], 11, 12, 13)
    moved = make([2, 1, 0], 13, 12, 11)
    assert_near(moved.flip(0), together)
    for index, (label, seed) in enumerate(((0, 11), (1, 12), (2, 13))):
        assert_near(make([label], seed), together[index : index + 1])
    assert (make([0], 12) - together[:1]).abs().max() > 0.1, "another seed"
    assert (make([1], 11) - together[:1]).abs().max() > 0.01, "another class"


def test_guidance_is_the_formula(pipeline: LavitaPipeline) -> None:
    pipeline.scheduler = make_scheduler("ddim")
    state = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    pipeline.transformer.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    t = torch.tensor([999, 999])
    with torch.no_grad():
        conditional, unconditional = (
            pipeline.transformer(state, t, torch.tensor(labels)).sample[:, :, :4] for labels in ([0, 2], [3, 3])
        )
    sizes.clear()
    for scale in (1.0, 0.0, 2.0):
        # One step of DDIM is the predicted z_0.
        latents = pipeline(
            ["boxing", "pong"],
            num_inference_steps=1,
            guidance_scale=scale,
            latents=state,
            output_type="latent",
            precision="fp32",
        ).frames
        noise = unconditional + scale * (conditional - unconditional)
        expected = (state - np.sqrt(1 - ALPHA_BAR[999]) * noise) / np.sqrt(ALPHA_BAR[999])
        assert_near(latents, expected, 1e-4)
    assert sizes == [2, 4, 4], "without guidance the network is not asked twice"


def test_classes_by_name_and_by_number(pipeline: LavitaPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    by_name = pipeline(["pong", "boxing"], generator=seeded(1, 2), **options).frames
    by_number = pipeline([2, 0], generator=seeded(1, 2), **options).frames
    assert torch.equal(by_name, by_number)


def test_outputs(pipeline: LavitaPipeline) -> None:
    frames = pipeline([0, 1], num_inference_steps=2, generator=seeded(1, 2)).frames
    assert frames.shape == (2, 2, 16, 16, 3) and frames.dtype == np.uint8
    assert frames.std() > 0
    short = pipeline([0], num_frames=1, num_inference_steps=2, generator=seeded(1)).frames
    assert short.shape == (1, 1, 16, 16, 3)


def test_an_unconditional_model(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    pipeline = LavitaPipeline(make_transformer(), tiny_vae, make_scheduler("unipc"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="latent").frames.shape == (1, 2, 4, 8, 8)
    assert pipeline(num_videos=3, num_inference_steps=2, output_type="latent").frames.shape[0] == 3
    with pytest.raises(ValueError, match="this model is unconditional"):
        pipeline([0])
    with pytest.raises(ValueError, match="guidance_scale other than 1 needs a model with classes or texts"):
        pipeline(guidance_scale=2.0)
    with pytest.raises(ValueError, match="0 videos were asked for"):
        pipeline(num_videos=0)


# --- texts, images, other lengths


@pytest.fixture
def with_texts(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> LavitaPipeline:
    """A model of pooled embeddings of 3 numbers: what counts the letters a, b and c of a text."""
    transformer = make_transformer(text_dim=3, text_encoder="letters")
    pipeline = LavitaPipeline(transformer, tiny_vae, make_scheduler("unipc"))
    pipeline.set_progress_bar_config(disable=True)
    counts = lambda texts: torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])  # noqa: E731
    pipeline._text_encoder = counts  # type: ignore[assignment]
    return pipeline


def test_prompts_and_embeddings_give_the_same_videos(with_texts: LavitaPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    one = with_texts(prompt=["aab", "c"], generator=seeded(0, 1), **options).frames
    embeds, none = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 3)
    other = with_texts(prompt_embeds=embeds, negative_prompt_embeds=none, generator=seeded(0, 1), **options).frames
    assert torch.equal(one, other), "the negative prompt is the empty text"
    led_away = with_texts(prompt=["aab", "c"], negative_prompt="b", generator=seeded(0, 1), **options).frames
    assert (one - led_away).abs().max() > 1e-3
    alone = with_texts(prompt="c", generator=seeded(1), **options).frames
    torch.testing.assert_close(alone[0], one[1], atol=1e-4, rtol=1e-4)
    for wrong, message in (
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": embeds}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": embeds[:, :2]}, r"prompt_embeds have shape \(2, 2\), but must have \(2, 3\)"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, r"negative_prompt_embeds have shape \(1, 3\)"),
        ({"prompt": "a", "num_videos": 2}, "num_videos is 2, but there are 1 class_labels or prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            with_texts(**{"num_inference_steps": 1, "guidance_scale": 2.0, **wrong})


def test_images_from_the_video_model(pipeline: LavitaPipeline) -> None:
    """Without the temporal modules each frame is made on its own, so that one alone is the same."""
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "use_temporal": False}
    noise = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = pipeline([0], latents=noise, **options).frames
    alone = pipeline([0], latents=noise[:, 1:], num_frames=1, **options).frames
    torch.testing.assert_close(both[:, 1:], alone, atol=1e-4, rtol=1e-4)
    moving = pipeline([0], latents=noise, **{**options, "use_temporal": True}).frames
    assert (moving - both).abs().max() > 1e-3


def test_a_longer_clip_is_made_and_said(pipeline: LavitaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipeline([0], num_inference_steps=1, num_frames=2).frames.shape[1] == 2
    assert not caplog.messages
    assert pipeline([0], num_inference_steps=1, num_frames=4).frames.shape[1] == 4
    assert "4 frames were asked for, but the model was trained on 2" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "class_labels is None, but this model needs a list"),
        ({"class_labels": "pong"}, "class_labels is 'pong', but this model needs a list"),
        ({"class_labels": []}, "0 videos were asked for"),
        ({"class_labels": ["chess"]}, "class label is 'chess'; allowed: boxing, enduro, pong"),
        ({"class_labels": [3]}, "class label is 3; allowed"),
        ({"class_labels": [-1]}, "class label is -1; allowed"),
        ({"class_labels": [0], "num_frames": 0}, "num_frames is 0, but must be at least 1"),
        ({"class_labels": [0], "prompt": "a"}, "a prompt was given, but this model has no texts"),
        ({"class_labels": [0], "num_inference_steps": 0}, "num_inference_steps is 0, but must be in 1..1000"),
        ({"class_labels": [0], "num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"class_labels": [0], "num_videos": 2}, "num_videos is 2, but there are 1 class_labels"),
        ({"class_labels": [0], "output_type": "pil"}, "output_type is 'pil'; allowed: uint8, latent"),
        ({"class_labels": [0], "latents": torch.zeros(1, 2, 4, 4, 4)}, r"latents have shape \(1, 2, 4, 4, 4\)"),
        ({"class_labels": [0], "generator": seeded(1, 2)}, "generator has 2 generators, but .* makes 1 videos"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, pipeline: LavitaPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_an_autoencoder_of_other_channels_is_refused(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    with pytest.raises(ValueError, match="transformer has 3 latent channels, but the autoencoder 4"):
        LavitaPipeline(make_transformer(in_channels=3), tiny_vae, make_scheduler("unipc"))


def test_a_scheduler_of_another_prediction_is_refused(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    transformer = make_transformer(prediction_type="v_prediction", learn_sigma=False)
    with pytest.raises(ValueError, match="transformer predicts v_prediction, but the scheduler takes it for epsilon"):
        LavitaPipeline(transformer, tiny_vae, make_scheduler("unipc"))
    pipeline = LavitaPipeline(transformer, tiny_vae, make_scheduler("unipc", False, "v_prediction"))
    for sampler in SAMPLERS:
        pipeline.use_sampler(sampler)
        assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
        assert getattr(pipeline.scheduler.config, "variance_type", None) != "learned_range"


# ---- folders


def test_a_saved_pipeline_makes_the_same_video(tmp_path: Path, pipeline: LavitaPipeline) -> None:
    pipeline.save_pretrained(tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    expected = pipeline([1, 2], generator=seeded(1, 2), **options).frames
    for loaded in (LavitaPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is type(pipeline.scheduler)
        assert np.array_equal(loaded([1, 2], generator=seeded(1, 2), **options).frames, expected)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path, pipeline: LavitaPipeline) -> None:
    with pytest.raises(ValueError, match=r"holds no pipeline \(no model_index.json in it\)"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_pipeline(tmp_path / "missing")
    pipeline.save_pretrained(tmp_path)
    (weights,) = (tmp_path / "transformer").glob("*.safetensors")
    complete = load_file(weights)
    save_file(
        {name: value for name, value in complete.items() if name != "blocks.1.mlp.fc1.weight"},
        weights,
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"weights lack .*blocks\.1\.mlp\.fc1\.weight"):
        load_pipeline(tmp_path)
