"""Video files whose headers claim more than they hold: refused at once, without memory for what they claim."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path

import pytest
from tiny_data import write_videos

from lavita.video.formats import VideoError
from lavita.video.reading import iter_frames, probe


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(("each", "count"), [(1, 2**31 - 1), (1, 2**31), (0, 2**31), (1, 2**26)])
def test_more_frames_than_the_file_can_hold(tmp_path: Path, each: int, count: int) -> None:
    data = (write_videos(tmp_path, ["good.mp4"]) / "good.mp4").read_bytes()
    table = data.index(b"stsz") + 8  # behind its name, version and flags
    bomb = tmp_path / "bomb.mp4"
    bomb.write_bytes(changed(data, table, struct.pack(">II", each, count)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError, match=r"is cut off: \d+ of \d+ bytes are there"):
        probe(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "no room was made for the frames"


@pytest.mark.parametrize("side", [16_000, 100_000, 2**31 - 1])
def test_more_pixels_than_are_read(tmp_path: Path, side: int) -> None:
    for name, content in (
        ("bomb.y4m", f"YUV4MPEG2 W{side} H{side} F25:1 C420jpeg\nFRAME\n".encode() + b"\0" * 1000),
        ("bomb.apng", one_colour_png(side, side)),
    ):
        (tmp_path / name).write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(VideoError, match=name):
            probe(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(VideoError, match=r"frame pipe\.png is not a file"):
        probe(tmp_path / "pipe.png")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_too_many_pixels_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.y4m").write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 C420jpeg\nFRAME\n" + b"\0" * 1000)
    with pytest.raises(VideoError, match=r"a\.y4m: is 16000x16000; frames of more than 134,217,728 pixels are"):
        probe(tmp_path / "a.y4m")


def one_colour_png(width: int, height: int) -> bytes:
    """A PNG whose pixels are all there only if it is small."""
    rows = zlib.compress((b"\0" * (1 + 3 * width)) * height) if width * height < 10**6 else b""
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def test_an_image_that_is_a_bomb(tmp_path: Path) -> None:
    for name, content in (
        ("pixels", one_colour_png(12_000, 12_000)),
        ("claim", one_colour_png(2**31 - 1, 2**31 - 1)),
        ("text", with_text(one_colour_png(8, 8), 100_000_000)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(VideoError, match=rf"{name}.*0\.png"):
            list(iter_frames(tmp_path / name))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    with pytest.raises(VideoError, match=r"0\.png is 12000x12000; more than 134,217,728 pixels are not read"):
        probe(tmp_path / "pixels")


def with_text(image: bytes, length: int) -> bytes:
    """A PNG with a compressed text."""
    body = b"comment\0\0" + zlib.compress(b"\0" * length, 9)
    return image[:33] + struct.pack(">I", len(body)) + b"zTXt" + body + b"\0\0\0\0" + image[33:]


def test_a_gif_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    whole = write_videos(tmp_path, ["whole.gif"]) / "whole.gif"
    data = whole.read_bytes()
    assert probe(whole).num_frames == 10
    for padding in (b"\0", b"\0" * 1000, b"\r\n"):
        whole.write_bytes(data + padding)
        assert probe(whole).num_frames == 10
    # Behind each block: there a zero ends what was written so far, as a padding would.
    ends = [at for at in range(500, len(data) - 1) if data[at - 1] == 0 and data[at] in b"\x21\x2c"]
    assert len(ends) > 5
    for end in (*ends, len(data) - 1):
        cut = tmp_path / f"{end}.gif"
        cut.write_bytes(data[:end])
        with pytest.raises(VideoError, match="is cut off"):
            probe(cut)


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zeros.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zeros.mp4"):
        with pytest.raises(VideoError, match=f"{name}: is neither a file nor a folder"):
            probe(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(VideoError, match=r"frame pipe\.png is not a file"):
        probe(tmp_path / "pipe.png")
