"""Resizing as Pillow does it, on batches of float images."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of each channel on its own, as Pillow's for images of mode F, without rounding.

    This is the resize of clean-fid (Parmar et al. 2021, Sec. 4.1), which rounds to bytes neither before nor after.

    Args:
        images: float32 `(N, C, H, W)`.
        height: of the result, >= 1.
        width: of the result, >= 1.

    Returns:
        float32 `(N, C, height, width)`, which overshoots the range of the input at edges.
    """
    columns = _weights(images.shape[3], width).to(images.device)
    rows = _weights(images.shape[2], height).to(images.device)
    return rows @ (images @ columns.T)


@lru_cache(maxsize=64)
def _weights(length: int, new_length: int) -> Tensor:
    """Of each old pixel in each new one, (new_length, length): Keys' cubic with a = -0.5, widened where it shrinks."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(new_length)[:, None] + 0.5) * scale
    distance = np.abs((np.arange(length) + 0.5 - centers) / stretch)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))
