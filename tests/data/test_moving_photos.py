"""Videos of photographs: their shape, their movement, what they depend on, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavita.core.seeds import numpy_generator
from lavita.data.moving_photos import moving_photo, render_moving_photos
from lavita.video.reading import iter_frames


def write_photo(path: Path, size: tuple[int, int], seed: int) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    picture.save(path)
    return picture


def test_every_photograph_gets_its_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photo(tmp_path / "photos" / "a" / "tall.png", (200, 100), 0)
    write_photo(tmp_path / "photos" / "tall.jpg", (70, 150), 1)
    write_photo(tmp_path / "photos" / "tiny.png", (63, 100), 2)
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")

    assert render_moving_photos(tmp_path / "photos", tmp_path / "out", 2, 3, 32) == 4
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-tall-0.mp4", "0000-tall-1.mp4", "0001-tall-0.mp4", "0001-tall-1.mp4"]
    for name in names:
        frames = np.stack(list(iter_frames(tmp_path / "out" / name)))
        assert frames.shape == (3, 32, 32, 3)
        assert frames.std() > 5, "a picture, not one colour"
    printed = "".join(capsys.readouterr())
    assert "broken.png" in printed
    assert "left out: 1 images of less than 64 pixels on a side" in printed


def test_a_video_is_a_function_of_its_seed_and_moves_smoothly(tmp_path: Path) -> None:
    pictures = [write_photo(tmp_path / f"{n}.png", (180, 140), n) for n in range(2)]

    def film(seed: int) -> Any:
        return moving_photo(pictures[0], pictures[1], numpy_generator(seed, "test"), 6, 32).astype(int)

    videos = [film(seed) for seed in range(12)]
    np.testing.assert_array_equal(videos[0], film(0))
    assert not np.array_equal(videos[0], videos[1])
    changes = np.array([[np.abs(video[k] - video[0]).mean() for k in (1, 5)] for video in videos])
    assert (changes[:, 0] > 0).all(), "the piece in front moves even before a camera that stands still"
    assert changes[:, 0].mean() < 0.6 * changes[:, 1].mean(), "neighbouring frames are more alike than distant ones"


def test_a_turned_view_shows_the_picture_itself(tmp_path: Path) -> None:
    """All colours of a view are the picture's: beyond its borders it is mirrored, not black."""
    red = Image.new("RGB", (90, 70), (200, 30, 40))
    for seed in range(6):
        frames = moving_photo(red, red, numpy_generator(seed), 5, 16)
        np.testing.assert_array_equal(frames, np.broadcast_to(np.array([200, 30, 40], dtype=np.uint8), frames.shape))


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        render_moving_photos(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no usable images"):
        render_moving_photos(tmp_path / "empty", tmp_path / "out")
    write_photo(tmp_path / "small" / "a.png", (200, 40), 0)
    with pytest.raises(ValueError, match="holds no image of at least 64 x 64 pixels"):
        render_moving_photos(tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()
