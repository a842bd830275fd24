"""Patches, timesteps, labels and positions become vectors.

Legend: B batch, F frames, C channels, H W latent size, P patch, N = (H / P) (W / P) tokens a frame, D width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn


class PatchEmbed(nn.Module):
    """Uniform frame patch embedding (Sec. 3.3): every frame is cut into patches on its own, as in ViT."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        """Patches of `patch_size` squared latent pixels, mapped to `hidden_size`."""
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, F, C, H, W) to tokens (B, F, N, D)."""
        batch, frames = latents.shape[:2]
        tokens = self.proj(latents.flatten(0, 1))  # (B F, D, H/P, W/P)
        return tokens.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))  # (B, F, N, D)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through an MLP, as in DiT."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        """`frequency_size` sinusoids, mapped to `hidden_size`."""
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,), whole or fractional, to vectors (B, D)."""
        half = self.frequency_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A vector a class, and one more, the last, for "no label" (classifier-free guidance)."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        """A table of `num_classes + 1` rows."""
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B,) in 0..num_classes to vectors (B, D)."""
        return self.embedding_table(labels)


def sincos_positions(positions: np.ndarray, width: int) -> np.ndarray:
    """Fixed sinusoids of real positions (Vaswani et al. 2017, Sec. 3.5), sines first, as in DiT.

    Args:
        positions: float64 (M,).
        width: even.

    Returns:
        float64 (M, width).
    """
    frequencies = 1.0 / 10_000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def spatial_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sin-cos positions of a square grid of patches, float32 (1, grid * grid, width).

    The first half of the channels tells the column, the second the row, in DiT's order.
    """
    rows, columns = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid), indexing="ij")
    halves = [sincos_positions(axis.reshape(-1), width // 2) for axis in (columns, rows)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()[None]


def temporal_positions(num_frames: int, width: int) -> torch.Tensor:
    """1-D sin-cos positions of the frames, float32 (1, F, width)."""
    return torch.from_numpy(sincos_positions(np.arange(num_frames, dtype=np.float64), width)).float()[None]
