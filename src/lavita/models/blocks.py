"""Transformer blocks with S-AdaLN (Sec. 3.4, Fig. 7), spatial and temporal.

Legend: B batch, F frames, N tokens a frame, D width, h heads, d = D / h. Tokens are always (B, F, N, D):
linear layers don't care about the order of tokens, so only attention looks along an axis. S-AdaLN's vectors
are (B, 1 or F, 1, D): computed once a sample and broadcast over its tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Axis = Literal["space", "time"]

# Below this many tokens the plain product beats the fused kernel on a CPU, most of all in its backward pass
# (docs/design.md has the measurement).
PLAIN_ATTENTION_TOKENS = 128


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over the last two axes (..., tokens, d), by the device's best kernel."""
    if query.device.type == "cpu" and query.shape[-2] <= PLAIN_ATTENTION_TOKENS:
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (..., tokens, tokens)
        return weights.softmax(dim=-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention along one axis of a clip."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """`num_heads` divides `hidden_size`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Tokens (B, F, N, D) to (B, F, N, D): each attends to its frame (`space`) or its place (`time`)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, F, N, 3, h, d)
        if axis == "space":
            query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, F, h, N, d)
            mixed = dot_product_attention(query, key, value).transpose(2, 3)  # (B, F, N, h, d)
        else:
            query, key, value = qkv.permute(3, 0, 2, 4, 1, 5)  # each (B, N, h, F, d)
            mixed = dot_product_attention(query, key, value).permute(0, 3, 1, 2, 4)  # (B, F, N, h, d)
        return self.proj(mixed.flatten(-2))


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
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """SiLU, then the linear layer that gives S-AdaLN's vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_vectors * hidden_size))


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift: the norm has no weights of its own, eps 1e-6."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, normed.to(shift.dtype), 1 + scale)


class TransformerBlock(nn.Module):
    """The vanilla block (A.2) in adaLN-Zero form, for f attention, then f MLP.

    Each adds `gate * f(LayerNorm(x) (1 + scale) + shift)` to x.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, axis: Axis) -> None:
        """`axis` is what its attention looks along."""
        super().__init__()
        self.axis: Axis = axis
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens (B, F, N, D) and their condition (B, 1 or F, 1, D) to tokens (B, F, N, D)."""
        vectors = self.adaLN_modulation(condition).chunk(6, dim=-1)  # six of (B, 1 or F, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        x = torch.addcmul(x, gate_attn, self.attn(modulated_norm(x, shift_attn, scale_attn), self.axis))
        return torch.addcmul(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """The linear decoder (Sec. 3.2): tokens to patches, behind one more modulated norm."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        """Each token becomes `patch_size` squared pixels of `out_channels`."""
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens (B, F, N, D) to patches (B, F, N, P P C_out)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))
