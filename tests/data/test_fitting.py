"""Frames in another shape: cropped, or padded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_data import paint

from lavita.core.sizes import AnySize, Size
from lavita.data.clips import center_crop_resize, fit_frames, pad_resize


@pytest.mark.parametrize(
    ("frame", "size", "box"),
    [
        ((20, 30), Size(10, 10), (5, 0, 25, 20)),
        ((20, 30), Size(10, 20), (0, 2, 30, 17)),
        ((30, 20), Size(10, 20), (0, 10, 20, 20)),
        ((16, 40), Size(12, 20), (6, 0, 33, 16)),
        ((20, 30), 10, (5, 0, 25, 20)),
    ],
)
def test_a_crop_is_the_largest_middle_of_the_shape(
    frame: tuple[int, int], size: AnySize, box: tuple[int, int, int, int]
) -> None:
    frames = paint(2, 3, *frame)
    wanted = Size.of(size)
    expected = [
        np.asarray(Image.fromarray(each).resize((wanted.width, wanted.height), Image.Resampling.BICUBIC, box=box))
        for each in frames
    ]
    np.testing.assert_array_equal(center_crop_resize(frames, size), expected)
    np.testing.assert_array_equal(fit_frames(frames, size, "bucket"), expected)
    left, top, right, bottom = box
    assert (right - left) / (bottom - top) == pytest.approx(wanted.width / wanted.height, rel=0.05)
    assert right - left == frame[1] or bottom - top == frame[0]


@pytest.mark.parametrize(
    ("frame", "size", "inside"),
    [
        ((20, 40), Size(16, 16), (4, 0, 12, 16)),
        ((40, 20), Size(16, 16), (0, 4, 16, 12)),
        ((10, 10), Size(10, 30), (0, 10, 10, 20)),
        ((10, 30), Size(10, 30), (0, 0, 10, 30)),
    ],
)
def test_padding_shows_the_whole_frame_between_black(
    frame: tuple[int, int], size: Size, inside: tuple[int, int, int, int]
) -> None:
    frames = np.maximum(paint(2, 3, *frame), 1)
    padded = pad_resize(frames, size)
    assert padded.shape == (2, size.height, size.width, 3) and padded.dtype == np.uint8
    top, left, bottom, right = inside
    expected = [
        np.asarray(Image.fromarray(each).resize((right - left, bottom - top), Image.Resampling.BICUBIC))
        for each in frames
    ]
    np.testing.assert_array_equal(padded[:, top:bottom, left:right], expected)
    padded = padded.copy()
    padded[:, top:bottom, left:right] = 0
    assert not padded.any()


def test_frames_of_the_size_stay_as_they_are() -> None:
    frames = paint(2, 3, 12, 20)
    assert center_crop_resize(frames, Size(12, 20)) is frames
    np.testing.assert_array_equal(pad_resize(frames, Size(12, 20)), frames)
