"""Transformers of diffusers of equal width, depth, heads and patch: how others compute nearly the same.

Legend: B batch, F frames, C channels, H W latent size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import nn

CAPTION_VALUES = 8
LATTE_NOTE = (
    "LatteTransformer3DModel is the text model, whose forward pass needs a caption: built here without cross-attention "
    "and given a caption of one token, which it projects and does not look at. Its S-AdaLN is one layer and a table a "
    "block, where ours is a layer a block; q, k and v are three products."
)
DIT_NOTE = (
    "DiTTransformer2DModel sees the frames as a batch of images: all of its blocks attend in space, nothing along "
    "time. Each frame has its own condition, and each block its own timestep and label embedding."
)


class Rival(NamedTuple):
    """A model of diffusers, called on what ours takes."""

    model: nn.Module
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Latents (B, F, C, H, W), timesteps (B,) and labels (B,) to (B, F, 2 C, H, W)."""


def make_latte(config: Mapping[str, Any]) -> Rival:
    """Latte of diffusers for the fields of our model's constructor, with random weights."""
    model = LatteTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        num_layers=config["num_blocks"] // 2,  # it counts pairs
        cross_attention_dim=None,
        attention_bias=True,
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=CAPTION_VALUES,
        video_length=config["num_frames"],
    )

    def run(latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        caption = latents.new_zeros(len(latents), 1, CAPTION_VALUES)
        sample: torch.Tensor = model(latents.transpose(1, 2), timesteps, caption).sample
        return sample.transpose(1, 2)

    return Rival(model.eval().requires_grad_(False), run)


def make_dit(config: Mapping[str, Any]) -> Rival:
    """DiT of diffusers for the fields of our model's constructor, with random weights."""
    model = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        num_layers=config["num_blocks"],
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=config["num_classes"],
    )

    def run(latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        frames = latents.shape[1]
        repeated = (given.repeat_interleave(frames) for given in (timesteps, labels))
        sample: torch.Tensor = model(latents.flatten(0, 1), *repeated).sample
        return sample.unflatten(0, latents.shape[:2])

    return Rival(model.eval().requires_grad_(False), run)
