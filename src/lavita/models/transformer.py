"""The latent video diffusion transformer: one class; a variant of the paper is a plan of its blocks.

Legend: B batch, F frames, C channels, H W latent size, P patch, N = (H / P) (W / P) tokens a frame, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from lavita.models.blocks import Axis, FinalLayer, TransformerBlock
from lavita.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    spatial_positions,
    temporal_positions,
)

# Width, blocks (spatial and temporal together, as the paper counts them) and heads.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (64, 2, 2),
    "small": (256, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
VARIANTS = (1, 2)


def block_plan(variant: int, num_blocks: int) -> list[Axis]:
    """What each block's attention looks along (Sec. 3.2): 1 late fusion, 2 interleaved fusion.

    Raises:
        ValueError: for another variant, or an odd number of blocks.
    """
    if num_blocks < 2 or num_blocks % 2:
        raise ValueError(f"num_blocks is {num_blocks}, but must be even: as many temporal as spatial blocks")
    half = num_blocks // 2
    space: list[Axis] = ["space"]
    time: list[Axis] = ["time"]
    if variant == 1:
        return space * half + time * half
    if variant == 2:
        return (space + time) * half
    raise ValueError(f"variant is {variant!r}; allowed: {', '.join(map(str, VARIANTS))}")


def preset_sizes(preset: str) -> dict[str, int]:
    """The constructor's fields that a preset such as `XL/2` stands for.

    Raises:
        ValueError: for an unknown size or patch.
    """
    size, _, patch = preset.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise ValueError(
            f"preset is {preset!r}; allowed: one of {' '.join(SIZES)}, then /, "
            f"then one of {' '.join(map(str, PATCH_SIZES))}"
        )
    hidden_size, num_blocks, num_heads = SIZES[size]
    return {
        "hidden_size": hidden_size,
        "num_blocks": num_blocks,
        "num_heads": num_heads,
        "patch_size": int(patch),
    }


@dataclass
class TransformerOutput(BaseOutput):
    """What the model returns."""

    sample: torch.Tensor
    """(B, F, 2C, H, W) with `learn_sigma`: predicted noise (or velocity, by the configuration's `prediction_type`),
    then predicted variance; else (B, F, C, H, W)."""


class LavitaTransformer3DModel(ModelMixin, ConfigMixin):
    """Predicts the noise, and the variance, of noisy video latents.

    Parameters keep the names of DiT's and Latte's published weights.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        num_frames: int = 16,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        num_blocks: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        variant: int = 2,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        frame_interval: int = 1,
        fps: float = 8.0,
    ) -> None:
        """Builds the model; at initialisation its output is exactly zero.

        Args:
            sample_size: H = W of the latents.
            num_frames: F of the training clips, and the most that it takes.
            in_channels: C of the latents.
            patch_size: P; divides `sample_size`.
            hidden_size: D; a multiple of 4 and of `num_heads`.
            num_blocks: spatial and temporal blocks together; even.
            num_heads: attention heads.
            mlp_ratio: width of the MLP's hidden layer over D.
            variant: see `block_plan`.
            num_classes: 0 for an unconditional model.
            class_names: names of the classes, in the order of their labels; for people.
            learn_sigma: predict the variance too.
            prediction_type: what the weights predict, `epsilon` or `v_prediction` (see `diffusion`); a fact about
                them, which the forward pass ignores and samplers need.
            frame_interval: that of the training clips; a fact about the weights, which the forward pass
                ignores.
            fps: frames a second of a generated video: the data's over `frame_interval`; a fact as well.

        Raises:
            ValueError: for sizes that do not fit together.
        """
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size is {sample_size}, but must be a multiple of patch_size ({patch_size})")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size}, but must be a multiple of 4 and of num_heads ({num_heads})"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        grid = sample_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.register_buffer("pos_embed", spatial_positions(grid, hidden_size))  # (1, N, D)
        self.register_buffer("temp_embed", temporal_positions(num_frames, hidden_size))  # (1, F, D)
        plan = block_plan(variant, num_blocks)
        self.first_temporal = plan.index("time")
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_heads, mlp_ratio, axis) for axis in plan)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> LavitaTransformer3DModel:
        """Builds a model of a published size, for example `from_preset("XL/2", sample_size=32)`.

        Args:
            preset: S, B, L or XL (`SIZES` has smaller ones), then /2, /4 or /8.
            fields: any other field of the constructor; one that the preset sets wins over it.

        Raises:
            ValueError: for an unknown preset, or sizes that do not fit together.
        """
        return cls(**{**preset_sizes(preset), **fields})

    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier layers, small embeddings, zeros wherever a block or the model ends."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # Closed gates make every block the identity; a zero decoder starts at the prior's loss.
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[torch.Tensor]:
        """One evaluation.

        Args:
            latents: noisy latents (B, F, C, H, W); F at most `num_frames`.
            timesteps: (B,) or a scalar, in 0..999.
            class_labels: (B,) in 0..num_classes, the last for "no label"; None for an unconditional model.
            return_dict: a `TransformerOutput`, or a tuple.

        Raises:
            ValueError: for latents or labels that this model does not take.
        """
        self._check(latents, class_labels)
        condition = self.t_embedder(timesteps.expand(latents.shape[0]))  # (B, D)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(class_labels)  # (B, D)
        condition = condition[:, None, None]  # (B, 1, 1, D): the same for all tokens of a sample

        x = self.x_embedder(latents)  # (B, F, N, D)
        x = x + self.pos_embed[:, None].to(x.dtype)  # (B, F, N, D)
        for index, block in enumerate(self.blocks):
            if index == self.first_temporal:
                x = x + self.temp_embed[:, : x.shape[1], None].to(x.dtype)  # (B, F, N, D)
            x = block(x, condition)  # (B, F, N, D)
        sample = self.unpatchify(self.final_layer(x, condition))  # (B, F, C_out, H, W)
        return TransformerOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, F, N, P P C_out) to latents (B, F, C_out, H, W)."""
        p = self.config["patch_size"]
        grid = self.config["sample_size"] // p
        x = patches.unflatten(-1, (p, p, self.out_channels))  # (B, F, N, P, P, C)
        x = x.unflatten(2, (grid, grid))  # (B, F, h, w, P, P, C)
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # (B, F, C, h, P, w, P)
        return x.flatten(-2).flatten(-3, -2)

    def _check(self, latents: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        size, channels = self.config["sample_size"], self.config["in_channels"]
        frames, num_classes = self.config["num_frames"], self.config["num_classes"]
        if latents.ndim != 5 or latents.shape[2:] != (channels, size, size) or latents.shape[1] > frames:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but this model takes "
                f"(B, up to {frames}, {channels}, {size}, {size})"
            )
        if num_classes and class_labels is None:
            raise ValueError(f"class_labels are missing, but this model has {num_classes} classes")
        if not num_classes and class_labels is not None:
            raise ValueError("class_labels were given, but this model is unconditional")
