"""What a video is: its facts, its errors, the endings of its files, and checks of its pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".gif"})
FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
Frames = npt.NDArray[np.uint8]
PathLike = str | os.PathLike[str]


class VideoError(ValueError):
    """A video cannot be read as asked; the message begins with its path."""

    def __init__(self, path: PathLike, problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = Path(path)


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds.

    Attributes:
        path: The video file, folder of frames, or image.
        num_frames: Exact number of frames.
        width: Pixels, after rotation.
        height: Pixels, after rotation.
        fps: Mean frames a second; 25 where a file does not tell.
    """

    path: Path
    num_frames: int
    width: int
    height: int
    fps: float


def check_frames(field: str, frames: Frames) -> None:
    """Raises a ValueError that names `field` unless frames are uint8 (F, H, W, 3), F >= 1."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{field} is {frames.dtype} {frames.shape}; it must be uint8 (F, H, W, 3), F >= 1")


def _check_shape(path: PathLike, frame: str, shape: tuple[int, int], first: tuple[int, int]) -> None:
    if shape != first:
        raise VideoError(path, f"{frame} is {shape[1]}x{shape[0]}; the first frame is {first[1]}x{first[0]}")


def _on_black(rgba: npt.NDArray[Any]) -> Frames:
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
