"""Writes videos that every player and browser shows, or that lose nothing."""

from __future__ import annotations

import os
import uuid
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image

from lavita.video.formats import Frames, PathLike, check_frames


def write_video(path: PathLike, frames: Frames, fps: float) -> None:
    """Write a video in a form that every player and browser shows.

    MP4 is H.264 at a visually clean quality; an odd height or width is made even, as 4:2:0 colour needs, by
    repeating the last row or column. GIF has 256 colours a frame. MKV is FFV1, which loses nothing and which browsers
    do not play. The file appears whole or not at all.

    Args:
        path: Where to write; ends in ``.mp4``, ``.gif`` or ``.mkv``. Missing folders are made.
        frames: uint8 (F, H, W, 3), RGB, F >= 1.
        fps: Frames a second, above 0; at most 100 for GIF, whose clock ticks in hundredths of a second.

    Raises:
        ValueError: Another suffix, dtype, shape or rate.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".mkv"):
        raise ValueError(f"path is {path}; a video to write ends in .mp4, .gif or .mkv")
    check_frames("frames", frames)
    if not 0 < fps <= (100 if suffix == ".gif" else 1000):
        raise ValueError(f"fps is {fps}; it must be above 0 and at most 1000 (GIF: 100)")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.absolute().with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{suffix}")
    try:
        _encode(partial, frames, Fraction(fps).limit_denominator(1001) or Fraction(1, 1001))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(path: Path, frames: Frames, rate: Fraction) -> None:
    codec, pixel_format, convert = {
        ".mp4": ("libx264", "yuv420p", _to_yuv),
        ".gif": ("gif", "pal8", _quantize),
        ".mkv": ("ffv1", "bgr0", _to_bgr),
    }[path.suffix]
    is_mp4 = path.suffix == ".mp4"
    # Matroska files carry random numbers unless told not to; equal frames shall be equal files.
    options = {".mp4": {"movflags": "faststart"}, ".mkv": {"fflags": "+bitexact"}}.get(path.suffix, {})
    with av.open(str(path), "w", options=options) as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=rate))
        if is_mp4:
            to_even = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
            frames = np.pad(frames, to_even, "edge")
            stream.options = {"crf": "12"}
            # Tagged, since players guess the matrix of untagged files from their size.
            stream.codec_context.colorspace, stream.codec_context.color_range = 6, ColorRange.MPEG
        stream.pix_fmt = pixel_format
        stream.height, stream.width = frames.shape[1:3]
        for i, pixels in enumerate(frames):
            frame = convert(pixels)
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _quantize(pixels: Frames) -> VideoFrame:
    image = Image.fromarray(pixels).quantize(256)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, np.uint8)  # ARGB
    palette[: len(colors), 1:] = colors
    return VideoFrame.from_ndarray(cast(Any, (np.asarray(image), palette)), format="pal8")


def _to_bgr(pixels: Frames) -> VideoFrame:
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format="bgr0")


def _to_yuv(pixels: Frames) -> VideoFrame:
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND,
    )
