"""Reads videos exactly, frame by frame: video files, frame folders, and images as videos of one frame.

Frame ``i`` of a video is its ``i``-th frame in presentation order, whatever the container, the codec or the
frame rate. Of several video tracks the container's default one is read. Pixels are uint8 RGB, rotated and mirrored
as the file says; transparent sources are composited on black, grey ones are repeated over the channels, and deeper
ones are rounded to 8 bits. Pixel aspect ratio and interlacing are ignored. A broken file raises `VideoError` instead
of yielding fewer frames. Damage passes only if the decoder does not notice it, for example a missing end between two
frames of a container that does not declare its length (MP4, Matroska, AVI and GIF do).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lavita.video.declared import needed_size
from lavita.video.formats import (
    COMMON_SUFFIXES,
    MOST_PIXELS,
    OPEN_OPTIONS,
    VIDEO_SUFFIXES,
    Frames,
    PathLike,
    VideoError,
    VideoInfo,
    check_same_size,
    composite_on_black,
)
from lavita.video.frame_folders import image_size, list_images, read_images

# Packets are counted as frames, and clips are read from a keyframe, only for containers that store the time of every
# frame and for codecs with one shown frame per packet. Everything else is counted by decoding it and read from the
# beginning: AVI (no presentation times), transport and program streams (a packet may be a field, and times may jump),
# VP8 (hidden frames), MPEG-4 part 2 (packets that repeat a frame), GIF.
_INDEXED_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_ONE_FRAME_PER_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "mjpeg", "prores", "ffv1"})
_LIMITS = {"max_pixels": str(MOST_PIXELS)}  # FFmpeg's, before it makes room for a frame
_NUM_VERIFIED = 4  # frames decoded to check that packets and frames agree


@dataclass(frozen=True, eq=False)
class _Index:
    """Where the frames of a file are: `pts` (F,) int64 in presentation order, None if packets do not show them."""

    pts: npt.NDArray[np.int64] | None
    keys: tuple[tuple[int, int | None], ...]  # (pts, dts) of the keyframes, sorted
    height: int
    width: int
    fps: float


def probe(path: PathLike, folder_fps: float = 25.0) -> VideoInfo:
    """Counts and measures the frames of a video.

    Reads a video file once to its end, and decodes it only if its packets do not show how many frames there are. Reads
    the header of every image of a frame folder.

    Args:
        path: Video file, frame folder, or image.
        folder_fps: Frames per second to report for images, which have no rate.

    Raises:
        VideoError: The video is missing, empty or broken, or is a folder with frames of several sizes.
    """
    if (images := list_images(path)) is not None:
        folder, names = images
        height, width = image_size(folder, names[0])
        for name in names:
            check_same_size(path, f"frame {name}", image_size(folder, name), (height, width))
        return VideoInfo(Path(path), len(names), width, height, folder_fps)
    index = _index(*_file_key(path))
    num_frames = _count_decoded(*_file_key(path)) if index.pts is None else len(index.pts)
    return VideoInfo(Path(path), num_frames, index.width, index.height, index.fps)


def codec(path: PathLike) -> str:
    """The codec and pixel format of a video file, as in `h264 yuv420p`; VideoError if it cannot be opened."""
    with _open(path) as (_, stream):
        context = stream.codec_context
        return f"{context.name} {context.format.name if context.format else ''}".strip()


def read_clip(path: PathLike, start: int = 0, num_frames: int = 16, frame_interval: int = 1) -> Frames:
    """Reads the frames ``start, start + frame_interval, ...`` of a video.

    The result equals decoding the video from its beginning and picking frames. A file is read from the last keyframe
    before the clip if that is safe, and from its beginning otherwise.

    Args:
        path: Video file, frame folder (in natural order: ``frame2`` before ``frame10``), or image.
        start: The first frame, from 0.
        num_frames: Frames in the clip, F.
        frame_interval: Step between frames of the clip; 1 takes every frame.

    Returns:
        uint8 (F, H, W, 3), RGB.

    Raises:
        VideoError: The video is missing, broken, or shorter than the clip.
        ValueError: A negative `start`, or `num_frames` or `frame_interval` below 1.
    """
    for field, value, lowest in (
        ("start", start, 0),
        ("num_frames", num_frames, 1),
        ("frame_interval", frame_interval, 1),
    ):
        if value < lowest:
            raise ValueError(f"{field} is {value}; it must be at least {lowest}")
    wanted = range(start, start + num_frames * frame_interval, frame_interval)
    if (images := list_images(path)) is not None:
        folder, names = images
        _check_length(path, len(names), wanted)
        return np.stack(list(read_images(folder, names[0], [names[i] for i in wanted])))
    index = _index(*_file_key(path))
    if index.pts is not None:
        _check_length(path, len(index.pts), wanted)
        if (found := _read_from_keyframe(path, index, wanted)) is not None:
            return np.stack(found)
    clip, num_decoded = [], 0
    with contextlib.closing(_decode(path)) as decoded:
        for i, frame in enumerate(decoded):
            num_decoded = i + 1
            if i in wanted:
                clip.append(_to_rgb(path, frame))
            if len(clip) == num_frames:
                return np.stack(clip)
    _check_complete(path, index, num_decoded)
    _check_length(path, num_decoded, wanted)
    raise AssertionError("a video that is long enough holds all frames of the clip")


def iter_frames(path: PathLike) -> Iterator[Frames]:
    """Yields every frame of a video in order.

    Yields:
        uint8 (H, W, 3), RGB, all of the same size.

    Raises:
        VideoError: The video is missing or broken. If a frame is damaged, the frames before it are yielded first.
    """
    if (images := list_images(path)) is not None:
        folder, names = images
        yield from read_images(folder, names[0], names)
        return
    index = _index(*_file_key(path))
    num_decoded = 0
    for frame in _decode(path):
        yield _to_rgb(path, frame)
        num_decoded += 1
    _check_complete(path, index, num_decoded)


def _check_length(path: PathLike, num_frames: int, wanted: range) -> None:
    if wanted[-1] >= num_frames:
        raise VideoError(
            path,
            f"has {num_frames} frames; a clip of {len(wanted)} frames at interval {wanted.step} needs "
            f"{wanted[-1] - wanted[0] + 1}, from frame {wanted[0]} on",
        )


def _check_complete(path: PathLike, index: _Index, num_decoded: int) -> None:
    if index.pts is not None and num_decoded < len(index.pts):
        raise VideoError(path, f"is damaged: {num_decoded} of its {len(index.pts)} frames can be decoded")


def _file_key(path: PathLike) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, f"cannot be found: {error.strerror}") from error
    if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
        raise VideoError(path, f"is not a frame folder and has none of the suffixes of videos ({COMMON_SUFFIXES}, ...)")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is neither a file nor a folder")
    if not status.st_size:
        raise VideoError(path, "is an empty file")
    return os.fspath(path), status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _open(path: PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the video stream to show; errors of FFmpeg inside the block become `VideoError`.

    It is the one that the container marks as its default, as players show it, else the first one. Covers do not count.
    """
    try:
        # An absolute path, because FFmpeg takes the part before a colon in a relative one for a protocol.
        with av.open(os.path.abspath(path), options=_LIMITS, **OPEN_OPTIONS) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(path, "has no video stream")
            stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
            if stream.codec_context is None:
                raise VideoError(path, "has a video stream of an unknown codec")
            # Several videos are decoded in parallel; threads inside each decoder would only compete.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = _LIMITS
            _check_pixels(path, stream.width, stream.height)
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        limit = f", or its frames have more than {MOST_PIXELS:,} pixels" if error.errno == errno.EINVAL else ""
        raise VideoError(path, f"cannot be decoded: {error.strerror}{limit}") from error


