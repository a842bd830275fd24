"""The latent video diffusion transformer: one class, whose list of blocks makes the paper's four variants.

Legend: B batch, F frames, C channels, H W latent size, P patch, T tokens in time (F, or F / S with tubes of S frames),
N = (H / P) (W / P) tokens per frame, D width, I images after a video, R = 1 + I conditions per sample (the video's and
one per image; 1 if they share it), K condition tokens per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.outputs import BaseOutput
from torch import nn

from lavita.models.actions import ActionEmbedder, check_actions
from lavita.models.blocks import Conditioning, FinalLayer, FrameLayout, TransformerBlock
from lavita.models.cross_attention import WordEmbedder, add_cross_attention, pooled_part
from lavita.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TextEmbedder,
    TimestepEmbedder,
    TubeEmbed,
    frame_positions,
    rotary_positions,
    temporal_positions,
)
from lavita.models.initialization import initialize_weights
from lavita.models.inputs import check_fields, check_given, check_inputs, check_whole, frames_per_tube
from lavita.models.presets import block_plan, preset_sizes
from lavita.models.sequence_parallel import SequenceGroup, SharedClip, arranged, own_frames
from lavita.models.shapes import grid_positions, sample_grid, trained_range


@dataclass
class TransformerOutput(BaseOutput):
    """Output of the model."""

    sample: torch.Tensor
    """(B, F, 2C, H, W) with `learn_sigma`: predicted noise (or a velocity, by the configuration's `prediction_type`),
    then predicted variance; else (B, F, C, H, W)."""


class LavitaTransformer3DModel(ModelMixin, ConfigMixin, CacheMixin):  # type: ignore[misc]  # both define config_name
    """Predicts the noise of noisy video latents, and its variance.

    Parameters have the names of DiT's and Latte's published weights.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]  # type: ignore[misc, assignment]
    _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock"]  # type: ignore[misc]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 32,
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
        given_frames: list[str] | None = None,
        action_names: list[str] | None = None,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        text_dim: int = 0,
        text_encoder: str | None = None,
        text_tokens: int | None = None,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        flow_shift: float | None = None,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        frame_interval: int = 1,
        fps: float = 8.0,
        trained_shapes: list[list[int]] | None = None,
    ) -> None:
        """Builds the model; at initialisation its output is exactly zero.

        `class_names`, `text_encoder`, `prediction_type`, `flow_shift`, `latent_mean`, `latent_std`, `frame_interval`
        and `fps` are facts about the weights: they change nothing in the forward pass, but sampling needs them.

        Args:
            sample_size: H = W of the latents, or a list of both. Other sizes work, too: see `shapes.grid_positions`.
            num_frames: F of the training clips. Clips of other lengths work, too: see `frame_positions`.
            in_channels: C of the latents.
            patch_size: P; divides `sample_size`.
            hidden_size: D; a multiple of 4 and of `num_heads`.
            num_blocks: spatial and temporal blocks together; even for Variants 1 and 2.
            num_heads: attention heads; even for Variant 4, whose two attentions have half of them each.
            mlp_ratio: width of the MLP's hidden layer, as a multiple of D.
            variant: 1 to 4, see `block_plan`.
            patch_embedding: `uniform`: each frame is cut into patches (Sec. 3.3); `compression`: tubes of `tube_size`
                frames become tokens, and a 3-D transposed convolution after the decoder turns them into frames.
            tube_size: S; divides `num_frames` and the length of every clip. Ignored with `uniform`.
            conditioning: `s_adaln`: timestep and label modulate norms and gates; `all_tokens`: they are tokens of
                every frame, in plain blocks (Sec. 3.4).
            temporal_position: `absolute`: sin-cos, added once, before the first block with temporal attention, as the
                published weights have it; `absolute_input`: the same, added to the input of the first block (Sec. 3.3);
                `rope`: rotary, in every temporal attention (Sec. 3.5).
            given_frames: `given_frames.KINDS` that training gave, for a model that fills in the other frames of a clip;
                None for one that makes whole clips only.
            action_names: names of the actions that frames may have as a condition, see `actions`; None for none.
            num_classes: number of classes; 0 for a model without classes.
            class_names: names of the classes, in the order of their labels.
            text_dim: width of the pooled text embeddings of a text-conditional model (Sec. 4.4); 0 for none.
            text_encoder: path or hub id of the encoder of the text embeddings.
            text_tokens: L, tokens of a text that blocks attend to (see `cross_attention`), besides its pooled
                embedding; None for a model that knows the pooled embedding alone.
            learn_sigma: predict the variance, too.
            prediction_type: what the weights predict: `epsilon` or `v_prediction` (see `diffusion`), or `flow` (see
                `flow`), without `learn_sigma`.
            flow_shift: shift of the timesteps that a flow was trained at, and should be sampled at (see
                `flow.shift_time`); None is 1.
            latent_mean: mean of each channel of the scaled latents, which was subtracted in training (see
                `latent_statistics`); None if the model takes scaled latents as they are.
            latent_std: standard deviation of each channel, by which they were divided; together with `latent_mean`.
            frame_interval: frame interval of the training clips.
            fps: frames per second of a generated video: the data's divided by `frame_interval`.
            trained_shapes: lists of F, H and W of the training clips, if they had several shapes; `num_frames` and
                `sample_size` are then those of samples.

        Raises:
            ValueError: if a field is out of range, or fields do not fit together.
        """
        super().__init__()
        check_fields(self.config)
        self.mixings = plan = block_plan(variant, num_blocks)
        compression = patch_embedding == "compression"
        self.tube_size = frames_per_tube(self.config)
        self.sequence_group: SequenceGroup | None = None  # see `sequence_parallel.open_group`
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = (
            TubeEmbed(patch_size, tube_size, in_channels, hidden_size)
            if compression
            else PatchEmbed(patch_size, in_channels, hidden_size)
        )
        self.given_embed = nn.Parameter(torch.zeros(self.tube_size, hidden_size)) if given_frames else None
        self.action_embed = ActionEmbedder(len(action_names), self.tube_size, hidden_size) if action_names else None
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder: LabelEmbedder | TextEmbedder | None = None
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        elif text_dim:
            self.y_embedder = TextEmbedder(text_dim, hidden_size)
        height, width = sample_grid(self.config)
        self.grid = height // patch_size, width // patch_size
        self.register_buffer("pos_embed", grid_positions(self.config, self.grid))  # (1, N, D)
        if temporal_position != "rope":
            steps = np.arange(trained_range(self.config)[0] // self.tube_size, dtype=np.float64)
            self.register_buffer("temp_embed", temporal_positions(steps, hidden_size))  # (1, T, D)
        first = next(index for index, mixing in enumerate(plan) if mixing != "space")
        self.first_temporal = 0 if temporal_position == "absolute_input" else first
        kind: Conditioning = "all_tokens" if conditioning == "all_tokens" else "s_adaln"
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, mlp_ratio, mixing, kind) for mixing in plan
        )
        # A tube needs the values of all its frames: fewer could not hold the noise of each of them.
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
        initialize_weights(self)
        self.text_proj: WordEmbedder | None = None
        if text_tokens is not None:  # after all other weights, which are therefore those of the same seed without it
            self.text_proj = WordEmbedder(text_dim, hidden_size)
            add_cross_attention(self.blocks, hidden_size, num_heads)

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
            """See `torch.nn.Module.to`; the decorator of diffusers' method hides its signature from mypy."""

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> LavitaTransformer3DModel:
        """Builds a model of a published size, for example `from_preset("XL/2", sample_size=32)`.

        Args:
            preset: S, B, L or XL (`SIZES` has smaller ones), then /2, /4 or /8.
            fields: any other field of the constructor; fields given here override the preset's.

        Raises:
            ValueError: for an unknown preset, or fields that do not fit together.
        """
        return cls(**{**preset_sizes(preset, fields.get("variant", 2)), **fields})

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> Any:  # type: ignore[override]
        """See `ModelMixin.from_pretrained`; weights that lack a tensor, which would stay random, are refused.

        Raises:
            ValueError: naming what is missing, unless `output_loading_info` asks for that.
        """
        wants_report = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(source, output_loading_info=True, **options)
        model, report = loaded
        check_whole(model.config, report["missing_keys"], wants_report)
        return (model, report) if wants_report else model

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
        given: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
    ) -> TransformerOutput | tuple[torch.Tensor]:
        """Evaluates the model once.

        Args:
            latents: noisy latents (B, F, C, H, W).
            timesteps: (B,) or a scalar, in 0..999; for a flow floats in 0..1000.
            class_labels: for a model with classes, in 0..num_classes, where the last means "no label": (B,), or with
                `num_images` (B, 1 + I), the video's label and each image's own.
            text_embeds: for a model with texts, pooled embeddings (B, text_dim) or (B, 1 + I, text_dim); with
                `text_tokens` (B, 1 + L, text_dim) or (B, 1 + I, 1 + L, text_dim), see `cross_attention`.
            num_images: I; the last I of the F frames are independent images, not frames of the video: they pass the
                spatial modules only (Sec. 3.6).
            use_temporal: False treats every frame as an image (A.4).
            return_dict: return a `TransformerOutput` rather than a tuple.
            modulation: the output of `modulate` for these timesteps and conditions, if it is known; not with images.
            given: bool (B, F), the frames whose latents have no noise, for a model with `given_frames`; None for none.
                What is predicted for them means nothing.
            actions: int64 (B, F), the action of each frame, in 0..len(action_names), where the last means "no action";
                None for no action at all.

        Raises:
            ValueError: for latents or conditions that do not fit the model, or images if the patch embedding is
                `compression`.
        """
        check_inputs(self.config, latents, timesteps, class_labels, text_embeds, num_images, use_temporal)
        if given is not None:
            check_given(self.config, given, latents.shape[:2])
        if actions is not None:
            check_actions(self.config, actions, latents.shape[:2])
        if modulation is not None and num_images:
            raise ValueError(f"num_images is {num_images}, but must be 0 with modulation")
        patch = self.config["patch_size"]
        grid = latents.shape[3] // patch, latents.shape[4] // patch
        length, group = latents.shape[1] // self.tube_size, self.sequence_group  # T
        # With a group, T is below this process's part of it, and N in temporal blocks.
        shared = None if group is None else SharedClip(group, length)
        x = self.x_embedder(own_frames(latents, shared, unit=self.tube_size))  # (B, T, N, D)
        places = self.pos_embed if grid == self.grid else grid_positions(self.config, grid).to(x.device)
        x = x + places[:, None].to(x.dtype)  # (B, T, N, D)
        if given is not None and self.given_embed is not None:
            marks = given.unflatten(1, (-1, self.tube_size)).to(x.dtype) @ self.given_embed.to(x.dtype)  # (B, T, D)
            x = x + own_frames(marks, shared)[:, :, None]  # where nothing is given, exactly 0 is added
        if self.action_embed is not None:
            x = x + own_frames(self.action_embed(actions, latents.shape[1]), shared).to(x.dtype)  # (B, T, N, D)
        frames = self._frame_layout(x, length, num_images, use_temporal, shared)
        if self.text_proj is not None and text_embeds is not None:
            frames = replace(frames, words=self.text_proj(text_embeds))
        condition, num_tokens = None, 0
        vectors: list[torch.Tensor | None] = [None] * (len(self.blocks) + 1)
        if modulation is not None:
            vectors = [tensor[:, None, None] for tensor in modulation]  # (B, 1, 1, 6 D), the last one (B, 1, 1, 2 D)
        else:
            embedded = self._embed_conditions(timesteps.expand(len(x)), class_labels, text_embeds)  # (B, 1 or R, D)
            if self.config["conditioning"] == "s_adaln":
                condition = sum(embedded[1:], embedded[0])[:, :, None]  # (B, R, 1, D)
            else:
                tokens = self._condition_tokens(embedded, x.shape[1], frames)  # (B, T, K, D)
                num_tokens = tokens.shape[2]
                x = torch.cat([tokens, x], dim=2)  # (B, T, K + N, D)
        num_places, plan = x.shape[2], ["space", *self.mixings, "space"]
        for index, block in enumerate(self.blocks):
            if index == self.first_temporal and frames.num_video and self.config["temporal_position"] != "rope":
                positions = own_frames(self._temporal_embedding(length, frames.num_video), shared)
                x = x + positions.to(x)  # (B, T, K + N, D)
            x = arranged(x, shared, plan[index], plan[index + 1], num_places)
            x = block(x, condition, frames, vectors[index])  # (B, T, K + N, D)
        x = arranged(x, shared, plan[-2], plan[-1], num_places)
        patches = self.final_layer(x[:, :, num_tokens:], condition, frames, vectors[-1])  # (B, T, N, P P C_out S)
        if shared is not None:
            patches = shared.gather(patches)
        sample = self.unpatchify(patches, grid)  # (B, T, C_out S, H, W)
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
        """Computes S-AdaLN's vectors for several timesteps at once.

        The layers that compute them hold a third of a model's weights, and an evaluation reads them for only a handful
        of rows. A sampler knows its timesteps in advance, so it can read them once for many evaluations.

        Args:
            timesteps: (M,).
            class_labels: (B,), as in `forward`.
            text_embeds: (B, text_dim), or with `text_tokens` (B, 1 + L, text_dim).

        Returns:
            One tensor (M, B, 6 D) per block, then (M, B, 2 D) for the decoder; their slices at a timestep are
            `forward`'s `modulation`. None for a model with other conditioning.
        """
        if self.config["conditioning"] != "s_adaln":
            return None
        embedded = self._embed_conditions(timesteps, class_labels, text_embeds)  # (M, 1, D), (B, 1, D)
        condition = embedded[0]
        if len(embedded) > 1:
            condition = condition + embedded[1][:, 0]  # (M, B, D)
        return [module.adaLN_modulation(condition) for module in (*self.blocks, self.final_layer)]

    def _embed_conditions(
        self, timesteps: torch.Tensor, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Embeds the timesteps, (M, 1, D), and for a model with classes or texts those, (B, R, D)."""
        embedded = [self.t_embedder(timesteps)[:, None]]  # (M, 1, D)
        has_classes = isinstance(self.y_embedder, LabelEmbedder)
        given = class_labels if has_classes else pooled_part(self.config, text_embeds)
        if self.y_embedder is not None and given is not None:
            shared = given.ndim == (1 if has_classes else 2)
            embedded.append(self.y_embedder(given[:, None] if shared else given))  # (B, R, D)
        return embedded

    def _frame_layout(
        self, x: torch.Tensor, length: int, num_images: int, use_temporal: bool, shared: SharedClip | None
    ) -> FrameLayout:
        """Layout of T (`length`) frames, the last `num_images` of which are images; tokens `x` are those here."""
        num_video = length - num_images
        rows = None
        if num_images and self.y_embedder is not None:
            rows = torch.arange(1 - num_video, num_images + 1, device=x.device).clamp(min=0)  # 0 ... 0 1 ... I
            rows = own_frames(rows, shared, axis=0)
        if not use_temporal:
            return FrameLayout(0, None, rows, shared)
        rotation = None
        if self.config["temporal_position"] == "rope":
            heads = self.config["num_heads"] // (2 if self.config["variant"] == 4 else 1)
            head_size = self.config["hidden_size"] // heads
            rotation = rotary_positions(self._positions(num_video), head_size).to(x.device)
        return FrameLayout(num_video, rotation, rows, shared)

    def _positions(self, num_video: int) -> np.ndarray:
        """Positions in time of the video's frames, float64 (V,)."""
        return frame_positions(num_video, trained_range(self.config)[0] // self.tube_size)

    def _temporal_embedding(self, num_frames: int, num_video: int) -> torch.Tensor:
        """Absolute positions of the video's frames, zero for images: (1, T, 1, D)."""
        table = self.temp_embed[:, :num_video]
        if num_video > self.temp_embed.shape[1]:
            table = temporal_positions(self._positions(num_video), self.config["hidden_size"]).to(table.device)
        return F.pad(table, (0, 0, 0, num_frames - num_video))[:, :, None]

    def _condition_tokens(self, embedded: list[torch.Tensor], num_frames: int, frames: FrameLayout) -> torch.Tensor:
        """Repeats timestep and label, (B, 1 or R, D) each, as tokens of every frame, (B, T, K, D)."""
        tokens = []
        for condition in embedded:
            if frames.condition_rows is not None and condition.shape[1] > 1:
                tokens.append(condition[:, frames.condition_rows])
            else:
                tokens.append(condition.expand(-1, num_frames, -1))
        return torch.stack(tokens, dim=2)

    def unpatchify(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Turns patches (B, T, N, P P c) in rows and columns, `grid`, into frames (B, T, c, H, W)."""
        p = self.config["patch_size"]
        x = patches.unflatten(-1, (p, p, -1))  # (B, T, N, P, P, c)
        x = x.unflatten(2, grid)  # (B, T, h, w, P, P, c)
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # (B, T, c, h, P, w, P)
        return x.flatten(-2).flatten(-3, -2)  # (B, T, c, H, W)
