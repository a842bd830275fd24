"""Tiny videos for tests that need real files: every frame of every video is different."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from lavita.video.writing import write_video


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
        (root / name).write_bytes(_encoded(Path(name).suffix, num_frames, seed, height, width))
    return root


@cache
def _encoded(suffix: str, num_frames: int, seed: int, height: int, width: int) -> bytes:
    """A video file; each is encoded once in a test session."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"video{suffix}"
        write_video(file, paint(num_frames, seed, height, width), fps=10)
        return file.read_bytes()


def write_broken(file: Path) -> Path:
    """Writes bytes that are not a video."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.random.default_rng(0).bytes(2000))
    return file


def write_frames(root: Path, names: Sequence[str], num_frames: int = 4, pattern: str = "{:06d}.jpg") -> Path:
    """Writes a folder of frames for each name below `root`, which it returns."""
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(paint(num_frames, seed)):
            Image.fromarray(frame).save(root / name / pattern.format(number))
    return root


def write_numbered(folder: Path, num_frames: int, side: int = 32) -> None:
    """Writes a folder of grey frames; frame `i` has the value `i`."""
    folder.mkdir(parents=True)
    for number in range(num_frames):
        Image.new("RGB", (side, side), (number, number, number)).save(folder / f"{number}.png")


def write_avi(root: Path, names: Sequence[str], num_frames: int = 4) -> Path:
    """Like `write_videos`, for names that end in .avi: Motion JPEG, so that every frame is decoded to be counted."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        frames = paint(num_frames, seed)
        with av.open(str(root / name), "w") as container:
            stream = container.add_stream("mjpeg", rate=25)
            assert isinstance(stream, VideoStream)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuvj420p"
            for pixels in frames:
                container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return root
