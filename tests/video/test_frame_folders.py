"""Frame folders: the pixels of their images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numbered_frames import HEIGHT, WIDTH, numbers, paint
from PIL import Image

from lavita.video.formats import VideoError
from lavita.video.reading import iter_frames, probe, read_clip
from lavita.video.tree import is_frame_folder


def save_frames(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(paint(i)).save(folder / name)
    return folder


def test_frame_folder(tmp_path: Path) -> None:
    names = [f"frame{i}.png" for i in range(12)]
    folder = save_frames(tmp_path / "frames", names)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame1.png").write_text("not a frame either")
    assert is_frame_folder(folder) and not is_frame_folder(tmp_path) and not is_frame_folder(folder / names[0])
    info = probe(folder)
    assert (info.num_frames, info.height, info.width, info.fps) == (12, HEIGHT, WIDTH, 25.0)
    assert probe(folder, folder_fps=8).fps == 8
    np.testing.assert_array_equal(read_clip(folder, 1, 4, 3), np.stack([paint(i) for i in (1, 4, 7, 10)]))
    assert numbers(iter_frames(folder)) == list(range(12))
    with pytest.raises(VideoError, match=r"frames: has 12 frames; a clip of 5 frames at interval 3 needs 13"):
        read_clip(folder, 0, 5, 3)


def test_frame_folder_of_many_kinds_of_image(tmp_path: Path) -> None:
    rgba = np.full((32, 32, 4), 200, np.uint8)
    rgba[:16, :, 3], rgba[16:, :, 3] = 255, 128
    black_below = np.full((32, 32, 3), 200, np.uint8)
    black_below[16:] = 100
    grey = np.full((32, 32), 77, np.uint8)
    turned = np.zeros((32, 32, 3), np.uint8)
    turned[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(rgba).save(tmp_path / "1.png")
    Image.fromarray(grey).save(tmp_path / "2.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "3.png")
    Image.fromarray(rgba).quantize(8).save(tmp_path / "4.png")
    Image.fromarray(turned).save(tmp_path / "5.JPG", quality=95, exif=exif)
    Image.fromarray(turned).save(tmp_path / "6.bmp")
    Image.fromarray(turned).save(tmp_path / "7.webp", lossless=True)
    clip = read_clip(tmp_path, 0, 7).astype(int)
    expected = [
        black_below,
        grey[..., None],
        grey[..., None],
        black_below,
        np.rot90(turned, -1),
        turned,
        turned,
    ]
    for i, image in enumerate(expected):
        assert np.abs(clip[i] - image).max() <= (12 if i == 4 else 1), f"image {i + 1}"


def test_frame_folder_with_a_frame_of_another_size(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", [f"{i}.png" for i in range(6)])
    Image.fromarray(paint(4, 64, 80)).save(folder / "4.png")
    for read in (probe, lambda path: list(iter_frames(path)), lambda path: read_clip(path, 4, 2)):
        with pytest.raises(VideoError, match=r"frames: frame 4.png is 80x64; the first frame is 96x64"):
            read(folder)


def test_frame_folder_with_a_broken_frame(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", [f"{i}.png" for i in range(6)])
    data = (folder / "3.png").read_bytes()
    for content in (data[: len(data) // 2], b"", b"noise"):
        (folder / "3.png").write_bytes(content)
        with pytest.raises(VideoError, match=r"frames: frame 3.png cannot be read: (?!.*3\.png)"):
            read_clip(folder, 0, 6)
    assert len(read_clip(folder, 0, 3)) == 3


def test_a_frame_that_is_a_link_to_nowhere_is_broken_not_missing(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", [f"{i}.png" for i in range(4)])
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to("gone.png")
    with pytest.raises(VideoError, match=r"frames: frame 2.png cannot be read: No such file or directory"):
        probe(folder)


def test_a_frame_that_repeats_another_one_by_a_link_is_a_frame(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", ["0.png", "1.png"])
    (folder / "2.png").symlink_to("1.png")
    os.link(folder / "1.png", folder / "3.png")
    assert numbers(iter_frames(folder)) == [0, 1, 1, 1]


def test_frame_folder_that_grows_is_listed_again(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", ["0.png", "1.png"])
    assert probe(folder).num_frames == 2
    shutil.copy(folder / "0.png", folder / "2.png")
    os.utime(folder, ns=(1, 1))  # clocks of file systems are coarse
    assert probe(folder).num_frames == 3
