"""Which frames of which video make a clip, and how they become the pixels that a model sees."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from PIL import Image

from lavita.core.seeds import numpy_generator
from lavita.data.catalog import Catalog, Video
from lavita.video.reading import read_clip

Frames = npt.NDArray[np.uint8]


def clip_span(num_frames: int, frame_interval: int) -> int:
    """Frames of the file from a clip's first to its last, both included."""
    return (num_frames - 1) * frame_interval + 1


@dataclass(frozen=True)
class ClipDraw:
    """One clip: where it comes from and whether it is mirrored."""

    video: Video
    start: int
    flip: bool


class ClipSampler:
    """Draws clips uniformly: every (video, start) is equally likely, the last start included.

    A draw is a pure function of (seed, step, index): a resumed run, and any number of processes, draw what
    one uninterrupted process would have drawn.
    """

    def __init__(
        self,
        catalog: Catalog,
        num_frames: int,
        frame_interval: int,
        horizontal_flip: bool,
        seed: int,
        stream: str = "clip",
    ) -> None:
        """Prepares the draws; samplers of another `stream` draw independently.

        Raises:
            ValueError: where a video is shorter than a clip; `scan(min_frames=clip_span(...))` names those.
        """
        span = clip_span(num_frames, frame_interval)
        starts = [video.info.num_frames - span + 1 for video in catalog.videos]
        for video, count in zip(catalog.videos, starts, strict=True):
            if count < 1:
                raise ValueError(
                    f"{video.info.path}: has {video.info.num_frames} frames, but a clip needs {span} "
                    f"({num_frames} at interval {frame_interval})"
                )
        self.catalog = catalog
        self.num_frames, self.frame_interval = num_frames, frame_interval
        self.horizontal_flip, self.seed, self.stream = horizontal_flip, seed, stream
        self._ends = list(accumulate(starts))

    @property
    def num_clips(self) -> int:
        """Distinct (video, start) pairs."""
        return self._ends[-1]

    def draw(self, step: int, index: int, attempt: int = 0) -> ClipDraw:
        """The clip at a place of a step's batch, or the `attempt`-th in its stead where it cannot be read."""
        rng = numpy_generator(self.seed, self.stream, step, index, *([attempt] if attempt else []))
        number = int(rng.integers(self.num_clips))
        video = bisect_right(self._ends, number)
        start = number - (self._ends[video - 1] if video else 0)
        flip = bool(rng.random() < 0.5) if self.horizontal_flip else False
        return ClipDraw(self.catalog.videos[video], start, flip)


def read_pixels(draw: ClipDraw, num_frames: int, frame_interval: int, resolution: int) -> Frames:
    """Reads a clip from its video: center crop, resize, mirror.

    Returns:
        uint8 `(F, resolution, resolution, 3)`.
    """
    frames = read_clip(draw.video.info.path, draw.start, num_frames, frame_interval)
    frames = center_crop_resize(frames, resolution)
    return mirror(frames) if draw.flip else frames


def mirror(frames: Frames) -> Frames:
    """Flips frames `(..., H, W, 3)` left to right."""
    return np.ascontiguousarray(frames[..., ::-1, :])


def center_crop_resize(frames: Frames, resolution: int) -> Frames:
    """Scales the shorter side to `resolution` and cuts the middle square out.

    Args:
        frames: uint8 `(F, H, W, 3)`.
        resolution: side of the result.

    Returns:
        uint8 `(F, resolution, resolution, 3)`; antialiased bicubic where the size changes.
    """
    height, width = frames.shape[1:3]
    side = min(height, width)
    if side == height == width == resolution:
        return frames
    # Whole pixels: half of one would blur a crop that is not resized.
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC, box=box)) for f in frames])
