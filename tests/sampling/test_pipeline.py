"""The pipeline: what a video depends on, conditions, lengths, refusals and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sampling.sampled import largest_error, sample, seeded

from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.sampling.schedulers import DIFFUSION_SAMPLERS, make_scheduler, uses_learned_variance

# ---- what a video depends on


@pytest.mark.parametrize("sampler", ["unipc", "sde-dpm++", "ddpm"])
def test_a_seeds_video_does_not_depend_on_its_batch(sampler: str, pipeline: LavitaPipeline) -> None:
    pipeline.scheduler = make_scheduler(sampler)

    def make(labels: list[int], *seeds: int) -> torch.Tensor:
        return sample(pipeline, labels, num_inference_steps=4, guidance_scale=1.5, generator=seeded(*seeds))

    together = make([0, 1, 2], 11, 12, 13)
    moved = make([2, 1, 0], 13, 12, 11)
    assert largest_error(moved.flip(0), together) < 1e-4
    for index, (label, seed) in enumerate(((0, 11), (1, 12), (2, 13))):
        assert largest_error(make([label], seed), together[index : index + 1]) < 1e-4
    assert (make([0], 12) - together[:1]).abs().max() > 0.1, "another seed"
    assert (make([1], 11) - together[:1]).abs().max() > 0.01, "another class"


def test_classes_by_name_and_by_number(pipeline: LavitaPipeline) -> None:
    assert torch.equal(sample(pipeline, ["pong", "boxing"]), sample(pipeline, [2, 0]))


def test_names_of_classes_in_any_unicode_form(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    pipeline = make_pipeline(make_transformer(num_classes=2, class_names=["a", "cafe\u0301"]), tiny_vae)
    for name in ("cafe\u0301", "caf\xe9"):
        assert torch.equal(sample(pipeline, [name]), sample(pipeline, [1]))


def test_outputs(pipeline: LavitaPipeline) -> None:
    frames = pipeline([0, 1], num_inference_steps=2, generator=seeded(1, 2)).frames
    assert frames.shape == (2, 2, 16, 16, 3) and frames.dtype == np.uint8
    assert frames.std() > 0
    short = pipeline([0], num_frames=1, num_inference_steps=2, generator=seeded(1)).frames
    assert short.shape == (1, 1, 16, 16, 3)


def test_an_unconditional_model(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    pipeline = make_pipeline(make_transformer(), tiny_vae)
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
    """A model of texts, whose pooled embeddings are the numbers of the letters a, b and c."""
    transformer = make_transformer(text_dim=3, text_encoder="letters")
    pipeline = make_pipeline(transformer, tiny_vae)
    counts: Any = lambda texts: torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])  # noqa: E731
    pipeline._text_encoder = counts
    return pipeline


def test_prompts_and_embeddings_give_the_same_videos(with_texts: LavitaPipeline) -> None:
    def make(**options: Any) -> torch.Tensor:
        given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "precision": "fp32", **options}
        frames = with_texts(**given, output_type="latent").frames
        assert isinstance(frames, torch.Tensor)
        return frames

    one = make(prompt=["aab", "c"], generator=seeded(0, 1))
    embeds, none = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 3)
    other = make(prompt_embeds=embeds, negative_prompt_embeds=none, generator=seeded(0, 1))
    assert torch.equal(one, other), "the negative prompt is the empty text"
    steered = make(prompt=["aab", "c"], negative_prompt="b", generator=seeded(0, 1))
    assert (one - steered).abs().max() > 1e-3
    alone = make(prompt="c", generator=seeded(1))
    torch.testing.assert_close(alone[0], one[1], atol=1e-4, rtol=1e-4)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": embeds}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": embeds[:, :2]}, r"prompt_embeds have shape \(2, 2\), but must have \(2, 3\)"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, r"negative_prompt_embeds have shape \(1, 3\)"),
        ({"prompt": "a", "num_videos": 2}, "num_videos is 2, but there are 1 class_labels or prompts"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            make(**wrong)


def test_guidance_leads_from_the_negative_prompt_to_the_prompt(with_texts: LavitaPipeline) -> None:
    with_texts.scheduler = make_scheduler("ddim")
    state = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    signal = float(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).prod())  # of timestep 999
    with torch.no_grad():
        wanted, unwanted = (
            with_texts.transformer(state, torch.tensor([999]), text_embeds=torch.tensor([embed])).sample[:, :, :4]
            for embed in ([2.0, 1.0, 0.0], [0.0, 0.0, 3.0])
        )
    noise = unwanted + 2.0 * (wanted - unwanted)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 2.0, "precision": "fp32", "latents": state}
    latents = with_texts(prompt="aab", negative_prompt="ccc", output_type="latent", **options).frames
    assert isinstance(latents, torch.Tensor)
    # One step of DDIM gives the predicted z_0.
    assert largest_error(latents, (state - (1 - signal) ** 0.5 * noise) / signal**0.5) < 1e-4


def test_images_from_the_video_model(pipeline: LavitaPipeline) -> None:
    """Without the temporal modules, a frame does not depend on the others."""
    options: dict[str, Any] = {"num_inference_steps": 2, "use_temporal": False}
    noise = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = sample(pipeline, [0], latents=noise, **options)
    alone = sample(pipeline, [0], latents=noise[:, 1:], num_frames=1, **options)
    torch.testing.assert_close(both[:, 1:], alone, atol=1e-4, rtol=1e-4)
    moving = sample(pipeline, [0], latents=noise, **{**options, "use_temporal": True})
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
        ({"class_labels": [0], "num_frames": 0}, "num_frames is 0, but must be in 1..65536"),
        ({"class_labels": [0], "num_frames": 2**63}, "num_frames is 9223372036854775808, but must be in 1..65536"),
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
    with pytest.raises(ValueError, match="the transformer has 3 latent channels, but the autoencoder has 4"):
        LavitaPipeline(make_transformer(in_channels=3), tiny_vae, make_scheduler("unipc"))


def test_a_scheduler_of_another_prediction_is_refused(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    transformer = make_transformer(prediction_type="v_prediction", learn_sigma=False)
    with pytest.raises(ValueError, match="the transformer predicts v_prediction, but the scheduler expects epsilon"):
        LavitaPipeline(transformer, tiny_vae, make_scheduler("unipc"))
    pipeline = make_pipeline(transformer, tiny_vae)
    for sampler in DIFFUSION_SAMPLERS:
        pipeline.use_sampler(sampler)
        assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
        assert not uses_learned_variance(pipeline.scheduler)


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


def test_saving_replaces_an_older_pipeline_as_a_whole(
    tmp_path: Path, pipeline: LavitaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pipeline"
    save_pipeline(pipeline, folder)
    (folder / "left.txt").touch()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(pipeline, "save_pretrained", full)
        save_pipeline(pipeline, folder)
    assert (folder / "left.txt").exists(), "the older one is kept"
    save_pipeline(pipeline, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"] and not (folder / "left.txt").exists()
    load_pipeline(folder)
