"""Transformer blocks (Sec. 3.2, 3.4, A.2): attention in space and time, MLPs, and how the condition enters.

Legend: B batch, F frames (tokens in time), V frames of the video, I = F - V images after it, N tokens per frame,
D width, h heads, d = D / h, R conditions per sample: 1, or 1 + I if each image has its own.

Tokens are always (B, F, N, D): linear layers ignore the order of tokens, so only attention needs to know an axis.
Temporal layers must not touch the images.
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

from lavita.models.cross_attention import CrossAttention, Words
from lavita.models.embeddings import rotate
from lavita.models.sequence_parallel import SharedClip

# The tokens that a block's attention mixes: those of one frame; those at one place of all frames; or both, in two
# attentions, one after the other or side by side.
Mixing = Literal["space", "time", "space_then_time", "space_and_time"]
Conditioning = Literal["s_adaln", "all_tokens"]
Vectors = tuple[torch.Tensor, ...]

# Up to this many tokens, on a CPU, plain matrix products are faster than the fused kernel, above all in the backward
# pass (docs/design.md has the measurement).
PLAIN_ATTENTION_TOKENS = 128


@dataclass(frozen=True)
class FrameLayout:
    """How the frames of a batch divide into video and images, and which positions and conditions they have."""

    num_video: int
    """V, the leading frames that temporal layers mix; 0 leaves these layers out (A.4)."""
    rotation: torch.Tensor | None = None
    """Rotary positions of the V frames, (2, V, d/2); None without rotary positions."""
    condition_rows: torch.Tensor | None = None
    """Index of each frame's condition among the R, int64 (F,); None if R is 1."""
    shared: SharedClip | None = None
    """The clip, if several processes share it: blocks that attend in time only then have all frames, others have this
    process's frames, and so has `condition_rows`."""
    words: Words | None = None
    """The tokens of the texts, for blocks with `cross_attn`."""


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes softmax(q k^T / sqrt(d)) v over the last two axes (..., tokens, d), by the device's fastest kernel."""
    if query.device.type == "cpu" and query.shape[-2] <= PLAIN_ATTENTION_TOKENS:
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (..., tokens, tokens)
        return weights.softmax(dim=-1).to(value.dtype) @ value
    # With five axes torch would choose a slow kernel; the fused ones take four.
    mixed = F.scaled_dot_product_attention(query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4))
    return mixed.unflatten(0, query.shape[:-3])


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention in space or in time.

    The mixin marks it as an attention for diffusers' step caches; it has no processors.
    """

    processor = None  # type: ignore[assignment]
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """`num_heads` divides `hidden_size`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, mixing: Literal["space", "time"], frames: FrameLayout) -> torch.Tensor:
        """Tokens (B, F, N, D) to tokens (B, F, N, D).

        A token attends to the tokens of its frame (`space`), or to those at its place in the other frames (`time`; all
        frames must be the video's).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, F, N, 3, h, d)
        mixed = attend_in_space(qkv) if mixing == "space" else attend_in_time(qkv, frames.rotation)
        return self.proj(mixed.flatten(-2))


def attend_in_space(qkv: torch.Tensor) -> torch.Tensor:
    """Attention within each frame: queries, keys and values (B, F, N, 3, h, d) to (B, F, N, h, d)."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, F, h, N, d)
    return dot_product_attention(query, key, value).transpose(2, 3)


