"""Writes videos: MP4 and GIF, which every player and browser shows, and lossless MKV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, cast, get_args

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image

from lavita.core.files import replacing
from lavita.core.names import VideoFormat
from lavita.video.formats import Frames, PathLike, check_frames

# FFmpeg's SWS_BICUBIC, SWS_FULL_CHR_H_INP and SWS_ACCURATE_RND; PyAV has names for them only from version 18 on.
_SCALING = 0x4 | 0x4000 | 0x40000


def write_video(path: PathLike, frames: Frames, fps: float) -> None:
    """Writes a video file, whole or not at all; equal frames give equal files, whatever the number of cores.

    MP4 is H.264 at a visually clean quality; an odd height or width is made even, as 4:2:0 colour needs, by
    repeating the last row or column. GIF has 256 colours per frame. MKV is FFV1, which is lossless and which browsers
    do not play.

    Args:
        path: File to write, which ends in ``.mp4``, ``.gif`` or ``.mkv``. Missing folders are created.
        frames: uint8 (F, H, W, 3), RGB, F >= 1.
        fps: Frames per second, above 0 and at most 1000; at most 100 for GIF, which counts hundredths of a second.

    Raises:
        ValueError: Another suffix, dtype, shape or rate.
    """
    with video_writer(path, fps) as write:
        write(frames)


@contextmanager
def video_writer(path: PathLike, fps: float) -> Iterator[Callable[[Frames], None]]:
    """Writes a video file piece by piece; it is there at the end, whole, or not at all.

    Args:
        path: As for `write_video`.
        fps: As for `write_video`.

    Yields:
        A function that takes the next frames, uint8 (F, H, W, 3), all of one size; the file does not depend on how they
        are divided.

    Raises:
        ValueError: Another suffix, dtype, shape or rate, or no frames.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (allowed := [f".{name}" for name in get_args(VideoFormat)]):
        raise ValueError(f"path is {path}; a video to write ends in {', '.join(allowed)}")
    if not 0 < fps <= (100 if suffix == ".gif" else 1000):
        raise ValueError(f"fps is {fps}; it must be above 0 and at most 1000 (GIF: 100)")
    # An absolute path, because FFmpeg takes the part before a colon in a relative one for a protocol.
    with replacing(path.absolute()) as partial:
        # Without this option Matroska files hold random numbers; equal frames must give equal files.
        options = {".mp4": {"movflags": "faststart"}, ".mkv": {"fflags": "+bitexact"}}.get(suffix, {})
        with av.open(str(partial), "w", options=options) as container:
            encoder = _Encoder(container, suffix, Fraction(fps).limit_denominator(1001) or Fraction(1, 1001))
            yield encoder.write
            encoder.end()


class _Encoder:
    """Encodes frames into a container."""

    def __init__(self, container: OutputContainer, suffix: str, rate: Fraction) -> None:
        codec, self._pixel_format, self._convert = {
            ".mp4": ("libx264", "yuv420p", _to_yuv),
            ".gif": ("gif", "pal8", _quantize),
            ".mkv": ("ffv1", "bgr0", _to_bgr),
        }[suffix]
        self._container, self._rate, self._is_mp4 = container, rate, suffix == ".mp4"
        self._stream = stream = cast(VideoStream, container.add_stream(codec, rate=rate))
        self._count = 0
        if self._is_mp4:
            # Equal frames must give equal files. x264 computes macroblock trees with approximate numbers, differently
            # on each kind of processor and with AVX-512 even from run to run; threads would divide a frame into slices.
            stream.options = {"crf": "14", "mbtree": "0"}
            stream.codec_context.thread_count = 1
            # Tagged, because players guess the matrix of untagged files from their size.
            stream.codec_context.colorspace, stream.codec_context.color_range = 6, ColorRange.MPEG

    def write(self, frames: Frames) -> None:
        """Encodes the next frames."""
        check_frames("frames", frames)
        stream = self._stream
        if self._is_mp4:
            to_even = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
            frames = np.pad(frames, to_even, "edge")
        if not self._count:
            stream.pix_fmt = self._pixel_format
            stream.height, stream.width = frames.shape[1:3]
        elif (stream.height, stream.width) != frames.shape[1:3]:
            height, width = frames.shape[1:3]
            raise ValueError(f"frames are {width}x{height}, but the first ones were {stream.width}x{stream.height}")
        for pixels in frames:
            frame = self._convert(pixels)
            frame.pts, frame.time_base = self._count, 1 / self._rate
            self._count += 1
            self._container.mux(stream.encode(frame))

    def end(self) -> None:
        """Encodes what the codec still holds back."""
        if not self._count:
            raise ValueError("frames are missing: a video has at least one")
        self._container.mux(self._stream.encode())


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
        interpolation=_SCALING,
    )
