"""Writing videos and contact sheets."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from numbered_frames import numbers, paint
from PIL import Image

from lavita.video import writing
from lavita.video.contact_sheet import contact_sheet
from lavita.video.reading import probe, read_clip
from lavita.video.writing import video_writer, write_video


def boxes(path: Path) -> list[bytes]:
    """The kinds of the top-level boxes of an MP4 file."""
    data, at, kinds = path.read_bytes(), 0, []
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return kinds


def test_written_mp4(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    smooth = np.indices((64, 96)).sum(0)[None, :, :, None] + np.array([0, 40, 90]) + np.arange(10)[:, None, None, None]
    frames = smooth.astype(np.uint8)
    write_video(path, frames, 30000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.frames == 10
    assert boxes(path).index(b"moov") < boxes(path).index(b"mdat")
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (10, 64, 96, 30000 / 1001)
    assert np.abs(read_clip(path, 0, 10).astype(int) - frames).mean() < 1.5
    assert os.listdir(path.parent) == ["a.mp4"]


def test_written_colors_survive(tmp_path: Path) -> None:
    primaries = [[255, 0, 0], [0, 200, 50], [30, 60, 250], [250, 240, 10], [0, 0, 0], [255, 255, 255]]
    colors = np.array(primaries, np.uint8)
    write_video(tmp_path / "a.mp4", np.tile(colors[:, None, None], (1, 32, 32, 1)), 8)
    assert np.abs(read_clip(tmp_path / "a.mp4", 0, 6)[:, 16, 16].astype(int) - colors).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47), (1, 1)])
def test_written_mp4_of_odd_size_repeats_the_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = np.full((3, height, width, 3), 60, np.uint8)
    frames[:, -1:], frames[:, :, -1:] = 180, 180
    write_video(tmp_path / "a.mp4", frames, 8)
    clip = read_clip(tmp_path / "a.mp4", 0, 3).astype(int)
    assert clip.shape == (3, height + height % 2, width + width % 2, 3)
    np.testing.assert_allclose(clip, np.pad(frames, [(0, n % 2) for n in (0, height, width, 0)], "edge"), atol=12)


def test_written_gif(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).choice(np.array([0, 90, 255], np.uint8), (12, 33, 47, 3))
    frames[5:8] = frames[5]  # repeated frames must stay frames
    write_video(tmp_path / "a.gif", frames, 12.5)
    info = probe(tmp_path / "a.gif")
    assert (info.num_frames, info.height, info.width, info.fps) == (12, 33, 47, 12.5)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.gif", 0, 12), frames)


def test_written_mkv_loses_nothing(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 33, 47, 3), dtype=np.uint8)
    frames[5:8] = frames[5]
    for name in ("a.mkv", "b.mkv"):
        write_video(tmp_path / name, frames, 12.5)
    info = probe(tmp_path / "a.mkv")
    assert (info.num_frames, info.height, info.width, info.fps) == (12, 33, 47, 12.5)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", 0, 12), frames)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", 3, 4, 2), frames[3:11:2])
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def moving_noise() -> np.ndarray:
    """A clip of which x264, left to itself, makes several different files on a processor with AVX-512."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (6, 6, 3)).repeat(8, 0).repeat(8, 1)
    moved = [np.roll(picture, (2 * i, i), (0, 1)) + rng.integers(-12, 13, (48, 48, 3)) for i in range(8)]
    return np.array(moved).clip(0, 255).astype(np.uint8)


def test_equal_frames_give_equal_mp4_files(tmp_path: Path) -> None:
    """100 times, because the fault it is about shows in one to ten files of a hundred, on some processors only."""
    frames, files = moving_noise(), set()
    for _ in range(100):
        write_video(tmp_path / "a.mp4", frames, 8)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1
    assert b" mbtree=0 " in files.pop()