def attend_in_time(qkv: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Attention over time at each place: queries, keys and values (B, F, N, 3, h, d) to (B, F, N, h, d)."""
    query, key, value = qkv.permute(3, 0, 2, 4, 1, 5)  # each (B, N, h, F, d)
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    return dot_product_attention(query, key, value).permute(0, 3, 1, 2, 4)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        """The hidden layer is `mlp_ratio` times as wide."""
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., D) to tokens (..., D)."""
        return self.fc2(gelu_tanh(self.fc1(x)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016).

    Compiled float32 computes `x (1 + tanh u) / 2` as the equal `x sigmoid(2 u)`: vectorised on a CPU, the exponential
    is three times as fast as the hyperbolic tangent. Compiled bf16 keeps torch's operator, which oneDNN fuses into the
    matrix product before it if the weights are frozen.
    """
    if torch.compiler.is_compiling() and x.dtype == torch.float32:
        return x * torch.sigmoid(x * (2 * math.sqrt(2 / math.pi)) * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


def modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """SiLU, then the linear layer that computes S-AdaLN's vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_vectors * hidden_size))


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift, where the norm has no weights of its own; eps 1e-6."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, normed.to(shift.dtype), 1 + scale)


class TransformerBlock(nn.Module):
    """The vanilla block (A.2): one or two attentions, then an MLP, each after a LayerNorm and with a residual path.

    With S-AdaLN, in its adaLN-Zero form, each layer f adds `gate * f(LayerNorm(x) (1 + scale) + shift)` to x; the two
    attentions of Variant 3 share their three vectors, as its parameter count in Table 3 implies. The two of Variant 4
    have one norm, too, and half of the heads each, twice as wide: their outputs are added, so that together they are
    one layer f. With all tokens, the condition is among the tokens, and each layer adds `f(LayerNorm(x))`, where the
    norm has weights of its own. With `cross_attn`, set by `cross_attention.add_cross_attention`, the tokens attend to
    those of the text after they attended to each other in space.

    With `gradient_checkpointing`, set by `LavitaTransformer3DModel.enable_gradient_checkpointing`, autograd keeps only
    the block's input, and the backward pass computes the rest again (Chen et al. 2016). With `compiled`, the block runs
    as `compiled_mix`.
    """

    # Checkpointing happens inside the block's call, so that FSDP's hooks, which gather its weights, stay outside.
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, mixing: Mixing, conditioning: Conditioning = "s_adaln"
    ) -> None:
        """Builds a block; `space_and_time` needs an even `num_heads`, of which each attention gets half."""
        super().__init__()
        self.gradient_checkpointing = False
        self.compiled = False
        self.mixing: Mixing = mixing
        heads = num_heads // 2 if mixing == "space_and_time" else num_heads
        self.attn = Attention(hidden_size, heads)
        self.cross_attn: CrossAttention | None = None
        self.temporal_attn = Attention(hidden_size, heads) if mixing in ("space_then_time", "space_and_time") else None
        self.mlp = Mlp(hidden_size, mlp_ratio)
        plain = conditioning == "all_tokens"
        self.adaLN_modulation = None if plain else modulation(hidden_size, 6)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6) if plain else None
        own_norm = plain and mixing == "space_then_time"
        self.norm_temporal = nn.LayerNorm(hidden_size, eps=1e-6) if own_norm else None
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6) if plain else None

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: FrameLayout, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, F, N, D) to tokens (B, F, N, D).

        Args:
            x: the tokens.
            condition: with S-AdaLN, (B, R, 1, D).
            frames: layout of the F frames.
            vectors: the output of `adaLN_modulation` for `condition`, (B, R, 1, 6 D), if it is known already; then
                `condition` is ignored.
        """
        mix = compiled_mix() if self.compiled else TransformerBlock._mix
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(mix, self, x, condition, frames, vectors)
        return mix(self, x, condition, frames, vectors)

    def _mix(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: FrameLayout, vectors: torch.Tensor | None
    ) -> torch.Tensor:
        if self.adaLN_modulation is not None and vectors is None:
            assert condition is not None
            # A temporal block leaves images as they are, so it needs no conditions of theirs.
            vectors = self.adaLN_modulation(condition[:, :1] if self.mixing == "time" else condition)
        if self.mixing == "time":
            moving, still = x[:, : frames.num_video], x[:, frames.num_video :]
            if moving.shape[1]:
                attn_vectors, mlp_vectors = split_vectors(vectors, None)
                moving = residual(moving, self.norm1, attn_vectors, lambda y: self.attn(y, "time", frames))
                moving = residual(moving, self.norm2, mlp_vectors, self.mlp)
            return join(moving, still)
        attn_vectors, mlp_vectors = split_vectors(vectors, frames.condition_rows)
        x = residual(x, self.norm1, attn_vectors, lambda y: self._attend(y, frames))
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, frames.words, frames.condition_rows)
        if self.mixing == "space_then_time" and frames.num_video:
            assert self.temporal_attn is not None
            attend, shared = self.temporal_attn, frames.shared
            if shared is not None:
                x = residual(
                    x,
                    self.norm_temporal,
                    attn_vectors,
                    lambda y: shared.attend_in_time(lambda z: attend(z, "time", frames), y, frames.num_video),
                )
            else:
                moving, still = x[:, : frames.num_video], x[:, frames.num_video :]
                first = attn_vectors and tuple(vector[:, :1] for vector in attn_vectors)
                moving = residual(moving, self.norm_temporal, first, lambda y: attend(y, "time", frames))
                x = join(moving, still)
        return residual(x, self.norm2, mlp_vectors, self.mlp)

    def _attend(self, x: torch.Tensor, frames: FrameLayout) -> torch.Tensor:
        """Attention in space; of Variant 4 in time, too, whose output is added to that of the video's frames."""
        mixed = self.attn(x, "space", frames)
        if self.mixing != "space_and_time" or not frames.num_video:
            return mixed
        assert self.temporal_attn is not None
        if frames.shared is not None:
            attend = self.temporal_attn
            return mixed + frames.shared.attend_in_time(lambda y: attend(y, "time", frames), x, frames.num_video)
        moving, still = mixed[:, : frames.num_video], mixed[:, frames.num_video :]
        return join(moving + self.temporal_attn(x[:, : frames.num_video], "time", frames), still)


