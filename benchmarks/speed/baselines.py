"""Baselines: a plain implementation of our model, and transformers of diffusers of equal width, depth, heads and patch.

The plain model is written independently of `lavita.models`, from which it takes only the weights, so it is an oracle as
well. It computes what public code of the paper does, slow parts included: timestep and label are repeated for every
frame before spatial attention and for every token before temporal attention, and the S-AdaLN layers run on every copy;
attention weights are computed in full, softmax(q k^T) v; tokens are copied into the other order between the two kinds
of blocks; every step of a block is an operation of its own.

Legend: B batch, F frames, C channels, H W latent size, P patch, N = (H / P) (W / P) tokens per frame, D width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import nn

CAPTION_WIDTH = 8
LATTE_NOTE = (
    "LatteTransformer3DModel is the text model, whose forward pass needs a caption: it is built without "
    "cross-attention and given a caption of one token, which it projects and then ignores. Its S-AdaLN is one layer "
    "and a table per block, where ours is a layer per block; q, k and v are three products."
)
DIT_NOTE = (
    "DiTTransformer2DModel takes the frames as a batch of images: all of its blocks attend in space, none in time. "
    "Each frame has its own condition, and each block its own timestep and label embedding."
)


class PlainModel:
    """Variant 2 with uniform patches, S-AdaLN and absolute positions."""

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        """Takes the parameters and buffers of a `LavitaTransformer3DModel`, and its configuration.

        Raises:
            ValueError: for a model of another kind.
        """
        kind = {"variant": 2, "patch_embedding": "uniform", "conditioning": "s_adaln", "temporal_position": "absolute"}
        for name, value in kind.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} is {config[name]!r}, but the plain model has only {value!r}")
        self.weights = weights
        self.num_blocks, self.num_heads = config["num_blocks"], config["num_heads"]
        self.patch, self.width = config["patch_size"], config["hidden_size"]

    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps noisy latents (B, F, C, H, W), timesteps (B,), labels (B,) to the model's output (B, F, 2 C, H, W)."""
        batch, frames, _, height, width = latents.shape
        images = latents.reshape(batch * frames, *latents.shape[2:])  # (B F, C, H, W)
        weight, bias = self.weights["x_embedder.proj.weight"], self.weights["x_embedder.proj.bias"]
        x = F.conv2d(images, weight, bias, stride=self.patch).flatten(2).transpose(1, 2)  # (B F, N, D)
        x = x + self.weights["pos_embed"]
        num_tokens = x.shape[1]
        condition = self._timestep(timesteps)  # (B, D)
        if class_labels is not None:
            condition = condition + self.weights["y_embedder.embedding_table.weight"][class_labels]
        in_space = condition.repeat_interleave(frames, dim=0)  # (B F, D)
        in_time = condition.repeat_interleave(num_tokens, dim=0)  # (B N, D)
        for index in range(0, self.num_blocks, 2):
            x = self._block(index, x, in_space)
            x = _other_order(x, batch)  # (B N, F, D)
            if index == 0:
                x = x + self.weights["temp_embed"][:, :frames]
            x = self._block(index + 1, x, in_time)
            x = _other_order(x, batch)  # (B F, N, D)
        shift, scale = self._linear("final_layer.adaLN_modulation.1", F.silu(in_space)).chunk(2, dim=1)
        x = self._linear("final_layer.linear", _modulate(x, shift, scale))  # (B F, N, P P c)
        grid_h, grid_w = height // self.patch, width // self.patch
        x = x.reshape(batch * frames, grid_h, grid_w, self.patch, self.patch, -1)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(batch, frames, -1, height, width)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _timestep(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.weights["t_embedder.mlp.0.weight"].shape[1] // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(-math.log(10_000) * steps / half)[None]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(self.weights["pos_embed"].dtype)
        return self._linear("t_embedder.mlp.2", F.silu(self._linear("t_embedder.mlp.0", waves)))

    def _block(self, index: int, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Takes tokens (rows, tokens, D) and one condition per row (rows, D)."""
        name = f"blocks.{index}"
        vectors = self._linear(f"{name}.adaLN_modulation.1", F.silu(condition)).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        attended = self._attention(f"{name}.attn", _modulate(x, shift_attn, scale_attn))
        x = x + gate_attn.unsqueeze(1) * attended
        hidden = self._linear(f"{name}.mlp.fc1", _modulate(x, shift_mlp, scale_mlp))
        hidden = self._linear(f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        return x + gate_mlp.unsqueeze(1) * hidden

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        head = width // self.num_heads
        qkv = self._linear(f"{name}.qkv", x).reshape(rows, tokens, 3, self.num_heads, head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (rows, h, tokens, D / h)
        weights = (query @ key.transpose(-2, -1)) * head**-0.5
        weights = weights.softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(rows, tokens, width)
        return self._linear(f"{name}.proj", mixed)


def _other_order(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Copies (B a, b, D) to (B b, a, D)."""
    return x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Baseline(NamedTuple):
    """A model of diffusers that is called with the inputs of ours."""

    model: nn.Module
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Latents (B, F, C, H, W), timesteps (B,) and labels (B,) to (B, F, 2 C, H, W)."""


def make_latte(config: Mapping[str, Any]) -> Baseline:
    """The Latte of diffusers with our model's configuration and random weights."""
    model = LatteTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        num_layers=config["num_blocks"] // 2,  # counted in pairs
        cross_attention_dim=None,
        attention_bias=True,
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=CAPTION_WIDTH,
        video_length=config["num_frames"],
    )

    def run(latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        caption = latents.new_zeros(len(latents), 1, CAPTION_WIDTH)
        sample: torch.Tensor = model(latents.transpose(1, 2), timesteps, caption).sample
        return sample.transpose(1, 2)

    return Baseline(model.eval().requires_grad_(False), run)


def make_dit(config: Mapping[str, Any]) -> Baseline:
    """The DiT of diffusers with our model's configuration and random weights."""
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

    return Baseline(model.eval().requires_grad_(False), run)
