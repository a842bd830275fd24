"""Transformer blocks (Sec. 3.2, 3.4, A.2): what mixes along space and time, and how the condition enters.

Legend: B batch, F frames (tokens in time), N tokens a frame, D width, h heads, d = D / h, R conditions a sample: 1,
or 1 + I where I images with labels of their own follow the video. Tokens are always (B, F, N, D): linear layers
don't care about the order of tokens, so only attention looks along an axis. The first V of the F frames are the
video's; the others are images, which nothing temporal may touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from lavita.models.embeddings import rotate

# What a block's attention mixes: a frame's tokens; a place's tokens over time; the one, then the other, in two
# attentions; or both at once, half of the heads each.
Mixing = Literal["space", "time", "space_then_time", "space_and_time"]
Conditioning = Literal["s_adaln", "all_tokens"]
Vectors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Frames:
    """What the blocks know about the frames of a batch."""

    num_video: int
    """V: the first frames, which temporal modules see; 0 runs the model without them (A.4)."""
    rotation: torch.Tensor | None = None
    """Rotary positions of the V frames, (2, V, d/2)."""
    condition_rows: torch.Tensor | None = None
    """int64 (F,): which of the R conditions a frame has; None where all have the only one."""


# Below this many tokens the plain product beats the fused kernel on a CPU, most of all in its backward pass
# (docs/design.md has the measurement).
PLAIN_ATTENTION_TOKENS = 128


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over the last two axes (..., tokens, d), by the device's best kernel."""
    if query.device.type == "cpu" and query.shape[-2] <= PLAIN_ATTENTION_TOKENS:
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (..., tokens, tokens)
        return weights.softmax(dim=-1).to(value.dtype) @ value
    # The fused kernels take four axes; given five, the slow one would run.
    mixed = F.scaled_dot_product_attention(query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4))
    return mixed.unflatten(0, query.shape[:-3])


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention along space, time, or, with half of the heads each, both.

    The mixin is how diffusers' step caches recognise it; it has no processors.
    """

    processor = None
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """`num_heads` divides `hidden_size`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: torch.Tensor, mixing: Literal["space", "time", "space_and_time"], frames: Frames
    ) -> torch.Tensor:
        """Tokens (B, F, N, D) to (B, F, N, D).

        Each attends to its frame (`space`), to its place in the other frames (`time`; all must be the video's), or to
        its frame by the first half of the heads and to its place by the second. The heads' outputs go through one
        linear layer, which adds up what the two halves bring (Sec. 3.2, Variant 4); to an image the second half
        brings nothing.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, F, N, 3, h, d)
        if mixing == "space":
            mixed = attend_in_space(qkv)
        elif mixing == "time":
            mixed = attend_in_time(qkv, frames.rotation)
        else:
            half, video = self.num_heads // 2, frames.num_video
            parts = [attend_in_space(qkv[..., :half, :])]  # (B, F, N, h/2, d)
            if video:
                in_time = attend_in_time(qkv[:, :video, ..., half:, :], frames.rotation)  # (B, V, N, h/2, d)
                parts.append(F.pad(in_time, (0, 0) * 3 + (0, x.shape[1] - video)))  # (B, F, N, h/2, d)
            else:
                parts.append(torch.zeros_like(parts[0]))
            mixed = torch.cat(parts, dim=3)
        return self.proj(mixed.flatten(-2))


def attend_in_space(qkv: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values (B, F, N, 3, h, d) to (B, F, N, h, d): each token attends to its frame."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, F, h, N, d)
    return dot_product_attention(query, key, value).transpose(2, 3)


def attend_in_time(qkv: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Queries, keys and values (B, F, N, 3, h, d) to (B, F, N, h, d): each token attends to its place."""
    query, key, value = qkv.permute(3, 0, 2, 4, 1, 5)  # each (B, N, h, F, d)
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    return dot_product_attention(query, key, value).permute(0, 3, 1, 2, 4)


