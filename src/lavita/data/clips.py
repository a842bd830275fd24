"""Drawing clips from videos, and the pixels of a clip: crop or pad, resize, mirror."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image

from lavita.core.seeds import numpy_generator
from lavita.core.sizes import AnySize, Size
from lavita.data.catalog import Catalog, Video
from lavita.data.config import Fit
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
    size: AnySize | None = None
    """Size of its frames in pixels, in a run with several; by default the only one."""


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
        size: AnySize | None = None,
    ) -> None:
        """Prepares the draws; samplers of another `stream` draw independently. `size` is that of all clips.

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
        self.horizontal_flip, self.seed, self.stream, self.size = horizontal_flip, seed, stream, size
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
        return ClipDraw(self.catalog.videos[video], start, flip, self.size)

    def at(self, step: int) -> ClipSampler:
        """The sampler of a step: this one, for all of them. `buckets.BucketSampler` has several."""
        return self


def read_pixels(draw: ClipDraw, num_frames: int, frame_interval: int, resolution: AnySize, fit: Fit = "crop") -> Frames:
    """Reads a clip from its video, fits it to the resolution, and mirrors it if it was drawn so.

    Returns:
        uint8 `(F, height, width, 3)`.
    """
    frames = read_clip(draw.video.info.path, draw.start, num_frames, frame_interval)
    frames = fit_frames(frames, resolution, fit)
    return mirror(frames) if draw.flip else frames


def fit_frames(frames: Frames, resolution: AnySize, fit: Fit = "crop") -> Frames:
    """Brings frames to a size, as `data.fit` says; `bucket` crops to the size of a bucket."""
    return pad_resize(frames, resolution) if fit == "pad" else center_crop_resize(frames, resolution)


def mirror(frames: Frames) -> Frames:
    """Flips frames `(..., H, W, 3)` left to right."""
    return np.ascontiguousarray(frames[..., ::-1, :])


def center_crop_resize(frames: Frames, resolution: AnySize) -> Frames:
    """Cuts out the middle of frames, as large as it can be in the shape of `resolution`, and scales it to that.

    Args:
        frames: uint8 `(F, H, W, 3)`.
        resolution: size of the result in pixels.

    Returns:
        uint8 `(F, height, width, 3)`, by antialiased bicubic interpolation if the size changes.
    """
    height, width = frames.shape[1:3]
    size = Size.of(resolution)
    if (height, width) == (size.height, size.width):
        return frames
    # Whole pixels: an offset of half a pixel would blur a crop that is not resized.
    cut_height = min(height, max(1, round(width * size.height / size.width)))
    cut_width = min(width, max(1, round(height * size.width / size.height)))
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return _resized(frames, size.width, size.height, (left, top, left + cut_width, top + cut_height))


def pad_resize(frames: Frames, resolution: AnySize) -> Frames:
    """Scales frames (F, H, W, 3) to fit into `resolution`, in the middle of black; otherwise as above."""
    height, width = frames.shape[1:3]
    size = Size.of(resolution)
    scaled_height = min(size.height, max(1, round(height * size.width / width)))
    scaled_width = min(size.width, max(1, round(width * size.height / height)))
    if (height, width) != (scaled_height, scaled_width):
        frames = _resized(frames, scaled_width, scaled_height, (0, 0, width, height))
    top, left = (size.height - scaled_height) // 2, (size.width - scaled_width) // 2
    padded = np.zeros((len(frames), size.height, size.width, 3), np.uint8)
    padded[:, top : top + scaled_height, left : left + scaled_width] = frames
    return padded


def _resized(frames: Frames, width: int, height: int, box: tuple[int, int, int, int]) -> Frames:
    """A box (left, top, right, bottom) of frames, scaled."""
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC, box=box)) for f in frames])
