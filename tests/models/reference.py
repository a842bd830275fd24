"""Slow references: the transformer in float64 numpy, one sequence at a time, and attention over all tokens at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from lavita.models.blocks import Attention, Mixing
from lavita.models.transformer import LavitaTransformer3DModel


def assert_near(mine: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert mine.shape == expected.shape
    assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()


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
        self.heads = model.config["num_heads"] // (2 if model.config["variant"] == 4 else 1)
        self.rope = model.config["temporal_position"] == "rope"
        self.all_tokens = model.config["conditioning"] == "all_tokens"

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, x: np.ndarray, first: str, second: str, activation: Callable[..., np.ndarray]) -> np.ndarray:
        return self.linear(activation(self.linear(x, first)), second)

    def attend(self, x: np.ndarray, name: str, positions: list[float] | None) -> np.ndarray:
        """One sequence (M, D), without the last layer."""
        width = x.shape[1]
        size = width // self.heads
        qkv = self.linear(x, f"{name}.qkv")
        mixed = np.zeros_like(x)
        for start in range(0, width, size):
            query, key, value = (qkv[:, part + start : part + start + size] for part in (0, width, 2 * width))
            if positions is not None and self.rope:
                query, key = turn(query, positions), turn(key, positions)
            scores = np.exp(query @ key.T / np.sqrt(size))
            mixed[:, start : start + size] = scores / scores.sum(-1, keepdims=True) @ value
        return mixed

    def in_space(self, x: np.ndarray, name: str) -> np.ndarray:
        """Tokens (T, M, D), frame by frame."""
        return self.linear(np.stack([self.attend(frame, name, None) for frame in x]), f"{name}.proj")

    def in_time(self, x: np.ndarray, name: str, positions: list[float]) -> np.ndarray:
        """Tokens of the video's frames (V, M, D), place by place."""
        places = [self.attend(x[:, n], name, positions) for n in range(x.shape[1])]
        return self.linear(np.stack(places, axis=1), f"{name}.proj")

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
            return self.in_time(y, f"{name}.{attn}", positions) if num_video else y

        def space(y: np.ndarray) -> np.ndarray:
            mixed = self.in_space(y, f"{name}.attn")
            if kind == "s+t":
                mixed[video] += time(y[video], "temporal_attn")
            return mixed

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
        first = 0 if self.config["temporal_position"] == "absolute_input" else first
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
    in_time = torch.full((heads,), mixing == "time")
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
