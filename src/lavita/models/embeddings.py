"""Patches, timesteps, labels, texts and positions become vectors.

Legend: B batch, F frames, C channels, H W latent size, P patch, S frames of a tube, T = F / S tokens in time (F for
the uniform embedding), N = (H / P) (W / P) tokens a frame, D width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
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
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # channels last in memory, as every layer reads them
        return tokens.unflatten(0, (batch, frames))  # (B, F, N, D)


class TubeEmbed(nn.Module):
    """Compression frame patch embedding (Sec. 3.3): tubes of S frames are cut out and mapped to one token each."""

    def __init__(self, patch_size: int, tube_size: int, in_channels: int, hidden_size: int) -> None:
        """Tubes of `tube_size` frames by `patch_size` squared latent pixels, mapped to `hidden_size`."""
        super().__init__()
        kernel = (tube_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, F, C, H, W) to tokens (B, F/S, N, D)."""
        tokens = self.proj(latents.transpose(1, 2))  # (B, D, T, H/P, W/P)
        return tokens.flatten(3).permute(0, 2, 3, 1).contiguous()  # (B, T, N, D)


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
        """Labels (...) in 0..num_classes to vectors (..., D)."""
        return self.embedding_table(labels)


class TextEmbedder(nn.Module):
    """A pooled text embedding, normalised, through an MLP (Sec. 4.4); "no caption" is the empty text's embedding."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        """Embeddings of `text_dim`, mapped to `hidden_size`."""
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(text_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., text_dim) to vectors (..., D)."""
        # Encoders differ in scale by orders of magnitude.
        normed = F.layer_norm(text_embeds.float(), (text_embeds.shape[-1],))
        return self.mlp(normed.to(next(self.mlp.parameters()).dtype))


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


def frame_positions(num_frames: int, trained_frames: int) -> np.ndarray:
    """Where the frames of a clip stand in time, float64 (num_frames,), in units of the training clips' spacing.

    Clips up to the trained length stand at 0, 1, 2 ... Longer ones are squeezed evenly into the range that training
    has seen (position interpolation, Chen et al. 2023): positions beyond it are something no weight has learned.
    """
    if num_frames <= trained_frames:
        return np.arange(num_frames, dtype=np.float64)
    return np.linspace(0, trained_frames - 1, num_frames)


def temporal_positions(positions: np.ndarray, width: int) -> torch.Tensor:
    """1-D sin-cos positions of the frames (M,), float32 (1, M, width)."""
    return torch.from_numpy(sincos_positions(positions, width)).float()[None]


def rotary_positions(positions: np.ndarray, head_size: int) -> torch.Tensor:
    """Cosines and sines that rotate queries and keys (Su et al. 2021, Eq. 34), float32 (2, M, head_size / 2)."""
    sines, cosines = np.split(sincos_positions(positions, head_size), 2, axis=1)
    return torch.from_numpy(np.stack([cosines, sines])).float()


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + d/2) of queries or keys (..., M, d) by their positions' angles.

    Products of a turned query and a turned key depend on the difference of their positions only.
    """
    cosines, sines = rotation  # float32: bfloat16's angles would be off by whole degrees
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)