def test_an_mp4_file_does_not_depend_on_the_number_of_cores(tmp_path: Path) -> None:
    frames = np.tile(moving_noise(), (1, 6, 6, 1))
    write_video(tmp_path / "a.mp4", frames, 8)
    assert b" threads=1 " in (tmp_path / "a.mp4").read_bytes()
    assert b" sliced_threads=0 " in (tmp_path / "a.mp4").read_bytes()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", np.stack([paint(7)] * 3), 8)

    def fail(pixels: np.ndarray) -> VideoFrame:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_to_yuv", fail)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", np.stack([paint(9)] * 3), 8)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert numbers(read_clip(tmp_path / "a.mp4", 0, 3)) == [7, 7, 7]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "problem"),
    [
        ("a.avi", np.zeros((2, 8, 8, 3), np.uint8), 8, "ends in .mp4, .gif, .mkv"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.float32), 8, "frames is float32"),
        ("a.mp4", np.zeros((2, 3, 8, 8), np.uint8), 8, "must be uint8"),
        ("a.mp4", np.zeros((0, 8, 8, 3), np.uint8), 8, "F >= 1"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 0, "fps is 0"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.uint8), float("nan"), "fps is nan"),
        ("a.gif", np.zeros((2, 8, 8, 3), np.uint8), 120, "fps is 120"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, frames: np.ndarray, fps: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        write_video(tmp_path / name, frames, fps)
    assert not os.listdir(tmp_path)


def test_contact_sheet(tmp_path: Path) -> None:
    levels = np.arange(9, dtype=np.uint8) * 20
    clip = np.tile(levels[:, None, None, None], (1, 10, 12, 3))
    path = tmp_path / "new" / "sheet.png"
    contact_sheet([[clip], [clip[:2], clip[:1]]], path, num_columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    # Rows 20 high, columns 24 wide, 2 between; frames 0, 4 and 8 of nine; short clips show all they have.
    assert sheet.shape == (20 + 2 + 20, 3 * 24 + 2 * 2, 3)
    assert [sheet[5, x, 0] for x in (5, 31, 57)] == [0, 80, 160]
    assert [sheet[30, x, 0] for x in (5, 31, 57)] == [0, 20, 0]
    assert (sheet[20:22] == 255).all()
    contact_sheet([[clip], [clip]], path, row_labels=["one", "two"], num_columns=3, scale=2)
    labelled = np.asarray(Image.open(path))
    assert len(labelled) > len(sheet) and labelled[:16].min() < 128


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([], {}, "rows is empty"),
        ([[]], {}, "empty row"),
        ([[np.zeros((2, 8, 8), np.uint8)]], {}, r"rows\[0\]\[0\] is uint8 \(2, 8, 8\)"),
        ([[np.zeros((2, 8, 8, 3), np.uint8)]], {"row_labels": ["a", "b"]}, "2 labels"),
        ([[np.zeros((2, 8, 8, 3), np.uint8)]], {"num_columns": 0}, "num_columns is 0"),
    ],
)
def test_contact_sheets_that_cannot_be(
    tmp_path: Path, rows: list[list[np.ndarray]], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        contact_sheet(rows, tmp_path / "a.png", **settings)
    with pytest.raises(ValueError, match=r"ends in .png"):
        contact_sheet(rows, tmp_path / "a.jpg", **settings)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".mkv"])
def test_a_file_does_not_depend_on_its_pieces(suffix: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 18, 21, 3), dtype=np.uint8)
    write_video(tmp_path / f"whole{suffix}", frames, 10)
    with video_writer(tmp_path / f"pieces{suffix}", 10) as write:
        for piece in (frames[:1], frames[1:5], frames[5:]):
            write(piece)
        assert not (tmp_path / f"pieces{suffix}").exists()
    assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"pieces{suffix}").read_bytes()


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames are missing"), video_writer(tmp_path / "none.mp4", 10):
        pass
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with (
        pytest.raises(ValueError, match="frames are 18x16, but the first ones were 16x16"),
        video_writer(tmp_path / "sizes.mp4", 10) as write,
    ):
        write(frames)
        write(np.zeros((2, 16, 18, 3), np.uint8))
    assert not list(tmp_path.iterdir())