class Mlp(nn.Module):
    """Two linear layers with a tanh GELU between."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        """The hidden layer is `mlp_ratio` times as wide."""
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(gelu_tanh(self.fc1(x)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016).

    Compiled float32 takes the same function as `x sigmoid(2 u)` for `x (1 + tanh u) / 2`: a CPU's vector code has an
    exponential that is three times as fast as its hyperbolic tangent. Compiled bf16 keeps the form that frozen weights
    let oneDNN fuse into the product.
    """
    if torch.compiler.is_compiling() and x.dtype == torch.float32:
        return x * torch.sigmoid(x * (2 * math.sqrt(2 / math.pi)) * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


def modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """SiLU, then the linear layer that gives S-AdaLN's vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_vectors * hidden_size))


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift: the norm has no weights of its own, eps 1e-6."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, normed.to(shift.dtype), 1 + scale)


class TransformerBlock(nn.Module):
    """The vanilla block (A.2): attention, or two, then an MLP, each after a LayerNorm and beside a residual path.

    With S-AdaLN, in adaLN-Zero form, each f of them adds `gate * f(LayerNorm(x) (1 + scale) + shift)` to x; the two
    attentions of Variant 3 share their three vectors, as its parameter count in Table 3 says. With all tokens, the
    condition is among the tokens, and each adds `f(LayerNorm(x))`, the norm with weights of its own.

    With `gradient_checkpointing`, which `LavitaTransformer3DModel.enable_gradient_checkpointing` sets, autograd keeps
    its input only, and the backward pass computes the rest again (Chen et al. 2016). With `compiled` it runs as
    `compiled_mix` says.
    """

    # What is checkpointed is inside the block's own call: FSDP's hooks, which gather the block's weights, are outside.
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, mixing: Mixing, conditioning: Conditioning = "s_adaln"
    ) -> None:
        """`mixing` is what its attention looks along; `space_and_time` needs an even `num_heads`."""
        super().__init__()
        self.gradient_checkpointing = False
        self.compiled = False
        self.mixing: Mixing = mixing
        self.attn = Attention(hidden_size, num_heads)
        self.temporal_attn = Attention(hidden_size, num_heads) if mixing == "space_then_time" else None
        self.mlp = Mlp(hidden_size, mlp_ratio)
        plain = conditioning == "all_tokens"
        self.adaLN_modulation = None if plain else modulation(hidden_size, 6)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6) if plain else None
        self.norm_temporal = nn.LayerNorm(hidden_size, eps=1e-6) if plain and self.temporal_attn else None
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6) if plain else None

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: Frames, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, F, N, D) to tokens (B, F, N, D).

        Args:
            x: the tokens.
            condition: for S-AdaLN, (B, R, 1, D).
            frames: which of them are the video's.
            vectors: what `adaLN_modulation` makes of `condition`, (B, R, 1, 6 D), where that is known already; then
                `condition` is not looked at.
        """
        mix = compiled_mix() if self.compiled else TransformerBlock._mix
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(mix, self, x, condition, frames, vectors)
        return mix(self, x, condition, frames, vectors)

    def _mix(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: Frames, vectors: torch.Tensor | None
    ) -> torch.Tensor:
        if self.adaLN_modulation is not None and vectors is None:
            assert condition is not None
            # Nothing temporal happens to images, so their conditions are not needed there.
            vectors = self.adaLN_modulation(condition[:, :1] if self.mixing == "time" else condition)
        if self.mixing == "time":
            moving, still = x[:, : frames.num_video], x[:, frames.num_video :]
            if moving.shape[1]:
                attn_vectors, mlp_vectors = split_vectors(vectors, None)
                moving = residual(moving, self.norm1, attn_vectors, lambda y: self.attn(y, "time", frames))
                moving = residual(moving, self.norm2, mlp_vectors, self.mlp)
            return join(moving, still)
        attn_vectors, mlp_vectors = split_vectors(vectors, frames.condition_rows)
        mixing: Literal["space", "space_and_time"] = "space_and_time" if self.mixing == "space_and_time" else "space"
        x = residual(x, self.norm1, attn_vectors, lambda y: self.attn(y, mixing, frames))
        if self.temporal_attn is not None and frames.num_video:
            moving, still = x[:, : frames.num_video], x[:, frames.num_video :]
            attend, first = self.temporal_attn, attn_vectors and tuple(vector[:, :1] for vector in attn_vectors)
            moving = residual(moving, self.norm_temporal, first, lambda y: attend(y, "time", frames))
            x = join(moving, still)
        return residual(x, self.norm2, mlp_vectors, self.mlp)


@cache
def compiled_mix() -> Callable[..., torch.Tensor]:
    """The compiled body of all blocks: those that are alike share a graph for each shape.

    Without inductor's pattern matcher, which would turn a plain attention back into the fused kernel, whose backward
    pass is slow on CPUs.
    """
    mix: Callable[..., torch.Tensor] = torch.compile(
        TransformerBlock._mix, fullgraph=True, dynamic=False, options={"pattern_matcher": False}
    )
    return mix


def split_vectors(vectors: torch.Tensor | None, rows: torch.Tensor | None) -> tuple[Vectors | None, ...]:
    """Shift, scale and gate of the attention, and those of the MLP, each (B, 1 or F, 1, D), from (B, R, 1, 6 D).

    `rows` says which of the R a frame has; without it all have the first.
    """
    if vectors is None:
        return None, None
    six = vectors[:, :1] if rows is None else vectors[:, rows]
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six.chunk(6, dim=-1)
    return (shift_attn, scale_attn, gate_attn), (shift_mlp, scale_mlp, gate_mlp)


def residual(
    x: torch.Tensor, norm: nn.LayerNorm | None, vectors: Vectors | None, layer: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`x + gate * layer(norm(x) (1 + scale) + shift)` with S-AdaLN's vectors, else `x + layer(norm(x))`."""
    if vectors is None:
        assert norm is not None
        return x + layer(norm(x))
    shift, scale, gate = vectors
    return torch.addcmul(x, gate, layer(modulated_norm(x, shift, scale)))


def join(video: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The frames of a video, then the images; no copy where there is only the one or the other."""
    if not images.shape[1]:
        return video
    return torch.cat([video, images], dim=1) if video.shape[1] else images


class FinalLayer(nn.Module):
    """The linear decoder (Sec. 3.2): tokens to patches, behind one more norm."""

    def __init__(self, hidden_size: int, patch_values: int, conditioning: Conditioning = "s_adaln") -> None:
        """Each token becomes `patch_values` numbers."""
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation: nn.Sequential | None = None
        if conditioning == "s_adaln":
            self.adaLN_modulation = modulation(hidden_size, 2)
        else:
            self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: Frames, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, F, N, D) to patches (B, F, N, values); `vectors`, (B, R, 1, 2 D), as a block's."""
        if self.adaLN_modulation is None:
            return self.linear(self.norm(x))
        both = self.adaLN_modulation(condition) if vectors is None else vectors
        shift, scale = (both if frames.condition_rows is None else both[:, frames.condition_rows]).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))
