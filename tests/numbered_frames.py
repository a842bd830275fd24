"""Videos whose frames show their own number, so that a test can tell which frame it got."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 50
NUM_BITS, BLOCK = 8, 16
X264: dict[str, Any] = {"crf": "8", "preset": "veryfast"}
VPX = {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}  # with hidden frames


def paint(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame with its number in binary: two rows of four blocks, over a moving texture."""
    texture = np.random.default_rng(0).integers(60, 180, (height + 64, width + 64, 3), dtype=np.uint8)
    frame = texture[number % 64 :, number % 64 :][:height, :width].copy()
    for bit in range(NUM_BITS):
        y, x = bit // 4 * BLOCK, bit % 4 * BLOCK
        frame[y : y + BLOCK, x : x + BLOCK] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that `paint` wrote, robust to compression."""
    blocks = [frame[bit // 4 * BLOCK :, bit % 4 * BLOCK :][4:12, 4:12] for bit in range(NUM_BITS)]
    return sum(int(block.mean() > 127) << bit for bit, block in enumerate(blocks))


def numbers(frames: Sequence[np.ndarray] | Iterator[np.ndarray] | np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def encode(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    images: Sequence[np.ndarray] | None = None,
    times: Sequence[int] | None = None,
    shift: int = 0,
    container: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """Encode `images` (default: painted ones) by plain PyAV, at `times` in ms or a 25th of a second apart."""
    images = [paint(i) for i in range(NUM_FRAMES)] if images is None else images
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for i, image in enumerate(images):
            layout = {2: "gray", 3: {3: "rgb24", 4: "rgba"}.get(image.shape[-1])}[image.ndim]
            frame = VideoFrame.from_ndarray(image, format=layout or "")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            if shift and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            output.mux(packet)
    return path


def decode_all(path: Path) -> np.ndarray:
    """Every frame by plain PyAV, without anything of ours."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rotate(path: Path, degrees: int, mirrored: bool = False) -> Path:
    """Writes a counter-clockwise rotation into the track header of an MP4, which PyAV does only from version 18 on."""
    cos, sin = (round(f(math.radians(degrees)) * 65536) for f in (math.cos, math.sin))
    flip = -1 if mirrored else 1
    matrix = struct.pack(">9i", flip * cos, -sin, 0, flip * sin, cos, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    start = data.index(b"tkhd") + 44
    path.write_bytes(data[:start] + matrix + data[start + len(matrix) :])
    return path
