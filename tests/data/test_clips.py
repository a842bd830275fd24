"""Data sets and clips: what is found, which clips are drawn, and what becomes of their pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from tiny_data import paint, write_broken, write_frames, write_videos

from lavita.data.catalog import Catalog, Video, scan
from lavita.data.clips import ClipDraw, ClipSampler, center_crop_resize, clip_span, mirror, read_pixels
from lavita.video.formats import VideoError, VideoInfo
from lavita.video.writing import write_video


def fake_catalog(*lengths: int) -> Catalog:
    videos = [
        Video(VideoInfo(Path(f"{i}.mp4"), length, 16, 16, 10.0), f"{i}.mp4", None) for i, length in enumerate(lengths)
    ]
    return Catalog(Path("."), tuple(videos), (), ())


# --- scan


def test_any_tree_of_videos_and_frame_folders_is_found(tmp_path: Path) -> None:
    write_videos(tmp_path, ["b/deep/er/1.mp4", "top.mp4", "a/2.gif", "a/.hidden.mp4", ".cache/3.mp4"])
    (tmp_path / "a" / "2.gif").rename(tmp_path / "a" / "UPPER.GIF")
    (tmp_path / "a" / "notes.txt").write_text("no video")
    write_frames(tmp_path, ["frames/one"], 4, "{:03}.png")

    catalog = scan(tmp_path)

    found = {video.name: video.info.num_frames for video in catalog.videos}
    assert found == {"b/deep/er/1.mp4": 10, "top.mp4": 10, "a/UPPER.GIF": 10, "frames/one": 4}
    assert all(video.info.path == tmp_path / video.name for video in catalog.videos)
    assert all((video.info.width, video.info.height) == (20, 16) for video in catalog.videos)
    assert {video.label for video in catalog.videos} == {None}
    assert (catalog.class_names, catalog.broken) == ((), ())
    assert catalog == scan(tmp_path), "the order is always the same"


def test_images_next_to_videos_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["cats/0.mp4", "cats/1.mp4", "dogs/0.mp4"])
    write_frames(tmp_path, ["birds/0"])
    write_frames(tmp_path, ["cats"], 3)
    write_frames(tmp_path, ["."], 1, "cover.png")
    catalog = scan(tmp_path, class_folders=True)
    assert catalog.class_names == ("birds", "cats", "dogs")
    assert [video.name for video in catalog.videos] == ["birds/0", "cats/0.mp4", "cats/1.mp4", "dogs/0.mp4"]
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: left out: 4 images next to videos, such as cats/000000.jpg",
        f"{tmp_path}: 1 of 4 videos are folders of images, such as birds/0",
    ]
    assert len(scan(tmp_path, images=True).videos) == 8, "every image counts among images"
    line = f"{tmp_path}: left out: 3 videos next to images, such as cats/0.mp4"
    assert capsys.readouterr().err.splitlines() == [line]


def test_folders_that_are_no_classes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["cats/0.mp4", "dogs/0.mp4v.mp4"])
    (tmp_path / "dogs" / "0.mp4v.mp4").rename(tmp_path / "dogs" / "0.mp4v")
    assert scan(tmp_path, class_folders=True).class_names == ("cats",)
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: left out: 1 other files (.mp4v 1)",
        f"{tmp_path}: 1 folders hold no videos and are no classes, such as dogs",
    ]
    scan(tmp_path)
    assert "classes" not in capsys.readouterr().err


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    write_videos(tmp_path, ["zebra/0.mp4", "ant/1.mp4", "ant/0.mp4", "more/bee/0.mp4"])
    catalog = scan(tmp_path, class_folders=True)
    assert catalog.class_names == ("ant", "bee", "zebra")
    labels = {video.name: video.label for video in catalog.videos}
    assert labels == {"ant/0.mp4": 0, "ant/1.mp4": 0, "more/bee/0.mp4": 1, "zebra/0.mp4": 2}


def test_a_video_in_no_class_folder_is_refused(tmp_path: Path) -> None:
    write_videos(tmp_path, ["a/0.mp4", "stray.mp4"])
    with pytest.raises(ValueError, match=r"stray\.mp4: is in no class folder"):
        scan(tmp_path, class_folders=True)


def test_broken_videos_are_named_and_kept_in_the_catalog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["a/0.mp4"])
    write_broken(tmp_path / "a" / "noise.mp4")
    (tmp_path / "a" / "empty.avi").touch()

    catalog = scan(tmp_path)

    assert [video.name for video in catalog.videos] == ["a/0.mp4"]
    assert [message.split(": ")[0] for message in catalog.broken] == ["a/empty.avi", "a/noise.mp4"]
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        *(f"skipped: {message}" for message in catalog.broken),
        f"{tmp_path}: 1 of 3 videos are used, 2 are left out",
    ]
    assert captured.out == ""
    with pytest.raises(VideoError, match=r"empty\.avi: "):
        scan(tmp_path, broken="error")


def test_too_short_videos_count_as_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["long/0.mp4"], num_frames=7)
    write_videos(tmp_path, ["short/1.mp4"], num_frames=6)
    catalog = scan(tmp_path, class_folders=True, min_frames=7)
    assert [video.name for video in catalog.videos] == ["long/0.mp4"]
    assert catalog.class_names == ("long",), "a class without usable videos is left out"
    assert catalog.broken == ("short/1.mp4: has 6 frames, but a clip needs 7",)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path}: 1 of 2 videos are used, 1 are left out; 1 classes have no usable video, such as 'short'"
    )
    with pytest.raises(ValueError, match="has 6 frames, but a clip needs 7"):
        scan(tmp_path, min_frames=7, broken="error")
    with pytest.raises(ValueError, match=r"no usable videos .found only 2 broken ones, the first: "):
        scan(tmp_path, min_frames=8)


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable videos .found none.; the names of video files end in \.mp4, "):
        scan(tmp_path)
    with pytest.raises(ValueError, match="missing: no such folder"):
        scan(tmp_path / "missing")


# --- draws


def test_every_clip_is_equally_likely_the_last_start_included() -> None:
    lengths, num_frames, interval = (12, 5, 20), 3, 2
    span = clip_span(num_frames, interval)
    assert span == 5
    sampler = ClipSampler(fake_catalog(*lengths), num_frames, interval, True, seed=3)
    places = {(f"{i}.mp4", start) for i, length in enumerate(lengths) for start in range(length - span + 1)}
    assert sampler.num_clips == len(places) == 8 + 1 + 16

    draws = [sampler.draw(step, index) for step in range(1000) for index in range(6)]

    counts = Counter((draw.video.name, draw.start) for draw in draws)
    assert set(counts) == places
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    flips = sum(draw.flip for draw in draws)
    assert stats.binomtest(flips, len(draws), 0.5).pvalue > 1e-3


def test_without_flips_the_same_clips_are_drawn_unflipped() -> None:
    flipped = ClipSampler(fake_catalog(30, 40), 4, 3, True, seed=0)
    straight = ClipSampler(fake_catalog(30, 40), 4, 3, False, seed=0)
    draws = [(flipped.draw(step, 0), straight.draw(step, 0)) for step in range(200)]
    assert all((a.video, a.start) == (b.video, b.start) for a, b in draws)
    assert not any(b.flip for _, b in draws)


def test_a_draw_is_a_function_of_seed_step_and_index() -> None:
    def draws(seed: int, steps: list[int], indices: list[int]) -> dict[tuple[int, int], ClipDraw]:
        sampler = ClipSampler(fake_catalog(300, 400), 4, 3, True, seed)
        return {(step, index): sampler.draw(step, index) for step in steps for index in indices}

    forward = draws(0, [0, 1, 2, 3], [0, 1, 2])
    assert draws(0, [3, 2, 1, 0], [2, 1, 0]) == forward
    assert draws(0, [2], [1]).items() <= forward.items()
    assert draws(1, [0, 1, 2, 3], [0, 1, 2]) != forward
    assert len(set(forward.values())) > 10, "another step or index draws another clip"


def test_a_video_that_is_shorter_than_a_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.mp4: has 9 frames, but a clip needs 10 .4 at interval 3."):
        ClipSampler(fake_catalog(10, 9), 4, 3, True, seed=0)


# --- pixels


@pytest.fixture
def numbered(tmp_path: Path) -> Video:
    """A video whose frame t has the grey level 10 t at its left and 255 - 10 t at its right half."""
    levels = 10 * np.arange(20, dtype=np.uint8)
    frames = np.repeat(np.stack([levels, 255 - levels], 1), 16, axis=1)  # (F, 32)
    frames = np.broadcast_to(frames[:, None, :, None], (20, 32, 32, 3))
    write_video(tmp_path / "numbered.mp4", np.ascontiguousarray(frames), fps=10)
    return scan(tmp_path).videos[0]


@pytest.mark.parametrize(("start", "num_frames", "interval"), [(0, 4, 1), (2, 4, 3), (13, 3, 3), (19, 1, 7)])
def test_clips_have_the_exact_start_and_stride(numbered: Video, start: int, num_frames: int, interval: int) -> None:
    pixels = read_pixels(ClipDraw(numbered, start, False), num_frames, interval, resolution=16)
    assert pixels.shape == (num_frames, 16, 16, 3)
    assert pixels.dtype == np.uint8
    seen = np.round(pixels[:, :, 2:6].mean(axis=(1, 2, 3)) / 10)
    assert seen.tolist() == [start + i * interval for i in range(num_frames)]


def test_a_flipped_clip_is_the_mirrored_clip(numbered: Video) -> None:
    straight, flipped = (read_pixels(ClipDraw(numbered, 1, flip), 4, 2, resolution=16) for flip in (False, True))
    np.testing.assert_array_equal(flipped, straight[:, :, ::-1])
    assert not np.array_equal(flipped, straight)


def test_mirror() -> None:
    frames = paint(2)
    mirrored = mirror(frames)
    np.testing.assert_array_equal(mirrored, np.flip(frames, axis=2))
    np.testing.assert_array_equal(mirror(mirrored), frames)
    assert mirrored.flags.c_contiguous


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 20), (20, 16), (16, 21), (23, 16)])
def test_without_a_change_of_size_pixels_are_only_cut(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    cut = center_crop_resize(frames, 16)
    np.testing.assert_array_equal(cut, frames[:, top : top + 16, left : left + 16])


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 63), (64, 40), (10, 10), (12, 9)])
def test_resizing_equals_pillow(height: int, width: int) -> None:
    frames = paint(2, seed=5, height=height, width=width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = [
        np.asarray(
            Image.fromarray(frame).crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BICUBIC)
        )
        for frame in frames
    ]
    resized = center_crop_resize(frames, 16)
    assert resized.shape == (2, 16, 16, 3)
    assert resized.dtype == np.uint8
    # At the edges the filter reaches beyond the cut.
    difference = np.abs(resized.astype(int) - np.stack(expected))
    assert difference[:, 2:-2, 2:-2].max() <= 1
    assert difference.mean() < 4


def test_shrinking_keeps_ramps_and_does_not_alias() -> None:
    ramp = np.broadcast_to(2 * np.arange(64, dtype=np.uint8)[None, None, :, None], (1, 64, 64, 3))
    shrunk = center_crop_resize(np.ascontiguousarray(ramp), 32)
    expected = 2 * (2 * np.arange(32) + 0.5)
    np.testing.assert_allclose(shrunk[0, :, 3:-3, 0], np.tile(expected[3:-3], (32, 1)), atol=1)

    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    frames = np.repeat(checkers[None, :, :, None], 3, axis=3).astype(np.uint8)
    assert np.abs(center_crop_resize(frames, 16)[:, 2:-2, 2:-2].astype(int) - 127).max() <= 2
