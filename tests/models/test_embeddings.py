"""Positions of tokens and sinusoids of timesteps, against their formulas and diffusers' tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from models.reference import sincos

from lavita.models.embeddings import (
    TimestepEmbedder,
    frame_positions,
    rotary_positions,
    rotate,
    spatial_positions,
    temporal_positions,
)


def test_positions_are_dits() -> None:
    width, grid = 32, 6
    table = spatial_positions(np.arange(grid), np.arange(grid), width)
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
    embedder = TimestepEmbedder(8)
    sinusoids: list[torch.Tensor] = []
    embedder.mlp.register_forward_pre_hook(lambda _, inputs: sinusoids.append(inputs[0]))
    timesteps = torch.tensor([0, 1, 250, 999])
    angles = timesteps.double().numpy()[:, None] / 10_000 ** (np.arange(128) / 128)
    embedder(timesteps)
    np.testing.assert_allclose(
        sinusoids[0].numpy(), np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4
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