@cache
def compiled_mix() -> Callable[..., torch.Tensor]:
    """Compiles the body of the blocks: blocks that are alike share a graph per shape.

    Inductor's pattern matcher is off: it would turn a plain attention back into the fused kernel, whose backward pass
    is slow on CPUs.
    """
    mix: Callable[..., torch.Tensor] = torch.compile(
        TransformerBlock._mix, fullgraph=True, dynamic=False, options={"pattern_matcher": False}
    )
    return mix


def split_vectors(vectors: torch.Tensor | None, rows: torch.Tensor | None) -> tuple[Vectors | None, ...]:
    """Splits S-AdaLN's vectors (B, R, 1, 6 D) into shift, scale and gate, (B, 1 or F, 1, D), of attention and MLP.

    `rows` is the index of each frame's condition among the R, (F,); without it all frames have the first.
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
    """Concatenates the frames of a video and the images; without one of the two, no copy is made."""
    if not images.shape[1]:
        return video
    return torch.cat([video, images], dim=1) if video.shape[1] else images


class FinalLayer(nn.Module):
    """The linear decoder (Sec. 3.2), after one more norm: tokens to patches."""

    def __init__(self, hidden_size: int, patch_values: int, conditioning: Conditioning = "s_adaln") -> None:
        """Builds a decoder of each token to `patch_values` numbers."""
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation: nn.Sequential | None = None
        if conditioning == "s_adaln":
            self.adaLN_modulation = modulation(hidden_size, 2)
        else:
            self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None, frames: FrameLayout, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, F, N, D) to patches (B, F, N, patch_values); arguments as a block's, `vectors` (B, R, 1, 2 D)."""
        if self.adaLN_modulation is None:
            return self.linear(self.norm(x))
        both = self.adaLN_modulation(condition) if vectors is None else vectors
        shift, scale = (both if frames.condition_rows is None else both[:, frames.condition_rows]).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))
