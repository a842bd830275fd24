"""Cross-attention from the tokens of a clip to the tokens of its text (Rombach et al. 2022, Sec. 3.3).

A text is one tensor, (1 + L, text_dim): its pooled embedding, the states of its tokens, and rows of zeros up to the
model's `text_tokens`, which are padding. The pooled embedding enters as in a model without these tokens.

Legend: B batch, F frames, N tokens per frame, D width, h heads, d = D / h, L tokens of a text, R texts per sample: 1,
or 1 + I if each of the I images after a video has its own, M queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST_TEXT_TOKENS, MOST_TEXT_TOKENS = 4, 4096
"""A text of fewer tokens would be hardly more than the special ones at its ends; no encoder comes near the most."""
# Up to this many keys, on a CPU, plain products are faster than the fused kernel, as in self-attention.
PLAIN_TEXT_TOKENS = 128


@dataclass(frozen=True)
class Words:
    """The tokens of the texts of a batch, as blocks see them."""

    tokens: torch.Tensor
    """(B, R, L, D)."""
    mask: torch.Tensor
    """bool (B, R, L), false for padding."""


def check_text_tokens(config: Mapping[str, Any]) -> None:
    """Checks the field `text_tokens` of the transformer.

    Raises:
        ValueError: if it is out of range, or the model has no texts.
    """
    count = config["text_tokens"]
    if count is None:
        return
    if not LEAST_TEXT_TOKENS <= count <= MOST_TEXT_TOKENS:
        raise ValueError(f"text_tokens is {count}, but must be in {LEAST_TEXT_TOKENS}..{MOST_TEXT_TOKENS}")
    if not config["text_dim"]:
        raise ValueError(f"text_tokens is {count}, but this model has no texts: text_dim is 0")


def text_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a text as a model takes it: (text_dim,), or (1 + L, text_dim) if it attends to tokens."""
    count = config.get("text_tokens")
    return (config["text_dim"],) if count is None else (1 + count, config["text_dim"])


def pooled_part(config: Mapping[str, Any], text_embeds: torch.Tensor | None) -> torch.Tensor | None:
    """The pooled embeddings (..., text_dim) among texts (..., text_dim) or (..., 1 + L, text_dim)."""
    return text_embeds if text_embeds is None or config["text_tokens"] is None else text_embeds[..., 0, :]


class WordEmbedder(nn.Module):
    """The states of a text's tokens, each normalised, through a linear layer."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        """Embeds `text_dim` numbers in `hidden_size`."""
        super().__init__()
        self.proj = nn.Linear(text_dim, hidden_size)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, text_embeds: torch.Tensor) -> Words:
        """Texts (B, 1 + L, text_dim), or (B, R, 1 + L, text_dim), to the words that blocks attend to."""
        states = (text_embeds[:, None] if text_embeds.ndim == 3 else text_embeds)[:, :, 1:]  # (B, R, L, text_dim)
        normed = F.layer_norm(states.float(), (states.shape[-1],))  # the scales of encoders differ, as in TextEmbedder
        return Words(self.proj(normed.to(self.proj.weight.dtype)), (states != 0).any(-1))


class CrossAttention(nn.Module):
    """Multi-head attention from a clip's tokens, after a norm of its own, to those of its text.

    At initialisation its output is exactly zero, so that it changes nothing in a model that it is added to.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """`num_heads` divides `hidden_size`."""
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        for layer in (self.q, self.kv):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor, words: Words | None, rows: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B, F, N, D) to what is added to them, (B, F, N, D).

        Args:
            x: the tokens.
            words: the texts.
            rows: index of each frame's text among the R, int64 (F,); without it all frames have the first.
        """
        assert words is not None, "the model gives its words to every block"
        query = self.q(F.layer_norm(x, (x.shape[-1],), eps=1e-6)).unflatten(-1, (self.num_heads, -1))  # (B, F, N, h, d)
        key, value = self.kv(words.tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(3)  # each (B, R, L, h, d)
        mask = words.mask
        if rows is None:
            mixed = masked_attention(query.flatten(1, 2)[:, None], key[:, :1], value[:, :1], mask[:, :1])
        else:
            mixed = masked_attention(query, key[:, rows], value[:, rows], mask[:, rows])
        return self.proj(mixed.reshape(x.shape))


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Computes softmax(q k^T / sqrt(d)) v over the keys that are no padding.

    Args:
        query: (B, R, M, h, d).
        key: (B, R, L, h, d).
        value: like `key`.
        mask: bool (B, R, L), true for at least one key.

    Returns:
        (B, R, M, h, d).
    """
    query, key, value = (tensor.transpose(2, 3) for tensor in (query, key, value))  # (B, R, h, M or L, d)
    seen = mask[:, :, None, None]  # (B, R, 1, 1, L)
    if query.device.type == "cpu" and key.shape[-2] <= PLAIN_TEXT_TOKENS:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, R, h, M, L)
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(value.dtype) @ value
    else:
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))  # the fused kernels take four axes
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen.flatten(0, 1))
        mixed = mixed.unflatten(0, mask.shape[:2])
    return mixed.transpose(2, 3)


def add_cross_attention(blocks: Iterable[nn.Module], hidden_size: int, num_heads: int) -> None:
    """Gives the blocks of a model of `text_tokens` their attention to texts: all those that attend in space.

    These are all blocks of Variants 3 and 4, and the spatial ones of Variants 1 and 2. What a text says holds for every
    frame, and images, which have texts of their own, pass the spatial blocks only; each token knows its place in time
    from where the positions in time are added, so that blocks can place a movement in it.

    Args:
        blocks: the model's `TransformerBlock`s; changed in place.
        hidden_size: D.
        num_heads: h.
    """
    for block in blocks:
        if block.mixing != "time":
            block.cross_attn = CrossAttention(hidden_size, num_heads)
