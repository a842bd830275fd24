"""Drawing clips from videos, and the pixels of a clip: center crop, resize, mirror."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image

from lavita.core.seeds import numpy_generator
from lavita.data.catalog import Catalog, Video
from lavita.video.formats import Frames
from lavita.video.reading import read_clip


def clip_span(num_frames: int, frame_interval: int) -> int:
    """Number of frames in the file from the first to the last frame of a clip, both included."""
    return (num_frames - 1) * frame_interval + 1


@dataclass(frozen=True)
class ClipDraw:
    """A drawn clip: its video, its first frame, and whether it is mirrored."""

    video: Video
    start: int
    flip: bool


class ClipSampler:
    """Draws clips uniformly: every (video, start) is equally likely, the last start included.

    A draw is a pure function of (seed, step, index): a resumed run and any number of processes draw what one
    uninterrupted process would have drawn.
    """

    def __init__(
        self,
        catalog: Catalog,
        num_frames: int,
        frame_interval: int,
        horizontal_flip: bool,
        seed: int,
        stream: str = "clip",
        span: int | None = None,
    ) -> None:
        """Prepares the draws; samplers of another `stream` draw independently.

        With `span`, at least that of a clip, clips start only where so many frames of the file are left: samplers that
        differ in the clip's length or interval only then draw the same starts.

        Raises:
            ValueError: if a video is shorter than a clip; `scan(min_frames=clip_span(...))` leaves those out.
        """
        span = clip_span(num_frames, frame_interval) if span is None else span
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
        """Number of distinct (video, start) pairs."""
        return self._ends[-1]

    def draw(self, step: int, index: int, attempt: int = 0) -> ClipDraw:
        """Draws the clip at an index of a step's batch, or the `attempt`-th replacement of one that cannot be read."""
        rng = numpy_generator(self.seed, self.stream, step, index, *([attempt] if attempt else []))
        number = int(rng.integers(self.num_clips))
        video = bisect_right(self._ends, number)
        start = number - (self._ends[video - 1] if video else 0)
        flip = bool(rng.random() < 0.5) if self.horizontal_flip else False
        return ClipDraw(self.catalog.videos[video], start, flip)


def read_pixels(draw: ClipDraw, num_frames: int, frame_interval: int, resolution: int) -> Frames:
    """Reads a clip from its video, crops and resizes it, and mirrors it if it was drawn so.

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
    """Cuts out the middle square of frames and scales it to `resolution`.

    Args:
        frames: uint8 `(F, H, W, 3)`.
        resolution: side of the result in pixels.

    Returns:
        uint8 `(F, resolution, resolution, 3)`, by antialiased bicubic interpolation if the size changes.
    """
    height, width = frames.shape[1:3]
    side = min(height, width)
    if side == height == width == resolution:
        return frames
    # Whole pixels: an offset of half a pixel would blur a crop that is not resized.
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC, box=box)) for f in frames])
