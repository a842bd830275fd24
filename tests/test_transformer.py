"""The transformer, against a slow float64 re-implementation and diffusers' DiT block."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn

from lavita.models.blocks import PLAIN_ATTENTION_TOKENS, Axis, TransformerBlock, dot_product_attention
from lavita.models.embeddings import TimestepEmbedder, spatial_positions, temporal_positions
from lavita.models.transformer import LavitaTransformer3DModel, block_plan, preset_sizes

MakeTransformer = Callable[..., LavitaTransformer3DModel]

# ---- the slow re-implementation: one sequence of one sample at a time


def sincos(position: int, width: int) -> list[float]:
    angles = [position / 10_000 ** (2 * k / width) for k in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


class SlowTransformer:
    """Reads the weights of a model by name and shares no code with it."""

    def __init__(self, model: LavitaTransformer3DModel) -> None:
        self.config = model.config
        self.weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        """One sequence (M, D)."""
        width = x.shape[1]
        head = width // self.config["num_heads"]
        qkv = self.linear(x, f"{name}.qkv")
        mixed = np.zeros_like(x)
        for start in range(0, width, head):
            query, key, value = (qkv[:, part + start : part + start + head] for part in (0, width, 2 * width))
            scores = np.exp(query @ key.T / np.sqrt(head))
            mixed[:, start : start + head] = scores / scores.sum(-1, keepdims=True) @ value
        return self.linear(mixed, f"{name}.proj")

    def block(self, x: np.ndarray, condition: np.ndarray, name: str) -> np.ndarray:
        """One sequence (M, D) and its condition (D,)."""
        vectors = np.split(self.linear(silu(condition), f"{name}.adaLN_modulation.1"), 6)
        x = x + vectors[2] * self.attention(layer_norm(x) * (1 + vectors[1]) + vectors[0], f"{name}.attn")
        hidden = gelu(self.linear(layer_norm(x) * (1 + vectors[4]) + vectors[3], f"{name}.mlp.fc1"))
        return x + vectors[5] * self.linear(hidden, f"{name}.mlp.fc2")

    def condition(self, timestep: int, label: int | None) -> np.ndarray:
        angles = timestep * 10_000 ** (-np.arange(128) / 128)
        vector = np.concatenate([np.cos(angles), np.sin(angles)])
        vector = self.linear(silu(self.linear(vector, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        return vector if label is None else vector + self.weights["y_embedder.embedding_table.weight"][label]

    def __call__(self, latents: np.ndarray, timestep: int, label: int | None) -> np.ndarray:
        """One sample (F, C, H, W)."""
        num_frames, patch, width = len(latents), self.config["patch_size"], self.config["hidden_size"]
        grid = self.config["sample_size"] // patch
        places = [(row, column) for row in range(grid) for column in range(grid)]
        tokens = np.zeros((num_frames, len(places), width))
        for f in range(num_frames):
            for n, (row, column) in enumerate(places):
                pixels = latents[f, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                projected = np.tensordot(self.weights["x_embedder.proj.weight"], pixels, axes=3)
                position = np.array(sincos(column, width // 2) + sincos(row, width // 2))
                tokens[f, n] = projected + self.weights["x_embedder.proj.bias"] + position

        condition = self.condition(timestep, label)
        half = self.config["num_blocks"] // 2
        plan = "s" * half + "t" * half if self.config["variant"] == 1 else "st" * half
        for index, kind in enumerate(plan):
            if index == plan.index("t"):
                for f in range(num_frames):
                    tokens[f] += np.array(sincos(f, width))
            if kind == "s":
                for f in range(num_frames):
                    tokens[f] = self.block(tokens[f], condition, f"blocks.{index}")
            else:
                for n in range(len(places)):
                    tokens[:, n] = self.block(tokens[:, n], condition, f"blocks.{index}")

        shift, scale = np.split(self.linear(silu(condition), "final_layer.adaLN_modulation.1"), 2)
        patches = self.linear(layer_norm(tokens) * (1 + scale) + shift, "final_layer.linear")
        channels = patches.shape[-1] // patch**2
        output = np.zeros((num_frames, channels, *latents.shape[2:]))
        for n, (row, column) in enumerate(places):
            for i in range(patch):
                for j in range(patch):
                    first = (i * patch + j) * channels
                    output[:, :, row * patch + i, column * patch + j] = patches[:, n, first : first + channels]
        return output


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": 2, "num_classes": 3, "num_blocks": 4},
        {"variant": 1, "num_classes": 3, "num_blocks": 4},
        {"variant": 2, "learn_sigma": False, "patch_size": 4, "mlp_ratio": 2.0},
    ],
)
def test_equals_the_slow_model(fields: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_frames=3, **fields)
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = [1, 3] if model.config["num_classes"] else [None, None]
    label_tensor = torch.tensor(labels) if model.config["num_classes"] else None
    with torch.no_grad():
        output = model(latents, torch.tensor([3, 40]), label_tensor).sample
    slow = SlowTransformer(model)
    for sample, timestep, label, mine in zip(latents, (3, 40), labels, output, strict=True):
        expected = slow(sample.double().numpy(), timestep, label)
        assert np.abs(mine.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


# ---- parts


@pytest.mark.parametrize("axis", ["space", "time"])
def test_a_block_equals_dits_in_diffusers(axis: Axis) -> None:
    class Condition(nn.Module):
        def forward(self, *_: Any, **__: Any) -> torch.Tensor:
            return rows

    width, heads = 32, 4
    torch.manual_seed(0)
    block = TransformerBlock(width, heads, 4.0, axis)
    theirs = BasicTransformerBlock(
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
        output = block(x, condition[:, None, None])
        if axis == "space":
            rows = condition.repeat_interleave(3, dim=0)
            expected = theirs(x.reshape(6, 5, width)).reshape(2, 3, 5, width)
        else:
            rows = condition.repeat_interleave(5, dim=0)
            moved = x.transpose(1, 2).reshape(10, 3, width)
            expected = theirs(moved).reshape(2, 5, 3, width).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, PLAIN_ATTENTION_TOKENS, PLAIN_ATTENTION_TOKENS + 1])
def test_attention_equals_the_fused_kernel(tokens: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 2, tokens, 8, requires_grad=True) for _ in range(3)]
    output = dot_product_attention(*inputs)
    expected = nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(output.shape)
    for mine, theirs in zip(
        torch.autograd.grad((output * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_positions_are_dits() -> None:
    width, grid = 32, 6
    table = spatial_positions(grid, width)
    assert table.shape == (1, grid * grid, width) and table.dtype == torch.float32
    expected = [sincos(c, width // 2) + sincos(r, width // 2) for r in range(grid) for c in range(grid)]
    np.testing.assert_allclose(table[0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(
        table[0].numpy(), get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt"), atol=1e-5
    )
    np.testing.assert_allclose(
        temporal_positions(16, width)[0].numpy(), [sincos(f, width) for f in range(16)], atol=1e-6
    )


def test_the_sinusoids_of_a_timestep() -> None:
    embedder = TimestepEmbedder(256)
    embedder.mlp = nn.ModuleList([nn.Linear(1, 1)])  # its dtype is read
    embedder.mlp.forward = lambda x: x  # type: ignore[method-assign]
    timesteps = torch.tensor([0, 1, 250, 999])
    angles = timesteps.double().numpy()[:, None] / 10_000 ** (np.arange(128) / 128)
    np.testing.assert_allclose(
        embedder(timesteps).numpy(), np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4
    )


# ---- what mixes with what


@pytest.mark.parametrize(("variant", "first_temporal"), [(1, 2), (2, 1)])
def test_frames_mix_in_temporal_blocks_only(
    variant: int, first_temporal: int, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=variant, num_blocks=4, num_frames=3)
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


def test_places_mix_in_spatial_blocks_only() -> None:
    torch.manual_seed(0)
    condition = torch.randn(1, 1, 1, 32)
    x = torch.randn(1, 3, 5, 32)
    other = x.clone()
    other[:, 1, 2] += torch.randn(32)
    for axis, frames, places in (("space", [1], [0, 1, 2, 3, 4]), ("time", [0, 1, 2], [2])):
        block = TransformerBlock(32, 2, 4.0, axis)  # type: ignore[arg-type]
        with torch.no_grad():
            changed = (block(x, condition) != block(other, condition)).any(dim=-1)[0]
        expected = torch.zeros(3, 5, dtype=torch.bool)
        for frame in frames:
            expected[frame, places] = True
        assert torch.equal(changed, expected), axis


def test_the_order_of_frames_and_the_conditions_matter(tiny_transformer: LavitaTransformer3DModel) -> None:
    torch.manual_seed(0)
    latents, t, label = torch.randn(1, 2, 4, 8, 8), torch.tensor([5]), torch.tensor([1])
    with torch.no_grad():
        output = tiny_transformer(latents, t, label).sample
        flipped = tiny_transformer(latents.flip(1), t, label).sample.flip(1)
        later = tiny_transformer(latents, t + 500, label).sample
        unlabelled = tiny_transformer(latents, t, torch.tensor([3])).sample
        one_frame = tiny_transformer(latents[:, :1], t, label).sample
    for other in (flipped, later, unlabelled):
        assert (output - other).abs().max() > 1e-3
    assert one_frame.shape == (1, 1, 8, 8, 8)


# ---- initialisation, sizes, files, errors


def plain(**fields: Any) -> LavitaTransformer3DModel:
    sizes = {"sample_size": 8, "num_frames": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}
    return LavitaTransformer3DModel(**{**sizes, **fields})


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_starts_at_zero(learn_sigma: bool) -> None:
    model = plain(learn_sigma=learn_sigma, num_classes=3)
    (output,) = model(torch.randn(2, 2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 3]), return_dict=False)
    assert output.shape == (2, 2, 8 if learn_sigma else 4, 8, 8)
    assert not output.any()


@pytest.mark.parametrize("variant", [1, 2])
def test_every_parameter_is_trained_once_the_gates_open(variant: int) -> None:
    model = plain(variant=variant, num_classes=3, num_blocks=4)
    for module in (*model.blocks, model.final_layer):
        nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight)
    output = model(torch.randn(2, 2, 4, 8, 8), torch.tensor([7, 70]), torch.tensor([0, 3])).sample
    output.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert not [name for name, _ in model.named_parameters() if "embed" in name and "embedder" not in name]


@pytest.mark.parametrize("variant", [1, 2])
def test_xl_has_the_papers_673_68_million_parameters(variant: int) -> None:
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset("XL/2", variant=variant)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 673_681_568
    assert round(count / 1e6, 2) == 673.68
    assert [block.axis for block in model.blocks] == block_plan(variant, 28)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_dits(size: str, millions: int) -> None:
    # Peebles & Xie 2023, Table 4: 1000 classes, and the fixed positions counted too.
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset(f"{size}/2", num_classes=1000)
    count = sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.6)


def test_presets_fields_can_be_overruled() -> None:
    assert preset_sizes("B/4") == {"hidden_size": 768, "num_blocks": 12, "num_heads": 12, "patch_size": 4}
    model = LavitaTransformer3DModel.from_preset("tiny/2", sample_size=8, num_blocks=4)
    assert (model.config["hidden_size"], len(model.blocks)) == (64, 4)


def test_round_trip_through_a_folder(tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    tiny_transformer.save_pretrained(tmp_path)
    loaded = LavitaTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config["class_names"] == ["boxing", "enduro", "pong"]
    assert loaded.config["fps"] == 4.0
    assert not loaded.training
    saved = tiny_transformer.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    inputs = torch.randn(1, 2, 4, 8, 8), torch.tensor([9]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, tiny_transformer(*inputs).sample)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 3, 8, 8), r"shape \(1, 2, 3, 8, 8\), but this model takes \(B, up to 2, 4, 8, 8\)"),
        ((1, 2, 4, 8, 16), "this model takes"),
        ((1, 3, 4, 8, 8), "up to 2"),
        ((2, 4, 8, 8), "this model takes"),
    ],
)
def test_latents_of_another_shape_are_refused(
    shape: tuple[int, ...], message: str, tiny_transformer: LavitaTransformer3DModel
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_transformer(torch.zeros(shape), torch.tensor([1]), torch.tensor([0]))


def test_labels_that_do_not_fit_are_refused(
    tiny_transformer: LavitaTransformer3DModel, make_transformer: MakeTransformer
) -> None:
    latents, t = torch.zeros(1, 2, 4, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match="class_labels are missing, but this model has 3 classes"):
        tiny_transformer(latents, t)
    with pytest.raises(ValueError, match="this model is unconditional"):
        make_transformer()(latents, t, torch.tensor([0]))


@pytest.mark.parametrize("preset", ["XL/3", "M/2", "XL", "", "xl/2", "S/2/2"])
def test_an_unknown_preset_is_named(preset: str) -> None:
    with pytest.raises(ValueError, match=f"preset is '{preset}'; allowed: .*XL.*1 2 4 8"):
        LavitaTransformer3DModel.from_preset(preset)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": 3}, "variant is 3; allowed: 1, 2"),
        ({"num_blocks": 3}, "num_blocks is 3, but must be even"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"patch_size": 3}, r"sample_size is 8, but must be a multiple of patch_size \(3\)"),
        ({"num_heads": 3}, "hidden_size is 32, but must be a multiple of 4 and of num_heads"),
        ({"hidden_size": 30}, "hidden_size is 30"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names has 1 names, but num_classes is 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**fields)