def _decode(path: PathLike) -> Generator[VideoFrame, None, None]:
    with _open(path) as (container, stream):
        first, i = None, 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(path, f"is damaged or cut off at about frame {i}")
            for frame in packet.decode():
                assert isinstance(frame, VideoFrame)
                if frame.is_corrupt:
                    raise VideoError(path, f"frame {i} is damaged")
                first = first or (frame.height, frame.width)
                check_same_size(path, f"frame {i}", (frame.height, frame.width), first)
                yield frame
                i += 1


@lru_cache(maxsize=16384)
def _index(path: str, mtime_ns: int, size: int) -> _Index:
    _check_size(path, size, needed_size(path))
    with _open(path) as (container, stream):
        needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        _check_size(path, size, needed)
        packets: list[tuple[int | None, int | None, bool]] = []
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(path, f"is damaged or cut off at about frame {len(packets)}")
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe))
        indexed = container.format.name in _INDEXED_CONTAINERS and stream.codec.canonical_name in _ONE_FRAME_PER_PACKET
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        if container.format.name == "dv" and stream.guessed_rate:  # reports its clock as the average rate
            fps = float(stream.guessed_rate)
        if container.format.name == "gif" and container.duration:  # the rate of its stream is a guess
            fps = len(packets) * av.time_base / container.duration
    with contextlib.closing(_decode(path)) as decoded:
        head = list(itertools.islice(decoded, _NUM_VERIFIED))
    if not head:
        raise VideoError(path, "has no frame that can be decoded")
    height, width, _ = _to_rgb(path, head[0]).shape
    times = sorted({pts for pts, _, _ in packets if pts is not None})
    # The first frames show whether frames have lost their reference at the start, and whether packets are fields.
    if not indexed or len(times) < len(packets) or [frame.pts for frame in head] != times[:_NUM_VERIFIED]:
        return _Index(None, (), height, width, fps)
    keys = tuple(sorted((pts, dts) for pts, dts, is_key in packets if is_key and pts is not None))
    return _Index(np.array(times, np.int64), keys, height, width, fps)


