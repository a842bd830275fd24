"""The latent video diffusion transformer: one class; a variant of the paper is a plan of its blocks.

Legend: B batch, F frames, C channels, H W latent size, P patch, T tokens in time (F, or F / S with tubes of S frames),
N = (H / P) (W / P) tokens a frame, D width, R conditions a sample (the video's, and one an image), K condition tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from lavita.models.blocks import Conditioning, FinalLayer, Frames, TransformerBlock
from lavita.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TextEmbedder,
    TimestepEmbedder,
    TubeEmbed,
    frame_positions,
    rotary_positions,
    spatial_positions,
    temporal_positions,
)
from lavita.models.inputs import _check_shape
from lavita.models.presets import block_plan, preset_sizes

PATCH_EMBEDDINGS = ("uniform", "compression")
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)
TEMPORAL_POSITIONS = ("absolute", "rope")


@dataclass
class TransformerOutput(BaseOutput):
    """What the model returns."""

    sample: torch.Tensor
    """(B, F, 2C, H, W) with `learn_sigma`: predicted noise (or velocity, by the configuration's `prediction_type`),
    then predicted variance; else (B, F, C, H, W)."""


class LavitaTransformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Predicts the noise, and the variance, of noisy video latents.

    Parameters keep the names of DiT's and Latte's published weights.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock"]

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
        patch_embedding: str = "uniform",
        tube_size: int = 2,
        conditioning: str = "s_adaln",
        temporal_position: str = "absolute",
        num_classes: int = 0,
        class_names: list[str] | None = None,
        text_dim: int = 0,
        text_encoder: str | None = None,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        frame_interval: int = 1,
        fps: float = 8.0,
    ) -> None:
        """Builds the model; at initialisation its output is exactly zero.

        Args:
            sample_size: H = W of the latents.
            num_frames: F of the training clips. Other lengths work too: see `frame_positions`.
            in_channels: C of the latents.
            patch_size: P; divides `sample_size`.
            hidden_size: D; a multiple of 4 and of `num_heads`.
            num_blocks: spatial and temporal blocks together; even for Variants 1 and 2.
            num_heads: attention heads; even for Variant 4.
            mlp_ratio: width of the MLP's hidden layer over D.
            variant: 1 to 4, see `block_plan`.
            patch_embedding: `uniform`: each frame is cut into patches (Sec. 3.3); `compression`: tubes of `tube_size`
                frames become tokens, and a 3-D transposed convolution after the decoder makes frames of them.
            tube_size: S; divides `num_frames` and the length of every clip. Without a meaning for `uniform`.
            conditioning: `s_adaln`: timestep and label steer norms and gates; `all_tokens`: they are tokens of every
                frame, in plain blocks (Sec. 3.4).
            temporal_position: `absolute`: sin-cos, added once, before the first temporal attention; `rope`: rotary, in
                every temporal attention (Sec. 3.5).
            num_classes: 0 for a model without classes.
            class_names: names of the classes, in the order of their labels; for people.
            text_dim: width of the pooled text embeddings of a text-conditional model (Sec. 4.4); 0 for none.
            text_encoder: path or hub id of the encoder that makes them; a fact for those who sample.
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
        sizes = {"sample_size": sample_size, "num_frames": num_frames, "in_channels": in_channels}
        sizes |= {"patch_size": patch_size, "hidden_size": hidden_size, "num_heads": num_heads, "tube_size": tube_size}
        for name, number in sizes.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1")
        if num_classes < 0 or text_dim < 0:
            raise ValueError(f"num_classes is {num_classes} and text_dim {text_dim}, but must be at least 0")
        if sample_size % patch_size:
            raise ValueError(f"sample_size is {sample_size}, but must be a multiple of patch_size ({patch_size})")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size}, but must be a multiple of 4 and of num_heads ({num_heads})"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
        for name, value, allowed in (
            ("patch_embedding", patch_embedding, PATCH_EMBEDDINGS),
            ("conditioning", conditioning, CONDITIONINGS),
            ("temporal_position", temporal_position, TEMPORAL_POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if num_classes and text_dim:
            raise ValueError(f"num_classes is {num_classes} and text_dim {text_dim}, but a model has classes or texts")
        plan = block_plan(variant, num_blocks)
        if variant == 4 and num_heads % 2:
            raise ValueError(f"num_heads is {num_heads}, but must be even for variant 4: half of them look along time")
        if temporal_position == "rope" and hidden_size // num_heads % 2:
            raise ValueError(
                f"hidden_size / num_heads is {hidden_size // num_heads}, but must be even for rope, which turns pairs"
            )
        compression = patch_embedding == "compression"
        self.tube_size = tube_size if compression else 1
        if self.tube_size < 1 or num_frames % self.tube_size:
            raise ValueError(f"num_frames is {num_frames}, but must be a multiple of tube_size ({tube_size})")
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        grid = sample_size // patch_size
        self.x_embedder = (
            TubeEmbed(patch_size, tube_size, in_channels, hidden_size)
            if compression
            else PatchEmbed(patch_size, in_channels, hidden_size)
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder: LabelEmbedder | TextEmbedder | None = None
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        elif text_dim:
            self.y_embedder = TextEmbedder(text_dim, hidden_size)
        self.register_buffer("pos_embed", spatial_positions(grid, hidden_size))  # (1, N, D)
        if temporal_position == "absolute":
            steps = np.arange(num_frames // self.tube_size, dtype=np.float64)
            self.register_buffer("temp_embed", temporal_positions(steps, hidden_size))  # (1, T, D)
        self.first_temporal = next(index for index, mixing in enumerate(plan) if mixing != "space")
        kind: Conditioning = "all_tokens" if conditioning == "all_tokens" else "s_adaln"
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, mlp_ratio, mixing, kind) for mixing in plan
        )
        # A tube keeps the values of all its frames: from fewer, the noise of one could not be told from another's.
        patch_values = patch_size * patch_size * self.out_channels * self.tube_size
        self.final_layer = FinalLayer(hidden_size, patch_values, kind)
        self.temporal_upsample = (
            nn.ConvTranspose3d(
                self.out_channels * tube_size,
                self.out_channels,
                kernel_size=(tube_size, 1, 1),
                stride=(tube_size, 1, 1),
            )
            if compression
            else None
        )
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
        return cls(**{**preset_sizes(preset, fields.get("variant", 2)), **fields})

    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier layers, small embeddings, zeros wherever a block or the model ends."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.y_embedder):
            if isinstance(embedder, (TimestepEmbedder, TextEmbedder)):
                for layer in embedder.mlp:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=0.02)
        # Closed gates make every block the identity; a zero decoder starts at the prior's loss.
        for module in (*self.blocks, self.final_layer):
            if module.adaLN_modulation is not None:
                nn.init.zeros_(module.adaLN_modulation[1].weight)
                nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        if self.temporal_upsample is not None:
            # Frame s of a tube starts as the s-th share of the decoder's channels.
            channels, tube = self.out_channels, self.tube_size
            identity = torch.eye(channels).repeat(tube, 1).view(tube, channels, channels)
            weight = torch.zeros(tube, channels, channels, tube)
            weight[range(tube), :, :, range(tube)] = identity
            with torch.no_grad():
                self.temporal_upsample.weight.copy_(weight.view(tube * channels, channels, tube, 1, 1))
            nn.init.zeros_(self.temporal_upsample.bias)  # type: ignore[arg-type]

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        num_images: int = 0,
        use_temporal: bool = True,
        return_dict: bool = True,
        modulation: Sequence[torch.Tensor] | None = None,
    ) -> TransformerOutput | tuple[torch.Tensor]:
        """One evaluation.

        Args:
            latents: noisy latents (B, F, C, H, W).
            timesteps: (B,) or a scalar, in 0..999.
            class_labels: for a model with classes, in 0..num_classes, the last for "no label": (B,), or with
                `num_images` (B, 1 + num_images), the video's label and each image's own.
            text_embeds: for a model with texts, pooled embeddings (B, text_dim) or (B, 1 + num_images, text_dim).
            num_images: I; the last I of the F frames are images of their own, not of the video: they pass the spatial
                modules only (Sec. 3.6), and of Variant 4 the spatial heads.
            use_temporal: False treats every frame as an image (A.4).
            return_dict: a `TransformerOutput`, or a tuple.
            modulation: what `modulate` gives for these timesteps and conditions, computed before; not with images.

        Raises:
            ValueError: for latents or conditions that this model does not take, or images where the patch embedding
                is `compression`.
        """
        self._check(latents, timesteps, class_labels, text_embeds, num_images, use_temporal)
        if modulation is not None and num_images:
            raise ValueError(f"modulation was given, and num_images is {num_images}, but must be 0 beside it")
        conditions: list[torch.Tensor] = []
        if modulation is None:
            own = self._own_condition(class_labels, text_embeds)  # (B, R, D)
            conditions = [self.t_embedder(timesteps.expand(latents.shape[0]))[:, None]]  # (B, 1, D)
            conditions += [] if own is None else [own]

        x = self.x_embedder(latents)  # (B, T, N, D)
        x = x + self.pos_embed[:, None].to(x.dtype)  # (B, T, N, D)
        frames = self._frames(x, num_images if self.y_embedder is not None else 0, num_images, use_temporal)
        condition = None
        num_tokens = 0
        vectors: list[torch.Tensor | None] = [None] * (len(self.blocks) + 1)
        if modulation is not None:
            vectors = [tensor[:, None, None] for tensor in modulation]  # (B, 1, 1, 6 D), the last one (B, 1, 1, 2 D)
        elif self.config["conditioning"] == "s_adaln":
            condition = sum(conditions[1:], conditions[0])[:, :, None]  # (B, R, 1, D)
        else:
            num_tokens = len(conditions)
            x = torch.cat([self._tokens(conditions, x.shape[1], frames), x], dim=2)  # (B, T, K + N, D)
        for index, block in enumerate(self.blocks):
            if index == self.first_temporal and frames.num_video and self.config["temporal_position"] == "absolute":
                x = x + self._temporal_embedding(x.shape[1], frames.num_video).to(x)  # (B, T, K + N, D)
            x = block(x, condition, frames, vectors[index])  # (B, T, K + N, D)
        patches = self.final_layer(x[:, :, num_tokens:], condition, frames, vectors[-1])  # (B, T, N, P P C_out S)
        sample = self.unpatchify(patches)  # (B, T, C_out S, H, W)
        if self.temporal_upsample is not None:
            sample = self.temporal_upsample(sample.transpose(1, 2)).transpose(1, 2)  # (B, F, C_out, H, W)
        return TransformerOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def modulate(
        self,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
    ) -> list[torch.Tensor] | None:
        """S-AdaLN's vectors of several timesteps at once.

        They hold a third of the weights of a model, which an evaluation reads for a handful of rows: a sampler, who
        knows its timesteps, has them read once for many.

        Args:
            timesteps: (S,).
            class_labels: (B,), as `forward` takes them.
            text_embeds: (B, text_dim).

        Returns:
            For each block (S, B, 6 D), for the decoder (S, B, 2 D); the slices of a timestep are `forward`'s
            `modulation`. None for a model of another conditioning.
        """
        if self.config["conditioning"] != "s_adaln":
            return None
        condition = self.t_embedder(timesteps)[:, None]  # (S, 1, D)
        own = self._own_condition(class_labels, text_embeds)  # (B, 1, D)
        if own is not None:
            condition = condition + own[:, 0]  # (S, B, D)
        return [module.adaLN_modulation(condition) for module in (*self.blocks, self.final_layer)]

    def _own_condition(
        self, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Vectors of what each sample is conditioned on, (B, R, D); None for a model without conditions."""
        given = class_labels if isinstance(self.y_embedder, LabelEmbedder) else text_embeds
        if self.y_embedder is None or given is None:
            return None
        one = given.ndim == (1 if isinstance(self.y_embedder, LabelEmbedder) else 2)
        return self.y_embedder(given[:, None] if one else given)

    def _frames(self, x: torch.Tensor, num_conditions: int, num_images: int, use_temporal: bool) -> Frames:
        """What the blocks are told of tokens (B, T, N, D) with `num_conditions` conditions beside the video's."""
        num_video = x.shape[1] - num_images
        rows = None
        if num_conditions:
            rows = torch.arange(1 - num_video, num_images + 1, device=x.device).clamp(min=0)  # 0 ... 0 1 ... I
        if not use_temporal:
            return Frames(0, None, rows)
        rotation = None
        if self.config["temporal_position"] == "rope":
            head_size = self.config["hidden_size"] // self.config["num_heads"]
            rotation = rotary_positions(self._positions(num_video), head_size).to(x.device)
        return Frames(num_video, rotation, rows)

    def _positions(self, num_video: int) -> np.ndarray:
        return frame_positions(num_video, self.config["num_frames"] // self.tube_size)

    def _temporal_embedding(self, num_frames: int, num_video: int) -> torch.Tensor:
        """Absolute positions of the video's frames, zero for images, (1, T, 1, D)."""
        table = self.temp_embed[:, :num_video]
        if num_video > self.temp_embed.shape[1]:
            table = temporal_positions(self._positions(num_video), self.config["hidden_size"]).to(table.device)
        return F.pad(table, (0, 0, 0, num_frames - num_video))[:, :, None]

    def _tokens(self, conditions: list[torch.Tensor], num_frames: int, frames: Frames) -> torch.Tensor:
        """Timestep and label, (B, 1 or R, D) each, as tokens of every frame, (B, T, K, D)."""
        tokens = []
        for condition in conditions:
            if frames.condition_rows is not None and condition.shape[1] > 1:
                tokens.append(condition[:, frames.condition_rows])
            else:
                tokens.append(condition.expand(-1, num_frames, -1))
        return torch.stack(tokens, dim=2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, T, N, P P c) to frames (B, T, c, H, W)."""
        p = self.config["patch_size"]
        grid = self.config["sample_size"] // p
        x = patches.unflatten(-1, (p, p, -1))  # (B, T, N, P, P, c)
        x = x.unflatten(2, (grid, grid))  # (B, T, h, w, P, P, c)
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # (B, T, c, h, P, w, P)
        return x.flatten(-2).flatten(-3, -2)

    def _check(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
        num_images: int,
        use_temporal: bool,
    ) -> None:
        size, channels, tube = self.config["sample_size"], self.config["in_channels"], self.tube_size
        if latents.ndim != 5 or latents.shape[2:] != (channels, size, size) or not latents.shape[1]:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but this model takes (B, F, {channels}, {size}, {size})"
            )
        if timesteps.ndim:
            _check_shape("timesteps", timesteps, (latents.shape[0],))
        if self.temporal_upsample is not None:
            if num_images or not use_temporal:
                raise ValueError(
                    "patch_embedding is compression: its tokens hold several frames of a video, so there are no images "
                    "among them (num_images must be 0, and use_temporal true)"
                )
            if latents.shape[1] % tube:
                raise ValueError(
                    f"latents have {latents.shape[1]} frames, but must have a multiple of {tube}, a tube's"
                )
        if not 0 <= num_images < latents.shape[1]:
            raise ValueError(f"num_images is {num_images}, but must be in 0..{latents.shape[1] - 1}: fewer than frames")
        num_classes, text_dim = self.config["num_classes"], self.config["text_dim"]
        if class_labels is not None and not num_classes:
            kind = "has texts" if text_dim else "is unconditional"
            raise ValueError(f"class_labels were given, but this model {kind}")
        if text_embeds is not None and not text_dim:
            kind = f"has {num_classes} classes" if num_classes else "is unconditional"
            raise ValueError(f"text_embeds were given, but this model {kind}")
        expected: tuple[int, ...] = (latents.shape[0], 1 + num_images) if num_images else (latents.shape[0],)
        if num_classes:
            if class_labels is None:
                raise ValueError(f"class_labels are missing, but this model has {num_classes} classes")
            _check_shape("class_labels", class_labels, expected)
        if text_dim:
            if text_embeds is None:
                raise ValueError("text_embeds are missing, but this model has texts")
            _check_shape("text_embeds", text_embeds, (*expected, text_dim))
