"""What the tests of sampling share: pipelines of tiny models, and latents sampled from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from conftest import MakeTransformer

from lavita.core.seeds import generator
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline

BuildPipeline = Callable[..., LavitaPipeline]
CLASSES: dict[str, Any] = {"num_classes": 3}
TEXTS: dict[str, Any] = {"text_dim": 5}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return float((found - expected).norm() / expected.norm())


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def build_pipeline(
    make_transformer: MakeTransformer, vae: AutoencoderKL, scale: float = 1.0, **fields: Any
) -> LavitaPipeline:
    """A pipeline of a tiny model; `scale` multiplies the weights of its blocks."""
    transformer = make_transformer(**fields)
    with torch.no_grad():
        for parameter in transformer.blocks.parameters():
            parameter.mul_(scale)
    return make_pipeline(transformer, vae)


def sample(
    pipeline: LavitaPipeline, labels: Sequence[int | str], seeds: Sequence[int] | None = None, **options: Any
) -> torch.Tensor:
    """Latents of videos by class, or by text for a model with texts, or of as many videos without a condition.

    In float32, and with the seeds 0, 1 ... unless `seeds`, `generator` or `latents` are given.
    """
    given: dict[str, Any] = {"num_inference_steps": 6, "precision": "fp32", **options}
    config = pipeline.transformer.config
    if config["num_classes"]:
        given["class_labels"] = labels
    elif config["text_dim"]:
        numbers = torch.tensor([float(label) for label in labels])
        given["prompt_embeds"] = numbers[:, None] + torch.linspace(-1, 1, config["text_dim"])
        given.setdefault("negative_prompt_embeds", torch.zeros(len(labels), config["text_dim"]))
    else:
        given["num_videos"] = len(labels)
    if given.keys().isdisjoint(("latents", "generator")):
        seeds = range(len(labels)) if seeds is None else seeds
        given["generator"] = [generator(seed, "sample") for seed in seeds]
    frames = pipeline(**given, output_type="latent").frames
    assert isinstance(frames, torch.Tensor)
    return frames
