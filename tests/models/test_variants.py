"""The four variants, against a slow float64 re-implementation, masked full attention and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn

from lavita.models.blocks import Attention, FrameLayout, Mixing
from lavita.models.embeddings import (
    TimestepEmbedder,
    frame_positions,
    rotary_positions,
    rotate,
    spatial_positions,
    temporal_positions,
)
from lavita.models.transformer import LavitaTransformer3DModel

MakeTransformer = Callable[..., LavitaTransformer3DModel]

KINDS = [
    {"variant": variant, "conditioning": conditioning, "temporal_position": position}
    for variant, conditioning, position in itertools.product(
        (1, 2, 3, 4), ("s_adaln", "all_tokens"), ("absolute", "rope")
    )
]
GIVEN = {"classes": {"num_classes": 3}, "texts": {"text_dim": 5}, "nothing": {}}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
every_condition = pytest.mark.parametrize("given", GIVEN)


def assert_near(mine: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert mine.shape == expected.shape
    assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()


def random_latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conditions(model: LavitaTransformer3DModel, *shape: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Labels or texts of the given shape, or nothing, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    if model.config["num_classes"]:
        return {"class_labels": torch.randint(model.config["num_classes"] + 1, shape, generator=generator)}
    if model.config["text_dim"]:
        return {"text_embeds": torch.randn(*shape, model.config["text_dim"], generator=generator)}
    return {}


# ---- the slow re-implementation: one sample at a time, one sequence at a time


def sincos(position: float, width: int) -> list[float]:
    angles = [position / 10_000 ** (2 * k / width) for k in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def squeezed(num_frames: int, trained: int) -> list[float]:
    """0, 1, 2 ...; of clips longer than the trained ones as many steps over the same range."""
    return [f if num_frames <= trained else f * (trained - 1) / (num_frames - 1) for f in range(num_frames)]


def turn(x: np.ndarray, positions: list[float]) -> np.ndarray:
    """Rotary embedding of one head's queries or keys (M, d): channels i and i + d/2 are a complex number."""
    half = x.shape[1] // 2
    angles = np.array([[position / 10_000 ** (i / half) for i in range(half)] for position in positions])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


