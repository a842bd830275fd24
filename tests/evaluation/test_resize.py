"""The resize against Pillow's own, on float images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lavita.evaluation.features.networks import resize_bicubic


@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    [(64, 64, 299, 299), (256, 256, 299, 299), (300, 200, 97, 41), (17, 33, 17, 50), (5, 4, 1, 1), (64, 64, 64, 64)],
)
def test_equals_pillows_mode_f(height: int, width: int, new_height: int, new_width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    ours = resize_bicubic(torch.from_numpy(pixels).permute(0, 3, 1, 2), new_height, new_width)
    size = (new_width, new_height)
    for number, image in enumerate(pixels):
        for channel in range(3):
            theirs = np.asarray(Image.fromarray(image[..., channel]).resize(size, Image.Resampling.BICUBIC))
            assert theirs.dtype == np.float32
            np.testing.assert_allclose(ours[number, channel].numpy(), theirs, atol=1e-3 * 0.2)


def test_nothing_is_rounded() -> None:
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 255
    resized = resize_bicubic(edge, 16, 16)
    assert resized.min() < -1 and resized.max() > 256
    assert (resized - resized.round()).abs().max() > 0.1