@lru_cache(maxsize=16384)
def _count_decoded(path: str, mtime_ns: int, size: int) -> int:
    return sum(1 for _ in _decode(path))


def _check_size(path: str, size: int, needed: int) -> None:
    """Raises a VideoError for a file that lacks its end, which demuxing would ignore in silence."""
    if needed > size:
        raise VideoError(path, f"is cut off: {size} of {needed} bytes are there")


def _check_pixels(path: PathLike, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise VideoError(path, f"is {width}x{height}; frames of more than {MOST_PIXELS:,} pixels are not read")


def _read_from_keyframe(path: PathLike, index: _Index, wanted: range) -> list[Frames] | None:
    """Reads a clip from a keyframe; None if only decoding from the beginning is sure to be exact."""
    assert index.pts is not None
    first_pts = int(index.pts[wanted[0]])
    num_before = bisect.bisect_right(index.keys, first_pts, key=lambda key: key[0])
    if not num_before or index.keys[num_before - 1][0] <= index.pts[0]:
        return None
    with contextlib.suppress(VideoError), _open(path) as (container, stream):
        pts, dts = index.keys[num_before - 1]
        for time in (pts, pts if dts is None else dts):  # Matroska seeks by pts, MP4 by dts
            container.seek(time, stream=stream)
            packets = container.demux(stream)
            key = next(packets)
            if key.is_keyframe and key.pts is not None and key.pts <= first_pts:
                break
        else:
            return None
        clip: list[Frames] = []
        i = first = int(np.searchsorted(index.pts, key.pts))
        for packet in itertools.chain([key], packets):
            for frame in packet.decode():
                assert isinstance(frame, VideoFrame)
                if frame.pts is not None and frame.pts < key.pts:
                    continue  # leads an open group of pictures; refers to frames before the keyframe
                if frame.pts != index.pts[i] or frame.is_corrupt or (i == first and not frame.key_frame):
                    return None
                if i in wanted:
                    clip.append(_to_rgb(path, frame))
                    if clip[-1].shape[:2] != (index.height, index.width):
                        return None
                if len(clip) == len(wanted):
                    return clip
                i += 1
    return None


def _to_rgb(path: PathLike, frame: VideoFrame) -> Frames:
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        pixels = composite_on_black(frame.to_ndarray(format="rgba", threads=1))
    else:
        pixels = cast(Frames, frame.to_ndarray(format="rgb24", threads=1))
    if (matrix := cast(Any, frame.side_data.get("DISPLAYMATRIX"))) is None:
        return pixels
    # Source pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    if a == d == 0 and b and c:
        pixels, flip_x, flip_y = pixels.transpose(1, 0, 2), c < 0, b < 0
    elif b == c == 0 and a and d:
        flip_x, flip_y = a < 0, d < 0
    else:
        raise VideoError(path, "is rotated by an angle that is not a multiple of 90 degrees, which cannot be read")
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
