"""What a video is: pixels, facts, errors, and the endings of video and image files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

# The containers of moving pictures that PyAV's FFmpeg reads (`av.formats_available`), with the suffixes that stand for
# video. Left out are suffixes that mostly mean something else (.ogg and .m4a: audio; .avif: images; .dat, .mod, .v),
# raw pixels, which do not say their size (.yuv), and the formats of old games.
SUFFIXES_BY_CONTAINER = {
    "mov,mp4,m4a,3gp,3g2,mj2": ".mp4 .m4v .mov .qt .3gp .3g2 .f4v .ismv .mj2",
    "matroska,webm": ".mkv .webm .mk3d",
    "avi": ".avi .divx",
    "mpeg": ".mpg .mpeg .mpe .m2p .vob .evo",
    "mpegts": ".ts .mts .m2ts .m2t .tp .trp",
    "asf": ".wmv .asf .dvr-ms",
    "wtv": ".wtv",
    "flv": ".flv",
    "kux": ".kux",
    "swf": ".swf",
    "ogg": ".ogv .ogm",
    "rm": ".rm .rmvb",
    "ivr": ".ivr",
    "mxf": ".mxf",
    "gxf": ".gxf",
    "dv": ".dv .dif",
    "nut": ".nut",
    "nsv": ".nsv",
    "ty": ".ty",
    "vivo": ".viv",
    "dhav": ".dav",
    "ivf": ".ivf",
    "yuv4mpegpipe": ".y4m",
    "gif": ".gif",
    "apng": ".apng",
    # Streams without a container.
    "mpegvideo": ".m1v .m2v .mpv",
    "mjpeg": ".mjpeg .mjpg",
    "h261": ".h261",
    "h263": ".h263",
    "h264": ".h264 .264 .avc .h26l",
    "hevc": ".hevc .h265 .265",
    "vvc": ".vvc .h266 .266",
    "obu": ".obu",
    "vc1": ".vc1",
    "dirac": ".drc .vc2",
    "cavsvideo": ".cavs",
    "dnxhd": ".dnxhd .dnxhr",
}
VIDEO_SUFFIXES = frozenset(" ".join(SUFFIXES_BY_CONTAINER.values()).split())
COMMON_SUFFIXES = ".mp4, .mov, .mkv, .webm, .avi, .mpg, .ts, .wmv, .flv, .gif"
"""A few of `VIDEO_SUFFIXES`, for messages."""
OPEN_OPTIONS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
"""Options of `av.open` for metadata that is not UTF-8, which PyAV replaces by itself from version 19 on."""
FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""Suffixes of image files, which are the frames of a frame folder."""
MOST_PIXELS = 2**27
"""Most pixels of a frame, 16384 x 8192: a file that claims more is refused before memory is taken for it."""
GENERATION = "generation.json"
"""File beside generated videos that says how they were made."""
PROMPTS = "prompts.jsonl"
"""File beside generated videos that says from which prompts they were made."""
GIVEN = "given.jsonl"
"""File beside generated videos that says which frames they were given."""
Frames = npt.NDArray[np.uint8]
"""Pixels: uint8 RGB, `(F, H, W, 3)` for a clip, `(H, W, 3)` for a frame."""
PathLike = str | os.PathLike[str]


class VideoError(ValueError):
    """A video cannot be read as requested; the message begins with its path."""

    def __init__(self, path: PathLike, problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = Path(path)
        self.problem = problem


@dataclass(frozen=True)
class VideoInfo:
    """Size, length and rate of a video.

    Attributes:
        path: Video file, frame folder, or image.
        num_frames: Exact number of frames.
        width: Pixels, after rotation.
        height: Pixels, after rotation.
        fps: Mean number of frames per second; 25 if the file does not say.
    """

    path: Path
    num_frames: int
    width: int
    height: int
    fps: float


def check_frames(field: str, frames: Frames) -> None:
    """Raises a ValueError that names `field` unless frames are uint8 (F, H, W, 3) with F >= 1."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{field} is {frames.dtype} {frames.shape}; it must be uint8 (F, H, W, 3), F >= 1")


def check_same_size(path: PathLike, frame: str, size: tuple[int, int], first: tuple[int, int]) -> None:
    """Raises a VideoError unless a frame has the (height, width) of the first frame of its video."""
    if size != first:
        raise VideoError(path, f"{frame} is {size[1]}x{size[0]}; the first frame is {first[1]}x{first[0]}")


def composite_on_black(rgba: npt.NDArray[Any]) -> Frames:
    """Composites uint8 RGBA pixels `(..., 4)` on black; returns RGB `(..., 3)`."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
