"""Embeddings of patches, timesteps, labels, texts and positions.

Legend: B batch, F frames, C channels, H W latent size, P patch, S frames per tube, T = F / S tokens in time (F with
the uniform embedding), N = (H / P) (W / P) tokens per frame, D width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    """Uniform frame patch embedding (Sec. 3.3): each frame is cut into patches, as in ViT."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        """Embeds patches of `patch_size` x `patch_size` latent pixels in `hidden_size` numbers."""
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, F, C, H, W) to tokens (B, F, N, D)."""
        batch, frames = latents.shape[:2]
        tokens = self.proj(latents.flatten(0, 1))  # (B F, D, H/P, W/P)
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # channels last in memory, as every layer reads them
        return tokens.unflatten(0, (batch, frames))  # (B, F, N, D)


class TubeEmbed(nn.Module):
    """Compression frame patch embedding (Sec. 3.3): each tube of S frames and one patch becomes a token."""

    def __init__(self, patch_size: int, tube_size: int, in_channels: int, hidden_size: int) -> None:
        """Embeds tubes of `tube_size` frames and `patch_size` x `patch_size` latent pixels in `hidden_size` numbers."""
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
        """Embeds `frequency_size` sinusoids, half of them sines, in `hidden_size` numbers."""
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
    """One vector per class, and a last one for "no label" (classifier-free guidance)."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        """Builds a table of `num_classes + 1` rows."""
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (...) in 0..num_classes to vectors (..., D)."""
        return self.embedding_table(labels)


class TextEmbedder(nn.Module):
    """A pooled text embedding, normalised, through an MLP (Sec. 4.4); "no caption" is the empty text."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        """Embeds `text_dim` numbers in `hidden_size`."""
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(text_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., text_dim) to vectors (..., D)."""
        # The scales of text encoders differ by orders of magnitude.
        normed = F.layer_norm(text_embeds.float(), (text_embeds.shape[-1],))
        return self.mlp(normed.to(next(self.mlp.parameters()).dtype))


def sincos_positions(positions: np.ndarray, width: int) -> np.ndarray:
    """Sinusoids of real-valued positions (Vaswani et al. 2017, Sec. 3.5), sines first, as in DiT.

    Args:
        positions: float64 (M,).
        width: an even number.

    Returns:
        float64 (M, width).
    """
    frequencies = 1.0 / 10_000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def spatial_positions(rows: np.ndarray, columns: np.ndarray, width: int) -> torch.Tensor:
    """2-D sin-cos positions of the patches at some rows (R,) and columns (C,), float32 (1, R * C, width)."""
    return torch.from_numpy(spatial_table(rows, columns, width)).float()[None]


def spatial_table(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """The same as float64 (R * C, width).

    The first half of the channels encodes the column, the second the row, in DiT's order.
    """
    each = np.meshgrid(np.asarray(rows, np.float64), np.asarray(columns, np.float64), indexing="ij")
    halves = [sincos_positions(axis.reshape(-1), width // 2) for axis in reversed(each)]
    return np.concatenate(halves, axis=1)


def frame_positions(num_frames: int, trained_frames: int) -> np.ndarray:
    """Positions in time of a clip's frames, float64 (num_frames,), in units of the training clips' spacing.

    In a clip up to the trained length they are 0, 1, 2, ... A longer clip is compressed evenly into the range of the
    training clips (position interpolation, Chen et al. 2023), because the weights have seen no position beyond it.
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
    """Rotates the channel pairs (i, i + d/2) of queries or keys (..., M, d) by the angles of their positions.

    The product of a rotated query and a rotated key depends only on the difference of their positions.
    """
    cosines, sines = rotation  # float32: in bfloat16 the angles would be off by whole degrees
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)
