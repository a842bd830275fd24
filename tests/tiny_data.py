"""Tiny videos for tests that need real files: every frame of every video is different."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lavita.video import write_video


def paint(num_frames: int, seed: int = 0, height: int = 16, width: int = 20) -> np.ndarray:
    """A smooth random texture that moves: uint8 (F, H, W, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return np.stack([np.roll(texture, (number, 2 * number), (0, 1)) for number in range(num_frames)])


def write_videos(
    root: Path,
    names: Sequence[str] = ("a/0.mp4", "a/1.mp4", "b/2.mp4"),
    num_frames: int = 10,
    height: int = 16,
    width: int = 20,
) -> Path:
    """Writes a video for each name below `root`, which it returns."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, paint(num_frames, seed, height, width), fps=10)
    return root


def write_broken(file: Path) -> Path:
    """Writes bytes that are no video."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.random.default_rng(0).bytes(2000))
    return file
