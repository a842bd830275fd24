"""Blocks and attention, against diffusers' and torch's, and which tokens reach which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from diffusers.models.attention import BasicTransformerBlock
from models.reference import assert_near, masked_attention
from torch import nn

from lavita.models.blocks import (
    PLAIN_ATTENTION_TOKENS,
    Attention,
    FrameLayout,
    Mixing,
    TransformerBlock,
    dot_product_attention,
)
from lavita.models.embeddings import rotary_positions

# ---- against other libraries


@pytest.mark.parametrize("mixing", ["space", "time"])
def test_a_block_equals_dits_in_diffusers(mixing: Mixing) -> None:
    class Condition(nn.Module):
        def forward(self, *_: Any, **__: Any) -> torch.Tensor:
            return rows

    width, heads = 32, 4
    torch.manual_seed(0)
    block: Any = TransformerBlock(width, heads, 4.0, mixing)
    theirs: Any = BasicTransformerBlock(
        width,
        heads,
        width // heads,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        attention_bias=True,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    theirs.norm1.emb = Condition()
    for mine, other in (
        (block.adaLN_modulation[1], theirs.norm1.linear),
        (block.attn.proj, theirs.attn1.to_out[0]),
        (block.mlp.fc1, theirs.ff.net[0].proj),
        (block.mlp.fc2, theirs.ff.net[2]),
    ):
        other.load_state_dict(mine.state_dict())
    with torch.no_grad():
        for index, other in enumerate((theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)):
            other.weight.copy_(block.attn.qkv.weight[index * width : (index + 1) * width])
            other.bias.copy_(block.attn.qkv.bias[index * width : (index + 1) * width])

        x, condition = torch.randn(2, 3, 5, width), torch.randn(2, width)
        output = block(x, condition[:, None, None], FrameLayout(3))
        if mixing == "space":
            rows = condition.repeat_interleave(3, dim=0)
            expected = theirs(x.reshape(6, 5, width)).reshape(2, 3, 5, width)
        else:
            rows = condition.repeat_interleave(5, dim=0)
            moved = x.transpose(1, 2).reshape(10, 3, width)
            expected = theirs(moved).reshape(2, 5, 3, width).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixing", ["space", "time"])
def test_a_plain_block_equals_torchs(mixing: Mixing) -> None:
    width, heads = 32, 4
    torch.manual_seed(0)
    block: Any = TransformerBlock(width, heads, 4.0, mixing, "all_tokens")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = nn.TransformerEncoderLayer(
        width,
        heads,
        dim_feedforward=4 * width,
        dropout=0.0,
        activation=nn.GELU(approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        for mine, other in (
            (block.attn.proj, theirs.self_attn.out_proj),
            (block.mlp.fc1, theirs.linear1),
            (block.mlp.fc2, theirs.linear2),
            (block.norm1, theirs.norm1),
            (block.norm2, theirs.norm2),
        ):
            other.load_state_dict(mine.state_dict())
        x = torch.randn(2, 3, 5, width)
        output = block(x, None, FrameLayout(3))
        if mixing == "space":
            expected = theirs(x.flatten(0, 1)).unflatten(0, (2, 3))
        else:
            expected = theirs(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, PLAIN_ATTENTION_TOKENS, PLAIN_ATTENTION_TOKENS + 1])
def test_attention_equals_the_fused_kernel(tokens: int) -> None:
    torch.manual_seed(0)
    inputs = query, key, value = torch.randn(3, 2, 3, 2, tokens, 8).requires_grad_().unbind()
    output = dot_product_attention(query, key, value)
    expected = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(output.shape)
    for mine, theirs in zip(
        torch.autograd.grad((output * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


# ---- which tokens reach which


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("changed_frame", [1, 2])
@pytest.mark.parametrize("num_video", [0, 2, 3])
@pytest.mark.parametrize("mixing", ["space", "time", "space_then_time", "space_and_time"])
def test_what_a_token_reaches(mixing: Mixing, num_video: int, changed_frame: int, conditioning: Any) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(32, 2, 4.0, mixing, conditioning)
    condition = torch.randn(1, 1, 1, 32)
    x = torch.randn(1, 3, 5, 32)
    other = x.clone()
    other[:, changed_frame, 2] += torch.randn(32)
    with torch.no_grad():
        frames = FrameLayout(num_video)
        changed = (block(x, condition, frames) != block(other, condition, frames)).any(dim=-1)[0]

    video = list(range(num_video)) if changed_frame < num_video else []
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[changed_frame, 2] = True
    if mixing != "time":
        expected[changed_frame, :] = True
    if mixing == "space_then_time":
        expected[video, :] = True
    if mixing in ("time", "space_and_time"):
        expected[video, 2] = True
    assert torch.equal(changed, expected)


def test_an_image_passes_a_temporal_block_untouched() -> None:
    block = TransformerBlock(32, 2, 4.0, "time")
    x = torch.randn(1, 3, 5, 32)
    output = block(x, torch.randn(1, 1, 1, 32), FrameLayout(2))
    assert torch.equal(output[:, 2:], x[:, 2:])
    assert not torch.equal(output[:, :2], x[:, :2])


@pytest.mark.parametrize(("variant", "first_temporal"), [(1, 2), (2, 1), (3, 0), (4, 0)])
@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
def test_frames_mix_in_temporal_blocks_only(
    conditioning: str, variant: int, first_temporal: int, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=variant, conditioning=conditioning, num_blocks=4, num_frames=3)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    torch.manual_seed(0)
    latents = torch.randn(1, 3, 4, 8, 8)
    other = latents.clone()
    other[:, 1] += 1
    with torch.no_grad():
        model(latents, torch.tensor([5]))
        model(other, torch.tensor([5]))
    for index in range(4):
        changed = (seen[index] != seen[4 + index]).flatten(2).any(dim=2)[0].tolist()
        assert changed == ([False, True, False] if index < first_temporal else [True, True, True]), index


# ---- attention


def random_attention(heads: int = 4) -> Attention:
    torch.manual_seed(0)
    attention = Attention(32, heads)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    return attention.requires_grad_(False)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("mixing", "num_video"), [("space", 4), ("space", 2), ("time", 4)])
def test_factorised_attention_is_masked_full_attention(mixing: Any, num_video: int, rope: bool) -> None:
    attention = random_attention()
    x = torch.randn(2, 4, 5, 32)
    rotation = rotary_positions(np.arange(num_video), 8) if rope else None
    output = attention(x, mixing, FrameLayout(num_video, rotation))
    assert_near(output, masked_attention(attention, x, mixing, num_video, rope))


def test_rotary_attention_depends_on_relative_positions_only() -> None:
    attention = random_attention()
    x = torch.randn(2, 5, 3, 32)
    positions = np.arange(5.0)

    def at(positions: np.ndarray) -> torch.Tensor:
        return attention(x, "time", FrameLayout(5, rotary_positions(positions, 8)))

    output = at(positions)
    for shift in (-4, 0.25, 100):
        assert_near(at(positions + shift), output)
    for other in (positions[::-1], positions[[1, 0, 2, 3, 4]], 2 * positions):
        assert (at(other) - output).abs().max() > 1e-2


def test_without_positions_temporal_attention_knows_no_order() -> None:
    attention = random_attention()
    x = torch.randn(2, 5, 3, 32)
    assert_near(attention(x.flip(1), "time", FrameLayout(5)), attention(x, "time", FrameLayout(5)).flip(1))