class SlowTransformer:
    """Reads the weights of a model by name and shares no code with it."""

    def __init__(self, model: LavitaTransformer3DModel) -> None:
        self.config = model.config
        self.weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
        self.tube = model.config["tube_size"] if model.config["patch_embedding"] == "compression" else 1
        self.heads = list(range(model.config["num_heads"]))
        self.rope = model.config["temporal_position"] == "rope"
        self.all_tokens = model.config["conditioning"] == "all_tokens"

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, x: np.ndarray, first: str, second: str, activation: Callable[..., np.ndarray]) -> np.ndarray:
        return self.linear(activation(self.linear(x, first)), second)

    def attend(self, x: np.ndarray, name: str, heads: list[int], positions: list[float] | None) -> np.ndarray:
        """One sequence (M, D): what the given heads bring, zeros where the others would."""
        width = x.shape[1]
        size = width // len(self.heads)
        qkv = self.linear(x, f"{name}.qkv")
        mixed = np.zeros_like(x)
        for start in (head * size for head in heads):
            query, key, value = (qkv[:, part + start : part + start + size] for part in (0, width, 2 * width))
            if positions is not None and self.rope:
                query, key = turn(query, positions), turn(key, positions)
            scores = np.exp(query @ key.T / np.sqrt(size))
            mixed[:, start : start + size] = scores / scores.sum(-1, keepdims=True) @ value
        return mixed

    def attention(
        self, x: np.ndarray, name: str, in_space: list[int], in_time: list[int], positions: list[float]
    ) -> np.ndarray:
        """Tokens (T, M, D): some heads look along each frame, some along each place of the video's frames."""
        mixed = np.zeros_like(x)
        num_video = len(positions)
        for f in range(len(x)):
            mixed[f] += self.attend(x[f], name, in_space, None)
        for n in range(x.shape[1] if num_video else 0):
            mixed[:num_video, n] += self.attend(x[:num_video, n], name, in_time, positions)
        return self.linear(mixed, f"{name}.proj")

    def add(
        self, x: np.ndarray, condition: np.ndarray, block: str, norm: str, layer: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The residual path around one layer; tokens (T, M, D), the condition of each frame (T, 1, D)."""
        if self.all_tokens:
            return x + layer(self.affine_norm(x, f"{block}.{norm}"))
        vectors = np.split(self.linear(silu(condition), f"{block}.adaLN_modulation.1"), 6, axis=-1)
        shift, scale, gate = vectors[3:] if norm == "norm2" else vectors[:3]
        return x + gate * layer(layer_norm(x) * (1 + scale) + shift)

    def affine_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def block(self, x: np.ndarray, condition: np.ndarray, kind: str, name: str, positions: list[float]) -> np.ndarray:
        """Tokens (T, M, D), the first of them the video's: as many as there are positions."""
        num_video = len(positions)
        video, images = slice(0, num_video), slice(num_video, None)

        def mlp(y: np.ndarray) -> np.ndarray:
            return self.mlp(y, f"{name}.mlp.fc1", f"{name}.mlp.fc2", gelu)

        def time(y: np.ndarray, attn: str) -> np.ndarray:
            return self.attention(y, f"{name}.{attn}", [], self.heads, positions)

        def space(y: np.ndarray) -> np.ndarray:
            half = len(self.heads) // 2
            if kind == "s+t":
                return self.attention(y, f"{name}.attn", self.heads[:half], self.heads[half:], positions)
            return self.attention(y, f"{name}.attn", self.heads, [], positions)

        if kind == "t":
            moved = self.add(x[video], condition[video], name, "norm1", lambda y: time(y, "attn"))
            moved = self.add(moved, condition[video], name, "norm2", mlp)
            return np.concatenate([moved, x[images]])
        x = self.add(x, condition, name, "norm1", space)
        if kind == "s,t":
            moved = self.add(x[video], condition[video], name, "norm_temporal", lambda y: time(y, "temporal_attn"))
            x = np.concatenate([moved, x[images]])
        return self.add(x, condition, name, "norm2", mlp)

    def timestep(self, timestep: int) -> np.ndarray:
        angles = timestep * 10_000 ** (-np.arange(128) / 128)
        return self.mlp(np.concatenate([np.cos(angles), np.sin(angles)]), "t_embedder.mlp.0", "t_embedder.mlp.2", silu)

    def own(self, given: np.ndarray) -> np.ndarray:
        if self.config["num_classes"]:
            return self.weights["y_embedder.embedding_table.weight"][int(given)]
        return self.mlp(layer_norm(given, eps=1e-5), "y_embedder.mlp.0", "y_embedder.mlp.2", silu)

    def embed(self, latents: np.ndarray, places: list[tuple[int, int]]) -> np.ndarray:
        """Latents (F, C, H, W) to tokens (T, N, D)."""
        patch, width = self.config["patch_size"], self.config["hidden_size"]
        weight = self.weights["x_embedder.proj.weight"].reshape(width, -1, self.tube, patch, patch)
        tokens = np.zeros((len(latents) // self.tube, len(places), width))
        for f in range(len(tokens)):
            for n, (row, column) in enumerate(places):
                frames = latents[f * self.tube : (f + 1) * self.tube]
                cut = frames[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                position = np.array(sincos(column, width // 2) + sincos(row, width // 2))
                tokens[f, n] = np.einsum("dcsij,scij->d", weight, cut) + position
        return tokens + self.weights["x_embedder.proj.bias"]

    def decode(self, patches: np.ndarray, places: list[tuple[int, int]], size: int) -> np.ndarray:
        """Patches (T, N, P P C S) to frames (F, C, H, W)."""
        patch = self.config["patch_size"]
        channels = patches.shape[-1] // patch**2
        decoded = np.zeros((len(patches), channels, size, size))
        for n, (row, column) in enumerate(places):
            for i in range(patch):
                for j in range(patch):
                    first = (i * patch + j) * channels
                    decoded[:, :, row * patch + i, column * patch + j] = patches[:, n, first : first + channels]
        if self.config["patch_embedding"] == "uniform":
            return decoded
        weight, bias = self.weights["temporal_upsample.weight"], self.weights["temporal_upsample.bias"]
        frames = [
            np.tensordot(weight[:, :, s, 0, 0].T, decoded[f], axes=1) + bias[:, None, None]
            for f in range(len(decoded))
            for s in range(self.tube)
        ]
        return np.stack(frames)

    def __call__(
        self, latents: np.ndarray, timestep: int, givens: list[np.ndarray | None], num_video: int
    ) -> np.ndarray:
        """One sample (F, C, H, W); its T frames' own labels or texts; the first `num_video` of them are the video."""
        size, width = self.config["sample_size"], self.config["hidden_size"]
        grid = size // self.config["patch_size"]
        places = [(row, column) for row in range(grid) for column in range(grid)]
        tokens = self.embed(latents, places)
        of_frames = []
        for given in givens:
            of_frames.append([self.timestep(timestep)] + ([] if given is None else [self.own(given)]))
        condition = np.array(of_frames).sum(axis=1, keepdims=True)
        if self.all_tokens:
            tokens = np.concatenate([np.array(of_frames), tokens], axis=1)

        blocks = self.config["num_blocks"]
        plan = {
            1: ["s"] * (blocks // 2) + ["t"] * (blocks // 2),
            2: ["s", "t"] * (blocks // 2),
            3: ["s,t"] * blocks,
            4: ["s+t"] * blocks,
        }[self.config["variant"]]
        positions = squeezed(num_video, self.config["num_frames"] // self.tube)
        first = next(index for index, kind in enumerate(plan) if "t" in kind)
        for index, kind in enumerate(plan):
            if index == first and not self.rope:
                for f, position in enumerate(positions):
                    tokens[f] += np.array(sincos(position, width))
            tokens = self.block(tokens, condition, kind, f"blocks.{index}", positions)

        tokens = tokens[:, -len(places) :]
        if self.all_tokens:
            normed = self.affine_norm(tokens, "final_layer.norm")
        else:
            shift, scale = np.split(self.linear(silu(condition), "final_layer.adaLN_modulation.1"), 2, axis=-1)
            normed = layer_norm(tokens) * (1 + scale) + shift
        return self.decode(self.linear(normed, "final_layer.linear"), places, size)


def check_against_the_slow_model(
    model: LavitaTransformer3DModel, latents: torch.Tensor, num_images: int = 0, use_temporal: bool = True
) -> None:
    batch, num_frames = latents.shape[:2]
    given = conditions(model, batch, 1 + num_images) if num_images else conditions(model, batch)
    timesteps = [3, 40]  # of large ones float32 does not know the sinusoids to 1e-5
    with torch.no_grad():
        output = model(
            latents, torch.tensor(timesteps), **given, num_images=num_images, use_temporal=use_temporal
        ).sample
    slow = SlowTransformer(model)
    num_tokens = num_frames // slow.tube
    num_video = num_tokens - num_images
    for b, timestep in enumerate(timesteps):
        givens: list[np.ndarray | None] = [None] * num_tokens
        for values in given.values():
            rows = list(values[b].double().numpy()) if num_images else [values[b].double().numpy()]
            givens = rows[:1] * num_video + rows[1:]
        expected = slow(latents[b].double().numpy(), timestep, givens, num_video if use_temporal else 0)
        assert_near(output[b].double(), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "embedding",
    [
        {"patch_embedding": "uniform", "num_classes": 3},
        {"patch_embedding": "compression", "num_frames": 4, "text_dim": 5},
    ],
    ids=["uniform", "compression"],
)
@every_kind
def test_equals_the_slow_model(
    kind: dict[str, Any], embedding: dict[str, Any], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(**{"num_blocks": 4, "num_frames": 3, **kind, **embedding})
    check_against_the_slow_model(model, random_latents(2, model.config["num_frames"]))


@every_condition
@every_kind
def test_images_equal_the_slow_model(kind: dict[str, Any], given: str, make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **GIVEN[given], **kind)
    latents = random_latents(2, 5)
    check_against_the_slow_model(model, latents, num_images=2)
    check_against_the_slow_model(model, latents[:, :2], use_temporal=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"learn_sigma": False, "patch_size": 4, "mlp_ratio": 2.0},
        {"learn_sigma": False, "patch_size": 4, "patch_embedding": "compression", "tube_size": 3, "num_frames": 3},
        {"variant": 4, "num_heads": 4, "conditioning": "all_tokens"},
        {"variant": 3, "num_blocks": 3, "patch_embedding": "compression", "tube_size": 1, "temporal_position": "rope"},
    ],
)
def test_other_sizes_equal_the_slow_model(fields: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(**fields)
    check_against_the_slow_model(model, random_latents(2, model.config["num_frames"]))


@pytest.mark.parametrize("num_frames", [2, 6, 8, 12])
@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
@pytest.mark.parametrize("variant", [2, 4])
def test_clips_of_any_length_equal_the_slow_model(
    variant: int, temporal_position: str, patch_embedding: str, num_frames: int, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(
        variant=variant, temporal_position=temporal_position, patch_embedding=patch_embedding, num_frames=6
    )
    check_against_the_slow_model(model, random_latents(2, num_frames))


# ---- factorised attention is masked full attention


def masked_attention(attention: Attention, x: torch.Tensor, mixing: Mixing, num_video: int, rope: bool) -> torch.Tensor:
    """Attention over all F N tokens at once, where a mask says who sees whom; frame f stands at position f."""
    num_frames, num_places = x.shape[1:3]
    heads = attention.num_heads
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in attention.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    )  # each (B, h, F N, d)
    frame = torch.arange(num_frames).repeat_interleave(num_places)
    place = torch.arange(num_places).repeat(num_frames)
    in_video = frame < num_video
    in_time = torch.arange(heads) >= {"space": heads, "time": 0, "space_and_time": heads // 2}[mixing]
    sees_in_space = frame[:, None] == frame
    sees_in_time = (place[:, None] == place) & in_video[:, None] & in_video
    sees_in_time |= torch.eye(len(frame), dtype=torch.bool)  # softmax needs something; images' part is removed below
    mask = torch.where(in_time[:, None, None], sees_in_time, sees_in_space)  # (h, F N, F N)
    if rope:
        half = query.shape[-1] // 2
        angles = frame[:, None] / 10_000 ** (torch.arange(half) / half)
        spin = torch.polar(torch.ones_like(angles), angles)
        turned = [torch.complex(part[..., :half], part[..., half:]) * spin for part in (query, key)]
        query, key = (
            torch.where(in_time[:, None, None], torch.cat([new.real, new.imag], dim=-1), old)
            for new, old in zip(turned, (query, key), strict=True)
        )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    mixed = mixed.masked_fill((in_time[:, None] & ~in_video)[..., None], 0)
    return attention.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, (num_frames, num_places))


def random_attention(heads: int = 4) -> Attention:
    torch.manual_seed(0)
    attention = Attention(32, heads)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    return attention.requires_grad_(False)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(
    ("mixing", "num_video"),
    [("space", 4), ("space", 2), ("time", 4), ("space_and_time", 4), ("space_and_time", 2), ("space_and_time", 0)],
)
def test_factorised_attention_is_masked_full_attention(mixing: Mixing, num_video: int, rope: bool) -> None:
    attention = random_attention()
    x = torch.randn(2, 4, 5, 32)
    rotation = rotary_positions(np.arange(num_video), 8) if rope else None
    output = attention(x, mixing, FrameLayout(num_video, rotation))
    assert_near(output, masked_attention(attention, x, mixing, num_video, rope))


@every_kind
def test_every_variant_is_masked_full_attention(
    kind: dict[str, Any], make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def masked(self: Attention, x: torch.Tensor, mixing: Mixing, frames: FrameLayout) -> torch.Tensor:
        calls.append(mixing)
        return masked_attention(self, x, mixing, frames.num_video, frames.rotation is not None)

    model = make_transformer(num_blocks=4, num_frames=3, num_classes=3, **kind)
    latents, t, given = random_latents(2, 5), torch.tensor([3, 40]), conditions(model, 2, 3)
    with torch.no_grad():
        output = model(latents, t, **given, num_images=2).sample
        monkeypatch.setattr(Attention, "forward", masked)
        expected = model(latents, t, **given, num_images=2).sample
    assert_near(output, expected)
    one_block = {1: ["space"], 2: ["space"], 3: ["space", "time"], 4: ["space_and_time"]}
    assert calls[: len(one_block[kind["variant"]])] == one_block[kind["variant"]]
    assert len(calls) == (8 if kind["variant"] == 3 else 4)


# ---- images beside a video


@every_condition
@every_kind
def test_images_and_video_do_not_touch(kind: dict[str, Any], given: str, make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **GIVEN[given], **kind)
    latents, t, own = random_latents(2, 5), torch.tensor([3, 400]), conditions(model, 2, 3)

    def changed(part: slice, labels: slice) -> torch.Tensor:
        """The output where some frames and their labels or texts are others."""
        other_latents, other = latents.clone(), {name: values.clone() for name, values in own.items()}
        other_latents[:, part] += 1
        for name, values in other.items():
            values[:, labels] = (values[:, labels] + 1) % 4 if name == "class_labels" else values[:, labels] + 1
        return model(other_latents, t, **other, num_images=2).sample

    with torch.no_grad():
        output = model(latents, t, **own, num_images=2).sample
        other_images = changed(slice(3, 5), slice(1, 3))
        other_video = changed(slice(0, 3), slice(0, 1))
        assert torch.equal(other_images[:, :3], output[:, :3])
        assert torch.equal(other_video[:, 3:], output[:, 3:])
        assert (other_images[:, 3:] - output[:, 3:]).abs().amax(dim=(2, 3, 4)).min() > 1e-3
        assert (other_video[:, :3] - output[:, :3]).abs().amax(dim=(2, 3, 4)).min() > 1e-3

        of_video = {name: values[:, 0] for name, values in own.items()}
        alone = model(latents[:, :3], t, **of_video).sample
        assert_near(output[:, :3], alone)
        assert torch.equal(model(latents[:, :3], t, **of_video, num_images=0, use_temporal=True).sample, alone)
        for image in range(2):
            of_image = {name: values[:, 1 + image] for name, values in own.items()}
            frame = latents[:, 3 + image : 4 + image]
            alone = model(frame, t, **of_image, use_temporal=False).sample
            assert_near(output[:, 3 + image : 4 + image], alone)


@every_kind
def test_each_image_follows_its_own_label(kind: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3, **kind)
    latents, t = random_latents(1, 4), torch.tensor([5])
    with torch.no_grad():
        output = model(latents, t, torch.tensor([[0, 1, 2]]), num_images=2).sample
        for column, frames in enumerate(([0, 1], [2], [3])):
            labels = torch.tensor([[0, 1, 2]])
            labels[0, column] = 3
            other = model(latents, t, labels, num_images=2).sample
            different = (other != output).flatten(2).any(dim=2)[0]
            assert different.nonzero().flatten().tolist() == frames


@pytest.mark.parametrize("kind", [{"variant": 1}, {"variant": 2}])
def test_without_temporal_blocks_the_spatial_ones_are_a_model(
    kind: dict[str, Any], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **kind)
    latents, t = random_latents(1, 3), torch.tensor([5])
    with torch.no_grad():
        output = model(latents, t, use_temporal=False).sample
        temporal = [block for block in model.blocks if block.mixing == "time"]
        assert len(temporal) == 2
        for block in temporal:
            block.register_forward_hook(lambda _, inputs, __: inputs[0])
        model.temp_embed.zero_()
        assert torch.equal(model(latents, t).sample, output)


# ---- positions


def test_positions_are_dits() -> None:
    width, grid = 32, 6
    table = spatial_positions(grid, width)
    assert table.shape == (1, grid * grid, width) and table.dtype == torch.float32
    expected = [sincos(c, width // 2) + sincos(r, width // 2) for r in range(grid) for c in range(grid)]
    np.testing.assert_allclose(table[0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(
        table[0].numpy(), get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt"), atol=1e-5
    )
    positions = [0, 1, 2.5, 15]
    np.testing.assert_allclose(
        temporal_positions(np.array(positions), width)[0].numpy(), [sincos(p, width) for p in positions], atol=1e-6
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


@pytest.mark.parametrize(
    ("num_frames", "trained", "expected"),
    [
        (1, 1, [0]),
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 0.75, 1.5, 2.25, 3]),
        (7, 4, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        (4, 2, [0, 1 / 3, 2 / 3, 1]),
    ],
)
def test_longer_clips_are_squeezed_into_the_trained_range(num_frames: int, trained: int, expected: list[float]) -> None:
    positions = frame_positions(num_frames, trained)
    assert positions.dtype == np.float64
    np.testing.assert_allclose(positions, expected, rtol=1e-15)


@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
def test_a_shorter_clip_is_that_of_a_model_of_its_length(
    temporal_position: str, patch_embedding: str, make_transformer: MakeTransformer
) -> None:
    long, short = (
        make_transformer(num_frames=frames, temporal_position=temporal_position, patch_embedding=patch_embedding)
        for frames in (8, 4)
    )
    latents, t = random_latents(2, 4), torch.tensor([3, 40])
    with torch.no_grad():
        assert torch.equal(long(latents, t).sample, short(latents, t).sample)
        assert not torch.equal(long(random_latents(2, 8), t).sample[:, :4], short(latents, t).sample)


@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_the_order_of_frames_matters(variant: int, temporal_position: str, make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=variant, temporal_position=temporal_position, num_frames=3)
    latents, t = random_latents(1, 3), torch.tensor([5])
    with torch.no_grad():
        output, flipped = model(latents, t).sample, model(latents.flip(1), t).sample.flip(1)
    assert (output - flipped).abs().max() > 1e-3


# ---- rotary positions


def test_rotate_turns_pairs_of_channels() -> None:
    positions, size = [0, 1, 2.5, 15, 250], 8
    angles = [[position / 10_000 ** (2 * i / size) for i in range(size // 2)] for position in positions]
    rotation = torch.tensor(
        [[[function(a) for a in row] for row in angles] for function in (math.cos, math.sin)], dtype=torch.float64
    )
    table = rotary_positions(np.array(positions), size)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), rotation, atol=1e-7, rtol=0)

    x = torch.randn(2, 3, len(positions), size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for m, row in enumerate(angles):
        for i, angle in enumerate(row):
            cosine, sine = math.cos(angle), math.sin(angle)
            matrix = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
            pair = [i, i + size // 2]
            expected[..., m, pair] = x[..., m, pair] @ matrix.T
    turned = rotate(x, rotation)
    torch.testing.assert_close(turned, expected, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-14, rtol=1e-14)

    rounded = x.bfloat16()
    turned = rotate(rounded, table)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.double(), rotate(rounded.double(), rotation), atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("mixing", ["time", "space_and_time"])
def test_rotary_attention_depends_on_relative_positions_only(mixing: Mixing) -> None:
    attention = random_attention()
    x = torch.randn(2, 5, 3, 32)
    positions = np.arange(5.0)

    def at(positions: np.ndarray) -> torch.Tensor:
        return attention(x, mixing, FrameLayout(5, rotary_positions(positions, 8)))

    output = at(positions)
    for shift in (-4, 0.25, 100):
        assert_near(at(positions + shift), output)
    for other in (positions[::-1], positions[[1, 0, 2, 3, 4]], 2 * positions):
        assert (at(other) - output).abs().max() > 1e-2


def test_without_positions_temporal_attention_knows_no_order() -> None:
    attention = random_attention()
    x = torch.randn(2, 5, 3, 32)
    assert_near(attention(x.flip(1), "time", FrameLayout(5)), attention(x, "time", FrameLayout(5)).flip(1))
